"""Everything that needs a GPU, in one run of under nine minutes: `python -m benchmarks.gpu`.

1. Whether graphs work at all: solves like the eager loop's, and the same again and again.
2. The kernels' tests, compiled instead of interpreted, and a small run under compute-sanitizer (memcheck, racecheck).
3. Accuracy of solves and gradients against tight float64 ones, and against plain torch on the same GPU.
4. Each kernel's bandwidth beside that of a copy, from the bytes that `benchmarks.traffic` counts.
5. A step's launches one by one beside the same launches replayed as a CUDA graph.
6. An attempted step of the loop on the device beside its field calls alone, replayed as a graph.
7. Whole solves, by graphs and by the eager loop, beside plain torch and torchdiffeq, on a small state and on a large
   one with a cheap field; and last, compiled.

Needs torch, triton, torchdiffeq, pytest, pytest-xdist and numpy, and the repository's root as the working directory.
Prints a table and writes `benchmarks/results/<gpu>.json`, in which the parts that are not run anew stay as they are;
each says its commit and date. A part is a process of its own, with a limit: one that fails or hangs is said to have,
what it had found by then is kept, and the others still run.

    python -m benchmarks.gpu --only smoke checks  # three minutes; all that is timed: five
    python -m benchmarks.gpu --rehearse           # on a CPU: tiny sizes under triton's interpreter, no figures
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import gc
import itertools
import json
import math
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType  # type: ignore[attr-defined]

GPU = torch.cuda.is_available()
if not GPU:  # before anything imports triton
    os.environ.setdefault("TRITON_INTERPRET", "1")

import nesterov_triton as nt  # noqa: E402
from benchmarks import timing, traffic  # noqa: E402
from benchmarks.gpu_failures import FAILURES  # noqa: E402
from benchmarks.problems import BOUND, T0, T1, TOLERANCE, WIDTH, XI, Problem, TorchdiffeqSystem, relative_error  # noqa: E402
from benchmarks.report import Line, commit, table, today, versions  # noqa: E402
from nesterov_triton import nystrom  # noqa: E402
from nesterov_triton.ops import dispatch  # noqa: E402
from nesterov_triton.ops.nystrom.reference import size_of  # noqa: E402
from nesterov_triton.stepping import graphs  # noqa: E402

DEVICE = torch.device("cuda" if GPU else "cpu")
ROOT = Path(__file__).parent.parent
TESTS = (
    "kernels", "adjoint_kernels", "first_order_kernels", "dense_output_kernels", "nystrom_kernels", "fused",
    "fused_nystrom", "device_loop",
)  # fmt: skip
DOPRI5, NYSTROM4 = nt.tableaus.get("dopri5"), nystrom.METHODS["nystrom4"]
GATE = nt.gates.Softclip(BOUND)
SECONDS = 540  # for everything
LIMITS = {  # of its process; the first compiles what it launches
    "smoke": 90, "checks": 220, "accuracy": 90, "bandwidth": 90, "latency": 45, "loops": 90, "solves": 120,
    "compiled": 120,
}  # fmt: skip


@dataclass(frozen=True)
class Scale:
    """How much of everything: on a GPU, or in a rehearsal."""

    rows: tuple[int, ...]  # elements of a row, for the bandwidth
    large: int  # elements of the large state
    batch: int  # of the small one
    seconds: float  # spent on one timing
    rounds: int  # of the contenders of a comparison
    width: int  # of the field with large matrix products
    repeats: int  # of a solve with it
    least: float  # tolerance
    steps: tuple[int, int]  # of the solves whose difference is a step


FULL = Scale((1 << 20, 1 << 22, 1 << 24, 1 << 26), 1 << 24, 256, 0.05, 15, 1024, 200, 0.0, (8, 24))
TINY = Scale((1 << 10,), 1 << 10, 4, 0.0, 1, 8, 3, 1e-2, (2, 4))


class Found(dict[str, Any]):
    """What a part has found, written to a file as it comes: if the part is cut short, so much is there."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self._file = file

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(name, value)
        _write(self._file, self)


def _write(file: Path, content: object) -> None:
    """Whole, or not at all."""
    beside = file.with_suffix(".new")
    beside.write_text(json.dumps(content, indent=1, default=str) + "\n")
    beside.replace(file)


def insist(stats: Any, backward: bool = True) -> None:
    """Raise where it was not by graphs: the figure would be of something else. (A CPU has none.)"""
    loops = [stats.loop, stats.loop_backward] if backward else [stats.loop]
    if GPU and any(loop != "graph" for loop in loops):
        raise RuntimeError(f"not by graphs, but: {loops}")


@contextlib.contextmanager
def path(kernels: bool) -> Iterator[None]:
    """Solves inside take this path; as they would anyway on a GPU with kernels."""
    chosen = dispatch.runs_kernels
    dispatch.runs_kernels = lambda device: kernels
    try:
        yield
    finally:
        dispatch.runs_kernels = chosen


# --- whether graphs work at all


