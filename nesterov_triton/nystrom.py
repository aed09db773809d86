"""Methods for momentum systems whose field sees the position alone, as data: Nyström pairs and splittings.

In  x' = σ_x(m),  m' = -γ m + F(t, x)  only the force F costs anything: it holds the field. A step of size dt evaluates

    F_i = F(t + c_i dt, X_i),    X_0 = x,    X_s-1 = x_new

and never computes a force for a momentum. Without a gate, y = e^(γ t / 2) x makes it y'' = G(t, y), for which, with
v = y',

    Y_i   = y + c_i dt v + dt² sum_j a_ij G_j
    v_new = v + dt sum_i b_i G_i                                        (HNW II.14)

With a gate σ_x the positions are integrals of gated momenta at nodes d_q, which need no further force:

    M_q   = e^(-γ d_q dt) m + dt sum_j p_qj e^(-γ (d_q - c_j) dt) F_j
    X_i   = x + dt sum_q w_iq σ_x(M_q)
    m_new = e^(-γ dt) m + dt sum_j b_j e^(-γ (1 - c_j) dt) F_j

which is the first scheme again where σ_x is the identity and γ = 0: a_ij = sum_q w_iq p_qj. For `nystrom4` the
momentum between the nodes is the integral of the polynomial through the forces so far, and each position is a Gauss
quadrature of it: that keeps order 4 for every smooth gate. In a splitting each M_q comes from the one before by a kick,
and each position from the one before by a drift (a partitioned Runge-Kutta method with a diagonal of its own).

A new method is one more entry here. Sources, by the name used below:

- DEP: Dormand, El-Mikkawy, Prince, "Families of Runge-Kutta-Nystrom formulae", IMA J. Numer. Anal. 7 (1987).
- DP: Dormand, Prince, "Runge-Kutta-Nystrom triples", Comput. Math. Appl. 13 (1987).
- BM: Blanes, Moan, "Practical symplectic partitioned Runge-Kutta and Runge-Kutta-Nystrom methods", J. Comput. Appl.
  Math. 142 (2002).
- HNW: Hairer, Norsett, Wanner, "Solving Ordinary Differential Equations I", 2nd ed. (1993).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from nesterov_triton.gates import Identity
from nesterov_triton.systems import Momentum, System

__all__ = ["METHODS", "Gated", "Nystrom", "check"]

Rows = tuple[tuple[float, ...], ...]

# Gauss's quadrature of order 6 on [0, 1]: (point, weight).
POINTS = ((0.5 - math.sqrt(0.15), 5 / 18), (0.5, 4 / 9), (0.5 + math.sqrt(0.15), 5 / 18))


@dataclass(frozen=True)
class Gated:
    """How a method integrates gated momenta.

    Attributes:
        d: the nodes of the momenta, in the order in which they can be computed.
        p: a row for each, over the forces known by then.
        w: s - 1 rows, for X_1 to X_s-1, over the momenta known by then.
    """

    d: tuple[float, ...]
    p: Rows
    w: Rows


@dataclass(frozen=True)
class Nystrom:
    """One explicit method with s forces a step, the last of which is the next step's first.

    Attributes:
        name: what it is asked for by.
        order: of the propagated solution.
        c: s nodes, from 0 to 1.
        a: s rows, row i with i coefficients; the last one leads to x_new.
        b: s weights of m_new.
        error: two rows of s: the error estimates are dt² sum_i error_0i G_i in y and dt sum_i error_1i G_i in v.
        error_order: they are O(dt^(error_order + 1)).
        gated: for systems with a gate on the momentum; None where the method has no form for them.
        reversible: whether a step of size -dt takes a step of size dt back, to rounding.

    Dense output is Hermite's between the ends of a step, where the force is known: without a gate y is a quintic and v
    its derivative; with one x and m are cubics.

    Raises:
        ValueError: the entries don't fit together.
    """

    name: str
    order: int
    c: tuple[float, ...]
    a: Rows
    b: tuple[float, ...]
    error: Rows
    error_order: int
    gated: Gated | None = None
    reversible: bool = False

    adaptive = True
    interpolant = ((1.0,),)  # of a loop on the device: the fraction of the step, from which the weights are made
    controller = "pi"  # a tenth fewer evaluations than with the integral one, whose rejections cost all of them

    def __post_init__(self) -> None:
        s = self.stages
        self._require(self.c[0] == 0 and self.c[-1] == 1, "c must begin with 0 and end with 1")
        self._require([len(row) for row in self.a] == list(range(s)), "a must have a row of i entries for each stage i")
        self._require(
            len(self.b) == s and [len(row) for row in self.error] == [s, s], "b and error must have s entries"
        )
        self._require(_close(sum(self.b), 1) and all(_close(sum(row), 0) for row in self.error), "b must sum to 1")
        self._require(_close(sum(self.a[-1]), 0.5), "the last row of a must sum to 1/2")
        if self.gated is not None:
            for row, weights in zip(self.a[1:], self.gated.w, strict=True):
                for j, a in enumerate(row):
                    through = sum(w * p[j] for w, p in zip(weights, self.gated.p, strict=False) if j < len(p))
                    self._require(_close(through, a), "the gated form must be the other one without a gate")

    @property
    def stages(self) -> int:
        """Forces of a step, that of its start included."""
        return len(self.c)

    @property
    def fsal(self) -> bool:
        """First same as last: always."""
        return True

    @property
    def all_c(self) -> tuple[float, ...]:
        """The nodes, of which dense output needs no more."""
        return self.c

    def __repr__(self) -> str:
        return f"Nystrom({self.name!r}, order={self.order}, stages={self.stages})"

    def __reduce__(self) -> tuple[object, ...]:
        return _registered, (self.name,)

    def _require(self, condition: bool, message: str) -> None:
        if not condition:
            raise ValueError(f"method {self.name!r}: {message}")


def check(method: Nystrom, system: System) -> None:
    """Raise where the method cannot integrate the system.

    Raises:
        ValueError: naming a method that can.
    """
    name = method.name
    if not isinstance(system, Momentum):
        raise ValueError(f"method {name!r} is for momentum systems (x, m); for a first-order system use 'dopri5'")
    if system.sees_momentum:
        raise ValueError(f"method {name!r} needs a field that sees the position alone, not f(t, h, m); use 'dopri5'")
    if method.gated is None and not isinstance(system.gate_x, Identity):
        others = ", ".join(repr(m.name) for m in METHODS.values() if m.gated is not None)
        raise ValueError(f"method {name!r} knows no gate on the momentum (gate_x); use {others} or 'dopri5'")


def _registered(name: str) -> Nystrom:
    return METHODS[name]


def _close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-13, abs_tol=1e-13)


def _floats(rows: Sequence[Sequence[float | Fraction]]) -> Rows:
    return tuple(tuple(map(float, row)) for row in rows)


def _polynomial_paths(c: Sequence[float], a: Rows) -> Gated:
    """The gated form of a pair of order 4 with 4 stages.

    On the way to X_i the force is the polynomial through the forces so far, but for a factor in its linear part on the
    way to X_2 that makes its integral the pair's own; two Gauss nodes integrate what it gives the momentum exactly.
    """
    nodes, rows, weights = list[float](), list[tuple[float, ...]](), list[tuple[float, ...]]()
    for i in range(1, len(c)):
        for g in (0.5 - math.sqrt(3) / 6, 0.5 + math.sqrt(3) / 6):
            d = g * c[i]
            row: tuple[float, ...]
            if i == 2:  # a constant and a linear part: the integral from 0 to d of theta, theta being a21's
                slope = 6 * a[2][1] / c[2] ** 3
                row = (d - slope * d * d / 2, slope * d * d / 2)
            else:
                row = tuple(_integral(_lagrange(c[:i], j), d) for j in range(i))
            nodes.append(d)
            rows.append(row)
        weights.append((0.0,) * (2 * i - 2) + (c[i] / 2, c[i] / 2))
    return Gated(tuple(nodes), tuple(rows), tuple(weights))


def _lagrange(nodes: Sequence[float], j: int) -> list[float]:
    """Coefficients, the constant one first, of the polynomial that is 1 at node j and 0 at the others."""
    coefficients = [1.0]
    for k, node in enumerate(nodes):
        if k != j:
            scale = nodes[j] - node
            shifted = [0.0, *coefficients]
            coefficients = [(s - node * c) / scale for s, c in zip(shifted, [*coefficients, 0.0], strict=True)]
    return coefficients


def _integral(coefficients: Sequence[float], end: float) -> float:
    return sum(c * end ** (k + 1) / (k + 1) for k, c in enumerate(coefficients))


# The published embedded formulas are so far off that a solve comes out a hundred times as accurate as was asked for.
# Any mixture of one with the method itself is one of the same order. These shares make tolerances mean what they do
# with dopri5: on the problems of `benchmarks.structure` errors at the same tolerance are 0.01 to 0.25 of dopri5's for
# trained fields (nystrom6 and blanes_moan4: to 0.9), and no more than five times of them on a smooth oscillator.
_SHARE_4, _SHARE_6, _SHARE_SPLITTING = 1 / 64, 1 / 32, 1 / 1024


def _nystrom4() -> Nystrom:
    """RKN4(3)4FM of DEP."""
    c = (Fraction(0), Fraction(1, 4), Fraction(7, 10), Fraction(1))
    a = _floats([
        (),
        (Fraction(1, 32),),
        (Fraction(7, 1000), Fraction(119, 500)),
        (Fraction(1, 14), Fraction(8, 27), Fraction(25, 189)),
    ])  # fmt: skip
    y = (Fraction(1, 14), Fraction(8, 27), Fraction(25, 189), Fraction(0))
    v = (Fraction(1, 14), Fraction(32, 81), Fraction(250, 567), Fraction(5, 54))
    y_hat = (Fraction(-7, 150), Fraction(67, 150), Fraction(3, 20), Fraction(-1, 20))
    v_hat = (Fraction(13, 21), Fraction(-20, 27), Fraction(275, 189), Fraction(-1, 3))
    nodes = tuple(map(float, c))
    return Nystrom(
        "nystrom4", 4, nodes, a, tuple(map(float, v)), _scaled(_SHARE_4, _minus(y, y_hat), _minus(v, v_hat)), 3,
        gated=_polynomial_paths(nodes, a),
    )  # fmt: skip


def _nystrom6() -> Nystrom:
    """RKN6(4)6FD of DP."""
    r = math.sqrt(8581)
    c = (0, (209 - r) / 900, (209 - r) / 450, (209 + r) / 450, 0.9, 1)
    last = (
        329 / 4212, 0, (84119543 + 366727 * r) / 409622616, (84119543 - 366727 * r) / 409622616, 200 / 17901,
    )  # fmt: skip
    a = _floats([
        (),
        ((26131 - 209 * r) / 810000,),
        ((26131 - 209 * r) / 607500, (26131 - 209 * r) / 303750),
        (
            (980403512254 + 7781688431 * r) / 11694469921875,
            -(1262884486208 + 15385481287 * r) / 11694469921875,
            (7166233891441 + 78694563299 * r) / 46777879687500,
        ),
        (
            -9 * (329260 + 3181 * r) / 27040000,
            27 * (35129 + 3331 * r) / 13520000,
            -27 * (554358343 + 31040327 * r) / 464060480000,
            153 * (8555257 - 67973 * r) / 2745920000,
        ),
        last,
    ])  # fmt: skip
    b = (329 / 4212, 0, (389225579 + 96856 * r) / 1024056540, (389225579 - 96856 * r) / 1024056540, 2000 / 17901, 0.05)
    y_hat = ((2701 + 23 * r) / 4563, -(9829 + 131 * r) / 9126, 5 * (1798 + 17 * r) / 9126, 0, 0, 0)
    v_hat = (
        115 / 2106, 0, (84119543 + 366727 * r) / 256014135, (84119543 - 366727 * r) / 256014135, 6950 / 17901, -0.1,
    )  # fmt: skip
    return Nystrom("nystrom6", 6, c, a, b, _scaled(_SHARE_6, _minus((*last, 0), y_hat), _minus(b, v_hat)), 4)


def _minus(x: Sequence[float | Fraction], y: Sequence[float | Fraction]) -> tuple[float, ...]:
    return tuple(float(a - b) for a, b in zip(x, y, strict=True))


def _scaled(share: float, *rows: Sequence[float]) -> Rows:
    return tuple(tuple(share * x for x in row) for row in rows)


def _splitting(name: str, order: int, kicks: Sequence[float], drifts: Sequence[float], error: Rows, q: int) -> Nystrom:
    """Kick, drift, kick, ..., kick: symmetric, and so taken back by a step of the opposite size."""
    s = len(kicks)
    times = list(itertools.accumulate(drifts))
    c = (0.0, *times[:-1], 1.0)
    d = tuple(itertools.accumulate(kicks[:-1]))
    p = tuple(tuple(kicks[: k + 1]) for k in range(s - 1))
    w = tuple(tuple(drifts[: k + 1]) for k in range(s - 1))
    a = tuple(tuple(sum(w[i - 1][k] * kicks[j] for k in range(j, i)) for j in range(i)) if i else () for i in range(s))
    return Nystrom(name, order, c, a, tuple(kicks), error, q, gated=Gated(d, p, w), reversible=True)


def _strang() -> Nystrom:
    """Strang's splitting, the leapfrog in its kick-drift-kick form; error against a kick at the start alone."""
    return _splitting("strang", 2, (0.5, 0.5), (1.0,), _STRANG_ERROR, 1)


