"""Whole solves and their gradients on the kernels' path against plain torch: the same steps, the same values.

On a CUDA device the kernels run as they do for a user. On a CPU they run under triton's interpreter, and, in most
tests, their torch references do: the path is the same, and each kernel is held to its reference elsewhere.
"""

import itertools

import pytest
import torch
from support import MODELS, Field, features, gradients, options_for
from torch.utils._python_dispatch import _disable_current_modes

import nesterov_triton as nt
from benchmarks.counters import LaunchCount, MarkedField, OperatorCount
from nesterov_triton.network import Evaluation
from nesterov_triton.ops import dispatch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TIMES = {"two": (1.0, 2.0), "many": (1.0, 1.1, 1.15, 1.6, 2.0), "backward": (2.0, 1.4, 1.0)}


def run(layer, h, times=(1.0, 2.0)):
    """Output, gradients and counts of one call."""
    h = h.to(DEVICE).requires_grad_()
    out = layer(h, times)
    grads = gradients(layer, (out**2).sum() + out[-1:].sum(), h)
    s = layer.stats
    return out.detach(), grads, (s.nfe_forward, s.nfe_backward, s.accepted, s.rejected), (s.path, s.path_backward)


def both(take, path, make, h, times=(1.0, 2.0)):
    """The same call down plain torch and down `path`."""
    results = []
    for way in ("torch", path):
        take(way)
        torch.manual_seed(0)
        results.append(run(make().to(DEVICE), h, times))
    return results


def agree(plain, fused, eps=2e-13):
    """Values and gradients to a few units in the last place of the largest, and every count."""
    out, grads, counts, paths = plain
    assert paths == ("torch: the state is on the CPU",) * 2 or DEVICE == "cuda"
    assert fused[3] == ("kernels", "kernels")
    assert fused[2] == counts
    for a, b in zip([fused[0], *fused[1]], [out, *grads], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=eps * max(1.0, b.abs().max().item()))


METHODS = [*itertools.product(["dopri5"], TIMES), ("dopri8", "many"), ("bosh3", "backward"), ("tsit5", "two"),
           ("adaptive_heun", "two"), ("rk4", "many"), ("euler", "two"), ("midpoint", "many")]  # fmt: skip


@pytest.mark.parametrize("gradient", ["discrete", "adjoint"])
@pytest.mark.parametrize(("method", "times"), METHODS)
@pytest.mark.parametrize("model", list(MODELS))
def test_a_solve_by_the_references_is_plain_torchs(take, model, method, times, gradient):
    """On steps that do not depend on the error's last digits, to rounding."""
    make = lambda: MODELS[model].layer(hidden=5, gradient=gradient, **options_for(method))  # noqa: E731
    agree(*both(take, "references", make, features(3, 2), TIMES[times]))


@pytest.mark.parametrize("gradient", ["discrete", "adjoint"])
@pytest.mark.parametrize("method", ["dopri5", "dopri8", "bosh3"])
@pytest.mark.parametrize("model", list(MODELS))
def test_the_same_steps_are_accepted(take, model, method, gradient):
    make = lambda: MODELS[model].layer(method=method, gradient=gradient, rtol=1e-6, atol=1e-6)  # noqa: E731
    agree(*both(take, "references", make, 2 * features(3, 2), TIMES["many"]), 1e-9)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("gradient", ["discrete", "adjoint"])
@pytest.mark.parametrize("model", list(MODELS))
def test_a_solve_by_the_kernels_is_plain_torchs(take, model, gradient):
    make = lambda: MODELS[model].layer(hidden=5, gradient=gradient, **options_for("dopri5"))  # noqa: E731
    agree(*both(take, "kernels", make, features(3, 2), TIMES["many"]))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("gate", ["identity", "tanh", "hardtanh", nt.gates.Softclip(0.7)])
@pytest.mark.parametrize("method", ["dopri8", "rk4"])
def test_gates_and_methods_by_the_kernels(take, gate, method):
    make = lambda: nt.GNesterovNODE(Field(), gate=gate, **options_for(method)).double()  # noqa: E731
    agree(*both(take, "kernels", make, features(3, 2), (1.0, 1.3, 2.0)))


@pytest.mark.usefixtures("poisoned")
def test_float32_takes_the_same_steps(take):
    """Where the error is well above rounding: below, a first step that is far too short grows as rounding has it."""
    options = {"rtol": 1e-3, "atol": 1e-3, "first_step": 0.3}
    make = lambda: MODELS["GNesterovNODE"].layer(hidden=5, **options).float()  # noqa: E731
    agree(*both(take, "kernels", make, 3 * features(3, 2, dtype=torch.float32)), 1e-5)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("model", ["NODE", "GNesterovNODE"])
