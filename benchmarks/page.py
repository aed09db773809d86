"""The stored results as one page with tables and figures: `python -m benchmarks report`.

Writes `benchmarks/results/README.md` and the figures beside it from what `benchmarks/results` holds: counts.json,
precision.csv, and what each machine's folder has (sides.json, cpu.json, compiled.json, precision.csv, scaling.csv), and
the JSON files of `benchmarks.gpu`. Of a machine the newest counts. `findings.md` there, if it exists, is written by
hand and stands on the page as it is.
"""

from __future__ import annotations

import argparse
import itertools
import json
import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import figures
from benchmarks.contenders import OURS
from benchmarks.curves import Curve, Row, curves, milliseconds
from benchmarks.precision import MOST
from benchmarks.report import RELATIONS, RESULTS, read_rows
from benchmarks.scaling import BATCH, COMPILED, EAGER, FIELD, KEPT, OUTPUTS, PEER, WIDTH

LEVELS = (1e-3, 1e-6, 1e-9)
DETEST = "DETEST"
# What a user gets by default, and with graphs kept.
OWN = {
    "forward": (f"{OURS} eager", f"{OURS} compiled", f"{OURS} graph"),
    "train": (
        f"{OURS} eager, discrete",
        f"{OURS} eager, kept",
        f"{OURS} compiled, discrete",
        f"{OURS} graph, discrete",
    ),
}
SAID = {"forward": "forward", "train": "forward and backward"}
FASTER = 0.98  # a ratio below which a peer counts as faster


@dataclass
class Machine:
    """What was measured on one machine, the newest of each kind."""

    name: str
    letter: str = ""
    documents: dict[str, dict[str, Any]] = field(default_factory=dict)  # by kind: sides, cpu, compiled, gpu, ...
    rows: dict[str, list[dict[str, str]]] = field(default_factory=dict)  # by kind: precision, scaling
    folder: Path | None = None

    def origins(self) -> Iterable[tuple[str, str, str, Mapping[str, str]]]:
        """(what, date, commit, versions) of all that it has."""
        for kind, document in sorted(self.documents.items()):
            for part in (document.get("tables") or document.get("origins") or {"": document}).values():
                yield kind, part["date"], part["commit"], part["versions"]


@dataclass
class Stored:
    """All results: those that are the same everywhere, and those of machines."""

    counts: dict[str, Any]
    precision: list[dict[str, str]]
    precision_origins: dict[str, Any]
    machines: list[Machine]
    findings: str


def load(results: Path) -> Stored:
    """Read a folder of results."""
    machines: dict[str, Machine] = {}
    for path in sorted([*results.glob("*.json"), *results.glob("*/*.json")]):
        document = json.loads(path.read_text())
        if not isinstance(document, dict) or not {"machine", "gpu"} & document.keys():
            continue
        name = str(document.get("machine") or document["gpu"]).removesuffix(", one thread")
        kind = "gpu" if "gpu" in document else path.stem
        machine = machines.setdefault(name, Machine(name))
        if kind in machine.documents and _date(machine.documents[kind]) > _date(document):
            continue
        machine.documents[kind] = document
        if "origins" in document:
            machine.rows[kind] = read_rows(path.with_suffix(".csv"))
            machine.folder = path.parent.relative_to(results)
    for letter, name in zip(string.ascii_uppercase, sorted(machines), strict=False):
        machines[name].letter = letter
    return Stored(
        _read(results / "counts.json"),
        read_rows(results / "precision.csv"),
        _read(results / "precision.json").get("origins", {}),
        [machines[name] for name in sorted(machines)],
        (results / "findings.md").read_text().strip() if (results / "findings.md").exists() else "",
    )


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def _date(document: Mapping[str, Any]) -> str:
    parts = document.get("tables") or document.get("origins")
    dates = [part["date"] for part in parts.values()] if isinstance(parts, dict) else [document["date"]]
    return str(max(dates))


# --- the page


def page(results: Path) -> str:
    """The page's text."""
    stored = load(results)
    sections = [
        "# Measured\n\nWritten by `python -m benchmarks report` from the files beside it"
        + (", but for `findings.md`." if stored.findings else "."),
        _section("Where a peer is faster, or needs less", "\n".join(_slower(stored))),
        _section("What was found", stored.findings),
        _section("Side by side", _sides(stored)),
        _section("Against aims", _aims(stored)),
        _section("Work and precision", _precision(stored)),
        _section("Scaling", _scaling(stored)),
        _section("Counts, the same on every machine", _counts(stored)),
        _section("Absolute times", _absolute(stored)),
        _section("Where these come from", _origins(stored)),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _section(title: str, text: str) -> str:
    return f"## {title}\n\n{text}" if text else ""


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], text_columns: int = 1) -> str:
    marks = ["---"] * text_columns + ["---:"] * (len(head) - text_columns)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, marks, *rows])


