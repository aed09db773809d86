"""Gradients: against finite differences, against each other, and where there can be none, an error."""

import copy
import math

import pytest
import torch
import torch.utils.checkpoint
from support import (
    ADAPTIVE,
    FIXED,
    GATED,
    GRADIENTS,
    METHODS,
    MODELS,
    Field,
    Recorder,
    features,
    gradients,
    largest_difference,
    options_for,
)
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

import nesterov_triton as nt
from nesterov_triton.solve import Settings, bind

TIMES = torch.tensor([1.0, 1.25, 1.62, 2.0], dtype=torch.float64)  # two interior times, in different steps
EXACT = ["discrete", "backprop"]


def check(layer, h, t, *, velocity=False, second=False):
    """gradcheck in features, times and every parameter; gradcheck moves the parameters themselves."""

    def function(h, t, *_):
        return layer(h, t=t, return_velocity=True) if velocity else layer(h, t=t)

    inputs = (h.requires_grad_(), t.clone().requires_grad_(), *layer.parameters())
    assert gradcheck(function, inputs)
    if second:
        assert gradgradcheck(function, inputs, atol=1e-4)


@pytest.mark.parametrize("gradient", EXACT)
@pytest.mark.parametrize("name", [*MODELS, *GATED])
def test_gradients_of_every_model(name, gradient):
    model = {**MODELS, **GATED}[name]
    start = {} if model.rows == 1 else {"initial_velocity": nn.Linear(2, 2)}
    layer = model.layer(hidden=2, gradient=gradient, method="midpoint", step_size=0.3, **start)
    check(layer, features(2, 2), TIMES, velocity=model.rows == 2)


@pytest.mark.parametrize("gradient", EXACT)
@pytest.mark.parametrize("name", ["NODE", "GNesterovNODE"])
@pytest.mark.parametrize("method", METHODS)
def test_gradients_of_every_method(method, name, gradient):
    layer = MODELS[name].layer(hidden=2, gradient=gradient, **options_for(method))
    check(layer, features(1, 2), TIMES)
    assert layer.stats.accepted > 2


@pytest.mark.parametrize("gradient", EXACT)
@pytest.mark.parametrize("method", ["bosh3", "dopri5", "tsit5", "dopri8"])
def test_gradients_at_a_tight_tolerance_backward_in_time(method, gradient):
    """Step sizes count as constants: their share of the gradient is as small as the error."""
    tolerance = 1e-8 if method == "bosh3" else 1e-11
    layer = MODELS["GNesterovNODE"].layer(hidden=2, method=method, rtol=tolerance, atol=tolerance, gradient=gradient)
    h, t = features(1, 2).requires_grad_(), TIMES.flip(0).clone().requires_grad_()
    assert gradcheck(lambda h, t: layer(h, t=t), (h, t), atol=1e-4)


@pytest.mark.parametrize("name", ["SONODE", "HBNODE", "GNesterovNODE", "GNesterovNODE-exact"])
def test_second_derivatives_by_backprop(name):
    layer = MODELS[name].layer(hidden=2, gradient="backprop", method="rk4", step_size=0.7)
    check(layer, features(1, 2), TIMES[[0, 2, 3]], second=True)


def test_second_derivatives_by_backprop_of_an_adaptive_method():
    layer = MODELS["NODE"].layer(hidden=2, gradient="backprop", **options_for("dopri5"))
    check(layer, features(1, 2), TIMES[[0, 2, 3]], second=True)


