"""One model trained with one seed, an epoch at a time, so that it can stop and go on after any batch of it."""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

import nesterov_triton as nt
from nesterov_triton.experiments.experiment import Experiment, Settings, Split
from nesterov_triton.experiments.processes import Processes


@dataclass(frozen=True)
class Epoch:
    """One row of history.csv. NFE: mean per training batch; seconds: training alone, without the test.

    ``test_accuracy_percent`` is None where the experiment has none.
    """

    epoch: int
    train_loss: float
    test_loss: float
    test_accuracy_percent: float | None
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
    nfe_forward: float
    nfe_backward: float


@dataclass
class Partial:
    """An epoch under way: batches done and the sums over them, all that it needs to go on beside the network."""

    batches: int = 0
    loss: float = 0.0
    nfe_forward: float = 0.0
    nfe_backward: float = 0.0
    seconds: float = 0.0


class Trainer:
    """Network, optimiser and history of one run. The order of the data depends on (seed, epoch) alone.

    With several processes every one has a trainer of the same run, and takes its part of each batch.
    """

    def __init__(
        self,
        experiment: Experiment,
        settings: Settings,
        model: str,
        seed: int,
        folder: Path = Path("."),
        processes: Processes | None = None,
    ) -> None:
        self.experiment = experiment
        self.settings = settings
        self.processes = processes or Processes(settings.device)
        self.device = self.processes.device
        loaded = self.processes.leader_first(lambda: experiment.load(seed, folder))
        self.data: tuple[Split, Split] = (loaded[0].first(settings.limit), loaded[1].first(settings.limit))
        self.train, self.test = (part.to(self.device) for part in self.data)
        torch.manual_seed(seed)
        self.network = experiment.build(model, settings).to(self.device)
        self.parallel = self.processes.wrap(self.network)
        self.parameters = [p for p in self.network.parameters() if p.requires_grad]
        self.optimiser = torch.optim.Adam(self.parameters, lr=settings.learning_rate)
        self.run = Run(model, seed, sum(p.numel() for p in self.parameters))
        self.partial = Partial()

    def state(self) -> dict[str, Any]:
        return {
            "run": asdict(self.run),
            "network": self.network.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "partial": asdict(self.partial),
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.run = Run.from_dict(state["run"])
        self.network.load_state_dict(state["network"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.partial = Partial(**state.get("partial", {}))  # an earlier version's has none

    def advance(self, on_batch: Callable[[Batch], None], pause: Callable[[], None] = lambda: None) -> None:
        """One epoch more, or a failure, in ``self.run``; ``pause`` is called where the state is whole."""
        epoch = len(self.run.history) + 1
        try:
            self.run.history.append(self._epoch(epoch, on_batch, pause))
        except nt.SolveError as error:
            self.run.failure = Failure(error.status.name, epoch, str(error))
        except FloatingPointError as error:
            self.run.failure = Failure("DIVERGED", epoch, str(error))
        self.partial = Partial()

    def _epoch(self, epoch: int, on_batch: Callable[[Batch], None], pause: Callable[[], None]) -> Epoch:
        size, count = self.settings.batch_size, len(self.train.inputs)
        shuffle = torch.Generator().manual_seed(1_000_003 * self.run.seed + epoch)
        batches = torch.split(torch.randperm(count, generator=shuffle).to(self.device), size)
        partial = self.partial
        start = time.perf_counter() - partial.seconds
        for i in range(partial.batches, len(batches)):
            factor = self.experiment.schedule(self.settings, epoch, (epoch - 1) * len(batches) + i)
            for group in self.optimiser.param_groups:
                group["lr"] = self.settings.learning_rate * factor
            try:
                value, forward, backward = self._step(batches[i])
            except FloatingPointError as error:
                raise FloatingPointError(
                    f"{error} in batch {i + 1} of epoch {epoch}; try a lower --learning-rate"
                ) from error
            partial.batches = i + 1
            partial.loss += value * len(batches[i])
            partial.nfe_forward += forward
            partial.nfe_backward += backward
            partial.seconds = time.perf_counter() - start
            on_batch(Batch(epoch, (i + 1) / len(batches), value, forward, backward))
            if i + 1 < len(batches):
                pause()
        if self.device.startswith("cuda"):
            torch.cuda.synchronize(self.device)
        seconds = time.perf_counter() - start
        test_loss, test_accuracy = self.evaluate()
        return Epoch(
            epoch=epoch,
            train_loss=partial.loss / count,
            test_loss=test_loss,
            test_accuracy_percent=None if test_accuracy is None else 100 * test_accuracy,
            nfe_forward=partial.nfe_forward / len(batches),
            nfe_backward=partial.nfe_backward / len(batches),
            seconds=seconds,
        )

    def _step(self, batch: torch.Tensor) -> tuple[float, float, float]:
        """One step of the optimiser: the batch's loss and its evaluations forward and backward, mean over processes."""
        rows, counted = self.processes.part(batch)
        # The gradients are averaged over the processes: so each one's mean counts by its share of the rows.
        weight = counted * self.processes.size / len(batch)
        self.optimiser.zero_grad()
        failed: nt.SolveError | None = None
        try:
            loss = self.experiment.loss(self.parallel(self.train.inputs[rows]), self.train.targets[rows])
        except nt.SolveError as error:
            failed = error
        # A process whose solve fails tells the others before they wait for its gradients.
        local = 0.0 if failed else loss.item() * counted
        total, failures = self.processes.sum([local, float(failed is not None)])
        if failures:
            raise next(filter(None, self.processes.gather(failed)))
        (loss if weight == 1 else loss * weight).backward()  # type: ignore[no-untyped-call]
        value = total / len(batch) if self.processes.size > 1 else loss.item()
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        if not (math.isfinite(value) and norm.isfinite()):
            raise FloatingPointError(f"loss {value}, norm of the gradient {norm.item()}")
        if self.settings.clip is not None:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.settings.clip, norm)
        self.optimiser.step()
        stats = self.network.stats  # nfe_backward counts once the backward has run
        forward, backward = self.processes.sum([float(stats.nfe_forward), float(stats.nfe_backward)])
        return value, forward / self.processes.size, backward / self.processes.size

    @torch.no_grad()
    def evaluate(self) -> tuple[float, float | None]:
        """Loss and accuracy (a fraction) on the test data."""
        parts = torch.split(torch.arange(len(self.test.inputs), device=self.device), self.experiment.test_batch_size)
        loss = right = 0.0
        for rows in parts[self.processes.rank :: self.processes.size]:
            outputs, targets = self.network(self.test.inputs[rows]), self.test.targets[rows]
            loss += self.experiment.loss(outputs, targets).item() * len(rows)
            if self.experiment.accuracy is not None:
                right += self.experiment.accuracy(outputs, targets) * len(rows)
        loss, right = self.processes.sum([loss, right])
        count = len(self.test.inputs)
        return loss / count, None if self.experiment.accuracy is None else right / count
