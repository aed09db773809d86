"""The command, run for real: small trainings, killed and resumed, and everything it writes."""

import contextlib
import csv
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("rich")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")


import nesterov_triton as nt
from nesterov_triton.experiments import digits
from nesterov_triton.experiments.cli import main
from nesterov_triton.experiments.experiment import Settings
from nesterov_triton.experiments.folder import Folder
from nesterov_triton.experiments.models import MODELS, Network, TimedField, build_layer
from nesterov_triton.experiments.paper import point_cloud
from nesterov_triton.experiments.runner import Runner
from nesterov_triton.experiments.training import Trainer

COARSE = ("--tolerance", "1e-2")
SECONDS = 120  # for a subprocess on a busy machine; nothing is measured against it


def command(*arguments: object) -> int:
    """The exit code of the command in this process."""
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as end:  # argparse
        return int(end.code or 0)


def start(*arguments: object) -> "subprocess.Popen[str]":
    line = [sys.executable, "-m", "nesterov_triton", *map(str, arguments)]
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def read(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def curves(folder: Path) -> list[dict[str, str]]:
    """history.csv without the one column that no two runs share."""
    return [{name: value for name, value in row.items() if name != "seconds"} for row in read(folder / "history.csv")]


def wait_for_rows(process: "subprocess.Popen[str]", folder: Path, rows: int) -> None:
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        with contextlib.suppress(FileNotFoundError):
            if len(read(folder / "history.csv")) >= rows:
                return
        time.sleep(0.005)
    raise AssertionError(f"no {rows} rows in {SECONDS} s")


def table(text: str) -> dict[str, list[str]]:
    """The cells of the printed table by model."""
    lines = (line.split() for line in text.splitlines())
    return {words[0]: words[1:] for words in lines if words and words[0] in MODELS}


@pytest.mark.parametrize(
    ("experiment", "options"), [("digits", ("--batch-size", 450)), ("point-cloud", ("--learning-rate", "3e-3"))]
)
def test_every_model_trains(
    experiment: str, options: Sequence[object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = command(
        "compare", experiment, "--models", *MODELS, "--epochs", 3, *COARSE, *options, "--output", tmp_path / "out"
    )
    assert code == 0
    rows = read(tmp_path / "out" / "history.csv")
    assert [(row["model"], row["epoch"]) for row in rows] == [(model, str(i)) for model in MODELS for i in (1, 2, 3)]
    for first, last in zip(rows[::3], rows[2::3], strict=True):
        assert float(last["train_loss"]) < float(first["train_loss"]), last["model"]
        assert int(float(last["nfe_forward"])) >= 7
        assert int(float(last["nfe_backward"])) >= 6
    assert list(table(capsys.readouterr().out)) == list(MODELS)
    assert (tmp_path / "out" / "figure.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("experiment", ["digits", "point-cloud"])
@pytest.mark.parametrize("options", [("--gradient", "adjoint"), ("--gradient", "backprop", "--gate", "hardtanh")])
def test_other_gradients_train(experiment: str, options: Sequence[str], tmp_path: Path) -> None:
    arguments = ("--models", "NODE", "GNesterovNODE", "--epochs", 1, "--batch-size", 500)
    assert command("compare", experiment, *arguments, *COARSE, *options, "--output", tmp_path) == 0
    assert all(math.isfinite(float(row["test_loss"])) for row in read(tmp_path / "history.csv"))


def test_fixed_steps_count_as_they_must(tmp_path: Path) -> None:
    arguments = ("--models", "hbnode", "--epochs", 1, "--method", "rk4", "--step-size", 0.25)
    assert command("compare", "point-cloud", *arguments, "--output", tmp_path) == 0
    (row,) = read(tmp_path / "history.csv")
    assert (row["model"], row["nfe_forward"]) == ("HBNODE", "16.0")  # four steps of four stages


@pytest.mark.parametrize("model", ["NODE", "GNesterovNODE"])
def test_reported_nfe_is_what_the_field_saw(model: str) -> None:
    settings = replace(point_cloud.COMPARED.defaults, tolerance=1e-4)
    trainer = Trainer(point_cloud.COMPARED, settings, model, seed=0)
    (field,) = (module for module in trainer.network.modules() if isinstance(module, TimedField))
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    field.register_forward_hook(count)
    batches: list[Any] = []
    trainer.advance(batches.append)
    (epoch,) = trainer.run.history
    assert len(batches) == 3
    assert batches[-1].fraction == 1
    stats: Any = trainer.network.layer.stats  # of the last call, which was the test
    assert calls == 3 * (epoch.nfe_forward + epoch.nfe_backward) + stats.nfe_forward


@pytest.mark.parametrize(
    ("model", "count"),
    [("NODE", 545), ("HBNODE", 582), ("NesterovNODE", 581), ("GHBNODE", 583), ("GNesterovNODE", 582)],
)
def test_point_cloud_networks_have_the_published_size(model: str, count: int) -> None:
    # The published counts; the generalised models add their residual's scalar.
    assert Trainer(point_cloud.COMPARED, point_cloud.COMPARED.defaults, model, seed=0).run.parameters == count


def test_point_clouds_are_the_published_ones() -> None:
    train, test = point_cloud.load(3)
    for split, inner, outer in ((train, 40, 80), (test, 400, 800)):
        assert split.inputs.dtype == torch.float64
        radius = split.inputs.norm(dim=1)
        assert split.targets.flatten().tolist() == [-1.0] * inner + [1.0] * outer
        assert radius[:inner].max() <= 0.5
        assert radius[inner:].min() >= 0.85
        assert radius[inner:].max() <= 1
    # r = 0.5 sqrt(U) is uniform on the disc: a quarter of the points within half the radius. Four deviations.
    assert abs((test.inputs[:400].norm(dim=1) < 0.25).double().mean() - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 400)
    assert test.inputs.mean(dim=0).abs().max() < 0.1  # all directions
    other, _ = point_cloud.load(4)
    again, _ = point_cloud.load(3)
    assert not torch.equal(train.inputs, other.inputs)
    assert torch.equal(train.inputs, again.inputs)
    assert not torch.isin(train.inputs, test.inputs).any()


def test_digits_are_split_once_and_in_proportion() -> None:
    train, test = digits.load(0)
    assert (len(train.inputs), len(test.inputs)) == (1347, 450)
    assert train.inputs.shape[1] == 64
    assert train.inputs.dtype == torch.float32
    assert train.inputs.min() == -1
    assert train.inputs.max() == 1
    for label in range(10):
        inside, outside = (int((part.targets == label).sum()) for part in (train, test))
        assert abs(outside - 0.25 * (inside + outside)) <= 1
    assert torch.equal(test.inputs, digits.load(1)[1].inputs)


def cost_of_nodes_loss(history: list[dict[str, str]], model: str, seed: str) -> float | None:
    """What the column says, from the history alone."""
    node, own = ([row for row in history if (row["model"], row["seed"]) == (name, seed)] for name in ("NODE", model))
    spent = [
        sum(float(row["nfe_forward"]) + float(row["nfe_backward"]) for row in own[: i + 1]) for i in range(len(own))
    ]
    whole = sum(float(row["nfe_forward"]) + float(row["nfe_backward"]) for row in node)
    there = [x for x, row in zip(spent, own, strict=True) if float(row["train_loss"]) <= float(node[-1]["train_loss"])]
    return 100 * there[0] / whole if there else None


def test_summary_is_the_table_and_follows_from_the_history(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--models", "NODE", "NesterovNODE", "--seeds", 0, 7, "--epochs", 2, "--output", tmp_path)
    assert command("compare", "point-cloud", *arguments, *COARSE) == 0
    printed = table(capsys.readouterr().out)
    history, summary = read(tmp_path / "history.csv"), read(tmp_path / "summary.csv")
    assert [row["model"] for row in summary] == ["NODE", "NesterovNODE"]
    formats = {
        "test_accuracy_percent": ".2f",
        "test_loss": ".4f",
        "train_loss": ".4f",
        "nfe_forward": ".1f",
        "nfe_backward": ".1f",
        "nfe_to_node_loss_percent": ".1f",
        "seconds_per_epoch": ".3f",
    }
    for row in summary:
        own = [line for line in history if line["model"] == row["model"]]
        shown = []
        for name, form in formats.items():
            if name == "seconds_per_epoch":
                values = [fmean(float(line["seconds"]) for line in own if line["seed"] == seed) for seed in "07"]
            elif name == "nfe_to_node_loss_percent":
                values = [
                    value for seed in "07" if (value := cost_of_nodes_loss(history, row["model"], seed)) is not None
                ]
                if len(values) < 2:
                    assert row[name] == ""
                    shown.append("-")
                    continue
            else:
                values = [float(line[name]) for line in own if line["epoch"] == "2"]
            assert float(row[name]) == pytest.approx(fmean(values))
            assert float(row[f"{name}_std"]) == pytest.approx(stdev(values))
            shown += [format(float(row[name]), form), "±", format(float(row[f"{name}_std"]), form)]
        assert printed[row["model"]] == [*shown, row["parameters"], row["status"]]


def test_killed_at_any_moment_it_resumes_to_the_same_curves(tmp_path: Path) -> None:
    # Momentum of the optimiser, order of the data and initialisation all have to come back for this.
    arguments = ("compare", "point-cloud", "--models", "NODE", "GHBNODE", "--epochs", 24, "--decay", "0.99", *COARSE)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert command(*arguments, "--output", whole) == 0
    for rows, later in ((3, ()), (27, ("--resume",))):
        process = start(*arguments, "--output", killed, *later)
        wait_for_rows(process, killed, rows)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        left = curves(killed)
        assert rows <= len(left) < 48
        assert left == [row for row in curves(whole) if row in left]
    (killed / ".history.csv.1.nesterov-tmp").write_text("model,se")  # what a kill inside a write leaves
    assert command("compare", "point-cloud", "--output", killed, "--resume") == 0
    assert curves(killed) == curves(whole)
    assert not list(killed.rglob(".*"))
    for row, other in zip(read(killed / "summary.csv"), read(whole / "summary.csv"), strict=True):
        assert row["test_loss"] == other["test_loss"]


def test_resume_can_ask_for_more(tmp_path: Path) -> None:
    base = ("compare", "point-cloud", *COARSE)
    assert command(*base, "--models", "NODE", "--epochs", 2, "--output", tmp_path / "grown") == 0
    more = ("--models", "NODE", "SONODE", "--epochs", 4)
    assert command(*base, *more, "--output", tmp_path / "grown", "--resume") == 0
    assert command(*base, *more, "--output", tmp_path / "whole") == 0
    assert curves(tmp_path / "grown") == curves(tmp_path / "whole")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_it_keeps_and_shows_what_is_done(number: signal.Signals, code: int, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = start(
        "compare", "point-cloud", "--models", "NODE", "HBNODE", "--epochs", 100_000, *COARSE, "--output", out
    )
    wait_for_rows(process, out, 2)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=SECONDS)
    assert process.returncode == code, stderr
    assert "Traceback" not in stderr
    assert f"nesterov-triton compare point-cloud --output {out} --resume" in stderr
    done = len(read(out / "history.csv"))
    assert done >= 2
    assert table(stdout)["NODE"][-4:] == f"{done} of 100000 epochs".split()
    assert table(stdout)["HBNODE"][-2:] == ["not", "started"]
    assert read(out / "summary.csv")[0]["status"] == f"{done} of 100000 epochs"
    assert (out / "figure.png").exists()


class Broken(nn.Module):
    """A field that stops being finite as soon as its state leaves where it began."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, t: Tensor, h: Tensor) -> Tensor:
        return self.scale * h / (t < 1.1)


def test_a_failing_model_is_shown_and_the_others_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def build(model: str, settings: Settings) -> Network:
        if model != "HBNODE":
            return point_cloud.build(model, settings)
        layer = build_layer(model, Broken(), None, gate=settings.gate, method=settings.method, rtol=1e-2, atol=1e-2)
        return Network(layer, nn.Linear(2, 1)).double()

    experiment = replace(point_cloud.COMPARED, build=build)
    models = ("NODE", "HBNODE", "NesterovNODE")
    settings = replace(point_cloud.COMPARED.defaults, models=models, epochs=2, tolerance=1e-2)
    for _ in range(2):  # resumed, it stays failed
        assert Runner(experiment, settings, Folder(tmp_path))() == 1
        screen = capsys.readouterr()
        assert [cells[-1] for cells in table(screen.out).values() if "failed:" not in cells] == ["done", "done"]
        assert " ".join(table(screen.out)["HBNODE"]).endswith("failed: NON_FINITE in epoch 1")
        assert "t = 1" in screen.err  # the solver's own message: where it happened
        statuses = {row["model"]: row["status"] for row in read(tmp_path / "summary.csv")}
        assert statuses["HBNODE"] == "failed: NON_FINITE in epoch 1"
        assert {row["model"] for row in read(tmp_path / "history.csv")} == {"NODE", "NesterovNODE"}


def test_divergence_is_a_failure_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--models", "NesterovNODE", "--epochs", 3, "--learning-rate", "1e200", *COARSE)
    assert command("compare", "point-cloud", *arguments, "--output", tmp_path) == 1
    assert "failed:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--models", "NesterovNOD"), ("--models", "NesterovNOD", "did you mean 'NesterovNODE'")),
        (("--method", "dopri6"), ("--method", "did you mean 'dopri")),
        (("--gate", "softclp"), ("--gate", "did you mean 'softclip'")),
        (("--gradient", "adjiont"), ("--gradient", "did you mean 'adjoint'")),
        (("--device", "gpu"), ("--device", "gpu", "cuda")),
        (("--device", "cuda:4096"), ("cuda:4096", "cannot be used")),
        (("--epochs", "0"), ("--epochs", "at least 1")),
        (("--seeds", "1", "x"), ("--seeds", "'x'")),
        (("--tolerance", "-1e-3"), ("--tolerance",)),
        (("--tolerance", "nan"), ("--tolerance", "positive")),
        (("--method", "rk4"), ("--step-size",)),
        (("--method", "dopri5", "--step-size", "0.1"), ("--step-size", "leave out")),
        (("--resume", "--overwrite"), ("not allowed with",)),
        (("--method", "nystrom4", "--models", "HBNODE", "NODE"), ("NODE: method 'nystrom4' is for momentum systems",)),
        (("--method", "nystrom4", "--models", "SONODE"), ("SONODE: method 'nystrom4'", "position alone")),
        (("--method", "nystrom6", "--models", "GHBNODE"), ("GHBNODE: method 'nystrom6'", "gate")),
        (("--gradient", "reversible"), ("--gradient", "strang", "blanes_moan4")),
        (("--method", "auto", "--step-size", "0.1"), ("--step-size", "auto")),
        (("--gradient", "reversible", "--method", "auto", "--models", "NODE"), ("NODE: ", "blanes_moan4")),
    ],
)
def test_wrong_requests_name_the_option_and_the_fix(
    arguments: Sequence[str], words: Sequence[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("compare", "point-cloud", "--output", tmp_path / "out", *arguments) == 2
    message = capsys.readouterr().err
    assert all(word in message for word in words), message
    assert message.count("\n") == 1, message
    assert not (tmp_path / "out").exists()


def test_usage_errors_are_one_line_that_names_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ((), ("compare",), ("compaer", "digits"), ("compare", "digits", "--epoch-count", 3)):
        assert command(*arguments) == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1, message
        assert "--help" in message


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert command("--version") == 0
    assert capsys.readouterr().out == f"nesterov-triton {nt.__version__}\n"


def test_fixed_steps_of_a_method_that_is_adaptive_too(tmp_path: Path) -> None:
    arguments = ("--models", "HBNODE", "--epochs", 1, "--method", "strang", "--step-size", 0.25)
    assert command("compare", "point-cloud", *arguments, "--output", tmp_path) == 0
    (row,) = read(tmp_path / "history.csv")
    assert float(row["nfe_forward"]) <= 5  # four steps of one evaluation, and the first one


def test_a_request_refused_leaves_the_old_run(
    tmp_path: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = curves(finished)
    refused = ("compare", "point-cloud", "--output", finished, "--overwrite", "--method", "nystrom4", "--models")
    assert command(*refused, "NODE") == 2
    assert curves(finished) == rows


def test_unknown_experiment_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert command("compare", "digit") == 2
    assert "did you mean 'digits'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "before", "after"),
    [
        ("--tolerance", "0.01", "0.001"),
        ("--method", "dopri5", "tsit5"),
        ("--gradient", "discrete", "adjoint"),
        ("--gate", "softclip", "tanh"),
        ("--batch-size", "50", "40"),
        ("--learning-rate", "0.01", "0.02"),
        ("--decay", "1.0", "0.5"),
        ("--epochs", "2", "1"),
        ("--models", "NODE", "HBNODE"),
        ("--seeds", "0", "1"),
    ],
)
def test_resuming_with_another_setting_names_it(
    option: str, before: str, after: str, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = curves(finished)
    assert command("compare", "point-cloud", "--output", finished, "--resume", option, after) == 2
    message = capsys.readouterr().err
    assert f"another {option.removeprefix('--')}" in message
    assert f"it has {before}" in message
    assert after in message
    assert curves(finished) == rows


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    assert command("compare", "point-cloud", "--models", "NODE", "--epochs", 2, *COARSE, "--output", folder) == 0
    return folder


def test_resuming_another_experiment_is_refused(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("compare", "digits", "--output", finished, "--resume") == 2
    assert "another experiment: it has point-cloud" in capsys.readouterr().err


def test_a_filled_folder_is_not_written_to_unasked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ("compare", "point-cloud", "--models", "NODE", *COARSE, "--output", tmp_path, "--epochs")
    (tmp_path / "notes.txt").write_text("mine")
    assert command(*small, 1) == 2
    message = capsys.readouterr().err
    assert all(word in message for word in ("not empty", "--resume", "--overwrite", "--output"))
    assert command(*small, 1, "--resume") == 2
    assert "no run" in capsys.readouterr().err
    assert command(*small, 2, "--overwrite") == 0
    assert command(*small, 1, "--overwrite") == 0  # nothing of the first one is left
    assert [row["epoch"] for row in read(tmp_path / "history.csv")] == ["1"]
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_resuming_nothing_starts_from_the_beginning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # A job that is restarted until it ends can always say --resume.
    arguments = ("--models", "NODE", "--epochs", 1, *COARSE, "--output", tmp_path / "new", "--resume")
    assert command("compare", "point-cloud", *arguments) == 0
    assert "starting from the beginning" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert command("compare", "point-cloud", "--output", tmp_path / "file" / "out") == 2
    assert str(tmp_path / "file") in capsys.readouterr().err


@pytest.mark.parametrize(
    ("experiment", "module", "package"),
    [
        ("digits", "sklearn", "scikit-learn"),
        ("point-cloud", "rich", "rich"),
        ("point-cloud", "matplotlib", "matplotlib"),
    ],
)
def test_a_missing_package_names_the_extra(
    experiment: str,
    module: str,
    package: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, module, None)  # type: ignore[arg-type]  # Python's own way to make an import fail
    assert command("compare", experiment, "--output", tmp_path / "out") == 2
    message = capsys.readouterr().err
    assert package in message
    assert 'pip install "nesterov-triton[experiments]"' in message


def test_without_a_terminal_the_progress_is_a_few_plain_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("compare", "point-cloud", "--models", "NODE", "--epochs", 20, *COARSE, "--output", tmp_path) == 0
    screen = capsys.readouterr()
    assert "\x1b" not in screen.out + screen.err
    lines = [line for line in screen.err.splitlines() if line.startswith("[1/1] NODE seed 0: epoch ")]
    assert len(lines) == 10
    assert lines[-1].startswith("[1/1] NODE seed 0: epoch 20/20  loss ")


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="no pseudo-terminals here")
def test_on_a_terminal_there_is_a_live_bar(tmp_path: Path) -> None:
    controller, terminal = os.openpty()
    line = ["compare", "point-cloud", "--models", "NODE", "--epochs", "10", *COARSE, "--output", str(tmp_path / "out")]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    process = subprocess.Popen([sys.executable, "-m", "nesterov_triton", *line], stderr=terminal, env=environment)
    os.close(terminal)
    seen = b""
    with contextlib.suppress(OSError):  # Linux: the other side is closed
        while chunk := os.read(controller, 65536):
            seen += chunk
    os.close(controller)
    assert process.wait(timeout=SECONDS) == 0
    text = seen.decode()
    assert text.count("NODE seed 0") > 2  # drawn again and again
    assert "/10" in text
    assert "NFE" in text
    assert text.rstrip().endswith("figure.pdf")