@pytest.mark.parametrize("model", ["NODE", "HBNODE", "GNesterovNODE-exact"])
@pytest.mark.parametrize("method", ["dopri5", "rk4", "adaptive_heun"])
def test_second_derivatives_of_discrete_are_those_of_backprop(model, method):
    found = {}
    for gradient in ("discrete", "backprop"):
        layer = MODELS[model].layer(gradient=gradient, **options_for(method))
        h, t = features(2, 2).requires_grad_(), TIMES[[0, 2, 3]].clone().requires_grad_()
        wanted = [h, t, *layer.parameters()]
        first = torch.autograd.grad(layer(h, t).pow(2).sum(), wanted, create_graph=True)
        found[gradient] = torch.autograd.grad(sum(g.square().sum() for g in first), wanted)
    for ours, theirs in zip(found["discrete"], found["backprop"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_second_derivatives_of_the_adjoint_are_refused():
    layer = MODELS["HBNODE"].layer(gradient="adjoint")
    h = features(2, 2).requires_grad_()
    with pytest.raises(RuntimeError, match="for second derivatives use"):
        torch.autograd.grad(layer(h).pow(2).sum(), h, create_graph=True)


@pytest.mark.parametrize("times", [[1.0, 2.0], [1.0, 1.25, 1.62, 2.0], [2.0, 1.62, 1.25, 1.0]])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["ANODE", "SONODE", "GHBNODE", "GNesterovNODE", "GNesterovNODE-exact"])
def test_discrete_equals_backprop(name, method, times):
    """To rounding, at a loose tolerance, rejected steps included."""
    found, counts = [], []
    for gradient in EXACT:
        options = {"method": method, "step_size": 0.3} if method in FIXED else {"method": method, "first_step": 1.0}
        if method in ADAPTIVE:
            options |= {"rtol": 1e-3, "atol": 1e-3}
        layer = MODELS[name].layer(gradient=gradient, **options)
        with torch.no_grad():
            for p in layer.field.parameters():
                p.mul_(3.0)
        h, t = features(2, 2).requires_grad_(), torch.tensor(times, dtype=torch.float64, requires_grad=True)
        out = layer(h, t=t)
        found.append(gradients(layer, out.pow(2).sum(), h, t))
        counts.append((layer.stats.accepted, layer.stats.rejected, layer.stats.nfe_forward))
    assert counts[0] == counts[1]
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def adjoint_errors(build, tolerances=(1e-4, 1e-6, 1e-8)):
    """Distance of the adjoint's gradients from the exact ones, at one tolerance after the other."""
    errors = []
    h0 = features(3, 2)

    def all_gradients(layer):
        h, t = h0.clone().requires_grad_(), TIMES.clone().requires_grad_()
        out = layer(h, t=t)
        return gradients(layer, (out * out.detach().cos()).sum(), h, t)

    truth = all_gradients(build(method="dopri8", rtol=1e-12, atol=1e-12, gradient="discrete"))
    for tolerance in tolerances:
        errors.append(
            largest_difference(truth, all_gradients(build(rtol=tolerance, atol=tolerance, gradient="adjoint")))
        )
    return errors


@pytest.mark.parametrize("name", [*MODELS, "GNesterovNODE-callable", "GNesterovNODE-softclip-inside"])
def test_adjoint_converges(name):
    errors = adjoint_errors({**MODELS, **GATED}[name].layer)
    assert errors[0] > 5 * errors[1] > 25 * errors[2]
    assert errors[2] < 1e-6


@pytest.mark.parametrize("method", ["bosh3", "tsit5", "dopri8", "adaptive_heun"])
def test_adjoint_converges_with_every_method(method):
    tolerances = {"adaptive_heun": (1e-3, 1e-5), "dopri8": (1e-6, 1e-8, 1e-10)}.get(method, (1e-3, 1e-5, 1e-7))
    errors = adjoint_errors(
        lambda **options: MODELS["GNesterovNODE"].layer(**{"method": method, **options}), tolerances
    )
    assert errors[0] > 5 * errors[1]
    assert errors[-1] < (1e-3 if method == "adaptive_heun" else 1e-5)


@pytest.mark.parametrize(
    "strategy",
    [
        nt.gradients.Adjoint(quadratures_in_norm=True),
        nt.gradients.Adjoint(method="tsit5"),
        nt.gradients.Adjoint(method="dopri8", rtol=1e-7, atol=1e-7),
        nt.gradients.Adjoint(rtol=1e-9, atol=1e-9, quadratures_in_norm=True),
    ],
    ids=["quadratures", "tsit5", "dopri8", "tighter"],
)
def test_adjoint_with_options(strategy):
    def build(**options):
        if options["gradient"] == "adjoint":
            options["gradient"] = strategy
        return MODELS["GHBNODE"].layer(**options)

    errors = adjoint_errors(build, (1e-4, 1e-7))
    assert errors[1] < 1e-5
    assert errors[0] < 5e-3


def test_adjoint_of_a_forward_solve_with_fixed_steps():
    errors = []
    for step_size in (0.11, 0.055):
        pair = []
        for gradient in ("discrete", nt.gradients.Adjoint()):
            layer = MODELS["GNesterovNODE"].layer(method="rk4", step_size=step_size, gradient=gradient)
            h = features(3, 2).requires_grad_()
            pair.append(gradients(layer, layer(h, t=TIMES).pow(2).sum(), h))
        errors.append(largest_difference(*pair))
    assert errors[0] > 8 * errors[1]  # fourth order
    layer = MODELS["GNesterovNODE"].layer(
        method="rk4", step_size=0.05, gradient=nt.gradients.Adjoint(method="dopri5", rtol=1e-8, atol=1e-8)
    )
    h = features(3, 2).requires_grad_()
    assert largest_difference(gradients(layer, layer(h, t=TIMES).pow(2).sum(), h), pair[0]) < 1e-4


def test_quadratures_in_the_norm_cost_steps():
    class Oscillating(nn.Module):
        """Of the state it knows nothing: its cotangent is constant, and only the parameter's integral is left."""

        def __init__(self):
            super().__init__()
            self.size = nn.Parameter(torch.ones((), dtype=torch.float64))

        def forward(self, t, h):
            return self.size * torch.sin(40 * t) + 0 * h

    counts, errors = [], []
    for inside in (False, True):
        strategy = nt.gradients.Adjoint(rtol=1e-6, atol=1e-6, quadratures_in_norm=inside)
        layer = nt.NODE(Oscillating(), rtol=1e-2, atol=1e-2, gradient=strategy)
        layer(features(3, 2)).sum().backward()
        counts.append(layer.stats.nfe_backward)
        errors.append(abs(float(layer.field.size.grad) - 6 * (math.cos(40) - math.cos(80)) / 40))
    assert counts[1] > counts[0]
    assert errors[1] < 1e-5


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("name", MODELS)
def test_loss_of_a_whole_layer_by_finite_differences(name, gradient):
    """Along a random direction in all parameters and the input at once, by Richardson's extrapolation."""
    model = MODELS[name]
    start = {} if model.rows == 1 else {"initial_velocity": nn.Linear(2, 2)}
    layer = model.layer(method="dopri8", rtol=1e-11, atol=1e-11, gradient=gradient, **start)
    h = features(3, 2).requires_grad_()
    moved = [h, *layer.parameters()]
    directions = [torch.randn_like(p) for p in moved]

    def loss(step):
        with torch.no_grad():
            for p, d in zip(moved, directions, strict=True):
                p.add_(d, alpha=step)
            value = layer(h, t=TIMES).sin().sum().item()
            for p, d in zip(moved, directions, strict=True):
                p.add_(d, alpha=-step)
        return value

    def central(step):
        return (loss(step) - loss(-step)) / (2 * step)

    expected = (4 * central(5e-4) - central(1e-3)) / 3
    found = gradients(layer, layer(h, t=TIMES).sin().sum(), h)
    actual = sum(float((g * d).sum()) for g, d in zip(found, directions, strict=True))
    assert actual == pytest.approx(expected, rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("method", ["rk4", "dopri5", "dopri8"])
def test_a_requested_time_at_the_end_of_a_step_has_its_gradient(method, gradient):
    """dy(t_k)/dt_k is the slope there, wherever the steps happen to end."""
    t = torch.tensor([1.0, 1.25, 2.0], dtype=torch.float64, requires_grad=True)
    y0 = torch.ones(1, dtype=torch.float64)
    options = {"step_size": 0.25} if method == "rk4" else {"first_step": 0.25, "atol": 1e-2}
    ys = nt.solve(lambda t, y: -y, y0, t, method=method, gradient=gradient, **options).ys
    ends = nt.solve(lambda t, y: -y, y0, t.detach()[:2], method=method, **options).ys
    assert torch.equal(ys[1].detach(), ends[1])  # the step did end there
    ys[1].sum().backward()
    slope = ys[1].item()
    torch.testing.assert_close(t.grad, torch.tensor([slope, -slope, 0.0], dtype=torch.float64), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("gate", [torch.tanh, "tanh"])
def test_times_have_gradients_through_the_rate_of_a_gated_scale(gate, gradient):
    """κ'(t) enters the velocity and the exact form's initial state: autograd must reach through a callable gate's."""
    layer = nt.GNesterovNODE(
        Field(), gate, 0.5, form="exact", method="dopri8", rtol=1e-10, atol=1e-10, gradient=gradient
    )

    def loss(t):
        h, v = layer(features(2, 2), t=t, return_velocity=True)
        return h.sum() + (v * v).sum()

    t = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    loss(t).backward()
    with torch.no_grad():
        for i in range(2):
            d = torch.zeros(2, dtype=torch.float64)
            d[i] = 1e-5
            numeric = (loss(t + d) - loss(t - d)) / 2e-5
            assert t.grad[i].item() == pytest.approx(numeric.item(), rel=1e-5)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_times_given_as_separate_tensors_keep_their_gradients(gradient):
    end = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    y = nt.solve(lambda t, y: -y, torch.ones(2, dtype=torch.float64), (1.0, end), gradient=gradient).final
    y.sum().backward()
    assert end.grad.item() == pytest.approx(-y.sum().item(), rel=1e-4)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_solve_with_a_pair_state(gradient):
    system = nt.systems.gnesterov(Field(), "softclip", 0.4)
    x, m = features(3, 2).requires_grad_(), features(3, 2, seed=2).requires_grad_()
    solution = nt.solve(system, (x, m), (1.0, 1.5, 2.0), gradient=gradient, rtol=1e-9, atol=1e-9)
    xs, ms = solution.ys
    assert torch.equal(xs[-1], solution.final[0])
    assert torch.equal(ms[-1], solution.final[1])
    found = torch.autograd.grad(xs.sum() + (ms * ms).sum(), (x, m))
    exact = nt.solve(system, (x, m), (1.0, 1.5, 2.0), gradient="backprop", rtol=1e-9, atol=1e-9)
    expected = torch.autograd.grad(exact.ys[0].sum() + (exact.ys[1] ** 2).sum(), (x, m))
    assert largest_difference(list(found), list(expected)) < 1e-6


# --- tensors the field closes over


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_conditioned_field_with_a_tensor_made_from_others(gradient):
    encoder = nn.Linear(2, 2).double()
    data = features(2, 2)

    def loss(strategy):
        theta = encoder(data).sigmoid()  # not a leaf
        y = nt.solve(
            lambda t, y: theta * torch.sin(y + t),
            data,
            (0.0, 1.0),
            params=[theta],
            gradient=strategy,
            rtol=1e-9,
            atol=1e-9,
        ).final
        return torch.autograd.grad(y.pow(2).sum(), list(encoder.parameters()))

    assert largest_difference(list(loss(gradient)), list(loss("backprop"))) < 1e-6


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_params_may_be_an_iterator(gradient):
    net = nn.Linear(2, 2).double()
    y = nt.solve(lambda t, y: net(y), features(2, 2), (0.0, 1.0), params=net.parameters(), gradient=gradient).final
    y.sum().backward()
    found = [p.grad for p in net.parameters()]
    net.zero_grad()
    y = nt.solve(lambda t, y: net(y), features(2, 2), (0.0, 1.0), params=[*net.parameters()], gradient=gradient).final
    y.sum().backward()
    assert len(found) == 2
    for p, grad in zip(net.parameters(), found, strict=True):
        assert torch.equal(p.grad, grad)


@pytest.mark.parametrize("loop", ["eager", "graph"])
@pytest.mark.parametrize("gradient", ["discrete", "adjoint"])
def test_params_that_are_computed_from_each_other(gradient, loop):
    """Each one's own part counts once, though the way from one to the next lies in the field's graph as well."""
    net = nn.Linear(2, 2).double()

    class Conditioned(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, t, y):
            return torch.tanh(self.net(y) @ first + t) * second

    def loss(**keywords):
        nonlocal first, second
        first = net.weight.exp()
        second = (first @ net.weight).sum(0).sin()
        y0 = features(3, 2) * first[0]
        y = nt.solve(Conditioned(), y0, (0.0, 1.0), params=[first, second], rtol=1e-9, atol=1e-9, **keywords).final
        return y.square().sum() + second.sum()  # which are used outside, too

    first = second = net.weight
    wanted = list(net.parameters())
    expected = torch.autograd.grad(loss(gradient="backprop"), wanted)
    assert largest_difference(torch.autograd.grad(loss(gradient=gradient, loop=loop), wanted), expected) < 1e-6
    loss(gradient="backprop").backward()  # no way is left closed
    torch.testing.assert_close(net.weight.grad, expected[0])


def test_second_derivatives_of_params_that_are_computed_from_each_other():
    a = features(2, 2).requires_grad_()

    def second(gradient):
        b = a.tanh()
        y = nt.solve(
            lambda t, y: torch.sin(y @ a) @ b, features(3, 2), (0.0, 1.0), params=[a, b], gradient=gradient,
            method="rk4", step_size=0.25,
        ).final  # fmt: skip
        (once,) = torch.autograd.grad(y.square().sum(), a, create_graph=True)
        return [once.detach(), *torch.autograd.grad(once.square().sum(), a)]

    assert largest_difference(second("discrete"), second("backprop")) < 1e-10


@pytest.mark.parametrize("needs_grad", [True, False], ids=["input-needs-grad", "input-does-not"])
@pytest.mark.parametrize("gradient", ["discrete", "adjoint"])
def test_a_closure_that_would_lose_its_gradient_raises(gradient, needs_grad):
    theta = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    y0 = features(2, 2).requires_grad_(needs_grad)
    other = theta * 2  # the loss has a gradient all the same: nothing else would tell
    y = nt.solve(lambda t, y: theta * y, y0, (0.0, 1.0), gradient=gradient).final
    with pytest.raises(RuntimeError, match=r"params=.*backprop"):
        (y.sum() + other).backward()


@pytest.mark.parametrize("gradient", ["discrete", "adjoint"])
def test_a_gate_that_would_lose_its_gradient_raises(gradient):
    slope = torch.tensor(0.5, requires_grad=True)
    layer = nt.GHBNODE(Field(), lambda x: torch.tanh(slope.to(x.dtype) * x), 0.3, gradient=gradient).double()
    with pytest.raises(RuntimeError, match="gate"):
        layer(features(2, 2)).sum().backward()


def test_a_closure_keeps_its_gradient_under_backprop():
    theta = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    y0 = features(2, 2)
    y = nt.solve(lambda t, y: theta * y, y0, (0.0, 1.0), gradient="backprop", rtol=1e-8, atol=1e-8).final
    y.sum().backward()
    assert theta.grad.item() == pytest.approx((y0.sum() * torch.exp(theta)).item(), rel=1e-6)


def test_a_closure_needs_no_gradient_where_none_is_wanted():
    theta = torch.tensor(0.5, requires_grad=True)
    with torch.no_grad():
        assert not nt.solve(lambda t, y: theta * y, torch.ones(2), (0.0, 1.0)).final.requires_grad
    assert not nt.solve(lambda t, y: theta.detach() * y, torch.ones(2), (0.0, 1.0)).final.requires_grad


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_unused_parameters_and_constant_fields(gradient):
    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.rate, self.unused = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))

        def forward(self, t, h):
            return self.rate.expand_as(h)

    layer = nt.NesterovNODE(Constant(), gradient=gradient)
    h = torch.zeros(3, 2, requires_grad=True)
    layer(h).sum().backward()
    assert float(layer.field.rate.grad.abs().max()) > 0
    assert layer.field.unused.grad is None or float(layer.field.unused.grad.abs().max()) == 0

    layer = nt.HBNODE(lambda t, h: torch.zeros_like(h), gradient=gradient)
    layer(h).sum().backward()
    assert torch.equal(layer.system.raw_damping.grad, torch.tensor(0.0))


# --- how autograd may treat the layer


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_parameters_changed_before_the_backward_pass_raise(gradient):
    layer = MODELS["GNesterovNODE"].layer(gradient=gradient)
    loss = layer(features(2, 2)).sum()
    with torch.no_grad():
        layer.field.a.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_backward_twice(gradient):
    layer = MODELS["GNesterovNODE"].layer(gradient=gradient)
    h = features(2, 2).requires_grad_()
    loss = layer(h).pow(2).sum()
    inputs = [h, *layer.parameters()]
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    once = layer.stats.nfe_backward
    second = torch.autograd.grad(loss, inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert layer.stats.nfe_backward == 2 * once
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_two_calls_before_one_backward(gradient):
    layer = MODELS["HBNODE"].layer(gradient=gradient)
    a, b = features(2, 2).requires_grad_(), features(4, 2, seed=3).requires_grad_()
    together = torch.autograd.grad(layer(a).sum() + layer(layer(b)).sum(), (a, b))
    alone = torch.autograd.grad(layer(a).sum(), a)[0], torch.autograd.grad(layer(layer(b)).sum(), b)[0]
    assert all(torch.equal(x, y) for x, y in zip(together, alone, strict=True))


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_a_field_that_is_itself_a_layer(gradient):
    def outer(inner_gradient):
        inner = nt.NODE(Field(hidden=2), t=(0.0, 0.5), gradient=inner_gradient, method="rk4", step_size=0.25)

        class Through(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = inner

            def forward(self, t, h):
                return torch.tanh(self.inner(h))

        layer = nt.NODE(Through(), gradient=inner_gradient, method="rk4", step_size=0.125)
        h = features(2, 2).requires_grad_()
        return gradients(layer, layer(h).sum(), h)

    # The adjoint's error with so long fixed steps; the others have none.
    assert largest_difference(outer(gradient), outer("backprop")) < (1e-2 if gradient == "adjoint" else 1e-11)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_loss_on_some_of_the_times(gradient):
    """Gradients only of an interior time, with no cotangent at the last."""
    found = []
    for strategy in (gradient, "backprop"):
        layer = MODELS["GNesterovNODE"].layer(gradient=strategy, rtol=1e-9, atol=1e-9)
        h = features(2, 2).requires_grad_()
        found.append(gradients(layer, layer(h, t=TIMES)[1].sum(), h))
    assert largest_difference(*found) < 1e-7


def test_only_what_needs_gradients_gets_them():
    layer = MODELS["GHBNODE"].layer()
    for p in layer.field.parameters():
        p.requires_grad_(False)
    layer(features(2, 2)).sum().backward()
    assert layer.system.raw_damping.grad is not None
    assert layer.field.a.grad is None
    for p in layer.parameters():
        p.requires_grad_(False)
    assert not layer(features(2, 2)).requires_grad
    h = features(2, 2).requires_grad_()
    layer(h).sum().backward()
    assert h.grad is not None


@pytest.mark.parametrize("gradient", EXACT)  # the adjoint starts from the output, and says so
@pytest.mark.parametrize("name", ["NODE", "HBNODE", "GNesterovNODE"])
def test_the_output_may_be_changed_in_place(name, gradient):
    """As by a ReLU(inplace=True) behind the layer."""
    found = []
    for inplace in (False, True):
        layer = MODELS[name].layer(gradient=gradient)
        h = features(2, 2).requires_grad_()
        out = layer(h)
        found.append(gradients(layer, torch.nn.functional.relu(out, inplace=inplace).pow(2).sum(), h))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_tensor_subclass_parameters_and_parametrisations(gradient):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))

        def forward(self, t, h):
            return self.linear(h)

    torch.manual_seed(0)
    layer = nt.NODE(Net(), gradient=gradient, rtol=1e-9, atol=1e-9).double()
    h = features(2, 2).requires_grad_()
    found = gradients(layer, layer(h).sum(), h)
    layer.settings = type(layer.settings).make(gradient="backprop", rtol=1e-9, atol=1e-9)
    assert largest_difference(found, gradients(layer, layer(h).sum(), h)) < 1e-6


@pytest.mark.parametrize("gradient", EXACT)
def test_the_backward_pass_costs_what_it_must(gradient):
    """One vector-Jacobian product a stage that counts, of accepted steps alone."""
    field = Recorder(Field())
    layer = nt.NODE(field, t=(0.0, 4.0), gradient=gradient, rtol=1e-6, atol=1e-6, first_step=4.0).double()
    loss = layer(3 * features(2, 2)).sum()
    assert layer.stats.nfe_backward == 0
    forward = field.calls
    loss.backward()
    assert layer.stats.rejected > 0
    if gradient == "discrete":
        assert layer.stats.nfe_backward == field.calls - forward == 6 * layer.stats.accepted
    else:
        assert field.calls == forward
        assert layer.stats.nfe_backward >= 6 * layer.stats.accepted


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_a_field_that_is_a_gradient_itself(gradient):
    """-∇F of a learned F: autograd inside the field, under the solver's no_grad too."""

    class Energy(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(2, 1)

        def forward(self, t, h):
            with torch.enable_grad():
                x = h if h.requires_grad else h.detach().requires_grad_()
                return torch.autograd.grad(torch.tanh(self.linear(x)).sum(), x, create_graph=True)[0]

    torch.manual_seed(0)
    layer = nt.NesterovNODE(Energy(), form="exact", gradient=gradient, rtol=1e-9, atol=1e-9).double()
    h = features(3, 2).requires_grad_()
    found = gradients(layer, layer(h).sum(), h)
    layer.settings = type(layer.settings).make(gradient="backprop", rtol=1e-9, atol=1e-9)
    assert largest_difference(found, gradients(layer, layer(h).sum(), h)) < 1e-7


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_under_activation_checkpointing(gradient):
    layer = MODELS["GHBNODE"].layer(gradient=gradient)
    h = features(3, 2).requires_grad_()
    expected = gradients(layer, layer(h).sum(), h)
    out = torch.utils.checkpoint.checkpoint(layer, h, use_reentrant=False)
    assert largest_difference(gradients(layer, out.sum(), h), expected) == 0.0


@pytest.mark.parametrize("gradient", ["discrete", "adjoint"])
def test_a_parameter_replaced_before_the_backward_pass_raises(gradient):
    layer = MODELS["NODE"].layer(gradient=gradient)
    loss = layer(features(2, 2).requires_grad_()).sum()
    layer.field.a = nn.Parameter(torch.zeros_like(layer.field.a))
    with pytest.raises(RuntimeError, match="would get no gradient"):
        loss.backward()


@pytest.mark.parametrize("gradient", ["discrete", "adjoint"])
def test_a_parameter_that_is_added_to_the_force_of_either_sign(gradient):
    """Its cotangent at a stage is the adjoint itself, without a copy."""

    class Driven(Field):
        def __init__(self):
            super().__init__()
            self.force = nn.Parameter(features(3, 2))

        def forward(self, t, h):
            return super().forward(t, h) + self.force

    for sign in (1.0, -1.0):
        found = []
        for strategy in (gradient, "backprop"):
            system = nt.systems.Momentum(Driven(), nesterov=True, damping=1.0, sign=sign)
            state = (features(3, 2), features(3, 2, seed=2))
            x, _ = nt.solve(system, state, (1.0, 2.0), rtol=1e-9, atol=1e-9, gradient=strategy).final
            found.append(gradients(system, x.square().sum()))
        assert largest_difference(*found) < 1e-6


def test_backprop_leaves_no_hook_on_a_parameter_that_the_field_returns():
    force = nn.Parameter(torch.ones(3, 2))
    solution = nt.solve(lambda t, y: force, torch.ones(3, 2), (0.0, 1.0), gradient="backprop")
    solution.final[0].sum().backward()
    torch.testing.assert_close(force.grad[0], torch.ones(2))
    assert not force._backward_hooks


@pytest.mark.parametrize("gradient", ["discrete", "adjoint"])
@pytest.mark.parametrize("early", [True, False])
def test_a_tensor_used_at_some_times_only_is_seen_all_the_same(gradient, early):
    theta = torch.ones(2, dtype=torch.float64, requires_grad=True)

    def field(t, h):
        return -h + theta if (float(t) < 1.3) == early else -h

    h = torch.ones(3, 2, dtype=torch.float64, requires_grad=True)
    loss = nt.solve(field, h, (1.0, 2.0), gradient=gradient, rtol=1e-8, atol=1e-8).final.sum()
    with pytest.raises(RuntimeError, match="params="):
        loss.backward()


@pytest.mark.parametrize("method", ["dopri5", "bosh3", "fehlberg2", "dopri8"])
@pytest.mark.parametrize("quadratures_in_norm", [True, False])
def test_the_adjoint_sums_the_same_parameters_for_every_method(method, quadratures_in_norm):
    field = Field()
    h = features(3, 2)

    def gradients(gradient):
        layer = nt.GHBNODE(field, gradient=gradient, method=method, rtol=1e-7, atol=1e-7).double()
        layer.zero_grad()
        layer(h).square().sum().backward()
        return [p.grad.clone() for p in field.parameters()]

    for a, b in zip(
        gradients(nt.gradients.Adjoint(quadratures_in_norm=quadratures_in_norm)), gradients("discrete"), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


class Conditioned(nn.Module):
    """f(t, h) with a context that its user sets."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2, dtype=torch.float64)
        self.register_buffer("shift", torch.ones(2, dtype=torch.float64))
        self.dropout = nn.Dropout(0.5)
        self.context, self.factor = torch.ones(3, 1, dtype=torch.float64), 1.0

    def forward(self, t, h):
        u = torch.tanh(self.linear(torch.cat((h, self.context), dim=1)) + self.shift)
        return self.factor * (self.dropout(u) if self.factor == 2 else u)


CHANGES = {
    "another context": lambda f: setattr(f, "context", 2 * f.context),
    "a context written to": lambda f: f.context.mul_(2),
    "a buffer written to": lambda f: f.shift.add_(1),
    "a number": lambda f: setattr(f, "factor", 1.5),
    "random numbers": lambda f: setattr(f, "factor", 2.0),
}


@pytest.mark.parametrize("method", ["dopri5", "rk4", "nystrom4"])
@pytest.mark.parametrize("change", list(CHANGES))
def test_a_field_that_has_changed_since_the_forward_pass_is_an_error(change, method):
    """Gradients were those of another function, silently."""
    options = {"step_size": 0.5} if method == "rk4" else {}
    layer = nt.GNesterovNODE(Conditioned(), method=method, **options)
    if change == "random numbers":
        layer.field.factor = 2.0
    y = layer(features(3, 2))
    CHANGES[change](layer.field)
    with pytest.raises(RuntimeError, match="another output in the backward pass than it gave"):
        y.sum().backward()


@pytest.mark.parametrize("gradient", ["backprop", nt.gradients.Discrete(recompute=False)], ids=str)
def test_a_field_may_change_where_it_is_not_called_again(gradient):
    """A layer called in turn on several contexts, and one backward pass through all of it."""
    found = []
    for strategy in (gradient, "discrete"):
        torch.manual_seed(0)
        h, layers = features(3, 2), []
        field = Conditioned()
        for k in range(3):
            if strategy == "discrete":  # the same by a field for each context
                layers.append(field if k == 0 else copy.deepcopy(layers[0]))
                layers[k].linear = layers[0].linear
            else:
                layers.append(field)
            layers[k].context = k * torch.ones(3, 1, dtype=torch.float64)
            h = nt.GNesterovNODE(layers[k], xi=0.5, gradient=strategy)(h)
        h.square().sum().backward()
        found.append(field.linear.weight.grad)
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)


def test_the_adjoint_s_method_brings_its_own_controller():
    """As every method does, unless a controller was asked for."""
    system, state = nt.systems.nesterov(torch.sin), (features(3, 2), features(3, 2))
    times = torch.tensor([1.0, 2.0], dtype=torch.float64)
    found = []
    for controller in (None, nt.controllers.Integral(safety=0.5)):
        settings = Settings.make(method="dopri5", controller=controller)
        problem = bind(system, state, state[0], times, settings, (), nt.Stats())
        found.append(nt.gradients.Adjoint(method="nystrom4").backward_problem(problem).options.controller)
    own = nt.controllers.get(nt.methods.controller_of(nt.methods.get("nystrom4")))
    assert found[0] == own != nt.controllers.Integral()
    assert found[1] == nt.controllers.Integral(safety=0.5)


KEEP = nt.gradients.Discrete(recompute=False)


class Context(nn.Module):
    """f(t, h, context, factor)."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2, dtype=torch.float64)

    def forward(self, t, h, context, factor=1.0):
        return factor * torch.tanh(self.linear(torch.cat((h, t * context), dim=1)))


def with_context(layer, call=None):
    """(h(T), gradients of h0, of what the context comes from, and of the field) with a context that an encoder made."""
    torch.manual_seed(3)
    encoder, h = nn.Linear(4, 1, dtype=torch.float64), features(3, 2).requires_grad_()
    out = (layer if call is None else call)(h, args=(encoder(features(3, 4)), 1.5))
    wanted = (h, encoder.weight, layer.field.linear.weight)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), wanted)]


