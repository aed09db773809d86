"""Bytes that the kernels move in one attempted step, counted from the tableau, and the least that any kernels could.

    python -m benchmarks.traffic

A row is N values: x, m, one stage's field output, slope or features. One step goes from a state whose first slope is
known (FSAL) and ends with the new state, the last slope and the error. Small things (coefficients, the blocks' partial
sums) are counted too, and vanish with growing N.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from nesterov_triton import nystrom, tableaus
from nesterov_triton.nystrom import Nystrom
from nesterov_triton.ops.nystrom.reference import Plan, Row, plan_of
from nesterov_triton.tableaus import Tableau

_BLOCK_BYTES = 4096  # of one row that one program works on
_SUM_BYTES = 8


@dataclass(frozen=True)
class Launch:
    """One kernel launch: rows read and written."""

    kernel: str
    read: int
    written: int

    @property
    def rows(self) -> int:
        return self.read + self.written


def momentum_stage(tableau: Tableau, known: int, new: int, ahead: int, momentum: bool = False) -> Launch:
    """The launch that takes the field's outputs at `new` stages, with the `known` slopes before them, to the features
    of the `ahead` stages after them; see `ops.momentum_stage`."""
    following = known + new
    positions = [*range(known, following), *range(following, following + ahead)]  # x of these stages
    momenta = [*range(known, following), *([following] if momentum else [])]
    read = 2 + new + _slopes_read(tableau.a, known, positions, momenta)
    return Launch(f"momentum stages {following}-{following + ahead - 1}", read, new + ahead + momentum)


def momentum_finish(tableau: Tableau, new: int, keep: int = 1) -> Launch:
    """The launch that ends the step; its norm's second half reads no rows."""
    known = tableau.stages - new
    rows = (*tableau.a, tableau.b, *tableau.error)
    ends = range(tableau.stages, len(rows))
    slopes = _slopes_read(rows, known, [*range(known, tableau.stages), *ends], [*range(known, tableau.stages), *ends])
    return Launch("momentum finish", 2 + new + slopes, 2 + keep)


def momentum_adjoint_stage(tableau: Tableau, known: int, new: int, ahead: int, sees_momentum: bool = False) -> Launch:
    """The launch that takes the field's outputs at `new` stages, with dm and v of the `known` ones before them, to the
    features of the `ahead` stages after them and to the outputs' cotangents; see `ops.momentum_adjoint_stage`."""
    following, rows = known + new, (*tableau.all_a, ())
    back = _Sweep.of(rows, set(range(known, following)))
    m = sees_momentum and ahead > 0
    momenta = [*range(known, following), *back.p_m, *([following] if m else [])]
    slopes = _slopes_read(rows, known, range(known, following + ahead), momenta)
    through = len(back.p_x) + sees_momentum * len(back.p_m)
    read = 2 + new + slopes + 1 + bool(back.y_x) + through
    return Launch(f"adjoint stages {known}-{following - 1}", read, 2 * new + ahead + m)


def momentum_adjoint_finish(tableau: Tableau, sees_momentum: bool = False) -> Launch:
    """The launch that ends an adjoint step, with or without the quadratures; its second half reads no rows."""
    stages, rows = tableau.stages, (*tableau.a, tableau.b, *tableau.error)
    ends = range(stages, len(rows))
    last = {stages - 1}  # must be finite, whether or not the error looks at it
    back = _Sweep.of(rows, set(), last | _used(rows, ends))
    slopes = _slopes_read(rows, stages, ends, [*ends, *back.p_m], last)
    return Launch("adjoint finish", 4 + slopes + len(back.p_x) + sees_momentum * len(back.p_m), 4)


def momentum_reverse_stage(
    tableau: Tableau, stages: int, following: int, new: int, sees_momentum: bool = False, seeds: bool = False
) -> Launch:
    """The launch that forms the cotangents of the `new` stages before stage `following` of `stages`, with the v of
    that one and of those after it; see `ops.momentum_reverse_stage`."""
    through, computed = stages - following, new == 2 and following == stages
    back = _Sweep.of(_transposed(tableau, stages), set(range(through, through + new)))
    momenta = [stages - 1 - p for p in back.p_m]
    positions = [stages - 2] if computed else []
    slopes = _slopes_read(tableau.all_a, stages - 1 - computed, positions, [*momenta, *positions])
    read = new + slopes + bool(momenta) + computed + len(back.p_x) + sees_momentum * len(back.p_m)
    read += _ends_read(tableau, stages, back, seeds)
    return Launch(f"reverse stages {following - new}-{following - 1}", read, new + computed)


