"""What methods that use the structure of momentum systems save: `python -m benchmarks.structure`.

Evaluations of the field for a given global error, in float64, on two trained fields of each kind (the paper's point
clouds, `assets/momentum_layers.json`), on a random network and on a damped oscillator with a closed solution;
evaluations and error at the same tolerance; time for the same error; evaluations that training takes, against the
continuous adjoint by dopri5; and how far a walk back through a splitting's steps ends from where they began.
Evaluations and errors are the same on every machine.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import nesterov_triton as nt
from benchmarks import problems, timing
from benchmarks.report import Line, run
from nesterov_triton import nystrom, systems
from nesterov_triton.experiments.paper import point_cloud
from nesterov_triton.experiments.training import Trainer

LAYERS = Path(__file__).parent / "assets" / "momentum_layers.json"
ERRORS = (1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8)
TOLERANCES = tuple(10 ** (-k / 3) for k in range(3, 31))
GENERAL = ("dopri5", "tsit5")
MOST = 4000  # evaluations of one solve
TARGET = {1e-3: 0.5, 1e-4: 0.5, 1e-5: 0.5, 1e-6: 2 / 3, 1e-7: 2 / 3, 1e-8: 2 / 3}
TARGET_GATED = {1e-3: 0.6, 1e-4: 0.6}
LOSS = 0.01  # of training
KEPT = nt.gradients.Discrete(recompute=False)  # whose backward pass evaluates nothing

State = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class Case:
    """An initial value problem of a momentum system, float64, with its solution at t1."""

    system: systems.Momentum
    state: State
    t: tuple[float, float]
    truth: Tensor

    @property
    def gated(self) -> bool:
        return not isinstance(self.system.gate_x, nt.gates.Identity)

    def solve(self, method: Any, tolerance: float) -> tuple[int, float]:
        """Evaluations, and the error at t1 relative to the solution (root mean squares over x and m)."""
        # Every evaluation more than `MOST` costs an attempt of at most twelve: enough to end a hopeless solve.
        solution = nt.solve(
            self.system, self.state, self.t, method=method, rtol=tolerance, atol=tolerance, max_steps=MOST, throw=False
        )
        found = torch.stack(tuple(solution.final))
        error = float((found - self.truth).norm() / self.truth.norm())
        return solution.stats.nfe_forward, error if solution.status is nt.Status.SUCCESS else math.inf


def case(system: systems.Momentum, state: State, t: tuple[float, float], truth: Tensor | None = None) -> Case:
    if truth is None:  # kinks of trained fields cost it some digits: right to 1e-9
        solution = nt.solve(system, state, t, method="dopri8", rtol=1e-12, atol=1e-12, max_steps=10**6)
        truth = torch.stack(tuple(solution.final))
    return Case(system, state, t, truth)


def trained(name: str) -> Case:
    """A layer that was trained on the point clouds, with 50 of its points."""
    model, seed = name.split()
    settings = replace(point_cloud.DEFAULTS, method="dopri5")
    layer: Any = point_cloud.build(model, settings).layer
    weights = json.loads(LAYERS.read_text())["layers"][name]
    layer.load_state_dict({key: torch.tensor(value, dtype=torch.float64) for key, value in weights.items()})
    h = point_cloud.load(int(seed))[0].inputs[:50]
    start, end = (float(t) for t in layer.t)
    velocity = None if layer.initial_velocity is None else layer.initial_velocity(h)
    state = layer.system.initial_state(h, velocity, torch.tensor(start, dtype=torch.float64))
    return case(layer.system, state, (start, end))


class Autonomous(nn.Module):
    """A network as a field that does not look at the time."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, t: Tensor, h: Tensor) -> Any:
        return self.network(h)


def random_network() -> Case:
    """NesterovNODE on an untrained network of eight features."""
    torch.manual_seed(0)
    layers = nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8)
    field = Autonomous(nn.Sequential(*layers)).double()
    for p in field.parameters():
        p.mul_(1.5)
    generator = torch.Generator().manual_seed(1)
    x, m = torch.randn((2, 32, 8), generator=generator, dtype=torch.float64)
    return case(systems.nesterov(field), (x, m), (1.0, 2.0))


