"""Speed, operators and memory on one CPU thread, beside torchdiffeq: `python -m benchmarks.cpu`.

Both packages solve the same GNesterovNODE (see `benchmarks.problems`) with dopri5 in float32, rtol = atol = 1e-5. Both
answers and gradients are held against a tight float64 solution before anything is timed: a wrong one ends the run.
Times are CPU time. The contenders take turns in an order drawn anew in each round, and a ratio is the median of the
ratios within a round, so that a machine that slows down slows down all of them. Counts of operators and bytes are exact
(see `benchmarks.counters`).

Prints a Markdown table and writes `cpu.json` into this machine's folder of `benchmarks/results`.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor

import nesterov_triton as nt
from benchmarks import timing
from benchmarks.counters import LiveMemory, MarkedField, OperatorCount, PerStep, per_step
from benchmarks.problems import (
    BOUND,
    SYSTEM,
    T0,
    T1,
    TOLERANCE,
    XI,
    PackageSystem,
    Problem,
    TorchdiffeqSystem,
    relative_error,
)
from benchmarks.report import Line, run

WRONG = 1e-3  # the relative error of an answer or a gradient that ends the run: a hundred tolerances
GRADIENTS = ("discrete", "adjoint", "backprop")
# Solves of different length, for counts per step.
TOLERANCES = (1e-3, 1e-4, 1e-5, 1e-6)
STEP_SIZES = (1 / 4, 1 / 8, 1 / 32)


def layer(problem: Problem, gradient: Any) -> nt.GNesterovNODE:
    gate = nt.gates.Softclip(BOUND)
    return nt.GNesterovNODE(
        problem.field, gate=gate, xi=XI, t=(T0, T1), rtol=TOLERANCE, atol=TOLERANCE, gradient=gradient
    )


# --- answers


def check_answers(problem: Problem) -> dict[str, dict[str, float]]:
    """Errors of features and gradients, NFE and steps of every contender.

    Raises:
        RuntimeError: an answer or a gradient is wrong, or the package's NFE is not the number of calls of the field.
    """
    h_true, gradients_true = problem.truth()

    def errors(name: str, h1: Tensor) -> dict[str, float]:
        error = relative_error(h1, h_true)
        gradient_error = max(map(relative_error, problem.gradients(h1), gradients_true))
        if not max(error, gradient_error) < WRONG:
            raise RuntimeError(f"{name}: wrong answer, error {error:.1e}, of the gradients {gradient_error:.1e}")
        return {"error": error, "gradient_error": gradient_error}

    answers = {}
    for gradient in GRADIENTS:
        marked = MarkedField(problem.field)
        package = PackageSystem(marked)
        h1 = package.solve(problem.h0, rtol=TOLERANCE, atol=TOLERANCE, gradient=gradient)
        calls, stats = marked.calls, package.stats
        if calls != stats.nfe_forward:
            raise RuntimeError(f"{gradient}: stats say {stats.nfe_forward} evaluations, the field counted {calls}")
        answers[gradient] = errors(gradient, h1) | asdict(stats)
        answers[f"{gradient}, layer"] = errors(f"{gradient}, layer", layer(problem, gradient)(problem.h0))
    for name, adjoint in (("odeint", False), ("odeint_adjoint", True)):
        marked = MarkedField(problem.field)
        peer = TorchdiffeqSystem(marked)
        h1 = peer.solve(problem.h0, rtol=TOLERANCE, atol=TOLERANCE, adjoint=adjoint)
        counts = {"nfe_forward": marked.calls, "accepted": peer.accepted, "rejected": peer.rejected}
        answers[f"torchdiffeq {name}"] = counts | errors(name, h1)
    return answers


# --- times


def measure_times(problem: Problem, nfe: int, nfe_backward: int, rounds: int) -> dict[str, list[float]]:
    """CPU seconds per round of solves without and with a backward pass, and of the field alone.

    "field" is `nfe` calls without a graph, "train, field" adds `nfe_backward` calls with one and their backward passes:
    what the package's solves with the discrete gradient would take if the rest of them cost nothing.
    """
    tolerances: dict[str, Any] = {"rtol": TOLERANCE, "atol": TOLERANCE}
    package, peer = PackageSystem(problem.field), TorchdiffeqSystem(problem.field)
    layers = {gradient: layer(problem, gradient) for gradient in GRADIENTS}
    t = torch.tensor(T0)

    def field_calls(h0: Tensor) -> None:
        for _ in range(nfe):
            problem.field(t, h0)

    def field_gradients(h0: Tensor) -> None:
        with torch.no_grad():
            field_calls(h0)
        for _ in range(nfe_backward):
            h = h0.detach().requires_grad_()
            torch.autograd.grad(problem.field(t, h), [h, *problem.field.parameters()], problem.cotangent)

    def forward(solve: Callable[[Tensor], object]) -> Callable[[], object]:
        return torch.no_grad()(lambda: solve(problem.h0))

    def train(solve: Callable[..., Tensor], **options: Any) -> Callable[[], object]:
        return lambda: problem.gradients(solve(problem.h0, **options))

    contenders = {
        "field": forward(field_calls),
        "forward, solve": forward(lambda h0: package.solve(h0, **tolerances)),
        "forward, layer": forward(layers["discrete"]),
        "forward, odeint": forward(lambda h0: peer.solve(h0, **tolerances)),
        "train, field": lambda: field_gradients(problem.h0),
        "train, odeint": train(peer.solve, **tolerances),
        "train, odeint_adjoint": train(peer.solve, adjoint=True, **tolerances),
    }
    for gradient in GRADIENTS:
        contenders[f"train, solve {gradient}"] = train(package.solve, gradient=gradient, **tolerances)
        contenders[f"train, layer {gradient}"] = train(layers[gradient])
    return timing.interleave(contenders, rounds)


# --- counts


def count_operators(problem: Problem, system: type[PackageSystem] | type[TorchdiffeqSystem]) -> dict[str, PerStep]:
    """Operators, views and host reads of forward solves, the field's own left out."""
    found = []
    system(problem.field).solve(problem.h0, rtol=TOLERANCE, atol=TOLERANCE)  # makes what is made once and kept
    for tolerance in TOLERANCES:
        marked = MarkedField(problem.field)
        solver = system(marked)
        with OperatorCount(marked) as count:
            solver.solve(problem.h0, rtol=tolerance, atol=tolerance)
        found.append((solver.accepted, solver.rejected, count))
    return {
        "operators": per_step([(a, r, count.solver.total()) for a, r, count in found]),
        "views": per_step([(a, r, count.views.total()) for a, r, count in found]),
        "host reads": per_step([(a, r, count.host_reads) for a, r, count in found]),
    }


