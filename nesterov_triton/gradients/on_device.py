"""Which loop makes a solve: the eager one, or one on the device, captured as a graph where that can be."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextlib import nullcontext
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
    device = problem.z.device
    cuda = device.type == "cuda"
    found: R | None = None
    with torch.cuda.device(device) if cuda else nullcontext():
        try:
            field = problem.system.field
            key: tuple[Hashable, ...] = (graphs.identity(field), kind, detail, *_key(problem))
            if cuda:
                params = None if kind == "forward" else flow.params
                seen = graphs.signature(flow.network, *_sample(flow, z, t), params=params, check=_check_leaves)
                key += (graphs.own_tensors(field), graphs.switches(), seen)
            entry = graphs.LOOPS.get(key, field)
            entry.uses += 1
            if entry.reason:
                raise graphs.Unfit(entry.reason)
            if problem.loop == "auto" and entry.uses < 2:
                raise graphs.Unfit("the first of its kind; the next one is captured")
            with graphs.LOOPS.borrow(entry, cuda) as free:
                _say(problem, kind, ("graph" if cuda else CALLED) if free else "eager: the captured loop is in use")
                if free:
                    found = _solve(problem, flow, entry, kind, make, solve, results)
        except graphs.Unfit as reason:
            _decline(problem, kind, str(reason))
    return found


def _solve(
    problem: Problem,
    flow: Flow,
    entry: graphs.Entry,
    kind: Kind,
    make: Callable[[], Any],
    solve: Callable[[Any], R],
    results: Callable[[R], Sequence[Tensor]],
) -> R | None:
    graphs.LOOPS.keep(entry, make)
    before = flow.network.evaluations

    def again() -> R:
        flow.network.evaluations = before
        return solve(entry.loop)

    try:
        if problem.z.device.type == "cuda":
            found = graphs.by_graph(entry, problem.z.device, again, results)
            if entry.reason:
                graphs.warn_once(entry.reason)
                _say(problem, kind, f"eager: {entry.reason}")
            return found
        return again()
    except (Overwritten, RuntimeError) as error:
        if not is_overwritten(error):
            raise
        flow.network.evaluations = before
        entry.refuse("the field returns memory that it has returned before (a captured graph's, perhaps)")
        raise graphs.Unfit(entry.reason) from None


def _check_leaves(evaluation: Evaluation, params: Sequence[Tensor]) -> None:
    """Raise where the field uses leaves that a backward pass would not see."""
    if unseen_leaves(evaluation.u, (*evaluation.leaves, *params)):
        raise graphs.Unfit("the field reads its parameters otherwise than as attributes, or other tensors")


def _say(problem: Problem, kind: Kind, what: str) -> None:
    if kind == "forward":
        problem.stats.loop = what
    else:
        problem.stats.loop_backward = what


def _decline(problem: Problem, kind: Kind, reason: str) -> None:
    if problem.loop == "graph":
        graphs.warn_once(reason)
    _say(problem, kind, "eager" if problem.loop == "eager" else f"eager: {reason}")


def _objection(problem: Problem) -> str:
    """Why it has to be the eager loop; empty where it has not."""
    controller, tolerance = problem.options.controller, problem.tolerance
    if problem.loop == "eager":
        return "loop='eager'"
    if problem.loop == "auto" and problem.z.device.type != "cuda":
        return f"the state is on the {problem.z.device.type.upper()}"
    if problem.loop == "auto" and not AUTO:
        return "graphs have not been run on a GPU yet; loop='graph' asks for one"
    if problem.z.device.type != "cpu" and not problem.path().kernels:
        return problem.path().reason
    if isinstance(problem.system, Momentum) and not problem.system.follows_rule:
        return f"{type(problem.system).__name__} has factors of its own"
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
