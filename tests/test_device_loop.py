"""The loop that is decided on the device: the eager loop's steps, values, gradients and failures, with no look at the
device in between. On a CPU its attempts are called one by one; on a CUDA device they are replayed."""

import contextlib
import copy
import functools
import gc
import itertools
import math
import queue
import random
import threading
import time
import warnings
import weakref
from contextlib import nullcontext

import pytest
import torch
from support import MODELS, Field, clone, features, gradients, live_tensors, options_for
from torch import nn

import nesterov_triton as nt
from benchmarks.counters import MarkedField, OperatorCount
from nesterov_triton import gates, tableaus
from nesterov_triton.gradients import on_device
from nesterov_triton.network import Network
from nesterov_triton.ops import control
from nesterov_triton.ops.control import Law, Setting, Slot, reference
from nesterov_triton.stepping import device_loop, graphs
from nesterov_triton.stepping.device_loop import DeviceLoop

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BY = "graph" if DEVICE == "cuda" else "device"
TIMES = {"two": (1.0, 2.0), "many": (1.0, 1.1, 1.15, 1.6, 2.0), "backward": (2.0, 1.4, 1.0)}
F64 = torch.float64


@pytest.fixture(autouse=True)
def _fresh():
    graphs.LOOPS.clear()
    graphs._warned.clear()
    yield
    graphs.LOOPS.clear()


def run(make, h, times):
    torch.manual_seed(0)
    layer = make().to(DEVICE)
    h = h.to(DEVICE).requires_grad_()
    out = layer(h, times)
    grads = gradients(layer, (out**2).sum() + out[-1:].sum(), h)
    return out.detach(), grads, layer.stats


COUNTS = ("accepted", "rejected", "nfe_forward", "nfe_backward")


def agree(make, h, times, eps=2e-13, counts=COUNTS):
    """The loop on the device against the eager one, twice: the second solve finds memory that has been used."""
    eager = run(lambda: make(loop="eager"), h, times)
    assert (eager[2].loop, eager[2].loop_backward) == ("eager", "eager")
    layer = make(loop="graph")
    for _ in range(2):
        out, grads, stats = run(lambda: layer, h, times)
        assert stats.loop.startswith(BY), stats.loop
        assert stats.loop_backward.startswith(BY), stats.loop_backward
        assert [getattr(stats, name) for name in counts] == [getattr(eager[2], name) for name in counts]
        for a, b in zip([out, *grads], [eager[0], *eager[1]], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=eps * max(1.0, b.abs().max().item()))


METHODS = [("dopri5", "many"), ("dopri5", "backward"), ("bosh3", "two"), ("tsit5", "two"), ("rk4", "many")]


@pytest.mark.parametrize("gradient", ["discrete", "adjoint"])
@pytest.mark.parametrize(("method", "times"), METHODS)
@pytest.mark.parametrize("model", list(MODELS))
def test_it_is_the_eager_loop(model, method, times, gradient):
    """On steps that do not depend on the error's last digits, to rounding."""
    make = lambda **loop: MODELS[model].layer(hidden=5, gradient=gradient, **options_for(method), **loop)  # noqa: E731
    agree(make, features(3, 2), TIMES[times])


@pytest.mark.parametrize("gradient", ["discrete", "adjoint"])
@pytest.mark.parametrize("method", ["dopri5", "bosh3"])
@pytest.mark.parametrize("model", list(MODELS))
def test_the_same_steps_are_accepted(model, method, gradient):
    options = {"method": method, "gradient": gradient, "rtol": 1e-6, "atol": 1e-6}
    make = lambda **loop: MODELS[model].layer(**options, **loop)  # noqa: E731
    agree(make, 2 * features(3, 2), TIMES["many"], 1e-9)


@pytest.mark.parametrize("gradient", ["discrete", "adjoint"])
@pytest.mark.parametrize("method", ["dopri8", "adaptive_heun", "fehlberg2"])
@pytest.mark.parametrize("model", ["NODE", "GNesterovNODE"])
def test_evaluations_that_are_not_saved(model, method, gradient):
    """The same steps; but a slope at a step's start that is no stage of the step before is computed in every attempt,
    and so are dense output's own stages, where the eager loop looks which attempts want them."""
    options = {"method": method, "gradient": gradient, "rtol": 1e-3, "atol": 1e-3}
    make = lambda **loop: MODELS[model].layer(**options, **loop)  # noqa: E731
    agree(make, 2 * features(3, 2), TIMES["many"], 1e-9, COUNTS[:2])


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("gradient", ["discrete", "adjoint"])
@pytest.mark.parametrize("model", list(MODELS))
def test_by_the_kernels(take, model, gradient):
    take("kernels")
    make = lambda **loop: MODELS[model].layer(gradient=gradient, **options_for("dopri5"), **loop)  # noqa: E731
    agree(make, features(3, 2), TIMES["many"])


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("gate", ["identity", "tanh", "hardtanh", nt.gates.Softclip(0.7)])
def test_gates_and_other_methods_by_the_kernels(take, gate):
    take("kernels")
    for options in (options_for("bosh3"), options_for("rk4")):
        make = lambda **loop: nt.GNesterovNODE(Field(), gate=gate, **options, **loop).double()  # noqa: E731, B023
        agree(make, features(3, 2), TIMES["two"])


@pytest.mark.usefixtures("runs_kernels")
def test_float32_takes_the_same_steps(take):
    take("kernels")
    options = {"rtol": 1e-3, "atol": 1e-3, "first_step": 0.3}
    make = lambda **loop: MODELS["GNesterovNODE"].layer(**options, **loop).float()  # noqa: E731
    agree(make, 3 * features(3, 2, dtype=torch.float32), TIMES["two"], 1e-5)


@pytest.mark.parametrize("controller", ["pi", nt.controllers.Integral(safety=0.7, max_factor=2.0)])
@pytest.mark.parametrize("gradient", ["discrete", "adjoint"])
def test_controllers(controller, gradient):
    options = {"controller": controller, "gradient": gradient, "rtol": 1e-7, "atol": 1e-7}
    agree(lambda **loop: MODELS["GNesterovNODE"].layer(**options, **loop), 3 * features(3, 2), TIMES["two"], 1e-9)


def test_without_a_gradient_and_a_larger_tolerance_for_x():
    h = features(3, 2).to(DEVICE)
    for loop in ("eager", "graph"):
        layer = MODELS["GNesterovNODE"].layer(rtol=torch.tensor(1e-5), atol=1e-7, loop=loop).to(DEVICE)
        with torch.no_grad():
            found = layer(h, TIMES["many"])
        if loop == "eager":
            eager = found
    assert layer.stats.loop.startswith(BY)
    torch.testing.assert_close(found, eager, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("gradient", ["discrete", "adjoint"])
def test_a_loop_made_in_inference_mode_serves_training(gradient):
    layer = nt.GNesterovNODE(Field(), gradient=gradient, loop="graph").double().to(DEVICE)
    h = features(3, 2).to(DEVICE)
    with torch.inference_mode():
        first = layer(h)
    with torch.no_grad():
        torch.testing.assert_close(layer(h), first, rtol=0, atol=0)
    eager = copy.deepcopy(layer).configure(loop="eager")
    found = []
    for each in (layer, eager):
        x = h.clone().requires_grad_()
        each(x).sum().backward()
        with torch.inference_mode():
            each(h)
        each(x).sum().backward()
        found.append([x.grad, *(p.grad for p in each.parameters())])
    assert layer.stats.loop.startswith(BY)
    assert layer.stats.loop_backward.startswith(BY)
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


class Einsum(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 2, dtype=F64))

    def forward(self, t, h):
        return torch.einsum("oi,bi->bo", self.weight, torch.tanh(h))


