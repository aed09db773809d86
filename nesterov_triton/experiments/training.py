"""One model trained with one seed, an epoch at a time, so that it can stop and go on after any of them."""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

import nesterov_triton as nt
from nesterov_triton.experiments.experiment import Experiment, Settings


@dataclass(frozen=True)
class Epoch:
    """One row of history.csv. NFE: mean per training batch; seconds: training alone, without the test."""

    epoch: int
    train_loss: float
    test_loss: float
    test_accuracy_percent: float
    nfe_forward: float
    nfe_backward: float
    seconds: float


@dataclass(frozen=True)
class Failure:
    """Why a run ended early: the solver's status, or DIVERGED when loss or gradient became infinite or NaN."""

    status: str
    epoch: int
    message: str


@dataclass
class Run:
    """What is known of one model with one seed."""

    model: str
    seed: int
    parameters: int
    history: list[Epoch] = field(default_factory=list)
    failure: Failure | None = None

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> "Run":
        failure = stored["failure"]
        return cls(
            model=stored["model"],
            seed=stored["seed"],
            parameters=stored["parameters"],
            history=[Epoch(**row) for row in stored["history"]],
            failure=failure and Failure(**failure),
        )


@dataclass(frozen=True)
class Batch:
    """Where an epoch stands after a batch, for the progress bar."""

    epoch: int
    fraction: float
    loss: float
    nfe_forward: int
    nfe_backward: int


class Trainer:
    """Network, optimiser and history of one run. The order of the data depends on (seed, epoch) alone."""

    def __init__(self, experiment: Experiment, settings: Settings, model: str, seed: int) -> None:
        self.experiment = experiment
        self.settings = settings
        self.train, self.test = (part.to(settings.device) for part in experiment.load(seed))
        torch.manual_seed(seed)
        self.network = experiment.build(model, settings).to(settings.device)
        self.optimiser = torch.optim.Adam(self.network.parameters(), lr=settings.learning_rate)
        self.run = Run(model, seed, sum(p.numel() for p in self.network.parameters() if p.requires_grad))

    def state(self) -> dict[str, Any]:
        return {
            "run": asdict(self.run),
            "network": self.network.state_dict(),
            "optimiser": self.optimiser.state_dict(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.run = Run.from_dict(state["run"])
        self.network.load_state_dict(state["network"])
        self.optimiser.load_state_dict(state["optimiser"])

    def advance(self, on_batch: Callable[[Batch], None]) -> None:
        """One epoch more, or a failure, in ``self.run``."""
        epoch = len(self.run.history) + 1
        try:
            self.run.history.append(self._epoch(epoch, on_batch))
        except nt.SolveError as error:
            self.run.failure = Failure(error.status.name, epoch, str(error))
        except FloatingPointError as error:
            self.run.failure = Failure("DIVERGED", epoch, str(error))

    def _epoch(self, epoch: int, on_batch: Callable[[Batch], None]) -> Epoch:
        size, count = self.settings.batch_size, len(self.train.inputs)
        shuffle = torch.Generator().manual_seed(1_000_003 * self.run.seed + epoch)
        batches = torch.split(torch.randperm(count, generator=shuffle).to(self.settings.device), size)
        for group in self.optimiser.param_groups:
            group["lr"] = self.settings.learning_rate * self.settings.decay ** (epoch - 1)
        total = forward = backward = 0.0
        start = time.perf_counter()
        for i, rows in enumerate(batches, start=1):
            self.optimiser.zero_grad()
            loss = self.experiment.loss(self.network(self.train.inputs[rows]), self.train.targets[rows])
            loss.backward()  # type: ignore[no-untyped-call]
            value = loss.item()
            norm = torch.nn.utils.get_total_norm([p.grad for p in self.network.parameters() if p.grad is not None])
            if not (math.isfinite(value) and norm.isfinite()):
                raise FloatingPointError(
                    f"loss {value}, norm of the gradient {norm.item()} in batch {i} of epoch {epoch}; "
                    "try a lower --learning-rate"
                )
            self.optimiser.step()
            stats: Any = self.network.layer.stats  # nfe_backward counts once the backward has run
            total += value * len(rows)
            forward += stats.nfe_forward
            backward += stats.nfe_backward
            on_batch(Batch(epoch, i / len(batches), value, stats.nfe_forward, stats.nfe_backward))
        if self.settings.device.startswith("cuda"):
            torch.cuda.synchronize(self.settings.device)
        seconds = time.perf_counter() - start
        test_loss, test_accuracy = self.evaluate()
        return Epoch(
            epoch=epoch,
            train_loss=total / count,
            test_loss=test_loss,
            test_accuracy_percent=100 * test_accuracy,
            nfe_forward=forward / len(batches),
            nfe_backward=backward / len(batches),
            seconds=seconds,
        )

    @torch.no_grad()
    def evaluate(self) -> tuple[float, float]:
        """Loss and accuracy (a fraction) on the test data."""
        outputs = self.network(self.test.inputs)
        loss = self.experiment.loss(outputs, self.test.targets).item()
        return loss, self.experiment.accuracy(outputs, self.test.targets)
