"""The front door beside torchdiffeq itself: values, steps, options, forms of the state, and the listed differences."""

import math

import pytest
import scipy.linalg
import torch
import torchdiffeq
from hypothesis import given
from hypothesis import strategies as st
from support import Field, features
from torch import nn

import nesterov_triton as nt
from nesterov_triton.interop import options as opt

ADAPTIVE = ["dopri5", "dopri8", "tsit5", "bosh3", "fehlberg2", "adaptive_heun"]
FIXED = ["euler", "midpoint", "heun2", "heun3", "rk4"]
SHARED = [m for m in ADAPTIVE if m != "tsit5"]  # torchdiffeq 0.2.5 has no tsit5
FSAL = ["dopri5", "dopri8", "bosh3"]
BOTH = {"forward": [0.0, 0.4, 1.0, 1.7], "backward": [1.7, 1.0, 0.4, 0.0]}


class Counted(nn.Module):
    """A field that keeps the times it was called at."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.times = inner, []

    def forward(self, t, y):
        self.times.append(float(t))
        return self.inner(t, y)


def field():
    return Counted(Field(3, 4))


def start(*shape, **keywords):
    return features(*(shape or (5, 3)), **keywords)


def tensor(times, dtype=torch.float64):
    return torch.tensor(times, dtype=dtype)


def both(f, y0, t, **keywords):
    """torchdiffeq's answer and ours, and the evaluations that each took."""
    f.times.clear()
    theirs = torchdiffeq.odeint(f, y0, t, **keywords)
    n = len(f.times)
    f.times.clear()
    ours = nt.odeint(f, y0, t, **keywords)
    return theirs, ours, n, len(f.times)


# -- values and steps --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", BOTH)
@pytest.mark.parametrize("options", [None, {"step_size": 0.17}, {"step_size": 0.17, "interp": "cubic"}])
@pytest.mark.parametrize("method", FIXED)
def test_fixed_steps_are_torchdiffeqs_to_rounding(method, options, direction):
    theirs, ours, n, m = both(field(), start(), tensor(BOTH[direction]), method=method, options=options)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)
    assert m == n or options.get("interp") == "cubic"  # there two evaluations a requested time, where theirs take one


@pytest.mark.parametrize("direction", BOTH)
@pytest.mark.parametrize("method", FSAL)
def test_adaptive_steps_are_torchdiffeqs(method, direction):
    # Up to the last one, which theirs take beyond the end. A first time before it sees the same steps.
    times = BOTH[direction]
    long = tensor([*times, times[-1] + (times[-1] - times[0])])
    f = field()
    theirs, ours, _, _ = both(f, start(), long, method=method, rtol=1e-6, atol=1e-7)
    tolerance = 1e-12 if method != "bosh3" else 1e-3  # whose interpolant is another one
    torch.testing.assert_close(ours[:4], theirs[:4], rtol=0, atol=tolerance)
    torch.testing.assert_close(ours[4], theirs[4], rtol=0, atol=1e-4)
    lowest, highest = sorted((float(long[0]), float(long[-1])))
    assert all(lowest <= t <= highest for t in f.times)


@pytest.mark.parametrize("method", FSAL)
def test_accepted_and_rejected_steps_are_torchdiffeqs(method):
    class Told(Field):
        def callback_step(self, t, y, dt):
            steps.append((float(t), float(dt)))

    f, t = Told(3, 4), tensor([0.0, 6.0])
    keywords = {"method": method, "rtol": 1e-6, "atol": 1e-7, "options": {"first_step": 2.5}}
    steps = []
    torchdiffeq.odeint(f, start(), t, **keywords)
    theirs, steps = steps, []
    nt.odeint(f, start(), t, **keywords)
    assert len({t0 for t0, _ in steps}) < len(steps)  # some are rejected
    assert len(steps) == pytest.approx(len(theirs), abs=1)
    inner = min(len(steps), len(theirs)) - 2
    assert inner > 3
    torch.testing.assert_close(tensor(steps[:inner]), tensor(theirs[:inner]), rtol=1e-8, atol=0)


