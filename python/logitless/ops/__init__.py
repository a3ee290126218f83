"""Differentiable operations on logits descriptions."""
