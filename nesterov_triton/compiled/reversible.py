"""The reversible gradient inside torch.compile: a splitting's steps, taken back in the loop of a backward pass.

Loops in loops, in either direction: one over stretches of so many accepted steps, whose first states are all that is
kept, and in it one over the steps of a stretch. Where the walk back comes out too far from the kept state, two more
loops go through that stretch, first forward and then back; elsewhere these two make no turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._higher_order_ops.while_loop import while_loop
from torch.func import vjp

from nesterov_triton.compiled import nystrom
from nesterov_triton.compiled.gradients import Counts, Setting
from nesterov_triton.compiled.loop import select, start, walk, within
from nesterov_triton.compiled.nystrom import Parts
from nesterov_triton.compiled.step import Rows, attempt, kept, stage_times
from nesterov_triton.compiled.step import inside as states_inside
from nesterov_triton.compiled.system import Moment
from nesterov_triton.nystrom import Nystrom


class Shears(NamedTuple):
    """A step's numbers, 0-d float64 each.

    A splitting is a sequence of shears of two coordinates, each of which adds to one what depends on the other alone:

        kick i    p += kick_i F_i(place_i q) + pull_i q
        drift i   q += drift_i σ(decay_i p)

    Coordinates: with a gate q = x and p = e^(γ (t - t_n)) m; without one, where γ is a part of the kicks, q and p are y
    and its velocity, as in `nystrom`: q = x and p = m + half x at the start of the step, x = end q and m = end p - half
    x at its end. With a gate place_i = 1, and pull_i and half are 0.
    """

    kick: Sequence[Tensor]
    place: Sequence[Tensor]
    pull: Sequence[Tensor]
    drift: Sequence[Tensor]
    decay: Sequence[Tensor]
    end: Tensor
    half: Tensor


def shears(method: Nystrom, gated: bool, gamma: Tensor | float, dt: Tensor) -> Shears:
    """The numbers of a step of size `dt`, 0-d float64."""
    assert method.gated is not None
    one, zero = torch.ones_like(dt), torch.zeros_like(dt)
    weights = [h * dt for h in method.gated.w[-1]]
    if gated:
        kick = [torch.exp(gamma * c * dt) * b * dt for c, b in zip(method.c, method.b, strict=True)]
        decay = [torch.exp(-(gamma * d * dt)) for d in method.gated.d]
        s = method.stages
        return Shears(kick, [one] * s, [zero] * s, weights, decay, torch.exp(-(gamma * dt)), zero)
    half = 0.5 * gamma + zero
    place = [torch.exp(-(half * c * dt)) for c in method.c]
    kick = [b * dt / e for b, e in zip(method.b, place, strict=True)]
    return Shears(kick, place, [b * dt * half * half for b in method.b], weights, [one] * len(weights), place[-1], half)


class Taken(NamedTuple):
    """A step that was taken, in either direction."""

    numbers: Shears  # in the state's dtype
    start: Rows
    stop: Rows
    forces: Sequence[Tensor]
    pulls: Sequence[Any]  # of the forces but the first: cotangent -> those of position, tensors and moment
    positions: Sequence[Tensor]  # q at each kick
    gates: Sequence[tuple[Tensor, Tensor, Any]]  # at each drift: p, the gate's value, its pullback
    momentum: Tensor  # p at the end


class Steps:
    """Steps of one solve and their transposes.

    Args:
        setting: what is constant about it.
        end: the last time.
        inside: requested times inside, [n] float64, and the cotangents there, [n, *shape] each; None for none.
        tensors: as `Bound` takes them.
    """

    def __init__(self, setting: Setting, end: Tensor, inside: Tensor | None, of_outputs: Rows, tensors: Rows) -> None:
        self.setting, self.end, self.inside, self.of_outputs, self.tensors = setting, end, inside, of_outputs, tensors
        parts = setting.flow(tensors).parts
        assert parts is not None
        assert isinstance(setting.plan.tableau, Nystrom)
        self.method, self.parts, self.bound = setting.plan.tableau, parts, setting.bound
        self.gated = parts.gate is not None
        self._has = [x is not None for x in setting.bound.moments(end.reshape(1))[0]]
        # Whether the step's numbers have cotangents: each costs an inner product.
        self.counted = setting.time_grads or "damping" in setting.bound.scalars

    def moments(self, times: Tensor) -> list[tuple[Tensor, ...]]:
        """What the force needs of each of these times, without what it does not need."""
        return [tuple(x for x in moment if x is not None) for moment in self.bound.moments(times)]

    def stages(self, t: Tensor, t1: Tensor) -> list[tuple[Tensor, ...]]:
        """The same of a step's stage times."""
        return self.moments(stage_times(self.method.c, t, t1, t1 - t))

    def linearise(self, moment: tuple[Tensor, ...], x: Tensor) -> tuple[Tensor, Any]:
        """The force at a position, and its pullback, to position, tensors and, with time_grads, moment."""

        def force(x: Tensor, own: Rows, at: tuple[Tensor, ...]) -> Tensor:
            return self.bound.force(self._moment(at), x, own)

        if self.setting.time_grads:
            value, pull, *_ = vjp(force, x, self.tensors, moment)
        else:
            value, pull, *_ = vjp(lambda x, own: force(x, own, moment), x, self.tensors)
        return value, pull

    def take(self, t: Tensor, t1: Tensor, rows: Rows, back: bool) -> Taken:
        """The step from t to t1, from the state at its start; or, `back`, from that at its end."""
        n, s = self._numbers(t, t1, rows[0]), self.method.stages
        moments = self.stages(t, t1)
        forces: list[Tensor] = []
        pulls: list[Any] = []
        positions: list[Tensor] = []
        gates: list[tuple[Tensor, Tensor, Any]] = []

        def drifted(i: int, p: Tensor) -> Tensor:
            value, pull = p, None
            if self.parts.gate is not None:
                value, pull, *_ = vjp(self.parts.gate, p * n.decay[i])
            gates.append((p, value, pull))
            return value * n.drift[i]

        def kicked(i: int, q: Tensor) -> Tensor:
            x, pull = q if self.gated else q * n.place[i], None
            if i == 0:  # differentiated with the step before, whose last force it is
                force = self.bound.force(self._moment(moments[0]), x, self.tensors)
            else:
                force, pull = self.linearise(moments[i], x)
            forces.append(force)
            pulls.append(pull)
            positions.append(q)
            return force * n.kick[i] if self.gated else force * n.kick[i] + q * n.pull[i]

        if not back:
            q, p = rows[0], rows[1] if self.gated else rows[1] + n.half * rows[0]
            for i in range(s):
                p = p + kicked(i, q)
                if i < s - 1:
                    q = q + drifted(i, p)
            m = p * n.end
            stop = [q, m] if self.gated else [q * n.end, m - n.half * (q * n.end)]
            return Taken(n, rows, stop, forces, pulls, positions, gates, p)
        x, m = rows
        q, p = (x, m / n.end) if self.gated else (x / n.end, (m + n.half * x) / n.end)
        momentum = p
        for i in reversed(range(s)):
            p = p - kicked(i, q)
            if i > 0:
                q = q - drifted(i - 1, p)
        began = [q, p if self.gated else p - n.half * q]
        return Taken(n, began, rows, forces[::-1], pulls[::-1], positions[::-1], gates[::-1], momentum)

    def transpose(self, t: Tensor, t1: Tensor, taken: Taken, found: Rows) -> list[Tensor]:
        """What has been found of cotangents once this step is transposed: of x and m at its start, of the force there,
        which is not yet pulled back, of the tensors, and with time_grads of the first time, the last, and those
        inside."""
        n, s, setting = taken.numbers, self.method.stages, self.setting
        of_x1, of_m1, of_last, *totals = found
        tensors, of_times = list(totals[: len(self.tensors)]), list(totals[len(self.tensors) :])
        of_x = of_m = of_first = None
        of_t = of_t1 = of_gamma = torch.zeros_like(t)
        of_inside: Tensor | None = None
        if self.inside is not None:
            mask = within(self.inside, t, t1)
            given = select(mask, self.of_outputs, [torch.zeros_like(g) for g in self.of_outputs])
            ends, free = self._pull_outputs(t, t1, taken, given)
            of_x, of_m, x1, m1, of_first, last = ends
            of_x1, of_m1, of_last = of_x1 + x1, of_m1 + m1, of_last + last
            if free:
                of_t, of_t1, of_inside, of_gamma = free
        zero = torch.zeros_like(t)
        kick, place, pull, drift, decay = ([zero] * k for k in (s, s, s, s - 1, s - 1))
        end = half = zero

        def inner(a: Tensor, b: Tensor) -> Tensor:
            return (a * b).sum().to(torch.float64) if self.counted else zero

        stages = self.stages(t, t1) if setting.time_grads else []
        of_moments = [tuple(torch.zeros_like(x) for x in at) for at in stages]
        of_p = of_m1 * n.end
        end = inner(of_m1, taken.momentum)
        if self.gated:
            of_q = of_x1
        else:
            outer = of_x1 - n.half * of_m1
            of_q = outer * n.end
            end = end + inner(outer, taken.positions[-1])
            half = -inner(of_m1, taken.stop[0])
        for i in reversed(range(s)):
            q, of_force = taken.positions[i], of_p * n.kick[i]
            kick[i] = inner(of_p, taken.forces[i])
            if not self.gated:
                of_q = of_q + of_p * n.pull[i]
                pull[i] = inner(of_p, q)
            if i == 0:
                of_first = of_force if of_first is None else of_first + of_force
                break
            if i == s - 1:
                of_force = of_force + of_last
            of_place, own, *of_moment = taken.pulls[i](of_force)
            tensors = [a + b for a, b in zip(tensors, own, strict=True)]
            if of_moment:
                of_moments[i] = of_moment[0]
            if not self.gated:
                place[i] = inner(of_place, q)
                of_place = of_place * n.place[i]
            of_q = of_q + of_place
            p, value, pull_gate = taken.gates[i - 1]
            drift[i - 1] = inner(of_q, value)
            of_value = of_q * n.drift[i - 1]
            if pull_gate is not None:
                (of_value,) = pull_gate(of_value)
                decay[i - 1] = inner(of_value, p)
                of_value = of_value * n.decay[i - 1]
            of_p = of_p + of_value
        if not self.gated:
            of_q = of_q + n.half * of_p
            half = half + inner(of_p, taken.start[0])
        if self.counted:
            numbers = (*kick, *place, *pull, *drift, *decay, end, half)
            gamma = torch.as_tensor(self.parts.gamma, dtype=torch.float64, device=t.device)
            _, back, *_ = vjp(self._all_numbers, t, t1, gamma)
            more_t, more_t1, more_gamma = back((numbers, tuple(of_moments)))
            if "damping" in self.bound.scalars:
                where = self.bound.scalars.index("damping")
                tensors[where] = tensors[where] + (of_gamma + more_gamma)
            if setting.time_grads:
                of_times = self.add_times(of_times, of_t + more_t, of_t1 + more_t1, of_inside, t1)
        of_x = of_q if of_x is None else of_x + of_q
        of_m = of_p if of_m is None else of_m + of_p
        assert of_first is not None
        return [of_x, of_m, of_first, *tensors, *of_times]

    def finish(self, t: Tensor, x: Tensor, found: Rows) -> list[Tensor]:
        """The same once the force at the first time, `t`, is pulled back, too; without it."""
        of_x, of_m, of_first, *totals = found
        tensors, of_times = totals[: len(self.tensors)], totals[len(self.tensors) :]
        _, pull = self.linearise(self.moments(t.reshape(1))[0], x)
        more, own, *of_moment = pull(of_first)
        tensors = [a + b for a, b in zip(tensors, own, strict=True)]
        if of_moment:
            _, back, *_ = vjp(lambda t: self.moments(t.reshape(1))[0], t)
            of_times = [of_times[0] + back(of_moment[0])[0], *of_times[1:]]
        return [of_x + more, of_m, *tensors, *of_times]

    def add_times(
        self, totals: Rows, of_t: Tensor, of_t1: Tensor, of_inside: Tensor | None, t1: Tensor
    ) -> list[Tensor]:
        """The cotangents of the times with those of a step: the grid moves with the first time, and the last step ends
        at the last time."""
        last = t1 == self.end
        zero = torch.zeros_like(of_t)
        more = [of_t + torch.where(last, zero, of_t1), torch.where(last, of_t1, zero)]
        if of_inside is not None:
            more.append(of_inside)
        return [a + b for a, b in zip(totals, more, strict=True)]

    def _moment(self, values: Sequence[Tensor]) -> Moment:
        given = iter(values)
        return Moment(*(next(given) if has else None for has in self._has))  # type: ignore[arg-type]

    def _shears(self, t: Tensor, t1: Tensor, gamma: Tensor | float) -> Shears:
        return shears(self.method, self.gated, gamma, t1 - t)

    def _numbers(self, t: Tensor, t1: Tensor, like: Tensor) -> Shears:
        """In the state's dtype."""
        found = self._shears(t, t1, self.parts.gamma)
        kick, place, pull, drift, decay = ([x.to(like.dtype) for x in part] for part in found[:5])
        return Shears(kick, place, pull, drift, decay, found.end.to(like.dtype), found.half.to(like.dtype))

    def _all_numbers(self, t: Tensor, t1: Tensor, gamma: Tensor) -> tuple[Any, ...]:
        found = self._shears(t, t1, gamma)
        flat = tuple(x for part in found[:5] for x in part)
        return (*flat, found.end, found.half), tuple(self.stages(t, t1)) if self.setting.time_grads else ()

    def _pull_outputs(self, t: Tensor, t1: Tensor, taken: Taken, given: Rows) -> tuple[Rows, Rows]:
        """The cotangents of what dense output is made of: the states at both ends and the forces there; and, where
        numbers have any, of t, t1, the times inside and γ."""
        inside, parts = self.inside, self.parts
        assert inside is not None

        def states(ends: Rows, t: Tensor, t1: Tensor, at: Tensor, gamma: Tensor | float) -> tuple[Tensor, ...]:
            x, m, x1, m1, first, last = ends
            own = Parts(None, gamma, parts.gate)
            dt = t1 - t
            return tuple(nystrom.dense_output(own, dt, (x, m), (x1, m1), first, last, (at - t) / dt))

        ends = (*taken.start, *taken.stop, taken.forces[0], taken.forces[-1])
        if not self.counted:
            _, pull, *_ = vjp(lambda ends: states(ends, t, t1, inside, parts.gamma), ends)
            return pull(tuple(given))[0], ()
        gamma = torch.as_tensor(parts.gamma, dtype=torch.float64, device=t.device)
        _, pull, *_ = vjp(states, ends, t, t1, inside, gamma)
        of_ends, *free = pull(tuple(given))
        return of_ends, free


