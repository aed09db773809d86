"""What goes wrong in a field at any call, in either pass, is told as it is, and a later solve knows nothing of it.
Hundreds of solves leave nothing behind, and solves at the same time do not see each other."""

import gc
import random
import sys
import threading

import pytest
import torch
from support import KEPT, Field, features, live_tensors

import nesterov_triton as nt
from nesterov_triton.stepping.scratch import SHELF


@pytest.fixture(scope="module")
def few_objects():
    """What there is already is not looked at again: a collection, and a count, take a hundredth of their time."""
    SHELF.clear()
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


class Faulty(Field):
    """Does at one call what it is told to, once."""

    def __init__(self, seed=0):
        super().__init__(2, 3, seed=seed)
        self.calls, self.at, self.fault = 0, 0, None

    def forward(self, t, h):
        self.calls += 1
        out = super().forward(t, h)
        if self.calls != self.at:
            return out
        if isinstance(self.fault, BaseException):
            raise self.fault
        return out * self.fault

    def arm(self, at, fault):
        self.calls, self.at, self.fault = 0, at, fault


TIMES = (1.0, 1.4, 2.0)


def layer(make, **options):
    def solver(field, times=TIMES, rtol=1e-3):
        made = make(field, rtol=rtol, atol=rtol / 10, **options).double()
        return lambda h: made(h, t=times)

    return solver


def front(interface, **options):
    def solver(field, times=TIMES, rtol=1e-3):
        t = torch.tensor(times, dtype=torch.float64)
        return lambda h: interface(field, h, t, rtol=rtol, atol=rtol / 10, **options)

    return solver


def until(field, times=TIMES, rtol=1e-3):
    """Ends at an event, whose time counts as well."""
    t0 = torch.tensor(1.0, dtype=torch.float64)

    def solve(h):
        def event_fn(t, y):
            return t - times[-1] + 0.1 - 0.01 * y[0, 0]

        time, states = nt.odeint_event(
            field, h, t0, event_fn=event_fn, odeint_interface=nt.odeint, rtol=1e-4, atol=1e-5
        )
        return states * time

    return solve


SOLVERS = {
    "NODE discrete": layer(nt.NODE),
    "NODE kept": layer(nt.NODE, gradient=KEPT),
    "NODE kept fixed steps": layer(nt.NODE, gradient=KEPT, method="rk4", step_size=0.1),
    "NODE adjoint": layer(nt.NODE, gradient="adjoint"),
    "NODE fixed steps": layer(nt.NODE, method="rk4", step_size=0.2),
    "NODE device loop discrete": layer(nt.NODE, loop="graph"),
    "GNesterovNODE discrete": layer(nt.GNesterovNODE),
    "GNesterovNODE kept": layer(nt.GNesterovNODE, gradient=KEPT),
    "GNesterovNODE kept nystrom4": layer(nt.GNesterovNODE, gradient=KEPT, method="nystrom4"),
    "GNesterovNODE adjoint nystrom4": layer(nt.GNesterovNODE, gradient="adjoint", method="nystrom4"),
    "GNesterovNODE adjoint": layer(nt.GNesterovNODE, gradient="adjoint"),
    "GNesterovNODE backprop": layer(nt.GNesterovNODE, gradient="backprop"),
    "GNesterovNODE device loop discrete": layer(nt.GNesterovNODE, loop="graph"),
    "GNesterovNODE device loop adjoint": layer(nt.GNesterovNODE, loop="graph", gradient="adjoint"),
    "odeint": front(nt.odeint),
    "odeint fixed steps": front(nt.odeint, method="rk4", options={"step_size": 0.2}),
    "odeint cubic": front(nt.odeint, method="rk4", options={"step_size": 0.3, "interp": "cubic"}),
    "odeint dopri8": front(nt.odeint, method="dopri8"),
    "odeint backprop": front(nt.odeint, gradient="backprop"),
    "odeint rows": front(nt.odeint, per_sample=True),
    "odeint_adjoint": front(nt.odeint_adjoint),
    "odeint_adjoint discrete": front(nt.odeint_adjoint, gradient="discrete"),
    "odeint_event": until,
}


def prepared(name):
    """A field, and a run of both passes: the states, and the gradients of input and parameters."""
    field = Faulty()
    solve = SOLVERS[name](field)

    def run():
        h = features(3, 2).requires_grad_()
        out = solve(h)
        forward = field.calls
        return forward, out.detach(), torch.autograd.grad(out.square().sum(), (h, *field.parameters()))

    return field, run


