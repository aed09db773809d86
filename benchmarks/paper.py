"""Gather runs of ``nesterov-triton reproduce`` and write the page that puts them beside the paper's claims.

    python -m benchmarks.paper /path/to/outputs

takes from each known folder there what is small (settings, machines, tables, figures; no checkpoints) to
benchmarks/results/paper/, and writes its README.md from the histories. Seeds that are not complete are left out.
"""

from __future__ import annotations

import csv
import json
import shutil
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

HERE = Path(__file__).parent / "results" / "paper"
KEPT = ("settings.json", "machines.json", "history.csv", "summary.csv", "figure.png", "figure.pdf")
KEPT_TOO = ("features.png", "features.pdf")
MODELS = ("NODE", "ANODE", "SONODE", "HBNODE", "GHBNODE", "NesterovNODE", "GNesterovNODE")
AIM = 60.0  # percent of NODE's evaluations


@dataclass(frozen=True)
class Source:
    """A folder of results.

    Attributes:
        path: its path.
        title: what to call it.
        node: where NODE's runs are, if not in it.
        note: said above its table.
        judged: whether it can say anything of the claims.
    """

    path: str
    title: str
    node: str = ""
    note: str = ""
    judged: bool = True


AUTO = (
    "`--method auto --tolerance 1e-6`, which takes `nystrom4` for these models. Its errors there are about those of "
    "dopri5 at 1e-7, or less (`benchmarks.structure`). NODE's runs are those of dopri5 at 1e-7."
)
SOURCES = (
    Source("point-cloud/softclip-discrete", "Point clouds, gate softclip, gradient discrete"),
    Source(
        "point-cloud/linear-readout",
        "Point clouds, gate softclip, gradient discrete, linear readout",
        note="`compare point-cloud` with the paper's 200 epochs: the readout without the released code's hardtanh(±1), "
        "in which a run can die (no gradient comes from outputs beyond ±1, right or wrong).",
    ),
    Source(
        "point-cloud/hardtanh-discrete",
        "Point clouds, gate hardtanh(±5), gradient discrete",
        "point-cloud/softclip-discrete",
        "Gated models only; the others are those of softclip.",
    ),
    Source("point-cloud/softclip-adjoint", "Point clouds, gate softclip, gradient adjoint"),
    Source(
        "point-cloud/hardtanh-adjoint",
        "Point clouds, gate hardtanh(±5), gradient adjoint (all as published)",
        "point-cloud/softclip-adjoint",
        "Gated models only; the others are those of softclip.",
    ),
    Source(
        "point-cloud/auto",
        "Point clouds, gate softclip, gradient discrete, method auto",
        "point-cloud/softclip-discrete",
        AUTO,
    ),
    Source(
        "point-cloud/linear-readout-auto",
        "Point clouds, gate softclip, gradient discrete, linear readout, method auto",
        "point-cloud/linear-readout",
        AUTO,
    ),
    Source("mnist", "MNIST, a subset"),
    Source("walker2d", "Walker2d, a subset"),
    Source(
        "cifar10-smoke", "CIFAR-10, a smoke run", note="The images at hand were encoded anew as JPEG.", judged=False
    ),
)
SILVERBOX = (
    Source("silverbox/softclip", "Silverbox, gate softclip(0.25)"),
    Source("silverbox/hardtanh", "Silverbox, gate hardtanh(±0.25), as published"),
)


@dataclass
class Curve:
    """One training to its last epoch."""

    train_loss: list[float] = field(default_factory=list)
    test_loss: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    forward: list[float] = field(default_factory=list)
    backward: list[float] = field(default_factory=list)

    @property
    def evaluations(self) -> list[float]:
        return [f + b for f, b in zip(self.forward, self.backward, strict=True)]


Curves = dict[str, dict[str, Curve]]  # by model, then by seed


def curves(folder: Path, settings: dict[str, Any]) -> Curves:
    """The complete runs of a history."""
    found: Curves = defaultdict(lambda: defaultdict(Curve))
    for row in read(folder / "history.csv"):
        curve = found[row["model"]][row["seed"]]
        curve.train_loss.append(float(row["train_loss"]))
        curve.test_loss.append(float(row["test_loss"]))
        if row["test_accuracy_percent"]:
            curve.accuracy.append(float(row["test_accuracy_percent"]))
        curve.forward.append(float(row["nfe_forward"]))
        curve.backward.append(float(row["nfe_backward"]))
    epochs = settings["epochs"]
    complete = {
        model: {seed: curve for seed, curve in runs.items() if len(curve.train_loss) == epochs}
        for model, runs in found.items()
    }
    return {model: runs for model, runs in complete.items() if runs}


