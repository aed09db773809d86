"""A step by the methods of `nesterov_triton.nystrom` on blocks, shared by its kernels, and the two small kernels that
make its weights on the device."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from nesterov_triton.nystrom import Nystrom
from nesterov_triton.ops.momentum.kernel import coefficient
from nesterov_triton.ops.nystrom.reference import table
from nesterov_triton.ops.runge_kutta.kernel import start, stored

# The quintics that are 1 in one of y, y', y'' at one end of [0, 1] and 0 in the other five, the constant part first.
QUINTICS = tl.constexpr((
    (1.0, 0.0, 0.0, -10.0, 15.0, -6.0), (0.0, 1.0, 0.0, -6.0, 8.0, -3.0), (0.0, 0.0, 0.5, -1.5, 1.5, -0.5),
    (0.0, 0.0, 0.0, 10.0, -15.0, 6.0), (0.0, 0.0, 0.0, -4.0, 7.0, -3.0), (0.0, 0.0, 0.0, 0.5, -1.0, 0.5),
))  # fmt: skip


@triton.jit
def combined(columns, weights_ptr, base, ROWS: tl.constexpr, K: tl.constexpr):
    """base + Σ_j weight_j columns[j], over the columns of the K-th row that are there; see `reference.Row`."""
    for j in tl.static_range(len(columns)):
        if len(ROWS[K]) > j + 1 and ROWS[K][j + 1]:
            base += tl.load(weights_ptr + (ROWS[K][0] + j)).to(base.dtype) * columns[j]
    return base


@triton.jit
def position(
    x, m, forces, weights_ptr,
    STAGE: tl.constexpr, POSITIONS: tl.constexpr, PATHS: tl.constexpr, gate_x: tl.constexpr, BOUND_X: tl.constexpr,
):  # fmt: skip
    """X_STAGE, a block, from those of x, m and F_0 … F_STAGE-1, by the rows of a `reference.Plan`.

    What the same kernel asks for twice the compiler forms once, as long as nothing is stored in between; and what is
    asked for and not weighed it leaves out."""
    found = x
    if STAGE > 0:
        columns = (x, m) + forces
        if len(PATHS) > 0:
            gates = ()
            for q in tl.static_range(len(POSITIONS[STAGE - 1]) - 1):
                momentum = combined(columns, weights_ptr, tl.zeros_like(x), PATHS, q)
                gates = gates + (gate_x(momentum, BOUND_X),)
            found = combined(gates, weights_ptr, x, POSITIONS, STAGE - 1)
        else:
            found = combined(columns, weights_ptr, tl.zeros_like(x), POSITIONS, STAGE - 1)
    return found


@triton.jit
def linear(coefficients_ptr, STAGE: tl.constexpr, GATED: tl.constexpr, WIDE: tl.constexpr):
    """What X_STAGE is multiplied by in the force."""
    q = coefficient(coefficients_ptr, STAGE, 2, WIDE)
    if not GATED:
        minus_gamma = coefficient(coefficients_ptr, STAGE, 3, WIDE)
        q += minus_gamma * minus_gamma * 0.25
    return q


@triton.jit
def force(
    u, at, coefficients_ptr,
    STAGE: tl.constexpr, GATED: tl.constexpr, gate_f: tl.constexpr, BOUND_F: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """F_STAGE, a block, from the field's output and X_STAGE; rounded to DTYPE, as later kernels will read it."""
    drive = coefficient(coefficients_ptr, STAGE, 1, u.dtype)
    return stored(drive * gate_f(u, BOUND_F) + linear(coefficients_ptr, STAGE, GATED, u.dtype) * at, DTYPE)


@triton.jit
def transposed(cotangents, weights_ptr, base, ROWS: tl.constexpr, COLUMN: tl.constexpr, FIRST: tl.constexpr):
    """base + Σ_k weight_k cotangents[k], of this column in each of the rows from FIRST on."""
    for k in tl.static_range(len(cotangents)):
        if len(ROWS[FIRST + k]) > COLUMN + 1 and ROWS[FIRST + k][COLUMN + 1]:
            base += tl.load(weights_ptr + (ROWS[FIRST + k][0] + COLUMN)).to(base.dtype) * cotangents[k]
    return base


@triton.jit
def sweep_back(
    x, m, forces, of_positions, of_m, weights_ptr,
    STAGE: tl.constexpr, POSITIONS: tl.constexpr, PATHS: tl.constexpr, ENDS: tl.constexpr,
    pullback_x: tl.constexpr, BOUND_X: tl.constexpr,
):  # fmt: skip
    """A tuple of blocks and a block; see `reference.sweep_back`."""
    nothing, nodes = tl.zeros_like(of_m), ()
    first: tl.constexpr = len(POSITIONS[STAGE - 1]) - 1 if STAGE > 0 else 0
    for q in tl.static_range(first, len(PATHS)):
        momentum = combined((x, m) + forces, weights_ptr, nothing, PATHS, q)
        of_gate = transposed(of_positions, weights_ptr, nothing, POSITIONS, q, STAGE)
        nodes = nodes + (pullback_x(of_gate, momentum, BOUND_X),)
    of_force = transposed((of_m,), weights_ptr, nothing, ENDS, 2 + STAGE, 0)
    if len(PATHS) > 0:
        of_force = transposed(nodes, weights_ptr, of_force, PATHS, 2 + STAGE, first)
    else:
        of_force = transposed(of_positions, weights_ptr, of_force, POSITIONS, 2 + STAGE, STAGE)
    return nodes, of_force


