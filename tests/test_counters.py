"""The benchmark's counters on cases counted by hand; by them the solver's operators, host reads, memory per step."""

import pytest
import torch

import nesterov_triton as nt
from benchmarks.counters import LiveMemory, MarkedField, OperatorCount, per_step
from benchmarks.problems import PackageSystem, Problem

# --- the counters themselves


def test_operators_are_counted_below_autograd_without_views_and_allocations():
    x = torch.ones(3, 4, requires_grad=True)
    with OperatorCount() as count:
        y = x.t().reshape(-1) * 2  # a view, a copy, a view and a product
        torch.empty(3)
        y.sum().backward()
    assert count.solver["aten.clone.default"] == 1
    assert count.solver["aten.sum.default"] == 1
    assert count.solver["aten.mul.Tensor"] == 2  # once forward, once backward
    assert not {"aten.t.default", "aten._unsafe_view.default", "aten.empty.memory_format"} & set(count.solver)
    assert count.views["aten.empty.memory_format"] == 1
    assert count.host_reads == 0


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(),
        lambda x: float(x[0]),
        lambda x: bool(x[0] > 0),
        lambda x: x.tolist(),
        lambda x: x.numpy(),
        lambda x: torch.equal(x, x),
        lambda x: x.add(x, alpha=x[0]),
        lambda x: x.nonzero(),
    ],
    ids=["item", "float", "bool", "tolist", "numpy", "equal", "alpha", "nonzero"],
)
def test_every_way_to_read_a_value_on_the_host_is_seen(read):
    with OperatorCount() as count:
        read(torch.ones(3))
    assert count.host_reads == 1


def test_operators_of_a_marked_field_are_set_aside():
    field = MarkedField(lambda t, h: torch.tanh(h) * h.sum().item())
    h = torch.ones(3)
    with OperatorCount(field) as count:
        h = field(None, h + 1)
        h = field(None, h)
        h.sum().item()
    assert field.calls == 2
    assert count.field == {"aten.tanh.default": 2, "aten.sum.default": 2, "aten.mul.Tensor": 2}
    assert count.solver == {"aten.add.Tensor": 1, "aten.sum.default": 1}
    assert count.host_reads == 1


def test_bytes_moved_are_arguments_read_and_results_written():
    x, out = torch.ones(10), torch.empty(10)
    with OperatorCount() as count:
        torch.add(x, x, out=out)  # two read, one written
        out.copy_(x)  # one and one
        out.mul_(2.0)  # one and one
        x.view(2, 5).sum()  # ten values read, one written
    assert count.moved == 4 * (30 + 20 + 20 + 11)


def test_a_field_that_raises_is_marked_no_longer():
    field = MarkedField(lambda t, h: h.no_such_method())
    with pytest.raises(AttributeError):
        field(None, torch.ones(1))
    assert not field.running


def test_a_count_is_split_into_set_up_and_steps():
    counts = [(a, r, 7 + 5 * a + 3 * r) for a, r in ((4, 0), (6, 1), (9, 1), (11, 4))]
    found = per_step(counts)
    assert (found.setup, found.accepted, found.rejected) == pytest.approx((7, 5, 3))
    assert found.residual == pytest.approx(0, abs=1e-9)
    assert per_step([*counts, (5, 0, 7 + 25 + 10)]).residual > 1
    with pytest.raises(ValueError, match="different numbers of accepted steps"):
        per_step([(4, 0, 1), (4, 1, 2)])


def test_live_memory_follows_storages_until_they_die():
    x = torch.ones(1000)
    with LiveMemory() as memory:
        y = x + 1
        z = y.view(10, 100)
        x.view(-1).add_(1)  # storages from before do not count
        del y
        assert memory.live == x.nbytes  # the view keeps it alive
        del z
        assert memory.live == 0
        products = [x * i for i in range(3)]
        del products
        assert (memory.live, memory.peak) == (0, 3 * x.nbytes)


def test_live_memory_sees_what_autograd_keeps():
    x = torch.ones(1000, requires_grad=True)
    with LiveMemory() as memory:
        y = x
        for _ in range(5):
            y = torch.sin(y)
        assert memory.live == 5 * x.nbytes
        del y
        assert memory.live == 0


