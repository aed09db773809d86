"""Bad input: each an error that names the argument and the fix, before the field is called once."""

import math

import numpy as np
import pytest
import torch
from support import Recorder, features
from torch import nn

import nesterov_triton as nt
from nesterov_triton import systems


def field():
    return Recorder(lambda t, h: -h)


def raises(error, match):
    return pytest.raises(error, match=match)


LAYERS = {
    "NODE": nt.NODE,
    "ANODE": lambda f, **o: nt.ANODE(f, augment=1, **o),
    "HBNODE": nt.HBNODE,
    "GHBNODE": nt.GHBNODE,
    "NesterovNODE": nt.NesterovNODE,
    "GNesterovNODE": nt.GNesterovNODE,
}
BAD_TIMES = [
    ([1.0], "at least two"),
    ([], "at least two"),
    ([1.0, 1.0], "strictly increasing or.*nothing to solve.*without a call"),
    ([1.0, 1.0, 2.0], "strictly increasing or.*drop repetitions"),
    ([1.0, 3.0, 2.0], "strictly increasing or"),
    ([2.0, 1.0, 1.5], "strictly increasing or"),
    ([1.0, math.nan], "NaN"),
    ([1.0, math.inf], "infinite"),
    (torch.tensor([[1.0, 2.0]]), "one-dimensional"),
    (torch.tensor(1.0), "one-dimensional"),
    (torch.tensor([1.0, math.nan]), "NaN"),
    (np.array([2.0, 2.0]), "strictly"),
]
WRONG_TYPE_TIMES = [2.0, None, "soon", [1.0, None], [1.0, "2.x"], torch.tensor([1j, 2j]), torch.tensor([True, False])]


@pytest.mark.parametrize(("times", "match"), BAD_TIMES)
def test_bad_times(times, match):
    f = field()
    with raises(ValueError, rf"\bt\b.*{match}"):
        nt.solve(f, features(2, 2), times)
    for make in LAYERS.values():
        with raises(ValueError, rf"\bt\b.*{match}"):
            make(f, t=times)
        with raises(ValueError, rf"\bt\b.*{match}"):
            make(f)(features(2, 2), t=times)
    assert f.calls == 0


@pytest.mark.parametrize("times", WRONG_TYPE_TIMES, ids=str)
def test_times_of_a_wrong_type(times):
    f = field()
    with raises(TypeError, r"\bt\b must"):
        nt.solve(f, features(2, 2), times)
    if times is not None:  # None means the layer's own
        with raises(TypeError, r"\bt\b must"):
            nt.NODE(f)(features(2, 2), t=times)
    assert f.calls == 0


@pytest.mark.parametrize("times", [(0.0, 1.0), (1.0, 0.0), (-1.0, 2.0), (3.0, 2.0, -1e-9)])
@pytest.mark.parametrize("form", ["absorbed", "exact"])
@pytest.mark.parametrize("make", [nt.NesterovNODE, nt.GNesterovNODE])
def test_times_where_nesterovs_damping_is_singular(make, form, times):
    f = field()
    with raises(ValueError, r"\bt\b must be positive.*t=\(1"):
        make(f, form=form, t=times)
    with raises(ValueError, r"\bt\b must be positive"):
        make(f, form=form)(features(2, 2), t=times)
    system = systems.gnesterov(f, form=form)
    with raises(ValueError, r"\bt\b must be positive"):
        nt.solve(system, (features(2, 2), features(2, 2)), times)
    assert f.calls == 0
    nt.HBNODE(f, t=times)(features(2, 2))  # only theirs is


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_input_that_is_not_finite(bad, dtype):
    f = field()
    h = torch.ones(3, 2, dtype=dtype)
    h[1, 1] = bad
    for make in LAYERS.values():
        with raises(ValueError, r"\bh\b.*NaN or infinite"):
            make(f)(h)
    with raises(ValueError, r"state.*NaN or infinite"):
        nt.solve(f, h, (0.0, 1.0))
    with raises(ValueError, r"state m.*NaN or infinite"):
        nt.solve(systems.heavy_ball(f), (torch.ones_like(h), h), (0.0, 1.0))
    assert f.calls == 0


def test_a_sum_that_overflows_is_no_infinite_input():
    h = torch.full((4, 2), 3e38)
    assert nt.NODE(lambda t, h: torch.zeros_like(h))(h).shape == h.shape