@triton.jit
def start_cotangents(
    nodes, of_positions, of_m, weights_ptr, POSITIONS: tl.constexpr, PATHS: tl.constexpr, ENDS: tl.constexpr
):
    """Two blocks; see `reference.start_cotangents`."""
    nothing = tl.zeros_like(of_m)
    of_x = transposed((of_m,), weights_ptr, nothing, ENDS, 0, 0)
    of_start = transposed((of_m,), weights_ptr, nothing, ENDS, 1, 0)
    if len(PATHS) > 0:
        for k in tl.static_range(len(of_positions)):
            of_x += of_positions[k]
        of_start = transposed(nodes, weights_ptr, of_start, PATHS, 1, 0)
    else:
        of_x = transposed(of_positions, weights_ptr, of_x, POSITIONS, 0, 0)
        of_start = transposed(of_positions, weights_ptr, of_start, POSITIONS, 1, 0)
    return of_x, of_start


@triton.jit
def first_cotangents(
    x, m, forces, of_positions, of_m, weights_ptr, kick_ptr, given_ptr, offsets, mask, n,
    POSITIONS: tl.constexpr, PATHS: tl.constexpr, ENDS: tl.constexpr, pullback_x: tl.constexpr, BOUND_X: tl.constexpr,
):  # fmt: skip
    """The cotangents of the nodes, and of x, m and the force at the step's start, that of x but for what comes through
    the force; see `nystrom_reverse_stage.reference.first_cotangents`."""
    nodes, of_force = sweep_back(
        x, m, forces, of_positions, of_m, weights_ptr, 0, POSITIONS, PATHS, ENDS, pullback_x, BOUND_X
    )
    of_x, of_start = start_cotangents(nodes, of_positions, of_m, weights_ptr, POSITIONS, PATHS, ENDS)
    if given_ptr is not None:
        of_x += tl.load(given_ptr + offsets, mask=mask).to(of_m.dtype)
        of_start += tl.load(given_ptr + n + offsets, mask=mask).to(of_m.dtype)
        of_force += tl.load(given_ptr + n + n + offsets, mask=mask).to(of_m.dtype)
    of_force += tl.load(kick_ptr).to(of_m.dtype) * of_start
    return nodes, of_x, of_start, of_force


@triton.jit
def adjoint_path(
    x, m, forces, a_x, a_m, through, coefficients_ptr, weights_ptr,
    POSITIONS: tl.constexpr, PATHS: tl.constexpr, GROWTH: tl.constexpr, pullback_x: tl.constexpr, BOUND_X: tl.constexpr,
):  # fmt: skip
    """Two tuples of blocks; see `reference.adjoint_path`. GROWTH: where the step's growth is among its weights."""
    nothing = tl.zeros_like(a_m)
    positions, pulled, nodes = (a_m,), (), ()
    for j in tl.static_range(len(through)):
        scale = coefficient(coefficients_ptr, j, 0, a_m.dtype) / tl.load(weights_ptr + (GROWTH + j)).to(a_m.dtype)
        of_position = linear(coefficients_ptr, j, len(PATHS) > 0, a_m.dtype) * positions[j]
        pulled = pulled + (scale * through[j] + of_position,)
        if j < len(POSITIONS):
            columns = (a_m, -a_x) + pulled
            if len(PATHS) > 0:
                for q in tl.static_range(len(nodes), len(POSITIONS[j]) - 1):
                    momentum = combined((x, m) + forces, weights_ptr, nothing, PATHS, q)
                    nodes = nodes + (pullback_x(combined(columns, weights_ptr, nothing, PATHS, q), momentum, BOUND_X),)
                positions = positions + (combined(nodes, weights_ptr, a_m, POSITIONS, j),)
            else:
                positions = positions + (combined(columns, weights_ptr, nothing, POSITIONS, j),)
    return positions, pulled


