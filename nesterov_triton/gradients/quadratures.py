"""The adjoint's integrals over its accepted steps, for the parameters: nothing depends on them but the result."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nesterov_triton.gradients.totals import Totals, accumulate
from nesterov_triton.methods import Method


class ParameterQuadratures:
    """∫ g dt for the parameters' cotangents g_i of a step's stages, each as large as the network.

    Of the g_i only sums are kept, Σ w_i g_i for the method's weights (and for its error rows, if they are wanted), and
    a copy of an FSAL stage's, which is the next step's first.

    Args:
        tableau: the method.
        totals: where the integrals go.
        with_errors: whether the error rows' sums are wanted.

    Attributes:
        sums: Σ w_i g_i of the step under way, of each row of weights.
        first: the cotangents of the state to go on from, where they are known.
        following: of an FSAL method those of the end of the step under way.
    """

    def __init__(self, tableau: Method, totals: Totals, with_errors: bool = False) -> None:
        self.tableau, self.totals = tableau, totals
        self.weights = (tableau.b, *tableau.error) if with_errors else (tableau.b,)
        self.sums: list[list[Tensor]] = []
        self.first: list[Tensor] = []
        self.following: list[Tensor] = []

    def begin(self) -> None:
        """A step is tried, from a state whose first stage may be known."""
        self._start(self.first)

    def wants(self, i: int) -> bool:
        """Whether stage `i` counts."""
        return i == 0 or self._is_next(i) or any(w[i] != 0 for w in self.weights)

    def add(self, i: int, found: Sequence[Tensor | None]) -> None:
        """The cotangents of stage `i`, as Flow.params; none where it does not count. They are not needed after."""
        if not found:
            return
        if i == 0:
            self.first = self._scaled(found, 1.0)
            self._start(self.first)
            return
        if self._is_next(i):
            self.following = self._scaled(found, 1.0)
        for weights, sums in zip(self.weights, self.sums, strict=True):
            accumulate(sums, found, weights[i])

    def accept(self, dt: float) -> None:
        """The step, of size `dt`, is accepted."""
        if self.totals.params:
            accumulate(self.totals.params, self.sums[0], -dt)
            self.first = self.following

    def _start(self, first: Sequence[Tensor]) -> None:
        """The sums of the first stage alone."""
        if first:
            self.sums = [self._scaled(first, w[0]) for w in self.weights]

    def _scaled(self, found: Sequence[Tensor | None], weight: float) -> list[Tensor]:
        """weight · found, in memory of its own and in at least float32; where None stands for zeros."""
        full = [_like(p, g) for p, g in zip(self.totals.params, found, strict=True)]
        return list(torch._foreach_mul(full, weight))

    def _is_next(self, i: int) -> bool:
        return self.tableau.fsal and i == self.tableau.stages - 1


def _like(total: Tensor, found: Tensor | None) -> Tensor:
    """`found` in the dtype of `total`, and with its strides, for kernels that see bare memory."""
    if found is None:
        return torch.zeros_like(total)
    if found.stride() != total.stride():
        return torch.empty_like(total).copy_(found)
    return found.to(total.dtype)
