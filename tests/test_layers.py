"""The layers as modules: what users do with any `nn.Module`, and what is particular to these."""

import copy
import io
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_model, save_model
from support import GRADIENTS, METHODS, MODELS, MOMENTUM, Field, Recorder, features, options_for
from torch import nn

import nesterov_triton as nt


class Net(nn.Module):
    """A float32 field for any model; module-level, so that it can be pickled."""

    def __init__(self, n: int = 3, *, sees_momentum: bool = False) -> None:
        super().__init__()
        self.linear = nn.Linear(n * (2 if sees_momentum else 1), n)

    def forward(self, t, h, m=None):
        return torch.tanh(self.linear(h if m is None else torch.cat((h, m), -1)) + t)


def layer_of(name: str, **options) -> nn.Module:
    model = MODELS[name]
    return model.build(Net(3 + model.augment, sees_momentum=model.sees_momentum), **model.keywords, **options)


@pytest.mark.parametrize("name", MODELS)
def test_state_dict_round_trip(name):
    layer, other = layer_of(name), layer_of(name)
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(torch.randn_like(p))
    h = torch.randn(4, 3)
    assert not torch.equal(layer(h), other(h))
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    assert not other.load_state_dict(torch.load(buffer, weights_only=True)).missing_keys
    assert torch.equal(layer(h), other(h))


@pytest.mark.parametrize("name", MODELS)
def test_safetensors_round_trip(name, tmp_path):
    layer, other = layer_of(name), layer_of(name)
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(torch.randn_like(p))
    save_model(layer, str(tmp_path / "layer.safetensors"))
    assert load_model(other, str(tmp_path / "layer.safetensors")) == (set(), [])
    h = torch.randn(4, 3)
    assert torch.equal(layer(h), other(h))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "make_copy", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"]
)
def test_copies_are_equal_and_apart(name, make_copy):
    layer = layer_of(name, gradient=nt.gradients.Adjoint(), controller="pi", atol=torch.full((1,), 1e-4))
    h = torch.randn(4, 3)
    layer(h).sum().backward()  # a layer that has been used
    twin = make_copy(layer)
    assert torch.equal(twin(h), layer(h))
    assert repr(twin) == repr(layer)
    with torch.no_grad():
        for p in twin.parameters():
            p.add_(1.0)
    assert not torch.equal(twin(h), layer(h))


def test_pickle_with_a_named_function_as_gate():
    layer = nt.GHBNODE(Net(), torch.tanh)
    h = torch.randn(4, 3)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(h), layer(h))


@pytest.mark.parametrize("name", MODELS)
def test_repr_says_how_it_solves(name):
    text = repr(layer_of(name, method="tsit5", rtol=1e-3, atol=1e-4, gradient="adjoint"))
    for word in ("tsit5", "rtol=0.001", "atol=0.0001", "adjoint", name.split("-")[0]):
        assert word in text
    text = repr(layer_of(name, method="rk4", step_size=0.125))
    assert "rk4" in text
    assert "step_size=0.125" in text
    assert "rtol" not in text
    if name == "ANODE":
        assert "augment=2" in text


def test_repr_says_in_a_line_what_differs_from_the_default():
    def line(layer):
        return layer.extra_repr()

    usual = "method=dopri5, rtol=1e-05, atol=1e-05, gradient=discrete"
    assert line(nt.GNesterovNODE(Net())) == usual
    layer = nt.GNesterovNODE(Net(), "tanh", 0.25, form="exact", t=(1, 3), max_steps=7, loop="graph", controller="pi")
    changed = "controller=pi, max_steps=7, loop=graph, t=(1.0, 3.0)"
    assert line(layer) == f"gate=Tanh(bound=1.0), xi=0.25, form=exact, {usual}, {changed}"
    assert line(nt.HBNODE(Net(), method="strang", step_size=0.1)) == "method=strang, gradient=discrete, step_size=0.1"
    many = nt.HBNODE(Net(), t=torch.linspace(0, 1, 100), gradient=nt.gradients.Reversible(7), method="auto")
    assert "gradient=Reversible(every=7, bound=None)" in line(many)
    assert "t=0.0...1.0 (100 times)" in line(many)
    assert "t=learned" in line(nt.NODE(Net(), t=nn.Parameter(torch.tensor([0.0, 1.0]))))
    assert len(repr(layer.settings)) < 500
    assert repr(nt.tableaus.get("dopri5")) == "Tableau('dopri5', order=5, stages=7)"


OPTIONS = {
    "method": "strang", "rtol": 1e-3, "atol": torch.full((1,), 1e-4), "gradient": nt.gradients.Reversible(5),
    "controller": "integral", "first_step": 0.1, "max_steps": 500, "loop": "eager",
}  # fmt: skip


