"""What people write for torchdiffeq, with its import changed: short forms of its examples, running and converging.

Each is run as it stands with torchdiffeq's function and with ours, from the same seed.
"""

import math

import pytest
import torch
import torchdiffeq
from torch import nn

import nesterov_triton as nt

ODEINT = {"odeint": (nt.odeint, torchdiffeq.odeint), "odeint_adjoint": (nt.odeint_adjoint, torchdiffeq.odeint_adjoint)}


def both(train, name):
    """The losses of a training, ours and torchdiffeq's."""
    found = []
    for odeint in ODEINT[name]:
        torch.manual_seed(0)
        found.append(train(odeint))
    return found


@pytest.mark.parametrize("name", ODEINT)
def test_a_spiral_is_learned(name):
    # y' = A y³, learned from batches of short trajectories.
    matrix = torch.tensor([[-0.1, 2.0], [-2.0, -0.1]])

    class Cubic(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(2, 50), nn.Tanh(), nn.Linear(50, 2))
            for layer in (self.net[0], self.net[2]):
                nn.init.normal_(layer.weight, std=0.1)
                nn.init.zeros_(layer.bias)

        def forward(self, t, y):
            return self.net(y**3)

    times = torch.linspace(0.0, 5.0, 200)
    with torch.no_grad():
        truth = torchdiffeq.odeint(lambda t, y: y**3 @ matrix, torch.tensor([[2.0, 0.0]]), times, method="dopri5")

    def train(odeint):
        func, losses = Cubic(), []
        optimizer = torch.optim.RMSprop(func.parameters(), lr=1e-2)
        for _ in range(16):
            starts = torch.randint(0, 190, (20,))
            target = torch.stack([truth[starts + k] for k in range(10)])
            optimizer.zero_grad()
            predicted = odeint(func, truth[starts], times[:10], rtol=1e-5, atol=1e-6)
            loss = (predicted - target).abs().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    ours, theirs = both(train, name)
    assert ours[0] == pytest.approx(theirs[0], rel=1e-5)
    assert ours[:5] == pytest.approx(theirs[:5], rel=1e-2)
    assert sum(ours[-4:]) < 0.7 * sum(ours[:4])


@pytest.mark.parametrize("name", ODEINT)
def test_physics_is_learned(name):
    # A pendulum's stiffness and damping from its motion, by a state that is a tuple, at times of their own.
    class Pendulum(nn.Module):
        def __init__(self, stiffness, damping):
            super().__init__()
            self.stiffness, self.damping = nn.Parameter(torch.tensor(stiffness)), nn.Parameter(torch.tensor(damping))

        def forward(self, t, state):
            angle, speed = state
            return speed, -self.stiffness * torch.sin(angle) - self.damping * speed

    times = torch.linspace(0.0, 2.5, 6)
    state = (torch.tensor([1.0, 0.4]), torch.tensor([0.0, 0.7]))
    with torch.no_grad():
        truth = torchdiffeq.odeint(Pendulum(3.0, 0.25), state, times, rtol=1e-8)

    def train(odeint):
        model, losses = Pendulum(2.4, 0.0), []
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        for _ in range(16):
            optimizer.zero_grad()
            angles, _ = odeint(model, state, times, rtol=1e-4, atol=1e-5)
            loss = (angles - truth[0]).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses, model.stiffness.item(), model.damping.item()

    (ours, stiffness, damping), (theirs, _, _) = both(train, name)
    assert ours[:5] == pytest.approx(theirs[:5], rel=1e-2)
    assert min(ours[-4:]) < 0.1 * ours[0]
    assert abs(stiffness - 3.0) < 0.4
    assert damping > 0.1


@pytest.mark.parametrize("name", ODEINT)
def test_a_small_continuous_normalising_flow_learns(name):
    # The log-density is integrated beside the sample; its rate is a trace that autograd takes inside of the field.
    class Flow(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(3, 24), nn.Tanh(), nn.Linear(24, 2))

        def forward(self, t, state):
            z, _ = state
            with torch.set_grad_enabled(True):
                z.requires_grad_(True)
                rate = self.net(torch.cat((z, t.expand(len(z), 1)), dim=1))
                trace = sum(torch.autograd.grad(rate[:, i].sum(), z, create_graph=True)[0][:, i] for i in range(2))
            return rate, -trace.view(-1, 1)

    def sample(n):
        angle = 2 * math.pi * torch.rand(n)
        return torch.stack((angle.cos(), angle.sin()), dim=1) + 0.1 * torch.randn(n, 2)

    def train(odeint):
        flow, losses = Flow(), []
        optimizer = torch.optim.Adam(flow.parameters(), lr=1e-2)
        for _ in range(12):
            x = sample(64)
            optimizer.zero_grad()
            z, moved = odeint(
                flow, (x, torch.zeros(len(x), 1)), torch.tensor([1.0, 0.0]), rtol=1e-4, atol=1e-4, method="dopri5"
            )
            normal = torch.distributions.MultivariateNormal(torch.zeros(2), 0.1 * torch.eye(2))
            loss = -(normal.log_prob(z[-1]) - moved[-1].view(-1)).mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    ours, theirs = both(train, name)
    assert ours[0] == pytest.approx(theirs[0], rel=1e-3)
    assert ours[:4] == pytest.approx(theirs[:4], rel=2e-2)
    assert ours[-1] < ours[0] - 0.5


def test_a_latent_state_conditioned_by_an_encoder_learns_through_odeint():
    # The field keeps a tensor that an encoder made: autograd must see through it.
    class Conditioned(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.context = nn.Linear(4, 2), None

        def forward(self, t, y):
            return torch.tanh(self.net(torch.cat((y, self.context), dim=1)))

    torch.manual_seed(0)
    func, encoder, x = Conditioned(), nn.Linear(3, 2), torch.randn(5, 3)
    found = []
    for odeint in (nt.odeint, torchdiffeq.odeint):
        func.context = encoder(x)
        out = odeint(func, torch.zeros(5, 2), torch.tensor([0.0, 1.0]))
        found.append(torch.autograd.grad(out[-1].square().sum(), [*encoder.parameters(), *func.parameters()]))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