@pytest.mark.parametrize("direction", BOTH)
@pytest.mark.parametrize("method", ADAPTIVE)
def test_every_adaptive_method_solves_a_linear_system(method, direction):
    a = features(3, 3, seed=5)
    times = BOTH[direction]
    ours = nt.odeint(lambda t, y: y @ a, start(4, 3), tensor(times), method=method, rtol=1e-7, atol=1e-8)
    for t, y in zip(times, ours, strict=True):
        exact = start(4, 3) @ torch.from_numpy(scipy.linalg.expm(a.numpy() * (t - times[0])))
        torch.testing.assert_close(y, exact, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("time", [torch.float32, torch.float64])
def test_dtypes_are_kept(dtype, time):
    f, y0 = Field(3, 4).to(dtype), start(dtype=dtype)
    seen = []

    def watched(t, y):
        seen.append((t.dtype, t.ndim, y.dtype))
        return f(t, y)

    found = nt.odeint(watched, y0, tensor([0.0, 1.0], time))
    assert found.dtype == dtype
    assert set(seen) == {(dtype, 0, dtype)}
    torch.testing.assert_close(found, torchdiffeq.odeint(f, y0, tensor([0.0, 1.0], time)), rtol=1e-5, atol=1e-5)


# -- forms of the state ------------------------------------------------------------------------------------------------


def test_tuples_of_any_shapes():
    f = Field(3, 4)

    def pair(t, state):
        y, s, empty = state
        return f(t, y), torch.sin(t) * s + y.sum(), empty

    y0 = (start(2, 3), tensor(0.3), torch.zeros(0, 4, dtype=torch.float64))
    t = tensor([0.0, 0.5, 1.5])
    ours = nt.odeint(pair, y0, t, rtol=1e-6, atol=1e-8)
    assert [x.shape for x in ours] == [(3, 2, 3), (3,), (3, 0, 4)]
    exact = nt.odeint(pair, y0, t, rtol=1e-11, atol=1e-11)
    for x, y in zip(ours, exact, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)
    theirs = torchdiffeq.odeint(lambda t, s: pair(t, (*s, None))[:2], y0[:2], t, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(exact[0], theirs[0], rtol=1e-8, atol=1e-8)


def test_a_tuples_error_is_the_largest_of_its_tensors():
    # A large quiet tensor beside a small lively one: one mean over both would hide the error.
    calls = []

    def f(t, state):
        calls.append(1)
        return 0 * state[0], torch.cos(9 * t) * state[1]

    y0, t = (torch.zeros(1000, dtype=torch.float64), tensor([1.0])), tensor([0.0, 3.0])
    keywords = {"rtol": 1e-6, "atol": 1e-6}
    theirs = torchdiffeq.odeint(f, y0, t, **keywords)
    n = len(calls)
    calls.clear()
    ours = nt.odeint(f, y0, t, **keywords)
    assert len(calls) == pytest.approx(n, abs=6)
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_complex_states(method):
    a = torch.complex(features(3, 3, seed=3), features(3, 3, seed=4)) / 2
    y0 = torch.complex(start(2, 3), start(2, 3, seed=7))
    t = tensor([0.0, 0.7, 2.0])
    options = {"step_size": 0.01} if method == "rk4" else None
    ours = nt.odeint(lambda t, y: y @ a, y0, t, method=method, options=options)
    for time, y in zip(t.tolist(), ours, strict=True):
        torch.testing.assert_close(y, y0 @ torch.matrix_exp(a * time), rtol=1e-6, atol=1e-6)
    mixed = nt.odeint(lambda t, s: (s[0] @ a, -s[1]), (y0, torch.ones(2, dtype=torch.float64)), t)
    torch.testing.assert_close(mixed[0], ours, rtol=1e-5, atol=1e-5)
    assert mixed[1].is_complex()  # promoted, as torch.cat does


def test_gradients_of_complex_states():
    a = torch.complex(features(2, 2, seed=3), features(2, 2, seed=4)).requires_grad_()
    y0 = torch.complex(start(2), start(2, seed=7)).requires_grad_()

    def loss(solution):
        return (solution[-1] - (0.3 + 0.1j)).abs().square().sum()

    t = tensor([0.0, 0.5, 1.0])
    exact = torch.autograd.grad(loss(torch.stack((y0, y0 @ torch.matrix_exp(a)))), (y0, a))
    for gradient in ("backprop", "discrete", "adjoint"):
        found = nt.odeint_adjoint(lambda t, y: y @ a, y0, t, adjoint_params=(a,), gradient=gradient)
        for x, y in zip(torch.autograd.grad(loss(found), (y0, a)), exact, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


def test_one_time_gives_the_first_state():
    y0 = start(2).requires_grad_()
    found = nt.odeint(lambda t, y: y, y0, tensor([1.0]))
    assert torch.equal(found, y0[None])
    assert torch.equal(torch.autograd.grad(found.sum(), y0)[0], torch.ones_like(y0))
    pair = nt.odeint(lambda t, y: y, (y0, y0), tensor([1.0]))
    assert [x.shape for x in pair] == [(1, 2), (1, 2)]


def test_states_without_elements():
    y0 = torch.zeros(0, 3, dtype=torch.float64, requires_grad=True)
    for method in ("dopri5", "rk4"):
        found = nt.odeint(lambda t, y: y, y0, tensor([0.0, 1.0]), method=method)
        assert found.shape == (2, 0, 3)
        found.sum().backward()


def test_a_slope_of_another_dtype_is_converted_as_in_torchdiffeq():
    def f(t, y):
        return (y * 0.5).double()

    y0, t = torch.ones(3), tensor([0.0, 1.0])
    torch.testing.assert_close(nt.odeint(f, y0, t), torchdiffeq.odeint(f, y0, t), rtol=1e-6, atol=1e-6)


# -- options -----------------------------------------------------------------------------------------------------------


def attempts(f, t, **keywords):
    """(t, dt) of all attempted steps."""
    steps = []
    f.callback_step = lambda t, y, dt: steps.append((float(t), float(dt)))
    nt.odeint(f, start(), t, **keywords)
    del f.callback_step
    return steps


def test_step_bounds():
    f, t = Field(3, 4), tensor([0.0, 2.0])
    free = attempts(f, t, rtol=1e-3, atol=1e-3)
    assert max(dt for _, dt in free) > 0.5
    bound = attempts(f, t, rtol=1e-3, atol=1e-3, options={"max_step": 0.1})
    assert max(dt for _, dt in bound) < 0.1 + 1e-12
    coarse = attempts(f, t, rtol=1e-12, atol=1e-12, options={"min_step": 0.25, "max_step": 0.25})
    torch.testing.assert_close(tensor([dt for _, dt in coarse]), torch.full((8,), 0.25, dtype=torch.float64))
    assert attempts(f, t, options={"first_step": 0.125})[0] == (0.0, 0.125)


def test_controller_options_are_torchdiffeqs():
    class Told(Field):
        def callback_step(self, t, y, dt):
            steps.append(float(dt))

    f, t = Told(3, 4), tensor([0.0, 4.0])
    for options in ({"safety": 0.7}, {"ifactor": 1.5}, {"dfactor": 0.5, "first_step": 3.0}, {"ifactor": 1.0}):
        steps = []
        torchdiffeq.odeint(f, start(), t, rtol=1e-6, atol=1e-7, options=options)
        theirs, steps = steps, []
        nt.odeint(f, start(), t, rtol=1e-6, atol=1e-7, options=options)
        inner = min(len(steps), len(theirs)) - 3  # the end is near
        torch.testing.assert_close(tensor(steps[:inner]), tensor(theirs[:inner]), rtol=1e-8, atol=0)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_steps_end_at_step_t(sign):
    f = Field(3, 4)
    stops = tensor([0.33, 0.777]) * sign
    steps = attempts(f, tensor([0.0, sign]), options={"step_t": stops}, rtol=1e-3, atol=1e-3)
    assert set(stops.tolist()) <= {t for t, _ in steps}


@pytest.mark.parametrize("gradient", ["discrete", "backprop", "adjoint"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_jumps_are_seen_from_both_sides(sign, dtype, gradient):
    # y' = a before the jump and b after it: exact whatever the steps, if no evaluation sees the wrong side.
    jump = tensor([0.3], dtype) * sign
    a = torch.tensor(2.0, dtype=dtype, requires_grad=True)
    times = []

    class Jump(nn.Module):
        def forward(self, t, y):
            times.append(t.item())
            assert t != jump
            before = t * sign < jump[0] * sign
            return torch.where(before, a, -3 * a).expand(y.shape)

    y0 = torch.zeros(2, dtype=dtype)
    t = tensor([0.0, sign], dtype)
    found = nt.odeint_adjoint(
        Jump(), y0, t, rtol=1e-4, atol=1e-4, options={"jump_t": jump}, adjoint_params=(a,), gradient=gradient
    )
    at = abs(jump.item())
    exact = sign * (2 * at - 6 * (1 - at))
    torch.testing.assert_close(found[-1], torch.full_like(y0, exact), rtol=1e-6, atol=1e-6)
    (g,) = torch.autograd.grad(found[-1].sum(), a)
    assert g.item() == pytest.approx(exact, rel=1e-4)


@pytest.mark.parametrize("method", FIXED)
def test_perturbed_grids_are_torchdiffeqs(method):
    seen = []

    def f(t, y):
        seen.append(t.item())
        return torch.where(t < 0.5, y, -y)

    y0, t, options = start(2), tensor([0.0, 1.0]), {"step_size": 0.25, "perturb": True}
    theirs = torchdiffeq.odeint(f, y0, t, method=method, options=options)
    n = len(seen)
    ours = nt.odeint(f, y0, t, method=method, options=options)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)
    starts = {"euler": 1, "midpoint": 2, "heun2": 2, "heun3": 3, "rk4": 4}[method]
    assert seen[n + starts :: starts] == seen[starts:n:starts]


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_grid_constructors(sign):
    def grid(func, y0, t):
        assert y0.shape == (5, 3)
        return t[0] + (t[-1] - t[0]) * torch.linspace(0, 1, 7, dtype=t.dtype) ** 2

    f, t = field(), tensor([0.0, 0.5, 1.3]) * sign
    theirs, ours, n, m = both(f, start(), t, method="rk4", options={"grid_constructor": grid})
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)
    assert n == m


def test_norms_of_ones_own():
    t, y0 = tensor([0.0, 2.0]), start()
    shapes = []

    def largest(y):
        shapes.append(y.shape)
        return y.abs().max()

    f = field()
    theirs, ours, n, m = both(f, y0, t, rtol=1e-6, atol=1e-7, options={"norm": largest})
    assert n == m
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert set(shapes) == {(5, 3)}
    # A norm that looks at one element alone: the others' errors do not matter.
    blind = nt.odeint(f, y0, t, options={"norm": lambda y: 0.0 * y.sum()}, return_stats=True)[1]
    assert blind.accepted < 10  # ten times longer each
    seen = []
    nt.odeint(
        lambda t, s: (f(t, s[0]), s[1]), (y0, y0[0]), t, options={"norm": lambda s: seen.append(s) or s[0].norm()}
    )
    assert [x.shape for x in seen[0]] == [(5, 3), (3,)]


@pytest.mark.parametrize(
    ("rtol", "atol"),
    [
        (torch.tensor(1e-5), torch.tensor(1e-6)),
        (1e-5, torch.full((3,), 1e-6)),
        (torch.full((5, 1), 1e-5), 1e-6),
        (0.0, 1e-6),
        (1e-5, 0),
        (torch.tensor(0.0), 1e-6),
    ],
)
def test_tolerances_may_be_tensors_or_zero(rtol, atol):
    theirs, ours, n, m = both(field(), start(), tensor([0.0, 1.0]), rtol=rtol, atol=atol)
    assert m == pytest.approx(n, abs=6)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_tolerances_of_each_tensor_of_a_tuple():
    def f(t, s):
        return torch.cos(5 * t) * s[0], torch.sin(7 * t) * s[1]

    y0, t = (start(2), start(3)), tensor([0.0, 3.0])
    for rtol, atol in (((1e-3, 1e-8), 1e-9), (1e-9, (1e-3, torch.full((3,), 1e-8)))):
        ours, stats = nt.odeint(f, y0, t, rtol=rtol, atol=atol, return_stats=True)
        loose = nt.odeint(f, y0, t, rtol=1e-3, atol=1e-3, return_stats=True)[1]
        assert stats.accepted > 2 * loose.accepted
        exact = y0[1] * math.exp((1 - math.cos(21.0)) / 7)
        torch.testing.assert_close(ours[1][-1], exact, rtol=1e-6, atol=1e-6)


def test_max_num_steps_counts_the_whole_solve():
    f, t = Field(3, 4), torch.linspace(0, 4, 41).double()
    stats = nt.odeint(f, start(), t, options={"max_step": 0.1}, return_stats=True)[1]
    attempted = stats.accepted + stats.rejected
    assert attempted > 40
    assert nt.odeint(f, start(), t, options={"max_step": 0.1, "max_num_steps": attempted}) is not None
    with pytest.raises(nt.SolveError) as error:
        nt.odeint(f, start(), t, options={"max_step": 0.1, "max_num_steps": attempted - 1})
    assert error.value.status is nt.Status.MAX_STEPS
    # torchdiffeq counts anew from each requested time.
    torchdiffeq.odeint(f, start(), t, options={"max_step": 0.1, "max_num_steps": 3})


# -- what is handed over, and what is refused --------------------------------------------------------------------------


def test_methods_of_solve_are_pointed_to():
    system, state, t = nt.systems.gnesterov(Field(3, 4)), (start(), start()), tensor([1.0, 2.0])
    for method in ("nystrom4", "nystrom6", "strang", "blanes_moan4", "auto"):
        for solve in (nt.odeint, nt.odeint_adjoint):
            with pytest.raises(ValueError, match=rf"method '{method}' is solve's: .*nt\.solve\(.*method='{method}'"):
                solve(system, state, t, method=method)
    for theirs, ours in (("rk4_38", "rk4"), ("prince_dormand8", "dopri8")):
        with pytest.raises(ValueError, match=rf"method '{theirs}' is solve's.*method='{ours}', its name here"):
            nt.odeint(system, state, t, method=theirs)
    with pytest.raises(ValueError, match=r"adjoint_method 'nystrom4' is solve's"):
        nt.odeint_adjoint(system, state, t, adjoint_method="nystrom4")


@pytest.mark.parametrize("method", opt.HANDED_OVER)
def test_other_methods_are_torchdiffeqs(method):
    f, t = Field(3, 4), tensor([0.0, 0.5, 1.0])
    options = {} if method == "scipy_solver" else {"step_size": 0.1}
    theirs = torchdiffeq.odeint(f, start(), t, method=method, options=options)
    assert torch.equal(nt.odeint(f, start(), t, method=method, options=options), theirs)
    with pytest.raises(ValueError, match=r"unknown option of method .* in options 'step_sise'"):
        nt.odeint(f, start(), t, method=method, options={"step_sise": 0.1})
    with pytest.raises(ValueError, match="drop return_stats"):
        nt.odeint(f, start(), t, method=method, return_stats=True)
    if method != "scipy_solver":
        ours = nt.odeint_adjoint(f, start(), t, method="dopri5", adjoint_method=method, adjoint_options=options)
        torch.testing.assert_close(ours, torchdiffeq.odeint(f, start(), t))


def test_all_of_torchdiffeqs_methods_are_known():
    from torchdiffeq._impl.odeint import SOLVERS

    assert set(SOLVERS) <= set(opt.METHODS)
    assert set(opt.METHODS) - set(SOLVERS) == {"tsit5"}


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("unknown method 'dopri55': did you mean 'dopri5'", {"method": "dopri55"}),
        ("unknown option of method 'dopri5' in options 'max_steps'", {"options": {"max_steps": 3}}),
        ("unknown option of method 'dopri5' in options 'step_size'", {"options": {"step_size": 0.1}}),
        ("unknown option of method 'rk4' in options 'first_step'", {"method": "rk4", "options": {"first_step": 0.1}}),
        (r"options\['max_num_steps'\] must be", {"options": {"max_num_steps": 0}}),
        (r"options\['max_num_steps'\] must be an integer", {"options": {"max_num_steps": 1.5}}),
        (r"options\['safety'\] must lie", {"options": {"safety": 1.1}}),
        ("0 < dfactor < 1", {"options": {"dfactor": 1.0}}),
        ("min_step ≤ max_step", {"options": {"min_step": 1.0, "max_step": 0.5}}),
        (r"options\['first_step'\] must be above 0", {"options": {"first_step": 0.0}}),
        (r"options\['first_step'\] must be a number", {"options": {"first_step": "small"}}),
        ("hold a time twice", {"options": {"step_t": tensor([0.5]), "jump_t": tensor([0.5])}}),
        (r"options\['jump_t'\] must be a 1-D tensor", {"options": {"jump_t": 0.5}}),
        (r"options\['norm'\] must be a function", {"options": {"norm": "seminorm"}}),
        (r"options\['norm'\] must return", {"options": {"norm": lambda y: y}}),
        (r"options\['dtype'\] must be", {"options": {"dtype": torch.int32}}),
        ("options must be a dict", {"options": [("first_step", 0.1)]}),
        ("exclude each other", {"method": "rk4", "options": {"step_size": 0.1, "grid_constructor": lambda f, y, t: t}}),
        ("a grid from t", {"method": "rk4", "options": {"grid_constructor": lambda f, y, t: t + 1}}),
        ("a grid that runs", {"method": "rk4", "options": {"grid_constructor": lambda f, y, t: t[[0, 1, 0, 1]]}}),
        ("a 1-D floating-point", {"method": "rk4", "options": {"grid_constructor": lambda f, y, t: t.tolist()}}),
        ("did you mean 'cubic'", {"method": "rk4", "options": {"interp": "cubik"}}),
        (r"options\['perturb'\] must be", {"method": "rk4", "options": {"perturb": 1}}),
        ("rtol and atol are both 0", {"rtol": 0.0, "atol": 0.0}),
        ("rtol must be a finite number", {"rtol": -1.0}),
        ("atol must be a finite number", {"atol": math.nan}),
        ("atol must be a number", {"atol": "tight"}),
        ("rtol does not broadcast", {"rtol": torch.ones(7)}),
        ("atol must be finite", {"atol": torch.full((3,), math.inf)}),
        ("rtol must not require gradients", {"rtol": torch.ones(3, requires_grad=True)}),
        ("y0 must be a tensor or a tuple", {"y0": 1.0}),
        ("y0 must be floating point", {"y0": torch.ones(2, dtype=torch.int64)}),
        (r"y0\[1\] must be a tensor", {"y0": (torch.ones(2), 1.0)}),
        ("holds NaN or infinite values", {"y0": torch.full((5, 3), math.nan, dtype=torch.float64)}),
        ("strictly increasing or decreasing", {"t": tensor([0.0, 1.0, 1.0])}),
        ("at least two times", {"t": torch.zeros(0)}),
        ("t must be one-dimensional", {"t": tensor(1.0)}),
        ("func must be a module or function", {"func": 3}),
        ("args must be a tuple", {"args": torch.ones(2)}),
        ("unknown gradient", {"gradient": "disctete"}),
        ("returned shape", {"func": lambda t, y: y[:1]}),
        ("returned float", {"func": lambda t, y: 1.0}),
        ("return a tuple of 2 tensors", {"func": lambda t, y: y[0], "y0": (torch.ones(2), torch.ones(2))}),
        ("for a real state", {"func": lambda t, y: y * 1j}),
    ],
)
def test_bad_input_is_an_error_that_names_it(message, change):
    calls = {"func": lambda t, y: -y, "y0": start(), "t": tensor([0.0, 1.0])} | change
    func, y0, t = calls.pop("func"), calls.pop("y0"), calls.pop("t")
    with pytest.raises((ValueError, TypeError), match=message):
        nt.odeint(func, y0, t, **calls)


def test_inputs_changed_in_place_are_found():
    with pytest.raises(RuntimeError, match="changes its input in place"):
        nt.odeint(lambda t, y: y.mul_(2), start(), tensor([0.0, 1.0]))


# -- callbacks, args, stats, systems -----------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", BOTH)
@pytest.mark.parametrize("single", [True, False])
def test_callbacks_are_told_of_every_step(single, direction):
    told = {"step": [], "accept": [], "reject": []}

    class Told(Field):
        def callback_step(self, t, y, dt):
            told["step"].append((t, y, dt))

        def callback_accept_step(self, t, y, dt):
            told["accept"].append((t, y, dt))

        def callback_reject_step(self, t, y, dt):
            told["reject"].append((t, y, dt))

        def forward(self, t, y):
            return super().forward(t, y) if single else (super().forward(t, y[0]), -y[1])

    y0 = start() if single else (start(), start(2))
    times = tensor(BOTH[direction])
    stats = nt.odeint(Told(3, 4), y0, times, options={"first_step": 1.5}, return_stats=True)[1]
    assert len(told["accept"]) == stats.accepted
    assert len(told["reject"]) == stats.rejected > 0
    assert len(told["step"]) == stats.accepted + stats.rejected
    t, y, dt = told["step"][0]
    assert (t.item(), dt.item()) == (times[0].item(), 1.5)
    first = y if single else y[0]
    assert torch.equal(first, start())
    ends = [float(t) + math.copysign(float(dt), times[1] - times[0]) for t, _, dt in told["accept"]]
    assert ends[-1] == times[-1]
    assert ends[:-1] == pytest.approx([float(t) for t, _, _ in told["accept"]][1:])


def test_args_are_passed_and_differentiated():
    a = features(3, 3).requires_grad_()
    scale = (2 * a).sum()  # no leaf
    y0, t = start(2, 3), tensor([0.0, 0.5, 1.0])

    def f(t, y, matrix, size, name):
        assert name == "any"
        return torch.tanh(y @ matrix) * size

    found = []
    for gradient in (None, "discrete", "adjoint", "backprop"):
        solution = nt.odeint(f, y0, t, args=(a, scale, "any"), gradient=gradient, rtol=1e-9, atol=1e-10)
        found.append(torch.autograd.grad(solution.square().sum(), a, retain_graph=True)[0])
    theirs = torchdiffeq.odeint(lambda t, y: f(t, y, a, scale, "any"), y0, t, rtol=1e-9, atol=1e-10)
    (exact,) = torch.autograd.grad(theirs.square().sum(), a)
    for g in found:
        torch.testing.assert_close(g, exact, rtol=1e-5, atol=1e-6)


def test_args_are_differentiated_where_the_solution_is_interpolated_by_slopes():
    a, t = features(3, 3).requires_grad_(), tensor([0.0, 0.2, 1.0])
    options = {"step_size": 0.5, "interp": "cubic"}
    theirs = torchdiffeq.odeint(lambda t, y: torch.tanh(y @ a), start(), t, method="rk4", options=options)
    (expected,) = torch.autograd.grad(theirs.square().sum(), a)
    for gradient in ("discrete", "backprop"):
        ours = nt.odeint(
            lambda t, y, a: torch.tanh(y @ a), start(), t, args=(a,), method="rk4", options=options, gradient=gradient
        )
        (found,) = torch.autograd.grad(ours.square().sum(), a)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)


