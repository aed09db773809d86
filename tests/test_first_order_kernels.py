"""First-order steps together with their adjoint, and transposed: references against autograd, kernels against these.
(The state's own steps are in test_kernels.py.)"""

import math

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
    KERNELS,
    REFERENCES,
    RK4,
    SIZES,
    check_choice,
    check_no_backward,
    check_one_node,
    close,
    close_norms,
    normal,
    scalar,
)

from benchmarks import traffic
from nesterov_triton import tableaus
from nesterov_triton.ops import (
    first_order_finish,
    first_order_reverse_finish,
    first_order_reverse_stage,
    first_order_stage,
)
from nesterov_triton.stepping.dense_output import dense_output
from nesterov_triton.stepping.explicit_rk import error_norm

pytestmark = pytest.mark.usefixtures("poisoned")


def field(t, y):
    """Smooth, and no element apart from the others."""
    return torch.sin(y * (1 + t)) + 0.3 * y.roll(1) * y.flip(0)


def through_field(t, y, cotangent):
    """(∂f/∂y)ᵀ applied to a cotangent."""
    y = y.detach().requires_grad_()
    with torch.enable_grad():
        return torch.autograd.grad(field(t, y), y, cotangent)[0]


def plain_stages(f, z, tableau, t, dt):
    """All slopes of a step by its definition, the extra stages' included."""
    slopes = []
    for c, a in zip(tableau.all_c, tableau.all_a, strict=True):
        slopes.append(f(t + c * dt, z + dt * sum(w * k for w, k in zip(a, slopes, strict=True))))
    return slopes


def plain_end(z, slopes, tableau, dt):
    return z + dt * sum(w * k for w, k in zip(tableau.b, slopes, strict=False))


# --- the references


@pytest.mark.parametrize("method", list(tableaus.TABLEAUS))
def test_an_adjoint_step_is_a_step_of_the_joint_system(method):
    tableau, n, t, dt = tableaus.get(method), 11, 1.0, -0.17
    z = normal(2 * n, dtype=F64)

    def joint(s, z):
        y, a = z.chunk(2)
        return torch.cat((field(s, y), -through_field(s, y, a)))

    expected = plain_stages(joint, z, tableau, t, dt)
    with torch.no_grad():
        at, slopes, through = z, [], []
        for i, c in enumerate(tableau.all_c):
            if i:
                at = first_order_stage.first_order_stage(z, slopes, scalar(dt), tableau, i - 1, through)
            y, a = at.chunk(2)
            slopes.append(field(t + c * dt, y))
            through.append(through_field(t + c * dt, y, a))
            torch.testing.assert_close(torch.cat((slopes[-1], -through[-1])), expected[i], rtol=1e-12, atol=1e-12)
        s = tableau.stages
        done = first_order_finish.first_order_finish(
            z, slopes[:s], scalar(dt), scalar(1e-3), scalar(1e-5), tableau, through[:s]
        )
    new = plain_end(z, expected, tableau, dt)
    assert (done.y is None) == tableau.fsal
    if done.y is not None:
        torch.testing.assert_close(done.y, new, rtol=1e-12, atol=1e-12)
    if tableau.adaptive:
        errors = torch.stack([dt * sum(w * k for w, k in zip(e, expected, strict=False)) for e in tableau.error])
        norm = error_norm(errors, torch.maximum(z.abs(), new.abs()), 1e-3, 1e-5)
        assert float(done.error) == pytest.approx(norm, rel=1e-9)


def transposed(y, cotangent, tableau, stages, t, dt, seeds):
    """The cotangent of y by the operators; the field is transposed by autograd."""
    slopes, states, through = [], [y], []
    for i in range(stages):
        if i:
            states.append(first_order_stage.first_order_stage(y, slopes, scalar(dt), tableau, i - 1))
        slopes.append(field(t + tableau.all_c[i] * dt, states[i]))
    for i in reversed(range(stages)):
        of_slope = first_order_reverse_stage.first_order_reverse_stage(
            cotangent, through, scalar(dt), tableau, stages, seeds[i]
        )
        through = [through_field(t + tableau.all_c[i] * dt, states[i], of_slope), *through]
    return first_order_reverse_finish.first_order_reverse_finish(cotangent, through)


