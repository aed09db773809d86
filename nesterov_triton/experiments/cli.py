"""The command line: ``nesterov-triton compare ...`` and ``nesterov-triton reproduce ...``."""

import argparse
import importlib.util
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NoReturn

import torch

import nesterov_triton as nt
from nesterov_triton._names import lookup
from nesterov_triton.experiments import digits
from nesterov_triton.experiments.data import data_folder
from nesterov_triton.experiments.experiment import CommandError, Experiment, Measurement, Settings
from nesterov_triton.experiments.folder import Folder
from nesterov_triton.experiments.models import MODELS, parse_gate
from nesterov_triton.experiments.paper import EXPERIMENTS as PAPER
from nesterov_triton.experiments.paper import point_cloud
from nesterov_triton.experiments.processes import Processes, processes, started

COMMANDS: dict[str, Mapping[str, Experiment | Measurement]] = {
    "compare": {each.defaults.experiment: each for each in (digits.EXPERIMENT, point_cloud.COMPARED)},
    "reproduce": PAPER,
}
METHODS = (*nt.methods.METHODS, "auto")
GATES = tuple(nt.gates.GATES)
GRADIENTS = tuple(nt.gradients.GRADIENTS)
EXTENDABLE = ("epochs", "models", "seeds")  # a resumed run may have more of these, and of nothing else


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with these arguments (default: the process's own).

    Returns the exit code: 0 done, 1 a model failed, 2 a wrong or impossible request, 130 or 143 interrupted.
    """
    given = vars(parser().parse_args(argv))
    command: str = given.pop("command")
    try:
        require_packages(("matplotlib", "rich", *COMMANDS[command][given["experiment"]].requires))
        if not started():
            return run(command, given, Processes())
        device = device_of(command, given)
        check_device(device)
        with processes(device) as all_of_them:
            return run(command, given, all_of_them)
    except CommandError as error:
        print(f"nesterov-triton: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # before the training, or a second one during the report
        return 130


def run(command: str, given: dict[str, Any], all_of_them: Processes) -> int:
    """The command's work, in one of the processes that take part; see `main`."""
    from nesterov_triton.experiments.runner import CHECKPOINT_SECONDS, Runner, measure  # needs the packages looked for

    experiment = COMMANDS[command][given["experiment"]]
    folder = folder_of(command, given)
    given.pop("output", None)
    data = data_folder(given.pop("data", None))
    resume, overwrite = given.pop("resume"), given.pop("overwrite")
    checkpoint_seconds = given.pop("checkpoint_seconds", CHECKPOINT_SECONDS)

    def prepared() -> Settings:
        refuse_unused(experiment, given)
        settings = choose(experiment.defaults, given, folder, resume=resume, overwrite=overwrite)
        check(settings)
        check_models(experiment, settings)
        if overwrite or folder.is_empty():
            # What is refused, or cannot be had, must neither leave a folder nor cost the one that is there.
            experiment.load(settings.seeds[0], data)
        if overwrite:
            folder.clear()
        return settings

    # The first process alone looks at the folder, which it then writes to.
    settings, refused = all_of_them.share(attempt(prepared) if all_of_them.leader else (None, None))
    if settings is None:
        if all_of_them.leader:
            raise CommandError(refused)
        return 2
    if isinstance(experiment, Measurement):
        return measure(experiment, settings, folder, data) if all_of_them.leader else 0
    if all_of_them.size == 1:
        all_of_them = Processes(settings.device)  # a resumed run's
    return Runner(
        experiment,
        settings,
        folder,
        data=data,
        command=command,
        processes=all_of_them,
        checkpoint_seconds=checkpoint_seconds,
    )()


def folder_of(command: str, given: dict[str, Any]) -> Folder:
    """The output folder; each command's has a name of its own, since their settings are not the same."""
    name = given["experiment"] if command == "compare" else f"paper/{given['experiment']}"
    return Folder(given.get("output") or Path("runs") / name)


def device_of(command: str, given: dict[str, Any]) -> str:
    """The device before there are settings: what is given, or what a resumed run has, or the default."""
    stored = folder_of(command, given).settings() if given["resume"] else None
    default: str = (stored or COMMANDS[command][given["experiment"]].defaults).device
    asked: str = given.get("device", default)
    return asked


def attempt(action: Callable[[], Settings]) -> tuple[Settings | None, str | None]:
    """What the action gives, or the message of its refusal."""
    try:
        return action(), None
    except CommandError as error:
        return None, str(error)


def refuse_unused(experiment: Experiment | Measurement, given: dict[str, Any]) -> None:
    if isinstance(experiment, Measurement):
        for name in experiment.unused:
            if name in given:
                flag = name.replace("_", "-")
                raise CommandError(f"{experiment.defaults.experiment} trains nothing: leave out --{flag}")


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
    method = settings.method
    if not nt.methods.get(method).adaptive and settings.step_size is None:
        raise CommandError(f"method {method} takes fixed steps: give --step-size, for example 0.1")
    if settings.step_size is not None and (method == "auto" or not nt.methods.takes_steps(method)):
        raise CommandError(f"method {method} chooses its own steps: leave out --step-size")
    if settings.gradient == "reversible" and method != "auto" and not nt.methods.reversible(method):
        raise CommandError("--gradient reversible takes steps back: give --method strang or blanes_moan4")
    check_device(settings.device)


def check_models(experiment: Experiment | Measurement, settings: Settings) -> None:
    """Build every model once, which looks at all its options; their networks are small."""
    for model in settings.models:
        try:
            experiment.build(model, settings)
        except (ValueError, TypeError) as error:
            raise CommandError(f"{model}: {error}; leave that model out (--models), or change the option") from error


def check_device(name: str) -> None:
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise CommandError(f"device {name} cannot be used here: {reason}") from error


def require_packages(names: Iterable[str]) -> None:
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        packages = ", ".join({"sklearn": "scikit-learn", "PIL": "pillow"}.get(name, name) for name in missing)
        raise CommandError(
            f'the experiments need {packages}, not installed here: pip install "nesterov-triton[experiments]"'
        )


class Parser(argparse.ArgumentParser):
    """One line for a wrong request, which the usage's dozen would hide."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}; see {self.prog} --help\n")


def parser() -> argparse.ArgumentParser:
    """Options not given stay out of the namespace: the defaults are the experiment's, or the resumed run's."""
    root = Parser(prog="nesterov-triton", description="Compare momentum neural ODEs by training them.")
    root.add_argument("--version", action="version", version=f"%(prog)s {nt.__version__}")
    commands = root.add_subparsers(dest="command", required=True)
    for command, help, text in (
        ("compare", "train several models on one experiment and compare them", "Train several models on a small task."),
        (
            "reproduce",
            "an experiment of the NesterovNODE paper, with all its models",
            "Run an experiment of the NesterovNODE paper (Nguyen et al., NeurIPS 2022) with all its models. Under "
            "torchrun each batch is split over the processes.",
        ),
    ):
        add_options(
            commands.add_parser(
                command,
                help=help,
                description=f"{text} Writes summary.csv, history.csv, figures and a checkpoint of each run to the "
                "output folder.",
                epilog="Exit code: 0 done, 1 a model failed, 2 a wrong request, 130 or 143 interrupted (go on with "
                "--resume).",
            ),
            COMMANDS[command],
        )
    return root


def add_options(command: argparse.ArgumentParser, experiments: Mapping[str, Experiment | Measurement]) -> None:
    option = command.add_argument
    option("experiment", type=one_of("experiment", experiments), help=" or ".join(experiments))

    def setting(flag: str, kind: Callable[[str], Any], text: str, **keywords: Any) -> None:
        add_setting(option, experiments.values(), flag, kind, text, **keywords)

    setting("--models", one_of("model", MODELS), f"any of {' '.join(MODELS)}", nargs="+")
    setting("--seeds", whole(0), "one training of every model for each seed", nargs="+")
    setting("--epochs", whole(1), "passes over the training data")
    setting("--batch-size", whole(1), "rows in a training step")
    setting("--learning-rate", positive, "of Adam")
    setting("--decay", positive, "factor on the learning rate after every epoch (cifar10: every 1,000 steps)")
    setting("--clip", positive, "bound on the gradient's norm")
    setting("--limit", whole(1), "training rows, and test rows, used at most")
    setting("--tolerance", positive, "relative and absolute tolerance of the solver")
    setting("--method", one_of("method", METHODS), f"one of {' '.join(METHODS)}")
    setting("--step-size", positive, "of a fixed-step method, in units of t (the layers go from 1 to 2)")
    setting("--gradient", one_of("gradient", GRADIENTS), f"one of {' '.join(GRADIENTS)}")
    setting("--gate", gate, f"of GHBNODE and GNesterovNODE: {' '.join(GATES)}, or with a bound, hardtanh:0.5")
    setting("--xi", xi, "their residual: a number, or learnable")
    setting("--damping-factor", positive, "r in the damping r/t of NesterovNODE and GNesterovNODE")
    setting("--device", device, "cpu, cuda, cuda:1, ...")
    if any(isinstance(each, Measurement) or each.requires for each in experiments.values()):
        text = "folder of the data files, where what is missing is downloaded to"
        option(
            "--data", type=Path, default=argparse.SUPPRESS, help=f"{text} (default: $NESTEROV_TRITON_DATA, or a cache)"
        )
    text = "between two checkpoints inside an epoch (default: 30)"
    option("--checkpoint-seconds", type=positive, default=argparse.SUPPRESS, metavar="SECONDS", help=text)
    text = "folder of the results (default: runs/EXPERIMENT, or runs/paper/EXPERIMENT)"
    option("--output", type=Path, default=argparse.SUPPRESS, help=text)
    start = command.add_mutually_exclusive_group()
    start.add_argument("--resume", action="store_true", help="go on with the run in the output folder")
    start.add_argument("--overwrite", action="store_true", help="replace the run in the output folder")


def add_setting(
    option: Callable[..., argparse.Action],
    experiments: Iterable[Experiment | Measurement],
    flag: str,
    kind: Callable[[str], Any],
    text: str,
    **keywords: Any,
) -> None:
    name = flag.removeprefix("--").replace("-", "_")
    assert name in {setting.name for setting in fields(Settings)}
    defaults: dict[Any, list[str]] = {}
    for experiment in experiments:
        if not (isinstance(experiment, Measurement) and name in experiment.unused):
            defaults.setdefault(getattr(experiment.defaults, name), []).append(experiment.defaults.experiment)
    if "nargs" in keywords:
        keywords["action"] = Several
    texts = ["none" if default is None else show(default) for default in defaults]
    if len(texts) > 1:
        texts = [f"{text} for {' and '.join(names)}" for text, names in zip(texts, defaults.values(), strict=True)]
    shown = ", ".join(texts)
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


def gate(text: str) -> str:
    name, colon, bound = text.partition(":")
    text = one_of("gate", GATES)(name) + colon + bound
    try:
        parse_gate(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def xi(text: str) -> float | str:
    if text == "learnable":
        return text
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number of at least 0, or learnable, got {text!r}")
    return value
