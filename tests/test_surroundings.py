"""A solve is its own: what goes on before it, around it and after it changes nothing, or is refused."""

import subprocess
import sys

import pytest
import torch
from support import GRADIENTS, MODELS, features, gradients, largest_difference

import nesterov_triton as nt

SECOND_USE = """
import torch
import nesterov_triton as nt

class Field(torch.nn.Linear):
    def forward(self, t, h):
        return t * super().forward(h)

for gradient in ("discrete", "adjoint", "backprop"):
    layer = nt.GNesterovNODE(Field(2, 2, device="cpu"), gradient=gradient)
    layer.system.raw_xi = torch.nn.Parameter(torch.zeros((), device="cpu"))
    t = torch.tensor([1.0, 1.5, 2.0], device="cpu", requires_grad=True)
    h = torch.ones(3, 2, device="cpu", requires_grad=True)
    {before}
    h1, velocity = layer(h, t=t, return_velocity=True)
    (h1.sum() + velocity.sum()).backward()
    assert h.grad is not None and t.grad is not None and layer.system.raw_xi.grad is not None
"""


@pytest.mark.parametrize(
    "before",
    ["with torch.inference_mode(): layer(h, t=t)", 'torch.set_default_device("meta")'],
    ids=["inference mode", "default device"],
)
def test_constants_that_are_made_once_are_good_for_every_later_solve(before):
    """In a process of its own, which has none yet: as where a validation runs before the first epoch."""
    subprocess.run([sys.executable, "-c", SECOND_USE.format(before=before)], check=True, timeout=120)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_times_that_change_after_the_solve_do_not_change_its_gradient(gradient):
    found = []
    for change in (False, True):
        layer = MODELS["GNesterovNODE"].layer(gradient=gradient)
        h, t = features(2, 2).requires_grad_(), torch.tensor([1.0, 1.5, 2.0], dtype=torch.float64)
        loss = layer(h, t=t).sum()
        if change:
            t.mul_(3)
        found.append(gradients(layer, loss, h))
    assert largest_difference(*found) == 0.0
    times = torch.tensor([1.0, 2.0], dtype=torch.float64)
    solution = nt.solve(lambda t, y: -y, torch.ones(2), times)
    times.zero_()
    assert solution.t.tolist() == [1.0, 2.0]
