"""Triton kernel: from the field's outputs at one or two stages of a momentum step to their cotangents, which go back
through the field.

Two at a time, as on the way forward: K_m,i depends on c_m,i+1, c_m,i+2, …, these on K_x,i+1, …, hence on v_{i+2}, ….
Once v_{i+2} is there, the cotangents of stage i + 1 and of stage i can both be formed, unless the field sees m.

What is stored was decided by counting rows of N values, here of a whole dopri5 step, of which six stages count: its
stages forward again from nothing but (x, m), its stages back, and the finish; where the field sees m, its w_j are read
with the v_j, and the m_i that it is given are written:

| kept of other stages                          | field sees m, one stage a launch | two stages a launch |
|-----------------------------------------------|----------------------------------|---------------------|
| dm_j, c_x,j and c_m,j                         |                                  | 90                  |
| dm_j, v_j and c_m,j                           |                                  | 86                  |
| dm_j, v_j and m_j                             |                                  | 82                  |
| dm_j and v_j, everything else computed again  | 144                              | **81**              |
| u_j and v_j, everything else computed again   | 139                              | 76                  |

A launch reads m, (λ_x, λ_m), the outputs, the dm_j (for σ_x'(m_j); none where σ_x is the identity) and the v_j of the
later stages, and writes the cotangents; the first one reads x too where it computes the last slope that anybody needs,
and writes that. The last line is the floor; it is not what is done, for the reasons that `momentum_stage.kernel` gives.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from nesterov_triton.gates import Gate, kernel_form
from nesterov_triton.gates_triton import FORMS, PULLBACKS
from nesterov_triton.ops.momentum.kernel import all_cotangents, coefficient, further_slopes, load_all
from nesterov_triton.ops.momentum_reverse_stage.reference import ReverseStage, last_weights, transposed
from nesterov_triton.ops.runge_kutta.kernel import combine, launch_shape, start
from nesterov_triton.tableaus import Tableau


@triton.jit
def sweep_back(
    m, dt, dm, cotangent_ptr, seeds, through, through_m, coefficients_ptr, offsets, mask, n,
    A: tl.constexpr, W: tl.constexpr, B: tl.constexpr, COUNT: tl.constexpr,
    pullback_x: tl.constexpr, BOUND_X: tl.constexpr,
):  # fmt: skip
    """The cotangent of the step's end, the last COUNT momenta and what `all_cotangents` makes of them, from the last
    stage to the first.

    Args:
        m: block of m_n.
        dm: blocks of the slopes of all stages but the last.
        cotangent_ptr: λ, [2 N].
        seeds: [2 N] for each stage, or none.
        through: v of the last stages, in stage order, [N] each.
        through_m: w of the same stages; none where the field does not see m.
        A: what leads to each stage.
        W: the same on the way back.
        B: the stages' weights.
    """
    of_x = tl.load(cotangent_ptr + offsets, mask=mask).to(m.dtype)
    of_m = tl.load(cotangent_ptr + n + offsets, mask=mask).to(m.dtype)
    momenta, base_x, base_m, v, w = (), (), (), (), ()
    for p in tl.static_range(COUNT):
        momenta = momenta + (combine(m, dt, dm, A, len(B) - 1 - p),)
        seed_x, seed_m = tl.zeros_like(m), tl.zeros_like(m)
        if B[len(B) - 1 - p] != 0:
            seed_x += of_x * B[len(B) - 1 - p]
            seed_m += of_m * B[len(B) - 1 - p]
        if len(seeds) > 0:
            seed_x += tl.load(seeds[len(B) - 1 - p] + offsets, mask=mask).to(m.dtype)
            seed_m += tl.load(seeds[len(B) - 1 - p] + n + offsets, mask=mask).to(m.dtype)
        base_x = base_x + (dt * seed_x,)
        base_m = base_m + (dt * seed_m,)
    for p in tl.static_range(len(through)):
        v = v + (tl.load(through[len(through) - 1 - p] + offsets, mask=mask).to(m.dtype),)
    for p in tl.static_range(len(through_m)):
        w = w + (tl.load(through_m[len(through) - 1 - p] + offsets, mask=mask).to(m.dtype),)
    _, y_m, p_x, p_m = all_cotangents(
        base_x, base_m, momenta, v, w, coefficients_ptr, dt, W, len(B) - 1, -1, pullback_x, BOUND_X
    )
    return of_x, of_m, momenta, y_m, p_x, p_m


@triton.jit
def reverse_stage_kernel(
    z_ptr, cotangent_ptr, outputs, slopes, through, through_m, seeds, coefficients_ptr, dt_ptr,
    slope_ptrs, cotangent_ptrs, n,
    A: tl.constexpr, W: tl.constexpr, B: tl.constexpr,
    gate_x: tl.constexpr, pullback_x: tl.constexpr, BOUND_X: tl.constexpr,
    gate_f: tl.constexpr, pullback_f: tl.constexpr, BOUND_F: tl.constexpr,
    WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of the highest stages below those of `through`.

    Args:
        z_ptr: (x_n, m_n), [2 N].
        outputs: the field's outputs at one or two stages, in stage order, [N] each.
        slopes: dm_0, dm_1, …, [N] each.
        coefficients_ptr: rows (κ, s, q, -γ), [stages, 4].
        slope_ptrs: where dm of the last stage but one goes, [N], if it is computed; else none.
        cotangent_ptrs: where the outputs' cotangents go, [N] each.

    The others as in `sweep_back`.
    """
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    dt = tl.load(dt_ptr).to(WIDE)
    m = tl.load(z_ptr + n + offsets, mask=mask).to(WIDE)
    dm = load_all(slopes, offsets, mask, WIDE)
    u = load_all(outputs, offsets, mask, WIDE)
    if len(slope_ptrs) > 0:
        x = tl.load(z_ptr + offsets, mask=mask).to(WIDE)
        _, dm = further_slopes(
            (u[0],), x, m, dt, dm, coefficients_ptr, A, len(slopes),
            gate_x, BOUND_X, gate_f, BOUND_F, z_ptr.dtype.element_ty,
        )  # fmt: skip
        tl.store(slope_ptrs[0] + offsets, dm[len(slopes)], mask=mask)
    _, _, _, y_m, _, _ = sweep_back(
        m, dt, dm, cotangent_ptr, seeds, through, through_m, coefficients_ptr, offsets, mask, n,
        A, W, B, len(through) + len(outputs), pullback_x, BOUND_X,
    )  # fmt: skip
    for j in tl.static_range(len(outputs)):
        # Place p in the sweep is stage len(B) - 1 - p.
        drive = coefficient(coefficients_ptr, len(B) - len(through) - len(outputs) + j, 1, WIDE)
        g = pullback_f(drive * y_m[len(through) + len(outputs) - 1 - j], u[j], BOUND_F)
        tl.store(cotangent_ptrs[j] + offsets, g, mask=mask)