@pytest.mark.parametrize(
    ("h", "match"),
    [
        (torch.ones(2, 2, dtype=torch.long), "int64"),
        (torch.ones(2, 2, dtype=torch.bool), "bool"),
        (torch.ones(2, 2, dtype=torch.complex64), "complex64"),
        ([[1.0, 2.0]], "list"),
        (None, "NoneType"),
        (np.ones((2, 2)), "ndarray"),
    ],
    ids=["integer", "bool", "complex", "list", "None", "numpy"],
)
def test_input_of_a_wrong_type(h, match):
    f = field()
    for make in LAYERS.values():
        with raises(TypeError, rf"\bh\b must be a.*{match}.*convert"):
            make(f)(h)
    with raises(TypeError, rf"state must be a.*{match}.*convert"):
        nt.solve(f, h, (0.0, 1.0))
    assert f.calls == 0


def test_a_complex_state_keeps_both_parts():
    for dtype in (torch.complex64, torch.complex128):
        for call in (*(make(field()) for make in LAYERS.values()), lambda h: nt.solve(field(), h, (0.0, 1.0))):
            with raises(TypeError, r"floating-point.*complex.*view_as_real.*odeint"):
                call(torch.ones(2, 2, dtype=dtype))


def test_a_layer_in_place_of_its_system():
    for make in (nt.NODE, nt.GNesterovNODE):
        with raises(TypeError, rf"got the layer {make.__name__}; pass layer\.system"):
            nt.solve(make(field()), features(2, 2), (0.0, 1.0))
        with raises(TypeError, rf"func .*got the layer {make.__name__}; pass layer\.system"):
            nt.odeint(make(field()), features(2, 2), torch.tensor([0.0, 1.0]))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("make", [nt.NODE, nt.GNesterovNODE])
def test_tracers_of_one_example(make, tmp_path):
    layer, h = make(Returns(lambda h: -h)), torch.ones(2, 2)
    for module in (layer, nn.Sequential(nn.Linear(2, 2), layer)):
        with raises(RuntimeError, r"torch\.jit\.trace.*use torch\.export"):
            torch.jit.trace(module, (h,))
        with raises(RuntimeError, rf"{make.__name__} cannot be scripted.*use torch\.export"):
            torch.jit.script(module)
        with raises(TypeError, r"Proxy of torch\.fx.*use torch\.export"):
            torch.fx.symbolic_trace(module)
    with raises(RuntimeError, r"torch\.onnx\.export.*use torch\.export"):
        torch.onnx.export(nn.Sequential(layer), (h,), str(tmp_path / "x.onnx"), dynamo=False)


def test_states_that_are_no_pair():
    f = field()
    system = systems.heavy_ball(f)
    h = features(2, 2)
    for state in (h, (h,), (h, h, h), None):
        with raises(TypeError, r"pair \(x, m\)"):
            nt.solve(system, state, (0.0, 1.0))
    with raises(ValueError, "agree in shape"):
        nt.solve(system, (h, features(2, 3)), (0.0, 1.0))
    with raises(ValueError, "agree in shape, dtype"):
        nt.solve(system, (h, h.float()), (0.0, 1.0))
    with raises(TypeError, "state must be a tensor"):
        nt.solve(f, (h, h), (0.0, 1.0))
    assert f.calls == 0


