"""The command line: ``nesterov-triton compare digits`` and ``nesterov-triton compare point-cloud``."""

import argparse
import importlib.util
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

import nesterov_triton as nt
from nesterov_triton._names import lookup
from nesterov_triton.experiments import digits, point_cloud
from nesterov_triton.experiments.experiment import CommandError, Settings
from nesterov_triton.experiments.folder import Folder
from nesterov_triton.experiments.models import MODELS

EXPERIMENTS = {experiment.defaults.experiment: experiment for experiment in (digits.EXPERIMENT, point_cloud.EXPERIMENT)}
METHODS = tuple(nt.tableaus.TABLEAUS)
GATES = tuple(nt.gates.GATES)
GRADIENTS = tuple(nt.gradients.GRADIENTS)
EXTENDABLE = ("epochs", "models", "seeds")  # a resumed comparison may have more of these, and of nothing else


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with these arguments (default: the process's own).

    Returns the exit code: 0 done, 1 a model failed, 2 a wrong or impossible request, 130 or 143 interrupted.
    """
    given = vars(parser().parse_args(argv))
    given.pop("command")
    output: Path | None = given.pop("output", None)
    resume, overwrite = given.pop("resume"), given.pop("overwrite")
    experiment = EXPERIMENTS[given["experiment"]]
    folder = Folder(output or Path("runs") / given["experiment"])
    try:
        require_packages(("matplotlib", "rich", *experiment.requires))
        settings = choose(experiment.defaults, given, folder, resume=resume, overwrite=overwrite)
        check(settings)
        if overwrite:
            folder.clear()
        from nesterov_triton.experiments.compare import compare  # needs the packages just looked for

        return compare(experiment, settings, folder)
    except CommandError as error:
        print(f"nesterov-triton: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # before the training, or a second one during the report
        return 130


def choose(defaults: Settings, given: dict[str, Any], folder: Folder, *, resume: bool, overwrite: bool) -> Settings:
    """The settings to run with: what is given, over what is stored when resuming, over the defaults."""
    if not resume:
        if not (overwrite or folder.is_empty()):
            raise CommandError(
                f"{folder.path} is not empty; go on with it with --resume, replace it with --overwrite, "
                "or choose another --output"
            )
        return replace(defaults, **given)
    stored = folder.settings()
    if stored is None:
        print(f"nesterov-triton: nothing stored in {folder.path} yet, starting from the beginning", file=sys.stderr)
        return replace(defaults, **given)
    for name, value in given.items():
        before = getattr(stored, name)
        if value != before and not extends(name, before, value):
            more = " (only more of them can be asked for)" if name in EXTENDABLE else ""
            raise CommandError(
                f"cannot resume {folder.path} with another {name.replace('_', '-')}: it has {show(before)}, "
                f"you ask for {show(value)}{more}; leave that option out, or choose another --output"
            )
    return replace(stored, **given)


def extends(name: str, before: Any, value: Any) -> bool:
    """Whether going from ``before`` to ``value`` keeps every epoch that is done."""
    if name == "epochs":
        return bool(value >= before)
    return name in EXTENDABLE and set(before) <= set(value)


def show(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def check(settings: Settings) -> None:
    """What can only be judged from several settings together, or from this machine."""
    adaptive = nt.tableaus.get(settings.method).adaptive
    if not adaptive and settings.step_size is None:
        raise CommandError(f"method {settings.method} takes fixed steps: give --step-size, for example 0.1")
    if adaptive and settings.step_size is not None:
        raise CommandError(f"method {settings.method} chooses its own steps: leave out --step-size")
    try:
        torch.empty(0, device=settings.device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise CommandError(f"device {settings.device} cannot be used here: {reason}") from error


def require_packages(names: Iterable[str]) -> None:
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        packages = ", ".join("scikit-learn" if name == "sklearn" else name for name in missing)
        raise CommandError(
            f'the experiments need {packages}, not installed here: pip install "nesterov-triton[experiments]"'
        )


def parser() -> argparse.ArgumentParser:
    """Options not given stay out of the namespace: the defaults are the experiment's, or the resumed run's."""
    root = argparse.ArgumentParser(prog="nesterov-triton", description="Compare momentum neural ODEs by training them.")
    commands = root.add_subparsers(dest="command", required=True)
    compare = commands.add_parser(
        "compare",
        help="train several models on one experiment and compare them",
        description="Train several models on one experiment. Writes summary.csv, history.csv, figure.png and a "
        "checkpoint of each run to the output folder.",
        epilog="Exit code: 0 done, 1 a model failed, 2 a wrong request, 130 or 143 interrupted (go on with --resume).",
    )
    option = compare.add_argument
    option("experiment", type=one_of("experiment", EXPERIMENTS), help=" or ".join(EXPERIMENTS))
    add_setting(option, "--models", one_of("model", MODELS), f"any of {' '.join(MODELS)}", nargs="+")
    add_setting(option, "--seeds", whole(0), "one training of every model for each seed", nargs="+")
    add_setting(option, "--epochs", whole(1), "passes over the training data")
    add_setting(option, "--batch-size", whole(1), "rows in a training step")
    add_setting(option, "--learning-rate", positive, "of Adam")
    add_setting(option, "--decay", positive, "factor on the learning rate after every epoch")
    add_setting(option, "--tolerance", positive, "relative and absolute tolerance of the solver")
    add_setting(option, "--method", one_of("method", METHODS), f"one of {' '.join(METHODS)}")
    add_setting(option, "--step-size", positive, "of a fixed-step method, in units of t (the layers go from 1 to 2)")
    add_setting(option, "--gradient", one_of("gradient", GRADIENTS), f"one of {' '.join(GRADIENTS)}")
    add_setting(option, "--gate", one_of("gate", GATES), f"of GHBNODE and GNesterovNODE: {' '.join(GATES)}")
    add_setting(option, "--device", device, "cpu, cuda, cuda:1, ...")
    option("--output", type=Path, default=argparse.SUPPRESS, help="folder of the results (default: runs/EXPERIMENT)")
    start = compare.add_mutually_exclusive_group()
    start.add_argument("--resume", action="store_true", help="go on with the comparison in the output folder")
    start.add_argument("--overwrite", action="store_true", help="replace the comparison in the output folder")
    return root


def add_setting(
    option: Callable[..., argparse.Action], flag: str, kind: Callable[[str], Any], text: str, **keywords: Any
) -> None:
    name = flag.removeprefix("--").replace("-", "_")
    assert name in {setting.name for setting in fields(Settings)}
    defaults = dict.fromkeys(getattr(experiment.defaults, name) for experiment in EXPERIMENTS.values())
    if "nargs" in keywords:
        keywords["action"] = Several
    shown = " / ".join("none" if default is None else show(default) for default in defaults)
    option(
        flag, type=kind, default=argparse.SUPPRESS, metavar=name.upper(), help=f"{text} (default: {shown})", **keywords
    )


class Several(argparse.Action):
    """A tuple without repetitions."""

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        setattr(namespace, self.dest, tuple(dict.fromkeys(values)))


def one_of(kind: str, names: Iterable[str]) -> Callable[[str], str]:
    """An argument type: one of these names, in whatever case."""
    canonical = {name.lower(): name for name in names}

    def parse(text: str) -> str:
        if text.lower() in canonical:
            return canonical[text.lower()]
        try:
            return lookup(kind, text, {name: name for name in canonical.values()})
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return parse


def whole(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"must be a whole number of at least {least}, got {text!r}")
        return value

    return parse


def positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text!r}")
    return value


def device(text: str) -> str:
    if re.fullmatch(r"cpu|cuda(:\d+)?", text) is None:
        raise argparse.ArgumentTypeError(
            f"unknown device {text!r}: valid names are cpu, cuda and, for one of several, cuda:1"
        )
    return text
