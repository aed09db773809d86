"""Torch reference of the momentum right-hand side.

Shapes: N is the number of elements of h. A `Row` has 2 N elements, the part of x and the part of m; everything else is
[N] unless said otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nesterov_triton.gates import Gate, Identity
from nesterov_triton.ops.rows import Row


class Gates(NamedTuple):
    """σ_x and σ_f; joint where they are one gate known by its values: then both are computed in one pass over a row."""

    x: Gate
    f: Gate
    joint: bool

    @classmethod
    def of(cls, x: Gate, f: Gate) -> Gates:
        """The pair."""
        return cls(x, f, x == f and x.from_value and not isinstance(x, Identity))


def derivative(
    m: Tensor,
    u: Tensor,
    columns: Tensor,
    sign: float,
    drive: Tensor | None,
    linear: Tensor | None,
    gates: Gates,
    out: Row | None = None,
    values: Row | None = None,
) -> Sequence[Tensor]:
    """(x', m') = (σ_x(m), s σ_f(u) + q x - γ m).

    Args:
        m: the momentum.
        u: the field's output.
        columns: (x, m) as columns, [N, 2].
        sign: s where it is constant.
        drive: s where it depends on the time, 0-d, sign included; then `sign` is not looked at.
        linear: (q, -γ), [2]; None where both are 0.
        out: where to write the result.
        values: where to keep σ_x(m) and σ_f(u) for the transpose; needs `out`.
    """
    if out is None:
        if gates.joint:
            dx, s = gates.x(torch.cat((m, u))).view(2, -1).unbind(0)
        else:
            dx, s = gates.x(m), gates.f(u)
        return dx, _momentum_part(s, columns, sign, drive, linear, None)
    kept = out if values is None else values
    if gates.joint:
        gates.x.both(m, u, kept)
        if values is not None:
            out.parts[0].copy_(values.parts[0])
        s = kept.parts[1]
    else:
        gates.x(m, out=out.parts[0])
        s = u if isinstance(gates.f, Identity) else gates.f(u, out=kept.parts[1])
    _momentum_part(s, columns, sign, drive, linear, out.parts[1])
    return out.parts


def _momentum_part(
    s: Tensor, columns: Tensor, sign: float, drive: Tensor | None, linear: Tensor | None, out: Tensor | None
) -> Tensor:
    """sign · s + q x - γ m, or with the drive for the sign."""
    if drive is not None:
        s, sign = s * drive, 1.0
    if linear is None:
        return torch.mul(s, sign, out=out)
    # One matrix-vector product reads x and m once, and takes γ and ξ as tensors.
    return torch.addmv(s, columns, linear, beta=sign, out=out)


def gate_cotangents(c: Row, m: Tensor, u: Tensor, slope: Row, values: Row, gates: Gates) -> Sequence[Tensor]:
    """(σ_x'(m) c_x, σ_f'(u) c_m), for the cotangent c of (x', m').

    Args:
        slope, values: what `derivative` wrote to `out` and `values`; the latter may be overwritten.
    """
    if gates.joint:
        return gates.x.both_pullback(c, values)
    return gates.x.pullback(c.parts[0], m, slope.parts[0]), gates.f.pullback(c.parts[1], u, values.parts[1])


def field_cotangent(through_gate: Tensor, sign: float, drive: Tensor | None) -> Tensor:
    """The cotangent s σ_f'(u) c_m to hand to the field."""
    if drive is not None:
        return through_gate * drive
    return through_gate if sign == 1.0 else torch.neg(through_gate)


def pullback(
    c: Row,
    through_gate: Tensor,
    through_field: Tensor | None,
    scale: Tensor | None,
    linear: Tensor | None,
    out: Row,
) -> None:
    """Transpose of the right-hand side's derivative: (κ v + q c_m, σ_x'(m) c_x - γ c_m) into `out`.

    Args:
        c: the cotangent of (x', m').
        through_gate: σ_x'(m) c_x.
        through_field: v, the cotangent of h that came back through the field; None where f does not depend on h.
        scale: κ, 0-d; None for 1.
        linear: (q, -γ), [2]; None where both are 0.
    """
    c_m = c.parts[1]
    of_x, of_m = out.parts
    if through_field is None:
        of_x.zero_()
    elif scale is None:
        of_x.copy_(through_field)
    else:
        torch.mul(through_field, scale, out=of_x)
    if linear is None:
        of_m.copy_(through_gate)
    else:
        q, minus_gamma = linear.unbind(0)
        of_x.addcmul_(c_m, q)
        torch.addcmul(through_gate, c_m, minus_gamma, out=of_m)
