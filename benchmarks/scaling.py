"""How time grows: `python -m benchmarks scaling`.

Milliseconds of a solve against batch, state width, number of output times and number of steps; forward, and with its
backward pass ("discrete" here, with the field's graphs kept, too; the faster one of torchdiffeq's two there); on one
thread and on two. This package's eager loop, its compiled layer along the batch (one compilation with `dynamic=True`),
torchdiffeq, and the field's calls alone. GNesterovNODE with the field of `benchmarks.problems`, float32; dopri5 at
1e-5, but along the steps the 3/8 rule in fixed steps, so that both take the same.

Wall time (two threads are two clocks), contenders by turns, medians. Writes `scaling.csv` into this machine's folder of
`benchmarks/results`, curve by curve: a run of some leaves the others as they are.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torchdiffeq
from torch import Tensor

import nesterov_triton as nt
from benchmarks.cases import RightHandSide
from benchmarks.problems import BOUND, T0, T1, TOLERANCE, XI, Problem, relative_error
from benchmarks.report import folder, keep_rows, machine
from benchmarks.timing import interleave

NAME = "scaling"
COLUMNS = ("curve", "axis", "value", "way", "threads", "contender", "milliseconds")
BATCH, WIDTH, OUTPUTS, STEPS = 256, 64, 2, 16
AXES: dict[str, tuple[int, ...]] = {
    "batch": (1, 16, 64, 256, 1024, 4096),
    "width": (2, 8, 32, 64, 128, 256),
    "output times": (2, 8, 32, 128),
    "steps": (4, 16, 64, 256),
}
THREADS = (1, 2)
WAYS = ("forward", "train")
EAGER, COMPILED, PEER, FIELD = "nesterov_triton eager", "nesterov_triton compiled", "torchdiffeq", "field alone"
KEPT = "nesterov_triton eager, kept"
# Two solvers at 1e-5, or two that take the same fixed steps.
AGREE = 1e-3


class Case:
    """One point of a curve: a problem, and how it is to be solved."""

    def __init__(self, axis: str, value: int) -> None:
        sizes = {"batch": BATCH, "width": WIDTH, "output times": OUTPUTS, "steps": STEPS} | {axis: value}
        self.problem = Problem.draw(sizes["batch"], sizes["width"])
        self.times = torch.linspace(T0, T1, sizes["output times"])
        fixed = (T1 - T0) / sizes["steps"]
        tolerances: dict[str, Any] = {"rtol": TOLERANCE, "atol": TOLERANCE}
        self.own: dict[str, Any] = tolerances
        self.peer: dict[str, Any] = tolerances | {"method": "dopri5"}
        if axis == "steps":
            self.own = {"method": "rk4_38", "step_size": fixed}
            self.peer = {"method": "rk4", "options": {"step_size": fixed}}
        gate = nt.gates.Softclip(BOUND)
        options: dict[str, Any] = {"gate": gate, "xi": XI, "t": self.times.tolist(), **self.own}
        self.layer = nt.GNesterovNODE(self.problem.field, **options)
        kept = nt.gradients.Discrete(recompute=False)
        self.kept = nt.GNesterovNODE(self.problem.field, gradient=kept, **options)

    def ours(self, module: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Features at the output times after the first, or at the last one alone: [n, batch, width]."""
        h: Tensor = (self.layer if module is None else module)(self.problem.h0)
        return h[None] if len(self.times) == 2 else h[1:]

    def torchdiffeq(self, adjoint: bool = False) -> Tensor:
        system = RightHandSide("GNesterovNODE", self.problem.field, None)
        h0, t = self.problem.h0, self.times
        odeint = torchdiffeq.odeint_adjoint if adjoint else torchdiffeq.odeint
        z = odeint(system, system.start(h0, t[0]), t, **self.peer)
        h: Tensor = system.scale(t[1:])[:, None, None] * z[1:, 0]
        return h

    def train(self, solve: Callable[[], Tensor]) -> object:
        return torch.autograd.grad((solve() * self.problem.cotangent).sum(), self.problem.inputs)

    def field_alone(self, backward: bool) -> Callable[[], object]:
        """The calls of the field that the package's own solve makes, with their backward passes."""
        problem, t = self.problem, torch.tensor(T0)
        with torch.set_grad_enabled(backward):
            h1 = self.ours()
            nfe = int(self.layer.stats.nfe_forward)
            again = 0
            if backward:
                torch.autograd.grad(h1.sum(), problem.inputs)
                again = int(self.layer.stats.nfe_backward)

        def call() -> None:
            with torch.no_grad():
                for _ in range(nfe):
                    problem.field(t, problem.h0)
            for _ in range(again):
                h = problem.h0.detach().requires_grad_()
                torch.autograd.grad(problem.field(t, h), [h, *problem.field.parameters()], problem.cotangent)

        return call

    def contenders(self, way: str, compiled: Callable[[Tensor], Tensor] | None) -> dict[str, Callable[[], object]]:
        """What is timed, once the answers agree.

        Raises:
            RuntimeError: they do not.
        """
        solves: dict[str, Callable[[], Tensor]] = {EAGER: self.ours, PEER: self.torchdiffeq}
        if compiled is not None:
            solves[COMPILED] = partial(self.ours, compiled)
        if way == "train":
            solves[KEPT] = partial(self.ours, self.kept)
            solves[PEER] = self._faster([self.torchdiffeq, partial(self.torchdiffeq, adjoint=True)])
        with torch.set_grad_enabled(way == "train"):
            answers = {name: solve() for name, solve in solves.items()}
            for name, found in answers.items():
                error = relative_error(found, answers[PEER].detach().double())
                if not error < AGREE:
                    raise RuntimeError(f"{name} and {PEER} differ by {error:.1e}")
        wrap = self.train if way == "train" else torch.no_grad()(lambda solve: solve())
        calls: dict[str, Callable[[], object]] = {name: partial(wrap, solve) for name, solve in solves.items()}
        return calls | {FIELD: self.field_alone(way == "train")}

    def _faster(self, solves: Sequence[Callable[[], Tensor]]) -> Callable[[], Tensor]:
        def seconds(solve: Callable[[], Tensor]) -> float:
            self.train(solve)
            start = time.perf_counter()
            self.train(solve)
            return time.perf_counter() - start

        return min(solves, key=seconds)


