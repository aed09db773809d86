"""Every model against scipy's DOP853 at 1e-12 on a right-hand side written again in numpy."""

import math

import numpy as np
import pytest
import torch
from support import ADAPTIVE, GATED, MODELS, Field, exact_solution, features
from torch import nn

import nesterov_triton as nt

DIRECTIONS = {"forward": [1.0, 1.3, 1.71, 2.0], "backward": [2.0, 1.66, 1.2, 1.0]}
# What each adaptive method is asked for and what it must then reach; interior times come from its interpolant.
ACCURACY = {
    "dopri5": (1e-9, 1e-7),
    "tsit5": (1e-9, 1e-7),
    "bosh3": (1e-7, 1e-5),
    "adaptive_heun": (1e-6, 1e-4),
    "fehlberg2": (1e-7, 1e-4),  # a hopeful estimate: 1/512 of a difference of slopes
    "dopri8": (1e-12, 1e-9),
}


def assert_close(actual: torch.Tensor, expected: np.ndarray, tolerance: float) -> None:
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual.detach().numpy(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("name", [*MODELS, *GATED])
def test_model_solves_its_equation(name, direction):
    model = {**MODELS, **GATED}[name]
    times = DIRECTIONS[direction]
    layer = model.layer(t=times, method="dopri8", rtol=1e-11, atol=1e-11)
    h0 = features(3, 2)
    expected, _ = model.truth(layer, h0.numpy(), times)
    assert_close(layer(h0), expected, 1e-8)
    two = layer(h0, t=(times[0], times[-1]))
    assert_close(two, expected[-1], 1e-9)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("name", [n for n, m in {**MODELS, **GATED}.items() if m.rows == 2])
def test_initial_velocity_goes_in_and_velocity_comes_out(name, direction):
    model = {**MODELS, **GATED}[name]
    times = DIRECTIONS[direction]
    start = nn.Linear(2, 2).double()
    layer = model.layer(t=times, method="dopri8", rtol=1e-11, atol=1e-11, initial_velocity=start)
    h0 = features(3, 2)
    expected, rates = model.truth(layer, h0.numpy(), times, start(h0).detach().numpy())
    h, v = layer(h0, return_velocity=True)
    assert_close(h, expected, 1e-8)
    assert_close(v, rates, 1e-8)
    h, v = layer(h0, t=(times[0], times[-1]), return_velocity=True)
    assert_close(h, expected[-1], 1e-8)
    assert_close(v, rates[-1], 1e-8)


@pytest.mark.parametrize("controller", ["integral", "pi"])
@pytest.mark.parametrize("method", ADAPTIVE)
@pytest.mark.parametrize("name", ["NODE", "GNesterovNODE"])
def test_every_adaptive_method_and_controller_reaches_its_tolerance(name, method, controller):
    model = MODELS[name]
    tolerance, reach = ACCURACY[method]
    layer = model.layer(method=method, rtol=tolerance, atol=tolerance, controller=controller)
    h0 = features(2, 2)
    for times in DIRECTIONS.values():
        expected, _ = model.truth(layer, h0.numpy(), times)
        with torch.no_grad():
            assert_close(layer(h0, t=times), expected, reach)
        assert layer.stats.accepted > 2


@pytest.mark.parametrize("method", ADAPTIVE)
def test_error_shrinks_with_the_tolerance(method):
    model = MODELS["GHBNODE"]
    h0 = features(2, 2)
    errors, steps = [], []
    for tolerance in (1e-6, 1e-8, 1e-10) if method == "dopri8" else (1e-3, 1e-5, 1e-7):
        layer = model.layer(method=method, rtol=tolerance, atol=tolerance)
        expected, _ = model.truth(layer, h0.numpy(), [1.0, 2.0])
        with torch.no_grad():
            errors.append(float(np.abs(layer(h0).numpy() - expected[-1]).max()))
        steps.append(layer.stats.accepted)
    assert errors[0] > 3 * errors[1] > 9 * errors[2]
    assert steps[0] < steps[1] < steps[2]


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_exact_form_is_nesterovs_second_order_equation(direction):
    """h'' + (3/t) h' = -f(t, h), integrated as it stands in (h, h')."""
    times = DIRECTIONS[direction]
    field, start = Field(), nn.Linear(2, 2).double()
    layer = nt.NesterovNODE(
        field, form="exact", t=times, method="dopri8", rtol=1e-11, atol=1e-11, initial_velocity=start
    )
    h0 = features(3, 2)

    def direct(t, z):
        h, v = z
        return np.stack((v, -3 / t * v - field.numpy(t, h)))

    expected = exact_solution(direct, np.stack((h0.numpy(), start(h0).detach().numpy())), times)
    h, v = layer(h0, return_velocity=True)
    assert_close(h, expected[:, 0], 1e-8)
    assert_close(v, expected[:, 1], 1e-8)
    assert_close(v[0], start(h0).detach().numpy(), 1e-14)
    generalised = nt.GNesterovNODE(
        field, "identity", 0.0, form="exact", t=times, method="dopri8", rtol=1e-11, atol=1e-11, initial_velocity=start
    )
    assert_close(generalised(h0), expected[:, 0], 1e-8)


def test_exact_form_at_rest_starts_at_rest():
    layer = nt.NesterovNODE(Field(), form="exact", t=(1.5, 1.7, 2.0))
    _, v = layer(features(3, 2), return_velocity=True)
    assert float(v[0].detach().abs().max()) < 1e-15
    assert float(v[1].detach().abs().max()) > 1e-3


def test_nesterovs_flow_descends_a_convex_quadratic():
    """F - F* = O(1/t²), by the Lyapunov function of Su, Boyd and Candès."""
    curvature = torch.tensor([0.02, 0.3, 2.0], dtype=torch.float64)
    optimum = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)

    def objective(h):
        return 0.5 * (curvature * (h - optimum) ** 2).sum(-1)

    times = np.linspace(1.0, 50.0, 400)
    # x = h / k(t) falls as e^(-t/2): over so long an interval only a relative tolerance says anything about h.
    layer = nt.NesterovNODE(
        lambda t, h: curvature * (h - optimum), form="exact", t=times, method="dopri8", rtol=1e-10, atol=1e-20
    )
    h0 = features(4, 3)
    with torch.no_grad():
        h, v = layer(h0, return_velocity=True)
    t = torch.tensor(times).unsqueeze(1)
    energy = t**2 * objective(h) + 2 * ((h + t.unsqueeze(2) / 2 * v - optimum) ** 2).sum(-1)
    assert bool((energy[1:] <= energy[:-1] + 1e-7).all())
    # E never grows, so t² (F - F*) ≤ E(1) at all times; and what is left at the end shows the decay.
    assert bool((t**2 * objective(h) <= energy[0] + 1e-7).all())
    assert bool((objective(h[-1]) < 1e-2 * objective(h0)).all())


