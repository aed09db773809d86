"""Nyström pairs and splittings: order conditions, convergence, gradients, time reversal, and what they refuse."""

from __future__ import annotations

import copy
import gc
import math
import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from support import KEPT, Field
from torch import Tensor, nn

import nesterov_triton as nt
from nesterov_triton import gradients, systems
from nesterov_triton.flow import Flow
from nesterov_triton.network import Network
from nesterov_triton.nystrom import METHODS, Nystrom
from nesterov_triton.stepping.nystrom import Layout

NAMES = tuple(METHODS)
GATED = tuple(name for name, method in METHODS.items() if method.gated is not None)
REVERSIBLE = tuple(name for name, method in METHODS.items() if method.reversible)

SYSTEMS: dict[str, Callable[[Any], systems.Momentum]] = {
    "nesterov": systems.nesterov,
    "nesterov exact": lambda f: systems.nesterov(f, form="exact"),
    "heavy ball": systems.heavy_ball,
    "gnesterov": lambda f: systems.gnesterov(f, gate=nt.gates.Softclip(1.5)),
    "gnesterov exact": lambda f: systems.gnesterov(f, gate=torch.atan, form="exact"),
    "generalised heavy ball": lambda f: systems.generalised_heavy_ball(f, gate="tanh"),
    "frictionless": lambda f: systems.Momentum(f, gate_x="tanh"),
}
CASES = [
    (name, method)
    for name in SYSTEMS
    for method in NAMES
    if method in GATED or isinstance(SYSTEMS[name](Field()).gate_x, nt.gates.Identity)
]


def system(name: str) -> systems.Momentum:
    torch.manual_seed(0)
    return SYSTEMS[name](Waves()).double()


class Waves(nn.Module):
    """A smooth field of four features."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.rate = nn.Parameter(0.8 * torch.randn(4, 4)), nn.Parameter(torch.randn(4))

    def forward(self, t: Tensor, h: Tensor) -> Tensor:
        return torch.sin(h @ self.mix + t * self.rate)


def start(batch: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, m = torch.randn((2, batch, 4), generator=generator, dtype=torch.float64)
    return x, m


def reference(system: systems.Momentum, state: tuple[Tensor, Tensor], times: Sequence[float]) -> Tensor:
    """The states at `times` by scipy's DOP853, [n, 2, *shape]."""
    shape = (2, *state[0].shape)
    values = {name: float(value.detach()) for name, value in system.scalars().items()}
    gamma, xi = values.get("damping", system.fixed_damping), values.get("xi", system.fixed_xi)

    def slope(t: float, z: np.ndarray) -> np.ndarray:
        x, m = torch.from_numpy(z).view(shape).unbind(0)
        time = torch.tensor(t, dtype=torch.float64)
        k = systems.nesterov_scale(time) if system.nesterov else torch.ones_like(time)
        kappa = system.gate_x(k) if system.nesterov else k
        drive = system.sign * system.gate_f(system.field(time, kappa * x))
        if system.exact:
            drive = drive / kappa + (3 / (4 * t * t) - 1 / 4) * x
        with torch.no_grad():
            return torch.stack((system.gate_x(m), drive - gamma * m - xi * kappa * x)).reshape(-1).numpy()

    with torch.no_grad():
        z = torch.stack(state).reshape(-1).numpy()
        found = solve_ivp(slope, (times[0], times[-1]), z, "DOP853", times, rtol=1e-13, atol=1e-13)
    return torch.from_numpy(found.y.T.copy()).view(len(times), *shape)


# --- order conditions


Tree = tuple[int, tuple[Any, ...]]  # a force's derivative: how many times by velocities, and the forces it is fed with


def nystrom_trees(limit: int) -> Iterator[tuple[Tree, int]]:
    """The special Nyström trees with order up to `limit` (HNW II.14), each with its order."""
    known: list[tuple[Tree, int]] = []
    for order in range(1, limit + 1):
        fresh = []
        for velocities in range(order):
            for children in partitions(known, order - 1 - velocities):
                fresh.append(((velocities, children), order))
        known += fresh
    yield from known


def partitions(trees: list[tuple[Tree, int]], rest: int, first: int = 0) -> Iterator[tuple[Tree, ...]]:
    """Multisets of trees whose orders plus one add up to `rest`."""
    if rest == 0:
        yield ()
    for i in range(first, len(trees)):
        tree, order = trees[i]
        if order + 1 <= rest:
            for others in partitions(trees, rest - order - 1, i):
                yield (tree, *others)


def weights_of(tree: Tree, c: np.ndarray, a: np.ndarray) -> tuple[np.ndarray, float, int]:
    """The tree's stage weights, and the factor and power of t^(power) for the exact solution."""
    velocities, children = tree
    weights, factor, power = c**velocities, 1.0, velocities
    for child in children:
        w, f, p = weights_of(child, c, a)
        weights, factor, power = weights * (a @ w), factor * f / ((p + 1) * (p + 2)), power + p + 2
    return weights, factor, power