def launch(
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
    seeds: Sequence[Tensor],
    through_m: Sequence[Tensor],
) -> ReverseStage:
    """As `momentum_reverse_stage`, by the kernel, on whatever device triton runs (a CPU under its interpreter)."""
    form_x, form_f = kernel_form(gate_x), kernel_form(gate_f)
    if form_x is None or form_f is None:
        raise ValueError(f"no Triton form of {gate_x if form_x is None else gate_f}")
    n = z.numel() // 2
    counts = len(outputs), stages - 1 - len(slopes)
    cotangents, new = ([torch.empty(n, dtype=z.dtype, device=z.device) for _ in range(k)] for k in counts)
    if n:
        held = 3 + len(outputs) + len(slopes) + len(through) + len(through_m)  # seeds are added up at once
        programs, block, options = launch_shape(n, z.dtype, held)
        start(
            reverse_stage_kernel, programs, z, cotangent, tuple(outputs), tuple(slopes), tuple(through),
            tuple(through_m), tuple(seeds), coefficients, dt, tuple(new), tuple(cotangents), n,
            tableau.all_a, transposed(tableau.all_a, stages), last_weights(tableau, stages),
            FORMS[form_x[0]], PULLBACKS[form_x[0]], form_x[1], FORMS[form_f[0]], PULLBACKS[form_f[0]], form_f[1],
            tl.float64 if z.dtype == torch.float64 else tl.float32, block, **options,
        )  # fmt: skip
    return ReverseStage(cotangents, new)
