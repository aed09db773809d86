"""The adjoint's integrals over its accepted steps, for the parameters: nothing depends on them but the result."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nesterov_triton.gradients.totals import Totals, accumulate, zeros_for
from nesterov_triton.tableaus import Tableau


class ParameterQuadratures:
    """∫ g dt for the parameters' cotangents g_i of a step's stages, each as large as the network.

    Of the g_i only sums are kept, Σ_{i>0} w_i g_i for the method's weights (and for its error rows, if they are
    wanted), besides the first stage's, and an FSAL stage's, which is the next step's first.
    These two are held as they come: they may lie in the state of their stage, which is an accepted one and stays.

    Args:
        tableau: the method.
        totals: where the integrals go.
        with_errors: whether the error rows' sums are wanted.
    """

    def __init__(self, tableau: Tableau, totals: Totals, with_errors: bool = False) -> None:
        self.tableau, self.totals = tableau, totals
        params = totals.flow.params
        self.weights = (tableau.b, *tableau.error) if with_errors else (tableau.b,)
        self.sums = [zeros_for(params) for _ in self.weights]
        self.first: Sequence[Tensor | None] = ()
        self._next: Sequence[Tensor | None] = ()

    def begin(self) -> None:
        """A step is tried, from a state whose first stage may be known."""
        for sums in self.sums:
            if sums:
                torch._foreach_zero_(sums)

    def wants(self, i: int) -> bool:
        """Whether stage `i` counts."""
        return i == 0 or self._is_next(i) or any(w[i] != 0 for w in self.weights)

    def add(self, i: int, found: Sequence[Tensor | None]) -> None:
        """The cotangents of stage `i`, as Flow.params; none where it does not count."""
        if i == 0:
            self.first = found
        elif found:
            if self._is_next(i):
                self._next = found
            for weights, sums in zip(self.weights, self.sums, strict=True):
                accumulate(sums, found, weights[i])

    def accept(self, dt: float) -> None:
        """The step, of size `dt`, is accepted."""
        accumulate(self.totals.params, self.first, -dt * self.tableau.b[0])
        accumulate(self.totals.params, self.sums[0], -dt)
        if self.tableau.fsal:
            self.first = self._next

    def _is_next(self, i: int) -> bool:
        return self.tableau.fsal and i == self.tableau.stages - 1
