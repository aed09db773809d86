"""What is seen while a comparison runs: a live bar on a terminal, a few plain lines elsewhere."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from nesterov_triton.experiments.experiment import Settings
from nesterov_triton.experiments.training import Batch, Epoch, Run

LINES_PER_RUN = 10  # without a terminal


class Display(Protocol):
    """Told of everything that happens, in this order for each run: start, (batch..., epoch)..., finish."""

    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
    def start(self, run: Run) -> None: ...
    def batch(self, batch: Batch) -> None: ...
    def epoch(self, epoch: Epoch) -> None: ...
    def finish(self, run: Run) -> None: ...


def display(console: Console, settings: Settings) -> Display:
    return Bars(console, settings) if console.is_terminal else Lines(console, settings)


def numbers(epoch: Epoch) -> str:
    return f"loss {epoch.train_loss:.4f}  {tested(epoch)}  NFE {epoch.nfe_forward:.0f} + {epoch.nfe_backward:.0f}"


def tested(epoch: Epoch | None) -> str:
    """The last test's result: the accuracy, or the loss where there is none."""
    if epoch is None:
        return "tested  -- "
    if epoch.test_accuracy_percent is None:
        return f"test loss {epoch.test_loss:.4f}"
    return f"accuracy {epoch.test_accuracy_percent:5.2f} %"


def verdict(run: Run) -> str:
    if run.failure is not None:
        return f"failed in epoch {run.failure.epoch}: {run.failure.status}"
    return numbers(run.history[-1])


class Lines:
    """At most ``LINES_PER_RUN`` lines for each run."""

    def __init__(self, console: Console, settings: Settings) -> None:
        self.console = console
        self.epochs = settings.epochs
        self.total = len(settings.models) * len(settings.seeds)
        self.position = 0
        self.name = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def start(self, run: Run) -> None:
        self.position += 1
        self.name = f"[{self.position}/{self.total}] {run.model} seed {run.seed}"
        if run.history:
            self._print(f"{self.name}: goes on after epoch {len(run.history)}")

    def batch(self, batch: Batch) -> None:
        pass

    def epoch(self, epoch: Epoch) -> None:
        if epoch.epoch == self.epochs or epoch.epoch % max(1, self.epochs // LINES_PER_RUN) == 0:
            self._print(f"{self.name}: epoch {epoch.epoch}/{self.epochs}  {numbers(epoch)}  {epoch.seconds:.2f} s")

    def finish(self, run: Run) -> None:
        if run.failure is not None:
            self._print(f"{self.name}: {verdict(run)}")

    def _print(self, line: str) -> None:
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)


class Bars:
    """A bar for the run under way, a bar for all of them, and a line for each finished one."""

    def __init__(self, console: Console, settings: Settings) -> None:
        self.epochs = settings.epochs
        self.console = console
        self.current = Progress(
            TextColumn("{task.description}", style="bold"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            console=console,
            expand=True,
        )
        self.overall = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            expand=True,
        )
        self.runs = len(settings.models) * len(settings.seeds)
        self.run_task = self.current.add_task("loading data", total=self.epochs, numbers="")
        self.all_task = self.overall.add_task("all runs", total=self.runs * self.epochs)
        self.done = 0
        self.last: Epoch | None = None
        self.live = Live(Group(self.current, self.overall), console=console, transient=True)

    def __enter__(self) -> Self:
        self.live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.live.__exit__(kind, error, trace)

    def start(self, run: Run) -> None:
        self.last = run.history[-1] if run.history else None
        self.current.update(self.run_task, description=f"{run.model} seed {run.seed}")
        self._show(len(run.history), "")

    def batch(self, batch: Batch) -> None:
        nfe = f"{batch.nfe_forward:.0f} + {batch.nfe_backward:.0f}"
        text = f"loss {batch.loss:.4f}  {tested(self.last)}  NFE {nfe}"
        self._show(batch.epoch - 1 + batch.fraction, text)

    def epoch(self, epoch: Epoch) -> None:
        self.last = epoch
        self._show(epoch.epoch, numbers(epoch))

    def finish(self, run: Run) -> None:
        self.done += 1
        self._show(0, "")
        style = "red" if run.failure else "green"
        self.console.print(f"[{style}]{run.model} seed {run.seed}[/]  {verdict(run)}", highlight=False)

    def _show(self, epochs: float, text: str) -> None:
        # The count of epochs is shown whole; the bar for all runs moves with every batch.
        self.current.update(self.run_task, completed=int(epochs), numbers=text)
        self.overall.update(self.all_task, completed=self.done * self.epochs + epochs)


@contextmanager
def counted(console: Console, total: int) -> Iterator[Callable[[str], None]]:
    """A bar over ``total`` things: call what this gives with each one's name when it is done. Terminals only."""
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=None), MofNCompleteColumn())
    with Progress(*columns, console=console, expand=True, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=total)
        yield lambda name: progress.update(task, advance=1, description=name)
