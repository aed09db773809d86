"""Which loop makes a solve: the eager one, or one on the device, captured as a graph where that can be."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from nesterov_triton import transforms
from nesterov_triton.flow import Flow
from nesterov_triton.gradients.problem import Problem
from nesterov_triton.stepping import graphs
from nesterov_triton.stepping.controllers import PI, Integral
from nesterov_triton.stepping.fused_rk import Overwritten, is_overwritten
from nesterov_triton.systems import Momentum

R = TypeVar("R")
CALLED = "device: attempts are called one by one, for a CPU has no graphs"


def on_device(
    problem: Problem,
    flow: Flow,
    kind: str,
    detail: Hashable,
    z: Tensor,
    t: float,
    objection: str,
    make: Callable[[], Any],
    solve: Callable[[Any], R],
    results: Callable[[R], Sequence[Tensor]],
) -> R | None:
    """What `solve` returns, by a loop on the device, or None where the eager loop is to do it; which it was is in the
    stats, also where it fails.

    Args:
        kind, detail: of the loop, beside what the problem says.
        z, t: a state, [D], and a time to try the field at.
        objection: why it has to be the eager loop, if anything is known.
        make: makes the loop.
        solve: solves by it; may be called twice, for the same.
        results: what of the result is compared when a graph is new.
    """

    def say(what: str) -> None:
        setattr(problem.stats, "loop" if kind == "forward" else "loop_backward", what)

    def eager(reason: str) -> None:
        if problem.loop == "graph" or (problem.loop == "auto" and reason.startswith("the field")):
            graphs.warn_once(reason)
        say("eager" if problem.loop == "eager" else f"eager: {reason}")

    objection = objection or _objection(problem)
    if objection:
        eager(objection)
        return None
    cuda = problem.z.device.type == "cuda"
    key: tuple[Hashable, ...] = (graphs.identity(problem.system.field), kind, detail, *_key(problem))
    if cuda:
        seen, reason = graphs.signature(flow.network, *_sample(flow, z, t))
        if reason:
            eager(reason)
            return None
        key += (graphs.own_tensors(problem.system.field), seen)
    entry = graphs.LOOPS.get(key, problem.system.field)
    entry.uses += 1
    if entry.reason:
        eager(entry.reason)
        return None
    if problem.loop == "auto" and entry.uses < 2:
        say("eager: the first of its kind; the next one is captured")
        return None
    found: R | None = None
    with graphs.LOOPS.borrow(entry) as free:
        if not free:
            say("eager: the captured loop is in use")
            return None
        graphs.LOOPS.keep(entry, make)
        before = flow.network.evaluations

        def again() -> R:
            flow.network.evaluations = before
            return solve(entry.loop)

        say("graph" if cuda else CALLED)
        try:
            found = graphs.by_graph(entry, again, results) if cuda else again()
        except (Overwritten, RuntimeError) as error:
            if not is_overwritten(error):
                raise
            flow.network.evaluations = before
            entry.reason = "the field returns memory that it has returned before (a captured graph's, perhaps)"
        if entry.reason:
            eager(entry.reason)
    return found


def _objection(problem: Problem) -> str:
    """Why it has to be the eager loop; empty where it has not."""
    controller, tolerance = problem.options.controller, problem.tolerance
    if problem.loop == "eager":
        return "loop='eager'"
    if problem.loop == "auto" and problem.z.device.type != "cuda":
        return f"the state is on the {problem.z.device.type.upper()}"
    if problem.z.device.type != "cpu" and not problem.path().kernels:
        return problem.path().reason
    if isinstance(problem.system, Momentum) and not problem.system.follows_rule:
        return f"{type(problem.system).__name__} has factors of its own"
    if type(controller) not in (Integral, PI):
        return f"controller {type(controller).__name__} may have a rule of its own"
    if tolerance is not None and any(isinstance(x, Tensor) and x.ndim for x in (tolerance.rtol, tolerance.atol)):
        return "the tolerance differs from element to element"
    if transforms.active():
        return "a torch.func transform is active"
    return "" if problem.z.numel() else "the state is empty"


def _key(problem: Problem) -> tuple[Hashable, ...]:
    system = problem.system
    rule = (system.rule, system.sees_momentum) if isinstance(system, Momentum) else None
    wanted = tuple((p.data_ptr(), tuple(p.shape), p.dtype) for p in problem.params)
    z = problem.z
    return (
        problem.tableau.name, problem.tolerance is None, tuple(problem.shape), z.dtype, z.device, rule, wanted,
        tuple(problem.scalars), problem.autocast,
    )  # fmt: skip


def _sample(flow: Flow, z: Tensor, t: float) -> tuple[Tensor, ...]:
    """What the field is called with for a look at what it does."""
    time = torch.full((), t, dtype=flow.dtype, device=flow.device)
    rows = z.detach().view(flow.rows, *flow.shape).unbind(0)
    return time, *(rows if flow.system.sees_momentum else rows[:1])