def test_options_are_what_they_were_made_of():
    layer = nt.GNesterovNODE(Net(), **OPTIONS)
    assert dict(layer.options) == {**OPTIONS, "step_size": None}
    again = nt.GNesterovNODE(Net(), **layer.options)
    assert repr(again.settings) == repr(layer.settings)
    with pytest.raises(TypeError, match="item assignment"):
        layer.options["rtol"] = 1.0
    for name in nt.methods.METHODS:
        step = {} if nt.methods.get(name).adaptive else {"step_size": 0.1}
        assert nt.HBNODE(Net(), method=name, **step).options["method"] == name
    for name in nt.gradients.GRADIENTS:
        assert nt.HBNODE(Net(), gradient=name, method="strang").options["gradient"] == name
    assert nt.HBNODE(Net(), method="auto").options["method"] == "auto"


def test_configure_replaces_options_and_keeps_the_others():
    layer, h = nt.GNesterovNODE(Net(), rtol=1e-2, atol=1e-2), torch.randn(4, 3)
    rough = layer(h)
    assert layer.configure(rtol=1e-9, atol=1e-9, method="dopri8") is layer
    fine = layer(h)
    assert layer.stats.method == "dopri8"
    assert not torch.equal(rough, fine)
    same = nt.GNesterovNODE(layer.field, rtol=1e-9, atol=1e-9, method="dopri8").to(h)
    same.load_state_dict(layer.state_dict())
    assert torch.equal(same(h), fine)
    layer.configure(method="auto", gradient="reversible")
    assert layer(h).shape == h.shape
    assert layer.stats.method == "blanes_moan4"
    assert (layer.options["rtol"], layer.options["method"]) == (1e-9, "auto")
    twin = pickle.loads(pickle.dumps(layer))
    assert dict(copy.deepcopy(layer).options) == dict(twin.options) == dict(layer.options)
    assert torch.equal(twin(h), layer(h))


def test_a_refused_configuration_changes_nothing():
    layer = nt.SONODE(Net(sees_momentum=True), method="rk4", step_size=0.25)
    before = dict(layer.options)
    for options, error, match in (
        ({"method": "dopri"}, ValueError, "did you mean 'dopri5'"),
        ({"rtol": -1.0}, ValueError, "rtol"),
        ({"rtoll": 1.0}, TypeError, "did you mean 'rtol'"),
        ({"gate": "tanh"}, TypeError, "that is for GHBNODE and GNesterovNODE"),
        ({"method": "dopri5"}, ValueError, r"step_size belongs.*step_size = 0\.25.*step_size=None"),
        ({"method": "nystrom4"}, ValueError, "position alone"),
    ):
        with pytest.raises(error, match=match):
            layer.configure(**options)
        assert dict(layer.options) == before
    assert layer.configure(method="dopri5", step_size=None).options["step_size"] is None


def test_assignment_that_nothing_would_read_is_refused():
    layer = nt.GNesterovNODE(Net())
    for name in (*OPTIONS, "step_size"):
        with pytest.raises(AttributeError, match=rf"layer\.configure\({name}="):
            setattr(layer, name, OPTIONS.get(name, 0.1))
    for name, value, match in (
        ("field", Net(), r"layer\.system\.field"),
        ("gate", "tanh", "another layer"),
        ("gate", nn.Tanh(), "another layer"),
        ("xi", 1.0, "another layer"),
        ("form", "exact", "another layer"),
        ("options", {}, "configure"),
    ):
        with pytest.raises(AttributeError, match=match):
            setattr(layer, name, value)

    class Own(nt.NODE):
        def __init__(self, field):
            super().__init__(field)
            self.gate = nn.Linear(3, 3)

    assert isinstance(Own(Net()).gate, nn.Linear)


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("name", MODELS)
def test_stats(name, gradient):
    layer = layer_of(name, gradient=gradient)
    h = torch.randn(4, 3)
    out = layer(h)
    stats = layer.stats
    counts = (stats.nfe_forward, stats.nfe_backward, stats.accepted, stats.rejected)
    assert all(type(c) is int for c in counts)
    assert counts[0] > 0
    assert counts[1] == 0
    assert counts[2] > 0
    out.sum().backward()
    assert layer.stats.nfe_backward > 0
    assert layer.stats.nfe_forward == counts[0]
    layer(h)  # the next call starts over and leaves the old counts alone
    assert layer.stats is not stats
    assert layer.stats.nfe_backward == 0
    with torch.no_grad():
        layer(h)
    assert (layer.stats.nfe_forward, layer.stats.accepted, layer.stats.rejected) == (counts[0], *counts[2:])


