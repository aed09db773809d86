"""What was measured, on what, against which target: a Markdown table and where it comes from."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import re
import subprocess
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

_RELATIONS = {"<=": "≤", ">=": "≥", "=": "="}


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
        target = f"{_RELATIONS[self.target[0]]} {self.target[1]:g}" if self.target else ""
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
    path = Path(__file__).parent / "results" / slug
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
    output = Path(__file__).parent / "results" / f"{name}.json"
    parser.add_argument("--output", type=Path, default=output, help=f"JSON file (default: results/{name}.json)")
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
