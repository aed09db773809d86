"""The user's network as a solve calls it: counted, checked, under its own autocast."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import _engine_run_backward
from torch.overrides import has_torch_function

from nesterov_triton import transforms
from nesterov_triton._fields import explained, name_of
from nesterov_triton.systems import Field


@dataclass
class Evaluation:
    """One call of a field with its graph kept, ready for one `pullback`."""

    leaves: tuple[Tensor, ...]  # what the field was given: h, or (h, m)
    time: Tensor | None  # its 0-d time, where gradients with respect to times are wanted
    u: Tensor  # its output, with its graph
    retain: bool = False  # whether parts of the graph are somebody else's, too

    def pullback(
        self, g: Tensor, params: tuple[Tensor, ...]
    ) -> tuple[Sequence[Tensor | None], Tensor | None, Sequence[Tensor | None]]:
        """Cotangents of (the leaves, flat), of the time, and of `params`, for the cotangent `g`, [N], of the output;
        None for what the output does not depend on. Frees the graph, unless it is to retain it."""
        n = len(self.leaves)
        inputs = (*self.leaves, *params) if self.time is None else (*self.leaves, self.time, *params)
        if not self.u.requires_grad:  # a field that depends on nothing
            return (None,) * n, None, (None,) * len(params)
        grads = vjp((self.u,), inputs, (g.view(self.u.shape),), self.retain)
        through = [None if v is None else v.reshape(-1) for v in grads[:n]]
        if self.time is None:
            return through, None, grads[n:]
        return through, grads[n], grads[n + 1 :]


def vjp(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], grads: Sequence[Tensor], retain: bool
) -> Sequence[Tensor | None]:
    """`torch.autograd.grad(outputs, inputs, grads, retain, allow_unused=True)`; the engine alone where there is nothing
    to look for: a fifth of the time on small fields goes into checks of what is known to be right."""
    if has_torch_function((*outputs, *inputs)):
        return torch.autograd.grad(outputs, inputs, grads, retain, allow_unused=True)
    found: Sequence[Tensor | None] = _engine_run_backward(
        tuple(outputs), tuple(grads), retain, False, tuple(inputs), True, accumulate_grad=False
    )
    return found


class Seen(NamedTuple):
    """What a field gave once, at a time, in memory of its own."""

    t: Tensor
    u: Tensor


class Network:
    """A field, bound to the shape, dtype and device that its output must have.

    Args:
        field: f(t, h) or f(t, h, m).
        shape, dtype, device: of h.
        autocast: the dtype of the autocast it runs under; None for none.
        watch: keep the graph of the first evaluation whatever the grad mode.
        on_output: is shown the outputs that have a graph.
        retain: for `Evaluation`s.
        args: what the field is called with beside time and features.
        remember: keep the first evaluation. Of one on a GPU nothing is kept: to compare would be to wait for it.

    Attributes:
        evaluations: calls so far.
        remember: as given, on a CPU.
        first: with it, the first of them.
        expected: what the next call at that time is to give, where that is known: the field may have changed.
        retain: as given.
    """

    def __init__(
        self,
        field: Field,
        shape: torch.Size,
        dtype: torch.dtype,
        device: torch.device,
        autocast: torch.dtype | None,
        watch: bool = False,
        on_output: Callable[[Tensor], object] | None = None,
        retain: bool = False,
        remember: bool = False,
        args: tuple[Any, ...] = (),
    ) -> None:
        self._args = args
        self.shape, self.dtype, self.device = shape, dtype, device
        self.retain = retain
        self.evaluations = 0
        self.first: Seen | None = None
        self.expected: Seen | None = None
        self.remember = remember and device.type == "cpu"
        self._field, self._autocast, self._watch, self._on_output = field, autocast, watch, on_output

    def __call__(self, t: Tensor, *features: Tensor) -> Tensor:
        """The field's output, of h's shape, dtype and device.

        Raises:
            ValueError, TypeError: it is something else.
            RuntimeError: the field changes its input in place.
        """
        call = self._field if self.evaluations else self._first
        if self._autocast is None:
            u = call(t, *features, *self._args)
        else:
            # Without its cache: that may hold weights cast in the forward pass, without their graph.
            with torch.autocast(self.device.type, dtype=self._autocast, cache_enabled=False):
                u = call(t, *features, *self._args)
        self.evaluations += 1
        if type(u) is not Tensor or u.dtype != self.dtype or u.shape != self.shape or u.device != self.device:
            u = self._checked(u)
        if self.expected is not None:
            self._compare(self.expected, t, u)
        if self._on_output is not None:
            tracked = transforms.tracked(u)
            if tracked is not None:
                self._on_output(tracked)
        return u

    def taped(self, t: Tensor, *features: Tensor, time_grads: bool = False) -> Evaluation:
        """A call whose graph is kept. The features' memory must stay as it is until the pullback."""
        # Tensors of their own: a view that is marked as a leaf here must not be the state's.
        leaves = tuple(f.detach().requires_grad_() for f in features)
        time = t.detach().requires_grad_() if time_grads else None
        with torch.enable_grad():
            return Evaluation(leaves, time, self(t if time is None else time, *leaves), self.retain)

    def _compare(self, expected: Seen, t: Tensor, u: Tensor) -> None:
        """Raise where the field, at the expected time, gives something else than it gave once; it is the same state.

        Raises:
            RuntimeError: and says what to do.
        """
        if float(t) != float(expected.t):
            return
        self.expected = None
        if torch.equal(u, expected.u):
            return
        size, off = float(expected.u.abs().max()), float((u.detach() - expected.u).abs().max())
        # What is not finite goes on, as it does with autograd.
        if math.isfinite(off) and off > torch.finfo(u.dtype).eps ** 0.5 * size:
            raise RuntimeError(
                f"the field {self._name()} gives another output in the backward pass than it gave in the forward pass "
                "for the same input: something that it uses has changed since (an attribute, a buffer, its mode), or "
                "it draws random numbers. Keep it as it was until the backward pass, hand what changes in as params "
                "or args, or use gradient='backprop' or nt.gradients.Discrete(recompute=False)"
            )

    def _first(self, t: Tensor, *given: Any) -> Tensor:
        """The first evaluation, looked at for what would be wrong every time; `given` are the features and args."""
        features: Sequence[Tensor] = given[: len(given) - len(self._args)]
        versions = [None if x.is_inference() else x._version for x in features]
        with torch.set_grad_enabled(self._watch or torch.is_grad_enabled()):
            try:
                u = self._field(t, *given)
            except (TypeError, RuntimeError) as error:
                told = explained(self._field, features, len(self._args), error, self._autocast is not None)
                if told is error:
                    raise
                raise told from error
        if versions != [None if x.is_inference() else x._version for x in features]:
            raise RuntimeError(
                f"field {self._name()} changes its input in place, and that is the solver's state; "
                "use inplace=False, or clone the input first"
            )
        if self.remember and isinstance(u, Tensor):
            self.first = Seen(t, u.detach().clone())
        return u

    def _checked(self, u: Any) -> Tensor:
        """Raise for what a field must not return; accept a tensor subclass, and autocast's narrower dtype."""
        name, shape, device = self._name(), tuple(self.shape), self.device
        if not isinstance(u, Tensor):
            raise TypeError(f"field {name} returned {type(u).__name__}; it must return a tensor of h's shape")
        if u.shape != self.shape:
            raise ValueError(f"field {name} returned shape {tuple(u.shape)} for h of shape {shape}; return h's")
        if u.device != device:
            raise ValueError(f"field {name} returned a tensor on {u.device}, h is on {device}; move the field there")
        if u.dtype != self.dtype:
            if not (self._autocast is not None and u.is_floating_point()):
                raise ValueError(
                    f"field {name} returned {u.dtype} for h of {self.dtype}; convert the field or the input, "
                    f"for example with .to({self.dtype})"
                )
            return u.to(self.dtype)
        return u

    def _name(self) -> str:
        return name_of(self._field)
