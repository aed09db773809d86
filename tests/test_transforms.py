"""Layers under torch.func transforms, in copies and under autocast: against the same without any of it."""

import copy
import dataclasses
import pickle
import subprocess
import sys

import pytest
import torch
from support import GATES, GRADIENTS, MODELS, Field, features
from torch import nn
from torch.autograd import forward_ad, gradgradcheck
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap

import nesterov_triton as nt
from nesterov_triton.ops import dispatch

FIXED = {"method": "rk4", "step_size": 0.4}
ADAPTIVE = {"method": "dopri5", "rtol": 1e-3, "atol": 1e-3}
OPTIONS = {"fixed": FIXED, "adaptive": ADAPTIVE}
SEVEN = ["NODE", "ANODE", "SONODE", "HBNODE", "GHBNODE", "NesterovNODE", "GNesterovNODE"]
TIMES = torch.tensor([1.0, 1.25, 1.62, 2.0], dtype=torch.float64)
SECOND = ["discrete", "adjoint"]


def make(name: str, options: dict = FIXED, gradient: str = "backprop", **more) -> nn.Module:
    model = MODELS[name]
    start = {} if model.rows == 1 else {"initial_velocity": nn.Linear(2, 2)}
    if start:
        nn.init.normal_(start["initial_velocity"].weight, generator=torch.Generator().manual_seed(5))
        nn.init.zeros_(start["initial_velocity"].bias)
    return model.layer(gradient=gradient, **start, **options, **more)


def state_of(layer: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in layer.named_parameters()}


def loss_of(layer: nn.Module):
    """The loss as a pure function of parameters, features and times."""

    def loss(params, h, t=TIMES):
        return (functional_call(layer, params, (h, t)) ** 2).sum()

    return loss


def by_autograd(layer: nn.Module, h: torch.Tensor, t: torch.Tensor = TIMES):
    """The same loss's gradients: of the parameters by name, of features and times."""
    h, t = h.clone().requires_grad_(), t.clone().requires_grad_()
    named = dict(layer.named_parameters())
    found = torch.autograd.grad((layer(h, t) ** 2).sum(), [*named.values(), h, t])
    return dict(zip(named, found, strict=False)), found[-2], found[-1]


def same(found, expected, **tolerance):
    torch.testing.assert_close(found, expected, **{"rtol": 1e-10, "atol": 1e-12, **tolerance})


# --- one gradient


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("name", MODELS)
def test_grad_and_vjp(name, options):
    layer, h = make(name, options), features(3, 2)
    of_params, of_h, of_t = by_autograd(layer, h)
    counts = layer.stats
    same(grad(loss_of(layer), (0, 1, 2))(state_of(layer), h, TIMES), (of_params, of_h, of_t))
    assert layer.stats == counts
    value, pullback = vjp(layer, h, TIMES)
    assert torch.equal(value, layer(h, TIMES))
    same(pullback(2 * value), (of_h, of_t))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_no_grad_around_grad_and_within_it(options):
    """Around it changes nothing; within it all is constant."""
    layer, h = make("GNesterovNODE", options), features(3, 2)
    params, loss = state_of(layer), loss_of(layer)
    expected = by_autograd(layer, h)[0]
    with torch.no_grad():
        same(grad(loss)(params, h), expected)

    def constant_but_for_h(h):
        with torch.no_grad():
            c = layer(h)
        return (c * h).sum()

    same(grad(constant_but_for_h)(h), layer(h).detach())


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("gate", ["callable", "hardtanh-inside"])
def test_gates_and_the_velocity(gate, options):
    """The velocity takes the gate's derivative, which for a callable is autograd's."""
    layer = nt.GNesterovNODE(Field(), GATES[gate][0], form="exact", gradient="backprop", **options).double()

    def loss(h, t):
        h1, v = layer(h, t, return_velocity=True)
        return (h1**2).sum() + (v * h1).sum()

    h, t = features(3, 2).requires_grad_(), TIMES.clone().requires_grad_()
    expected = torch.autograd.grad(loss(h, t), (h, t))
    same(grad(loss, (0, 1))(h.detach(), TIMES), expected)


# --- vmap


@pytest.mark.parametrize("name", MODELS)
def test_vmap_over_samples(name):
    layer, h = make(name), features(4, 3, 2)
    together = torch.stack([layer(x, TIMES) for x in h])
    same(vmap(layer, (0, None))(h, TIMES), together)
    same(vmap(layer, (1, None), out_dims=1)(h.movedim(0, 1).contiguous(), TIMES), together.movedim(0, 1))
    same(vmap(vmap(layer))(h[:, :, None]), layer(h.reshape(-1, 2)).reshape(4, 3, 1, -1))
    with torch.no_grad():
        same(vmap(layer, (0, None))(h, TIMES), together)
    assert layer.stats.nfe_forward > 0


