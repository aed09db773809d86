"""What torch.func transforms and forward-mode AD hide in tensors, and what a solve must know of it.

A transform wraps tensors, one wrapper a level. Beside it stand two traps: under vmap the host cannot read values, since
there is one for each sample; and `requires_grad` tells of the innermost transform alone.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd import forward_ad

_functorch = torch._C._functorch


def active() -> bool:
    """Whether a torch.func transform is running, or forward-mode AD."""
    return _functorch.maybe_current_level() is not None or _forward_mode()


def readable(x: Tensor) -> bool:
    """Whether the host can read values of `x`: not where vmap keeps many samples in it."""
    return _functorch.maybe_current_level() is None or not any(map(_functorch.is_batchedtensor, _levels(x)))


def batched(x: Tensor) -> bool:
    """Whether `x` is many samples in one: of vmap, or of `is_grads_batched` in torch.autograd.grad."""
    return not readable(x) or _functorch.is_legacy_batchedtensor(x)


def carries(x: Tensor) -> bool:
    """Whether `x` carries samples, a tangent, or the graph of a transform."""
    if not active():
        return False
    if _forward_mode() and forward_ad.unpack_dual(x).tangent is not None:  # type: ignore[no-untyped-call]
        return True
    grad = torch.is_grad_enabled()
    # Of an outer level's tangent nothing can be asked: in forward mode, everything that is wrapped may have one.
    return any(
        _forward_mode() or _functorch.is_batchedtensor(level) or (grad and level.requires_grad)
        for level in _levels(x)
        if _functorch.is_functorch_wrapped_tensor(level)
    )


def tracked(x: Tensor) -> Tensor | None:
    """`x` on the innermost level that records its graph; None where none does."""
    if x.requires_grad or _functorch.maybe_current_level() is None:
        return x if x.requires_grad else None
    return next((level for level in _levels(x) if level.requires_grad), None)


def plain(x: Tensor) -> Tensor:
    """A constant without the wrappers that it got where a transform was running when it was made: what is kept must
    outlive them."""
    if _functorch.maybe_current_level() is None:
        return x
    *_, bare = _levels(x)
    return bare


def check_readable(x: Tensor) -> None:
    """Raise where an adaptive method could not read the norm of `x`.

    Raises:
        RuntimeError: naming the fix.
    """
    if not readable(x):
        raise RuntimeError(
            "an adaptive method chooses its steps by the error's norm, and under torch.func.vmap there is one for each "
            "sample, which cannot be read: use a fixed-step method, for example method='rk4', step_size=0.1, or call "
            "the layer (or solve) on the whole batch, without vmap"
        )


def _levels(x: Tensor) -> Iterator[Tensor]:
    """`x`, and what each of its wrappers holds."""
    yield x
    while _functorch.is_functorch_wrapped_tensor(x):
        x = _functorch.get_unwrapped(x)
        yield x


def _forward_mode() -> bool:
    return forward_ad._current_level >= 0