def test_a_state_on_another_device():
    net = nn.Linear(2, 2, device="meta")

    class Far(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net
            self.calls = 0

        def forward(self, t, h):
            self.calls += 1
            return self.net(h)

    f = Far()
    for make in LAYERS.values():
        with raises(ValueError, r"\bh\b is on cpu.*meta.*move"):
            make(f)(torch.ones(2, 2))
    with raises(ValueError, r"state is on cpu.*meta.*move"):
        nt.solve(f, torch.ones(2, 2), (0.0, 1.0))
    assert f.calls == 0


# --- options: refused when the layer is built and by `solve`

BAD_OPTIONS = [
    ({"rtol": -1e-3}, "rtol"),
    ({"rtol": math.nan}, "rtol"),
    ({"atol": math.inf}, "atol"),
    ({"atol": -1.0}, "atol"),
    ({"rtol": 0.0, "atol": 0.0}, r"rtol and atol"),
    ({"rtol": "tight"}, "rtol"),
    ({"atol": None}, "atol"),
    ({"atol": True}, "atol"),
    ({"atol": torch.tensor([1e-3, -1e-3])}, "atol"),
    ({"rtol": torch.tensor([1e-3, math.nan])}, "rtol"),
    ({"rtol": torch.tensor([1, 2])}, "rtol"),
    ({"atol": torch.tensor(1e-3, requires_grad=True)}, "atol"),
    ({"method": "dopri55"}, r"method 'dopri55'.*did you mean 'dopri5'"),
    ({"method": "RK4"}, r"method 'RK4'.*did you mean 'rk4"),
    ({"gradient": "discreet"}, r"gradient 'discreet'.*did you mean 'discrete'"),
    ({"gradient": "adjoin"}, r"gradient 'adjoin'.*did you mean 'adjoint'"),
    ({"controller": "PID"}, r"controller 'PID'.*did you mean 'pi'"),
    ({"method": "rk4"}, "step_size is missing"),
    ({"method": "rk4", "step_size": 0.0}, "step_size must be a positive number"),
    ({"method": "rk4", "step_size": -0.1}, "step_size must be a positive number"),
    ({"method": "euler", "step_size": math.nan}, "step_size must be a positive number"),
    ({"method": "euler", "step_size": math.inf}, "step_size must be a positive number"),
    ({"method": "midpoint", "step_size": "0.1"}, "step_size must be a positive number"),
    ({"method": "rk4", "step_size": 0.1, "first_step": 0.1}, "first_step"),
    ({"step_size": 0.1}, "step_size.*first_step"),
    ({"first_step": 0.0}, "first_step"),
    ({"max_steps": 0}, "max_steps"),
    ({"max_steps": -5}, "max_steps"),
    ({"max_steps": 1.5}, "max_steps"),
    ({"max_steps": True}, "max_steps"),
    ({"max_steps": math.inf}, r"max_steps must be an integer.*2\*\*31"),
    ({"max_steps": math.nan}, "max_steps must be an integer"),
    ({"max_steps": "10"}, "max_steps must be an integer"),
]


@pytest.mark.parametrize(("options", "match"), BAD_OPTIONS, ids=lambda x: str(x)[:40])
def test_bad_options(options, match):
    f = field()
    with raises(ValueError, match):
        nt.solve(f, features(2, 2), (0.0, 1.0), **options)
    for make in LAYERS.values():
        with raises(ValueError, match):
            make(f, **options)
    assert f.calls == 0


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"gradient": 3}, "gradient must be a name or a strategy"),
        ({"gradient": nt.gradients.Adjoint}, "gradient must be a name or a strategy"),
        ({"controller": 0.9}, "controller must be a name or a controller"),
        ({"controller": nt.controllers.PI}, "controller must be a name or a controller"),
        ({"method": 5}, "method must be a name"),
    ],
)
def test_options_of_a_wrong_type(options, match):
    f = field()
    with raises(TypeError, match):
        nt.solve(f, features(2, 2), (0.0, 1.0), **options)
    with raises(TypeError, match):
        nt.NODE(f, **options)
    assert f.calls == 0


@pytest.mark.parametrize("name", ["rtol", "atol"])
def test_tolerances_that_do_not_broadcast(name):
    f = field()
    for make in LAYERS.values():
        with raises(ValueError, rf"{name} of shape \(5,\).*\(2, \d\)"):
            make(f, **{name: torch.full((5,), 1e-3)})(features(2, 2))
    with raises(ValueError, rf"{name} of shape \(4, 2, 2\)"):
        nt.solve(f, features(2, 2), (0.0, 1.0), **{name: torch.full((4, 2, 2), 1e-3)})
    assert f.calls == 0


