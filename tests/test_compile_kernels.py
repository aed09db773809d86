"""Every kernel compiled ahead of time for two targets: types, registers, spills, and rows read and written."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import traffic
from nesterov_triton import nystrom, tableaus

# Second launches and those of the control, which read no rows.
SUMS = (
    "norm_kernel", "sums_kernel", "begin_kernel", "weigh_kernel", "step_weights_kernel", "dense_weights_kernel",
    "propose_kernel", "choose_kernel",
)  # fmt: skip
pytestmark = pytest.mark.xdist_group("compiled kernels")  # all are compiled once
SCRIPT = Path(__file__).with_name("compile_kernels.py")
DOPRI5, DOPRI8, RK4 = map(tableaus.get, ("dopri5", "dopri8", "rk4"))
NYSTROM4, NYSTROM6, BLANES_MOAN4 = (nystrom.METHODS[name] for name in ("nystrom4", "nystrom6", "blanes_moan4"))


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
        print(f"sm_{one['target']} {one['case']:44s} {one['kernel']:21s} {one['registers']:3d} registers, ", end="")
        print(f"{one['spilled']} bytes spilled")
    return found


def test_nothing_is_spilled(compiled):
    assert {one["target"] for one in compiled} == {80, 90}
    spilled = [one for one in compiled if one["spilled"] and "float64" not in one["case"]]
    assert not spilled


def test_two_programs_fit_a_multiprocessor(compiled):
    """256 threads each at most, of 65,536 registers: with one program at a time its loads and arithmetic would take
    turns."""
    assert not [one for one in compiled if one["registers"] * one["warps"] > 128 * 8]


def test_nothing_of_a_float64_kernel_is_float32(compiled):
    """A compile-time number that takes the wrong turn becomes a float32."""
    sums = ("norm_kernel", "sums_kernel")
    chosen = [one for one in compiled if "float64" in one["case"] or one["kernel"] in sums]
    assert chosen
    assert not [one for one in chosen if one["narrow"]]


def test_rows_are_addressed_with_64_bits(compiled):
    """Those of the second launches are few."""
    assert not [one for one in compiled if one["short_offsets"] and one["kernel"] not in SUMS]
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
    **{
        f"adjoint stage {known}+{new}+{ahead} dopri5 float32": traffic.momentum_adjoint_stage(DOPRI5, known, new, ahead)
        for known, new, ahead in ((1, 2, 2), (3, 2, 2), (5, 2, 0), (1, 1, 1))
    },
    "adjoint stage 5+1+1 dopri5 float32 m": traffic.momentum_adjoint_stage(DOPRI5, 5, 1, 1, sees_momentum=True),
    "adjoint stage 9+2+2 dopri8 float32": traffic.momentum_adjoint_stage(DOPRI8, 9, 2, 2),
    "adjoint stage 3+2+2 dopri5 bfloat16": traffic.momentum_adjoint_stage(DOPRI5, 3, 2, 2),
    "adjoint finish dopri5 float32": traffic.momentum_adjoint_finish(DOPRI5),
    "adjoint finish dopri5 float32 sums": traffic.momentum_adjoint_finish(DOPRI5),
    "adjoint finish dopri8 float32 sums": traffic.momentum_adjoint_finish(DOPRI8),
    "adjoint finish rk4 float32": traffic.momentum_adjoint_finish(RK4),
    **{
        f"reverse stage {following}-{new}/6 dopri5 float32": traffic.momentum_reverse_stage(DOPRI5, 6, following, new)
        for following, new in ((6, 2), (4, 2), (2, 2), (6, 1), (1, 1))
    },
    "reverse stage 2-2/7 dopri5 float32 seeds": traffic.momentum_reverse_stage(DOPRI5, 7, 2, 2, seeds=True),
    "reverse stage 1-1/6 dopri5 float32 m": traffic.momentum_reverse_stage(DOPRI5, 6, 1, 1, sees_momentum=True),
    "reverse stage 6-2/6 dopri5 float64": traffic.momentum_reverse_stage(DOPRI5, 6, 6, 2),
    "reverse finish 6 dopri5 float32": traffic.momentum_reverse_finish(DOPRI5, 6),
    "reverse finish 6 dopri5 float32 sums": traffic.momentum_reverse_finish(DOPRI5, 6, quadratures=True),
    "reverse finish 7 dopri5 float32 m seeds sums": traffic.momentum_reverse_finish(DOPRI5, 7, True, True, True),
    "first order stage 5 dopri5 float32": traffic.first_order_step(DOPRI5)[5],
    "first order finish dopri5 float32": traffic.first_order_finish(DOPRI5),
    "first order finish dopri8 float32": traffic.first_order_finish(DOPRI8),
    "first order finish rk4 float32": traffic.first_order_finish(RK4),
}
# Of so many rows that a thread takes half or a quarter of the elements.
NARROWER = (
    "adjoint finish dopri5 float32 sums",
    "adjoint finish dopri8 float32 sums",
    "reverse finish 7 dopri5 float32 m seeds sums",
    "nystrom reverse finish nystrom6 float32 sums",
    "nystrom reverse finish blanes_moan4 float32 sums",
    "nystrom reverse finish blanes_moan4 float32 gated sums",
    "nystrom reverse stage 1 nystrom4 float64 gated",
    "nystrom reverse finish nystrom4 float64 gated sums",
    "nystrom adjoint finish nystrom6 float32 damping",
    *(
        f"nystrom adjoint finish blanes_moan4 float32{label}{sums}"
        for label in ("", " gated")
        for sums in ("", " sums", " damping")
    ),
    "nystrom adjoint stage 6 blanes_moan4 float32 gated",
    "nystrom adjoint stage 2 nystrom4 float64 gated",
    "nystrom adjoint finish nystrom4 float64 damping",
    "nystrom adjoint finish nystrom4 float64 gated damping",
    "nystrom adjoint finish blanes_moan4 float64 gated damping",
)

ADJOINT = traffic.first_order_adjoint_step(DOPRI5)
EXPECTED |= {
    "first order stage 5 dopri5 float32 adjoint": ADJOINT[5],
    "first order stage 5 dopri5 float64 adjoint": ADJOINT[5],
    "first order stage 11 dopri8 float32 adjoint": traffic.first_order_adjoint_step(DOPRI8)[11],
    "first order finish dopri5 float32 adjoint": ADJOINT[-2],
    "first order finish dopri5 float64 adjoint": ADJOINT[-2],
    "first order finish dopri5 bfloat16 adjoint": ADJOINT[-2],
    "first order finish dopri8 float32 adjoint": traffic.first_order_adjoint_step(DOPRI8)[-2],
    "first order finish rk4 float32 adjoint": traffic.first_order_adjoint_step(RK4)[-2],
    "first order reverse stage 0 of 6 dopri5 float32": traffic.first_order_reverse_stage(DOPRI5, 0, 6),
    "first order reverse stage 0 of 6 dopri5 bfloat16": traffic.first_order_reverse_stage(DOPRI5, 0, 6),
    "first order reverse stage 1 of 7 dopri5 float32 seed": traffic.first_order_reverse_stage(DOPRI5, 1, 7, seed=True),
    "first order reverse stage 0 of 16 dopri8 float32 seed": traffic.first_order_reverse_stage(
        DOPRI8, 0, 16, seed=True
    ),
    "first order reverse finish 6 float32": traffic.first_order_reverse_finish(6),
    "first order reverse finish 6 float64": traffic.first_order_reverse_finish(6),
    "first order reverse finish 16 float32": traffic.first_order_reverse_finish(16),
    # Stores inside the loop over the times are there once.
    "first order dense output dopri5 float32": traffic.first_order_dense_output(DOPRI5, 1),
    "first order dense output dopri5 float64": traffic.first_order_dense_output(DOPRI5, 1),
    "first order dense output dopri8 float32": traffic.first_order_dense_output(DOPRI8, 1),
    "momentum dense output dopri5 float32": traffic.momentum_dense_output(DOPRI5, 1),
    "momentum dense output dopri5 float64": traffic.momentum_dense_output(DOPRI5, 1),
    "momentum dense output dopri5 bfloat16": traffic.momentum_dense_output(DOPRI5, 1),
    **{
        f"nystrom stage {known} {method.name} float32{label}": traffic.nystrom_stage(method, bool(label), known)
        for method, known in ((NYSTROM4, 1), (NYSTROM4, 2), (NYSTROM6, 1), (NYSTROM6, 4), (BLANES_MOAN4, 5))
        for label in ("", " gated")
        if not label or method is not NYSTROM6
    },
    **{
        f"nystrom finish {method.name} float32{label}": traffic.nystrom_finish(method, bool(label))
        for method in nystrom.METHODS.values()
        for label in ("", " gated")
        if not label or method is not NYSTROM6
    },
    **{
        f"nystrom reverse stage {stage} {method.name} float32{label}": traffic.nystrom_reverse_stage(
            method, bool(label), stage
        )
        for method in nystrom.METHODS.values()
        for label in ("", " gated")
        if not label or method is not NYSTROM6
        for stage in sorted({0, 1, method.stages - 2} - {method.stages - 1})
    },
    **{
        f"nystrom reverse finish {method.name} float32{label}{sums}": traffic.nystrom_reverse_finish(
            method, bool(label), bool(sums)
        )
        for method in nystrom.METHODS.values()
        for label in ("", " gated")
        for sums in ("", " sums")
        if not label or method is not NYSTROM6
    },
    **{
        f"nystrom adjoint stage {stage} {method.name} float32{label}": traffic.nystrom_adjoint_stage(
            method, bool(label), stage
        )
        for method in nystrom.METHODS.values()
        for label in ("", " gated")
        if not label or method is not NYSTROM6
        for stage in sorted({0, 1, method.stages - 2, method.stages - 1})
    },
    **{
        f"nystrom adjoint finish {method.name} float32{label}{sums}": traffic.nystrom_adjoint_finish(
            method, bool(label)
        )
        for method in nystrom.METHODS.values()
        for label in ("", " gated")
        for sums in ("", " sums", " damping")
        if not label or method is not NYSTROM6
    },
    "nystrom adjoint stage 2 nystrom4 float64 gated": traffic.nystrom_adjoint_stage(NYSTROM4, True, 2),
    "nystrom adjoint stage 2 nystrom4 bfloat16 gated": traffic.nystrom_adjoint_stage(NYSTROM4, True, 2),
    "nystrom adjoint finish nystrom4 float64 damping": traffic.nystrom_adjoint_finish(NYSTROM4, False),
    "nystrom adjoint finish nystrom4 float64 gated damping": traffic.nystrom_adjoint_finish(NYSTROM4, True),
    "nystrom adjoint finish nystrom4 bfloat16 damping": traffic.nystrom_adjoint_finish(NYSTROM4, False),
    "nystrom adjoint finish blanes_moan4 float64 gated damping": traffic.nystrom_adjoint_finish(BLANES_MOAN4, True),
    "nystrom reverse stage 1 nystrom4 float64 gated": traffic.nystrom_reverse_stage(NYSTROM4, True, 1),
    "nystrom reverse finish nystrom4 float64 gated sums": traffic.nystrom_reverse_finish(NYSTROM4, True, True),
    "nystrom stage 0 nystrom4 float32": traffic.nystrom_stage(NYSTROM4, False, 0, output=False),
    "nystrom stage 2 nystrom4 float64 gated": traffic.nystrom_stage(NYSTROM4, True, 2),
    "nystrom finish nystrom6 float64": traffic.nystrom_finish(NYSTROM6, False),
    "nystrom finish nystrom6 bfloat16": traffic.nystrom_finish(NYSTROM6, False),
    "nystrom dense output float32": traffic.nystrom_dense_output(1),
    "nystrom dense output float64 gated": traffic.nystrom_dense_output(1),
    # Of dopri8 a thread works on half as many elements: 8 bytes in bfloat16 are 4, so that only the count is looked at.
    "momentum dense output dopri8 bfloat16": traffic.momentum_dense_output(DOPRI8, 1),
}


@pytest.mark.parametrize("case", list(EXPECTED))
def test_rows_are_those_of_the_count(compiled, case):
    """What benchmarks.traffic counts is what is left in the compiled kernels, and in accesses of 16 bytes a thread."""
    found = [one for one in compiled if one["case"] == case and one["kernel"] not in SUMS]
    assert len(found) == 2
    for one in found:
        assert (one["loads"], one["stores"]) == (EXPECTED[case].read, EXPECTED[case].written)
        if "bfloat16" not in case and case not in NARROWER:
            assert (one["wide_loads"], one["wide_stores"]) == (one["loads"], one["stores"])


@pytest.mark.parametrize(("case", "moved"), [("end float32", 3), ("end float64", 3), ("end float32 taped", 5)])
def test_an_accepted_step_moves_its_rows_once(compiled, case, moved):
    """The new state and slope, and the state before them onto the tape."""
    found = [one for one in compiled if one["case"] == case]
    assert [(one["wide_loads"], one["wide_stores"]) for one in found] == [(moved, moved)] * 2
