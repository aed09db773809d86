"""Stages of the discrete reverse sweep by the methods of `nesterov_triton.nystrom`: the cotangents that go back through
the field."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from nesterov_triton import nystrom
from nesterov_triton.gates import Gate, Identity, kernel_form, of_form
from nesterov_triton.nystrom import Nystrom
from nesterov_triton.ops import dispatch
from nesterov_triton.ops.nystrom import check_weights
from nesterov_triton.ops.nystrom_reverse_stage import reference
from nesterov_triton.ops.nystrom_reverse_stage.reference import ReverseStage

__all__ = ["ReverseStage", "nystrom_reverse_stage"]


def nystrom_reverse_stage(
    output: Tensor,
    z: Tensor,
    forces: Sequence[Tensor],
    cotangent: Tensor,
    of_positions: Sequence[Tensor],
    through: Tensor | None,
    coefficients: Tensor,
    weights: Tensor,
    kick: Tensor,
    method: Nystrom,
    gate_x: Gate,
    gate_f: Gate,
    given: Tensor | None = None,
) -> ReverseStage:
    """The cotangent g_i = s σ_f'(u_i) c_i of the field's output at a stage, from the last stage but one to the first.

    The last force of a step is the first of the next, which goes back with that one's: the cotangent λ of the step's
    end has what comes through it. With y_i = κ v_i + q c_i the cotangent of X_i, y_s-1 = λ_x, and v_i = (∂f/∂h)ᵀ g_i
    from autograd, the cotangent c_i of F_i is a mixture of λ_m and of those of the positions after it, with a gate of
    those of the momenta between. For the first force there is what the step before makes of it, too: the kick that it
    gives m, and what is given. A step of four stages:

        h0, _ = nystrom_stage(None, z, [], ...)
        h1, f0 = nystrom_stage(u0, z, [], ...)
        h2, f1 = nystrom_stage(u1, z, [f0], ...)
        _, f2 = nystrom_stage(u2, z, [f0, f1], ..., ahead=False)    # with a gate, or where the quadratures are wanted
        g2, _ = nystrom_reverse_stage(u2, z, [f0, f1, f2], λ, [], None, ...)
        g1, y2 = nystrom_reverse_stage(u1, z, [f0, f1, f2], λ, [], v2, ...)
        g0, y1 = nystrom_reverse_stage(u0, z, [f0, f1, f2], λ, [y2], v1, ...)
        λ, _ = nystrom_reverse_finish(z, [f0, f1, f2], λ, [y1, y2], v0, ...)

    Not differentiable: under autograd it raises in the backward pass. On a CUDA device a Triton kernel, one launch;
    elsewhere, and for gates that have no Triton form, the torch reference.

    Args:
        output: u_i, N elements.
        z: (x_n, m_n), [2 N], float16, bfloat16, float32 or float64; other rows have its dtype. Contiguous, like all
            rows.
        forces: F_0 … F_s-2, N elements each; none where σ_x is the identity.
        cotangent: λ = (λ_x, λ_m), [2 N].
        of_positions: y_i+2 … y_s-2, N elements each.
        through: v_i+1, N elements; None at the last stage but one, which is the first to be gone through.
        coefficients: rows (κ, s, q, -γ), one for each stage, [stages, 4] or more, float32 or float64.
        weights: the step's, as `ops.nystrom.step_weights`, float32 or float64.
        kick: b_s-1 times the size of the step before, one element, float32 or float64; 0 for the first step.
        method: the method.
        gate_x, gate_f: σ_x and σ_f.
        given: cotangents of x, m and the force at the step's start, [3 N], beside those from this step and the kick.

    Raises:
        ValueError: sizes, dtypes, devices or the number of stages don't fit, or a row is not contiguous.
    """
    n, gated = z.numel() // 2, not isinstance(gate_x, Identity)
    check(method, forces, gated, len(of_positions) + (through is not None), "output")
    dispatch.check_rows(z, 2 * n, z=z, cotangent=cotangent)
    dispatch.check_rows(z, n, output=output, forces=forces, of_positions=of_positions, through=through)
    dispatch.check_rows(z, 3 * n, given=given)
    dispatch.check_scalars(z, kick=kick)
    dispatch.check_coefficients(z, coefficients, method.stages)
    check_weights(z, weights, method, gated)
    tensors = output, z, forces, cotangent, of_positions, through, coefficients, weights, kick
    form_x, form_f = kernel_form(gate_x), kernel_form(gate_f)
    if form_x is None or form_f is None:
        return reference.nystrom_reverse_stage(*tensors, method, gate_x, gate_f, given)
    if dispatch.as_operator():
        rows = _operator(*tensors, dispatch.method_name(method), *form_x, *form_f, given)
        return ReverseStage(rows[0], None if through is None else rows[1])
    run: Callable[..., ReverseStage] = dispatch.implementation("nystrom_reverse_stage", z)
    return run(*tensors, method, gate_x, gate_f, given)


def check(method: Nystrom, forces: Sequence[Tensor], gated: bool, following: int, what: str) -> None:
    """Raise ValueError for forces or stages that don't fit the method.

    Args:
        following: how many of the positions before the last have cotangents.
        what: what there must be a stage for.
    """
    wanted = method.stages - 1
    if len(forces) != wanted and (gated or forces):
        raise ValueError(f"{len(forces)} forces for {method.name}, which looks at {wanted if gated else 0}")
    if following > method.stages - 2:
        raise ValueError(f"no stage for {what} before {following} others of {method.name}: it has {method.stages}")


def _run(output: Tensor, z: Tensor, *args: Any) -> list[Tensor]:
    *tensors, method, gate_x, bound_x, gate_f, bound_f, given = args
    gates = of_form(gate_x, bound_x), of_form(gate_f, bound_f)
    run = dispatch.implementation("nystrom_reverse_stage", z)
    return [row for row in run(output, z, *tensors, nystrom.METHODS[method], *gates, given) if row is not None]


def _fake(output: Tensor, z: Tensor, *args: Any) -> list[Tensor]:
    return [z.new_empty(z.numel() // 2) for _ in range(1 + (args[3] is not None))]


# The rows of `ReverseStage` that there are, one after the other.
_operator = dispatch.operator(
    "nystrom_reverse_stage",
    "(Tensor output, Tensor z, Tensor[] forces, Tensor cotangent, Tensor[] of_positions, Tensor? through, "
    "Tensor coefficients, Tensor weights, Tensor kick, str method, str gate_x, float bound_x, str gate_f, "
    "float bound_f, Tensor? given) -> Tensor[]",
    _run,
    _fake,
)
