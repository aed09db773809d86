"""One step of the methods of `nystrom` on rows: its forces, its end, its error, dense output.

As `stepping.nystrom`, written out: y = e^(γ t / 2) x with its velocity v where there is no gate, e^(γ t) m with one,
each counted from the start of the step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

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
    """As `attempt`, for the adjoint: see `gradients.nystrom_adjoint`."""
    x, m, a_x, a_m = rows
    gated, back, gate = method.gated, parts.back, parts.gate
    assert back is not None
    gamma, h = _cast(parts.gamma, x), _cast(dt, x)
    half = gamma * 0.5
    if first is None:
        first, moments = back(moments[0], x, a_m), moments[1:]
    stages: list[Rows] = [first]

    def grown(part: float) -> Tensor:
        return _growth(parts.gamma, part, dt, x)

    position, cotangent, end = x, a_m, grown(1.0 if gate is not None else 0.5)
    if gate is None:
        # Two systems, of damping γ and -γ, that share their forces.
        mu = gamma * a_m - a_x
        v, w = m + half * x, mu - half * a_m
        driven, driving = [first[0] + half * half * x], [first[1] + half * half * a_m]
        for i, moment in enumerate(moments, 1):
            late, c = grown(0.5 * method.c[i]), method.c[i] * h
            position = (x + c * v + (h * h) * _sum(driven, method.a[i])) / late
            cotangent = (a_m + c * w + (h * h) * _sum(driving, method.a[i])) * late
            stages.append(back(moment, position, cotangent))
            driven.append((stages[-1][0] + half * half * position) * late)
            driving.append((stages[-1][1] + half * half * cotangent) / late)
        v1, w1 = v + h * _sum(driven, method.b), w + h * _sum(driving, method.b)
        m1, a_x1 = v1 / end - half * position, half * cotangent - w1 * end
        of_y, of_u = ((h * h) * _sum(x, method.error[0]) for x in (driven, driving))
        of_v, of_w = (h * _sum(x, method.error[1]) for x in (driven, driving))
        error = [of_y / end, (of_v - half * of_y) / end, (half * of_u - of_w) * end, of_u * end]
    else:
        assert gated is not None
        gates: list[Tensor] = []
        pulls: list[Tensor] = []
        driven, driving = [first[0]], [-first[1]]
        for i, moment in enumerate(moments, 1):
            row, late = gated.w[i - 1], grown(method.c[i])
            for q in range(len(gates), len(row)):
                age = grown(gated.d[q])
                value, pull, *_ = vjp(gate, (m + h * _sum(driven, gated.p[q])) / age)
                (through,) = pull(a_x + h * _sum(driving, gated.p[q]))
                gates.append(value)
                pulls.append(through / age)
            position = x + h * _sum(gates, row)
            cotangent = (a_m - h * _sum(pulls, row)) * late
            stages.append(back(moment, position, cotangent))
            driven.append(stages[-1][0] * late)
            driving.append(-stages[-1][1])
        m1, a_x1 = (m + h * _sum(driven, method.b)) / end, a_x + h * _sum(driving, method.b)
        early = [x / grown(c) for x, c in zip(driving, method.c, strict=True)]
        of_y, of_v = (h * h) * _sum(driven, method.error[0]) / end, h * _sum(driven, method.error[1]) / end
        error = [of_y, of_v, h * _sum(driving, method.error[1]), (h * h) * _sum(early, method.error[0]) * end]
    new = [position, m1, a_x1, cotangent]
    if parts.of_gamma is not None:
        mean, k = _mean_of_gamma(parts, dt, rows, new, stages[0], stages[-1]), 2 + parts.of_gamma
        stages = [[*stage[:k], mean, *stage[k + 1 :]] for stage in stages]
    return stages, new, error


def _mean_of_gamma(parts: Parts, dt: Tensor, rows: Rows, new: Rows, first: Rows, last: Rows) -> Tensor:
    """The mean of a_m · m over a step, from its dense output."""
    points = torch.stack([torch.full_like(dt, p) for p, _ in POINTS])
    momenta = dense_output(parts._replace(back=None), dt, rows[:2], new[:2], first[0], last[0], points)[1]
    (_, m0, a_x0, a0), (_, m1, a_x1, a1) = rows, new
    gamma = _cast(parts.gamma, m0)
    if parts.gate is None:
        pairs, other = ((a0, gamma * a0 - a_x0), (a1, gamma * a1 - a_x1)), Parts(None, -parts.gamma, None)
        cotangents = dense_output(other, dt, *pairs, first[1], last[1], points)[0]
    else:
        through = [vjp(parts.gate, m)[1](a)[0] for m, a in ((m0, a_x0), (m1, a_x1))]
        pairs = (a0, gamma * a0 - through[0]), (a1, gamma * a1 - through[1])
        cotangents = dense_output(parts._replace(gate=torch.clone), dt, *pairs, a0, a1, points)[0]
    products = [(a * m).sum() for a, m in zip(cotangents.unbind(0), momenta.unbind(0), strict=True)]
    return _sum(products, [w for _, w in POINTS]).to(torch.float64)


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
