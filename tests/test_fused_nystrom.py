"""Whole solves by the methods of `nystrom` and their gradients, by kernels and by the loop on the device, against the
eager loop in plain torch: the same steps, the same values."""

import itertools

import pytest
import torch
from support import MODELS, Field, features
from test_device_loop import agree as loops_agree
from test_fused import TIMES, Reusing, agree, both, run

import nesterov_triton as nt
from benchmarks import traffic
from nesterov_triton.nystrom import METHODS
from nesterov_triton.ops import nystrom_finish, nystrom_stage
from nesterov_triton.ops.runge_kutta import kernel as norm
from nesterov_triton.stepping import graphs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAYERS = ("HBNODE", "GHBNODE", "NesterovNODE", "NesterovNODE-exact", "GNesterovNODE", "GNesterovNODE-exact")
# Every method with every system that it is for, each with some of the times.
PAIRS = [
    (model, method) for model, method in itertools.product(LAYERS, METHODS) if model[0] != "G" or method != "nystrom6"
]
PAIRS = [(*pair, list(TIMES)[k % 3]) for k, pair in enumerate(p for p in PAIRS if p != ("GHBNODE", "nystrom6"))]
FIXED = {"step_size": 0.3}
STEPS = {"discrete": traffic.nystrom_reverse_step, "adjoint": traffic.nystrom_adjoint_step}
GRADIENTS = pytest.mark.parametrize("gradient", list(STEPS))


@pytest.fixture(autouse=True)
def _fresh():
    graphs.LOOPS.clear()
    graphs._warned.clear()
    yield
    graphs.LOOPS.clear()


@GRADIENTS
@pytest.mark.parametrize(("model", "method", "times"), PAIRS)
def test_a_solve_by_the_references_is_plain_torchs(take, model, method, times, gradient):
    make = lambda: MODELS[model].layer(hidden=5, method=method, gradient=gradient, **FIXED)  # noqa: E731
    agree(*both(take, "references", make, features(3, 2), TIMES[times]))


@GRADIENTS
@pytest.mark.parametrize("model", LAYERS)
def test_the_same_steps_are_accepted(take, model, gradient):
    options = {"method": "nystrom4", "rtol": 1e-5, "atol": 1e-5, "first_step": 0.9, "gradient": gradient}
    make = lambda: MODELS[model].layer(**options)  # noqa: E731
    plain, fused = both(take, "references", make, 3 * features(3, 2), TIMES["many"])
    agree(plain, fused, 1e-9)
    assert plain[2][3]  # some were rejected


@pytest.mark.parametrize(("model", "method", "times"), PAIRS)
def test_the_same_steps_are_accepted_backward(take, model, method, times):
    """By every method; from a first step that the backward solve rejects, too."""
    from nesterov_triton.stepping.loop import LoopOptions

    own = LoopOptions(nt.controllers.get("pi"), first_step=0.45)
    for backward in (nt.gradients.Adjoint(), nt.gradients.Adjoint(rtol=1e-6, atol=1e-6, options=own)):
        if backward.options is None or METHODS[method].order > 2:
            options = {"method": method, "rtol": 1e-4, "atol": 1e-4, "gradient": backward}
            make = lambda: MODELS[model].layer(hidden=5, **options)  # noqa: E731, B023
            agree(*both(take, "references", make, 2 * features(3, 2), TIMES[times]), 1e-9)


@GRADIENTS
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("model", "method"),
    [
        ("GNesterovNODE", "nystrom4"),
        ("NesterovNODE-exact", "nystrom6"),
        ("HBNODE", "strang"),
        ("GHBNODE", "blanes_moan4"),
    ],
)
def test_a_solve_by_the_kernels_is_plain_torchs(take, model, method, gradient):
    options = {"method": method, "rtol": 1e-2, "atol": 1e-2, "gradient": gradient}
    make = lambda: MODELS[model].layer(hidden=5, **options)  # noqa: E731
    agree(*both(take, "kernels", make, features(3, 2), TIMES["many"]), 1e-11)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("gate", ["identity", "tanh", "hardtanh", nt.gates.Softclip(0.7)])