def test_unknown_options_are_python_errors():
    with raises(TypeError, "stepsize"):
        nt.NODE(field(), stepsize=0.1)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"gate": "softclp"}, ValueError, r"gate 'softclp'.*did you mean 'softclip'"),
        ({"gate": "Tanh"}, ValueError, r"gate 'Tanh'.*did you mean 'tanh'"),
        ({"gate": 3.0}, TypeError, "gate must be"),
        ({"gate": None}, TypeError, "gate must be"),
        ({"xi": "learnabel"}, ValueError, r"xi 'learnabel'.*did you mean 'learnable'"),
        ({"xi": -0.1}, ValueError, "xi must be"),
        ({"xi": math.nan}, ValueError, "xi must be"),
        ({"xi": None}, ValueError, "xi must be"),
        ({"xi": True}, ValueError, "xi must be"),
    ],
    ids=str,
)
@pytest.mark.parametrize("make", [nt.GHBNODE, nt.GNesterovNODE])
def test_bad_gate_and_residual(make, options, error, match):
    with raises(error, match):
        make(field(), **options)


@pytest.mark.parametrize("make", [nt.NesterovNODE, nt.GNesterovNODE])
def test_unknown_form(make):
    with raises(ValueError, r"form 'exakt'.*did you mean 'exact'.*absorbed"):
        make(field(), form="exakt")


@pytest.mark.parametrize("t", [(1.0, 200.0), (1e-30, 1.0), (250.0, 1.0)])
def test_times_beyond_the_range_of_the_state_s_dtype(t):
    """They ended as NON_FINITE, which blamed the field."""
    layer = nt.NesterovNODE(lambda t, h: -h, t=t, rtol=1e-2, atol=1e-2)
    with raises(ValueError, "is out of torch.float32's range"):
        layer(torch.ones(2, 3))
    layer = nt.GNesterovNODE(lambda t, h: -h, t=(150.0, 151.0))  # whose κ is bounded
    assert layer(torch.ones(2, 3)).isfinite().all()


def test_forms_of_systems_that_have_none():
    with raises(ValueError, "form"):
        systems.Momentum(field(), form="exact")
    for sign in (2.0, 0.0, math.nan):  # any other size belongs to the field
        with pytest.raises(ValueError, match="sign must be 1 or -1"):
            systems.Momentum(field(), sign=sign)
    for factor in (-1.0, math.inf, True, "learnable"):
        with pytest.raises(ValueError, match="damping_factor must be"):
            systems.nesterov(field(), damping_factor=factor)
    with pytest.raises(ValueError, match="damping_factor is"):
        systems.Momentum(field(), damping_factor=5.0)
    with raises(ValueError, r"damping 'learned'.*did you mean 'learnable'"):
        systems.Momentum(field(), damping="learned")


@pytest.mark.parametrize("augment", [0, -1, 1.0, True, None, "2"])
def test_bad_augment(augment):
    with raises(ValueError, r"augment must be an integer of at least 1"):
        nt.ANODE(field(), augment=augment)


def test_nothing_to_augment():
    f = field()
    with raises(ValueError, r"no dimension 1.*dim="):
        nt.ANODE(f, augment=1)(torch.ones(3))
    assert f.calls == 0


def test_fields_and_systems_that_are_none():
    with raises(TypeError, "field must be a module or function"):
        nt.HBNODE(3)
    with raises(TypeError, "system must be"):
        nt.solve(None, features(2, 2), (0.0, 1.0))
    with raises(TypeError, "initial_velocity must be a module"):
        nt.HBNODE(field(), initial_velocity=torch.zeros(2, 2))


@pytest.mark.parametrize(
    "start",
    [lambda h: h[:, :1], lambda h: h.float(), lambda h: None, lambda h: 0.0],
    ids=["shape", "dtype", "None", "float"],
)
def test_bad_initial_velocity(start):
    f = field()
    with raises(ValueError, r"initial_velocity returned.*return h's shape and dtype"):
        nt.NesterovNODE(f, initial_velocity=start)(features(2, 2))
    assert f.calls == 0


@pytest.mark.parametrize("params", [[1.0], ["weight"], [None]])
def test_params_that_are_no_tensors(params):
    f = field()
    with raises(TypeError, r"params\[0\]"):
        nt.solve(f, features(2, 2), (0.0, 1.0), params=params)
    with raises(TypeError, r"params=\[tensor\]"):
        nt.solve(f, features(2, 2), (0.0, 1.0), params=torch.ones(2, requires_grad=True))
    assert f.calls == 0


# --- what a field must not return


class Returns(nn.Module):
    def __init__(self, what):
        super().__init__()
        self.what = what
        self.calls = 0

    def forward(self, t, h, m=None):
        self.calls += 1
        return self.what(h)