def momentum_reverse_finish(
    tableau: Tableau, stages: int, sees_momentum: bool = False, seeds: bool = False, quadratures: bool = False
) -> Launch:
    """The launch that ends the sweep over a step; the quadratures' second half reads no rows."""
    places = range(stages)
    slopes = _slopes_read(tableau.all_a, stages - 1, places if quadratures else [], places)
    through = (1 + sees_momentum) * stages
    seeded = 2 * stages if seeds else 0
    return Launch("reverse finish", 1 + quadratures + 2 + slopes + through + seeded, 2)


def _used(rows: Sequence[Sequence[float]], which: Iterable[int]) -> set[int]:
    """The columns of these rows that hold anything but zeros."""
    return {j for row in which for j, weight in enumerate(rows[row]) if weight != 0}


def _slopes_read(
    rows: Sequence[Sequence[float]],
    known: int,
    positions: Iterable[int],
    momenta: Iterable[int],
    themselves: Iterable[int] = (),
) -> int:
    """How many of the `known` dm_j a kernel reads that forms these combinations of the dx_j = σ_x(m_j) and of the dm_j
    (indices of rows), and looks at some of the dm_j themselves."""
    needed = _used(rows, {*_used(rows, positions), *momenta}) | set(themselves)
    return len({j for j in needed if j < known})


def _transposed(tableau: Tableau, stages: int) -> list[list[float]]:
    """What leads to each of so many stages on the way back, the last one first."""
    a, last = tableau.all_a, stages - 1
    return [[a[last - r][last - p] for r in range(p)] for p in range(stages)]


def _ends_read(tableau: Tableau, stages: int, back: _Sweep, seeds: bool) -> int:
    """Rows of the cotangent of a step's end, and of the seeds, that a launch of the reverse sweep reads."""
    read = 0
    for places in (back.y_x, back.y_m):
        read += any(stages - 1 - p < tableau.stages and tableau.b[stages - 1 - p] != 0 for p in places)
        read += seeds * len(places)
    return read


@dataclass(frozen=True)
class _Sweep:
    """The places at which a kernel forms what `momentum_adjoint_stage.reference.all_cotangents` computes."""

    y_x: set[int]
    y_m: set[int]
    p_x: set[int]
    p_m: set[int]

    @classmethod
    def of(cls, weights: Sequence[Sequence[float]], y_m: set[int], p: Iterable[int] = ()) -> _Sweep:
        """Those that it needs for these Y_m and for both parts of these P."""
        found = cls(set(), set(y_m), set(p), set(p))
        for place in reversed(range(len(weights))):
            if place in found.p_m:
                found.y_x.add(place)
            if place in found.p_m | found.p_x:
                found.y_m.add(place)
            if place in found.y_x:
                found.p_x.update(_used(weights, [place]))
            if place in found.y_m:
                found.p_m.update(_used(weights, [place]))
        return found


def momentum_step(tableau: Tableau, pairs: bool = True) -> list[Launch]:
    """All launches of one step of an FSAL method on a momentum system; two stages a launch unless the field sees m."""
    launches, known, new = [], 1, 0
    while known + new < tableau.stages:
        ahead = min(2 if pairs else 1, tableau.stages - known - new)
        launches.append(momentum_stage(tableau, known, new, ahead, not pairs))
        known, new = known + new, ahead
    return [*launches, momentum_finish(tableau, new), Launch("norm", 0, 0)]


def momentum_floor(tableau: Tableau, pairs: bool = True) -> int:
    """Rows of a step in which every launch reads each value that it needs once, and writes nothing but what others
    must have: the field its arguments, the next step its state and first slope. The slopes between are not written but
    formed again from the field's outputs, of which as many are read as slopes are otherwise."""
    *stages, _, _ = launches = momentum_step(tableau, pairs)
    arguments = (tableau.stages - 1) * (1 if pairs else 2)
    slopes_between = sum(launch.written for launch in stages) - arguments
    return sum(launch.rows for launch in launches) - slopes_between


