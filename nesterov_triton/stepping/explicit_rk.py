"""One explicit Runge-Kutta step on a flat state, [D].

Stages are stored in a buffer that lives as long as the solve, or, when plain autograd is to see every operation, in a
list of fresh tensors. Adaptive methods have many stages: theirs are stage-major, so that Σ_j a_ij k_j is one
matrix-vector product over contiguous memory. Fixed-step methods have few, which are added one by one. How depends on
the method alone, so that every storage gives the same bits.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from nesterov_triton import transforms
from nesterov_triton.flow import OpenState, StageTimes
from nesterov_triton.ops import runge_kutta
from nesterov_triton.ops.rows import Row, empty_rows
from nesterov_triton.stepping.dense_output import dense_output
from nesterov_triton.stepping.scratch import SHELF
from nesterov_triton.stepping.stepper import TimeAxis, Tolerance, stage_times
from nesterov_triton.tableaus import Tableau


class Dynamics(Protocol):
    """What a step needs of a right-hand side on flat states, [D], made of parts of [N]."""

    @property
    def copies(self) -> bool:
        """Whether the memory of a state may be used again once `derivative` has returned."""

    def open(self, z: Tensor) -> OpenState:
        """A state with its views."""

    def at(self, times: Sequence[float] | Tensor) -> StageTimes:
        """What the right-hand side needs at `times`: numbers, or [s] float64 on the CPU with a graph. Good until the
        next call for as many times."""

    def derivative(self, at: StageTimes, i: int, z: OpenState, out: Row | None = None) -> Sequence[Tensor]:
        """The right-hand side at stage `i` as parts of [N], written into `out` if given."""


class Table:
    """A method's numbers, all in one tensor.

    Attributes:
        flat: the rows below, one after the other.
        rows: what leads to stage i; b; the error rows; what leads to the extra stages of dense output.
        errors: the error rows among them, [s] each.
    """

    def __init__(self, tableau: Tableau, flat: Tensor) -> None:
        self.tableau, self.flat = tableau, flat
        self.lengths = [len(row) for row in table_rows(tableau)]
        self.rows = list(torch.split(flat, self.lengths))
        s = tableau.stages
        self.errors = self.rows[s + 1 : s + 1 + len(tableau.error)]

    def like(self, flat: Tensor) -> Table:
        """The same rows of another tensor."""
        return Table(self.tableau, flat)


def table_rows(tableau: Tableau) -> list[tuple[float, ...]]:
    """The rows of `Table`."""
    return [*tableau.a, tableau.b, *tableau.error, *tableau.extra_a]


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)  # or later solves could not save it for their backward passes
def table(tableau: Tableau, dtype: torch.dtype, device: torch.device) -> Table:
    """The method's own numbers; made once, and never written to."""
    numbers = [x for row in table_rows(tableau) for x in row]
    made = torch.tensor(numbers, dtype=torch.float64, device="cpu").to(device, dtype)
    kept = Table(tableau, transforms.plain(made))
    kept.rows, kept.errors = ([transforms.plain(row) for row in rows] for rows in (kept.rows, kept.errors))
    return kept


class Stages(Protocol):
    """Storage for the stages k_j, [D] each, and for dt times the tableau."""

    def out(self, i: int) -> Row | None:
        """Where stage i is to be written, or None if it is to be allocated."""

    def put(self, i: int, k: Sequence[Tensor]) -> None:
        """Stage i has been computed (and written to `out`)."""

    def stage(self, i: int) -> Tensor:
        """Stage i, [D]."""

    def columns(self, n: int) -> Tensor:
        """The first n stages as columns, [D, n]."""

    def carry(self, i: int) -> None:
        """Make stage i the first one."""


class StageBuffer:
    """Stages in one buffer, overwritten by every step."""

    def __init__(self, count: int, rows: int, like: Tensor) -> None:
        storage, self._rows = empty_rows(count, rows, like)
        columns = storage.t()
        self._columns = [columns.narrow(1, 0, n) for n in range(count + 1)]

    def out(self, i: int) -> Row:
        return self._rows[i]

    def put(self, i: int, k: Sequence[Tensor]) -> None:
        pass

    def stage(self, i: int) -> Tensor:
        return self._rows[i].flat

    def columns(self, n: int) -> Tensor:
        return self._columns[n]

    def carry(self, i: int) -> None:
        self._rows[0].flat.copy_(self._rows[i].flat)


