"""The gates' Triton forms: each σ of `gates` and its pullback once more, on blocks in registers.

A file of its own beside `gates.py`, because that one must import without triton. A form takes a block of float32 or
float64 (half precision is widened right after the load) and its bound as a compile-time constant; `FORMS` knows it by
the name that `gates.kernel_form` gives, and `PULLBACKS` the form that multiplies a cotangent by σ'(x).
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


@triton.jit
def identity_pullback(grad, x, BOUND: tl.constexpr):
    """σ' = 1."""
    return grad


@triton.jit
def softclip_pullback(grad, x, BOUND: tl.constexpr):
    """σ' = 1 - (σ / c)², from the value as in the torch form."""
    y = softclip(x, BOUND) * (1.0 / BOUND)
    return grad - grad * y * y


@triton.jit
def hardtanh_pullback(grad, x, BOUND: tl.constexpr):
    """σ' = 1 inside of the bounds, 0 on them and outside; by a product there, as in the torch form, which lets NaN
    through."""
    return tl.where(tl.abs(x) < BOUND, grad, grad * 0.0)


PULLBACKS: dict[str, Any] = {
    "identity": identity_pullback,
    "softclip": softclip_pullback,
    "hardtanh": hardtanh_pullback,
}
