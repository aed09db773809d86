"""Work and precision of every adaptive method, here and in the peers: `python -m benchmarks precision`.

Global error against evaluations of the field and against time, at tolerances 1e-2 to 1e-9 (rtol = atol), in float64,
on the problems of `benchmarks.initial_values`. The methods are those that each package's own registry names, implicit
ones left out. Evaluations are counted by one counter around the field, for every package: calls, which a solver that
has steps for each sample makes for all of them at once. A solve ends after `MOST` evaluations.

Errors and evaluations are the same on every machine, and go into `results/precision.csv`. With `--time`, the
milliseconds of a solve (CPU time, one thread, contenders by turns) go into this machine's own folder. A run of some
groups alone leaves the others' rows as they are.
"""

from __future__ import annotations

import argparse
import importlib
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch
import torchdiffeq
from torch import Tensor

import nesterov_triton as nt
from benchmarks.contenders import OURS, Absent, load
from benchmarks.initial_values import GROUPS, Array, Field, InitialValues, problems
from benchmarks.report import RESULTS, folder, installed, keep_rows, machine, read_rows
from benchmarks.timing import interleave
from nesterov_triton.methods import METHODS
from nesterov_triton.nystrom import Nystrom, check
from nesterov_triton.systems import as_system

TOLERANCES = tuple(10.0**-k for k in range(2, 10))
MOST, MOST_TIMED = 6000, 2000
NAME = "precision"
COLUMNS = ("group", "problem", "package", "method", "order", "tolerance", "evaluations", "error", "note")
TIMED = ("group", "problem", "package", "method", "tolerance", "milliseconds")
# Of DETEST one problem of each class is timed.
TIMED_PROBLEMS = ("point cloud", "A3", "B5", "C5", "D3", "E2", "damped oscillator")
PACKAGES = ("torch", "torchdiffeq", "torchode", "torchdyn", "diffrax", "jax")

Solve: TypeAlias = Callable[[float], Array]


class NotSolved(Exception):
    """Why there is no answer, in words."""


class TooMany(NotSolved):
    """A solve asked for more than `MOST` evaluations."""

    def __init__(self) -> None:
        super().__init__(f"more than {MOST} evaluations")


class Counter:
    """Counts the evaluations of a field, whoever asks for them."""

    def __init__(self) -> None:
        self.calls = 0

    def tick(self) -> None:
        self.calls += 1

    def around(self, field: Field) -> Field:
        def counted(t: Any, h: Any) -> Any:
            self.tick()
            if self.calls > MOST:
                raise TooMany
            return field(t, h)

        return counted


@dataclass(frozen=True, eq=False)
class Method:
    """An adaptive method of a package.

    Attributes:
        package, name: its own names.
        order: of the solution that is propagated.
        prepare: given a problem and a counter, or None for timing, solves it at a tolerance.

    Raises (from `prepare`'s function):
        NotSolved: in words.
    """

    package: str
    name: str
    order: int
    prepare: Callable[[InitialValues, Counter | None], Solve]


def _field(problem: InitialValues, counter: Counter | None) -> Field:
    field = problem.field(torch)
    return field if counter is None else counter.around(field)


# --- this package


def ours() -> Iterator[Method]:
    def prepare(method: Any) -> Callable[[InitialValues, Counter | None], Solve]:
        def prepared(problem: InitialValues, counter: Counter | None) -> Solve:
            y0 = torch.tensor(problem.y0)
            system = as_system(problem.system(_field(problem, counter)))
            if isinstance(method, Nystrom):
                try:
                    check(method, system)
                except ValueError as error:
                    raise Absent(str(error)) from None
            state: Any = (y0[0], y0[1]) if problem.momentum else y0
            times = (problem.t0, problem.t1)

            def solve(tolerance: float) -> Array:
                try:
                    final = nt.solve(system, state, times, method=method.name, rtol=tolerance, atol=tolerance).final
                except nt.SolveError as error:
                    raise NotSolved(error.status.name) from None
                return (torch.stack(final) if isinstance(final, tuple) else final).numpy()

            return solve

        return prepared

    for name, method in METHODS.items():
        if method.adaptive:
            yield Method(OURS, name, method.order, prepare(method))


# --- torchdiffeq


def torchdiffeq_() -> Iterator[Method]:
    registry: dict[str, Any] = importlib.import_module("torchdiffeq._impl.odeint").SOLVERS
    adaptive = importlib.import_module("torchdiffeq._impl.rk_common").RKAdaptiveStepsizeODESolver

    def prepare(name: str) -> Callable[[InitialValues, Counter | None], Solve]:
        def prepared(problem: InitialValues, counter: Counter | None) -> Solve:
            y0, t = torch.tensor(problem.y0), torch.tensor([problem.t0, problem.t1], dtype=torch.float64)
            rates = problem.rates(torch, _field(problem, counter))

            def solve(tolerance: float) -> Array:
                try:
                    y = torchdiffeq.odeint(rates, y0, t, rtol=tolerance, atol=tolerance, method=name)
                except AssertionError as error:
                    raise NotSolved(str(error).rstrip("0123456789.e+- ")) from None
                final: Array = y[-1].numpy()
                return final

            return solve

        return prepared

    for name, solver in registry.items():
        if issubclass(solver, adaptive):
            yield Method("torchdiffeq", name, solver.order, prepare(name))


