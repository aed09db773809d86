"""Gates: values against their formulas, derivatives against autograd, and what a gate must not be."""

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from support import GRADIENTS, Field, features, gradients, largest_difference
from torch import nn

import nesterov_triton as nt
from nesterov_triton import gates

ALL = {
    "identity": (gates.Identity(), lambda x: x),
    "tanh": (gates.Tanh(), torch.tanh),
    "hardtanh": (gates.Hardtanh(), lambda x: x.clamp(-5, 5)),
    "hardtanh-1": (gates.Hardtanh(1.0), lambda x: x.clamp(-1, 1)),
    "softclip": (gates.Softclip(), lambda x: 5 * torch.tanh(x / 5)),
    "softclip-2": (gates.Softclip(2.0), lambda x: 2 * torch.tanh(x / 2)),
    "callable": (gates.get(torch.atan), torch.atan),
}
numbers = st.lists(st.floats(-50, 50, allow_subnormal=False), min_size=1, max_size=8)


@pytest.mark.parametrize("name", ALL)
@given(values=numbers)
def test_value_and_derivative(name, values):
    gate, formula = ALL[name]
    x = torch.tensor(values, dtype=torch.float64)
    x = torch.where(x.abs() == gate.bound, x + 0.5, x)  # away from the kinks
    y = gate(x)
    torch.testing.assert_close(y, formula(x), rtol=1e-14, atol=1e-14)
    out = torch.empty_like(x)
    gate(x, out=out)
    assert torch.equal(out, y)
    leaf, grad = x.clone().requires_grad_(), torch.linspace(-2, 3, len(x), dtype=torch.float64)
    (expected,) = torch.autograd.grad(formula(leaf), leaf, grad)
    torch.testing.assert_close(gate.pullback(grad, x, y), expected, rtol=1e-12, atol=1e-12)
    (by_autograd,) = torch.autograd.grad(gate(leaf), leaf, grad)
    torch.testing.assert_close(by_autograd, expected, rtol=1e-12, atol=1e-12)
    assert float(y.abs().max()) <= gate.bound


@pytest.mark.parametrize("name", ["tanh", "softclip"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_values_are_as_good_as_the_dtype(name, dtype):
    gate, formula = ALL[name]
    x = torch.cat((torch.linspace(-8, 8, 101), torch.tensor([1e-3, -1e-2, 0.0]))).to(dtype)
    y = gate(x)
    assert y.dtype == dtype
    expected = formula(x.double())
    assert float((y.double() - expected).abs().max()) <= 4 * torch.finfo(dtype).eps * gate.bound
    assert float(gate(torch.zeros(1, dtype=dtype))) == 0.0


@pytest.mark.parametrize("gate", [gates.Softclip(3.0), gates.Tanh()])
def test_saturation_is_smooth_and_finite(gate):
    x = torch.tensor([-1e30, -700.0, 0.0, 700.0, 1e30], dtype=torch.float64)
    y = gate(x)
    torch.testing.assert_close(y, torch.tensor([-1.0, -1.0, 0.0, 1.0, 1.0], dtype=torch.float64) * gate.bound)
    slope = gate.pullback(torch.ones_like(x), x, y)
    torch.testing.assert_close(slope, torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0], dtype=torch.float64))


def test_hardtanh_has_no_slope_at_and_beyond_its_bounds():
    x = torch.tensor([-6.0, -5.0, 4.999, 5.0, 6.0])
    gate = gates.Hardtanh(5.0)
    expected = torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0])
    assert torch.equal(gate.pullback(torch.ones(5), x, gate(x)), expected)
    leaf = x.clone().requires_grad_()
    gate(leaf).sum().backward()
    assert torch.equal(leaf.grad, expected)


def test_bounds_and_names():
    assert gates.get("softclip") == gates.Softclip(5.0)
    assert gates.get("hardtanh") == gates.Hardtanh(5.0)
    assert gates.get("tanh").bound == 1.0
    assert gates.get("identity").bound == math.inf
    own = gates.Softclip(2.5)
    assert gates.get(own) is own
    assert gates.Softclip(2.5) == own
    assert gates.Softclip(2.0) != own


@pytest.mark.parametrize("bound", [0.0, -1.0, math.inf, math.nan])
@pytest.mark.parametrize("gate", [gates.Softclip, gates.Hardtanh])
def test_bad_bound(gate, bound):
    with pytest.raises(ValueError, match=r"bound.*positive"):
        gate(bound)
    with pytest.raises(ValueError, match="Softclip"):
        gates.Tanh(2.0)


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("make", [nt.GHBNODE, nt.GNesterovNODE])
@pytest.mark.parametrize(
    ("built_in", "callable_gate"),
    [
        ("tanh", torch.tanh),
        ("identity", lambda x: x + 0.0),
        (gates.Softclip(2.0), lambda x: 2 * torch.tanh(x / 2)),
        (gates.Hardtanh(0.5), lambda x: torch.clamp(x, -0.5, 0.5)),
        (gates.Hardtanh(0.5), nn.Hardtanh(-0.5, 0.5)),
    ],
    ids=["tanh", "identity", "softclip", "clamp", "module"],
)
def test_a_callable_gate_gives_what_the_built_in_one_gives(make, gradient, built_in, callable_gate):
    found = []
    for gate in (built_in, callable_gate):
        layer = make(Field(), gate, 0.3, gradient=gradient, rtol=1e-6, atol=1e-6).double()
        h = features(3, 2).requires_grad_()
        out = layer(h)
        found.append([out, *gradients(layer, out.pow(2).sum(), h)])
    assert largest_difference(*found) < 1e-8


def test_a_gate_that_is_not_elementwise():
    layer = nt.GHBNODE(Field(), lambda x: x.sum(), 0.3).double()
    with pytest.raises(ValueError, match="gate must be elementwise"):
        layer(features(3, 2))
    layer = nt.GHBNODE(Field(), lambda x: x.float(), 0.3).double()
    with pytest.raises(ValueError, match="gate must be elementwise"):
        layer(features(3, 2))


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_a_gate_that_works_in_place_is_refused(gradient):
    """It would change the solver's state under its feet."""
    layer = nt.GHBNODE(Field(), nn.Hardtanh(-0.1, 0.1, inplace=True), 0.3, gradient=gradient).double()
    with pytest.raises((ValueError, RuntimeError), match=r"in place|in-place"):
        layer(features(3, 2)).sum().backward()
    with torch.no_grad(), pytest.raises(ValueError, match="gate must not change its argument"):
        layer(features(3, 2))


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_a_constant_gate(gradient):
    """x' = 1 whatever m: its derivative is 0, not an error."""
    layer = nt.GHBNODE(Field(), torch.ones_like, 0.3, gradient=gradient).double()
    h = features(3, 2).requires_grad_()
    out = layer(h)
    torch.testing.assert_close(out, h + 1)
    torch.testing.assert_close(torch.autograd.grad(out.sum(), h)[0], torch.ones_like(h))