def forward(setting: Setting, every: int, times: Tensor, rows: Rows, tensors: Rows) -> tuple[Rows, Rows, Counts, Rows]:
    """The rows at the end and those at the requested times inside, counts, and what is kept: the last step's end, the
    steps' starts, and the rows after each stretch."""
    plan, flow = setting.plan, setting.flow(tensors)
    t0, end = times[0].clone(), times[-1].clone()
    control, first, evaluations = start(plan, flow, t0, end, rows)
    done = walk(plan, flow, control, first, rows, t0, end, every=every)
    c, each = done.control, plan.tableau.stages - 1
    spent = evaluations + each * (c.accepted + c.rejected)
    outputs: Rows = []
    if len(times) > 2:
        outputs = _outputs_inside(setting, times, rows, tensors, Spans(done.taken[0], c.accepted, c.t))
        spent = spent + each * c.accepted + 1
    return done.rows, outputs, Counts(c.status, c.accepted, c.rejected, spent), (c.t, *done.taken)


class Spans(NamedTuple):
    """Where the accepted steps start and end.

    Attributes:
        starts: [stretches, every] float64; after the last step's what is not used.
        number: of steps, 0-d.
        stop: the last one's end, 0-d.
    """

    starts: Tensor
    number: Tensor
    stop: Tensor

    def at(self, k: Tensor) -> tuple[Tensor, Tensor]:
        """Start and end of the step `k`, 0-d each."""
        flat, last = self.starts.reshape(-1), k + 1 == self.number
        # No slice: Inductor of torch 2.11 takes none of unknown length.
        following = flat.index_select(0, torch.where(last, k, k + 1).reshape(1))[0]
        return flat.index_select(0, k.reshape(1))[0], torch.where(last, self.stop, following)