def smoke(scale: Scale, found: Found) -> None:
    """Like the eager loop; and with large matrix products the same to the bit, though the field is looked at beside
    each replay, and another graph comes and goes: neither may share cuBLAS's workspace with it.

    Raises:
        RuntimeError: they do not.
    """
    for gradient, method in itertools.product(("discrete", "adjoint"), ("dopri5", "nystrom4")):
        found[f"{gradient}, {method}"] = _difference(scale, gradient, method)
    wide = problem_on(DEVICE, torch.float32, 64, scale.width)
    one, another = layer(wide, loop="graph"), problem_on(DEVICE, torch.float32, 64, scale.width)

    def solve(by: nt.GNesterovNODE, problem: Problem) -> list[Tensor]:
        out = by(problem.h0)
        grads = problem.gradients(out)
        insist(by.stats)
        return [out.detach(), *grads]

    first, unlike = solve(one, wide), 0
    for k in range(scale.repeats):
        if k == scale.repeats // 2:
            solve(layer(another, loop="graph"), another)
            del another
            gc.collect()
            graphs.LOOPS.count  # noqa: B018  # lets go of those whose field is gone
        unlike += not all(map(torch.equal, solve(one, wide), first))
        found["solves unlike the first"] = unlike
    if unlike:
        raise RuntimeError(f"{unlike} of {scale.repeats} solves by the same graph were unlike the first")


def _difference(scale: Scale, gradient: str, method: str) -> float:
    """Of five solves by graphs the largest relative one to the eager loop's, gradients included.

    Raises:
        RuntimeError: it is too large, or the steps are others.
    """
    problem, worst = problem_on(DEVICE, torch.float64, scale.batch), 0.0
    tolerance = max(1e-6, scale.least)
    options: dict[str, Any] = {"method": method, "rtol": tolerance, "atol": tolerance}
    eager, graph = (layer(problem, gradient, loop=loop, **options) for loop in ("eager", "graph"))
    out = eager(problem.h0)
    truth, steps = [out.detach(), *problem.gradients(out)], [eager.stats.accepted, eager.stats.rejected]
    for _ in range(min(scale.rounds, 5)):
        out = graph(problem.h0)
        worst = max(worst, *map(relative_error, [out.detach(), *problem.gradients(out)], truth))
        insist(graph.stats)
        taken = [graph.stats.accepted, graph.stats.rejected]
        if worst > 1e-8 or taken != steps:
            raise RuntimeError(f"{gradient}, {method}: relative difference {worst:.1e}; steps {taken}, not {steps}")
    return worst


# --- correctness


def checks(scale: Scale, found: Found) -> None:
    """The tests and the sanitizers, all at once: they leave most of the GPU and of a machine of 16 cores idle."""
    jobs: dict[str, Callable[[], dict[str, Any]]] = {
        "tests": run_tests,
        # Without the caching allocator each tensor is an allocation, and what lies beyond it is not ours; a capture
        # needs it.
        "memcheck, eager loop": lambda: sanitize("memcheck", "eager", PYTORCH_NO_CUDA_MEMORY_CACHING="1"),
        "memcheck, graphs": lambda: sanitize("memcheck", "graph"),
        "racecheck": lambda: sanitize("racecheck", "graph"),
    }
    with ThreadPoolExecutor(len(jobs)) as pool:
        waiting = {pool.submit(job): name for name, job in jobs.items()}
        for one in as_completed(waiting):
            found[waiting[one]] = one.result()


def run_tests(workers: int = 13, limit: int = 180) -> dict[str, Any]:
    """The kernels' tests in so many processes: most of their time is compilation. After `limit` seconds it counts what
    was done."""
    files = [f"tests/test_{name}.py" for name in TESTS]
    command = [sys.executable, "-m", "pytest", "-n", str(workers), "-q", "--tb=short", "-p", "no:cacheprovider"]
    command += ["-o", "faulthandler_timeout=60"]  # what hangs says where
    with tempfile.TemporaryDirectory() as folder:
        failures = Path(folder, "failures")
        command += ["-p", "benchmarks.gpu_failures", *files]
        status, said = _run(command, limit, **{FAILURES: str(failures)})
        found = failures.read_text() if failures.exists() else ""
    counts = {what: int(number) for number, what in re.findall(r"(\d+) (passed|failed|skipped|error)", said)}
    print(found)
    names = re.findall(r"^### (\S+)", found, re.MULTILINE)
    ended = {"timed out": limit} if status is None else {"exit": status}
    return {**ended, **counts, "failures": names, "end": said.splitlines()[-3:]}


