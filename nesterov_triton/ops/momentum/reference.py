"""Torch reference of the momentum right-hand side.

Shapes: N is the number of elements of h; z = (x, m) is [2, N], everything else [N] unless said otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nesterov_triton.gates import Gate


def force(u: Tensor, sign: float, drive: Tensor | None, gate: Gate, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """σ_f(u), and s σ_f(u) up to the constant sign: what enters m' of the field's output u.

    Args:
        sign: s, where it is constant; it is left to `derivative`, which applies it for nothing.
        drive: s(t), 0-d, where it depends on the time; then `sign` is part of it.
    """
    gated = gate(u, out=out) if out is not None and gate.bound < float("inf") else gate(u)
    return gated, gated if drive is None else gated * drive


def derivative(
    pushed: Tensor,
    z: Tensor,
    m: Tensor,
    sign: float,
    linear: Tensor | None,
    gate: Gate,
    out: Sequence[Tensor] | None = None,
) -> Sequence[Tensor]:
    """(x', m') = (σ_x(m), sign · pushed + q x - γ m).

    Args:
        pushed: from `force`.
        z: (x, m), [2, N].
        m: its second row.
        linear: (q, -γ), shape [2]; None where both are 0.
        gate: σ_x.
        out: two tensors [N] to write to.
    """
    x_out, m_out = (None, None) if out is None else out
    dx = gate(m, out=x_out)
    if linear is None:
        dm = torch.mul(pushed, sign, out=m_out)
    else:  # one matrix-vector product reads x and m once, and takes γ and ξ as tensors
        dm = torch.addmv(pushed, z.t(), linear, beta=sign, out=m_out)
    return dx, dm


def pullback(
    cotangent: Sequence[Tensor],
    through_field: Tensor | None,
    m: Tensor,
    dx: Tensor,
    scale: Tensor | None,
    linear: Tensor | None,
    gate: Gate,
    out: Sequence[Tensor],
) -> None:
    """Transpose of the right-hand side's derivative: (κ v + q c_m, σ_x'(m) c_x - γ c_m) into `out`.

    Args:
        cotangent: (c_x, c_m), the cotangents of x' and m'.
        through_field: v, the cotangent of h that came back through the field; None where f does not depend on h.
        m, dx: the momentum and x' = σ_x(m).
        scale: κ, 0-d; None for 1.
        linear: (q, -γ), shape [2]; None where both are 0.
        gate: σ_x.
        out: two tensors [N].
    """
    c_x, c_m = cotangent
    if through_field is None:
        out[0].zero_()
    elif scale is None:
        out[0].copy_(through_field)
    else:
        torch.mul(through_field, scale, out=out[0])
    gate.pullback(c_x, m, dx, out=out[1])
    if linear is not None:
        q, minus_gamma = linear.unbind(0)
        out[0].addcmul_(c_m, q)
        out[1].addcmul_(c_m, minus_gamma)
