"""Gradients through the front door: against autograd through tight solves, torchdiffeq's, and what each promises."""

import gc
import math
import threading
import weakref

import pytest
import torch
import torchdiffeq
from support import Field, features, live_tensors
from torch import nn

import nesterov_triton as nt

TIGHT = {"rtol": 1e-9, "atol": 1e-10}
GRADIENTS = ["discrete", "adjoint", "backprop"]
METHODS = ["dopri5", "dopri8", "rk4"]


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def loss(solution):
    parts = solution if isinstance(solution, tuple) else (solution,)
    return sum((k + 1) * y.square().sum() for part in parts for k, y in enumerate(part))


def check(found, expected, tolerance):
    for ours, theirs in zip(found, expected, strict=True):
        theirs = torch.zeros_like(ours) if theirs is None else theirs
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * max(1.0, theirs.abs().max().item()))


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("method", METHODS)
def test_gradients_of_state_parameters_and_times(method, gradient, sign):
    f, y0 = Field(3, 4), features(2, 3).requires_grad_()
    t = (tensor(0.1, 0.5, 1.2) * sign).requires_grad_()
    wanted = (y0, t, *f.parameters())
    reference = torchdiffeq.odeint_adjoint(f, y0, t, rtol=1e-9, atol=1e-10, method="dopri8")
    expected = torch.autograd.grad(loss(reference), wanted)
    options, tight = {"step_size": 0.02} if method == "rk4" else None, 1e-7
    found = nt.odeint_adjoint(f, y0, t, method=method, options=options, gradient=gradient,
                              rtol=tight, atol=tight)  # fmt: skip
    # Between fixed steps the solution is a straight line, as torchdiffeq's.
    check(torch.autograd.grad(loss(found), wanted), expected, 3e-2 if options else 1e-4)


@pytest.mark.parametrize("gradient", ["discrete", "backprop"])
@pytest.mark.parametrize("method", ["euler", "midpoint", "heun2", "heun3", "rk4"])
@pytest.mark.parametrize(
    "options", [None, {"step_size": 0.3}, {"step_size": 0.3, "interp": "cubic"}, {"grid_constructor": 1}]
)
def test_coarse_fixed_steps_have_torchdiffeqs_own_gradient(method, options, gradient):
    # Not near the exact solution's: the gradient of these very steps, of requested times and of the grid's too.
    if options == {"grid_constructor": 1}:
        options = {"grid_constructor": lambda f, y, t: torch.cat((t[:1], (t[:1] + t[1:2]) / 2, t[1:]))}
    f, y0 = Field(3, 4), features(2, 3).requires_grad_()
    t = tensor(0.0, 0.4, 1.0).requires_grad_()
    wanted = (y0, t, *f.parameters())
    theirs = torch.autograd.grad(loss(torchdiffeq.odeint(f, y0, t, method=method, options=options)), wanted)
    ours = torch.autograd.grad(loss(nt.odeint(f, y0, t, method=method, options=options, gradient=gradient)), wanted)
    check(ours, theirs, 1e-11)


@pytest.mark.parametrize("form", ["tensor", "tuple"])
@pytest.mark.parametrize("norm", [None, "seminorm", "own"])
def test_the_adjoints_norms(form, norm):
    f, y0, seen = Field(3, 4), features(2, 3).requires_grad_(), []

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.f = f

        def forward(self, t, y):
            return self.f(t, y[0]), -y[1]

    def own(parts):
        seen.append([x.shape for x in parts])
        return max(x.abs().max() for x in parts)

    single = form == "tensor"
    func, state = (f, y0) if single else (Two(), (y0, y0[0]))
    options = {} if norm is None else {"adjoint_options": {"norm": own if norm == "own" else norm}}
    t = tensor(0.0, 0.5, 1.0)
    ours, stats = nt.odeint_adjoint(func, state, t, rtol=1e-6, atol=1e-8, return_stats=True, **options)
    found = torch.autograd.grad(loss(ours), (y0, *f.parameters()))
    expected = torch.autograd.grad(loss(nt.odeint(func, state, t, **TIGHT)), (y0, *f.parameters()))
    check(found, expected, 2e-5)
    if norm == "own":
        states = [(2, 3), (2, 3)] if single else [(2, 3), (3,), (2, 3), (3,)]
        assert seen[-1] == [(), *states, *(p.shape for p in f.parameters())]
    else:
        again, other = nt.odeint_adjoint(func, state, t, rtol=1e-6, atol=1e-8, return_stats=True,
                                         adjoint_options={"norm": None if norm else "seminorm"})  # fmt: skip
        loss(again).backward()
        # The parameters' integrals ask for smaller steps.
        fewer, more = sorted((stats.nfe_backward, other.nfe_backward))
        assert (stats.nfe_backward, other.nfe_backward) == ((fewer, more) if norm else (more, fewer))


