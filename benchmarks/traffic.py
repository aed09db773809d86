"""Bytes that the kernels move in one attempted step, counted from the tableau, and the least that any kernels could.

    python -m benchmarks.traffic

A row is N values: x, m, one stage's field output, slope or features. One step goes from a state whose first slope is
known (FSAL) and ends with the new state, the last slope and the error. Small things (coefficients, the blocks' partial
sums) are counted too, and vanish with growing N.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nesterov_triton import tableaus
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


def _slopes_read(rows: Sequence[Sequence[float]], known: int, positions: Sequence[int], momenta: Sequence[int]) -> int:
    """How many of the `known` dm_j a kernel reads that forms these combinations of the dx_j = σ_x(m_j) and of the dm_j
    (indices of rows)."""
    formed = {j for row in positions for j, weight in enumerate(rows[row]) if weight != 0}
    needed = {j for row in {*formed, *momenta} for j, weight in enumerate(rows[row]) if weight != 0}
    return len({j for j in needed if j < known})


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


def step_bytes(launches: Sequence[Launch], tableau: Tableau, n: int, itemsize: int) -> int:
    """Bytes of a step on rows of `n` values of `itemsize` bytes."""
    programs = -(-n * itemsize // _BLOCK_BYTES)
    sums = 2 * programs * max(len(tableau.error), 1) * _SUM_BYTES
    coefficients = len(launches) * 8 * 8
    return sum(launch.rows for launch in launches) * n * itemsize + sums + coefficients


def main() -> None:
    """Print the counts of one dopri5 step."""
    tableau, n, itemsize = tableaus.get("dopri5"), 2**24, 4
    for launches, floor in (
        (momentum_step(tableau), momentum_floor(tableau)),
        (momentum_step(tableau, pairs=False), momentum_floor(tableau, pairs=False)),
        (first_order_step(tableau), sum(launch.rows for launch in first_order_step(tableau))),
    ):
        for launch in launches:
            print(f"{launch.kernel:22s} reads {launch.read:2d} rows, writes {launch.written}")
        rows = sum(launch.rows for launch in launches)
        moved, least = step_bytes(launches, tableau, n, itemsize), floor * n * itemsize
        print(f"{len(launches)} launches, {rows} rows, the floor {floor}; at N = 2**24, float32: ", end="")
        print(f"{moved / 1e9:.3f} GB, the floor {least / 1e9:.3f} GB, ratio {moved / least:.3f}\n")


if __name__ == "__main__":
    main()
