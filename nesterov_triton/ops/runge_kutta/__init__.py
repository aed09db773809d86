"""Linear combinations of stages, and the norm of the embedded error."""

from nesterov_triton.ops.runge_kutta.reference import combine, scaled_norms

__all__ = ["combine", "scaled_norms"]