def _outputs_inside(setting: Setting, times: Tensor, rows: Rows, tensors: Rows, spans: Spans) -> list[Tensor]:
    """The states at the requested times inside, by taking the accepted steps again."""
    method, inside, n = setting.plan.tableau, times[1:-1].clone(), setting.rows
    flow = setting.flow(tensors)
    first = kept(method, flow, rows, flow.at(times[0], rows))

    def condition(k: Tensor, *carried: Tensor) -> Tensor:
        return k < spans.number

    def body(k: Tensor, *carried: Tensor) -> tuple[Tensor, ...]:
        state, known, outputs = carried[:n], carried[n : n + 1], carried[n + 1 :]
        t, t1 = spans.at(k)
        flow, dt = setting.flow(tensors), t1 - t
        tried = attempt(method, flow, t, t1, dt, state, known, dense=True)
        found = states_inside(method, flow, dt, state, tried, (inside - t) / dt)
        return (k + 1, *tried.new, tried.stages[-1][0], *select(within(inside, t, t1), found, outputs))

    held = [row.new_zeros((len(inside), *row.shape)) for row in rows]
    carried = (torch.zeros_like(spans.number), *(x.clone() for x in (*rows, *first)), *held)
    done = while_loop(condition, body, carried)  # type: ignore[no-untyped-call]
    return list(done[2 + n :])


