"""What is no field, or not yet: said in words that name the fix, where the layer is built or first called."""

import copy
import functools
import pickle

import pytest
import torch
from torch import nn

import nesterov_triton as nt

LAYERS = [nt.NODE, functools.partial(nt.ANODE, augment=1), nt.HBNODE, nt.GHBNODE, nt.NesterovNODE, nt.GNesterovNODE]


class Timed(nn.Sequential):
    def forward(self, t, h):
        return super().forward(h)


def mlp(width=3):
    return Timed(nn.Linear(width, 4), nn.Tanh(), nn.Linear(4, width))


def of_h(h):
    return -h


def of_all(t, h, m):
    return -h


class Called:
    def __call__(self, h):
        return -h


# -- arguments ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "name", "takes", "wrapper"),
    [
        (nn.Linear(3, 3), "Linear", "input", "self[0](h)"),
        (nn.Sequential(nn.Linear(3, 3)), "Sequential", "input", "self[0](h)"),
        (torch.compile(nn.Linear(3, 3)), "Linear", "input", "self[0](h)"),
        (nn.DataParallel(nn.Linear(3, 3)), "Linear", "input", "self[0](h)"),
        (lambda h: -h, "<lambda>", "h", "lambda t, h: f(h)"),
        (of_h, "of_h", "h", "lambda t, h: of_h(h)"),
        (torch.compile(of_h), "of_h", "h", "lambda t, h: of_h(h)"),
        (functools.partial(of_h), "partial", "h", "lambda t, h: f(h)"),
        (nn.Linear(3, 3).forward, "forward", "input", "lambda t, h: forward(h)"),
        (Called(), "Called", "h", "lambda t, h: f(h)"),
        (of_all, "of_all", "t, h, m", "SONODE"),
        (lambda: 0, "<lambda>", "", "f(t, h)"),
        (lambda t, h, *, theta: h, "<lambda>", "t, h, theta", "partial"),
    ],
    ids=range(13),
)
def test_a_callable_that_takes_something_else_is_refused_where_it_is_given(field, name, takes, wrapper):
    for make in (*LAYERS, lambda f: nt.solve(f, torch.ones(2, 3), (0.0, 1.0))):
        with pytest.raises(TypeError) as refused:
            make(field)
        message = str(refused.value)
        assert message.startswith(f"field {name} is called as f(t, h) and takes ({takes})"), message
        assert wrapper in message
        assert "\n" not in message


def test_what_sonode_calls():
    for field, shown in ((nn.Linear(3, 3), "self, t, h, m"), (lambda t, h: h, "lambda t, h, m: f(t, h)")):
        with pytest.raises(TypeError, match=r"is called as f\(t, h, m\)") as refused:
            nt.SONODE(field)
        assert shown in str(refused.value)


def test_the_wrappers_that_are_shown_work():
    net, f = nn.Linear(3, 3), of_h
    with pytest.raises(TypeError) as refused:
        nt.NODE(net)
    text = str(refused.value)
    names = {"nn": nn}
    exec(text[text.index("class Field") : text.index("; then")], names)
    nt.NODE(names["Field"](net))(torch.ones(2, 3)).sum().backward()
    assert net.weight.grad is not None
    with pytest.raises(TypeError) as refused:
        nt.NODE(of_h)
    text = str(refused.value)
    nt.NODE(eval(text[text.index("lambda") :], {"of_h": f}))(torch.ones(2, 3))


class Hooked(nn.Linear):
    """A module whose hook drops the time."""

    def __init__(self):
        super().__init__(3, 3)
        self.register_forward_pre_hook(lambda module, given: given[1:])


def without_time(f):
    """A decorator that keeps the signature of what it wraps, as functools.wraps does."""

    @functools.wraps(f)
    def wrapper(t, h):
        return f(h)

    return wrapper


class Traced(nn.Module):
    def forward(self, t, h):
        return torch.tanh(h) * t


@pytest.mark.parametrize(
    "field",
    [
        mlp(),
        torch.compile(mlp(), backend="eager"),
        torch.compile(lambda t, h: -h, backend="eager"),
        nn.DataParallel(mlp()),
        lambda *given: -given[1],
        lambda t, h, scale=2.0: -scale * h,
        functools.partial(lambda scale, t, h: -scale * h, 2.0),
        functools.partial(lambda t, h, scale: -scale * h, scale=2.0),
        mlp().forward,
        Hooked(),
        without_time(of_h),
        torch.jit.trace(Traced(), (torch.tensor(1.0), torch.ones(2, 3))),
        torch.jit.script(Traced()),
        torch.fx.symbolic_trace(Traced()),
        torch.add,
        copy.deepcopy(mlp()),
        pickle.loads(pickle.dumps(Traced())),
    ],
    ids=range(17),
)
def test_what_is_a_field(field):
    for layer in (nt.NODE(field), nt.HBNODE(field)):
        assert layer(torch.ones(2, 3)).shape == (2, 3)


