"""The paper's experiments: sizes of the networks, two steps of each, their systems against independent arithmetic."""

import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

import nesterov_triton as nt
from nesterov_triton.experiments import runner
from nesterov_triton.experiments.cli import COMMANDS, device_of, main
from nesterov_triton.experiments.data import files, images
from nesterov_triton.experiments.data.download import DownloadError
from nesterov_triton.experiments.experiment import CommandError, Experiment, Settings, Split
from nesterov_triton.experiments.folder import Folder
from nesterov_triton.experiments.models import (
    MODELS,
    PAPER,
    Evolution,
    FirstOrderForm,
    build_layer,
)
from nesterov_triton.experiments.paper import EXPERIMENTS, cifar10, mnist, point_cloud, silverbox, walker2d
from nesterov_triton.experiments.processes import Processes
from nesterov_triton.experiments.training import Trainer

TRAINED = {name: each for name, each in EXPERIMENTS.items() if isinstance(each, Experiment)}
SECONDS = 120  # for a subprocess on a busy machine; nothing is measured against it


def command(*arguments: object) -> int:
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as end:  # argparse
        return int(end.code or 0)


def read(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def curves(folder: Path) -> list[dict[str, str]]:
    """history.csv without the one column that no two runs share."""
    return [{name: value for name, value in row.items() if name != "seconds"} for row in read(folder / "history.csv")]


# -- sizes -------------------------------------------------------------------------------------------------------------

# As published. Two things are left out here, marked "-": the residual's coefficient where it is frozen at zero (HBNODE
# and NesterovNODE; on CIFAR-10 and the point clouds it is no parameter there at all), and SONODE's unused damping.
# Marked "+": a learnable residual where the released code has a number (GHBNODE, GNesterovNODE on the point clouds).
PUBLISHED = {
    "point-cloud": ("545", "587", "541-", "582", "582+", "581", "581+"),
    "mnist": ("85316", "85462", "86179", "85931-", "85931", "85930-", "85930"),
    "cifar10": ("173611", "172452", "171635", "172916", "172916", "172915", "172915"),
    "walker2d": ("9929", "10019", "10390", "10099-", "10099", "10098-", "10098"),
}


def size(experiment: Experiment, model: str) -> int:
    return sum(p.numel() for p in experiment.build(model, experiment.defaults).parameters())


@pytest.mark.parametrize("name", PUBLISHED)
def test_networks_have_the_published_sizes(name: str) -> None:
    for model, published in zip(PAPER, PUBLISHED[name], strict=True):
        expected = int(published.rstrip("+-")) + {"+": 1, "-": -1}.get(published[-1], 0)
        assert size(TRAINED[name], model) == expected, model
    for model in ("NesterovNODE", "GNesterovNODE"):
        assert size(TRAINED[name], f"{model}-published") == size(TRAINED[name], model)


def test_silverbox_networks() -> None:
    for model, count in zip(PAPER, (3, 8, 4, 4, 4, 3, 3), strict=True):
        evolution, velocity = silverbox.build(model, silverbox.DEFAULTS, torch.zeros(64))
        assert sum(p.numel() for p in evolution.parameters()) == count
        assert velocity.weight.numel() == 1


# -- two steps of everything -------------------------------------------------------------------------------------------


def tiny(name: str) -> Callable[[int, Path], tuple[Split, Split]]:
    """Four rows to train on and two to test, of the experiment's shapes."""

    def load(seed: int, folder: Path) -> tuple[Split, Split]:
        generator = torch.Generator().manual_seed(seed)
        if name == "point-cloud":
            train, test = point_cloud.load(seed)
            return Split(train.inputs[38:42], train.targets[38:42]), test.first(2)
        if name == "walker2d":
            inputs = torch.randn(6, 3, 18, dtype=torch.float64, generator=generator)
            inputs[..., 17] = torch.randint(1, 4, (6, 3), generator=generator) / 64
            whole = Split(inputs, torch.randn(6, 3, 17, dtype=torch.float64, generator=generator))
        else:
            shape = (6, 1, 28, 28) if name == "mnist" else (6, 3, 32, 32)
            pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
            whole = Split(pixels, torch.arange(6))
        return whole.first(4), Split(whole.inputs[4:], whole.targets[4:])

    return load


def small(name: str, **changes: Any) -> tuple[Experiment, Settings]:
    experiment = replace(TRAINED[name], load=tiny(name))
    settings = replace(experiment.defaults, epochs=1, batch_size=2, tolerance=1e-2, models=MODELS, seeds=(0,))
    return experiment, replace(settings, **changes)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", TRAINED)
def test_every_model_takes_two_steps_of_every_experiment(name: str, model: str) -> None:
    experiment, settings = small(name)
    trainer = Trainer(experiment, settings, model, seed=0)
    before = {key: value.clone() for key, value in trainer.network.state_dict().items()}
    batches: list[Any] = []
    trainer.advance(batches.append)
    (epoch,) = trainer.run.history
    assert len(batches) == 2
    assert math.isfinite(epoch.train_loss)
    assert epoch.nfe_forward >= (3 * 7 if name == "walker2d" else 7)
    assert epoch.nfe_backward >= (3 * 6 if name == "walker2d" else 6)
    assert (epoch.test_accuracy_percent is None) == (name == "walker2d")
    for key, value in trainer.network.state_dict().items():
        assert not torch.equal(value, before[key]), f"{key} is not trained"


@pytest.mark.parametrize(
    "changes", [{"gradient": "adjoint", "gate": "hardtanh:0.5"}, {"method": "euler", "step_size": 0.5}]
)
@pytest.mark.parametrize("name", ["mnist", "walker2d"])
def test_other_settings_train_too(name: str, changes: dict[str, Any]) -> None:
    experiment, settings = small(name, xi=0.5, damping_factor=5.0, **changes)
    for model in ("GNesterovNODE", "GNesterovNODE-published"):
        trainer = Trainer(experiment, settings, model, seed=0)
        trainer.advance(lambda batch: None)
        assert trainer.run.failure is None
        assert "layer.system.raw_xi" not in trainer.network.state_dict()
        if "method" in changes:
            solves = 3 if name == "walker2d" else 1
            assert trainer.run.history[0].nfe_forward == 2 * solves


def test_schedules_and_clipping() -> None:
    walker = walker2d.DEFAULTS
    rates = [walker.learning_rate * walker2d.schedule(walker, epoch, 0) for epoch in (1, 50, 51, 500)]
    assert rates == pytest.approx([1e-3, 1e-3, 3e-3, 3e-3])
    cifar = cifar10.DEFAULTS
    assert [cifar10.schedule(cifar, 1, i) for i in (0, 999, 1000, 2500)] == pytest.approx([1, 1, 0.95, 0.95**2])
    experiment, settings = small("mnist", clip=1e-12)
    trainer = Trainer(experiment, settings, "NODE", seed=0)
    trainer.advance(lambda batch: None)
    norm = torch.nn.utils.get_total_norm([p.grad for p in trainer.parameters if p.grad is not None])
    assert norm.item() == pytest.approx(1e-12, rel=1e-3)


def test_one_command_runs_one_experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pyarrow")
    from test_data import TINY, write_images

    write_images(tmp_path, TINY)
    monkeypatch.setattr(images, "MNIST", TINY)
    out = tmp_path / "out"
    options = ("--models", "NODE", "GNesterovNODE", "--seeds", 0, 1, "--epochs", 1, "--tolerance", 0.1, "--limit", 2)
    assert command("reproduce", "mnist", "--data", tmp_path, *options, "--output", out) == 0
    assert sorted(p.name for p in out.iterdir()) == [
        "checkpoints",
        "figure.pdf",
        "figure.png",
        "history.csv",
        "machines.json",
        "settings.json",
        "summary.csv",
    ]
    assert [row["status"] for row in read(out / "summary.csv")] == ["done", "done"]
    assert json.loads((out / "settings.json").read_text())["limit"] == 2
    (made_with,) = json.loads((out / "machines.json").read_text())
    assert made_with["torch"] == torch.__version__
    assert {"processor", "commit", "python", "processes"} <= set(made_with)
    # A machine that finds everything done has made nothing of it.
    monkeypatch.setattr(runner, "machine", lambda *_: {"processor": "another"})
    assert command("reproduce", "mnist", "--data", tmp_path, "--resume", "--output", out) == 0
    assert json.loads((out / "machines.json").read_text()) == [made_with]


def test_the_point_clouds_command_draws_trajectories(tmp_path: Path) -> None:
    options = ("--models", "ANODE", "GNesterovNODE", "NesterovNODE-published", "--epochs", 1, "--seeds", 0)
    assert command("reproduce", "point-cloud", *options, "--tolerance", 1e-2, "--output", tmp_path) == 0
    for name in ("figure", "features"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (tmp_path / f"{name}.pdf").read_bytes().startswith(b"%PDF")


def test_defaults_are_all_models_and_settings_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    for experiment in COMMANDS["reproduce"].values():
        assert experiment.defaults.models == PAPER
    assert command("reproduce", "--help") == 0
    text = capsys.readouterr().out
    assert all(name in text for name in ("point-cloud", "mnist", "cifar10", "walker2d", "silverbox", "--data"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("silverbox", "--epochs", 3), ("silverbox trains nothing", "--epochs")),
        (("mnist", "--gate", "hardtan:0.5"), ("did you mean 'hardtanh'",)),
        (("mnist", "--gate", "hardtanh:x"), ("hardtanh:x", "positive number")),
        (("mnist", "--gate", "tanh:2"), ("takes no bound",)),
        (("mnist", "--xi", "-1"), ("--xi", "learnable")),
        (("mnist", "--models", "NesterovNODE-publishd"), ("did you mean 'NesterovNODE-published'",)),
        (("mnsit",), ("did you mean 'mnist'",)),
        (("mnist", "--models", "NODE", "--method", "nystrom4"), ("NODE: ", "'nystrom4'", "momentum systems")),
        (("silverbox", "--method", "nystrom4", "--models", "ANODE"), ("ANODE: ", "'nystrom4'", "momentum systems")),
        # Its steps' lengths are each sample's own, so all its solves are of a first-order form.
        (("walker2d", "--method", "nystrom4", "--models", "HBNODE"), ("HBNODE: ", "'nystrom4'", "dopri5")),
        (("cifar10", "--gradient", "reversible"), ("--gradient", "strang")),
    ],
)
def test_wrong_requests(
    arguments: tuple[object, ...], words: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("reproduce", *arguments, "--output", tmp_path / "out") == 2
    message = capsys.readouterr().err
    assert all(word in message for word in words), message
    assert message.count("\n") == 1, message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("experiment", ["mnist", "silverbox"])
def test_data_that_cannot_be_had_leave_no_folder(
    experiment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise DownloadError("no connection")

    monkeypatch.setattr(files, "download", fail)
    arguments = ("--data", tmp_path / "data", "--output", tmp_path / "out")
    for again in ((), ("--overwrite",)):
        assert command("reproduce", experiment, *arguments, *again) == 2
        assert "could not be downloaded" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
    assert (
        command("compare", "point-cloud", "--models", "NODE", "--epochs", 1, "--tolerance", 1e-2, *arguments[2:]) == 0
    )
    rows = (tmp_path / "out" / "history.csv").read_bytes()
    assert command("reproduce", experiment, *arguments, "--overwrite") == 2
    assert (tmp_path / "out" / "history.csv").read_bytes() == rows  # the old run is not lost to a broken connection


# -- the systems -------------------------------------------------------------------------------------------------------


class Field(nn.Module):
    """Smooth, of feature and time; of h and m side by side for SONODE."""

    def __init__(self, seen: int, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(seen + 1, width)

    def forward(self, t: Tensor, *states: Tensor) -> Tensor:
        return torch.tanh(self.linear(torch.cat([*states, t.expand(len(states[0]), 1)], dim=1)))


def evolution(model: str, gradient: str = "discrete", **options: Any) -> Evolution:
    torch.manual_seed(1)
    field = Field(6 if model == "SONODE" else 3, 3)
    solver = {"rtol": 1e-10, "atol": 1e-10, "gate": "softclip", "xi": "learnable", **options}
    return Evolution(model, field, gradient=gradient, **solver).double()


def state(rows: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    h, v = (torch.randn(rows, 3, dtype=torch.float64, generator=generator) for _ in range(2))
    return h, v


@pytest.mark.parametrize("model", MODELS)
def test_a_scale_of_one_changes_nothing(model: str) -> None:
    h, v = state()
    layer = evolution(model)
    plain, scaled = layer(h, v), layer(h, v, torch.ones(4, 1, dtype=torch.float64))
    for a, b in zip(plain, scaled, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("model", ["NODE", "SONODE", "GHBNODE"])
def test_a_scale_is_a_stretch_of_time(model: str) -> None:
    """Of a right-hand side that does not see the time, and so for each sample its own."""
    h, v = state()
    layer = evolution(model)
    with torch.no_grad():
        layer.system.field.linear.weight[:, -1] = 0
    scales = torch.tensor([0.1, 0.5, 1.0, 2.0], dtype=torch.float64)
    found, _ = layer(h, v, scales[:, None])
    for i, scale in enumerate(scales.tolist()):
        start = h[i : i + 1] if model == "NODE" else (h[i : i + 1], v[i : i + 1])
        solution = nt.solve(layer.system, start, (1.0, 1.0 + scale), rtol=1e-10, atol=1e-10)
        expected = solution.final if model == "NODE" else solution.final[0]
        torch.testing.assert_close(found[i : i + 1], expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("gradient", ["discrete", "adjoint"])
@pytest.mark.parametrize("model", MODELS)
def test_gradients_with_a_scale_for_each_sample(model: str, gradient: str) -> None:
    """For state, scale and parameters, against plain backpropagation."""
    found = []
    for strategy in ("backprop", gradient):
        h, v = state()
        scale = torch.tensor([[0.1], [0.5], [1.0], [2.0]], dtype=torch.float64).requires_grad_()
        layer = evolution(model, strategy)
        inputs = [h.requires_grad_(), v.requires_grad_(), scale, *layer.parameters()]
        loss = sum(out.square().sum() for out in layer(h, v, scale) if out is not None)
        found.append(torch.autograd.grad(loss, inputs, allow_unused=True))
    tolerance = 1e-10 if gradient == "discrete" else 1e-6
    for expected, got in zip(*found, strict=True):
        assert (expected is None) == (got is None)
        if expected is not None and got is not None:
            torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("gradient", ["discrete", "adjoint"])
@pytest.mark.parametrize("model", MODELS)
def test_walker_gradients_are_those_of_backpropagation(model: str, gradient: str) -> None:
    """Through several solves, whose Δt differ between steps and samples."""
    inputs = torch.randn(3, 4, 18, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    inputs[..., 17] = torch.tensor([[1, 3, 2, 1], [2, 1, 1, 5], [1, 1, 4, 2]]) / 4
    found = []
    for strategy in ("backprop", gradient):
        torch.manual_seed(0)
        settings = replace(walker2d.DEFAULTS, gradient=strategy, tolerance=1e-9)
        network = walker2d.build(model, settings)
        seen = inputs.clone().requires_grad_()
        found.append(torch.autograd.grad(network(seen).square().mean(), [seen, *network.parameters()]))
    tolerance = 1e-9 if gradient == "discrete" else 1e-6
    for expected, got in zip(*found, strict=True):
        scale = expected.abs().max().item()
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance * scale)
    assert found[0][0][..., 17].abs().min() > 0 or model in ("NODE", "ANODE")  # every Δt counts


@pytest.mark.parametrize("model", PAPER)
def test_walker_predictions_see_their_own_input_and_none_after(model: str) -> None:
    torch.manual_seed(0)
    network = walker2d.build(model, replace(walker2d.DEFAULTS, method="rk4", step_size=0.5))
    inputs = torch.rand(1, 4, 18, dtype=torch.float64).requires_grad_()
    for i, prediction in enumerate(network(inputs)[0]):
        (gradient,) = torch.autograd.grad(prediction.sum(), inputs, retain_graph=True)
        influence = gradient[0, :, :17].abs().sum(dim=1)
        assert influence[i] > 0
        assert influence[i + 1 :].eq(0).all()


@pytest.mark.parametrize("model", ["NesterovNODE-published", "GNesterovNODE-published"])
def test_the_published_variant_is_the_released_code_s(model: str) -> None:
    """Its right-hand side as that code writes it, one step of the classic Runge-Kutta method at a time."""
    torch.manual_seed(0)
    field, velocity = Field(2, 2).double(), nn.Linear(2, 2).double()
    clip = nn.Hardtanh(-0.5, 0.5) if model.startswith("G") else nn.Identity()
    xi = 0.5 if model.startswith("G") else 0.0
    layer = build_layer(model, field, velocity, gate="hardtanh:0.5", xi=xi, method="rk4", step_size=0.25)

    def slope(t: float, h: Tensor, dh: Tensor) -> tuple[Tensor, Tensor]:
        k_reciprocal = t**1.5 * math.exp(-t / 2)
        m = (1.5 * t**0.5 * math.exp(-t / 2) - 0.5 * k_reciprocal) * h + k_reciprocal * dh
        out = clip(field(torch.tensor(t, dtype=torch.float64), h))
        return clip(m), -m - out - xi * h

    h, _ = state()
    h = h[:, :2]
    a, b = h, velocity(h)
    for i in range(4):
        t, dt = 1 + i / 4, 0.25
        k1 = slope(t, a, b)
        k2 = slope(t + dt / 2, a + dt / 2 * k1[0], b + dt / 2 * k1[1])
        k3 = slope(t + dt / 2, a + dt / 2 * k2[0], b + dt / 2 * k2[1])
        k4 = slope(t + dt, a + dt * k3[0], b + dt * k3[1])
        a, b = (y + dt / 6 * (p + 2 * q + 2 * r + s) for y, p, q, r, s in zip((a, b), k1, k2, k3, k4, strict=True))
    k = clip(torch.tensor(2**-1.5 * math.exp(1.0), dtype=torch.float64))
    torch.testing.assert_close(layer(h), k * a)
    solver = {"gate": "hardtanh:0.5", "xi": xi, "method": "rk4", "step_size": 0.25}
    features, speed = Evolution(model, field, **solver)(h, velocity(h))
    dh = k * (b - (3 / 2 * 2**0.5 * math.exp(-1.0) - 1 / 2 * 1 / k) * (k * a))
    torch.testing.assert_close(features, k * a)
    torch.testing.assert_close(speed, dh)
    path = Evolution(model, field, **solver).path(h, velocity(h), torch.tensor([1.0, 1.5, 2.0], dtype=torch.float64))
    for got, first, last in zip(path, (h, velocity(h)), (k * a, dh), strict=True):
        torch.testing.assert_close(got[0], first)
        torch.testing.assert_close(got[-1], last)
    torch.testing.assert_close(layer(h, t=[1.0, 1.5, 2.0]), path[0])


@pytest.mark.parametrize("model", [model for model in PAPER if model not in ("NODE", "ANODE")])
def test_the_first_order_form_is_the_same_system(model: str) -> None:
    h, v = state()
    layer = evolution(model)
    start = layer.system.initial_state(h, v, torch.tensor(1.0, dtype=torch.float64))
    x, m = nt.solve(layer.system, start, (1.0, 2.0), rtol=1e-10, atol=1e-10).final
    y = nt.solve(FirstOrderForm(layer.system), torch.cat(start, dim=1), (1.0, 2.0), rtol=1e-10, atol=1e-10).final
    torch.testing.assert_close(y, torch.cat([x, m], dim=1), rtol=1e-8, atol=1e-8)


# -- silverbox ---------------------------------------------------------------------------------------------------------


def test_silverbox_norms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    voltage, output = torch.randn(2, 100, dtype=torch.float64, generator=generator)
    monkeypatch.setattr(silverbox.silverbox, "load", lambda folder: (voltage, output))
    monkeypatch.setattr(silverbox, "TIMES", range(1, 13))
    monkeypatch.setattr(silverbox, "SHOWN", (4, 12))
    options = ("--models", *MODELS, "--seeds", 0, 1, "--tolerance", 1e-7, "--output", tmp_path)
    assert command("reproduce", "silverbox", *options) == 0
    rows = read(tmp_path / "history.csv")
    assert len(rows) == len(MODELS) * 2 * 12
    table = {row["model"]: row for row in read(tmp_path / "summary.csv")}
    for model in MODELS:
        norms = [float(row["norm"]) for row in rows if (row["model"], row["t"]) == (model, "12.0")]
        assert float(table[model]["log10 norm at t = 12"]) == pytest.approx(math.log10(sum(norms) / 2), abs=0.006)
    # NODE: h' = w (h, v(t)) + b, with v(t) linear between samples, against scipy.
    integrate = pytest.importorskip("scipy.integrate")
    torch.manual_seed(1)
    built, _ = silverbox.build("NODE", silverbox.DEFAULTS, voltage)
    (w, u), b = built.system.field.linear.weight[0].tolist(), built.system.field.linear.bias.item()
    samples = voltage.numpy()

    def slope(t: float, h: np.ndarray) -> np.ndarray:
        return w * h + u * np.interp(t, np.arange(100), samples) + b

    end = integrate.solve_ivp(slope, (1, 12), [output[0].item()], rtol=1e-9, atol=1e-9, max_step=0.1).y[0, -1]
    found = [float(row["norm"]) for row in rows if (row["model"], row["seed"], row["t"]) == ("NODE", "1", "12.0")]
    assert found == pytest.approx([abs(end)], rel=1e-4)


def test_an_overflow_is_a_result() -> None:
    assert silverbox.size(torch.tensor([math.nan])) == math.inf
    rows = [{"model": "NODE", "t": 1.0, "norm": x} for x in (1.0, math.inf)]
    assert silverbox.logarithms(rows, "NODE", (1,)) == [math.inf]


# -- stopping, going on, and several processes -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["walker2d", "mnist"])
def test_an_epoch_can_be_left_anywhere(name: str, tmp_path: Path) -> None:
    """The trainer that goes on from a state inside an epoch ends where the one that was not stopped does."""
    experiment, settings = small(name, batch_size=1, epochs=2)

    class Stop(Exception):
        pass

    whole = Trainer(experiment, settings, "GNesterovNODE", seed=0)
    for _ in range(2):
        whole.advance(lambda batch: None)
    done = Trainer(experiment, settings, "GNesterovNODE", seed=0)
    stops = 0
    while len(done.run.history) < 2:
        folder = Folder(tmp_path)
        folder.checkpoints.mkdir(exist_ok=True)

        def stop(trainer: Trainer = done, folder: Folder = folder) -> None:
            folder.save(trainer.state())
            raise Stop

        try:
            done.advance(lambda batch: None, stop)
        except Stop:
            stops += 1
            stored = folder.load("GNesterovNODE", 0)
            assert stored is not None
            done = Trainer(experiment, settings, "GNesterovNODE", seed=0)
            done.restore(stored)
            assert done.partial.batches == 1 + (stops - 1) % 3
    assert stops == 6
    assert [replace(epoch, seconds=0.0) for epoch in done.run.history] == [
        replace(epoch, seconds=0.0) for epoch in whole.run.history
    ]
    for key, value in done.network.state_dict().items():
        assert torch.equal(value, whole.network.state_dict()[key])


def test_killed_inside_an_epoch_it_goes_on_there(tmp_path: Path) -> None:
    arguments = ("compare", "digits", "--models", "HBNODE", "--epochs", "1", "--batch-size", "6", "--tolerance", "1e-2")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert command(*arguments, "--output", whole) == 0
    line = [
        sys.executable,
        "-m",
        "nesterov_triton",
        *arguments,
        "--checkpoint-seconds",
        "0.05",
        "--output",
        str(killed),
    ]
    process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    checkpoint = killed / "checkpoints" / "HBNODE-seed0.pt"
    deadline = time.monotonic() + SECONDS
    while not checkpoint.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    stored = Folder(killed).load("HBNODE", 0)
    assert stored is not None
    assert 0 < stored["partial"]["batches"] < 225
    assert stored["run"]["history"] == []
    assert command("compare", "digits", "--output", killed, "--resume") == 0
    assert curves(killed) == curves(whole)


def torchrun(folder: Path, *arguments: object) -> "subprocess.Popen[str]":
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = ["-m", "nesterov_triton", *map(str, arguments), "--output", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*line, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    """The same global batches, half in each process; the last one of an epoch has 20 rows."""
    base = ("reproduce", "point-cloud", "--models", "NODE", "GHBNODE", "GNesterovNODE-published", "--seeds", 0)
    cases = {
        "fixed": ("--method", "rk4", "--step-size", 0.25, "--epochs", 2),
        "adaptive": ("--tolerance", 1e-6, "--epochs", 1, "--models", "HBNODE", "GNesterovNODE"),
    }
    for case, options in cases.items():
        process = torchrun(tmp_path / f"{case}-two", *base, *options)
        assert command(*base, *options, "--output", tmp_path / f"{case}-one") == 0
        stdout, stderr = process.communicate(timeout=SECONDS)
        assert process.returncode == 0, stderr
        assert stdout.count("Concentric") + stdout.count("concentric") == 1  # one of them shows
        one, two = (read(tmp_path / f"{case}-{n}" / "history.csv") for n in ("one", "two"))
        assert len(one) == len(two) > 0
        for a, b in zip(one, two, strict=True):
            assert (a["model"], a["epoch"]) == (b["model"], b["epoch"])
            for column in ("train_loss", "test_loss"):
                near = {"rel": 1e-9} if case == "fixed" else {"rel": 1e-4}
                assert float(b[column]) == pytest.approx(float(a[column]), **near)
            if case == "fixed":
                assert a["nfe_forward"] == b["nfe_forward"] == "16.0"
                assert a["nfe_backward"] == b["nfe_backward"]
    # And one process goes on where two were.
    for n in ("one", "two"):
        assert command("reproduce", "point-cloud", "--output", tmp_path / f"fixed-{n}", "--epochs", 3, "--resume") == 0
    one, two = (read(tmp_path / f"fixed-{n}" / "history.csv") for n in ("one", "two"))
    assert [float(row["train_loss"]) for row in two] == pytest.approx(
        [float(row["train_loss"]) for row in one], rel=1e-9
    )


def test_several_processes_go_on_where_they_were(tmp_path: Path) -> None:
    given: dict[str, Any] = {"experiment": "point-cloud", "output": tmp_path, "resume": False}
    assert device_of("compare", given) == "cpu"
    Folder(tmp_path).prepare(replace(point_cloud.DEFAULTS, device="cuda"))
    assert device_of("compare", given | {"resume": True}) == "cuda"
    assert device_of("compare", given | {"resume": True, "device": "cpu"}) == "cpu"


def test_a_folder_that_cannot_be_written_to_says_so(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    folder.prepare(point_cloud.DEFAULTS)
    folder.machines.mkdir()
    with pytest.raises(CommandError, match=r"cannot write to .*choose another --output"):
        folder.credit({"processor": "this one"})


def test_a_batch_smaller_than_the_processes() -> None:
    parts = [Processes("cpu", rank, 3).part(torch.tensor([5, 6])) for rank in range(3)]
    assert [(rows.tolist(), counted) for rows, counted in parts] == [([5], 1), ([6], 1), ([5], 0)]


class FailsInOne(nn.Module):
    """A field that is no longer finite for states of the second half of a batch: one of two processes' solves."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, t: Tensor, h: Tensor) -> Tensor:
        return self.scale * h / (h.abs().sum() < 1e6)


FAILING = """
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from nesterov_triton.experiments.experiment import Split
from nesterov_triton.experiments.folder import Folder
from nesterov_triton.experiments.models import Network, build_layer
from nesterov_triton.experiments.paper import point_cloud
from nesterov_triton.experiments.processes import processes
from nesterov_triton.experiments.runner import Runner
sys.path.insert(0, "tests")
from test_paper import FailsInOne

def build(model, settings):
    if model == "NODE":
        return point_cloud.build(model, settings)
    return Network(build_layer(model, FailsInOne(), None, gate="tanh", rtol=1e-2, atol=1e-2), nn.Linear(2, 1)).double()

def load(seed, folder):
    inputs = torch.ones(4, 2, dtype=torch.float64)
    inputs[seed] = 1e7
    split = Split(inputs, torch.ones(4, 1, dtype=torch.float64))
    return split, split

experiment = replace(point_cloud.EXPERIMENT, load=load, build=build, figures=())
settings = replace(experiment.defaults, models=("HBNODE", "NODE"), seeds=(0,), epochs=1, tolerance=1e-2)
with processes("cpu") as both:
    code = Runner(experiment, settings, Folder(Path(sys.argv[1])), processes=both)()
sys.exit(0 if code == 1 else 5)
"""


def test_a_solve_that_fails_in_one_process_fails_in_all_and_the_next_model_trains(tmp_path: Path) -> None:
    script = tmp_path / "failing.py"
    script.write_text(FAILING)
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    root = str(Path(__file__).parent.parent)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    done = subprocess.run(
        [*line, str(tmp_path / "out")], capture_output=True, text=True, timeout=SECONDS, env=environment, cwd=root
    )
    assert done.returncode == 0, done.stderr
    statuses = {row["model"]: row["status"] for row in read(tmp_path / "out" / "summary.csv")}
    assert statuses == {"HBNODE": "failed: NON_FINITE in epoch 1", "NODE": "done"}


def test_an_earlier_version_s_settings_are_read(tmp_path: Path) -> None:
    assert command("compare", "point-cloud", "--models", "NODE", "--epochs", 1, "--output", tmp_path) == 0
    path = tmp_path / "settings.json"
    stored = json.loads(path.read_text())
    for name in ("xi", "damping_factor", "clip", "limit"):
        del stored[name]
    path.write_text(json.dumps(stored))
    assert Folder(tmp_path).settings() == replace(point_cloud.COMPARED.defaults, models=("NODE",), epochs=1)


def test_settings_are_the_published_ones() -> None:
    s = mnist.DEFAULTS
    assert (s.batch_size, s.learning_rate, s.clip, s.epochs, s.tolerance) == (64, 5e-4, 10.0, 40, 1e-5)
    s = cifar10.DEFAULTS
    assert (s.batch_size, s.learning_rate, s.decay, s.clip, s.epochs, s.tolerance) == (256, 1e-3, 0.95, 1.0, 40, 1e-5)
    s = walker2d.DEFAULTS
    assert (s.batch_size, s.learning_rate, s.clip, s.epochs, s.tolerance) == (256, 1e-3, 1.0, 500, 1e-7)
    s = point_cloud.DEFAULTS
    assert (s.batch_size, s.learning_rate, s.clip, s.epochs, s.tolerance) == (50, 1e-2, None, 200, 1e-7)


def test_the_page_follows_from_the_histories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = pytest.importorskip("benchmarks.paper")
    monkeypatch.setattr(page, "HERE", tmp_path / "page")
    (tmp_path / "page").mkdir()
    out = tmp_path / "out" / "point-cloud" / "softclip-discrete"
    options = ("--seeds", 0, 1, "--epochs", 3, "--tolerance", 1e-2, "--models", "NODE", "NesterovNODE")
    assert command("reproduce", "point-cloud", *options, "--output", out) == 0
    text = page.page(tmp_path / "out")
    history = read(out / "history.csv")
    (line,) = (line for line in text.splitlines() if line.startswith("| NesterovNODE |"))
    own = [row for row in history if row["model"] == "NesterovNODE"]
    final = [float(row["train_loss"]) for row in own if row["epoch"] == "3"]
    forward = [sum(float(row["nfe_forward"]) for row in own if row["seed"] == seed) / 3 for seed in "01"]
    cells = [cell.strip() for cell in line.split("|")[1:-1]]
    assert cells[1] == "2"
    assert cells[2] == f"{np.mean(final):.4f} ± {np.std(final, ddof=1):.4f}"
    assert cells[4] == f"{np.mean(forward):.0f} ± {np.std(forward, ddof=1):.0f}"
    assert "| Point clouds, gate softclip, gradient discrete | NesterovNODE |" in text
    assert (tmp_path / "page" / "point-cloud" / "softclip-discrete" / "figure.png").exists()
    assert not (tmp_path / "page" / "point-cloud" / "softclip-discrete" / "checkpoints").exists()
