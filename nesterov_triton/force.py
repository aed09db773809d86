"""The force of a momentum system, bound to one solve: all that a method of `nystrom` evaluates.

    F(t, x) = s(t) σ_f(f(t, κ(t) x)) + q(t) x

in three forms, as `Flow` gives the whole right-hand side: its value, its value with the network's graph kept, and its
transpose.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nesterov_triton.flow import Flow
from nesterov_triton.gates import Identity
from nesterov_triton.network import Evaluation
from nesterov_triton.systems import Momentum


@dataclass(frozen=True)
class Moments:
    """What forces need of their times, 0-d each in the state's dtype; None in every place where the system has none."""

    t: Sequence[Tensor]
    scale: Sequence[Tensor | None]
    drive: Sequence[Tensor | None]
    q: Sequence[Tensor | None]


@dataclass
class Linearisation:
    """One force with the network's graph kept, ready for `Force.pullback`."""

    network: Evaluation
    x: Tensor  # where it was taken, [N]
    gated: Tensor  # σ_f(u), [N]


@dataclass
class Cotangents:
    """Cotangents from one force: of the position, [N]; of parameters; and, where wanted, 0-d, of `Moments`."""

    x: Tensor
    params: Sequence[Tensor | None]
    time: Tensor | None = None
    scale: Tensor | None = None
    drive: Tensor | None = None
    q: Tensor | None = None


class Force:
    """The force of `flow`'s system. Positions and forces are flat, [N].

    Raises:
        ValueError: the system has no such force.
    """

    def __init__(self, flow: Flow) -> None:
        assert isinstance(flow.system, Momentum)
        self.flow, self.system = flow, flow.system
        self.sign, self.gate = self.system.sign, self.system.gate_f
        self.gated = not isinstance(self.gate, Identity)

    def __call__(self, at: Moments, i: int, x: Tensor, out: Tensor | None = None) -> Tensor:
        """The force at moment `i` and position `x`; written into `out` if given."""
        u = self.flow.network(at.t[i], self._features(at, i, x)).reshape(-1)
        return self._of(at, i, x, self.gate(u, out=out) if self.gated else u, out)

    def linearise(self, at: Moments, i: int, x: Tensor, out: Tensor) -> Linearisation:
        """As a call into `out`, keeping the network's graph. `x` must stay as it is until the pullback."""
        evaluation = self.flow.network.taped(at.t[i], self._features(at, i, x), time_grads=self.flow.time_grads)
        u = evaluation.u.detach().reshape(-1)
        gated = self.gate(u) if self.gated else u
        self._of(at, i, x, gated, out)
        return Linearisation(evaluation, x, gated)

    def pullback(self, at: Moments, i: int, lin: Linearisation, c: Tensor, wrt_params: bool = True) -> Cotangents:
        """Transpose of `linearise` at moment `i`, for the cotangent `c` of the force. Frees the graph.

        Args:
            wrt_params: whether the parameters' cotangents are wanted.
        """
        flow, scale, drive, q = self.flow, at.scale[i], at.drive[i], at.q[i]
        through_gate = self.gate.pullback(c, lin.network.u.detach().reshape(-1), lin.gated) if self.gated else c
        g = through_gate * (self.sign if drive is None else drive)
        through, time, grads = lin.network.pullback(g, flow.params if wrt_params else ())
        v = through[0]
        of_x = torch.zeros_like(c) if v is None else v if scale is None else v * scale
        if q is not None:
            of_x = torch.addcmul(of_x, c, q)
        found = Cotangents(of_x, grads, time)
        if flow.coefficient_grads:
            if q is not None:
                found.q = torch.dot(c, lin.x)
            if scale is not None and v is not None:
                found.scale = torch.dot(v, lin.x)
            if drive is not None:
                found.drive = torch.dot(c, lin.gated)
        return found

    def _features(self, at: Moments, i: int, x: Tensor) -> Tensor:
        scale = at.scale[i]
        h = x.view(self.flow.shape)
        return h if scale is None else h * scale

    def _of(self, at: Moments, i: int, x: Tensor, gated: Tensor, out: Tensor | None) -> Tensor:
        drive, q = at.drive[i], at.q[i]
        driven = gated
        if drive is not None:
            driven = torch.mul(gated, drive, out=out)
        elif self.sign != 1.0:
            driven = torch.mul(gated, self.sign, out=out)
        if q is not None:
            return torch.addcmul(driven, x, q, out=out)
        return driven if out is None or driven is out else out.copy_(driven)
