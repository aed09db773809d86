"""Every kernel against its torch reference: under triton's interpreter on a CPU, compiled on a CUDA device."""

import math
import subprocess
import sys

import pytest
import torch
from kernel_support import (
    BF16,
    DEVICE,
    DOPRI5,
    DTYPES,
    F16,
    F32,
    F64,
    GATES,
    HARDTANH,
    IDENTITY,
    KERNELS,
    ODD,
    REFERENCES,
    SIZES,
    SOFTCLIP,
    TANH,
    all_close,
    check_choice,
    check_no_backward,
    check_one_node,
    close,
    close_norms,
    momentum_arguments,
    normal,
    scalar,
)

from benchmarks import traffic
from nesterov_triton import gates, systems, tableaus
from nesterov_triton.flow import Flow
from nesterov_triton.network import Network
from nesterov_triton.ops import first_order_finish, first_order_stage, momentum_finish, momentum_stage
from nesterov_triton.stepping.explicit_rk import ExplicitRK, error_norm
from nesterov_triton.stepping.stepper import Tolerance, stage_times

pytestmark = pytest.mark.usefixtures("poisoned")
OPERATORS = ("momentum_stage", "momentum_finish", "first_order_stage", "first_order_finish")


# --- values


def stage_cases():
    """All ways through the stages of all methods, each with one gate pair, dtype and size; for dopri5 every gate with
    every dtype."""
    k = 0
    for name, tableau in tableaus.TABLEAUS.items():
        for ahead in (1, 2):
            for following in range(len(tableau.all_a) - ahead + 1):
                for new in range(min(2, following) + 1):
                    if name != "dopri8" or (following + new) % 3 == 0:
                        yield name, following - new, new, ahead, GATES[k % 5], DTYPES[k % 4], SIZES[k % 6]
                        k += 1
    for pair in GATES:
        for dtype in DTYPES:
            yield "dopri5", 3, 2, 2, pair, dtype, SIZES[k % 6]
            k += 1


@pytest.mark.parametrize(("method", "known", "new", "ahead", "pair", "dtype", "n"), list(stage_cases()))
def test_momentum_stage(method, known, new, ahead, pair, dtype, n):
    tableau = tableaus.get(method)
    arguments = (*momentum_arguments(tableau, new, known, n, dtype), tableau, *pair, ahead, known % 2 == 0)
    all_close(KERNELS["momentum_stage"](*arguments), REFERENCES["momentum_stage"](*arguments))