def test_the_default_norm_counts_each_parameter_by_itself():
    # One parameter whose integral alone is hard: the solve for state and cotangent is trivial.
    w = nn.Parameter(tensor(0.0))
    quiet = nn.Parameter(torch.zeros(1000, dtype=torch.float64))

    class Hard(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.quiet = w, quiet

        def forward(self, t, y):
            return self.w * torch.sin(40 * t) + 0 * y + self.quiet.sum() * 0

    y0, t = tensor(1.0), tensor(0.0, 2.0)
    errors = {}
    for norm in (None, "seminorm"):
        options = {} if norm is None else {"norm": norm}
        out = nt.odeint_adjoint(Hard(), y0, t, rtol=1e-5, atol=1e-5, adjoint_options=options)
        (g,) = torch.autograd.grad(out[-1].sum(), w)
        exact = (1 - torch.cos(tensor(80.0))) / 40
        errors[norm] = abs(g - exact).item()
    assert errors[None] < 1e-4
    assert errors["seminorm"] > 10 * errors[None]


def test_adjoint_tolerances_method_and_options():
    f, y0, t = Field(3, 4), features(2, 3).requires_grad_(), tensor(0.0, 1.0)
    expected = torch.autograd.grad(loss(nt.odeint(f, y0, t, **TIGHT)), (y0, *f.parameters()))
    counts = []
    for keywords in (
        {"adjoint_rtol": 1e-3, "adjoint_atol": 1e-3},
        {"adjoint_rtol": 1e-9, "adjoint_atol": 1e-10},
        {"adjoint_method": "rk4", "adjoint_options": {"step_size": 0.02}},
        {"adjoint_method": "bosh3", "adjoint_rtol": 1e-5, "adjoint_atol": 1e-5},
        {"adjoint_options": {"max_step": 0.02, "max_num_steps": 60}},
        {"method": "rk4", "options": {"step_size": 0.02}},
        {
            "method": "rk4",
            "options": {"grid_constructor": lambda f, y, t: torch.linspace(*t[[0, -1]].tolist(), 61).to(t)},
        },
    ):
        out, stats = nt.odeint_adjoint(f, y0, t, return_stats=True, **keywords)
        check(torch.autograd.grad(loss(out), (y0, *f.parameters())), expected, 3e-3)
        counts.append(stats.nfe_backward)
    loose, tight, rk4, _, bounded, same, grid = counts
    assert loose < tight
    assert (rk4, same, grid) == (200, 200, 240)
    assert bounded > 300
    with pytest.raises(ValueError, match="adjoint_options is missing"):
        nt.odeint_adjoint(f, y0, t, options={"first_step": 0.1}, adjoint_method="rk4")
    with pytest.raises(ValueError, match="in adjoint_options 'seminorm': did you mean 'norm'"):
        nt.odeint_adjoint(f, y0, t, adjoint_options={"seminorm": True})
    with pytest.raises(nt.SolveError, match="backward solve"):
        loss(nt.odeint_adjoint(f, y0, t, adjoint_options={"max_num_steps": 1})).backward()


def test_adjoint_callbacks():
    told = []

    class Told(Field):
        def callback_step_adjoint(self, t, y, dt):
            told.append((t.item(), [x.shape for x in y], dt.item()))

    y0, t = features(2, 3).requires_grad_(), tensor(0.0, 1.0)
    out = nt.odeint_adjoint(Told(3, 4), y0, t)
    assert not told
    out.sum().backward()
    assert told[0][0] == 1.0
    assert told[0][1] == [(), (2, 3), (2, 3)]
    assert all(dt > 0 for _, _, dt in told)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_unused_parameters_get_zeros(gradient):
    class Partly(Field):
        def __init__(self):
            super().__init__(3, 4)
            self.unused = nn.Parameter(torch.ones(5))

    f = Partly()
    out = nt.odeint_adjoint(f, features(2, 3), tensor(0.0, 1.0), gradient=gradient)
    out.sum().backward()
    assert f.unused.grad is None if gradient == "backprop" else torch.equal(f.unused.grad, torch.zeros(5))
    assert f.a.grad.abs().sum() > 0


@pytest.mark.parametrize("method", ["euler", "midpoint", "rk4"])
def test_fixed_steps_keep_their_graphs_as_torchdiffeqs_do(method):
    def run(odeint, **keywords):
        f, y0 = Field(3, 4), features(2, 3).requires_grad_()
        f.calls = 0
        f.register_forward_hook(lambda *_: setattr(f, "calls", f.calls + 1))
        states = odeint(f, y0, tensor(0.0, 0.3, 1.0), method=method, options={"step_size": 0.1}, **keywords)
        forward = f.calls
        loss(states).backward()
        return states.detach(), [y0.grad, *(p.grad for p in f.parameters())], f.calls - forward

    states, grads, again = run(nt.odeint)
    theirs, expected, _ = run(torchdiffeq.odeint)
    torch.testing.assert_close(states, theirs, rtol=1e-13, atol=1e-13)
    check(grads, expected, 1e-12)
    assert again == 0
    same, exact, again = run(nt.odeint, gradient="discrete")
    assert torch.equal(states, same)
    check(grads, exact, 1e-13)
    assert again > 0


@pytest.mark.parametrize("reach", ["closure", "attribute", "upstream"])
def test_tensors_that_the_adjoint_cannot_see_are_an_error(reach):
    theta = features(3, 3, seed=4).requires_grad_()
    hidden = torch.tanh(theta) if reach == "upstream" else theta

    class Conditioned(Field):
        context = None

        def forward(self, t, y):
            return super().forward(t, y) @ (hidden if self.context is None else self.context)

    f, y0, t = Conditioned(3, 4), features(2, 3).requires_grad_(), tensor(0.0, 1.0)
    if reach == "attribute":
        f.context = torch.tanh(theta)
    with pytest.raises(RuntimeError, match="would get no gradient"):
        nt.odeint_adjoint(f, y0, t).sum().backward()
    with pytest.raises(RuntimeError, match="would get no gradient"):
        nt.odeint_adjoint(f, features(2, 3), t, adjoint_params=()).sum().backward()
    # odeint sees it, as torchdiffeq's does, and so does adjoint_params.
    ours = torch.autograd.grad(loss(nt.odeint(f, y0, t, **TIGHT)), (theta, y0, f.a), retain_graph=True)
    theirs = torch.autograd.grad(loss(torchdiffeq.odeint(f, y0, t, **TIGHT)), (theta, y0, f.a))
    check(ours, theirs, 1e-5)
    if reach == "closure":
        named = nt.odeint_adjoint(f, y0, t, adjoint_params=(*f.parameters(), theta), **TIGHT)
        check(torch.autograd.grad(loss(named), (theta, y0, f.a)), theirs, 1e-5)


def test_functions_must_name_their_parameters_for_the_adjoint():
    with pytest.raises(ValueError, match="adjoint_params is missing"):
        nt.odeint_adjoint(lambda t, y: y, features(2), tensor(0.0, 1.0))
    for bad, error in ((torch.ones(2), "got one tensor"), ((1.0,), "must hold tensors")):
        with pytest.raises(TypeError, match=error):
            nt.odeint_adjoint(lambda t, y: y, features(2), tensor(0.0, 1.0), adjoint_params=bad)


def test_the_choice_of_a_gradient_costs_no_evaluation():
    calls = []
    theta = features(3, 3).requires_grad_()

    def f(t, y):
        calls.append(1)
        return torch.tanh(y @ theta)

    y0, t = features(2, 3), tensor(0.0, 1.0)
    nt.odeint(f, y0, t)
    n = len(calls)
    with torch.no_grad():
        nt.odeint(f, y0, t)
    assert len(calls) == 2 * n


def test_the_first_evaluation_is_differentiated_once():
    # It is made before the solve: its gradient must neither be lost nor count twice.
    theta = features(3, 3).requires_grad_()
    y0 = features(2, 3).requires_grad_()
    out = nt.odeint(lambda t, y: y @ theta, y0, tensor(0.0, 0.5), method="euler")[-1]
    assert torch.allclose(out, y0 + 0.5 * y0 @ theta)
    found = torch.autograd.grad(out.sum(), (y0, theta))
    check(found, torch.autograd.grad((y0 + 0.5 * y0 @ theta).sum(), (y0, theta)), 1e-12)


def test_second_derivatives():
    f, y0, t = Field(3, 4), features(2, 3).requires_grad_(), tensor(0.0, 1.0)

    def second(solver, **keywords):
        (g,) = torch.autograd.grad(solver(f, y0, t, **keywords)[-1].square().sum(), y0, create_graph=True)
        return torch.autograd.grad(g.square().sum(), (y0, f.a))

    expected = second(torchdiffeq.odeint, **TIGHT)
    check(second(nt.odeint, **TIGHT), expected, 1e-4)
    check(second(nt.odeint, gradient="backprop", **TIGHT), expected, 1e-4)
    with pytest.raises(RuntimeError, match="for second derivatives use"):
        second(nt.odeint_adjoint)
    a = features(3, 3).requires_grad_()
    with pytest.raises(RuntimeError, match="need gradient='backprop'"):
        torch.autograd.grad(
            nt.odeint(lambda t, y, a: torch.tanh(y @ a), y0, t, args=(a,))[-1].sum(), a, create_graph=True
        )


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_gradients_add_up_and_come_again(gradient):
    f, y0, t = Field(3, 4), features(2, 3), tensor(0.0, 1.0)
    out = nt.odeint_adjoint(f, y0, t, gradient=gradient)
    out.sum().backward()
    once = f.a.grad.clone()
    nt.odeint_adjoint(f, y0, t, gradient=gradient).sum().backward()
    torch.testing.assert_close(f.a.grad, 2 * once)


def test_checkpointing_around_a_solve():
    from torch.utils.checkpoint import checkpoint

    f, y0, t = Field(3, 4), features(2, 3).requires_grad_(), tensor(0.0, 1.0)
    plain = torch.autograd.grad(loss(nt.odeint_adjoint(f, y0, t)), (y0, *f.parameters()))
    saved = checkpoint(lambda y: nt.odeint_adjoint(f, y, t), y0, use_reentrant=False)
    check(torch.autograd.grad(loss(saved), (y0, *f.parameters())), plain, 1e-12)


# -- faults ------------------------------------------------------------------------------------------------------------


class Fails(Field):
    """Fails at one call, by raising or by what it returns."""

    def __init__(self, at, how):
        super().__init__(3, 4)
        self.at, self.how, self.calls = at, how, 0

    def forward(self, t, y):
        self.calls += 1
        if self.calls == self.at:
            if isinstance(self.how, BaseException):
                raise self.how
            return super().forward(t, y) * self.how
        return super().forward(t, y)


@pytest.mark.parametrize("at", [1, 2, 9, 30])
@pytest.mark.parametrize("how", [ValueError("mine"), KeyboardInterrupt(), float("nan"), float("inf")])
@pytest.mark.parametrize("solver", [nt.odeint, nt.odeint_adjoint])
def test_a_failure_at_any_call_leaves_nothing_behind(solver, how, at):
    f, y0, t = Fails(at, how), features(2, 3).requires_grad_(), tensor(0.0, 1.0)
    raised = None
    try:
        out = solver(f, y0, t, rtol=1e-5, atol=1e-6)
        out.sum().backward()
    except BaseException as e:
        raised = e
    if isinstance(how, BaseException):
        assert raised is how
    else:  # a step that is not finite is tried again; only the first evaluation is not
        assert raised is None or isinstance(raised, nt.SolveError)
        assert (raised is not None and raised.status is nt.Status.NON_FINITE) or bool(torch.isfinite(out).all())
    f.at = 0
    again = solver(f, y0, t, rtol=1e-5, atol=1e-6)
    clean = Fails(0, 0.0)
    torch.testing.assert_close(again, solver(clean, y0, t, rtol=1e-5, atol=1e-6), rtol=0, atol=0)


def test_an_explosion_and_a_stiff_problem_say_what_happened():
    y0, t = tensor(1.0), tensor(0.0, 2.0)
    with pytest.raises(nt.SolveError) as error:
        nt.odeint(lambda t, y: y * y, y0, t)  # 1 / (1 - t)
    assert error.value.status in (nt.Status.STEP_UNDERFLOW, nt.Status.NON_FINITE)
    assert error.value.t == pytest.approx(1.0, abs=1e-3)
    with pytest.raises(nt.SolveError) as error:
        nt.odeint(lambda t, y: -1e6 * (y - torch.cos(t)), y0, t, options={"max_num_steps": 500})
    assert error.value.status is nt.Status.MAX_STEPS
    assert error.value.steps == 500


@pytest.mark.parametrize("solver", [nt.odeint, nt.odeint_adjoint])
def test_solves_in_a_loop_keep_nothing(solver):
    f, t = Field(3, 4), tensor(0.0, 0.3, 1.0)

    def train(n):
        alive = []
        for _ in range(n):
            y0 = features(2, 3).requires_grad_()
            out = solver(f, y0, t, rtol=1e-3, atol=1e-3)
            out.sum().backward()
            alive += [weakref.ref(y0), weakref.ref(out)]
        return alive

    gc.disable()
    try:
        train(3)
        before = live_tensors()
        alive = train(40)
        assert not any(ref() is not None for ref in alive[:-2])  # by reference counts alone
        after = live_tensors()
    finally:
        gc.enable()
    assert after <= before + 5


def test_two_threads_do_not_disturb_each_other():
    fields = [Field(3, 4, seed=k) for k in range(2)]
    y0, t = features(2, 3), tensor(0.0, 1.0)

    def gradient(f, solver):
        return torch.autograd.grad(loss(solver(f, y0, t, rtol=1e-5, atol=1e-6)), list(f.parameters()))

    expected = [gradient(f, s) for f, s in zip(fields, (nt.odeint, nt.odeint_adjoint), strict=True)]
    wrong = []

    def work(k):
        for _ in range(5):
            found = gradient(fields[k], (nt.odeint, nt.odeint_adjoint)[k])
            if not all(torch.equal(x, y) for x, y in zip(found, expected[k], strict=True)):
                wrong.append(k)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("options", [None, {"grid_constructor": lambda func, y, t: t}])
@pytest.mark.parametrize("method", ["euler", "rk4"])
def test_args_and_every_point_of_a_grid_at_once(method, options):
    """A solve a step: the backward pass of each meets the args that it was made with."""
    found = []
    for solver, extra in ((nt.odeint, True), (torchdiffeq.odeint, False)):
        theta = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
        t = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64, requires_grad=True)
        y0 = torch.ones(1, dtype=torch.float64)
        if extra:
            y = solver(lambda t, y, a: -a * y, y0, t, args=(theta,), method=method, options=options)
        else:
            y = solver(lambda t, y, a=theta: -a * y, y0, t, method=method, options=options)
        found.append(torch.autograd.grad(y.square().sum(), (theta, t)))
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