@pytest.mark.parametrize("name", NAMES)
def test_nystrom_order_conditions(name: str) -> None:
    method = METHODS[name]
    s = method.stages
    c = np.array(method.c)
    a = np.array([[*row, *(0.0,) * (s - len(row))] for row in method.a])
    checked = 0
    for tree, order in nystrom_trees(method.order):
        weights, factor, power = weights_of(tree, c, a)
        assert power == order - 1
        assert np.dot(method.b, weights) == pytest.approx(factor / order, abs=2e-15)
        if order < method.order:
            assert np.dot(a[-1], weights) == pytest.approx(factor / (order * (order + 1)), abs=2e-15)
        of_y, of_v = (np.dot(row, weights) for row in method.error)
        if order <= method.error_order:
            assert of_v == pytest.approx(0, abs=2e-15)
        if order < method.error_order:
            assert of_y == pytest.approx(0, abs=2e-15)
        checked += 1
    assert checked == {2: 2, 4: 7, 6: 23}[method.order]
    # And not one order more, or the estimate would be of something else.
    left = [np.dot(method.error[1], weights_of(tree, c, a)[0]) for tree, o in nystrom_trees(method.error_order + 1)]
    assert max(map(abs, left)) > 1e-4


def coloured(limit: int) -> dict[tuple[str, int], list[tuple[Any, ...]]]:
    """Trees whose colours, force and gate, alternate, by colour of the root and order."""
    other = {"force": "gate", "gate": "force"}
    found: dict[tuple[str, int], list[tuple[Any, ...]]] = {}
    for order in range(1, limit + 1):
        for root in other:
            known = [(tree, o) for o in range(1, order) for tree in found[other[root], o]]
            found[root, order] = list(multisets(known, order - 1))
    return found


def multisets(trees: list[tuple[Any, int]], rest: int, first: int = 0) -> Iterator[tuple[Any, ...]]:
    if rest == 0:
        yield ()
    for i in range(first, len(trees)):
        tree, order = trees[i]
        if order <= rest:
            for others in multisets(trees, rest - order, i):
                yield (tree, *others)


@pytest.mark.parametrize("name", GATED)
def test_order_conditions_of_the_gated_form(name: str) -> None:
    """Those of partitioned Runge-Kutta methods for x' = σ(m), m' = F(x): for any gate, not for the identity alone."""
    method = METHODS[name]
    gated, s = method.gated, method.stages
    assert gated is not None
    n = len(gated.d)
    paths = np.array([[*row, *(0.0,) * (s - len(row))] for row in gated.p])
    drifts = np.zeros((s, n))
    for i, row in enumerate(gated.w):
        drifts[i + 1, : len(row)] = row
    np.testing.assert_allclose(paths.sum(1), gated.d, atol=2e-15)
    np.testing.assert_allclose(drifts.sum(1), method.c, atol=2e-15)

    def stage_weights(root: str, tree: tuple[Any, ...]) -> tuple[np.ndarray, float, int]:
        weights, factor, power = np.ones(s if root == "force" else n), 1.0, 0
        for child in tree:
            w, f, p = stage_weights("gate" if root == "force" else "force", child)
            weights = weights * ((drifts if root == "force" else paths) @ w)
            factor, power = factor * f / (p + 1), power + p + 1
        return weights, factor, power

    for (root, order), trees in coloured(method.order).items():
        for tree in trees:
            weights, factor, power = stage_weights(root, tree)
            assert power == order - 1
            last = np.array(method.b) if root == "force" else drifts[-1]
            assert np.dot(last, weights) == pytest.approx(factor / order, abs=3e-15)


def test_a_method_that_does_not_fit_together_is_refused() -> None:
    good = METHODS["nystrom4"]
    for change in (
        {"c": (0.1, *good.c[1:])},
        {"b": (*good.b[:-1], 0.5)},
        {"a": good.a[:-1]},
        {"error": (good.error[0],)},
        {"gated": METHODS["strang"].gated},
    ):
        with pytest.raises(ValueError, match="method 'nystrom4'"):
            replace(good, **change)


@pytest.mark.parametrize("name", NAMES)
def test_copies_and_pickles_are_the_method_itself(name: str) -> None:
    method = METHODS[name]
    assert copy.deepcopy(method) is method
    assert pickle.loads(pickle.dumps(method)) is method


# --- convergence


@pytest.mark.parametrize("t", [(1.0, 2.0), (2.0, 1.0)], ids=["forwards", "backwards"])
@pytest.mark.parametrize(("name", "method"), CASES)
def test_fixed_steps_converge_with_the_order(name: str, method: str, t: tuple[float, float]) -> None:
    flow, state, order = system(name), start(), METHODS[method].order
    truth = reference(flow, state, t)[-1]
    counts = {2: (32, 64), 4: (16, 32), 6: (8, 16)}[order]
    errors = []
    for n in counts:
        with torch.no_grad():
            solution = nt.solve(flow, state, t, method=method, step_size=1 / n)
        errors.append(float((torch.stack(solution.final) - truth).abs().max()))
        assert solution.stats.nfe_forward == (METHODS[method].stages - 1) * n + 1
    assert errors[1] < 1e-3
    assert math.log2(errors[0] / errors[1]) > order - 0.5