def sanitize(tool: str, loop: str, limit: int = 180, **variables: str) -> dict[str, Any]:
    """A small run of every layer under compute-sanitizer."""
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(program).exists():
        return {"said": "compute-sanitizer was not found"}
    # Calls that fail are torch's affair: it asks whether pointers are its own, and so on.
    command = [program, "--tool", tool, "--error-exitcode", "9", "--report-api-errors", "no"]
    command += ["--target-processes", "application-only"]  # not the compilers that triton starts
    small = [sys.executable, "-m", "benchmarks.gpu", "--small-run", loop]
    status, output = _run([*command, *small], limit, **variables)
    said = [line for line in output.splitlines() if line.startswith("=========")]
    if status != 0:
        print(tool, loop, output[-5000:])
    loops = sorted(set(re.findall(r"loop(?:_backward)?='([^']*)'", output)))
    ended = {"timed out": limit} if status is None else {"exit": status}
    return {**ended, "said": said[-1] if said else output[-500:], "loops": loops}


def _run(command: Sequence[str], limit: float, **variables: str) -> tuple[int | None, str]:
    """Exit status and output of a command; see `_wait`."""
    with tempfile.TemporaryFile("w+") as out:
        status = _wait(command, limit, {"stdout": out, "stderr": out}, **variables)
        out.seek(0)
        return status, out.read()


def _wait(command: Sequence[str], limit: float, streams: dict[str, Any] | None = None, **variables: str) -> int | None:
    """Exit status of a command, None where it has been interrupted after `limit` seconds; of what it has started in its
    session nothing is left to hold up the GPU."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **variables}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **(streams or {}))
    timed_out = False
    try:
        process.wait(limit)
    except subprocess.TimeoutExpired:
        timed_out = True
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return None if timed_out else process.returncode


def small_run(loop: str) -> None:
    """What compute-sanitizer watches: every layer, forward and backward, with odd sizes and an output in mid-step."""
    faulthandler.dump_traceback_later(60, repeat=True)
    kinds: tuple[Any, ...] = (nt.NODE, nt.SONODE, nt.NesterovNODE, nt.GNesterovNODE)
    methods = ("dopri5", "discrete"), ("dopri5", "adjoint"), ("nystrom4", "discrete"), ("nystrom4", "adjoint")
    for kind, (method, gradient) in itertools.product(kinds, methods):
        if method == "nystrom4" and kind in (nt.NODE, nt.SONODE):  # not for them
            continue
        options: dict[str, Any] = {"gradient": gradient, "method": method, "loop": loop, "rtol": 1e-2, "atol": 1e-2}
        layer = kind(Affine().to(DEVICE), t=(1.0, 1.4, 2.0), **options)
        h = torch.randn(193, 7, device=DEVICE).requires_grad_()
        for _ in range(2):
            layer(h).square().sum().backward()
        print(kind.__name__, gradient, layer.stats, flush=True)


class Affine(nn.Module):
    """A field of odd width, with or without the momentum."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(7, 7)

    def forward(self, t: Tensor, h: Tensor, m: Tensor | None = None) -> Tensor:
        u: Tensor = self.linear(h)
        return u if m is None else u - m


# --- accuracy


def layer(problem: Problem, gradient: Any = "discrete", **options: Any) -> nt.GNesterovNODE:
    settings = {"rtol": TOLERANCE, "atol": TOLERANCE} | options
    return nt.GNesterovNODE(problem.field, gate=GATE, xi=XI, t=(T0, T1), gradient=gradient, **settings)


def problem_on(device: torch.device, dtype: torch.dtype, batch: int, width: int = WIDTH) -> Problem:
    drawn = Problem.draw(batch=batch, width=width)
    h0 = drawn.h0.detach().to(device, dtype).requires_grad_()
    return Problem(drawn.field.to(device, dtype), h0, drawn.cotangent.to(device, dtype))


def accuracy(scale: Scale, found: Found) -> None:
    """Relative errors of the kernels' solves and gradients, by both loops, in each dtype, against a float64 solve in
    plain torch."""
    exact = problem_on(DEVICE, torch.float64, scale.batch)
    with path(False):
        truth = layer(exact, rtol=1e-12, atol=1e-12)(exact.h0)
        gradients = exact.gradients(truth)
    truth = truth.detach()
    for dtype, least in (
        (torch.float64, 1e-10),
        (torch.float32, 1e-6),
        (torch.bfloat16, 1e-2),
        (torch.float16, 1e-2),
    ):
        problem, tolerance = problem_on(DEVICE, dtype, scale.batch), max(least, scale.least)
        for gradient, method in itertools.product(("discrete", "adjoint"), ("dopri5", "nystrom4")):

            def solve(loop: str, kernels: bool = True) -> tuple[Tensor, tuple[Tensor, ...], Any]:
                with path(kernels):
                    options: dict[str, Any] = {"method": method, "rtol": tolerance, "atol": tolerance}  # noqa: B023
                    one = layer(problem, gradient, loop=loop, **options)  # noqa: B023
                    out = one(problem.h0)  # noqa: B023
                    return out.detach(), problem.gradients(out), one.stats  # noqa: B023

            plain, plain_grads, plain_stats = solve("eager", kernels=False)
            which = f"{str(dtype).removeprefix('torch.')} {gradient}" + ("" if method == "dopri5" else f", {method}")
            for loop in ("eager", "graph"):
                out, grads, stats = solve(loop)
                if loop == "graph":
                    insist(stats)
                found[which + (", graph" if loop == "graph" else "")] = {
                    "path": stats.path, "path_backward": stats.path_backward, "tolerance": tolerance,
                    "error": relative_error(out, truth),
                    "gradient_error": max(map(relative_error, grads, gradients)),
                    "difference_from_torch": relative_error(out, plain.double()),
                    "gradient_difference_from_torch": max(
                        relative_error(a, b.double()) for a, b in zip(grads, plain_grads, strict=True)
                    ),
                    "steps": [stats.accepted, stats.rejected],
                    "steps_of_torch": [plain_stats.accepted, plain_stats.rejected],
                }  # fmt: skip