@pytest.mark.parametrize("method", ["nystrom4", "blanes_moan4"])
def test_gates_of_the_adjoint_by_the_kernels(take, gate, method):
    options = {"method": method, "gradient": "adjoint", **FIXED}
    make = lambda: nt.GHBNODE(Field(), gate=gate, **options).double()  # noqa: E731
    agree(*both(take, "kernels", make, features(3, 2), (1.0, 1.3, 2.0)))


@GRADIENTS
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_types_by_the_kernels(take, dtype, gradient):
    options = {"method": "nystrom4", "step_size": 0.5, "gradient": gradient}
    make = lambda: MODELS["GNesterovNODE"].layer(**options).to(dtype)  # noqa: E731
    agree(*both(take, "kernels", make, features(3, 2).to(dtype)), 24 * torch.finfo(dtype).eps)


@GRADIENTS
@pytest.mark.parametrize("options", [{}, {"first_step": 0.4}, FIXED])
def test_a_field_that_uses_its_memory_again(take, options, gradient):
    """Its output is read by the next launch and by no other; in a backward pass it is copied."""
    field, options = Field(), {"gradient": gradient, **options}
    take("torch")
    plain = run(nt.GNesterovNODE(field, method="nystrom4", **options).double().to(DEVICE), features(3, 2))
    take("references")
    fused = run(nt.GNesterovNODE(Reusing(field), method="nystrom4", **options).double().to(DEVICE), features(3, 2))
    for a, b in zip([fused[0], *fused[1]], [plain[0], *plain[1]], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@GRADIENTS
@pytest.mark.usefixtures("runs_kernels")
@pytest.mark.parametrize("method", METHODS)
def test_a_step_takes_the_launches_that_are_counted(take, method, gradient, monkeypatch):
    take("kernels")
    from nesterov_triton.ops.nystrom_adjoint_finish import kernel as adjoint_finish
    from nesterov_triton.ops.nystrom_adjoint_stage import kernel as adjoint_stage
    from nesterov_triton.ops.nystrom_finish import kernel as finish
    from nesterov_triton.ops.nystrom_reverse_finish import kernel as reverse_finish
    from nesterov_triton.ops.nystrom_reverse_stage import kernel as reverse_stage
    from nesterov_triton.ops.nystrom_stage import kernel as stage

    started, start = [], norm.start
    for module in (stage, finish, reverse_stage, reverse_finish, adjoint_stage, adjoint_finish, norm):
        monkeypatch.setattr(module, "start", lambda kernel, *a, **k: (started.append(kernel), start(kernel, *a, **k)))
    counts = []
    for step in (1.0, 0.25):
        started.clear()
        layer = nt.NesterovNODE(Field(), method=method, step_size=step, gradient=gradient).double().to(DEVICE)
        out = layer(features(3, 2).to(DEVICE))
        assert layer.stats.nfe_forward == layer.stats.accepted * (METHODS[method].stages - 1) + 1
        forward = len(started)
        out.sum().backward()
        counts.append((forward, len(started) - forward))
    ahead, back = (3 * len(step(METHODS[method], gated=False)) for step in (traffic.nystrom_step, STEPS[gradient]))
    assert [b - a for a, b in zip(*counts, strict=True)] == [ahead, back]


def test_the_operators_take_what_a_step_is_made_of():
    """A step by the public functions, as their docstrings have it, is the eager stepper's."""
    from kernel_support import normal, scalar

    from nesterov_triton.ops.nystrom.reference import step_weights

    method, gate = METHODS["nystrom4"], nt.gates.Softclip(2.0)
    system = nt.systems.gnesterov(lambda t, h: torch.sin(3 * h * t), gate, 0.3)
    z, t, t1 = normal(10, dtype=torch.float64), 1.0, 1.3
    times = [t + c * (t1 - t) for c in method.c]
    rows = [system.rule.coefficients(s, 1.0, 0.3) for s in times]
    c = scalar([[r.scale, system.sign, r.q, r.minus_gamma] for r in rows])
    weights = step_weights(scalar([t1 - t]), c, method, True)
    rest = (c, weights, method, gate, gate)

    def field(i, h):
        return system.field(times[i], h)

    h0, _ = nystrom_stage.nystrom_stage(None, z, [], *rest)
    h1, f0 = nystrom_stage.nystrom_stage(field(0, h0), z, [], *rest)
    h2, f1 = nystrom_stage.nystrom_stage(field(1, h1), z, [f0], *rest)
    h3, f2 = nystrom_stage.nystrom_stage(field(2, h2), z, [f0, f1], *rest)
    tol = scalar(1e-3)
    done = nystrom_finish.nystrom_finish(field(3, h3), z, [f0, f1, f2], c, weights, tol, tol, *rest[2:])
    solved = nt.solve(system, tuple(z.view(2, -1)), (t, t1), method="nystrom4", step_size=1.0, gradient="backprop")
    torch.testing.assert_close(done.z.view(2, -1), torch.stack(solved.final).detach(), rtol=1e-14, atol=1e-14)


# -- which path, and which loop ----------------------------------------------------------------------------------------


def test_a_method_that_is_not_registered_takes_plain_torch(take):
    from dataclasses import replace

    take("references")
    layer = nt.HBNODE(Field(), method="nystrom4").double().to(DEVICE)
    layer.settings = replace(layer.settings, tableau=replace(METHODS["nystrom4"], order=3))
    layer(features(3, 2).to(DEVICE))
    assert layer.stats.path == "torch: the method 'nystrom4' is not registered"


@pytest.mark.parametrize("gradient", ["reversible", "backprop"])
def test_strategies_in_plain_torch_say_so(take, gradient):
    take("references")
    layer = nt.HBNODE(Field(), method="strang", step_size=0.25, gradient=gradient).double().to(DEVICE)
    layer(features(3, 2).to(DEVICE)).sum().backward()
    if gradient == "backprop":
        assert layer.stats.path.startswith("torch")
    else:
        assert layer.stats.path == "kernels"
        assert layer.stats.path_backward == "torch: kernels take no step back"


# -- the loop on the device --------------------------------------------------------------------------------------------


@GRADIENTS
@pytest.mark.parametrize(("model", "method", "times"), PAIRS)
def test_the_loop_on_the_device_is_the_eager_loop(model, method, times, gradient):
    make = lambda **loop: MODELS[model].layer(hidden=5, method=method, gradient=gradient, **FIXED, **loop)  # noqa: E731
    loops_agree(make, features(3, 2), TIMES[times])


@GRADIENTS
@pytest.mark.parametrize("model", LAYERS)
def test_the_loop_on_the_device_accepts_the_same_steps(model, gradient):
    options = {"method": "nystrom4", "rtol": 1e-5, "atol": 1e-5, "first_step": 0.9, "gradient": gradient}
    make = lambda **loop: MODELS[model].layer(**options, **loop)  # noqa: E731
    loops_agree(make, 3 * features(3, 2), TIMES["many"], 1e-9)


@pytest.mark.parametrize(("model", "method", "times"), PAIRS)
def test_the_adjoint_on_the_device_accepts_the_same_steps(model, method, times):
    """By every method, the first step chosen there."""
    options = {"method": method, "rtol": 1e-4, "atol": 1e-4, "gradient": "adjoint"}
    make = lambda **loop: MODELS[model].layer(hidden=5, **options, **loop)  # noqa: E731
    loops_agree(make, 2 * features(3, 2), TIMES[times], 1e-9)


@GRADIENTS
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("model", "method"), [("GNesterovNODE", "nystrom4"), ("HBNODE", "nystrom6"), ("GHBNODE", "strang")]
)
def test_the_loop_on_the_device_by_the_kernels(take, model, method, gradient):
    take("kernels")
    options = {"method": method, "rtol": 1e-2, "atol": 1e-2, "gradient": gradient}
    make = lambda **loop: MODELS[model].layer(hidden=5, **options, **loop)  # noqa: E731
    loops_agree(make, features(3, 2), TIMES["many"], 1e-11)


