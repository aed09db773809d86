"""What a type checker sees: the options of layers and `solve` by name, and what calls return."""

import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

import nesterov_triton as nt
from nesterov_triton import gates, gradients
from nesterov_triton.methods import METHODS, MethodName
from nesterov_triton.stepping import controllers

USER = """
import torch
from torch import Tensor, nn
from typing import assert_type
import nesterov_triton as nt

class Field(nn.Module):
    def forward(self, t: Tensor, h: Tensor) -> Tensor:
        return -h

h, f = torch.ones(2, 3), Field()
layer = nt.GNesterovNODE(f, "tanh", 0.5, form="exact", method="auto", t=(1.0, 2.0), initial_velocity=nn.Identity())
assert_type(layer(h), Tensor)
assert_type(layer(h, return_velocity=True), tuple[Tensor, Tensor])
assert_type(layer.forward(h, return_velocity=True), tuple[Tensor, Tensor])
assert_type(nt.NODE(f, rtol=1e-3)(h), Tensor)
assert_type(layer.configure(rtol=1e-3, gradient=nt.gradients.Adjoint(rtol=1e-3)), nt.GNesterovNODE)
nt.solve(f, h, (0.0, 1.0), method="dopri5", gradient="adjoint", loop="graph", controller="pi")
nt.ANODE(f, augment=1, dim=1, method="rk4", step_size=0.1)
"""
WRONG = [
    'nt.NODE(f, rtoll=1e-3)',
    'nt.NODE(f, initial_velocity=f)',
    'nt.HBNODE(f, method="dopri")',
    'nt.SONODE(f, gradient="adjont")',
    'nt.GHBNODE(f, gate="softclp")',
    'nt.NesterovNODE(f, form="exakt")',
    'nt.GNesterovNODE(f, controller="PI")',
    'nt.ANODE(f, augment=1, loop="grpah")',
    'nt.solve(f, h, (0.0, 1.0), method="dopri")',
    'nt.solve(f, h, (0.0, 1.0), gradient="adjont")',
    'layer.configure(rtoll=1e-3)',
    'layer.configure(method="dopri")',
    'layer(h, return_velocities=True)',
]  # fmt: skip


def test_names_are_the_registered_ones():
    assert get_args(MethodName) == (*METHODS, "auto")
    assert get_args(gradients.GradientName) == tuple(gradients.GRADIENTS)
    assert get_args(gates.GateName) == tuple(gates.GATES)
    assert get_args(controllers.ControllerName) == tuple(controllers.CONTROLLERS)


@pytest.mark.slow
def test_strict_user_code(tmp_path):
    """Right code passes, and of the wrong lines each is told."""
    pytest.importorskip("mypy")
    file = tmp_path / "user.py"
    file.write_text(USER + "\n".join(WRONG) + "\n")
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file", "", "--cache-dir", str(tmp_path), str(file)]
    root = str(Path(nt.__file__).parents[1])
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env={"MYPYPATH": root, "PATH": ""})
    lines = [line for line in done.stdout.splitlines() if line.startswith("user.py") and ": error: " in line]
    first = USER.count("\n") + 1
    assert sorted({int(line.split(":")[1]) for line in lines}) == list(range(first, first + len(WRONG))), done.stdout
