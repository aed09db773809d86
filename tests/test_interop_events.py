"""Events and dense solutions: against closed forms, torchdiffeq and finite differences."""

import math

import pytest
import torch
import torchdiffeq
from support import Field, features
from torch import nn

import nesterov_triton as nt

METHODS = {"dopri5": None, "dopri8": None, "bosh3": None, "tsit5": None, "rk4": {"step_size": 0.05}}
TIGHT = {"rtol": 1e-9, "atol": 1e-10}


def tensor(*values):
    return torch.tensor(values if len(values) != 1 else values[0], dtype=torch.float64)


class Fall(nn.Module):
    """Height and velocity under gravity g."""

    def __init__(self, g=9.8):
        super().__init__()
        self.g = nn.Parameter(tensor(g))

    def forward(self, t, state):
        height, velocity = state
        return velocity, -self.g * torch.ones_like(height)


def ground(t, state):
    return state[0]


@pytest.mark.parametrize("interface", [nt.odeint, nt.odeint_adjoint, torchdiffeq.odeint])
@pytest.mark.parametrize("gradient", [None, "discrete", "backprop", "adjoint"])
def test_the_time_of_a_fall_and_its_gradient(interface, gradient):
    if interface is torchdiffeq.odeint and gradient is not None:
        pytest.skip("torchdiffeq has no choice")
    fall = Fall()
    height, velocity, t0 = (tensor(x).requires_grad_() for x in (10.0, 3.0, 0.5))
    keywords = {} if gradient is None else {"gradient": gradient}
    time, (heights, velocities) = nt.odeint_event(
        fall, (height, velocity), t0, event_fn=ground, odeint_interface=interface, **TIGHT, **keywords
    )
    root = (velocity * velocity + 2 * fall.g * height).sqrt()
    exact = t0 + (velocity + root) / fall.g
    wanted = (height, velocity, t0, fall.g)
    assert heights.shape == velocities.shape == (2,)
    torch.testing.assert_close(time, exact, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(velocities[-1], -root, rtol=1e-7, atol=1e-7)
    assert abs(heights[-1].item()) < 1e-8

    def grads(x):
        found = torch.autograd.grad(x, wanted, retain_graph=True, allow_unused=True)
        return [torch.zeros_like(w) if g is None else g for w, g in zip(wanted, found, strict=True)]

    for ours, closed in ((time, exact), (velocities[-1], -root), (time + 2 * velocities[-1], exact - 2 * root)):
        for x, y in zip(grads(ours), grads(closed), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_events_of_every_method_in_both_directions(method, reverse):
    def circle(t, y):
        return torch.stack((y[1], -y[0]))

    y0, t0 = tensor(1.0, 0.0), tensor(0.3)  # y = (cos, -sin)(t - t0)
    keywords = {"method": method, "options": METHODS[method], "reverse_time": reverse}
    time, states = nt.odeint_event(circle, y0, t0, event_fn=lambda t, y: y[0], **keywords)
    sign = -1.0 if reverse else 1.0
    # As good as the interpolant: dopri8's is of order four, over steps for order eight.
    tolerance = 1e-4 if method == "dopri8" else 1e-5
    assert time.item() == pytest.approx(0.3 + sign * math.pi / 2, abs=tolerance)
    torch.testing.assert_close(states[-1], tensor(0.0, -sign), rtol=0, atol=tolerance)
    if method != "tsit5":
        theirs = torchdiffeq.odeint_event(circle, y0, t0, event_fn=lambda t, y: y[0], **keywords)
        assert time.item() == pytest.approx(theirs[0].item(), abs=2e-3 if method == "rk4" else 1e-5)


def test_the_event_is_torchdiffeqs():
    f, y0, t = Field(3, 4), features(3), tensor(0.0, 1.0)
    start = y0[0].item()

    def event(t, y):
        return y[0] - start - 0.2 * t - 0.3

    ours, theirs = (odeint(f, y0, t, event_fn=event) for odeint in (nt.odeint, torchdiffeq.odeint))
    torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=2e-9)  # both halve down to atol
    torch.testing.assert_close(ours[1], theirs[1], rtol=0, atol=1e-8)
    with torch.no_grad():
        bare = nt.odeint(f, y0, t, event_fn=event)
    assert torch.equal(bare[1], ours[1])  # whether gradients are wanted or not


def test_the_first_of_several_events_counts_and_its_own_parameters_learn():
    level = tensor(0.5).requires_grad_()

    def events(t, y):
        return torch.stack((y - level, t - 2.0))

    y0, t0 = tensor(1.0), tensor(0.0)
    time, _ = nt.odeint_event(lambda t, y: -y, y0, t0, event_fn=events, **TIGHT)
    assert time.item() == pytest.approx(math.log(2), abs=1e-8)
    (g,) = torch.autograd.grad(time, level)
    assert g.item() == pytest.approx(-2.0, abs=1e-6)  # t = -log(level)
    late, state = nt.odeint_event(lambda t, y: -y / 10, y0, t0, event_fn=events, **TIGHT)
    assert late.item() == pytest.approx(2.0, abs=1e-8)
    assert state[-1].item() == pytest.approx(math.exp(-0.2), abs=1e-8)


def test_an_event_at_the_start_ends_there():
    y0 = tensor(0.0, 1.0).requires_grad_()
    time, states = nt.odeint(lambda t, y: y, y0, tensor(0.7, 1.0), event_fn=lambda t, y: y[0])
    assert time == 0.7
    assert torch.equal(states, torch.stack((y0, y0)))


def test_stats_and_dtypes_of_an_event():
    time, states, stats = nt.odeint(
        lambda t, y: -y, torch.ones(2), torch.tensor([0.0, 1.0]), event_fn=lambda t, y: y[0] - 0.5, return_stats=True
    )
    assert (time.dtype, time.ndim, states.dtype) == (torch.float32, 0, torch.float32)
    assert stats.nfe_forward > 6
    assert stats.accepted > 1


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("t must hold two times", {"t": tensor(0.0, 1.0, 2.0)}),
        ("event_fn must be a function", {"event_fn": 3}),
        ("must return a real tensor", {"event_fn": lambda t, y: 1.0}),
        ("returned NaN", {"event_fn": lambda t, y: torch.where(t > 0, math.nan, 1.0)}),
        (r"options\['step_size'\] is missing", {"method": "rk4"}),
    ],
)
def test_bad_events(message, change):
    keywords = {"t": tensor(0.0, 1.0), "event_fn": lambda t, y: y.sum()} | change
    with pytest.raises((ValueError, TypeError), match=message):
        nt.odeint(lambda t, y: -y, features(2), keywords.pop("t"), **keywords)


