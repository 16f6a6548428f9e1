"""Sparse against dense, measured."""
