"""Tensors that need gradients and that a strategy cannot see: found, and refused, instead of silently getting none."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from nesterov_triton import gates, transforms
from nesterov_triton.flow import Flow
from nesterov_triton.gradients.problem import Problem, parameters, ways_between
from nesterov_triton.network import Evaluation
from nesterov_triton.systems import Momentum


def check_leaves(flow: Flow, evaluation: Evaluation) -> None:
    """Raise where the field uses tensors that need gradients and would silently get none.

    Raises:
        RuntimeError: naming their shapes.
    """
    own = evaluation.leaves if evaluation.time is None else (*evaluation.leaves, evaluation.time)
    refuse_unseen(evaluation.u, (*own, *flow.params))
    if isinstance(flow.system, Momentum):
        check_gates(flow.system, flow.dtype, flow.device)


def refuse_unseen(u: Tensor, seen: Sequence[Tensor]) -> None:
    """Raise where the field's output `u` depends on tensors that need gradients and are not among `seen`.

    Raises:
        RuntimeError: naming their shapes.
    """
    Sight(seen).check(u)


def check_gates(system: Momentum, dtype: torch.dtype, device: torch.device) -> None:
    """Raise where a callable gate uses tensors that need gradients.

    Raises:
        RuntimeError: how many.
    """
    for gate in (system.gate_x, system.gate_f):
        if isinstance(gate, gates.Elementwise):
            _check_gate(gate, dtype, device)


def check_transforms(problem: Problem, params: Sequence[Tensor]) -> None:
    """Raise where a transform asks for what an autograd.Function with a backward pass of its own does not give.

    Args:
        params: what the field is known to use, whether it needs gradients or not.

    Raises:
        RuntimeError: naming the fix.
    """
    if transforms.active() and (problem.differentiable() or any(map(transforms.carries, (*problem.inputs, *params)))):
        raise RuntimeError(_TRANSFORMED)


def check_cotangents(cotangents: Sequence[Tensor | None]) -> None:
    """Raise where the backward pass is asked for many gradients at once, as by `is_grads_batched`.

    Raises:
        RuntimeError: naming the fix.
    """
    if any(g is not None and transforms.batched(g) for g in cotangents):
        raise RuntimeError(_TRANSFORMED)


def refuse_graph(strategy: str) -> None:
    """Raise in a backward pass that is to have a graph of its own (create_graph=True), which the strategy has not.

    Raises:
        RuntimeError: naming the fix.
    """
    # At once: once_differentiable lets torch.autograd.grad go by with zeros.
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"the {strategy} gradient has no graph of its own (create_graph=True): for second derivatives use "
            "gradient='discrete' or 'backprop'"
        )


def check_parameters(problem: Problem) -> None:
    """Raise where the field no longer has the parameters that the forward pass used.

    Raises:
        RuntimeError: some of them are other tensors now.
    """
    known = {id(p) for p in (*problem.params, *problem.frozen)}
    if any(id(p) not in known for p in parameters(problem.system.field)):
        raise RuntimeError(
            "the field has other parameters than in the forward pass, replaced since, or put in for one call as "
            "torch.func.functional_call does: what it was solved with would get no gradient. Run the backward pass "
            "while they are in place, or use gradient='backprop'"
        )


@contextmanager
def apart(params: Sequence[Tensor]) -> Iterator[None]:
    """Within it parameters are asked for parts of their gradients. Their own hooks do not run, which are meant for the
    whole. Where one is computed from another, the way to the other is closed: its own part goes that way once, when all
    have been added up. `Problem.flow_back` keeps the graphs that such a way is in.

    Raises:
        RuntimeError: a tensor that is no leaf has a hook, or keeps its gradient: that cannot be helped.
    """
    hooked = [p for p in params if p._backward_hooks or (not p.is_leaf and p.retains_grad)]
    if any(not p.is_leaf for p in hooked):
        raise RuntimeError(
            "a tensor in params= that is no leaf has a hook, or keeps its gradient (retain_grad), which would see the "
            "parts of its gradient one by one: use it on a leaf, or gradient='backprop'"
        )
    kept = [p._backward_hooks for p in hooked]
    for p in hooked:
        p._backward_hooks = None
    closed = [node.register_prehook(lambda grads: (None,) * len(grads)) for node in ways_between(params)]
    try:
        yield
    finally:
        for handle in closed:
            handle.remove()
        for p, hooks in zip(hooked, kept, strict=True):
            p._backward_hooks = hooks


def refuse_gradients(states: Sequence[Tensor], u: Tensor) -> list[Tensor]:
    """The states, such that a backward pass through them raises: the field's output `u` has a graph that they lack."""
    if transforms.active():
        raise RuntimeError(_TRANSFORMED)
    anchor = torch.zeros((), device="cpu", requires_grad=True)
    return list(_Refuse.apply(_lost(unseen_leaves(u, ())), anchor, *states))  # type: ignore[no-untyped-call]