def test_layers_have_the_parameters_they_should():
    own = {
        "NODE": 0,
        "ANODE": 0,
        "SONODE": 0,
        "HBNODE": 1,
        "GHBNODE": 2,
        "NesterovNODE": 0,
        "NesterovNODE-exact": 0,
        "GNesterovNODE": 1,
        "GNesterovNODE-exact": 1,
    }
    for name, count in own.items():
        layer = layer_of(name)
        field = {id(p) for p in layer.field.parameters()}
        extra = [p for p in layer.parameters() if id(p) not in field]
        assert len(extra) == count
        assert all(p.shape == () for p in extra)
    assert len(list(nt.GHBNODE(Net(), xi=0.3).parameters())) == 2 + 1
    assert len(list(nt.GNesterovNODE(Net(), xi=0.3).parameters())) == 2


@pytest.mark.parametrize("raw", [-30.0, -3.0, 0.0, 4.0, 30.0])
def test_damping_and_residual_stay_in_their_ranges(raw):
    layer = nt.GHBNODE(Net())
    with torch.no_grad():
        layer.system.raw_damping.fill_(raw)
        layer.system.raw_xi.fill_(raw)
        assert 0 <= layer.system.damping.item() <= 1
        assert layer.system.xi.item() >= 0
        assert layer.system.damping.item() == pytest.approx(torch.sigmoid(torch.tensor(raw)).item())
        assert layer.system.xi.item() == pytest.approx(nn.functional.softplus(torch.tensor(raw)).item())
        assert bool(torch.isfinite(layer(torch.randn(2, 3))).all())
    assert nt.GHBNODE(Net(), xi=0.25).system.xi == 0.25


@pytest.mark.parametrize("name", ["GHBNODE", "GNesterovNODE"])
def test_training_moves_every_parameter(name):
    layer = layer_of(name, initial_velocity=nn.Linear(3, 3))
    optimiser = torch.optim.Adam(layer.parameters(), lr=0.05)
    h, target = torch.randn(16, 3), torch.randn(16, 3)
    before = [p.detach().clone() for p in layer.parameters()]
    losses = []
    for _ in range(30):
        optimiser.zero_grad()
        loss = (layer(h) - target).pow(2).mean()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert all(not torch.equal(p, b) for p, b in zip(layer.parameters(), before, strict=True))


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("name", ["NODE", "GNesterovNODE"])
def test_times_as_a_parameter_are_trained(name, gradient):
    layer = layer_of(name, t=nn.Parameter(torch.tensor([1.0, 1.5])), gradient=gradient)
    assert any(p is layer.t for p in layer.parameters())
    assert "t" in layer.state_dict()
    h = torch.randn(8, 3)
    with torch.no_grad():
        target = layer(h, t=(1.0, 2.0))
    for p in layer.field.parameters():
        p.requires_grad_(False)
    optimiser = torch.optim.Adam([layer.t], lr=0.05)
    for _ in range(60):
        optimiser.zero_grad()
        ((layer(h, t=torch.stack((layer.t.new_tensor(1.0), layer.t[1]))) - target) ** 2).sum().backward()
        optimiser.step()
    assert layer.t[1].item() == pytest.approx(2.0, abs=0.02)
    layer(h).sum().backward()  # and as its own times
    assert layer.t.grad is not None


@pytest.mark.parametrize("name", MODELS)
def test_times_for_one_call(name):
    layer = layer_of(name, t=(1.0, 2.0))
    h = torch.randn(4, 3)
    out = layer(h)
    several = layer(h, t=[1.0, 1.5, 2.0])
    assert several.shape == (3, *out.shape)
    assert torch.equal(several[-1], out)
    assert torch.equal(layer(h, t=torch.tensor([1.0, 1.5, 2.0])), several)
    assert torch.equal(layer(h, t=(x / 2 for x in (2, 3, 4))), several)
    assert torch.equal(layer(h, t=np.linspace(1, 2, 3)), several)
    assert torch.equal(layer(h), out)
    torch.testing.assert_close(several[0][:, :3], h)


@pytest.mark.parametrize("name", MODELS)
def test_no_grad_and_inference_mode(name):
    layer = layer_of(name)
    h = torch.randn(4, 3)
    expected = layer(h)
    assert expected.requires_grad
    with torch.no_grad():
        out = layer(h)
    assert not out.requires_grad
    assert torch.equal(out, expected)
    with torch.inference_mode():
        assert torch.equal(layer(h), expected)
        assert layer(h[:0]).shape == expected[:0].shape