def _number(value: float | None) -> str:
    """Two digits, and no power of ten where it fits without."""
    if value is None:
        return ""
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"


def _slower(stored: Stored) -> list[str]:
    """Every peer that is ahead, and by how much."""
    lines = []
    for machine in stored.machines:
        for way, names in OWN.items():
            for own, cases in _behind(machine, way, names).items():
                for peer, found in cases.items():
                    places = ", ".join(f"{case} ({_number(1 / value)} times)" for case, value in found)
                    lines.append(f"- {machine.letter}, {SAID[way]}: {peer} is faster than {_own(own)}: {places}.")
        lines += _behind_in_scaling(machine)
        works = milliseconds(machine.rows.get("precision", []))
        if works:
            lines += _behind_in_work(stored, f"Time on {machine.letter}", works)
    lines += _behind_in_work(stored, "Evaluations of the field", None)
    if not lines:
        return ["Nowhere, in what is measured here."]
    letters = "; ".join(f"{machine.letter} is {machine.name}" for machine in stored.machines)
    return [f"{letters}.", "", *lines]


def _own(name: str) -> str:
    return "this package, " + name.removeprefix(f"{OURS} ")


def _behind(machine: Machine, way: str, names: Sequence[str]) -> dict[str, dict[str, list[tuple[str, float]]]]:
    """By own contender and peer: (case, ratio) where the peer takes less time."""
    found: dict[str, dict[str, list[tuple[str, float]]]] = {}
    for title, table in machine.documents.get("sides", {}).get("tables", {}).items():
        case, _, its_way = title.rpartition(", ")
        if its_way != way:
            continue
        for own in names:
            for peer, value in table["ratios"].get(own, {}).items():
                if peer != "field alone" and value < FASTER:
                    found.setdefault(own, {}).setdefault(peer, []).append((case, value))
    return found


def _behind_in_scaling(machine: Machine) -> list[str]:
    lines = []
    for own in (EAGER, KEPT):
        for (axis, way, threads), ratios in _scaling_ratios(machine, own).items():
            if behind := [f"{value} ({_number(1 / ratio)} times)" for value, ratio in ratios.items() if ratio < FASTER]:
                said = (
                    f"{machine.letter}, {SAID[way]}, {threads} thread{'s' if threads != '1' else ''}, along the {axis}"
                )
                lines.append(f"- {said}: torchdiffeq is faster than {_own(own)}, at {', '.join(behind)}.")
    return lines


def _behind_in_work(stored: Stored, what: str, works: Mapping[tuple[str, ...], float] | None) -> list[str]:
    """Where the best method of a peer gets to an error with less than the best one here."""
    lines = []
    for problem, found in _problem_curves(stored, works).items():
        said = []
        for level in LEVELS:
            best: dict[str, tuple[float, str]] = {}
            for curve in found:
                if (cost := curve.work_for(level)) is not None:
                    best[curve.package] = min(best.get(curve.package, (cost, curve.method)), (cost, curve.method))
            own = best.pop(OURS, None)
            ahead = [
                f"{package}'s {method} "
                + (f"takes {100 * cost / own[0]:.0f} % of {own[1]}'s" if own else "alone gets there")
                for package, (cost, method) in best.items()
                if own is None or cost < FASTER * own[0]
            ]
            said += [f"to error {_power(level)} {', '.join(ahead)}"] if ahead else []
        if said:
            lines.append(f"- {what}, {problem}: {'; '.join(said)}.")
    return lines


def _power(value: float) -> str:
    return f"{value:.0e}".replace("e-0", "e-")


def _sides(stored: Stored) -> str:
    """Ratios by turns: one table for each way, machines beneath each other in every case."""
    parts = []
    for way, names in OWN.items():
        rows, peers = [], dict[str, None]()
        for case, entries in _cases(stored, way).items():
            for machine, table in entries:
                for own in names:
                    if ratios := table["ratios"].get(own):
                        peers |= dict.fromkeys(peer for peer in ratios if peer != "field alone")
                        rows.append(
                            (case, machine.letter, own.removeprefix(f"{OURS} ").removesuffix(", discrete"), ratios)
                        )
        if rows:
            head = ["case", "machine", "loop", "/ field alone", *peers]
            cells = [
                [case, letter, loop, _inverse(ratios.get("field alone")), *(_number(ratios.get(p)) for p in peers)]
                for case, letter, loop, ratios in rows
            ]
            parts.append(f"### {SAID[way].capitalize()}\n\n{_table(head, cells, 3)}")
    if not parts:
        return ""
    return (
        "How many times this package's time a peer takes, and how many times the time of its own calls of the field "
        "this package takes: medians of the ratios within a round, dopri5, rtol = atol = 1e-5, float32, one thread. "
        'Gradients are those of "discrete"; kept: of `Discrete(recompute=False)`. Every answer was held against a '
        "tight float64 solution first.\n\n" + "\n\n".join(parts)
    )


