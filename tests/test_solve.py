"""`solve` without a layer: fixed steps, observed orders, output times, counts, statuses."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from support import ADAPTIVE, FIXED, GRADIENTS, KEPT, METHODS, Field, Recorder, exact_solution, features, options_for

import nesterov_triton as nt
from nesterov_triton import SolveError, Status, systems, tableaus
from nesterov_triton.stepping.explicit_rk import error_norm

COST = {"dopri5": 6, "tsit5": 6, "bosh3": 3, "adaptive_heun": 2, "fehlberg2": 3, "dopri8": 12}  # per step, later steps
FSAL = ["dopri5", "tsit5", "bosh3", "dopri8"]
FIXED_COST = {"euler": 1, "midpoint": 2, "rk4": 4, "rk4_38": 4}


def observed_order(steps: list[float], errors: list[float]) -> float:
    """Slope of log error on log step."""
    return float(np.polyfit(np.log(steps), np.log(errors), 1)[0])


# --- fixed steps


@pytest.mark.parametrize("method", FIXED)
@pytest.mark.parametrize("end", [2.0, 0.4])
def test_observed_order(method, end):
    """At the end and, through the interpolant, in between; in both directions; with a step that does not divide."""
    field, y0 = Field(), features(2, 2)
    times = [1.0 + f * (end - 1.0) for f in (0.0, 0.11, 0.23, 0.37, 0.42, 0.58, 0.61, 0.79, 0.86, 0.93, 1.0)]
    expected = exact_solution(field.numpy, y0.numpy(), times)
    counts = (8.3, 16.3, 32.3, 64.3)
    steps = [abs(end - 1.0) / c for c in counts]
    errors, between = [], []
    for step in steps:
        with torch.no_grad():
            ys = nt.solve(field, y0, times, method=method, step_size=step).ys.numpy()
        errors.append(np.abs(ys[-1] - expected[-1]).max())
        between.append(np.abs(ys[1:-1] - expected[1:-1]).max())
    tableau = tableaus.get(method)
    assert observed_order(steps, errors) == pytest.approx(tableau.order, abs=0.35)
    # A step's interpolant of order p is off by O(dt^(p+1)), on top of the global error.
    assert observed_order(steps, between) > min(tableau.order, tableau.interpolant_order + 1) - 0.6


@pytest.mark.parametrize("method", FIXED)
@pytest.mark.parametrize(
    ("step", "count"), [(0.3, 4), (0.25, 4), (1.0, 1), (5.0, 1), (0.1, 10), (1 / 3, 3), (0.07, 15)]
)
def test_fixed_steps_end_where_they_must(method, step, count):
    field = Recorder(lambda t, y: torch.cos(t) * torch.ones_like(y))
    solution = nt.solve(field, torch.zeros(1, dtype=torch.float64), (0.5, 1.5), method=method, step_size=step)
    assert solution.stats.accepted == count
    assert solution.stats.rejected == 0
    assert solution.stats.nfe_forward == field.calls == FIXED_COST[method] * count
    times = [float(t) for t in field.times]
    starts = times[:: FIXED_COST[method]]
    assert starts == pytest.approx([0.5 + i * step for i in range(count)], abs=1e-12)
    assert max(times) <= 1.5


def test_euler_by_hand():
    y = nt.solve(lambda t, y: t * y, torch.tensor([1.0]), (1.0, 1.75), method="euler", step_size=0.5).final
    assert y.item() == pytest.approx((1 + 0.5 * 1.0) * (1 + 0.25 * 1.5))


@pytest.mark.parametrize("method", FIXED)
def test_interpolated_polynomials(method):
    """A method is exact for y' = p(t) of lower degree than its order, and so is what it says between the steps."""
    degree = {"euler": 0, "midpoint": 1, "rk4": 2, "rk4_38": 2}[method]
    times = torch.linspace(0.0, 1.0, 9, dtype=torch.float64)
    y0 = torch.zeros(2, dtype=torch.float64)
    ys = nt.solve(
        lambda t, y: (degree + 1) * t**degree * torch.ones_like(y), y0, times, method=method, step_size=0.3
    ).ys
    torch.testing.assert_close(ys[:, 0], times ** (degree + 1), rtol=1e-13, atol=1e-13)


