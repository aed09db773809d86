"""Work-precision: problems against solutions nobody here wrote, one counter for every package, curves and the page."""

import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import scipy.integrate
import torch

import nesterov_triton as nt
from benchmarks import curves, figures, page, precision
from benchmarks.contenders import OURS
from benchmarks.initial_values import TRAINED, detest_problem, oscillator, point_cloud
from benchmarks.precision import Counter, Method, NotSolved, TooMany, curve, methods
from benchmarks.report import RESULTS, keep_rows, read_rows
from nesterov_triton.experiments.paper.point_cloud import EXPERIMENT, load
from nesterov_triton.methods import METHODS


def by_scipy(problem, tolerance=1e-11):
    rates = problem.rates(np, problem.field(np))
    return scipy.integrate.solve_ivp(
        lambda t, y: rates(t, y.reshape(problem.y0.shape)).reshape(-1), (problem.t0, problem.t1),
        problem.y0.reshape(-1), "DOP853", rtol=tolerance, atol=tolerance,
    ).y[:, -1].reshape(problem.y0.shape)  # fmt: skip


def test_the_oscillators_closed_solution_is_scipys():
    assert oscillator().error(by_scipy(oscillator())) < 1e-8


def test_the_trained_networks_truth_is_scipys_and_its_system_the_experiments():
    problem = point_cloud()
    assert problem.error(by_scipy(problem)) < 1e-6  # what scipy's error estimate is worth over kinks
    network = EXPERIMENT.build("GNesterovNODE", replace(EXPERIMENT.defaults, tolerance=1e-9))
    state = {
        name: torch.tensor(value, dtype=torch.float64)
        for name, value in json.loads(TRAINED.read_text())["state_dict"].items()
    }
    network.load_state_dict(state)
    with torch.no_grad():
        h = network.layer(load(0)[0].inputs).numpy()
    kappa = 5 * math.tanh(2**-1.5 * math.e / 5)
    assert np.abs(h - kappa * problem.truth[0]).max() < 1e-5


def test_every_adaptive_method_of_the_registry_is_there_and_a_new_one_appears(monkeypatch):
    found = [method.name for method in precision.ours()]
    assert found == [name for name, method in METHODS.items() if method.adaptive]
    assert {"dopri5", "nystrom4", "strang"} <= set(found)
    monkeypatch.setitem(METHODS, "dopri5_again", replace(METHODS["dopri5"], name="dopri5_again"))
    again = [method for method in precision.ours() if method.name == "dopri5_again"]
    assert [row["evaluations"] for row in curve(again[0], oscillator(), (1e-3,))] == [224]


def test_a_method_for_other_systems_has_no_curve():
    (strang,) = (method for method in precision.ours() if method.name == "strang")
    assert curve(strang, detest_problem("A1")) == []


@pytest.mark.parametrize("problem", [oscillator(), detest_problem("E1")], ids=lambda problem: problem.name)
def test_every_methods_evaluations_are_counted_and_its_error_falls(problem):
    """Of every package that is installed. diffrax's take a second each to compile: two of them."""
    for method in methods():
        if method.package == "diffrax" and method.name not in ("Dopri5", "Heun"):
            continue
        rows = curve(method, problem, (1e-3, 1e-6) if method.order > 3 else (1e-2, 1e-3))
        if not rows:
            assert not problem.momentum
            continue
        loose, tight = rows
        assert not loose["note"], (method.package, method.name, loose)
        assert int(loose["evaluations"]) < int(tight["evaluations"]), (method.package, method.name)
        assert float(tight["error"]) < 0.5 * float(loose["error"]), (method.package, method.name)


def test_the_counter_says_what_the_package_says():
    problem, counter = oscillator(), Counter()
    field = counter.around(problem.field(torch))
    state = tuple(torch.tensor(problem.y0))
    stats = nt.solve(problem.system(field), state, (problem.t0, problem.t1)).stats
    assert counter.calls == stats.nfe_forward > 100


def stand_in(answers):
    """A method that gives these answers one after the other, raising those that are errors."""
    answers = iter(answers)

    def prepare(problem, counter):
        def solve(tolerance):
            counter.calls += 7
            answer = next(answers)
            if isinstance(answer, Exception):
                raise answer
            return problem.truth + answer

        return solve

    return Method("a package", "a method", 2, prepare)


def test_a_curve_ends_where_evaluations_are_too_many_and_says_what_failed():
    problem = detest_problem("A1")
    rows = curve(stand_in([TooMany(), NotSolved("lost"), 1e-3, math.nan, TooMany(), 1e-9]), problem)
    assert [(row["evaluations"], row["note"]) for row in rows] == [
        ("", "more than 6000 evaluations"),  # the first ones may only have been lost
        ("", "lost"),
        (7, ""),
        (7, "not finite"),
        ("", "more than 6000 evaluations"),
    ]


def test_the_counter_stops_a_solve_that_does_not_end():
    counter = Counter()
    counted = counter.around(lambda t, y: y)
    counter.calls = precision.MOST - 1
    counted(0, 0)
    with pytest.raises(TooMany):
        counted(0, 0)


def row(problem, method, tolerance, evaluations, error, package=OURS, note=""):
    names = ("problem", "method", "tolerance", "evaluations", "error", "package", "note", "order", "group")
    values = (problem, method, tolerance, str(evaluations), str(error), package, note, "4", problem)
    return dict(zip(names, values, strict=True))


def test_work_for_an_error_is_read_off_a_power_law():
    # error = work^-4
    (found,) = curves.curves([row("p", "m", f"1e-{k}", 10**k, 10.0 ** (-4 * k)) for k in (1, 2, 3)], ["p"])
    assert found.work_for(1e-6) == pytest.approx(10**1.5)
    assert found.work_for(1.0) == 10  # the loosest tolerance was enough
    assert found.work_for(1e-13) is None


