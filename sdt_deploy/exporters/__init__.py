"""From a model to a bundle of ONNX graphs."""