def test_arguments_that_only_a_call_tells_of():
    """Without a signature the first evaluation says it; an error inside of the field is left as it is."""
    with pytest.raises(TypeError, match=r"field tanh is called as f\(t, h\)"):
        nt.NODE(torch.tanh)(torch.ones(2, 3))

    def inside(t, h):
        return of_h(t, h)

    with pytest.raises(TypeError, match=r"of_h\(\) takes 1 positional argument"):
        nt.NODE(inside)(torch.ones(2, 3))


def test_an_adapter_from_hooks_that_fails_is_told_at_the_call():
    module = nn.Linear(3, 3)
    module.register_forward_pre_hook(lambda module, given: given)
    with pytest.raises(TypeError, match=r"field Linear is called as f\(t, h\)"):
        nt.NODE(module)(torch.ones(2, 3))


# -- classes -----------------------------------------------------------------------------------------------------------


def test_classes_where_instances_are_wanted():
    for make in (*LAYERS, nt.SONODE):
        with pytest.raises(TypeError, match=r"field .*class Linear.*pass an instance"):
            make(nn.Linear)
    with pytest.raises(TypeError, match=r"system .*class FirstOrder.*pass an instance"):
        nt.solve(nt.systems.FirstOrder, torch.ones(2, 3), (0.0, 1.0))
    for gate in (nn.Tanh, nt.gates.Softclip):
        for make in (nt.GHBNODE, nt.GNesterovNODE):
            with pytest.raises(TypeError, match=rf"gate .*class {gate.__name__}.*pass an instance"):
                make(mlp(), gate=gate)
    with pytest.raises(TypeError, match=r"initial_velocity .*class Linear.*pass an instance"):
        nt.HBNODE(mlp(), initial_velocity=nn.Linear)


def test_a_gate_with_parameters():
    """It is applied to k(t), too, which is float64: torch's message is about types."""
    h = torch.ones(2, 3, requires_grad=True)
    for make in (nt.GHBNODE, nt.GNesterovNODE):
        with pytest.raises(RuntimeError, match="the gate uses 1 tensor"):
            make(mlp(), gate=nn.PReLU())(h).sum().backward()


# -- dtypes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", LAYERS)
@pytest.mark.parametrize("gradient", ["discrete", "adjoint", "backprop"])
def test_a_state_and_parameters_of_two_dtypes(make, gradient):
    width = 3 + isinstance(make, functools.partial)
    for h in (torch.ones(2, 3, dtype=torch.float64), torch.ones(2, 3, dtype=torch.bfloat16)):
        for x in (h, h.clone().requires_grad_()):
            with pytest.raises(
                ValueError, match=rf"h, the state, is {h.dtype} and .*\.float32; .*h\.to\(torch\.float32"
            ):
                make(mlp(width), gradient=gradient)(x)
    with pytest.raises(ValueError, match=r"is torch\.float64 and .* torch\.float32"):
        nt.solve(mlp(), torch.ones(2, 3).double(), (0.0, 1.0))


class Half(nn.Module):
    """Weights of another dtype than the states, which the field itself casts."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(3, 3).bfloat16()

    def forward(self, t, h):
        return self.net(h.bfloat16()).to(h.dtype)


class Scale(nn.Module):
    """Another dtype that torch promotes."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, t, h):
        return -self.scale * h


def test_fields_of_another_dtype_that_know_what_they_do():
    for field, h in ((Half(), torch.ones(2, 3)), (Scale(), torch.ones(2, 3).double())):
        nt.NODE(field)(h.requires_grad_()).sum().backward()
        assert all(p.grad is not None for p in field.parameters())
    mixed = Timed(nn.Linear(3, 3), nn.Linear(3, 3).double())
    with pytest.raises(RuntimeError, match="dtype"):  # torch's own: whose mistake it is cannot be told
        nt.NODE(mixed)(torch.ones(2, 3).double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        nt.NODE(mlp())(torch.ones(2, 3))


# -- lazy parameters ---------------------------------------------------------------------------------------------------


def test_lazy_parameters_must_exist_before_gradients_are_wanted():
    field = Timed(nn.LazyLinear(4), nn.Tanh(), nn.LazyLinear(3))
    layer = nt.GNesterovNODE(field)
    with pytest.raises(ValueError, match=r"lazy.*0\.weight.*torch\.no_grad"):
        layer(torch.ones(2, 3))
    with torch.no_grad():
        layer(torch.ones(2, 3))  # the dry run
    layer(torch.ones(2, 3)).sum().backward()
    assert all(p.grad is not None for p in field.parameters())