def test_half_precision_is_as_close_as_its_digits_allow(take, model, dtype):
    """The field rounds its output, the solver what it stores; a solve is a few such roundings off."""
    h = features(3, 2).to(dtype)
    take("torch")
    exact = MODELS[model].layer(rtol=1e-8, atol=1e-8)
    truth = exact(h.double())
    take("kernels")
    layer = MODELS[model].layer(method="rk4", step_size=0.25).to(DEVICE, dtype)
    out = layer(h.to(DEVICE).requires_grad_())
    assert layer.stats.path == "kernels"
    torch.testing.assert_close(
        out.double().cpu(), truth, rtol=0, atol=24 * torch.finfo(dtype).eps * truth.abs().max().item()
    )
    out.sum().backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in layer.parameters() if p.grad is not None)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("shape", [(0, 2), (1, 2), (2, 3, 2)])
def test_any_shape(take, shape):
    make = lambda: MODELS["GNesterovNODE"].layer(rtol=1e-3, atol=1e-3)  # noqa: E731
    plain, fused = both(take, "kernels", make, features(*shape))
    assert fused[0].shape == shape
    torch.testing.assert_close(fused[0], plain[0], rtol=1e-12, atol=1e-12)


def test_an_input_that_is_not_contiguous(take):
    make = lambda: MODELS["GNesterovNODE"].layer(rtol=1e-3, atol=1e-3)  # noqa: E731
    agree(*both(take, "references", make, features(2, 3).t()))


class Strided(torch.nn.Module):
    """An output with holes, in memory order of its own."""

    def forward(self, t, h):
        return torch.stack((torch.sin(h * t), h), dim=-1)[..., 0].t().contiguous().t()


@pytest.mark.parametrize("gradient", ["discrete", "adjoint"])
@pytest.mark.parametrize("layer", [nt.NODE, nt.NesterovNODE])
def test_an_output_that_is_not_contiguous(take, layer, gradient):
    agree(*both(take, "references", lambda: layer(Strided(), gradient=gradient), features(3, 2)))


class Reusing(torch.nn.Module):
    """A field whose output always lies in the same memory, as that of a captured graph does."""

    def __init__(self, field):
        super().__init__()
        self.field, self.memory = field, torch.zeros(3, 2, dtype=torch.float64, device=DEVICE)

    def forward(self, t, *features):
        return _Into.apply(self.field(t, *features), self.memory)


class _Into(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, memory):
        ctx.set_materialize_grads(False)
        return memory.detach().copy_(x)

    @staticmethod
    def backward(ctx, g):
        return g, None


@pytest.mark.parametrize("gradient", ["discrete", "adjoint"])
@pytest.mark.parametrize("options", [{}, {"first_step": 0.1}, {"method": "rk4", "step_size": 0.3}])
@pytest.mark.parametrize("kind", [nt.NODE, nt.SONODE, nt.GNesterovNODE])
def test_a_field_that_uses_its_memory_again(take, kind, options, gradient):
    """Held outputs are compared by address; once one is overwritten the step is taken again, on copies."""
    field = Field(sees_momentum=kind is nt.SONODE)
    take("torch")
    plain = run(kind(field, gradient=gradient, **options).double().to(DEVICE), features(3, 2))
    take("references")
    fused = run(kind(Reusing(field), gradient=gradient, **options).double().to(DEVICE), features(3, 2))
    for a, b in zip([fused[0], *fused[1]], [plain[0], *plain[1]], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert fused[2][2:] == plain[2][2:]


class Graphed(torch.nn.Module):
    """A field of which nothing has memory of its own: output, what its graph keeps, and every gradient lie where those
    of the call before did, as in a captured graph."""

    def __init__(self, field):
        super().__init__()
        self.field, self.memory = field, {}

    def forward(self, t, *features):
        return _Graphed.apply(self, t, len(features), *features, *self.field.parameters())

    def into(self, name, x):
        return self.memory.setdefault(name, torch.empty_like(x)).copy_(x)


class _Graphed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, module, t, n, *inputs):
        ctx.module, ctx.n, ctx.t = module, n, t
        kept = [module.into(f"kept {k}", x) for k, x in enumerate(inputs[:n])]
        return module.into("output", module.field(t, *kept)).detach()

    @staticmethod
    def backward(ctx, g):
        module = ctx.module
        with torch.enable_grad():
            kept = [module.memory[f"kept {k}"].detach().requires_grad_() for k in range(ctx.n)]
            inputs = (*kept, *module.field.parameters())
            found = torch.autograd.grad(module.field(ctx.t, *kept), inputs, g)
        return (None, None, None, *(module.into(f"gradient {k}", x).detach() for k, x in enumerate(found)))


