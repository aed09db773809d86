"""Counts that are the same on every machine, for this package and its peers: `python -m benchmarks counts`.

Per accepted dopri5 step, beside the field: operators (on a GPU each is at least one kernel launch), host reads, bytes
moved in states; the same in the backward pass, there with the field's own derivatives; evaluations of the field at each
tolerance; peak memory for each further step; and the launches and rows of the Triton kernels. All in float64, and with
all samples alike, so that steps mean the same to a solver that has steps for each sample.

Writes `benchmarks/results/counts.json`. `--check` compares the package's counts with that file instead and fails where
one got worse: `.ci/run` does so. Who means it runs the command without `--check` and commits the file along.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torchdiffeq
from torch import Tensor

from benchmarks import traffic
from benchmarks.cases import MODELS, Case, RightHandSide
from benchmarks.contenders import OURS, Absent, Flat, layer, load
from benchmarks.counters import LiveMemory, MarkedField, OperatorCount, per_step
from benchmarks.report import commit, installed, today, versions
from nesterov_triton import tableaus

STORED = Path(__file__).parent / "results" / "counts.json"
TOLERANCES = (1e-3, 1e-4, 1e-5, 1e-6, 1e-7)
SHAPE = (16, 8)
# A tenth of an operator: constants met for the first time do not fall on whole steps.
SLACK = 0.1

Steps = tuple[int, int]
Solver = Callable[[Case, str], tuple[Tensor, Steps]]


def ours(case: Case, gradient: str) -> tuple[Tensor, Steps]:
    module = layer(case, gradient=gradient)
    h1 = module(case.h0)
    return h1, (module.stats.accepted, module.stats.rejected)


class _Counting(RightHandSide):
    accepted = rejected = 0

    def callback_accept_step(self, t: Tensor, z: Tensor, dt: Tensor) -> None:
        self.accepted += 1

    def callback_reject_step(self, t: Tensor, z: Tensor, dt: Tensor) -> None:
        self.rejected += 1


def torchdiffeq_(case: Case, gradient: str) -> tuple[Tensor, Steps]:
    system = _Counting(case.model, case.field, case.raw_damping)
    t = torch.tensor([case.t0, case.t1], dtype=case.h0.dtype)
    z0 = system.start(case.h0, t[0])
    z = torchdiffeq.odeint(system, z0, t, rtol=case.tolerance, atol=case.tolerance, method="dopri5")
    return system.features(z[-1], t[1]), (system.accepted, system.rejected)


def torchode_(case: Case, gradient: str) -> tuple[Tensor, Steps]:
    torchode = load("torchode")
    flat = Flat(case.right_hand_side(), case)
    term = torchode.ODETerm(flat, with_stats=False)
    controller = torchode.IntegralController(atol=case.tolerance, rtol=case.tolerance, term=term).double()
    method = torchode.Dopri5(term=term)
    solver = torchode.AutoDiffAdjoint(method, controller, backprop_through_step_size_control=False).double()
    start, end = (torch.full((len(case.h0),), t, dtype=case.h0.dtype) for t in (case.t0, case.t1))
    solution = solver.solve(
        torchode.InitialValueProblem(y0=flat.start(case.h0, start[:1, None]), t_start=start, t_end=end)
    )
    accepted = int(solution.stats["n_accepted"].max())
    rejected = int(solution.stats["n_steps"].max()) - accepted
    return flat.features(solution.ys[:, -1], end[0]), (accepted, rejected)


SOLVERS: dict[str, Solver] = {OURS: ours, "torchdiffeq": torchdiffeq_, "torchode": torchode_}


def _case(model: Any, tolerance: float) -> tuple[Case, MarkedField]:
    drawn = Case.draw(model, "small", shape=SHAPE)
    field = MarkedField(drawn.field.double())
    damping = drawn.raw_damping
    return dataclasses.replace(
        drawn,
        field=field,
        h0=drawn.h0[:1].detach().double().expand(SHAPE).clone().requires_grad_(),
        cotangent=drawn.cotangent.double(),
        raw_damping=None if damping is None else torch.nn.Parameter(damping.detach().double()),
        tolerance=tolerance,
    ), field


def count(solver: Solver, model: Any) -> dict[str, float]:
    """All counts of one solver on one model.

    Raises:
        Absent: the solver is not installed.
    """
    case, _ = _case(model, 1e-4)
    case.gradients(solver(case, "discrete")[0])  # makes what is made once and kept
    rows: dict[str, list[tuple[int, int, float]]] = {}
    found: dict[str, float] = {}
    for tolerance in TOLERANCES:
        case, field = _case(model, tolerance)
        state = case.right_hand_side().rows * case.h0.nbytes

        def add(what: str, steps: Steps, value: float) -> None:
            rows.setdefault(what, []).append((*steps, value))

        with torch.no_grad(), OperatorCount(field) as forward:
            _, steps = solver(case, "discrete")
        add("forward: operators", steps, forward.solver.total())
        add("forward: host reads", steps, forward.host_reads)
        add("forward: states moved", steps, forward.moved / state)
        found[f"evaluations of the field at {tolerance:.0e}"] = field.calls
        for gradient in ("discrete", "adjoint", "backprop") if solver is ours else ("discrete",):
            with LiveMemory() as memory:
                case.gradients(solver(case, gradient)[0])
            add(f"peak memory in states, {gradient}", steps, memory.peak / state)
        h1, steps = solver(case, "discrete")
        with OperatorCount(field) as backward:
            case.gradients(h1)
        add("backward: operators", steps, backward.solver.total())
        add("backward: host reads", steps, backward.host_reads)
    for what, counts in rows.items():
        split = per_step(counts)
        found[f"{what}, per accepted step"] = round(split.accepted, 2)
        found[f"{what}, set-up"] = round(split.setup, 2)
    return found


def kernels() -> dict[str, float]:
    """Launches and rows of the Triton kernels in one dopri5 step; the tests hold the solver to them."""
    tableau = tableaus.get("dopri5")
    steps = {
        "forward": traffic.momentum_step(tableau),
        "adjoint": traffic.momentum_adjoint_step(tableau),
        "discrete": traffic.momentum_reverse_step(tableau),
        "first order, forward": traffic.first_order_step(tableau),
    }
    launches: dict[str, float] = {f"kernels: launches, {name}": len(step) for name, step in steps.items()}
    return launches | {f"kernels: rows, {name}": sum(one.rows for one in step) for name, step in steps.items()}


def count_all(solvers: Mapping[str, Solver]) -> dict[str, dict[str, float]]:
    tables: dict[str, dict[str, float]] = {}
    for name, solver in solvers.items():
        for model in MODELS:
            try:
                tables[f"{name}, {model}"] = count(solver, model)
            except Absent as why:
                print(f"{name}: left out, {why}", file=sys.stderr)
                break
    return tables


def worse(new: Mapping[str, Mapping[str, float]], stored: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Where a count grew, or is stored and no longer taken, or taken and not stored."""
    said = []
    for table in sorted(new.keys() | stored.keys()):
        here, there = new.get(table, {}), stored.get(table, {})
        for what in sorted(here.keys() | there.keys()):
            if what not in here or what not in there:
                said.append(f"{table}: {what}: {'stored, not counted' if what in there else 'counted, not stored'}")
            elif here[what] > there[what] + SLACK:
                said.append(f"{table}: {what}: {here[what]:g}, stored {there[what]:g}")
    return said


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks counts", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--check", action="store_true", help="fail where the package's counts are above the stored ones"
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    own = {f"{OURS}, kernels": kernels()} | count_all({OURS: ours})
    if options.check:
        stored = json.loads(STORED.read_text())
        tables = {name: table for name, table in stored["tables"].items() if name.startswith(OURS)}
        if found := worse(own, tables):
            print(*found, sep="\n")
            sys.exit(
                f"{len(found)} counts are not those of {STORED.name} (torch {stored['versions']['torch']}, commit "
                f"{stored['commit']}). Mend what they count; or, where the price is meant, run "
                "`python -m benchmarks counts` and commit the file with the change."
            )
        print(f"{sum(map(len, own.values()))} counts, none worse than stored")
        return
    peers = count_all({name: solver for name, solver in SOLVERS.items() if name != OURS})
    packages = versions("nesterov-triton", *installed("torch", "torchdiffeq", "torchode"))
    header = {"versions": packages, "date": today(), "commit": commit()}
    STORED.write_text(json.dumps(header | {"tables": own | peers}, indent=1) + "\n")
