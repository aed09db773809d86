"""`per_sample=True`: every row by itself."""

import math

import pytest
import torch
from support import Field, features
from torch import nn

import nesterov_triton as nt

METHODS = ["dopri5", "dopri8", "tsit5", "bosh3", "fehlberg2", "adaptive_heun"]


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def lively(t, y):
    """Elementwise, so that nothing but the solver could mix rows; the first element sets a row's pace."""
    pace = y[:, :1]
    return torch.cat((0 * pace, torch.cos(pace * t) * y[:, 1:] * pace), dim=1)


def rows(n=5):
    return torch.cat((torch.linspace(0.5, 20, n, dtype=torch.float64)[:, None], features(n, 2)), dim=1)


@pytest.mark.parametrize("times", [[0.0, 0.4, 1.0], [1.0, 0.3, 0.0]])
@pytest.mark.parametrize("method", METHODS)
def test_a_row_is_the_same_whatever_the_others_are(method, times):
    y0, t = rows(), torch.tensor(times, dtype=torch.float64)
    tight = 1e-3 if method in ("adaptive_heun", "bosh3") else 1e-5
    keywords = {"method": method, "rtol": tight, "atol": tight / 10, "per_sample": True, "return_stats": True}
    together, stats = nt.odeint(lively, y0, t, **keywords)
    alone = [nt.odeint(lively, y0[b : b + 1], t, **keywords) for b in range(5)]
    assert torch.equal(together, torch.cat([y for y, _ in alone], dim=1))
    assert stats.accepted == sum(s.accepted for _, s in alone)
    assert stats.rejected == sum(s.rejected for _, s in alone)
    assert alone[0][1].accepted < alone[-1][1].accepted
    shuffled = torch.tensor([3, 0, 4, 1, 2])
    assert torch.equal(nt.odeint(lively, y0[shuffled], t, **keywords)[0], together[:, shuffled])
    exact = y0[:, 1:] * torch.exp(torch.sin(y0[:, :1] * t[-1]) - torch.sin(y0[:, :1] * t[0]))
    torch.testing.assert_close(together[-1, :, 1:], exact, rtol=5e-2, atol=1e-2)


def test_a_row_alone_takes_the_steps_of_a_batch_of_one():
    f, y0, t = Field(3, 4), features(1, 3), tensor(0.0, 0.6, 1.5)
    own, a = nt.odeint(f, y0, t, rtol=1e-6, atol=1e-7, per_sample=True, return_stats=True)
    plain, b = nt.odeint(f, y0, t, rtol=1e-6, atol=1e-7, return_stats=True)
    assert (a.accepted, a.rejected) == (b.accepted, b.rejected)
    torch.testing.assert_close(own, plain, rtol=0, atol=1e-10)


@pytest.mark.parametrize("gradient", [None, "backprop"])
@pytest.mark.parametrize("method", ["dopri5", "bosh3", "adaptive_heun"])
def test_gradients(method, gradient):
    class Paced(nn.Module):
        def __init__(self):
            super().__init__()
            self.f, self.calls = Field(3, 4), 0

        def forward(self, t, y):
            assert t.shape == (4, 1)
            self.calls += 1
            return y[:, :1] * self.f(t, y)

    f, y0, t = Paced(), features(4, 3).requires_grad_(), tensor(0.0, 0.5, 1.0)
    wanted = (y0, *f.parameters())
    tight = 1e-4 if method == "adaptive_heun" else 1e-6
    keywords = {"method": method, "rtol": tight, "atol": tight / 10, "per_sample": True}
    with torch.no_grad():
        bare = nt.odeint(f, y0, t, **keywords)
    f.calls = 0
    out, stats = nt.odeint(f, y0, t, gradient=gradient, return_stats=True, **keywords)
    torch.testing.assert_close(out, bare, rtol=0, atol=1e-14)
    assert stats.nfe_forward == f.calls
    found = torch.autograd.grad(out.square().sum(), wanted)
    assert stats.nfe_forward + stats.nfe_backward == f.calls

    def unpaced(t, y):
        return y[:, :1] * f.f(t, y)

    reference = nt.odeint(unpaced, y0, t, rtol=1e-9, atol=1e-10)
    for ours, theirs in zip(found, torch.autograd.grad(reference.square().sum(), wanted), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-2)


def test_a_failure_says_which_row():
    y0 = tensor(0.1, 0.2, 3.0, 0.1)[:, None]
    with pytest.raises(nt.SolveError, match="row 2") as error:
        nt.odeint(lambda t, y: y * y, y0, tensor(0.0, 1.0), per_sample=True)
    assert error.value.t == pytest.approx(1 / 3, abs=1e-3)
    with pytest.raises(nt.SolveError, match="row 2") as error:
        nt.odeint(lambda t, y: y * y, y0, tensor(0.0, 1.0), per_sample=True, options={"max_num_steps": 12})
    assert error.value.status is nt.Status.MAX_STEPS
    with pytest.raises(nt.SolveError, match="row 1"):
        nt.odeint(lambda t, y: torch.where(y > 0.15, math.nan, y), y0[:2], tensor(0.0, 1.0), per_sample=True)


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("for adaptive methods", {"method": "rk4"}),
        ("one real tensor", {"y0": (features(2), features(2))}),
        (r"options\['norm'\] does not go", {"options": {"norm": torch.linalg.vector_norm}}),
        ("event_fn does not go", {"event_fn": lambda t, y: y.sum()}),
        ("t has no gradient", {"t": tensor(0.0, 1.0).requires_grad_()}),
        ("'discrete' or 'backprop'", {"gradient": "adjoint"}),
    ],
)
def test_what_does_not_go_with_it(message, change):
    given = {"y0": features(2, 3), "t": tensor(0.0, 1.0)} | change
    y0, t = given.pop("y0"), given.pop("t")
    with pytest.raises(ValueError, match=message):
        nt.odeint(lambda t, y: y, y0, t, per_sample=True, **given)