def oscillator() -> Case:
    """h'' + 0.4 h' + 25 h = 0 for about five periods."""
    gamma, omega, t1 = 0.4, 5.0, 6.0
    x, m = torch.tensor([[[1.0, 0.5]], [[0.0, 1.0]]], dtype=torch.float64)
    nu = math.sqrt(omega**2 - gamma**2 / 4)
    b = (m + gamma / 2 * x) / nu
    decay, cos, sin = math.exp(-gamma / 2 * t1), math.cos(nu * t1), math.sin(nu * t1)
    h = decay * (x * cos + b * sin)
    truth = torch.stack((h, -gamma / 2 * h + nu * decay * (b * cos - x * sin)))
    return case(systems.Momentum(lambda t, h: -(omega**2) * h, damping=gamma), (x, m), (0.0, t1), truth)


def cases() -> dict[str, Case]:
    names = json.loads(LAYERS.read_text())["layers"]
    return {name: trained(name) for name in names} | {"random network": random_network(), "oscillator": oscillator()}


def curve(problem: Case, method: str) -> list[tuple[int, float]]:
    """(evaluations, error) for each tolerance, up to the first that took too many."""
    points = []
    for tolerance in TOLERANCES:
        points.append(problem.solve(method, tolerance))
        if points[-1][0] > MOST or points[-1][1] < 1e-9:
            break
    return points


def needed(points: Sequence[tuple[int, float]], error: float) -> float:
    """Evaluations for this error: on the line, in logarithms, between the last point above it and the next; those of
    the first point where that is below it already; NaN where none is."""
    found = float(points[0][0]) if points[0][1] <= error else math.nan
    for (n0, e0), (n1, e1) in itertools.pairwise(points):
        if e1 <= error < e0 < math.inf:
            part = math.log(e0 / error) / math.log(e0 / e1)
            found = math.exp(math.log(n0) + part * math.log(n1 / n0))
    return found


# --- evaluations


def evaluations() -> tuple[list[Line], dict[str, Any]]:
    lines: list[Line] = []
    table: dict[str, dict[str, list[float | None]]] = {}
    ratios: dict[tuple[bool, float], list[float]] = {}
    for name, problem in cases().items():
        own = [m.name for m in nystrom.METHODS.values() if m.gated is not None or not problem.gated]
        counts = {}
        for method in (*GENERAL, *own, "auto"):
            points = curve(problem, method)
            counts[method] = [needed(points, error) for error in ERRORS]
        table[name] = {k: [None if math.isnan(x) else round(x, 1) for x in v] for k, v in counts.items()}
        for i, error in enumerate(ERRORS):
            general = [counts[m][i] for m in GENERAL if not math.isnan(counts[m][i])]
            found = {m: counts[m][i] for m in own if not math.isnan(counts[m][i])}
            if not general or not found:
                continue
            best = min(found, key=found.__getitem__)
            targets = TARGET_GATED if problem.gated else TARGET
            target = ("<=", targets[error]) if error in targets else None
            lines.append(Line(f"{name}, error {error:.0e}, {best}", found[best] / min(general), target))
            if name[-1].isdigit() and "nystrom4" in found:
                ratios.setdefault((problem.gated, error), []).append(found["nystrom4"] / min(general))
    for (gated, error), values in ratios.items():
        mean = math.exp(statistics.fmean(map(math.log, values)))
        kind = "with gates" if gated else "without gates"
        lines.append(Line(f"nystrom4 on trained fields {kind}, error {error:.0e}, mean of {len(values)}", mean))
    return lines, {"evaluations": {"errors": ERRORS, **table}}