@pytest.mark.parametrize("method", list(tableaus.TABLEAUS))
def test_a_transposed_step_is_autograds(method):
    """With all stages, and without a last one that the new state does not contain."""
    tableau, n, t, dt = tableaus.get(method), 11, 1.0, 0.17
    y, cotangent = normal(n, dtype=F64).requires_grad_(), normal(n, dtype=F64)
    end = plain_end(y, plain_stages(field, y, tableau, t, dt), tableau, dt)
    (expected,) = torch.autograd.grad(end, y, cotangent)
    with torch.no_grad():
        for stages in {tableau.stages, tableau.stages - (tableau.b[-1] == 0), len(tableau.all_a)}:
            actual = transposed(y.detach(), cotangent, tableau, stages, t, dt, [None] * stages)
            torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tableau", [DOPRI5, DOPRI8, RK4], ids=lambda tableau: tableau.name)
def test_a_transposed_step_with_states_inside_is_autograds(tableau):
    """Seeds are what requested states inside the step add to the slopes' cotangents."""
    n, t, dt = 11, 1.0, 0.17
    y, cotangent, inside = normal(n, dtype=F64).requires_grad_(), normal(n, dtype=F64), normal(3, n, dtype=F64)
    stages = plain_stages(field, y, tableau, t, dt)
    weights = torch.stack([dense_output(tableau).weights(theta) for theta in (0.2, 0.5, 0.9)]).to(y)
    states = y + dt * weights @ torch.stack(stages)
    (expected,) = torch.autograd.grad((plain_end(y, stages, tableau, dt), states), y, (cotangent, inside))
    with torch.no_grad():
        seeds = list(weights.t() @ inside)
        actual = transposed(y.detach(), cotangent, tableau, len(tableau.all_a), t, dt, seeds) + inside.sum(0)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


# --- the kernels


def rows(count, n, dtype):
    return [normal(n, dtype=dtype) for _ in range(count)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("method", "n"), [("dopri5", 1025), ("tsit5", 7), ("dopri8", 600), ("rk4", 1), ("euler", 5)])
def test_adjoint(method, n, dtype):
    tableau, dt = tableaus.get(method), scalar(-0.1)
    z, slopes, through = normal(2 * n, dtype=dtype), *(rows(len(tableau.all_a), n, dtype) for _ in range(2))
    for stage in range(0, len(tableau.all_a) - 1, 3 if method == "dopri8" else 1):
        arguments = (z, slopes[: stage + 1], dt, tableau, stage, through[: stage + 1])
        close(KERNELS["first_order_stage"](*arguments), REFERENCES["first_order_stage"](*arguments))
    s = tableau.stages
    arguments = (z, slopes[:s], dt, scalar(1e-2), scalar(1e-3), tableau, through[:s])
    actual, expected = KERNELS["first_order_finish"](*arguments), REFERENCES["first_order_finish"](*arguments)
    assert (actual.y is None) == tableau.fsal
    close(actual.y, expected.y)
    close_norms(actual.error, expected.error, dtype)


