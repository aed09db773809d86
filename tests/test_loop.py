"""The adaptive loop's decisions, where they could go round in circles."""

import math

import pytest
import torch

import nesterov_triton as nt


def test_a_last_step_that_was_rejected_is_not_stretched_back_to_itself():
    # E is just above 1 for the whole interval, and a safety near 1 proposes a step hardly shorter: within the 1 % by
    # which a last step may be stretched. Stretched, it would be the rejected step again, for ever.
    controller = nt.controllers.Integral(safety=0.995)
    y0 = torch.ones(3, dtype=torch.float64)

    def attempts(atol):
        solution = nt.solve(
            lambda t, y: torch.cos(3 * t) * y,
            y0,
            (0.0, 1.0),
            rtol=0.0,
            atol=atol,
            first_step=1.0,
            controller=controller,
            max_steps=100,
            throw=False,
        )
        return solution.status, solution.stats

    # Find, by bisection, the tolerance at which the whole interval is only just too long.
    low, high = 1e-9, 10.0
    for _ in range(60):
        middle = (low * high) ** 0.5
        _, stats = attempts(middle)
        if stats.accepted == 1 and stats.rejected == 0:
            high = middle
        else:
            low = middle
    status, stats = attempts(high * 0.99)
    assert status is nt.Status.SUCCESS
    assert stats.rejected >= 1
    assert stats.accepted + stats.rejected < 10


def test_an_interval_of_one_unit_in_the_last_place_is_one_step():
    end = math.nextafter(1.0, 2.0)
    solution = nt.solve(lambda t, y: -y, torch.ones(2, dtype=torch.float64), (1.0, end))
    assert solution.stats.accepted == 1
    assert torch.allclose(solution.final, torch.ones(2, dtype=torch.float64))


def test_a_failed_call_leaves_its_own_counts():
    layer = nt.NODE(lambda t, y: y, max_steps=1, first_step=1e-3)
    layer(torch.ones(2), t=(0.0, 1e-3))
    assert layer.stats.accepted == 1
    with pytest.raises(nt.SolveError) as failure:
        layer(torch.ones(2), t=(0.0, 1.0))
    assert layer.stats is failure.value.stats
    assert layer.stats.accepted == 1
    assert layer.stats.nfe_forward == 7
