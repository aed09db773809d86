"""Torch reference of the dense output of the methods of `nesterov_triton.nystrom`."""

from __future__ import annotations

import torch
from torch import Tensor

from nesterov_triton.gates import Gate, Identity
from nesterov_triton.ops.dispatch import wide
from nesterov_triton.ops.first_order_dense_output.reference import put
from nesterov_triton.ops.nystrom.reference import ends_of


def nystrom_dense_output(
    z: Tensor,
    force: Tensor,
    end: Tensor,
    end_force: Tensor,
    weights: Tensor,
    gate_x: Gate,
    out: Tensor | None = None,
    span: Tensor | None = None,
) -> Tensor:
    """See `ops.nystrom_dense_output.nystrom_dense_output`."""
    dtype = wide(z.dtype)
    x, m, x1, m1 = (row for pair in (z, end) for row in pair.view(2, -1).to(dtype))
    f, f1 = force.to(dtype), end_force.to(dtype)
    columns = ends_of(None if isinstance(gate_x, Identity) else gate_x, x, m, f, x1, m1, f1)
    total = torch.zeros((len(weights), 2, x.numel()), dtype=dtype, device=z.device)
    for j, column in enumerate(columns):  # one by one: a matrix product may run in TF32, where so configured
        total.addcmul_(weights[:, :, j, None].to(dtype), column)
    return put(total.flatten(1).to(z.dtype), out, span)
