"""Stages of the continuous adjoint of a momentum system, which goes with the system itself: from the field's outputs to
its next arguments and to the cotangents that go back through it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from nesterov_triton import tableaus
from nesterov_triton.gates import Gate, kernel_form, of_form
from nesterov_triton.ops import dispatch
from nesterov_triton.ops.momentum_adjoint_stage import reference
from nesterov_triton.ops.momentum_adjoint_stage.reference import AdjointStage
from nesterov_triton.tableaus import Tableau

__all__ = ["AdjointStage", "momentum_adjoint_stage"]


def momentum_adjoint_stage(
    outputs: Sequence[Tensor],
    z: Tensor,
    slopes: Sequence[Tensor],
    adjoint: Tensor,
    through: Sequence[Tensor],
    coefficients: Tensor,
    dt: Tensor,
    tableau: Tableau,
    gate_x: Gate,
    gate_f: Gate,
    ahead: int = 1,
    momentum: bool = False,
    through_m: Sequence[Tensor] = (),
) -> AdjointStage:
    """What `ops.momentum_stage.momentum_stage` gives, and the cotangents g_i = s σ_f'(u_i) a_m,i of the outputs.

    The joint system is (x, m, a_x, a_m), the adjoint's slopes

        a_x' = -(κ v + q a_m)    a_m' = γ a_m - σ_x'(m) a_x - w    with v = (∂f/∂h)ᵀ g and w = (∂f/∂m)ᵀ g

    for v and w that come from autograd. a_m,i+1 depends on v_0 … v_{i-1} alone, so g_i and g_{i+1} come together, as
    h_i and h_{i+1} do. A step of seven stages from a known slope dm0 and a known v0:

        h1, h2 = momentum_stage([], z, [dm0], ..., ahead=2).h
        (h3, h4), (dm1, dm2), _, (g1, g2) = momentum_adjoint_stage([u1, u2], z, [dm0], a, [v0], ..., ahead=2)
        (h5, h6), (dm3, dm4), _, (g3, g4) = momentum_adjoint_stage([u3, u4], z, [dm0, dm1, dm2], a, [v0, v1, v2], ...)
        _, (dm5, dm6), _, (g5, g6) = momentum_adjoint_stage([u5, u6], z, [dm0, ...], a, [v0, ...], ..., ahead=0)
        z_new, a_new, error, _ = momentum_adjoint_finish(z, [dm0, ..., dm6], a, [v0, ..., v6], ...)

    A field that sees m takes one stage after the other: one output, `ahead` = 1 and `momentum`.

    Not differentiable: under autograd it raises in the backward pass. On a CUDA device a Triton kernel, one launch;
    elsewhere, and for gates that have no Triton form, the torch reference.

    Args:
        outputs: the field's outputs u at the one or two stages after those of `slopes`, N elements each.
        z: (x_n, m_n), [2 N], float16, bfloat16, float32 or float64; other rows have its dtype. Contiguous, like all
            rows.
        slopes: dm_0, dm_1, …, N elements each.
        adjoint: (a_x, a_m) at the step's start, [2 N].
        through: v_0, v_1, …, as many as there are slopes, N elements each.
        coefficients: rows (κ, s, q, -γ), one for each stage up to the last one wanted, [stages, 4] float32 or float64.
        dt: the step size, one element, float32 or float64; negative where time runs backwards.
        tableau: the method; its extra stages for dense output follow upon the others.
        gate_x, gate_f: σ_x and σ_f.
        ahead: how many further stages' features are wanted, 0, 1 or 2.
        momentum: whether the next stage's m is wanted too; there is none with `ahead` = 0.
        through_m: w_0, w_1, …, as many as there are v, N elements each; none where the field does not see m.

    Raises:
        ValueError: sizes, dtypes, devices or the number of stages don't fit, a row is not contiguous, or there are two
            outputs of a field that sees m: the second cotangent needs what comes of the first.
    """
    n = z.numel() // 2
    known, following = len(slopes), len(slopes) + len(outputs)
    if len(outputs) not in (1, 2):
        raise ValueError(f"outputs must be those of 1 or 2 stages, got {len(outputs)}")
    if ahead not in (0, 1, 2) or following > len(tableau.all_a) - ahead:
        raise ValueError(
            f"{ahead} stages after the first {following} of {tableau.name}, which has {len(tableau.all_a)}"
        )
    if len(through) != known or len(through_m) not in (0, known):
        raise ValueError(f"{len(through)} through and {len(through_m)} through_m with {known} slopes")
    if through_m and len(outputs) == 2:
        raise ValueError("2 outputs with through_m: a field that sees m takes one stage after the other")
    dispatch.check_rows(z, 2 * n, z=z, adjoint=adjoint)
    dispatch.check_rows(z, n, outputs=outputs, slopes=slopes, through=through, through_m=through_m)
    dispatch.check_scalars(z, dt=dt)
    dispatch.check_coefficients(z, coefficients, following + ahead)
    tensors = outputs, z, slopes, adjoint, through, coefficients, dt
    form_x, form_f = kernel_form(gate_x), kernel_form(gate_f)
    if form_x is None or form_f is None:
        return reference.momentum_adjoint_stage(*tensors, tableau, gate_x, gate_f, ahead, momentum, through_m)
    if dispatch.as_operator():
        rows = _operator(*tensors, dispatch.method_name(tableau), *form_x, *form_f, ahead, momentum, through_m)
        new = ahead + len(outputs)
        m = rows[-1] if momentum and ahead else None
        return AdjointStage(rows[:ahead], rows[ahead:new], m, rows[new : new + len(outputs)])
    run: Callable[..., AdjointStage] = dispatch.implementation("momentum_adjoint_stage", z)
    return run(*tensors, tableau, gate_x, gate_f, ahead, momentum, through_m)


def _run(outputs: Sequence[Tensor], z: Tensor, *args: Any) -> list[Tensor]:
    *tensors, method, gate_x, bound_x, gate_f, bound_f, ahead, momentum, through_m = args
    gates = of_form(gate_x, bound_x), of_form(gate_f, bound_f)
    run = dispatch.implementation("momentum_adjoint_stage", z)
    h, new, m, cotangents = run(outputs, z, *tensors, tableaus.get(method), *gates, ahead, momentum, through_m)
    return [*h, *new, *cotangents, *([] if m is None else [m])]


def _fake(outputs: Sequence[Tensor], z: Tensor, *args: Any) -> list[Tensor]:
    *_, ahead, momentum, _ = args
    return [z.new_empty(z.numel() // 2) for _ in range(ahead + 2 * len(outputs) + (momentum and ahead > 0))]


# The rows of `AdjointStage`, one after the other, m last.
_operator = dispatch.operator(
    "momentum_adjoint_stage",
    "(Tensor[] outputs, Tensor z, Tensor[] slopes, Tensor adjoint, Tensor[] through, Tensor coefficients, Tensor dt, "
    "str method, str gate_x, float bound_x, str gate_f, float bound_f, int ahead, bool momentum, "
    "Tensor[] through_m) -> Tensor[]",
    _run,
    _fake,
)