class Images(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1, dtype=F64)

    def forward(self, t, h):
        return torch.tanh(self.conv(h.to(memory_format=torch.channels_last))).contiguous()


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("field", "shape"), [(Einsum, (3, 2)), (Images, (2, 2, 4, 4))])
def test_gradients_in_another_layout_than_their_parameters(take, field, shape):
    """A kernel sees bare memory."""
    take("kernels")
    inner = field()
    make = lambda **loop: nt.NODE(copy.deepcopy(inner), gradient="adjoint", **options_for("bosh3"), **loop)  # noqa: E731
    agree(make, torch.randn(*shape, dtype=F64), TIMES["two"])


def test_fields_on_leaves_in_place_of_their_parameters():
    """What is captured of a backward pass: the same gradients, and none of autograd's own nodes for the parameters."""
    from nesterov_triton.gradients.problem import Aliased

    class Tied(Field):
        def __init__(self):
            super().__init__()
            self.again = self.a

        def forward(self, t, h):
            return super().forward(t, h) + (h @ self.again) @ self.out

    field, h, t = Tied(), features(3, 2), torch.ones((), dtype=F64)
    params = tuple(field.parameters())
    aliased = Aliased(field)
    own = aliased.of(params)
    assert not any(a is p for a, p in zip(own, params, strict=True))
    assert [a.data_ptr() for a in own] == [p.data_ptr() for p in params]
    expected = torch.autograd.grad(field(t, h).square().sum(), params)
    found = torch.autograd.grad(aliased(t, h).square().sum(), own)
    assert [torch.equal(a, b) for a, b in zip(found, expected, strict=True)] == [True] * len(params)
    assert tuple(field.parameters()) == params or all(a is b for a, b in zip(field.parameters(), params, strict=True))


def test_a_tape_that_is_full_is_emptied(monkeypatch):
    monkeypatch.setattr(device_loop, "TAPE_BYTES", 0)
    options = {"rtol": 1e-9, "atol": 1e-9}
    make = lambda **loop: MODELS["HBNODE"].layer(**options, **loop)  # noqa: E731
    h = 3 * features(3, 2)
    agree(make, h, TIMES["many"], 1e-8)
    layer = make(loop="graph").to(DEVICE)
    run(lambda: layer, h, TIMES["two"])
    assert layer.stats.accepted > 2 * 4


class Elsewhere(threading.Thread):
    """A device that does what it is told in order and when it likes, with an event behind what it was told so far."""

    def __init__(self, pause):
        super().__init__(daemon=True)
        self.todo, self.pause = queue.SimpleQueue(), pause
        self.marks, self.told, self.failed = 0, 0, None
        self.start()

    def run(self):
        while (job := self.todo.get()) is not None:
            time.sleep(self.pause())
            try:
                job()
            except Exception as error:
                self.failed = error

    def record(self):
        self.told += 1
        self.todo.put(lambda: setattr(self, "marks", self.marks + 1))

    def query(self):
        if self.failed is not None:
            raise self.failed
        return self.marks == self.told

    def synchronize(self):
        while not self.query():
            time.sleep(0)


@pytest.mark.parametrize("taped", [4, 64])
@pytest.mark.parametrize("pause", [0.0, 1e-3, "now and then"])
def test_the_host_runs_ahead_of_a_device_that_is_slow(monkeypatch, pause, taped):
    """What the host sees meanwhile is old, or half of it; it launches ahead, and counts what is there at the end."""
    draw = random.Random(0).random
    device = Elsewhere(lambda: 3e-3 * (draw() < 0.3) if pause == "now and then" else pause)
    called, looks = DeviceLoop._call, []

    def launch(self, name):
        if name not in self._costs:  # what it costs is known once it has been called
            called(self, name)
            self._event = device
            return
        self.used.add(name)
        device.todo.put(self.part(name))

    def look(self, unload=None):
        self.meanwhile = lambda: looks.append(device.query())
        return run_loop(self, unload)

    run_loop = DeviceLoop.run
    monkeypatch.setattr(DeviceLoop, "_call", launch)
    monkeypatch.setattr(DeviceLoop, "run", look)
    monkeypatch.setattr(device_loop, "TAPE_BYTES", 0 if taped == 4 else 2**20)
    field = Field()
    layers = [nt.GNesterovNODE(field, rtol=tol, atol=tol, loop="graph").double() for tol in (1e-5, 1e-9, 1e-3)]
    h = 3 * features(5, 2)
    for _ in range(2):
        for layer in layers:  # more steps than the last time, and fewer
            with torch.no_grad():
                expected = clone(layer, loop="eager")
                out, truth = layer(h, TIMES["many"]), expected(h, TIMES["many"])
            torch.testing.assert_close(out, truth, rtol=1e-12, atol=1e-12)
            assert [getattr(layer.stats, k) for k in COUNTS] == [getattr(expected.stats, k) for k in COUNTS]
            out = layer(h.requires_grad_())
            gradients(layer, out.sum(), h)
            assert layer.stats.accepted > 2
    with pytest.raises(nt.SolveError, match="max_steps") as failed:
        nt.GNesterovNODE(field, rtol=1e-9, atol=1e-9, max_steps=9, loop="graph").double()(h.detach())
    assert failed.value.steps == 9
    device.todo.put(None)
    assert len(looks) == 2 * 3 * 2 + 1


def test_no_host_read_for_a_step():
    """However many steps there are, the device is looked at as often, forward and backward."""
    for method, gradient in itertools.product(("dopri5", "nystrom4"), ("discrete", "adjoint")):
        reads, steps = [], []
        for tolerance in (1e-3, 1e-6, 1e-9):
            field = MarkedField(Field())
            options = {"method": method, "gradient": gradient, "rtol": tolerance, "atol": tolerance}
            layer = nt.GNesterovNODE(field, **options, loop="graph").double()
            h = (3 * features(3, 2)).to(DEVICE).requires_grad_()
            with OperatorCount(field) as count:
                layer.to(DEVICE)(h, (1.0, 1.5, 2.0)).sum().backward()
            reads.append(count.host_reads)
            steps.append(layer.stats.accepted + layer.stats.rejected)
        assert steps[0] < steps[1] < steps[2] < 64
        assert reads[0] == reads[1] == reads[2] < 12


# -- failures ----------------------------------------------------------------------------------------------------------


def bad_at(time):
    return lambda t, y: y / (t < time)