@triton.jit
def step_weights_kernel(table_ptr, dt_ptr, coefficients_ptr, weights_ptr, SHARE: tl.constexpr, RATES: tl.constexpr,
                        SIZE: tl.constexpr, LANES: tl.constexpr):  # fmt: skip
    """One program; see `reference.weights_for` and `rates_for`. The damping is in the first of the rows (κ, s, q, -γ),
    and r = SHARE γ."""
    lanes = tl.arange(0, LANES).to(tl.int64)
    mask = lanes < SIZE
    h = tl.load(dt_ptr)
    r = -tl.load(coefficients_ptr + 3) * SHARE
    g = r * h
    age = tl.load(table_ptr + lanes, mask=mask, other=0.0)
    one = tl.load(table_ptr + SIZE + lanes, mask=mask, other=0.0)
    of_h = tl.load(table_ptr + 2 * SIZE + lanes, mask=mask, other=0.0)
    of_square = tl.load(table_ptr + 3 * SIZE + lanes, mask=mask, other=0.0)
    of_g = tl.load(table_ptr + 4 * SIZE + lanes, mask=mask, other=0.0)
    of_gh = tl.load(table_ptr + 5 * SIZE + lanes, mask=mask, other=0.0)
    of_rg = tl.load(table_ptr + 6 * SIZE + lanes, mask=mask, other=0.0)
    total = one + of_h * h + of_square * (h * h) + of_g * g + of_gh * (g * h) + of_rg * (r * g)
    if RATES:
        total = ((of_g + of_gh * h) * h + of_rg * (2 * g) - age * h * total) * SHARE
    tl.store(weights_ptr + lanes, tl.exp(-age * g) * total, mask=mask)


def launch_step_weights(
    dt: Tensor, coefficients: Tensor, method: Nystrom, gated: bool, rates: bool = False, growth: bool = False
) -> Tensor:
    """As `ops.nystrom.step_weights`, by the kernel."""
    numbers = table(method, gated, dt.device, growth)
    size = numbers.shape[1]
    weights = dt.new_empty(size)
    start(
        step_weights_kernel, 1, numbers, dt, coefficients, weights, 1.0 if gated else 0.5, rates, size,
        triton.next_power_of_2(size), num_warps=4,
    )  # fmt: skip
    return weights


@triton.jit
def quintic(s, K: tl.constexpr):
    """The K-th of `QUINTICS` at s, and its derivative there."""
    value, rate = tl.zeros_like(s), tl.zeros_like(s)
    for k in tl.static_range(6):
        rate = rate * s + value
        value = value * s + QUINTICS[K][5 - k]
    return value, rate


# Not specialised: neither 1 nor any other number of times gets a kernel of its own.
@triton.jit(do_not_specialize=["times"])
def dense_weights_kernel(theta_ptr, dt_ptr, coefficients_ptr, weights_ptr, times, GATED: tl.constexpr,
                         LANES: tl.constexpr):  # fmt: skip
    """A block of times; see `reference.hermite`."""
    lanes = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    mask = lanes < times
    s = tl.load(theta_ptr + lanes, mask=mask, other=0.0)
    h, gamma = tl.load(dt_ptr), -tl.load(coefficients_ptr + 3)
    if GATED:
        of_x, of_m = weights_ptr + lanes * 16, weights_ptr + lanes * 16 + 12
        for end in tl.static_range(2):
            late = s if end == 0 else 1.0 - s  # counted from this end
            early = 1.0 - late
            value, slope = early * early * (1.0 + 2.0 * late), late * early * early * (h if end == 0 else -h)
            tl.store(of_x + 2 * end, value, mask=mask)
            tl.store(of_x + 2 * end + 1, slope, mask=mask)
            tl.store(of_m + 2 * end, value - slope * gamma, mask=mask)
            tl.store(of_m + 2 * end + 1, slope, mask=mask)
            tl.store(of_x + 4 + 2 * end, s * 0.0, mask=mask)
            tl.store(of_x + 5 + 2 * end, s * 0.0, mask=mask)
            tl.store(of_m - 4 + 2 * end, s * 0.0, mask=mask)
            tl.store(of_m - 3 + 2 * end, s * 0.0, mask=mask)
    else:
        half = gamma * 0.5
        for end in tl.static_range(2):
            y, dy = quintic(s, 3 * end)
            v, dv = quintic(s, 3 * end + 1)
            a, da = quintic(s, 3 * end + 2)
            decay = tl.exp(-half * h * (s - end))
            for part in tl.static_range(2):
                of_y, of_v, of_a = y, v * h, a * (h * h)
                if part == 1:
                    of_y, of_v, of_a = dy / h - half * of_y, dv - half * of_v, da * h - half * of_a
                place = weights_ptr + lanes * 12 + (6 * part + 3 * end)
                tl.store(place, (of_y + of_v * half) * decay, mask=mask)
                tl.store(place + 1, of_v * decay, mask=mask)
                tl.store(place + 2, of_a * decay, mask=mask)


def launch_dense_weights(theta: Tensor, dt: Tensor, coefficients: Tensor, gated: bool) -> Tensor:
    """As `ops.nystrom.dense_weights`, by the kernel."""
    times, lanes = len(theta), 64
    weights = dt.new_empty((times, 2, 8 if gated else 6))
    programs = triton.cdiv(times, lanes)
    start(dense_weights_kernel, programs, theta, dt, coefficients, weights, times, gated, lanes, num_warps=2)
    return weights
