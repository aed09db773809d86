"""Counts as values, and failures that cross processes."""

import copy
import dataclasses
import json
import pickle

import pytest
import torch
from torch import nn

import nesterov_triton as nt


class Field(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(3, 3)

    def forward(self, t, h):
        return torch.tanh(self.net(h))


def failure():
    with pytest.raises(nt.SolveError) as failed:
        nt.solve(lambda t, y: 50 * y * y, torch.ones(2), (0.0, 1.0), max_steps=20)
    return failed.value


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_failure_keeps_its_counts(copied):
    error = failure()
    error.add_note("in worker 3")
    twin = copied(error)
    assert str(twin) == str(error)
    assert (twin.status, twin.t, twin.dt, twin.steps) == (error.status, error.t, error.dt, error.steps)
    assert twin.stats == error.stats
    assert twin.stats.accepted + twin.stats.rejected == 20
    assert twin.__notes__ == ["in worker 3"]
    assert pickle.loads(pickle.dumps(nt.SolveError(nt.Status.MAX_STEPS, 0.0, 0.1, 5))).stats is None


def test_counts_as_a_dict():
    layer = nt.GNesterovNODE(Field())
    layer(torch.ones(2, 3)).sum().backward()
    counts = layer.stats.as_dict()
    assert list(counts) == [field.name for field in dataclasses.fields(nt.Stats)]
    assert nt.Stats(**counts) == layer.stats
    assert json.loads(json.dumps(counts)) == counts
    assert nt.Stats(nfe_forward=torch.tensor(7)).as_dict()["nfe_forward"] == 7
    counts["accepted"] = -1
    assert layer.stats.accepted > 0


def test_counts_of_several_calls_are_added():
    """A recurrent cell: the layer's own counts are those of its last call."""
    layer, other = nt.GNesterovNODE(Field()), nt.HBNODE(Field(), method="nystrom4")
    h, calls = torch.ones(2, 3), []
    for each in (layer, layer, other):
        h = each(h)
        calls.append(each.stats)
    before = sum(calls)
    assert before.nfe_backward == 0
    h.sum().backward()  # which adds to what each call has counted
    total = sum(calls)
    assert isinstance(total, nt.Stats)
    for name in ("nfe_forward", "nfe_backward", "accepted", "rejected"):
        assert getattr(total, name) == sum(getattr(stats, name) for stats in calls) >= 0
    assert total.nfe_backward > 0
    assert total == sum(calls, nt.Stats()) == calls[0] + calls[1] + calls[2]
    assert total.method == "dopri5; nystrom4"
    assert total.path == calls[0].path
    running = nt.Stats()
    running += calls[0]
    assert running == calls[0]
    assert running is not calls[0]
    assert sum(calls[:1]) is not calls[0]
    with pytest.raises(TypeError, match="unsupported operand"):
        calls[0] + 1
    with pytest.raises(TypeError, match="unsupported operand"):
        1 + calls[0]
