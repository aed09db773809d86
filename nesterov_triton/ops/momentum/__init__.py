"""The elementwise part of the momentum family's right-hand side, and of its transpose."""

from nesterov_triton.ops.momentum.reference import Gates, derivative, field_cotangent, gate_cotangents, pullback

__all__ = ["Gates", "derivative", "field_cotangent", "gate_cotangents", "pullback"]
