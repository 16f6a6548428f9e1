"""Distillation: a dense checkpoint becomes a depth-sparse one that follows it."""
