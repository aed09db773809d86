"""Stages of the discrete reverse sweep over a momentum step: the cotangents that go back through the field."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from nesterov_triton import tableaus
from nesterov_triton.gates import Gate, kernel_form, of_form
from nesterov_triton.ops import dispatch
from nesterov_triton.ops.momentum_reverse_stage import reference
from nesterov_triton.ops.momentum_reverse_stage.reference import ReverseStage
from nesterov_triton.tableaus import Tableau

__all__ = ["ReverseStage", "momentum_reverse_stage"]


def momentum_reverse_stage(
    outputs: Sequence[Tensor],
    z: Tensor,
    slopes: Sequence[Tensor],
    cotangent: Tensor,
    through: Sequence[Tensor],
    coefficients: Tensor,
    dt: Tensor,
    tableau: Tableau,
    stages: int,
    gate_x: Gate,
    gate_f: Gate,
    seeds: Sequence[Tensor] = (),
    through_m: Sequence[Tensor] = (),
) -> ReverseStage:
    """The cotangents g_i = s σ_f'(u_i) K_m,i of the field's outputs at one or two stages, from the last to the first.

    For the cotangent λ of the step's end, and v_j = (∂f/∂h)ᵀ g_j and w_j = (∂f/∂m)ᵀ g_j that come from autograd,

        K_i = dt (b_i λ + seed_i + Σ_{j>i} a_ji c_j)    for both parts
        c_j = (κ v_j + q K_m,j, σ_x'(m_j) K_x,j - γ K_m,j + w_j)

    K_m,i depends on v_{i+2}, v_{i+3}, … alone, so g_{i+1} and g_i come together. A step of six stages:

        h0, h1 = momentum_stage([], z, [], ..., ahead=2).h
        (h2, h3), (dm0, dm1), _ = momentum_stage([u0, u1], z, [], ..., ahead=2)
        (h4, h5), (dm2, dm3), _ = momentum_stage([u2, u3], z, [dm0, dm1], ..., ahead=2)
        (g4, g5), (dm4,) = momentum_reverse_stage([u4, u5], z, [dm0, dm1, dm2, dm3], c, [], ...)
        (g2, g3), _ = momentum_reverse_stage([u2, u3], z, [dm0, dm1, dm2, dm3, dm4], c, [v4, v5], ...)
        (g0, g1), _ = momentum_reverse_stage([u0, u1], z, [dm0, dm1, dm2, dm3, dm4], c, [v2, v3, v4, v5], ...)
        c, _ = momentum_reverse_finish(z, [dm0, dm1, dm2, dm3, dm4], c, [v0, v1, v2, v3, v4, v5], ...)

    A field that sees m takes one stage after the other: one output.

    Not differentiable: under autograd it raises in the backward pass. On a CUDA device a Triton kernel, one launch;
    elsewhere, and for gates that have no Triton form, the torch reference.

    Args:
        outputs: the field's outputs u_i, or u_i and u_{i+1}, at the highest stages whose g are not formed yet, N
            elements each.
        z: (x_n, m_n), [2 N], float16, bfloat16, float32 or float64; other rows have its dtype. Contiguous, like all
            rows.
        slopes: dm_0 … dm_{stages - 2}, N elements each. With two outputs and no v the last one may be missing: then it
            is computed.
        cotangent: λ = (λ_x, λ_m), [2 N].
        through: v of all stages after those of the outputs, in stage order, N elements each.
        coefficients: rows (κ, s, q, -γ), one for each stage, [stages, 4] or more, float32 or float64.
        dt: the step size, one element, float32 or float64.
        tableau: the method; its extra stages for dense output follow upon the others.
        stages: how many of them were evaluated: fewer than the method's where the last has no weight, more with dense
            output.
        gate_x, gate_f: σ_x and σ_f.
        seeds: cotangents of the slopes (x', m') over dt, as they come in through dense output, [2 N] for each of the
            stages; or none.
        through_m: w of the same stages as v, N elements each; none where the field does not see m.

    Raises:
        ValueError: sizes, dtypes, devices or the number of stages don't fit, a row is not contiguous, or there are two
            outputs of a field that sees m: the second cotangent needs what comes of the first.
    """
    n = z.numel() // 2
    if len(outputs) not in (1, 2):
        raise ValueError(f"outputs must be those of 1 or 2 stages, got {len(outputs)}")
    if not 1 <= stages <= len(tableau.all_a) or len(through) + len(outputs) > stages:
        raise ValueError(
            f"{len(outputs)} outputs before {len(through)} through, with {stages} stages of {tableau.name}, which has "
            f"{len(tableau.all_a)}"
        )
    missing = stages - 1 - len(slopes)
    if missing and not (missing == 1 and len(outputs) == 2 and not through):
        raise ValueError(f"{len(slopes)} slopes with {stages} stages, expected {stages - 1}")
    if len(seeds) not in (0, stages) or len(through_m) not in (0, len(through)):
        raise ValueError(
            f"{len(seeds)} seeds with {stages} stages and {len(through_m)} through_m with {len(through)} through"
        )
    if through_m and len(outputs) == 2:
        raise ValueError("2 outputs with through_m: a field that sees m takes one stage after the other")
    dispatch.check_rows(z, 2 * n, z=z, cotangent=cotangent, seeds=seeds)
    dispatch.check_rows(z, n, outputs=outputs, slopes=slopes, through=through, through_m=through_m)
    dispatch.check_scalars(z, dt=dt)
    dispatch.check_coefficients(z, coefficients, stages)
    tensors = outputs, z, slopes, cotangent, through, coefficients, dt
    form_x, form_f = kernel_form(gate_x), kernel_form(gate_f)
    if form_x is None or form_f is None:
        return reference.momentum_reverse_stage(*tensors, tableau, stages, gate_x, gate_f, seeds, through_m)
    if dispatch.as_operator():
        rows = _operator(*tensors, dispatch.method_name(tableau), stages, *form_x, *form_f, seeds, through_m)
        return ReverseStage(rows[: len(outputs)], rows[len(outputs) :])
    run: Callable[..., ReverseStage] = dispatch.implementation("momentum_reverse_stage", z)
    return run(*tensors, tableau, stages, gate_x, gate_f, seeds, through_m)


def _run(outputs: Sequence[Tensor], z: Tensor, *args: Any) -> list[Tensor]:
    *tensors, method, stages, gate_x, bound_x, gate_f, bound_f, seeds, through_m = args
    gates = of_form(gate_x, bound_x), of_form(gate_f, bound_f)
    run = dispatch.implementation("momentum_reverse_stage", z)
    cotangents, new = run(outputs, z, *tensors, tableaus.get(method), stages, *gates, seeds, through_m)
    return [*cotangents, *new]


def _fake(outputs: Sequence[Tensor], z: Tensor, slopes: Sequence[Tensor], *args: Any) -> list[Tensor]:
    stages = args[5]
    return [z.new_empty(z.numel() // 2) for _ in range(len(outputs) + stages - 1 - len(slopes))]


# The rows of `ReverseStage`, one after the other.
_operator = dispatch.operator(
    "momentum_reverse_stage",
    "(Tensor[] outputs, Tensor z, Tensor[] slopes, Tensor cotangent, Tensor[] through, Tensor coefficients, Tensor dt, "
    "str method, int stages, str gate_x, float bound_x, str gate_f, float bound_f, Tensor[] seeds, "
    "Tensor[] through_m) -> Tensor[]",
    _run,
    _fake,
)
