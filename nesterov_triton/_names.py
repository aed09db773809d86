"""Look-up of named choices: an unknown name raises with the nearest valid one, if one is near."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


def lookup(kind: str, name: object, choices: Mapping[str, T]) -> T:
    """Return ``choices[name]``.

    Raises:
        ValueError: `name` is unknown; the message gives all valid names, and the nearest if one is near.
    """
    if isinstance(name, str) and name in choices:
        return choices[name]
    raise ValueError(unknown(kind, name, choices))


# Below it are pairs like gate and gradient (0.67), above it misspellings like learned for learnable (0.75).
ALIKE = 0.7


def unknown(kind: str, name: object, choices: Mapping[str, object], owners: Sequence[str] = ()) -> str:
    """What to say of a name that is not among `choices`: all of them, and the nearest valid one if it is near.

    Args:
        owners: what knows this name, where something else does; said instead of a guess.
    """
    lowered, given = {choice.lower(): choice for choice in choices}, str(name).lower()
    alike = {choice: difflib.SequenceMatcher(None, given, choice).ratio() for choice in lowered}
    near = max(alike, key=lambda choice: alike[choice], default="")  # of several the first, dopri5 before dopri8
    if alike.get(near, 0) < ALIKE:
        near = next((choice for choice in lowered if len(choice) >= 4 and choice in given), "")  # seminorm for norm
    hint = f"did you mean {lowered[near]!r}? " if near else ""
    if owners:
        hint = f"that is for {' and '.join(owners)}; "
    return f"unknown {kind} {name!r}: {hint}valid names are {', '.join(choices)}"


def public(module: Mapping[str, Any]) -> list[str]:
    """What `dir` of a module shows, given its globals: what it offers, and what every module has."""
    return sorted({*module["__all__"], *(name for name in module if name.startswith("__") and name.endswith("__"))})