def same(run, expected):
    _, out, found = run()
    return torch.equal(out, expected[1]) and all(map(torch.equal, found, expected[2]))


@pytest.mark.parametrize("fault", ["exception", "interrupt", "nan", "inf"])
@pytest.mark.parametrize("name", SOLVERS)
def test_a_fault_at_a_random_call_of_either_pass(name, fault, few_objects):
    field, run = prepared(name)
    expected = run()
    forward, total = expected[0], field.calls
    draw = random.Random(f"{name} {fault}")
    calls = [1, *draw.sample(range(2, forward + 1), 2)]
    calls += draw.sample(range(forward + 1, total + 1), 2) if total > forward else []
    kind = {"exception": KeyError, "interrupt": KeyboardInterrupt}.get(fault)
    left = []
    for at in calls:
        thrown = kind("mine") if kind else float(fault)
        field.arm(at, thrown)
        raised = values = None
        try:
            _, out, found = run()
        except BaseException as error:
            raised = error
        else:
            assert bool(out.isfinite().all()) or at > forward
            values = torch.cat([x.reshape(-1) for x in (out, *found)])
        if kind:
            assert raised is thrown
        elif raised is not None:
            assert isinstance(raised, nt.SolveError)
            assert raised.status is nt.Status.NON_FINITE
        elif bool(values.isfinite().all()):
            # An attempt that is not finite is made again, shorter; what cannot be made again is not finite.
            exact = torch.cat([x.reshape(-1) for x in (expected[1], *expected[2])])
            torch.testing.assert_close(values, exact, rtol=1e-2, atol=1e-2)  # a gate takes inf for its bound
        field.arm(0, None)
        raised = thrown = out = found = values = exact = None
        if at in (calls[0], calls[-1]):
            assert same(run, expected)
            gc.collect()
            left.append(live_tensors())
    assert not any(p._backward_hooks for p in field.parameters())
    assert left[-1] <= left[0]


LEAKS = [
    "NODE device loop discrete",
    "NODE kept fixed steps",
    "GNesterovNODE discrete",
    "GNesterovNODE kept",
    "GNesterovNODE kept nystrom4",
    "GNesterovNODE adjoint",
    "GNesterovNODE adjoint nystrom4",
    "GNesterovNODE backprop",
    "odeint",
    "odeint rows",
    "odeint_adjoint",
    "odeint_event",
]


class Held:
    """What a node of an autograd graph has saved. Nodes themselves are below Python, where nobody counts them."""

    def __init__(self, tensor):
        self.tensor = tensor.detach()  # or a node that saves its own output would keep itself


ONE_WAY = [(name, False) for name in LEAKS if "kept" in name or name == "GNesterovNODE discrete"]


@pytest.mark.parametrize(("name", "backward"), [*((name, True) for name in LEAKS), *ONE_WAY])
def test_two_hundred_solves_leave_nothing_behind(name, backward, few_objects):
    """No tensor, no graph, nothing that Python knows of."""
    field = Faulty()
    solve, h = SOLVERS[name](field, (1.0, 1.1, 1.2), 1e-1), features(3, 2).requires_grad_()

    def left(solves):
        with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor):
            for _ in range(solves):
                loss = solve(h).square().mean()
                if backward:
                    loss.backward()
        del loss
        gc.collect()
        held = sum(type(x) is Held for x in gc.get_objects())
        return live_tensors(), held, len(gc.get_objects())

    tensors, _, objects = left(10)
    tensors_later, held, objects_later = left(200)
    assert tensors_later == tensors
    assert held == 0
    assert objects_later <= objects + 20  # not one for every ten solves


TOGETHER = [
    ("NODE discrete", "GNesterovNODE adjoint"),
    ("GNesterovNODE discrete", "GNesterovNODE backprop"),
    ("NODE device loop discrete", "GNesterovNODE device loop adjoint"),
    ("GNesterovNODE device loop discrete", "GNesterovNODE device loop discrete"),
    ("odeint", "odeint rows"),
    ("odeint_adjoint", "odeint_event"),
]


@pytest.mark.parametrize("names", TOGETHER, ids=" and ".join)
def test_two_threads_with_two_layers(names):
    """Both passes, to the bit what each finds alone."""
    runs = [prepared(name)[1] for name in names]
    expected = [run() for run in runs]
    start, right, interval = threading.Barrier(2), [0, 0], sys.getswitchinterval()

    def work(k):
        start.wait()
        for _ in range(6):
            right[k] += same(runs[k], expected[k])

    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=work, args=(k,)) for k in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert right == [6, 6]
