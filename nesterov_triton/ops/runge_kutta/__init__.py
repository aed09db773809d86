"""Linear combinations of stages, and the norm of the embedded error."""

from nesterov_triton.ops.runge_kutta.reference import combine, finished_norm, scaled_squares, weighted

__all__ = ["combine", "finished_norm", "scaled_squares", "weighted"]
