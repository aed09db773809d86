"""Compiles the kernels ahead of time, with no GPU and no driver, and prints one JSON line for each.

Run as a script, in a process of its own and without TRITON_INTERPRET: `python tests/compile_kernels.py 80 90`. The
launchers themselves are called, so that argument types, alignment and launch options are those of a launch; only the
launch is left out.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.runtime.jit import JITFunction

from nesterov_triton import gates, nystrom, tableaus
from nesterov_triton.gates_triton import FORMS
from nesterov_triton.ops import control
from nesterov_triton.ops.control import kernel as control_kernel
from nesterov_triton.ops.first_order_dense_output import kernel as first_order_dense_output
from nesterov_triton.ops.first_order_finish import kernel as first_order_finish
from nesterov_triton.ops.first_order_reverse_finish import kernel as first_order_reverse_finish
from nesterov_triton.ops.first_order_reverse_stage import kernel as first_order_reverse_stage
from nesterov_triton.ops.first_order_stage import kernel as first_order_stage
from nesterov_triton.ops.momentum_adjoint_finish import kernel as momentum_adjoint_finish
from nesterov_triton.ops.momentum_adjoint_stage import kernel as momentum_adjoint_stage
from nesterov_triton.ops.momentum_dense_output import kernel as momentum_dense_output
from nesterov_triton.ops.momentum_finish import kernel as momentum_finish
from nesterov_triton.ops.momentum_reverse_finish import kernel as momentum_reverse_finish
from nesterov_triton.ops.momentum_reverse_stage import kernel as momentum_reverse_stage
from nesterov_triton.ops.momentum_stage import kernel as momentum_stage
from nesterov_triton.ops.nystrom import kernel as nystrom_weights
from nesterov_triton.ops.nystrom.reference import size_of
from nesterov_triton.ops.nystrom_adjoint_finish import kernel as nystrom_adjoint_finish
from nesterov_triton.ops.nystrom_adjoint_stage import kernel as nystrom_adjoint_stage
from nesterov_triton.ops.nystrom_dense_output import kernel as nystrom_dense_output
from nesterov_triton.ops.nystrom_finish import kernel as nystrom_finish
from nesterov_triton.ops.nystrom_reverse_finish import kernel as nystrom_reverse_finish
from nesterov_triton.ops.nystrom_reverse_stage import kernel as nystrom_reverse_stage
from nesterov_triton.ops.nystrom_stage import kernel as nystrom_stage

N = 1 << 16
SOFTCLIP, HARDTANH, IDENTITY = gates.Softclip(5.0), gates.Hardtanh(5.0), gates.Identity()


class Driver:
    """What triton asks of a driver in order to compile."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return self.capability  # keeps the caches of the two targets apart

    def get_current_stream(self, device: object = None) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def resources(ptx: str, capability: int) -> dict[str, int]:
    """Registers and spilled bytes, by the assembler that triton uses."""
    arch = f"sm_{capability}a" if capability >= 90 else f"sm_{capability}"
    found = get_ptxas(capability) if get_ptxas.__code__.co_argcount else get_ptxas()
    ptxas = getattr(found, "path", found)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        command = [str(ptxas), "-v", f"--gpu-name={arch}", str(source), "-o", str(Path(folder, "kernel.cubin"))]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spilled = [int(x) for x in re.findall(r"(\d+) bytes spill", said)]
    return {"registers": int(re.search(r"Used (\d+) registers", said)[1]), "spilled": sum(spilled)}


def main(capabilities: list[int]) -> None:
    compiled: list[tuple[str, object]] = []
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):  # type: ignore[no-untyped-def]
        compiled.append((self.fn.__name__, run(self, *args, grid=grid, warmup=True, **kwargs)))

    JITFunction.run = compile_only
    for capability in capabilities:
        triton.runtime.driver.set_active(Driver(capability))
        for label, call in (*cases(), *first_order_cases(), *dense_output_cases(), *nystrom_cases(), *control_cases()):
            compiled.clear()
            call()
            for name, kernel in compiled:
                ptx, ttir = kernel.asm["ptx"], kernel.asm["ttir"]
                line = {
                    "triton": triton.__version__,
                    "target": capability,
                    "case": label,
                    "kernel": name,
                    **resources(ptx, capability),
                    "warps": kernel.metadata.num_warps,
                    # Rows read and written: block loads and stores that are left after the compiler's clean-up.
                    "loads": len(re.findall(r"tt\.load .*: tensor<", ttir)),
                    "stores": len(re.findall(r"tt\.store .*: tensor<", ttir)),
                    # Those of a whole 16 bytes, in the assembly.
                    "wide_loads": len(re.findall(r"ld\.global\S*\.v4\.b32|ld\.global\S*\.v2\.b64", ptx)),
                    "wide_stores": len(re.findall(r"st\.global\S*\.v4\.b32|st\.global\S*\.v2\.b64", ptx)),
                    "narrow": "f32" in ttir,
                    # Offsets of blocks of 32 bits would show as an addptr that takes them.
                    "short_offsets": len(re.findall(r"tt\.addptr .*tensor<\d+xi32>", ttir)),
                }
                print(json.dumps(line), flush=True)