def _inverse(ratio: float | None) -> str:
    return "" if ratio is None else _number(1 / ratio)


def _cases(stored: Stored, way: str) -> dict[str, list[tuple[Machine, dict[str, Any]]]]:
    found: dict[str, list[tuple[Machine, dict[str, Any]]]] = {}
    for machine in stored.machines:
        for title, table in machine.documents.get("sides", {}).get("tables", {}).items():
            case, _, its_way = title.rpartition(", ")
            if its_way == way:
                found.setdefault(case, []).append((machine, table))
    return found


def _aims(stored: Stored) -> str:
    """The tables of `benchmarks.report.Line`s, machines side by side."""
    parts = []
    for kind in sorted({kind for machine in stored.machines for kind in machine.documents}):
        of = [(m, d) for m in stored.machines if isinstance((d := m.documents.get(kind, {})).get("table"), list)]
        if not of:
            continue
        lines: dict[tuple[str, int], dict[str, Any]] = {}
        for machine, document in of:
            seen: dict[str, int] = {}
            for line in document["table"]:
                seen[line["what"]] = seen.get(line["what"], 0) + 1
                entry = lines.setdefault((line["what"], seen[line["what"]]), {"target": line["target"], "values": {}})
                mark = "" if line["met"] is not False else " (**no**)"
                entry["values"][machine.letter] = f"{line['value']:.3g}{mark}"
        rows = [
            [
                what,
                *(entry["values"].get(machine.letter, "") for machine, _ in of),
                f"{RELATIONS[entry['target'][0]]} {entry['target'][1]:g}" if entry["target"] else "",
            ]
            for (what, _), entry in lines.items()
        ]
        about = "; ".join(dict.fromkeys(document["problem"] for _, document in of if "problem" in document))
        head = ["", *(machine.letter for machine, _ in of), "aim"]
        parts.append(f"### {kind}\n\n" + (f"{about}.\n\n" if about else "") + _table(head, rows))
    return "\n\n".join(parts)


# --- work and precision


def _problem_names(stored: Stored, works: Mapping[tuple[str, ...], float] | None) -> dict[str, list[str]]:
    """The problems that make one diagram, by its title."""
    timed = None if works is None else {key[0] for key in works}
    found: dict[str, list[str]] = {}
    for row in stored.precision:
        group = DETEST if row["group"].startswith(DETEST) else row["group"]
        names = found.setdefault(group, [])
        if row["problem"] not in names and (timed is None or row["problem"] in timed):
            names.append(row["problem"])
    return {group: names for group, names in found.items() if names}


def _problem_curves(stored: Stored, works: Mapping[tuple[str, ...], float] | None) -> dict[str, list[Curve]]:
    names = _problem_names(stored, works)
    return {group: curves(stored.precision, problems, works) for group, problems in names.items()}


def _precision(stored: Stored) -> str:
    if not stored.precision:
        return ""
    counted = _problem_curves(stored, None)
    text = [
        "Global error at the end, the largest |error| / (1 + |truth|), in float64, at rtol = atol = 1e-2 to 1e-9: a "
        "trained GNesterovNODE on the point clouds (120 points; its ELUs have kinks, over which no method keeps its "
        "order), the 25 problems of DETEST (evaluations added up, the geometric mean of the errors), and damped "
        "oscillators in the momentum form with their closed solution. Every explicit adaptive method that the "
        f"packages' registries name; a solve ends after {MOST} evaluations. A call of the field is one evaluation, of "
        "all samples at once in torchode, too, where each has its own steps.",
        "Evaluations of the field until the error is the given one, straight between tolerances; empty where none of "
        "the tolerances brings it there.",
        _levels(counted),
        *(f"![{name}: error over evaluations](figures/{_slug(name)}.png)" for name in counted),
        f"![{DETEST} by class](figures/detest-classes.png)" if DETEST in counted else "",
    ]
    for machine in stored.machines:
        works = milliseconds(machine.rows.get("precision", []))
        if not works:
            continue
        timed, names = _problem_curves(stored, works), _problem_names(stored, works)
        only = f" (of DETEST {', '.join(names[DETEST])})" if DETEST in names else ""
        text += [
            f"### Time, machine {machine.letter}",
            f"Milliseconds until the error is the given one, one thread{only}. This package's solves are those of its "
            "eager loop; diffrax's are compiled whole, and their compilation is not in the time.",
            _levels(timed),
            *(f"![{name}: error over time]({machine.folder}/{_slug(name)}.png)" for name in timed),
        ]
    return "\n\n".join(part for part in text if part)


