"""The first step size: Hairer, Nørsett, Wanner, Solving ODEs I, algorithm II.4."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nesterov_triton import transforms
from nesterov_triton.ops import runge_kutta
from nesterov_triton.stepping.stepper import Stepper


def initial_step(stepper: Stepper, t: float, end: float, z: Tensor) -> float:
    """A first step size > 0, which may be longer than the interval: what was planned says more of the next one. NaN
    where the right-hand side is not finite at the start.

    Costs one evaluation of the right-hand side beyond the one that the first step needs anyway. The trial point stays
    inside the interval.
    """
    first = stepper.first_derivative(t, z)  # part of the solution, so outside no_grad
    # Detached, for forward-mode AD: no_grad does not keep tangents out.
    z, first = z.detach(), first.detach()
    with torch.no_grad():
        d0, d1 = _norms(stepper, torch.stack((z, first)), z)
        known = math.isfinite(d0) and math.isfinite(d1)
        # Without an absolute tolerance a slope away from 0 is infinitely large, and no reason to give up.
        if not known and not bool(torch.isfinite(first).all()):
            return math.nan
        span = abs(end - t)
        guess = 1e-6 if not known or d0 < 1e-5 or d1 < 1e-5 else 0.01 * d0 / d1
        h0 = min(guess, span)
        signed = math.copysign(h0, end - t)
        second = stepper.probe(t + signed if h0 < span else end, torch.add(z, first, alpha=signed))
        (d2,) = _norms(stepper, (second.detach() - first).unsqueeze(0), z)
        d2 /= h0
    slope = max(d1, d2)
    if not math.isfinite(slope) or not math.isfinite(d2):
        return h0
    h1 = max(1e-6, h0 * 1e-3) if slope <= 1e-15 else (0.01 / slope) ** (1 / (stepper.tableau.error_order + 1))
    return min(100 * guess, h1)


def _norms(stepper: Stepper, values: Tensor, z: Tensor) -> list[float]:
    """Norms of `values`, [n, D], relative to the tolerance at z."""
    tolerance = stepper.tolerance
    assert tolerance is not None
    transforms.check_readable(values)
    if tolerance.measure is not None:
        return [float(tolerance.measure(v, z, z)) for v in values]
    squares = runge_kutta.scaled_squares(values, z.abs(), tolerance.rtol, tolerance.atol)
    return [math.sqrt(x / max(z.numel(), 1)) for x in squares.tolist()]
