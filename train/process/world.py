"""The processes of a run: who is who, small agreements between them, and an orderly end.

Agreements (flags, names, means for the log) go over a group of their own on gloo, so that they
never mix with the gradients' traffic and never touch the accelerator.
"""

from __future__ import annotations

import dataclasses
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store

from pipeline.errors import ConfigError
from train.config import RunConfig
from train.process.meeting import meet
from train.process.place import RankPlace, find_place, shows_one_gpu_each, write_place
from train.process.roll import Roll

T = TypeVar("T")

GROUP_PATIENCE = 2.0
"""How much longer than `engine.timeout_s` a collective waits for a rank. A collective that gives up
ends the run with an error that names no culprit; the watchdog ends it with the stacks, and it looks
no more often than every quarter of `engine.timeout_s`."""


@dataclass
class World:
    """The processes of a run, seen from one of them. Every method that agrees on something must be
    called by all.

    Args:
        rank: 0 to world_size - 1.
        local_rank: the same within this node; also the number of this process's GPU.
        world_size: processes of the run.
        local_world_size: processes of this node.
        device: where this process computes.
        backend: what carries gradients: nccl or gloo.
        control: the gloo group of small agreements; None in a world of one.
    """

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    backend: str = "gloo"
    control: Any = None

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the one that writes logs."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.control is not None:
            dist.barrier(group=self.control)

    def broadcast(self, value: T) -> T:
        """Give every rank what rank 0 passed; small picklable objects made by this program only."""
        if self.control is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def gather(self, value: T) -> list[T]:
        """Give every rank what each rank passed, in order of rank."""
        if self.control is None:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def mean(self, values: Sequence[float]) -> list[float]:
        """Average numbers over the ranks, for the log."""
        if self.control is None:
            return [float(value) for value in values]
        # float64: the sum over many ranks must not round what each of them logs.
        totals = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(totals, group=self.control)
        return (totals / self.world_size).tolist()

    def highest(self, value: int) -> int:
        """Return the largest of a number over the ranks: one integer, the cheapest agreement there
        is."""
        if self.control is None:
            return value
        box = torch.tensor([value], dtype=torch.int64)
        dist.all_reduce(box, op=dist.ReduceOp.MAX, group=self.control)
        return int(box.item())

    def for_a_thread(self, *, timeout_s: float) -> World:
        """Give the same processes with a control group of their own, so that a thread can agree
        with its likes on the other ranks while the main thread goes on. All ranks call it together,
        once a thread.

        Args:
            timeout_s: longest wait for another rank.
        """
        if self.control is None:
            return dataclasses.replace(self)
        group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
        return dataclasses.replace(self, control=group)

    def device_name(self) -> str:
        """Name this rank's host and device, for messages."""
        return f"{socket.gethostname()}, {self.device}"

    def end(self) -> None:
        """Leave in an orderly way. Without it processes on gloo sometimes abort while they exit."""
        if self.control is None:
            if dist.is_initialized():
                dist.destroy_process_group()
            return
        # Nobody may close its connections while another still agrees on something.
        self.control = None
        dist.barrier()
        dist.destroy_process_group()


def init_world(config: RunConfig, *, roll: Roll | None = None) -> World:
    """Join the run's processes.

    Fills in the launcher's variables if they are absent (a plain `python -m`, or srun without
    torchrun), because DeepSpeed looks for mpi4py otherwise.

    Args:
        config: settings of the run; `engine.timeout_s` bounds every wait for another rank: inside
            the loop by the watchdog, outside it by the groups, which wait longer.
        roll: the ranks of this node, so that one that died before the others met is named.

    Returns:
        The world, with its process groups up.

    Raises:
        ConfigError: the launcher's variables contradict each other, or there are more ranks than
            GPUs.
        InfrastructureError: the ranks did not meet: the port is taken, the host is unknown, or a
            rank did not come.
    """
    place = find_place(os.environ)
    device = _pick_device(place)
    backend = "nccl" if device.type == "cuda" else "gloo"
    write_place(
        os.environ,
        place,
        master_port=place.master_port or _free_port(),
    )
    if device.type == "cpu":
        # DeepSpeed would look for other accelerators, and warn.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    timeout = timedelta(seconds=GROUP_PATIENCE * config.engine.timeout_s)
    if place.world_size == 1:
        # A store in this process's memory: no port and no network that another process could take.
        store: Store = torch._C._distributed_c10d.HashStore()
        dist.init_process_group(
            backend,
            store=store,
            rank=0,
            world_size=1,
            timeout=timeout,
        )
        control = None
    else:
        options = {"device_id": device} if device.type == "cuda" else {}
        store = meet(place, timeout_s=config.engine.timeout_s, roll=roll)
        dist.init_process_group(
            backend,
            store=store,
            rank=place.rank,
            world_size=place.world_size,
            timeout=timeout,
            **options,  # type: ignore[arg-type]
        )
        control = dist.new_group(backend="gloo", timeout=timeout)
    return World(
        rank=place.rank,
        local_rank=place.local_rank,
        world_size=place.world_size,
        local_world_size=place.local_world_size,
        device=device,
        backend=backend,
        control=control,
    )


def _pick_device(place: RankPlace) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    index = place.local_rank
    if count == 1 and place.local_world_size > 1 and shows_one_gpu_each(os.environ):
        index = 0
    if index >= count:
        raise ConfigError(
            f"environment: local rank {place.local_rank} has no GPU, this process sees {count}. "
            f"Start at most {count} processes on this node."
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