BAD_FIELDS = [
    (lambda h: None, TypeError, r"field Returns returned NoneType.*must return a tensor of h's shape"),
    (lambda h: (h, h), TypeError, r"field Returns returned tuple"),
    (lambda h: h.tolist(), TypeError, r"field Returns returned list"),
    (lambda h: 1.0, TypeError, r"field Returns returned float"),
    (lambda h: h.sum(), ValueError, r"field Returns returned shape \(\) for h of shape \(\d, \d\)"),
    (lambda h: h[:1], ValueError, r"field Returns returned shape \(1, \d\) for h of shape"),
    (lambda h: h.t(), ValueError, r"field Returns returned shape .* for h of shape"),
    (lambda h: h.reshape(-1), ValueError, r"field Returns returned shape"),
    (lambda h: h.float(), ValueError, r"field Returns returned torch.float32 for h of torch.float64.*convert"),
    (lambda h: h.long(), ValueError, r"field Returns returned torch.int64 for h of torch.float64"),
    (lambda h: torch.zeros_like(h, device="meta"), ValueError, r"field Returns returned a tensor on meta.*move"),
]


@pytest.mark.parametrize("gradient", ["discrete", "adjoint", "backprop"])
@pytest.mark.parametrize(("what", "error", "match"), BAD_FIELDS, ids=range(len(BAD_FIELDS)))
def test_what_a_field_must_not_return(what, error, match, gradient):
    for make in [*LAYERS.values(), nt.SONODE]:
        f = Returns(what)
        h = features(5, 2).requires_grad_()
        with raises(error, match):
            make(f, gradient=gradient)(h)
        assert f.calls == 1  # the first output is enough


def test_the_name_of_a_function_that_misbehaves_is_told():
    def my_dynamics(t, y):
        return y[0]

    with raises(ValueError, "field my_dynamics returned shape"):
        nt.solve(my_dynamics, features(3, 2), (0.0, 1.0))


@pytest.mark.parametrize("gradient", ["discrete", "adjoint", "backprop"])
@pytest.mark.parametrize("make", [nt.NODE, nt.HBNODE, nt.NesterovNODE])
def test_a_field_that_works_in_place_is_refused(make, gradient):
    """Its input is the solver's state: silently wrong numbers otherwise."""
    f = Returns(lambda h: torch.relu_(h))
    with torch.no_grad(), raises(RuntimeError, r"field Returns.*in place.*inplace=False"):
        make(f, gradient=gradient)(features(3, 2))
    with raises(RuntimeError, r"in place|in-place|inplace"):
        make(f, gradient=gradient)(features(3, 2).requires_grad_()).sum().backward()


# --- adjoint options


def test_bad_adjoint_options():
    for options in ({"rtol": 0.0}, {"atol": -1.0}, {"rtol": math.nan}):
        with raises(ValueError, r"Adjoint (rtol|atol) must be positive"):
            nt.gradients.Adjoint(**options)
    with raises(ValueError, r"dopri7.*did you mean"):
        nt.gradients.Adjoint(method="dopri7")


@pytest.mark.parametrize("value", ["x", True, [1e-3], 1j, torch.tensor(1e-3)], ids=str)
def test_numbers_that_are_none(value):
    for name in ("rtol", "atol"):
        with raises(TypeError, rf"Adjoint {name} must be a positive number"):
            nt.gradients.Adjoint(**{name: value})
    for gate in (nt.gates.Softclip, nt.gates.Hardtanh):
        with raises(TypeError, "gate bound must be a positive finite number, got"):
            gate(value)
    for name in ("every", "bound"):
        with raises(ValueError, f"Reversible {name} must be"):
            nt.gradients.Reversible(**{name: value})
    with raises(TypeError, "controller alpha must be a number"):
        nt.controllers.PI(alpha=value)
    with raises(TypeError, "dim must be"):
        nt.ANODE(field(), 1, dim=value)


def test_a_bound_that_is_to_be_learned():
    with raises(TypeError, r"gate bound .*got Parameter; a gate has no parameters.*number"):
        nt.gates.Softclip(bound=nn.Parameter(torch.tensor(5.0)))


