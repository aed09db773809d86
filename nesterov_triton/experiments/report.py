"""The end of a comparison: one table, on the screen and as CSV, and one figure."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from nesterov_triton.experiments.experiment import Experiment, Settings
from nesterov_triton.experiments.folder import write_csv
from nesterov_triton.experiments.training import Epoch, Run


@dataclass(frozen=True)
class Column:
    """A measured quantity: its name in the CSV, its heading on the screen, and how to read it from a run.

    ``value`` is given all runs too, for what is relative to another model's; None where there is no such number.
    """

    name: str
    heading: str
    format: str
    value: Callable[[Run, Sequence[Run]], float | None]


def last(name: str) -> Callable[[Run, Sequence[Run]], float | None]:
    """What the last epoch has under this name."""
    return lambda run, runs: getattr(run.history[-1], name)


def evaluations(epoch: Epoch) -> float:
    """Forward and backward, of a batch."""
    return epoch.nfe_forward + epoch.nfe_backward


def cost_of_nodes_loss(run: Run, runs: Sequence[Run]) -> float | None:
    """How much of NODE's evaluations, in percent, this run took until its training loss was NODE's last one.

    Of the NODE run with the same seed, forward and backward over all its epochs; None where this run never got there.
    """
    node = next((other for other in runs if other.model == "NODE" and other.seed == run.seed and other.history), None)
    if node is None:
        return None
    aim, spent = node.history[-1].train_loss, 0.0
    for epoch in run.history:
        spent += evaluations(epoch)
        if epoch.train_loss <= aim:
            return 100 * spent / sum(map(evaluations, node.history))
    return None


COLUMNS = (
    Column("test_accuracy_percent", "test\nacc. %", ".2f", last("test_accuracy_percent")),
    Column("test_loss", "test\nloss", ".4f", last("test_loss")),
    Column("train_loss", "train\nloss", ".4f", last("train_loss")),
    Column("nfe_forward", "NFE\nfwd", ".1f", last("nfe_forward")),
    Column("nfe_backward", "NFE\nbwd", ".1f", last("nfe_backward")),
    Column("nfe_to_node_loss_percent", "to NODE's\nloss, %", ".1f", cost_of_nodes_loss),
    Column("seconds_per_epoch", "s per\nepoch", ".3f", lambda run, runs: fmean(row.seconds for row in run.history)),
)


@dataclass(frozen=True)
class Row:
    """A model: (mean, standard deviation over seeds or None) of each column; empty before its first epoch."""

    model: str
    values: dict[str, tuple[float, float | None]]
    parameters: int | None
    status: str


def summarise(runs: Sequence[Run], settings: Settings) -> list[Row]:
    """A row for each model: the last epoch of its complete runs, or, while there is none, of those begun."""
    rows = []
    for model in settings.models:
        own = [run for run in runs if run.model == model]
        complete = [run for run in own if run.failure is None and len(run.history) >= settings.epochs]
        begun = complete or [run for run in own if run.history]
        values = {}
        for column in COLUMNS if begun else ():
            found = [column.value(run, runs) for run in begun]
            measured = [value for value in found if value is not None]
            if measured and len(measured) == len(found):  # a mean over some of the seeds would flatter
                values[column.name] = (fmean(measured), stdev(measured) if len(measured) > 1 else None)
        rows.append(Row(model, values, own[0].parameters if own else None, _status(own, len(complete), settings)))
    return rows


def _status(runs: Sequence[Run], complete: int, settings: Settings) -> str:
    """That all is done, or what failed and how far the rest is."""
    if complete == len(settings.seeds):
        return "done"
    if not runs:
        return "not started"
    several = len(settings.seeds) > 1
    notes = [f"{complete} of {len(settings.seeds)} seeds"] if several else []
    for run in runs:
        if run.failure is not None:
            which = f", seed {run.seed}" if several else ""
            notes.append(f"failed: {run.failure.status} in epoch {run.failure.epoch}{which}")
        elif not several:
            notes.append(f"{len(run.history)} of {settings.epochs} epochs")
    return "; ".join(notes)


def cells(row: Row) -> list[str]:
    """The row as the screen shows it."""
    shown = [row.model]
    for column in COLUMNS:
        mean, deviation = row.values.get(column.name, (None, None))
        text = "-" if mean is None else format(mean, column.format)
        shown.append(text if deviation is None else f"{text} ± {deviation:{column.format}}")
    return [*shown, "-" if row.parameters is None else str(row.parameters), row.status]


def print_table(rows: Sequence[Row], experiment: Experiment, settings: Settings, console: Console) -> None:
    over = f", mean ± standard deviation over {len(settings.seeds)} seeds" if len(settings.seeds) > 1 else ""
    table = Table(
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        title=f"{experiment.title}: {describe(settings)}",
        caption=f"last epoch{over}; NFE: evaluations of the field per training batch, forward and backward; "
        "to NODE's loss: its share of NODE's evaluations in all epochs; s per epoch: training only",
    )
    table.add_column("model", style="bold", no_wrap=True)
    for heading in [*(column.heading for column in COLUMNS), "para-\nmeters"]:
        table.add_column(heading, justify="right", no_wrap=not over)
    table.add_column("status")
    for row in rows:
        table.add_row(*cells(row), style="red" if "failed" in row.status else None)
    console.print(table)


def write_summary(path: Path, rows: Sequence[Row]) -> None:
    """The table's rows in full precision; ``*_std`` is empty for one seed."""
    names = [name for column in COLUMNS for name in (column.name, f"{column.name}_std")]
    lines: list[dict[str, Any]] = []
    for row in rows:
        line: dict[str, Any] = {"model": row.model, "parameters": row.parameters, "status": row.status}
        for name, (mean, deviation) in row.values.items():
            line |= {name: mean, f"{name}_std": deviation}
        lines.append(line)
    write_csv(path, ["model", *names, "parameters", "status"], lines)


