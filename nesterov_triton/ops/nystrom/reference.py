"""Torch reference of a step by the methods of `nesterov_triton.nystrom`: its weights, and what they make of columns.

Shapes: N is the number of elements of h; columns are [N], in the dtype that is computed in. Forces are those of
`force.Force`, with γ²/4 x in them where the momentum has no gate.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nesterov_triton import transforms
from nesterov_triton.gates import Gate
from nesterov_triton.nystrom import POINTS, Nystrom

Row = tuple[int, ...]  # where the weight of the first column is; then 1 for each column that has one, 0 for the others


class Plan(NamedTuple):
    """Where in a step's weights are those of each of its combinations. Columns are x, m, F_0, F_1, … unless said.

    Attributes:
        positions: rows of X_1 to X_s-1; with a gate over σ_x(M_0), σ_x(M_1), …, and x is added.
        paths: with a gate, rows of M_0, M_1, …; none without.
        ends: rows of m at the end, and of the error estimates of x and m there.
    """

    positions: tuple[Row, ...]
    paths: tuple[Row, ...]
    ends: tuple[Row, Row, Row]

    @property
    def gated(self) -> bool:
        """Whether the momentum has a gate."""
        return bool(self.paths)


Terms = tuple[float, ...]  # of a weight: its age, and its factors of 1, h, h², g, g h and r g; see `weights_for`


def _terms(method: Nystrom, gated: bool) -> list[list[Terms]]:
    """Of all weights, row by row. Where the momentum has a gate these are rows of M_0, M_1, … and of m at the end, over
    m and the forces; of X_1 to X_s-1, over the nodes; of the errors, over the forces. Without one: of X_1 to X_s-1 and
    of m at the end, over x, m and the forces; of the errors."""
    s, c, (y, v), rows = method.stages, method.c, method.error, list[list[Terms]]()

    def put(width: int, *weights: Terms) -> None:
        padded = [*weights, *((),) * (width - len(weights))]
        rows.append([(*weight, *(0.0,) * (7 - len(weight))) for weight in padded])

    if gated:
        assert method.gated is not None
        for d, row in zip(method.gated.d, method.gated.p, strict=True):
            put(s + 1, (d, 1.0), *((d - age, 0.0, p) for age, p in zip(c, row, strict=False)))
        put(s + 1, (1.0, 1.0), *((1.0 - age, 0.0, b) for age, b in zip(c, method.b, strict=True)))
        for row in method.gated.w:
            put(len(method.gated.d), *((0.0, 0.0, w) for w in row))
    else:
        for d, row in zip(c[1:], method.a[1:], strict=True):
            forces = ((d - age, 0.0, 0.0, a) for age, a in zip(c, row, strict=False))
            put(s + 2, (d, 1.0, 0.0, 0.0, d), (d, 0.0, d), *forces)
        both = zip(c, method.b, (*method.a[-1], 0.0), strict=True)
        kicks = ((1.0 - age, 0.0, b, 0.0, 0.0, -a) for age, b, a in both)
        put(s + 2, (1.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0), (1.0, 1.0, 0.0, 0.0, -1.0), *kicks)
    put(s, *((1.0 - age, 0.0, 0.0, of_y) for age, of_y in zip(c, y, strict=True)))
    both = zip(c, v, y, strict=True)
    put(s, *((1.0 - age, 0.0, of_v, 0.0, 0.0, 0.0 if gated else -of_y) for age, of_v, of_y in both))
    return rows


def _growth_terms(method: Nystrom, gated: bool) -> list[Terms]:
    """Of what a step of the adjoint has after its weights: e^(γ τ) at the stages, and at `POINTS` times their weights;
    τ is the time since the step began."""
    share = 1.0 if gated else 0.5  # of γ in r
    numbers = [*((c, 1.0) for c in method.c), *POINTS]
    return [(-c / share, weight, *(0.0,) * 5) for c, weight in numbers]


@functools.cache
def plan_of(method: Nystrom, gated: bool) -> Plan:
    """Where the weights of `table` are."""
    terms = _terms(method, gated)
    starts = [0, *itertools.accumulate(map(len, terms))]

    def row(k: int, missing: int) -> Row:
        """The k-th, without the first columns, so many."""
        used = [int(any(weight[1:])) for weight in terms[k]]
        until = max(j for j, one in enumerate(used) if one) + 1
        return starts[k] - missing, *(0,) * missing, *used[:until]

    n, last = len(method.gated.d) if gated and method.gated else 0, method.stages - 1
    momentum = n if gated else last
    first = n + 1 if gated else 0
    return Plan(
        tuple(row(first + i, 0) for i in range(last)), tuple(row(q, 1) for q in range(n)),
        (row(momentum, int(gated)), row(len(terms) - 2, 2), row(len(terms) - 1, 2)),
    )  # fmt: skip


def size_of(method: Nystrom, gated: bool, growth: bool = False) -> int:
    """How many weights a step has; with `growth`, one of the adjoint."""
    s, n = method.stages, len(method.gated.d) if method.gated else 0
    own = (n + 1) * (s + 1) + (s - 1) * n + 2 * s if gated else s * (s + 4)
    return own + growth * (s + len(POINTS))


# Of all devices, and never dropped: graphs read it, and while one is captured none may be made.
@functools.cache
@torch.inference_mode(False)
def table(method: Nystrom, gated: bool, device: torch.device, growth: bool = False) -> Tensor:
    """What a step's weights are made of, [7, size] float64: one column each; with `growth`, of a step of the adjoint.
    Made once, and never written to."""
    columns = [weight for row in _terms(method, gated) for weight in row]
    columns += _growth_terms(method, gated) if growth else []
    return transforms.plain(torch.tensor(columns, dtype=torch.float64, device="cpu").t().contiguous().to(device))


def weights_for(table: Tensor, h: Tensor, gamma: Tensor | float, gated: bool) -> Tensor:
    """A step's weights, [..., size] float64, for its size h and the damping γ, [...] float64 on the device of `table`.

    Each is  e^(-age g) (k_1 + k_h h + k_h² h² + k_g g + k_gh g h + k_rg r g)  with g = r h, r = γ where the momentum
    has a gate, γ/2 without.
    """
    r = torch.as_tensor(gamma if gated else gamma * 0.5, dtype=torch.float64, device=h.device).expand_as(h)
    g = r * h
    age, *factors = table.unbind(0)
    powers = (torch.ones_like(h), h, h * h, g, g * h, r * g)
    total = sum(k * power.unsqueeze(-1) for k, power in zip(factors, powers, strict=True))
    return torch.exp(-age * g.unsqueeze(-1)) * total


def rates_for(table: Tensor, h: Tensor, gamma: Tensor, gated: bool) -> Tensor:
    """The derivatives of `weights_for` with respect to γ."""
    share = 1.0 if gated else 0.5
    r = share * gamma
    g = r * h
    age, one, of_h, of_square, of_g, of_gh, of_rg = table.unbind(0)
    total = one + of_h * h + of_square * (h * h) + of_g * g + of_gh * (g * h) + of_rg * (r * g)
    return share * torch.exp(-age * g) * ((of_g + of_gh * h) * h + of_rg * (2 * g) - age * h * total)


def hermite(theta: Tensor, h: Tensor | float, gamma: Tensor | float, gated: bool) -> Tensor:
    """The weights of x and m at the fractions θ of a step, [2, ·, ...] for θ [...], float64: of x, σ_x(m), x_1,
    σ_x(m_1), m, F, m_1, F_1 where the momentum has a gate, of x, m, F, x_1, m_1, F_1 without; 1 is the step's end."""
    s = theta
    if gated:
        r = 1 - s
        values = (r * r * (1 + 2 * s), s * s * (3 - 2 * s))
        slopes = (s * r * r * h, -s * s * r * h)
        nothing = s * 0.0
        x = (values[0], slopes[0], values[1], slopes[1], nothing, nothing, nothing, nothing)
        m = (nothing, nothing, nothing, nothing, values[0] - slopes[0] * gamma, slopes[0],
             values[1] - slopes[1] * gamma, slopes[1])  # fmt: skip
        return torch.stack((torch.stack(x), torch.stack(m)))
    half = gamma * 0.5
    # Quintic Hermite in y, and its derivative.
    s2, s3, s4, s5 = s * s, s**3, s**4, s**5
    y = (
        1 - 10 * s3 + 15 * s4 - 6 * s5,
        (s - 6 * s3 + 8 * s4 - 3 * s5) * h,
        (s2 - 3 * s3 + 3 * s4 - s5) * (0.5 * h * h),
        10 * s3 - 15 * s4 + 6 * s5,
        (-4 * s3 + 7 * s4 - 3 * s5) * h,
        (s3 - 2 * s4 + s5) * (0.5 * h * h),
    )
    v = (
        (-30 * s2 + 60 * s3 - 30 * s4) / h,
        1 - 18 * s2 + 32 * s3 - 15 * s4,
        (2 * s - 9 * s2 + 12 * s3 - 5 * s4) * (0.5 * h),
        (30 * s2 - 60 * s3 + 30 * s4) / h,
        -12 * s2 + 28 * s3 - 15 * s4,
        (3 * s2 - 8 * s3 + 5 * s4) * (0.5 * h),
    )
    of_m = [b - half * a for a, b in zip(y, v, strict=True)]
    return torch.stack((_from_y(y, s, h, half), _from_y(of_m, s, h, half)))


