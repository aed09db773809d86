"""The count of bytes and launches that the kernels are held to."""

import itertools
import re
from pathlib import Path

import pytest

from benchmarks import traffic
from nesterov_triton import nystrom, tableaus

DOPRI5, NYSTROM4 = tableaus.get("dopri5"), nystrom.METHODS["nystrom4"]


def test_a_dopri5_step_takes_at_most_eight_launches():
    assert len(traffic.momentum_step(DOPRI5)) == 5
    assert len(traffic.momentum_step(DOPRI5, pairs=False)) == 8
    assert len(traffic.first_order_step(DOPRI5)) == 8


def test_rows_of_a_dopri5_step():
    assert [launch.rows for launch in traffic.momentum_step(DOPRI5)] == [5, 9, 11, 12, 0]
    assert traffic.momentum_floor(DOPRI5) == 33
    assert [launch.rows for launch in traffic.first_order_step(DOPRI5)] == [3, 4, 5, 6, 7, 7, 7, 0]


def test_rows_of_a_first_order_adjoint_step():
    launches = traffic.first_order_adjoint_step(DOPRI5)
    assert [launch.rows for launch in launches] == [6, 8, 10, 12, 14, 14, 14, 0]  # the floor: all are needed
    assert len(launches) <= 8


def test_rows_of_a_first_order_reverse_step():
    """Without dopri5's last stage: nothing but the error looks at it."""
    launches = traffic.first_order_reverse_step(DOPRI5, 6)
    assert [launch.rows for launch in launches] == [3, 4, 5, 6, 7, 2, 3, 4, 5, 5, 7, 8]
    assert len(traffic.first_order_reverse_step(DOPRI5, 7)) == len(launches) + 2


@pytest.mark.parametrize("times", [1, 10])
def test_dense_output_reads_a_row_once_however_many_times_are_wanted(times):
    first_order, momentum = traffic.first_order_dense_output, traffic.momentum_dense_output
    assert [first_order(DOPRI5, times).read, first_order(tableaus.get("dopri8"), times).read] == [7, 13]
    assert [momentum(DOPRI5, times).read, momentum(tableaus.get("dopri8"), times).read] == [9, 16]
    assert [first_order(DOPRI5, times).written, momentum(DOPRI5, times).written] == [times, 2 * times]


@pytest.mark.parametrize("method", ["dopri5", "tsit5", "dopri8", "bosh3"])
def test_first_order_bytes_are_those_of_the_floor(method):
    """What is moved beside rows vanishes."""
    tableau, n = tableaus.get(method), 2**24
    stages = tableau.stages - (tableau.b[-1] == 0)
    for launches in (traffic.first_order_adjoint_step(tableau), traffic.first_order_reverse_step(tableau, stages)):
        floor = sum(launch.rows for launch in launches) * n * 4
        assert traffic.step_bytes(launches, tableau, n, 4) / floor <= 1.001


def test_launches_and_rows_of_a_dopri5_adjoint_step_and_of_a_reverse_sweep():
    assert len(traffic.momentum_adjoint_step(DOPRI5)) == 6
    assert len(traffic.momentum_adjoint_step(DOPRI5, pairs=False)) == 9
    assert len(traffic.momentum_reverse_step(DOPRI5)) == 7
    assert [launch.rows for launch in traffic.momentum_adjoint_step(DOPRI5)] == [5, 14, 18, 20, 22, 0]
    assert [launch.rows for launch in traffic.momentum_reverse_step(DOPRI5)] == [4, 8, 10, 13, 14, 16, 16]


STEPS = {
    "forward": (traffic.momentum_step, traffic.momentum_floor),
    "adjoint": (traffic.momentum_adjoint_step, traffic.momentum_adjoint_floor),
    "reverse": (traffic.momentum_reverse_step, traffic.momentum_reverse_floor),
}


@pytest.mark.parametrize("kind", STEPS)
@pytest.mark.parametrize("pairs", [True, False])
@pytest.mark.parametrize("method", ["dopri5", "tsit5", "dopri8", "bosh3"])
def test_bytes_are_within_fifteen_percent_of_the_floor(method, pairs, kind):
    tableau, n = tableaus.get(method), 2**24
    step, floor = STEPS[kind]
    ratio = traffic.step_bytes(step(tableau, pairs), tableau, n, 4) / (floor(tableau, pairs) * n * 4)
    print(f"{kind} {method}: {ratio:.3f} times the floor")
    assert ratio <= 1.15