def test_momentum_systems_are_interpolated_by_their_slopes():
    system = nt.systems.gnesterov(Field(3, 4), form="exact").double()
    state, t = (start(), start(seed=9)), tensor([1.0, 1.33, 2.0])
    coarse = nt.odeint(system, state, t, method="rk4", options={"step_size": 0.1, "interp": "cubic"})
    for ours, exact in zip(coarse, nt.odeint(system, state, t, rtol=1e-9, atol=1e-10), strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-4)
    grads = torch.autograd.grad(sum(x[1].sum() for x in coarse), list(system.parameters()))
    fine = nt.odeint(system, state, t, rtol=1e-9, atol=1e-10)
    for ours, exact in zip(
        grads, torch.autograd.grad(sum(x[1].sum() for x in fine), list(system.parameters())), strict=True
    ):
        torch.testing.assert_close(ours, exact, rtol=1e-3, atol=1e-3)


def test_stats_count_what_was_called():
    f = field()
    y0 = start().requires_grad_()
    found, stats = nt.odeint(f, y0, tensor([0.0, 1.0]), return_stats=True)
    assert stats.nfe_forward == len(f.times)
    f.times.clear()
    found.sum().backward()
    assert stats.nfe_backward == len(f.times)


@pytest.mark.parametrize("name", ["nesterov", "gnesterov", "heavy_ball", "second_order"])
def test_momentum_systems_take_their_own_path(name):
    inner = Field(3, 4, sees_momentum=name == "second_order")
    system = getattr(nt.systems, name)(inner).double()
    state, t = (start(), start(seed=9)), tensor([1.0, 1.4, 2.0])
    expected = nt.solve(system, state, t, rtol=1e-7, atol=1e-9)
    for solver in (nt.odeint, nt.odeint_adjoint):
        found, stats = solver(system, state, t, return_stats=True)
        assert stats.path == expected.stats.path
        for ours, theirs in zip(found, expected.ys, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
        loss = sum(x.square().sum() for x in found)
        assert all(bool(g.abs().sum() > 0) for g in torch.autograd.grad(loss, list(inner.parameters())))


def test_first_order_systems_are_their_field():
    f, t = Field(3, 4), tensor([0.0, 1.0])
    assert torch.equal(nt.odeint(nt.systems.FirstOrder(f), start(), t), nt.odeint(f, start(), t))


def test_under_torch_compile_the_solve_stays_in_python():
    f, t = Field(3, 4), tensor([0.0, 1.0])

    @torch.compile(backend="eager")
    def model(y):
        return nt.odeint(f, 2 * y, t)[-1] + 1

    torch.testing.assert_close(model(start()), nt.odeint(f, 2 * start(), t)[-1] + 1)


# -- properties --------------------------------------------------------------------------------------------------------

seeds = st.integers(0, 10_000)


@given(seed=seeds, method=st.sampled_from(["dopri5", "dopri8", "tsit5", "bosh3"]), sign=st.sampled_from([1.0, -1.0]))
def test_linear_systems_are_the_matrix_exponential(seed, method, sign):
    a, y0 = features(3, 3, seed=seed), features(2, 3, seed=seed + 1)
    t = sign * features(1, seed=seed + 2).abs().item() + 0.1 * sign
    found = nt.odeint(lambda t, y: y @ a, y0, tensor([0.5, 0.5 + t]), method=method, rtol=1e-7, atol=1e-9)[-1]
    exact = y0 @ torch.from_numpy(scipy.linalg.expm(a.numpy() * t))
    assert (found - exact).abs().max() < 1e-4 * (1 + exact.abs().max())


@given(seed=seeds)
def test_back_in_time_is_where_it_came_from(seed):
    f, y0, t = Field(3, 4, seed=seed), features(2, 3, seed=seed), tensor([0.0, 1.0])
    there = nt.odeint(f, y0, t, rtol=1e-9, atol=1e-10)[-1]
    back = nt.odeint(f, there, t.flip(0), rtol=1e-9, atol=1e-10)[-1]
    torch.testing.assert_close(back, y0, rtol=1e-5, atol=1e-5)


@given(seed=seeds, cut=st.floats(0.05, 0.95))
def test_an_interval_may_be_split_at_an_output(seed, cut):
    f, y0 = Field(3, 4, seed=seed), features(2, 3, seed=seed)
    whole = nt.odeint(f, y0, tensor([0.0, cut, 1.0]), rtol=1e-8, atol=1e-9)
    first = nt.odeint(f, y0, tensor([0.0, cut]), rtol=1e-8, atol=1e-9)[-1]
    second = nt.odeint(f, first, tensor([cut, 1.0]), rtol=1e-8, atol=1e-9)[-1]
    torch.testing.assert_close(whole[1], first, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(whole[2], second, rtol=1e-5, atol=1e-5)
    # An output more changes nothing about the others.
    assert torch.equal(nt.odeint(f, y0, tensor([0.0, 1.0]), rtol=1e-8, atol=1e-9)[-1], whole[2])


@given(seed=seeds)
def test_a_permuted_batch_gives_permuted_answers(seed):
    f, y0, t = Field(3, 4, seed=seed), features(6, 3, seed=seed), tensor([0.0, 0.5, 1.0])
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(nt.odeint(f, y0[order], t), nt.odeint(f, y0, t)[:, order], rtol=1e-9, atol=1e-9)


class Turn(nn.Module):
    def forward(self, t, y):
        return 1j * y


def test_complex_states_without_elements():
    y0 = torch.zeros(0, 3, dtype=torch.complex128)
    for solver in (nt.odeint, nt.odeint_adjoint):
        y = solver(Turn(), y0, torch.tensor([0.0, 1.0]))
        assert (y.shape, y.dtype) == ((2, 0, 3), torch.complex128)