# --- torchode: [batch, features], and a time for each sample


def _for_rows(problem: InitialValues, field: Field) -> tuple[Field, Tensor]:
    """The right-hand side on [batch, features], x and m side by side, its time 0-d, [1] or [batch]; and the state."""
    rates, y0 = problem.rates(torch, field), torch.tensor(problem.y0)
    if not problem.momentum:
        return lambda t, y: rates(t.reshape(-1)[0], y[0])[None], y0[None]

    def f(t: Tensor, y: Tensor) -> Tensor:
        z = torch.stack(y.chunk(2, dim=1))
        return torch.cat(tuple(rates(t if t.ndim == 0 else t[:, None], z)), dim=1)

    return f, torch.cat(tuple(y0), dim=1)


def _from_rows(problem: InitialValues, y: Tensor) -> Array:
    return (torch.stack(y.chunk(2, dim=1)) if problem.momentum else y[0]).numpy()


def torchode_() -> Iterator[Method]:
    torchode = load("torchode")
    registry = importlib.import_module("torchode.interface").METHODS

    def prepare(make: Any) -> Callable[[InitialValues, Counter | None], Solve]:
        def prepared(problem: InitialValues, counter: Counter | None) -> Solve:
            f, y0 = _for_rows(problem, _field(problem, counter))
            term = torchode.ODETerm(f, with_stats=False)
            start, end = (torch.full((len(y0),), t, dtype=torch.float64) for t in (problem.t0, problem.t1))
            values = torchode.InitialValueProblem(y0=y0, t_start=start, t_end=end)

            def solve(tolerance: float) -> Array:
                controller = torchode.IntegralController(atol=tolerance, rtol=tolerance, term=term)
                solution = torchode.AutoDiffAdjoint(make(term=term), controller).double().solve(values)
                status = int(solution.status.max())
                if status != torchode.Status.SUCCESS.value:
                    raise NotSolved(torchode.Status(status).name)
                return _from_rows(problem, solution.ys[:, -1])

            return solve

        return prepared

    adaptive = importlib.import_module("torchode.single_step_methods.runge_kutta").ExplicitRungeKutta
    for name, make in registry.items():
        if isinstance(make, type) and issubclass(make, adaptive):  # all but Euler's have an estimate
            yield Method("torchode", name, make(term=None).convergence_order(), prepare(make))


# --- torchdyn


def torchdyn_() -> Iterator[Method]:
    odeint = load("torchdyn.numerics").odeint
    registry = load("torchdyn.numerics.solvers.ode").SOLVER_DICT

    def prepare(name: str) -> Callable[[InitialValues, Counter | None], Solve]:
        def prepared(problem: InitialValues, counter: Counter | None) -> Solve:
            f, y0 = _for_rows(problem, _field(problem, counter))
            t = torch.tensor([problem.t0, problem.t1], dtype=torch.float64)

            def solve(tolerance: float) -> Array:
                states = odeint(f, y0, t, name, rtol=tolerance, atol=tolerance)[1]
                return _from_rows(problem, states[-1])

            return solve

        return prepared

    seen = set()
    for name, solver in registry.items():
        if solver in seen:  # under a second name
            continue
        seen.add(solver)
        with suppress(TypeError):  # one that takes more than its type
            made = solver(dtype=torch.float64)
            if made.stepping_class == "adaptive":
                yield Method("torchdyn", name, made.order, prepare(name))


# --- diffrax


def diffrax_() -> Iterator[Method]:
    diffrax, jax = load("diffrax"), load("jax")
    jnp = jax.numpy

    def prepare(solver: Any) -> Callable[[InitialValues, Counter | None], Solve]:
        def prepared(problem: InitialValues, counter: Counter | None) -> Solve:
            plain = problem.field(jnp)

            def field(t: Any, h: Any) -> Any:
                if counter is not None:
                    jax.debug.callback(counter.tick)
                return plain(t, h)

            rates = problem.rates(jnp, field)

            def run(y0: Any, tolerance: Any) -> Any:
                solution = diffrax.diffeqsolve(
                    diffrax.ODETerm(lambda t, y, _: rates(t, y)), solver(), problem.t0, problem.t1, None, y0,
                    stepsize_controller=diffrax.PIDController(rtol=tolerance, atol=tolerance),
                    saveat=diffrax.SaveAt(t1=True), max_steps=MOST, throw=False,
                )  # fmt: skip
                return solution.ys[0], solution.result == diffrax.RESULTS.successful

            y0 = jnp.asarray(problem.y0)
            compiled = jax.jit(run)

            def solve(tolerance: float) -> Array:
                with jax.enable_x64(True):
                    found, good = compiled(y0, tolerance)
                    jax.effects_barrier()
                    if counter is not None and counter.calls > MOST:
                        raise TooMany
                    if not good:
                        raise NotSolved("not successful")
                    return np.asarray(found)

            return solve

        def in_float64(problem: InitialValues, counter: Counter | None) -> Solve:
            with jax.enable_x64(True):
                return prepared(problem, counter)

        return in_float64

    for name, solver in vars(diffrax).items():
        if isinstance(solver, type) and issubclass(solver, diffrax.AbstractERK) and name != "AbstractERK":
            yield Method("diffrax", name, solver().order(None), prepare(solver))