# --- counts


@pytest.mark.parametrize("method", ADAPTIVE)
def test_evaluations_of_an_adaptive_method(method):
    """Two at the start (slope, trial step); an FSAL method then saves one a step, whether accepted or not."""
    field = Recorder(Field())
    with torch.no_grad():
        stats = nt.solve(field, 3 * features(3, 2), (0.0, 4.0), method=method, rtol=1e-4, atol=1e-4).stats
    attempts = stats.accepted + stats.rejected
    assert stats.nfe_forward == field.calls
    if method in FSAL:
        assert field.calls == 2 + COST[method] * attempts
    else:  # the first stage is evaluated once a state, and kept over rejections
        stages = COST[method]
        assert field.calls == 2 + stages * attempts - 1 - stats.rejected
    with torch.no_grad():
        stats = nt.solve(field, features(3, 2), (0.0, 1.0), method=method, rtol=1e-4, atol=1e-4, first_step=0.1).stats
    if method in FSAL:
        assert stats.nfe_forward == 1 + COST[method] * (stats.accepted + stats.rejected)


def test_rejected_steps_cost_no_first_stage():
    field = Recorder(Field())
    solution = nt.solve(field, 3 * features(3, 2), (0.0, 4.0), first_step=4.0, method="fehlberg2")
    assert solution.stats.rejected > 0
    assert field.calls == 3 * solution.stats.accepted + 2 * solution.stats.rejected


@pytest.mark.parametrize("method", METHODS)
def test_interpolants_cost_only_where_they_need_stages_of_their_own(method):
    y0 = features(2, 2)
    options = options_for(method)
    calls = []
    for times in ((1.0, 2.0), (1.0, 1.22, 2.0), (1.0, 1.2, 1.22, 2.0)):
        field = Recorder(Field())
        with torch.no_grad():
            nt.solve(field, y0, times, **options)
        calls.append(field.calls)
    extra = 3 if method == "dopri8" else 0
    assert calls == [calls[0], calls[0] + extra, calls[0] + extra]


@pytest.mark.parametrize("method", ADAPTIVE)
def test_the_first_step_may_be_longer_than_the_interval(method):
    solution = nt.solve(Field(), features(1, 2), (0.0, 0.1), method=method, first_step=5.0, rtol=1.0, atol=1.0)
    assert solution.stats.accepted == 1


# --- what a solution holds


def test_solution_of_a_first_order_system():
    y0 = features(2, 3, 4)
    solution = nt.solve(lambda t, y: -y, y0, [0, 1, 3], rtol=1e-9, atol=1e-9)
    assert solution.status is Status.SUCCESS
    assert solution.t.tolist() == [0.0, 1.0, 3.0]
    assert solution.ys.shape == (3, 2, 3, 4)
    assert torch.equal(solution.ys[0], y0)
    assert torch.equal(solution.ys[-1], solution.final)
    torch.testing.assert_close(solution.final, y0 * math.exp(-3), rtol=1e-7, atol=1e-9)
    assert isinstance(solution.stats.nfe_forward, int)
    assert solution.message


