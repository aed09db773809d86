"""The kernels of the methods of `nystrom` against their torch references, and these against the eager stepper."""

import itertools
import math

import pytest
import torch
from kernel_support import (
    DEVICE,
    DTYPES,
    F16,
    F32,
    F64,
    HARDTANH,
    IDENTITY,
    KERNELS,
    ODD,
    REFERENCES,
    SOFTCLIP,
    TANH,
    all_close,
    check_choice,
    check_no_backward,
    check_one_node,
    close,
    close_norms,
    normal,
    scalar,
)

from nesterov_triton import gates
from nesterov_triton.nystrom import METHODS, POINTS
from nesterov_triton.ops import (
    nystrom_adjoint_finish,
    nystrom_adjoint_stage,
    nystrom_dense_output,
    nystrom_finish,
    nystrom_reverse_finish,
    nystrom_reverse_stage,
    nystrom_stage,
)
from nesterov_triton.ops.nystrom import kernel, reference
from nesterov_triton.ops.nystrom.reference import plan_of, size_of
from nesterov_triton.stepping.nystrom import plain_growth, plain_weights

pytestmark = pytest.mark.usefixtures("poisoned")
SIZES = (1025, 1, 7, 517)
NYSTROM4, NYSTROM6 = METHODS["nystrom4"], METHODS["nystrom6"]
GATES = ((SOFTCLIP, SOFTCLIP), (IDENTITY, HARDTANH), (HARDTANH, TANH), (ODD, IDENTITY), (IDENTITY, IDENTITY))
OPERATORS = (
    "nystrom_stage", "nystrom_finish", "nystrom_dense_output", "nystrom_reverse_stage", "nystrom_reverse_finish",
    "nystrom_adjoint_stage", "nystrom_adjoint_finish",
)  # fmt: skip


def weights_of(method, gated, h=0.3, gamma=0.7, growth=False):
    """Those of a step: compensating errors of weights drawn at random would be none."""
    number = torch.tensor(h, dtype=F64)
    return reference.weights_for(reference.table(method, gated, number.device, growth), number, gamma, gated).to(DEVICE)


def arguments(method, forces, n, dtype, gated, output=True):
    """output, z, forces, coefficients, weights."""
    u = normal(n, dtype=dtype) * 3 if output else None
    c = torch.rand(method.stages, 4, dtype=F64).to(DEVICE) * 2 - 1
    known = [normal(n, dtype=dtype) for _ in range(forces)]
    return u, normal(2 * n, dtype=dtype) * 3, known, c, weights_of(method, gated)


def reverse_arguments(method, stage, n, dtype, gated, given=False, forces=None):
    """z, forces, cotangent, of_positions, through, coefficients, weights, kick; given: for the launch of a stage, of
    the finish for stage -1."""
    last = method.stages - 1
    known = [normal(n, dtype=dtype) for _ in range(last if forces or gated else 0)]
    of_positions = [normal(n, dtype=dtype) for _ in range(max(last - 2 - stage, 0))]
    through = normal(n, dtype=dtype) if stage < last - 1 else None
    c = torch.rand(method.stages, 4, dtype=F64).to(DEVICE) * 2 - 1
    rows = normal(2 * n, dtype=dtype) * 3, known, normal(2 * n, dtype=dtype), of_positions, through
    extra = normal(3 * n, dtype=dtype) if given else None
    return (*rows, c, weights_of(method, gated), scalar([0.2])), extra


def adjoint_arguments(method, stage, n, dtype, gated, finish=False):
    """output, z, forces, adjoint, through, coefficients, weights: for the launch of a stage, or of the finish."""
    u, z, forces, c, _ = arguments(method, stage, n, dtype, gated)
    adjoint, through = normal(2 * n, dtype=dtype), [normal(n, dtype=dtype) for _ in range(stage + finish)]
    return u, z, forces, adjoint, through, c, weights_of(method, gated, -0.3, growth=True)


def dense_of(gated):
    theta = torch.tensor([point for point, _ in POINTS], dtype=F64, device=DEVICE)
    return reference.dense_weights(theta, scalar([-0.3]), scalar([[1.0, 1.0, 0.0, -0.7]]), gated)


