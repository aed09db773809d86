"""A run of the command: every model with every seed, kept on disk as it goes, reported at the end."""

import shlex
import signal
import threading
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

import torch
from rich.console import Console

from nesterov_triton.experiments.experiment import Experiment, Measurement, Settings
from nesterov_triton.experiments.folder import Folder, write_csv
from nesterov_triton.experiments.machine import machine
from nesterov_triton.experiments.processes import Processes
from nesterov_triton.experiments.progress import Display, counted, display
from nesterov_triton.experiments.report import (
    describe,
    draw,
    print_cells,
    print_table,
    summarise,
    write_summary,
)
from nesterov_triton.experiments.training import Run, Trainer

CHECKPOINT_SECONDS = 30.0  # between two checkpoints inside an epoch; one more is written at its end


class Runner:
    """Trains what a folder does not hold yet and reports everything it holds then.

    Args:
        experiment: what to train.
        settings: with what.
        folder: where results and checkpoints go; written to by the first process alone.
        data: the folder of data files.
        command: compare or reproduce, to be told how to go on.
        processes: those that take part.
        checkpoint_seconds: between two checkpoints inside an epoch.
    """

    def __init__(
        self,
        experiment: Experiment,
        settings: Settings,
        folder: Folder,
        *,
        data: Path = Path("."),
        command: str = "compare",
        processes: Processes | None = None,
        checkpoint_seconds: float = CHECKPOINT_SECONDS,
    ) -> None:
        self.experiment, self.settings, self.folder, self.data = experiment, settings, folder, data
        self.command, self.checkpoint_seconds = command, checkpoint_seconds
        self.processes = processes or Processes(settings.device)
        self.screen, self.notes = (console(stderr, quiet=not self.processes.leader) for stderr in (False, True))

    def __call__(self) -> int:
        """The exit code: 0, 1 if a run failed, 128 + the signal's number if interrupted."""
        if self.experiment.threads is None:
            return self._run()
        threads = torch.get_num_threads()
        torch.set_num_threads(self.experiment.threads)
        try:
            return self._run()
        finally:
            torch.set_num_threads(threads)

    def _run(self) -> int:
        settings, folder, leader = self.settings, self.folder, self.processes.leader
        about = f"{self.experiment.title}: {describe(settings)}, {settings.epochs} epochs"
        self.notes.print(f"{about} -> {folder.path}", soft_wrap=True)
        with Interruption() as interruption:
            try:
                # Seeds outside, so that an interrupted run has every model.
                done: dict[tuple[int, str], Run | None] = dict.fromkeys(product(settings.seeds, settings.models))
                if leader:
                    folder.prepare(settings)
                    done |= {(run.seed, run.model): run for run in folder.runs(settings)}
                    if not all(run is not None and finished(run, settings) for run in done.values()):
                        folder.credit(machine(self.processes.device, self.processes.size))
                with display(self.notes, settings) as shown:
                    for seed, model in done:
                        for run in self.train(model, seed, shown):
                            done[seed, model] = run
                            if leader:
                                folder.write_history(filter(None, done.values()))
                            interruption.check()
            except KeyboardInterrupt:
                interruption.came = interruption.came or signal.SIGINT
        # What is on disk is what a resumed run goes on from: report that, not what was in memory.
        failed = self.report(folder.runs(settings)) if leader else False
        if interruption.came is not None:
            words = ["nesterov-triton", self.command, settings.experiment, "--output", str(folder.path), "--resume"]
            self.notes.print(f"Interrupted; what is done is kept. Go on with:\n  {shlex.join(words)}", soft_wrap=True)
            return 128 + interruption.came
        return 1 if self.processes.share(failed) else 0

    def train(self, model: str, seed: int, shown: Display) -> Iterator[Run]:
        """Bring one run to its last epoch, or to its failure; yields it whenever an epoch's checkpoint is written."""
        stored = self.processes.share(self.folder.load(model, seed) if self.processes.leader else None)
        run = Run.from_dict(stored["run"]) if stored else None
        if run is not None and finished(run, self.settings):
            shown.start(run)
            yield run
        else:
            trainer = Trainer(self.experiment, self.settings, model, seed, self.data, self.processes)
            if stored:
                trainer.restore(stored)
            run = trainer.run
            shown.start(run)
            saved = time.monotonic()

            def save() -> None:
                nonlocal saved
                if self.processes.leader:
                    self.folder.save(trainer.state())
                saved = time.monotonic()

            def pause() -> None:
                if time.monotonic() - saved >= self.checkpoint_seconds:
                    save()

            while not finished(run, self.settings):
                trainer.advance(shown.batch, pause)
                save()
                if run.failure is None:
                    shown.epoch(run.history[-1])
                yield run
        shown.finish(run)

    def report(self, runs: list[Run]) -> bool:
        """Table, CSV and figures of what is done. Returns whether a run failed."""
        experiment, settings, folder = self.experiment, self.settings, self.folder
        if not any(run.history or run.failure for run in runs):
            self.notes.print("No epoch was finished: nothing to show.")
            return False
        rows = summarise(runs, settings)
        folder.write_history(runs)
        write_summary(folder.summary, rows)
        written = [folder.summary, folder.history, *folder.draw("figure", draw(runs, experiment, settings))]
        networks = {run.model: run.seed for run in reversed(runs) if run.history}  # of the first seed
        for name, figure in experiment.figures:
            trained = {model: self.network(model, networks[model]) for model in settings.models if model in networks}
            data = experiment.load(runs[0].seed, self.data)
            written += folder.draw(name, figure(trained, settings, data))
        print_table(rows, experiment, settings, self.screen)
        failures = [run for run in runs if run.failure is not None]
        for run in failures:
            assert run.failure is not None
            self.notes.print(
                f"{run.model} seed {run.seed}: {run.failure.message}", style="red", markup=False, soft_wrap=True
            )
        names = ", ".join(path.name for path in written)
        self.notes.print(f"Written to {folder.path}: {names}", soft_wrap=True)
        return bool(failures)

    def network(self, model: str, seed: int) -> Any:
        """A network as its checkpoint has it, on the CPU."""
        stored = self.folder.load(model, seed)
        assert stored is not None
        network = self.experiment.build(model, self.settings)
        network.load_state_dict(stored["network"])
        return network