def same_tolerance() -> tuple[list[Line], dict[str, Any]]:
    """Evaluations and error by each method as parts of dopri5's, at five tolerances."""
    tolerances = [10.0**-k for k in range(3, 8)]
    table: dict[str, dict[str, list[tuple[float, float]]]] = {}
    groups: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for name, problem in cases().items():
        general = [problem.solve("dopri5", tolerance) for tolerance in tolerances]
        for method in nystrom.METHODS.values():
            if method.order > 2 and (method.gated is not None or not problem.gated):
                own = [problem.solve(method.name, tolerance) for tolerance in tolerances]
                parts = [(a / b, e / f) for (a, e), (b, f) in zip(own, general, strict=True)]
                table.setdefault(name, {})[method.name] = parts
                groups.setdefault((method.name, "trained fields" if name[-1].isdigit() else name), []).extend(parts)
    lines = []
    for (method_name, where), parts in groups.items():
        evaluations, error = (math.exp(statistics.fmean(map(math.log, x))) for x in zip(*parts, strict=True))
        said = f"at the same tolerance as dopri5, {where}, {method_name}: part of its"
        lines += [Line(f"{said} evaluations, mean", evaluations), Line(f"{said} error, mean", error)]
        lines.append(Line(f"{said} error, largest", max(e for _, e in parts)))
    return lines, {"same tolerance": {"tolerances": tolerances, **table}}


# --- time


def wall_clock(rounds: int) -> tuple[list[Line], dict[str, Any]]:
    """The same error, in time: the benchmark system of `problems`, forward, float32."""
    lines, found = [], {}
    for size, batch in (("medium", 256), ("large", 4096)):
        problem = problems.Problem.draw(batch)
        with torch.enable_grad():
            truth, _ = problem.truth(1e-9)
        h = problem.h0.detach()
        calls: dict[str, Callable[[], object]] = {}
        counts: dict[str, int] = {}
        methods: tuple[Any, ...] = (*GENERAL, "nystrom4")
        for method in methods:
            for tolerance in TOLERANCES:
                layer = nt.GNesterovNODE(
                    problem.field, gate=nt.gates.Softclip(problems.BOUND), xi=problems.XI, method=method,
                    rtol=tolerance, atol=tolerance, loop="eager",
                )  # fmt: skip
                if problems.relative_error(layer(h), truth) <= 1e-4:
                    break
            calls[method], counts[method] = partial(layer, h), layer.stats.nfe_forward
        seconds = timing.interleave(calls, rounds)
        for method in GENERAL:
            time, count = timing.ratio(seconds, "nystrom4", method), counts["nystrom4"] / counts[method]
            note = f"evaluations {counts['nystrom4']} / {counts[method]}"
            lines.append(Line(f"time for an error of 1e-4, {size}, nystrom4 / {method}", time, note=note))
            lines.append(Line(f"... over the ratio of evaluations, {size}, {method}", time / count, ("<=", 1.2)))
        found[size] = {
            name: {"evaluations": counts[name], "milliseconds": 1e3 * statistics.median(seconds[name])}
            for name in calls
        }
    return lines, {"time": found}


# --- training


