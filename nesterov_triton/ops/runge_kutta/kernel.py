"""The Runge-Kutta arithmetic on blocks, shared by the stage and finish kernels, and the second half of their reduction.

Blocks are float32 or float64. Sums over stages are unrolled over tuples of blocks, so that every block stays in
registers; coefficients that are 0 cost nothing. Coefficients stand where they are used: assigned to a variable, a
compile-time number would become a float32. Tuples grow by `+`, the one way that the compiler knows.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# 16 bytes a thread and row, the widest load there is. Half precision gets 8: all arithmetic is on float32, and with 16
# the up to thirty rows of a dopri8 finish would take 8 registers each, and 240 leave no room for a second program.
_ELEMENTS = {torch.float64: 2, torch.float32: 4, torch.float16: 4, torch.bfloat16: 4}
_WARPS = 8
# One program adds the partial sums of all blocks, so many at a time.
CHUNK = 2048


def launch_shape(n: int, dtype: torch.dtype, held: int = 0) -> tuple[int, int, dict[str, int]]:
    """How a kernel over rows of `n` elements is launched: programs, elements a program, options; `held` is the number
    of blocks that it holds at a time, where they are many.

    Then half or a quarter of the elements a thread, where more than 128 registers would be taken otherwise, which
    leaves no room for a second program; there are rows enough in flight for accesses of fewer bytes. The limits are
    those of the compiled kernels (sm_90, float32): an end of a dopri5 adjoint step holds 18 blocks and takes 128
    registers; with the quadratures it holds 25 and takes 213, with half the elements 99. Of dopri8 it holds 43 and
    takes 168 with half, 80 with a quarter. A thread that has one float64 can't have less: then half the threads (an end
    of a gated nystrom4 adjoint step takes 169).

    One choice by size and type, nothing tuned: these kernels do nothing but stream rows, and what such a kernel needs
    is wide loads, several of them in flight (one for each row it reads) and registers to spare for occupancy.
    """
    block = _ELEMENTS[dtype] * 32 * _WARPS
    if held > (14 if dtype == torch.float64 else 24):
        block //= 2
    warps = _WARPS
    if dtype == torch.float64:
        if held > 28:
            block, warps = block // 2, warps // 2
    elif held > 38:
        block //= 2
    return triton.cdiv(n, block), block, {"num_warps": warps}


def start(kernel: Any, programs: int, rows: Tensor, *arguments: Any, **options: int) -> None:
    """Launch `programs` programs of a kernel, whose first argument is `rows`, on the device of `rows`: triton itself
    launches on the current one."""
    with torch.cuda.device_of(rows):
        kernel[(programs,)](rows, *arguments, **options)


def used(*rows: tuple[float, ...]) -> tuple[bool, ...]:
    """Which columns of a tableau's rows hold anything but zeros."""
    return tuple(map(any, zip(*rows, strict=True)))


@triton.jit
def load_rows(rows, offsets, mask, WIDE: tl.constexpr, USED: tl.constexpr):
    """A tuple of pointers as a tuple of blocks of the type WIDE; zeros for those that are not USED."""
    blocks = ()
    for j in tl.static_range(len(USED)):
        if USED[j]:
            # Widened at once: the interpreter's arithmetic on bfloat16 is garbage.
            blocks = blocks + (tl.load(rows[j] + offsets, mask=mask).to(WIDE),)
        else:
            blocks = blocks + (tl.zeros([offsets.shape[0]], WIDE),)
    return blocks


@triton.jit
def weighted(like, rows, W: tl.constexpr, ROW: tl.constexpr):
    """Σ_j W[ROW][j] rows[j], of the shape and type of `like`."""
    total = tl.zeros_like(like)
    for j in tl.static_range(len(W[ROW])):
        if W[ROW][j] != 0:
            total += rows[j] * W[ROW][j]
    return total


