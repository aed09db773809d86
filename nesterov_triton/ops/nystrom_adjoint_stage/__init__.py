"""Stages of the continuous adjoint by the methods of `nesterov_triton.nystrom`: from the field's output to its next
argument, and to the cotangent that goes back through it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from nesterov_triton import nystrom
from nesterov_triton.gates import Gate, Identity, kernel_form, of_form
from nesterov_triton.nystrom import Nystrom
from nesterov_triton.ops import dispatch
from nesterov_triton.ops.nystrom import check_weights
from nesterov_triton.ops.nystrom_adjoint_stage import reference
from nesterov_triton.ops.nystrom_adjoint_stage.reference import AdjointStage

__all__ = ["AdjointStage", "nystrom_adjoint_stage"]


def nystrom_adjoint_stage(
    output: Tensor,
    z: Tensor,
    forces: Sequence[Tensor],
    adjoint: Tensor,
    through: Sequence[Tensor],
    coefficients: Tensor,
    weights: Tensor,
    method: Nystrom,
    gate_x: Gate,
    gate_f: Gate,
    ahead: bool = True,
) -> AdjointStage:
    """What `ops.nystrom_stage.nystrom_stage` gives, and the cotangent g_i = s σ_f'(u_i) a_m,i of the output.

    With v_i = (∂f/∂h)ᵀ g_i from autograd the adjoint is a momentum system like the state's own (see
    `gradients.nystrom_adjoint`), whose position a_m,i depends on v_0 … v_i-1. A step of four stages from a known force
    and a known v_0:

        h1, _ = nystrom_stage(None, z, [f0], ...)
        h2, f1, g1 = nystrom_adjoint_stage(u1, z, [f0], a, [v0], ...)
        h3, f2, g2 = nystrom_adjoint_stage(u2, z, [f0, f1], a, [v0, v1], ...)
        _, _, g3 = nystrom_adjoint_stage(u3, z, [f0, f1, f2], a, [v0, v1, v2], ..., ahead=False)
        end, f3, error, _ = nystrom_adjoint_finish(u3, z, [f0, f1, f2], a, [v0, v1, v2, v3], ...)

    Not differentiable: under autograd it raises in the backward pass. On a CUDA device a Triton kernel, one launch;
    elsewhere, and for gates that have no Triton form, the torch reference.

    Args:
        output: the field's output u_i at the stage after those of `forces`, N elements.
        z: (x_n, m_n), [2 N], float16, bfloat16, float32 or float64; other rows have its dtype. Contiguous, like all
            rows.
        forces: F_0, F_1, …, N elements each.
        adjoint: (a_x, a_m) at the step's start, [2 N].
        through: v_0, v_1, …, as many as there are forces, N elements each.
        coefficients: rows (κ, s, q, -γ), one for each stage up to the last one wanted, [stages, 4] float32 or float64.
        weights: the step's with its growth, as `ops.nystrom.step_weights`, float32 or float64.
        method: the method.
        gate_x, gate_f: σ_x and σ_f.
        ahead: whether the features are wanted; the last stage has none, and its force is the finish's.

    Raises:
        ValueError: sizes, dtypes, devices or the number of stages don't fit, or a row is not contiguous.
    """
    n, stage = z.numel() // 2, len(forces)
    if stage + ahead >= method.stages:
        raise ValueError(f"{int(ahead)} stages after the first {stage + 1} of {method.name}, which has {method.stages}")
    if len(through) != stage:
        raise ValueError(f"{len(through)} through with {stage} forces")
    dispatch.check_rows(z, 2 * n, z=z, adjoint=adjoint)
    dispatch.check_rows(z, n, output=output, forces=forces, through=through)
    dispatch.check_coefficients(z, coefficients, stage + 1 + ahead)
    check_weights(z, weights, method, not isinstance(gate_x, Identity), growth=True)
    tensors = output, z, forces, adjoint, through, coefficients, weights
    form_x, form_f = kernel_form(gate_x), kernel_form(gate_f)
    if form_x is None or form_f is None:
        return reference.nystrom_adjoint_stage(*tensors, method, gate_x, gate_f, ahead)
    if dispatch.as_operator():
        rows = iter(_operator(*tensors, dispatch.method_name(method), *form_x, *form_f, ahead))
        h = next(rows) if ahead else None
        return AdjointStage(h, next(rows) if stage < method.stages - 1 else None, next(rows))
    run: Callable[..., AdjointStage] = dispatch.implementation("nystrom_adjoint_stage", z)
    return run(*tensors, method, gate_x, gate_f, ahead)


def _run(output: Tensor, z: Tensor, *args: Any) -> list[Tensor]:
    *tensors, method, gate_x, bound_x, gate_f, bound_f, ahead = args
    gates = of_form(gate_x, bound_x), of_form(gate_f, bound_f)
    run = dispatch.implementation("nystrom_adjoint_stage", z)
    return [row for row in run(output, z, *tensors, nystrom.METHODS[method], *gates, ahead) if row is not None]


def _fake(output: Tensor, z: Tensor, forces: Sequence[Tensor], *args: Any) -> list[Tensor]:
    *_, method, _, _, _, _, ahead = args
    rows = 1 + ahead + (len(forces) < nystrom.METHODS[method].stages - 1)
    return [z.new_empty(z.numel() // 2) for _ in range(rows)]


# The rows of `AdjointStage` that there are, one after the other.
_operator = dispatch.operator(
    "nystrom_adjoint_stage",
    "(Tensor output, Tensor z, Tensor[] forces, Tensor adjoint, Tensor[] through, Tensor coefficients, Tensor weights, "
    "str method, str gate_x, float bound_x, str gate_f, float bound_f, bool ahead) -> Tensor[]",
    _run,
    _fake,
)
