"""Sums of what a backward pass finds beside the state: cotangents of parameters, scalars and times."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nesterov_triton.flow import Cotangents, Flow


def zeros_for(params: Sequence[Tensor]) -> list[Tensor]:
    """A sum for each of `params`, of its shape, in at least float32."""
    return [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in params]


def accumulate(sums: Sequence[Tensor], found: Sequence[Tensor | None], weight: float = 1.0) -> None:
    """sums += weight · found, where None is zero."""
    have = [(p, g) for p, g in zip(sums, found, strict=True) if g is not None]
    if have and weight != 0.0:
        torch._foreach_add_([p for p, _ in have], [g for _, g in have], alpha=weight)


class Totals:
    """Sums, over stages and steps, of the cotangents of everything but the state.

    Attributes:
        params: one tensor for each of Flow.params, of its shape, in at least float32.
        scalars: by name, 0-d float64.
    """

    def __init__(self, flow: Flow) -> None:
        self.flow = flow
        self.params = zeros_for(flow.params)
        self.scalars = {name: torch.zeros((), dtype=torch.float64, device="cpu") for name in flow.scalars}

    def restart(self, flow: Flow) -> None:
        """From 0 again, in the same memory, for another solve."""
        self.flow = flow
        if self.params:
            torch._foreach_zero_(self.params)
        for value in self.scalars.values():
            value.zero_()

    def take(self, other: Totals) -> None:
        """Become a copy of `other`."""
        self.params = [p.clone() for p in other.params]
        self.scalars = {name: value.clone() for name, value in other.scalars.items()}

    def of_params(self) -> list[Tensor]:
        """The parameters' cotangents, in their own dtypes."""
        return [total.to(p.dtype) for total, p in zip(self.params, self.flow.params, strict=True)]

    def add_scalars(self, integrals: Tensor) -> None:
        """Add the cotangents of ξ and γ, [2]; one host read."""
        for name, value in zip(("xi", "damping"), integrals.tolist(), strict=True):
            if name in self.scalars:
                self.scalars[name] += value

    def add_coefficients(
        self, times: Sequence[float], stages: Sequence[Cotangents], weights: Sequence[float] | None = None
    ) -> Tensor | None:
        """Pull the stages' coefficient cotangents back to the scalars; return those of `times` if they are wanted,
        [s]."""
        flow = self.flow
        if not flow.coefficient_grads and not flow.time_grads:
            return None
        of_times = self._pull(torch.tensor(times, dtype=torch.float64, device="cpu"), stages, weights)
        if of_times is not None:
            for i, stage in enumerate(stages):
                if stage.time is not None:
                    of_times[i] += stage.time.to(of_times)
        return of_times

    def _pull(self, times: Tensor, stages: Sequence[Cotangents], weights: Sequence[float] | None) -> Tensor | None:
        flow = self.flow
        leaf = times.detach().requires_grad_(flow.time_grads)
        with torch.enable_grad():
            # The scalars here are leaves of this solve: what leads to them is the caller's graph.
            values = flow.coefficients(leaf)
        outputs, grads = [], []
        q_and_gamma = [(None, None) if c.linear is None else c.linear.unbind(0) for c in stages]
        for value, found in (
            (values.scale, [c.scale for c in stages]),
            (values.drive, [c.drive for c in stages]),
            (values.q, [q for q, _ in q_and_gamma]),
            (values.minus_gamma, [g for _, g in q_and_gamma]),
        ):
            if value is None or not value.requires_grad:
                continue
            zero = value.new_zeros(())
            grad = torch.stack([zero if x is None else x.to(zero) for x in found])
            outputs.append(value)
            grads.append(grad if weights is None else grad * grad.new_tensor(weights))
        names = list(flow.scalars)
        inputs = [flow.scalars[n] for n in names] + ([leaf] if flow.time_grads else [])
        if not outputs or not inputs:
            return torch.zeros_like(times) if flow.time_grads else None
        pulled = torch.autograd.grad(outputs, inputs, grads, allow_unused=True)
        for name, g in zip(names, pulled, strict=False):
            if g is not None:
                self.scalars[name] += g
        if not flow.time_grads:
            return None
        last = pulled[-1]
        return torch.zeros_like(times) if last is None else last
