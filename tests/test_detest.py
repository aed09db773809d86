"""DETEST (`benchmarks.detest`): every adaptive method is about as accurate on every problem as scipy's of its kind, and
its error falls with the tolerance.
"""

import math
from functools import cache

import numpy as np
import pytest
import scipy.integrate
import torch

import nesterov_triton as nt
from benchmarks.detest import END, PROBLEMS, STARTS

KIND = {
    "dopri5": "RK45",
    "tsit5": "RK45",
    "bosh3": "RK23",
    "adaptive_heun": "RK23",
    "fehlberg2": "RK23",
    "dopri8": "DOP853",
    "prince_dormand8": "DOP853",
}
TOLERANCE = {"bosh3": 1e-5, "fehlberg2": 1e-4, "adaptive_heun": 1e-3}


@cache
def by_scipy(name, method, tolerance):
    f, y0 = PROBLEMS[name](np), np.array(STARTS[name])
    solution = scipy.integrate.solve_ivp(f, (0.0, END), y0, method, rtol=tolerance, atol=tolerance)
    assert solution.success
    return torch.from_numpy(solution.y[:, -1])


def exact(name):
    return by_scipy(name, "DOP853", 1e-12)


def distance(name, found):
    truth = exact(name)
    return ((found - truth).abs() / (1 + truth.abs())).max().item()


def error(name, method, tolerance):
    f, y0 = PROBLEMS[name](torch), STARTS[name]
    with torch.no_grad():
        solution = nt.solve(
            f, torch.tensor(y0, dtype=torch.float64), (0.0, END), method=method, rtol=tolerance, atol=tolerance,
            max_steps=20_000,
        )  # fmt: skip
    return distance(name, solution.final)


def test_the_reference_is_right_where_the_solution_is_known():
    closed = {
        "A1": [math.exp(-20)],
        "A2": [1 / math.sqrt(21)],
        "A3": [math.exp(math.sin(20))],
        "A4": [20 / (1 + 19 * math.exp(-5))],
        "E5": [None, math.sinh(math.log(25 / 5))],
    }
    for name, values in closed.items():
        for found, value in zip(exact(name).tolist(), values, strict=True):
            assert value is None or found == pytest.approx(value, rel=1e-9)


def test_every_adaptive_method_is_here() -> None:
    assert set(KIND) == {name for name, tableau in nt.tableaus.TABLEAUS.items() if tableau.adaptive}


@pytest.mark.parametrize("method", KIND)
def test_every_problem_is_solved_as_well_as_by_scipy(method):
    tolerance = TOLERANCE.get(method, 1e-6)
    # fehlberg2's own estimate is 1/512 of the difference of two stages: its tolerance is a loose one.
    allowed = 1500 if method == "fehlberg2" else 10
    bad = {}
    for name in PROBLEMS:
        found, theirs = error(name, method, tolerance), distance(name, by_scipy(name, KIND[method], tolerance))
        if not found <= allowed * max(theirs, tolerance):
            bad[name] = (found, theirs)
    assert not bad


@pytest.mark.parametrize("method", KIND)
def test_the_error_falls_with_the_tolerance(method):
    # On a problem of each class: the slope of log error over log tolerance is near 1.
    decades = 1.6 if TOLERANCE.get(method, 0) >= 1e-4 else 3.0
    tolerances = 1e-3 * 10.0 ** -np.linspace(0, decades, 4)
    slopes = {}
    for name in ("A3", "B5", "C1", "D2", "E2"):
        errors = [error(name, method, t) for t in tolerances]
        slopes[name] = np.polyfit(np.log(tolerances), np.log(errors), 1)[0]
    assert 0.7 < np.median(list(slopes.values())) < 1.4, slopes
