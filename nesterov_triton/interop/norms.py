"""Tolerances and norms as torchdiffeq takes them: what the loop is to measure an error by.

With err the embedded error of a step from y to y1, ratio = err / (atol + rtol max(|y|, |y1|)), element by element, and
the step is good enough where norm(ratio) is at most 1. The norm of a tensor is the root of the mean square, that of a
tuple the largest of its tensors'.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor

from nesterov_triton.interop.states import Layout

Norm: TypeAlias = Callable[[Any], Any]
Tolerance: TypeAlias = Tensor | float


@dataclass(frozen=True)
class Tolerances:
    """rtol and atol: numbers, or tensors that broadcast with the flat elements of a state, [N]."""

    rtol: Tolerance
    atol: Tolerance

    @classmethod
    def make(cls, rtol: Any, atol: Any, layout: Layout, prefix: str = "") -> Tolerances:
        """Check them.

        Raises:
            TypeError, ValueError: naming the argument and the fix.
        """
        return cls(tolerance(f"{prefix}rtol", rtol, layout), tolerance(f"{prefix}atol", atol, layout)).checked(prefix)

    def checked(self, prefix: str = "") -> Tolerances:
        """These, which are not both 0 anywhere.

        Raises:
            ValueError: they are.
        """
        total = self.rtol + self.atol
        zero = not bool((total > 0).all()) if isinstance(total, Tensor) else total == 0
        if zero:
            raise ValueError(f"{prefix}rtol and {prefix}atol are both 0; give at least one of them a positive value")
        return self

    @property
    def numbers(self) -> tuple[float, float] | None:
        """Both, where they are the same for all elements."""
        if isinstance(self.rtol, Tensor) or isinstance(self.atol, Tensor):
            return None
        return self.rtol, self.atol

    @property
    def smallest(self) -> tuple[float, float]:
        """The smallest of each."""
        return _least(self.rtol), _least(self.atol)

    def ratio(self, error: Tensor, before: Tensor, after: Tensor) -> Tensor:
        """The error over the tolerance, flat elements."""
        if error.dtype in (torch.float16, torch.bfloat16):  # 2 / 1e-5 is infinite in float16
            error, before, after = error.float(), before.float(), after.float()
        scale = torch.maximum(before.abs(), after.abs()).mul_(self.rtol).add_(self.atol)
        return error / scale.clamp_min_(torch.finfo(scale.dtype).tiny)  # 0 / 0 is no error


def _least(tolerance: Tolerance) -> float:
    return float(tolerance.min()) if isinstance(tolerance, Tensor) else tolerance


def tolerance(name: str, value: Any, layout: Layout) -> Tolerance:
    """One tolerance of a state, checked: a number, or flat, [N].

    Raises:
        TypeError, ValueError: naming the argument and the fix.
    """
    if isinstance(value, numbers.Real):
        number = float(value)
        if isinstance(cast(object, value), bool) or not 0 <= number < math.inf:
            raise ValueError(f"{name} must be a finite number and not negative, got {value!r}")
        return number
    if not layout.single and not (isinstance(value, Tensor) and value.ndim == 0) and hasattr(value, "__iter__"):
        each = list(value)
        if len(each) != len(layout.shapes):
            raise ValueError(
                f"{name} has {len(each)} entries for a y0 of {len(layout.shapes)} tensors; give one number, or one "
                "entry for each tensor"
            )
        return torch.cat([_checked(name, x, shape, layout) for x, shape in zip(each, layout.shapes, strict=True)])
    if isinstance(value, Tensor) and value.ndim == 0:
        return float(_checked(name, value, torch.Size(()), layout))
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a number or a tensor, got {type(value).__name__}")
    if not layout.single:
        raise ValueError(f"{name} must be a number or one entry for each tensor of y0, got shape {tuple(value.shape)}")
    return _checked(name, value, layout.shapes[0], layout)


def _checked(name: str, value: Any, shape: torch.Size, layout: Layout) -> Tensor:
    wide = torch.float32 if layout.real in (torch.float16, torch.bfloat16) else layout.real
    if isinstance(value, Tensor) and value.requires_grad:
        raise ValueError(f"{name} must not require gradients; detach it")
    try:
        found = torch.as_tensor(value, dtype=torch.float64).to(layout.device, wide).expand(shape).reshape(-1)
    except (RuntimeError, TypeError, ValueError):
        raise ValueError(f"{name} does not broadcast with a state of shape {tuple(shape)}") from None
    if not bool((torch.isfinite(found) & (found >= 0)).all()):
        raise ValueError(f"{name} must be finite and not negative everywhere")
    return found


def rms(x: Tensor) -> Tensor:
    """The root of the mean square of a tensor, 0-d; 0 of none."""
    size: Tensor = torch.linalg.vector_norm(x)
    return size / math.sqrt(max(x.numel(), 1))


def largest_rms(tensors: Sequence[Tensor]) -> Tensor | float:
    """The largest root of a mean square of several tensors; 0 of none."""
    if not tensors:
        return 0.0
    sizes = [math.sqrt(max(x.numel(), 1)) for x in tensors]
    found = torch.stack([x.double() for x in torch._foreach_norm(list(tensors))])
    return (found / torch.tensor(sizes, dtype=torch.float64, device=found.device)).amax()  # NaN wins


class StateMeasure:
    """The measure of a state's error.

    Args:
        norm: of the ratio in the state's own form, a tensor or a tuple; None for the default one.
    """

    def __init__(self, layout: Layout, tolerances: Tolerances, norm: Norm | None) -> None:
        self.layout, self.tolerances, self.custom = layout, tolerances, norm

    def norm(self, ratio: Tensor) -> Tensor | float:
        """Of flat elements, [N]."""
        layout = self.layout
        if self.custom is None:
            return rms(ratio) if layout.single else largest_rms(torch.split(ratio, layout.sizes))
        pieces = torch.split(ratio, layout.sizes)
        parts = tuple(p.reshape(shape) for p, shape in zip(pieces, layout.shapes, strict=True))
        return as_size(self.custom(parts[0] if layout.single else parts))

    def __call__(self, error: Tensor, z: Tensor, z1: Tensor) -> Tensor | float:
        with torch.no_grad():
            return self.norm(self.tolerances.ratio(*map(self.layout.elements, (error, z, z1))))


class AdjointMeasure:
    """The measure of the errors of an adjoint solve: of the state, of its cotangent, and of the parameters' integrals.

    Args:
        state: measures the forward state.
        tolerances: of the backward solve.
        params: the parameters that gradients are wanted of.
        norm: None for the largest of all norms, "seminorm" for that of state and cotangent alone, or a function of the
            ratios (t, y, cotangent of y, of each parameter), where tuples are spread out and t is 0.
    """

    def __init__(
        self, state: StateMeasure, tolerances: Tolerances, params: Sequence[Tensor], norm: Norm | str | None
    ) -> None:
        self.state, self.tolerances, self.params, self.custom = state, tolerances, params, norm
        rtol, atol = tolerances.smallest
        self._own = Tolerances(rtol, max(atol, 1e-30))

    def __call__(self, errors: Sequence[Tensor], before: Sequence[Tensor], after: Sequence[Tensor]) -> Tensor | float:
        layout = self.state.layout
        with torch.no_grad():
            halves = [self.tolerances.ratio(*map(layout.elements, (errors[i], before[i], after[i]))) for i in (0, 1)]
            if callable(self.custom):
                # Of the first step's size the parameters, whose integrals start at 0, have no say.
                rest = self._ratios(errors, before, after) or [torch.zeros_like(p) for p in self.params]
                parts = []
                for half in halves:
                    pieces = torch.split(half, layout.sizes)
                    parts += [p.reshape(shape) for p, shape in zip(pieces, layout.shapes, strict=True)]
                return as_size(self.custom((halves[0].new_zeros((), dtype=layout.real), *parts, *rest)))
            found = [self.state.norm(half) for half in halves]
            if self.custom is None and len(errors) > 2:
                found.append(largest_rms(self._ratios(errors, before, after)))
            return _largest(found)

    def _ratios(self, errors: Sequence[Tensor], before: Sequence[Tensor], after: Sequence[Tensor]) -> list[Tensor]:
        if len(errors) == 2:
            return []
        scale = torch._foreach_maximum(torch._foreach_abs(list(before[2:])), torch._foreach_abs(list(after[2:])))
        rtol, atol = self._own.smallest
        torch._foreach_mul_(scale, rtol)
        torch._foreach_add_(scale, atol)
        return list(torch._foreach_div(list(errors[2:]), list(scale)))


def _largest(sizes: Sequence[Tensor | float]) -> Tensor | float:
    """The largest, NaN if any is; on a GPU without a wait."""
    on_device = [x for x in sizes if isinstance(x, Tensor) and x.device.type != "cpu"]
    if on_device:
        like = on_device[0]
        return torch.stack([torch.as_tensor(x, dtype=torch.float64, device=like.device) for x in sizes]).amax()
    numbers = [float(x) for x in sizes]
    return math.nan if any(map(math.isnan, numbers)) else max(numbers)


def as_size(found: Any) -> Tensor | float:
    """What a norm of the user's returned, as a size: a 0-d tensor or a number.

    Raises:
        TypeError: it is neither.
    """
    if isinstance(found, numbers.Real):
        return abs(float(found))
    if isinstance(found, Tensor) and found.numel() == 1:
        return found.detach().reshape(()).abs()
    raise TypeError(f"options['norm'] must return a number or a tensor of one element, got {type(found).__name__}")
