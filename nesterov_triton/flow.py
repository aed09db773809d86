"""A system bound to one solve: shapes, dtype, the damping's and residual's values.

The flow turns stage times into coefficients and gives the right-hand side in three forms: its value, its value with the
network's graph kept, and its transpose.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from nesterov_triton import transforms
from nesterov_triton.network import Evaluation, Network
from nesterov_triton.ops import momentum
from nesterov_triton.ops.rows import Row
from nesterov_triton.systems import Coefficients, Momentum, System


class OpenState(NamedTuple):
    """A flat state, [D], and the views of it that the right-hand side reads; a momentum system's has all of them."""

    flat: Tensor
    parts: Sequence[Tensor]  # its rows, [N] each
    shaped: Sequence[Tensor]  # of these what the network sees, in h's shape
    transposed: Tensor  # its rows as columns, [N, rows]


class StageTimes(NamedTuple):
    """What the right-hand side needs at s stage times, cut into stages: 0-d times in the state's dtype, and the rows of
    `Coefficients` (None in every stage where the system has none)."""

    t: Sequence[Tensor]
    scale: Sequence[Tensor | None]
    drive: Sequence[Tensor | None]
    linear: Sequence[Tensor | None]  # (q, -γ), [2]


class Packet(NamedTuple):
    """What the kernels need of one step of s stages, on the device."""

    t: Sequence[Tensor]  # the stage times, 0-d in the state's dtype
    coefficients: Tensor  # rows (κ, s, q, -γ), [s, 4] float64; [s, 0] for a first-order system
    dt: Tensor  # the step size, [1] float64
    weights: Tensor | None = None  # of a method of `nystrom`, float64; None where they are to be made on the device


@dataclass
class Linearisation:
    """One evaluation of the right-hand side with the network's graph kept, ready for `Flow.pullback`."""

    network: Evaluation
    output: Tensor  # the network's, [N], without its graph
    state: OpenState
    slope: Row  # the right-hand side
    values: Row  # σ_x(m) and σ_f(u), where the gates have any


@dataclass
class Cotangents:
    """Cotangents of everything but the state, from one evaluation of the right-hand side."""

    params: Sequence[Tensor | None]  # as Flow.params
    time: Tensor | None = None  # 0-d
    scale: Tensor | None = None  # of κ, 0-d
    drive: Tensor | None = None  # of s(t), 0-d
    linear: Tensor | None = None  # of (q, -γ), [2]


