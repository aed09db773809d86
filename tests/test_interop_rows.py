"""`per_sample=True`: every row by itself."""

import math

import pytest
import torch
import torchdiffeq
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
    # To rounding: whether an element is computed in a vector or in what is left over depends on its place, and on some
    # processors its last digit does.
    same = {"rtol": 1e-12, "atol": 1e-13}
    torch.testing.assert_close(together, torch.cat([y for y, _ in alone], dim=1), **same)
    assert stats.accepted == sum(s.accepted for _, s in alone)
    assert stats.rejected == sum(s.rejected for _, s in alone)
    assert alone[0][1].accepted < alone[-1][1].accepted
    shuffled = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(nt.odeint(lively, y0[shuffled], t, **keywords)[0], together[:, shuffled], **same)
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


# -- states of other forms, beside the same rows alone -----------------------------------------------------------------


class Tuple(nn.Module):
    """Two tensors, and a pace for each row."""

    def __init__(self):
        super().__init__()
        self.f = Field(3, 4)

    def forward(self, t, y):
        x, v = y
        return v.mean(-1, keepdim=True).exp() * self.f(t, x), torch.cos(2 * t) - v * x[..., :1] ** 2


class Complex(nn.Module):
    """A rotation with a pace for each row, and a force."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.3 + 1j, -0.2 + 2j, -1j], dtype=torch.complex128))

    def forward(self, t, y):
        return self.w * y * (1 + 3 / (1 + y[..., :1].abs() ** 2)) + t


class Images(nn.Module):
    """A tensor of more dimensions."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(features(2, 2))

    def forward(self, t, y):
        return y.flatten(1).norm(dim=1).view(-1, 1, 1) * torch.sin(y @ self.w + t)


FORMS = {
    "tuple": (Tuple, (features(4, 3), features(4, 2, seed=2) * tensor(0.1, 2.0, 1.0, 0.5)[:, None])),
    "complex": (Complex, torch.complex(features(4, 3), features(4, 3, seed=2)) * tensor(0.1, 1.5, 1.0, 0.5)[:, None]),
    "images": (Images, features(4, 2, 2) * tensor(0.1, 3.0, 1.0, 0.5)[:, None, None]),
}


def each(y0, b):
    return tuple(x[b : b + 1] for x in y0) if isinstance(y0, tuple) else y0[b : b + 1]


def parts(y):
    return y if isinstance(y, tuple) else (y,)


def loss(solution):
    return sum((k + 1) * y.abs().square().sum() for part in parts(solution) for k, y in enumerate(part))


@pytest.mark.parametrize("times", [[0.0, 0.4, 1.0], [1.0, 0.3, 0.0]])
@pytest.mark.parametrize("form", FORMS)
def test_rows_of_every_form_are_solved_as_if_alone(form, times):
    make, y0 = FORMS[form]
    f, t = make(), tensor(*times)
    per_row = (tensor(1e-6, 1e-6, 1e-5, 1e-6)[:, None], 1e-6) if form == "tuple" else 1e-6
    keywords = {"rtol": 1e-6, "per_sample": True, "return_stats": True}
    with torch.no_grad():
        *together, stats = nt.odeint(f, y0, t, atol=per_row, **keywords)
        accepted = rejected = 0
        for b in range(4):
            own = ((per_row[0][b : b + 1], per_row[1])) if form == "tuple" else per_row
            *alone, one = nt.odeint(f, each(y0, b), t, atol=own, **keywords)
            accepted, rejected = accepted + one.accepted, rejected + one.rejected
            # A batch of one takes the steps that odeint takes: the same norm, of tuples and complex numbers too.
            *plain, same = nt.odeint(f, each(y0, b), t, rtol=1e-6, atol=own, return_stats=True)
            assert (one.accepted, one.rejected) == (same.accepted, same.rejected)
            reference = torchdiffeq.odeint(f, each(y0, b), t, rtol=1e-9, atol=1e-9)
            found = zip(parts(together[0]), parts(alone[0]), parts(plain[0]), parts(reference), strict=True)
            for whole, single, ordinary, exact in found:
                torch.testing.assert_close(whole[:, b : b + 1], single, rtol=1e-12, atol=1e-12)  # the field's rounding
                torch.testing.assert_close(single, ordinary, rtol=1e-10, atol=1e-10)
                torch.testing.assert_close(single, exact, rtol=1e-3, atol=1e-4)
    assert (stats.accepted, stats.rejected) == (accepted, rejected)