REGISTRIES: dict[str, Callable[[], Iterator[Method]]] = {
    OURS: ours,
    "torchdiffeq": torchdiffeq_,
    "torchode": torchode_,
    "torchdyn": torchdyn_,
    "diffrax": diffrax_,
}


def methods() -> list[Method]:
    """Every adaptive method of every package that is installed; the others say that they are not."""
    found: list[Method] = []
    for name, registry in REGISTRIES.items():
        try:
            found += registry()
        except Absent as why:
            print(f"{name}: left out, {why}", file=sys.stderr)
    return found


# --- the diagrams' numbers


def curve(method: Method, problem: InitialValues, tolerances: Sequence[float] = TOLERANCES) -> list[dict[str, Any]]:
    """A row for each tolerance, until the evaluations become too many.

    Empty where the method is not for such a problem.
    """
    rows: list[dict[str, Any]] = []
    solve, counter = None, Counter()
    for tolerance in tolerances:
        counter.calls = 0
        row: dict[str, Any] = {
            "group": problem.group, "problem": problem.name, "package": method.package, "method": method.name,
            "order": method.order, "tolerance": f"{tolerance:.0e}", "evaluations": "", "error": "", "note": "",
        }  # fmt: skip
        try:
            with torch.no_grad():
                solve = solve or method.prepare(problem, counter)
                error = problem.error(solve(tolerance))
            row |= {"evaluations": counter.calls, "error": f"{error:.3e}"}
            if not math.isfinite(error):
                row["note"] = "not finite"
        except Absent:
            return []
        except TooMany as why:
            row["note"] = str(why)
            if any(not earlier["note"] for earlier in rows):  # else it was lost, and may do better with smaller steps
                rows.append(row)
                break
        except NotSolved as why:
            row["note"] = str(why)
        rows.append(row)
    return rows


def measure_times(
    problem: InitialValues, rows: Sequence[Mapping[str, str]], found: Sequence[Method], budget: float
) -> list[dict[str, Any]]:
    """Milliseconds of a solve, the medians of rounds by turns, of each method and tolerance that `rows` have an answer
    for in at most `MOST_TIMED` evaluations.

    Args:
        budget: seconds for the rounds at a tolerance; there are at least 3 and at most 15.
    """
    answered = {(row["package"], row["method"]) for row in rows}
    prepared = {
        (method.package, method.name): method.prepare(problem, None)
        for method in found
        if (method.package, method.name) in answered
    }
    timed = []
    for tolerance in dict.fromkeys(row["tolerance"] for row in rows):
        calls: dict[str, Callable[[], object]] = {}
        named: dict[str, dict[str, Any]] = {}
        for row in rows:
            key = (row["package"], row["method"])
            if row["tolerance"] != tolerance or row["note"] or key not in prepared:
                continue
            if int(row["evaluations"]) <= MOST_TIMED:
                calls[", ".join(key)] = partial(prepared[key], float(tolerance))
                named[", ".join(key)] = {name: row[name] for name in TIMED[:-1]}
        if not calls:
            continue
        with torch.no_grad():
            for call in calls.values():  # what is made once and kept
                call()
            start = time.perf_counter()
            for call in calls.values():
                call()
            rounds = min(15, max(3, int(budget / (time.perf_counter() - start))))
            seconds = interleave(calls, rounds, warm_up=0)
        timed += [
            named[name] | {"milliseconds": f"{1e3 * statistics.median(values):.4g}"}
            for name, values in seconds.items()
        ]  # fmt: skip
    return timed


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks precision", description=__doc__.partition("\n")[0])
    parser.add_argument("--group", nargs="+", choices=GROUPS, default=list(GROUPS), help="of problems; all without")
    parser.add_argument("--time", action="store_true", help="time the solves of precision.csv, do not count anew")
    parser.add_argument("--budget", type=float, default=1.5, help="seconds of rounds at a tolerance (%(default)s)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    found, packages = methods(), installed(*PACKAGES)
    stored = read_rows(RESULTS / f"{NAME}.csv")
    for group in options.group:
        for problem in problems(group):
            if options.time and problem.name not in TIMED_PROBLEMS:
                continue
            print(problem.name, file=sys.stderr)
            own = [row for row in stored if row["problem"] == problem.name]
            if options.time:
                if not own:
                    parser.error(f"{problem.name} is not in precision.csv: run without --time first")
                timed = measure_times(problem, own, found, options.budget)
                keep_rows(folder() / f"{NAME}.csv", TIMED, "problem", problem.name, timed, packages, machine())
            else:
                rows = [row for method in found for row in curve(method, problem)]
                keep_rows(RESULTS / f"{NAME}.csv", COLUMNS, "problem", problem.name, rows, packages)
