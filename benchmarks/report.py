"""What was measured, on what, against which target: a Markdown table and where it comes from."""

from __future__ import annotations

import importlib.util
import os
import platform
import subprocess
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

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