@pytest.mark.parametrize("loop", ["eager", "graph"])
@pytest.mark.parametrize(
    "gradient", ["discrete", nt.gradients.Discrete(recompute=False), "adjoint", "reversible"], ids=str
)
@pytest.mark.parametrize("kind", [nt.NODE, nt.HBNODE, nt.GNesterovNODE])
@pytest.mark.filterwarnings("ignore:.*eager loop")
def test_args_are_differentiated(kind, gradient, loop):
    """Against autograd through every operation."""
    if gradient == "reversible" and kind is nt.NODE:
        pytest.skip("for momentum systems")
    options = {"method": "strang", "step_size": 0.02} if gradient == "reversible" else {"rtol": 1e-10, "atol": 1e-10}
    torch.manual_seed(0)
    field = Context()
    expected = with_context(kind(field, gradient="backprop", **options))
    found = with_context(kind(field, gradient=gradient, loop=loop, **options))
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-8 if gradient == "adjoint" else 1e-12)


def test_args_that_change_between_calls_of_one_layer():
    """What an attribute of the field could not do: each call goes back by its own."""
    torch.manual_seed(0)
    field, found = Context(), []
    for gradient in ("backprop", "discrete", "adjoint"):
        layer = nt.GNesterovNODE(field, xi=0.5, gradient=gradient, rtol=1e-10, atol=1e-10)
        h = features(3, 2).requires_grad_()
        y = h
        for k in range(3):
            y = layer(y, args=(k * torch.ones(3, 1, dtype=torch.float64),))
        found.append(torch.autograd.grad(y.square().sum(), (h, field.linear.weight)))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-7, atol=1e-7)


def test_args_of_solve_and_their_errors():
    y = nt.solve(lambda t, y, a: a * y, torch.ones(1, dtype=torch.float64), (0.0, 1.0), args=(-1.0,), rtol=1e-9).final
    torch.testing.assert_close(y.item(), math.exp(-1), rtol=1e-5, atol=1e-5)
    h, context = features(3, 2), features(3, 1)
    with pytest.raises(TypeError, match="args must be a tuple"):
        nt.NODE(Context())(h, args=context)
    with pytest.raises(TypeError, match=r"called as f\(t, h\) and takes \(t, h, context, factor\); pass .* args="):
        nt.NODE(Context())(h)
    total = nt.NODE(Context())(h, args=(context.requires_grad_(),)).sum()
    with pytest.raises(RuntimeError, match="second derivatives with tensors in args"):
        torch.autograd.grad(total, context, create_graph=True)
