"""Explicit Runge-Kutta methods as data: Butcher tableaus with embedded weights and dense output.

A step of size dt from (t, y) evaluates  k_i = f(t + c_i dt, y + dt sum_j a_ij k_j)  and gives

    y_new            = y + dt sum_i b_i k_i
    error estimate   =     dt sum_i error_i k_i
    y(t + theta dt)  = y + dt sum_i k_i sum_j P_ij theta^(j+1),   0 <= theta <= 1

A new method is one more entry here. Sources, by the name used below:

- DP: Dormand, Prince, "A family of embedded Runge-Kutta formulae", J. Comput. Appl. Math. 6 (1980).
- Shampine: "Some practical Runge-Kutta formulas", Math. Comp. 46 (1986).
- Tsitouras: "Runge-Kutta pairs of order 5(4) satisfying only the first column simplifying assumption",
  Comput. Math. Appl. 62 (2011).
- BS: Bogacki, Shampine, "A 3(2) pair of Runge-Kutta formulas", Appl. Math. Lett. 2 (1989).
- Fehlberg: "Low-order classical Runge-Kutta formulas with stepsize control", NASA TR R-315 (1969).
- HNW: Hairer, Norsett, Wanner, "Solving Ordinary Differential Equations I", 2nd ed. (1993), sections II.1 to II.6.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, SupportsIndex, TypeVar

from nesterov_triton._names import lookup, public

__all__ = ["TABLEAUS", "Tableau", "get"]

M = TypeVar("M")


@dataclass(frozen=True)
class Tableau:
    """One explicit Runge-Kutta method with s stages, plus e further stages that only dense output needs.

    Entries may be given as any real numbers (int, Fraction, float); they are stored as floats. Nothing has a unit:
    nodes and theta are fractions of the step.

    Attributes:
        name: what `get` knows it by.
        order: order of the propagated solution.
        c: s nodes.
        a: s rows, row i with the i coefficients of the stages before it.
        b: s weights of the propagated solution.
        error: rows b - b_hat of s entries each. None for a fixed-step method, one for an embedded pair, two for dopri8,
            of order 5 and 3: with e5, e3 these rows applied to k, the estimate is
            dt |e5|^2 / sqrt(|e5|^2 + 0.01 |e3|^2)  (HNW II.10).
        error_order: the error estimate is O(dt^(error_order + 1)): with one row this is the order of b_hat, for
            dopri8's combination of two it is 7. 0 for a fixed-step method.
        extra_c: e nodes of the stages evaluated only for dense output.
        extra_a: e rows, row i with s + i coefficients: all stages before it count.
        interpolant: s + e rows of equal length, row i the coefficients of theta, theta^2, ... for stage i.
        interpolant_order: the interpolant satisfies the order conditions up to this order at every theta.
        all_c, all_a: nodes and rows of all s + e stages.
        step_rows: what leads to each of the s stages and, last, to the step's end: the rows of a, then b.

    Raises:
        ValueError: the entries don't fit together. Checked are lengths, finiteness, sum_j a_ij = c_i, sum b = 1, every
            error row summing to 0, and an interpolant that is exact for constant k and equal to b at theta = 1.
    """

    name: str
    order: int
    c: tuple[float, ...]
    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    error: tuple[tuple[float, ...], ...]
    error_order: int
    extra_c: tuple[float, ...]
    extra_a: tuple[tuple[float, ...], ...]
    interpolant: tuple[tuple[float, ...], ...]
    interpolant_order: int
    all_c: tuple[float, ...] = field(init=False, repr=False, compare=False)
    all_a: tuple[tuple[float, ...], ...] = field(init=False, repr=False, compare=False)
    step_rows: tuple[tuple[float, ...], ...] = field(init=False, repr=False, compare=False)

    def __repr__(self) -> str:
        stages = f", stages={len(self.c)}" + (f"+{len(self.extra_c)}" if self.extra_c else "")
        return f"Tableau({self.name!r}, order={self.order}{stages})"

    def __reduce_ex__(self, protocol: SupportsIndex) -> str | tuple[Any, ...]:
        """What is registered stays itself in copies and pickles: operators are told a method by its name."""
        if TABLEAUS.get(self.name) is self:
            return get, (self.name,)
        return super().__reduce_ex__(protocol)

    def __post_init__(self) -> None:
        for name in ("c", "b", "extra_c"):
            object.__setattr__(self, name, self._floats(name, getattr(self, name)))
        for name in ("a", "error", "extra_a", "interpolant"):
            rows = tuple(self._floats(f"{name}[{i}]", row) for i, row in enumerate(getattr(self, name)))
            object.__setattr__(self, name, rows)
        object.__setattr__(self, "all_c", (*self.c, *self.extra_c))
        object.__setattr__(self, "all_a", (*self.a, *self.extra_a))
        object.__setattr__(self, "step_rows", (*self.a, self.b))

        s, total = len(self.c), len(self.c) + len(self.extra_c)
        self._require(s > 0, "c is empty: a method has at least one stage")
        self._length("a", self.a, s)
        self._length("b", self.b, s)
        self._length("extra_a", self.extra_a, len(self.extra_c))
        self._length("interpolant", self.interpolant, total)
        for i, row in enumerate(self.a):
            self._length(f"a[{i}]", row, i)
            self._sum(f"a[{i}]", row, self.c[i], f"c[{i}]")
        for i, row in enumerate(self.extra_a):
            self._length(f"extra_a[{i}]", row, s + i)
            self._sum(f"extra_a[{i}]", row, self.extra_c[i], f"extra_c[{i}]")
        self._sum("b", self.b, 1.0)
        for i, row in enumerate(self.error):
            self._length(f"error[{i}]", row, s)
            self._sum(f"error[{i}]", row, 0.0)

        degree = len(self.interpolant[0])
        for i, row in enumerate(self.interpolant):
            self._length(f"interpolant[{i}]", row, degree)
            self._sum(f"interpolant[{i}] at theta = 1", row, self.b[i] if i < s else 0.0, f"b[{i}]" if i < s else "")
        for j, column in enumerate(zip(*self.interpolant, strict=True)):
            self._sum(f"the theta^{j + 1} coefficients of interpolant", column, 1.0 if j == 0 else 0.0)

        self._require(self.order >= 1, f"order must be at least 1, got {self.order}")
        self._require(1 <= self.interpolant_order <= degree, f"interpolant_order must lie in 1..{degree} (its degree)")
        self._require(
            (self.error_order >= 1) == self.adaptive,
            f"error_order is {self.error_order} with {len(self.error)} error rows; it is 0 exactly when there are none",
        )

    @property
    def stages(self) -> int:
        """Stages of one step, an FSAL stage included, those for dense output not."""
        return len(self.c)

    @property
    def adaptive(self) -> bool:
        """Whether the method estimates its own error."""
        return bool(self.error)

    @property
    def fsal(self) -> bool:
        """First same as last: the last stage is f at the new state, hence the next step's first stage."""
        return self.a[-1] == self.b[:-1] and self.c[-1] == 1.0 and self.b[-1] == 0.0

    def _floats(self, field: str, row: Iterable[float]) -> tuple[float, ...]:
        values = tuple(float(x) for x in row)
        self._require(all(map(math.isfinite, values)), f"{field} holds a value that is not finite")
        return values

    def _length(self, field: str, row: Sequence[object], expected: int) -> None:
        self._require(len(row) == expected, f"{field} has {len(row)} entries, expected {expected}")

    def _sum(self, field: str, row: Sequence[float], expected: float, of: str = "") -> None:
        # Rounding is all that may be left, and it grows with the entries (dopri8's interpolant has some above 500).
        tolerance = 16 * 2.0**-52 * (1.0 + math.fsum(map(abs, row)))
        named = f"{of} = {expected}" if of else f"{expected}"
        actual = math.fsum(row)
        self._require(abs(actual - expected) <= tolerance, f"{field} sums to {actual}, expected {named}")

    def _require(self, condition: bool, message: str) -> None:
        if not condition:
            raise ValueError(f"tableau {self.name!r}: {message}")