@pytest.mark.parametrize("loop", ["eager", "graph"])
@pytest.mark.parametrize("options", [{}, FIXED])
def test_a_field_that_is_not_finite_is_seen(take, options, loop):
    take("references")
    layer = nt.HBNODE(lambda t, h: torch.where(t < 1.5, h, torch.nan), method="nystrom4", loop=loop, **options)
    with pytest.raises(nt.SolveError) as raised:
        layer(features(3, 2).to(DEVICE))
    assert raised.value.status is nt.Status.NON_FINITE
    assert 1.0 <= raised.value.t <= 1.5


@pytest.mark.parametrize("loop", ["eager", "graph"])
def test_too_many_steps(take, loop):
    take("references")
    layer = nt.HBNODE(Field(), method="nystrom4", rtol=1e-9, atol=1e-9, max_steps=3, loop=loop).double().to(DEVICE)
    with pytest.raises(nt.SolveError) as raised:
        layer(features(3, 2).to(DEVICE))
    assert raised.value.status is nt.Status.MAX_STEPS


class Late(Field):
    """A field that goes wrong when it is told to."""

    bad = False

    def forward(self, t, h):
        found = super().forward(t, h)
        return torch.where(t < 1.5, found * torch.nan, found) if self.bad else found


@pytest.mark.parametrize(("path", "loop"), [("torch", "eager"), ("references", "eager"), ("references", "graph")])
@pytest.mark.parametrize("options", [{}, FIXED])
def test_a_backward_solve_that_fails_says_so(take, path, options, loop):
    """And the next one succeeds, on memory that has seen NaN."""
    take(path)
    layer = nt.HBNODE(Late(), method="nystrom4", gradient="adjoint", loop=loop, **options).double().to(DEVICE)
    h = features(3, 2).to(DEVICE).requires_grad_()
    found = []
    for bad in (False, True, False):
        out = layer(h, (1.0, 2.0))
        layer.system.field.bad = bad
        if bad:
            with pytest.raises(nt.SolveError, match="the adjoint's backward solve") as raised:
                out.sum().backward()
            assert raised.value.status is nt.Status.NON_FINITE
            assert 1.2 <= raised.value.t <= 2.0
            layer.system.field.bad = False
        else:
            found.append(torch.autograd.grad(out.sum(), [h, *layer.parameters()]))
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("loop", ["eager", "graph"])
def test_too_many_steps_backward(take, loop):
    take("references")
    strategy = nt.gradients.Adjoint(rtol=1e-12, atol=1e-12)
    layer = nt.HBNODE(Field(), method="nystrom4", gradient=strategy, max_steps=20, loop=loop).double().to(DEVICE)
    out = layer(features(3, 2).to(DEVICE).requires_grad_())
    with pytest.raises(nt.SolveError, match="the adjoint's backward solve") as raised:
        out.sum().backward()
    assert raised.value.status is nt.Status.MAX_STEPS


def test_the_adjoint_behind_other_methods(take):
    """Kernels and loop are of the backward solve's method."""
    take("references")
    for method in ("dopri5", "nystrom6"):
        strategy = nt.gradients.Adjoint(method="nystrom4", rtol=1e-6, atol=1e-6)
        make = lambda **loop: MODELS["HBNODE"].layer(method=method, gradient=strategy, **loop)  # noqa: E731, B023
        loops_agree(make, features(3, 2), TIMES["two"], 1e-9)