@pytest.mark.parametrize(
    ("layer", "n", "expected"), [("NODE", 20, 545), ("HBNODE", 14, 582), ("NesterovNODE", 14, 581)]
)
def test_published_parameter_counts(layer, n, expected):

    class Net(nn.Module):  # Linear(3→n)-ELU-Linear-ELU-Linear(n→2) on h and the time
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(3, n), nn.ELU(), nn.Linear(n, n), nn.ELU(), nn.Linear(n, 2))

        def forward(self, t, h):
            return self.net(torch.cat((h, t.expand(len(h), 1)), dim=1))

    options = {}
    if layer != "NODE":
        options["initial_velocity"] = nn.Sequential(
            nn.Linear(2, n), nn.Hardtanh(-5, 5), nn.Linear(n, n), nn.Hardtanh(-5, 5), nn.Linear(n, 2)
        )
    model = nn.Sequential(getattr(nt, layer)(Net(), **options), nn.Linear(2, 1))
    assert sum(p.numel() for p in model.parameters()) == expected
    assert model(torch.randn(5, 2)).shape == (5, 1)


def test_damping_starts_where_the_paper_starts_it():
    for layer in (nt.HBNODE(Field()), nt.GHBNODE(Field())):
        (raw,) = (p for n, p in layer.named_parameters() if "damping" in n)
        assert raw.shape == ()
        assert float(raw.detach()) == -3.0
        assert math.isclose(layer.system.damping.item(), 1 / (1 + math.e**3), rel_tol=1e-6)


@pytest.mark.parametrize("times", [(1.0, 2.0), (2.0, 0.7)])
@pytest.mark.parametrize("factor", [0.0, 3.0, 5.0])
def test_the_damping_factor_in_the_exact_form(factor, times):
    """h'' + (r/t) h' = -f(t, h), as it stands, against scipy."""
    field, h, v = Field().double(), features(3, 2), features(3, 2, seed=2)
    layer = nt.NesterovNODE(
        field, form="exact", damping_factor=factor, initial_velocity=lambda _: v, t=times, rtol=1e-10, atol=1e-12
    )

    def slope(t, y):
        h, dh = torch.from_numpy(y).view(2, 3, 2)
        with torch.no_grad():
            force = -field(torch.tensor(t, dtype=torch.float64), h) - factor / t * dh
        return torch.stack((dh, force)).reshape(-1).numpy()

    end = exact_solution(slope, torch.stack((h, v)).reshape(-1).numpy(), list(times))[-1]
    found = torch.stack(layer(h, return_velocity=True)).detach().reshape(-1).numpy()
    np.testing.assert_allclose(found, end, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("gate", [None, 0.7])
def test_the_damping_factor_in_the_absorbed_form(gate):
    """x' = σ(m), m' = -m - σ(f(t, σ(k) x)) - ξ σ(k) x with k = t^(-5/2) e^(t/2), against scipy."""
    field, h, v = Field().double(), features(3, 2), features(3, 2, seed=2)
    sigma = nt.gates.Identity() if gate is None else nt.gates.Softclip(gate)
    layer = nt.GNesterovNODE(
        field, sigma, 0.4, damping_factor=5.0, initial_velocity=lambda _: v, rtol=1e-10, atol=1e-12
    )

    def squash(x):
        return x if gate is None else gate * np.tanh(x / gate)

    def kappa(t):
        return squash(t**-2.5 * math.exp(t / 2))

    def slope(t, y):
        x, m = y.reshape(2, 3, 2)
        with torch.no_grad():
            u = field(torch.tensor(t, dtype=torch.float64), torch.from_numpy(kappa(t) * x)).numpy()
        return np.stack((squash(m), -m - squash(u) - 0.4 * kappa(t) * x)).reshape(-1)

    start = np.stack((h.numpy() / kappa(1.0), v.numpy())).reshape(-1)
    x, m = exact_solution(slope, start, [1.0, 2.0])[-1].reshape(2, 3, 2)
    found, velocity = layer(h, return_velocity=True)
    np.testing.assert_allclose(found.detach().numpy(), kappa(2.0) * x, rtol=1e-8, atol=1e-8)
    t = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    k = t**-2.5 * torch.exp(t / 2)
    (rate,) = torch.autograd.grad(k if gate is None else gate * torch.tanh(k / gate), t)
    expected = kappa(2.0) * squash(m) + rate.item() * x
    np.testing.assert_allclose(velocity.detach().numpy(), expected, rtol=1e-8, atol=1e-8)