def momentum_adjoint_step(tableau: Tableau, pairs: bool = True) -> list[Launch]:
    """All launches of one step of an FSAL method on a momentum system with its adjoint, from a known dm_0 and v_0; two
    stages a launch unless the field sees m."""
    most, known = 2 if pairs else 1, 1
    new = min(most, tableau.stages - known)
    launches = [momentum_stage(tableau, known, 0, new, not pairs)]
    while known < tableau.stages:
        ahead = min(most, tableau.stages - known - new)
        launches.append(momentum_adjoint_stage(tableau, known, new, ahead, not pairs))
        known, new = known + new, ahead
    return [*launches, momentum_adjoint_finish(tableau, not pairs), Launch("norm", 0, 0)]


def momentum_adjoint_floor(tableau: Tableau, pairs: bool = True) -> int:
    """As `momentum_floor`: of the slopes only the last one is written, which the next step starts from."""
    return sum(launch.rows for launch in momentum_adjoint_step(tableau, pairs)) - (tableau.stages - 2)


def momentum_reverse_step(tableau: Tableau, pairs: bool = True) -> list[Launch]:
    """All launches of the reverse sweep over one step of a momentum system: forward again from (x, m), and back; two
    stages a launch unless the field sees m. A last stage without weight is left out."""
    most, stages = 2 if pairs else 1, reverse_stages(tableau)
    launches, known, new = [], 0, 0
    while known + new < stages:
        ahead = min(most, stages - known - new)
        launches.append(momentum_stage(tableau, known, new, ahead, not pairs))
        known, new = known + new, ahead
    while new:
        launches.append(momentum_reverse_stage(tableau, stages, known + new, new, not pairs))
        new = min(most, known)
        known -= new
    return [*launches, momentum_reverse_finish(tableau, stages, not pairs)]


def reverse_stages(tableau: Tableau) -> int:
    """How many stages a reverse sweep goes through where there is no dense output."""
    return tableau.stages - (tableau.b[-1] == 0)


def momentum_reverse_floor(tableau: Tableau, pairs: bool = True) -> int:
    """As `momentum_floor`: no slope is written."""
    return sum(launch.rows for launch in momentum_reverse_step(tableau, pairs)) - (reverse_stages(tableau) - 1)


def first_order_step(tableau: Tableau) -> list[Launch]:
    """All launches of one step of an FSAL method on y' = f. They are at the floor: slopes are the field's outputs."""
    stages = [
        Launch(f"first-order stage {i}", 1 + sum(w != 0 for w in tableau.a[i + 1]), 1)
        for i in range(tableau.stages - 1)
    ]
    return [*stages, first_order_finish(tableau), Launch("norm", 0, 0)]


def first_order_finish(tableau: Tableau) -> Launch:
    """The launch that ends the step: the last slope is always read, a state at the end only written without FSAL."""
    columns = list(zip(tableau.b, *tableau.error, strict=True))
    return Launch("first-order finish", 2 + sum(map(any, columns[:-1])), 0 if tableau.fsal else 1)


def first_order_adjoint_step(tableau: Tableau) -> list[Launch]:
    """All launches of one step of y' = f together with its adjoint, rows of y's size. At the floor: both halves are."""
    *stages, finish, norm = first_order_step(tableau)
    return [*(_twice(launch) for launch in stages), _twice(finish), norm]


def _twice(launch: Launch) -> Launch:
    """Of state and adjoint."""
    return Launch(f"{launch.kernel}, adjoint", 2 * launch.read, 2 * launch.written)


def first_order_reverse_stage(tableau: Tableau, stage: int, stages: int, seed: bool = False) -> Launch:
    """The launch that leads to one slope's cotangent, in a step of so many stages."""
    end = stage < tableau.stages and tableau.b[stage] != 0
    later = sum(row[stage] != 0 for row in tableau.all_a[stage + 1 : stages])
    return Launch(f"first-order reverse {stage}", end + later + seed, 1)


def first_order_reverse_finish(stages: int) -> Launch:
    """The launch that adds what came back through so many stages."""
    return Launch("first-order reverse end", 1 + stages, 1)


