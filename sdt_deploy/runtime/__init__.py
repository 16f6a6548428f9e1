"""From a bundle to results; needs neither torch nor onnx."""
