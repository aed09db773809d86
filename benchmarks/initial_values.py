"""Initial value problems with known solutions, in float64, for numpy, torch and jax.numpy alike.

- A trained GNesterovNODE on the concentric point clouds. `assets/point_cloud.json` holds its weights, and how they came
  about. Its ELUs have kinks in the second derivative, over which no error estimate holds (DOP853 at 1e-13 is wrong by
  2e-10), so the truth is that of very many steps of rk4, kept there, too.
- DETEST (`benchmarks.detest`). The truth is scipy's DOP853 at 1e-13, right to 4e-12.
- Damped oscillators in the momentum form, whose solution is closed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import scipy.integrate
import torch

import nesterov_triton as nt
from benchmarks import detest
from nesterov_triton.experiments.paper.point_cloud import load
from nesterov_triton.systems import System

TRAINED = Path(__file__).parent / "assets" / "point_cloud.json"
BOUND = 5.0  # of the trained network's gate
OSCILLATOR_DAMPING = 0.2
FREQUENCIES = (1.0, 2.0, 3.0, 5.0)
OSCILLATORS = 16  # of each frequency, with starts of their own

Array: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]
Field: TypeAlias = Callable[[Any, Any], Any]


@dataclass(frozen=True, eq=False)
class InitialValues:
    """One problem.

    Attributes:
        name: its own.
        group: of the problems that are drawn together.
        y0: the state at t0: [n], or [2, batch, width], x and m of a momentum system.
        t0, t1: the interval.
        field: given an array library, f(t, h): what counts as an evaluation. `t` is 0-d, or [batch, 1] for a solver
            that has a time for each sample.
        rates: given an array library and a field, the right-hand side (t, y) -> y' on y0's shape.
        system: given a field in torch, what this package solves.
        truth: the state at t1.
    """

    name: str
    group: str
    y0: Array
    t0: float
    t1: float
    field: Callable[[Any], Field]
    rates: Callable[[Any, Field], Field]
    system: Callable[[Field], System | Field]
    truth: Array

    @property
    def momentum(self) -> bool:
        return self.y0.ndim == 3

    def error(self, found: Any) -> float:
        """The largest |error| / (1 + |truth|) of all components at t1; NaN and infinity as they are."""
        return float((np.abs(np.asarray(found) - self.truth) / (1 + np.abs(self.truth))).max())


def _exactly(
    field: Callable[[Any], Field], rates: Callable[[Any, Field], Field], y0: Array, t0: float, t1: float
) -> Array:
    right_hand_side = rates(np, field(np))
    solution = scipy.integrate.solve_ivp(
        lambda t, y: right_hand_side(t, y.reshape(y0.shape)).reshape(-1), (t0, t1), y0.reshape(-1), "DOP853",
        rtol=1e-13, atol=1e-13,
    )  # fmt: skip
    assert solution.success
    end: Array = solution.y[:, -1].reshape(y0.shape)
    return end


# --- DETEST


@cache
def detest_problem(name: str) -> InitialValues:
    field, y0 = detest.PROBLEMS[name], np.array(detest.STARTS[name])

    def rates(xp: Any, field: Field) -> Field:
        return field

    truth = _exactly(field, rates, y0, 0.0, detest.END)
    return InitialValues(name, f"DETEST {name[0]}", y0, 0.0, detest.END, field, rates, lambda field: field, truth)


# --- damped oscillators: x'' = -γ x' - ω² x


@cache
def oscillator() -> InitialValues:
    frequency = np.array(FREQUENCIES)
    start = np.random.default_rng(0).standard_normal((2, OSCILLATORS, len(FREQUENCIES)))
    gamma, end = OSCILLATOR_DAMPING, 10.0

    def field(xp: Any) -> Field:
        stiffness = xp.asarray(-(frequency**2))
        return lambda t, h: stiffness * h

    def rates(xp: Any, field: Field) -> Field:
        return lambda t, z: xp.stack((z[1], field(t, z[0]) - gamma * z[1]))

    # x = e^(-γ t / 2) (x0 cos w t + (m0 + γ x0 / 2) / w sin w t) with w² = ω² - γ²/4
    (x0, m0), w = start, np.sqrt(frequency**2 - gamma**2 / 4)
    b = (m0 + gamma / 2 * x0) / w
    cos, sin, decay = np.cos(w * end), np.sin(w * end), math.exp(-gamma / 2 * end)
    x = decay * (x0 * cos + b * sin)
    m = decay * w * (b * cos - x0 * sin) - gamma / 2 * x
    return InitialValues(
        "damped oscillator", "damped oscillator", start, 0.0, end, field, rates,
        lambda field: nt.systems.Momentum(field, damping=gamma), np.stack((x, m)),
    )  # fmt: skip


# --- the trained network


def keep_trained(checkpoint: Path, about: dict[str, Any], steps: int = 200_000) -> None:
    """Writes `assets/point_cloud.json` from a checkpoint of `nesterov-triton reproduce point-cloud`.

    Args:
        checkpoint: GNesterovNODE-seed0.pt.
        about: command, commit and versions.
        steps: of rk4 for the truth; half as many must end within 1e-12 of it.
    """
    stored = torch.load(checkpoint, weights_only=True)
    last = stored["run"]["history"][-1]
    result = {key: last[key] for key in ("epoch", "train_loss", "test_loss", "test_accuracy_percent", "nfe_forward")}
    weights = {name: value.tolist() for name, value in stored["network"].items()}
    trained = _Trained({name: np.array(value) for name, value in weights.items()})
    rates = trained.rates(np, trained.field(np))
    truth, rough = (_fixed_steps(rates, trained.y0, 1.0, 2.0, n) for n in (steps, steps // 2))
    difference = float(np.abs(truth - rough).max())
    assert difference < 1e-12
    found = {"steps of rk4": steps, "half as many differ by": difference, "state": truth.tolist()}
    TRAINED.write_text(
        json.dumps({"about": about, "last epoch": result, "truth": found, "state_dict": weights}, indent=1) + "\n"
    )


def _fixed_steps(f: Field, y: Array, t0: float, t1: float, steps: int) -> Array:
    """The classical Runge-Kutta method with compensated sums."""
    dt, lost = (t1 - t0) / steps, np.zeros_like(y)
    for i in range(steps):
        t = t0 + i * dt
        k1 = f(t, y)
        k2 = f(t + dt / 2, y + dt / 2 * k1)
        k3 = f(t + dt / 2, y + dt / 2 * k2)
        step = dt / 6 * (k1 + 2 * k2 + 2 * k3 + f(t + dt, y + dt * k3)) - lost
        new = y + step
        lost, y = (new - y) - step, new
    return y


def _linear(xp: Any) -> Callable[[Any, Any, Any], Any]:
    return torch.nn.functional.linear if xp is torch else lambda y, w, b: y @ w.T + b


def _elu(xp: Any) -> Callable[[Any], Any]:
    return torch.nn.functional.elu if xp is torch else lambda y: xp.where(y > 0, y, xp.expm1(xp.minimum(y, 0)))


def _perceptron(xp: Any, weights: list[Array]) -> Callable[[Any], Any]:
    linear, elu = _linear(xp), _elu(xp)
    w0, b0, w1, b1, w2, b2 = map(xp.asarray, weights)
    return lambda y: linear(elu(linear(elu(linear(y, w0, b0)), w1, b1)), w2, b2)


class _Trained:
    """The system of a GNesterovNODE with the weights of `state`, by their names in the network's state_dict."""

    def __init__(self, state: dict[str, Array]) -> None:
        def layers(prefix: str) -> list[Array]:
            return [state[f"{prefix}.{i}.{kind}"] for i in (0, 2, 4) for kind in ("weight", "bias")]

        self.weights = layers("layer.system.field.network")
        self.xi = math.log1p(math.exp(float(state["layer.system.raw_xi"])))
        points = load(0)[0].inputs.numpy()  # those that it was trained on
        # The initial velocity is a network of the points, with hardtanh(±5) between its layers.
        w0, b0, w1, b1, w2, b2 = layers("layer.initial_velocity")
        hidden = np.clip(np.clip(points @ w0.T + b0, -5, 5) @ w1.T + b1, -5, 5)
        self.y0: Array = np.stack((points / _scale(np, 1.0), hidden @ w2.T + b2))

    def field(self, xp: Any) -> Field:
        network = _perceptron(xp, self.weights)
        return lambda t, h: network(xp.concatenate((h, xp.zeros_like(h[:, :1]) + t), 1))

    def rates(self, xp: Any, field: Field) -> Field:
        def f(t: Any, z: Any) -> Any:
            h, m = _scale(xp, t) * z[0], z[1]
            return xp.stack((_softclip(xp, m), -m - _softclip(xp, field(t, h)) - self.xi * h))

        return f

    def system(self, field: Field) -> System:
        return nt.systems.gnesterov(field, nt.gates.Softclip(BOUND), self.xi)


def _softclip(xp: Any, x: Any) -> Any:
    return BOUND * xp.tanh(x / BOUND)


def _scale(xp: Any, t: Any) -> Any:
    return _softclip(xp, t**-1.5 * xp.exp(t / 2))


@cache
def point_cloud() -> InitialValues:
    stored = json.loads(TRAINED.read_text())
    trained = _Trained({name: np.array(value) for name, value in stored["state_dict"].items()})
    truth = np.array(stored["truth"]["state"])
    name = "point cloud"
    return InitialValues(name, name, trained.y0, 1.0, 2.0, trained.field, trained.rates, trained.system, truth)


GROUPS = ("point cloud", *(f"DETEST {letter}" for letter in "ABCDE"), "damped oscillator")


def problems(group: str) -> list[InitialValues]:
    """The problems of a group.

    Raises:
        ValueError: there is none of this name.
    """
    if group not in GROUPS:
        raise ValueError(f"no group of problems {group!r}; there are {GROUPS}")
    if group == "point cloud":
        return [point_cloud()]
    if group == "damped oscillator":
        return [oscillator()]
    return [detest_problem(name) for name in detest.PROBLEMS if name[0] == group[-1]]