class Decay(nn.Module):
    def forward(self, t, y):
        return -y


def test_grids_of_the_adjoint_s_own():
    """The constructor that is called backward is the one of adjoint_options, whatever the forward grid is."""
    calls = {"forward": 0, "backward": 0}

    def grid(name, count):
        def construct(func, y0, t):
            calls[name] += 1
            return torch.linspace(float(t[0]), float(t[-1]), count, dtype=torch.float64)

        return construct

    t = torch.tensor([0.0, 1.0], dtype=torch.float64)
    counts = []
    for forward in ({"step_size": 0.25}, {"grid_constructor": grid("forward", 5)}):
        y0 = torch.ones(1, dtype=torch.float64, requires_grad=True)
        y, stats = nt.odeint_adjoint(
            Decay(), y0, t, method="rk4", options=forward,
            adjoint_options={"grid_constructor": grid("backward", 11)}, return_stats=True,
        )  # fmt: skip
        y[-1].sum().backward()
        counts.append(stats.nfe_backward)
        assert abs(float(y0.grad) - math.exp(-1)) < 1e-4
    assert counts == [40, 40]  # ten steps of four evaluations
    assert calls["backward"] == 2


class Drops(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.dropout = nn.Linear(2, 2, dtype=torch.float64), nn.Dropout(0.5)

    def forward(self, t, y):
        return torch.tanh(self.dropout(self.linear(y)))


class Normed(nn.Module):
    """Spectral norm changes its buffers at every call."""

    def __init__(self):
        super().__init__()
        self.linear = nn.utils.parametrizations.spectral_norm(nn.Linear(2, 2, dtype=torch.float64))

    def forward(self, t, y):
        return torch.tanh(self.linear(y))


@pytest.mark.parametrize("kind", [Drops, Normed])
@pytest.mark.parametrize(
    ("options", "reference"),
    [
        ({"rtol": 1.0, "atol": 1.0}, lambda *a, **k: nt.odeint(*a, gradient="backprop", **k)),
        ({"method": "rk4", "options": {"step_size": 0.05}}, torchdiffeq.odeint),
    ],
    ids=["adaptive", "fixed"],
)
def test_functions_that_are_another_at_every_call_are_differentiated_as_they_were_called(kind, options, reference):
    y0, t = features(3, 2), torch.tensor([0.0, 0.1], dtype=torch.float64)
    found = []
    for solver in (nt.odeint, reference):
        torch.manual_seed(0)
        func = kind()
        y = solver(func, y0, t, **options)
        y[-1].square().sum().backward()
        found.append([y.detach(), *(p.grad for p in func.parameters())])
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)