def _from_y(weights: Sequence[Tensor], s: Tensor, h: Tensor | float, half: Tensor | float) -> Tensor:
    """Weights of (x, m, G) at both ends from those of (y, v, y'') there, with the decay since then."""
    out = []
    for (of_y, of_v, of_g), age in ((weights[:3], s), (weights[3:], s - 1)):
        decay = torch.exp(-(half * h) * age)
        out += [(of_y + of_v * half) * decay, of_v * decay, of_g * decay]
    return torch.stack(out)


def ends_of(
    gate: Callable[[Tensor], Tensor] | None,
    x: Tensor,
    m: Tensor,
    force: Tensor,
    x1: Tensor,
    m1: Tensor,
    force1: Tensor,
) -> tuple[Tensor, ...]:
    """The columns that `hermite` weighs, from both ends of a step; `gate` is σ_x, None for the identity."""
    return (x, m, force, x1, m1, force1) if gate is None else (x, gate(m), x1, gate(m1), m, force, m1, force1)


def combined(columns: Sequence[Tensor], weights: Tensor, row: Row) -> Tensor:
    """Σ_j weight_j columns_j, [N], over the row's columns."""
    first, *used = row
    total = torch.zeros_like(columns[0])
    for j, column in enumerate(columns[: len(used)]):
        if used[j]:
            total = total + weights[first + j] * column
    return total