def measure(
    axis: str, values: Sequence[int], way: str, threads: int, budget: float, compiled: bool
) -> list[dict[str, Any]]:
    """The rows of one curve.

    Args:
        budget: seconds for the rounds of a point; there are at least 3 and at most 40.
        compiled: with the compiled layer, where the axis is the batch and the way is forward.
    """
    torch.set_num_threads(threads)
    rows = []
    module: Any = None
    for value in values:
        case = Case(axis, value)
        # A batch of 1 would be a graph of its own; the others share one: weights are drawn before the batch.
        if compiled and axis == "batch" and way == "forward" and value > 1 and module is None:
            module = torch.compile(case.layer, fullgraph=True, dynamic=True)
        calls = case.contenders(way, module)
        for call in calls.values():
            call()
        start = time.perf_counter()
        for call in calls.values():
            call()
        rounds = min(40, max(3, int(budget / (time.perf_counter() - start))))
        seconds = interleave(calls, rounds, warm_up=1, clock=time.perf_counter)
        common = {"curve": curve(axis, way, threads), "axis": axis, "value": value, "way": way, "threads": threads}
        rows += [
            common | {"contender": name, "milliseconds": f"{1e3 * statistics.median(times):.4g}"}
            for name, times in seconds.items()
        ]
    return rows


def curve(axis: str, way: str, threads: int) -> str:
    return f"{axis}, {way}, {threads}"


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks scaling", description=__doc__.partition("\n")[0])
    parser.add_argument("--axis", nargs="+", choices=AXES, default=list(AXES))
    parser.add_argument("--way", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--threads", nargs="+", type=int, default=list(THREADS))
    parser.add_argument("--compiled", action="store_true", help="the compiled layer too, along the batch")
    parser.add_argument("--budget", type=float, default=1.0, help="seconds of rounds a point (default: %(default)s)")
    options = parser.parse_args(arguments)
    for axis in options.axis:
        for way in options.way:
            for threads in options.threads:
                print(curve(axis, way, threads), file=sys.stderr)
                rows = measure(axis, AXES[axis], way, threads, options.budget, options.compiled)
                path = folder() / f"{NAME}.csv"
                keep_rows(path, COLUMNS, "curve", curve(axis, way, threads), rows, ("torch", "torchdiffeq"), machine())
