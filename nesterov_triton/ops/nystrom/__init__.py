"""A step by the methods of `nesterov_triton.nystrom`: its weights, made on a device, and what they make of columns."""

from __future__ import annotations

from torch import Tensor

from nesterov_triton.nystrom import Nystrom
from nesterov_triton.ops import dispatch
from nesterov_triton.ops.nystrom.reference import size_of

__all__ = ["check_weights", "dense_weights", "step_weights"]


def step_weights(
    dt: Tensor, coefficients: Tensor, method: Nystrom, gated: bool, rates: bool = False, growth: bool = False
) -> Tensor:
    """A step's weights, [size] float64, on the device; see `reference.table`. For loops there, which no tracer sees.

    Args:
        dt: the step size, [1] float64.
        coefficients: rows (κ, s, q, -γ), of which the first is looked at for γ, [·, 4] float64.
        method: the method.
        gated: whether the momentum has a gate.
        rates: their derivatives with respect to γ instead.
        growth: with what a step of the adjoint has beside them, e^(γ τ) at its stages and, times their weights, at
            `nystrom.POINTS`.
    """
    found: Tensor = dispatch.implementation("nystrom.step_weights", dt)(dt, coefficients, method, gated, rates, growth)
    return found


def dense_weights(theta: Tensor, dt: Tensor, coefficients: Tensor, gated: bool) -> Tensor:
    """The weights for the states at the fractions `theta`, [T] float64, of a step, [T, 2, ·] float64, on the device;
    see `reference.hermite`. The others as `step_weights`."""
    found: Tensor = dispatch.implementation("nystrom.dense_weights", dt)(theta, dt, coefficients, gated)
    return found


def check_weights(like: Tensor, weights: Tensor, method: Nystrom, gated: bool, growth: bool = False) -> None:
    """Raise ValueError unless these are weights of a step, or with `growth` of one of the adjoint, as
    `dispatch.check_scalars`."""
    dispatch.check_scalars(like, weights=weights)
    size = size_of(method, gated, growth)
    if weights.shape != (size,):
        raise ValueError(f"weights must have shape ({size},), got {tuple(weights.shape)}")
