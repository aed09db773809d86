"""Sums of what a backward pass finds beside the state: cotangents of parameters, scalars and times."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nesterov_triton.flow import Cotangents, Flow

AT_ONCE = 100  # steps that are kept until autograd is called


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
        self._later: list[tuple[Sequence[float], list[Tensor | None]]] = []

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
        """Take the stages' coefficient cotangents, which `settle` brings to the scalars; return those of `times` if
        they are wanted, [s]."""
        flow = self.flow
        if not flow.coefficient_grads and not flow.time_grads:
            return None
        self._later.append((times, _columns(stages, weights)))
        of_times = self.settle() if flow.time_grads or len(self._later) == AT_ONCE else None
        if of_times is None:
            return None
        for i, stage in enumerate(stages):
            if stage.time is not None:
                of_times[i] += stage.time.to(of_times)
        return of_times

    def settle(self) -> Tensor | None:
        """Bring to the scalars what `add_coefficients` was given: one call of autograd for all of it. Return the
        cotangents of its times if they are wanted."""
        if not self._later:
            return None
        flow, later = self.flow, self._later
        self._later = []
        leaf = torch.tensor([t for times, _ in later for t in times], dtype=torch.float64, device="cpu")
        leaf.requires_grad_(flow.time_grads)
        with torch.enable_grad():
            # The scalars here are leaves of this solve: what leads to them is the caller's graph.
            values = flow.coefficients(leaf)
        outputs, grads = [], []
        for k, value in enumerate(values):
            if value is not None and value.requires_grad:
                outputs.append(value)
                columns = [(len(times), found[k]) for times, found in later]
                grads.append(torch.cat([value.new_zeros(n) if x is None else x.to(value) for n, x in columns]))
        inputs = [*flow.scalars.values()] + ([leaf] if flow.time_grads else [])
        pulled = torch.autograd.grad(outputs, inputs, grads, allow_unused=True) if outputs and inputs else ()
        for name, g in zip(flow.scalars, pulled, strict=False):
            if g is not None:
                self.scalars[name] += g
        if not flow.time_grads:
            return None
        last = pulled[-1] if pulled else None
        return torch.zeros_like(leaf) if last is None else last


def _columns(stages: Sequence[Cotangents], weights: Sequence[float] | None) -> list[Tensor | None]:
    """The stages' cotangents of each of `Coefficients`, [s]; None where no stage has any."""
    linear = [(None, None) if c.linear is None else c.linear.unbind(0) for c in stages]
    found: list[Tensor | None] = []
    for column in ([c.scale for c in stages], [c.drive for c in stages], *zip(*linear, strict=True)):
        have = next((x for x in column if x is not None), None)
        if have is None:
            found.append(None)
            continue
        zero = have.new_zeros(())
        stacked = torch.stack([zero if x is None else x for x in column])
        found.append(stacked if weights is None else stacked * stacked.new_tensor(weights))
    return found