def finish_cases():
    k = 0
    for name, tableau in tableaus.TABLEAUS.items():
        for new in range(1, min(tableau.stages, 2) + 1):
            for keep in range(new + 1):
                yield name, new, keep, GATES[k % 5], DTYPES[k % 4], SIZES[(k + k // 4) % 6]
                k += 1
    for pair in GATES:
        for dtype in DTYPES:
            yield "dopri5", 2, 1, pair, dtype, SIZES[k % 6]
            k += 1


@pytest.mark.parametrize(("method", "new", "keep", "pair", "dtype", "n"), list(finish_cases()))
def test_momentum_finish(method, new, keep, pair, dtype, n):
    tableau = tableaus.get(method)
    tensors = (*momentum_arguments(tableau, new, tableau.stages - new, n, dtype), scalar(1e-2), scalar(1e-3))
    rest = (tableau, *pair, keep)
    actual, expected = KERNELS["momentum_finish"](*tensors, *rest), REFERENCES["momentum_finish"](*tensors, *rest)
    all_close(actual[:2], expected[:2])
    close_norms(actual.error, expected.error, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("method", "n"), [("dopri5", 1025), ("tsit5", 7), ("dopri8", 600), ("rk4", 1), ("euler", 5)])
def test_first_order(method, n, dtype):
    tableau = tableaus.get(method)
    y, dt = normal(n, dtype=dtype), scalar(0.1)
    slopes = [normal(n, dtype=dtype) for _ in range(tableau.stages)]
    for stage in range(tableau.stages - 1):
        arguments = (y, slopes[: stage + 1], dt, tableau, stage)
        close(KERNELS["first_order_stage"](*arguments), REFERENCES["first_order_stage"](*arguments))
    arguments = (y, slopes, dt, scalar(1e-2), scalar(1e-3), tableau)
    actual, expected = KERNELS["first_order_finish"](*arguments), REFERENCES["first_order_finish"](*arguments)
    assert (actual.y is None) == tableau.fsal
    close(actual.y, expected.y)
    close_norms(actual.error, expected.error, dtype)


@pytest.mark.parametrize("dtype", [F32, F64])
def test_scalars_may_have_either_type(dtype):
    """A float64 state takes float64 scalars to the last bit; a float32 scalar is read as what it is."""
    u, z, slopes, c, _ = momentum_arguments(DOPRI5, 2, 1, 65, F64)
    arguments = (u, z, slopes, c.to(dtype), scalar(0.1, dtype), DOPRI5, ODD, ODD, 2, False)
    all_close(KERNELS["momentum_stage"](*arguments), REFERENCES["momentum_stage"](*arguments))


@pytest.mark.parametrize("method", ["dopri5", "dopri8", "rk4"])
def test_empty_state(method):
    tableau = tableaus.get(method)
    for run in (KERNELS, REFERENCES):
        u, z, slopes, c, dt = momentum_arguments(tableau, 2, tableau.stages - 2, 0, F32)
        done = run["momentum_finish"](u, z, slopes, c, dt, dt, dt, tableau, SOFTCLIP, SOFTCLIP, 2)
        assert [x.numel() for x in (done.z, *done.slopes)] == [0, 0, 0]
        assert done.error == 0
        done = run["momentum_stage"](u[:1], z, slopes[:1], c, dt, tableau, SOFTCLIP, SOFTCLIP, 1, True)
        assert [x.numel() for x in (*done.h, *done.slopes, done.m)] == [0, 0, 0]
        done = run["first_order_finish"](u[0], [*slopes, *u], dt, dt, dt, tableau)
        assert done.error == 0
        assert run["first_order_stage"](u[0], slopes[:1], dt, tableau, 0).numel() == 0


# --- what the norm must tell


def test_norm_without_an_error_is_zero_even_without_an_absolute_tolerance():
    tableau, zero = DOPRI5, torch.zeros(10, dtype=F32, device=DEVICE)
    arguments = (zero, [zero] * 7, scalar(0.1), scalar(1e-3), scalar(0.0), tableau)
    for run in (KERNELS, REFERENCES):
        assert run["first_order_finish"](*arguments).error == 0
    zero = torch.zeros(13 * 4, dtype=F32, device=DEVICE)
    arguments = (zero, [zero] * 13, scalar(0.1), scalar(1e-3), scalar(1e-3), tableaus.get("dopri8"))
    for run in (KERNELS, REFERENCES):
        assert run["first_order_finish"](*arguments).error == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("method", ["dopri5", "dopri8", "rk4"])
def test_values_that_are_not_finite_are_seen(method, bad):
    """Wherever they are: in the field's last output, in a slope, or in the old state; in a block's last element."""
    tableau, n = tableaus.get(method), 1025
    for where in ("u", "z", "slopes"):
        if where == "z" and tableau.adaptive and not math.isnan(bad):
            continue  # an infinite state makes errors small: a solve looks at its end
        (u,), z, slopes, c, dt = momentum_arguments(tableau, 1, tableau.stages - 1, n, F32)
        {"u": u, "z": z, "slopes": slopes[0]}[where][-1] = bad
        arguments = ([u], z, slopes, c, dt, scalar(1e-3), scalar(1e-3), tableau, IDENTITY, IDENTITY, 0)
        for run in (KERNELS, REFERENCES):
            assert not torch.isfinite(run["momentum_finish"](*arguments).error), where
        arguments = (z, [torch.cat((k, k)) for k in (*slopes, u)], dt, scalar(1e-3), scalar(1e-3), tableau)
        for run in (KERNELS, REFERENCES):
            assert not torch.isfinite(run["first_order_finish"](*arguments).error), where


def test_a_state_that_overflows_its_type():
    """Its error over an infinite size is 0, as in plain torch."""
    y = torch.full((5,), 6e4, dtype=F16, device=DEVICE)
    arguments = (y, [y] * 7, scalar(1.0), scalar(1e-3), scalar(1e-3), DOPRI5)
    for run in (KERNELS, REFERENCES):
        assert run["first_order_finish"](*arguments).error == 0


@pytest.mark.parametrize("by", ["kernel", "reference"])
def test_an_error_too_large_for_the_dtype_is_not_taken_for_none(by):
    """dopri8 damps its error by another one, whose square overflows first: 1e18 and 1e21 in float32."""
    run = (KERNELS if by == "kernel" else REFERENCES)["first_order_finish"]
    tableau = tableaus.get("dopri8")
    rows = torch.tensor(tableau.error, dtype=F64)
    wanted = torch.tensor([1e18, 1e21], dtype=F64)
    slopes = (torch.linalg.pinv(rows) @ wanted).to(DEVICE, F32)
    assert torch.allclose(rows @ slopes.to("cpu", F64), wanted, rtol=0.1)
    slopes = slopes.view(-1, 1).unbind(0)
    y = torch.zeros(1, dtype=F32, device=DEVICE)
    done = run(y, slopes, scalar(1.0), scalar(0.0), scalar(1.0), tableau)
    assert not float(done.error) <= 1


def test_the_norm_is_the_same_in_every_run():
    tensors = (*momentum_arguments(DOPRI5, 2, 5, 5000, F32), scalar(1e-3), scalar(1e-3))
    first, second = (KERNELS["momentum_finish"](*tensors, DOPRI5, ODD, ODD, 1).error for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("method", ["dopri5", "dopri8"])
def test_the_norm_is_the_solvers(method):
    tableau, y = tableaus.get(method), normal(600, dtype=F64)
    slopes = [normal(600, dtype=F64) for _ in range(tableau.stages)]
    new = y + 0.1 * sum(b * k for b, k in zip(tableau.b, slopes, strict=True))
    rows = torch.stack([0.1 * sum(e * k for e, k in zip(row, slopes, strict=True)) for row in tableau.error])
    expected = error_norm(rows, torch.maximum(y.abs(), new.abs()), 1e-3, 1e-5)
    done = KERNELS["first_order_finish"](y, slopes, scalar(0.1), scalar(1e-3), scalar(1e-5), tableau)
    assert float(done.error) == pytest.approx(expected, rel=1e-12)


# --- whole steps


class Field(torch.nn.Module):
    """A field that looks at everything it is given."""

    def forward(self, t, h, m=None):
        u = 4 * torch.sin(h * t + h.flip(0))
        return u if m is None else u - 0.5 * m


SYSTEMS = {
    "gnesterov": lambda: systems.gnesterov(Field(), "softclip", 0.3),
    "gnesterov exact": lambda: systems.gnesterov(Field(), gates.Softclip(2.0), 0.3, "exact"),
    "heavy ball": lambda: systems.heavy_ball(Field()),
    "generalised heavy ball": lambda: systems.generalised_heavy_ball(Field(), "tanh", 0.3),
    "second order": lambda: systems.second_order(Field()),
}


def step_by_kernels(system, tableau, t, t1, z, tolerance, slope=None, pairs=True):
    """One step: its end, its last slope, its error, and the number of evaluations."""
    seen = []

    def field(h, m):
        i = len(seen) + (slope is not None)
        seen.append(i)
        at = torch.tensor(times[i], dtype=z.dtype, device=DEVICE)
        return system.field(at, h, m) if system.sees_momentum else system.field(at, h)

    times = stage_times(t, t1, tableau.c)
    found = [system.rule.coefficients(s, float(system.damping), float(system.xi)) for s in times]
    rows = [[c.scale or 1.0, c.drive or system.sign, c.q or 0.0, c.minus_gamma or 0.0] for c in found]
    c, dt = scalar(rows), scalar(t1 - t)
    pair = system.gate_x, system.gate_f
    x, m = z.view(2, -1)
    outputs, slopes = [], [] if slope is None else [slope]
    if slope is None:
        outputs = [field(c[0, 0].to(z.dtype) * x, m)]
    while len(slopes) + len(outputs) < tableau.stages:
        ahead = min(2 if pairs else 1, tableau.stages - len(slopes) - len(outputs))
        done = KERNELS["momentum_stage"](outputs, z, slopes, c, dt, tableau, *pair, ahead, system.sees_momentum)
        slopes, outputs = [*slopes, *done.slopes], [field(h, done.m) for h in done.h]
    done = KERNELS["momentum_finish"](outputs, z, slopes, c, dt, *map(scalar, tolerance), tableau, *pair, 1)
    return done.z, done.slopes[0], float(done.error), len(seen)


def flow_of(system, n, dtype):
    network = Network(system.field, torch.Size([n]), dtype, torch.device(DEVICE), None)
    return Flow(system, network, {k: v.detach() for k, v in system.scalars().items()})


@pytest.mark.parametrize("pairs", [True, False])
@pytest.mark.parametrize(
    ("name", "method", "dtype"),
    [
        *((name, "dopri5", F64) for name in SYSTEMS),
        ("gnesterov", "tsit5", F64),
        ("gnesterov", "bosh3", F64),
        ("gnesterov exact", "dopri8", F64),
        ("gnesterov", "rk4", F64),
        ("gnesterov", "dopri5", F32),
        ("generalised heavy ball", "dopri8", F32),
        ("gnesterov", "dopri5", BF16),
    ],
)
def test_a_whole_step_is_the_solvers(name, method, dtype, pairs):
    """Two steps, the second from the first's last slope where the method has FSAL."""
    system, tableau, n = SYSTEMS[name](), tableaus.get(method), 37
    pairs = pairs and not system.sees_momentum
    z, tolerance = normal(2 * n, dtype=dtype), (1e-3, 1e-4)
    adaptive = Tolerance(*tolerance) if tableau.adaptive else None
    flow = flow_of(system, n, dtype)
    with torch.no_grad():
        stepper = ExplicitRK(tableau, flow, 2, z, adaptive)
        slope = None
        for t, t1 in ((1.0, 1.3), (1.3, 1.55)):
            z1 = stepper.step(t, t1, z)
            actual, last, error, evaluations = step_by_kernels(system, tableau, t, t1, z, tolerance, slope, pairs)
            # In half precision the solver rounds every intermediate row, the kernels only what they store.
            scale = z1.abs().max().item()
            units = 64 if dtype in (F32, F64) else 8
            torch.testing.assert_close(actual, z1, rtol=0, atol=units * torch.finfo(dtype).eps * scale)
            if tableau.adaptive and dtype != BF16:
                expected = stepper.error(z, z1)
                assert error == pytest.approx(
                    expected, **({"rel": 1e-9} if dtype == F64 else {"rel": 1e-2, "abs": 1e-4})
                )
            assert evaluations == tableau.stages - (slope is not None)
            stepper.accept()
            slope = last if tableau.fsal else None
            z = z1


@pytest.mark.parametrize(("method", "pairs"), [("dopri5", True), ("dopri5", False), ("dopri8", True)])
def test_a_step_takes_the_launches_that_are_counted(method, pairs, monkeypatch):
    from nesterov_triton.ops.momentum_finish import kernel as finish
    from nesterov_triton.ops.momentum_stage import kernel as stage
    from nesterov_triton.ops.runge_kutta import kernel as norm

    system, tableau, z = SYSTEMS["gnesterov"](), tableaus.get(method), normal(20, dtype=F32)
    _, slope, *_ = step_by_kernels(system, tableau, 1.0, 1.1, z, (1e-3, 1e-3))
    started, start = [], norm.start
    for module in (stage, finish, norm):
        monkeypatch.setattr(module, "start", lambda kernel, *a, **k: (started.append(kernel), start(kernel, *a, **k)))
    step_by_kernels(system, tableau, 1.0, 1.1, z, (1e-3, 1e-3), slope, pairs)
    assert len(started) == len(traffic.momentum_step(tableau, pairs))


@pytest.mark.parametrize("method", ["dopri5", "tsit5", "bosh3", "dopri8", "rk4"])
def test_a_whole_first_order_step_is_the_solvers(method):
    tableau, n, t, t1 = tableaus.get(method), 37, 0.0, 0.3
    y, field = normal(n, dtype=F64), Field()
    times = [torch.tensor(s, dtype=F64, device=DEVICE) for s in stage_times(t, t1, tableau.c)]
    adaptive = Tolerance(1e-3, 1e-4) if tableau.adaptive else None
    flow = flow_of(systems.FirstOrder(field), n, F64)
    with torch.no_grad():
        stepper = ExplicitRK(tableau, flow, 1, y, adaptive)
        expected = stepper.step(t, t1, y)
        dt = scalar(t1 - t)
        slopes, y1 = [field(times[0], y)], y
        for i in range(tableau.stages - 1):
            y1 = KERNELS["first_order_stage"](y, slopes, dt, tableau, i)
            slopes.append(field(times[i + 1], y1))
        done = KERNELS["first_order_finish"](y, slopes, dt, scalar(1e-3), scalar(1e-4), tableau)
        torch.testing.assert_close(y1 if done.y is None else done.y, expected, rtol=1e-14, atol=1e-14)
        if tableau.adaptive:
            assert float(done.error) == pytest.approx(stepper.error(y, expected), rel=1e-9)


# --- the operators


def operator_cases():
    """(operator, arguments) as registered."""
    u, z, slopes, c, dt = momentum_arguments(DOPRI5, 2, 5, 65, F32)
    form = (*gates.kernel_form(ODD), *gates.kernel_form(IDENTITY))
    yield momentum_stage._operator, (u, z, slopes[:3], c, dt, "dopri5", *form, 2, False)
    yield momentum_stage._operator, ([], z, slopes[:1], c, dt, "dopri5", *form, 1, True)
    yield momentum_finish._operator, (u, z, slopes, c, dt, dt, dt, "dopri5", *form, 1)
    yield momentum_finish._operator, (u[:1], z, slopes[:3], c[:4], dt, dt, dt, "rk4", *form, 0)
    yield first_order_stage._operator, (u[0], slopes[:3], dt, "dopri5", 2, [])
    yield first_order_finish._operator, (u[0], [*slopes, *u], dt, dt, dt, "dopri5", [])
    yield first_order_finish._operator, (u[0], slopes[:4], dt, dt, dt, "rk4", [])


@pytest.mark.parametrize("k", range(7))
def test_operators_are_registered_as_torch_wants(k):
    operator, arguments = list(operator_cases())[k]
    torch.library.opcheck(operator, arguments)


def calls():
    """The public functions on one set of arguments, by name."""
    (u,), z, slopes, c, dt = momentum_arguments(DOPRI5, 1, 6, 65, F32)
    return {
        "momentum_stage": lambda x: momentum_stage.momentum_stage(
            [x], z, slopes[:3], c, dt, DOPRI5, SOFTCLIP, SOFTCLIP, 2, True
        ),
        "momentum_finish": lambda x: momentum_finish.momentum_finish(
            [x], z, slopes, c, dt, dt, dt, DOPRI5, SOFTCLIP, SOFTCLIP
        ),
        "first_order_stage": lambda x: first_order_stage.first_order_stage(z[:65], [*slopes[:2], x], dt, DOPRI5, 2),
        "first_order_finish": lambda x: first_order_finish.first_order_finish(z[:65], [*slopes, x], dt, dt, dt, DOPRI5),
    }, u


@pytest.mark.parametrize("name", OPERATORS)
def test_an_operator_is_one_node_of_a_compiled_graph(name):
    functions, u = calls()
    check_one_node(name, functions[name], u)


@pytest.mark.parametrize("name", OPERATORS)
def test_backward_through_an_operator_raises(name):
    functions, u = calls()
    check_no_backward(functions[name], u)


def test_on_a_cpu_the_reference_runs_and_on_a_cuda_device_the_kernel():
    check_choice(OPERATORS)


def test_a_gate_without_a_triton_form_takes_the_reference():
    u, z, slopes, c, dt = momentum_arguments(DOPRI5, 1, 6, 5, F64)
    own = gates.get(torch.tanh)
    assert gates.kernel_form(own) is None
    done = [momentum_stage.momentum_stage(u, z, slopes[:2], c, dt, DOPRI5, g, g).h[0] for g in (own, TANH)]
    torch.testing.assert_close(*done)
    done = [momentum_finish.momentum_finish(u, z, slopes, c, dt, dt, dt, DOPRI5, g, g).z for g in (own, TANH)]
    torch.testing.assert_close(*done)


@pytest.mark.parametrize("gate", [IDENTITY, TANH, SOFTCLIP, HARDTANH, ODD])
def test_a_gates_form_names_the_same_function(gate):
    x = torch.linspace(-9, 9, 101, dtype=F64)
    torch.testing.assert_close(gates.of_form(*gates.kernel_form(gate))(x), gate(x))


class Louder(gates.Softclip):
    def __call__(self, x, out=None):
        return 2 * super().__call__(x, out)


def test_a_subclass_of_a_known_gate_has_no_form():
    assert gates.kernel_form(Louder(5.0)) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"outputs": [torch.zeros(4)]}, "outputs must be contiguous, of 5 elements"),
        ({"outputs": [torch.zeros(5, dtype=F64)]}, r"outputs must be contiguous, of 5 elements, torch\.float32"),
        ({"outputs": [torch.zeros(10)[::2]]}, r"strides \(2,\)"),
        ({"slopes": [torch.zeros(5), torch.zeros(6)]}, "slopes must be contiguous, of 5 elements"),
        ({"slopes": [torch.zeros(5)] * 6}, "1 stages after the first 7 of dopri5, which has 7"),
        ({"ahead": 3}, "3 stages after the first 3"),
        ({"coefficients": torch.zeros(3, 4)}, r"coefficients must have shape \(4, 4\) or more rows"),
        ({"coefficients": torch.zeros(7, 4, dtype=F16)}, "coefficients must be contiguous float32 or float64"),
        ({"dt": torch.zeros((), dtype=torch.int64)}, "dt must be contiguous float32 or float64"),
    ],
)
def test_arguments_that_a_kernel_would_misread_are_refused(change, message):
    arguments = {
        "outputs": [torch.zeros(5)],
        "z": torch.zeros(10),
        "slopes": [torch.zeros(5)] * 2,
        "coefficients": torch.zeros(7, 4),
        "dt": torch.tensor(0.1),
        "tableau": DOPRI5,
        "gate_x": SOFTCLIP,
        "gate_f": SOFTCLIP,
    }
    with pytest.raises(ValueError, match=message):
        momentum_stage.momentum_stage(**(arguments | change))


def test_the_operators_do_not_import_triton():
    code = (
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import nesterov_triton\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "assert 'triton' not in new\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
