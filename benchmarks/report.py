"""What was measured, on what, against which target: a Markdown table and where it comes from."""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import os
import platform
import re
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
RELATIONS = {"<=": "≤", ">=": "≥", "=": "="}


@dataclass(frozen=True)
class Line:
    """One line of the table.

    Attributes:
        what: the quantity.
        value: what was measured.
        target: (relation, number) with the relation "<=", ">=" or "=" (to 0.01, for counts of bytes that a few scalars
            blur); None for a line that is there for information.
        note: said in brackets behind the quantity.
    """

    what: str
    value: float
    target: tuple[str, float] | None = None
    note: str = ""

    @property
    def met(self) -> bool | None:
        if self.target is None:
            return None
        relation, number = self.target
        if relation == "=":
            return abs(self.value - number) <= 0.01
        return self.value <= number if relation == "<=" else self.value >= number

    def row(self) -> str:
        what = f"{self.what} ({self.note})" if self.note else self.what
        target = f"{RELATIONS[self.target[0]]} {self.target[1]:g}" if self.target else ""
        met = {None: "", True: "yes", False: "**no**"}[self.met]
        return f"| {what} | {self.value:.3g} | {target} | {met} |"


def table(lines: list[Line]) -> str:
    return "\n".join(["| | measured | target | met |", "|---|---:|---:|---|", *(line.row() for line in lines)])


def machine() -> str:
    """The processor's own name, its cores and the operating system."""
    name = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.exists():
        names = [line.split(":")[1].strip() for line in information.read_text().splitlines() if "model name" in line]
        name = names[0] if names else name
    return f"{name}, {os.cpu_count()} cores, {platform.system()} {platform.machine()}"


def folder() -> Path:
    """Where this machine's results are kept, under a name made of the machine's own."""
    slug = re.sub(r"[^a-z0-9]+", "-", machine().lower()).strip("-")
    path = RESULTS / slug
    path.mkdir(parents=True, exist_ok=True)
    return path


def versions(*packages: str) -> dict[str, str]:
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def installed(*packages: str) -> list[str]:
    """Those that are."""
    return [name for name in packages if importlib.util.find_spec(name) is not None]


def today() -> str:
    return datetime.now(UTC).date().isoformat()


def commit() -> str:
    """Short hash, with "+" where the code that ran is not the code that was committed; empty outside a checkout."""

    def git(*arguments: str) -> str:
        here = Path(__file__).parent
        return subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=False).stdout.strip()

    changed = git("status", "--porcelain", "--", "*.py", "../nesterov_triton")
    return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")


def origin(packages: Sequence[str]) -> dict[str, Any]:
    """Where and when a number comes from; without the machine."""
    return {"date": today(), "commit": commit(), "versions": versions("nesterov-triton", *packages)}


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def keep_rows(
    path: Path,
    columns: Sequence[str],
    key: str,
    value: str,
    rows: Sequence[Mapping[str, Any]],
    packages: Sequence[str],
    machine: str = "",
) -> None:
    """Put rows into a CSV file in the place of those whose column `key` is `value`; the other rows stay.

    Beside it a JSON file says for each value where its rows come from, and on which machine, if that matters.
    """
    stored = read_rows(path)
    place = next((i for i, row in enumerate(stored) if row[key] == value), len(stored))
    before, after = ([row for row in part if row[key] != value] for part in (stored[:place], stored[place:]))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows([*before, *rows, *after])
    about = path.with_suffix(".json")
    known = json.loads(about.read_text()) if about.exists() else {}
    origins = known.get("origins", {}) | {value: origin(packages)}
    header = {"machine": machine} if machine else {}
    about.write_text(json.dumps(header | {"origins": origins}, indent=1) + "\n")


def run(
    name: str,
    description: str,
    problem: str,
    measure: Callable[[int], tuple[list[Line], dict[str, Any]]],
    *packages: str,
) -> None:
    """What a benchmark's command does: options, one thread, `measure(rounds)`, a Markdown table and a JSON file.

    Args:
        name: of the module, and of its file in `benchmarks/results`.
        problem: what is measured on, in words.
        packages: whose versions count.
    """
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=description)
    parser.add_argument("--rounds", type=int, default=60, help="rounds of the timed contenders (default: %(default)s)")
    output = folder() / f"{name}.json"
    parser.add_argument("--output", type=Path, default=output, help="JSON file (default: in this machine's folder)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    lines, numbers = measure(arguments.rounds)
    header = {
        "problem": problem,
        "machine": f"{machine()}, one thread",
        "versions": versions(*packages),
        "date": today(),
        "commit": commit(),
        "rounds": arguments.rounds,
    }
    rows = [asdict(line) | {"met": line.met} for line in lines]
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(header | {"table": rows} | numbers, indent=1) + "\n")
    said = ", ".join(f"{package} {number}" for package, number in versions(*packages).items())
    print(f"{problem}.\n{header['machine']}; {said}; {header['date']}, commit {header['commit']}.\n")
    print(table(lines))
