"""The gates' Triton forms: each σ of `gates` once more, on a block in registers.

A file of its own beside `gates.py`, because that one must import without triton. A form takes a block of float32 or
float64 (half precision is widened right after the load) and its bound as a compile-time constant; `FORMS` knows it by
the name that `gates.kernel_form` gives.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl


@triton.jit
def identity(x, BOUND: tl.constexpr):
    """`gates.Identity`: σ(x) = x."""
    return x


@triton.jit
def softclip(x, BOUND: tl.constexpr):
    """`gates.Softclip`, and `gates.Tanh` with BOUND = 1: σ(x) = c tanh(x / c) with tanh(v) = 2 sigmoid(2 v) - 1, the
    arithmetic of the torch form (libdevice's tanh is slower, and the interpreter has none)."""
    return tl.sigmoid(x * (2.0 / BOUND)) * (2.0 * BOUND) - BOUND


@triton.jit
def hardtanh(x, BOUND: tl.constexpr):
    """`gates.Hardtanh`: σ(x) = min(max(x, -c), c). By comparisons, which let NaN through; min and max drop it."""
    return tl.where(x > BOUND, BOUND, tl.where(x < -BOUND, -BOUND, x))


FORMS: dict[str, Any] = {"identity": identity, "softclip": softclip, "hardtanh": hardtanh}