def cases():  # type: ignore[no-untyped-def]
    """(label, a call of a launcher)."""
    float32, dopri5, dopri8 = torch.float32, tableaus.get("dopri5"), tableaus.get("dopri8")
    for known, new, ahead in ((1, 0, 2), (0, 1, 2), (1, 2, 2), (3, 2, 2), (1, 0, 1), (5, 1, 1)):
        yield f"momentum stage {known}+{new}+{ahead} dopri5 float32", stage_call(dopri5, known, new, ahead, float32)
    yield "momentum stage 3+1+1 dopri5 float32 m", stage_call(dopri5, 3, 1, 1, float32, IDENTITY, momentum=True)
    yield "momentum stage 3+2+2 dopri5 float32 hardtanh", stage_call(dopri5, 3, 2, 2, float32, HARDTANH)
    yield "momentum stage 9+2+2 dopri8 float32", stage_call(dopri8, 9, 2, 2, float32)
    yield "momentum stage 3+2+2 dopri5 float32 long", long_stage_call(dopri5)
    yield "momentum finish dopri5 float32", finish_call(dopri5, float32)
    yield "momentum finish dopri5 float32 hardtanh", finish_call(dopri5, float32, HARDTANH)
    yield "momentum finish dopri8 float32", finish_call(dopri8, float32)
    yield "momentum finish rk4 float32", finish_call(tableaus.get("rk4"), float32, new=1)
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        yield f"momentum stage 3+2+2 dopri5 {name}", stage_call(dopri5, 3, 2, 2, dtype)
        yield f"momentum finish dopri5 {name}", finish_call(dopri5, dtype)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        yield f"first order stage 5 dopri5 {name}", first_order_stage_call(dopri5, 5, dtype)
        yield f"first order finish dopri5 {name}", first_order_finish_call(dopri5, dtype)
    yield "first order finish dopri8 float32", first_order_finish_call(dopri8, float32)
    yield "first order finish rk4 float32", first_order_finish_call(tableaus.get("rk4"), float32)
    yield from adjoint_cases()