def count_memory(problem: Problem, gradient: str, method: str) -> PerStep:
    """Peak memory of a forward and backward solve, in states (x, m)."""
    solves: list[dict[str, Any]] = [{"rtol": tolerance, "atol": tolerance} for tolerance in TOLERANCES]
    if method == "rk4":
        solves = [{"step_size": step_size} for step_size in STEP_SIZES]
    package = PackageSystem(problem.field)
    state = 2 * problem.h0.nbytes
    found = []
    for options in solves:
        with LiveMemory() as memory:
            problem.gradients(package.solve(problem.h0, gradient=gradient, method=method, **options))
        found.append((package.accepted, package.rejected, memory.peak / state))
    return per_step(found)


# --- report


def measure(rounds: int) -> tuple[list[Line], dict[str, Any]]:
    """The lines of the table, and the numbers behind them."""
    problem = Problem.draw()
    answers = check_answers(problem)
    stats, peer_stats = answers["discrete"], answers["torchdiffeq odeint"]
    nfe, nfe_backward = int(stats["nfe_forward"]), int(stats["nfe_backward"])
    seconds = measure_times(problem, nfe, nfe_backward, rounds)
    ours, peer = count_operators(problem, PackageSystem), count_operators(problem, TorchdiffeqSystem)
    memory = {
        (gradient, method): count_memory(problem, gradient, method)
        for gradient in GRADIENTS
        for method in ("dopri5", "rk4")
    }

    ratio = partial(timing.ratio, seconds)
    lines = []
    for way in ("solve", "layer"):
        lines.append(
            Line(f"{way}, forward / calls of the field", ratio(f"forward, {way}", "field"), ("<=", 3), f"NFE {nfe}")
        )
    note = f"NFE {peer_stats['nfe_forward']:g}"
    for way in ("solve", "layer"):
        what = f"torchdiffeq `odeint` / {way}, forward"
        lines.append(Line(what, ratio("forward, odeint", f"forward, {way}"), (">=", 5), note))
    lines.append(Line("torchdiffeq `odeint` / calls of the field: the bound", ratio("forward, odeint", "field")))
    for rival, goal in (("odeint_adjoint", 5.0), ("odeint", 3.0)):
        for way in ("solve discrete", "layer discrete", "solve adjoint", "solve backprop"):
            what = f"torchdiffeq `{rival}` / {way}, forward and backward"
            target = (">=", goal) if "discrete" in way else None
            lines.append(Line(what, ratio(f"train, {rival}", f"train, {way}"), target))
        what = f"torchdiffeq `{rival}` / the field's calls and backward passes: the bound"
        lines.append(Line(what, ratio(f"train, {rival}", "train, field")))
    for what, target in (("operators", ("<=", 90.0)), ("host reads", ("=", 1.0)), ("views", None)):
        note = f"torchdiffeq {peer[what].accepted:g}"
        lines.append(Line(f"{what} per accepted step, forward", ours[what].accepted, target, note))
    growth = {"adjoint": ("=", 0.0), "discrete": ("=", 1.0)}
    for (gradient, method), found in memory.items():
        what = f"peak memory per accepted step, in states (x, m): {gradient}, {method}"
        lines.append(Line(what, found.accepted, growth.get(gradient)))
    return lines, {
        "answers": answers,
        "cpu_milliseconds": {
            name: {"median": 1e3 * statistics.median(values), "least": 1e3 * min(values)}
            for name, values in seconds.items()
        },
        "counts": {
            "nesterov_triton": {name: asdict(found) for name, found in ours.items()},
            "torchdiffeq": {name: asdict(found) for name, found in peer.items()},
        },
        "memory_in_states": {", ".join(name): asdict(found) for name, found in memory.items()},
    }


if __name__ == "__main__":
    run("cpu", __doc__.partition("\n")[0], SYSTEM, measure, "torch", "torchdiffeq", "nesterov-triton")
