"""Plain autograd through the solver: every operation on the tape, derivatives of any order."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from nesterov_triton.gradients.forward import forward
from nesterov_triton.gradients.problem import Problem


@dataclass(frozen=True)
class Backprop:
    """Gradient by autograd through every operation of the accepted and rejected steps.

    Memory: the whole graph. For third derivatives, for torch.func transforms and forward-mode AD, and where tensors of
    a closure need gradients. Step sizes count as constants, as in `Discrete`, and the gradients of the two agree to
    rounding. Under vmap the method must take fixed steps, and values are not checked: they cannot be read there.
    """

    def solve(self, problem: Problem) -> list[Tensor]:
        """The states at the requested times after the first, [D] each, with their graph."""
        stats = problem.stats

        def count(_: object) -> None:
            stats.nfe_backward += 1

        def watch(u: Tensor) -> None:
            if u.grad_fn is not None:  # a leaf is the user's own tensor: the hook would outlive the solve
                u.grad_fn.register_prehook(count)  # half the time of a hook on the tensor

        return forward(problem, problem.flow(on_output=watch), differentiable=True)
