"""The adjoint's and the reverse sweep's operators for momentum systems: the torch references against autograd, and
every kernel against its reference: under triton's interpreter on a CPU, compiled on a CUDA device."""

import importlib

import pytest
import torch
from kernel_support import (
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
    rows_of,
    scalar,
)

from benchmarks import traffic
from nesterov_triton import gates, tableaus
from nesterov_triton.ops import momentum_adjoint_finish as adjoint_finish
from nesterov_triton.ops import momentum_adjoint_stage as adjoint_stage
from nesterov_triton.ops import momentum_reverse_finish as reverse_finish
from nesterov_triton.ops import momentum_reverse_stage as reverse_stage
from nesterov_triton.ops.momentum_adjoint_finish import momentum_adjoint_finish
from nesterov_triton.ops.momentum_adjoint_stage import momentum_adjoint_stage
from nesterov_triton.ops.momentum_reverse_finish import momentum_reverse_finish
from nesterov_triton.ops.momentum_reverse_stage import momentum_reverse_stage
from nesterov_triton.ops.momentum_stage import momentum_stage
from nesterov_triton.stepping.explicit_rk import error_norm

pytestmark = pytest.mark.usefixtures("poisoned")
SIZES = (1025, 7, 517, 1)  # blocks are of 256 to 1024
PUBLIC = {
    "momentum_stage": momentum_stage,
    "momentum_adjoint_stage": momentum_adjoint_stage,
    "momentum_adjoint_finish": momentum_adjoint_finish,
    "momentum_reverse_stage": momentum_reverse_stage,
    "momentum_reverse_finish": momentum_reverse_finish,
}
OPERATORS = tuple(PUBLIC)[1:]


# --- the references against autograd


class Problem:
    """A momentum system whose field mixes its elements, on one step.

    κ, s, γ and ξ at a stage are those of (κ, s, -ξ κ, -γ), with numbers of the stage's own for κ and s, and for γ a
    factor, so that a coefficient of the wrong stage shows.
    """

    def __init__(self, tableau, pair, sees_momentum=False, n=6, dt=0.3):
        self.tableau, self.pair, self.sees_momentum, self.n = tableau, pair, sees_momentum, n
        self.total = len(tableau.all_a)
        self.z, self.cotangent = normal(2 * n, dtype=F64), normal(2 * n, dtype=F64)
        self.weight = normal(n, n, dtype=F64)
        self.xi, self.gamma, self.dt = scalar(0.4), scalar(0.7), scalar(dt)
        scale, drive = torch.linspace(0.8, 1.4, self.total), torch.linspace(-1.0, -1.3, self.total)
        self.scale, self.drive = scale.to(DEVICE, F64), drive.to(DEVICE, F64)

    def coefficients(self, xi=None, gamma=None):
        xi, gamma = self.xi if xi is None else xi, self.gamma if gamma is None else gamma
        return torch.stack((self.scale, self.drive, -xi * self.scale, -gamma.expand(self.total)), dim=1)

    def field(self, i, h, m, weight=None):
        u = 4 * torch.sin((self.weight if weight is None else weight) @ h + 0.1 * i)
        return u - 0.5 * m * h if self.sees_momentum else u

    def slope(self, i, x, m, coefficients, weight=None):
        """(x', m') at stage i and the field's output."""
        scale, drive, q, minus_gamma = coefficients[i]
        u = self.field(i, scale * x, m, weight)
        return self.pair[0](m), drive * self.pair[1](u) + q * x + minus_gamma * m, u

    def through(self, i, h, m, g):
        """v, and w where the field sees m."""
        h, m = (None if row is None else row.clone().requires_grad_() for row in (h, m))
        u = self.field(i, h, m)
        return torch.autograd.grad(u, (h, m) if self.sees_momentum else (h,), g)