def first_order_reverse_step(tableau: Tableau, stages: int) -> list[Launch]:
    """All launches that transpose one step of y' = f of so many stages: their states formed again, then backwards.
    They are at the floor: slopes and what came back are the field's outputs, and what else is written is its arguments
    and the result."""
    again = [
        Launch(f"first-order stage {i}", 1 + sum(w != 0 for w in tableau.all_a[i + 1]), 1) for i in range(stages - 1)
    ]
    back = [first_order_reverse_stage(tableau, i, stages) for i in reversed(range(stages))]
    return [*again, *back, first_order_reverse_finish(stages)]


def first_order_dense_output(tableau: Tableau, times: int) -> Launch:
    """The launch that gives the states at so many times inside a step; at the floor."""
    return Launch("first-order dense output", 1 + sum(map(any, tableau.interpolant)), times)


def momentum_dense_output(tableau: Tableau, times: int) -> Launch:
    """The same for a momentum system; at the floor too."""
    stages = [i for i, row in enumerate(tableau.interpolant) if any(row)]
    slopes = {*stages, *(j for i in stages for j, weight in enumerate(tableau.all_a[i]) if weight != 0)}
    return Launch("momentum dense output", 2 + len(slopes), 2 * times)


def nystrom_stage(method: Nystrom, gated: bool, known: int, output: bool = True, ahead: bool = True) -> Launch:
    """The launch that takes the field's output at the stage after the `known` forces, if there is one, to that stage's
    force, and `ahead` to the features of the stage after it; see `ops.nystrom_stage`."""
    plan, following = plan_of(method, gated), known + output
    needed = (_position(plan, following) if ahead else set()) | (_position(plan, known) if output else set())
    return Launch(f"Nystrom stage {following}", len(needed - {2 + known}) + output, ahead + output)


def nystrom_finish(method: Nystrom, gated: bool) -> Launch:
    """The launch that ends the step; its norm's second half reads no rows."""
    plan, last = plan_of(method, gated), method.stages - 1
    needed = {0, 1} | _position(plan, last)
    for row in plan.ends:
        needed |= _columns(row)
    return Launch("Nystrom finish", len(needed - {2 + last}) + 1, 3)


def nystrom_step(method: Nystrom, gated: bool) -> list[Launch]:
    """All launches of one step of a method of `nystrom`, from a known force."""
    stages = [nystrom_stage(method, gated, known) for known in range(1, method.stages - 1)]
    first, finish = nystrom_stage(method, gated, 1, output=False), nystrom_finish(method, gated)
    return [first, *stages, finish, Launch("norm", 0, 0)]


def nystrom_floor(method: Nystrom, gated: bool) -> int:
    """As `momentum_floor`: of the forces only the last one is written, which the next step starts from."""
    return sum(launch.rows for launch in nystrom_step(method, gated)) - (method.stages - 2)


def nystrom_reverse_stage(method: Nystrom, gated: bool, stage: int) -> Launch:
    """The launch that forms the cotangent of the field's output at a stage, and that of the position after it; see
    `ops.nystrom_reverse_stage`."""
    plan, through = plan_of(method, gated), stage < method.stages - 2
    needed = _of_force(plan, stage)
    if stage == 0:
        needed |= _of_start(plan)  # by the kick
    if through:
        needed = (needed | _of_force(plan, stage + 1)) - {("position", stage + 1)}
    return Launch(f"Nystrom reverse stage {stage}", 1 + through + len(needed), 1 + through)


def nystrom_reverse_finish(method: Nystrom, gated: bool, quadratures: bool = False) -> Launch:
    """The launch that ends the sweep over a step; the quadratures' second half reads no rows."""
    plan, last = plan_of(method, gated), method.stages - 1
    needed = _of_force(plan, 0) | _of_start(plan) | {("position", i) for i in range(1, method.stages)}
    if quadratures:
        needed |= {("column", j) for j in range(2 + last)}
    return Launch("Nystrom reverse finish", 1 + len(needed), 2)