def read(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def shares(own: dict[str, Curve], node: dict[str, Curve]) -> list[float | None]:
    """For each seed that both have, the share of NODE's evaluations until NODE's final training loss; None: never."""
    found: list[float | None] = []
    for seed, curve in own.items():
        if seed not in node:
            continue
        spent, share = 0.0, None
        for loss, evaluations in zip(curve.train_loss, curve.evaluations, strict=True):
            spent += evaluations
            if loss <= node[seed].train_loss[-1]:
                share = 100 * spent / sum(node[seed].evaluations)
                break
        found.append(share)
    return found


def spread(values: Sequence[float], form: str) -> str:
    text = format(fmean(values), form)
    return f"{text} ± {stdev(values):{form}}" if len(values) > 1 else text


def share_text(found: Sequence[float | None]) -> str:
    reached = [each for each in found if each is not None]
    if not reached:
        return f"never ({len(found)})" if found else "-"
    return f"{median(reached):.1f} ({len(reached)} of {len(found)})"


def table(data: Curves, node: dict[str, Curve]) -> Iterable[str]:
    has_accuracy = any(curve.accuracy for runs in data.values() for curve in runs.values())
    tested = "test acc. %" if has_accuracy else "test loss"
    headings = ("model", "seeds", "train loss", tested, "NFE forward", "NFE backward", "evaluations in all", SHARE)
    yield "| " + " | ".join(headings) + " |"
    yield "|---|" + "---:|" * (len(headings) - 1)
    for model, runs in data.items():
        own = list(runs.values())
        test = [curve.accuracy[-1] if has_accuracy else curve.test_loss[-1] for curve in own]
        cells = (
            model,
            str(len(own)),
            spread([curve.train_loss[-1] for curve in own], ".4f"),
            spread(test, ".2f" if has_accuracy else ".4f"),
            spread([fmean(curve.forward) for curve in own], ".0f"),
            spread([fmean(curve.backward) for curve in own], ".0f"),
            spread([sum(curve.evaluations) / 1000 for curve in own], ".1f"),
            share_text(shares(runs, node)),
        )
        yield "| " + " | ".join(cells) + " |"


def claims(source: Source, data: Curves, node: dict[str, Curve]) -> Iterable[str]:
    """Each claim with what was measured, for one folder."""
    if not node:
        return
    for model in ("NesterovNODE", "GNesterovNODE"):
        if model not in data:
            continue
        own = data[model]
        common = [seed for seed in own if seed in node]
        if not common:
            continue
        row = [source.title, model]
        for name in ("forward", "backward"):
            ours = fmean(fmean(getattr(own[seed], name)) for seed in common)
            theirs = fmean(fmean(getattr(node[seed], name)) for seed in common)
            row.append(f"{verdict(ours < theirs)}: {ours:.0f}, NODE {theirs:.0f}")
        if own[common[0]].accuracy:
            ours, theirs = (fmean(each[seed].accuracy[-1] for seed in common) for each in (own, node))
            row.append(f"{verdict(ours > theirs)}: {ours:.2f} %, NODE {theirs:.2f} %")
        else:
            ours, theirs = (fmean(each[seed].test_loss[-1] for seed in common) for each in (own, node))
            row.append(f"{verdict(ours < theirs)}: test loss {ours:.4f}, NODE {theirs:.4f}")
        found = shares(own, node)
        within = sum(each is not None and each <= AIM for each in found)
        row.append(f"{verdict(within == len(found))}: {within} of {len(found)} seeds; median {share_text(found)}")
        yield "| " + " | ".join(row) + " |"


def verdict(holds: bool) -> str:
    return "yes" if holds else "**no**"


def gather(outputs: Path, source: Source) -> dict[str, Any] | None:
    """Copy what is small; the settings, or None where there is nothing yet."""
    folder = outputs / source.path
    if folder.resolve() != (HERE / source.path).resolve() and (folder / "history.csv").exists():
        (HERE / source.path).mkdir(parents=True, exist_ok=True)
        for name in (*KEPT, *KEPT_TOO):
            if (folder / name).exists():
                shutil.copyfile(folder / name, HERE / source.path / name)
    try:
        settings: dict[str, Any] = json.loads((HERE / source.path / "settings.json").read_text())
    except FileNotFoundError:
        return None
    return settings


def conditions(source: Source, settings: dict[str, Any]) -> str:
    machines = json.loads((HERE / source.path / "machines.json").read_text())
    last = machines[-1]
    commits = ", ".join(dict.fromkeys(each["commit"][:10] for each in machines))
    asked = f"{settings['epochs']} epochs, batches of {settings['batch_size']}, tolerance {settings['tolerance']:g}"
    rows = "" if settings["limit"] is None else f", {settings['limit']} training and at most as many test rows"
    return (
        f"{asked}{rows}; {last['processor']}, {last['threads']} thread(s), Python {last['python']}, torch "
        f"{last['torch']}, commit {commits}."
    )


def page(outputs: Path) -> str:
    known = {source: settings for source in SOURCES if (settings := gather(outputs, source)) is not None}
    data = {source: curves(HERE / source.path, settings) for source, settings in known.items()}
    by_path = {source.path: each for source, each in data.items()}
    nodes = {source: by_path.get(source.node or source.path, {}).get("NODE", {}) for source in known}

    lines = [INTRODUCTION]
    lines += ["## The claims, one by one\n"]
    lines += [
        "| experiment | model | fewer NFE forward than NODE? | backward? | better on test data? | " + TARGET + " |"
    ]
    lines += ["|---|---|---|---|---|---|"]
    for source in filter(lambda source: source.judged, known):
        lines += claims(source, data[source], nodes[source])
    missing = [source.title for source in SOURCES if source not in known]
    if missing:
        lines += ["", f"Not run yet: {'; '.join(missing)}."]
    lines += ["", FINDINGS]
    for source in known:
        lines += [f"## {source.title}\n", conditions(source, known[source]), ""]
        lines += [source.note, ""] if source.note else []
        lines += table(data[source], nodes[source])
        settings = known[source]
        undone = sum(len(settings["seeds"]) - len(data[source].get(model, {})) for model in settings["models"])
        if undone:
            lines += ["", f"{undone} of {len(settings['seeds']) * len(settings['models'])} runs are not done."]
        lines += ["", f"![curves]({source.path}/figure.png)", ""]
        if (HERE / source.path / "features.png").exists():
            lines += [f"![trajectories]({source.path}/features.png)", ""]
    for source in SILVERBOX:
        silverbox_settings = gather(outputs, source)
        if silverbox_settings is None:
            continue
        rows = read(HERE / source.path / "summary.csv")
        lines += [f"## {source.title}\n"]
        lines += ["| " + " | ".join(rows[0]) + " |", "|---|" + "---:|" * (len(rows[0]) - 1)]
        lines += ["| " + " | ".join(row.values()) + " |" for row in rows]
        lines += ["", f"![norms]({source.path}/figure.png)", ""]
    lines += [HOW]
    return "\n".join(lines)


SHARE = "to NODE's loss, %"
TARGET = f"NODE's final training loss at ≤ {AIM:.0f} % of NODE's evaluations?"

INTRODUCTION = """# The paper's experiments, as measured

Written by `python -m benchmarks.paper` from the histories beside it; "What was found" alone is written by hand.

Loss and accuracy are those of the last epoch; NFE is the mean over all epochs and batches; "evaluations in all" is
forward and backward, of a batch, summed over the epochs, in thousands. Mean ± standard deviation over seeds. "To NODE's
loss" is the share of NODE's evaluations in all its epochs (same seed) that a model took until its training loss was
NODE's last one: the median over the seeds that got there, and how many did.
"""

FINDINGS = (HERE / "findings.md").read_text(encoding="utf-8") if (HERE / "findings.md").exists() else ""

HOW = """## To go on

Every folder here comes from one command, `nesterov-triton reproduce EXPERIMENT` with the options in its settings.json;
add `--resume` in a folder with checkpoints to go on with it, `--device cuda` for a GPU, and `torchrun --nproc-per-node
N -m nesterov_triton reproduce ...` for several. Then `python -m benchmarks.paper FOLDER` writes this page again.
"""


def main() -> None:
    outputs = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE
    HERE.mkdir(parents=True, exist_ok=True)
    (HERE / "README.md").write_text(page(outputs).rstrip() + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
