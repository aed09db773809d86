"""Discrete and adjoint gradients of a solve inside torch.compile, each with a loop of its own in its backward pass.

Every tensor that a gradient is wanted of is an argument of the function: what a loop's body merely sees would get none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._higher_order_ops.while_loop import while_loop
from torch.func import vjp

from nesterov_triton.compiled.loop import Control, Plan, Walk, select, start, walk, within
from nesterov_triton.compiled.nystrom import Parts
from nesterov_triton.compiled.step import Flow, Rows, attempt, nodes, stage_times, stages_back
from nesterov_triton.compiled.step import inside as states_inside
from nesterov_triton.compiled.system import Bound, Moment
from nesterov_triton.gates import Identity
from nesterov_triton.nystrom import Nystrom


@dataclass(frozen=True)
class Setting:
    """What is constant about a solve.

    Attributes:
        bound: the system.
        plan: of the forward solve.
        back: of the adjoint's backward solve.
        rows: of the state.
        time_grads: whether gradients with respect to the times are wanted.
    """

    bound: Bound
    plan: Plan
    back: Plan
    rows: int
    time_grads: bool

    def flow(self, tensors: Rows) -> Flow:
        """The right-hand side with these tensors."""
        bound, parts = self.bound, None
        if isinstance(self.plan.tableau, Nystrom):
            assert bound.rule is not None
            gate = None if isinstance(bound.rule.gate_x, Identity) else bound.rule.gate_x
            parts = Parts(lambda at, x: bound.force(at, x, tensors), bound.damping(tensors), gate)
        return Flow(lambda at, rows: bound.slopes(at, rows, tensors), bound.moments, parts)


class Counts(NamedTuple):
    """Of a forward solve, 0-d int64 each."""

    status: Tensor
    accepted: Tensor
    rejected: Tensor
    evaluations: Tensor


def forward(setting: Setting, times: Tensor, rows: Rows, tensors: Rows, keep: bool) -> tuple[Walk, Counts]:
    """The solve; with `keep` every attempt's state, and outputs inside by going through the accepted steps again."""
    plan = setting.plan
    inside = times[1:-1].clone() if len(times) > 2 else None

    flow = setting.flow(tensors)
    t0, end = times[0].clone(), times[-1].clone()  # a loop takes no two views of one tensor
    control, first, evaluations = start(plan, flow, t0, end, rows)
    again = keep and inside is not None
    done = walk(plan, flow, control, first, rows, t0, end, None if keep else inside, keep=keep)
    c, tableau = done.control, plan.tableau
    each = len(nodes(tableau, inside is not None and not keep)) - tableau.fsal
    spent = evaluations + each * (c.accepted + c.rejected)
    if again:
        assert inside is not None
        done = done._replace(outputs=_outputs_inside(setting, times, inside, rows, tensors, done))
        spent = spent + len(nodes(tableau, dense=True)) * c.accepted
    return done, Counts(c.status, c.accepted, c.rejected, spent)