FAILURES = {
    "too many steps": (lambda t, y: -50 * y, {"max_steps": 7, "rtol": 1e-8, "atol": 1e-8}),
    "stiff": (lambda t, y: y**2, {"rtol": 1e-8, "atol": 1e-8}),
    "not finite at the start": (lambda t, y: y * torch.nan, {}),
    "not finite at the start, with a first step": (lambda t, y: y * torch.nan, {"first_step": 0.1}),
    "not finite at the start, without FSAL": (lambda t, y: y * torch.nan, {"method": "fehlberg2", "first_step": 0.1}),
    "not finite later": (bad_at(1.4), {}),
    "infinite": (lambda t, y: 1e300 * y.abs().exp(), {"rtol": 1e-2, "first_step": 0.3}),
    "fixed, not finite": (bad_at(1.4), {"method": "rk4", "step_size": 0.1}),
    "fixed, too many": (lambda t, y: y, {"method": "rk4", "step_size": 0.1, "max_steps": 5}),
    "fixed, too short": (lambda t, y: y, {"method": "rk4", "step_size": 1e-17, "max_steps": 10**20}),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", list(FAILURES))
def test_failures_are_the_eager_loops(name, dtype):
    """Status, time, step size, number of attempts, and the states that were reached."""
    field, options = FAILURES[name]
    y0 = torch.tensor([1.0, 2.0], dtype=dtype, device=DEVICE)
    found = []
    for loop in ("eager", "graph"):
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            found.append(nt.solve(field, y0, (1.0, 1.2, 1.3, 3.0), loop=loop, throw=False, **options))
    eager, device = found
    assert eager.status is not nt.Status.SUCCESS
    assert device.status is eager.status
    assert device.stats.loop.startswith(BY) or name in ("fixed, too many", "fixed, too short")
    torch.testing.assert_close(device.ys, eager.ys, rtol=1e-5, atol=1e-5, equal_nan=True)
    numbers = []
    for solution in found:
        text = solution.message.split(":")[0].replace(",", "").split()
        numbers.append([float(text[text.index(word) + skip]) for word, skip in (("t", 2), ("dt", 2), ("after", 1))])
    if name == "not finite later" or dtype == torch.float32:  # how often a kink is tried hangs on the last digit
        torch.testing.assert_close(numbers[1][0], numbers[0][0], rtol=1e-3, atol=1e-3)
    else:
        torch.testing.assert_close(torch.tensor(numbers[1]), torch.tensor(numbers[0]), rtol=1e-3, atol=1e-12)


def test_an_infinite_end_without_a_trace_in_the_error():
    """Beside an infinite state every error is small."""
    y0 = torch.ones(2, dtype=torch.float16, device=DEVICE)

    def constant(t, y):
        return torch.full_like(y, 4e4)

    for loop in ("eager", "graph"):
        with torch.no_grad():
            found = nt.solve(constant, y0, (1.0, 3.0), loop=loop, rtol=1e-2, atol=1e-2, throw=False)
        assert found.status is nt.Status.NON_FINITE
        assert bool(found.final.isnan().all())


def test_the_layer_works_after_a_failure():
    """On the loop that failed: the same key."""
    bad = []

    class Sometimes(Field):
        def forward(self, t, h):
            return super().forward(t, h) * (torch.nan if bad else 1.0)

    layer = nt.HBNODE(Sometimes(), loop="graph").double().to(DEVICE)
    h = features(3, 2).to(DEVICE)
    first = layer(h)
    bad.append(1)
    with pytest.raises(nt.SolveError):
        layer(h)
    bad.clear()
    torch.testing.assert_close(layer(h), first, rtol=0, atol=0)


def test_an_exception_in_the_field_leaves_the_loop_usable():
    class Raises(Field):
        calls = 0

        def forward(self, t, h):
            Raises.calls += 1
            if Raises.calls == 9:
                raise KeyError("mine")
            return super().forward(t, h)

    layer = nt.NODE(Raises(), loop="graph").double()
    h = features(3, 2)
    with pytest.raises(KeyError, match="mine"):
        layer(h)
    torch.testing.assert_close(layer(h), nt.NODE(Field()).double()(h), rtol=1e-12, atol=1e-12)


# -- which loop --------------------------------------------------------------------------------------------------------


def test_unknown_loops_and_contradictions_are_refused():
    with pytest.raises(ValueError, match="graph"):
        nt.NODE(Field(), loop="grap")
    with pytest.raises(ValueError, match="exclude each other"):
        nt.NODE(Field(), loop="graph", gradient="backprop")


def test_stats_say_which_loop():
    h = features(3, 2)
    layer = nt.NODE(Field()).double()
    layer(h).sum().backward()
    assert layer.stats.loop == layer.stats.loop_backward == "eager: the state is on the CPU"
    layer = nt.NODE(Field(), gradient="backprop").double()
    layer(h)
    assert layer.stats.loop == "eager: gradient='backprop' records every operation"


class Own(nt.controllers.Integral):
    pass


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"atol": torch.full((2,), 1e-6)}, "differs from element to element"),
        ({"controller": Own()}, "rule of its own"),
    ],
)
def test_what_needs_the_eager_loop_is_said_once(options, why):
    layer = nt.NODE(Field(), loop="graph", **options).double()
    h = features(3, 2)
    with pytest.warns(RuntimeWarning, match=why):
        layer(h)
    assert why in layer.stats.loop
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(h)


def test_another_damping_factor():
    state = (features(3, 2), torch.zeros(3, 2, dtype=F64))
    system = nt.systems.gnesterov(Field(), form="exact", damping_factor=5.0)
    eager = nt.solve(system, state, (1.0, 2.0), loop="eager")
    found = nt.solve(system, state, (1.0, 2.0), loop="graph")
    assert found.stats.loop.startswith(BY)
    assert (found.stats.accepted, found.stats.rejected) == (eager.stats.accepted, eager.stats.rejected)
    torch.testing.assert_close(found.final, eager.final, rtol=1e-13, atol=1e-13)


def test_backward_passes_that_need_the_eager_loop():
    h = features(3, 2)
    t = torch.tensor([1.0, 2.0], dtype=F64, requires_grad=True)
    layer = nt.NODE(Field(), loop="graph").double()
    with pytest.warns(RuntimeWarning, match="respect to times"):
        layer(h, t).sum().backward()
    assert layer.stats.loop.startswith("device")
    assert "times" in layer.stats.loop_backward
    layer = nt.NODE(Field(), loop="graph", gradient=nt.gradients.Adjoint(quadratures_in_norm=True)).double()
    with pytest.warns(RuntimeWarning, match="in the norm"):
        layer(h).sum().backward()
    assert "norm" in layer.stats.loop_backward
    for method in ("dopri5", "nystrom4"):  # the loop on the device has a norm of its own
        graphs._warned.clear()
        found = []
        for loop in ("eager", "graph"):
            strategy = nt.gradients.Adjoint(
                measure=lambda errors, before, after: torch.cat(tuple(errors)).norm() / 1e-6
            )
            layer = MODELS["HBNODE"].layer(method=method, gradient=strategy, loop=loop)
            out = layer(h).sum()
            with nullcontext() if loop == "eager" else pytest.warns(RuntimeWarning, match="norm of its own"):
                found.append(torch.autograd.grad(out, list(layer.parameters())))
        torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)


def test_a_field_that_hands_out_the_same_memory_again():
    class Reuses(Field):
        def forward(self, t, h):
            u = super().forward(t, h)
            if not hasattr(self, "memory"):
                self.memory = torch.empty_like(u)
            with torch.no_grad():
                self.memory.copy_(u)
            return self.memory

    h = features(3, 2)
    layer = nt.HBNODE(Reuses(), loop="graph").double()
    with torch.no_grad(), pytest.warns(RuntimeWarning, match="memory that it has returned"):
        found = layer(h)
    torch.testing.assert_close(found, nt.HBNODE(Field()).double()(h), rtol=1e-12, atol=1e-12)


# -- what is kept ------------------------------------------------------------------------------------------------------


def test_loops_are_shared_kept_and_bounded(monkeypatch):
    monkeypatch.setattr(graphs.LOOPS, "size", 3)
    layer = nt.GNesterovNODE(Field(), loop="graph").double()
    for _ in range(3):
        layer(features(3, 2)).sum().backward()
    assert graphs.LOOPS.count == 2  # forward and backward
    for batch in range(1, 9):
        layer(features(batch, 2)).sum().backward()
    assert graphs.LOOPS.count == 3


def test_sixteen_loops_are_kept():
    layers = [nt.NODE(Field(), loop="graph").double() for _ in range(20)]
    with torch.no_grad():
        for layer in layers:
            layer(features(3, 2))
    assert graphs.LOOPS.count == graphs.SIZE == 16


def test_a_dropped_loop_goes_at_once():
    """Not when the garbage collector comes: it does not know how much memory a loop has on a device."""
    layer = nt.GNesterovNODE(Field(), loop="graph").double()
    layer(features(3, 2)).sum().backward()
    alive = [weakref.ref(entry.loop) for entry in graphs.LOOPS._entries.values()]
    gc.disable()
    try:
        graphs.LOOPS.clear()
        assert [loop() for loop in alive] == [None, None]
    finally:
        gc.enable()


