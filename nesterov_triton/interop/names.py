"""What a message calls things, and what a tracer is to leave alone."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar, cast

import torch
from torch import nn

P = ParamSpec("P")
R = TypeVar("R")


def name_of(function: object) -> str:
    """What the user knows the function by."""
    kind = type(function).__name__
    return kind if isinstance(function, nn.Module) else getattr(function, "__name__", kind)


def untraced(function: Callable[P, R]) -> Callable[P, R]:
    """The function as torch.compile is to call it: in Python. The layers are what can be traced."""

    disabled: list[Callable[P, R]] = []

    @functools.wraps(function)
    def call(*args: P.args, **keywords: P.kwargs) -> R:
        # Only where a tracer has been loaded: loading it takes seconds, and triton with it.
        if "torch._dynamo" not in sys.modules:
            return function(*args, **keywords)
        if not disabled:
            disabled.append(cast(Callable[P, R], torch.compiler.disable(function)))  # type: ignore[no-untyped-call]
        return disabled[0](*args, **keywords)

    return call
