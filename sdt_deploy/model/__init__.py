"""The reference model in PyTorch: the oracle, its checkpoints and conversion."""