def test_loops_go_with_their_field():
    layer = nt.GNesterovNODE(Field(), loop="graph").double()
    layer(features(3, 2)).sum().backward()
    alive = weakref.ref(layer.field)
    del layer
    gc.collect()
    assert alive() is None
    assert graphs.LOOPS.count == 0


def test_nothing_is_left_behind():
    """Of a hundred solves with as many losses."""
    layer = nt.GNesterovNODE(Field(), loop="graph").double()
    h = features(3, 2)

    def tensors():
        gc.collect()
        return live_tensors()

    counts = []
    for i in range(30):
        layer(h).sum().backward()
        layer.zero_grad()
        if i in (4, 29):
            counts.append(tensors())
    assert counts[0] == counts[1]


def test_two_solves_before_their_backward_passes():
    """What the first one kept is its own."""
    layer = nt.GNesterovNODE(Field(), loop="graph").double()
    a, b = features(3, 2).requires_grad_(), (3 * features(3, 2)).requires_grad_()
    one, two = layer(a), layer(b)
    two.sum().backward()
    one.sum().backward()
    plain = nt.GNesterovNODE(Field(), loop="eager").double()
    for h, found in ((a, a.grad), (b, b.grad)):
        again = h.detach().clone().requires_grad_()
        plain(again).sum().backward()
        torch.testing.assert_close(found, again.grad, rtol=1e-12, atol=1e-12)


def test_threads_do_not_share_a_loop():
    layer = nt.GNesterovNODE(Field(), loop="graph").double()
    inputs = [(k + 1) * features(3, 2) for k in range(4)]
    expected = [nt.GNesterovNODE(Field()).double()(h).detach() for h in inputs]
    found = [[] for _ in inputs]

    def work(k):
        with torch.no_grad():
            for _ in range(10):
                found[k].append(layer(inputs[k]))

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for results, e in zip(found, expected, strict=True):
        assert len(results) == 10
        for result in results:
            torch.testing.assert_close(result, e, rtol=1e-9, atol=1e-9)


def test_a_solve_inside_a_solve():
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nt.NODE(Field(), loop="graph", method="rk4", step_size=0.5)

        def forward(self, t, h):
            return self.inner(h)

    layer = nt.NODE(Nested(), loop="graph", method="rk4", step_size=0.5).double()
    h = features(3, 2)
    found = layer(h)
    layer.settings = nt.NODE(Field(), loop="eager", method="rk4", step_size=0.5).settings
    torch.testing.assert_close(found, layer(h), rtol=1e-12, atol=1e-12)


# -- what a field does, and graphs -------------------------------------------------------------------------------------


def look(field, h=None, **options):
    h = torch.ones(3, 2, dtype=F64) if h is None else h
    network = Network(field, h.shape, h.dtype, h.device, None)
    found = graphs.signature(network, torch.ones((), dtype=F64), h, **options)
    assert network.evaluations == 0
    return found