@pytest.mark.parametrize("number", [np.float32, np.float64, np.int64, lambda x: np.float16(x)])
def test_numbers_of_numpy(number):
    """As Python's own: they would turn up as numpy's arrays, or as other types for a compiler to guard."""
    integer = np.int64 if number is not np.int64 else number
    gradient = nt.gradients.Adjoint(rtol=number(1), atol=number(1))
    layer = nt.GNesterovNODE(
        lambda t, h: -h, nt.gates.Softclip(number(5)), number(1), rtol=number(1), atol=number(1), gradient=gradient,
        first_step=number(1), max_steps=integer(100), controller=nt.controllers.PI(alpha=number(1), beta=number(0)),
        t=(number(1), number(2)),
    )  # fmt: skip
    assert torch.is_tensor(layer(features(2, 2)))
    s, c = layer.settings, layer.settings.options.controller
    found = [s.rtol, s.options.first_step, s.options.max_steps, c.alpha, c.beta, layer.system.fixed_xi,
             layer.system.gate_x.bound, gradient.rtol, *layer.t]  # fmt: skip
    assert {type(x) for x in found} <= {int, float}
    assert nt.ANODE(lambda t, h: -h, integer(2), dim=integer(1))(features(2, 2)).shape == (2, 4)
    assert type(nt.gradients.Reversible(integer(9)).every) is int
    steps = nt.solve(lambda t, h: -h, features(2, 2), (0.0, 1.0), method="rk4", step_size=number(1)).stats
    assert steps.accepted == 1


def test_an_adjoint_that_does_not_fit_the_forward_solve():
    f = field()
    h = features(2, 2).requires_grad_()
    with raises(ValueError, r"'rk4' takes fixed steps.*step_size"):
        nt.NODE(f, gradient=nt.gradients.Adjoint(method="rk4"))(h)
    with raises(ValueError, r"'dopri5' is adaptive.*rtol and atol"):
        nt.NODE(f, method="rk4", step_size=0.1, gradient=nt.gradients.Adjoint(method="dopri5"))(h)
    assert f.calls == 0


@pytest.mark.parametrize(
    ("layer", "wrong", "nearest"),
    [
        (nt.NODE, "rtoll", "rtol"),
        (nt.NODE, "max_step", "max_steps"),
        (nt.HBNODE, "initial_velocty", "initial_velocity"),
        (nt.GNesterovNODE, "gat", "gate"),
        (nt.GNesterovNODE, "T", "t"),
        (nt.NODE, "max_num_steps", "max_steps"),
    ],
)
def test_an_unknown_option_of_a_layer_names_the_nearest(layer, wrong, nearest):
    with pytest.raises(TypeError, match=rf"unknown option of {layer.__name__} '{wrong}': did you mean '{nearest}'"):
        layer(lambda t, h: h, **{wrong: 1})


@pytest.mark.parametrize(
    ("layer", "name", "owners"),
    [
        (nt.HBNODE, "gate", "GHBNODE and GNesterovNODE"),
        (nt.NesterovNODE, "xi", "GHBNODE and GNesterovNODE"),
        (nt.HBNODE, "form", "NesterovNODE and GNesterovNODE"),
        (nt.NODE, "augment", "ANODE"),
        (nt.HBNODE, "params", "solve"),
        (nt.GNesterovNODE, "options", "odeint and odeint_adjoint"),
        (nt.GNesterovNODE, "adjoint_rtol", "odeint_adjoint"),
        (nt.HBNODE, "return_velocity", "the call of a momentum layer"),
    ],
)
def test_an_option_of_something_else_says_whose_it_is(layer, name, owners):
    with pytest.raises(TypeError, match=rf"unknown option of {layer.__name__} '{name}': that is for {owners}; valid"):
        layer(lambda t, h: h, **{name: 1})


def test_no_guess_where_nothing_is_near():
    for make in (lambda: nt.NODE(field(), colour=1), lambda: nt.NODE(field(), method="simplex")):
        with pytest.raises((TypeError, ValueError)) as refused:
            make()
        assert "did you mean" not in str(refused.value)
        assert "valid names are" in str(refused.value)


def test_a_first_order_layer_knows_no_initial_velocity():
    with pytest.raises(TypeError, match="unknown option of NODE 'initial_velocity'"):
        nt.NODE(lambda t, h: h, initial_velocity=None)