def nystrom_reverse_step(method: Nystrom, gated: bool) -> list[Launch]:
    """All launches of the reverse sweep over one step of a method of `nystrom`: forward again from (x, m), and back."""
    last = method.stages - 1
    again = [nystrom_stage(method, gated, known) for known in range(last - 1)]
    if gated:  # which looks at all forces
        again.append(nystrom_stage(method, gated, last - 1, ahead=False))
    back = [nystrom_reverse_stage(method, gated, stage) for stage in reversed(range(last))]
    return [nystrom_stage(method, gated, 0, output=False), *again, *back, nystrom_reverse_finish(method, gated)]


def nystrom_reverse_floor(method: Nystrom, gated: bool) -> int:
    """As `momentum_floor`: neither forces nor cotangents of positions are written."""
    positions = method.stages - 2
    return sum(launch.rows for launch in nystrom_reverse_step(method, gated)) - (2 * positions + gated)


def nystrom_adjoint_stage(method: Nystrom, gated: bool, stage: int, ahead: bool = True) -> Launch:
    """The launch that takes the field's output at a stage, with the forces and the v before it, to that stage's force
    and `ahead` to the features of the stage after it, which the last one has not, and to the output's cotangent; see
    `ops.nystrom_adjoint_stage`."""
    plan, more = plan_of(method, gated), stage < method.stages - 1
    state = _position(plan, stage) if more else set[int]()
    if more and ahead:
        state |= _position(plan, stage + 1)
    momenta, adjoint = _adjoint_position(plan, stage)
    state = (state | momenta) - {2 + stage}
    return Launch(f"Nystrom adjoint stage {stage}", 1 + len(state) + len(adjoint), 1 + more * (1 + ahead))


def nystrom_adjoint_finish(method: Nystrom, gated: bool) -> Launch:
    """The launch that ends an adjoint step, with or without the quadratures; its second half reads no rows."""
    plan, last = plan_of(method, gated), method.stages - 1
    state, adjoint = _adjoint_position(plan, last)
    state |= {0, 1} | _position(plan, last)
    adjoint |= {0, 1, 2 + last}  # the last P must be finite
    for row in plan.ends:
        state |= _columns(row)
        adjoint |= _columns(row)
    return Launch("Nystrom adjoint finish", 1 + len(state - {2 + last}) + len(adjoint), 5)


def nystrom_adjoint_step(method: Nystrom, gated: bool) -> list[Launch]:
    """All launches of one step of a method of `nystrom` with its adjoint, from a known force and a known v."""
    last, first = method.stages - 1, nystrom_stage(method, gated, 1, output=False)
    stages = [nystrom_adjoint_stage(method, gated, stage) for stage in range(1, last + 1)]
    return [first, *stages, nystrom_adjoint_finish(method, gated), Launch("norm", 0, 0)]


def nystrom_adjoint_floor(method: Nystrom, gated: bool) -> int:
    """As `nystrom_floor`."""
    return sum(launch.rows for launch in nystrom_adjoint_step(method, gated)) - (method.stages - 2)


def _adjoint_position(plan: Plan, i: int) -> tuple[set[int], set[int]]:
    """The columns that W_i is made of: x, m, F_0, … for the gates' derivatives, and a_m, a_x, v_0, …; a P is made of
    its v and its W."""
    state, adjoint, todo, done = set[int](), set[int](), [i], set[int]()
    while todo:
        k = todo.pop()
        done.add(k)
        found = _position(plan, k)
        adjoint |= found
        if k and plan.paths:
            adjoint.add(0)
            state = state.union(*(_columns(plan.paths[q]) for q in _columns(plan.positions[k - 1])))
        todo += [j - 2 for j in found if j >= 2 and j - 2 not in done]
    return state, adjoint


def nystrom_dense_output(times: int) -> Launch:
    """The launch that gives the states at so many times inside a step; at the floor."""
    return Launch("Nystrom dense output", 6, 2 * times)


def _columns(row: Row) -> set[int]:
    """The columns of a row that have a weight: x, m, F_0, F_1, …"""
    return {j for j, used in enumerate(row[1:]) if used}


def _position(plan: Plan, i: int) -> set[int]:
    """The columns that X_i is made of."""
    if i == 0:
        return {0}
    found = _columns(plan.positions[i - 1])
    return set[int]({0}).union(*(_columns(plan.paths[q]) for q in found)) if plan.paths else found