# --- bandwidth


def seconds(call: Callable[[], object], scale: Scale) -> float:
    """Median time of a call on the device, launched often enough to be far above the clock's grain."""
    call()
    if not GPU:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    torch.cuda.synchronize()
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    first.record()
    for _ in range(5):
        call()
    last.record()
    torch.cuda.synchronize()
    repeats = max(1, min(200, int(scale.seconds / 5 / max(first.elapsed_time(last) / 5e3, 1e-6))))
    found = []
    for _ in range(5):
        first.record()
        for _ in range(repeats):
            call()
        last.record()
        torch.cuda.synchronize()
        found.append(float(first.elapsed_time(last)) / 1e3 / repeats)
    return statistics.median(found)


def copy_bandwidth(scale: Scale) -> float:
    """Bytes read and written a second by torch's own copy of 2 GiB."""
    count = (1 << 29) if GPU else 1 << 10
    a = torch.zeros(count, device=DEVICE)
    b = torch.empty_like(a)
    return 2 * a.nbytes / seconds(lambda: b.copy_(a), scale)


def launches(n: int, dtype: torch.dtype) -> dict[str, tuple[int, Callable[[], object]]]:
    """One launch each of the kernels of a dopri5 step, and of a nystrom4 step: rows of n values moved, and the call."""
    ops, tableau, method = _Ops(), DOPRI5, NYSTROM4
    rows = [torch.randn(n, device=DEVICE).to(dtype) for _ in range(16)]
    z, a, end = (torch.randn(2 * n, device=DEVICE).to(dtype) for _ in range(3))
    c = torch.rand(7, 4, dtype=torch.float64, device=DEVICE)
    dt, tol = (torch.full((1,), x, dtype=torch.float64, device=DEVICE) for x in (0.1, 1e-3))
    gates = GATE, GATE
    u, k, v = rows[:2], rows[2:9], rows[9:16]
    weights = torch.rand(4, 7, dtype=torch.float64, device=DEVICE)
    own, rates = (torch.rand(size_of(method, True), dtype=torch.float64, device=DEVICE) for _ in range(2))
    grown = torch.rand(size_of(method, True, growth=True), dtype=torch.float64, device=DEVICE)
    stage = traffic.momentum_stage
    return {
        "momentum stage 1": (
            stage(tableau, 1, 0, 2).rows, lambda: ops.momentum_stage([], z, k[:1], c, dt, tableau, *gates, 2, False)
        ),
        "momentum stage 3": (
            stage(tableau, 1, 2, 2).rows, lambda: ops.momentum_stage(u, z, k[:1], c, dt, tableau, *gates, 2, False)
        ),
        "momentum stage 5": (
            stage(tableau, 3, 2, 2).rows, lambda: ops.momentum_stage(u, z, k[:3], c, dt, tableau, *gates, 2, False)
        ),
        "momentum finish": (
            traffic.momentum_finish(tableau, 2).rows,
            lambda: ops.momentum_finish(u, z, k[:5], c, dt, tol, tol, tableau, *gates, 1),
        ),
        "adjoint stage 3": (
            traffic.momentum_adjoint_stage(tableau, 3, 2, 2).rows,
            lambda: ops.momentum_adjoint_stage(u, z, k[:3], a, v[:3], c, dt, tableau, *gates, 2, False, ()),
        ),
        "adjoint finish": (
            traffic.momentum_adjoint_finish(tableau).rows,
            lambda: ops.momentum_adjoint_finish(z, k, a, v, c, dt, tol, tol, tableau, *gates, True, ()),
        ),
        "reverse stage 2": (
            traffic.momentum_reverse_stage(tableau, 6, 2, 2).rows,
            lambda: ops.momentum_reverse_stage(u, z, k[:5], end, v[:2], c, dt, tableau, 6, *gates, (), ()),
        ),
        "reverse finish": (
            traffic.momentum_reverse_finish(tableau, 6).rows,
            lambda: ops.momentum_reverse_finish(z, k[:5], end, v[:6], c, dt, tableau, 6, *gates, True, (), ()),
        ),
        "momentum dense output, 4 times": (
            traffic.momentum_dense_output(tableau, 4).rows,
            lambda: ops.momentum_dense_output(z, k, weights, dt, tableau, GATE),
        ),
        "first-order stage 5": (
            traffic.first_order_step(tableau)[5].rows, lambda: ops.first_order_stage(rows[0], k[:6], dt, tableau, 5, ())
        ),
        "first-order finish": (
            traffic.first_order_finish(tableau).rows,
            lambda: ops.first_order_finish(rows[0], k, dt, tol, tol, tableau, ()),
        ),
        "first-order reverse stage 0": (
            traffic.first_order_reverse_stage(tableau, 0, 6).rows,
            lambda: ops.first_order_reverse_stage(rows[0], v[:5], dt, tableau, 6, None),
        ),
        "nystrom stage 2": (
            traffic.nystrom_stage(method, True, 2).rows,
            lambda: ops.nystrom_stage(rows[0], z, k[:2], c, own, method, *gates, True),
        ),
        "nystrom finish": (
            traffic.nystrom_finish(method, True).rows,
            lambda: ops.nystrom_finish(rows[0], z, k[:3], c, own, tol, tol, method, *gates, True),
        ),
        "nystrom adjoint stage 2": (
            traffic.nystrom_adjoint_stage(method, True, 2).rows,
            lambda: ops.nystrom_adjoint_stage(rows[0], z, k[:2], a, v[:2], c, grown, method, *gates, True),
        ),
        "nystrom adjoint finish": (
            traffic.nystrom_adjoint_finish(method, True).rows,
            lambda: ops.nystrom_adjoint_finish(
                rows[0], z, k[:3], a, v[:4], c, grown, dt, tol, tol, method, *gates, True, False, None
            ),
        ),
        "nystrom reverse stage 0": (
            traffic.nystrom_reverse_stage(method, True, 0).rows,
            lambda: ops.nystrom_reverse_stage(rows[0], z, k[:3], end, v[:1], v[1], c, own, dt, method, *gates, None),
        ),
        "nystrom reverse finish": (
            traffic.nystrom_reverse_finish(method, True, quadratures=True).rows,
            lambda: ops.nystrom_reverse_finish(z, k[:3], end, v[:2], v[2], c, own, dt, method, GATE, None, rates),
        ),
    }  # fmt: skip


