"""Scaling: the contenders solve the same problem at every point, and one that does not is not timed."""

import pytest
import torch

from benchmarks import curves, figures, scaling
from benchmarks.contenders import OURS
from benchmarks.problems import Problem
from benchmarks.scaling import EAGER, FIELD, KEPT, PEER, Case


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(scaling, "BATCH", 3)
    monkeypatch.setattr(scaling, "WIDTH", 4)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("axis", scaling.AXES)
def test_every_point_is_a_problem_that_both_solve_to_its_truth(axis):
    case = Case(axis, 8)
    assert case.problem.h0.shape == {"batch": (8, 4), "width": (3, 8)}.get(axis, (3, 4))
    ours, theirs = case.ours(), case.torchdiffeq()
    assert torch.equal(case.ours(case.kept), ours)
    assert ours.shape == theirs.shape == ((7 if axis == "output times" else 1), *case.problem.h0.shape)
    truth, gradients = Problem.draw(*case.problem.h0.shape).truth()
    tolerance = 1e-2 if axis == "steps" else 1e-3
    for found in (ours, theirs):
        assert torch.allclose(found[-1].double(), truth, rtol=tolerance, atol=tolerance)
    if axis == "batch":
        for found, expected in zip(case.train(case.ours), gradients, strict=True):
            assert torch.allclose(found.double(), expected, rtol=1e-2, atol=1e-2)


def test_along_the_steps_both_take_as_many():
    case = Case("steps", 8)
    with torch.no_grad():
        case.ours()
    assert case.layer.stats.nfe_forward == 4 * 8


def test_a_curve_has_a_row_for_each_point_and_contender():
    rows = scaling.measure("steps", (2, 4), "train", 1, 0.0, compiled=False)
    assert [(row["value"], row["contender"]) for row in rows] == [
        (n, name) for n in (2, 4) for name in (EAGER, PEER, KEPT, FIELD)
    ]
    assert all(float(row["milliseconds"]) > 0 for row in rows)


def test_a_contender_that_solves_something_else_is_not_timed(monkeypatch):
    case = Case("batch", 2)
    monkeypatch.setattr(case, "torchdiffeq", lambda: 1.1 * case.ours())
    with pytest.raises(RuntimeError, match="differ by"):
        case.contenders("forward", None)


def test_the_same_numbers_make_the_same_figure(tmp_path):
    curve = curves.Curve(OURS, "dopri5", 5, ((10.0, 1e-2), (30.0, 1e-5)))
    other = curves.Curve("torchdiffeq", "bosh3", 3, ((20.0, 1e-2), (90.0, 1e-3)))
    for name in ("a", "b"):
        figures.precision(tmp_path / f"{name}.png", [curve, other], "evaluations", "a title")
    figures.precision(tmp_path / "c.png", [curve], "evaluations", "a title")
    a, b, c = ((tmp_path / f"{name}.png").read_bytes() for name in "abc")
    assert a == b != c
    names = ("axis", "way", "threads", "contender", "value", "milliseconds")
    rows = [
        dict(zip(names, ("batch", "forward", threads, EAGER, str(n), str(n * 1.5)), strict=True))
        for threads in "12"
        for n in (1, 10)
    ]
    figures.scaling(tmp_path / "d.png", rows, "forward", "a title")
    assert (tmp_path / "d.png").stat().st_size > 2000