def rates_of(method, gated):
    return reference.step_weights(scalar([0.3]), scalar([[1.0, 1.0, 0.0, -0.7]]), method, gated, rates=True)


def able(method, pair):
    return method.gated is not None or pair[0] is IDENTITY


def cases():
    """Every method with every gate, each with one dtype and size; of nystrom4 every dtype with every gate."""
    k = 0
    for method, pair in itertools.product(METHODS.values(), GATES):
        for dtype in DTYPES if method is NYSTROM4 else DTYPES[k % 4 : k % 4 + 1]:
            if able(method, pair):
                yield method, pair, dtype, SIZES[k % 4]
                k += 1


CASES = pytest.mark.parametrize(("method", "pair", "dtype", "n"), list(cases()))


# --- values


@CASES
def test_stage(method, pair, dtype, n):
    for forces in range(method.stages):
        for output, ahead in ((True, True), (True, False), (False, True)):
            if forces + output + ahead <= method.stages:
                given = (*arguments(method, forces, n, dtype, pair[0] is not IDENTITY, output), method, *pair, ahead)
                all_close(KERNELS["nystrom_stage"](*given), REFERENCES["nystrom_stage"](*given))


@CASES
def test_finish(method, pair, dtype, n):
    for adaptive in (True, False):
        tensors = arguments(method, method.stages - 1, n, dtype, pair[0] is not IDENTITY)
        given = (*tensors, scalar(1e-2), scalar(1e-3), method, *pair, adaptive)
        actual, expected = KERNELS["nystrom_finish"](*given), REFERENCES["nystrom_finish"](*given)
        all_close(actual[:2], expected[:2])
        close_norms(actual.error, expected.error, dtype)
        assert (expected.error > 0) == adaptive


@CASES
def test_reverse_stage(method, pair, dtype, n):
    gated = pair[0] is not IDENTITY
    for stage, given in [*((i, False) for i in range(method.stages - 1)), (0, True)]:
        rows, extra = reverse_arguments(method, stage, n, dtype, gated, given)
        arguments = (normal(n, dtype=dtype) * 3, *rows, method, *pair, extra)
        all_close(KERNELS["nystrom_reverse_stage"](*arguments), REFERENCES["nystrom_reverse_stage"](*arguments))


@CASES
def test_reverse_finish(method, pair, dtype, n):
    gated = pair[0] is not IDENTITY
    for rates, given in ((None, False), (None, True), (rates_of(method, gated), True)):
        rows, extra = reverse_arguments(method, -1, n, dtype, gated, given, rates is not None)
        arguments = (*rows, method, pair[0], extra, rates)
        actual, expected = (run["nystrom_reverse_finish"](*arguments) for run in (KERNELS, REFERENCES))
        close(actual.cotangent, expected.cotangent)
        assert (actual.quadratures is None) == (expected.quadratures is None) == (rates is None)
        if rates is not None:
            assert actual.quadratures.dtype == F64
            # Sums of values computed in float32 at least.
            eps = torch.finfo(F64 if dtype == F64 else F32).eps
            torch.testing.assert_close(actual.quadratures, expected.quadratures, rtol=64 * eps, atol=64 * eps * n)


@CASES
def test_adjoint_stage(method, pair, dtype, n):
    for stage in range(method.stages):
        for ahead in {stage < method.stages - 1, False}:
            given = (*adjoint_arguments(method, stage, n, dtype, pair[0] is not IDENTITY), method, *pair, ahead)
            actual, expected = (run["nystrom_adjoint_stage"](*given) for run in (KERNELS, REFERENCES))
            all_close(actual, expected)
            assert [x is None for x in actual] == [not ahead, stage == method.stages - 1, False]