# --- the solver


@pytest.fixture(scope="module")
def problem():
    return Problem.draw(batch=64, width=32)


def counts_of_solves(problem, **options):
    """(accepted, rejected, operators, host reads) beside the field, one for each tolerance."""
    counts = []
    PackageSystem(problem.field).solve(problem.h0)  # makes what is made once and kept
    for tolerance in (1e-3, 1e-4, 1e-5, 1e-6, 1e-7):
        field = MarkedField(problem.field)
        package = PackageSystem(field)
        with OperatorCount(field) as count:
            package.solve(problem.h0, rtol=tolerance, atol=tolerance, **options)
        assert field.calls == package.stats.nfe_forward
        counts.append((package.accepted, package.rejected, count.solver.total(), count.host_reads))
    return counts


def test_operators_per_accepted_step(problem):
    found = per_step([(accepted, rejected, count) for accepted, rejected, count, _ in counts_of_solves(problem)])
    assert found.residual < 2  # a constant met for the first time is made and kept
    assert found.accepted <= 90


@pytest.mark.parametrize("method", ["dopri5", "dopri8"])
def test_no_operator_of_the_solver_may_run_in_lower_precision(problem, method):
    """Matrix products may, as TF32 or bfloat16, where torch is configured so; an error estimate would drown in it."""
    field = MarkedField(problem.field)
    with OperatorCount(field) as count:
        PackageSystem(field).solve(problem.h0, method=method)
    assert count.field["aten.addmm.default"] > 0
    assert not {"aten.mm.default", "aten.mm.out", "aten.addmm.default", "aten.addmm.out", "aten.bmm.default"} & set(
        count.solver
    )


@pytest.mark.parametrize("first_step", [None, 1.0])
def test_one_host_read_per_attempted_step(problem, first_step):
    """A first step over the whole interval is rejected, the more often the tighter the tolerance."""
    counts = counts_of_solves(problem, first_step=first_step)
    if first_step is not None:
        assert len({rejected for _, rejected, _, _ in counts}) > 1
    set_up = {reads - accepted - rejected for accepted, rejected, _, reads in counts}
    assert len(set_up) == 1


@pytest.mark.parametrize(
    ("method", "solves"),
    [
        ("dopri5", [{"rtol": tolerance, "atol": tolerance} for tolerance in (1e-3, 1e-5, 1e-6)]),
        ("rk4", [{"step_size": 1 / steps} for steps in (4, 8, 32)]),
    ],
)
@pytest.mark.parametrize(("gradient", "states_per_step"), [("adjoint", 0), ("discrete", 1)])
def test_growth_of_peak_memory_per_accepted_step(problem, gradient, states_per_step, method, solves):
    package = PackageSystem(problem.field)
    state = 2 * problem.h0.nbytes
    peaks = []
    for options in solves:
        with LiveMemory() as memory:
            problem.gradients(package.solve(problem.h0, method=method, gradient=gradient, **options))
        peaks.append((package.accepted, 0, memory.peak / state))
    assert per_step(peaks).accepted == pytest.approx(states_per_step, abs=0.01)


def test_backprop_keeps_far_more_than_a_state_per_step(problem):
    """What the two above are for, and that the tracker can tell."""
    package = PackageSystem(problem.field)
    peaks = []
    for steps in (4, 8):
        with LiveMemory() as memory:
            problem.gradients(package.solve(problem.h0, method="rk4", gradient="backprop", step_size=1 / steps))
        peaks.append((package.accepted, 0, memory.peak / (2 * problem.h0.nbytes)))
    assert per_step(peaks).accepted > 5


def test_the_backward_pass_holds_one_stages_gradient_of_the_parameters():
    """Beside their sum: with a large network in a small state these are the memory that counts."""
    net = torch.nn.Linear(200, 200, bias=False)
    solution = nt.solve(lambda t, y: torch.tanh(net(y)), torch.ones(1, 200), (0.0, 1.0), params=[net.weight])
    loss = solution.final.sum()
    with LiveMemory() as memory:
        loss.backward()
    assert memory.peak < 2.5 * net.weight.nbytes
