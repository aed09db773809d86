"""Every solver a user would pick, on one case: `pytest benchmarks/ [--model ...] [--size ...] [--compiled]`.

An entry is timed once its features and gradients agree with a tight float64 solution. pytest-benchmark times one entry
after the other; for ratios on a machine that does other things, `python -m benchmarks sides` takes them by turns.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pytest

from benchmarks.cases import Case, ModelName
from benchmarks.contenders import FORWARD, TRAIN, Absent, Contender

BUDGET = 0.5  # seconds for the rounds of one entry, of which there are at least three


@lru_cache(maxsize=1)
def drawn(model: ModelName, size: str, device: str) -> Case:
    return Case.draw(model, size, device)


def measure(benchmark: Any, call: Callable[[], object]) -> None:
    call()  # compilation, and what is made once and kept
    start = time.perf_counter()
    call()
    once = max(time.perf_counter() - start, 1e-6)
    benchmark.pedantic(call, rounds=min(max(3, int(BUDGET / once)), 200), iterations=1)


def contender(
    table: dict[str, Callable[[Case], Contender]], name: str, case: Case, request: pytest.FixtureRequest
) -> Contender:
    if "compiled" in name and not request.config.getoption("--compiled"):
        pytest.skip("compiled layers are timed with --compiled")
    try:
        return table[name](case)
    except Absent as why:
        pytest.skip(str(why))


@pytest.mark.parametrize("name", FORWARD)
def test_forward(benchmark: Any, request: pytest.FixtureRequest, model: ModelName, size: str, name: str) -> None:
    case = drawn(model, size, request.config.getoption("--device"))
    solver = contender(FORWARD, name, case, request)
    benchmark.group = f"forward: {case.name}"
    benchmark.extra_info["error"], _ = case.errors(solver.features(), None)
    measure(benchmark, solver.forward)


@pytest.mark.parametrize("name", TRAIN)
def test_forward_and_backward(
    benchmark: Any, request: pytest.FixtureRequest, model: ModelName, size: str, name: str
) -> None:
    case = drawn(model, size, request.config.getoption("--device"))
    solver = contender(TRAIN, name, case, request)
    benchmark.group = f"forward and backward: {case.name}"
    errors = case.errors(solver.features(), solver.gradients())
    benchmark.extra_info["error"], benchmark.extra_info["gradient_error"] = errors
    measure(benchmark, solver.train)