class _Ops:
    """The operators' launchers by name."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return dispatch._load(name, True)


def bandwidth(scale: Scale, found: Found) -> None:
    """Bytes a second of each kernel over those of a copy, by size and dtype."""
    found["copy_bytes_per_second"] = copied = copy_bandwidth(scale)
    sizes = [(n, torch.float32) for n in scale.rows]
    sizes += [(scale.large, dtype) for dtype in (torch.float64, torch.bfloat16)]
    for n, dtype in sizes:
        itemsize = torch.empty(0, dtype=dtype).element_size()
        for name, (rows, call) in launches(n, dtype).items():
            moved = rows * n * itemsize
            found[f"{name}, {str(dtype).removeprefix('torch.')}, {n}"] = moved / seconds(call, scale) / copied
        if GPU:
            torch.cuda.empty_cache()


# --- latency


def latency(scale: Scale, found: Found) -> None:
    """Microseconds of one dopri5 step's launches on a small state: one by one, and replayed as a graph; and of a field
    call and of a launch of nothing, both from the host."""
    calls = list(launches(scale.batch * 64, torch.float32).values())[:4]

    def step() -> None:
        for _, call in calls:
            call()

    step()
    problem = problem_on(DEVICE, torch.float32, scale.batch)
    t = torch.tensor(T0, device=DEVICE)
    one = torch.zeros(1, device=DEVICE)
    with torch.no_grad():
        found["launches"] = 1e6 * wall(step, scale)
        found["field"] = 1e6 * wall(lambda: problem.field(t, problem.h0), scale)
        found["smallest torch operator"] = 1e6 * wall(lambda: one.add_(1), scale)
    if GPU:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        found["graph replay"] = 1e6 * wall(graph.replay, scale)


def wall(call: Callable[[], object], scale: Scale) -> float:
    """Seconds of a call from the host's side, the device's end of a long row of them included."""
    call()
    _synchronize()
    start = time.perf_counter()
    call()
    _synchronize()
    repeats = max(1, min(200, int(scale.seconds / (time.perf_counter() - start))))
    found = []
    for _ in range(7 if GPU else 1):
        _synchronize()
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        _synchronize()
        found.append((time.perf_counter() - start) / repeats)
    return statistics.median(found)


def _synchronize() -> None:
    if GPU:
        torch.cuda.synchronize()


# --- the loop on the device


def loops(scale: Scale, found: Found) -> None:
    """Microseconds of an attempted step on a small state, forward and in training, and of its field calls alone.

    A step's own time is the difference of two solves that take different numbers of them; the mean over a solve of the
    five steps that the tolerance asks for has start and end in it, two more field calls among them.
    """
    problem = problem_on(DEVICE, torch.float32, scale.batch)
    t, calls = torch.tensor(T0, device=DEVICE), DOPRI5.stages - 1

    def field() -> None:
        for _ in range(calls):
            problem.field(t, problem.h0)

    with torch.no_grad():
        field()
        floor = field
        if GPU:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                field()
            floor = graph.replay
        found[f"{calls} field calls"] = 1e6 * wall(floor, scale)
    for loop in ("graph", "eager"):
        for gradient, method in (("discrete", "dopri5"), ("adjoint", "dopri5"), ("discrete", "nystrom4")):
            for name in ("forward", "training"):
                if name == "forward" and gradient == "adjoint":
                    continue
                solve = partial(_attempts, problem, name, gradient, loop, method, scale)
                seconds, attempts, said = solve({})
                which = name if name == "forward" else f"{name}, {gradient}"
                which += "" if method == "dopri5" else f", {method}"
                found[f"{which}, {loop}: mean over a solve"] = 1e6 * seconds / attempts
                found[f"{which}, {loop}: loops"] = said
                steady = {"controller": nt.controllers.Integral(max_factor=1 + 1e-9), "rtol": 1e3}
                few, many = (solve(steady | {"first_step": 1 / n}) for n in scale.steps)
                found[f"{which}, {loop}: an attempted step"] = 1e6 * (many[0] - few[0]) / (many[1] - few[1])
    found["step over field"] = found["forward, graph: an attempted step"] / found[f"{calls} field calls"]


def _attempts(
    problem: Problem, name: str, gradient: str, loop: str, method: str, scale: Scale, options: dict[str, Any]
) -> tuple[float, int, list[str]]:
    """Seconds of a call, attempted steps, and which loops it took."""
    ours = layer(problem, gradient, loop=loop, method=method, **options)

    def call() -> object:
        if name == "forward":
            with torch.no_grad():
                return ours(problem.h0.detach())
        return problem.gradients(ours(problem.h0))

    for _ in range(min(scale.rounds, 3)):
        call()
    stats = ours.stats
    if loop == "graph":
        insist(stats, backward=name == "training")
    said = [stats.loop, stats.loop_backward] if name == "training" else [stats.loop]
    return wall(call, scale), stats.accepted + stats.rejected, said


# --- whole solves


class Cheap(nn.Module):
    """A field that is one pass over the state."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(4.0))

    def forward(self, t: Tensor, h: Tensor) -> Tensor:
        return torch.sin(self.weight * h)