@pytest.mark.parametrize(("name", "method"), CASES)
def test_adaptive_steps_meet_the_tolerance(name: str, method: str) -> None:
    flow, state = system(name), start()
    truth = reference(flow, state, (1.0, 3.0))[-1]
    tolerances = (1e-3, 1e-4) if METHODS[method].order == 2 else (1e-4, 1e-6)
    for tolerance in tolerances:
        with torch.no_grad():
            solution = nt.solve(flow, state, (1.0, 3.0), method=method, rtol=tolerance, atol=tolerance)
        assert float((torch.stack(solution.final) - truth).abs().max()) < 20 * tolerance
        stats = solution.stats
        assert stats.nfe_forward == (METHODS[method].stages - 1) * (stats.accepted + stats.rejected) + 2


def oscillator() -> tuple[systems.Momentum, tuple[Tensor, Tensor], Tensor, tuple[Tensor, Tensor]]:
    """A damped one: system, state, times, and its closed solution at these."""
    gamma, omega = 0.4, 5.0
    flow = systems.Momentum(lambda t, h: -(omega**2) * h, damping=gamma)
    x, m = torch.tensor([1.0, 0.5]).double(), torch.tensor([0.0, 1.0]).double()
    nu = math.sqrt(omega**2 - gamma**2 / 4)
    t = torch.linspace(0, 2, 9, dtype=torch.float64)[:, None]
    b = (m + gamma / 2 * x) / nu
    decay, cos, sin = torch.exp(-gamma / 2 * t), torch.cos(nu * t), torch.sin(nu * t)
    exact = decay * (x * cos + b * sin)
    rate = -gamma / 2 * exact + nu * decay * (b * cos - x * sin)
    return flow, (x, m), t[:, 0], (exact, rate)


def test_an_oscillator_with_a_closed_solution() -> None:
    flow, state, t, (exact, rate) = oscillator()
    for method, bound in (("nystrom4", 2e-7), ("nystrom6", 2e-9), ("blanes_moan4", 2e-8)):
        xs, ms = nt.solve(flow, state, t, method=method, rtol=1e-9, atol=1e-9).ys
        assert float((xs - exact).abs().max()) < bound
        assert float((ms - rate).abs().max()) < 50 * bound


@pytest.mark.parametrize("method", ["nystrom4", "nystrom6"])
def test_a_tolerance_means_what_it_means_with_dopri5(method: str) -> None:
    """Errors against a closed solution, with fewer evaluations."""
    flow, state, t, (exact, rate) = oscillator()

    def solve(method: str, tolerance: float) -> tuple[float, int]:
        solution = nt.solve(flow, state, t, method=method, rtol=tolerance, atol=tolerance)
        xs, ms = solution.ys
        return math.sqrt(float((xs - exact).square().mean() + (ms - rate).square().mean())), solution.stats.nfe_forward

    for tolerance in (1e-4, 1e-5, 1e-6, 1e-7):
        (own, evaluations), (general, most) = solve(method, tolerance), solve("dopri5", tolerance)
        assert own < 5 * general
        assert evaluations < 0.8 * most


@pytest.mark.parametrize(("name", "method"), CASES)
def test_dense_output_converges(name: str, method: str) -> None:
    flow, state = system(name), start()
    t = [1.0, 1.07, 1.41, 1.93, 2.0]
    truth = reference(flow, state, t)[1:-1]
    order = min(METHODS[method].order, 4 if isinstance(flow.gate_x, nt.gates.Identity) else 3)
    errors = []
    for n in (20, 80):
        with torch.no_grad():
            xs, ms = nt.solve(flow, state, t, method=method, step_size=1 / n).ys
        errors.append(float((torch.stack((xs, ms), 1)[1:-1] - truth).abs().max()))
    assert errors[1] < 1e-3
    assert math.log(errors[0] / errors[1], 4) > order - 0.6


@pytest.mark.parametrize("name", REVERSIBLE)
@pytest.mark.parametrize("kind", ["nesterov", "heavy ball", "gnesterov", "gnesterov exact"])
def test_steps_are_taken_back_to_rounding(name: str, kind: str) -> None:
    flow, (x, m) = system(kind), start()
    with torch.no_grad():
        there = nt.solve(flow, (x, m), (1.0, 2.0), method=name, step_size=0.05).final
        back = nt.solve(flow, there, (2.0, 1.0), method=name, step_size=0.05).final
        assert float((there[0] - x).abs().max()) > 0.1
    torch.testing.assert_close(back, (x, m), rtol=0, atol=1e-13)


def test_requested_times_change_no_step_and_states_at_their_ends_are_the_steps() -> None:
    flow, state = system("gnesterov"), start()
    with torch.no_grad():
        plain = nt.solve(flow, state, (1.0, 2.0), method="nystrom4")
        dense = nt.solve(flow, state, (1.0, 1.3, 1.31, 2.0), method="nystrom4")
    torch.testing.assert_close(plain.final, dense.final, rtol=0, atol=0)
    assert (plain.stats.accepted, plain.stats.nfe_forward) == (dense.stats.accepted, dense.stats.nfe_forward)


