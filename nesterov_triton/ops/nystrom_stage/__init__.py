"""Stages by the methods of `nesterov_triton.nystrom`: from the field's output to its next argument."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from nesterov_triton import nystrom
from nesterov_triton.gates import Gate, Identity, kernel_form, of_form
from nesterov_triton.nystrom import Nystrom
from nesterov_triton.ops import dispatch
from nesterov_triton.ops.nystrom import check_weights
from nesterov_triton.ops.nystrom_stage import reference
from nesterov_triton.ops.nystrom_stage.reference import Stage

__all__ = ["Stage", "nystrom_stage"]


def nystrom_stage(
    output: Tensor | None,
    z: Tensor,
    forces: Sequence[Tensor],
    coefficients: Tensor,
    weights: Tensor,
    method: Nystrom,
    gate_x: Gate,
    gate_f: Gate,
    ahead: bool = True,
) -> Stage:
    """F_i = s σ_f(u_i) + q X_i, with γ²/4 in q where σ_x is the identity, and from it h_i+1 = κ X_i+1.

    A step of four stages from a known force:

        h1, _ = nystrom_stage(None, z, [f0], ...)
        h2, f1 = nystrom_stage(u1, z, [f0], ...)
        h3, f2 = nystrom_stage(u2, z, [f0, f1], ...)
        z_new, f3, error = nystrom_finish(u3, z, [f0, f1, f2], ...)

    Not differentiable: under autograd it raises in the backward pass. On a CUDA device a Triton kernel, one launch;
    elsewhere, and for gates that have no Triton form, the torch reference.

    Args:
        output: the field's output at the stage after those of `forces`, N elements; None where that stage's own
            features are wanted.
        z: (x_n, m_n), [2 N], float16, bfloat16, float32 or float64; other rows have its dtype. Contiguous, like all
            rows.
        forces: F_0, F_1, …, N elements each.
        coefficients: rows (κ, s, q, -γ), one for each stage up to the last one wanted, [stages, 4] float32 or float64.
        weights: the step's, as `ops.nystrom.step_weights`, float32 or float64.
        method: the method.
        gate_x, gate_f: σ_x and σ_f.
        ahead: whether the features are wanted.

    Raises:
        ValueError: sizes, dtypes, devices or the number of stages don't fit, a row is not contiguous, or nothing is
            wanted.
    """
    n = z.numel() // 2
    following = len(forces) + (output is not None)
    if following > method.stages - ahead or not (ahead or output is not None):
        raise ValueError(f"{int(ahead)} stages after the first {following} of {method.name}, which has {method.stages}")
    dispatch.check_rows(z, 2 * n, z=z)
    dispatch.check_rows(z, n, output=output, forces=forces)
    dispatch.check_coefficients(z, coefficients, following + ahead)
    check_weights(z, weights, method, not isinstance(gate_x, Identity))
    tensors = output, z, forces, coefficients, weights
    form_x, form_f = kernel_form(gate_x), kernel_form(gate_f)
    if form_x is None or form_f is None:
        return reference.nystrom_stage(*tensors, method, gate_x, gate_f, ahead)
    if dispatch.as_operator():
        rows = iter(_operator(*tensors, dispatch.method_name(method), *form_x, *form_f, ahead))
        return Stage(next(rows) if ahead else None, None if output is None else next(rows))
    run: Callable[..., Stage] = dispatch.implementation("nystrom_stage", z)
    return run(*tensors, method, gate_x, gate_f, ahead)


def _run(output: Tensor | None, z: Tensor, *args: Any) -> list[Tensor]:
    *tensors, method, gate_x, bound_x, gate_f, bound_f, ahead = args
    gates = of_form(gate_x, bound_x), of_form(gate_f, bound_f)
    run = dispatch.implementation("nystrom_stage", z)
    return [row for row in run(output, z, *tensors, nystrom.METHODS[method], *gates, ahead) if row is not None]


def _fake(output: Tensor | None, z: Tensor, *args: Any) -> list[Tensor]:
    return [z.new_empty(z.numel() // 2) for _ in range(args[-1] + (output is not None))]


# The rows of `Stage` that there are, one after the other.
_operator = dispatch.operator(
    "nystrom_stage",
    "(Tensor? output, Tensor z, Tensor[] forces, Tensor coefficients, Tensor weights, str method, str gate_x, "
    "float bound_x, str gate_f, float bound_f, bool ahead) -> Tensor[]",
    _run,
    _fake,
)