def _quadratic(b: Sequence[float]) -> tuple[tuple[float, ...], ...]:
    """Second-order dense output of any method of order two: the parabola through y, y' = k_1 and y_new."""
    return tuple((1.0, b_i - 1.0) if i == 0 else (0.0, b_i) for i, b_i in enumerate(b))


def _cubic_hermite(b: Sequence[float]) -> tuple[tuple[float, ...], ...]:
    """Third-order dense output of an FSAL method of order three or more: values and slopes at both ends (HNW II.6)."""
    rows = [[0.0, 3.0 * b_i, -2.0 * b_i] for b_i in b]
    rows[0] = [1.0, rows[0][1] - 2.0, rows[0][2] + 1.0]
    rows[-1] = [0.0, rows[-1][1] - 1.0, rows[-1][2] + 1.0]
    return tuple(map(tuple, rows))


def _quartic(b: Sequence[float], middle: Sequence[float]) -> tuple[tuple[float, ...], ...]:
    """Fourth-order dense output of an FSAL method: values at both ends and in the middle, slopes at both ends."""
    rows = []
    for i, (b_i, m_i) in enumerate(zip(b, middle, strict=True)):
        first, last = float(i == 0), float(i == len(b) - 1)
        rows.append((
            first,
            -4 * first + last - 5 * b_i + 16 * m_i,
            5 * first - 3 * last + 14 * b_i - 32 * m_i,
            -2 * first + 2 * last - 8 * b_i + 16 * m_i,
        ))  # fmt: skip
    return tuple(rows)


