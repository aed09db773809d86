"""Dense output: references against the solver's own, kernels against the references."""

import pytest
import torch
from kernel_support import (
    DEVICE,
    DOPRI5,
    DOPRI8,
    DTYPES,
    F16,
    F32,
    F64,
    GATES,
    IDENTITY,
    KERNELS,
    ODD,
    REFERENCES,
    RK4,
    SIZES,
    SOFTCLIP,
    check_choice,
    check_no_backward,
    check_one_node,
    close,
    normal,
    scalar,
)

from nesterov_triton import gates, systems, tableaus
from nesterov_triton.flow import Flow
from nesterov_triton.network import Network
from nesterov_triton.ops.first_order_dense_output import _operator as first_order_operator
from nesterov_triton.ops.first_order_dense_output import first_order_dense_output
from nesterov_triton.ops.momentum_dense_output import _operator as momentum_operator
from nesterov_triton.ops.momentum_dense_output import momentum_dense_output
from nesterov_triton.stepping.dense_output import dense_output
from nesterov_triton.stepping.explicit_rk import ExplicitRK

pytestmark = pytest.mark.usefixtures("poisoned")


class Field(torch.nn.Module):
    """A field that looks at everything it is given."""

    def forward(self, t, h):
        return 4 * torch.sin(h * t + h.flip(0))


def solved(system, rows, tableau, n, thetas):
    """A step of the solver: the state at its start, [D], the slopes [stages, D], dt, and its dense output [T, D]."""
    t, t1 = 1.0, 1.3
    network = Network(system.field, torch.Size([n]), F64, torch.device(DEVICE), None)
    flow = Flow(system, network, {k: v.detach() for k, v in system.scalars().items()})
    z = normal(rows * n, dtype=F64)
    with torch.no_grad():
        stepper = ExplicitRK(tableau, flow, rows, z, None, dense=True)
        stepper.step(t, t1, z)
        found = stepper.interpolate(t, t1, z, [t + theta * (t1 - t) for theta in thetas], range(len(thetas)))
        slopes = [stepper.stages.stage(i).clone() for i in range(len(tableau.interpolant))]
    return z, slopes, scalar(t1 - t), torch.stack(found)


def weights_of(tableau, thetas):
    """b_i(θ_k), [T, stages]."""
    if not thetas:
        return torch.empty((0, len(tableau.interpolant)), dtype=F64, device=DEVICE)
    return torch.stack([dense_output(tableau).weights(theta) for theta in thetas]).to(DEVICE)


# --- the references


@pytest.mark.parametrize("method", list(tableaus.TABLEAUS))
def test_first_order_dense_output_is_the_solvers(method):
    tableau, thetas = tableaus.get(method), (0.1, 0.5, 0.77, 1.0)
    y, slopes, dt, expected = solved(systems.FirstOrder(Field()), 1, tableau, 13, thetas)
    weights = weights_of(tableau, thetas)
    with torch.no_grad():
        for known in (None, tableau):
            actual = first_order_dense_output(y, slopes, weights, dt, known)
            torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("gate", [IDENTITY, SOFTCLIP, gates.get(torch.atan)], ids=["identity", "softclip", "own"])
@pytest.mark.parametrize("method", list(tableaus.TABLEAUS))
def test_momentum_dense_output_is_the_solvers(method, gate):
    tableau, thetas, n = tableaus.get(method), (0.1, 0.5, 0.77, 1.0), 13
    z, slopes, dt, expected = solved(systems.generalised_heavy_ball(Field(), gate, 0.3), 2, tableau, n, thetas)
    dm = [slope[n:] for slope in slopes]
    with torch.no_grad():
        actual = momentum_dense_output(z, dm, weights_of(tableau, thetas), dt, tableau, gate)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


# --- the kernels


def arguments_of(tableau, n, dtype, times, rows=1, small=F64):
    """The state, slopes, weights and dt."""
    slopes = [normal(n, dtype=dtype) for _ in tableau.interpolant]
    weights = weights_of(tableau, [(k + 1) / (times + 1) for k in range(times)]).to(small)
    return normal(rows * n, dtype=dtype) * 3, slopes, weights, scalar(0.1, small)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("method", "times"), [("dopri5", 3), ("tsit5", 1), ("dopri8", 2), ("rk4", 4), ("euler", 0)])
def test_first_order(method, times, dtype):
    tableau, n = tableaus.get(method), SIZES[(len(method) + DTYPES.index(dtype)) % 6]
    arguments = arguments_of(tableau, n, dtype, times)
    for known in (None, tableau):
        run = "first_order_dense_output"
        close(KERNELS[run](*arguments, known), REFERENCES[run](*arguments, known))


def momentum_cases():
    for method, times in (("dopri5", 3), ("tsit5", 1), ("dopri8", 2), ("rk4", 4), ("euler", 0)):
        for k, dtype in enumerate(DTYPES):
            yield method, times, dtype, GATES[(k + times) % 5][0]
    for gate, _ in GATES:
        yield "dopri5", 2, F32, gate


@pytest.mark.parametrize(("method", "times", "dtype", "gate"), list(momentum_cases()))
def test_momentum(method, times, dtype, gate):
    tableau, n = tableaus.get(method), SIZES[(len(method) + DTYPES.index(dtype)) % 6]
    arguments = (*arguments_of(tableau, n, dtype, times, 2), tableau, gate)
    run = "momentum_dense_output"
    close(KERNELS[run](*arguments), REFERENCES[run](*arguments))


