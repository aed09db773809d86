"""Step-size controllers: their formulas by hand, and what they do to a solve."""

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from support import MODELS, features

import nesterov_triton as nt
from nesterov_triton import controllers

errors = st.floats(1e-12, 1e6)


def test_the_elementary_rule():
    rule = controllers.Integral()
    assert rule.factor(1.0, 1.0, 5, False) == pytest.approx(0.9)
    assert rule.factor(0.5**5, 1.0, 5, False) == pytest.approx(1.8)
    assert rule.factor(2.0**5, 1.0, 5, False) == pytest.approx(0.45)
    assert rule.factor(1e9, 1.0, 5, False) == 0.2
    assert rule.factor(1e-30, 1.0, 5, False) == 10.0
    assert rule.factor(0.0, 1.0, 5, False) == 10.0
    # no growth right after a rejection
    assert rule.factor(1e-30, 1.0, 5, True) == 1.0
    assert rule.factor(0.0, 1.0, 5, True) == 1.0


def test_the_pi_rule():
    rule = controllers.PI(safety=0.8, alpha=0.7, beta=0.4)
    assert rule.factor(0.1, 0.3, 5, False) == pytest.approx(0.8 * 0.1 ** (-0.7 / 5) * 0.3 ** (0.4 / 5))
    assert rule.factor(3.0, 0.3, 5, False) == pytest.approx(0.8 * 3.0 ** (-1 / 5))  # rejected: the elementary rule


@pytest.mark.parametrize("rule", [controllers.Integral(), controllers.PI(), controllers.Integral(0.5, 0.1, 2.0)])
@given(error=errors, previous=errors, q=st.integers(1, 8), after_rejection=st.booleans())
def test_factors_stay_within_their_limits(rule, error, previous, q, after_rejection):
    factor = rule.factor(error, min(previous, 1.0), q, after_rejection)
    assert rule.min_factor <= factor <= rule.max_factor
    if error > 1:
        assert factor < 1
    if after_rejection:
        assert factor <= 1


@pytest.mark.parametrize("error", [math.nan, math.inf])
def test_an_error_that_is_not_finite_shrinks_the_step_as_far_as_it_goes(error):
    assert controllers.Integral(min_factor=0.3).factor(error, 1.0, 5, False) == 0.3
    assert controllers.PI().factor(error, 1.0, 5, True) == 0.2


@pytest.mark.parametrize(
    "options",
    [
        {"safety": 0.0},
        {"safety": 1.0},
        {"min_factor": 0.0},
        {"min_factor": 1.0},
        {"max_factor": 1.0},
        {"max_factor": math.inf},
        {"safety": math.nan},
    ],
)
@pytest.mark.parametrize("kind", [controllers.Integral, controllers.PI])
def test_bad_options(kind, options):
    with pytest.raises(ValueError, match="controller"):
        kind(**options)


def test_bad_pi_exponents():
    with pytest.raises(ValueError, match="alpha"):
        controllers.PI(alpha=0.0)
    with pytest.raises(ValueError, match="beta"):
        controllers.PI(beta=-0.1)


def test_names_and_objects():
    assert controllers.get("integral") == controllers.Integral()
    assert controllers.get("pi") == controllers.PI()
    own = controllers.PI(alpha=0.6)
    assert controllers.get(own) is own


def test_a_solve_obeys_its_controller():
    """With growth capped at 1.3 and no error to speak of, the steps form a geometric series."""
    ends = []

    def field(t, y):
        ends.append(float(t))
        return torch.zeros_like(y)

    rule = controllers.Integral(max_factor=1.3)
    nt.solve(field, torch.ones(2, dtype=torch.float64), (0.0, 1.0), first_step=0.1, controller=rule)
    # dopri5 evaluates at the end of each step last, and at its own c_i before; ends are where the next step starts.
    starts = [0.0, 0.1, 0.23, 0.399, 0.6187, 0.90431]
    assert [pytest.approx(s, rel=1e-12) in ends for s in starts] == [True] * len(starts)
    assert max(ends) == 1.0
    stats = nt.solve(field, torch.ones(2), (0.0, 1.0), first_step=0.1, controller=rule).stats
    assert (stats.accepted, stats.rejected) == (6, 0)


def test_a_smaller_safety_factor_rejects_less():
    stats = []
    for safety in (0.99, 0.7):
        layer = MODELS["GNesterovNODE"].layer(
            t=(1.0, 8.0), rtol=1e-5, atol=1e-5, controller=controllers.Integral(safety=safety)
        )
        with torch.no_grad():
            layer(3 * features(3, 2))
        stats.append(layer.stats)
    assert stats[1].rejected <= stats[0].rejected
    assert stats[1].accepted > stats[0].accepted