@pytest.mark.parametrize("name", MODELS)
def test_gradients_for_each_sample(name):
    layer, h = make(name), features(3, 2, 2)
    each = [by_autograd(layer, x) for x in h]
    of_params = {k: torch.stack([e[0][k] for e in each]) for k in each[0][0]}
    arguments = state_of(layer), h, TIMES
    found = vmap(grad(loss_of(layer), (0, 1, 2)), (None, 0, None))(*arguments)
    same(found, (of_params, torch.stack([e[1] for e in each]), torch.stack([e[2] for e in each])))
    assert layer.stats.nfe_backward == layer.stats.nfe_forward


@pytest.mark.parametrize("name", MODELS)
def test_ensembles(name):
    """Every member with its own parameters, the damping and the residual among them, and its own gradient."""
    members = [make(name, seed=seed) for seed in range(3)]
    with torch.no_grad():
        for k, member in enumerate(members):
            for p in member.system.parameters(recurse=False):
                p.add_(0.3 * k)
    stacked = {k: v.detach() for k, v in stack_module_state(members)[0].items()}
    base, h = copy.deepcopy(members[0]), features(2, 2)
    each = [by_autograd(member, h)[0] for member in members]
    found = vmap(grad(loss_of(base)), (0, None))(stacked, h)
    same(found, {k: torch.stack([e[k] for e in each]) for k in each[0]})
    out = vmap(lambda p: functional_call(base, p, (h, TIMES)))(stacked)
    same(out, torch.stack([member(h, TIMES) for member in members]))


def test_autograd_through_vmap_counts_its_backward_pass():
    layer, h = make("GNesterovNODE"), features(3, 2, 2).requires_grad_()
    found = torch.autograd.grad((vmap(layer)(h) ** 2).sum(), [h, layer.field.a])
    assert layer.stats.nfe_backward == layer.stats.nfe_forward > 0
    expected = torch.autograd.grad(sum((layer(x) ** 2).sum() for x in h), [h, layer.field.a])
    same(found, expected)


def test_solve_with_a_closure_over_what_is_mapped():
    theta, y = features(4, 2, 2), features(3, 2, seed=2)

    def final(theta):
        return nt.solve(lambda t, y: torch.tanh(y @ theta), y, (0.0, 1.0), gradient="backprop", **FIXED).final

    same(vmap(final)(theta), torch.stack([final(x) for x in theta]))
    each = [grad(lambda x: final(x).sum())(x) for x in theta]
    same(vmap(grad(lambda x: final(x).sum()))(theta), torch.stack(each))


def test_what_cannot_be_read_is_not_checked_and_the_rest_is():
    layer, h = make("HBNODE"), features(3, 2, 2)
    h[1] = torch.nan
    out = vmap(layer)(h)
    assert torch.isnan(out[1]).all()
    same(out[::2], vmap(layer)(h[::2]))
    with pytest.raises(ValueError, match="h holds NaN or infinite values"):
        grad(lambda x: layer(x).sum())(h[1])
    with pytest.raises(ValueError, match="t must be strictly"):
        vmap(lambda x: layer(x, (1.0, 1.0)))(h[::2])
    bad = nt.NODE(lambda t, h: h / 0, gradient="backprop", **FIXED)
    with pytest.raises(nt.SolveError, match="became infinite or NaN"):
        grad(lambda x: bad(x).sum())(h[0])


@pytest.mark.parametrize("more", [{}, {"first_step": 0.1}], ids=["", "first step given"])
@pytest.mark.parametrize("over", ["features", "parameters"])
@pytest.mark.parametrize("name", ["NODE", "GNesterovNODE"])
def test_an_adaptive_method_under_vmap_says_what_to_do(name, over, more):
    layer, h = make(name, ADAPTIVE, **more), features(2, 2, 2)
    params = {k: torch.stack((p, p)) for k, p in state_of(layer).items()}
    attempt = {
        "features": lambda: vmap(layer)(h),
        "parameters": lambda: vmap(grad(loss_of(layer)), (0, None))(params, h[0]),
    }[over]
    with pytest.raises(RuntimeError, match=r"under torch\.func\.vmap.*fixed-step method.*without vmap"):
        attempt()


def test_times_for_each_sample_are_refused():
    layer, h = make("NODE"), features(2, 2, 2)
    for times in (lambda t: t, lambda t: [1.0, t[1]]):
        with pytest.raises(ValueError, match=r"t is batched by torch\.func\.vmap"):
            vmap(lambda h, t, times=times: layer(h, times(t)))(h, torch.stack((TIMES, TIMES)))


