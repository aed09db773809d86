"""One process, or the several that ``torchrun`` starts: the same training, each batch split between them."""

import gc
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn

T = TypeVar("T")
PATIENCE = timedelta(hours=2)  # for the first process to fetch data, or draw


class Processes:
    """How many processes take part, and which this is.

    Attributes:
        rank, size: 0 and 1 without ``torchrun``.
        device: this process's own, such as cuda:1 for cuda in the second one of a machine.
    """

    def __init__(self, device: str = "cpu", rank: int = 0, size: int = 1) -> None:
        self.device, self.rank, self.size = device, rank, size

    @property
    def leader(self) -> bool:
        """Whether this is the process that writes and shows."""
        return self.rank == 0

    def share(self, value: T) -> T:
        """The first process's value, in all of them."""
        if self.size == 1:
            return value
        box = [value]
        distributed.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: T) -> list[T]:
        """Every process's value, in the order of their ranks."""
        if self.size == 1:
            return [value]
        boxes: list[Any] = [None] * self.size
        distributed.all_gather_object(boxes, value)
        return boxes

    def leader_first(self, action: Callable[[], T]) -> T:
        """The action's result; the first process is done before the others begin."""
        if self.leader:
            result = action()
            self.wait()
            return result
        self.wait()
        return action()

    def wait(self) -> None:
        if self.size > 1:
            self.sum([0.0])

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sums over all processes, in float64."""
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        distributed.all_reduce(tensor)
        return [float(value) for value in tensor.tolist()]

    def part(self, rows: Tensor) -> tuple[Tensor, int]:
        """This process's rows of a batch, at least one, and how many of them count."""
        own = torch.tensor_split(rows, self.size)[self.rank]
        return (own, len(own)) if len(own) else (rows[:1], 0)

    def wrap(self, network: nn.Module) -> nn.Module:
        """The network, its gradients averaged over the processes."""
        if self.size == 1:
            return network
        ids = [torch.device(self.device)] if self.device.startswith("cuda") else None
        return nn.parallel.DistributedDataParallel(network, device_ids=ids)


def started(environment: Any = os.environ) -> bool:
    """Whether ``torchrun`` started several processes."""
    return int(environment.get("WORLD_SIZE", "1")) > 1 and "RANK" in environment


@contextmanager
def processes(device: str) -> Iterator[Processes]:
    """The processes that take part, joined: over nccl on cuda, over gloo on a CPU."""
    if not started():
        yield Processes(device)
        return
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=PATIENCE)
    try:
        yield Processes(device, distributed.get_rank(), distributed.get_world_size())
    finally:
        gc.collect()  # a failed run's network, held by its traceback, would outlive the group that it talks through
        distributed.destroy_process_group()