def reverse_sweep(problem, run, stages, seeds=(), pairs=True):
    """The sweep over a step as a solver does it: ReverseFinish and all g, in stage order."""
    p = problem
    c, method, pairs = p.coefficients(), (p.tableau, *p.pair), pairs and not p.sees_momentum
    h, momenta, outputs, slopes = [], [], [], []
    while len(outputs) < stages:
        new, ahead = outputs[len(slopes) :], min(2 if pairs else 1, stages - len(outputs))
        done = run["momentum_stage"](new, p.z, slopes, c, p.dt, *method, ahead, p.sees_momentum)
        h, slopes = [*h, *done.h], [*slopes, *done.slopes]
        momenta.extend([done.m] * ahead)
        outputs.extend([p.field(i, h[i], momenta[i]) for i in range(len(outputs), len(h))])
    through, through_m, cotangents = [], [], []
    while len(through) < stages:
        left = stages - len(through)
        first = max(left - (2 if pairs else 1), 0)
        done = run["momentum_reverse_stage"](
            outputs[first:left], p.z, slopes, p.cotangent, through, c, p.dt, p.tableau, stages, *p.pair, seeds,
            through_m,
        )  # fmt: skip
        slopes = [*slopes, *done.slopes]
        found = [p.through(i, h[i], momenta[i], g) for i, g in enumerate(done.cotangents, first)]
        through = [*(rows[0] for rows in found), *through]
        through_m = [*(rows[1] for rows in found), *through_m] if p.sees_momentum else []
        cotangents = [*done.cotangents, *cotangents]
    return run["momentum_reverse_finish"](
        p.z, slopes, p.cotangent, through, c, p.dt, p.tableau, stages, *p.pair, True, seeds, through_m
    ), cotangents


def check_sweep(problem, run, stages, seeded, pairs):
    """Everything that comes out of a sweep against autograd through the whole step."""
    p = problem
    seeds = [normal(2 * p.n, dtype=F64) for _ in range(stages)] if seeded else []
    leaves = [tensor.clone().requires_grad_() for tensor in (p.z, p.xi, p.gamma)]
    z, xi, gamma = leaves
    slopes, outputs = [], []
    for i in range(stages):
        x, m = (z + p.dt * sum(a * k for a, k in zip(p.tableau.all_a[i], slopes, strict=True))).view(2, -1)
        dx, dm, u = p.slope(i, x, m, p.coefficients(xi, gamma))
        slopes.append(torch.cat((dx, dm)))
        outputs.append(u)
    loss = p.cotangent @ z + sum(p.dt * b * (p.cotangent @ k) for b, k in zip(p.tableau.b, slopes, strict=False))
    loss = loss + sum(p.dt * (seed @ k) for seed, k in zip(seeds, slopes, strict=False))
    of_z, of_xi, of_gamma, *of_outputs = torch.autograd.grad(loss, [*leaves, *outputs], materialize_grads=True)

    done, cotangents = reverse_sweep(p, run, stages, seeds, pairs)
    near(done.cotangent, of_z)
    near(-done.quadratures, torch.stack((of_xi, of_gamma)))
    near(torch.stack(cotangents), torch.stack(of_outputs))  # hence the field's parameters' gradients too


