"""Linear combinations of stages, and the norm of the embedded error."""

from nesterov_triton.ops.runge_kutta.reference import combine, scaled_squares

__all__ = ["combine", "scaled_squares"]
