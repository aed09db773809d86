"""The count of bytes and launches that the kernels are held to."""

import pytest

from benchmarks import traffic
from nesterov_triton import tableaus

DOPRI5 = tableaus.get("dopri5")


def test_a_dopri5_step_takes_at_most_eight_launches():
    assert len(traffic.momentum_step(DOPRI5)) == 5
    assert len(traffic.momentum_step(DOPRI5, pairs=False)) == 8
    assert len(traffic.first_order_step(DOPRI5)) == 8


def test_rows_of_a_dopri5_step():
    assert [launch.rows for launch in traffic.momentum_step(DOPRI5)] == [5, 9, 11, 12, 0]
    assert traffic.momentum_floor(DOPRI5) == 33
    assert [launch.rows for launch in traffic.first_order_step(DOPRI5)] == [3, 4, 5, 6, 7, 7, 7, 0]


@pytest.mark.parametrize("pairs", [True, False])
@pytest.mark.parametrize("method", ["dopri5", "tsit5", "dopri8", "bosh3"])
def test_bytes_are_within_fifteen_percent_of_the_floor(method, pairs):
    tableau, n = tableaus.get(method), 2**24
    floor = traffic.momentum_floor(tableau, pairs) * n * 4
    ratio = traffic.step_bytes(traffic.momentum_step(tableau, pairs), tableau, n, 4) / floor
    print(f"{method}: {ratio:.3f} times the floor")
    assert ratio <= 1.15


def test_the_script_prints_both(capsys):
    traffic.main()
    said = capsys.readouterr().out
    assert said.count("8 launches") == 2
    assert "5 launches, 37 rows, the floor 33" in said
