"""One step of the methods of `nystrom` on rows: its forces, its end, its error, dense output.

As `stepping.nystrom`, written out: y = e^(γ t / 2) x with its velocity v where there is no gate, e^(γ t) m with one,
each counted from the start of the step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.func import vjp

from nesterov_triton.compiled.system import Moment
from nesterov_triton.nystrom import POINTS, Nystrom

Rows = Sequence[Tensor]


class Parts(NamedTuple):
    """What a momentum system is made of, where its field sees the position alone.

    Attributes:
        force: s σ_f(f(t, κ x)) + q x; None where `back` is there.
        gamma: 0-d float64.
        gate: σ_x; None for the identity.
        back: of the adjoint of one, whose rows are (x, m, a_x, a_m): from x and a_m the force F, (∂F/∂x)ᵀ a_m, and the
            integrands of the quadratures.
        of_gamma: which of these is γ's; the force does not know it.
    """

    force: Callable[[Moment, Tensor], Tensor] | None
    gamma: Tensor | float
    gate: Callable[[Tensor], Tensor] | None
    back: Callable[[Moment, Tensor, Tensor], list[Tensor]] | None = None
    of_gamma: int | None = None

    def forces_of(self, rows: Rows, slope: Rows) -> list[Tensor]:
        """A first stage, from the right-hand side there."""
        force: Tensor = slope[1] + _cast(self.gamma, rows[1]) * rows[1]
        return [force] if self.back is None else [force, -slope[2], *slope[4:]]


def attempt(
    method: Nystrom, parts: Parts, moments: Sequence[Moment], dt: Tensor, rows: Rows, first: Tensor | None
) -> tuple[list[Rows], Rows, Rows]:
    """The s forces of a step of size `dt`, 0-d float64, each as rows; the state at its end; the embedded error.

    Args:
        moments: of the stages; without the first one's where its force, `first`, is known.
    """
    x, m = rows
    gated, h, half = method.gated, _cast(dt, x), _cast(parts.gamma, x) * 0.5
    assert parts.force is not None
    if first is None:
        first, moments = parts.force(moments[0], x), moments[1:]
    forces = [first]

    def grown(part: float) -> Tensor:
        return _growth(parts.gamma, part, dt, x)

    if parts.gate is None:
        v, y, position = m + half * x, x, x
        driven = [first + half * half * x]  # y''
        for i, moment in enumerate(moments, 1):
            late = grown(0.5 * method.c[i])
            y = x + (method.c[i] * h) * v + (h * h) * _sum(driven, method.a[i])
            position = y / late
            forces.append(parts.force(moment, position))
            driven.append((forces[-1] + half * half * position) * late)
        v1, end = v + h * _sum(driven, method.b), grown(0.5)
        of_y, of_v = ((h * h) * _sum(driven, method.error[0]) / end, h * _sum(driven, method.error[1]) / end)
        return [[f] for f in forces], [position, v1 / end - half * position], [of_y, of_v - half * of_y]
    assert gated is not None
    gates: list[Tensor] = []
    driven, position, end = [first], x, grown(1.0)
    for i, moment in enumerate(moments, 1):
        row = gated.w[i - 1]
        for q in range(len(gates), len(row)):
            gates.append(parts.gate((m + h * _sum(driven, gated.p[q])) / grown(gated.d[q])))
        position = x + h * _sum(gates, row)
        forces.append(parts.force(moment, position))
        driven.append(forces[-1] * grown(method.c[i]))
    of_y, of_v = ((h * h) * _sum(driven, method.error[0]) / end, h * _sum(driven, method.error[1]) / end)
    return [[f] for f in forces], [position, (m + h * _sum(driven, method.b)) / end], [of_y, of_v]


def adjoint_attempt(
    method: Nystrom, parts: Parts, moments: Sequence[Moment], dt: Tensor, rows: Rows, first: Rows | None
) -> tuple[list[Rows], Rows, Rows]:
    """As `attempt`, for the adjoint, which is a system of twice the size: see `gradients.nystrom_adjoint`."""
    x, m, a_x, a_m = rows
    back, gate_x = parts.back, cast(Any, parts.gate)
    assert back is not None
    stages: list[Rows] = [] if first is None else [first]

    def growth(part: float) -> Tensor:
        return _growth(parts.gamma, part, dt, x)

    def force(moment: Moment, positions: Tensor) -> Tensor:
        late = growth(method.c[len(stages)])  # forces come one after the other
        stages.append(back(moment, positions[0], positions[1] * late))
        value, of_x, *_ = stages[-1]
        return torch.stack((value, of_x / late))

    def gate(momenta: Tensor) -> Tensor:
        value, pull, *_ = vjp(gate_x, momenta[0])
        return torch.stack((value, *pull(momenta[1])))

    def outwards(positions: Tensor, momenta: Tensor) -> list[Tensor]:
        return [positions[0], momenta[0], -growth(1.0) * momenta[1], growth(1.0) * positions[1]]

    twice = Parts(force, parts.gamma, None if gate_x is None else gate)
    start = [torch.stack((x, a_m)), torch.stack((m, -a_x))]
    known = None if first is None else torch.stack(tuple(first[:2]))
    forces, new, error = attempt(method, twice, moments, dt, start, known)
    if parts.of_gamma is not None:
        points = torch.stack([torch.full_like(dt, point) for point, _ in POINTS])
        positions, momenta = dense_output(twice, dt, start, new, forces[0][0], forces[-1][0], points)
        products = [growth(point) * (positions[i, 1] * momenta[i, 0]).sum() for i, (point, _) in enumerate(POINTS)]
        mean, k = _sum(products, [weight for _, weight in POINTS]).to(torch.float64), 2 + parts.of_gamma
        stages = [[*stage[:k], mean, *stage[k + 1 :]] for stage in stages]
    return stages, outwards(*new), outwards(*error)


def dense_output(
    parts: Parts, dt: Tensor, rows: Rows, new: Rows, first: Tensor, last: Tensor, theta: Tensor
) -> list[Tensor]:
    """The states at the fractions `theta`, [n] float64, of the step: [n, *shape] each. As `Layout.dense`."""
    (x0, m0), (x1, m1) = rows, new
    shape = (-1,) + (1,) * x0.ndim
    h, s = _cast(dt, x0), _cast(theta, x0).view(shape)
    r = 1 - s
    if parts.gate is not None:
        values, slopes = (r * r * (1 + 2 * s), s * s * (3 - 2 * s)), (s * r * r * h, -s * s * r * h)
        gamma = _cast(parts.gamma, x0)
        x = values[0] * x0 + slopes[0] * parts.gate(m0) + values[1] * x1 + slopes[1] * parts.gate(m1)
        m = values[0] * m0 + slopes[0] * (first - gamma * m0) + values[1] * m1 + slopes[1] * (last - gamma * m1)
        return [x, m]
    half = _cast(parts.gamma, x0) * 0.5
    end, here = _growth(parts.gamma, 0.5, dt, x0), torch.exp(half * h * s)
    y = (x0, x1 * end)
    v = (m0 + half * x0, (m1 + half * x1) * end)
    g = (first + half * half * x0, (last + half * half * x1) * end)
    s2, s3, s4, s5 = s * s, s**3, s**4, s**5
    at = (
        (1 - 10 * s3 + 15 * s4 - 6 * s5) * y[0]
        + (s - 6 * s3 + 8 * s4 - 3 * s5) * h * v[0]
        + (s2 - 3 * s3 + 3 * s4 - s5) * (0.5 * h * h) * g[0]
        + (10 * s3 - 15 * s4 + 6 * s5) * y[1]
        + (-4 * s3 + 7 * s4 - 3 * s5) * h * v[1]
        + (s3 - 2 * s4 + s5) * (0.5 * h * h) * g[1]
    )
    rate = (
        (30 * s2 - 60 * s3 + 30 * s4) / h * (y[1] - y[0])
        + (1 - 18 * s2 + 32 * s3 - 15 * s4) * v[0]
        + (2 * s - 9 * s2 + 12 * s3 - 5 * s4) * (0.5 * h) * g[0]
        + (-12 * s2 + 28 * s3 - 15 * s4) * v[1]
        + (3 * s2 - 8 * s3 + 5 * s4) * (0.5 * h) * g[1]
    )
    return [at / here, (rate - half * at) / here]


def _growth(gamma: Tensor | float, part: float, dt: Tensor, like: Tensor) -> Tensor:
    """e^(γ part dt), 0-d in the dtype of `like`."""
    return torch.exp(gamma * part * dt).to(like.dtype)


def _cast(x: Tensor | float, like: Tensor) -> Any:
    return x.to(like.dtype) if isinstance(x, Tensor) else x


def _sum(terms: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Σ weights · terms; some weight is not 0."""
    used = [w * x for w, x in zip(weights, terms, strict=False) if w != 0]
    total = used[0]
    for term in used[1:]:
        total = total + term
    return total