def solves(scale: Scale, found: Found) -> None:
    """Milliseconds and kernels of solves, forward and with a backward pass, ours and torchdiffeq's, by size."""
    small = problem_on(DEVICE, torch.float32, scale.batch)
    n = scale.large // 64
    h0 = torch.randn(n, 64, device=DEVICE).requires_grad_()
    large = Problem(Cheap().to(DEVICE), h0, torch.randn(n, 64, device=DEVICE) / n)  # type: ignore[arg-type]
    compare("small", small, contenders(small, backpropagation=True), scale, found)
    compare("large", large, contenders(large, backpropagation=False), scale, found)


def compiled(scale: Scale, found: Found) -> None:
    """As `solves`, on the small state, with a solve that torch.compile has: that may take its time, or fail."""
    problem = problem_on(DEVICE, torch.float32, scale.batch)
    chosen = {name: call for name, call in contenders(problem).items() if not others(name) and "nystrom4" not in name}
    for gradient in ("discrete", "adjoint"):
        one = layer(problem, gradient, loop="eager")
        one = torch.compile(one, fullgraph=True) if GPU else one  # type: ignore[assignment]
        chosen[f"train, {gradient}, compiled"] = training(problem, one)
        if gradient == "discrete":
            chosen["forward, compiled"] = inference(problem, one)
    compare("small", problem, chosen, scale, found)


def inference(problem: Problem, solve: Callable[..., Tensor], **options: Any) -> Callable[[], object]:
    return torch.no_grad()(lambda: solve(problem.h0.detach(), **options))


def training(problem: Problem, solve: Callable[..., Tensor], **options: Any) -> Callable[[], object]:
    return lambda: problem.gradients(solve(problem.h0, **options))


def contenders(problem: Problem, backpropagation: bool = False) -> dict[str, Callable[[], object]]:
    """All but the compiled ones."""
    tolerances: dict[str, Any] = {"rtol": TOLERANCE, "atol": TOLERANCE}
    peer = TorchdiffeqSystem(problem.field)
    ours = {gradient: layer(problem, gradient, loop="graph") for gradient in ("discrete", "adjoint")}
    eager = {gradient: layer(problem, gradient, loop="eager") for gradient in ("discrete", "adjoint")}
    nystrom4 = layer(problem, "discrete", loop="graph", method="nystrom4")

    def plain(solve: Callable[[], object]) -> Callable[[], object]:
        def run() -> object:
            with path(False):
                return solve()

        return run

    def graphed(
        make: Callable[..., Callable[[], object]], one: nt.GNesterovNODE, backward: bool
    ) -> Callable[[], object]:
        call = make(problem, one)

        def run() -> None:
            call()
            insist(one.stats, backward)

        return run

    found = {
        "forward": graphed(inference, ours["discrete"], False),
        "forward, eager loop": inference(problem, eager["discrete"]),
        "forward, plain torch": plain(inference(problem, eager["discrete"])),
        "forward, odeint": inference(problem, peer.solve, **tolerances),
        "forward, nystrom4": graphed(inference, nystrom4, False),
        "train, discrete": graphed(training, ours["discrete"], True),
        "train, discrete, nystrom4": graphed(training, nystrom4, True),
        "train, adjoint": graphed(training, ours["adjoint"], True),
        "train, discrete, eager loop": training(problem, eager["discrete"]),
        "train, adjoint, eager loop": training(problem, eager["adjoint"]),
        "train, discrete, plain torch": plain(training(problem, eager["discrete"])),
        "train, odeint_adjoint": training(problem, peer.solve, adjoint=True, **tolerances),
    }
    if backpropagation:
        found["train, odeint"] = training(problem, peer.solve, **tolerances)
    return found