def accepted_steps(rows: Rows, t0: Tensor, taken: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Of all attempts the accepted ones first, in order: their indices, and for every attempt its start and end times
    and the rows that it started from."""
    t1, accepted, *after = taken
    before = torch.cat((torch.zeros_like(accepted[:1]), accepted[:-1]))
    order = torch.argsort((accepted == before).to(torch.int8), stable=True)
    starts = torch.cat((t0.reshape(1), t1[:-1]))
    states = [torch.cat((row.unsqueeze(0), kept[:-1])) for row, kept in zip(rows, after, strict=True)]
    return order, starts, t1, states


def _pick(x: Tensor, i: Tensor) -> Tensor:
    return x.index_select(0, i)[0]


def _outputs_inside(
    setting: Setting, times: Tensor, inside: Tensor, rows: Rows, tensors: Rows, done: Walk
) -> list[Tensor]:
    """The states at the requested times inside, from the accepted steps."""
    tableau = setting.plan.tableau
    order, starts, ends, states = accepted_steps(rows, times[0], done.taken)
    count = done.control.accepted

    def condition(k: Tensor, *outputs: Tensor) -> Tensor:
        return k < count

    def body(k: Tensor, *outputs: Tensor) -> tuple[Tensor, ...]:
        i = _pick(order, k.reshape(1)).reshape(1)
        t, t1, state = _pick(starts, i), _pick(ends, i), [_pick(x, i) for x in states]
        dt = t1 - t
        flow = setting.flow(tensors)
        tried = attempt(tableau, flow, t, t1, dt, state, None, dense=True)
        found = states_inside(tableau, flow, dt, state, tried, (inside - t) / dt)
        mask = within(inside, t, t1)
        return (k + 1, *select(mask, found, outputs))

    held = [row.new_zeros((len(inside), *row.shape)) for row in rows]
    _, *outputs = while_loop(condition, body, (torch.zeros_like(count), *held))  # type: ignore[no-untyped-call]
    return list(outputs)


class Discrete(torch.autograd.Function):
    """(the rows at the end, those at the requested times inside, counts, what was kept) and, backward, the accepted
    steps transposed one by one."""

    @staticmethod
    def forward(ctx: Any, setting: Setting, times: Tensor, *args: Tensor) -> tuple[Tensor, ...]:
        rows, tensors = args[: setting.rows], args[setting.rows :]
        done, counts = forward(setting, times, rows, tensors, keep=True)
        ctx.setting = setting
        ctx.save_for_backward(times, counts.accepted, *args, *done.taken)
        # What was kept is given out, too: its length is known to the tracer by its being a result.
        return (*done.rows, *done.outputs, *counts, *done.taken)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        setting: Setting = ctx.setting
        times, count, *saved = ctx.saved_tensors
        n = setting.rows
        taken = saved[len(saved) - 2 - n :]
        args = saved[: len(saved) - 2 - n]
        rows, tensors = args[:n], args[n:]
        inside = times[1:-1].clone() if len(times) > 2 else None
        ends, of_outputs = cotangents[:n], cotangents[n : 2 * n] if inside is not None else ()
        order, starts, stops, states = accepted_steps(rows, times[0], taken)
        wanted, end = setting.plan.tableau, times[-1].clone()

        # The stages that are differentiated: all, or those that the state at the end depends on.
        used = nodes(wanted, inside is not None)[: stages_back(wanted, inside is not None)]

        def step(times: Rows, dt: Tensor, moments: list[Moment], state: Rows, own: Rows) -> tuple[Tensor, ...]:
            t, t1, *at = times
            flow = setting.flow(own)._replace(moments=lambda _: moments)
            tried = attempt(wanted, flow, t, t1, dt, state, None, inside is not None, len(used))
            if inside is None:
                return tuple(tried.new)
            return (*tried.new, *states_inside(wanted, flow, dt, state, tried, (at[0] - t) / dt))

        def timed(times: Rows, state: Rows, own: Rows) -> tuple[Tensor, ...]:
            t, t1 = times[:2]
            dt = t1 - t
            return step(times, dt, setting.bound.moments(stage_times(used, t, t1, dt)), state, own)

        def condition(k: Tensor, *carried: Tensor) -> Tensor:
            return k >= 0

        def body(k: Tensor, *carried: Tensor) -> tuple[Tensor, ...]:
            of_state, sums, of_times = carried[:n], carried[n : n + len(tensors)], carried[n + len(tensors) :]
            i = _pick(order, k.reshape(1)).reshape(1)
            t, t1, state = _pick(starts, i), _pick(stops, i), tuple(_pick(x, i) for x in states)
            at = (t, t1) if inside is None else (t, t1, inside)
            given = list(of_state)
            if inside is not None:
                mask = within(inside, t, t1)
                given += select(mask, of_outputs, [torch.zeros_like(g) for g in of_outputs])
            if setting.time_grads:
                _, pull, *_ = vjp(timed, at, state, tuple(tensors))
                found_times, found_state, found = pull(tuple(given))
                last = t1 == end
                of_t, of_t1, *of_at = found_times
                zero = torch.zeros_like(of_t)
                # The grid moves with the first time, and the last step ends at the last time.
                found_times = (of_t + torch.where(last, zero, of_t1), torch.where(last, of_t1, zero), *of_at)
            else:  # each would cost a sum over the state for every stage
                dt = t1 - t
                moments = setting.bound.moments(stage_times(used, t, t1, dt))
                _, pull, *_ = vjp(lambda state, own: step(at, dt, moments, state, own), state, tuple(tensors))
                found_state, found = pull(tuple(given))
                found_times = ()
            new = [a + b for a, b in zip((*sums, *of_times), (*found, *found_times), strict=True)]
            return (k - 1, *(g.clone() for g in found_state), *new)

        sums = [torch.zeros_like(x) for x in tensors]
        if setting.time_grads:
            sums += [torch.zeros_like(times[0]), torch.zeros_like(times[0])]
            sums += [torch.zeros_like(inside)] if inside is not None else []
        carried = (count - 1, *(g.clone() for g in ends), *sums)
        _, *done = while_loop(condition, body, carried)  # type: ignore[no-untyped-call]
        given, of_times = done[: n + len(tensors)], None
        if setting.time_grads:
            of_first, of_last, *between = done[n + len(tensors) :]
            of_times = torch.cat((of_first.reshape(1), *between, of_last.reshape(1)))
        return (None, of_times, *given)


class Adjoint(torch.autograd.Function):
    """(the rows at the end, those at the requested times inside, counts) and, backward, the adjoint equation."""

    @staticmethod
    def forward(ctx: Any, setting: Setting, times: Tensor, *args: Tensor) -> tuple[Tensor, ...]:
        rows, tensors = args[: setting.rows], args[setting.rows :]
        done, counts = forward(setting, times, rows, tensors, keep=False)
        ctx.setting = setting
        ctx.save_for_backward(times, *args, *done.outputs, *done.rows)
        return (*done.rows, *done.outputs, *counts)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        setting: Setting = ctx.setting
        times, *saved = ctx.saved_tensors
        n, bound, back = setting.rows, setting.bound, setting.back
        many = len(times) > 2
        ends = saved[len(saved) - n :]
        held = saved[len(saved) - 2 * n : len(saved) - n] if many else []
        args = saved[: len(saved) - n * (2 if many else 1)]
        rows, tensors = args[:n], args[n:]

        def slopes(at: Moment, joint: Rows) -> Rows:
            state, adjoint = joint[:n], joint[n:]
            slope, pull, *_ = vjp(lambda y, own: bound.slopes(at, y, own), tuple(state), tuple(tensors))
            of_state, of_tensors = pull(tuple(adjoint))
            return (*slope, *(-g for g in of_state), *(-g for g in of_tensors))

        def forces(at: Moment, x: Tensor, a_m: Tensor) -> list[Tensor]:
            force, pull, *_ = vjp(lambda y, own: bound.force(at, y, own), x, tuple(tensors))
            of_x, of_tensors = pull(a_m)
            return [force, of_x, *(-g for g in of_tensors)]

        flow = Flow(slopes, bound.moments)
        own = setting.flow(tensors).parts
        if own is not None:
            learned = bound.scalars.index("damping") if "damping" in bound.scalars else None
            flow = flow._replace(parts=own._replace(force=None, back=forces, of_gamma=learned))
        # The states at all times, and their cotangents, last first.
        points = [t.clone() for t in times.unbind(0)]
        states = [list(rows), *([x[k] for x in held] for k in range(len(times) - 2)), list(ends)]
        given = [cotangents[n : 2 * n] if many else (), cotangents[:n]]
        jumps = [[g[k] for g in given[0]] for k in range(len(times) - 2)] + [list(given[1])]
        adjoint: list[Tensor] = [torch.zeros_like(row) for row in rows]
        sums = [torch.zeros_like(x) for x in tensors]
        of_times = [torch.zeros_like(times[0]) for _ in range(len(times))]
        control: Control | None = None
        failed = torch.zeros((), dtype=torch.bool, device=times.device)
        for k in range(len(times) - 1, 0, -1):
            jump = jumps[k - 1]
            if setting.time_grads:  # y(t_k) moves along the solution
                of_times[k] = of_times[k] + _inner(jump, setting.flow(tensors).at(points[k], states[k]))
            adjoint = [a + g for a, g in zip(adjoint, jump, strict=True)]
            joint = [*states[k], *adjoint]
            planned = None if control is None else control.dt
            begun, first, _ = start(back, flow, points[k], points[k - 1], joint, planned)
            done = walk(back, flow, begun, first, joint, points[k], points[k - 1], None, sums)
            control, adjoint, sums = done.control, done.rows[n:], done.quadratures
            failed = failed | (control.status != 0)
        if setting.time_grads:
            of_times[0] = of_times[0] - _inner(adjoint, setting.flow(tensors).at(points[0], rows))
        adjoint = [torch.where(failed, torch.full_like(a, torch.nan), a) for a in adjoint]
        sums = [torch.where(failed, torch.full_like(a, torch.nan), a) for a in sums]
        return (None, torch.stack(of_times) if setting.time_grads else None, *adjoint, *sums)


def _inner(a: Rows, b: Rows) -> Tensor:
    return torch.stack([(x * y).sum().to(torch.float64) for x, y in zip(a, b, strict=True)]).sum()
