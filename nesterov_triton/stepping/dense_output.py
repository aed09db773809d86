"""A method's interpolant: the state anywhere inside a step, from the step's stages."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from nesterov_triton import transforms
from nesterov_triton.tableaus import Tableau


class DenseOutput:
    """A method's interpolant: y(t + θ dt) = y + dt Σ_i b_i(θ) k_i, with polynomials b_i.

    Attributes:
        stages: how many stages it needs, the extra ones included.
    """

    def __init__(self, tableau: Tableau) -> None:
        self.stages = len(tableau.interpolant)
        self._polynomials = transforms.plain(torch.tensor(tableau.interpolant, dtype=torch.float64, device="cpu"))
        powers = torch.arange(1, self._polynomials.shape[1] + 1, dtype=torch.float64, device="cpu")
        self._powers = transforms.plain(powers)

    def weights(self, theta: Tensor | float) -> Tensor:
        """b_i(θ), [stages] float64 on the CPU."""
        return self._polynomials @ theta**self._powers

    def weights_of(self, thetas: Tensor) -> Tensor:
        """b_i of each of several θ, [n] float64 on the CPU: [stages, n]."""
        return self._polynomials @ thetas ** self._powers[:, None]

    def slopes(self, theta: float) -> Tensor:
        """db_i/dθ, [stages] float64 on the CPU."""
        return self._polynomials @ (self._powers * theta ** (self._powers - 1))


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)
def dense_output(tableau: Tableau) -> DenseOutput:
    """The method's interpolant, made once."""
    return DenseOutput(tableau)