@pytest.mark.parametrize("small", [F32, F64])
def test_scalars_may_have_either_type(small):
    """A float64 state takes float64 scalars to the last bit; a float32 scalar is read as what it is."""
    for run, rows, rest in (("first_order_dense_output", 1, ()), ("momentum_dense_output", 2, (ODD,))):
        arguments = (*arguments_of(DOPRI8, 65, F64, 2, rows, small), DOPRI8, *rest)
        close(KERNELS[run](*arguments), REFERENCES[run](*arguments))


@pytest.mark.parametrize("n", [0, 5])
def test_nothing_to_do(n):
    for run in (KERNELS, REFERENCES):
        for times in {0, 2 * (n == 0)}:
            y, slopes, weights, dt = arguments_of(DOPRI5, n, F32, times)
            assert run["first_order_dense_output"](y, slopes, weights, dt, DOPRI5).shape == (times, n)
            z, slopes, weights, dt = arguments_of(DOPRI5, n, F32, times, 2)
            done = run["momentum_dense_output"](z, slopes, weights, dt, DOPRI5, SOFTCLIP)
            assert done.shape == (times, 2 * n)


def test_rows_without_weight_are_not_looked_at():
    """Nobody may have written them. Of a momentum system m_i takes them all the same, where stage i has a weight."""
    y, slopes, weights, dt = arguments_of(DOPRI8, 9, F32, 2)
    slopes[1:5] = [torch.full((9,), torch.nan, device=DEVICE)] * 4
    z, momenta, *_ = arguments_of(DOPRI8, 9, F32, 2, 2)
    momenta[1] = momenta[2] = slopes[1]
    for run in (KERNELS, REFERENCES):
        assert torch.isfinite(run["first_order_dense_output"](y, slopes, weights, dt, DOPRI8)).all()
        assert torch.isfinite(run["momentum_dense_output"](z, momenta, weights, dt, DOPRI8, SOFTCLIP)).all()


# --- the operators


def operator_cases():
    """(operator, arguments) as registered."""
    y, slopes, weights, dt = arguments_of(DOPRI5, 65, F32, 3)
    yield first_order_operator, (y, slopes, weights, dt, "dopri5")
    yield first_order_operator, (y, slopes, weights, dt, None)
    z, slopes, weights, dt = arguments_of(RK4, 65, F32, 2, 2)
    yield momentum_operator, (z, slopes, weights, dt, "rk4", *gates.kernel_form(ODD))


@pytest.mark.parametrize("k", range(3))
def test_operators_are_registered_as_torch_wants(k):
    operator, arguments = list(operator_cases())[k]
    torch.library.opcheck(operator, arguments)


def calls():
    """The public functions on one set of arguments, by name."""
    z, slopes, weights, dt = arguments_of(DOPRI5, 65, F32, 3, 2)
    return {
        "first_order_dense_output": lambda x: first_order_dense_output(x, slopes, weights, dt, DOPRI5),
        "momentum_dense_output": lambda x: momentum_dense_output(
            z, [*slopes[:6], x], weights, dt, DOPRI5, gates.Softclip(2.0)
        ),
    }, normal(65, dtype=F32)


@pytest.mark.parametrize("name", list(calls()[0]))
def test_an_operator_is_one_node_of_a_compiled_graph(name):
    functions, x = calls()
    check_one_node(name, functions[name], x)


@pytest.mark.parametrize("name", list(calls()[0]))
def test_backward_through_an_operator_raises(name):
    functions, x = calls()
    check_no_backward(functions[name], x)


def test_on_a_cpu_the_reference_runs_and_on_a_cuda_device_the_kernel():
    check_choice(("first_order_dense_output", "momentum_dense_output"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"slopes": [torch.zeros(5)] * 6}, "dense output of dopri5 with 6 slopes, expected 7"),
        ({"slopes": [torch.zeros(4)] * 7}, "slopes must be contiguous, of 5 elements"),
        ({"slopes": [torch.zeros(10)[::2]] * 7}, r"strides \(2,\)"),
        ({"weights": torch.zeros(7)}, r"weights must have shape \(times, 7\), got \(7,\)"),
        ({"weights": torch.zeros(2, 6)}, r"weights must have shape \(times, 7\), got \(2, 6\)"),
        ({"weights": torch.zeros(7, 2).t()}, "weights must be contiguous float32 or float64"),
        ({"weights": torch.zeros(2, 7, dtype=F16)}, "weights must be contiguous float32 or float64"),
        ({"dt": torch.zeros((), dtype=torch.int64)}, "dt must be contiguous float32 or float64"),
    ],
)
def test_arguments_that_a_kernel_would_misread_are_refused(change, message):
    arguments = {"slopes": [torch.zeros(5)] * 7, "weights": torch.zeros(2, 7), "dt": torch.tensor(0.1)} | change
    with pytest.raises(ValueError, match=message):
        first_order_dense_output(torch.zeros(5), **arguments, tableau=DOPRI5)
    with pytest.raises(ValueError, match=message):
        momentum_dense_output(torch.zeros(10), **arguments, tableau=DOPRI5, gate_x=SOFTCLIP)


def test_an_odd_momentum_state_is_refused():
    with pytest.raises(ValueError, match="z must be contiguous, of 10 elements"):
        momentum_dense_output(
            torch.zeros(11), [torch.zeros(5)] * 7, torch.zeros(2, 7), torch.tensor(0.1), DOPRI5, SOFTCLIP
        )