class StageList:
    """Stages as fresh tensors, each with its graph; `count` of them in a step."""

    def __init__(self, count: int) -> None:
        self._k: list[Tensor] = []
        self._last = count - 1

    def out(self, i: int) -> None:
        return None

    def put(self, i: int, k: Sequence[Tensor]) -> None:
        # What the field returned it may write to when it is called again, unless autograd watches over that.
        kept = len(k) == 1 and (i == self._last or k[0].requires_grad)
        self._k[i:] = [k[0] if kept else torch.cat(tuple(k))]

    def stage(self, i: int) -> Tensor:
        return self._k[i]

    def columns(self, n: int) -> Tensor:
        return torch.stack(self._k[:n]).t()

    def carry(self, i: int) -> None:
        self._k = [self._k[i]]


class Weights(Protocol):
    """A method's rows, and the states that they lead to."""

    def scale(self, dt: Tensor | float) -> None:
        """Take them times dt from now on."""

    def combine(self, z: Tensor, stages: Stages, row: int, out: Tensor | None = None) -> Tensor:
        """z + dt Σ_j a_j k_j with the a_j of a row of `Table`, [D], into `out` if given."""


class Products:
    """By one matrix-vector product over all stages; `made` is where dt times the table goes, made anew without.

    Attributes:
        scaled: dt times the table.
    """

    def __init__(self, table: Table, made: Table | None = None) -> None:
        self._table, self._made = table, made
        self.scaled = table

    def scale(self, dt: Tensor | float) -> None:
        if self._made is None:
            self.scaled = self._table.like(self._table.flat * dt)
        else:
            torch.mul(self._table.flat, dt, out=self._made.flat)
            self.scaled = self._made

    def combine(self, z: Tensor, stages: Stages, row: int, out: Tensor | None = None) -> Tensor:
        scaled = self.scaled
        return runge_kutta.combine(z, stages.columns(scaled.lengths[row]), scaled.rows[row], out)


class Sums:
    """By one sum for each stage that counts. The increments first, for they are small beside the state."""

    def __init__(self, tableau: Tableau) -> None:
        self._terms = terms(tableau)
        self._dt = 0.0
        self._zero: Tensor | None = None  # carries the graph of a dt that has one

    def scale(self, dt: Tensor | float) -> None:
        if isinstance(dt, Tensor):
            self._zero, dt = dt - dt.detach(), float(dt.detach())
        self._dt = dt

    def combine(self, z: Tensor, stages: Stages, row: int, out: Tensor | None = None) -> Tensor:
        first, weight, rest = self._terms[row]
        total = stages.stage(first)
        for j, ratio in rest:
            total = torch.add(total, stages.stage(j), alpha=ratio)
        z1 = torch.add(z, total, alpha=weight * self._dt, out=out)
        return z1 if self._zero is None else z1 + total * (weight * self._zero).to(z.device, z.dtype)


@functools.lru_cache(maxsize=64)
def terms(tableau: Tableau) -> list[tuple[int, float, list[tuple[int, float]]]]:
    """Of each row of `Table` its largest weight, with its stage, and the other stages with what theirs is of that."""
    found = []
    for row in table_rows(tableau):
        weights = {j: w for j, w in enumerate(row) if w != 0}
        first = max(weights, key=lambda j: abs(weights[j]), default=0)
        rest = [(j, w / weights[first]) for j, w in weights.items() if j != first]
        found.append((first, weights.get(first, 0.0), rest))
    return found


class Memory:
    """What steps of one method write to, for states of one size. Nothing in it is read before it is written.

    Attributes:
        stages: the stages.
        state: [D], for the state of a stage.
        products, estimates: of an adaptive method; None of one that has no error.
    """

    def __init__(self, tableau: Tableau, count: int, rows: int, like: Tensor) -> None:
        self.stages = StageBuffer(count, rows, like)
        self.state = torch.empty_like(like)
        self.nbytes = (count + 1) * like.nbytes
        self.products: Products | None = None
        self.estimates: Estimates | None = None
        if tableau.adaptive:
            numbers = table(tableau, like.dtype, like.device)
            self.products = Products(numbers, numbers.like(torch.empty_like(numbers.flat)))
            self.estimates = Estimates(tableau, like)
            self.nbytes += (3 + len(tableau.error)) * like.nbytes


class Estimates:
    """What the error's norm is made in.

    Attributes:
        errors: [n, D], for the embedded error rows; `rows` are these.
        old, new: [D] each, for |z| of the state to go on from and of the next.
        size: [D], for the larger of both.
    """

    def __init__(self, tableau: Tableau, like: Tensor) -> None:
        self.errors = like.new_empty((len(tableau.error), like.numel()))
        self.rows = self.errors.unbind(0)
        self.old, self.new, self.size = (torch.empty_like(like) for _ in range(3))

    def accept(self) -> None:
        """The next state is the one to go on from."""
        self.old, self.new = self.new, self.old


