"""The README's example runs, and what it says of names and errors is what the package says."""

import re
from pathlib import Path

import pytest
import torch

import nesterov_triton as nt
from nesterov_triton.gradients import GRADIENTS

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def section(title):
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_the_example_runs_and_learns():
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    torch.manual_seed(0)
    scope = {}
    exec(compile(code, "README", "exec"), scope)
    assert scope["loss"].item() < 0.5  # ten unit normals summed: variance 10 before training
    stats = scope["model"][1].stats
    assert stats.nfe_forward > 0
    assert stats.nfe_backward > 0


def test_there_are_two_commands_for_a_fresh_machine():
    commands = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    assert len(commands) == 2
    assert all(c.startswith("pip install ") for c in commands)


def test_every_layer_gradient_method_and_status_is_in_its_table():
    models = section("Models")
    for name in ("NODE", "ANODE", "SONODE", "HBNODE", "GHBNODE", "NesterovNODE", "GNesterovNODE"):
        assert f"| `{name}(field" in models
    for name in nt.tableaus.TABLEAUS:
        assert f"`{name}`" in models
    for name in GRADIENTS:
        assert f'| `"{name}"`' in section("Gradients")
    for status in nt.Status:
        assert status is nt.Status.SUCCESS or f"| `{status.name}` |" in section("Errors")


@pytest.mark.parametrize(
    ("quoted", "provoke"),
    [
        ("did you mean", lambda h: nt.NODE(lambda t, y: y, method="dopri")),
        ("at least two times", lambda h: nt.NODE(lambda t, y: y, t=[1.0])),
        ("NaN or infinite times", lambda h: nt.NODE(lambda t, y: y, t=[1.0, float("nan")])),
        ("must be strictly increasing or decreasing", lambda h: nt.NODE(lambda t, y: y, t=[1.0, 1.0])),
        ("must be positive for a Nesterov system", lambda h: nt.NesterovNODE(lambda t, y: y, t=[0.0, 1.0])),
        ("holds NaN or infinite values", lambda h: nt.NODE(lambda t, y: y)(h / 0)),
        ("must be a floating-point tensor", lambda h: nt.NODE(lambda t, y: y)(h.long())),
        ("step_size is missing", lambda h: nt.NODE(lambda t, y: y, method="rk4")),
        ("belongs to fixed-step methods", lambda h: nt.NODE(lambda t, y: y, step_size=0.1)),
        ("belongs to adaptive methods", lambda h: nt.NODE(lambda t, y: y, method="rk4", step_size=0.1, first_step=1)),
        ("does not broadcast with h", lambda h: nt.NODE(lambda t, y: y, rtol=torch.ones(7))(h)),
        ("returned", lambda h: nt.NODE(lambda t, y: y[:1])(h)),
        ("t must lie between", lambda h: nt.NesterovNODE(lambda t, y: y, t=[1.0, 2000.0])),
        (
            "t must be one tensor where it needs gradients",
            lambda h: nt.NODE(lambda t, y: y, t=[0.0, torch.ones((), requires_grad=True)]),
        ),
        ("state of a momentum system must be a pair", lambda h: nt.solve(nt.systems.nesterov(torch.sin), h, (1, 2))),
        ("state x and m must agree", lambda h: nt.solve(nt.systems.nesterov(torch.sin), (h, h[:1]), (1, 2))),
        ("is defined for the Nesterov systems only", lambda h: nt.systems.Momentum(torch.sin, form="exact")),
        ("initial_velocity returned", lambda h: nt.HBNODE(lambda t, y: y, initial_velocity=lambda y: y[:1])(h)),
        ("gate must be elementwise", lambda h: nt.GHBNODE(lambda t, y: y, gate=lambda x: x[:1])(h)),
    ],
)
def test_the_errors_quoted_are_the_errors_raised(quoted, provoke):
    assert quoted in section("Errors")
    with pytest.raises((ValueError, TypeError), match=quoted):
        provoke(torch.ones(3, 2))