Held = tuple[str, int]  # a row: ("column", j) is x, m, F_0, …; ("position", i) the cotangent of X_i, the last one λ_x


def _of_force(plan: Plan, i: int) -> set[Held]:
    """What the cotangent of F_i is made of."""
    found = _of_momentum(plan, 2 + i)
    if not plan.paths:
        return found | _of_positions(plan, i, 2 + i)
    return found.union(*(_of_node(plan, q, i) for q, path in enumerate(plan.paths) if 2 + i in _columns(path)))


def _of_start(plan: Plan) -> set[Held]:
    """What the cotangent of m at the start of a step is made of."""
    found = _of_momentum(plan, 1)
    if not plan.paths:
        return found | _of_positions(plan, 0, 1)
    return found.union(*(_of_node(plan, q, 0) for q, path in enumerate(plan.paths) if 1 in _columns(path)))


def _of_node(plan: Plan, q: int, i: int) -> set[Held]:
    """What the cotangent of M_q is made of, by the positions after X_i."""
    return _of_positions(plan, i, q) | {("column", j) for j in _columns(plan.paths[q])}


def _of_momentum(plan: Plan, column: int) -> set[Held]:
    """λ_m, where this column leads to m at the end."""
    return {("momentum", 0)} if column in _columns(plan.ends[0]) else set()


def _of_positions(plan: Plan, i: int, column: int) -> set[Held]:
    """The cotangents of the positions after X_i that this column leads to."""
    return {("position", k + 1) for k, row in enumerate(plan.positions) if k >= i and column in _columns(row)}


def step_bytes(launches: Sequence[Launch], tableau: Tableau | Nystrom, n: int, itemsize: int) -> int:
    """Bytes of a step on rows of `n` values of `itemsize` bytes."""
    programs = -(-n * itemsize // _BLOCK_BYTES)
    sums = 2 * programs * max(len(tableau.error), 1) * _SUM_BYTES
    coefficients = len(launches) * 8 * 8
    return sum(launch.rows for launch in launches) * n * itemsize + sums + coefficients


def main() -> None:
    """Print the counts of one step of dopri5 and of nystrom4."""
    tableau, nystrom4, n, itemsize = tableaus.get("dopri5"), nystrom.METHODS["nystrom4"], 2**24, 4
    first_order = first_order_step(tableau), first_order_adjoint_step(tableau), first_order_reverse_step(tableau, 6)
    for launches, floor in (
        (momentum_step(tableau), momentum_floor(tableau)),
        (momentum_step(tableau, pairs=False), momentum_floor(tableau, pairs=False)),
        (momentum_adjoint_step(tableau), momentum_adjoint_floor(tableau)),
        (momentum_adjoint_step(tableau, pairs=False), momentum_adjoint_floor(tableau, pairs=False)),
        (momentum_reverse_step(tableau), momentum_reverse_floor(tableau)),
        (momentum_reverse_step(tableau, pairs=False), momentum_reverse_floor(tableau, pairs=False)),
        *((at_floor, sum(launch.rows for launch in at_floor)) for at_floor in first_order),
        (nystrom_step(nystrom4, gated=True), nystrom_floor(nystrom4, gated=True)),
        (nystrom_adjoint_step(nystrom4, gated=False), nystrom_adjoint_floor(nystrom4, gated=False)),
        (nystrom_adjoint_step(nystrom4, gated=True), nystrom_adjoint_floor(nystrom4, gated=True)),
        (nystrom_reverse_step(nystrom4, gated=False), nystrom_reverse_floor(nystrom4, gated=False)),
        (nystrom_reverse_step(nystrom4, gated=True), nystrom_reverse_floor(nystrom4, gated=True)),
    ):
        for launch in launches:
            print(f"{launch.kernel:28s} reads {launch.read:2d} rows, writes {launch.written}")
        rows = sum(launch.rows for launch in launches)
        moved, least = step_bytes(launches, tableau, n, itemsize), floor * n * itemsize
        print(f"{len(launches)} launches, {rows} rows, the floor {floor}; at N = 2**24, float32: ", end="")
        print(f"{moved / 1e9:.3f} GB, the floor {least / 1e9:.3f} GB, ratio {moved / least:.3f}\n")


if __name__ == "__main__":
    main()