def near(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


SWEEPS = [
    # method, gates, stages, seeds, two stages a launch, the field sees m
    ("dopri5", (SOFTCLIP, SOFTCLIP), 6, False, True, False),
    ("dopri5", (TANH, HARDTANH), 6, False, False, False),
    ("dopri5", (HARDTANH, TANH), 7, True, True, False),
    ("dopri5", (IDENTITY, IDENTITY), 5, True, True, False),
    ("dopri5", (SOFTCLIP, TANH), 6, False, True, True),
    ("dopri5", (IDENTITY, TANH), 7, True, True, True),
    ("tsit5", (TANH, TANH), 6, False, True, False),
    ("bosh3", (TANH, IDENTITY), 4, True, True, False),
    ("bosh3", (TANH, IDENTITY), 3, False, True, False),
    ("rk4", (TANH, TANH), 4, False, True, False),
    ("midpoint", (SOFTCLIP, TANH), 2, False, True, False),
    ("euler", (SOFTCLIP, TANH), 1, True, True, False),
    ("dopri8", (TANH, SOFTCLIP), 12, False, True, False),
    ("dopri8", (TANH, SOFTCLIP), 16, True, True, False),
]


@pytest.mark.parametrize("by", ["reference", "operator", "own gate", "kernel"])
@pytest.mark.parametrize(("method", "pair", "stages", "seeded", "pairs", "sees_momentum"), SWEEPS)
def test_a_reverse_sweep_is_autograd_through_the_step(method, pair, stages, seeded, pairs, sees_momentum, by):
    if by == "own gate":
        pair = gates.get(torch.tanh), gates.get(torch.sin)
    run = {"reference": REFERENCES, "kernel": KERNELS}.get(by, PUBLIC)
    check_sweep(Problem(tableaus.get(method), pair, sees_momentum), run, stages, seeded, pairs)


def adjoint_step(problem, run, pairs=True, start=None, tolerances=(1e-3, 1e-4)):
    """One step of the joint system as a solver does it: AdjointFinish, its last dm and v, and the number of launches.

    start: dm_0 and v_0, where they are known.
    """
    p, stages = problem, problem.tableau.stages
    c, method, pairs = p.coefficients(), (p.tableau, *p.pair), pairs and not p.sees_momentum
    slopes, through = ([], []) if start is None else ([start[0]], [start[1]])
    done = run["momentum_stage"](
        [], p.z, slopes, c, p.dt, *method, min(2 if pairs else 1, stages - len(slopes)), p.sees_momentum
    )
    through_m = []
    while len(slopes) < stages:
        first, h = len(slopes), done.h
        m = done.m
        outputs = [p.field(i, h_i, m) for i, h_i in enumerate(h, first)]
        ahead = min(2 if pairs else 1, stages - first - len(outputs))
        done = run["momentum_adjoint_stage"](
            outputs, p.z, slopes, p.cotangent, through, c, p.dt, *method, ahead, p.sees_momentum, through_m
        )
        assert len(done.h) == ahead
        slopes = [*slopes, *done.slopes]
        found = [p.through(i, h_i, m, g) for i, (h_i, g) in enumerate(zip(h, done.cotangents, strict=True), first)]
        through = [*through, *(rows[0] for rows in found)]
        through_m = [*through_m, *(rows[1] for rows in found)] if p.sees_momentum else []
    done = run["momentum_adjoint_finish"](
        p.z, slopes, p.cotangent, through, c, p.dt, *map(scalar, tolerances), *method, True, through_m
    )
    return done, slopes[-1], through[-1]


def joint_slope(problem, i, joint):
    """The right-hand side of (x, m, a_x, a_m) at stage i, [4 N], half of it by autograd; and ⟨h, a_m⟩, ⟨m, a_m⟩."""
    p = problem
    state, adjoint = joint.view(2, -1)
    z = state.detach().requires_grad_()
    x, m = z.view(2, -1)
    slope = torch.cat(p.slope(i, x, m, p.coefficients())[:2])
    (of_z,) = torch.autograd.grad(slope, z, adjoint)
    a_m = adjoint[p.n :]
    return torch.cat((slope.detach(), -of_z)), torch.stack((p.scale[i] * (x.detach() @ a_m), m.detach() @ a_m))


def check_adjoint(problem, run, pairs, known):
    """An adjoint step against a plain Runge-Kutta step of the joint system."""
    p, tableau = problem, problem.tableau
    joint = torch.cat((p.z, p.cotangent))
    slopes, sums = [], []
    for i in range(tableau.stages):
        k, products = joint_slope(p, i, joint + p.dt * sum(a * k for a, k in zip(tableau.a[i], slopes, strict=True)))
        slopes.append(k)
        sums.append(products)
    new = joint + p.dt * sum(b * k for b, k in zip(tableau.b, slopes, strict=True))
    integrals = p.dt * sum(b * one for b, one in zip(tableau.b, sums, strict=True))
    start = None
    if known:
        x, m = p.z.view(2, -1)
        u = p.field(0, p.scale[0] * x, m).requires_grad_()
        (g,) = torch.autograd.grad(p.drive[0] * p.pair[1](u), u, p.cotangent[p.n :])
        start = slopes[0][p.n : 2 * p.n].clone(), p.through(0, p.scale[0] * x, m, g)[0]

    done, last, _ = adjoint_step(p, run, pairs, start)
    near(done.state, new)
    near(done.quadratures, integrals)
    near(last, slopes[-1][p.n : 2 * p.n])
    if tableau.adaptive:
        rows = torch.stack([p.dt * sum(e * k for e, k in zip(row, slopes, strict=True)) for row in tableau.error])
        expected = error_norm(rows, torch.maximum(joint.abs(), new.abs()), 1e-3, 1e-4)
        assert float(done.error) == pytest.approx(expected, rel=1e-9)
    else:
        assert done.error == 0


ADJOINTS = [
    # method, gates, two stages a launch, dm_0 and v_0 known, the field sees m
    ("dopri5", (SOFTCLIP, SOFTCLIP), True, True, False),
    ("dopri5", (TANH, HARDTANH), False, True, False),
    ("dopri5", (HARDTANH, TANH), True, False, False),
    ("dopri5", (IDENTITY, IDENTITY), True, True, False),
    ("dopri5", (TANH, SOFTCLIP), True, False, True),
    ("dopri5", (IDENTITY, TANH), True, False, True),
    ("adaptive_heun", (TANH, TANH), True, False, False),
    ("bosh3", (TANH, IDENTITY), True, True, False),
    ("rk4", (TANH, TANH), True, False, False),
    ("midpoint", (SOFTCLIP, TANH), False, False, False),
    ("euler", (SOFTCLIP, TANH), True, False, False),
    ("dopri8", (TANH, SOFTCLIP), True, True, False),
]


@pytest.mark.parametrize("by", ["reference", "operator", "own gate", "kernel"])
@pytest.mark.parametrize(("method", "pair", "pairs", "known", "sees_momentum"), ADJOINTS)
def test_an_adjoint_step_is_a_step_of_the_joint_system(method, pair, pairs, known, sees_momentum, by):
    if by == "own gate":
        pair = gates.get(torch.tanh), gates.get(torch.sin)
    run = {"reference": REFERENCES, "kernel": KERNELS}.get(by, PUBLIC)
    for dt in (0.3, -0.3) if by != "kernel" else (-0.3,):
        check_adjoint(Problem(tableaus.get(method), pair, sees_momentum, dt=dt), run, pairs, known)


# --- the kernels against the references


def adjoint_stage_arguments(tableau, known, new, n, dtype, sees_momentum=False):
    """outputs, z, slopes, adjoint, through, coefficients, dt; and through_m."""
    u, z, dm, c, dt = momentum_arguments(tableau, new, known, n, dtype)
    v, w = ([normal(n, dtype=dtype) for _ in range(count)] for count in (known, known * sees_momentum))
    return (u, z, dm, normal(2 * n, dtype=dtype), v, c, dt), w


def adjoint_finish_arguments(tableau, n, dtype, sees_momentum=False):
    """z, slopes, adjoint, through, coefficients, dt, rtol, atol; and through_m."""
    (_, *tensors), w = adjoint_stage_arguments(tableau, tableau.stages, 0, n, dtype, sees_momentum)
    return (*tensors, scalar(1e-2), scalar(1e-3)), w


def reverse_arguments(tableau, stages, following, new, slopes, n, dtype, seeded=False, sees_momentum=False):
    """outputs, z, slopes, cotangent, through, coefficients, dt; and seeds, through_m."""
    u, z, dm, c, dt = momentum_arguments(tableau, new, slopes, n, dtype)
    through = stages - following
    v, w = ([normal(n, dtype=dtype) for _ in range(count)] for count in (through, through * sees_momentum))
    seeds = [normal(2 * n, dtype=dtype) for _ in range(stages * seeded)]
    return (u, z, dm, normal(2 * n, dtype=dtype), v, c, dt), seeds, w


def close_sums(actual, expected, n):
    """Sums over n elements, added up in float32 or float64 within a block."""
    assert actual.dtype == expected.dtype == F64
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6 * n)


