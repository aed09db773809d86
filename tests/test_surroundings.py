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


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_hooks_of_parameters_see_the_gradient_once(gradient):
    """As a hook that scales or clips, or that logs; not once for every evaluation of the field."""
    layer = MODELS["HBNODE"].layer(gradient=gradient)
    seen = []

    def loss():
        return layer(features(2, 2)).sum()

    (expected,) = torch.autograd.grad(loss(), layer.field.a)
    layer.field.a.register_hook(lambda g: seen.append(g) or 0.1 * g)
    loss().backward()
    assert len(seen) == 1
    torch.testing.assert_close(layer.field.a.grad, 0.1 * expected)


@pytest.mark.parametrize("gradient", ["discrete", "adjoint"])
def test_a_hook_that_would_see_parts_of_a_gradient_is_refused(gradient):
    def loss(prepare):
        theta = features(2, 2).requires_grad_() * 2
        prepare(theta)
        return nt.solve(lambda t, y: y @ theta, features(3, 2), (0.0, 1.0), params=[theta], gradient=gradient).final

    loss(lambda theta: None).sum().backward()
    for prepare in (lambda theta: theta.retain_grad(), lambda theta: theta.register_hook(lambda g: None)):
        with pytest.raises(RuntimeError, match="no leaf has a hook"):
            loss(prepare).sum().backward()


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_parameters_put_in_for_one_call(gradient, frozen):
    """Silence would be zeros for them and, for the input, the gradient of another network."""
    found = []
    for strategy in (gradient, "backprop"):
        layer = MODELS["NODE"].layer(gradient=strategy, rtol=1e-9, atol=1e-9).requires_grad_(not frozen)
        fast = {name: (p.detach() + 0.5).requires_grad_() for name, p in layer.named_parameters()}
        h = features(2, 2).requires_grad_()

        def gradients_of(module, h, fast=fast):
            return torch.autograd.grad(module(h).square().sum(), [h, *fast.values()])

        if strategy != "backprop":
            loss = torch.func.functional_call(layer, fast, (h,)).square().sum()
            with pytest.raises(RuntimeError, match="would get no gradient"):
                torch.autograd.grad(loss, [h, *fast.values()])
            whole = WithGradients(layer, gradients_of)
            found.append(torch.func.functional_call(whole, {f"layer.{k}": v for k, v in fast.items()}, (h,)))
        else:
            loss = torch.func.functional_call(layer, fast, (h,)).square().sum()
            found.append(torch.autograd.grad(loss, [h, *fast.values()]))
    assert largest_difference(*found) < 1e-6


class WithGradients(torch.nn.Module):
    """A layer's loss with its backward pass in one call."""

    def __init__(self, layer, gradients_of):
        super().__init__()
        self.layer, self.gradients_of = layer, gradients_of

    def forward(self, h):
        return self.gradients_of(self.layer, h)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_frozen_parameters_that_change_before_the_backward_pass_raise(gradient):
    layer = MODELS["NODE"].layer(gradient=gradient).requires_grad_(False)
    loss = layer(features(2, 2).requires_grad_()).sum()
    layer.field.a.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
