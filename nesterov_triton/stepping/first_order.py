"""Fixed steps of first-order systems.

Their right-hand side is the field itself, and they have few stages: nothing is to be done but to call it and to add up.
Next to a small field all else would count.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nesterov_triton.flow import Flow
from nesterov_triton.methods import Method
from nesterov_triton.nystrom import Nystrom
from nesterov_triton.stepping.explicit_rk import ExplicitRK
from nesterov_triton.stepping.stepper import stage_times
from nesterov_triton.tableaus import Tableau


def takes(method: Method, flow: Flow) -> bool:
    """Whether `FirstOrderSteps` is for them. Its times are numbers: autograd sees nothing of them."""
    return flow.rows == 1 and not isinstance(method, Nystrom) and not method.adaptive


class FirstOrderSteps(ExplicitRK):
    """Steps of a fixed-step method on a first-order system, out of place: autograd may look or not."""

    def __init__(
        self, tableau: Tableau, flow: Flow, like: Tensor, *, dense: bool = False, inside: torch.dtype | None = None
    ) -> None:
        super().__init__(tableau, flow, 1, like, None, dense=dense, differentiable=True, inside=inside)
        self._flow = flow

    def step(self, t: float, t1: float, z: Tensor) -> Tensor:
        """The state after one step from t to t1, [D], freshly allocated."""
        self.dt = t1 - t
        self._weights.scale(self.dt)
        state = z
        for i, time in enumerate(stage_times(t, t1, self.tableau.c, self.inside)):
            if i > 0:
                state = self._combine(z, i)
            self.stages.put(i, (self._flow.slope(time, state),))
        return self._combine(z, self.tableau.stages)
