"""Properties that hold for all inputs: shapes, dtypes, strides, reversed time, output times, strategies."""

import itertools

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from support import GRADIENTS, KEPT, METHODS, MODELS, Field, Recorder, features, gradients, options_for
from torch import nn

import nesterov_triton as nt


class Pointwise(nn.Module):
    """A field for features of any shape and dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.7))

    def forward(self, t, h, m=None):
        out = torch.tanh(self.weight.to(h.dtype) * h + t)
        return out if m is None else out - 0.3 * m


def pointwise(name: str, **options):
    model = MODELS[name]
    return model.build(Pointwise(), **model.keywords, **options)


shapes = st.lists(st.integers(0, 4), min_size=2, max_size=4).map(tuple)
dtypes = st.sampled_from([torch.float32, torch.float64])
names = st.sampled_from(list(MODELS))
strategies = st.sampled_from(GRADIENTS)
methods = st.sampled_from(METHODS)
starts = st.floats(0.5, 3.0)


@st.composite
def interior_times(draw):
    """Strictly monotone times from 1 to 2 or back, with up to five between."""
    between = sorted(draw(st.sets(st.integers(1, 99), min_size=1, max_size=5)))
    times = [1.0, *(1 + x / 100 for x in between), 2.0]
    return times if draw(st.booleans()) else times[::-1]


@settings(max_examples=60)
@given(name=names, shape=shapes, dtype=dtypes, method=methods, gradient=strategies, count=st.integers(2, 4))
def test_shapes_and_dtypes(name, shape, dtype, method, gradient, count):
    """The features' shape and dtype come out again, for empty batches and images too, and so do their gradients'."""
    layer = pointwise(name, gradient=gradient, **options_for(method))
    h = torch.randn(shape, dtype=dtype, requires_grad=True)
    times = torch.linspace(1.0, 2.0, count)
    out = layer(h, t=times)
    expected = list(shape)
    if name == "ANODE":
        expected[1] += 2
    assert list(out.shape) == ([] if count == 2 else [count]) + expected
    assert out.dtype == dtype
    assert bool(torch.isfinite(out).all())
    out.sum().backward()
    assert h.grad.shape == h.shape
    assert h.grad.dtype == dtype
    if MODELS[name].rows == 2:
        h_again, velocity = layer(h, t=times, return_velocity=True)
        assert velocity.shape == out.shape
        assert velocity.dtype == dtype
        assert torch.equal(h_again, out)


@settings(max_examples=30)
@given(name=names, gradient=strategies, kind=st.sampled_from(["transposed", "strided", "expanded", "narrowed"]))
def test_strides_do_not_matter(name, gradient, kind):
    base = features(4, 6)
    h = {
        "transposed": base.t(),
        "strided": base[::2, ::3],
        "expanded": base[:1].expand(4, 6),
        "narrowed": base[:, 1:4],
    }[kind]
    assert not h.is_contiguous()
    found = []
    for x in (h, h.contiguous()):
        layer = pointwise(name, gradient=gradient)
        x = x.detach().requires_grad_()
        out = layer(x)
        found.append([out, *gradients(layer, out.sum(), x)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@settings(max_examples=30)
@given(name=names, method=methods, rows=st.integers(1, 4))
def test_elements_of_a_batch_do_not_mix(name, method, rows):
    """On the same steps a batch of one gives what it gives in a larger batch."""
    layer = pointwise(name, **options_for(method))
    h = features(rows, 3)
    with torch.no_grad():
        together = layer(h)
        alone = torch.cat([layer(h[i : i + 1]) for i in range(rows)])
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)


@settings(max_examples=25)
@given(name=names, t0=starts, span=st.floats(0.1, 1.5), method=st.sampled_from(["dopri5", "tsit5", "dopri8"]))
def test_reversed_time_undoes_forward_time(name, t0, span, method):
    model = MODELS[name]
    if model.rows == 1:
        layer = pointwise("NODE", method=method, rtol=1e-10, atol=1e-10)
        h = features(2, 3)
        with torch.no_grad():
            back = layer(layer(h, t=(t0, t0 + span)), t=(t0 + span, t0))
        torch.testing.assert_close(back, h, rtol=1e-7, atol=1e-7)
        return
    system = pointwise(name).system
    state = features(2, 3), features(2, 3, seed=5)
    options = {"method": method, "rtol": 1e-10, "atol": 1e-10}
    with torch.no_grad():
        there = nt.solve(system, state, (t0, t0 + span), **options).final
        back = nt.solve(system, there, (t0 + span, t0), **options).final
    torch.testing.assert_close(back, state, rtol=1e-7, atol=1e-7)


@settings(max_examples=40)
@given(name=names, times=interior_times(), method=methods, gradient=strategies, tight=st.booleans())
def test_extra_output_times_change_nothing(name, times, method, gradient, tight):
    """Neither the last state, to the bit, nor the steps."""
    options = {"method": method, "rtol": 1e-5, "atol": 1e-5} if tight else options_for(method)
    if tight and "step_size" in options_for(method):
        options = {"method": method, "step_size": 0.07}
    layer = pointwise(name, gradient=gradient, **options)
    h = features(2, 3).requires_grad_()
    two = layer(h, t=(times[0], times[-1]))
    alone = (layer.stats.accepted, layer.stats.rejected)
    several = layer(h, t=times)
    assert (layer.stats.accepted, layer.stats.rejected) == alone
    assert torch.equal(several[-1], two)


@settings(max_examples=30)
@given(name=names, times=interior_times(), method=methods)
def test_output_times_do_not_depend_on_each_other(name, times, method):
    """Each requested state is the same whether others are asked for or not."""
    layer = pointwise(name, **options_for(method))
    h = features(2, 3)
    with torch.no_grad():
        together = layer(h, t=times)
        for i in range(1, len(times) - 1):
            alone = layer(h, t=(times[0], times[i], times[-1]))[1]
            torch.testing.assert_close(alone, together[i], rtol=1e-13, atol=1e-13)


@settings(max_examples=30)
@given(name=names, times=interior_times(), method=methods, dtype=dtypes)
def test_same_bits_again_and_whatever_the_strategy(name, times, method, dtype):
    h = features(3, 2, dtype=dtype)
    outputs, grads = [], []
    for gradient in (*GRADIENTS, *GRADIENTS):
        layer = pointwise(name, gradient=gradient, **options_for(method))
        x = h.clone().requires_grad_()
        t = torch.tensor(times, dtype=torch.float64, requires_grad=True)
        out = layer(x, t=t)
        outputs.append(out)
        grads.append(gradients(layer, out.sum(), x, t))
        with torch.no_grad():
            outputs.append(layer(x, t=times))
    assert all(torch.equal(outputs[0], out) for out in outputs[1:])
    for first, again in zip(grads[: len(GRADIENTS)], grads[len(GRADIENTS) :], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@settings(max_examples=40)
@given(
    name=names,
    method=methods,
    gradient=strategies,
    dtype=dtypes,
    times=interior_times(),
    shift=st.floats(0.0, 30.0),
    adaptive=st.booleans(),
)
def test_the_field_is_never_called_outside_the_interval(name, method, gradient, dtype, times, shift, adaptive):
    """Forward and backward; the time is a 0-d tensor of h's dtype, on its device."""
    model = MODELS[name]
    field = Recorder(Pointwise())
    options = {"method": method} if adaptive and "step_size" not in options_for(method) else options_for(method)
    layer = model.build(field, **model.keywords, gradient=gradient, **options)
    h = features(2, 3, dtype=dtype).requires_grad_()
    if not name.startswith(("Nesterov", "GNesterov")):  # whose κ(t) grows as e^(t/2)
        shift *= 100
    times = [t + shift for t in times]
    layer(h, t=times).sum().backward()
    bounds = torch.tensor([min(times), max(times)], dtype=torch.float64).to(dtype)
    for t in field.times:
        assert t.shape == ()
        assert t.dtype == dtype
        assert t.device == h.device
        assert bounds[0] <= t <= bounds[1]