@CASES
def test_adjoint_finish(method, pair, dtype, n):
    gated = pair[0] is not IDENTITY
    for adaptive, quadratures, dense in ((True, False, None), (False, True, None), (True, True, dense_of(gated))):
        tensors = adjoint_arguments(method, method.stages - 1, n, dtype, gated, finish=True)
        given = (*tensors, scalar(-0.3), scalar(1e-2), scalar(1e-3), method, *pair, adaptive, quadratures, dense)
        actual, expected = (run["nystrom_adjoint_finish"](*given) for run in (KERNELS, REFERENCES))
        all_close(actual[:2], expected[:2])
        close_norms(actual.error, expected.error, dtype)
        assert (expected.error > 0) == adaptive
        assert (actual.quadratures is None) == (expected.quadratures is None) == (not quadratures)
        if quadratures:
            assert actual.quadratures.dtype == F64
            assert bool(expected.quadratures[1]) == (dense is not None)
            # Sums of values computed in float32 at least; of rounded ones where the end is looked at.
            eps = torch.finfo(dtype if dense is not None else F64 if dtype == F64 else F32).eps
            torch.testing.assert_close(actual.quadratures, expected.quadratures, rtol=64 * eps, atol=64 * eps * n)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("method", METHODS.values(), ids=list(METHODS))