def position(i: int, x: Tensor, m: Tensor, forces: Sequence[Tensor], weights: Tensor, plan: Plan, gate: Gate) -> Tensor:
    """X_i from x, m and F_0 … F_i-1, [N] each; `weights` in their dtype, `gate` σ_x."""
    if i == 0:
        return x
    columns, row = (x, m, *forces), plan.positions[i - 1]
    if not plan.gated:
        return combined(columns, weights, row)
    return x + combined([gate(combined(columns, weights, path)) for path in plan.paths[: len(row) - 1]], weights, row)


def linear(coefficients: Tensor, gated: bool) -> Tensor:
    """What x is multiplied by in the force, of each of the rows (κ, s, q, -γ), [s, 4]."""
    _, _, q, minus_gamma = coefficients.unbind(1)
    return q if gated else q + 0.25 * minus_gamma * minus_gamma


def force(u: Tensor, at: Tensor, i: int, coefficients: Tensor, gated: bool, gate: Gate) -> Tensor:
    """F_i from the field's output and X_i, [N] each; `coefficients` in their dtype, `gate` σ_f."""
    return coefficients[i, 1] * gate(u.reshape(-1).to(at.dtype)) + linear(coefficients, gated)[i] * at


def sweep_back(
    i: int,
    x: Tensor,
    m: Tensor,
    forces: Sequence[Tensor],
    of_positions: Sequence[Tensor],
    of_m: Tensor,
    weights: Tensor,
    plan: Plan,
    gate: Gate,
) -> tuple[list[Tensor], Tensor]:
    """The cotangents of the M_q that X_i does not look at, and of F_i, [N] each.

    Args:
        x, m: at the step's start.
        forces: F_0 … F_s-2; with a gate, else anything.
        of_positions: the cotangents of X_i+1 … X_s-1.
        of_m: that of m at the end.
        gate: σ_x.
    """
    nodes, first = list[Tensor](), len(plan.positions[i - 1]) - 1 if i else 0
    for q in range(first, len(plan.paths)):
        momentum = combined((x, m, *forces), weights, plan.paths[q])
        of_gate = transposed(of_positions, weights, plan.positions[i:], q)
        nodes.append(gate.pullback(of_gate, momentum, gate(momentum)))
    own = transposed([of_m], weights, plan.ends[:1], 2 + i)
    if plan.gated:
        return nodes, own + transposed(nodes, weights, plan.paths[first:], 2 + i)
    return nodes, own + transposed(of_positions, weights, plan.positions[i:], 2 + i)