@pytest.mark.parametrize("kind", [tuple, list])
def test_solution_of_a_momentum_system(kind):
    """h'' = -h from (1, 0): cos and -sin."""
    system = systems.second_order(lambda t, h, m: -h)
    state = kind((torch.ones(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)))
    times = torch.linspace(0.0, 3.0, 7)
    solution = nt.solve(system, state, times, method="dopri8", rtol=1e-11, atol=1e-11)
    xs, ms = solution.ys
    torch.testing.assert_close(xs[:, 0], times.double().cos(), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(ms[:, 1], -times.double().sin(), rtol=1e-8, atol=1e-8)


def test_momentum_system_by_hand():
    system = systems.Momentum(lambda t, h: -h, damping=0.5, gate_x="tanh", xi=0.25)
    x, m = features(2, 2), features(2, 2, seed=4)
    final = nt.solve(system, (x, m), (0.0, 0.1), method="euler", step_size=0.1).final
    torch.testing.assert_close(final[0], x + 0.1 * torch.tanh(m))
    torch.testing.assert_close(final[1], m + 0.1 * (-0.5 * m - x - 0.25 * x))


def test_a_scalar_state_and_no_elements():
    y = nt.solve(lambda t, y: -y, torch.tensor(2.0), (0.0, 1.0)).final
    assert y.shape == ()
    assert y.item() == pytest.approx(2 * math.exp(-1), rel=1e-4)
    for method in METHODS:
        empty = nt.solve(
            lambda t, y: -y,
            torch.ones(0, 3),
            (0.0, 1.0, 2.0),
            **options_for(method) | {"atol": 1.0} if method in ADAPTIVE else options_for(method),
        )
        assert empty.ys.shape == (3, 0, 3)


def test_the_input_is_left_as_it_was():
    y0 = features(2, 2)
    kept = y0.clone()
    solution = nt.solve(lambda t, y: -y, y0, (0.0, 0.5, 1.0))
    solution.ys.mul_(0.0)
    solution.final.mul_(0.0)
    assert torch.equal(y0, kept)


def test_tolerances_as_tensors():
    """One element asked for more: its error shrinks, the other's may stay."""
    y0 = torch.ones(2, dtype=torch.float64)
    number = torch.tensor(1e-3, dtype=torch.float64)
    loose = nt.solve(lambda t, y: y.sin(), y0, (0.0, 3.0), rtol=number, atol=number)
    both = nt.solve(lambda t, y: y.sin(), y0, (0.0, 3.0), rtol=1e-3, atol=1e-3)
    assert torch.equal(loose.final, both.final)
    mixed = nt.solve(lambda t, y: y.sin(), y0, (0.0, 3.0), rtol=1e-3, atol=torch.tensor([1e-3, 1e-7]))
    assert mixed.stats.accepted > both.stats.accepted
    # for a momentum system the same tolerances hold for x and m
    system = systems.heavy_ball(Field())
    state = (features(3, 2), features(3, 2))
    tensor = nt.solve(system, state, (0.0, 1.0), rtol=torch.full((2,), 1e-5), atol=torch.full((3, 1), 1e-5))
    number = nt.solve(system, state, (0.0, 1.0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(tensor.final[0], number.final[0], rtol=1e-9, atol=1e-9)


def test_purely_relative_and_purely_absolute_tolerance():
    y0 = torch.tensor([0.0, 1.0], dtype=torch.float64)
    for options in ({"rtol": 1e-6, "atol": 0.0}, {"rtol": 0.0, "atol": 1e-6}):
        y = nt.solve(lambda t, y: torch.stack((torch.zeros_like(y[0]), -y[1])), y0, (0.0, 1.0), **options).final
        torch.testing.assert_close(y, torch.tensor([0.0, math.exp(-1)], dtype=torch.float64), rtol=1e-5, atol=0)
    # a momentum at rest has no size of its own to be relative to
    h = nt.HBNODE(Field(), rtol=1e-6, atol=0.0).double()(features(2, 2))
    assert bool(torch.isfinite(h).all())


# --- failures


def fail(field, y0, times, **options) -> SolveError:
    with pytest.raises(SolveError) as caught:
        nt.solve(field, y0, times, **options)
    error = caught.value
    assert isinstance(error, RuntimeError)
    assert f"t = {error.t:.9g}" in str(error)
    assert "dt = " in str(error)
    assert f"{error.steps} steps" in str(error)
    assert error.status.value in str(error)
    silent = nt.solve(field, y0, times, throw=False, **options)
    assert silent.status is error.status
    assert silent.message == str(error)
    final = silent.final if isinstance(silent.final, tuple) else (silent.final,)
    assert all(bool(torch.isnan(x).all()) for x in final)
    assert not any(x.requires_grad for x in final)
    restored = pickle.loads(pickle.dumps(error))
    assert (restored.status, restored.t, restored.dt, restored.steps) == (error.status, error.t, error.dt, error.steps)
    assert str(restored) == str(error)
    assert str(copy.copy(error)) == str(error)
    return error


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("method", ADAPTIVE)
def test_step_underflow_at_a_pole(method, gradient):
    """y' = y² from 1 has its pole at t = 1."""
    tolerance = 1e-3 if COST[method] < 4 else 1e-6
    y0 = torch.ones(2, dtype=torch.float64, requires_grad=True)
    error = fail(lambda t, y: y * y, y0, (0.0, 2.0), method=method, rtol=tolerance, atol=tolerance, gradient=gradient)
    assert error.status in (Status.STEP_UNDERFLOW, Status.NON_FINITE)
    assert error.t == pytest.approx(1.0, abs=0.1 if method == "fehlberg2" else 0.01)
    assert error.steps > 5


def test_step_underflow_is_told_from_a_broken_field():
    error = fail(lambda t, y: y * y, torch.ones(2, dtype=torch.float64), (0.0, 2.0))
    assert error.status is Status.STEP_UNDERFLOW
    assert abs(error.dt) < 1e-14


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_max_steps(gradient):
    y0 = features(2, 2).requires_grad_()
    error = fail(Field(), y0, (0.0, 10.0), rtol=1e-10, atol=1e-10, max_steps=7, gradient=gradient)
    assert error.status is Status.MAX_STEPS
    assert error.steps == 7
    assert 0 < error.t < 10
    stats = nt.solve(Field(), y0, (0.0, 10.0), rtol=1e-10, atol=1e-10).stats
    needed = stats.accepted + stats.rejected
    nt.solve(Field(), y0, (0.0, 10.0), rtol=1e-10, atol=1e-10, max_steps=needed)
    fail(Field(), y0, (0.0, 10.0), rtol=1e-10, atol=1e-10, max_steps=needed - 1)


def test_max_steps_of_a_fixed_method_is_known_before_the_first():
    field = Recorder(Field())
    error = fail(field, features(2, 2), (0.0, 1.0), method="rk4", step_size=0.1, max_steps=9)
    assert error.status is Status.MAX_STEPS
    assert field.calls == 0
    nt.solve(field, features(2, 2), (0.0, 1.0), method="rk4", step_size=0.1, max_steps=10)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("method", METHODS)
def test_a_field_that_is_not_finite_from_the_start(method, bad):
    options = {"step_size": 0.1} if method in FIXED else {}
    error = fail(lambda t, y: y * bad, torch.ones(2), (1.0, 2.0), method=method, **options)
    assert error.status is Status.NON_FINITE
    assert error.t == 1.0


@pytest.mark.parametrize("direction", [1.0, -1.0])
@pytest.mark.parametrize("method", METHODS)
def test_a_field_that_is_not_finite_from_some_time_on(method, direction):
    def field(t, y):
        return torch.where(direction * t > 0.5, math.nan, -direction * y)

    options = {"step_size": 0.04} if method in FIXED else {"rtol": 1e-4, "atol": 1e-4}
    times = [0.0, 0.2 * direction, direction]
    y0 = torch.ones(2, dtype=torch.float64)
    error = fail(field, y0, times, method=method, **options)
    assert error.status is Status.NON_FINITE
    assert direction * error.t == pytest.approx(0.5, abs=0.05)
    ys = nt.solve(field, y0, times, method=method, throw=False, **options).ys
    assert ys[1, 0].item() == pytest.approx(math.exp(-0.2), rel=2e-2)  # what was reached is kept
    assert bool(torch.isnan(ys[2]).all())


def test_a_state_that_overflows_for_once_is_tried_again_shorter():
    """A first step far too long may leave the range of float32; the problem itself is harmless."""
    y = nt.solve(lambda t, y: -(y**9), torch.full((2,), 2.0), (0.0, 1.0), first_step=1.0).final
    assert bool(torch.isfinite(y).all())
    assert 0 < float(y[0]) < 1


def test_one_bad_element_is_enough():
    for options in ({"method": "rk4", "step_size": 0.1}, {}):
        error = fail(lambda t, y: -y + torch.tensor([0.0, 0.0, math.inf]), torch.ones(4, 3), (0.0, 1.0), **options)
        assert error.status is Status.NON_FINITE


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_throw_false_of_a_momentum_system(gradient):
    system = systems.heavy_ball(lambda t, h: h * math.nan)
    solution = nt.solve(system, (torch.ones(2), torch.ones(2)), (0.0, 0.5, 1.0), throw=False, gradient=gradient)
    assert solution.status is Status.NON_FINITE
    xs, ms = solution.ys
    assert torch.equal(xs[0], torch.ones(2))
    assert bool(torch.isnan(xs[1:]).all())
    assert bool(torch.isnan(ms[1:]).all())
    assert not xs.requires_grad


def test_a_failure_in_the_adjoints_backward_solve():
    """The forward solve passes, and the adjoint may take no more steps than it did."""
    layer = nt.NODE(Field(), gradient=nt.gradients.Adjoint(rtol=1e-12, atol=1e-12), max_steps=30).double()
    out = layer(features(2, 2).requires_grad_())
    with pytest.raises(SolveError, match="adjoint's backward solve") as caught:
        out.sum().backward()
    assert caught.value.status is Status.MAX_STEPS
    assert layer.stats.nfe_backward > 0
    out = layer(features(2, 2).requires_grad_())
    with pytest.raises(SolveError) as caught:
        (out.sum() * math.nan).backward()
    assert caught.value.status is Status.NON_FINITE


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_an_exception_in_the_field_passes_and_the_layer_works_afterwards(method, gradient):
    class Broken(Field):
        fuse = 10**9

        def forward(self, t, h):
            self.fuse -= 1
            if self.fuse < 0:
                raise KeyError("from the field")
            return super().forward(t, h)

    options = {"step_size": 0.1} if method == "rk4" else {}
    layer = nt.GNesterovNODE(Broken(), method=method, gradient=gradient, **options).double()
    h = features(2, 2).requires_grad_()

    def gradient_of_call():
        return torch.autograd.grad(layer(h).sum(), h)[0]

    expected = gradient_of_call()
    layer.field.fuse = 5
    with pytest.raises(KeyError, match="from the field"):
        layer(h)
    layer.field.fuse = 10**9
    out = layer(h)
    if gradient not in ("backprop", KEPT):  # these call the field once
        layer.field.fuse = 5
        with pytest.raises(KeyError, match="from the field"):
            out.sum().backward()
        layer.field.fuse = 10**9
    assert torch.equal(gradient_of_call(), expected)


def test_a_step_too_small_for_the_time():
    error = fail(lambda t, y: y, torch.ones(1), (1e9, 1e9 + 1e-4), method="euler", step_size=1e-8, max_steps=10**6)
    assert error.status is Status.STEP_UNDERFLOW
    error = fail(lambda t, y: y, torch.ones(1), (1e9, 1e9 + 1e-4), first_step=1e-9)
    assert error.status is Status.STEP_UNDERFLOW


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("method", ["dopri5", "adaptive_heun", "dopri8"])
def test_a_state_that_grows_out_of_its_dtype_is_no_success(method, gradient):
    """Its field stays finite, and relative to an infinite state every error is small."""
    y0 = torch.tensor([60000.0, 1.0], dtype=torch.float16, requires_grad=True)
    error = fail(
        lambda t, y: 30000.0 + 0 * y.tanh(), y0, (0.0, 1.0), method=method, rtol=1e-2, atol=1e-2, gradient=gradient
    )
    assert error.status is Status.NON_FINITE
    solution = nt.solve(lambda t, y: 30000.0 + 0 * y.tanh(), y0, (0.0, 0.1, 1.0), rtol=1e-2, atol=1e-2, throw=False)
    assert solution.ys[1].isfinite().all()
    assert solution.ys[2].isnan().all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scale", [1e-250, 1e250])
def test_the_unit_of_time_does_not_matter(method, scale):
    def solve(unit):
        options = {"step_size": 0.3 * unit} if method in FIXED else {"first_step": 0.2 * unit}
        times = [unit * t for t in (0.0, 0.3, 0.6, 1.0)]
        return nt.solve(lambda t, y: -y / unit, features(3), times, method=method, **options).ys

    torch.testing.assert_close(solve(scale), solve(1.0), rtol=1e-12, atol=1e-12)


def test_an_error_too_large_for_the_dtype_is_not_taken_for_none():
    """dopri8 damps its error by another one, whose square overflows first."""
    errors = torch.tensor([[1e18], [1e21]])
    assert error_norm(errors, torch.ones(1), 0.0, 1.0) > 1


@pytest.mark.parametrize("direction", [1.0, -1.0])
@pytest.mark.parametrize("method", ADAPTIVE)
def test_an_interval_shorter_than_any_trial_step(method, direction):
    """The trial step that sizes the first one stays inside too."""
    field = Recorder(lambda t, y: -y)
    end = 1.0 + direction * 1e-8
    y = nt.solve(field, torch.ones(2, dtype=torch.float64), (1.0, end), method=method).final
    torch.testing.assert_close(y, torch.full((2,), 1 - direction * 1e-8, dtype=torch.float64), rtol=1e-14, atol=0)
    times = torch.stack(field.times)
    assert float(times.min()) >= min(1.0, end)
    assert float(times.max()) <= max(1.0, end)
    assert len(torch.unique(times)) > 1


@pytest.mark.parametrize("gradient", ["discrete", "backprop"])
def test_a_field_may_return_memory_that_it_writes_to_again(gradient):
    y = torch.tensor([1.0, -0.5], dtype=torch.float64)
    held = torch.empty_like(y)
    arguments = (y, (0.0, 1.0))
    options = {"method": "rk4", "step_size": 0.25, "gradient": gradient}
    found = nt.solve(lambda t, h: torch.sub(t, h, out=held), *arguments, **options).final
    assert torch.equal(found, nt.solve(lambda t, h: t - h, *arguments, **options).final)


@pytest.mark.parametrize("loop", ["eager", "graph"])
def test_a_slope_of_infinite_norm_is_no_reason_to_give_up(loop):
    """Without an absolute tolerance, at a state of 0: the first step is a short one, not one of length 0."""
    y0 = torch.zeros(2, dtype=torch.float64)
    found = nt.solve(lambda t, y: torch.ones_like(y), y0, (0.0, 1.0), rtol=1e-5, atol=0.0, loop=loop)
    torch.testing.assert_close(found.final, torch.ones_like(y0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("loop", ["eager", "graph"])
@pytest.mark.parametrize("gap", [1e-3, 1e-9, math.ulp(1.0)])
def test_a_short_interval_does_not_shorten_the_steps_of_the_next(gap, loop):
    """The adjoint goes from one requested time to the one before; the first way may be a sliver."""
    torch.manual_seed(0)
    field, h = Field().double(), features(3, 2)
    spent = []
    for times in ((1.0, 2.0), (1.0, 2.0 - gap, 2.0)):
        controller = nt.controllers.Integral(max_factor=2.0)
        layer = nt.NODE(field, t=times, gradient="adjoint", controller=controller, loop=loop)
        layer(h.requires_grad_()).sum().backward()
        spent.append(layer.stats.nfe_backward)
    assert spent[1] <= spent[0] + 10  # a start, a step and a change of the slope more