def compare(name: str, problem: Problem, chosen: dict[str, Callable[[], object]], scale: Scale, found: Found) -> None:
    """Time the contenders by turns. One that raises is left out.

    Raises:
        RuntimeError: which did; when all else is there.
    """
    raised: dict[str, str] = {}
    warm_up = 2 if scale.rounds > 1 else 0
    times = timing.interleave(chosen, scale.rounds, warm_up=warm_up, clock=clock, raised=raised)
    times = {one: values for one, values in times.items() if values}
    ratio = partial(timing.ratio, times)
    result: dict[str, Any] = {
        "elements": problem.h0.numel(),
        "raised": raised,
        "milliseconds": {one: 1e3 * statistics.median(values) for one, values in times.items()},
        "ratios": {
            f"{a} / {b}": ratio(a, b)
            for a, b in itertools.product(times, times)
            if a != b and a.split(",")[0] == b.split(",")[0] and others(a) and not others(b)
        },
    }
    found[name] = result
    # Only now: with a profiler at work nothing is as it was, and the figures are what the time is for.
    ours, peer = layer(problem, loop="graph"), TorchdiffeqSystem(problem.field)
    inference(problem, ours)()
    inference(problem, peer.solve, rtol=TOLERANCE, atol=TOLERANCE)()
    result |= {"stats": asdict(ours.stats), "steps_of_torchdiffeq": [peer.accepted, peer.rejected]}
    found[name] = result
    result["kernels"] = {one: count_kernels(chosen[one]) for one in times}
    found[name] = result
    if raised:
        raise RuntimeError(f"contenders that raised, {name}: {raised}")


def others(name: str) -> bool:
    """Whether a contender is what the default is to be compared with."""
    return any(word in name for word in ("odeint", "plain", "eager", "compiled"))


def clock() -> float:
    """Wall seconds once the device has done all it was given."""
    _synchronize()
    return time.perf_counter()


def count_kernels(call: Callable[[], object]) -> int | None:
    """Kernels that a call launches, copies left out."""
    if not GPU:
        return None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    events = [e for e in profile.events() if e.device_type == DeviceType.CUDA]
    return sum(not e.name.startswith(("Memcpy", "Memset")) for e in events)


# --- report


PARTS: dict[str, Callable[[Scale, Found], None]] = {
    "smoke": smoke, "checks": checks, "accuracy": accuracy, "bandwidth": bandwidth, "latency": latency, "loops": loops,
    "solves": solves, "compiled": compiled,
}  # fmt: skip


def names() -> list[str]:
    """The parts, in order; the compiled tests and sanitizers want a GPU."""
    return [name for name in PARTS if GPU or name != "checks"]


def lines(found: dict[str, Any]) -> list[Line]:
    """The table: what is aimed at, and what says most of the rest."""
    rows = []
    for name, value in found.get("smoke", {}).items():
        if name == "solves unlike the first":
            rows.append(Line("graphs: solves unlike the first", value, ("<=", 0)))
        else:
            rows.append(Line(f"graphs: relative difference from the eager loop, {name}", value, ("<=", 1e-8)))
    for name, one in found.get("checks", {}).items():
        late = f", timed out after {one['timed out']} s" if "timed out" in one else ""
        if name == "tests":
            bad, failed = len(one["failures"]), one.get("exit", 0) != 0
            rows.append(Line("tests that failed", bad or failed, ("<=", 0), f"{one.get('passed', 0)} passed{late}"))
        elif late:
            rows.append(Line(f"compute-sanitizer {name}, timed out, seconds", one["timed out"]))
        elif "exit" in one:
            rows.append(Line(f"compute-sanitizer {name}, exit status", one["exit"], ("<=", 0), one["said"].strip("= ")))
    for name, one in found.get("accuracy", {}).items():
        target = {"float64": 1e-8, "float32": 1e-3}.get(name.split()[0])
        rows.append(Line(f"relative error, {name}", one["error"], ("<=", target) if target else None))
        rows.append(Line(f"of the gradients, {name}", one["gradient_error"], ("<=", target) if target else None))
    bandwidths = dict(found.get("bandwidth", {}))
    if bandwidths:
        rows.append(Line("copy bandwidth, TB/s", bandwidths.pop("copy_bytes_per_second") / 1e12))
    for name, value in bandwidths.items():
        wanted = int(name.split(", ")[-1]) >= 1 << 24 and "float32" in name and ("stage" in name or "finish" in name)
        rows.append(Line(f"{name}: bandwidth over a copy's", value, (">=", 0.85) if wanted else None))
    for name, value in found.get("latency", {}).items():
        rows.append(Line(f"small state, µs: {name}", value))
    for name, value in found.get("loops", {}).items():
        if isinstance(value, float):
            rows.append(Line(f"small state, loop: {name}", value, ("<=", 2.0) if name == "step over field" else None))
    goals = {
        ("small", "forward, odeint / forward"): 20.0,
        ("small", "train, odeint_adjoint / train, discrete"): 20.0,
        ("large", "forward, odeint / forward"): 5.0,
    }
    for size, one in (*found.get("solves", {}).items(), *found.get("compiled", {}).items()):
        for name, value in one["ratios"].items():
            goal = goals.get((size, name))
            rows.append(Line(f"{size} state, time of {name}", value, (">=", goal) if goal else None))
    return rows