def test_growth(method, gated):
    """On the device and on the host; by e^(γ c h) the adjoint's own variables become the adjoint."""
    if gated and method.gated is None:
        return
    own, h, gamma = size_of(method, gated), -0.3, 0.7
    given = scalar([h]), scalar([[1.0, 1.0, 0.0, -gamma]] * 2), method, gated, False, True
    expected = reference.step_weights(*given)
    torch.testing.assert_close(kernel.launch_step_weights(*given), expected, rtol=1e-14, atol=1e-16)
    assert len(expected) == size_of(method, gated, growth=True)
    torch.testing.assert_close(expected[:own], weights_of(method, gated, h), rtol=0, atol=0)
    on_host = plain_weights(method, gamma, h, gated) + plain_growth(method, gamma, h)
    torch.testing.assert_close(scalar(on_host), expected, rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(expected[own:][: method.stages], torch.exp(gamma * h * scalar(method.c)))


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("method", METHODS.values(), ids=list(METHODS))
def test_rates_are_derivatives_of_weights(method, gated):
    """Against those that autograd makes of the weights, and of the kernel."""
    if gated and method.gated is None:
        return
    gamma = torch.tensor(0.7, dtype=F64, device=DEVICE)
    numbers, h = reference.table(method, gated, gamma.device), torch.tensor(0.3, dtype=F64, device=DEVICE)
    expected = torch.func.jacfwd(lambda gamma: reference.weights_for(numbers, h, gamma, gated))(gamma)
    torch.testing.assert_close(rates_of(method, gated), expected, rtol=1e-13, atol=1e-15)
    given = scalar([0.3]), scalar([[1.0, 1.0, 0.0, -0.7]] * 2), method, gated, True
    torch.testing.assert_close(kernel.launch_step_weights(*given), expected, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("times", [0, 1, 3])
@pytest.mark.parametrize(
    ("gate", "dtype", "n"), [*zip((IDENTITY, SOFTCLIP, HARDTANH, IDENTITY), DTYPES, SIZES, strict=True)]
)
def test_dense_output(gate, dtype, n, times):
    z, end = (normal(2 * n, dtype=dtype) for _ in range(2))
    force, end_force = (normal(n, dtype=dtype) for _ in range(2))
    theta = torch.linspace(0.1, 0.9, times, dtype=F64, device=DEVICE)
    gated = gate is not IDENTITY
    weights = reference.dense_weights(theta, scalar([0.3]), scalar([[1.0, 1.0, 0.0, -0.7]]), gated)
    given = (z, force, end, end_force, weights, gate)
    close(KERNELS["nystrom_dense_output"](*given), REFERENCES["nystrom_dense_output"](*given))
    if times:
        out = [torch.zeros(times, 2 * n, dtype=dtype, device=DEVICE) for _ in range(2)]
        span = torch.tensor([times - 1, 1], device=DEVICE)  # the last one alone
        for run, memory in zip((KERNELS, REFERENCES), out, strict=True):
            run["nystrom_dense_output"](*given, memory, span)
        close(*out)
        assert [bool(row.any()) for row in out[0]] == [False] * (times - 1) + [True]


@pytest.mark.parametrize("gamma", [0.0, 0.7])
@pytest.mark.parametrize("gated", [True, False])
def test_weights(gated, gamma):
    dt, coefficients = scalar([-0.3]), scalar([[1.0, 1.0, 0.0, -gamma]] * 2)
    for method in METHODS.values():
        if gated <= (method.gated is not None):
            actual = kernel.launch_step_weights(dt, coefficients, method, gated)
            expected = reference.step_weights(dt, coefficients, method, gated)
            torch.testing.assert_close(actual, expected, rtol=1e-14, atol=1e-16)
            assert len(actual) == reference.size_of(method, gated)
    theta = torch.rand(100, dtype=F64).to(DEVICE)
    actual = kernel.launch_dense_weights(theta, dt, coefficients, gated)
    torch.testing.assert_close(actual, reference.dense_weights(theta, dt, coefficients, gated), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("method", METHODS.values(), ids=list(METHODS))
def test_what_a_plan_leaves_out_is_zero(method, gated):
    """Whatever the step size and the damping; and what it takes in has a weight."""
    if gated and method.gated is None:
        return
    plan, weights = plan_of(method, gated), weights_of(method, gated)
    held = torch.zeros(len(weights), dtype=torch.bool)
    for first, *used in (*plan.positions, *plan.paths, *plan.ends):
        for j, one in enumerate(used):
            if one:
                assert not held[first + j]
                held[first + j] = True
    assert torch.equal(held, weights.cpu() != 0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("adaptive", [True, False])
def test_values_that_are_not_finite_are_seen(bad, adaptive):
    """In the field's last output and in a force; in a block's last element."""
    for place in ("output", "force"):
        u, z, forces, c, weights = arguments(NYSTROM4, 3, 1025, F32, True)
        {"output": u, "force": forces[1]}[place][-1] = bad
        given = (u, z, forces, c, weights, scalar(1e-3), scalar(1e-3), NYSTROM4, ODD, IDENTITY, adaptive)
        for run in (KERNELS, REFERENCES):
            assert not torch.isfinite(run["nystrom_finish"](*given).error), place
    for place in ("output", "force", "adjoint", "through"):
        u, z, forces, adjoint, through, *numbers = adjoint_arguments(NYSTROM4, 3, 1025, F32, True, finish=True)
        {"output": u, "force": forces[1], "adjoint": adjoint, "through": through[3]}[place][-1] = bad
        given = (u, z, forces, adjoint, through, *numbers, *[scalar(1e-3)] * 3, NYSTROM4, ODD, IDENTITY)
        for run in (KERNELS, REFERENCES):
            error = run["nystrom_adjoint_finish"](*given, adaptive, False, None).error
            assert not torch.isfinite(error), place


def test_empty_state():
    for run in (KERNELS, REFERENCES):
        given = arguments(NYSTROM4, 3, 0, F32, True)
        done = run["nystrom_finish"](*given, scalar(1.0), scalar(1.0), NYSTROM4, ODD, ODD, True)
        assert [x.numel() for x in done] == [0, 0, 1]
        assert done.error == 0
        u, z, forces, *rest = given
        done = run["nystrom_stage"](u, z, forces[:1], *rest, NYSTROM4, ODD, ODD, True)
        assert [x.numel() for x in done] == [0, 0]
        (z, *rest), _ = reverse_arguments(NYSTROM4, 1, 0, F32, True)
        done = run["nystrom_reverse_stage"](u, z, *rest, NYSTROM4, ODD, ODD, None)
        assert [x.numel() for x in done] == [0, 0]
        rows, _ = reverse_arguments(NYSTROM4, -1, 0, F32, True)
        done = run["nystrom_reverse_finish"](*rows, NYSTROM4, ODD, None, rates_of(NYSTROM4, True))
        assert [x.tolist() for x in done] == [[], [0.0, 0.0]]
        done = run["nystrom_adjoint_stage"](*adjoint_arguments(NYSTROM4, 1, 0, F32, True), NYSTROM4, ODD, ODD, True)
        assert [x.numel() for x in done] == [0, 0, 0]
        given = adjoint_arguments(NYSTROM4, 3, 0, F32, True, finish=True)
        done = run["nystrom_adjoint_finish"](*given, *[scalar(1.0)] * 3, NYSTROM4, ODD, ODD, True, True, dense_of(True))
        assert [x.tolist() for x in done] == [[], [], 0.0, [0.0, 0.0]]


# --- the operators


def operator_cases():
    """(operator, arguments) as registered."""
    form = (*gates.kernel_form(ODD), *gates.kernel_form(IDENTITY))
    u, z, forces, c, weights = arguments(NYSTROM4, 3, 65, F32, True)
    yield nystrom_stage._operator, (u, z, forces[:1], c, weights, "nystrom4", *form, True)
    yield nystrom_stage._operator, (u, z, forces[:1], c, weights, "nystrom4", *form, False)
    yield nystrom_stage._operator, (None, z, forces, c, weights, "nystrom4", *form, True)
    yield nystrom_finish._operator, (u, z, forces, c, weights, c[0, 0], c[0, 1], "nystrom4", *form, True)
    dense = torch.rand(3, 2, 8, dtype=F64, device=DEVICE)
    yield nystrom_dense_output._operator, (z, u, z + 1, u, dense, *form[:2])
    for stage, given in ((2, False), (0, True)):
        rows, extra = reverse_arguments(NYSTROM4, stage, 65, F32, True, given)
        yield nystrom_reverse_stage._operator, (u, *rows, "nystrom4", *form, extra)
    for rates in (None, rates_of(NYSTROM4, True)):
        rows, extra = reverse_arguments(NYSTROM4, -1, 65, F32, True)
        yield nystrom_reverse_finish._operator, (*rows, "nystrom4", *form[:2], extra, rates)
    for stage, ahead in ((0, False), (1, True), (3, False)):
        rows = adjoint_arguments(NYSTROM4, stage, 65, F32, True)
        yield nystrom_adjoint_stage._operator, (*rows, "nystrom4", *form, ahead)
    for sums, dense in ((False, None), (True, None), (True, dense_of(True))):
        rows = adjoint_arguments(NYSTROM4, 3, 65, F32, True, finish=True)
        numbers = c[0, 2], c[0, 0], c[0, 1]
        yield nystrom_adjoint_finish._operator, (*rows, *numbers, "nystrom4", *form, True, sums, dense)


@pytest.mark.parametrize("k", range(15))
def test_operators_are_registered_as_torch_wants(k):
    operator, given = list(operator_cases())[k]
    torch.library.opcheck(operator, given)


def calls():
    """The public functions on one set of arguments, by name."""
    u, z, forces, c, weights = arguments(NYSTROM4, 3, 65, F32, True)
    tol, dense = scalar(1e-3), torch.rand(3, 2, 8, dtype=F64, device=DEVICE)
    gates = SOFTCLIP, SOFTCLIP
    back, _ = reverse_arguments(NYSTROM4, 1, 65, F32, True)
    (start, _), rates = reverse_arguments(NYSTROM4, -1, 65, F32, True), rates_of(NYSTROM4, True)
    stage, end = (adjoint_arguments(NYSTROM4, 3, 65, F32, True, finish)[1:] for finish in (False, True))
    return {
        "nystrom_adjoint_stage": lambda x: nystrom_adjoint_stage.nystrom_adjoint_stage(
            x, *stage, NYSTROM4, *gates, ahead=False
        ),
        "nystrom_adjoint_finish": lambda x: nystrom_adjoint_finish.nystrom_adjoint_finish(
            x, *end, tol, tol, tol, NYSTROM4, *gates, quadratures=True
        ),
        "nystrom_stage": lambda x: nystrom_stage.nystrom_stage(x, z, forces[:2], c, weights, NYSTROM4, *gates),
        "nystrom_finish": lambda x: nystrom_finish.nystrom_finish(x, z, forces, c, weights, tol, tol, NYSTROM4, *gates),
        "nystrom_dense_output": lambda x: nystrom_dense_output.nystrom_dense_output(z, x, z, x, dense, SOFTCLIP),
        "nystrom_reverse_stage": lambda x: nystrom_reverse_stage.nystrom_reverse_stage(x, *back, NYSTROM4, *gates),
        "nystrom_reverse_finish": lambda x: nystrom_reverse_finish.nystrom_reverse_finish(
            *start[:4], x, *start[5:], NYSTROM4, SOFTCLIP, None, rates
        ),
    }, u


@pytest.mark.parametrize("name", OPERATORS)
def test_an_operator_is_one_node_of_a_compiled_graph(name):
    functions, u = calls()
    check_one_node(name, functions[name], u)


@pytest.mark.parametrize("name", OPERATORS)
def test_backward_through_an_operator_raises(name):
    functions, u = calls()
    check_no_backward(functions[name], u)


def test_a_gate_without_a_triton_form_takes_the_reference():
    u, z, forces, c, weights = arguments(NYSTROM4, 3, 5, F64, True)
    own, tol = gates.get(torch.tanh), scalar(1e-3)
    done = [nystrom_stage.nystrom_stage(u, z, forces[:1], c, weights, NYSTROM4, g, g).h for g in (own, TANH)]
    torch.testing.assert_close(*done)
    done = [nystrom_finish.nystrom_finish(u, z, forces, c, weights, tol, tol, NYSTROM4, g, g).z for g in (own, TANH)]
    torch.testing.assert_close(*done)
    dense = torch.rand(3, 2, 8, dtype=F64, device=DEVICE)
    dense[:, 0, 4:] = dense[:, 1, :4] = 0  # as with a gate it is
    done = [nystrom_dense_output.nystrom_dense_output(z, u, z, u, dense, g) for g in (own, TANH)]
    torch.testing.assert_close(*done)
    rows, _ = reverse_arguments(NYSTROM4, 1, 5, F64, True)
    run = nystrom_reverse_stage.nystrom_reverse_stage
    torch.testing.assert_close(*(run(u, *rows, NYSTROM4, g, g).cotangent for g in (own, TANH)))
    rows, _ = reverse_arguments(NYSTROM4, -1, 5, F64, True)
    last = nystrom_reverse_finish.nystrom_reverse_finish
    torch.testing.assert_close(*(last(*rows, NYSTROM4, g).cotangent for g in (own, TANH)))
    rows, stage = adjoint_arguments(NYSTROM4, 1, 5, F64, True), nystrom_adjoint_stage.nystrom_adjoint_stage
    torch.testing.assert_close(*(list(stage(*rows, NYSTROM4, g, g)) for g in (own, TANH)))
    rows, end = adjoint_arguments(NYSTROM4, 3, 5, F64, True, True), nystrom_adjoint_finish.nystrom_adjoint_finish
    rest = True, True, dense_of(True)
    torch.testing.assert_close(*(list(end(*rows, tol, tol, tol, NYSTROM4, g, g, *rest)) for g in (own, TANH)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"output": torch.zeros(4)}, "output must be contiguous, of 5 elements"),
        ({"output": torch.zeros(5, dtype=F64)}, r"output must be contiguous, of 5 elements, torch\.float32"),
        ({"forces": [torch.zeros(10)[::2]]}, r"strides \(2,\)"),
        ({"forces": [torch.zeros(5)] * 3}, "1 stages after the first 4 of nystrom4, which has 4"),
        ({"output": None, "ahead": False}, "0 stages after the first 1"),
        ({"coefficients": torch.zeros(2, 4)}, r"coefficients must have shape \(3, 4\) or more rows"),
        ({"weights": torch.zeros(5)}, r"weights must have shape \(61,\)"),
        ({"weights": torch.zeros(61, dtype=F16)}, "weights must be contiguous float32 or float64"),
    ],
)
def test_arguments_that_a_kernel_would_misread_are_refused(change, message):
    given = {
        "output": torch.zeros(5),
        "z": torch.zeros(10),
        "forces": [torch.zeros(5)],
        "coefficients": torch.zeros(4, 4),
        "weights": torch.zeros(61),
        "method": NYSTROM4,
        "gate_x": SOFTCLIP,
        "gate_f": SOFTCLIP,
    }
    with pytest.raises(ValueError, match=message):
        nystrom_stage.nystrom_stage(**(given | change))


def test_other_arguments_that_a_kernel_would_misread_are_refused():
    x, z, c, tol = torch.zeros(5), torch.zeros(10), torch.zeros(4, 4), torch.tensor(0.1)
    rest = (NYSTROM4, SOFTCLIP, SOFTCLIP)
    with pytest.raises(ValueError, match="2 forces and an output for nystrom4, which has 4 stages"):
        nystrom_finish.nystrom_finish(x, z, [x, x], c, torch.zeros(61), tol, tol, *rest)
    with pytest.raises(ValueError, match=r"weights must have shape \(61,\)"):
        nystrom_finish.nystrom_finish(x, z, [x, x, x], c, torch.zeros(60), tol, tol, *rest)
    with pytest.raises(ValueError, match=r"weights must have shape \(times, 2, 8\), got \(1, 2, 6\)"):
        nystrom_dense_output.nystrom_dense_output(z, x, z, x, torch.zeros(1, 2, 6), SOFTCLIP)
    with pytest.raises(ValueError, match="end_force must be contiguous, of 5 elements"):
        nystrom_dense_output.nystrom_dense_output(z, x, z, z, torch.zeros(1, 2, 8), SOFTCLIP)


def test_arguments_of_the_reverse_sweep_that_a_kernel_would_misread_are_refused():
    x, given = torch.zeros(5), torch.zeros(15)
    numbers = torch.zeros(4, 4), torch.zeros(61), torch.zeros(1)
    rest, z = (NYSTROM4, SOFTCLIP, SOFTCLIP), torch.zeros(10)
    stage, finish = nystrom_reverse_stage.nystrom_reverse_stage, nystrom_reverse_finish.nystrom_reverse_finish
    with pytest.raises(ValueError, match="2 forces for nystrom4, which looks at 3"):
        stage(x, z, [x, x], z, [], None, *numbers, *rest)
    with pytest.raises(ValueError, match="no stage for output before 3 others of nystrom4: it has 4"):
        stage(x, z, [x, x, x], z, [x, x], x, *numbers, *rest)
    with pytest.raises(ValueError, match="through must be contiguous, of 5 elements"):
        stage(x, z, [x, x, x], z, [], z, *numbers, *rest)
    with pytest.raises(ValueError, match="given must be contiguous, of 15 elements"):
        stage(x, z, [x, x, x], z, [], x, *numbers, *rest, given[:10])
    with pytest.raises(ValueError, match="1 of_positions for nystrom4, expected 2"):
        finish(z, [x, x, x], z, [x], x, *numbers, *rest[:2], given)
    with pytest.raises(ValueError, match=r"weights must have shape \(61,\), got \(60,\)"):
        finish(z, [x, x, x], z, [x, x], x, *numbers, *rest[:2], None, torch.zeros(60))
    with pytest.raises(ValueError, match="0 forces for nystrom4, which looks at 3"):
        finish(z, [], z, [x, x], x, numbers[0], torch.zeros(32), numbers[2], NYSTROM4, IDENTITY, None, torch.zeros(32))


def test_arguments_of_the_adjoint_that_a_kernel_would_misread_are_refused():
    x, z = torch.zeros(5), torch.zeros(10)
    numbers, rest, tol = (torch.zeros(4, 4), torch.zeros(68)), (NYSTROM4, SOFTCLIP, SOFTCLIP), torch.zeros(())
    stage, finish = nystrom_adjoint_stage.nystrom_adjoint_stage, nystrom_adjoint_finish.nystrom_adjoint_finish
    with pytest.raises(ValueError, match="1 stages after the first 4 of nystrom4, which has 4"):
        stage(x, z, [x] * 3, z, [x] * 3, *numbers, *rest)
    with pytest.raises(ValueError, match="1 through with 2 forces"):
        stage(x, z, [x] * 2, z, [x], *numbers, *rest)
    with pytest.raises(ValueError, match="adjoint must be contiguous, of 10 elements"):
        stage(x, z, [x], x, [x], *numbers, *rest)
    with pytest.raises(ValueError, match=r"weights must have shape \(68,\), got \(61,\)"):
        stage(x, z, [x], z, [x], numbers[0], torch.zeros(61), *rest)
    with pytest.raises(ValueError, match="3 forces, an output and 3 through for nystrom4, which has 4 stages"):
        finish(x, z, [x] * 3, z, [x] * 3, *numbers, tol, tol, tol, *rest)
    with pytest.raises(ValueError, match=r"dense must have shape \(3, 2, 8\), got \(3, 2, 6\)"):
        finish(x, z, [x] * 3, z, [x] * 4, *numbers, tol, tol, tol, *rest, dense=torch.zeros(3, 2, 6))


def test_on_a_cpu_the_reference_runs_and_on_a_cuda_device_the_kernel():
    check_choice(OPERATORS)