def test_a_signature_tells_what_a_replay_would_miss():
    class Knobs(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(2, 2, dtype=F64)
            self.factor, self.shift, self.activation = 2.0, torch.ones(2, dtype=F64), torch.tanh

        def forward(self, t, h):
            return self.factor * self.activation(self.linear(h)) + self.shift

    field = Knobs()
    plain = look(field)
    assert look(field) == plain == look(field, torch.zeros(3, 2, dtype=F64))
    held = field.shift
    for change, undo in (
        (lambda: setattr(field, "factor", 3.0), lambda: setattr(field, "factor", 2.0)),
        (lambda: setattr(field, "shift", held.clone()), lambda: setattr(field, "shift", held)),
        (lambda: setattr(field, "activation", torch.relu), lambda: setattr(field, "activation", torch.tanh)),
        (lambda: field.linear.requires_grad_(False), lambda: field.linear.requires_grad_(True)),
    ):
        change()
        assert look(field) != plain
        undo()
        assert look(field) == plain
    field.linear.weight = nn.Parameter(field.linear.weight.detach().clone())
    assert look(field) != plain


def test_a_signature_knows_arguments_by_their_names_and_lists_by_their_lengths():
    a, x = torch.eye(3, dtype=F64), torch.ones(3, 2, dtype=F64)
    assert look(lambda t, h: torch.addmm(x, a, h, beta=2)) != look(lambda t, h: torch.addmm(x, a, h, alpha=2))

    def split(*arguments):
        return lambda t, h: (torch.split_with_sizes(h, *arguments), 2 * h)[1]

    assert look(split([2, 0], 1)) != look(split([2, 0, 1]))


def test_a_field_that_writes_its_result_to_a_tensor_of_its_own_is_unfit():
    own = torch.zeros(3, 2, dtype=F64)
    with pytest.raises(graphs.Unfit, match="changes a tensor of its own"):
        look(lambda t, h: torch.add(h, 1.0, out=own).clone())


class Reverse(torch.autograd.Function):
    factor = 1.0

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return -Reverse.factor * g


def test_a_signature_of_a_backward_pass_sees_the_backward_pass(monkeypatch):
    plain = look(lambda t, h: Reverse.apply(h), params=())
    monkeypatch.setattr(Reverse, "factor", 2.0)
    assert look(lambda t, h: Reverse.apply(h), params=()) != plain


NORM = nn.BatchNorm1d(2, dtype=F64)


@pytest.mark.parametrize(
    ("field", "why"),
    [
        (lambda t, h: h if t > 0.5 else -h, "reads a value"),
        (lambda t, h: NORM(h), "changes a tensor of its own"),
        (lambda t, h: nn.functional.dropout(h), "random"),
        (lambda t, h: h[h[:, 0] > 0].sum() * h, "depends on values"),
        (lambda t, h: torch.sparse_coo_tensor([[0], [1]], [1.0], (3, 3), dtype=F64) @ h, "plain memory"),
    ],
)
def test_a_signature_says_what_cannot_be_captured(field, why):
    state = torch.get_rng_state()
    with pytest.raises(graphs.Unfit, match=why):
        look(field)
    assert torch.equal(torch.get_rng_state(), state)  # before it has done it
    assert int(NORM.num_batches_tracked) == 0


def test_a_look_leaves_a_compiled_field_compiled():
    runs = []

    def backend(graph, _):
        def run(*args):
            runs.append(1)
            return graph.forward(*args)

        return run

    torch._dynamo.reset()
    inner = Field()
    field = torch.compile(lambda t, h: inner(t, h), backend=backend)
    h, t = torch.ones(3, 2, dtype=F64), torch.ones((), dtype=F64)
    look(field, h)
    field(t, h)
    assert len(runs) == 1
    look(field, h)
    field(t, h)
    assert len(runs) == 2
    torch._dynamo.reset()


class Loop:
    """What `by_graph` is handed, with a part that adds 1."""

    def __init__(self):
        self.value = torch.zeros(1)
        self.replays, self.used, self.meanwhile = {}, set(), None

    def part(self, name):
        return self.add

    def add(self):
        self.value += 1

    def release(self):
        pass

    def solve(self):
        self.value.zero_()
        self.used.add("add")
        for _ in range(3):
            self.replays.get("add", self.add)()
        return self.value.clone()


def by_graph(loop, entry):
    return graphs.by_graph(entry, torch.device("cpu"), loop.solve, lambda x: [x])


def test_a_graph_is_believed_once_it_has_repeated_the_calls(monkeypatch):
    loop = Loop()
    entry = graphs.Entry(loop)
    replays = []
    monkeypatch.setattr(graphs, "captured", lambda part, *_: lambda: (replays.append(1), part()))
    assert by_graph(loop, entry) == 3
    assert loop.replays
    assert len(replays) == 3
    assert by_graph(loop, entry) == 3
    assert len(replays) == 6


def test_a_graph_that_gives_something_else_is_not_used(monkeypatch):
    loop = Loop()
    entry = graphs.Entry(loop)
    monkeypatch.setattr(graphs, "captured", lambda part, *_: lambda: None)
    assert by_graph(loop, entry) is None
    assert "another result" in entry.reason
    assert not loop.replays
    assert entry.loop is None


def test_what_cannot_be_captured_is_refused(monkeypatch):
    def refuse(part, *_):
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")

    loop = Loop()
    entry = graphs.Entry(loop)
    monkeypatch.setattr(graphs, "captured", refuse)
    assert by_graph(loop, entry) is None
    assert "cannot be captured: CUDA error: operation not permitted" in entry.reason
    assert not loop.replays


def test_a_look_is_taken_once_the_device_is_at_work(monkeypatch):
    """At the first chance that the loop gives, or else at the end; and what it raises goes through."""
    loop, said = Loop(), []
    entry = graphs.Entry(loop)
    monkeypatch.setattr(graphs, "captured", lambda part, *_: part)
    by_graph(loop, entry)
    solve = loop.solve

    def waits():
        loop.meanwhile()
        said.append("waited")
        return solve()

    def by(solve, check):
        return graphs.by_graph(entry, torch.device("cpu"), solve, lambda x: [x], check)

    assert by(waits, lambda: said.append("looked")) == 3
    assert said == ["looked", "waited"]
    assert by(solve, lambda: said.append("looked")) == 3
    assert said == ["looked", "waited", "looked"]

    def stale():
        raise graphs.Stale(graphs.Signature("another"))

    with pytest.raises(graphs.Stale):
        by(waits, stale)
    assert loop.meanwhile is None
    assert loop.replays


def test_the_loop_used_last_is_known_without_a_look():
    field = Field()
    key = (graphs.identity(field), "forward")
    first, second = (graphs.LOOPS.get((*key, what), field) for what in ("a", "b"))
    assert graphs.LOOPS.last(key) is None
    for entry, what in ((first, "a"), (second, "b")):
        graphs.LOOPS.keep(entry, Loop)
        graphs.LOOPS.confirm(key, (*key, what))
        assert graphs.LOOPS.last(key) is entry
    second.refuse("it was found out")
    assert graphs.LOOPS.last(key) is None
    graphs.LOOPS.confirm(key, (*key, "a"))
    assert graphs.LOOPS.last(key) is first
    del field
    gc.collect()
    assert graphs.LOOPS.last(key) is None


def test_a_signature_does_not_depend_on_where_temporary_memory_happens_to_lie():
    field, litter = Field().double(), []

    def long(t, h):
        for _ in range(20):
            h = torch.cat((field(t, h), field(t, h)))[: len(h)] + h.exp()
        return h

    first = look(long)
    for k in range(20):
        litter += [torch.randn(3, 2, dtype=F64) for _ in range(7)]
        del litter[::3]
        assert look(long) == first, k


def test_a_field_that_changes_a_view_of_its_own_tensor_is_unfit():
    count = torch.zeros(3, 2, dtype=F64)
    with pytest.raises(graphs.Unfit, match="changes a tensor of its own"):
        look(lambda t, h: h + count.view(-1).add_(1).view(3, 2))


def test_memory_that_a_field_reads_and_does_not_own_is_known():
    """What a replay in vain might still read: not what it is given, and not its own parameters."""
    constant, field = torch.randn(2, 2, dtype=F64), Field().double()

    class Closure(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = field

        def forward(self, t, h):
            return self.inner(t, h) @ constant

    closure = Closure()
    seen = look(closure)
    assert len(seen.outside) == 1 + len(list(field.parameters()))
    assert [x.data_ptr() for x in graphs.not_own(seen.outside, closure)] == [constant.data_ptr()]


@pytest.mark.skipif(DEVICE != "cuda", reason="nothing is captured on a CPU")
def test_a_capture_that_fails_leaves_the_device_as_it_was():
    """Streams, allocator, and the generator, which refused to draw random numbers from then on."""

    class Synchronizes(Field):
        def forward(self, t, h):
            torch.cuda.synchronize()
            return super().forward(t, h)

    layer = nt.GNesterovNODE(Synchronizes(), loop="graph").double().to(DEVICE)
    h = features(3, 2).to(DEVICE).requires_grad_()
    with pytest.warns(RuntimeWarning, match="cannot be captured"):
        out = layer(h)
    out.sum().backward()
    assert layer.stats.loop.startswith("eager: the field cannot be captured")
    torch.randn(3, device=DEVICE)
    again = nt.GNesterovNODE(Field(), loop="graph").double().to(DEVICE)
    again(h).sum().backward()
    assert (again.stats.loop, again.stats.loop_backward) == ("graph", "graph")


class FakeEvent:
    def record(self, stream=None):
        pass

    def synchronize(self):
        pass


class FakeStream:
    def wait_event(self, event):
        pass

    def synchronize(self):
        pass


@pytest.fixture
def fake_graphs(monkeypatch):
    """On a CPU what a CUDA device does: parts are captured, and replayed as they were when they were captured. Such a
    replay is the part itself, with the `scale` that there was."""
    scale = [1.0]
    if DEVICE == "cuda":
        return scale

    def captured(part, device, entry):
        known = scale[0]

        def replay():
            now, scale[0] = scale[0], known
            try:
                part()
            finally:
                scale[0] = now

        return replay

    monkeypatch.setattr(graphs, "captures", lambda device: True)
    monkeypatch.setattr(graphs, "captured", captured)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    stream = FakeStream()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: stream)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    return scale


@pytest.mark.parametrize("gradient", ["discrete", "adjoint"])
def test_a_field_that_changed_its_mind_is_found_out(fake_graphs, gradient):
    """What had been launched by the graph that was used last counts for nothing: not its values, and not its
    evaluations."""
    scale = fake_graphs

    class Scaled(Field):
        def forward(self, t, h):  # as a closure would
            return scale[0] * super().forward(t, h)

    field = Scaled()
    layers = [nt.GNesterovNODE(field, loop=loop, gradient=gradient).double() for loop in ("graph", "eager")]
    layers[1].load_state_dict(layers[0].state_dict())
    h = features(3, 2).to(DEVICE).requires_grad_()
    for scale[0] in (1.0, 1.0, 3.0, 3.0, 1.0, 3.0):
        found = []
        for layer in layers:
            out = layer.to(DEVICE)(h, TIMES["many"])
            found.append([out.detach(), *gradients(layer, out.square().sum(), h)])
        stats, expected = (layer.stats for layer in layers)
        assert (stats.loop, stats.loop_backward) == ("graph", "graph")
        assert [getattr(stats, k) for k in COUNTS] == [getattr(expected, k) for k in COUNTS]
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)
    assert graphs.LOOPS.count == 4


def test_the_field_is_looked_at_once_in_a_solve(fake_graphs, monkeypatch):
    """Whether a solve captures or replays; and a loop that is in use, or a refused one, is not waited for."""
    looks, signature = [], graphs.signature
    monkeypatch.setattr(graphs, "signature", lambda *a, **k: (looks.append(1), signature(*a, **k))[1])
    layer = nt.GNesterovNODE(Field(), loop="graph").double().to(DEVICE)
    h = features(3, 2).to(DEVICE)
    with torch.no_grad():
        for count in range(1, 4):
            out = layer(h)
            assert len(looks) == count
        (entry,) = graphs.LOOPS._entries.values()
        entry.busy = True
        torch.testing.assert_close(layer(h), out)
        assert layer.stats.loop == "eager: the captured loop is in use"
        entry.busy = False
        entry.refuse("it was found out")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            torch.testing.assert_close(layer(h), out)
        assert layer.stats.loop == "eager: it was found out"


