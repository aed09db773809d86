"""What the stored rows of `precision` and `scaling` say: curves of error over work, of time over size."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

Row: TypeAlias = Mapping[str, str]
LEAST = 1e-16  # an error of 0 has no logarithm


@dataclass(frozen=True)
class Curve:
    """Error over work of one method, from loose to tight tolerances.

    Attributes:
        package, method, order: whose.
        points: (work, error); work in evaluations or milliseconds.
    """

    package: str
    method: str
    order: int
    points: tuple[tuple[float, float], ...]

    @property
    def name(self) -> str:
        return f"{self.package} {self.method}"

    def work_for(self, error: float) -> float | None:
        """The work with which the error first falls to `error`, straight between points in logarithms; None where no
        tolerance brought it there. Where the loosest one was enough, its work."""
        before: tuple[float, float] | None = None
        for work, found in self.points:
            if found <= error:
                if before is None:
                    return work
                share = math.log(before[1] / error) / math.log(before[1] / max(found, LEAST))
                return math.exp(math.log(before[0]) + share * (math.log(work) - math.log(before[0])))
            before = (work, found)
        return None


def curves(
    rows: Iterable[Row], problems: Sequence[str], works: Mapping[tuple[str, ...], float] | None = None
) -> list[Curve]:
    """A curve for each method over several problems together: the sum of the work, the geometric mean of the errors.

    A tolerance counts where every problem was solved at it.

    Args:
        rows: of precision.csv.
        problems: their names.
        works: milliseconds by (problem, package, method, tolerance), in the place of evaluations.
    """
    found: dict[tuple[str, str, int], dict[str, dict[str, tuple[float, float]]]] = {}
    for row in rows:
        if row["problem"] not in problems or row["note"]:
            continue
        key = (row["problem"], row["package"], row["method"], row["tolerance"])
        work = float(row["evaluations"]) if works is None else works.get(key)
        if work is not None:
            at = found.setdefault((row["package"], row["method"], int(row["order"])), {})
            at.setdefault(row["tolerance"], {})[row["problem"]] = (work, max(float(row["error"]), LEAST))
    made = []
    for (package, method, order), at in found.items():
        points = [
            (sum(work for work, _ in solved.values()), _geometric_mean([error for _, error in solved.values()]))
            for solved in at.values()
            if len(solved) == len(problems)
        ]
        if points:
            made.append(Curve(package, method, order, tuple(points)))
    return made


def milliseconds(rows: Iterable[Row]) -> dict[tuple[str, ...], float]:
    """The timed rows by (problem, package, method, tolerance)."""
    names = ("problem", "package", "method", "tolerance")
    return {tuple(row[name] for name in names): float(row["milliseconds"]) for row in rows}


def _geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))