def test_an_event_that_never_comes():
    t = tensor(0.0, 1.0)
    for method, options in (("dopri5", {"max_num_steps": 50}), ("euler", {"step_size": 0.1, "max_num_steps": 500})):
        keywords = {"event_fn": lambda t, y: y, "method": method, "options": options}
        with pytest.raises(nt.SolveError, match="max_steps"):
            nt.odeint(lambda t, y: torch.cos(t) + 0 * y, tensor(5.0), t, **keywords)
    with pytest.raises(TypeError, match="t0 must be"):
        nt.odeint_event(lambda t, y: y, features(2), 0.0, event_fn=lambda t, y: y.sum())


def test_a_bouncing_ball_as_torchdiffeqs_example_has_it():
    class Ball(Fall):
        def __init__(self):
            super().__init__()
            self.bounce = nn.Parameter(tensor(0.9))

        def simulate(self, odeint_event, interface, bounces):
            state, t = (tensor(1.0), tensor(0.0)), tensor(0.0)
            times = []
            for _ in range(bounces):
                t, solution = odeint_event(
                    self, state, t, event_fn=ground, odeint_interface=interface, atol=1e-8, rtol=1e-8
                )
                height, velocity = (x[-1] for x in solution)
                state = (height + 1e-7, -self.bounce * velocity)
                times.append(t)
            return torch.stack(times)

    ball = Ball()
    theirs = ball.simulate(torchdiffeq.odeint_event, torchdiffeq.odeint, 4)
    for interface in (nt.odeint, nt.odeint_adjoint):
        ours = ball.simulate(nt.odeint_event, interface, 4)
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
        fall = math.sqrt(2 / 9.8)
        exact = tensor(*(fall * (1 + 2 * sum(0.9**k for k in range(1, n))) for n in range(1, 5)))
        torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-5)
        for x, y in zip(
            torch.autograd.grad(ours[-1], (ball.g, ball.bounce)),
            torch.autograd.grad(theirs[-1], (ball.g, ball.bounce), retain_graph=True),
            strict=True,
        ):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