def gpu_name() -> str:
    return torch.cuda.get_device_name() if GPU else "no GPU"


def driver() -> str:
    if not GPU:
        return ""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def run_part(name: str, file: Path, scale: Scale) -> int:
    """In a process of its own: what is found is in the file, why it failed in another beside it."""
    faulthandler.dump_traceback_later(60, repeat=True)
    try:
        with path(True):
            PARTS[name](scale, Found(file))
    except Exception:
        said = traceback.format_exc()
        file.with_suffix(".failed").write_text(said)
        print(f"{name} failed:\n{said}", flush=True)
        return 1
    return 0


def attempt(name: str, left: float, rehearse: bool) -> tuple[dict[str, Any], str]:
    """What a part finds in a process of its own, and why there is no more of it; empty where there is."""
    limit = min(left, 900 if rehearse else LIMITS[name])
    if limit < 15:
        return {}, "no time was left for it"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "found.json")
        command = [sys.executable, "-m", "benchmarks.gpu", "--part", name, "--into", str(file)]
        status = _wait([*command, *["--rehearse"] * rehearse], limit)
        found = json.loads(file.read_text()) if file.exists() else {}
        failed = file.with_suffix(".failed")
        if failed.exists():
            return found, failed.read_text()
    if status is None:
        return found, f"timed out after {limit:.0f} s"
    return found, f"ended with status {status}" if status else ""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.partition("\n")[0])
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes, on a CPU under triton's interpreter")
    parser.add_argument("--only", nargs="+", metavar="PART", choices=list(PARTS), help="run these parts alone")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for everything (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="JSON file (default: benchmarks/results/<gpu>.json)")
    parser.add_argument("--commit", default=commit(), help="where there is no checkout to ask")
    for hidden in ("--small-run", "--part", "--into"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if not GPU and not options.rehearse:
        parser.error("torch sees no CUDA device; --rehearse runs the script without one")
    torch.manual_seed(0)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # not without what it has started
    if options.small_run:
        small_run(options.small_run)
        return 0
    if options.part:
        return run_part(options.part, Path(options.into), TINY if options.rehearse else FULL)
    output = options.output
    if output is None and not options.rehearse:
        slug = re.sub(r"[^a-z0-9]+", "-", gpu_name().lower()).strip("-")
        output = Path(__file__).parent / "results" / f"{slug}.json"
    began = time.monotonic()
    before = json.loads(output.read_text()) if output is not None and output.exists() else {}
    found = {name: before[name] for name in names() if name in before}
    ran = dict(before.get("parts", {}))
    failed: dict[str, str] = {}
    header = {
        "gpu": gpu_name(),
        "driver": driver(),
        "cuda": torch.version.cuda,
        "versions": versions("torch", "triton", "torchdiffeq"),
        "date": today(),
        "commit": options.commit,
        "parts": ran,
        "failed": failed,
    }
    for name in names():
        if options.only and name not in options.only:
            continue
        start = time.monotonic()
        left = math.inf if options.rehearse else options.seconds - (start - began)
        new, why = attempt(name, left, options.rehearse)
        seconds = round(time.monotonic() - start, 1)
        if new:
            found[name] = new
            ran[name] = {"date": today(), "commit": options.commit, "seconds": seconds}
        if why:
            failed[name] = why
        print(f"{name}: {seconds} s" + (f"; {why.strip().splitlines()[-1]}" if why else ""), flush=True)
        if output is not None:  # at once: the machine may not last
            output.parent.mkdir(parents=True, exist_ok=True)
            printed = [asdict(row) | {"met": row.met} for row in lines(found)]
            _write(output, header | {"table": printed} | found)
    rows = lines(found)
    print(f"\n{header['gpu']}, driver {header['driver']}, {header['versions']}, {header['date']}")
    if options.rehearse:
        print("A rehearsal: every part ran as far as it says; no figure here means anything.")
    print(table(rows))
    print(f"{time.monotonic() - began:.0f} s" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