_STRANG_ERROR = ((-1 / 32, 1 / 32), (-1 / 16, 1 / 16))


def _blanes_moan4() -> Nystrom:
    """S6 of BM, with kicks where it has drifts and the reverse."""
    kicks = [0.0792036964311957, 0.353172906049774, -0.0420650803577195]
    drifts = [0.209515106613362, -0.143851773179818]
    drifts.append(0.5 - sum(drifts))
    kicks = [*kicks, 1 - 2 * sum(kicks), *reversed(kicks)]
    return _splitting("blanes_moan4", 4, kicks, [*drifts, *reversed(drifts)], _BLANES_MOAN_ERROR, 3)


# Rows of least norm among those that are the whole term of order 4 on average, with no term of order 3 or less.
_BLANES_MOAN_ERROR = _scaled(
    _SHARE_SPLITTING,
    (0.18754659481446437, -0.08996239815404805, 0.012569300427300693, -0.22030699417543398, 0.012569300427300693,
     -0.08996239815404805, 0.18754659481446437),
    (-1.334702199120362, 2.782713860048556, -0.32459898105326374, 0.0, 0.32459898105326374, -2.782713860048556,
     1.334702199120362),
)  # fmt: skip


METHODS: dict[str, Nystrom] = {method.name: method for method in (_nystrom4(), _nystrom6(), _strang(), _blanes_moan4())}