def test_fewer_evaluations_than_general_methods_for_the_same_error() -> None:
    """On smooth fields; trained ones are in the benchmarks."""

    def needed(flow: systems.Momentum, method: str, targets: Sequence[float]) -> list[float]:
        """Evaluations for each of these errors, between those of two tolerances on a logarithmic scale."""
        truth = reference(flow, start(), (1.0, 2.0))[-1]
        points = []
        for k in range(3, 28):
            with torch.no_grad():
                solution = nt.solve(flow, start(), (1.0, 2.0), method=method, rtol=10 ** (-k / 4), atol=10 ** (-k / 4))
            error = float((torch.stack(solution.final) - truth).abs().max())
            points.append((math.log(error), math.log(solution.stats.nfe_forward)))
        points.sort()
        errors, counts = zip(*points, strict=True)
        assert errors[0] < math.log(min(targets))
        return [math.exp(np.interp(math.log(target), errors, counts)) for target in targets]

    ratios = []
    for name in ("nesterov", "heavy ball", "gnesterov", "generalised heavy ball"):
        own, *others = (needed(system(name), m, (1e-3, 1e-4, 1e-5)) for m in ("nystrom4", "dopri5", "tsit5"))
        ratios += [a / min(b) for a, *b in zip(own, *others, strict=True)]
    assert math.exp(sum(map(math.log, ratios)) / len(ratios)) < 0.6


# --- gradients


def loss_of(xs: Tensor, ms: Tensor) -> Tensor:
    weights = torch.linspace(0.5, 1.5, len(xs), dtype=torch.float64)[:, None, None]
    return (xs * weights).square().sum() + ms.sin().sum()


def gradient_of(
    flow: systems.Momentum, method: str, gradient: Any, t: Sequence[float], **options: Any
) -> tuple[Tensor, tuple[Tensor, ...], nt.Stats]:
    x, m = (s.clone().requires_grad_() for s in start())
    times = torch.tensor(t, dtype=torch.float64, requires_grad=True)
    solution = nt.solve(flow, (x, m), times, method=method, gradient=gradient, **options)
    loss = loss_of(*solution.ys)
    return loss.detach(), torch.autograd.grad(loss, [x, m, times, *flow.parameters()]), solution.stats


@pytest.mark.parametrize("options", [{"rtol": 1e-4, "atol": 1e-4}, {"step_size": 0.3}], ids=["adaptive", "fixed"])
@pytest.mark.parametrize("t", [(1.0, 1.4, 1.7, 2.2), (2.2, 1.3, 1.0)], ids=["forwards", "backwards"])
@pytest.mark.parametrize(("name", "method"), CASES)
def test_discrete_and_reversible_gradients_are_those_of_backpropagation(
    name: str, method: str, t: tuple[float, ...], options: dict[str, float]
) -> None:
    flow = system(name)
    loss, truth, counts = gradient_of(flow, method, "backprop", t, **options)
    strategies: list[Any] = ["discrete", KEPT]
    if method in REVERSIBLE:  # also with the state kept more often, and with every stretch taken forward again
        strategies += ["reversible", gradients.Reversible(every=2), gradients.Reversible(every=3, bound=0.0)]
    for strategy in strategies:
        value, found, stats = gradient_of(flow, method, strategy, t, **options)
        torch.testing.assert_close(value, loss, rtol=1e-13, atol=0)
        torch.testing.assert_close(found, truth, rtol=1e-9, atol=1e-10)
        assert (stats.accepted, stats.rejected) == (counts.accepted, counts.rejected)
        # The slope that chooses the first step has no graph.
        assert stats.nfe_forward == counts.nfe_forward + (strategy is KEPT and "rtol" in options)
        again = "taken forward again" in stats.path_backward
        assert again == (isinstance(strategy, gradients.Reversible) and strategy.bound == 0.0)
        if not again:  # each force once
            assert stats.nfe_backward == (METHODS[method].stages - 1) * stats.accepted + 1


