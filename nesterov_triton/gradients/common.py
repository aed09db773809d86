"""What the strategies that evaluate the field again in the backward pass have in common."""

from __future__ import annotations

from nesterov_triton.flow import Flow, Linearisation, unseen_leaves


def check_leaves(flow: Flow, lin: Linearisation) -> None:
    """Raise where the field uses tensors that need gradients and would silently get none.

    Raises:
        RuntimeError: naming their shapes.
    """
    seen = (*lin.leaves, *flow.params) if lin.time is None else (*lin.leaves, lin.time, *flow.params)
    unseen = unseen_leaves(lin.u, seen)
    if unseen:
        shapes = ", ".join(str(tuple(x.shape)) for x in unseen)
        raise RuntimeError(
            f"the field uses {len(unseen)} tensor(s) that need gradients and are neither its parameters nor in params "
            f"(shapes {shapes}): they would get no gradient. Pass them (or the tensor made from them) in params=, or use "
            "gradient='backprop'"
        )