def _levels(by_problem: Mapping[str, Sequence[Curve]]) -> str:
    """The work to each error level: a row for each method, the least of a column in bold."""
    columns = [(name, level) for name in by_problem for level in LEVELS]
    methods = sorted(
        {
            (curve.package != OURS, curve.package, curve.order, curve.method)
            for found in by_problem.values()
            for curve in found
        }
    )
    costs: dict[tuple[str, str, str, float], float] = {}
    for name, level in columns:
        for curve in by_problem[name]:
            if (cost := curve.work_for(level)) is not None:
                costs[curve.package, curve.method, name, level] = cost
    least = {
        (name, level): min((cost for (*_, n, at), cost in costs.items() if (n, at) == (name, level)), default=None)
        for name, level in columns
    }
    rows = []
    for _, package, order, method in methods:
        cells = []
        for name, level in columns:
            cost = costs.get((package, method, name, level))
            said = _number(cost)
            cells.append(f"**{said}**" if cost is not None and cost == least[name, level] else said)
        if any(cells):
            rows.append([package, method, str(order), *cells])
    head = ["package", "method", "order", *(f"{name}, {_power(level)}" for name, level in columns)]
    return _table(head, rows, 2)


def _slug(name: str) -> str:
    return name.lower().replace(" ", "-")


# --- scaling


def _scaling_ratios(machine: Machine, own: str, other: str = PEER) -> dict[tuple[str, str, str], dict[str, float]]:
    """By (axis, way, threads) and value: the other's time / own time."""
    times = {
        (row["axis"], row["way"], row["threads"], row["value"], row["contender"]): float(row["milliseconds"])
        for row in machine.rows.get("scaling", [])
    }
    found: dict[tuple[str, str, str], dict[str, float]] = {}
    for (axis, way, threads, value, contender), time in times.items():
        if contender == other and (axis, way, threads, value, own) in times:
            found.setdefault((axis, way, threads), {})[value] = time / times[axis, way, threads, value, own]
    return found


def _scaling(stored: Stored) -> str:
    text = []
    for machine in stored.machines:
        ratios = _scaling_ratios(machine, EAGER)
        if not ratios:
            continue
        compiled, field_alone = _scaling_ratios(machine, COMPILED), _scaling_ratios(machine, EAGER, FIELD)
        kept = _scaling_ratios(machine, KEPT)
        rows = []
        for (axis, way, threads), at in ratios.items():
            for value, ratio in at.items():
                key = (axis, way, threads)
                rows.append([
                    axis, SAID[way], threads, value, _inverse(field_alone.get(key, {}).get(value)), _number(ratio),
                    _number(kept.get(key, {}).get(value)), _number(compiled.get(key, {}).get(value)),
                ])  # fmt: skip
        head = [
            "along", "way", "threads", "value", "eager / field alone", "torchdiffeq / eager",
            "torchdiffeq / eager, kept", "torchdiffeq / compiled",
        ]  # fmt: skip
        text += [
            f"### Machine {machine.letter}",
            *(f"![{SAID[way]}]({machine.folder}/scaling-{way}.png)" for way in dict.fromkeys(w for _, w, _ in ratios)),
            _table(head, rows, 2),
        ]
    if not text:
        return ""
    about = (
        f"Batch {BATCH}, width {WIDTH}, {OUTPUTS} times and dopri5 at 1e-5 but for what the axis says; along the steps "
        "the 3/8 rule in fixed steps. torchdiffeq's backward pass is its faster one of two at each point. Wall time."
    )
    return "\n\n".join([about, *text])


# --- counts, times, origins


def _counts(stored: Stored) -> str:
    tables: dict[str, dict[str, float]] = stored.counts.get("tables", {})
    by_model: dict[str, dict[str, dict[str, float]]] = {}
    for title, table in tables.items():
        package, _, model = title.rpartition(", ")
        by_model.setdefault(model, {})[package] = table
    parts = []
    for model, packages in by_model.items():
        whats = list(dict.fromkeys(what for table in packages.values() for what in table))
        rows = [[what, *(f"{table[what]:g}" if what in table else "" for table in packages.values())] for what in whats]
        parts.append(f"### {model}\n\n{_table(['', *packages], rows)}")
    return "\n\n".join(parts)


