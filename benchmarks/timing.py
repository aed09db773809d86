"""Contenders timed by turns, so that a machine that slows down slows down all of them."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence


def interleave(
    contenders: dict[str, Callable[[], object]],
    rounds: int,
    warm_up: int = 3,
    clock: Callable[[], float] = time.process_time,
    raised: dict[str, str] | None = None,
) -> dict[str, list[float]]:
    """Seconds (of CPU time) of each contender in each round; every round runs each one once, in a new order.

    Args:
        raised: is told which contender raised what; that one is left out, and the others go on.
    """
    order = list(contenders)
    shuffle = random.Random(0).shuffle
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    # A collection belongs to no contender: between them, and only over what they left, or it would empty the caches.
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        for number in range(warm_up + rounds):
            shuffle(order)
            for name in list(order):
                gc.collect()
                try:
                    start = clock()
                    contenders[name]()
                    elapsed = clock() - start
                except Exception as error:
                    if raised is None:
                        raise
                    raised[name] = f"{type(error).__name__}: {error}"
                    order.remove(name)
                    del seconds[name]
                    continue
                if number >= warm_up:
                    seconds[name].append(elapsed)
    finally:  # whatever comes after is to be collected again
        gc.enable()
        gc.unfreeze()
    return seconds


def ratio(seconds: Mapping[str, Sequence[float]], numerator: str, denominator: str) -> float:
    """The median of the ratios within a round."""
    return statistics.median(a / b for a, b in zip(seconds[numerator], seconds[denominator], strict=True))