def test_auto_captures_what_comes_again(fake_graphs, monkeypatch):
    monkeypatch.setattr(on_device, "AUTO", True)
    monkeypatch.setattr(on_device, "_objection", lambda problem: "")
    layer = nt.GNesterovNODE(Field()).double().to(DEVICE)
    said = []
    for _ in range(3):
        layer(features(3, 2).to(DEVICE)).sum().backward()
        said.append((layer.stats.loop, layer.stats.loop_backward))
    first = "eager: the first of its kind; the next one is captured"
    assert said == [(first, first), ("graph", "graph"), ("graph", "graph")]


def test_an_interruption_leaves_no_graph_that_nobody_has_checked(monkeypatch):
    class Stops(Loop):
        def solve(self):
            if self.replays:
                raise KeyboardInterrupt
            return super().solve()

    loop = Stops()
    monkeypatch.setattr(graphs, "captured", lambda part, *_: lambda: None)
    with pytest.raises(KeyboardInterrupt):
        by_graph(loop, graphs.Entry(loop))
    assert not loop.replays


# -- a CUDA device's part, written down --------------------------------------------------------------------------------

GPU = torch.device("cuda", 0)


class Noted:
    """Something of `torch.cuda` that writes down what is called of it."""

    def __init__(self, name, said):
        self._name, self._said = name, said

    def __getattr__(self, what):
        if what.startswith("__"):
            raise AttributeError(what)
        return lambda *a, **k: self._said.append(" ".join([self._name, what, *map(str, a)]))

    def __str__(self):
        return self._name