# -- dense solutions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ends", [(0.2, 1.7), (1.7, 0.2)])
@pytest.mark.parametrize("method", METHODS)
def test_dense_solutions_are_odeints(method, ends):
    f, y0 = Field(3, 4), features(2, 3)
    keywords = {"method": method, "options": METHODS[method], "rtol": 1e-7, "atol": 1e-8}
    dense = nt.odeint_dense(f, y0, *ends, **keywords)
    times = torch.linspace(*ends, 9, dtype=torch.float64)
    expected = nt.odeint(f, y0, times, **TIGHT)
    torch.testing.assert_close(dense(times), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(dense(ends[1]), expected[-1], rtol=1e-4, atol=1e-5)
    assert torch.equal(dense(times.view(3, 3)), dense(times).view(3, 3, 2, 3))
    assert torch.equal(dense(tensor(ends[0])), y0)
    assert (dense.t0, dense.t1) == ends
    assert dense.stats.accepted > 0


def test_a_dense_solution_is_torchdiffeqs():
    f, y0 = Field(3, 4), features(3)
    theirs = torchdiffeq.odeint_dense(f, y0, tensor(0.0), tensor(2.0), rtol=1e-7, atol=1e-9)
    ours = nt.odeint_dense(f, y0, tensor(0.0), tensor(2.0), rtol=1e-7, atol=1e-9)
    for t in (0.1, 0.77, 1.5):
        torch.testing.assert_close(ours(tensor(t)), theirs(tensor(t)), rtol=0, atol=1e-12)


def test_a_dense_solution_is_differentiable_in_everything():
    f, y0, t = Field(3, 4), features(3).requires_grad_(), tensor(0.3, 1.1).requires_grad_()
    wanted = (y0, t, *f.parameters())
    dense = nt.odeint_dense(f, y0, 0.0, 1.5, **TIGHT)
    found = torch.autograd.grad(dense(t).square().sum(), wanted)
    fixed = nt.odeint(f, y0, torch.cat((tensor([0.0]), t, tensor([1.5]))), **TIGHT)[1:3]
    for x, y in zip(found, torch.autograd.grad(fixed.square().sum(), wanted), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        assert not nt.odeint_dense(f, y0, 0.0, 1.5)(0.5).requires_grad


def test_dense_tuples_and_limits():
    dense = nt.odeint_dense(lambda t, s: (s[1], -s[0]), (tensor(0.0), tensor(1.0)), 0.0, math.pi, **TIGHT)
    sine, cosine = dense(torch.linspace(0, math.pi, 7, dtype=torch.float64))
    times = torch.linspace(0, math.pi, 7, dtype=torch.float64)
    torch.testing.assert_close(sine, times.sin(), rtol=0, atol=1e-6)
    torch.testing.assert_close(cosine, times.cos(), rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="t must lie between"):
        dense(4.0)
    with pytest.raises(ValueError, match="own methods only"):
        nt.odeint_dense(lambda t, y: y, features(2), 0.0, 1.0, method="implicit_adams")
    with pytest.raises(ValueError, match="is missing"):
        nt.odeint_dense(lambda t, y: y, features(2), 0.0, 1.0, method="rk4")


def test_a_dense_solution_says_that_its_start_has_no_gradient():
    """It was None, silently, and wrong where both ends came from one tensor."""
    t = torch.tensor([0.0, 1.0], dtype=torch.float64, requires_grad=True)
    y0 = torch.ones(1, dtype=torch.float64, requires_grad=True)
    with pytest.raises(ValueError, match="t0 needs a gradient"):
        nt.odeint_dense(lambda t, y: -y, y0, t[0], t[-1])
    with torch.no_grad():
        nt.odeint_dense(lambda t, y: -y, y0, t[0], t[-1])
    (g,) = torch.autograd.grad(nt.odeint_dense(lambda t, y: -y, y0, t[0].detach(), t[-1])(t[-1]).sum(), t)
    torch.testing.assert_close(g[1].item(), -math.exp(-1), rtol=1e-6, atol=1e-6)
