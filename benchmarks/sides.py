"""All solvers by turns on every case, as ratios within a round: `python -m benchmarks sides`.

Writes `sides.json` into this machine's folder of `benchmarks/results`, case by case: a run that is broken off, or one
of some cases alone, leaves the others' numbers as they are. Times are CPU time on a CPU.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.cases import MODELS, SIZES, TOLERANCE, Case, WrongAnswer
from benchmarks.contenders import FORWARD, OURS, TRAIN, Absent, Contender, layer
from benchmarks.report import commit, folder, installed, machine, today, versions
from benchmarks.timing import interleave, ratio

PACKAGES = ("torch", "torchdiffeq", "torchode", "torchdyn", "diffrax", "jax")
FIELD = "field alone"
WAYS = {"forward": FORWARD, "train": TRAIN}


def field_alone(case: Case, train: bool) -> Callable[[], object]:
    """The calls of the field that the package's eager solve makes, and nothing else: what it would take at best.

    With `train` also the discrete gradient's calls and their backward passes.
    """
    module = layer(case, gradient="discrete")
    nfe = backward = 0
    ends = [case.t1] if case.recurrence is None else case.recurrence.ends
    for end in ends:
        h1 = module(case.h0, t=(case.t0, end))
        nfe += int(module.stats.nfe_forward)
        if train:
            h1.sum().backward()
            backward += int(module.stats.nfe_backward)
    for x in case.inputs:
        x.grad = None
    t, weights = torch.tensor(case.t0), list(case.field.parameters())

    def call() -> None:
        with torch.no_grad():
            for _ in range(nfe):
                case.field(t, case.h0)
        for _ in range(backward):
            h = case.h0.detach().requires_grad_()
            torch.autograd.grad(case.field(t, h), [h, *weights], case.cotangent)

    return call


def build(
    case: Case, table: dict[str, Callable[[Case], Contender]], train: bool, compiled: bool, patience: float
) -> tuple[dict[str, Callable[[], object]], dict[str, Any]]:
    """The contenders that can run, their answers checked; and their errors, or why they are not timed."""
    calls: dict[str, Callable[[], object]] = {FIELD: field_alone(case, train)}
    answers: dict[str, Any] = {}
    for name, make in table.items():
        if "compiled" in name and not compiled:
            continue
        start = time.perf_counter()
        try:
            solver = make(case)
            errors = case.errors(solver.features(), solver.gradients() if train else None)
        except Absent as why:
            answers[name] = {"left_out": str(why)}
            print(f"  {name}: left out, {why}", file=sys.stderr)
            continue
        except WrongAnswer as what:  # said and not timed; the others still are
            answers[name] = {"wrong": str(what)}
            print(f"  {name}: {what}", file=sys.stderr)
            continue
        call = solver.train if train else solver.forward
        begun = time.perf_counter()
        call()
        if (taken := time.perf_counter() - begun) > patience:
            answers[name] = {"left_out": f"a call took {taken:.0f} s"}
            print(f"  {name}: left out, a call took {taken:.0f} s", file=sys.stderr)
            continue
        calls[name] = call
        answers[name] = {"error": errors[0], "gradient_error": errors[1], "first_seconds": time.perf_counter() - start}
    return calls, answers


def measure(case: Case, way: str, budget: float, compiled: bool, patience: float = math.inf) -> dict[str, Any]:
    """One table: milliseconds of each contender (the median), and how often it takes the time of the package's own.

    Args:
        budget: seconds for all rounds; there are at least 3 and at most 60.
        patience: seconds; a contender that takes longer for a call is left out.
    """
    calls, answers = build(case, WAYS[way], way == "train", compiled, patience)
    start = time.perf_counter()
    for call in calls.values():
        call()
    rounds = min(60, max(3, int(budget / (time.perf_counter() - start))))
    seconds = interleave(calls, rounds, warm_up=1)
    own = [name for name in calls if name.startswith(OURS)]
    return {
        "rounds": rounds,
        "milliseconds": {name: 1e3 * statistics.median(values) for name, values in seconds.items()},
        "ratios": {
            name: {other: ratio(seconds, other, name) for other in calls if other != name and other not in own}
            for name in own
        },
        "answers": answers,
    }


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks sides", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--size", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--way", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--compiled", action="store_true", help="compiled layers too")
    parser.add_argument("--budget", type=float, default=20.0, help="seconds of rounds a table (default: %(default)s)")
    parser.add_argument(
        "--patience", type=float, default=60.0, help="seconds of a call beyond which a solver is left out (%(default)s)"
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    output = folder() / "sides.json"
    for size in options.size:
        for model in options.model:
            case = Case.draw(model, size)
            for way in options.way:
                print(f"{case.name}, {way}", file=sys.stderr)
                found = measure(case, way, options.budget, options.compiled, options.patience)
                stored = json.loads(output.read_text()) if output.exists() else {}
                origin = {
                    "date": today(),
                    "commit": commit(),
                    "versions": versions("nesterov-triton", *installed(*PACKAGES)),
                }
                tables = stored.get("tables", {}) | {f"{case.name}, {way}": found | origin}
                header = {"machine": f"{machine()}, one thread", "tolerance": TOLERANCE}
                output.write_text(json.dumps(header | {"tables": tables}, indent=1) + "\n")