@pytest.fixture
def cuda(monkeypatch):
    """Streams, captures and allocators that only write down what they are asked for; and in which order."""
    said, graphs_made = [], []

    class Graph(Noted):
        def __init__(self):
            super().__init__("graph", said)
            graphs_made.append(self)

    @contextlib.contextmanager
    def on(stream):
        said.append(f"on {stream}")
        yield
        said.append(f"off {stream}")

    streams = iter("ABCDEFGH")
    pools = itertools.count(1)
    monkeypatch.setattr(graphs, "_STREAMS", threading.local())
    monkeypatch.setattr(graphs, "_FAILED", [])
    monkeypatch.setattr(graphs, "_settle", lambda device: said.append("settle"))
    for name, value in {
        "CUDAGraph": Graph, "Stream": lambda device: Noted(next(streams), said), "stream": on,
        "current_stream": lambda device=None: Noted("current", said), "device": lambda device: contextlib.nullcontext(),
        "synchronize": lambda: said.append("synchronize"), "graph_pool_handle": lambda: next(pools),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    for name in ("clearCublasWorkspaces", "endAllocateToPool", "releasePool"):
        say = functools.partial(lambda name, *a: said.append(" ".join([name, *map(str, a)])), name)
        monkeypatch.setattr(torch._C, f"_cuda_{name}", say, raising=False)
    return said


def test_cublas_has_no_workspace_in_a_capture_but_the_graphs_own(cuda):
    """None from before, which would go with any other graph; and nobody else gets the graph's."""
    entry = graphs.Entry(Loop())
    graphs.captured(lambda: cuda.append("launch"), GPU, entry)()
    begin, end = cuda.index("graph capture_begin"), cuda.index("graph capture_end")
    assert cuda[begin + 1 : end] == ["launch"]
    clear = [k for k, what in enumerate(cuda) if what == "clearCublasWorkspaces"]
    assert clear[0] < begin < end < clear[-1]
    assert cuda.index("synchronize") < clear[0]  # what is under way may still use it
    assert cuda[-1] == "graph replay"
    first = entry.pool
    graphs.captured(lambda: None, GPU, entry)
    assert entry.pool == first == 1  # one for all parts


def test_a_torch_that_cannot_clear_workspaces_captures_all_the_same(cuda, monkeypatch):
    monkeypatch.delattr(torch._C, "_cuda_clearCublasWorkspaces")
    graphs.captured(lambda: None, GPU, graphs.Entry(Loop()))()
    assert cuda[-1] == "graph replay"


def test_a_look_has_a_stream_of_its_own_that_what_follows_waits_for(cuda):
    event = Noted("event", cuda)
    with graphs.aside(GPU, "capture"):
        pass
    assert cuda == ["A wait_stream current", "on A", "off A", "current wait_stream A"]
    for _ in range(2):
        cuda.clear()
        with contextlib.suppress(KeyError), graphs.aside(GPU, "look", event):
            raise KeyError  # as where the field has changed: what it read may be freed at once
        assert cuda == ["B wait_event event", "on B", "current wait_stream B"]


def test_a_capture_that_fails_gives_back_what_it_has_claimed(cuda, monkeypatch):
    def fail(self):
        raise RuntimeError("the capture was invalidated")

    monkeypatch.setattr(torch.cuda.CUDAGraph, "capture_end", fail, raising=False)
    entry = graphs.Entry(Loop())
    with pytest.raises(RuntimeError, match="invalidated"):
        graphs.captured(lambda: None, GPU, entry)
    claims = [what for what in cuda if "Pool" in what or what == "settle"]
    assert claims == ["endAllocateToPool 0 1", "releasePool 0 1", "settle"]
    assert len(graphs._FAILED) == 1  # torch's allocator of pinned memory goes on asking it
    assert entry.pool is None
    assert cuda.count("clearCublasWorkspaces") == 2


def test_a_field_that_raises_in_a_capture_ends_it_properly(cuda):
    def raises():
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        graphs.captured(raises, GPU, graphs.Entry(Loop()))
    assert "graph capture_end" in cuda
    assert not [what for what in cuda if "Pool" in what]  # the graph has its claim, and gives it up as it goes
    assert not graphs._FAILED


@pytest.mark.parametrize("enabled", [True, False])
def test_nothing_is_collected_in_a_capture(cuda, enabled):
    before = gc.isenabled()
    seen = []
    try:
        (gc.enable if enabled else gc.disable)()
        graphs.captured(lambda: seen.append(gc.isenabled()), GPU, graphs.Entry(Loop()))
        assert gc.isenabled() is enabled
    finally:
        (gc.enable if before else gc.disable)()
    assert seen == [False]


def test_a_capture_is_tried_twice(monkeypatch):
    """Another thread may have ended the first."""
    tries = []

    def captured(part, *_):
        tries.append(1)
        if len(tries) == 1:
            raise RuntimeError("operation failed due to a previous error during capture")
        return part

    loop = Loop()
    entry = graphs.Entry(loop)
    monkeypatch.setattr(graphs, "captured", captured)
    assert by_graph(loop, entry) == 3
    assert not entry.reason
    assert len(tries) == 2


@contextlib.contextmanager
def held(lock):
    """By another thread."""
    taken, done = threading.Event(), threading.Event()

    def hold():
        with lock:
            taken.set()
            done.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    taken.wait()
    yield
    done.set()
    thread.join()


def test_a_thread_does_not_wait_for_ever_to_look_or_to_capture(cuda, monkeypatch):
    """Who has the lock may wait for autograd's thread, and that one for the lock."""
    monkeypatch.setattr(graphs, "PATIENCE", 0.01)
    with held(graphs._LOOKING), pytest.raises(graphs.Later, match="looks at its field"):
        look(Field())
    with held(graphs._CAPTURING), pytest.raises(graphs.Later, match="captures"):
        graphs.captured(lambda: None, GPU, graphs.Entry(Loop()))
    look(Field())
    graphs.captured(lambda: None, GPU, graphs.Entry(Loop()))


def counts(layer, h):
    layer(h, TIMES["many"]).sum().backward()
    return [getattr(layer.stats, k) for k in COUNTS]


@pytest.mark.parametrize("gradient", ["discrete", "adjoint"])
def test_what_cannot_be_had_now_can_be_had_later(fake_graphs, monkeypatch, gradient):
    if DEVICE == "cuda":
        pytest.skip("captures are the device's own")
    layer = nt.GNesterovNODE(Field(), loop="graph", gradient=gradient).double()
    h = features(3, 2)
    expected = counts(clone(layer, loop="eager"), h)

    def busy(*_):
        raise graphs.Later("another thread captures")

    with monkeypatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("error")
        patch.setattr(graphs, "captured", busy)
        assert counts(layer, h) == expected
        assert layer.stats.loop == layer.stats.loop_backward == "eager: another thread captures"
    with monkeypatch.context() as patch:
        patch.setattr(graphs, "PATIENCE", 0.01)
        with held(graphs._LOOKING):
            assert counts(layer, h) == expected
        assert layer.stats.loop == layer.stats.loop_backward == "eager: another thread looks at its field"
    assert counts(layer, h) == expected
    assert (layer.stats.loop, layer.stats.loop_backward) == ("graph", "graph")
    with held(graphs._LOOKING), monkeypatch.context() as patch:  # after the replay has been launched
        patch.setattr(graphs, "PATIENCE", 0.01)
        assert counts(layer, h) == expected
        assert "looks at its field" in layer.stats.loop
    assert counts(layer, h) == expected
    assert (layer.stats.loop, layer.stats.loop_backward) == ("graph", "graph")


def test_of_a_capture_that_fails_nothing_is_counted(fake_graphs, monkeypatch):
    if DEVICE == "cuda":
        pytest.skip("captures are the device's own")

    def fail(*_):
        raise RuntimeError("not while capturing")

    monkeypatch.setattr(graphs, "captured", fail)
    layer = nt.GNesterovNODE(Field(), loop="graph").double()
    h = features(3, 2)
    with pytest.warns(RuntimeWarning, match="cannot be captured"):
        found = counts(layer, h)
    assert found == counts(clone(layer, loop="eager"), h)


# -- memory is let go when the device is done with it ------------------------------------------------------------------


def test_a_loop_goes_only_when_the_device_is_done_with_it():
    field, said = Field(), []

    class Watched(Loop):
        def __del__(self):
            said.append("freed")

    loops = graphs.Loops()
    stream = Noted("stream", said)
    key = (graphs.identity(field), "forward")

    def fresh():
        loops.clear()
        entry = loops.get(key, field)
        entry.loop = Watched()
        said.clear()
        return entry

    for let_go in (lambda entry: entry.refuse("it was found out"), lambda entry: loops.clear()):
        entry = fresh()
        entry.done = Noted("event", said)
        with loops.borrow(entry, stream) as free:
            assert free
            let_go(entry)
        assert [what for what in said if what.endswith(("synchronize", "freed"))][-1] == "freed"
        assert any(what.endswith("synchronize") for what in said)
        entry = fresh()
        with loops.borrow(entry, None):
            pass
        entry.stream, entry.done = stream, Noted("event", said)
        let_go(entry)
        assert said == ["event synchronize", "freed"]


def test_the_oldest_of_too_many_keys_goes_like_any_other(monkeypatch):
    monkeypatch.setattr(graphs, "SEEN", 1)
    field, said = Field(), []
    loops = graphs.Loops()
    first = loops.get((graphs.identity(field), "first"), field)
    first.loop, first.stream, first.done = Loop(), Noted("stream", said), Noted("event", said)
    loops.get((graphs.identity(field), "second"), field)
    assert said == ["event synchronize"]
    assert first.loop is None


@pytest.mark.parametrize("where", ["release", "record"])
def test_a_loop_is_free_again_whatever_fails_as_it_is_given_back(where):
    loop, event = Loop(), FakeEvent()
    entry = graphs.Entry(loop, done=event)

    def fail(*_):
        raise RuntimeError("the device has failed")

    setattr(loop if where == "release" else event, where, fail)
    with pytest.raises(RuntimeError, match="the device has failed"), graphs.Loops().borrow(entry, FakeStream()):
        pass
    assert not entry.busy


def test_a_device_that_reports_nothing_more_is_noticed_though_its_times_are_nan():
    layer = nt.GNesterovNODE(Field(), loop="graph").double()
    with torch.no_grad():
        layer(features(3, 2))
    (entry,) = graphs.LOOPS._entries.values()
    loop = entry.loop
    looks = iter(range(100))

    def stuck():
        assert next(looks) < 99, "it would look for ever"
        return device_loop.Report(1.0, float("nan"), control.RUNNING, 0, 0, 0, 0, float("nan"))

    loop._look, loop._call, loop._event = stuck, lambda name: None, FakeEvent()
    loop._event.query = lambda: True
    with pytest.raises(RuntimeError, match="reports nothing"):
        loop.run()


# -- what else a graph depends on --------------------------------------------------------------------------------------

matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
SWITCHES = {
    "fp32_precision": (matmul, "ieee", "tf32"),
    "allow_fp16_reduced_precision_reduction": (matmul, True, False),
    "allow_bf16_reduced_precision_reduction": (matmul, True, False),
    "enabled": (cudnn, True, False),
    "enable_flash_sdp": None, "enable_mem_efficient_sdp": None, "enable_math_sdp": None, "enable_cudnn_sdp": None,
}  # fmt: skip


@pytest.mark.parametrize("name", list(SWITCHES))
def test_switches_see_what_decides_about_kernels(name):
    before = graphs.switches()
    try:
        if SWITCHES[name] is None:
            getattr(torch.backends.cuda, name)(False)
        else:
            owner, _, other = SWITCHES[name]
            setattr(owner, name, other)
        assert graphs.switches() != before
    finally:
        if SWITCHES[name] is None:
            getattr(torch.backends.cuda, name)(True)
        else:
            owner, usual, _ = SWITCHES[name]
            setattr(owner, name, usual)


def test_switches_see_the_old_names_too():
    before = graphs.switches()
    torch.set_float32_matmul_precision("high")
    try:
        assert graphs.switches() != before
    finally:
        torch.set_float32_matmul_precision("highest")


# -- kernels against their reference -----------------------------------------------------------------------------------

NUMBERS = {
    Slot.T: 1.2, Slot.DT: 0.1, Slot.PREVIOUS: 0.3, Slot.FINITE: 1.0, Slot.FIRST_FINITE: 1.0, Slot.ACCEPTED: 3.0,
    Slot.REJECTED: 1.0, Slot.TAPED: 2.0, Slot.OUTPUT: 1.0, Slot.SOLVE: 7.0,
}  # fmt: skip
SETTING = {
    Setting.START: 1.0, Setting.END: 2.0, Setting.STEP_SIZE: 0.1, Setting.COUNT: 10.0, Setting.MAX_STEPS: 100.0,
    Setting.SAFETY: 0.9, Setting.MIN_FACTOR: 0.2, Setting.MAX_FACTOR: 10.0, Setting.ALPHA: 0.14, Setting.BETA: 0.08,
    Setting.PLAIN: 0.2, Setting.RTOL: 1e-5, Setting.ATOL: 1e-5, Setting.DAMPING: 0.7, Setting.XI: 0.3,
    Setting.CAPACITY: 4.0,
}  # fmt: skip
SITUATIONS = {
    "a step": {},
    "the last": {Slot.DT: 0.95},
    "the last, stretched": {Slot.DT: 0.795},
    "not stretched": {Slot.DT: 0.795, Slot.AFTER_REJECTION: 1.0},
    "too short": {Slot.DT: 1e-17},
    "too short, not finite": {Slot.DT: 1e-17, Slot.FINITE: 0.0},
    "too many": {Setting.MAX_STEPS: 4.0},
    "done": {Slot.T: 2.0},
    "failed": {Slot.STATUS: 3.0},
    "tape full": {Slot.TAPED: 4.0},
    "backward": {Slot.DT: -0.1, Setting.END: 1.0},
    "the last, backward": {Slot.DT: -0.5, Setting.END: 1.0, Slot.AFTER_REJECTION: 1.0},
    "first slope not finite": {Slot.FIRST_FINITE: 0.0},
    "the last of fixed steps": {Slot.ACCEPTED: 9.0},
}
LAWS = (
    None,
    Law(True, False, -1.0, gates.Softclip(5.0)),
    Law(True, True, -1.0, gates.Identity()),
    Law(False, False, 1.0, gates.Hardtanh(1.1)),
    Law(True, True, -1.0, gates.Tanh()),
    Law(True, True, -1.0, gates.Softclip(2.0), 5.0, 3.75),
)
DOPRI5 = tableaus.get("dopri5")


def numbers(situation):
    decided, setting = torch.zeros(control.SLOTS, dtype=F64), torch.zeros(control.SETTINGS, dtype=F64)
    for slots, start in ((decided, NUMBERS), (setting, SETTING)):
        kind = type(next(iter(start)))
        for slot, value in {**start, **{k: v for k, v in situation.items() if type(k) is kind}}.items():
            slots[slot] = value
    return decided.to(DEVICE), setting.to(DEVICE)


def begun(function, situation, adaptive, law, dtype):
    decided, setting = numbers(situation)
    nodes = torch.tensor(DOPRI5.c, dtype=F64, device=DEVICE)
    attempt = torch.full((control.SLOTS,), torch.nan, dtype=F64, device=DEVICE)
    stages = (torch.zeros(7, dtype=dtype), torch.zeros(7, 4, dtype=F64), torch.zeros(1, dtype=F64))
    stages = [x.to(DEVICE) for x in stages]
    function(decided, attempt, setting, nodes, *stages, adaptive, law)
    return [attempt, *stages]


@pytest.mark.usefixtures("runs_kernels")
@pytest.mark.parametrize("adaptive", [True, False])
@pytest.mark.parametrize("situation", list(SITUATIONS))
def test_begin(situation, adaptive):
    from nesterov_triton.ops.control import kernel

    for law, dtype in itertools.product(LAWS, (F64, torch.float32)):
        found = [begun(f, SITUATIONS[situation], adaptive, law, dtype) for f in (kernel.launch_begin, reference.begin)]
        for a, b in zip(*found, strict=True):
            eps = 1e-14 if a.dtype == F64 else 1e-6
            torch.testing.assert_close(a, b, rtol=eps, atol=1e-15, equal_nan=True)


@pytest.mark.usefixtures("runs_kernels")
@pytest.mark.parametrize("adaptive", [True, False])
@pytest.mark.parametrize("situation", list(SITUATIONS))
def test_weigh_end_and_add(situation, adaptive):
    from nesterov_triton.ops.control import kernel

    attempt, *_ = begun(reference.begin, SITUATIONS[situation], adaptive, None, F64)
    _, setting = numbers(SITUATIONS[situation])
    requested = torch.tensor([1.1, 1.25, 1.3, 1.9], dtype=F64, device=DEVICE)
    if setting[Setting.END] < setting[Setting.START] + 0.1:
        requested = requested.flip(0)
    errors = (0.0, 0.5, 1e-6, 1.0, 1.5, 1e9, math.inf, math.nan)
    for value, more in zip(errors, itertools.cycle((True, False)), strict=False):
        dtype = F64 if more else torch.float32
        rows = [torch.randn(1500, dtype=dtype, device=DEVICE) for _ in range(6)]
        tape, report = torch.randn(4, 2, 1500, dtype=dtype), torch.zeros(control.SPANS + 8, dtype=F64)
        tape, report = tape.to(DEVICE), report.to(DEVICE)
        if not more:  # where accepted, it is to be said
            rows[4][1400] = math.inf
        error = torch.tensor(value, dtype=F64, device=DEVICE)
        results = []
        for weigh, end, add in (
            (kernel.launch_weigh, kernel.launch_end, kernel.launch_add_accepted),
            (reference.weigh, reference.end, reference.add_accepted),
        ):
            weights = torch.zeros(4, len(DOPRI5.interpolant), dtype=F64, device=DEVICE)
            span = torch.zeros(2, dtype=torch.int64, device=DEVICE)
            weigh(attempt, error, requested, weights, span, DOPRI5.interpolant)
            decided = torch.full((control.SLOTS,), torch.nan, dtype=F64, device=DEVICE)
            kept, held = [x.clone() for x in rows[:3]], (tape.clone(), report.clone())
            end(
                attempt, decided, setting, error, requested if more else None, kept, rows[3:], 2,
                held[0] if more else None, held[1], adaptive,
            )  # fmt: skip
            accepted = bool(attempt[Slot.ACTIVE]) and value <= 1
            assert bool(held[1][control.INFINITE]) == (accepted and not more)
            total, first = rows[0].clone(), rows[1].clone()
            add(decided, attempt, total, rows[2], first, rows[3])
            inside = weights[int(span[0]) : int(span.sum())]
            results.append([span, inside, decided, *kept, *held, total, first])
        for a, b in zip(*results, strict=True):
            eps = 1e-12 if a.dtype == F64 else 1e-6
            torch.testing.assert_close(a, b, rtol=eps, atol=eps, equal_nan=True)


PROPOSALS = {
    "a step": {},
    "backward": {Setting.END: 0.5},
    "a short interval": {Setting.END: 1.2 + 1e-9},
    "without a tolerance for x": {Setting.ATOL: 0.0},
    "high order": {Setting.PLAIN: 1 / 8},
}
STATES = {  # factors of the state, of its slope, and of how much the second slope differs
    "plain": (1.0, 1.0, 0.1),
    "at rest": (0.0, 1.0, 0.1),
    "standing still": (1.0, 0.0, 0.0),
    "steep": (1.0, 1e5, 1e4),
    "overflowing": (1.0, math.inf, 1.0),
    "second slope not finite": (1.0, 1.0, math.nan),
}


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("state", list(STATES))
@pytest.mark.parametrize("situation", list(PROPOSALS))
def test_the_first_step_size(situation, state, dtype):
    from nesterov_triton.ops.control import kernel

    decided, setting = numbers(PROPOSALS[situation])
    of_z, of_slope, of_change = STATES[state]
    z, slope, change = (torch.randn(3000, dtype=F64, device=DEVICE) for _ in range(3))
    z, second = (z * of_z).to(dtype), (slope * of_slope + change * of_change).to(dtype)
    slope = (slope * of_slope).to(dtype)
    results = []
    for propose, extrapolate, choose in (
        (kernel.launch_propose, kernel.launch_extrapolate, kernel.launch_choose),
        (reference.propose, reference.extrapolate, reference.choose),
    ):
        own, trial = decided.clone(), torch.zeros_like(decided)
        sizes, out = torch.zeros(3, dtype=F64, device=DEVICE), torch.empty_like(z)
        propose(own, trial, setting, z, slope, sizes, True)
        extrapolate(own, setting, z, slope, sizes, out)
        choose(own, setting, z, slope, second, sizes)
        bare = decided.clone()
        propose(bare, trial.clone(), setting, z, slope, sizes.clone(), False)
        results.append([own, trial, sizes, bare, out])
    *scalars, out = range(5)
    for k in scalars:
        eps = 1e-12 if dtype == F64 else 2e-5
        torch.testing.assert_close(results[0][k], results[1][k], rtol=eps, atol=1e-300, equal_nan=True)
    eps = 1e-12 if dtype == F64 else 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(results[0][out], results[1][out], rtol=eps, atol=eps, equal_nan=True)