def _minus(b: Sequence[float], b_hat: Mapping[int, float]) -> tuple[float, ...]:
    return tuple(b_i - b_hat.get(i, 0.0) for i, b_i in enumerate(b))


def _dop853_interpolant(b: Sequence[float], d: Sequence[Sequence[float]]) -> tuple[tuple[float, ...], ...]:
    """Polynomial rows of DOP853's dense output, published nested (HNW II.6):

    theta (F0 + (1 - theta) (F1 + theta (F2 + (1 - theta) (F3 + theta (F4 + (1 - theta) (F5 + theta F6)))))).

    F0, F1, F2 make it a Hermite interpolant of y_new, k_1 and the FSAL stage; F3 to F6 are the rows of d, over the
    stages and the extra ones. Expanded exactly, since coefficients of size 500 cancel to weights of size 1.
    """
    rows = []
    for i in range(len(d[0])):
        b_i = Fraction(b[i]) if i < len(b) else Fraction(0)
        first, last = int(i == 0), int(i == len(b) - 1)
        nested = [b_i, first - b_i, 2 * b_i - first - last, *(Fraction(row[i]) for row in d)]
        poly = [Fraction(0)]
        for depth in reversed(range(len(nested))):
            poly[0] += nested[depth]
            shifted = [Fraction(0), *poly]
            poly = shifted if depth % 2 == 0 else [p - q for p, q in zip([*poly, Fraction(0)], shifted, strict=True)]
        rows.append(tuple(float(p) for p in poly[1:]))
    return tuple(rows)


_EULER = Tableau(
    name="euler",
    order=1,
    c=(0,),
    a=((),),
    b=(1,),
    error=(),
    error_order=0,
    extra_c=(),
    extra_a=(),
    interpolant=((1,),),
    interpolant_order=1,
)

# The explicit midpoint rule (Runge 1895; HNW II.1).
_MIDPOINT = Tableau(
    name="midpoint",
    order=2,
    c=(0, 1 / 2),
    a=((), (1 / 2,)),
    b=(0, 1),
    error=(),
    error_order=0,
    extra_c=(),
    extra_a=(),
    interpolant=_quadratic((0, 1)),
    interpolant_order=2,
)

# Heun's methods of order two and three (Heun 1900; HNW II.1).
_HEUN2 = Tableau(
    name="heun2",
    order=2,
    c=(0, 1),
    a=((), (1,)),
    b=(1 / 2, 1 / 2),
    error=(),
    error_order=0,
    extra_c=(),
    extra_a=(),
    interpolant=_quadratic((1 / 2, 1 / 2)),
    interpolant_order=2,
)
_HEUN3 = Tableau(
    name="heun3",
    order=3,
    c=(0, 1 / 3, 2 / 3),
    a=((), (1 / 3,), (0, 2 / 3)),
    b=(1 / 4, 0, 3 / 4),
    error=(),
    error_order=0,
    extra_c=(),
    extra_a=(),
    interpolant=_quadratic((1 / 4, 0, 3 / 4)),
    interpolant_order=2,
)