@pytest.mark.parametrize("name", MODELS)
def test_dtype_follows_the_module(name):
    layer = layer_of(name, rtol=1e-5, atol=1e-5)
    h = torch.randn(4, 3)
    single = layer(h)
    assert single.dtype == torch.float32
    layer.double()
    double = layer(h.double())
    assert double.dtype == torch.float64
    torch.testing.assert_close(single.double(), double, rtol=1e-4, atol=1e-4)
    assert torch.equal(layer.float()(h), single)


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", MODELS)
def test_half_precision(name, dtype, gradient):
    """To the accuracy of the dtype, at the default tolerances, forward and backward."""
    layer = layer_of(name, gradient=gradient).to(dtype)
    reference = copy.deepcopy(layer).double()
    h = torch.randn(4, 3).to(dtype).requires_grad_()
    wide = h.detach().double().requires_grad_()
    out, expected = layer(h), reference(wide)
    assert out.dtype == dtype
    limit = 20 * torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), expected, rtol=limit, atol=limit)
    out.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(h.grad.double(), wide.grad, rtol=3 * limit, atol=3 * limit)


@pytest.mark.parametrize("backward_inside", [True, False])
@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("name", ["NODE", "SONODE", "GNesterovNODE"])
def test_autocast_is_for_the_field_alone(name, gradient, backward_inside):
    """The solver keeps the state's dtype; the backward pass runs the field as the forward pass did."""
    layer = (
        layer_of(name, gradient=gradient, initial_velocity=nn.Linear(3, 3))
        if name != "NODE"
        else layer_of(name, gradient=gradient)
    )
    seen = []
    layer.field.linear.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    h = torch.randn(4, 3, requires_grad=True)
    reference = layer(h)
    (expected,) = torch.autograd.grad(reference.sum(), layer.field.linear.weight)
    seen.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(h)
        if backward_inside:
            out.sum().backward()
    if not backward_inside:
        out.sum().backward()
    assert out.dtype == torch.float32
    assert set(seen) == {torch.bfloat16}
    torch.testing.assert_close(out, reference, rtol=0.05, atol=0.05)
    torch.testing.assert_close(layer.field.linear.weight.grad, expected, rtol=0.1, atol=0.1)


# --- particular layers


@pytest.mark.parametrize(("shape", "dim"), [((4, 3), 1), ((2, 3, 5, 5), 1), ((2, 5, 3), -1), ((3,), 0)])
def test_anode_pads_with_zeros_and_returns_all_of_it(shape, dim):
    field = Recorder(lambda t, h: torch.ones_like(h))
    h = torch.randn(shape)
    out = nt.ANODE(field, augment=2, dim=dim)(h)
    padded = field.features[0]
    expected = list(shape)
    expected[dim] += 2
    assert list(out.shape) == list(padded.shape) == expected
    assert torch.equal(padded.narrow(dim, 0, shape[dim]), h)
    assert bool((padded.narrow(dim, shape[dim], 2) == 0).all())
    torch.testing.assert_close(out, padded + 1)


def test_sonode_sees_the_momentum():
    """h'' = -m from rest at h = 1 with velocity 1: h = 2 - e^-(t - 1)."""
    seen = []

    def field(t, h, m):
        seen.append(m)
        return -m

    layer = nt.SONODE(field, initial_velocity=lambda h: torch.ones_like(h), rtol=1e-8, atol=1e-8)
    h, v = layer(torch.ones(2, 2, dtype=torch.float64), return_velocity=True)
    e = torch.exp(torch.tensor(-1.0, dtype=torch.float64))
    torch.testing.assert_close(h, (2 - e).expand(2, 2))
    torch.testing.assert_close(v, e.expand(2, 2))
    assert seen[0].shape == (2, 2)
    assert bool((seen[0] == 1).all())


