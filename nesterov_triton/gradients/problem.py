"""One solve as a value: what every gradient strategy is handed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from nesterov_triton import kernels
from nesterov_triton.flow import Flow
from nesterov_triton.kernels import Path
from nesterov_triton.network import Network
from nesterov_triton.nystrom import Nystrom
from nesterov_triton.ops import dispatch
from nesterov_triton.status import Stats
from nesterov_triton.stepping.loop import LoopOptions, Progress
from nesterov_triton.stepping.stepper import Tolerance
from nesterov_triton.systems import Field, System
from nesterov_triton.tableaus import Tableau


@dataclass(frozen=True)
class Problem:
    """A checked initial value problem with its method.

    Attributes:
        system: the right-hand side.
        shape: of h.
        z: the initial state, [D] with D = rows · N, contiguous, with its graph.
        times: the requested times, [n] float64 on the CPU, with their graph.
        scalars: the system's learnable scalars by name, 0-d float64 on the CPU, with their graph.
        params: further tensors that gradients are wanted of.
        frozen: the field's parameters that need no gradient; a backward pass wants them unchanged.
        tolerance: None for fixed steps.
        stats: counted on while the solve runs.
        autocast: the dtype of the autocast that the network runs under, forward and backward; None for none.
        loop: "auto", "eager" or "graph"; see `solve`.
        stand_ins: by the id of one of `params`, the leaf that the field is given in its place where the strategy, not
            autograd, differentiates: so that a graph behind it stays out of the field's own.
        args: what the field is called with beside time and features; in place of those that need gradients their
            stand-ins, if there are any.
        inside: whether the right-hand side is seen from inside of a step at its ends; see `stage_times`.
    """

    system: System
    shape: torch.Size
    z: Tensor
    times: Tensor
    scalars: dict[str, Tensor]
    params: tuple[Tensor, ...]
    method: Tableau | Nystrom
    tolerance: Tolerance | None
    options: LoopOptions
    stats: Stats
    frozen: tuple[Tensor, ...] = ()
    autocast: torch.dtype | None = None
    loop: str = "auto"
    inside: bool = False
    stand_ins: Mapping[int, Tensor] = field(default_factory=dict)
    args: tuple[Any, ...] = ()

    def flow(
        self, *, watch: bool = False, on_output: Callable[[Tensor], object] | None = None, remember: bool = False
    ) -> Flow:
        """The system bound to this solve; the options as for `Network`."""
        return Flow(self.system, self._network(watch, on_output, remember=remember), self.scalars, self.params)

    def flow_back(self, *, time_grads: bool, coefficient_grads: bool, aliased: bool = False) -> Flow:
        """The same for a backward pass: on leaves in place of the scalars, with the cotangents that are wanted.

        With `aliased` the field's parameters are leaves of their own as well, on the same memory: what autograd knows
        of the real ones, such as the stream they were first used on, has no place in a graph that is captured.
        """
        leaves = {name: value.detach().requires_grad_() for name, value in self.scalars.items()}
        wanted = {"time_grads": time_grads, "coefficient_grads": coefficient_grads}
        params = tuple(self.stand_ins.get(id(p), p) for p in self.params) if self.stand_ins else self.params
        retain = bool(ways_between(params))
        if not aliased or not isinstance(self.system.field, nn.Module):
            return Flow(self.system, self._network(retain=retain), leaves, params, **wanted)
        alias = Aliased(self.system.field)
        return Flow(self.system, self._network(field=alias, retain=retain), leaves, alias.of(params), **wanted)

    def _network(
        self,
        watch: bool = False,
        on_output: Callable[[Tensor], object] | None = None,
        field: Field | None = None,
        retain: bool = False,
        remember: bool = False,
    ) -> Network:
        z, field = self.z, self.system.field if field is None else field
        return Network(
            field, self.shape, z.dtype, z.device, self.autocast, watch, on_output, retain, remember, self.args
        )

    def path(self) -> Path:
        """What does the elementwise work of this solve, unless autograd is to see all of it."""
        tolerance, found = self.tolerance, kernels.path(self.system, self.z.device)
        if not found.kernels:
            return found
        if tolerance is not None and tolerance.measure is not None:
            return Path(False, "the error has a norm of its own")
        if self.inside:
            return Path(False, "the ends of steps are seen from inside")
        if tolerance is None and isinstance(self.method, Tableau) and self.method.adaptive:
            return Path(False, "an adaptive method takes given steps")
        if not dispatch.is_registered(self.method):
            return Path(False, f"the method {self.method.name!r} is not registered")
        return kernels.path(self.system, self.z.device, *((tolerance.rtol, tolerance.atol) if tolerance else ()))

    @property
    def tableau(self) -> Tableau:
        """The method, of those that take any system."""
        assert isinstance(self.method, Tableau)
        return self.method

    def count(self, flow: Flow, progress: Progress) -> None:
        """Add what a forward solve by this flow took to the stats."""
        self.stats.nfe_forward += flow.network.evaluations
        self.stats.accepted += progress.accepted
        self.stats.rejected += progress.rejected

    @property
    def edge(self) -> torch.dtype | None:
        """`inside` as `stage_times` wants it."""
        return self.z.dtype if self.inside else None

    def backward_path(self, objection: str | None) -> Path:
        """The same for its backward pass, unless there is something that only plain torch does; kept in the stats."""
        path = self.path() if objection is None else Path(False, objection)
        self.stats.path_backward = str(path)
        return path

    def without_autocast(self) -> AbstractContextManager[object]:
        """A context for the solver's own arithmetic, which keeps the state's dtype."""
        kind = self.z.device.type
        return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """What gradients may be wanted of."""
        return (self.z, self.times, *self.scalars.values(), *self.params)

    def differentiable(self) -> bool:
        """Whether anything needs a gradient here and now."""
        return torch.is_grad_enabled() and any(x.requires_grad for x in self.inputs)


class Aliased:
    """A field on other leaves in place of its parameters, with the same memory. One call at a time."""

    _lock = threading.RLock()  # for the parameters are changed while it runs

    def __init__(self, field: nn.Module) -> None:
        self.field = field
        self._alias = {
            name: p.detach().requires_grad_(p.requires_grad)
            for name, p in field.named_parameters(remove_duplicate=True)
        }

    def __call__(self, t: Tensor, *features: Tensor) -> Tensor:
        with self._lock:
            found: Tensor = functional_call(self.field, self._alias, (t, *features), tie_weights=True)
            return found

    def of(self, params: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Those that stand for `params`; a tensor that is none of the field's stands for itself."""
        own = {id(p): self._alias[name] for name, p in self.field.named_parameters(remove_duplicate=True)}
        return tuple(own.get(id(p), p) for p in params)


def parameters(field: Callable[..., Tensor]) -> tuple[Tensor, ...]:
    """The field's own parameters; none where it is a function."""
    return tuple(field.parameters()) if isinstance(field, nn.Module) else ()


def trainable(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Those of `tensors` that need gradients, each once."""
    seen: dict[int, Tensor] = {id(p): p for p in tensors if p.requires_grad}
    return tuple(seen.values())


def ways_between(params: Sequence[Tensor]) -> list[Any]:
    """The autograd nodes that made those of `params` that are computed from others of them, each once."""
    made = {p.grad_fn: None for p in params if p.grad_fn is not None}
    if not made:
        return []
    leaves = {id(p) for p in params if p.grad_fn is None}
    found = []
    for start in made:
        stack, visited = [n for n, _ in start.next_functions], set()
        while stack:
            node = stack.pop()
            if node is None or node in visited:
                continue
            if node in made or id(getattr(node, "variable", None)) in leaves:
                found.append(start)
                break
            visited.add(node)
            stack.extend(following for following, _ in node.next_functions)
    return found
