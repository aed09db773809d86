"""Layers inside torch.compile: no graph break, and the eager solver's steps, values and gradients.

Most run on the "eager" backend, which traces as every other does and leaves out what takes minutes; `aot_eager` traces
the backward pass ahead of time as well, and inductor compiles.
"""

import io
import itertools

import pytest
import torch
from functorch.compile import make_boxed_func
from support import FIXED, MODELS, Field, features, gradients, largest_difference
from torch._dynamo.backends.common import aot_autograd

import nesterov_triton as nt
from nesterov_triton.status import Stats

TIGHT = {"rtol": 1e-5, "atol": 1e-5}
BEFORE_2_13 = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13)
LAYERS = ["NODE", "ANODE", "SONODE", "HBNODE", "GHBNODE", "NesterovNODE", "GNesterovNODE"]


@pytest.fixture(autouse=True)
def _forgotten():
    """Nothing that an earlier test compiled is used again, or kept."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(module, backend="eager", **options):
    return torch.compile(module, fullgraph=True, backend=backend, **options)


def counts(stats: Stats):
    return int(stats.accepted), int(stats.rejected)


def agree(layer, backend="eager", times=(1.0, 2.0), h=None, eps=1e-10, run=None):
    """Values, gradients and steps of the layer and of its compiled self."""
    h = features(3, 2) if h is None else h
    results = []
    for call in (layer, compiled(layer, backend) if run is None else run):
        x = h.detach().clone().requires_grad_()
        out = call(x, times)
        results.append((out.detach(), gradients(layer, (out**2).sum() + out[-1:].sum(), x), layer.stats))
    (plain, grads, stats), (fast, fast_grads, fast_stats) = results
    assert counts(fast_stats) == counts(stats)
    torch.testing.assert_close(fast, plain, rtol=0, atol=eps * max(1.0, plain.abs().max().item()))
    scale = max(1.0, *(g.abs().max().item() for g in grads))
    assert largest_difference(fast_grads, grads) <= eps * scale
    return stats, fast_stats


def layer_of(model, method="dopri5", **options):
    if method == "adaptive_heun":
        options = {"rtol": 1e-3, "atol": 1e-3} | options
    return MODELS[model].layer(method=method, **({"step_size": 0.3} if method in FIXED else TIGHT) | options)


# --- the sweep


@pytest.mark.parametrize("gradient", ["discrete", "adjoint"])
@pytest.mark.parametrize("model", list(MODELS))
def test_every_layer(model, gradient):
    stats, fast = agree(layer_of(model, gradient=gradient))
    assert int(fast.nfe_forward) == stats.nfe_forward
    if gradient == "discrete":
        assert int(fast.nfe_backward) == stats.nfe_backward
    assert (fast.path, fast.loop) == ("compiled", "compiled")


@pytest.mark.parametrize("gradient", ["discrete", "adjoint"])
@pytest.mark.parametrize("model", LAYERS)
def test_every_layer_in_fixed_steps(model, gradient):
    agree(layer_of(model, "rk4", gradient=gradient))


@pytest.mark.parametrize("method", ["bosh3", "adaptive_heun", "tsit5", "dopri8", "fehlberg2", "euler", "midpoint"])
def test_every_method(method):
    agree(layer_of("GNesterovNODE", method))


@pytest.mark.parametrize("gradient", ["discrete", "adjoint"])
@pytest.mark.parametrize("times", [(1.0, 1.2, 1.3, 2.0), (2.0, 1.5, 1.0)])
@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_several_times_in_both_directions(method, times, gradient):
    agree(layer_of("GNesterovNODE", method, gradient=gradient), times=times)


@pytest.mark.parametrize("options", [{"controller": "pi"}, {"first_step": 0.3}, {"rtol": torch.full((3, 2), 1e-6)}])
def test_options(options):
    agree(MODELS["GNesterovNODE"].layer(**({"rtol": 1e-6, "atol": 1e-6} | options)))


# Methods of few stages, which take a fraction of the time to compile; with dopri5 and rk4 one layer each.
SWEEP = [*itertools.product(LAYERS, ["adaptive_heun", "euler"]), ("GNesterovNODE", "dopri5"), ("SONODE", "rk4")]


@pytest.mark.parametrize("gradient", ["discrete", "adjoint"])
@pytest.mark.parametrize(("model", "method"), SWEEP)
def test_traced_ahead_of_time(model, method, gradient):
    agree(layer_of(model, method, gradient=gradient), "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("gradient", ["discrete", "adjoint"])
@pytest.mark.parametrize(("model", "method"), SWEEP)
def test_by_inductor(model, method, gradient):
    agree(layer_of(model, method, gradient=gradient), "inductor")


@pytest.mark.slow
def test_inductor_s_wrapper_in_cpp():
    """Around the kernels C++ instead of Python: forward, and backward where nothing is kept."""
    layer, h = layer_of("GNesterovNODE", gradient="adjoint"), features(3, 2)
    fast = torch.compile(layer, fullgraph=True, options={"cpp_wrapper": True})
    agree(layer, run=fast)
    with torch.no_grad():
        torch.testing.assert_close(fast(h), layer(h), rtol=1e-10, atol=1e-10)


def test_steps_taken_back_by_inductor():
    """Loops in loops."""
    gradient = nt.gradients.Reversible(every=2)
    stats, _ = agree(layer_of("NesterovNODE", "strang", gradient=gradient, step_size=0.2), "inductor")
    assert stats.accepted == 5


def test_inside_a_larger_model():
    torch.manual_seed(0)
    layer = nt.GNesterovNODE(Field(), **TIGHT)
    model = torch.nn.Sequential(torch.nn.Linear(4, 2), layer, torch.nn.Tanh(), torch.nn.Linear(2, 1)).double()
    x = features(5, 4)
    expected = model(x)
    grads = torch.autograd.grad(expected.square().sum(), list(model.parameters()))
    actual = compiled(model)(x)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    fast = torch.autograd.grad(actual.square().sum(), list(model.parameters()))
    assert largest_difference(list(fast), list(grads)) <= 1e-9


# --- what else a call may be


@pytest.mark.parametrize("gradient", ["discrete", "adjoint"])
@pytest.mark.parametrize("times", [[1.0, 2.0], [1.0, 1.3, 2.0]])
def test_gradients_with_respect_to_times(times, gradient):
    layer, h = layer_of("GNesterovNODE", gradient=gradient), features(3, 2)
    t = torch.tensor(times, dtype=torch.float64, requires_grad=True)
    expected, actual = (torch.autograd.grad(call(h, t).square().sum(), t)[0] for call in (layer, compiled(layer)))
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


class Context(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(3, 2, dtype=torch.float64)

    def forward(self, t, h, context, factor=1.0):
        return factor * torch.tanh(self.linear(torch.cat((h, t * context), dim=1)))


@pytest.mark.parametrize("gradient", ["discrete", "adjoint"])
def test_args(gradient):
    """A context that the compiled function makes, differentiated through the loop; and a number."""
    torch.manual_seed(0)
    layer, encoder = nt.GNesterovNODE(Context(), gradient=gradient, **TIGHT), torch.nn.Linear(4, 1, dtype=torch.float64)
    h, z, results = features(3, 2), features(3, 4), []

    def call(h, z):
        return layer(h, args=(encoder(z), 1.5))

    for run in (call, compiled(call)):
        out = run(h, z)
        wanted = (*encoder.parameters(), *layer.parameters())
        results.append([out.detach(), *torch.autograd.grad(out.square().sum(), wanted)])
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


def test_another_damping_factor():
    layer = nt.GNesterovNODE(Field(), damping_factor=5.0, form="exact", **TIGHT).double()
    agree(layer)


def test_velocities():
    torch.manual_seed(0)
    layer = nt.GNesterovNODE(Field(), initial_velocity=torch.nn.Linear(2, 2), **TIGHT).double()
    h = features(3, 2)
    for a, b in zip(layer(h, return_velocity=True), compiled(layer)(h, return_velocity=True), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_a_callable_gate():
    layer, h = nt.GNesterovNODE(Field(), gate=torch.sin, **TIGHT).double(), features(3, 2)
    for a, b in zip(layer(h, return_velocity=True), compiled(layer)(h, return_velocity=True), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_a_learned_time():
    layer = nt.NODE(Field(), t=torch.nn.Parameter(torch.tensor([0.0, 1.0], dtype=torch.float64)), **TIGHT).double()
    h = features(3, 2)
    grads = [torch.autograd.grad(call(h).sum(), layer.t)[0] for call in (layer, compiled(layer))]
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-9)


def test_without_gradients():
    layer, h = layer_of("GNesterovNODE"), features(3, 2)
    with torch.no_grad():
        torch.testing.assert_close(compiled(layer)(h), layer(h), rtol=1e-10, atol=1e-10)


def test_solve_itself():
    system, state = nt.systems.gnesterov(Field()).double(), (features(3, 2), features(3, 2, seed=2))

    def run(x, m):
        solution = nt.solve(system, (x, m), (1.0, 1.5, 2.0), **TIGHT)
        return (*solution.ys, *solution.final)

    for a, b in zip(run(*state), compiled(run)(*state), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_solve_itself_for_any_batch_and_tolerance():
    """As README has it: with numbers taken for constants."""
    system = nt.systems.gnesterov(Field()).double()

    def run(x, m, tolerance):
        return nt.solve(system, (x, m), (1.0, 2.0), rtol=tolerance, atol=tolerance).final[0]

    with torch._dynamo.config.patch(specialize_float=True):
        own = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=True)
        for batch, tolerance in ((3, 1e-5), (5, 1e-7)):
            state = features(batch, 2), features(batch, 2, seed=2)
            torch.testing.assert_close(own(*state, tolerance), run(*state, tolerance), rtol=1e-10, atol=1e-10)


class Wide(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 8))

    def forward(self, t, h):
        return self.net(h)


@pytest.mark.parametrize("gradient", ["discrete", "adjoint"])
def test_autocast(gradient):
    """The field in bfloat16, the state and the solver in float32."""
    torch.manual_seed(0)
    layer = nt.GNesterovNODE(Wide(), gradient=gradient, method="rk4", step_size=0.25)
    x = torch.randn(4, 8, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outs = [call(x) for call in (layer, compiled(layer))]
    assert outs[1].dtype == torch.float32
    with torch.autocast("cpu", enabled=False):
        full = layer(x)
    assert (outs[0] - full).abs().max() > 1e-5  # it makes a difference
    torch.testing.assert_close(*outs, rtol=0, atol=1e-5)
    grads = [torch.autograd.grad(out.sum(), [x, *layer.parameters()]) for out in outs]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-2)


# --- recompilation


def test_a_second_batch_size_compiles_nothing_anew():
    layer = layer_of("GNesterovNODE")
    run = compiled(layer, dynamic=True)
    agree(layer, h=features(3, 2), run=run)
    with torch._dynamo.config.patch(error_on_recompile=True):
        agree(layer, h=features(7, 2), run=run)
        agree(layer, h=features(5, 2), run=run)


def test_steps_taken_back_at_a_second_batch_size_compile_nothing_anew():
    layer = layer_of("GNesterovNODE", "strang", gradient=nt.gradients.Reversible(every=2), step_size=0.3)
    run = compiled(layer, dynamic=True)
    agree(layer, h=features(3, 2), run=run)
    with torch._dynamo.config.patch(error_on_recompile=True):
        agree(layer, h=features(7, 2), run=run)


@pytest.mark.parametrize("dynamic", [None, True])
def test_a_changed_setting_is_noticed(dynamic):
    layer, h = nt.GNesterovNODE(Field(), gate=nt.gates.Softclip(3.0), rtol=1e-2, atol=1e-2).double(), features(3, 2)
    run = compiled(layer, dynamic=dynamic)
    run(h)
    first = counts(layer.stats)
    layer.configure(rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(run(h), layer(h), rtol=1e-7, atol=1e-7)
    run(h)
    assert counts(layer.stats) > first
    layer.system.gate_x = layer.system.gate_f = nt.gates.Softclip(0.5)
    torch.testing.assert_close(run(h), layer(h), rtol=1e-7, atol=1e-7)


def test_a_compiled_loop_never_asks_the_host():
    """Forward and backward are one loop each, and no operator hands a value to the host."""
    aten, seen = torch.ops.aten, []

    def look(graph, _):
        modules = [m for m in graph.modules() if isinstance(m, torch.fx.GraphModule)]
        seen.append([n.target for m in modules for n in m.graph.nodes if n.op == "call_function"])
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=look, bw_compiler=look)
    compiled(layer_of("GNesterovNODE"), backend)(features(3, 2).requires_grad_()).sum().backward()
    assert len(seen) == 2
    reads = {aten._local_scalar_dense.default, aten.item.default, aten.is_nonzero.default, aten.nonzero.default}
    for targets in seen:
        assert sum("while_loop" in str(target) for target in targets) == 1
        assert not reads & {t for t in targets if isinstance(t, torch._ops.OpOverload)}


# --- failures


def test_a_solve_that_fails_is_nan_and_says_so():
    layer = nt.NODE(lambda t, h: 50 * h * h, max_steps=20)
    out = compiled(layer)(features(3, 2).abs() + 1)
    assert bool(torch.isnan(out).all())
    assert counts(layer.stats)[0] + counts(layer.stats)[1] == 20


@pytest.mark.parametrize(
    ("field", "status"),
    [
        (lambda t, y: 50 * y * y, nt.Status.MAX_STEPS),
        (lambda t, y: y * torch.nan, nt.Status.NON_FINITE),
        (lambda t, y: y, nt.Status.SUCCESS),
    ],
)
def test_the_status_of_a_compiled_solve_is_the_eager_one_s(field, status):
    y0 = features(3, 2).abs() + 1
    eager = nt.solve(field, y0, (0.0, 1.0), max_steps=40, throw=False)
    solution = torch.compile(
        lambda y: nt.solve(field, y, (0.0, 1.0), max_steps=40, throw=False), fullgraph=True, backend="eager"
    )(y0)
    assert eager.status is status
    assert list(nt.Status)[int(solution.status)] is status


def test_a_field_that_is_not_finite_gives_nan():
    layer = nt.HBNODE(lambda t, h: torch.where(t < 1.5, h, torch.nan))
    assert bool(torch.isnan(compiled(layer)(features(3, 2))).all())


@pytest.mark.parametrize("gradient", ["discrete", "adjoint"])
def test_tensors_that_would_get_no_gradient_are_refused(gradient):
    """A tracer alone would give them none, and say nothing."""
    w = torch.ones(2, dtype=torch.float64, requires_grad=True)
    with pytest.raises(Exception, match="would get no gradient"):
        compiled(nt.NODE(lambda t, h: w * h, gradient=gradient))(features(3, 2))
    with torch.no_grad():
        compiled(nt.NODE(lambda t, h: w * h, gradient=gradient))(features(3, 2))


@pytest.mark.parametrize("grads", [True, False])
@pytest.mark.parametrize("field", [lambda t, h: h[:1], lambda t, h: h.float()])
def test_a_field_that_does_not_fit_the_state_is_refused(field, grads):
    """Whatever would broadcast, or be cast, without a word."""
    refusal = pytest.raises(Exception, match=r"field returned shape.*for h of shape \(3, 2\) torch.float64")
    with refusal, torch.set_grad_enabled(grads):
        compiled(nt.NODE(field))(features(3, 2))


@pytest.mark.parametrize("grads", [True, False])
def test_a_field_that_changes_its_buffers_is_refused(grads):
    """A loop has them changed once, or not at all, where the eager solver has them changed at every evaluation."""

    class Normed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = torch.nn.BatchNorm1d(2).double()

        def forward(self, t, h):
            return self.norm(h)

    field = Normed()
    layer, h = nt.NODE(field), features(3, 2)
    with pytest.raises(Exception, match=r"changes its buffers \(norm\."), torch.set_grad_enabled(grads):
        compiled(layer)(h)
    assert field.norm.num_batches_tracked == 0
    field.eval()
    torch._dynamo.reset()
    torch.testing.assert_close(compiled(layer)(h), layer(h), rtol=1e-12, atol=1e-12)


class Conditioned(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.context = torch.nn.Linear(3, 2, dtype=torch.float64), torch.zeros(3, 1, dtype=torch.float64)

    def forward(self, t, h):
        return torch.tanh(self.linear(torch.cat((h, self.context), dim=1)))


@pytest.mark.parametrize("gradient", ["discrete", "adjoint"])
def test_a_context_set_in_the_compiled_function_is_refused_where_it_would_get_no_gradient(gradient):
    """Its gradient was zero, silently: what is looked at in Python still had the context of before."""
    layer, encoder = nt.NODE(Conditioned(), gradient=gradient), torch.nn.Linear(2, 1, dtype=torch.float64)

    def call(h):
        layer.field.context = encoder(h)
        return layer(h)

    h = features(3, 2)
    with pytest.raises(Exception, match=r"Conditioned.context needs a gradient and is no parameter"):
        compiled(call)(h)
    torch._dynamo.reset()
    with torch.no_grad():
        torch.testing.assert_close(compiled(call)(h), call(h), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gradient": "backprop"}, "cannot be traced by torch.compile"),
        ({"gradient": nt.gradients.Adjoint(method="rk4"), "step_size": 0.1, "method": "euler"}, "cannot be traced"),
        ({"gradient": nt.gradients.Adjoint(measure=lambda *_: 0.5)}, r"Adjoint\(measure=\) cannot be traced"),
    ],
)
def test_what_cannot_be_traced_says_what_to_do(options, message):
    layer = nt.NODE(Field(), **options).double()
    with pytest.raises(Exception, match=message):
        compiled(layer)(features(3, 2).requires_grad_())


def test_a_strategy_made_under_the_tracer():
    system, state = nt.systems.gnesterov(Field()).double(), (features(3, 2), features(3, 2, seed=2))

    def run(x, m):
        gradient = nt.gradients.Adjoint(rtol=1e-3)
        return nt.solve(system, (x, m), (1.0, 2.0), method="adaptive_heun", rtol=1e-2, gradient=gradient).final[0]

    found = []
    for call in (run, compiled(run)):
        x, m = (s.clone().requires_grad_() for s in state)
        found.append(torch.autograd.grad(call(x, m).square().sum(), [x, m, *system.parameters()]))
    assert largest_difference(list(found[1]), list(found[0])) <= 1e-10


@pytest.mark.skipif(BEFORE_2_13, reason="torch hands on another stand-in")
def test_a_system_made_under_the_tracer_is_refused():
    field = Field()

    def run(x, m):
        return nt.solve(nt.systems.Momentum(field), (x, m), (1.0, 2.0)).final[0]

    with pytest.raises(Exception, match="make it outside"):
        compiled(run)(features(3, 2), features(3, 2))


# --- export


@pytest.mark.parametrize("options", [TIGHT, TIGHT | {"t": (1.0, 1.3, 2.0)}, {"method": "rk4", "step_size": 0.3}])
@pytest.mark.parametrize("model", ["NODE", "GNesterovNODE"])
def test_an_exported_layer_runs_again_at_another_batch_size(model, options):
    layer = MODELS[model].layer(**options)
    batch = torch.export.Dim("batch", min=1, max=64)
    # Where gradients are on, too: what is exported is for inference all the same.
    program = torch.export.export(layer, (features(3, 2),), dynamic_shapes=({0: batch},))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    run = torch.export.load(file).module()
    for n in (3, 7):
        h = features(n, 2)
        torch.testing.assert_close(run(h), layer(h), rtol=1e-10, atol=1e-10)
