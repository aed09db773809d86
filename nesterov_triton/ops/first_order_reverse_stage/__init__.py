"""One stage of a transposed first-order step: from what came back through the later stages to its slope's cotangent."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from nesterov_triton import tableaus
from nesterov_triton.ops import dispatch
from nesterov_triton.tableaus import Tableau

__all__ = ["first_order_reverse_stage"]


def first_order_reverse_stage(
    cotangent: Tensor,
    through: Sequence[Tensor],
    dt: Tensor,
    tableau: Tableau,
    stages: int,
    seed: Tensor | None = None,
) -> Tensor:
    """The cotangent K_i = dt (b_i λ + seed_i + Σ_{j>i} a_ji v_j) of stage i's slope, [D], to hand back to the field.

    The field's answer is v_i = (∂f/∂y)ᵀ K_i. A step is transposed from its last stage, i = stages - 1, to its first:
    i = stages - 1 - len(through); `first_order_reverse_finish` ends it.

    Not differentiable: under autograd it raises in the backward pass. On a CUDA device a Triton kernel, one launch;
    elsewhere the torch reference.

    Args:
        cotangent: λ, of the state at the step's end, D elements, float16, bfloat16, float32 or float64. Contiguous,
            like all rows.
        through: v_{i+1}, v_{i+2}, … in the order of the stages, D elements of λ's dtype each.
        dt: the step size, one element, float32 or float64.
        tableau: the method; its extra stages for dense output follow upon the others, without weight in b.
        stages: how many stages the step has evaluated; a last one without weight in b may be left out.
        seed: what else this slope was used for, divided by dt, D elements: for requested states inside the step, of
            cotangents g_k, Σ_k weights[k, i] g_k with the weights of `first_order_dense_output` (and Σ_k g_k comes to
            the result of `first_order_reverse_finish`). None for nothing.

    Raises:
        ValueError: sizes, dtypes, devices or the number of stages don't fit, or a row is not contiguous.
    """
    if not len(through) < stages <= len(tableau.all_a):
        raise ValueError(
            f"{len(through)} of {stages} stages of {tableau.name} have been transposed; it has {len(tableau.all_a)}, "
            "and at least one must be left"
        )
    dispatch.check_rows(cotangent, cotangent.numel(), cotangent=cotangent, through=through, seed=seed)
    dispatch.check_scalars(cotangent, dt=dt)
    if dispatch.as_operator():
        found: Tensor = _operator(cotangent, through, dt, dispatch.method_name(tableau), stages, seed)
        return found
    run: Callable[..., Tensor] = dispatch.implementation("first_order_reverse_stage", cotangent)
    return run(cotangent, through, dt, tableau, stages, seed)


def _run(
    cotangent: Tensor, through: Sequence[Tensor], dt: Tensor, method: str, stages: int, seed: Tensor | None
) -> Tensor:
    run: Callable[..., Tensor] = dispatch.implementation("first_order_reverse_stage", cotangent)
    return run(cotangent, through, dt, tableaus.get(method), stages, seed)


def _fake(cotangent: Tensor, *args: Any) -> Tensor:
    return cotangent.new_empty(cotangent.numel())


_operator = dispatch.operator(
    "first_order_reverse_stage",
    "(Tensor cotangent, Tensor[] through, Tensor dt, str method, int stages, Tensor? seed) -> Tensor",
    _run,
    _fake,
)
