"""Every kernel compiled ahead of time for two targets: types, registers, spills, and rows read and written."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import traffic
from nesterov_triton import tableaus

SCRIPT = Path(__file__).with_name("compile_kernels.py")
DOPRI5, DOPRI8, RK4 = map(tableaus.get, ("dopri5", "dopri8", "rk4"))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """One dictionary for each kernel, see compile_kernels.py."""
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    environment["PYTHONPATH"] = os.pathsep.join([str(SCRIPT.parent.parent), environment.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "80", "90"], capture_output=True, text=True, timeout=600, env=environment
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    for one in found:
        print(f"sm_{one['target']} {one['case']:42s} {one['kernel']:14s} {one['registers']:3d} registers, ", end="")
        print(f"{one['spilled']} bytes spilled")
    return found


def test_nothing_is_spilled(compiled):
    assert {one["target"] for one in compiled} == {80, 90}
    spilled = [one for one in compiled if one["spilled"] and "float64" not in one["case"]]
    assert not spilled


def test_two_programs_fit_a_multiprocessor(compiled):
    """256 threads each, of 65,536 registers: with one program at a time its loads and arithmetic would take turns."""
    assert not [one for one in compiled if one["registers"] > 128]


def test_nothing_of_a_float64_kernel_is_float32(compiled):
    """A compile-time number that takes the wrong turn becomes a float32."""
    chosen = [one for one in compiled if "float64" in one["case"] or one["kernel"] == "norm_kernel"]
    assert chosen
    assert not [one for one in chosen if one["narrow"]]


def test_rows_are_addressed_with_64_bits(compiled):
    """The norm's own are few, and its pointer moves."""
    assert not [one for one in compiled if one["short_offsets"] and one["kernel"] != "norm_kernel"]
    assert [one for one in compiled if one["case"].endswith("long")]


EXPECTED = {
    **{
        f"momentum stage {known}+{new}+{ahead} dopri5 float32": traffic.momentum_stage(DOPRI5, known, new, ahead)
        for known, new, ahead in ((1, 0, 2), (0, 1, 2), (1, 2, 2), (3, 2, 2), (1, 0, 1), (5, 1, 1))
    },
    "momentum stage 3+1+1 dopri5 float32 m": traffic.momentum_stage(DOPRI5, 3, 1, 1, momentum=True),
    "momentum stage 9+2+2 dopri8 float32": traffic.momentum_stage(DOPRI8, 9, 2, 2),
    "momentum finish dopri5 float32": traffic.momentum_finish(DOPRI5, 2),
    "momentum finish dopri8 float32": traffic.momentum_finish(DOPRI8, 2),
    "momentum finish rk4 float32": traffic.momentum_finish(RK4, 1),
    "momentum finish dopri5 float64": traffic.momentum_finish(DOPRI5, 2),
    "momentum finish dopri5 bfloat16": traffic.momentum_finish(DOPRI5, 2),
    "first order stage 5 dopri5 float32": traffic.first_order_step(DOPRI5)[5],
    "first order finish dopri5 float32": traffic.first_order_finish(DOPRI5),
    "first order finish dopri8 float32": traffic.first_order_finish(DOPRI8),
    "first order finish rk4 float32": traffic.first_order_finish(RK4),
}


@pytest.mark.parametrize("case", list(EXPECTED))
def test_rows_are_those_of_the_count(compiled, case):
    """What benchmarks.traffic counts is what is left in the compiled kernels, and in accesses of 16 bytes a thread."""
    found = [one for one in compiled if one["case"] == case and one["kernel"] != "norm_kernel"]
    assert len(found) == 2
    for one in found:
        assert (one["loads"], one["stores"]) == (EXPECTED[case].read, EXPECTED[case].written)
        if "bfloat16" not in case:
            assert (one["wide_loads"], one["wide_stores"]) == (one["loads"], one["stores"])