def measure(experiment: Measurement, settings: Settings, folder: Folder, data: Path = Path(".")) -> int:
    """Run an experiment that trains nothing, and report it. Returns the exit code, 0."""
    screen, notes = console(False), console(True)
    notes.print(f"{experiment.title}: {describe(settings)} -> {folder.path}", soft_wrap=True)
    folder.prepare(settings)
    folder.credit(machine(settings.device, 1))
    rows: list[dict[str, Any]] = []
    with torch.no_grad(), counted(notes, len(settings.models) * len(settings.seeds)) as done:
        for model, seed in product(settings.models, settings.seeds):
            rows += [{"model": model, "seed": seed, **row} for row in experiment.measure(model, seed, settings, data)]
            done(f"{model} seed {seed}")
    write_csv(folder.history, rows[0], rows)
    headings, cells, figure = experiment.present(rows, settings)
    write_csv(folder.summary, headings, [dict(zip(headings, row, strict=True)) for row in cells])
    written = [folder.summary, folder.history, *folder.draw("figure", figure)]
    print_cells(headings, cells, f"{experiment.title}: {describe(settings)}", screen)
    notes.print(f"Written to {folder.path}: {', '.join(path.name for path in written)}", soft_wrap=True)
    return 0


def finished(run: Run, settings: Settings) -> bool:
    return run.failure is not None or len(run.history) >= settings.epochs


def console(stderr: bool, quiet: bool = False) -> Console:
    """A console; wide enough for the table where no terminal sets the width."""
    found = Console(stderr=stderr, quiet=quiet)
    return found if found.is_terminal else Console(stderr=stderr, quiet=quiet, width=200)


class Interruption:
    """Ctrl-C and SIGTERM as one KeyboardInterrupt, remembering which of them came."""

    def __init__(self) -> None:
        self.came: signal.Signals | None = None
        self.before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def check(self) -> None:
        """Raise what was swallowed: Python drops exceptions that a handler raises inside a destructor."""
        if self.came is not None:
            raise KeyboardInterrupt

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.came = signal.Signals(number)
        raise KeyboardInterrupt