def test_rows_of_a_step_of_the_nystrom_methods():
    rows = {}
    for (name, method), gated in itertools.product(nystrom.METHODS.items(), (False, True)):
        if method.gated is not None or not gated:
            launches = traffic.nystrom_step(method, gated)
            assert len(launches) == method.stages + 1
            rows[name, gated] = [launch.rows for launch in launches]
            ratio = traffic.step_bytes(launches, method, 2**24, 4) / (traffic.nystrom_floor(method, gated) * 2**26)
            assert ratio <= 1.15
    assert rows["nystrom4", False] == rows["nystrom4", True] == [4, 6, 7, 9, 0]
    assert rows["nystrom6", False] == [4, 6, 7, 8, 9, 11, 0]
    assert rows["blanes_moan4", False] == rows["blanes_moan4", True] == [4, 6, 7, 8, 9, 10, 12, 0]
    assert rows["strang", False] == rows["strang", True] == [4, 7, 0]
    assert [traffic.nystrom_floor(nystrom.METHODS[name], False) for name in ("nystrom4", "nystrom6")] == [24, 41]


@pytest.mark.parametrize(
    ("name", "gated", "rows", "floor"),
    [
        ("nystrom4", False, [2, 5, 6, 4, 6, 7, 7], 33),
        ("nystrom4", True, [2, 5, 6, 6, 8, 10, 11, 11], 54),
        ("nystrom6", False, [2, 5, 6, 7, 8, 4, 6, 7, 8, 9, 9], 63),
    ],
)
def test_rows_of_a_reverse_step_of_the_nystrom_methods(name, gated, rows, floor):
    launches = traffic.nystrom_reverse_step(nystrom.METHODS[name], gated)
    assert [launch.rows for launch in launches] == rows
    assert traffic.nystrom_reverse_floor(nystrom.METHODS[name], gated) == floor


def test_rows_of_an_adjoint_step_of_the_nystrom_methods():
    rows = {}
    for (name, method), gated in itertools.product(nystrom.METHODS.items(), (False, True)):
        if method.gated is not None or not gated:
            launches, n = traffic.nystrom_adjoint_step(method, gated), 2**24
            assert len(launches) == method.stages + 2
            rows[name, gated] = [launch.rows for launch in launches]
            assert (
                traffic.step_bytes(launches, method, n, 4) / (traffic.nystrom_adjoint_floor(method, gated) * n * 4)
                < 1.15
            )
    assert rows["nystrom4", False] == [4, 10, 12, 7, 17, 0]
    assert rows["nystrom4", True] == [4, 10, 12, 11, 17, 0]
    assert rows["nystrom6", False] == [4, 10, 12, 14, 16, 9, 21, 0]
    assert rows["strang", False] == [4, 5, 13, 0]
    assert rows["blanes_moan4", True] == [4, 10, 12, 14, 16, 18, 17, 23, 0]
    assert [traffic.nystrom_adjoint_floor(NYSTROM4, gated) for gated in (False, True)] == [48, 52]


def test_the_script_prints_both(capsys):
    traffic.main()
    said = capsys.readouterr().out
    assert said.count("8 launches") == 4
    assert "12 launches, 59 rows, the floor 59" in said
    assert "5 launches, 37 rows, the floor 33" in said
    assert "6 launches, 79 rows, the floor 74" in said
    assert "7 launches, 81 rows, the floor 76" in said
    assert "5 launches, 26 rows, the floor 24" in said
    assert "7 launches, 37 rows, the floor 33" in said
    assert "6 launches, 50 rows, the floor 48" in said
    assert "6 launches, 54 rows, the floor 52" in said


def test_the_readme_says_what_is_counted():
    rows = [
        (traffic.momentum_step(DOPRI5), traffic.momentum_floor(DOPRI5)),
        (traffic.momentum_step(DOPRI5, pairs=False), traffic.momentum_floor(DOPRI5, pairs=False)),
        (traffic.first_order_step(DOPRI5), sum(launch.rows for launch in traffic.first_order_step(DOPRI5))),
        (traffic.momentum_adjoint_step(DOPRI5), traffic.momentum_adjoint_floor(DOPRI5)),
        (traffic.momentum_reverse_step(DOPRI5), traffic.momentum_reverse_floor(DOPRI5)),
        (traffic.nystrom_step(NYSTROM4, gated=True), traffic.nystrom_floor(NYSTROM4, gated=True)),
        (traffic.nystrom_adjoint_step(NYSTROM4, gated=False), traffic.nystrom_adjoint_floor(NYSTROM4, gated=False)),
        (traffic.nystrom_adjoint_step(NYSTROM4, gated=True), traffic.nystrom_adjoint_floor(NYSTROM4, gated=True)),
        (traffic.nystrom_reverse_step(NYSTROM4, gated=False), traffic.nystrom_reverse_floor(NYSTROM4, gated=False)),
        (traffic.nystrom_reverse_step(NYSTROM4, gated=True), traffic.nystrom_reverse_floor(NYSTROM4, gated=True)),
    ]
    said = Path(__file__).parent.parent.joinpath("nesterov_triton", "ops", "README.md").read_text(encoding="utf-8")
    table = re.findall(r"^\| (?:forward|adjoint|discrete).*\| (\d+) \| (\d+) \| (\d+) \|$", said, flags=re.MULTILINE)
    counted = [(len(launches), sum(launch.rows for launch in launches), floor) for launches, floor in rows]
    assert [tuple(map(int, row)) for row in table] == counted
