"""The continuous adjoint by Nyström pairs and splittings: against autograd, order, evaluations, and what it refuses."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torchdiffeq
from test_nystrom import CASES, GATED, REVERSIBLE, SYSTEMS, Waves, gradient_of, loss_of, start, system
from torch import Tensor, nn

import nesterov_triton as nt
from nesterov_triton import gradients, systems
from nesterov_triton.nystrom import METHODS
from nesterov_triton.stepping import graphs
from nesterov_triton.stepping.loop import LoopOptions

FORWARDS, BACKWARDS = (1.0, 1.4, 1.7, 2.2), (2.2, 1.3, 1.0)
DIRECTIONS = pytest.mark.parametrize("t", [FORWARDS, BACKWARDS], ids=["forwards", "backwards"])


@functools.cache
def truth(name: str, t: tuple[float, ...]) -> tuple[Tensor, ...]:
    """The gradient of `loss_of` by autograd through torchdiffeq's solve of the equations as they are in the paper."""
    flow = system(name)
    x, m = (s.clone().requires_grad_() for s in start())
    times = torch.tensor(t, dtype=torch.float64, requires_grad=True)

    def slope(t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x, m = state
        kappa = flow.gate_x(t**-1.5 * torch.exp(t / 2)) if flow.nesterov else torch.ones_like(t)
        force = flow.sign * flow.gate_f(flow.field(t, kappa * x))
        if flow.exact:
            force = force / kappa + (3 / (4 * t * t) - 1 / 4) * x
        return flow.gate_x(m), force - flow.damping * m - flow.xi * kappa * x

    steps = {"step_t": times.detach()}  # its dense output is of order 4
    xs, ms = torchdiffeq.odeint(slope, (x, m), times, method="dopri8", rtol=1e-13, atol=1e-13, options=steps)
    return torch.autograd.grad(loss_of(xs, ms), [x, m, times, *flow.parameters()])


def distances(found: Sequence[Tensor], true: Sequence[Tensor]) -> list[float]:
    return [float((a - b).abs().max()) for a, b in zip(found, true, strict=True)]


def backward_alone(method: str, step_size: float) -> gradients.Adjoint:
    """To be taken after a solve without an error."""
    return gradients.Adjoint(method=method, options=LoopOptions(nt.controllers.get("pi"), step_size=step_size))


EXACT = {"method": "dopri8", "rtol": 1e-12, "atol": 1e-12}


# --- gradients


@DIRECTIONS
@pytest.mark.parametrize(("name", "method"), CASES)
def test_gradients_are_those_of_autograd(name: str, method: str, t: tuple[float, ...]) -> None:
    """Of states, times, parameters, ξ and γ."""
    tolerance = 1e-5 if METHODS[method].order == 2 else 1e-7
    _, found, stats = gradient_of(system(name), method, "adjoint", t, rtol=tolerance, atol=tolerance)
    size = max(float(g.abs().max()) for g in truth(name, t))
    assert max(distances(found, truth(name, t))) < 100 * tolerance * size
    assert stats.path_backward == "torch: the state is on the CPU"


@DIRECTIONS
@pytest.mark.parametrize(("name", "method"), CASES)
def test_fixed_steps_backward_converge_with_the_order(name: str, method: str, t: tuple[float, ...]) -> None:
    order = METHODS[method].order
    coarse, fine = (0.05, 0.025) if order < 6 else (0.075, 0.0375)
    errors = []
    for step_size in (coarse, fine):
        _, found, _ = gradient_of(system(name), gradient=backward_alone(method, step_size), t=t, **EXACT)
        errors.append(distances(found, truth(name, t)))
    assert max(errors[1]) < (0.1 if order == 2 else 1e-5)
    # Each gradient, where the error is not small by chance and larger than the truth's own.
    for before, after in zip(*errors, strict=True):
        assert after < max(before / 2 ** (order - 0.8), 0.03 * max(errors[1]), 1e-10)


@pytest.mark.parametrize("name", SYSTEMS)
@pytest.mark.parametrize("method", REVERSIBLE)
def test_fixed_steps_of_a_splitting_have_the_exact_gradient(method: str, name: str) -> None:
    """Each kick and each drift backward is the transpose of the one forward: the adjoint is discrete, to rounding."""
    found = []
    for gradient in ("adjoint", "backprop"):
        flow = system(name)
        x, m = (s.clone().requires_grad_() for s in start())
        solution = nt.solve(flow, (x, m), (1.0, 1.5, 2.0), method=method, gradient=gradient, step_size=0.125)
        # γ moves the decay within a step, too.
        wanted = [x, m, *(p for key, p in flow.named_parameters() if key != "raw_damping")]
        found.append(torch.autograd.grad(loss_of(*solution.ys), wanted))
    torch.testing.assert_close(*found, rtol=1e-11, atol=1e-12)


def test_fewer_evaluations_than_dopri5_for_the_same_error() -> None:
    """Of the backward solve, on smooth fields; on trained ones it needs half."""

    def needed(name: str, method: str, targets: Sequence[float]) -> list[float]:
        points = []
        for k in range(2, 8):
            strategy = gradients.Adjoint(rtol=10**-k, atol=10**-k, method=method)
            _, found, stats = gradient_of(system(name), gradient=strategy, t=(1.0, 2.0), controller="pi", **EXACT)
            error = max(distances(found, truth(name, (1.0, 2.0))))
            points.append((math.log(error), math.log(stats.nfe_backward)))
        errors, counts = zip(*sorted(points), strict=True)
        assert errors[0] < math.log(min(targets))
        return [math.exp(np.interp(math.log(target), errors, counts)) for target in targets]

    ratios = []
    for name in ("nesterov", "heavy ball", "gnesterov", "generalised heavy ball"):
        own, general = (needed(name, method, (1e-3, 1e-4, 1e-5)) for method in ("nystrom4", "dopri5"))
        ratios += [a / b for a, b in zip(own, general, strict=True)]
    assert math.exp(sum(map(math.log, ratios)) / len(ratios)) < 0.8


def test_evaluations_are_those_of_the_method() -> None:
    """Those of dopri5 only where it is asked for; fixed steps are the forward ones."""
    flow = system("gnesterov")
    x, m = (s.requires_grad_() for s in start())

    def evaluations(gradient: Any, times: Sequence[float] = (1.0, 2.0), **options: Any) -> int:
        solution = nt.solve(flow, (x, m), times, gradient=gradient, **{"method": "nystrom4", **options})
        torch.autograd.grad(solution.final[0].sum(), x)
        return solution.stats.nfe_backward

    assert evaluations("adjoint", step_size=0.25) == 3 * 4 + 1
    assert evaluations("adjoint", (1.0, 1.5, 2.0), step_size=0.25) == 2 * (3 * 2 + 1)  # the cotangent jumps
    assert evaluations("adjoint", method="strang", step_size=0.25) == 4 + 1
    assert (evaluations("adjoint") - 2) % 3 == 0
    assert (evaluations(gradients.Adjoint(method="dopri5")) - 2) % 6 == 0
    # Behind another method's steps: fixed ones where it has a step size, and no tolerance is given.
    own = gradients.Adjoint(method="nystrom4")
    assert evaluations(own, method="rk4", step_size=0.25) == 3 * 4 + 1
    assert (evaluations(own, method="dopri5") - 2) % 3 == 0
    tight = gradients.Adjoint(rtol=1e-7, atol=1e-7)
    assert evaluations(tight, step_size=0.25) > 10 * 3


@pytest.mark.parametrize(
    ("method", "gate"), [*((name, "identity") for name in METHODS), *((name, lambda m: m) for name in GATED)]
)
def test_the_cotangent_of_a_symmetric_force_moves_as_the_state_does(method: str, gate: Any) -> None:
    """For F = K x it is a = e^(γ (t - T)) (-m, x) if it was so at T; so is its error, and but for γ a its slope."""
    gamma, k = 0.7, torch.randn((4, 4), dtype=torch.float64)
    flow = systems.Momentum(lambda t, h: h @ (k + k.T), damping=gamma, gate_x=gate)
    starts, growths = [], []

    def turned(state: Tensor) -> Tensor:
        x, m = state.view(2, -1)
        return torch.cat((-m, x))

    def measure(errors: Sequence[Tensor], before: Sequence[Tensor], after: Sequence[Tensor]) -> Tensor:
        if torch.equal(before[0], after[0]):  # on the way to the first step: of the state, of its slope, ...
            starts.append(errors)
        else:
            growths.append(after[1].norm() / after[0].norm())
            for own, other in (after, errors):
                torch.testing.assert_close(other, growths[-1] * turned(own), rtol=1e-9, atol=1e-13)
        return torch.cat(tuple(errors)).norm() / 1e-5

    x, m = (s.requires_grad_() for s in start())
    strategy = gradients.Adjoint(measure=measure)
    x1, m1 = nt.solve(flow, (x, m), (0.0, 1.0), method=method, gradient=strategy).final
    found = torch.autograd.grad((m1 * x1.detach() - x1 * m1.detach()).sum(), [x, m])
    assert len(growths) > 2
    (_, cotangent), (slope, rate) = starts[:2]
    true = torch.cat((m1, x1 @ (k + k.T) - gamma * m1)).detach().view(-1)
    torch.testing.assert_close(slope, true, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(rate, gamma * cotangent + turned(slope), rtol=1e-12, atol=1e-13)
    assert float(growths[-1]) == pytest.approx(math.exp(-gamma), rel=1e-12)
    torch.testing.assert_close(found, (-math.exp(-gamma) * m, math.exp(-gamma) * x), rtol=0, atol=1e-2)


def test_a_measure_of_the_error() -> None:
    """The root mean square again, and hence the same steps: the measure is shown state and cotangent in their order."""
    flow, tolerance = system("generalised heavy ball"), torch.tensor([1e-4, 1e-5, 1e-6, 1e-4], dtype=torch.float64)
    seen: list[Tensor] = []

    def measure(errors: Sequence[Tensor], before: Sequence[Tensor], after: Sequence[Tensor]) -> Tensor:
        seen.append(before[0])
        sizes = [1 + torch.maximum(a.abs(), b.abs()) for a, b in zip(before, after, strict=True)]
        scaled = [e / (tolerance.repeat(6) * size) for e, size in zip(errors, sizes, strict=True)]
        return torch.cat(scaled).square().mean().sqrt()

    found = []
    for own in (None, measure):
        x, m = (s.requires_grad_() for s in start())
        options: dict[str, Any] = {"rtol": tolerance, "atol": tolerance, "gradient": gradients.Adjoint(measure=own)}
        solution = nt.solve(flow, (x, m), (1.0, 2.0), method="nystrom4", **options)
        grads = torch.autograd.grad(solution.final[0].sum(), [x, m, *flow.parameters()])
        found.append((*grads, torch.tensor(solution.stats.nfe_backward)))
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-13)
    assert torch.equal(seen[0], torch.cat([s.detach().reshape(-1) for s in solution.final]))


# --- kernels, and the loop on the device; `test_fused_nystrom` has more of them


@DIRECTIONS
@pytest.mark.parametrize("loop", ["eager", "graph"])
@pytest.mark.parametrize(("name", "method"), CASES)
def test_fused_steps_have_the_gradients_of_plain_torch(
    take: Callable[[str], None], name: str, method: str, loop: str, t: tuple[float, ...]
) -> None:
    """Of states, times, parameters, ξ and γ; by as many evaluations."""
    found, callable_gate = [], name == "gnesterov exact"
    for path in ("torch", "references"):
        take(path)
        options: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4, "loop": "eager" if path == "torch" else loop}
        found.append(gradient_of(system(name), method, "adjoint", t, **options))
    (_, plain, counts), (_, fused, stats) = found
    torch.testing.assert_close(fused, plain, rtol=1e-9, atol=1e-10)
    assert (stats.nfe_forward, stats.nfe_backward) == (counts.nfe_forward, counts.nfe_backward)
    assert stats.path_backward.startswith("torch" if callable_gate else "kernels")
    assert stats.loop_backward.startswith("device" if loop == "graph" else "eager")
    graphs.LOOPS.clear()


