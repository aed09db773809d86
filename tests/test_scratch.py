"""Scratch memory that solves leave to one another: nobody sees another's numbers in it."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import nesterov_triton as nt
from nesterov_triton.stepping.scratch import SHELF, Shelf

GRADIENTS = ("discrete", "adjoint")


@pytest.fixture(autouse=True)
def empty_shelf():
    SHELF.clear()
    yield
    SHELF.clear()


class Decay(nn.Module):
    """y' = -a y, so that y(1) = e^-a y(0) and dy(1)/da = -y(1)."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, t, y):
        return -self.a * y


def solve(field, y0, **options):
    return nt.solve(field, y0, (0.0, 1.0), rtol=1e-9, atol=1e-9, **options)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_what_a_solve_gave_stays_when_its_memory_is_used_again(gradient):
    field, starts = Decay(), [torch.full((3, 2), float(k), dtype=torch.float64) for k in (1, 2, 3)]
    ends = [solve(field, y0, gradient=gradient).final for y0 in starts]
    assert len(SHELF) == 1  # all of them used the same
    grads = [torch.autograd.grad(end.sum(), field.a)[0] for end in ends]
    for y0, end, grad in zip(starts, ends, grads, strict=True):
        torch.testing.assert_close(end, math.exp(-1) * y0, rtol=1e-8, atol=0)
        torch.testing.assert_close(grad, -math.exp(-1) * y0.sum(), rtol=1e-7, atol=0)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_a_solve_inside_a_solve_has_memory_of_its_own(gradient):
    inner = Decay()

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, t, y):
            return solve(inner, y, gradient=gradient).final

    y0 = torch.ones(4, dtype=torch.float64)
    for _ in range(2):
        end = solve(Outer(), y0, gradient=gradient).final
        torch.testing.assert_close(end, math.exp(math.exp(-1)) * y0, rtol=1e-7, atol=0)
        (grad,) = torch.autograd.grad(end.sum(), inner.a)
        expected = -math.exp(-1) * math.exp(math.exp(-1)) * y0.sum()
        torch.testing.assert_close(grad, expected, rtol=1e-6, atol=0)


def test_memory_of_inference_mode_serves_training_and_the_other_way_round():
    field, y0 = Decay(), torch.ones(2, dtype=torch.float64)
    for _ in range(2):
        with torch.inference_mode():
            torch.testing.assert_close(solve(field, y0).final, math.exp(-1) * y0, rtol=1e-8, atol=0)
        (grad,) = torch.autograd.grad(solve(field, y0).final.sum(), field.a)
        torch.testing.assert_close(grad, -math.exp(-1) * y0.sum(), rtol=1e-7, atol=0)


def test_threads_do_not_share_memory():
    def work(k: int) -> bool:
        field, y0 = Decay(), torch.full((64,), float(k + 1), dtype=torch.float64)
        for _ in range(5):
            end = solve(field, y0).final
            (grad,) = torch.autograd.grad(end.sum(), field.a)
            torch.testing.assert_close(end, math.exp(-1) * y0, rtol=1e-8, atol=0)
            torch.testing.assert_close(grad, -math.exp(-1) * y0.sum(), rtol=1e-7, atol=0)
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(8)))


def test_a_solve_that_fails_keeps_its_memory_from_others():
    with pytest.raises(nt.SolveError):
        nt.solve(lambda t, y: y * y, torch.ones(2), (0.0, 2.0), max_steps=50)
    assert len(SHELF) == 0


class Block:
    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes


def test_the_shelf_holds_no_more_than_its_limit_and_drops_the_oldest():
    shelf, like = Shelf(limit=10), torch.zeros(1)
    blocks = {key: Block(4) for key in "abc"}
    for key, block in blocks.items():
        shelf.put(key, like, block)
    assert len(shelf) == 2
    assert shelf.take("a", like, lambda: Block(0)) is not blocks["a"]
    assert shelf.take("b", like, lambda: Block(0)) is blocks["b"]
    assert shelf.take("b", like, lambda: Block(0)) is not blocks["b"]  # it is in use
    shelf.put("large", like, Block(11))
    assert len(shelf) == 1
    shelf.clear()
    assert len(shelf) == 0


def test_systems_that_see_other_views_of_a_state_do_not_share_them():
    """A SONODE's network sees x and m, an HBNODE's x alone; their states are of one size."""

    def spring(t, x, m):
        return -x

    x, m = torch.ones(2, 3, dtype=torch.float64), torch.zeros(2, 3, dtype=torch.float64)
    for _ in range(2):
        for system in (nt.systems.Momentum(lambda t, x: -x), nt.systems.second_order(spring)):
            x0 = x.clone().requires_grad_()
            end, speed = nt.solve(system, (x0, m), (0.0, 1.0), rtol=1e-9, atol=1e-9).final
            (grad,) = torch.autograd.grad(end.sum(), x0)
            torch.testing.assert_close(end, math.cos(1) * x, rtol=1e-8, atol=0)
            torch.testing.assert_close(speed, -math.sin(1) * x, rtol=1e-8, atol=0)
            torch.testing.assert_close(grad, math.cos(1) * x, rtol=1e-7, atol=0)
