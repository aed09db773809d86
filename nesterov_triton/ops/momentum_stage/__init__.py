"""Stages of a momentum system: from the field's outputs to its next arguments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from nesterov_triton import tableaus
from nesterov_triton.gates import Gate, kernel_form, of_form
from nesterov_triton.ops import dispatch
from nesterov_triton.ops.momentum_stage import reference
from nesterov_triton.ops.momentum_stage.reference import Stage
from nesterov_triton.tableaus import Tableau

__all__ = ["Stage", "momentum_stage"]


def momentum_stage(
    outputs: Sequence[Tensor],
    z: Tensor,
    slopes: Sequence[Tensor],
    coefficients: Tensor,
    dt: Tensor,
    tableau: Tableau,
    gate_x: Gate,
    gate_f: Gate,
    ahead: int = 1,
    momentum: bool = False,
) -> Stage:
    """dm_i = s σ_f(u_i) + q x_i - γ m_i, and from it the next stages' h = κ (x_n + dt Σ_j a_j σ_x(m_j)).

    x_{i+1} depends on m_0 … m_i alone, so what gives the features of the next stage gives those of the one after it too
    (`ahead` = 2), and the field's two outputs come back together. A step of seven stages from a known slope:

        h1, h2 = momentum_stage([], z, [dm0], ..., ahead=2).h
        (h3, h4), (dm1, dm2), _ = momentum_stage([u1, u2], z, [dm0], ..., ahead=2)
        (h5, h6), (dm3, dm4), _ = momentum_stage([u3, u4], z, [dm0, dm1, dm2], ..., ahead=2)
        z_new, (dm6,), error = momentum_finish([u5, u6], z, [dm0, dm1, dm2, dm3, dm4], ...)

    A field that sees m takes one stage after the other: `ahead` = 1 and `momentum`. So does a field that overwrites its
    last output in the next evaluation.

    Not differentiable: under autograd it raises in the backward pass. On a CUDA device a Triton kernel, one launch;
    elsewhere, and for gates that have no Triton form, the torch reference.

    Args:
        outputs: the field's outputs at the stages after those of `slopes`, N elements each; none where the slopes so
            far are all known, or where the first stages' features are wanted.
        z: (x_n, m_n), [2 N], float16, bfloat16, float32 or float64; other rows have its dtype. Contiguous, like all
            rows.
        slopes: dm_0, dm_1, …, N elements each.
        coefficients: rows (κ, s, q, -γ), one for each stage up to the last one wanted, [stages, 4] float32 or float64.
        dt: the step size, one element, float32 or float64.
        tableau: the method; its extra stages for dense output follow upon the others.
        gate_x, gate_f: σ_x and σ_f.
        ahead: how many stages' features are wanted: 1 or 2, or 0 where only the slopes are.
        momentum: whether the next stage's m is wanted too.

    Raises:
        ValueError: sizes, dtypes, devices or the number of stages don't fit, or a row is not contiguous.
    """
    n = z.numel() // 2
    following = len(slopes) + len(outputs)
    if ahead not in (0, 1, 2) or ahead < momentum or following > len(tableau.all_a) - ahead:
        raise ValueError(
            f"{ahead} stages after the first {following} of {tableau.name}, which has {len(tableau.all_a)}"
        )
    dispatch.check_rows(z, 2 * n, z=z)
    dispatch.check_rows(z, n, outputs=outputs, slopes=slopes)
    dispatch.check_scalars(z, dt=dt)
    dispatch.check_coefficients(z, coefficients, following + ahead)
    form_x, form_f = kernel_form(gate_x), kernel_form(gate_f)
    if form_x is None or form_f is None:
        return reference.momentum_stage(outputs, z, slopes, coefficients, dt, tableau, gate_x, gate_f, ahead, momentum)
    if dispatch.as_operator():
        rows = _operator(
            outputs, z, slopes, coefficients, dt, dispatch.method_name(tableau), *form_x, *form_f, ahead, momentum
        )
        return Stage(rows[:ahead], rows[ahead : ahead + len(outputs)], rows[-1] if momentum else None)
    run: Callable[..., Stage] = dispatch.implementation("momentum_stage", z)
    return run(outputs, z, slopes, coefficients, dt, tableau, gate_x, gate_f, ahead, momentum)


def _run(outputs: Sequence[Tensor], z: Tensor, *args: Any) -> list[Tensor]:
    *scalars, method, gate_x, bound_x, gate_f, bound_f, ahead, momentum = args
    slopes, coefficients, dt = scalars
    gates = of_form(gate_x, bound_x), of_form(gate_f, bound_f)
    run = dispatch.implementation("momentum_stage", z)
    h, new, m = run(outputs, z, slopes, coefficients, dt, tableaus.get(method), *gates, ahead, momentum)
    return [*h, *new, *([] if m is None else [m])]


def _fake(outputs: Sequence[Tensor], z: Tensor, *args: Any) -> list[Tensor]:
    *_, ahead, momentum = args
    return [z.new_empty(z.numel() // 2) for _ in range(ahead + len(outputs) + momentum)]


# The rows of `Stage`, one after the other.
_operator = dispatch.operator(
    "momentum_stage",
    "(Tensor[] outputs, Tensor z, Tensor[] slopes, Tensor coefficients, Tensor dt, str method, str gate_x, "
    "float bound_x, str gate_f, float bound_f, int ahead, bool momentum) -> Tensor[]",
    _run,
    _fake,
)
