"""DETEST, the non-stiff test set, classes A to E on [0, 20], for numpy, torch and jax.numpy alike.

Hull, Enright, Fellen, Sedgwick, "Comparing numerical methods for ordinary differential equations", SIAM J. Numer. Anal.
9 (1972). `PROBLEMS[name](xp)` gives f(t, y) in the array library xp, y [n] and t 0-d; `STARTS[name]` is y at 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np

END = 20.0

RightHandSide: TypeAlias = Callable[[Any, Any], Any]


def _linear(matrix: np.ndarray[Any, Any]) -> Callable[[Any], RightHandSide]:
    def problem(xp: Any) -> RightHandSide:
        a = xp.asarray(matrix)
        return lambda t, y: a @ y

    return problem


def _chain(rates: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Each of n decays into the next at its own rate; the last one stays."""
    a: np.ndarray[Any, Any] = -np.diag(rates) + np.diag(rates[:9], -1)
    a[9, 9] = 0.0
    return a


def _diffusion(n: int) -> np.ndarray[Any, Any]:
    a: np.ndarray[Any, Any] = -2 * np.eye(n) + np.eye(n, k=1) + np.eye(n, k=-1)
    return a


# C5, the sun and five outer planets: masses, positions, velocities and the gravitational constant.
_GRAVITY, _SUN = 2.95912208286, 1.00000597682
_MASSES = [0.000954786104043, 0.000285583733151, 0.0000437273164546, 0.0000517759138449, 0.00000277777777778]
_POSITIONS = [3.42947415189, 3.35386959711, 1.35494901715, 6.64145542550, 5.97156957878, 2.18231499728, 11.2630437207,
              14.6952576794, 6.27960525067, -30.1552268759, 1.65699966404, 1.43785752721, -21.1238353380, 28.4465098142,
              15.3882659679]  # fmt: skip
_VELOCITIES = [-0.557160570446, 0.505696783289, 0.230578543901, -0.415570776342, 0.365682722812, 0.169143213293,
               -0.325325669158, 0.189706021964, 0.0877265322780, -0.0240476254170, -0.287659532608, -0.117219543175,
               -0.176860753121, -0.216393453025, -0.0148647893090]  # fmt: skip


def _planets(xp: Any) -> RightHandSide:
    masses = xp.asarray(np.array(_MASSES)[:, None])
    # A planet is no distance from itself: 1 there, under a numerator of 0.
    alone = xp.asarray(np.eye(5)[:, :, None])

    def f(t: Any, y: Any) -> Any:
        x, v = y.reshape(2, 5, 3)
        near = ((x * x).sum(1) ** 1.5)[:, None]
        apart = x[None] - x[:, None]  # from i to j
        cubes = ((apart * apart).sum(2) + alone[:, :, 0])[:, :, None] ** 1.5
        # The sun's pull on the planet itself is in (m_0 + m_i) x / r³.
        pulls = (masses[None] * (apart / cubes - (x / near)[None])).sum(1) + masses * x / near
        return xp.concatenate((v.reshape(-1), (_GRAVITY * (pulls - (_SUN + masses) * x / near)).reshape(-1)))

    return f


def _orbit(xp: Any) -> RightHandSide:
    def f(t: Any, y: Any) -> Any:
        x, v = y[:2], y[2:]
        return xp.concatenate((v, -x / (x * x).sum() ** 1.5))

    return f


def _orbit_start(e: float) -> list[float]:
    return [1 - e, 0.0, 0.0, math.sqrt((1 + e) / (1 - e))]


def _b4(xp: Any) -> RightHandSide:
    def f(t: Any, y: Any) -> Any:
        r = xp.hypot(y[0], y[1])
        return xp.stack((-y[1] - y[0] * y[2] / r, y[0] - y[1] * y[2] / r, y[0] / r))

    return f


def _scalar(f: Callable[[Any, Any, Any], Any]) -> Callable[[Any], RightHandSide]:
    return lambda xp: lambda t, y: f(xp, t, y)


def _rows(f: Callable[[Any, Any, Any], tuple[Any, ...]]) -> Callable[[Any], RightHandSide]:
    return lambda xp: lambda t, y: xp.stack(f(xp, t, y))


PROBLEMS: dict[str, Callable[[Any], RightHandSide]] = {
    "A1": _scalar(lambda xp, t, y: -y),
    "A2": _scalar(lambda xp, t, y: -(y**3) / 2),
    "A3": _scalar(lambda xp, t, y: y * xp.cos(t)),
    "A4": _scalar(lambda xp, t, y: y / 4 * (1 - y / 20)),
    "A5": _scalar(lambda xp, t, y: (y - t) / (y + t)),
    "B1": _rows(lambda xp, t, y: (2 * (y[0] - y[0] * y[1]), -(y[1] - y[0] * y[1]))),
    "B2": _rows(lambda xp, t, y: (-y[0] + y[1], y[0] - 2 * y[1] + y[2], y[1] - y[2])),
    "B3": _rows(lambda xp, t, y: (-y[0], y[0] - y[1] ** 2, y[1] ** 2)),
    "B4": _b4,
    "B5": _rows(lambda xp, t, y: (y[1] * y[2], -y[0] * y[2], -0.51 * y[0] * y[1])),
    "C1": _linear(_chain(np.ones(10))),
    "C2": _linear(_chain(np.arange(1.0, 11.0))),
    "C3": _linear(_diffusion(10)),
    "C4": _linear(_diffusion(51)),
    "C5": _planets,
    **{f"D{k}": _orbit for k in range(1, 6)},
    "E1": _rows(lambda xp, t, y: (y[1], -y[1] / (t + 1) - (1 - 0.25 / (t + 1) ** 2) * y[0])),
    "E2": _rows(lambda xp, t, y: (y[1], (1 - y[0] ** 2) * y[1] - y[0])),
    "E3": _rows(lambda xp, t, y: (y[1], y[0] ** 3 / 6 - y[0] + 2 * xp.sin(2.78535 * t))),
    "E4": _rows(lambda xp, t, y: (y[1], 0.032 - 0.4 * y[1] ** 2)),
    "E5": _rows(lambda xp, t, y: (y[1], xp.sqrt(1 + y[1] ** 2) / (25 - t))),
}
STARTS: dict[str, list[float]] = {
    "A1": [1.0],
    "A2": [1.0],
    "A3": [1.0],
    "A4": [1.0],
    "A5": [4.0],
    "B1": [1.0, 3.0],
    "B2": [2.0, 0.0, 1.0],
    "B3": [1.0, 0.0, 0.0],
    "B4": [3.0, 0.0, 0.0],
    "B5": [0.0, 1.0, 1.0],
    **{name: [1.0] + [0.0] * 9 for name in ("C1", "C2", "C3")},
    "C4": [1.0] + [0.0] * 50,
    "C5": _POSITIONS + _VELOCITIES,
    **{f"D{k}": _orbit_start(0.2 * k - 0.1) for k in range(1, 6)},
    "E1": [0.6713967071418030, 0.09540051444747446],
    "E2": [2.0, 0.0],
    "E3": [0.0, 0.0],
    "E4": [30.0, 0.0],
    "E5": [0.0, 0.0],
}