@pytest.mark.parametrize("name", MOMENTUM)
def test_velocity_is_the_derivative_of_the_output(name):
    layer = MODELS[name].layer(method="dopri8", rtol=1e-10, atol=1e-10)
    h = features(3, 2)
    d = 1e-3
    with torch.no_grad():
        hs, vs = layer(h, t=(1.0, 1.5 - 2 * d, 1.5 - d, 1.5, 1.5 + d, 1.5 + 2 * d, 2.0), return_velocity=True)
    numeric = (8 * (hs[4] - hs[2]) - (hs[5] - hs[1])) / (12 * d)
    torch.testing.assert_close(vs[3], numeric, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", [n for n in MOMENTUM if n not in ("SONODE",)])
def test_one_learnable_initial_velocity_gets_gradients(name):
    start = nn.Linear(3, 3)
    layer = layer_of(name, initial_velocity=start)
    assert sum(p.numel() for p in layer.parameters()) == sum(p.numel() for p in layer_of(name).parameters()) + 12
    layer(torch.randn(4, 3)).sum().backward()
    assert float(start.weight.grad.abs().max()) > 0


def test_layers_are_thin_over_solve():
    field = Field()
    h, m = features(3, 2), features(3, 2, seed=3)
    layer = nt.GNesterovNODE(field, "tanh", 0.2, t=(1.0, 1.4, 2.0), initial_velocity=lambda _: m).double()
    system = nt.systems.gnesterov(field, "tanh", 0.2)
    state = system.initial_state(h, m, torch.tensor(1.0, dtype=torch.float64))
    solution = nt.solve(system, state, (1.0, 1.4, 2.0))
    xs, ms = solution.ys
    hs, vs = layer(h, return_velocity=True)
    assert torch.equal(hs, system.features(solution.t, xs))
    assert torch.equal(vs, system.velocity(solution.t, xs, ms))
    torch.testing.assert_close(hs[0], h)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", MODELS)
def test_every_layer_with_every_method(name, method):
    layer = layer_of(name, **options_for(method))
    reference = copy.deepcopy(layer).double()
    reference.settings = type(reference.settings).make(method="dopri8", rtol=1e-8, atol=1e-8)
    h = torch.randn(4, 3)
    limit = {"euler": 0.7, "midpoint": 0.1, "adaptive_heun": 0.15, "fehlberg2": 0.15}.get(method, 0.02)
    with torch.no_grad():
        torch.testing.assert_close(layer(h), reference(h.double()).float(), rtol=limit, atol=limit)


def test_layers_in_a_sequential_model():
    model = nn.Sequential(nn.Linear(2, 3), layer_of("GNesterovNODE"), nn.ReLU(inplace=True), nn.Linear(3, 1))
    model(torch.randn(5, 2)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_images():
    layer = nt.GNesterovNODE(_Convolution())
    h = torch.randn(2, 3, 8, 8)
    out, velocity = layer(h, return_velocity=True)
    assert out.shape == velocity.shape == h.shape
    out.sum().backward()
    last = h.to(memory_format=torch.channels_last)
    torch.testing.assert_close(layer(last), out)


class _Convolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, t, h):
        return torch.tanh(self.conv(h))


# --- importing


def run_python(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_importing_the_package_imports_neither_triton_nor_what_only_tests_need():
    run_python(
        "import sys\n"
        "import torch\n"
        "before = set(sys.modules)\n"  # torch may bring triton by itself
        "import nesterov_triton\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "unwanted = new & {'triton', 'torchdiffeq', 'scipy', 'sklearn', 'matplotlib', 'rich'}\n"
        "assert not unwanted, unwanted\n"
    )


def test_the_package_works_without_triton():
    run_python(
        "import sys\n"
        "class Blocker:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('triton', 'torchdiffeq', 'scipy', 'sklearn', 'matplotlib', 'rich'):\n"
        "            raise ModuleNotFoundError('No module named ' + name, name=name)\n"
        "sys.meta_path.insert(0, Blocker())\n"
        "import torch, nesterov_triton as nt\n"
        "layer = nt.GNesterovNODE(lambda t, h: -h)\n"
        "out = layer(torch.ones(2, 2, requires_grad=True))\n"
        "out.sum().backward()\n"
        "assert 'triton' not in sys.modules\n"
    )


def test_times_that_are_parameters_are_the_layers():
    field = Field()
    t = torch.nn.Parameter(torch.tensor([1.0, 2.0]), requires_grad=False)  # to be trained later
    layer = nt.NODE(field, t=t).double()
    assert layer.t is t
    assert "t" in dict(layer.named_parameters())
    with pytest.raises(ValueError, match="t must be one tensor"):
        nt.NODE(field, t=[1.0, torch.nn.Parameter(torch.tensor(2.0))])


@pytest.mark.parametrize("form", ["absorbed", "exact"])
@pytest.mark.parametrize(
    "gate", ["softclip", "hardtanh", "identity", torch.atan, torch.relu], ids=lambda g: getattr(g, "__name__", g)
)
def test_inference_mode_is_no_grad(gate, form):
    """A callable gate's derivative was zero there: in the velocity, and in the start of the exact form."""
    layer = nt.GNesterovNODE(lambda t, h: torch.sin(h), gate=gate, xi=0.5, form=form)
    h = features(3, 2)
    with torch.no_grad():
        expected = layer(h, return_velocity=True)
    with torch.inference_mode():
        found = layer(h, return_velocity=True)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
