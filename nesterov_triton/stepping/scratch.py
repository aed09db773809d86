"""Scratch memory of eager solves on a CPU, left by one solve to the next of its kind, with its views.

A solve writes its stages into some dozen rows of the state's size. To make them and their hundred views anew takes a
tenth of a short solve; and what a big solve gives back to the system comes again page by page, each page with a fault.
On other devices torch's allocator keeps memory by itself.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from nesterov_triton import transforms

LIMIT = 128 * 2**20  # bytes that are kept in all


class Scratch(Protocol):
    """Memory with its views; nothing in it is read before it is written."""

    @property
    def nbytes(self) -> int: ...


S = TypeVar("S", bound=Scratch)


class Shelf:
    """Scratch memory that is not in use, the last used last; what goes beyond the limit is dropped, oldest first."""

    def __init__(self, limit: int = LIMIT) -> None:
        self.limit = limit
        self._lock = threading.Lock()
        self._free: OrderedDict[Hashable, Scratch] = OrderedDict()

    def take(self, key: Hashable, like: Tensor, make: Callable[[], S]) -> S:
        """What was put back under this key, or what `make` makes. Nobody else has it until it is put back."""
        if not _plain(like):
            return make()
        with self._lock:
            found = self._free.pop(key, None)
        if found is not None:
            return found  # type: ignore[return-value]
        with torch.inference_mode(False):  # or later solves could not write to it
            return make()

    def put(self, key: Hashable, like: Tensor, scratch: Scratch) -> None:
        """Nobody uses it any more. Not to be called for what a failed solve may still refer to."""
        if not _plain(like) or scratch.nbytes > self.limit:
            return
        with self._lock:
            self._free[key] = scratch
            self._free.move_to_end(key)
            while sum(each.nbytes for each in self._free.values()) > self.limit:
                self._free.popitem(last=False)

    def __len__(self) -> int:
        return len(self._free)

    def clear(self) -> None:
        """Give everything back."""
        with self._lock:
            self._free.clear()


def _plain(like: Tensor) -> bool:
    return like.device.type == "cpu" and type(like) is Tensor and not transforms.active()


SHELF = Shelf()