@settings(max_examples=30)
@given(name=names, method=methods, gradient=strategies, times=interior_times())
def test_counts_of_evaluations_are_true(name, method, gradient, times):
    model = MODELS[name]
    field = Recorder(Pointwise())
    layer = model.build(field, **model.keywords, gradient=gradient, **options_for(method))
    loss = layer(features(2, 3).requires_grad_(), t=times).sum()
    forward = field.calls
    assert layer.stats.nfe_forward == forward
    assert layer.stats.nfe_backward == 0
    loss.backward()
    if gradient in ("backprop", KEPT):
        assert field.calls == forward  # nothing is evaluated again; what is counted are vector-Jacobian products
        # A last stage that is the next step's first may go back in both.
        assert 0 < layer.stats.nfe_backward <= forward + (gradient is KEPT) * layer.stats.accepted
    else:
        assert layer.stats.nfe_backward == field.calls - forward > 0


@given(factor=st.floats(0.25, 4.0), name=st.sampled_from(["NODE", "HBNODE"]))
def test_rescaled_time(factor, name):
    """h' = f on [0, c] is h' = c f on [0, 1]; of second order c² f, γ c."""
    h = features(2, 2)
    options = {"method": "dopri8", "rtol": 1e-10, "atol": 1e-10}
    with torch.no_grad():
        if name == "NODE":
            slow = nt.solve(lambda t, y: torch.sin(y), h, (0.0, factor), **options).final
            fast = nt.solve(lambda t, y: factor * torch.sin(y), h, (0.0, 1.0), **options).final
        else:
            rest = torch.zeros_like(h)
            one = nt.systems.Momentum(lambda t, x: torch.sin(x), damping=0.5)
            two = nt.systems.Momentum(lambda t, x: factor**2 * torch.sin(x), damping=0.5 * factor)
            slow = nt.solve(one, (h, rest), (0.0, factor), **options).final[0]
            fast = nt.solve(two, (h, rest), (0.0, 1.0), **options).final[0]
    torch.testing.assert_close(slow, fast, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("name", MODELS)
def test_pieces_of_an_interval_make_the_whole(name, gradient):
    """From time to time by separate solves: what a momentum layer's velocity is for."""
    model = MODELS[name]
    layer = model.layer(method="dopri8", rtol=1e-10, atol=1e-10, gradient=gradient)
    if model.rows == 1:
        h = features(2, 2 + model.augment)
        layer = nt.NODE(Field(2 + model.augment), method="dopri8", rtol=1e-10, atol=1e-10, gradient=gradient)
        whole, piece = layer(h), h
        for span in itertools.pairwise((1.0, 1.3, 1.8, 2.0)):
            piece = layer(piece, t=span)
    else:
        state = features(2, 2), features(2, 2, seed=7)
        options = {"method": "dopri8", "rtol": 1e-10, "atol": 1e-10, "gradient": gradient}
        whole, piece = nt.solve(layer.system, state, (1.0, 2.0), **options).final, state
        for span in itertools.pairwise((1.0, 1.3, 1.8, 2.0)):
            piece = nt.solve(layer.system, piece, span, **options).final
    torch.testing.assert_close(piece, whole, rtol=1e-7, atol=1e-7)