# --- derivatives of derivatives, and forward mode


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("name", SEVEN)
def test_second_derivatives(name, options):
    """By autograd twice against finite differences of the first ones; then by transforms against autograd."""
    steps = {"first_step": 0.3, "rtol": 0.0, "atol": 1e6} if options is ADAPTIVE else {}
    layer = make(name, {**options, **steps}, hidden=2)
    h, t = features(1, 2), TIMES[[0, 2, 3]]
    inputs = (h.requires_grad_(), t.clone().requires_grad_(), *layer.parameters())
    assert gradgradcheck(lambda h, t, *_: layer(h, t), inputs, atol=1e-4)

    def loss(h, t):
        return (layer(h, t) ** 3).sum()

    h = h.detach()
    expected = torch.autograd.functional.hessian(loss, (h, t))
    same(hessian(loss, (0, 1))(h, t), expected)
    same(jacrev(jacrev(loss, (0, 1)), (0, 1))(h, t), expected)
    # Level by level: the inner one knows nothing of the outer one's times.
    mixed = grad(lambda t: (grad(loss)(h, t) * h).sum())(t)
    same(mixed, torch.einsum("abt,ab->t", expected[0][1], h))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("name", MODELS)
def test_forward_mode(name, options):
    layer, h = make(name, options), features(2, 2)
    loss, params = loss_of(layer), state_of(layer)
    of_params, of_h, of_t = by_autograd(layer, h)
    directions = {k: torch.randn_like(p) for k, p in params.items()}, torch.randn_like(h), torch.randn_like(TIMES)
    expected = sum((of_params[k] * v).sum() for k, v in directions[0].items())
    expected = expected + (of_h * directions[1]).sum() + (of_t * directions[2]).sum()
    for mode in (torch.enable_grad, torch.no_grad):
        with mode():
            same(jvp(loss, (params, h, TIMES), directions)[1], expected)
            same(jacfwd(loss, 1)(params, h), of_h)
            with forward_ad.dual_level():
                dual = forward_ad.make_dual(h, directions[1])
                out = (layer(dual, TIMES) ** 2).sum()
                same(forward_ad.unpack_dual(out).tangent, (of_h * directions[1]).sum())


# --- the other gradients


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("gradient", SECOND)
@pytest.mark.parametrize("name", ["NODE", "GNesterovNODE"])
def test_transforms_of_the_other_gradients_say_what_to_do(name, gradient, trained):
    layer, h = make(name, FIXED, gradient).requires_grad_(trained), features(2, 2)
    loss, params = loss_of(layer), state_of(layer)
    stacked = {k: torch.stack((p, p)) for k, p in params.items()}

    def dual():
        with forward_ad.dual_level():
            layer(forward_ad.make_dual(h, h))

    for attempt in (
        lambda: grad(loss)(params, h),
        lambda: grad(lambda h: layer(h).sum())(h),
        lambda: grad(lambda t: layer(h, t).sum())(TIMES),
        lambda: vjp(layer, h),
        lambda: vmap(layer)(h[:, None]),
        lambda: vmap(lambda p: loss(p, h))(stacked),
        lambda: vmap(grad(loss), (None, 0))(params, h[:, None]),
        lambda: jvp(layer, (h,), (h,)),
        lambda: grad(lambda h: (grad(lambda g: (layer(h) * g).sum())(h)).sum())(h),
        dual,
    ):
        for mode in (torch.enable_grad, torch.no_grad):
            with mode(), pytest.raises(RuntimeError, match="use gradient='backprop'"):
                attempt()


@pytest.mark.parametrize("gradient", SECOND)
def test_batched_gradients_of_the_others_say_what_to_do(gradient):
    h, batch = features(2, 2).requires_grad_(), torch.eye(4, dtype=torch.float64).view(4, 2, 2)
    out = make("HBNODE")(h)
    each = torch.stack([torch.autograd.grad(out, h, g, retain_graph=True)[0] for g in batch])
    for strategy in ("backprop", gradient):
        out = make("HBNODE", FIXED, strategy)(h)
        for many in (
            lambda out=out: torch.autograd.grad(out, h, batch, is_grads_batched=True, retain_graph=True)[0],
            lambda out=out: vmap(lambda g: torch.autograd.grad(out, h, g, retain_graph=True)[0])(batch),
        ):
            if strategy == "backprop":
                same(many(), each)
            else:
                with pytest.raises(RuntimeError, match="use gradient='backprop'"):
                    many()


