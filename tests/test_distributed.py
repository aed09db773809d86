"""Two processes on a CPU: models with these layers, and with `odeint` in them, under DistributedDataParallel and FSDP2.

Each process has half of the batch; the gradients are those of one process with all of it.
"""

import io
import os
import socket

import pytest
import torch
import torch.distributed as dist
from torch import nn

import nesterov_triton as nt

STEPS = 2  # the second one meets what the first one has left


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, t, h):
        return self.b(torch.tanh(self.a(h)) + t)


class Solved(nn.Module):
    """What people write around `odeint`."""

    def __init__(self, odeint):
        super().__init__()
        self.func, self.odeint = Net(), odeint

    def forward(self, x):
        return self.odeint(self.func, x, torch.tensor([0.0, 1.0]), rtol=1e-4, atol=1e-4)[-1]


MIDDLES = {
    "NODE discrete": lambda: nt.NODE(Net()),
    "NODE adjoint": lambda: nt.NODE(Net(), gradient="adjoint"),
    "GNesterovNODE": lambda: nt.GNesterovNODE(Net(), xi=0.5),
    "odeint": lambda: Solved(nt.odeint),
    "odeint_adjoint": lambda: Solved(nt.odeint_adjoint),
}
WRAPPERS = ["ddp", "fsdp", "fsdp of the layer too"]


def model(name):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), MIDDLES[name](), nn.Linear(4, 1))


def batch():
    return torch.randn(8, 3, generator=torch.Generator().manual_seed(1))


def gradients(net, x):
    for _ in range(STEPS):
        net.zero_grad()
        net(x).square().mean().backward()
    return [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in net.parameters()]


def worker(rank, port, results):
    from torch.distributed.fsdp import fully_shard

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    try:
        found = {}
        for name in MIDDLES:
            for wrapper in WRAPPERS:
                net = model(name)
                if wrapper == "ddp":
                    net = nn.parallel.DistributedDataParallel(net)
                else:
                    if "layer" in wrapper:
                        fully_shard(net[1])
                    fully_shard(net)
                found[name, wrapper] = gradients(net, batch()[4 * rank : 4 * rank + 4])
        if rank == 0:
            torch.save(found, results)
    finally:
        dist.destroy_process_group()


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch without gloo")
def test_gradients_of_two_processes_are_those_of_one(tmp_path):
    torch.multiprocessing.spawn(worker, args=(free_port(), tmp_path / "results"), nprocs=2)
    found = torch.load(tmp_path / "results")
    assert set(found) == {(name, wrapper) for name in MIDDLES for wrapper in WRAPPERS}
    for name in MIDDLES:
        expected = gradients(model(name), batch())
        for wrapper in WRAPPERS:
            for ours, theirs in zip(found[name, wrapper], expected, strict=True):
                # Each half takes steps of its own.
                torch.testing.assert_close(
                    ours, theirs, rtol=2e-3, atol=2e-4, msg=lambda m, k=(name, wrapper): f"{k}: {m}"
                )


@pytest.mark.parametrize("name", ["NODE discrete", "NODE adjoint", "GNesterovNODE"])
def test_whole_models_and_their_states_are_saved_and_loaded(name):
    net, buffer = model(name), io.BytesIO()
    torch.save(net, buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=False)
    assert torch.equal(net(batch()), again(batch()))
    buffer = io.BytesIO()
    torch.save(net.state_dict(), buffer)
    buffer.seek(0)
    other = model(name)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(net(batch()), other(batch()))


def test_gradient_accumulation_is_one_large_batch():
    net, x = model("NODE discrete"), batch()
    net(x).square().mean().backward()
    whole = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    for part in x.split(4):
        (net(part).square().mean() / 2).backward()
    for ours, theirs in zip((p.grad for p in net.parameters()), whole, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-4)