def _absolute(stored: Stored) -> str:
    parts = []
    for way in OWN:
        rows = []
        names: dict[str, None] = {}
        for case, entries in _cases(stored, way).items():
            for machine, table in entries:
                names |= dict.fromkeys(table["milliseconds"])
                rows.append((case, machine.letter, table["milliseconds"]))
        if rows:
            cells = [[case, letter, *(_number(times.get(name)) for name in names)] for case, letter, times in rows]
            title = f"### {SAID[way].capitalize()}, milliseconds"
            parts.append(f"{title}\n\n{_table(['case', 'machine', *names], cells, 2)}")
    return "\n\n".join(parts)


def _origins(stored: Stored) -> str:
    """A line for each kind of result: newest and oldest date, commits, versions."""

    def row(where: str, kind: str, parts: Sequence[tuple[str, str, Mapping[str, str]]]) -> list[str]:
        dates, commits = sorted({date for date, _, _ in parts}), list(dict.fromkeys(commit for _, commit, _ in parts))
        packages: dict[str, dict[str, None]] = {}
        for _, _, versions in parts:
            for package, version in versions.items():
                packages.setdefault(package, {})[version] = None
        said = ", ".join(f"{package} {' and '.join(found)}" for package, found in packages.items())
        days = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
        return [where, kind, days, ", ".join(commits), said]

    rows = []
    if stored.counts:
        rows.append(row("every machine", "counts", [_origin(stored.counts)]))
    if stored.precision_origins:
        rows.append(row("every machine", "precision", [_origin(part) for part in stored.precision_origins.values()]))
    for machine in stored.machines:
        for kind, parts in itertools.groupby(machine.origins(), key=lambda origin: origin[0]):
            rows.append(row(f"{machine.letter}, {machine.name}", kind, [part[1:] for part in parts]))
    return _table(["machine", "what", "date", "commit", "versions"], rows, 5)


def _origin(part: Mapping[str, Any]) -> tuple[str, str, Mapping[str, str]]:
    return part["date"], part["commit"], part["versions"]


# --- figures


def drawings(results: Path) -> dict[Path, Callable[[Path], None]]:
    """What draws each figure of the page, by its file."""
    stored = load(results)
    found: dict[Path, Callable[[Path], None]] = {}

    def precision(curves: Sequence[Curve], work: str, title: str) -> Callable[[Path], None]:
        return lambda path: figures.precision(path, curves, work, title)

    for name, group in _problem_curves(stored, None).items():
        title = f"{name}: global error over evaluations of the field"
        found[results / "figures" / f"{_slug(name)}.png"] = precision(group, "evaluations of the field", title)
    classes = {
        row["group"]: [one["problem"] for one in stored.precision if one["group"] == row["group"]]
        for row in stored.precision
        if row["group"].startswith(DETEST)
    }
    if classes:
        of_class = {
            name: [c for c in curves(stored.precision, list(dict.fromkeys(problems))) if c.method.lower() == "dopri5"]
            for name, problems in classes.items()
        }
        title = "DETEST by class, dopri5: global error over evaluations of the field"
        found[results / "figures" / "detest-classes.png"] = lambda path: figures.by_class(
            path, of_class, "evaluations of the field", title
        )
    for machine in stored.machines:
        works = milliseconds(machine.rows.get("precision", []))
        assert machine.folder is not None or not machine.rows
        for name, group in _problem_curves(stored, works).items() if works else ():
            path = results / str(machine.folder) / f"{_slug(name)}.png"
            found[path] = precision(group, "milliseconds", f"{name}: global error over time")
        for way in dict.fromkeys(row["way"] for row in machine.rows.get("scaling", [])):
            rows = machine.rows["scaling"]
            title = f"Time of a solve, {SAID[way]}"
            found[results / str(machine.folder) / f"scaling-{way}.png"] = _scaling_figure(rows, way, title)
    return found


def _scaling_figure(rows: Sequence[Row], way: str, title: str) -> Callable[[Path], None]:
    return lambda path: figures.scaling(path, rows, way, title)


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks report", description=__doc__.partition("\n")[0])
    parser.parse_args(arguments)
    for path, draw in drawings(RESULTS).items():
        draw(path)
    (RESULTS / "README.md").write_text(page(RESULTS))
