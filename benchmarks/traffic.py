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


def momentum_stage(tableau: Tableau, stage: int, known: bool = False, momentum: bool = False) -> Launch:
    """The launch between the field's evaluation at `stage` and the next; arguments as `ops.momentum_stage`."""
    step_row = (*tableau.a, tableau.b)[stage + 1]
    position_rows = [step_row] if known else [step_row, tableau.a[stage]]
    slopes = _slopes_read(tableau, stage, position_rows, [step_row] if momentum else [], through=not known)
    return Launch(f"momentum stage {stage}", 2 + (not known) + slopes, 1 + (not known) + momentum)


def momentum_finish(tableau: Tableau, keep: bool = True) -> Launch:
    """The launch that ends the step; its norm's second half reads no rows."""
    last = tableau.stages - 1
    ends = [tableau.b, *tableau.error]
    return Launch("momentum finish", 3 + _slopes_read(tableau, last, [*ends, tableau.a[last]], ends), 2 + keep)


def _slopes_read(
    tableau: Tableau,
    stage: int,
    position_rows: Sequence[Sequence[float]],
    momentum_rows: Sequence[Sequence[float]],
    through: bool = True,
) -> int:
    """How many stored dm_j a kernel reads that forms these combinations of the σ_x(m_k) and of the dm_j, and m_stage
    itself if `through`."""
    momenta = {k for row in position_rows for k, weight in enumerate(row) if weight != 0}
    if through:
        momenta.add(stage)
    needed = {j for k in momenta for j, weight in enumerate(tableau.a[k]) if weight != 0}
    needed |= {j for row in momentum_rows for j, weight in enumerate(row) if weight != 0}
    # The stage's own slope is in registers, unless it came from an earlier step.
    return len({j for j in needed if j < stage or not through})


def momentum_step(tableau: Tableau) -> list[Launch]:
    """All launches of one step of an FSAL method on a momentum system whose field sees h alone."""
    stages = [momentum_stage(tableau, i, known=i == 0) for i in range(tableau.stages - 1)]
    return [*stages, momentum_finish(tableau), Launch("norm", 0, 0)]


def momentum_floor(tableau: Tableau) -> int:
    """Rows of a step in which every launch reads each value that it needs once and writes only what others need: the
    features for the field, the new state. Slopes are not written but formed again from the field's outputs."""
    launches = momentum_step(tableau)
    slopes_written = tableau.stages - 1  # all but the first, which is known
    return sum(launch.rows for launch in launches) - slopes_written


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