@pytest.mark.parametrize("gradient", SECOND)
def test_a_layer_whose_output_is_a_constant_of_the_transform_runs(gradient):
    """As a frozen teacher beside the network that is trained."""
    teacher, student, h = make("HBNODE", FIXED, gradient), make("HBNODE", seed=1), features(2, 2)

    def loss(params, target):
        with torch.no_grad():
            wanted = target()
        return ((functional_call(student, params, (h,)) - wanted) ** 2).sum()

    known = teacher(h).detach()
    params = state_of(student)
    same(grad(loss)(params, lambda: teacher(h)), grad(loss)(params, lambda: known))
    frozen = copy.deepcopy(teacher).requires_grad_(False)
    same(grad(lambda x: (x * frozen(h)).sum())(h), known)


# --- nothing stays behind

FIRST_USE = """
import torch
import nesterov_triton as nt

layer = nt.GNesterovNODE(lambda t, h: torch.tanh(t * h), gradient="backprop")
torch.func.grad(lambda h: layer(h, (1.0, 1.5, 2.0)).sum())(torch.ones(3, 2))
wrapped = torch._C._functorch.is_functorch_wrapped_tensor
from nesterov_triton.gates import constant
from nesterov_triton.stepping.dense_output import dense_output
from nesterov_triton.stepping.explicit_rk import table
method = layer.settings.tableau
found = [constant(0.4, torch.float32), dense_output(method)._polynomials, dense_output(method)._powers]
kept = table(method, torch.float32, torch.device("cpu"))
assert not any(map(wrapped, (*found, kept.flat, *kept.rows)))
"""


def test_constants_that_are_made_once_do_not_belong_to_a_transform():
    """In a process of its own, which has none yet."""
    subprocess.run([sys.executable, "-c", FIRST_USE], check=True, timeout=120)


# --- copies, and autocast


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("name", SEVEN)
def test_copies_of_a_used_layer(name, gradient):
    layer, h = make(name, ADAPTIVE, gradient), features(3, 2)
    (layer(h) ** 2).sum().backward()
    if gradient == "backprop":
        grad(loss_of(layer))(state_of(layer), h)
    by_state = make(name, ADAPTIVE, gradient, seed=7)
    by_state.load_state_dict(layer.state_dict())
    copies = copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))
    for twin in copies:
        assert twin.stats == layer.stats
        assert twin.stats is not layer.stats
    for twin in (*copies, by_state):
        assert twin.settings == layer.settings
        # By identity: that is how operators know a method.
        assert dispatch.method_name(twin.settings.tableau) == "dopri5"
        assert all(torch.equal(a, b) for a, b in zip(twin.parameters(), layer.parameters(), strict=True))
        ours, theirs = by_autograd(layer, h), by_autograd(twin, h)
        assert torch.equal(twin(h), layer(h))
        same(theirs, ours, rtol=0.0, atol=0.0)


def test_a_method_that_is_not_registered_is_copied_too():
    own = dataclasses.replace(nt.tableaus.get("bosh3"), name="mine")
    for twin in (copy.deepcopy(own), pickle.loads(pickle.dumps(own))):
        assert twin == own
        assert twin is not own


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("name", SEVEN)
def test_autocast(name, gradient):
    """A field in bfloat16, a state in float32: near the same in float32, and the three gradients near each other."""
    layer = make(name, FIXED, gradient).float()
    h = features(3, 2).float()
    reference, expected = layer(h).detach(), by_autograd(layer, h)
    seen = []

    class Linear(nn.Linear):
        def forward(self, h):
            out = super().forward(h)
            seen.append(out.dtype)
            return out

    if layer.system.rows == 2:
        layer.initial_velocity.__class__ = Linear
    inner = layer.field.forward
    layer.field.forward = lambda t, *f: seen.append(u := inner(t, *f)) or u
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(h)
        found = by_autograd(layer, h)
    seen = [x if isinstance(x, torch.dtype) else x.dtype for x in seen]
    assert set(seen) == {torch.bfloat16}
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, reference, rtol=0.05, atol=0.05)
    for a, b in zip(found[0].values(), expected[0].values(), strict=True):
        assert a.dtype == torch.float32
        assert (a - b).norm() <= 0.1 * (b.norm() + 1)
    torch.testing.assert_close(found[1], expected[1], rtol=0.1, atol=0.3)


def test_autocast_within_transforms():
    layer, h = make("HBNODE").float(), features(3, 2, 2).float()
    loss, params = loss_of(layer), state_of(layer)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = vmap(grad(loss), (None, 0))(params, h)
        each = [by_autograd(layer, x)[0] for x in h]
    for k in params:
        torch.testing.assert_close(found[k], torch.stack([e[k] for e in each]), rtol=0.02, atol=0.05)