# --- the rest of the package


def test_narrow_dtypes() -> None:
    found = []
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        layer = nt.GHBNODE(Waves().to(dtype), method="nystrom4", gradient="adjoint", rtol=1e-3, atol=1e-3)
        h = start()[0].to(dtype).requires_grad_()
        layer(h).square().sum().backward()
        assert h.grad is not None
        assert h.grad.dtype == dtype
        found.append([g.double() for g in (h.grad, *(p.grad for p in layer.parameters() if p.grad is not None))])
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[2], found[0], rtol=0.1, atol=0.5)


class Spoilt(nn.Module):
    """A field whose evaluations go wrong, or raise, from one on."""

    def __init__(self, good: int, raises: bool = False) -> None:
        super().__init__()
        self.good, self.raises, self.rate = good, raises, nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, t: Tensor, h: Tensor) -> Tensor:
        self.good -= 1
        if self.good < 0 and self.raises:
            raise ArithmeticError("spoilt")
        return -self.rate * h if self.good >= 0 else h * math.nan


@pytest.mark.parametrize("options", [{"step_size": 0.25}, {"rtol": 1e-4}], ids=["fixed", "adaptive"])
@pytest.mark.parametrize("late", [0, 1, 5])
def test_a_backward_solve_that_fails_says_where(late: int, options: dict[str, float]) -> None:
    def backward(field: Spoilt, **more: Any) -> None:
        flow = systems.Momentum(field, damping=0.1)
        x, m = (s.requires_grad_() for s in start())
        solution = nt.solve(flow, (x, m), (0.0, 1.0), method="nystrom4", gradient="adjoint", **options, **more)
        field.good = late
        solution.final[0].sum().backward()

    with pytest.raises(nt.SolveError, match=r"the adjoint's backward solve .* infinite or NaN") as caught:
        backward(Spoilt(1000))
    assert caught.value.status is nt.Status.NON_FINITE
    with pytest.raises(ArithmeticError, match="spoilt"):
        backward(Spoilt(1000, raises=True))