@pytest.mark.parametrize(("solver", "gradient"), [(nt.odeint, "discrete"), (nt.odeint_adjoint, "backprop")])
@pytest.mark.parametrize("form", FORMS)
def test_gradients_of_every_form_are_those_of_the_rows_alone(form, solver, gradient):
    """Of the times as well, those of the rows added up: what "discrete" says of a solve of each row's own."""
    make, y0 = FORMS[form]
    f, t = make(), tensor(0.1, 0.5, 1.2).requires_grad_()
    y0 = tuple(x.clone().requires_grad_() for x in y0) if form == "tuple" else y0.clone().requires_grad_()
    wanted = (t, *parts(y0), *f.parameters())
    tight = {"rtol": 1e-6, "atol": 1e-7}
    found = torch.autograd.grad(loss(solver(f, y0, t, per_sample=True, gradient=gradient, **tight)), wanted)
    alone = sum(loss(nt.odeint(f, each(y0, b), t, gradient="discrete", **tight)) for b in range(4))
    for ours, theirs in zip(found, torch.autograd.grad(alone, wanted), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    exact = loss(torchdiffeq.odeint(f, y0, t, rtol=1e-8, atol=1e-8))
    for ours, theirs in zip(found, torch.autograd.grad(exact, wanted), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_backward_in_time_the_times_have_gradients_too():
    f, t, y0 = Field(3, 4), tensor(1.2, 0.5, 0.1).requires_grad_(), features(4, 3)
    (found,) = torch.autograd.grad(loss(nt.odeint(f, y0, t, per_sample=True, rtol=1e-8, atol=1e-9)), t)
    (expected,) = torch.autograd.grad(loss(torchdiffeq.odeint(f, y0, t, rtol=1e-9, atol=1e-10)), t)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_parameters_that_are_unused_get_zeros_and_those_changed_since_are_an_error():
    class Partly(Field):
        def __init__(self):
            super().__init__(3, 4)
            self.unused = nn.Parameter(torch.ones(5))

    f, t = Partly(), tensor(0.0, 0.5, 1.0)
    nt.odeint(f, features(2, 3), t, per_sample=True)[1].sum().backward()
    assert torch.equal(f.unused.grad, torch.zeros(5))
    assert f.a.grad.abs().sum() > 0
    out = nt.odeint(f, features(2, 3), t, per_sample=True)
    with torch.no_grad():
        f.a.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out[1].sum().backward()


def test_args_and_named_parameters_are_differentiated():
    theta, y0, t = features(3, 3).requires_grad_(), features(4, 3), tensor(0.0, 1.0)

    def f(t, y, theta):
        return torch.sin(y @ theta + t)

    tight = {"rtol": 1e-8, "atol": 1e-9}
    (expected,) = torch.autograd.grad(loss(nt.odeint(f, y0, t, args=(theta,), **tight)), theta)
    for found in (
        nt.odeint(f, y0, t, args=(theta,), per_sample=True, **tight),
        nt.odeint_adjoint(
            lambda t, y: f(t, y, theta), y0, t, adjoint_params=(theta,), gradient="discrete", per_sample=True, **tight
        ),
    ):
        torch.testing.assert_close(torch.autograd.grad(loss(found), theta)[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0)])
def test_rows_without_elements_and_no_rows(shape):
    y0 = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    out = nt.odeint(lambda t, y: torch.cos(t) * y, y0, tensor(0.0, 0.5, 1.0), per_sample=True)
    assert out.shape == (3, *shape)
    out.sum().backward()
    assert y0.grad.shape == shape


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("for adaptive methods", {"method": "rk4"}),
        ("needs a batch", {"y0": (features(2, 3), features(3, 3))}),
        ("needs a batch", {"y0": torch.tensor(1.0)}),
        ("the same number of dimensions: unsqueeze", {"y0": (features(2, 3), features(2))}),
        ("momentum systems; write func", {"func": nt.systems.nesterov(torch.sin), "y0": (features(2), features(2))}),
        (r"options\['norm'\] does not go", {"options": {"norm": torch.linalg.vector_norm}}),
        ("event_fn does not go", {"event_fn": lambda t, y: y.sum()}),
        ("'discrete' or 'backprop'", {"gradient": "adjoint"}),
        ("'discrete' or 'backprop'", {"solver": nt.odeint_adjoint}),
        ("per_sample is for this package's own methods", {"method": "implicit_adams"}),
    ],
)
def test_what_does_not_go_with_it(message, change):
    given = {"func": nn.Identity(), "y0": features(2, 3), "t": tensor(1.0, 2.0)} | change
    func, y0, t, solver = (given.pop(name, nt.odeint) for name in ("func", "y0", "t", "solver"))
    with pytest.raises(ValueError, match=message):
        solver(func, y0, t, per_sample=True, **given)