def unseen_leaves(u: Tensor, seen: Sequence[Tensor]) -> list[Tensor]:
    """The leaves of u's autograd graph that need gradients and are not among `seen`: tensors a closure brought in."""
    return Sight(seen).unseen(u)


class Sight:
    """Looks for the same in the graphs of one evaluation after another, which all end in the same tensors."""

    def __init__(self, seen: Sequence[Tensor]) -> None:
        self._seen = {id(t) for t in seen}
        # What made a tensor that is seen is not looked into; nor are the nodes of leaves that have been found seen.
        self._ends: set[Any] = {t.grad_fn for t in seen if t.grad_fn is not None}

    def unseen(self, u: Tensor, *own: Tensor) -> list[Tensor]:
        """The leaves of u's graph that need gradients and are neither seen nor among `own`."""
        found: list[Tensor] = []
        stack: list[Any] = [u.grad_fn]
        visited = {None, *self._ends}
        while stack:
            node = stack.pop()
            if node in visited:
                continue
            visited.add(node)
            leaf = getattr(node, "variable", None)
            if leaf is None:
                stack.extend([following for following, _ in node.next_functions])
            elif id(leaf) in self._seen:
                self._ends.add(node)
            elif not any(leaf is x for x in own):
                found.append(leaf)
        return found

    def check(self, u: Tensor, *own: Tensor) -> None:
        """Raise where there are any.

        Raises:
            RuntimeError: naming their shapes.
        """
        unseen = self.unseen(u, *own)
        if unseen:
            raise RuntimeError(_lost(unseen))


def _check_gate(gate: gates.Elementwise, dtype: torch.dtype, device: torch.device) -> None:
    with torch.enable_grad():
        x = torch.zeros(1, dtype=dtype, device=device, requires_grad=True)
        unseen = unseen_leaves(gate.function(x), (x,))
    if unseen:
        raise RuntimeError(
            f"the gate uses {len(unseen)} tensor(s) that need gradients: they would get no gradient. Use "
            "gradient='backprop', or detach them"
        )


def _lost(unseen: Sequence[Tensor]) -> str:
    shapes = ", ".join(str(tuple(x.shape)) for x in unseen)
    return (
        f"the field uses {len(unseen)} tensor(s) that need gradients and are neither its parameters nor in params "
        f"(shapes {shapes}): they would get no gradient. Make them parameters of the field, an nn.Module, or pass "
        "them (or the tensor made from them) in solve(..., params=), or use gradient='backprop'"
    )


_TRANSFORMED = (
    "gradient='discrete' and gradient='adjoint' have backward passes of their own, which torch.func transforms (grad, "
    "vjp, vmap, jvp and what is made of them), batched gradients and forward-mode AD cannot see through: use "
    "gradient='backprop' there"
)


class _Refuse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, message: str, anchor: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        ctx.message = message
        return tuple(s.clone() for s in states)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError(ctx.message)