def test_a_backward_solve_has_as_many_steps_as_the_forward_one() -> None:
    flow = system("heavy ball")
    x, m = (s.requires_grad_() for s in start())
    strategy = gradients.Adjoint(rtol=1e-12, atol=1e-12)
    solution = nt.solve(flow, (x, m), (1.0, 2.0), method="nystrom4", gradient=strategy, max_steps=20)
    with pytest.raises(nt.SolveError, match="the adjoint's backward solve") as caught:
        solution.final[0].sum().backward()
    assert caught.value.status is nt.Status.MAX_STEPS


def test_one_tolerance_after_fixed_steps_is_refused_by_the_tracer_too() -> None:
    flow, (x, m), strategy = system("nesterov"), start(), gradients.Adjoint(rtol=1e-3)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def run(x: Tensor) -> Any:
        return nt.solve(flow, (x, m), (1.0, 2.0), method="nystrom4", step_size=0.25, gradient=strategy).final[0]

    with pytest.raises(Exception, match="give it rtol and atol"):
        run(x.requires_grad_())


def adjoint(**options: Any) -> gradients.Adjoint:
    return gradients.Adjoint(**{"method": "nystrom4", **options})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda s: nt.solve(lambda t, y: -y, s[0], (0.0, 1.0), gradient=adjoint()), "for momentum systems .* 'dopri5'"),
        (
            lambda s: nt.solve(systems.second_order(lambda t, h, m: h), s, (0.0, 1.0), gradient=adjoint()),
            "sees the position alone",
        ),
        (
            lambda s: nt.solve(system("gnesterov"), s, (1.0, 2.0), gradient=adjoint(method="nystrom6")),
            "knows no gate .* 'nystrom4'",
        ),
        (
            lambda s: nt.solve(
                system("nesterov"), s, (1.0, 2.0), method="strang", step_size=0.1, gradient=adjoint(rtol=1e-3)
            ),
            "give it rtol and atol",
        ),
        (
            lambda s: nt.odeint(
                system("nesterov"), s, torch.tensor([1.0, 2.0]), options={"jump_t": [1.5]}, gradient=adjoint()
            ),
            "jumps .* 'dopri5'",
        ),
        (lambda s: adjoint(method="nystrom5"), "did you mean 'nystrom"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(make: Callable[[Any], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(tuple(s.requires_grad_() for s in start()))