# "The" Runge-Kutta method (Kutta 1901; HNW table II.1.2), its interpolant from the four conditions up to order three.
_RK4 = Tableau(
    name="rk4",
    order=4,
    c=(0, 1 / 2, 1 / 2, 1),
    a=((), (1 / 2,), (0, 1 / 2), (0, 0, 1)),
    b=(1 / 6, 1 / 3, 1 / 3, 1 / 6),
    error=(),
    error_order=0,
    extra_c=(),
    extra_a=(),
    interpolant=((1, -3 / 2, 2 / 3), (0, 1, -2 / 3), (0, 1, -2 / 3), (0, -1 / 2, 2 / 3)),
    interpolant_order=3,
)

# The 3/8 rule (Kutta 1901; HNW table II.1.2), its interpolant from the four conditions up to order three.
_RK4_38 = Tableau(
    name="rk4_38",
    order=4,
    c=(0, 1 / 3, 2 / 3, 1),
    a=((), (1 / 3,), (-1 / 3, 1), (1, -1, 1)),
    b=(1 / 8, 3 / 8, 3 / 8, 1 / 8),
    error=(),
    error_order=0,
    extra_c=(),
    extra_a=(),
    interpolant=((1, -15 / 8, 1), (0, 15 / 8, -3 / 2), (0, 3 / 8, 0), (0, -3 / 8, 1 / 2)),
    interpolant_order=3,
)

# Heun's second-order method with Euler's inside (HNW II.4).
_ADAPTIVE_HEUN = Tableau(
    name="adaptive_heun",
    order=2,
    c=(0, 1),
    a=((), (1,)),
    b=(1 / 2, 1 / 2),
    error=((-1 / 2, 1 / 2),),
    error_order=1,
    extra_c=(),
    extra_a=(),
    interpolant=_quadratic((1 / 2, 1 / 2)),
    interpolant_order=2,
)

# Fehlberg's RK1(2) run in local extrapolation: the second-order weights are propagated, those of order one embedded.
_FEHLBERG2 = Tableau(
    name="fehlberg2",
    order=2,
    c=(0, 1 / 2, 1),
    a=((), (1 / 2,), (1 / 256, 255 / 256)),
    b=(1 / 512, 255 / 256, 1 / 512),
    error=((-1 / 512, 0, 1 / 512),),
    error_order=1,
    extra_c=(),
    extra_a=(),
    interpolant=_quadratic((1 / 512, 255 / 256, 1 / 512)),
    interpolant_order=2,
)

# BS; the embedded weights are 7/24, 1/4, 1/3, 1/8.
_BOSH3 = Tableau(
    name="bosh3",
    order=3,
    c=(0, 1 / 2, 3 / 4, 1),
    a=((), (1 / 2,), (0, 3 / 4), (2 / 9, 1 / 3, 4 / 9)),
    b=(2 / 9, 1 / 3, 4 / 9, 0),
    error=((-5 / 72, 1 / 12, 1 / 9, -1 / 8),),
    error_order=2,
    extra_c=(),
    extra_a=(),
    interpolant=_cubic_hermite((2 / 9, 1 / 3, 4 / 9, 0)),
    interpolant_order=3,
)

