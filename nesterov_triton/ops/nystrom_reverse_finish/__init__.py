"""The start of a step by the methods of `nesterov_triton.nystrom`, where the discrete reverse sweep over it ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nesterov_triton import nystrom
from nesterov_triton.gates import Gate, Identity, kernel_form, of_form
from nesterov_triton.nystrom import Nystrom
from nesterov_triton.ops import dispatch
from nesterov_triton.ops.nystrom import check_weights
from nesterov_triton.ops.nystrom_reverse_finish import reference
from nesterov_triton.ops.nystrom_reverse_finish.reference import ReverseFinish
from nesterov_triton.ops.nystrom_reverse_stage import check

__all__ = ["ReverseFinish", "nystrom_reverse_finish"]


def nystrom_reverse_finish(
    z: Tensor,
    forces: Sequence[Tensor],
    cotangent: Tensor,
    of_positions: Sequence[Tensor],
    through: Tensor,
    coefficients: Tensor,
    weights: Tensor,
    kick: Tensor,
    method: Nystrom,
    gate_x: Gate,
    given: Tensor | None = None,
    rates: Tensor | None = None,
) -> ReverseFinish:
    """The cotangent of the step's start, with what comes through the force there; terms as in
    `ops.nystrom_reverse_stage`.

    The quadratures are what the step adds to the cotangents of ξ and γ: by the weights, and by the coefficients of its
    forces but the last; summed in a fixed order.

    Not differentiable: under autograd it raises in the backward pass. On a CUDA device a Triton kernel, one launch, and
    one more for the quadratures; elsewhere, and for a gate that has no Triton form, the torch reference.

    Args:
        z: (x_n, m_n), [2 N], float16, bfloat16, float32 or float64; other rows have its dtype. Contiguous, like all
            rows.
        forces: F_0 … F_s-2, N elements each; none where σ_x is the identity and no quadratures are wanted.
        cotangent: λ = (λ_x, λ_m), [2 N].
        of_positions: y_1 … y_s-2, N elements each.
        through: v_0, N elements.
        coefficients: rows (κ, s, q, -γ), one for each stage, [stages, 4] or more, float32 or float64.
        weights: the step's, as `ops.nystrom.step_weights`, float32 or float64.
        kick, given: as in `ops.nystrom_reverse_stage`.
        method: the method.
        gate_x: σ_x.
        rates: the derivatives of the weights with respect to γ, like these, for the quadratures; None where nobody
            wants them.

    Raises:
        ValueError: sizes, dtypes, devices or the number of stages don't fit, or a row is not contiguous.
    """
    n, gated = z.numel() // 2, not isinstance(gate_x, Identity)
    check(method, forces, gated or rates is not None, len(of_positions), "the start")
    if len(of_positions) != method.stages - 2:
        raise ValueError(f"{len(of_positions)} of_positions for {method.name}, expected {method.stages - 2}")
    dispatch.check_rows(z, 2 * n, z=z, cotangent=cotangent)
    dispatch.check_rows(z, n, forces=forces, of_positions=of_positions, through=through)
    dispatch.check_rows(z, 3 * n, given=given)
    dispatch.check_scalars(z, kick=kick)
    dispatch.check_coefficients(z, coefficients, method.stages)
    for one in (weights, *(() if rates is None else (rates,))):
        check_weights(z, one, method, gated)
    tensors, form = (z, forces, cotangent, of_positions, through, coefficients, weights, kick), kernel_form(gate_x)
    if form is None:
        return reference.nystrom_reverse_finish(*tensors, method, gate_x, given, rates)
    if dispatch.as_operator():
        start, sums = _operator(*tensors, dispatch.method_name(method), *form, given, rates)
        return ReverseFinish(start, None if rates is None else sums)
    run: Callable[..., ReverseFinish] = dispatch.implementation("nystrom_reverse_finish", z)
    return run(*tensors, method, gate_x, given, rates)


def _run(z: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    *tensors, method, gate_x, bound_x, given, rates = args
    run = dispatch.implementation("nystrom_reverse_finish", z)
    start, sums = run(z, *tensors, nystrom.METHODS[method], of_form(gate_x, bound_x), given, rates)
    return start, z.new_empty(0, dtype=torch.float64) if sums is None else sums


def _fake(z: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return z.new_empty(z.numel()), z.new_empty(0 if args[-1] is None else 2, dtype=torch.float64)


# (cotangent, quadratures) as in `ReverseFinish`, the last without elements where that has None.
_operator = dispatch.operator(
    "nystrom_reverse_finish",
    "(Tensor z, Tensor[] forces, Tensor cotangent, Tensor[] of_positions, Tensor through, Tensor coefficients, "
    "Tensor weights, Tensor kick, str method, str gate_x, float bound_x, Tensor? given, Tensor? rates) "
    "-> (Tensor, Tensor)",
    _run,
    _fake,
)
