"""The output folder. Every file is replaced as a whole, so that a kill at any moment leaves the old or the new one."""

import csv
import io
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

from nesterov_triton.experiments.experiment import CommandError, Settings
from nesterov_triton.experiments.training import Epoch, Run

TEMPORARY = ".nesterov-tmp"
HISTORY_COLUMNS = ("model", "seed", *(column.name for column in fields(Epoch)))


class Folder:
    """Settings, machines, one checkpoint a run and the history; later the summary and the figures.

    Settings and checkpoints alone are read back; the other files are written from them.
    """

    figures = ("figure", "features")  # names without .png and .pdf

    def __init__(self, path: Path) -> None:
        self.path = path
        self.settings_path = path / "settings.json"
        self.checkpoints = path / "checkpoints"
        self.machines = path / "machines.json"
        self.history = path / "history.csv"
        self.summary = path / "summary.csv"

    def is_empty(self) -> bool:
        """No file but those that a killed write left half done."""
        if not self.path.is_dir():
            return not self.path.exists()
        files = [p for p in self.path.iterdir() if p != self.checkpoints] + list(self.checkpoints.glob("*"))
        return set(files) <= set(self._leftovers())

    def clear(self) -> None:
        """Remove the files of an earlier comparison, and nothing that is not ours."""
        drawn = [self.path / f"{name}.{kind}" for name in self.figures for kind in ("png", "pdf")]
        tables = (self.settings_path, self.machines, self.history, self.summary)
        for path in (*tables, *drawn, *self.checkpoints.glob("*-seed*.pt")):
            path.unlink(missing_ok=True)

    def prepare(self, settings: Settings) -> None:
        """Write the settings."""
        with self._writing():
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            for leftover in self._leftovers():
                leftover.unlink(missing_ok=True)
            write(self.settings_path, (json.dumps(asdict(settings), indent=2) + "\n").encode())

    def credit(self, machine: dict[str, Any]) -> None:
        """Write the machine under those that worked here before."""
        with self._writing():
            before = json.loads(self.machines.read_text()) if self.machines.exists() else []
            if machine not in before:
                write(self.machines, (json.dumps([*before, machine], indent=2) + "\n").encode())

    def settings(self) -> Settings | None:
        """The stored settings; None in an empty folder."""
        if self.is_empty():
            return None
        try:
            stored = json.loads(self.settings_path.read_text())
            return Settings(**stored | {"models": tuple(stored["models"]), "seeds": tuple(stored["seeds"])})
        except FileNotFoundError:
            message = f"{self.path} holds files, but no run (no settings.json); choose another --output"
        except (ValueError, TypeError, KeyError, OSError) as error:
            message = f"cannot read {self.settings_path} ({error}); start anew with --overwrite"
        raise CommandError(message)

    def save(self, state: dict[str, Any]) -> None:
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write(self._checkpoint(state["run"]["model"], state["run"]["seed"]), buffer.getvalue())

    def load(self, model: str, seed: int) -> dict[str, Any] | None:
        path = self._checkpoint(model, seed)
        if not path.exists():
            return None
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        return state

    def runs(self, settings: Settings) -> list[Run]:
        """What is stored, all models with the first seed, then with the next."""
        states = (self.load(model, seed) for seed in settings.seeds for model in settings.models)
        return [Run.from_dict(state["run"]) for state in states if state is not None]

    def write_history(self, runs: Iterable[Run]) -> None:
        rows = [{"model": run.model, "seed": run.seed, **asdict(epoch)} for run in runs for epoch in run.history]
        write_csv(self.history, HISTORY_COLUMNS, rows)

    def draw(self, name: str, figure: Any) -> list[Path]:
        """Write a matplotlib figure as PNG and as PDF; gives their paths."""
        assert name in self.figures
        paths = []
        for kind in ("png", "pdf"):
            image = io.BytesIO()
            # Without its date, so that the same numbers give the same file.
            figure.savefig(image, dpi=110, format=kind, metadata={"CreationDate": None} if kind == "pdf" else None)
            paths.append(self.path / f"{name}.{kind}")
            write(paths[-1], image.getvalue())
        return paths

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CommandError(f"cannot write to {self.path}: {error}; choose another --output") from error

    def _leftovers(self) -> list[Path]:
        return [path for folder in (self.path, self.checkpoints) for path in folder.glob(f".*{TEMPORARY}")]

    def _checkpoint(self, model: str, seed: int) -> Path:
        return self.checkpoints / f"{model}-seed{seed}.pt"


def write_csv(path: Path, columns: Iterable[str], rows: Iterable[dict[str, Any]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write(path, text.getvalue().encode())


def write(path: Path, content: bytes) -> None:
    """Write beside, flush to the disk, then rename over: never a torn file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY}")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()