METHODS = ("dopri5", "rk4", "bosh3", "adaptive_heun", "midpoint", "tsit5")


def adjoint_stage_cases():
    k = 0
    for name in METHODS:
        stages = tableaus.get(name).stages
        for known in range(stages):
            new = min(1 + k % 2, stages - known)
            yield (
                name,
                known,
                new,
                min(2, stages - known - new),
                k % 3 == 0,
                GATES[k % 5],
                DTYPES[k % 4],
                SIZES[(k + k // 4) % 4],
            )
            k += 1
    for pair in GATES:
        for dtype in DTYPES:
            yield "dopri5", 3, 2, 2, True, pair, dtype, SIZES[(k + k // 4) % 4]
            k += 1
    yield "dopri8", 9, 2, 2, False, GATES[0], F32, 517


@pytest.mark.parametrize(
    ("method", "known", "new", "ahead", "momentum", "pair", "dtype", "n"), list(adjoint_stage_cases())
)
def test_momentum_adjoint_stage(method, known, new, ahead, momentum, pair, dtype, n):
    tableau = tableaus.get(method)
    tensors, w = adjoint_stage_arguments(tableau, known, new, n, dtype, sees_momentum=momentum and new == 1)
    arguments = (*tensors, tableau, *pair, ahead, momentum, w)
    actual = KERNELS["momentum_adjoint_stage"](*arguments)
    assert [len(actual.h), len(actual.slopes), len(actual.cotangents)] == [ahead, new, new]
    assert (actual.m is not None) == (momentum and ahead > 0)
    all_close(actual, REFERENCES["momentum_adjoint_stage"](*arguments))


def finish_cases():
    k = 0
    for name in METHODS:
        yield name, k % 2 == 0, k % 3 == 0, GATES[k % 5], DTYPES[k % 4], SIZES[(k + k // 4) % 4]
        k += 1
    for pair in GATES:
        for dtype in DTYPES:
            yield "dopri5", k % 2 == 0, k % 3 == 0, pair, dtype, SIZES[(k + k // 4) % 4]
            k += 1
    yield "dopri8", True, False, GATES[0], F32, 517


@pytest.mark.parametrize(("method", "quadratures", "sees_momentum", "pair", "dtype", "n"), list(finish_cases()))
def test_momentum_adjoint_finish(method, quadratures, sees_momentum, pair, dtype, n):
    tableau = tableaus.get(method)
    tensors, w = adjoint_finish_arguments(tableau, n, dtype, sees_momentum)
    arguments = (*tensors, tableau, *pair, quadratures, w)
    actual = KERNELS["momentum_adjoint_finish"](*arguments)
    expected = REFERENCES["momentum_adjoint_finish"](*arguments)
    close(actual.state, expected.state)
    close_norms(actual.error, expected.error, dtype)
    assert (actual.quadratures is not None) == quadratures
    if quadratures:
        close_sums(actual.quadratures, expected.quadratures, n)


def reverse_stage_cases():
    k = 0
    for name in METHODS:
        stages = tableaus.get(name).stages
        for following in range(1, stages + 1):
            new = min(1 + k % 2, following)
            missing = new == 2 and following == stages and k % 3 != 0
            yield (
                name,
                stages,
                following,
                new,
                stages - 1 - missing,
                k % 5 == 0,
                GATES[k % 5],
                DTYPES[k % 4],
                SIZES[(k + k // 4) % 4],
            )
            k += 1
    for pair in GATES:
        for dtype in DTYPES:
            yield "dopri5", 6, 6 - k % 2, 2, 4 + k % 2, False, pair, dtype, SIZES[(k + k // 4) % 4]
            k += 1
    yield "dopri8", 16, 2, 2, 15, True, GATES[0], F32, 517


@pytest.mark.parametrize(
    ("method", "stages", "following", "new", "slopes", "seeded", "pair", "dtype", "n"), list(reverse_stage_cases())
)
def test_momentum_reverse_stage(method, stages, following, new, slopes, seeded, pair, dtype, n):
    tableau = tableaus.get(method)
    tensors, *more = reverse_arguments(tableau, stages, following, new, slopes, n, dtype, seeded, new == 1)
    arguments = (*tensors, tableau, stages, *pair, *more)
    actual = KERNELS["momentum_reverse_stage"](*arguments)
    assert [len(actual.cotangents), len(actual.slopes)] == [new, stages - 1 - slopes]
    all_close(actual, REFERENCES["momentum_reverse_stage"](*arguments))


@pytest.mark.parametrize(("method", "quadratures", "seeded", "pair", "dtype", "n"), list(finish_cases()))
def test_momentum_reverse_finish(method, quadratures, seeded, pair, dtype, n):
    tableau = tableaus.get(method)
    stages = tableau.stages - (tableau.b[-1] == 0) if n % 2 else len(tableau.all_a)
    tensors, *more = reverse_arguments(tableau, stages, 0, 0, stages - 1, n, dtype, seeded, dtype == F32)
    arguments = (*tensors[1:], tableau, stages, *pair, quadratures, *more)
    actual = KERNELS["momentum_reverse_finish"](*arguments)
    expected = REFERENCES["momentum_reverse_finish"](*arguments)
    close(actual.cotangent, expected.cotangent)
    assert (actual.quadratures is not None) == quadratures
    if quadratures:
        close_sums(actual.quadratures, expected.quadratures, n)


def test_empty_state():
    for run in (KERNELS, REFERENCES):
        tensors, w = adjoint_stage_arguments(DOPRI5, 3, 2, 0, F32)
        done = run["momentum_adjoint_stage"](*tensors, DOPRI5, TANH, TANH, 2, True, w)
        assert [row.numel() for row in rows_of(done)] == [0] * 7
        tensors, w = adjoint_finish_arguments(DOPRI5, 0, F32)
        done = run["momentum_adjoint_finish"](*tensors, DOPRI5, TANH, TANH, True, w)
        assert [done.state.numel(), float(done.error), *done.quadratures] == [0, 0, 0, 0]
        tensors, *more = reverse_arguments(DOPRI5, 6, 6, 2, 4, 0, F32)
        done = run["momentum_reverse_stage"](*tensors, DOPRI5, 6, TANH, TANH, *more)
        assert [row.numel() for row in rows_of(done)] == [0] * 3
        (_, *tensors), *more = reverse_arguments(DOPRI5, 6, 0, 0, 5, 0, F32)
        done = run["momentum_reverse_finish"](*tensors, DOPRI5, 6, TANH, TANH, True, *more)
        assert [done.cotangent.numel(), *done.quadratures] == [0, 0, 0]


@pytest.mark.parametrize("method", ["dopri5", "dopri8", "rk4"])
def test_values_that_are_not_finite_are_seen(method):
    """Wherever they are, in a block's last element; the last slopes too, at which dopri8's error does not look."""
    tableau, n = tableaus.get(method), 65
    for where, which in (
        ("z", None),
        ("slopes", 0),
        ("slopes", -1),
        ("adjoint", None),
        ("through", 0),
        ("through", -1),
    ):
        tensors, w = adjoint_finish_arguments(tableau, n, F32)
        given = dict(zip(("z", "slopes", "adjoint", "through"), tensors, strict=False))
        (given[where] if which is None else given[where][which])[-1] = torch.inf
        for run in (KERNELS, REFERENCES):
            done = run["momentum_adjoint_finish"](*tensors, tableau, IDENTITY, TANH, True, w)
            assert not torch.isfinite(done.error), (where, which)


def test_sums_are_the_same_in_every_run_and_do_not_change_the_norm():
    tensors, w = adjoint_finish_arguments(DOPRI5, 2100, F32)
    first, second, without = (
        KERNELS["momentum_adjoint_finish"](*tensors, DOPRI5, ODD, ODD, wanted, w) for wanted in (True, True, False)
    )
    assert torch.equal(first.quadratures, second.quadratures)
    assert torch.equal(first.error, second.error)
    # Other blocks, hence another order of summation.
    torch.testing.assert_close(first.error, without.error, rtol=1e-6, atol=0.0)


def test_the_hardtanhs_slope_is_that_of_the_torch_form_at_its_kinks():
    u = torch.tensor([-1.5, -1.0, 1.5, 2.0, 0.0], dtype=F64, device=DEVICE)
    z, c = normal(10, dtype=F64), torch.rand(7, 4, dtype=F64).to(DEVICE)
    arguments = ([u], z, [], normal(10, dtype=F64), [], c, scalar(0.1), DOPRI5, HARDTANH, HARDTANH, 0, False, [])
    actual = KERNELS["momentum_adjoint_stage"](*arguments)
    assert (actual.cotangents[0] == 0).tolist() == [True, False, True, True, False]
    all_close(actual, REFERENCES["momentum_adjoint_stage"](*arguments))


@pytest.mark.parametrize("pairs", [True, False])
def test_a_step_takes_the_launches_that_are_counted(pairs, monkeypatch):
    """With the quadratures too, which are added up in the norm's launch, and in one more after a reverse sweep."""
    from nesterov_triton.ops.runge_kutta.kernel import start

    started = []
    modules = "momentum_stage", "momentum_adjoint_stage", "momentum_adjoint_finish"
    modules += "momentum_reverse_stage", "momentum_reverse_finish", "runge_kutta"
    for name in modules:
        module = importlib.import_module(f"nesterov_triton.ops.{name}.kernel")
        monkeypatch.setattr(module, "start", lambda kernel, *a, **k: (started.append(kernel), start(kernel, *a, **k)))
    problem = Problem(DOPRI5, (SOFTCLIP, SOFTCLIP))
    known = normal(problem.n, dtype=F64), normal(problem.n, dtype=F64)
    adjoint_step(problem, KERNELS, pairs, known)
    assert len(started) == len(traffic.momentum_adjoint_step(DOPRI5, pairs))
    started.clear()
    reverse_sweep(problem, KERNELS, 6, pairs=pairs)
    assert len(started) == len(traffic.momentum_reverse_step(DOPRI5, pairs)) + 1


# --- the operators


def operator_cases():
    """(operator, arguments) as registered."""
    form = (*gates.kernel_form(ODD), *gates.kernel_form(IDENTITY))
    tensors, w = adjoint_stage_arguments(DOPRI5, 3, 2, 65, F32)
    yield adjoint_stage._operator, (*tensors, "dopri5", *form, 2, False, w)
    tensors, w = adjoint_stage_arguments(DOPRI5, 3, 1, 65, F32, sees_momentum=True)
    yield adjoint_stage._operator, (*tensors, "dopri5", *form, 1, True, w)
    for quadratures in (True, False):
        tensors, w = adjoint_finish_arguments(DOPRI5, 65, F32, sees_momentum=quadratures)
        yield adjoint_finish._operator, (*tensors, "dopri5", *form, quadratures, w)
    for slopes in (4, 5):
        tensors, *more = reverse_arguments(DOPRI5, 6, 6, 2, slopes, 65, F32, slopes == 4)
        yield reverse_stage._operator, (*tensors, "dopri5", 6, *form, *more)
    for quadratures in (True, False):
        (_, *tensors), *more = reverse_arguments(DOPRI5, 6, 0, 0, 5, 65, F32, quadratures)
        yield reverse_finish._operator, (*tensors, "dopri5", 6, *form, quadratures, *more)


@pytest.mark.parametrize("k", range(8))
def test_operators_are_registered_as_torch_wants(k):
    operator, arguments = list(operator_cases())[k]
    torch.library.opcheck(operator, arguments)


def calls():
    """The public functions on one set of arguments each, by name, as functions of the coefficients."""
    pair = SOFTCLIP, SOFTCLIP
    (u, z, dm, a, v, c, dt), _ = adjoint_stage_arguments(DOPRI5, 3, 2, 65, F32)
    (_, all_dm, _, all_v, *_), _ = adjoint_finish_arguments(DOPRI5, 65, F32)
    return {
        "momentum_adjoint_stage": lambda c: momentum_adjoint_stage(u, z, dm, a, v, c, dt, DOPRI5, *pair, 2, True),
        "momentum_adjoint_finish": lambda c: momentum_adjoint_finish(
            z, all_dm, a, all_v, c, dt, dt, dt, DOPRI5, *pair, True
        ),
        "momentum_reverse_stage": lambda c: momentum_reverse_stage(u, z, all_dm[:4], a, [], c, dt, DOPRI5, 6, *pair),
        "momentum_reverse_finish": lambda c: momentum_reverse_finish(
            z, all_dm[:5], a, all_v[:6], c, dt, DOPRI5, 6, *pair
        ),
    }, c


@pytest.mark.parametrize("name", OPERATORS)
def test_an_operator_is_one_node_of_a_compiled_graph(name):
    functions, c = calls()
    check_one_node(name, functions[name], c)


@pytest.mark.parametrize("name", OPERATORS)
def test_backward_through_an_operator_raises(name):
    functions, c = calls()
    check_no_backward(functions[name], c)


def test_on_a_cpu_the_reference_runs_and_on_a_cuda_device_the_kernel():
    check_choice(OPERATORS)


def row(n=5, dtype=F32):
    return torch.zeros(n, dtype=dtype)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("momentum_adjoint_stage", {"outputs": [row(4)]}, "outputs must be contiguous, of 5 elements"),
        ("momentum_adjoint_stage", {"adjoint": row(5)}, "adjoint must be contiguous, of 10 elements"),
        ("momentum_adjoint_stage", {"through": [row(), row(dtype=F64)]}, "through must be contiguous"),
        ("momentum_adjoint_stage", {"through_m": [row(), row(10)[::2]]}, r"strides \(2,\)"),
        ("momentum_adjoint_stage", {"through": [row()]}, "1 through and 0 through_m with 2 slopes"),
        ("momentum_adjoint_stage", {"through_m": [row()]}, "2 through and 1 through_m with 2 slopes"),
        ("momentum_adjoint_stage", {"outputs": [row()] * 2, "through_m": [row()] * 2}, "one stage after the other"),
        ("momentum_adjoint_stage", {"outputs": []}, "outputs must be those of 1 or 2 stages, got 0"),
        ("momentum_adjoint_stage", {"ahead": 3}, "3 stages after the first 3 of dopri5"),
        ("momentum_adjoint_stage", {"ahead": -1}, "-1 stages after the first 3 of dopri5"),
        ("momentum_adjoint_stage", {"coefficients": torch.zeros(3, 4)}, r"coefficients must have shape \(4, 4\)"),
        ("momentum_adjoint_finish", {"slopes": [row()] * 6}, "6 slopes, 7 through and 0 through_m for dopri5: 7"),
        ("momentum_adjoint_finish", {"through_m": [row()]}, "7 slopes, 7 through and 1 through_m for dopri5: 7"),
        ("momentum_adjoint_finish", {"through": [row(6)] * 7}, "through must be contiguous, of 5 elements"),
        ("momentum_adjoint_finish", {"rtol": torch.zeros((), dtype=F16)}, "rtol must be contiguous float32 or"),
        ("momentum_reverse_stage", {"outputs": [row()] * 3}, "outputs must be those of 1 or 2 stages, got 3"),
        ("momentum_reverse_stage", {"stages": 8}, "with 8 stages of dopri5, which has 7"),
        ("momentum_reverse_stage", {"through": [row()] * 5}, "2 outputs before 5 through, with 6 stages"),
        ("momentum_reverse_stage", {"slopes": [row()] * 3}, "3 slopes with 6 stages, expected 5"),
        ("momentum_reverse_stage", {"slopes": [row()] * 4, "through": [row()]}, "4 slopes with 6 stages, expected 5"),
        ("momentum_reverse_stage", {"outputs": [row()], "slopes": [row()] * 4}, "4 slopes with 6 stages, expected 5"),
        ("momentum_reverse_stage", {"seeds": [row(10)] * 5}, "5 seeds with 6 stages"),
        ("momentum_reverse_stage", {"seeds": [row()] * 6}, "seeds must be contiguous, of 10 elements"),
        ("momentum_reverse_stage", {"through": [row()], "through_m": [row()]}, "one stage after the other"),
        ("momentum_reverse_finish", {"stages": 0}, "0 stages of dopri5, which has 7"),
        ("momentum_reverse_finish", {"slopes": [row()] * 6}, "6 slopes and 6 through with 6 stages, expected 5 and 6"),
        ("momentum_reverse_finish", {"through_m": [row()]}, "0 seeds and 1 through_m with 6 stages"),
        ("momentum_reverse_finish", {"cotangent": row(10, F64)}, "cotangent must be contiguous, of 10 elements"),
    ],
)
def test_arguments_that_a_kernel_would_misread_are_refused(name, change, message):
    arguments = {"z": row(10), "coefficients": torch.zeros(7, 4), "dt": torch.tensor(0.1), "tableau": DOPRI5}
    arguments |= {"gate_x": SOFTCLIP, "gate_f": SOFTCLIP}
    if name == "momentum_adjoint_stage":
        arguments |= {"outputs": [row()], "adjoint": row(10), "slopes": [row()] * 2, "through": [row()] * 2}
    elif name == "momentum_adjoint_finish":
        arguments |= {"adjoint": row(10), "slopes": [row()] * 7, "through": [row()] * 7}
        arguments |= {"rtol": torch.tensor(0.1), "atol": torch.tensor(0.1)}
    elif name == "momentum_reverse_stage":
        arguments |= {"outputs": [row()] * 2, "cotangent": row(10), "slopes": [row()] * 5, "through": [], "stages": 6}
    else:
        arguments |= {"cotangent": row(10), "slopes": [row()] * 5, "through": [row()] * 6, "stages": 6}
    with pytest.raises(ValueError, match=message):
        PUBLIC[name](**(arguments | change))