class Reversible(torch.autograd.Function):
    """(the rows at the end, those at the requested times inside, counts, what was kept) and, backward, the accepted
    steps taken back and transposed one by one."""

    @staticmethod
    def forward(
        ctx: Any, setting: Setting, every: int, bound: float | None, times: Tensor, *args: Tensor
    ) -> tuple[Tensor, ...]:
        rows, tensors = args[: setting.rows], args[setting.rows :]
        ends, outputs, counts, held = forward(setting, every, times, rows, tensors)
        ctx.setting, ctx.bound = setting, bound
        ctx.save_for_backward(times, counts.accepted, *args, *held)
        # What was kept is given out, too: its length is known to the tracer by its being a result.
        return (*ends, *outputs, *counts, *held)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        setting: Setting = ctx.setting
        times, count, *saved = ctx.saved_tensors
        n = setting.rows
        stop, starts, *after = saved[len(saved) - 2 - n :]
        args = saved[: len(saved) - 2 - n]
        rows, tensors = args[:n], args[n:]
        many, every, spans = len(times) > 2, starts.shape[1], Spans(starts, count, stop)
        states = [torch.cat((row.unsqueeze(0), x[:-1])) for row, x in zip(rows, after, strict=True)]
        bound = 10 * torch.finfo(rows[0].dtype).eps ** 0.5 if ctx.bound is None else ctx.bound
        inside, of_outputs = (times[1:-1].clone(), cotangents[n : 2 * n]) if many else (None, ())
        end = times[-1].clone()
        method = setting.plan.tableau

        def steps() -> Steps:
            return Steps(setting, end, inside, of_outputs, tensors)

        def stretch(i: Tensor, *carried: Tensor) -> tuple[Tensor, ...]:
            low, before = i * every, carried[n:]
            high = torch.minimum(low + every, count) - 1
            begun = [x.index_select(0, i.reshape(1))[0] for x in states]

            def back(k: Tensor, *carried: Tensor) -> tuple[Tensor, ...]:
                own, (t, t1) = steps(), spans.at(k)
                taken = own.take(t, t1, carried[:n], back=True)
                return (k - 1, *(x.clone() for x in taken.start), *own.transpose(t, t1, taken, carried[n:]))

            turns = (high, *(x.clone() for x in carried))
            walked = while_loop(lambda k, *_: k >= low, back, turns)[1:]  # type: ignore[no-untyped-call]
            # Not "<": what is not finite is too far.
            again = ~(_norm([a - b for a, b in zip(walked[:n], begun, strict=True)]) <= bound * _norm(begun))

            def forth(k: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
                t, t1 = spans.at(k)
                tried = attempt(method, setting.flow(tensors), t, t1, t1 - t, state, None, dense=False)
                return (k + 1, *tried.new)

            stacked = torch.ops.higher_order.while_loop_stack_output
            turns = (low.clone(), *(x.clone() for x in begun))
            _, *later = stacked(lambda k, *_: again & (k < high), forth, turns, ())
            whole = [torch.cat((x.unsqueeze(0), y)) for x, y in zip(begun, later, strict=True)]

            def once_more(k: Tensor, *found: Tensor) -> tuple[Tensor, ...]:
                own, (t, t1) = steps(), spans.at(k)
                state = [x.index_select(0, (k - low).reshape(1))[0] for x in whole]
                taken = own.take(t, t1, state, back=False)
                return (k - 1, *own.transpose(t, t1, taken, found))

            turns = (high.clone(), *(torch.where(again, a, b) for a, b in zip(before, walked[n:], strict=True)))
            _, *found = while_loop(lambda k, *_: again & (k >= low), once_more, turns)  # type: ignore[no-untyped-call]
            return (i - 1, *(x.clone() for x in begun), *found)

        sums = [torch.zeros_like(x) for x in tensors]
        if setting.time_grads:
            sums += [torch.zeros_like(times[0]), torch.zeros_like(times[0])]
            sums += [torch.zeros_like(inside)] if inside is not None else []
        adjoint = [*(g.clone() for g in cotangents[:n]), torch.zeros_like(rows[0])]
        carried = ((count + every - 1) // every - 1, *(x[-1].clone() for x in after), *adjoint, *sums)
        done = while_loop(lambda i, *_: i >= 0, stretch, carried)  # type: ignore[no-untyped-call]
        given = steps().finish(times[0].clone(), rows[0], done[1 + n :])
        found, of_times = given[: n + len(tensors)], None
        if setting.time_grads:
            of_first, of_last, *between = given[n + len(tensors) :]
            of_times = torch.cat((of_first.reshape(1), *between, of_last.reshape(1)))
        return (None, None, None, of_times, *found)


def _norm(rows: Rows) -> Tensor:
    wide = torch.promote_types(rows[0].dtype, torch.float32)
    return torch.stack([torch.linalg.vector_norm(x, dtype=wide).square() for x in rows]).sum().sqrt()