def test_problems_together_count_where_all_were_solved():
    rows = [
        row("p", "m", "1e-2", 10, 1e-2), row("q", "m", "1e-2", 30, 1e-4),
        row("p", "m", "1e-3", 20, 1e-3), row("q", "m", "1e-3", "", "", note="lost"),
    ]  # fmt: skip
    (found,) = curves.curves(rows, ["p", "q"])
    assert found.points == ((40.0, pytest.approx(1e-3)),)
    works = {("p", OURS, "m", "1e-3"): 5.0}
    (timed,) = curves.curves(rows, ["p"], works)
    assert timed.points == ((5.0, pytest.approx(1e-3)),)


def test_rows_take_the_place_of_those_of_their_problem_alone(tmp_path):
    path = tmp_path / "some.csv"
    for problem, value in (("p", 1), ("q", 2), ("p", 3)):
        keep_rows(
            path, ("problem", "value"), "problem", problem, [{"problem": problem, "value": value}], ("torch",), "M"
        )
    assert read_rows(path) == [{"problem": "p", "value": "3"}, {"problem": "q", "value": "2"}]
    about = json.loads(path.with_suffix(".json").read_text())
    assert about["machine"] == "M"
    assert set(about["origins"]) == {"p", "q"}


def test_the_labels_of_lines_are_kept_apart_and_in_order():
    moved = figures._apart([0.0, 0.01, 0.02, 0.5, 0.9, 0.91], 0.1)
    assert all(b - a > 0.1 - 1e-12 for a, b in itertools.pairwise(moved))
    assert moved[3] == 0.5
    assert sum(moved[:3]) == pytest.approx(0.03)
    assert sum(moved[4:]) == pytest.approx(1.81)


# --- the page


def results(path, machine, ratio, date="2026-01-01", letter="m"):
    """A machine's stored results, with one table of each kind."""
    origin = {"date": date, "commit": "abc", "versions": {"torch": "2.13"}}
    folder = path / letter
    folder.mkdir(exist_ok=True, parents=True)
    own = f"{OURS} eager"
    table = origin | {
        "milliseconds": {own: 10.0, "torchdiffeq odeint": 10.0 * ratio, "field alone": 4.0},
        "ratios": {own: {"torchdiffeq odeint": ratio, "field alone": 0.4}},
    }
    sides = {"machine": f"{machine}, one thread", "tables": {"NODE, small, forward": table}}
    (folder / "sides.json").write_text(json.dumps(sides))
    line = {"what": "ratio", "value": ratio, "target": [">=", 1.0], "note": "", "met": ratio >= 1}
    cpu = origin | {"machine": f"{machine}, one thread", "table": [line], "problem": "the problem"}
    (folder / "cpu.json").write_text(json.dumps(cpu))
    return folder


def test_the_page_says_first_where_a_peer_is_faster(tmp_path):
    results(tmp_path, "First processor", 3.0, letter="a")
    said = page.page(tmp_path)
    assert "Nowhere" in said.split("\n## ")[1]
    results(tmp_path, "Second processor", 0.5, letter="b")
    said = page.page(tmp_path)
    first = said.split("\n## ")[1]
    assert "- B, forward: torchdiffeq odeint is faster than this package, eager: NODE, small (2 times)." in first
    assert "- A" not in first
    assert said.index("### Forward\n") < said.index("### Forward, milliseconds")  # ratios first
    assert "| NODE, small | A | eager | 2.5 | 3 |" in said
    assert "| NODE, small | B | eager | 2.5 | 0.5 |" in said
    assert "| ratio | 3 | 0.5 (**no**) | ≥ 1 |" in said  # machines side by side


def test_of_one_machine_the_newest_counts(tmp_path):
    results(tmp_path, "A processor", 3.0, date="2026-01-02", letter="a")
    results(tmp_path, "A processor", 7.0, date="2026-01-01", letter="b")
    assert "| ratio | 3 | ≥ 1 |" in page.page(tmp_path)
    results(tmp_path, "A processor", 5.0, date="2026-01-03", letter="c")
    assert "| ratio | 5 | ≥ 1 |" in page.page(tmp_path)


def test_a_gpus_file_stands_beside_the_cpus(tmp_path):
    results(tmp_path, "A processor", 3.0)
    lines = [{"what": "ratio", "value": 9.0, "target": None, "note": "", "met": None}]
    found = {"gpu": "Some GPU", "date": "2026-01-01", "commit": "abc", "versions": {"torch": "2.13"}, "table": lines}
    (tmp_path / "some-gpu-2026-01-01.json").write_text(json.dumps(found))
    said = page.page(tmp_path)
    assert "### gpu\n\n|  | B | aim |\n| --- | ---: | ---: |\n| ratio | 9 |  |" in said
    assert "| B, Some GPU | gpu | 2026-01-01 | abc | torch 2.13 |" in said


def test_a_peer_that_needs_fewer_evaluations_is_said(tmp_path):
    rows = [row("p", "m", "1e-3", 100, 9e-4), row("p", "n", "1e-3", 80, 9e-4, package="torchdiffeq")]
    keep_rows(tmp_path / "precision.csv", precision.COLUMNS, "problem", "p", rows, ("torch",))
    assert "- Evaluations of the field, p: to error 1e-3 torchdiffeq's n takes 80 % of m's." in page.page(tmp_path)


def test_the_committed_page_is_what_the_command_makes_of_the_committed_results():
    written = (RESULTS / "README.md").read_text()
    assert written == page.page(RESULTS), "run `python -m benchmarks report` and commit what it writes"
    for path in page.drawings(RESULTS):
        assert path.exists()
        assert f"({path.relative_to(RESULTS)})" in written
