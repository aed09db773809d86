"""Numbers as they are given: Python's, or numpy's scalars; and no others."""

from __future__ import annotations

import math
import numbers
from typing import TypeGuard

import torch


def is_number(value: object) -> TypeGuard[float]:
    """Whether `value` is a real number: not a bool, a string or a tensor. It may be infinite or NaN."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def is_integer(value: object) -> TypeGuard[int]:
    """Whether `value` is an integer by its type, too."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_whole(value: object) -> TypeGuard[int]:
    """Whether `value` is a real number without a fraction, finite."""
    return type(value) is int or (is_number(value) and math.isfinite(value) and value == int(value))


def plain(value: float) -> float:
    """Python's own float or int: numpy's scalars come out of arithmetic with tensors as numpy's arrays."""
    if torch.compiler.is_compiling() or type(value) in (float, int):  # a tracer's numbers have sources, not types
        return value
    return int(value) if is_integer(value) else float(value)


def make_plain(owner: object, kind: str) -> None:
    """Each attribute of a frozen dataclass of numbers as Python's own.

    Raises:
        TypeError: one is no number; `kind` is what its owner is called.
    """
    if torch.compiler.is_compiling():  # made of another one's numbers, by code that knows no attributes by name
        return
    for name, value in vars(owner).items():
        if not is_number(value):
            raise TypeError(f"{kind} {name} must be a number, got {value!r}")
        if plain(value) is not value:
            object.__setattr__(owner, name, plain(value))