@pytest.mark.parametrize("gradient", ["discrete", "reversible"])
@pytest.mark.parametrize("name", ["nesterov", "heavy ball", "gnesterov exact"])
def test_gradients_against_finite_differences(name: str, gradient: str) -> None:
    flow = system(name)
    x, m = (s[:1].clone().requires_grad_() for s in start())
    own = list(flow.parameters())

    def run(x: Tensor, m: Tensor, t: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
        method = "blanes_moan4" if gradient == "reversible" else "nystrom4"
        return tuple(nt.solve(flow, (x, m), t, method=method, gradient=gradient, step_size=0.25).ys)

    t = torch.tensor([1.0, 1.4, 2.0], dtype=torch.float64, requires_grad=True)
    # Step sizes count as constants: a finite difference of the last time would change how many there are.
    fixed = t.detach()
    assert torch.autograd.gradcheck(lambda x, m, *p: run(x, m, fixed, *p), (x, m, *own), fast_mode=True)


def test_second_derivatives() -> None:
    flow = system("gnesterov")
    x, m = (s[:1].clone().requires_grad_() for s in start())

    def run(x: Tensor, m: Tensor) -> Tensor:
        return nt.solve(flow, (x, m), (1.0, 2.0), method="nystrom4", step_size=0.5).final[0]

    assert torch.autograd.gradgradcheck(run, (x, m), fast_mode=True)
    solution = nt.solve(flow, (x, m), (1.0, 2.0), method="strang", step_size=0.5, gradient="reversible")
    with pytest.raises(RuntimeError, match="gradient='discrete' or 'backprop'"):
        torch.autograd.grad(solution.final[0].sum(), x, create_graph=True)


def off(found: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    return max(float((a - b).abs().max() / (1 + b.abs().max())) for a, b in zip(found, truth, strict=True))


@pytest.mark.parametrize("t", [(1.0, 1.5, 2.0), (2.0, 1.0)], ids=["forwards", "backwards"])
@pytest.mark.parametrize(("name", "method"), CASES)
def test_the_adjoint_by_the_same_method_converges_with_its_order(name: str, method: str, t: tuple[float, ...]) -> None:
    """To the gradients of backpropagation through dopri8 at 1e-12: of states, times, parameters, ξ and γ."""
    flow = system(name)
    _, truth, _ = gradient_of(flow, "dopri8", "backprop", t, rtol=1e-12, atol=1e-12)
    errors = []
    for count in (16, 32):
        _, found, stats = gradient_of(flow, method, "adjoint", t, step_size=1 / count)
        errors.append(off(found, truth))
        # Each force once, and the first of each interval; the slopes at the requested times are calls of their own.
        assert stats.nfe_backward == (METHODS[method].stages - 1) * count + len(t) - 1 + len(t)
    assert math.log2(errors[0] / errors[1]) > METHODS[method].order - 0.7
    assert errors[1] < {2: 5e-3, 4: 1e-5, 6: 1e-8}[METHODS[method].order]


@pytest.mark.parametrize(
    ("name", "method"), [("nesterov exact", "nystrom6"), ("heavy ball", "nystrom4"), ("gnesterov", "blanes_moan4")]
)
def test_the_adjoint_keeps_its_tolerance_by_any_pair_of_methods(name: str, method: str) -> None:
    flow, t, options = system(name), (1.0, 1.4, 2.0), {"rtol": 1e-8, "atol": 1e-8}
    _, truth, _ = gradient_of(flow, "dopri8", "backprop", t, rtol=1e-12, atol=1e-12)
    gradients_by = {}
    for forward, backward in ((method, None), (method, "dopri5"), ("dopri5", method)):
        _, found, stats = gradient_of(flow, forward, gradients.Adjoint(method=backward), t, **options)
        assert off(found, truth) < 1e-6
        gradients_by[forward, backward] = found
        assert stats.nfe_backward > 0
    assert off(gradients_by[method, None], gradients_by[method, "dopri5"]) > 0  # not one and the same solve


def test_fewer_evaluations_of_both_passes_for_the_same_error_of_the_adjoint_gradient() -> None:
    """Over the better of dopri5 and tsit5, in the mean."""
    ratios, t = [], (1.0, 2.0)
    for name in ("nesterov", "heavy ball", "gnesterov", "generalised heavy ball"):
        flow = system(name)
        _, truth, _ = gradient_of(flow, "dopri8", "backprop", t, rtol=1e-12, atol=1e-12)
        counts = []
        for method in ("nystrom4", "dopri5", "tsit5"):
            runs = []
            for tolerance in (10 ** (-2 - k / 2) for k in range(10)):
                _, found, stats = gradient_of(flow, method, "adjoint", t, rtol=tolerance, atol=tolerance)
                runs.append((off(found, truth), stats.nfe_forward + stats.nfe_backward))
            counts.append([min(nfe for error, nfe in runs if error <= goal) for goal in (1e-3, 1e-4, 1e-5)])
        own, *others = counts
        ratios += [a / min(b) for a, *b in zip(own, *others, strict=True)]
    assert math.exp(sum(map(math.log, ratios)) / len(ratios)) < 0.75


@pytest.mark.parametrize("gate", [None, "tanh"])
def test_a_step_too_long_for_the_exponential(gate: str | None) -> None:
    """Forwards it decays to nothing; backwards it grows to what is not finite."""
    flow = systems.Momentum(lambda t, x: -x, damping=3.0, **({} if gate is None else {"gate_x": gate}))
    for loop in ("eager", "graph"):
        options = {"method": "nystrom4", "step_size": 500.0, "loop": loop}
        ahead = nt.solve(flow, start(), (0.0, 500.0), **options).final
        assert all(bool(torch.isfinite(part).all()) for part in ahead)
        with pytest.raises(nt.SolveError) as raised:
            nt.solve(flow, start(), (0.0, -500.0), **options)
        assert raised.value.status is nt.Status.NON_FINITE


def test_an_adjoint_that_fails_says_where() -> None:
    flow, state = system("gnesterov"), start()
    x, m = (s.clone().requires_grad_() for s in state)
    solution = nt.solve(flow, (x, m), (1.0, 2.0), method="nystrom4", gradient="adjoint", max_steps=20, rtol=1e-3)
    with torch.no_grad():
        flow.field.rate.data.fill_(math.nan)  # not a change that autograd counts
    with pytest.raises(nt.SolveError, match="the adjoint's backward solve") as raised:
        solution.final[0].sum().backward()
    assert raised.value.status is nt.Status.NON_FINITE


def test_a_field_with_hidden_leaves_is_refused() -> None:
    hidden = torch.ones(4, dtype=torch.float64, requires_grad=True)
    flow = systems.nesterov(lambda t, h: h * hidden)
    x, m = (s.clone().requires_grad_() for s in start())
    for method, gradient in (("nystrom4", "discrete"), ("strang", "reversible")):
        solution = nt.solve(flow, (x, m), (1.0, 1.2), method=method, gradient=gradient)
        with pytest.raises(RuntimeError, match="would get no gradient"):
            solution.final[0].sum().backward()


def bytes_saved(steps: int, gradient: Any) -> int:
    flow = system("gnesterov")
    x, m = (s.clone().requires_grad_() for s in start(64))
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        nt.solve(flow, (x, m), (1.0, 2.0), method="strang", gradient=gradient, step_size=1 / steps)
    return sum(kept)


def test_memory_of_the_reversible_gradient_does_not_grow_with_the_steps() -> None:
    state = 2 * 64 * 4 * 8
    assert bytes_saved(50, "reversible") == bytes_saved(10, "reversible")
    assert bytes_saved(200, "reversible") - bytes_saved(50, "reversible") == 3 * state  # one in fifty
    assert bytes_saved(200, gradients.Reversible(every=1000)) == bytes_saved(10, "reversible")
    assert bytes_saved(200, "discrete") - bytes_saved(50, "discrete") == 150 * state


def test_a_stretch_that_cannot_be_walked_back_is_taken_forward_again() -> None:
    """A strongly damped system forgets where it came from: in float32 its steps cannot be taken back."""
    found = {}
    for gradient in ("discrete", "reversible"):
        torch.manual_seed(0)
        field = Waves()
        flow = systems.Momentum(field, damping=30.0)
        x, m = (s.float().requires_grad_() for s in start())
        solution = nt.solve(flow, (x, m), (0.0, 2.0), method="strang", gradient=gradient, step_size=0.02)
        found[gradient] = torch.autograd.grad(solution.final[0].square().sum(), [x, m, *field.parameters()])
    assert "taken forward again" in solution.stats.path_backward
    torch.testing.assert_close(found["reversible"], found["discrete"], rtol=1e-3, atol=1e-4)


# --- the rest of the package


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", GATED)
def test_narrow_dtypes(dtype: torch.dtype, method: str) -> None:
    layer = nt.GNesterovNODE(Waves().to(dtype), method=method, rtol=1e-2, atol=1e-2)
    h = start()[0].to(dtype).requires_grad_()
    out = layer(h)
    out.float().sum().backward()
    assert out.dtype == dtype
    assert h.grad is not None
    assert bool(torch.isfinite(h.grad).all())


def test_an_ensemble_under_vmap() -> None:
    flow = system("heavy ball")
    x, m = start()
    params = {name: torch.stack([p, p + 0.1]) for name, p in flow.named_parameters()}

    def run(own: dict[str, Tensor]) -> Tensor:
        def call(t: Tensor, h: Tensor) -> Tensor:
            field = {name.removeprefix("field."): value for name, value in own.items() if name != "raw_damping"}
            return torch.func.functional_call(flow.field, field, (t, h))

        member = systems.Momentum(call, damping=0.3)
        options = {"method": "nystrom4", "gradient": "backprop", "step_size": 0.25}
        return nt.solve(member, (x, m), (1.0, 2.0), **options).final[0]

    together = torch.func.vmap(run)(params)
    alone = torch.stack([run({k: v[i] for k, v in params.items()}) for i in range(2)])
    torch.testing.assert_close(together, alone)


def test_a_layer_leaves_nothing_behind() -> None:
    layer = nt.GNesterovNODE(Waves(), method="nystrom4").double()
    h = start()[0].requires_grad_()

    def tensors() -> int:
        gc.collect()
        return sum(type(o) in (Tensor, nn.Parameter) for o in gc.get_objects())

    for _ in range(3):
        layer(h).sum().backward()
    before = tensors()
    for _ in range(5):
        layer(h).sum().backward()
    assert tensors() <= before


def test_the_choice_of_a_method() -> None:
    x, m = start()

    def chosen(flow: Any, state: Any = (x, m), **options: Any) -> str:
        with torch.no_grad():
            return nt.solve(flow, state, (1.0, 1.1), method="auto", **options).stats.method

    assert chosen(system("nesterov")) == "nystrom4"
    assert chosen(system("gnesterov")) == "nystrom4"
    assert chosen(system("nesterov"), rtol=1e-9, atol=1e-9) == "nystrom6"
    assert chosen(system("gnesterov"), rtol=1e-9, atol=1e-9) == "dopri5"
    assert chosen(system("gnesterov"), gradient="reversible") == "blanes_moan4"
    assert chosen(systems.second_order(lambda t, h, v: h * v)) == "dopri5"
    assert chosen(lambda t, y: -y, x) == "dopri5"
    layer = nt.HBNODE(Waves().double(), method="auto")
    assert "method=auto" in repr(layer)
    layer(x)
    assert layer.stats.method == "nystrom4"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda s: nt.solve(lambda t, y: y, s[0], (0.0, 1.0), method="nystrom4"), "for momentum systems .* 'dopri5'"),
        (
            lambda s: nt.solve(systems.second_order(lambda t, h, m: h), s, (0.0, 1.0), method="strang"),
            "sees the position alone",
        ),
        (lambda s: nt.solve(system("gnesterov"), s, (1.0, 2.0), method="nystrom6"), "knows no gate .* 'nystrom4'"),
        (lambda s: nt.GNesterovNODE(Waves(), method="nystrom6"), "knows no gate .* 'nystrom4'"),
        (lambda s: nt.NODE(Waves(), method="auto", gradient="reversible"), "for momentum systems"),
        (lambda s: nt.SONODE(lambda t, h, m: h, method="strang"), "sees the position alone"),
        (
            lambda s: nt.solve(system("nesterov"), s, (1.0, 2.0), method="nystrom4", step_size=0.1, first_step=0.1),
            "exclude each other",
        ),
        (lambda s: nt.solve(system("nesterov"), s, (1.0, 2.0), method="auto", step_size=0.1), "name one"),
        (
            lambda s: nt.solve(system("nesterov"), s, (1.0, 2.0), gradient="reversible"),
            "method='strang' or 'blanes_moan4'",
        ),
        (lambda s: gradients.Reversible(every=0), "at least 1"),
        (lambda s: gradients.Adjoint(method="nystrom4", quadratures_in_norm=True), "take 'dopri5'"),
        (
            lambda s: gradient_of(system("gnesterov"), "dopri5", gradients.Adjoint(method="nystrom6"), (1.0, 2.0)),
            "knows no gate",
        ),
        (lambda s: gradients.Reversible(bound=-1.0), "≥ 0"),
        (lambda s: nt.solve(system("nesterov"), s, (1.0, 2.0), method="nystrom5"), "did you mean 'nystrom"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(make: Callable[[Any], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(start())


@pytest.mark.parametrize(
    ("name", "method", "gradient", "t"),
    [
        ("gnesterov exact", "nystrom4", "discrete", (2.0, 1.6, 1.0)),
        ("heavy ball", "nystrom6", "discrete", (1.0, 2.0)),
        ("nesterov", "blanes_moan4", "adjoint", (1.0, 1.5)),
        ("generalised heavy ball", "nystrom4", "adjoint", (2.0, 1.6, 1.0)),
        ("heavy ball", "nystrom6", "adjoint", (1.0, 1.5)),
    ],
)
def test_traced_solves_are_the_eager_ones(name: str, method: str, gradient: str, t: tuple[float, ...]) -> None:
    flow = system(name)

    def run(x: Tensor, m: Tensor) -> tuple[Any, Any]:
        solution = nt.solve(flow, (x, m), t, method=method, gradient=gradient, rtol=1e-4, atol=1e-4)
        return solution.ys, solution.stats

    found = []
    for call in (run, torch.compile(run, backend="aot_eager", fullgraph=True)):
        x, m = (s.clone().requires_grad_() for s in start())
        (xs, ms), stats = call(x, m)
        grads = torch.autograd.grad(xs.square().sum() + ms.sin().sum(), [x, m, *flow.parameters()])
        found.append((xs, ms, *grads, stats))
    for a, b in zip(found[0][:-1], found[1][:-1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)
    eager, traced = found[0][-1], found[1][-1]
    assert (int(traced.accepted), int(traced.rejected), traced.method) == (eager.accepted, eager.rejected, method)
    if len(t) == 2:
        assert int(traced.nfe_forward) == eager.nfe_forward


@pytest.mark.parametrize(
    ("name", "method", "gradient", "t", "options"),
    [
        ("gnesterov exact", "strang", gradients.Reversible(every=2), (2.0, 1.6, 1.0), {"rtol": 1e-2, "atol": 1e-2}),
        ("heavy ball", "auto", gradients.Reversible(every=3, bound=0.0), (1.0, 2.2), {"rtol": 1e-4, "atol": 1e-4}),
    ],
)
def test_traced_steps_are_taken_back_as_eager_ones(
    name: str, method: str, gradient: Any, t: tuple[float, ...], options: dict[str, float]
) -> None:
    """Gradients of states, times, parameters, ξ and γ; also where every stretch is taken forward again."""
    flow = system(name)

    def run(x: Tensor, m: Tensor, times: Tensor) -> tuple[Any, Any]:
        solution = nt.solve(flow, (x, m), times, method=method, gradient=gradient, **options)
        return solution.ys, solution.stats

    torch._dynamo.reset()
    found = []
    for call in (run, torch.compile(run, backend="eager", fullgraph=True)):
        x, m = (s.clone().requires_grad_() for s in start())
        times = torch.tensor(t, dtype=torch.float64, requires_grad=True)
        (xs, ms), stats = call(x, m, times)
        found.append((xs, ms, *torch.autograd.grad(loss_of(xs, ms), [x, m, times, *flow.parameters()]), stats))
    (*eager, stats), (*traced, counts) = found
    torch.testing.assert_close(traced, eager, rtol=1e-11, atol=1e-12)
    steps, method = stats.accepted, stats.method
    assert steps > 3
    assert (int(counts.accepted), int(counts.rejected), counts.method) == (steps, stats.rejected, method)
    again = 0 if len(t) == 2 else steps * (METHODS[method].stages - 1) + 1  # for the outputs inside
    assert int(counts.nfe_forward) == stats.nfe_forward + again
    assert int(counts.nfe_backward) == steps * METHODS[method].stages + 1


def saved_by(output: Tensor) -> int:
    """Elements of the tensors that the graph of a compiled function's output keeps."""
    node: Any = output.grad_fn
    while not hasattr(node, "saved_tensors"):
        node = node.next_functions[0][0]
    return sum(tensor.numel() for tensor in node.saved_tensors)


def test_memory_of_traced_steps_that_are_taken_back() -> None:
    """As eager, one state in fifty: and fifty times, of the steps between."""
    flow = system("gnesterov")

    def run(x: Tensor, m: Tensor, times: Tensor) -> Tensor:
        return nt.solve(flow, (x, m), times, method="strang", gradient="reversible", step_size=0.01).final[0]

    torch._dynamo.reset()
    traced, kept = torch.compile(run, backend="aot_eager", fullgraph=True), []
    for end in (1.1, 1.5, 2.5):  # 10, 50 and 150 steps
        times, found = torch.tensor([1.0, end], dtype=torch.float64), []
        for call in (run, traced):
            x, m = (s.clone().requires_grad_() for s in start(64))
            out = call(x, m, times)
            found.append([out, *torch.autograd.grad(out.square().sum(), [x, m, *flow.parameters()], retain_graph=True)])
        torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-10)
        kept.append(saved_by(out))
    state = 2 * 64 * 4
    assert kept[1] == kept[0]
    assert kept[2] - kept[1] == 2 * (state + 50)


def test_a_traced_stretch_that_cannot_be_walked_back_is_taken_forward_again() -> None:
    torch.manual_seed(0)
    flow = systems.Momentum(Waves(), damping=30.0)

    def gradients_by(gradient: Any, traced: bool = False) -> tuple[Tensor, ...]:
        def run(x: Tensor, m: Tensor) -> Tensor:
            return nt.solve(flow, (x, m), (0.0, 2.0), method="strang", gradient=gradient, step_size=0.02).final[0]

        x, m = (s.float().requires_grad_() for s in start())
        out = (torch.compile(run, backend="eager", fullgraph=True) if traced else run)(x, m)
        return torch.autograd.grad(out.square().sum(), [x, m, *flow.parameters()])

    torch._dynamo.reset()
    truth = gradients_by("discrete")
    torch.testing.assert_close(gradients_by("reversible", traced=True), truth, rtol=1e-3, atol=1e-4)
    lost = gradients_by(gradients.Reversible(bound=math.inf))
    assert not all(torch.allclose(a, b, rtol=1e-3, atol=1e-4) for a, b in zip(lost, truth, strict=True))


@pytest.mark.parametrize(("name", "method"), CASES)
def test_numbers_with_and_without_a_graph_are_the_same(name: str, method: str) -> None:
    flow = system(name)
    values = {name: value.detach() for name, value in flow.scalars().items()}
    network = Network(flow.field, torch.Size((3, 4)), torch.float64, torch.device("cpu"), None)
    layout = Layout(METHODS[method], Flow(flow, network, values))
    times = [1.5 - 0.3 * c for c in METHODS[method].c]
    gamma, xi = values.get("damping", flow.fixed_damping), values.get("xi", flow.fixed_xi)
    h = torch.tensor(-0.3, dtype=torch.float64)
    graph = layout.graph(torch.tensor(times, dtype=torch.float64), h, gamma, xi)
    torch.testing.assert_close(layout.vector(times, -0.3), graph, rtol=1e-14, atol=1e-16)


def test_failures_have_a_status() -> None:
    state = start()

    def solve(field: Callable[[Tensor, Tensor], Tensor], **options: Any) -> nt.Status:
        flow = systems.Momentum(field, damping=0.1)
        return nt.solve(flow, state, (0.0, 5.0), method="nystrom4", throw=False, **options).status

    assert solve(lambda t, h: h * math.nan) is nt.Status.NON_FINITE
    assert solve(lambda t, h: -1e4 * h, max_steps=20) is nt.Status.MAX_STEPS
    assert solve(lambda t, h: 1 / (1 - t).clamp_min(0) ** 3 * torch.ones_like(h)) is not nt.Status.SUCCESS
    assert solve(lambda t, h: h * math.nan, step_size=0.5) is nt.Status.NON_FINITE
    assert solve(lambda t, h: -h) is nt.Status.SUCCESS


def test_every_method_keeps_its_first_force() -> None:
    assert all(isinstance(method, Nystrom) and method.fsal for method in METHODS.values())
    paths = [list(map(len, method.gated.p)) for method in METHODS.values() if method.gated is not None]
    assert all(lengths == sorted(lengths) for lengths in paths)