@pytest.mark.parametrize("seeded", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", ["dopri5", "bosh3", "dopri8", "midpoint"])
def test_transposed(method, dtype, seeded):
    """With all stages, and without a last one without weight."""
    tableau, n, dt = tableaus.get(method), SIZES[len(method) - 5], scalar(0.1)
    total = len(tableau.all_a)
    cotangent, through = normal(n, dtype=dtype), rows(total, n, dtype)
    for stages in {total, tableau.stages - (tableau.b[-1] == 0)}:
        for i in range(0, stages, 4 if method == "dopri8" else 1):
            seed = normal(n, dtype=dtype) if seeded else None
            arguments = (cotangent, through[i + 1 : stages], dt, tableau, stages, seed)
            run = "first_order_reverse_stage"
            close(KERNELS[run](*arguments), REFERENCES[run](*arguments))
        run = "first_order_reverse_finish"
        close(KERNELS[run](cotangent, through[:stages]), REFERENCES[run](cotangent, through[:stages]))


@pytest.mark.parametrize("dtype", [F32, F64])
def test_scalars_may_have_either_type(dtype):
    """A float64 state takes float64 scalars to the last bit; a float32 scalar is read as what it is."""
    dt, (z, y) = scalar(0.1, dtype), (normal(k * 65, dtype=F64) for k in (2, 1))
    slopes = rows(4, 65, F64)
    for op, arguments in (
        ("first_order_stage", (z, slopes, dt, DOPRI5, 3, slopes[::-1])),
        ("first_order_reverse_stage", (y, slopes, dt, DOPRI5, 6, y)),
    ):
        close(KERNELS[op](*arguments), REFERENCES[op](*arguments))


@pytest.mark.parametrize("method", ["dopri5", "dopri8", "rk4"])
def test_empty_state(method):
    tableau, none, dt = tableaus.get(method), torch.zeros(0, device=DEVICE), scalar(0.1)
    for run in (KERNELS, REFERENCES):
        several = [none] * tableau.stages
        assert run["first_order_stage"](none, several[:2], dt, tableau, 1, several[:2]).numel() == 0
        assert run["first_order_finish"](none, several, dt, dt, dt, tableau, several).error == 0
        assert run["first_order_reverse_stage"](none, several[:2], dt, tableau, 4, none).numel() == 0
        assert run["first_order_reverse_finish"](none, several).numel() == 0


def test_rows_without_weight_are_not_looked_at():
    """Nobody may have written them."""
    bad = torch.full((9,), torch.nan, device=DEVICE)
    y = normal(9, dtype=F32)
    for run in (KERNELS, REFERENCES):
        # b of dopri5 is 0 at stages 1 and 6, and so is a_61.
        for through, stages in (([], 7), ([y, y, y, y, bad], 7)):
            cotangent = bad
            done = run["first_order_reverse_stage"](cotangent, through, scalar(0.1), DOPRI5, stages, None)
            assert torch.isfinite(done).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("method", ["dopri5", "dopri8", "rk4"])
def test_values_that_are_not_finite_are_seen(method, bad):
    """In the state or its adjoint, in the first or the last slope of either; in a block's last element."""
    tableau, n = tableaus.get(method), 517
    for where in range(6):
        z, slopes, through = normal(2 * n, dtype=F32), *(rows(tableau.stages, n, F32) for _ in range(2))
        (z[:n], z[n:], slopes[0], slopes[-1], through[0], through[-1])[where][-1] = bad
        if where < 2 and tableau.adaptive and not math.isnan(bad):
            continue  # an infinite state makes errors small: a solve looks at its end
        arguments = (z, slopes, scalar(0.1), scalar(1e-3), scalar(1e-3), tableau, through)
        for run in (KERNELS, REFERENCES):
            assert not torch.isfinite(run["first_order_finish"](*arguments).error), where


@pytest.mark.parametrize("half", ["state", "adjoint"])
@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_a_state_that_overflows_its_type(method, half):
    """Its error over an infinite size is 0, as in plain torch; without an error it is all there is to be seen."""
    tableau = tableaus.get(method)
    big, zero = (torch.full((5,), value, dtype=F16, device=DEVICE) for value in (6e4, 0.0))
    z = torch.cat((big, zero) if half == "state" else (zero, big))
    slopes, through = ([big], [zero]) if half == "state" else ([zero], [-big])
    s = tableau.stages
    arguments = (z, slopes * s, scalar(1.0), scalar(1e-3), scalar(1e-3), tableau, through * s)
    for run in (KERNELS, REFERENCES):
        error = run["first_order_finish"](*arguments).error
        assert error == 0 if tableau.adaptive else torch.isnan(error)


# --- launches


@pytest.fixture
def started(monkeypatch):
    """The kernels that have been launched."""
    from nesterov_triton.ops.first_order_finish import kernel as finish
    from nesterov_triton.ops.first_order_reverse_finish import kernel as reverse_finish
    from nesterov_triton.ops.first_order_reverse_stage import kernel as reverse_stage
    from nesterov_triton.ops.first_order_stage import kernel as stage
    from nesterov_triton.ops.runge_kutta import kernel as norm

    found, start = [], norm.start
    for module in (stage, finish, reverse_stage, reverse_finish, norm):
        monkeypatch.setattr(module, "start", lambda kernel, *a, **k: (found.append(kernel), start(kernel, *a, **k)))
    return found


@pytest.mark.parametrize("method", ["dopri5", "dopri8", "rk4"])
def test_an_adjoint_step_takes_the_launches_that_are_counted(method, started):
    tableau, dt, n = tableaus.get(method), scalar(0.1), 5
    z, slopes, s = normal(2 * n, dtype=F32), rows(tableau.stages, n, F32), tableau.stages
    for i in range(s - 1):
        KERNELS["first_order_stage"](z, slopes[: i + 1], dt, tableau, i, slopes[: i + 1])
    KERNELS["first_order_finish"](z, slopes, dt, dt, dt, tableau, slopes)
    assert len(started) == len(traffic.first_order_adjoint_step(tableau))


@pytest.mark.parametrize(("method", "stages"), [("dopri5", 6), ("dopri5", 7), ("dopri8", 16)])
def test_a_transposed_step_takes_the_launches_that_are_counted(method, stages, started):
    tableau, dt, n = tableaus.get(method), scalar(0.1), 5
    y, through = normal(n, dtype=F32), rows(stages, n, F32)
    for i in range(stages - 1):
        KERNELS["first_order_stage"](y, through[: i + 1], dt, tableau, i)
    for i in reversed(range(stages)):
        KERNELS["first_order_reverse_stage"](y, through[i + 1 :], dt, tableau, stages)
    KERNELS["first_order_reverse_finish"](y, through)
    assert len(started) == len(traffic.first_order_reverse_step(tableau, stages))


# --- the operators


def operator_cases():
    """(operator, arguments) as registered."""
    z, y, dt, slopes = normal(130, dtype=F32), normal(65, dtype=F32), scalar(0.1), rows(7, 65, F32)
    yield first_order_stage._operator, (z, slopes[:3], dt, "dopri5", 2, slopes[3:6])
    yield first_order_finish._operator, (z, slopes, dt, dt, dt, "dopri5", slopes)
    yield first_order_finish._operator, (z, slopes[:4], dt, dt, dt, "rk4", slopes[:4])
    yield first_order_reverse_stage._operator, (y, slopes[:3], dt, "dopri5", 6, y)
    yield first_order_reverse_stage._operator, (y, [], dt, "dopri5", 6, None)
    yield first_order_reverse_finish._operator, (y, slopes[:6])


@pytest.mark.parametrize("k", range(6))
def test_operators_are_registered_as_torch_wants(k):
    operator, arguments = list(operator_cases())[k]
    torch.library.opcheck(operator, arguments)


def calls():
    """The public functions on one set of arguments, by name of the operator and what is given."""
    z, y, dt, slopes = normal(130, dtype=F32), normal(65, dtype=F32), scalar(0.1), rows(7, 65, F32)
    stage, reverse = first_order_stage.first_order_stage, first_order_reverse_stage.first_order_reverse_stage
    return {
        "first_order_stage": lambda x: stage(z, slopes[:3], dt, DOPRI5, 2, [*slopes[:2], x]),
        "first_order_finish": lambda x: first_order_finish.first_order_finish(
            z, slopes, dt, dt, dt, DOPRI5, [*slopes[:6], x]
        ),
        "first_order_finish rk4": lambda x: first_order_finish.first_order_finish(
            z, slopes[:4], dt, dt, dt, RK4, [*slopes[:3], x]
        ),
        "first_order_reverse_stage": lambda x: reverse(y, slopes[:2], dt, DOPRI5, 6, x),
        "first_order_reverse_finish": lambda x: first_order_reverse_finish.first_order_reverse_finish(
            y, [x, *slopes[:5]]
        ),
    }, normal(65, dtype=F32)


@pytest.mark.parametrize("name", list(calls()[0]))
def test_an_operator_is_one_node_of_a_compiled_graph(name):
    functions, x = calls()
    check_one_node(name.split()[0], functions[name], x)


@pytest.mark.parametrize("name", list(calls()[0]))
def test_backward_through_an_operator_raises(name):
    functions, x = calls()
    check_no_backward(functions[name], x)


def test_on_a_cpu_the_reference_runs_and_on_a_cuda_device_the_kernel():
    check_choice(("first_order_reverse_stage", "first_order_reverse_finish"))


FIVE, FOUR, TEN, DT = torch.zeros(5), torch.zeros(4), torch.zeros(10), torch.tensor(0.1)


@pytest.mark.parametrize(
    ("op", "arguments", "message"),
    [
        ("stage", (TEN, [FIVE] * 2, DT, DOPRI5, 1, [FIVE]), "through must have as many rows as slopes, 2, or none"),
        ("stage", (TEN, [FIVE], DT, DOPRI5, 0, [FOUR]), "through must be contiguous, of 5 elements"),
        ("stage", (TEN, [FIVE], DT, DOPRI5, 0), "slopes must be contiguous, of 10 elements"),
        ("stage", (torch.zeros(11), [FIVE], DT, DOPRI5, 0, [FIVE]), "y must be contiguous, of 10 elements"),
        ("finish", (TEN, [FIVE] * 4, DT, DT, DT, RK4, [FIVE] * 3), "through must have as many rows as slopes, 4"),
        ("finish", (TEN, [FIVE] * 4, DT, DT, DT, RK4, [FIVE.double()] * 4), r"through .* 5 elements, torch\.float32"),
        ("reverse_stage", (FIVE, [], DT, DOPRI5, 8), "0 of 8 stages of dopri5 have been transposed; it has 7"),
        ("reverse_stage", (FIVE, [FIVE] * 6, DT, DOPRI5, 6), "6 of 6 stages .* at least one must be left"),
        ("reverse_stage", (FIVE, [FOUR], DT, DOPRI5, 6), "through must be contiguous, of 5 elements"),
        ("reverse_stage", (FIVE, [], DT, DOPRI5, 6, FOUR), "seed must be contiguous, of 5 elements"),
        ("reverse_stage", (FIVE, [], torch.tensor(1), DOPRI5, 6), "dt must be contiguous float32 or float64"),
        ("reverse_finish", (TEN[::2], [FIVE]), r"cotangent must be contiguous, .* strides \(2,\)"),
        ("reverse_finish", (FIVE, [FOUR]), "through must be contiguous, of 5 elements"),
    ],
)
def test_arguments_that_a_kernel_would_misread_are_refused(op, arguments, message):
    modules = {
        "stage": first_order_stage.first_order_stage,
        "finish": first_order_finish.first_order_finish,
        "reverse_stage": first_order_reverse_stage.first_order_reverse_stage,
        "reverse_finish": first_order_reverse_finish.first_order_reverse_finish,
    }
    with pytest.raises(ValueError, match=message):
        modules[op](*arguments)