def adjoint_cases():  # type: ignore[no-untyped-def]
    """(label, a call of a launcher) of the continuous adjoint and of the reverse sweep."""
    float32, dopri5, dopri8 = torch.float32, tableaus.get("dopri5"), tableaus.get("dopri8")
    for known, new, ahead in ((1, 2, 2), (3, 2, 2), (5, 2, 0), (1, 1, 1)):
        yield f"adjoint stage {known}+{new}+{ahead} dopri5 float32", adjoint_stage_call(dopri5, known, new, ahead)
    yield "adjoint stage 5+1+1 dopri5 float32 m", adjoint_stage_call(dopri5, 5, 1, 1, sees_momentum=True)
    yield "adjoint stage 9+2+2 dopri8 float32", adjoint_stage_call(dopri8, 9, 2, 2)
    yield "adjoint finish dopri5 float32", adjoint_finish_call(dopri5)
    yield "adjoint finish dopri5 float32 sums", adjoint_finish_call(dopri5, quadratures=True)
    yield "adjoint finish dopri8 float32 sums", adjoint_finish_call(dopri8, quadratures=True)
    yield "adjoint finish rk4 float32", adjoint_finish_call(tableaus.get("rk4"))
    for following, new in ((6, 2), (4, 2), (2, 2), (6, 1), (1, 1)):
        yield f"reverse stage {following}-{new}/6 dopri5 float32", reverse_stage_call(dopri5, 6, following, new)
    yield "reverse stage 2-2/7 dopri5 float32 seeds", reverse_stage_call(dopri5, 7, 2, 2, seeded=True)
    yield "reverse stage 1-1/6 dopri5 float32 m", reverse_stage_call(dopri5, 6, 1, 1, sees_momentum=True)
    yield "reverse finish 6 dopri5 float32", reverse_finish_call(dopri5, 6)
    yield "reverse finish 6 dopri5 float32 sums", reverse_finish_call(dopri5, 6, quadratures=True)
    yield "reverse finish 7 dopri5 float32 m seeds sums", reverse_finish_call(dopri5, 7, float32, True, True, True)
    for dtype in (torch.float64, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        yield f"adjoint stage 3+2+2 dopri5 {name}", adjoint_stage_call(dopri5, 3, 2, 2, dtype)
        yield f"reverse stage 6-2/6 dopri5 {name}", reverse_stage_call(dopri5, 6, 6, 2, dtype)
        yield f"reverse finish 6 dopri5 {name} sums", reverse_finish_call(dopri5, 6, dtype, quadratures=True)
    yield (
        "adjoint finish dopri5 float64 hardtanh sums",
        adjoint_finish_call(dopri5, torch.float64, HARDTANH, quadratures=True),
    )


def first_order_cases():  # type: ignore[no-untyped-def]
    """As `cases`: the adjoint of a first-order system, and the transposed step."""
    float32, dopri5, dopri8 = torch.float32, tableaus.get("dopri5"), tableaus.get("dopri8")
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        yield f"first order stage 5 dopri5 {name} adjoint", first_order_stage_call(dopri5, 5, dtype, adjoint=True)
        yield f"first order finish dopri5 {name} adjoint", first_order_finish_call(dopri5, dtype, adjoint=True)
        yield f"first order reverse stage 0 of 6 dopri5 {name}", first_order_reverse_stage_call(dopri5, 0, 6, dtype)
        yield f"first order reverse finish 6 {name}", first_order_reverse_finish_call(6, dtype)
    for method in ("dopri8", "rk4"):
        finish = first_order_finish_call(tableaus.get(method), float32, adjoint=True)
        yield f"first order finish {method} float32 adjoint", finish
    yield "first order stage 11 dopri8 float32 adjoint", first_order_stage_call(dopri8, 11, float32, adjoint=True)
    yield (
        "first order reverse stage 1 of 7 dopri5 float32 seed",
        first_order_reverse_stage_call(dopri5, 1, 7, float32, seed=True),
    )
    yield (
        "first order reverse stage 0 of 16 dopri8 float32 seed",
        first_order_reverse_stage_call(dopri8, 0, 16, float32, seed=True),
    )
    yield "first order reverse finish 16 float32", first_order_reverse_finish_call(16, float32)


def first_order_reverse_stage_call(tableau, stage, stages, dtype, seed=False):  # type: ignore[no-untyped-def]
    cotangent, *through = rows(stages - stage, dtype)
    (extra,) = rows(1, dtype) if seed else (None,)
    return lambda: first_order_reverse_stage.launch(cotangent, through, *scalars(1), tableau, stages, extra)


def first_order_reverse_finish_call(stages, dtype):  # type: ignore[no-untyped-def]
    cotangent, *through = rows(1 + stages, dtype)
    return lambda: first_order_reverse_finish.launch(cotangent, through)


def dense_output_cases():  # type: ignore[no-untyped-def]
    """As `cases`; the number of times is known to no kernel."""
    for method, dtypes in (("dopri5", (torch.float32, torch.float64, torch.bfloat16)), ("dopri8", (torch.float32,))):
        for dtype in dtypes:
            name, tableau = str(dtype).removeprefix("torch."), tableaus.get(method)
            yield f"first order dense output {method} {name}", first_order_dense_output_call(tableau, dtype)
            yield f"momentum dense output {method} {name}", momentum_dense_output_call(tableau, dtype)
    yield "momentum dense output dopri8 float64", momentum_dense_output_call(tableaus.get("dopri8"), torch.float64)
    yield "momentum dense output dopri8 bfloat16", momentum_dense_output_call(tableaus.get("dopri8"), torch.bfloat16)


def first_order_dense_output_call(tableau, dtype):  # type: ignore[no-untyped-def]
    y, *slopes = rows(1 + len(tableau.interpolant), dtype)
    weights = torch.empty((3, len(slopes)), dtype=torch.float64)
    return lambda: first_order_dense_output.launch(y, slopes, weights, *scalars(1), tableau)


def momentum_dense_output_call(tableau, dtype):  # type: ignore[no-untyped-def]
    slopes, z = rows(len(tableau.interpolant), dtype), torch.empty(2 * N, dtype=dtype)
    weights = torch.empty((3, len(slopes)), dtype=torch.float64)
    return lambda: momentum_dense_output.launch(z, slopes, weights, *scalars(1), tableau, SOFTCLIP)


def nystrom_cases():  # type: ignore[no-untyped-def]
    """As `cases`, of the methods of `nystrom`, without a gate on the momentum and with one."""
    for name, method in nystrom.METHODS.items():
        for gate, label in ((IDENTITY, ""), (SOFTCLIP, " gated")):
            if gate is IDENTITY or method.gated is not None:
                for forces in {1, method.stages - 2} - {method.stages - 1}:
                    yield f"nystrom stage {forces} {name} float32{label}", nystrom_stage_call(method, forces, gate)
                yield f"nystrom finish {name} float32{label}", nystrom_finish_call(method, gate)
                yield f"nystrom weights {name} float64{label}", nystrom_weights_call(method, gate)
                for stage in {0, 1, method.stages - 2} - {method.stages - 1}:
                    call = nystrom_reverse_stage_call(method, stage, gate)
                    yield f"nystrom reverse stage {stage} {name} float32{label}", call
                for wanted, sums in ((False, ""), (True, " sums")):
                    call = nystrom_reverse_finish_call(method, gate, wanted)
                    yield f"nystrom reverse finish {name} float32{label}{sums}", call
                yield from nystrom_adjoint_cases(name, method, gate, label)
    nystrom4 = nystrom.METHODS["nystrom4"]
    yield "nystrom stage 0 nystrom4 float32", nystrom_stage_call(nystrom4, 0, IDENTITY)
    for dtype in (torch.float64, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        yield f"nystrom stage 2 nystrom4 {name} gated", nystrom_stage_call(nystrom4, 2, SOFTCLIP, dtype)
        yield f"nystrom finish nystrom4 {name} gated", nystrom_finish_call(nystrom4, SOFTCLIP, dtype)
        yield f"nystrom finish nystrom6 {name}", nystrom_finish_call(nystrom.METHODS["nystrom6"], IDENTITY, dtype)
        yield f"nystrom reverse stage 1 nystrom4 {name} gated", nystrom_reverse_stage_call(nystrom4, 1, SOFTCLIP, dtype)
        call = nystrom_reverse_finish_call(nystrom4, SOFTCLIP, True, dtype)
        yield f"nystrom reverse finish nystrom4 {name} gated sums", call
        yield f"nystrom adjoint stage 2 nystrom4 {name} gated", nystrom_adjoint_stage_call(nystrom4, 2, SOFTCLIP, dtype)
        for gate, label in ((IDENTITY, ""), (SOFTCLIP, " gated")):
            call = nystrom_adjoint_finish_call(nystrom4, gate, "damping", dtype)
            yield f"nystrom adjoint finish nystrom4 {name}{label} damping", call
    for gate, label in ((IDENTITY, ""), (SOFTCLIP, " gated")):  # the one of most stages
        blanes_moan4 = nystrom.METHODS["blanes_moan4"]
        call = nystrom_adjoint_stage_call(blanes_moan4, 5, gate, torch.float64)
        yield f"nystrom adjoint stage 5 blanes_moan4 float64{label}", call
        call = nystrom_adjoint_finish_call(blanes_moan4, gate, "damping", torch.float64)
        yield f"nystrom adjoint finish blanes_moan4 float64{label} damping", call
    for dtype in (torch.float32, torch.float64):
        for gate, label in ((IDENTITY, ""), (SOFTCLIP, " gated")):
            name = str(dtype).removeprefix("torch.")
            yield f"nystrom dense output {name}{label}", nystrom_dense_output_call(gate, dtype)
            if dtype == torch.float64:
                yield f"nystrom dense weights {name}{label}", nystrom_dense_weights_call(gate)


def nystrom_adjoint_cases(name, method, gate, label):  # type: ignore[no-untyped-def]
    """Of one method; the finish without quadratures, with those of ξ, and with those of γ, too."""
    for stage in sorted({0, 1, method.stages - 2, method.stages - 1}):
        yield f"nystrom adjoint stage {stage} {name} float32{label}", nystrom_adjoint_stage_call(method, stage, gate)
    for sums in ("", " sums", " damping"):
        call = nystrom_adjoint_finish_call(method, gate, sums.strip())
        yield f"nystrom adjoint finish {name} float32{label}{sums}", call


def nystrom_numbers(method, gate, growth=False):  # type: ignore[no-untyped-def]
    """coefficients, weights."""
    size = size_of(method, gate is not IDENTITY, growth)
    return torch.empty((method.stages, 4), dtype=torch.float64), torch.empty(size, dtype=torch.float64)


def nystrom_stage_call(method, forces, gate, dtype=torch.float32):  # type: ignore[no-untyped-def]
    return lambda: nystrom_stage.launch(
        rows(1, dtype)[0] if forces else None, pair(dtype), rows(forces, dtype), *nystrom_numbers(method, gate), method,
        gate, SOFTCLIP, True,
    )  # fmt: skip


def nystrom_finish_call(method, gate, dtype=torch.float32):  # type: ignore[no-untyped-def]
    return lambda: nystrom_finish.launch(
        *rows(1, dtype), pair(dtype), rows(method.stages - 1, dtype), *nystrom_numbers(method, gate), *scalars(2),
        method, gate, SOFTCLIP, True,
    )  # fmt: skip


def nystrom_reverse_stage_call(method, stage, gate, dtype=torch.float32):  # type: ignore[no-untyped-def]
    last = method.stages - 1
    forces, of_positions = rows(0 if gate is IDENTITY else last, dtype), rows(max(0, last - 2 - stage), dtype)
    through = rows(1, dtype)[0] if stage < last - 1 else None
    return lambda: nystrom_reverse_stage.launch(
        *rows(1, dtype), pair(dtype), forces, pair(dtype), of_positions, through, *nystrom_numbers(method, gate),
        *scalars(1), method, gate, SOFTCLIP, None,
    )  # fmt: skip


def nystrom_reverse_finish_call(method, gate, sums, dtype=torch.float32):  # type: ignore[no-untyped-def]
    last, (coefficients, weights) = method.stages - 1, nystrom_numbers(method, gate)
    forces = rows(last if sums or gate is not IDENTITY else 0, dtype)
    return lambda: nystrom_reverse_finish.launch(
        pair(dtype), forces, pair(dtype), rows(last - 1, dtype), *rows(1, dtype), coefficients, weights, *scalars(1),
        method, gate, None, weights if sums else None,
    )  # fmt: skip


def nystrom_adjoint_stage_call(method, stage, gate, dtype=torch.float32):  # type: ignore[no-untyped-def]
    return lambda: nystrom_adjoint_stage.launch(
        *rows(1, dtype), pair(dtype), rows(stage, dtype), pair(dtype), rows(stage, dtype),
        *nystrom_numbers(method, gate, True), method, gate, SOFTCLIP, stage < method.stages - 1,
    )  # fmt: skip


def nystrom_adjoint_finish_call(method, gate, sums, dtype=torch.float32):  # type: ignore[no-untyped-def]
    last, shape = method.stages - 1, (3, 2, 6 if gate is IDENTITY else 8)
    return lambda: nystrom_adjoint_finish.launch(
        *rows(1, dtype), pair(dtype), rows(last, dtype), pair(dtype), rows(last + 1, dtype),
        *nystrom_numbers(method, gate, True), *scalars(3), method, gate, SOFTCLIP, True, bool(sums),
        torch.empty(shape, dtype=torch.float64) if sums == "damping" else None,
    )  # fmt: skip


def nystrom_weights_call(method, gate):  # type: ignore[no-untyped-def]
    dt, (coefficients, _) = torch.empty(1, dtype=torch.float64), nystrom_numbers(method, gate)
    return lambda: nystrom_weights.launch_step_weights(dt, coefficients, method, gate is not IDENTITY)


def nystrom_dense_weights_call(gate):  # type: ignore[no-untyped-def]
    theta, dt, coefficients = (torch.empty(k, dtype=torch.float64) for k in ((100,), (1,), (4, 4)))
    return lambda: nystrom_weights.launch_dense_weights(theta, dt, coefficients, gate is not IDENTITY)


def nystrom_dense_output_call(gate, dtype):  # type: ignore[no-untyped-def]
    weights = torch.empty((3, 2, 6 if gate is IDENTITY else 8), dtype=torch.float64)
    force, end_force = rows(2, dtype)
    return lambda: nystrom_dense_output.launch(pair(dtype), force, pair(dtype), end_force, weights, gate)


def control_cases():  # type: ignore[no-untyped-def]
    """(label, a call of a launcher) of the loop on the device."""
    dopri5 = tableaus.get("dopri5")
    for dtype in (torch.float32, torch.float64):
        name = str(dtype).removeprefix("torch.")
        for label, law in (("", control.Law(True, True, -1.0, SOFTCLIP)), ("first order ", None)):
            yield f"{label}begin {name}", begin_call(dopri5, dtype, law, adaptive=True)
        yield f"begin fixed {name}", begin_call(dopri5, dtype, control.Law(True, False, -1.0, HARDTANH), adaptive=False)
        yield f"end {name}", end_call(dtype, taped=False, inside=False)
        yield f"end {name} taped", end_call(dtype, taped=True, inside=True)
        yield f"add accepted {name}", add_accepted_call(dtype)
        yield from ((f"{label} {name}", call) for label, call in first_step_calls(dtype))
    yield "weigh float64", weigh_call(dopri5)


def begin_call(tableau, dtype, law, adaptive):  # type: ignore[no-untyped-def]
    s = tableau.stages
    numbers = [torch.empty(k, dtype=torch.float64) for k in (control.SLOTS, control.SLOTS, control.SETTINGS, s)]
    needs = torch.empty(s, dtype=dtype), coefficients(tableau), torch.empty(1, dtype=torch.float64)
    return lambda: control_kernel.launch_begin(*numbers, *needs, adaptive, law)


def weigh_call(tableau):  # type: ignore[no-untyped-def]
    attempt, requested = (torch.empty(k, dtype=torch.float64) for k in (control.SLOTS, 100))
    weights = torch.empty((100, len(tableau.interpolant)), dtype=torch.float64)
    span = torch.empty(2, dtype=torch.int64)
    return lambda: control_kernel.launch_weigh(attempt, *scalars(1), requested, weights, span, tableau.interpolant)


def end_call(dtype, taped, inside):  # type: ignore[no-untyped-def]
    slots, decided, setting = (torch.empty(k, dtype=torch.float64) for k in (control.SLOTS,) * 2 + (control.SETTINGS,))
    requested = torch.empty(100, dtype=torch.float64) if inside else None
    tape = torch.empty((4, 2, N), dtype=dtype) if taped else None
    report = torch.empty(control.SPANS + 8, dtype=torch.float64)
    kept, new = rows(3, dtype), rows(3, dtype)
    return lambda: control_kernel.launch_end(
        slots, decided, setting, *scalars(1), requested, kept, new, 2, tape, report, True
    )


def first_step_calls(dtype):  # type: ignore[no-untyped-def]
    decided, trial, setting = (
        torch.empty(k, dtype=torch.float64) for k in (control.SLOTS, control.SLOTS, control.SETTINGS)
    )
    z, slope, second = (torch.empty(2 * N, dtype=dtype) for _ in range(3))
    sizes = torch.empty(3, dtype=torch.float64)
    given = decided, setting, z, slope
    yield "propose", lambda: control_kernel.launch_propose(decided, trial, setting, z, slope, sizes, True)
    yield "extrapolate", lambda: control_kernel.launch_extrapolate(*given, sizes, torch.empty_like(z))
    yield "choose", lambda: control_kernel.launch_choose(*given, second, sizes)


def add_accepted_call(dtype):  # type: ignore[no-untyped-def]
    decided, attempt = (torch.empty(control.SLOTS, dtype=torch.float64) for _ in range(2))
    return lambda: control_kernel.launch_add_accepted(decided, attempt, *rows(4, dtype))


def rows(count: int, dtype: torch.dtype) -> list[torch.Tensor]:
    return [torch.empty(N, dtype=dtype) for _ in range(count)]


def scalars(count: int) -> list[torch.Tensor]:
    return [torch.empty((), dtype=torch.float64) for _ in range(count)]


def coefficients(tableau: tableaus.Tableau) -> torch.Tensor:
    return torch.empty((tableau.stages, 4), dtype=torch.float64)


def stage_call(tableau, known, new, ahead, dtype, gate=SOFTCLIP, momentum=False):  # type: ignore[no-untyped-def]
    outputs, slopes, z = rows(new, dtype), rows(known, dtype), torch.empty(2 * N, dtype=dtype)
    return lambda: momentum_stage.launch(
        outputs, z, slopes, coefficients(tableau), *scalars(1), tableau, gate, gate, ahead, momentum
    )


def long_stage_call(tableau):  # type: ignore[no-untyped-def]
    """More elements than 32 bits count; the memory need not be there in order to compile."""
    u, z, c, (dt,) = rows(3, torch.float32), torch.empty(N), coefficients(tableau), scalars(1)
    shape = tableau.all_a, (True,) * 3, 2, 2
    return lambda: momentum_stage.stage_kernel[(1,)](
        z, (u[0], u[1]), tuple(u), c, dt, (u[0], u[1]), (u[0], u[1]), None, 2**31 + 16,
        *shape, *softclip_form(), *softclip_form(), tl.float32, 1024, num_warps=8,
    )  # fmt: skip


def softclip_form():  # type: ignore[no-untyped-def]
    return FORMS["softclip"], SOFTCLIP.bound


def finish_call(tableau, dtype, gate=SOFTCLIP, new=2):  # type: ignore[no-untyped-def]
    outputs, slopes, z = rows(new, dtype), rows(tableau.stages - new, dtype), torch.empty(2 * N, dtype=dtype)
    return lambda: momentum_finish.launch(
        outputs, z, slopes, coefficients(tableau), *scalars(3), tableau, gate, gate, 1
    )


def pair(dtype):  # type: ignore[no-untyped-def]
    return torch.empty(2 * N, dtype=dtype)


def adjoint_stage_call(  # type: ignore[no-untyped-def]
    tableau, known, new, ahead, dtype=torch.float32, sees_momentum=False
):
    return lambda: momentum_adjoint_stage.launch(
        rows(new, dtype), pair(dtype), rows(known, dtype), pair(dtype), rows(known, dtype), coefficients(tableau),
        *scalars(1), tableau, SOFTCLIP, SOFTCLIP, ahead, sees_momentum, rows(known * sees_momentum, dtype),
    )  # fmt: skip


def adjoint_finish_call(  # type: ignore[no-untyped-def]
    tableau, dtype=torch.float32, gate=SOFTCLIP, quadratures=False, sees_momentum=False
):
    count = tableau.stages
    return lambda: momentum_adjoint_finish.launch(
        pair(dtype), rows(count, dtype), pair(dtype), rows(count, dtype), coefficients(tableau), *scalars(3),
        tableau, gate, gate, quadratures, rows(count * sees_momentum, dtype),
    )  # fmt: skip


def reverse_stage_call(  # type: ignore[no-untyped-def]
    tableau, count, following, new, dtype=torch.float32, seeded=False, sees_momentum=False
):
    """The launch of the `new` stages before stage `following` of `count`."""
    through = count - following
    slopes = count - (2 if new == 2 and not through else 1)
    return lambda: momentum_reverse_stage.launch(
        rows(new, dtype), pair(dtype), rows(slopes, dtype), pair(dtype), rows(through, dtype), coefficients(tableau),
        *scalars(1), tableau, count, SOFTCLIP, SOFTCLIP, [pair(dtype) for _ in range(count * seeded)],
        rows(through * sees_momentum, dtype),
    )  # fmt: skip


def reverse_finish_call(  # type: ignore[no-untyped-def]
    tableau, count, dtype=torch.float32, quadratures=False, seeded=False, sees_momentum=False
):
    return lambda: momentum_reverse_finish.launch(
        pair(dtype), rows(count - 1, dtype), pair(dtype), rows(count, dtype), coefficients(tableau), *scalars(1),
        tableau, count, SOFTCLIP, SOFTCLIP, quadratures, [pair(dtype) for _ in range(count * seeded)],
        rows(count * sees_momentum, dtype),
    )  # fmt: skip


def first_order_stage_call(tableau, stage, dtype, adjoint=False):  # type: ignore[no-untyped-def]
    slopes, y = rows(stage + 1, dtype), torch.empty((1 + adjoint) * N, dtype=dtype)
    return lambda: first_order_stage.launch(y, slopes, *scalars(1), tableau, stage, slopes if adjoint else ())


def first_order_finish_call(tableau, dtype, adjoint=False):  # type: ignore[no-untyped-def]
    slopes, y = rows(tableau.stages, dtype), torch.empty((1 + adjoint) * N, dtype=dtype)
    return lambda: first_order_finish.launch(y, slopes, *scalars(3), tableau, slopes if adjoint else ())


if __name__ == "__main__":
    main([int(x) for x in sys.argv[1:]])
