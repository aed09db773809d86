"""Which loop makes a solve: the eager one, or one on the device, captured as a graph where that can be."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from nesterov_triton import transforms
from nesterov_triton.flow import Flow
from nesterov_triton.gradients.leaves import unseen_leaves
from nesterov_triton.gradients.problem import Problem
from nesterov_triton.network import Evaluation
from nesterov_triton.stepping import graphs
from nesterov_triton.stepping.controllers import PI, Integral
from nesterov_triton.stepping.fused_rk import Overwritten, is_overwritten
from nesterov_triton.systems import Momentum

R = TypeVar("R")
AUTO = False  # whether loop="auto" chooses graphs, from the second solve of a kind on
CALLED = "device: attempts are called one by one, for a CPU has no graphs"


Kind = Literal["forward", "adjoint", "reverse sweep"]


def declined(problem: Problem, kind: Kind, objection: str | None = None) -> bool:
    """Whether the eager loop is to do it, as the problem or the `objection` says; the stats say why."""
    reason = objection or _objection(problem)
    if reason:
        _decline(problem, kind, reason)
    return bool(reason)


def on_device(
    problem: Problem,
    flow: Flow,
    kind: Kind,
    detail: Hashable,
    z: Tensor,
    t: float,
    make: Callable[[], Any],
    solve: Callable[[Any], R],
    results: Callable[[R], Sequence[Tensor]],
) -> R | None:
    """What `solve` returns, by a loop on the device, or None where the eager loop is to do it after all. Which it was
    is in the stats, also where it fails. Not for what is `declined`.

    Args:
        kind, detail: of the loop, beside what the problem says.
        z, t: a state, [D], and a time to try the field at.
        make: makes the loop.
        solve: solves by it; may be called twice, for the same.
        results: what of the result is compared when a graph is new.
    """
    device, field, before = problem.z.device, problem.system.field, flow.network.evaluations
    key: tuple[Hashable, ...] = (graphs.identity(field), kind, detail, *_key(problem))
    given = make, solve, results
    try:
        if not graphs.captures(device):
            entry = graphs.LOOPS.get(key, field)
            _check(problem, entry)
            return _run_entry(problem, flow, kind, entry, None, *given)
        with torch.cuda.device(device):
            key += (graphs.own_tensors(field), graphs.switches())
            look = partial(_signature, flow, z, t, params=None if kind == "forward" else flow.params)
            stream = torch.cuda.current_stream(device)
            seen, last = None, graphs.LOOPS.last(key)
            if last is not None:
                try:
                    found = _run_entry(problem, flow, kind, last, stream, *given, _comparison(last, look, stream))
                except graphs.Stale as stale:
                    seen, flow.network.evaluations = stale.seen, before
                else:
                    if found is not None:
                        return found
            seen = seen or look()
            full = (*key, seen.digest)
            entry = graphs.LOOPS.get(full, field)
            _check(problem, entry)
            entry.seen, entry.outside = seen.digest, graphs.not_own(seen.outside, field)
            found = _run_entry(problem, flow, kind, entry, stream, *given)
            if found is not None:
                graphs.LOOPS.confirm(key, full)
            return found
    except graphs.Unfit as reason:
        flow.network.evaluations = before
        _decline(problem, kind, str(reason))
        return None
    except graphs.Later as reason:  # no fault of the field's: not remembered, and nothing to warn of
        flow.network.evaluations = before
        _record_loop(problem, kind, f"eager: {reason}")
        return None


def _check(problem: Problem, entry: graphs.Entry) -> None:
    """Raise Unfit where the entry is not to be used, or not yet."""
    entry.uses += 1
    if entry.reason:
        raise graphs.Unfit(entry.reason)
    if problem.loop == "auto" and entry.uses < 2:
        raise graphs.Unfit("the first of its kind; the next one is captured")


def _signature(
    flow: Flow, z: Tensor, t: float, ready: Any = None, *, params: Sequence[Tensor] | None
) -> graphs.Signature:
    """What the field does, at `z` and `t`, seen on a stream beside the current one; see `graphs.aside`."""
    with graphs.aside(flow.device, "look", ready):
        return graphs.signature(flow.network, *_sample(flow, z, t), params=params, check=_check_leaves)


def _comparison(entry: graphs.Entry, look: Callable[..., graphs.Signature], stream: Any) -> Callable[[], None]:
    """Raises Stale where the field, looked at beside the stream, does something else than what the entry is for."""
    ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
    ready.record(stream)

    def compare() -> None:
        seen = look(ready)
        if seen.digest != entry.seen:
            raise graphs.Stale(seen)

    return compare


def _run_entry(
    problem: Problem,
    flow: Flow,
    kind: Kind,
    entry: graphs.Entry,
    stream: Any,
    make: Callable[[], Any],
    solve: Callable[[Any], R],
    results: Callable[[R], Sequence[Tensor]],
    check: Callable[[], None] | None = None,
) -> R | None:
    """By the loop of an entry, on the current CUDA stream or a CPU; None where that is in use or cannot be."""
    device, before = problem.z.device, flow.network.evaluations

    def again() -> R:
        flow.network.evaluations = before
        return solve(entry.loop)

    with graphs.LOOPS.borrow(entry, stream) as free:
        by = CALLED if stream is None else "graph"
        _record_loop(problem, kind, by if free else "eager: the captured loop is in use")
        if not free:
            return None
        graphs.LOOPS.keep(entry, make)
        try:
            if stream is None:
                return again()
            found = graphs.by_graph(entry, device, again, results, check)
        except (Overwritten, RuntimeError) as error:
            if not is_overwritten(error):
                raise
            entry.refuse("the field returns memory that it has returned before (a captured graph's, perhaps)")
            raise graphs.Unfit(entry.reason) from None
        if found is None:
            flow.network.evaluations = before
            graphs.warn_once(entry.reason)
            _record_loop(problem, kind, f"eager: {entry.reason}")
        return found


def _check_leaves(evaluation: Evaluation, params: Sequence[Tensor]) -> None:
    """Raise where the field uses leaves that a backward pass would not see."""
    if unseen_leaves(evaluation.u, (*evaluation.leaves, *params)):
        raise graphs.Unfit("the field reads its parameters otherwise than as attributes, or other tensors")


def _record_loop(problem: Problem, kind: Kind, what: str) -> None:
    if kind == "forward":
        problem.stats.loop = what
    else:
        problem.stats.loop_backward = what


def _decline(problem: Problem, kind: Kind, reason: str) -> None:
    if problem.loop == "graph":
        graphs.warn_once(reason)
    _record_loop(problem, kind, "eager" if problem.loop == "eager" else f"eager: {reason}")


def _objection(problem: Problem) -> str:
    """Why it has to be the eager loop; empty where it has not."""
    controller, tolerance = problem.options.controller, problem.tolerance
    if problem.loop == "eager":
        return "loop='eager'"
    if problem.loop == "auto" and problem.z.device.type != "cuda":
        return f"the state is on the {problem.z.device.type.upper()}"
    if problem.loop == "auto" and not AUTO:
        return "CUDA graphs are not used by default yet; pass loop='graph' to use them"
    if problem.z.device.type != "cpu" and not problem.path().kernels:
        return problem.path().reason
    if problem.args:
        return "args are others in every call, and a graph is of certain memory"
    if type(controller) not in (Integral, PI):
        return f"controller {type(controller).__name__} may have a rule of its own"
    if tolerance is not None and any(isinstance(x, Tensor) and x.ndim for x in (tolerance.rtol, tolerance.atol)):
        return "the tolerance differs from element to element"
    if tolerance is not None and tolerance.measure is not None:
        return "the error has a norm of its own"
    if not problem.options.plain:
        return "its loop does not know all of these options"
    if transforms.active():
        return "a torch.func transform is active"
    return "" if problem.z.numel() else "the state is empty"


def _key(problem: Problem) -> tuple[Hashable, ...]:
    system = problem.system
    rule = (system.rule, system.sees_momentum) if isinstance(system, Momentum) else None
    wanted = tuple((p.data_ptr(), tuple(p.shape), p.dtype) for p in problem.params)
    z = problem.z
    return (
        problem.method.name, problem.tolerance is None, tuple(problem.shape), z.dtype, z.device, rule, wanted,
        tuple(problem.scalars), problem.autocast,
    )  # fmt: skip


def _sample(flow: Flow, z: Tensor, t: float) -> tuple[Tensor, ...]:
    """What the field is called with for a look at what it does."""
    time = torch.full((), t, dtype=flow.dtype, device=flow.device)
    rows = z.detach().view(flow.rows, *flow.shape).unbind(0)
    return time, *(rows if flow.system.sees_momentum else rows[:1])