# DP's RK5(4)7M with Shampine's embedded weights (1951/21600, 0, 22642/50085, 451/720, -12231/42400, 649/6300, 1/60), as
# in torchdiffeq, so that a tolerance means the same steps in both; DP's own give this estimate times 3/2. Dense output:
# Shampine; HNW II.6.
_DOPRI5 = Tableau(
    name="dopri5",
    order=5,
    c=(0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1, 1),
    a=(
        (),
        (1 / 5,),
        (3 / 40, 9 / 40),
        (44 / 45, -56 / 15, 32 / 9),
        (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
        (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
        (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
    ),
    b=(35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84, 0),
    error=((71 / 86400, 0, -142 / 50085, 71 / 2880, -5751 / 169600, 44 / 1575, -1 / 60),),
    error_order=4,
    extra_c=(),
    extra_a=(),
    interpolant=(
        (1, -8048581381 / 2820520608, 8663915743 / 2820520608, -12715105075 / 11282082432),
        (0, 0, 0, 0),
        (0, 131558114200 / 32700410799, -68118460800 / 10900136933, 87487479700 / 32700410799),
        (0, -1754552775 / 470086768, 14199869525 / 1410260304, -10690763975 / 1880347072),
        (0, 127303824393 / 49829197408, -318862633887 / 49829197408, 701980252875 / 199316789632),
        (0, -282668133 / 205662961, 2019193451 / 616988883, -1453857185 / 822651844),
        (0, 40617522 / 29380423, -110615467 / 29380423, 69997945 / 29380423),
    ),
    interpolant_order=4,
)

# Tsitouras; the interpolant is his own, multiplied out.
_TSIT5_B = (
    0.09646076681806523, 0.01, 0.4798896504144996, 1.379008574103742, -3.290069515436081, 2.324710524099774, 0,
)  # fmt: skip
_TSIT5 = Tableau(
    name="tsit5",
    order=5,
    c=(0, 0.161, 0.327, 0.9, 0.9800255409045097, 1, 1),
    a=(
        (),
        (0.161,),
        (-0.008480655492356989, 0.335480655492357),
        (2.8971530571054935, -6.359448489975075, 4.3622954328695815),
        (5.325864828439257, -11.748883564062828, 7.4955393428898365, -0.09249506636175525),
        (5.86145544294642, -12.92096931784711, 8.159367898576159, -0.071584973281401, -0.028269050394068383),
        _TSIT5_B[:-1],
    ),
    b=_TSIT5_B,
    error=((
        0.0017800110522257714, 0.0008164344596567469, -0.007880878010261995, 0.1447110071732629, -0.5823571654525552,
        0.45808210592918697, -1 / 66,
    ),),
    error_order=4,
    extra_c=(),
    extra_a=(),
    interpolant=(
        (1, -2.763706197274826, 2.9132554618219126, -1.0530884977290216),
        (0, 0.1317, -0.2234, 0.1017),
        (0, 3.9302962368947516, -5.941033872131505, 2.490627285651253),
        (0, -12.411077166933676, 30.33818863028232, -16.548102889244902),
        (0, 37.50931341651104, -88.1789048947664, 47.37952196281928),
        (0, -27.896526289197286, 65.09189467479366, -34.87065786149661),
        (0, 1.5, -4, 2.5),
    ),
    interpolant_order=4,
)  # fmt: skip

# DOP853 (HNW II.5, II.6 and II.10; the decimals are those of Hairer's dop853.f): 12 stages, the FSAL 13th, 3 for dense
# output. Not the Prince-Dormand 8(7) pair that some libraries name dopri8.
_DOP853_B = (
    0.054293734116568765, 0, 0, 0, 0, 4.450312892752409, 1.8915178993145003, -5.801203960010585, 0.3111643669578199,
    -0.1521609496625161, 0.20136540080403034, 0.04471061572777259, 0,
)  # fmt: skip
_DOP853_D = (
    (
        -8.428938276109013, 0, 0, 0, 0, 0.5667149535193777, -3.0689499459498917, 2.38466765651207, 2.117034582445028,
        -0.871391583777973, 2.2404374302607883, 0.6315787787694688, -0.08899033645133331, 18.148505520854727,
        -9.194632392478356, -4.436036387594894,
    ),
    (
        10.427508642579134, 0, 0, 0, 0, 242.28349177525817, 165.20045171727028, -374.5467547226902, -22.113666853125306,
        7.733432668472264, -30.674084731089398, -9.332130526430229, 15.697238121770845, -31.139403219565178,
        -9.35292435884448, 35.81684148639408,
    ),
    (
        19.985053242002433, 0, 0, 0, 0, -387.0373087493518, -189.17813819516758, 527.8081592054236, -11.57390253995963,
        6.8812326946963, -1.0006050966910838, 0.7777137798053443, -2.778205752353508, -60.19669523126412,
        84.32040550667716, 11.99229113618279,
    ),
    (
        -25.69393346270375, 0, 0, 0, 0, -154.18974869023643, -231.5293791760455, 357.6391179106141, 93.40532418362432,
        -37.45832313645163, 104.0996495089623, 29.8402934266605, -43.53345659001114, 96.32455395918828,
        -39.17726167561544, -149.72683625798564,
    ),
)  # fmt: skip
_DOPRI8 = Tableau(
    name="dopri8",
    order=8,
    c=(
        0, 0.05260015195876773, 0.0789002279381516, 0.1183503419072274, 0.2816496580927726, 1 / 3, 1 / 4, 4 / 13,
        127 / 195, 3 / 5, 6 / 7, 1, 1,
    ),
    a=(
        (),
        (0.05260015195876773,),
        (0.0197250569845379, 0.0591751709536137),
        (0.02958758547680685, 0, 0.08876275643042054),
        (0.2413651341592667, 0, -0.8845494793282861, 0.924834003261792),
        (1 / 27, 0, 0, 0.17082860872947386, 0.12546768756682242),
        (0.037109375, 0, 0, 0.17025221101954405, 0.06021653898045596, -0.017578125),
        (
            0.03709200011850479, 0, 0, 0.17038392571223998, 0.10726203044637328, -0.015319437748624402,
            0.008273789163814023,
        ),
        (
            0.6241109587160757, 0, 0, -3.3608926294469414, -0.868219346841726, 27.59209969944671, 20.154067550477894,
            -43.48988418106996,
        ),
        (
            0.47766253643826434, 0, 0, -2.4881146199716677, -0.590290826836843, 21.230051448181193, 15.279233632882423,
            -33.28821096898486, -0.020331201708508627,
        ),
        (
            -0.9371424300859873, 0, 0, 5.186372428844064, 1.0914373489967295, -8.149787010746927, -18.52006565999696,
            22.739487099350505, 2.4936055526796523, -3.0467644718982196,
        ),
        (
            2.273310147516538, 0, 0, -10.53449546673725, -2.0008720582248625, -17.9589318631188, 27.94888452941996,
            -2.8589982771350235, -8.87285693353063, 12.360567175794303, 0.6433927460157636,
        ),
        _DOP853_B[:-1],
    ),
    b=_DOP853_B,
    error=(
        (
            0.01312004499419488, 0, 0, 0, 0, -1.2251564463762044, -0.4957589496572502, 1.6643771824549864,
            -0.35032884874997366, 0.3341791187130175, 0.08192320648511571, -0.022355307863886294, 0,
        ),
        _minus(_DOP853_B, {0: 31 / 127, 8: 12675 / 17272, 11: 3 / 136}),
    ),
    error_order=7,
    extra_c=(1 / 10, 1 / 5, 7 / 9),
    extra_a=(
        (
            0.056167502283047954, 0, 0, 0, 0, 0, 0.25350021021662483, -0.2462390374708025, -0.12419142326381637,
            0.15329179827876568, 0.00820105229563469, 0.007567897660545699, -0.008298,
        ),
        (
            0.03183464816350214, 0, 0, 0, 0, 0.028300909672366776, 0.053541988307438566, -0.05492374857139099, 0, 0,
            -0.00010834732869724932, 0.0003825710908356584, -0.00034046500868740456, 0.1413124436746325,
        ),
        (
            -0.42889630158379194, 0, 0, 0, 0, -4.697621415361164, 7.683421196062599, 4.06898981839711,
            0.3567271874552811, 0, 0, 0, -0.0013990241651590145, 2.9475147891527724, -9.15095847217987,
        ),
    ),
    interpolant=_dop853_interpolant(_DOP853_B, _DOP853_D),
    interpolant_order=7,
)  # fmt: skip

# RK8(7)13M of Prince and Dormand, "High order embedded Runge-Kutta formulae", J. Comput. Appl. Math. 7 (1981):
# 13 stages and the FSAL 14th. What torchdiffeq names dopri8; its weights for the middle of a step, through which the
# quartic goes, are of order five.
_PD8_B = (
    198769021 / 4761220748, 0, 0, 0, 0, -27305113 / 492406968, 572021774 / 2390268121, 5812593517 / 8262267752,
    -1957812281 / 2576883853, 4012596986 / 6074510377, 1314910499 / 8312354923, -19048680 / 79999651, 1 / 4, 0,
)  # fmt: skip
_PD8_EMBEDDED = {
    0: 230716846 / 7806827661, 5: -6685619618 / 8068511919, 6: 2282388386 / 7333189133, 7: 6122400461 / 2481371672, 8:
    -23453011187 / 9208303288, 9: 8962336519 / 6208545123, 10: 352020563 / 4432637684, 11: 2 / 45,
}  # fmt: skip
_PD8_MIDDLE = (
    0.04103130360739393, 0, 0, 0, 0, 0.05100562801991382, 0.2388930677412202, 0.3096870143996103, -0.2172325471755352,
    0.07833405679331928, -0.0018614369715579948, 0.007072844202678841, 0.00690847373200576, -0.013838404349047373,
)  # fmt: skip
_PRINCE_DORMAND8 = Tableau(
    name="prince_dormand8",
    order=8,
    c=(
        0, 1 / 18, 1 / 12, 1 / 8, 5 / 16, 3 / 8, 59 / 400, 93 / 200, 863529644 / 1528735103, 13 / 20, 92785925
        / 100346396, 1, 1, 1,
    ),
    a=(
        (),
        (
            1 / 18,
        ),
        (
            1 / 48, 1 / 16,
        ),
        (
            1 / 32, 0, 3 / 32,
        ),
        (
            5 / 16, 0, -75 / 64, 75 / 64,
        ),
        (
            3 / 80, 0, 0, 3 / 16, 3 / 20,
        ),
        (
            161452300 / 3369898517, 0, 0, 825286303 / 7352300820, -243109861 / 9531599248, 104775849 /
            8155778417,
        ),
        (
            138547406 / 8189353921, 0, 0, 2634287137 / 6792055768, 357664111 / 9941363487, 1736387453 /
            8815482381, -727312264 / 4211082401,
        ),
        (
            110771096 / 1603153459, 0, 0, -465637302 / 734156543, -945446455 / 5865140674, 296954126 /
            2141748743, 6568353549 / 6980714000, 1505252545 / 7112448841,
        ),
        (
            968783259 / 5277833456, 0, 0, -6019108436 / 2438102013, -2910586087 / 9992163083, -250897403 /
            9477475588, 2770191435 / 972734647, 2737337482 / 9728005407, 700688991 / 5662366625,
        ),
        (
            -8362059747 / 6879948169, 0, 0, 161334410371 / 9676614716, 8976391413 / 9802316695,
            -42275108363 / 6979999975, -137470236799 / 8589971233, 100504999135 / 6768331049, -8733256167
            / 653120944, 26184085373 / 5099952060,
        ),
        (
            1198905527 / 4631465976, 0, 0, -209551718 / 43889903, -3570624281 / 8206576911, -28839300635 /
            9457110433, 52008030341 / 9323911058, 58933961806 / 9573680005, -41310497527 / 8160735682,
            20470667808 / 9330609233, 437650510 / 3250813459,
        ),
        (
            8146429111 / 9905344999, 0, 0, -14794752543 / 1268991095, -6558072357 / 8656125808, 1048553375
            / 1468616476, 56140115833 / 4648986578, -19396273676 / 9116250601, 9942106469 / 4995616162,
            -1941121908 / 8285249657, 736688233 / 4188142068, 0,
        ),
        _PD8_B[:-1],
    ),
    b=_PD8_B,
    error=(_minus(_PD8_B, _PD8_EMBEDDED),),
    error_order=7,
    extra_c=(),
    extra_a=(),
    interpolant=_quartic(_PD8_B, _PD8_MIDDLE),
    interpolant_order=4,
)  # fmt: skip


TABLEAUS: dict[str, Tableau] = {
    tableau.name: tableau
    for tableau in (
        _DOPRI5, _TSIT5, _BOSH3, _ADAPTIVE_HEUN, _FEHLBERG2, _DOPRI8, _PRINCE_DORMAND8, _EULER, _MIDPOINT, _HEUN2,
        _HEUN3, _RK4, _RK4_38,
    )
}  # fmt: skip


def get(name: str) -> Tableau:
    """The tableau of this name.

    Raises:
        TypeError: `name` is not a string.
        ValueError: no method has this name; the message gives the nearest one and all of them.
    """
    return named(name, TABLEAUS)


def named(name: str, methods: Mapping[str, M]) -> M:
    """The one of `methods` that has this name; raises as `get`."""
    if not isinstance(name, str):
        raise TypeError(f"method must be a name such as 'dopri5', got {type(name).__name__}")
    return lookup("method", name, methods)


__all__ = ["TABLEAUS", "Tableau", "get"]


def __dir__() -> list[str]:
    return public(globals())