@triton.jit
def combine(base, dt, rows, W: tl.constexpr, ROW: tl.constexpr):
    """base + dt Σ_j W[ROW][j] rows[j]."""
    return base + dt * weighted(base, rows, W, ROW)


@triton.jit
def stored(value, DTYPE: tl.constexpr):
    """The value as it will be read back after being stored."""
    return value.to(DTYPE).to(value.dtype)


@triton.jit
def positive(scale):
    """The scale of an error, never 0: only an atol of 0 lets it vanish, and 0 / 0 is no error."""
    if scale.dtype == tl.float64:
        scale = tl.maximum(scale, 2.2250738585072014e-308)
    else:
        scale = tl.maximum(scale, 1.1754943508222875e-38)
    return scale


@triton.jit
def scaled(error, old, new, rtol, atol):
    """error / (atol + rtol max(|old|, |new|)); NaN where the new state is. Over an infinite one it is 0, as in plain
    torch: the state stays infinite, and the loop sees it at the end. Tried again shorter, a state that outgrows half
    precision would creep along its last finite value in steps that round to nothing."""
    scale = positive(atol + rtol * tl.maximum(tl.abs(old), tl.abs(new)))
    return tl.where(new == new, error / scale, float("nan"))


@triton.jit
def unless_finite(value):
    """0, and NaN where the value is not finite."""
    return tl.where(tl.abs(value) < float("inf"), value - value, float("nan"))


@triton.jit
def store_squares(partials_ptr, first, second, mask):
    """Leave this program's sum of first² + second² over the mask for `norm_kernel`."""
    squares = tl.where(mask, first * first + second * second, 0.0)
    tl.store(partials_ptr, tl.sum(squares, axis=0).to(tl.float64))


@triton.jit
def total(partials_ptr, blocks, CHUNK: tl.constexpr):
    """The sum of the blocks' sums, [blocks] float64, in a fixed order."""
    lanes = tl.arange(0, CHUNK)
    found = tl.zeros([CHUNK], tl.float64)
    for start in range(0, blocks, CHUNK):
        found += tl.load(partials_ptr + start + lanes, mask=start + lanes < blocks, other=0.0)
    return tl.sum(found, axis=0)


@triton.jit(do_not_specialize=["blocks", "count"])
def norm_kernel(partials_ptr, error_ptr, blocks, count, ERRORS: tl.constexpr, CHUNK: tl.constexpr):
    """The error norm from the blocks' sums of squares, in a fixed order, so that it is the same in every run.

    A second launch rather than a "last block done" in the first: no counter that must be 0 at the start (a launch of
    its own, or state that outlives a failed call), no memory fence to rely on; a dopri5 step still takes 8 launches.

    Args:
        partials_ptr: [max(ERRORS, 1), blocks] float64.
        error_ptr: 0-d float64.
        count: elements of the whole state.
    """
    squares = total(partials_ptr, blocks, CHUNK)
    elements = count.to(tl.float64)
    if ERRORS == 2:
        # Hairer, Nørsett, Wanner II.10: the fifth-order estimate, damped by the third-order one.
        third = total(partials_ptr + blocks, blocks, CHUNK)
        denominator = squares + 0.01 * third
        error = squares * tl.sqrt(1.0 / (elements * tl.where(squares == 0, 1.0, denominator)))
        # It may overflow first: then it must not damp, or the step would look perfect.
        error = tl.where(third < float("inf"), error, third)
    else:
        error = tl.sqrt(squares / elements)
    tl.store(error_ptr, error)


def launch_norm(partials: Tensor, count: int, errors: int) -> Tensor:
    """The error norm, 0-d float64, from partial sums [max(errors, 1), blocks] float64 over `count` elements."""
    error = torch.empty((), dtype=torch.float64, device=partials.device)
    start(norm_kernel, 1, partials, error, partials.shape[1], count, errors, CHUNK, num_warps=_WARPS)
    return error
