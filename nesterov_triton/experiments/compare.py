"""The comparison: every model with every seed, kept on disk after each epoch, reported at the end."""

import shlex
import signal
import threading
from collections.abc import Iterator
from itertools import product
from types import FrameType, TracebackType
from typing import Any, Self

import torch
from rich.console import Console

from nesterov_triton.experiments.experiment import Experiment, Settings
from nesterov_triton.experiments.folder import Folder
from nesterov_triton.experiments.progress import Display, display
from nesterov_triton.experiments.report import describe, draw, print_table, summarise, write_summary
from nesterov_triton.experiments.training import Run, Trainer


def compare(experiment: Experiment, settings: Settings, folder: Folder) -> int:
    """Train what ``folder`` does not hold yet and report everything it holds then.

    Returns the exit code: 0, 1 if a run failed, 128 + the signal's number if interrupted.
    """
    # One thread: on networks this small a second one gains nothing, and each wait for it while another process holds
    # its core made an epoch of the digits take 2.9 s instead of 0.4.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _compare(experiment, settings, folder)
    finally:
        torch.set_num_threads(threads)


def _compare(experiment: Experiment, settings: Settings, folder: Folder) -> int:
    screen, notes = console(stderr=False), console(stderr=True)
    notes.print(f"{experiment.title}: {describe(settings)}, {settings.epochs} epochs -> {folder.path}", soft_wrap=True)
    with Interruption() as interruption:
        try:
            folder.prepare(settings)
            with display(notes, settings) as shown:
                # Seeds outside, so that an interrupted comparison has every model.
                done: dict[tuple[int, str], Run | None] = dict.fromkeys(product(settings.seeds, settings.models))
                done |= {(run.seed, run.model): run for run in folder.runs(settings)}
                for seed, model in done:
                    for run in train(experiment, settings, folder, model, seed, shown):
                        done[seed, model] = run
                        folder.write_history(filter(None, done.values()))
                        interruption.check()
        except KeyboardInterrupt:
            interruption.came = interruption.came or signal.SIGINT
    # What is on disk is what a resumed comparison goes on from: report that, not what was in memory.
    runs = folder.runs(settings)
    failed = report(experiment, settings, folder, runs, screen, notes)
    if interruption.came is not None:
        command = shlex.join(
            ["nesterov-triton", "compare", settings.experiment, "--output", str(folder.path), "--resume"]
        )
        notes.print(f"Interrupted; finished epochs are kept. Go on with:\n  {command}", soft_wrap=True)
        return 128 + interruption.came
    return 1 if failed else 0


def train(
    experiment: Experiment, settings: Settings, folder: Folder, model: str, seed: int, shown: Display
) -> Iterator[Run]:
    """Bring one run to its last epoch, or to its failure; yields it whenever its checkpoint has been written."""
    stored = folder.load(model, seed)
    run = Run.from_dict(stored["run"]) if stored else None
    if run is not None and finished(run, settings):
        shown.start(run)
        yield run
    else:
        trainer = Trainer(experiment, settings, model, seed)
        if stored:
            trainer.restore(stored)
        run = trainer.run
        shown.start(run)
        while not finished(run, settings):
            trainer.advance(shown.batch)
            folder.save(trainer.state())
            if run.failure is None:
                shown.epoch(run.history[-1])
            yield run
    shown.finish(run)


def finished(run: Run, settings: Settings) -> bool:
    return run.failure is not None or len(run.history) >= settings.epochs


def report(
    experiment: Experiment, settings: Settings, folder: Folder, runs: list[Run], screen: Console, notes: Console
) -> bool:
    """Table, CSV and figure of what is done. Returns whether a run failed."""
    if not any(run.history or run.failure for run in runs):
        notes.print("No epoch was finished: nothing to show.")
        return False
    rows = summarise(runs, settings)
    folder.write_history(runs)
    write_summary(folder.summary, rows)
    draw(folder.figure, runs, experiment, settings)
    print_table(rows, experiment, settings, screen)
    failures = [run for run in runs if run.failure is not None]
    for run in failures:
        assert run.failure is not None
        notes.print(f"{run.model} seed {run.seed}: {run.failure.message}", style="red", markup=False, soft_wrap=True)
    written = ", ".join(path.name for path in (folder.summary, folder.history, folder.figure))
    notes.print(f"In {folder.path}: {written}", soft_wrap=True)
    return bool(failures)


def console(*, stderr: bool) -> Console:
    """A console; wide enough for the table where no terminal sets the width."""
    found = Console(stderr=stderr)
    return found if found.is_terminal else Console(stderr=stderr, width=200)


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