def transposed(cotangents: Sequence[Tensor], weights: Tensor, rows: Sequence[Row], column: int) -> Tensor:
    """Σ_k weight_k cotangents_k, [N], of this column in each of the rows."""
    total = torch.zeros_like(cotangents[0])
    for cotangent, (first, *used) in zip(cotangents, rows, strict=True):
        if column < len(used) and used[column]:
            total = total + weights[first + column] * cotangent
    return total


def start_cotangents(
    nodes: Sequence[Tensor], of_positions: Sequence[Tensor], of_m: Tensor, weights: Tensor, plan: Plan
) -> list[Tensor]:
    """The cotangents of x and m at the step's start, but for what comes through the force there, [N] each.

    Args:
        nodes: those of all M_q.
        of_positions: those of X_1 … X_s-1.
        of_m: that of m at the end.
    """
    of_x, of_start = (transposed([of_m], weights, plan.ends[:1], column) for column in (0, 1))
    if plan.gated:
        for of_position in of_positions:
            of_x = of_x + of_position
        return [of_x, of_start + transposed(nodes, weights, plan.paths, 1)]
    given = (transposed(of_positions, weights, plan.positions, column) for column in (0, 1))
    return [own + through for own, through in zip((of_x, of_start), given, strict=True)]


def adjoint_path(
    x: Tensor,
    m: Tensor,
    forces: Sequence[Tensor],
    adjoint: Tensor,
    through: Sequence[Tensor],
    coefficients: Tensor,
    weights: Tensor,
    plan: Plan,
    gate: Gate,
) -> tuple[list[Tensor], list[Tensor]]:
    """The adjoint's positions W_0 … W_k and forces P_0 … P_k-1 for k known v, [N] each; of all s, W_0 … W_s-1. With
    w = e^(-γ τ) a these are w_m and  P_i = e^(-γ τ_i) κ v_i + q W_i  (see `gradients.nystrom_adjoint`).

    Args:
        x, m: at the step's start.
        forces: with a gate F_0 … F_k-1, else anything.
        adjoint: (a_x, a_m) at the step's start, [2 N].
        through: v_0 … v_k-1, [N] each: what came back through the field for the cotangents a_m.
        weights: the step's, with its growth.
        gate: σ_x.
    """
    a_x, a_m = adjoint.view(2, -1)
    growth, factors = growth_of(weights, len(plan.positions) + 1), linear(coefficients, plan.gated)
    positions, pulled, nodes = [a_m], list[Tensor](), list[Tensor]()
    for j, v in enumerate(through):
        pulled.append(coefficients[j, 0] / growth[j] * v + factors[j] * positions[j])
        if j == len(plan.positions):
            break
        columns, row = (a_m, -a_x, *pulled), plan.positions[j]
        if plan.gated:
            for path in plan.paths[len(nodes) : len(row) - 1]:
                momentum = combined((x, m, *forces), weights, path)
                nodes.append(gate.pullback(combined(columns, weights, path), momentum, gate(momentum)))
            positions.append(a_m + combined(nodes, weights, row))
        else:
            positions.append(combined(columns, weights, row))
    return positions, pulled


def growth_of(weights: Tensor, stages: int) -> Tensor:
    """Of the weights of a step of the adjoint those that are its growth, [stages + 3]."""
    return weights[len(weights) - stages - len(POINTS) :]


def step_weights(
    dt: Tensor, coefficients: Tensor, method: Nystrom, gated: bool, rates: bool = False, growth: bool = False
) -> Tensor:
    """See `ops.nystrom.step_weights`."""
    run = rates_for if rates else weights_for
    return run(table(method, gated, dt.device, growth), dt[0], -coefficients[0, 3], gated)


def dense_weights(theta: Tensor, dt: Tensor, coefficients: Tensor, gated: bool) -> Tensor:
    """See `ops.nystrom.dense_weights`."""
    return hermite(theta, dt[0], -coefficients[0, 3], gated).permute(2, 0, 1).contiguous()
