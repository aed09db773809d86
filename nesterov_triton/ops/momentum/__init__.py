"""The elementwise part of the momentum family's right-hand side, and of its transpose."""

from nesterov_triton.ops.momentum.reference import derivative, force, pullback

__all__ = ["derivative", "force", "pullback"]