@pytest.mark.parametrize("gradient", ["discrete", "adjoint"])
@pytest.mark.parametrize("kind", [nt.NODE, nt.SONODE, nt.GNesterovNODE])
def test_a_field_whose_gradients_lie_in_the_same_memory(take, kind, gradient):
    field = Field(sees_momentum=kind is nt.SONODE)
    options = {"gradient": gradient, "rtol": 1e-5, "atol": 1e-5}
    take("torch")
    plain = run(kind(field, **options).double().to(DEVICE), features(3, 2))
    take("references")
    fused = run(kind(Graphed(field), **options).double().to(DEVICE), features(3, 2))
    for a, b in zip([fused[0], *fused[1]], [plain[0], *plain[1]], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_what_torch_says_of_an_output_of_its_graphs_is_understood(take):
    """Its pointer cannot be asked for once it is gone; the step is taken again on copies."""
    calls = itertools.count()

    def field(t, h):
        if next(calls) == 4:
            raise RuntimeError("Error: accessing tensor output of CUDAGraphs that has been overwritten by a run.")
        return torch.sin(h)

    take("references")
    h = features(3, 2).to(DEVICE)
    torch.testing.assert_close(nt.HBNODE(field)(h), nt.HBNODE(lambda t, h: torch.sin(h))(h))


class Partial(torch.nn.Module):
    """Depends on less than everything: on nothing, on the time alone, on m alone."""

    def __init__(self, on):
        super().__init__()
        self.on, self.weight = on, torch.nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

    def forward(self, t, h, m=None):
        of = {"nothing": torch.ones_like(h), "time": torch.sin(t) * torch.ones_like(h), "weight": self.weight + 0 * t}
        return torch.sin(m) if self.on == "momentum" else of[self.on].expand(h.shape)


@pytest.mark.parametrize("gradient", ["discrete", "adjoint"])
@pytest.mark.parametrize(
    ("kind", "on"),
    [*itertools.product([nt.NODE, nt.GNesterovNODE], ["nothing", "time", "weight"]), (nt.SONODE, "momentum")],
)
def test_a_field_that_does_not_depend_on_everything(take, kind, on, gradient):
    agree(*both(take, "references", lambda: kind(Partial(on), gradient=gradient).double(), features(3, 2)))


# --- which path, and why


def test_a_cpu_takes_plain_torch_and_says_so():
    layer = nt.GNesterovNODE(Field()).double()
    layer(features(3, 2))
    assert layer.stats.path == "torch: the state is on the CPU"
    assert layer.stats.path_backward == ""
    assert nt.kernels.path(layer.system, "cpu") == (False, "the state is on the CPU")


def test_what_the_kernels_do_not_know_takes_plain_torch_and_says_why(take):
    take("references")
    h = features(3, 2).to(DEVICE).requires_grad_()

    def paths(t=(1.0, 2.0), **options):
        layer = nt.GNesterovNODE(Field(), **options).double().to(DEVICE)
        layer(h, t).sum().backward()
        return layer.stats.path, layer.stats.path_backward

    assert paths() == ("kernels", "kernels")
    assert paths(gate=torch.sin) == ("torch: gate_x=sin has no Triton form",) * 2
    assert paths(rtol=torch.full((3, 2), 1e-4)) == ("torch: the tolerance differs from element to element",) * 2
    assert paths(rtol=torch.tensor(1e-4)) == ("kernels", "kernels")
    assert paths(gradient="backprop") == ("torch: gradient='backprop' records every operation", "")
    t = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    assert paths(t) == ("kernels", "torch: gradients with respect to times are wanted")
    assert paths(t, gradient="adjoint") == ("kernels", "kernels")
    in_norm = nt.gradients.Adjoint(quadratures_in_norm=True)
    assert paths(gradient=in_norm) == ("kernels", "torch: the parameters' quadratures are to be in the norm")


@pytest.fixture
def asked_anew():
    """What a device can do is found out once."""
    dispatch.why_not.cache_clear()
    yield
    dispatch.why_not.cache_clear()


def test_path_says_beforehand_what_a_solve_will_take(monkeypatch, asked_anew):
    system = nt.systems.gnesterov(Field(), gate=torch.sin)
    monkeypatch.setattr(dispatch, "has_triton", lambda: True)
    assert str(nt.kernels.path(system, "cuda")) == "torch: gate_x=sin has no Triton form"
    assert str(nt.kernels.path(nt.systems.heavy_ball(Field()), "cuda:0", 1e-3)) == "kernels"
    assert nt.kernels.path(nt.systems.heavy_ball(Field()), "cuda", torch.ones(2)).kernels is False
    dispatch.why_not.cache_clear()
    monkeypatch.setattr(dispatch, "has_triton", lambda: False)
    assert str(nt.kernels.path(system, "cuda")) == "torch: triton is not installed"


def test_kernels_can_be_switched_off_and_need_a_gpu_that_they_are_checked_for(monkeypatch, asked_anew):
    system = nt.systems.heavy_ball(Field())
    monkeypatch.setattr(dispatch, "has_triton", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "compute capability 7.5" in nt.kernels.path(system, "cuda").reason
    dispatch.why_not.cache_clear()
    monkeypatch.setenv("NESTEROV_TRITON_KERNELS", "0")
    assert str(nt.kernels.path(system, "cuda")) == "torch: NESTEROV_TRITON_KERNELS=0"


def test_whether_kernels_can_run_here_at_all():
    said = nt.kernels.available()
    assert said.startswith("yes: triton " if DEVICE == "cuda" else "no: ")


# --- failures on this path


@pytest.mark.parametrize("kind", [nt.NODE, nt.GNesterovNODE])
@pytest.mark.parametrize("options", [{}, {"first_step": 0.5}, {"method": "rk4", "step_size": 0.25}])
def test_a_field_that_is_not_finite_is_seen(take, kind, options):
    take("references")
    layer = kind(lambda t, h: torch.where(t < 1.5, h, torch.nan), **options)
    with pytest.raises(nt.SolveError, match="NaN") as raised:
        layer(features(3, 2).to(DEVICE), (1.0, 2.0))
    assert raised.value.status is nt.Status.NON_FINITE
    assert 1.0 <= raised.value.t <= 1.5


def test_a_method_of_two_stages_keeps_its_first_slope(take):
    """Both outputs go into the step's end: for another try, and to see what was not finite."""
    take("references")
    h = features(3, 2).to(DEVICE)
    layer = nt.GNesterovNODE(lambda t, h: torch.sin(9 * h), method="adaptive_heun", first_step=0.9)
    layer(h)
    s = layer.stats
    assert s.rejected
    assert s.nfe_forward == 2 * s.accepted + s.rejected
    layer = nt.HBNODE(lambda t, h: torch.where(t < 1.5, h, torch.nan), method="adaptive_heun", first_step=0.2)
    with pytest.raises(nt.SolveError, match="NaN"):
        layer(h)


@pytest.mark.parametrize("y", [torch.randn(5, 3)[:, :1], torch.randn(10)[::2], torch.ones(1).expand(5)])
def test_a_first_order_state_that_is_not_contiguous(take, y):
    take("references")
    y = y.to(DEVICE)
    out = nt.solve(lambda t, y: -y, y, (0.0, 1.0), rtol=1e-6, atol=1e-6).final
    torch.testing.assert_close(out, y * torch.tensor(-1.0).exp().item(), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("path", ["references", "kernels"])
def test_a_state_that_outgrows_half_precision_is_no_success(take, path):
    take(path)
    y = torch.tensor([60000.0, 1.0], dtype=torch.float16, device=DEVICE)
    solution = nt.solve(lambda t, y: 30000.0 + 0 * y.tanh(), y, (0.0, 1.0), rtol=1e-2, atol=1e-2, throw=False)
    assert solution.status is nt.Status.NON_FINITE


def test_an_exception_of_the_field_goes_through_and_leaves_the_layer_usable(take):
    take("references")
    calls = itertools.count()

    def field(t, h):
        if next(calls) == 5:
            raise KeyError("mine")
        return torch.sin(h)

    layer, h = nt.GNesterovNODE(field), features(3, 2).to(DEVICE)
    with pytest.raises(KeyError, match="mine"):
        layer(h)
    again = layer(h)
    take("torch")
    torch.testing.assert_close(layer(h), again, rtol=1e-12, atol=1e-12)


def test_tensors_that_would_get_no_gradient_are_refused(take):
    take("references")
    w = torch.ones(2, dtype=torch.float64, device=DEVICE, requires_grad=True)
    for gradient, kind in itertools.product(["discrete", "adjoint"], [nt.NODE, nt.GNesterovNODE]):
        h = features(3, 2).to(DEVICE).requires_grad_()
        out = kind(lambda t, h: w * h, gradient=gradient)(h)
        with pytest.raises(RuntimeError, match="would get no gradient"):
            out.sum().backward()


# --- launches

TRANSFERS = int(DEVICE == "cuda")  # of a step's numbers to the device


def launches_of(take, kind, first_step, gradient):
    """Steps and launches of a forward and a backward pass: the package's kernels, torch's operators beside the field,
    host reads. The packet of a step's scalars is made on the host, and moved without a launch."""
    take("kernels")
    field = MarkedField(Field(sees_momentum=kind is nt.SONODE))
    steps = Steps()
    settings = options_for("dopri5") | {"first_step": first_step, "gradient": gradient, "controller": steps}
    layer = kind(field, **settings).double().to(DEVICE)
    h = features(3, 2).to(DEVICE).requires_grad_()
    outputs: list[torch.Tensor] = []
    counts = []
    for call in (lambda: outputs.append(layer(h)), lambda: outputs[0].sum().backward()):
        steps.taken = 0
        with LaunchCount() as kernels, OperatorCount(field) as operators:
            call()
        operators.solver.pop("aten.lift_fresh.default")
        print(operators.solver)
        counts.append((steps.taken, kernels.total, sum(operators.solver.values()), operators.host_reads))
    return counts


class Steps(nt.controllers.Integral):
    """Counts what it is asked."""

    def __init__(self):
        super().__init__(max_factor=1.3)
        object.__setattr__(self, "taken", 0)

    def factor(self, *args):
        object.__setattr__(self, "taken", self.taken + 1)
        return super().factor(*args)


@pytest.mark.usefixtures("runs_kernels")
@pytest.mark.parametrize(("kind", "limit"), [(nt.NODE, 8), (nt.SONODE, 8), (nt.HBNODE, 5), (nt.GNesterovNODE, 5)])
def test_launches_of_a_forward_step(take, kind, limit):
    """Beside the field's own; differences of two solves leave out what is done once."""
    (steps, *more), (fewer, *less) = (launches_of(take, kind, first, "discrete")[0] for first in (0.04, 0.17))
    assert steps > fewer + 1
    ours, theirs, reads = ((a - b) / (steps - fewer) for a, b in zip(more, less, strict=True))
    print(f"{kind.__name__}: {ours} kernels, {theirs} other operators, {reads} host reads a step")
    assert (ours, theirs, reads) == (limit, TRANSFERS, 1)


@pytest.fixture
def pullbacks_aside(monkeypatch):
    """The field's vector-Jacobian products are not counted."""
    pullback = Evaluation.pullback

    def aside(self, *args):
        with _disable_current_modes():
            return pullback(self, *args)

    monkeypatch.setattr(Evaluation, "pullback", aside)


@pytest.mark.usefixtures("runs_kernels", "pullbacks_aside")
@pytest.mark.parametrize(("kind", "limit"), [(nt.NODE, 16), (nt.SONODE, 16), (nt.HBNODE, 14), (nt.GNesterovNODE, 14)])
def test_launches_of_an_adjoint_step(take, kind, limit):
    """The sums of the parameters' cotangents included, most of what torch does here."""
    (steps, *more), (fewer, *less) = (launches_of(take, kind, first, "adjoint")[1] for first in (0.04, 0.17))
    assert steps > fewer + 1
    ours, theirs, reads = ((a - b) / (steps - fewer) for a, b in zip(more, less, strict=True))
    print(f"{kind.__name__}: {ours} kernels, {theirs} other operators, {reads} host reads a step")
    assert ours + theirs <= limit + TRANSFERS
    assert reads == 1


@pytest.mark.usefixtures("runs_kernels", "pullbacks_aside")
@pytest.mark.parametrize(("kind", "launches"), [(nt.NODE, 12), (nt.NesterovNODE, 7), (nt.GNesterovNODE, 8)])
def test_launches_of_a_reverse_step(take, kind, launches):
    """One more where ξ or γ is learned, for the end of the sums. Torch adds to the parameters' sums, stage by stage."""
    found = [launches_of(take, kind, first, "discrete") for first in (0.04, 0.17)]
    steps, fewer = (forward[0] for forward, _ in found)
    (_, *more), (_, *less) = (backward for _, backward in found)
    ours, theirs, reads = ((a - b) / (steps - fewer) for a, b in zip(more, less, strict=True))
    print(f"{kind.__name__}: {ours} kernels, {theirs} other operators, {reads} host reads a step")
    assert (ours, reads) == (launches, 0)
    assert theirs <= 8