def training() -> tuple[list[Line], dict[str, Any]]:
    """GNesterovNODE on the point clouds, to the same loss."""
    tolerance = 1e-4
    own: dict[str, Any] = {"method": "auto", "gradient": "discrete", "tolerance": tolerance}
    kept: dict[str, Any] = own | {"gradient": KEPT}
    back: dict[str, Any] = own | {"gradient": "reversible"}
    adjoint_too: dict[str, Any] = own | {"gradient": "adjoint"}
    split = point_cloud.load(0)[0]
    h, targets = split.inputs[:50], split.targets[:50].expand(-1, 2)
    weights = json.loads(LAYERS.read_text())["layers"]["GNesterovNODE 0"]

    def gradient(**options: Any) -> Tensor:
        settings = replace(point_cloud.DEFAULTS, **options)
        layer: Any = point_cloud.build("GNesterovNODE", settings).layer
        layer.load_state_dict({key: torch.tensor(value, dtype=torch.float64) for key, value in weights.items()})
        with torch.enable_grad():
            loss = nn.functional.smooth_l1_loss(layer(h), targets)
            return torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(layer.parameters()))])

    truth = gradient(method="dopri8", gradient="discrete", tolerance=1e-11)

    def error(**options: Any) -> float:
        return float((gradient(**options) - truth).norm() / truth.norm())

    reached = error(**own)
    adjoint = {value: error(method="dopri5", gradient="adjoint", tolerance=value) for value in TOLERANCES}
    rival = next(value for value, found in adjoint.items() if found <= reached)

    def train(**options: Any) -> dict[str, float]:
        settings = replace(point_cloud.DEFAULTS, epochs=200, **options)
        with torch.enable_grad():
            trainer = Trainer(point_cloud.EXPERIMENT, settings, "GNesterovNODE", 0)
            evaluations, products = 0.0, 0.0
            while len(trainer.run.history) < settings.epochs:
                trainer.advance(lambda batch: None)
                epoch = trainer.run.history[-1]
                products += 3 * epoch.nfe_backward  # three batches
                evaluations += 3 * (epoch.nfe_forward + (0 if options["gradient"] == KEPT else epoch.nfe_backward))
                if epoch.train_loss <= LOSS:
                    break
        counts = {"evaluations": evaluations, "vector-Jacobian products": products}
        return {"epochs": len(trainer.run.history), **counts, "loss": epoch.train_loss}

    found = {
        f"auto, discrete, tolerance {tolerance:.0e}": train(**own),
        f"auto, Discrete(recompute=False), tolerance {tolerance:.0e}": train(**kept),
        f"auto, reversible, tolerance {tolerance:.0e}": train(**back),
        f"dopri5, adjoint, tolerance {rival:.0e}": train(method="dopri5", gradient="adjoint", tolerance=rival),
        f"auto, adjoint, tolerance {tolerance:.0e}": train(**adjoint_too),
        f"dopri5, adjoint, tolerance {tolerance:.0e}": train(method="dopri5", gradient="adjoint", tolerance=tolerance),
    }
    again, once, back_again, rivals, *_ = (run["evaluations"] for run in found.values())
    note = f"relative error of the gradient {reached:.1e} and {adjoint[rival]:.1e}; the backward pass evaluates nothing"
    what = f"evaluations to a training loss of {LOSS}, auto and"
    lines = [
        Line(
            f"{what} Discrete(recompute=False) / dopri5 and adjoint, gradients as accurate",
            once / rivals, ("<=", 1 / 3), note,
        ),
        Line(f"{what} discrete / the same", again / rivals, note="the field is called again in the backward pass"),
        Line(f"{what} reversible / the same", back_again / rivals),
    ]  # fmt: skip
    return lines, {"training": found, "error of the adjoint gradient": {f"{k:.0e}": v for k, v in adjoint.items()}}


# --- walking back


def walks() -> dict[str, dict[str, dict[str, float]]]:
    """The relative distance between a state and where the walk back to it ends."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name, problem in cases().items():
        for method in (m for m in nystrom.METHODS.values() if m.reversible):
            for dtype in (torch.float32, torch.float64):
                row = found.setdefault(f"{name}, {method.name}", {}).setdefault(str(dtype).removeprefix("torch."), {})
                for steps in (10, 100, 1000):
                    row[str(steps)] = _walk(problem, method.name, steps, dtype)
    return found


def _walk(problem: Case, method: Any, steps: int, dtype: torch.dtype) -> float:
    system = problem.system.to(dtype)
    try:
        state = tuple(x.to(dtype) for x in problem.state)
        t0, t1 = problem.t
        size = abs(t1 - t0) / steps
        solve: Callable[..., Any] = partial(nt.solve, system, method=method, step_size=size)
        there = solve(state, (t0, t1)).final
        back = torch.stack(solve(there, (t1, t0)).final)
        return float((back - torch.stack(state)).norm() / torch.stack(state).norm())
    except nt.SolveError:
        return math.inf
    finally:
        problem.system.to(torch.float64)


@torch.no_grad()
def measure(rounds: int) -> tuple[list[Line], dict[str, Any]]:
    lines, numbers = evaluations()
    for part, found in (same_tolerance(), wall_clock(rounds), training()):
        lines += part
        numbers |= found
    back = walks()
    for dtype in ("float32", "float64"):
        worst = max(x for name, row in back.items() if name[0].isupper() for x in row[dtype].values())
        lines.append(Line(f"walk back through 10 to 1000 steps on trained fields, {dtype}: the farthest", worst))
    return lines, numbers | {"walks back": back}


if __name__ == "__main__":
    run(
        "structure",
        __doc__.partition("\n")[0],
        "Evaluations for the same error: the best method for momentum systems / the better of dopri5 and tsit5",
        measure, "torch", "nesterov-triton",
    )  # fmt: skip
