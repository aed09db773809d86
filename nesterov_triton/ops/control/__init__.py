"""The decisions of a loop that never asks the host: step-size control as arithmetic on a few numbers on the device.

An attempted step is `begin`, which decides where it ends and forms what its stages need of the time; the step itself,
by the other operators; `weigh`, where states inside the step are wanted; and `end`, which accepts or rejects, and
reports. `propose`, `extrapolate` and `choose` find the first step size. All write into memory that stays where it is,
so that one attempt can be captured and replayed, and none reads the host. A rejected attempt leaves the state as it
was, and so does one that begins when the solve is over.

What is decided is what `stepping.loop` decides, in the same order. Control is kept twice: `decided` is what the last
attempt left, `attempt` a copy of it with what the attempt under way adds (`Slot`). Counts and flags are float64, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

from torch import Tensor

from nesterov_triton.gates import Gate
from nesterov_triton.ops import dispatch

__all__ = [
    "INFINITE", "SETTINGS", "SLOTS", "SPANS", "Law", "Setting", "Slot",
    "add_accepted", "begin", "choose", "end", "extrapolate", "propose", "weigh",
]  # fmt: skip

RUNNING, MAX_STEPS, STEP_UNDERFLOW, NON_FINITE = range(4)  # Slot.STATUS


class Slot(IntEnum):
    """Where in `decided` and `attempt`, [SLOTS] float64, what is kept."""

    T = 0
    DT = 1  # the step to try next
    PREVIOUS = 2  # error of the last accepted step
    AFTER_REJECTION = 3
    FINITE = 4  # whether the last attempt's error was
    STATUS = 5
    ACCEPTED = 6
    REJECTED = 7
    OUTPUT = 8  # requested times inside the interval that have been passed
    TAPED = 9  # accepted steps on the tape
    FIRST_FINITE = 10  # whether the slope at T is
    T1 = 11  # of the attempt under way: its end,
    H = 12  # its step size,
    LAST = 13  # whether its end is the last time,
    ACTIVE = 14  # and whether it counts at all
    OK = 15  # whether it was accepted; in `decided`
    SOLVE = 16  # a number of the solve, to know a report of this one by


class Setting(IntEnum):
    """Where in `setting`, [SETTINGS] float64, what is constant in a solve."""

    START = 0
    END = 1
    STEP_SIZE = 2  # signed; of fixed-step methods
    COUNT = 3  # of fixed steps
    MAX_STEPS = 4
    SAFETY = 5
    MIN_FACTOR = 6
    MAX_FACTOR = 7
    ALPHA = 8  # exponents of the controller, and of the elementary one
    BETA = 9
    PLAIN = 10
    RTOL = 11
    ATOL = 12
    DAMPING = 13
    XI = 14
    CAPACITY = 15  # of the tape


SLOTS, SETTINGS = 32, len(Setting)  # a power of two, for a block
# A report is `decided`, then whether an accepted state was not finite, then the ends of the steps on the tape.
INFINITE, SPANS = SLOTS, SLOTS + 1


@dataclass(frozen=True)
class Law:
    """What of a momentum system the time-dependent factors are made of, but for γ and ξ; see `systems.Rule`."""

    nesterov: bool
    exact: bool
    sign: float
    gate: Gate
    factor: float = 3.0
    curvature: float = 0.75


def begin(
    decided: Tensor,
    attempt: Tensor,
    setting: Tensor,
    nodes: Tensor,
    times: Tensor,
    coefficients: Tensor,
    dt: Tensor,
    adaptive: bool,
    law: Law | None,
) -> None:
    """Begin an attempt: fills `attempt`, and what its stages need.

    Args:
        decided: control as the last attempt left it, [SLOTS].
        attempt: control of this one, written.
        setting: [SETTINGS].
        nodes: the c_i of the stages, [s] float64.
        times: the stage times, [s] in the state's dtype, written.
        coefficients: rows (κ, s, q, -γ), [s, 4] float64, written; not looked at without `law`.
        dt: the step size, [1] float64, written.
        adaptive: whether the method is.
        law: None for a first-order system.
    """
    run = dispatch.implementation("control.begin", decided)
    run(decided, attempt, setting, nodes, times, coefficients, dt, adaptive, law)


def weigh(
    attempt: Tensor,
    error: Tensor,
    requested: Tensor,
    weights: Tensor,
    span: Tensor,
    interpolant: Sequence[Sequence[float]],
) -> None:
    """Which requested times this attempt passes, if it is accepted, and the interpolant's weights there.

    Args:
        error: the norm of the attempt's embedded error, 0-d float64.
        requested: the times strictly inside the interval, [T] float64.
        weights: b_i(θ_k), [T, stages] float64, written (outside of the span with anything).
        span: the first of them and how many, [2] int64, written.
        interpolant: the polynomials b_i, a row each, from θ on (of the methods of `nystrom` θ itself).
    """
    run = dispatch.implementation("control.weigh", attempt)
    run(attempt, error, requested, weights, span, interpolant)


def end(
    attempt: Tensor,
    decided: Tensor,
    setting: Tensor,
    error: Tensor,
    requested: Tensor | None,
    kept: Sequence[Tensor],
    new: Sequence[Tensor],
    states: int,
    tape: Tensor | None,
    report: Tensor,
    adaptive: bool,
) -> None:
    """End an attempt: fills `decided`; where it is accepted, `kept` becomes `new`, and the tape gets what was there.

    Args:
        attempt: as `begin` left it.
        error: the norm of its embedded error, 0-d float64; of a fixed step 0, or NaN where its end is not finite.
        requested: as `weigh`.
        kept, new: rows of N elements of one dtype: the state's, then the slope's.
        states: how many of the rows, the first ones, are the state's.
        tape: [capacity, states, N], for the state's rows of `kept`; None where nobody wants it.
        report: [SPANS + 2 capacity] float64, for the host: a copy of `decided`; at `INFINITE` 1 where the new state is
            not finite, else left alone; the ends of the steps on the tape. May be pinned memory: it is written only.
        adaptive: whether the method is.
    """
    run = dispatch.implementation("control.end", attempt)
    run(attempt, decided, setting, error, requested, kept, new, states, tape, report, adaptive)


def propose(
    decided: Tensor, trial: Tensor, setting: Tensor, z: Tensor, slope: Tensor, sizes: Tensor, choose: bool
) -> None:
    """Look at the slope at the start; these three are `stepping.initial_step`.

    Args:
        decided: whether the slope is finite is written; where a size is to be chosen that is the solve's status, too,
            since nothing mends it.
        trial: a control at the time to evaluate the slope at once more, [SLOTS], written; only with `choose`.
        z, slope: the state and its derivative, [D].
        sizes: (the trial step's size, the guess that it was cut from, norm of the slope), [3] float64, written; only
            with `choose`.
        choose: whether a size is to be chosen.
    """
    dispatch.implementation("control.propose", z)(decided, trial, setting, z, slope, sizes, choose)


def extrapolate(decided: Tensor, setting: Tensor, z: Tensor, slope: Tensor, sizes: Tensor, out: Tensor) -> None:
    """A step of Euler's method of the trial step's size: writes `out`, [D]."""
    dispatch.implementation("control.extrapolate", z)(decided, setting, z, slope, sizes, out)


def choose(decided: Tensor, setting: Tensor, z: Tensor, slope: Tensor, second: Tensor, sizes: Tensor) -> None:
    """Choose the first step size, from the slope `second` at the time in `propose`'s trial; writes it to `decided`."""
    dispatch.implementation("control.choose", z)(decided, setting, z, slope, second, sizes)


def add_accepted(
    decided: Tensor, attempt: Tensor, total: Tensor, step: Tensor, kept: Tensor | None, new: Tensor | None
) -> None:
    """Where the attempt was accepted: total -= h · step, and `kept` becomes `new`; all of one shape, dtype and layout.

    Raises:
        ValueError: they differ; a kernel sees bare memory.
    """
    for row in (step, kept, new):
        if row is not None and (row.stride() != total.stride() or row.dtype != total.dtype):
            raise ValueError(f"strides {row.stride()} {row.dtype}, expected {total.stride()} {total.dtype}")
    dispatch.implementation("control.add_accepted", decided)(decided, attempt, total, step, kept, new)
