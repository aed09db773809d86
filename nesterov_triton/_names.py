"""Look-up of named choices: an unknown name raises with the nearest valid one."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")


def lookup(kind: str, name: object, choices: Mapping[str, T]) -> T:
    """Return ``choices[name]``.

    Raises:
        ValueError: `name` is unknown; the message gives the nearest valid name and all of them.
    """
    if isinstance(name, str) and name in choices:
        return choices[name]
    raise ValueError(unknown(kind, name, choices))


def unknown(kind: str, name: object, choices: Mapping[str, object]) -> str:
    """What to say of a name that is not among `choices`: the nearest valid one, and all of them."""
    near = difflib.get_close_matches(str(name).lower(), list(choices), n=1, cutoff=0.0)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"unknown {kind} {name!r}: {hint}valid names are {', '.join(choices)}"