def print_cells(headings: Sequence[str], rows: Sequence[Sequence[str]], title: str, console: Console) -> None:
    """A table of texts."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, title=title)
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="right" if i else "left", style=None if i else "bold")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def describe(settings: Settings) -> str:
    """The settings that say what was solved and how, where they are not the usual ones."""
    step = f", step {settings.step_size:g}" if settings.step_size is not None else ""
    parts = [
        f"{settings.method}{step}, tolerance {settings.tolerance:g}, gradient {settings.gradient}, gate {settings.gate}"
    ]
    if settings.xi != "learnable":
        parts.append(f"xi {settings.xi:g}")
    if settings.damping_factor != 3:
        parts.append(f"damping {settings.damping_factor:g}/t")
    if settings.limit is not None:
        parts.append(f"{settings.limit} rows")
    return ", ".join(parts)


# Relatives share a hue: grey first order, blue heavy ball, orange Nesterov; all apart for colour-blind readers.
COLOURS = {
    "NODE": "#333333",
    "ANODE": "#999999",
    "SONODE": "#009e73",
    "HBNODE": "#0072b2",
    "GHBNODE": "#56b4e9",
    "NesterovNODE": "#e69f00",
    "GNesterovNODE": "#d55e00",
}
DECADES = 1e-6  # of a loss that are shown
Panel = tuple[str, str, Callable[[Epoch], float | None]]
LOSS: Panel = ("training loss", "mean over the epoch, log scale", lambda epoch: epoch.train_loss)
TEST_LOSS: Panel = ("test loss", "log scale", lambda epoch: epoch.test_loss)
ACCURACY: Panel = ("test accuracy", "% of the held-out data", lambda epoch: epoch.test_accuracy_percent)
FORWARD: Panel = ("NFE forward", "evaluations per batch", lambda epoch: epoch.nfe_forward)
BACKWARD: Panel = ("NFE backward", "evaluations per batch", lambda epoch: epoch.nfe_backward)


def style(model: str) -> dict[str, Any]:
    """Colour and dashes of a model's curve; the published code's variants are dashed."""
    name, _, published = model.partition("-")
    return {"color": COLOURS[name], "linestyle": "--" if published else "-"}


def draw(runs: Sequence[Run], experiment: Experiment, settings: Settings) -> Any:
    """The curves against the epoch, a matplotlib figure: mean over seeds, in the band from least to greatest."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

    figure = Figure(figsize=(10, 7.2), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True).ravel()
    panels = (TEST_LOSS if experiment.accuracy is None else ACCURACY, LOSS, FORWARD, BACKWARD)
    for axis, (title, unit, value) in zip(axes, panels, strict=True):
        for i, model in enumerate(settings.models):
            curves = [[value(epoch) for epoch in run.history] for run in runs if run.model == model and run.history]
            if not curves:
                continue
            length = max(map(len, curves))
            at_epoch = [
                [x for curve in curves if k < len(curve) and (x := curve[k]) is not None] for k in range(length)
            ]
            epochs = range(1, length + 1)
            mean = [fmean(values) for values in at_epoch]
            # Counts often coincide: there each curve is thinner than the one below it, so that all stay visible.
            width = 1.4 + 3 * (1 - (i + 1) / len(settings.models)) if title.startswith("NFE") else 1.8
            marker = "o" if length == 1 else None
            axis.plot(epochs, mean, label=model, linewidth=width, marker=marker, **style(model))
            if len(curves) > 1:
                low, high = [min(values) for values in at_epoch], [max(values) for values in at_epoch]
                axis.fill_between(epochs, low, high, color=style(model)["color"], alpha=0.15, linewidth=0)
        axis.set_title(title, loc="left", fontsize=11, fontweight="bold")
        axis.set_ylabel(unit)
        axis.grid(True, color="#e5e5e5", linewidth=0.8)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        if title.endswith("loss"):
            axis.set_yscale("log", nonpositive="clip")
            low, high = axis.get_ylim()
            low = max(low, DECADES * high)  # a loss can become 0
            axis.set_ylim(low, high)
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter(NullFormatter())
    for axis in axes[2:]:
        axis.set_ylim(bottom=0)
        axis.set_xlabel("epoch")
    begun = len({run.seed for run in runs if run.history})
    seeds = f", mean and range of {begun} seeds" if begun > 1 else ""
    figure.suptitle(f"{experiment.title}: {describe(settings)}{seeds}", fontsize=12)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(5, len(labels)), frameon=False)
    return figure