class ExplicitRK:
    """Steps of one method on one right-hand side.

    The derivative at the state to go on from is kept as the first stage between steps.

    Args:
        tableau: the method.
        dynamics: the right-hand side.
        rows: rows of the state.
        like: a state, [D]: gives size, dtype and device.
        tolerance: for the embedded error's norm; None for fixed steps.
        dense: whether `interpolate` will be called.
        differentiable: run out of place, visible to autograd.
        axis: the differentiable times, where autograd is to give gradients with respect to them.
        inside: as for `stage_times`.
    """

    def __init__(
        self,
        tableau: Tableau,
        dynamics: Dynamics,
        rows: int,
        like: Tensor,
        tolerance: Tolerance | None,
        *,
        dense: bool = False,
        differentiable: bool = False,
        axis: TimeAxis | None = None,
        inside: torch.dtype | None = None,
    ) -> None:
        self.tableau, self.dynamics, self.tolerance, self.axis = tableau, dynamics, tolerance, axis
        self.inside = inside
        self.dense = dense_output(tableau)
        count = self.dense.stages if dense else tableau.stages
        self._memory: Memory | None = None
        self._key, self._like = (tableau, count, rows, like.numel(), like.dtype), like
        self._between: OpenState | None = None
        self._products: Products | None = None
        self._estimates: Estimates | None = None
        if differentiable:
            self.stages: Stages = StageList(count)
            if tableau.adaptive:
                self._products = Products(table(tableau, like.dtype, like.device))
        else:
            self._memory = memory = SHELF.take(self._key, like, lambda: Memory(tableau, count, rows, like))
            self.stages, self._products, self._estimates = memory.stages, memory.products, memory.estimates
            if dynamics.copies:  # nothing keeps a stage's state, and all stages share one
                self._between = dynamics.open(memory.state)
        self._weights: Weights = Sums(tableau) if self._products is None else self._products
        self._sized = False  # whether the estimates have the size of the state to go on from
        self._has_first = False
        self._has_extra = False
        self._fsal = tableau.fsal
        self.dt = 0.0  # of the step just taken

    def release(self) -> None:
        """The last step has been taken: the memory is for others."""
        if self._memory is not None:
            SHELF.put(self._key, self._like, self._memory)
            self._memory = None

    def first_derivative(self, t: float, z: Tensor) -> Tensor:
        """The right-hand side at the start, [D]; kept as the first stage."""
        self._evaluate(self.dynamics.at(self._times(t, t, (0.0,))), 0, z)
        self._has_first = True
        return self.stages.stage(0)

    def probe(self, t: float, z: Tensor) -> Tensor:
        """The right-hand side somewhere else, [D]; the first stage is left as it is."""
        self._evaluate(self.dynamics.at(self._times(t, t, (0.0, 0.0))), 1, z)
        return self.stages.stage(1)

    def step(self, t: float, t1: float, z: Tensor) -> Tensor:
        """The state after one step from t to t1, [D], freshly allocated."""
        tableau = self.tableau
        self._weights.scale(self._step_size(t, t1))
        self._has_extra = False
        self.dt = t1 - t
        at = self.dynamics.at(self._times(t, t1, tableau.c))
        if not self._has_first:
            self._evaluate(at, 0, z)
            self._has_first = True
        last = tableau.stages - 1
        between, z1 = self._between, z
        for i in range(1, tableau.stages):
            if between is not None and i < last:
                self._combine(z, i, between.flat)
                self._put(at, i, between)
            else:
                z1 = self._combine(z, i)
                self._evaluate(at, i, z1)
        return z1 if self._fsal else self._combine(z, tableau.stages)

    def error(self, z: Tensor, z1: Tensor) -> float:
        """The norm of the embedded error of the step just taken. The one host read of a step."""
        transforms.check_readable(z1)
        if torch.is_grad_enabled():
            with torch.no_grad():
                return self.error(z, z1)
        tolerance, errors = self.tolerance, self._estimate(z)
        assert tolerance is not None
        if tolerance.measure is not None:
            return float(tolerance.measure(errors[0], z.detach(), z1.detach()))
        made = self._estimates
        assert made is not None
        if not self._sized:
            torch.abs(z.detach(), out=made.old)
            self._sized = True
        torch.maximum(made.old, torch.abs(z1.detach(), out=made.new), out=made.size)
        return error_norm(errors, made.size, tolerance.rtol, tolerance.atol)

    def _estimate(self, z: Tensor) -> Tensor:
        """The embedded error rows of the step just taken, [n, D], in memory that the next step's use again."""
        if self._estimates is None:
            self._estimates = Estimates(self.tableau, z.detach())
        columns = self.stages.columns(self.tableau.stages).detach()
        # Row by row: a matrix product may run in TF32, where so configured, and nearly equal stages cancel here.
        assert self._products is not None
        for row, out in zip(self._products.scaled.errors, self._estimates.rows, strict=True):
            torch.mv(columns, row.detach(), out=out)
        return self._estimates.errors

    def witness(self, z1: Tensor) -> Tensor:
        """0-d, of the step just taken, to z1: finite only where z1 is."""
        return z1.detach().sum()

    def starts_finite(self) -> bool:
        """Whether the derivative that the step just taken started with is finite."""
        return bool(torch.isfinite(self.stages.stage(0)).all())

    def accept(self) -> None:
        """Go on from the state that the step just taken gave."""
        if self._estimates is not None:
            self._estimates.accept()
        if self._fsal:
            self.stages.carry(self.tableau.stages - 1)
        else:
            self._has_first = False

    def restart(self) -> None:
        """Forget the state to go on from: the next step starts from another one."""
        self._has_first = self._sized = False

    def interpolate(
        self, t: float, t1: float, z: Tensor, times: Sequence[float], indices: Sequence[int]
    ) -> list[Tensor]:
        """The states at `times`, the requested times of these indices, inside the step from z just taken and not yet
        accepted, [D] each."""
        columns, dt = self._all_stages(t, t1, z), self._step_size(t, t1)
        states = []
        for time, index in zip(times, indices, strict=True):
            theta: Tensor | float = (time - t) / (t1 - t)
            if self.axis is not None:
                theta = (self.axis.output(time, index) - self.axis.start(t)) / dt
            weights = self.dense.weights(theta) * dt
            states.append(runge_kutta.combine(z, columns, weights.to(z.device, z.dtype)))
        return states

    def kept(self, t: float, t1: float, z: Tensor) -> Tensor:
        """All stages of the step from z just taken and not yet accepted, as columns, [D, s]; they may be kept."""
        columns = self._all_stages(t, t1, z)
        return columns if isinstance(self.stages, StageList) else columns.clone()

    def _all_stages(self, t: float, t1: float, z: Tensor) -> Tensor:
        """The stages that the interpolant needs, as columns."""
        tableau, s = self.tableau, self.tableau.stages
        if self.dense.stages > s and not self._has_extra:
            at = self.dynamics.at(self._times(t, t1, tableau.all_c))
            for j in range(s, self.dense.stages):
                self._evaluate(at, j, self._combine(z, j + 1 + len(tableau.error)))
            self._has_extra = True
        return self.stages.columns(self.dense.stages)

    def _evaluate(self, at: StageTimes, i: int, z: Tensor) -> None:
        self._put(at, i, self.dynamics.open(z))

    def _put(self, at: StageTimes, i: int, z: OpenState) -> None:
        self.stages.put(i, self.dynamics.derivative(at, i, z, self.stages.out(i)))

    def _combine(self, z: Tensor, row: int, out: Tensor | None = None) -> Tensor:
        return self._weights.combine(z, self.stages, row, out)

    def _step_size(self, t: float, t1: float) -> Tensor | float:
        return t1 - t if self.axis is None else self.axis.end(t1) - self.axis.start(t)

    def _times(self, t: float, t1: float, nodes: Sequence[float]) -> Sequence[float] | Tensor:
        """Stage times; the node 1 is t1 itself, so that no rounding takes the field outside the interval."""
        if self.axis is None:
            return stage_times(t, t1, nodes, self.inside)
        start, end = self.axis.start(t), self.axis.end(t1)
        times = torch.stack([end if c == 1.0 else start + c * (end - start) for c in nodes])
        if self.inside is None:
            return times
        return times + (times.new_tensor(stage_times(t, t1, nodes, self.inside)) - times.detach())


def error_norm(errors: Tensor, size: Tensor, rtol: Tensor | float, atol: Tensor | float) -> float:
    """The norm of a method's embedded error from its one or two error rows, [n, D]; one host read. Arguments as
    `runge_kutta.scaled_squares`."""
    squares = runge_kutta.scaled_squares(errors, size, rtol, atol)
    mean = 1 / max(errors.shape[1], 1)
    if len(squares) == 1:
        return math.sqrt(squares.item() * mean)
    fifth, third = squares.tolist()
    if not math.isfinite(third):  # no damping, or the step would look perfect
        return float(third)
    # Hairer, Nørsett, Wanner II.10: the fifth-order estimate, damped by the third-order one.
    return float(fifth) * math.sqrt(mean / (fifth + 0.01 * third)) if fifth else float(fifth)