class Flow:
    """A system, bound. States are flat, [D] with D = rows · N; a row is a view of N elements.

    Args:
        system: the right-hand side.
        scalars: the values of the system's learnable scalars for this solve ("damping", "xi"), 0-d tensors.
        params: the tensors that gradients are wanted of beside state and scalars.
        network: the system's field, as this solve calls it.
        time_grads: whether cotangents of the times are wanted of `pullback`.
        coefficient_grads: whether those of the scalars are.
    """

    def __init__(
        self,
        system: System,
        network: Network,
        scalars: dict[str, Tensor],
        params: tuple[Tensor, ...] = (),
        *,
        time_grads: bool = False,
        coefficient_grads: bool = False,
    ) -> None:
        self.system, self.network, self.scalars, self.params = system, network, scalars, params
        self.shape, self.dtype, self.device = network.shape, network.dtype, network.device
        self.time_grads, self.coefficient_grads = time_grads, coefficient_grads
        self.rows = system.rows
        self._values: tuple[float, float] | None = None  # of damping and xi
        self._known: dict[float, list[float]] = {}  # coefficients at the times that `at` was last asked for
        self._held: dict[int, tuple[Tensor, StageTimes]] = {}  # by the number of times: where they are written to
        # An ensemble has a damping and a xi for each member: tensors then, instead of numbers.
        self._hidden = not all(map(transforms.readable, scalars.values()))
        self._gates: momentum.Gates | None = None
        if isinstance(system, Momentum):
            self._gates = momentum.Gates.of(system.gate_x, system.gate_f)
            self._rule = system.rule

    # -- the time alone ------------------------------------------------------------------------------------------------

    def coefficients(self, times: Tensor) -> Coefficients[Tensor]:
        """At `times`, [s] float64 on the CPU; differentiable in times and scalars, in float64 on the CPU."""
        system = self.system
        if not isinstance(system, Momentum):
            return Coefficients(None, None, None, None)
        damping = self.scalars.get("damping", system.fixed_damping)
        found: Coefficients[Tensor] = self._rule.coefficients(times, damping, self.scalars.get("xi", system.fixed_xi))
        return found

    def at(self, times: Sequence[float] | Tensor) -> StageTimes:
        """Everything the right-hand side needs at `times`: numbers, or [s] float64 on the CPU with a graph. Good until
        the next call for as many times."""
        if self._gates is None:
            return self._times_alone(times)
        numbers = times.detach().tolist() if isinstance(times, Tensor) else times
        n, graph = len(numbers), torch.is_grad_enabled() or transforms.active()
        rows = [] if self._hidden else [x for row in self._factor_rows(numbers) for x in row]
        # The one cast and the one transfer of a step.
        wide = torch.tensor([*numbers, *rows], dtype=torch.float64 if graph else self.dtype, device="cpu")
        if graph:
            t = times if isinstance(times, Tensor) else wide[:n]
            columns = [x for x in self.coefficients(t) if x is not None]
            exact = torch.cat((t, torch.stack(columns, dim=1).view(-1))) if columns else t
            # The same numbers to the bit, plus a zero that carries the graph.
            wide = exact if self._hidden else wide + (exact - exact.detach())
        elif self.device.type == "cpu":
            return self._rewritten(wide, n)
        wide = wide.to(self.device, self.dtype)
        return self._cut(wide[:n], wide[n:])

    def _times_alone(self, times: Sequence[float] | Tensor) -> StageTimes:
        """`at` of a first-order system."""
        nothing = (None,) * len(times)
        if not isinstance(times, Tensor):
            times = torch.tensor(times, dtype=self.dtype, device="cpu")
        return StageTimes(times.to(self.device, self.dtype).unbind(0), nothing, nothing, nothing)

    def _factor_rows(self, times: Sequence[float]) -> list[list[float]]:
        """Of each time its row of `Coefficients`, without what the system has not."""
        # A step starts at the time where the last one ended, and several stages may be at its end.
        last, self._known = self._known, {}
        for t in times:
            if t not in self._known:
                self._known[t] = last.get(t) or [x for x in self._numbers_at(t) if x is not None]
        return [self._known[t] for t in times]

    def _rewritten(self, wide: Tensor, n: int) -> StageTimes:
        """`_cut` in memory whose views are made once; the times, which the field is given, in memory of their own."""
        held = self._held.get(n)
        if held is None:
            factors = wide[n:].clone()  # or a field's graph would see its times written to
            cut = self._cut(wide[:n], factors)
            self._held[n] = factors, cut
            return cut
        factors, cut = held
        if len(factors):
            factors.copy_(wide[n:])
        return StageTimes(wide[:n].unbind(0), cut.scale, cut.drive, cut.linear)

    def packet(self, times: Sequence[float], dt: float, weights: Sequence[float] = ()) -> Packet:
        """The same for the kernels, at `times`, for the step size `dt`, with these weights; one transfer, and no
        launch.

        Without a wait either: CUDA has staged pageable memory by the time that the call returns.
        """
        system, rows = self.system, list[float]()
        if isinstance(system, Momentum):
            for c in map(self._numbers_at, times):
                scale, drive = 1.0 if c.scale is None else c.scale, system.sign if c.drive is None else c.drive
                rows += (scale, drive, c.q or 0.0, c.minus_gamma or 0.0)
        n, width = len(times), 4 if rows else 0
        wide = torch.tensor([*rows, dt, *weights, *times], dtype=torch.float64, device="cpu")
        if self.dtype == torch.float64:
            wide = wide.to(self.device, non_blocking=True)
            narrow = wide[-n:]
        else:  # as bytes, so that both types travel together
            end = wide.numel() * 8
            packed = torch.cat((wide.view(torch.uint8), wide[-n:].to(self.dtype).view(torch.uint8)))
            packed = packed.to(self.device, non_blocking=True)
            wide, narrow = packed[:end].view(torch.float64), packed[end:].view(self.dtype)
        k = n * width
        own = wide[k + 1 : k + 1 + len(weights)] if weights else None
        return Packet(narrow.unbind(0), wide[:k].view(n, width), wide[k : k + 1], own)

    @property
    def readable(self) -> bool:
        """Whether γ and ξ are numbers: not in an ensemble under vmap."""
        return not self._hidden

    @property
    def numbers(self) -> tuple[float, float]:
        """γ and ξ of a momentum system in this solve; zeros of a first-order one."""
        system = self.system
        if not isinstance(system, Momentum):
            return 0.0, 0.0
        if self._values is None:
            damping, xi = self.scalars.get("damping"), self.scalars.get("xi")
            self._values = (
                system.fixed_damping if damping is None else float(damping.detach()),
                system.fixed_xi if xi is None else float(xi.detach()),
            )
        return self._values

    def _numbers_at(self, t: float) -> Coefficients[float]:
        """The coefficients of a momentum system. Plain numbers: seven scalars cost less than one operator on a tensor
        of seven."""
        found: Coefficients[float] = self._rule.coefficients(t, *self.numbers)
        return found

    def _cut(self, times: Tensor, factors: Tensor) -> StageTimes:
        """Cut n times and their rows of coefficients, flat, into stages."""
        system, n = self.system, len(times)
        t, nothing = times.unbind(0), (None,) * n
        if not isinstance(system, Momentum) or not len(factors):
            return StageTimes(t, nothing, nothing, nothing)
        rows = factors.view(n, -1)
        return StageTimes(
            t,
            rows[:, 0].unbind(0) if system.nesterov else nothing,
            rows[:, 1].unbind(0) if system.exact else nothing,
            rows[:, -2:].unbind(0) if system.damped or system.exact or system.residual else nothing,
        )

    # -- the right-hand side -------------------------------------------------------------------------------------------

    def open(self, z: Tensor) -> OpenState:
        """A state, [D], and its views."""
        if self._gates is None:
            return OpenState(z, (z,), (z.view(self.shape),), z)
        pair = z.view(2, -1)
        parts = pair.unbind(0)
        seen = parts if self.system.sees_momentum else parts[:1]
        return OpenState(z, parts, [part.view(self.shape) for part in seen], pair.t())

    @property
    def copies(self) -> bool:
        """Whether the network gets tensors of its own, so that the state's memory may be used again after a stage."""
        return isinstance(self.system, Momentum) and self.system.nesterov

    def derivative(self, at: StageTimes, i: int, z: OpenState, out: Row | None = None) -> Sequence[Tensor]:
        """The right-hand side at stage `i` and state `z`, as parts of [N]; written into `out` if given."""
        u = self.network(at.t[i], *self._features(at.scale[i], z))
        if self._gates is None:
            u = u.reshape(-1)
            return (u,) if out is None else (out.flat.copy_(u),)
        system: Momentum = self.system  # type: ignore[assignment]
        return momentum.derivative(
            z.parts[1], u.reshape(-1), z.transposed, system.sign, at.drive[i], at.linear[i], self._gates, out
        )

    def slope(self, t: float, z: Tensor) -> Tensor:
        """The right-hand side of a first-order system at a time and a state, [D]: as the field returned it."""
        time = torch.scalar_tensor(t, dtype=self.dtype, device=self.device)  # a third of the time of torch.tensor
        return self.network(time, z.view(self.shape)).reshape(-1)

    def linearise(self, at: StageTimes, i: int, z: OpenState, out: Row, values: Row) -> Linearisation:
        """As `derivative` into `out`, keeping the network's graph for `pullback`. `z`, `out` and `values`, a row for
        the gates' values, must stay as they are until then."""
        evaluation = self.network.taped(at.t[i], *self._features(at.scale[i], z), time_grads=self.time_grads)
        flat = evaluation.u.detach().reshape(-1)
        if self._gates is None:
            out.flat.copy_(flat)
        else:
            system: Momentum = self.system  # type: ignore[assignment]
            momentum.derivative(
                z.parts[1], flat, z.transposed, system.sign, at.drive[i], at.linear[i], self._gates, out, values
            )
        return Linearisation(evaluation, flat, z, out, values)

    def pullback(
        self, at: StageTimes, i: int, lin: Linearisation, c: Row, out: Row, wrt_params: bool = True
    ) -> Cotangents:
        """Transpose of `linearise` at stage `i`: the state's cotangent into `out`; the others returned.

        Args:
            c: cotangent of the right-hand side.
            wrt_params: whether the parameters' cotangents are wanted from this stage.
        """
        params = self.params if wrt_params else ()
        if self._gates is None:
            through, through_time, grads = lin.network.pullback(c.flat, params)
            if through[0] is None:
                out.flat.zero_()
            else:
                out.flat.copy_(through[0])
            return Cotangents(grads, through_time)
        system: Momentum = self.system  # type: ignore[assignment]
        drive, scale = at.drive[i], at.scale[i]
        u = lin.output
        of_m, gated = momentum.gate_cotangents(c, lin.state.parts[1], u, lin.slope, lin.values, self._gates)
        g = momentum.field_cotangent(gated, system.sign, drive)
        through, through_time, grads = lin.network.pullback(g, params)
        v = through[0]
        momentum.pullback(c, of_m, v, scale, at.linear[i], out)
        if system.sees_momentum and through[1] is not None:
            out.parts[1].add_(through[1])
        found = Cotangents(grads, through_time)
        if self.coefficient_grads:
            c_m = c.parts[1]
            if at.linear[i] is not None:
                found.linear = torch.mv(lin.state.transposed.t(), c_m)
            if scale is not None and v is not None:
                found.scale = torch.dot(v, lin.state.parts[0])
            if drive is not None:
                found.drive = torch.dot(c_m, self._gates.f(u))
        return found

    def _features(self, scale: Tensor | None, z: OpenState) -> Sequence[Tensor]:
        if scale is not None:
            return (z.shaped[0] * scale,)
        return z.shaped
