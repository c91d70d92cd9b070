"""Training state by parameter name: what an engine exports and takes back, however it shards it.

Shapes: tensors here are always whole; no rank-dependent shape exists outside an engine.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from train.errors import CheckpointError

WEIGHT = "weight"
"""Kind of tensor: the fp32 weight."""
MOMENTS = ("exp_avg", "exp_avg_sq")
"""Kinds of tensor: AdamW's two running means, under torch's names."""
KINDS = (WEIGHT, *MOMENTS)
"""Every kind, in the order they are written."""
_ROWS_SHOWN = 20


@dataclass(frozen=True, slots=True)
class NamedTensor:
    """One line of the table of a model's tensors.

    Args:
        name: dotted name in the unwrapped model.
        shape: full shape.
        trained: whether it has moments; frozen parameters and buffers have none.
        part: number of the part (the rank) that writes it.
    """

    name: str
    shape: tuple[int, ...]
    trained: bool
    part: int = 0

    @property
    def kinds(self) -> tuple[str, ...]:
        """Which kinds of tensor exist under this name."""
        return KINDS if self.trained else (WEIGHT,)


@dataclass
class ExportedState:
    """What one rank is to write of the training state, in host memory.

    Args:
        tensors: whole tensors by name, then by kind; only those that fall to this rank.
        scalars: step count of AdamW, loss scaler; equal on all ranks; JSON types.
        table: all tensors of the model, those of other ranks too.
    """

    tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    scalars: dict[str, Any] = field(default_factory=dict)
    table: list[NamedTensor] = field(default_factory=list)


class StateSource(Protocol):
    """Saved state that can be read, e.g. a CheckpointState."""

    @property
    def table(self) -> list[NamedTensor]:
        """All tensors there are."""

    @property
    def engine(self) -> Mapping[str, Any]:
        """The scalars of ExportedState."""

    def tensor(self, name: str, kind: str) -> Tensor:
        """Read one whole fp32 tensor."""


class NamedState(ABC):
    """Reads and writes the training state of one engine by parameter name. All ranks call each
    method alike."""

    @abstractmethod
    def prepare(self) -> None:
        """Make optimizer state exist and reachable by name, at zero if no step was taken."""

    @abstractmethod
    def read(self, name: str) -> dict[str, Tensor]:
        """Gather the whole tensors of one trained parameter, fp32, on any device."""

    @abstractmethod
    def write(self, name: str, kind: str, value: Tensor) -> None:
        """Put back one whole tensor; each rank keeps its share."""

    @abstractmethod
    def finish_write(self, adam_step: int) -> None:
        """Set the step count and bring the working weights in line with the fp32 ones."""

    @abstractmethod
    def adam_step(self) -> int:
        """Return how many steps AdamW has taken; skipped ones do not count."""


class PlainState(NamedState):
    """State that a torch optimizer keeps per parameter, unsharded.

    Args:
        masters: the fp32 tensor that is optimised, by name.
        working: the weights of the forward pass, by name; the same tensors in fp32.
        optimizer: AdamW over the masters.
    """

    def __init__(
        self,
        *,
        masters: Mapping[str, Tensor],
        working: Mapping[str, Tensor],
        optimizer: torch.optim.Optimizer,
    ) -> None:
        self.masters = masters
        self.working = working
        self.optimizer = optimizer

    def prepare(self) -> None:
        """Give every parameter its moments."""
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                make_moments(self.optimizer, parameter, group)

    def read(self, name: str) -> dict[str, Tensor]:
        """Return the tensors themselves, not copies."""
        master = self.masters[name]
        state = self.optimizer.state[master]
        tensors = {WEIGHT: master.detach()}
        for kind in MOMENTS:
            tensors[kind] = state[kind]
        return tensors

    def write(self, name: str, kind: str, value: Tensor) -> None:
        """Copy in place."""
        master = self.masters[name]
        if kind == WEIGHT:
            target = master
        else:
            state = self.optimizer.state[master]
            target = state[kind]
        # Into the same memory: the optimizer and the model hold on to it.
        with torch.no_grad():
            target.copy_(value)

    def finish_write(self, adam_step: int) -> None:
        """Set the step count; round the masters to the working weights."""
        set_adam_step(self.optimizer, adam_step)
        with torch.no_grad():
            for name, master in self.masters.items():
                working = self.working[name]
                # In fp32 there is one tensor for both.
                if working is not master:
                    working.copy_(master)

    def adam_step(self) -> int:
        """Return the step count."""
        return read_adam_step(self.optimizer)


def make_moments(
    optimizer: torch.optim.Optimizer, tensor: Tensor, group: Mapping[str, Any]
) -> None:
    """Make AdamW's state of one tensor as its own first step would, unless it is there."""
    state = optimizer.state[tensor]
    if MOMENTS[0] in state:
        return
    # A fused kernel wants the count beside the tensor, the loops want it on the host.
    device = torch.device("cpu")
    if group.get("fused") or group.get("capturable"):
        device = tensor.device
    state["step"] = torch.zeros((), dtype=torch.float32, device=device)
    for kind in MOMENTS:
        # AdamW's own first step keeps the memory format too; its kernels expect equal strides.
        moment = torch.zeros_like(
            tensor,
            memory_format=torch.preserve_format,
            requires_grad=False,
        )
        state[kind] = moment


def set_adam_step(optimizer: torch.optim.Optimizer, adam_step: int) -> None:
    """Set the step count of every tensor."""
    count = float(adam_step)
    for state in optimizer.state.values():
        if "step" in state:
            # Filled, not replaced: a captured graph reads this very tensor.
            state["step"].fill_(count)


def read_adam_step(optimizer: torch.optim.Optimizer) -> int:
    """Return the step count, which all tensors share; 0 before the first step."""
    for state in optimizer.state.values():
        # Only one is read: a fused kernel keeps each on the GPU, and every look there waits for it.
        if "step" in state:
            return int(state["step"])
    return 0


def list_tensors(module: nn.Module, *, parts: int) -> list[NamedTensor]:
    """List a model's parameters and saved buffers and share them out over parts of nearly equal
    size.

    Args:
        module: the unwrapped model, before anything shards it.
        parts: files to share out over; one a rank.

    Returns:
        The table, in the model's order.
    """
    trained = set()
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            trained.add(name)
    saved = module.state_dict(keep_vars=True)
    sizes = {name: tensor.numel() for name, tensor in saved.items()}

    # Largest first, each to the part with the least so far. Ties are broken by name, so that every
    # rank comes to the same table without asking.
    load = [0] * parts
    owners: dict[str, int] = {}
    largest_first = sorted(saved, key=lambda name: (-sizes[name], name))
    for name in largest_first:
        smallest_load = min(load)
        part = load.index(smallest_load)
        owners[name] = part
        # A frozen tensor has no moments.
        num_kinds = 1
        if name in trained:
            num_kinds = len(KINDS)
        load[part] += sizes[name] * num_kinds

    table = []
    for name, tensor in saved.items():
        shape = tuple(tensor.shape)
        row = NamedTensor(
            name,
            shape,
            trained=name in trained,
            part=owners[name],
        )
        table.append(row)
    return table


def check_same_model(
    saved: Iterable[NamedTensor], built: Iterable[NamedTensor], *, where: str
) -> None:
    """Refuse a checkpoint of another model, with a table of what differs.

    Args:
        saved: table of the checkpoint.
        built: table of the model that was built.
        where: the checkpoint, for the message.

    Raises:
        CheckpointError: names, shapes or what is trained differ.
    """
    theirs = {tensor.name: tensor for tensor in saved}
    ours = {tensor.name: tensor for tensor in built}
    # Each name once, those of this model first: sets would forget the order.
    all_names = [*ours, *theirs]
    names = list(dict.fromkeys(all_names))
    rows = []
    for name in names:
        in_checkpoint = describe_tensor(theirs.get(name))
        in_model = describe_tensor(ours.get(name))
        if in_checkpoint != in_model:
            rows.append((name, in_checkpoint, in_model))
    if not rows:
        return
    raise CheckpointError(
        f"{where}: the checkpoint is of another model; {len(rows)} of {len(names)} tensors "
        f"differ.\n{_lay_out(rows)}\nUse the model settings it was made with, or another "
        "checkpoint.dir for a new run."
    )


def _lay_out(rows: Sequence[tuple[str, str, str]]) -> str:
    """Lay out which tensors differ in columns; a long list is cut."""
    shown = [("tensor", "in the checkpoint", "in this model"), *rows[:_ROWS_SHOWN]]
    widths = []
    for cells in zip(*shown, strict=True):
        longest = max(cells, key=len)
        widths.append(len(longest))
    lines = []
    for row in shown:
        padded = []
        for cell, width in zip(row, widths, strict=True):
            padded.append(cell.ljust(width))
        line = "  ".join(padded)
        lines.append(f"  {line.rstrip()}")
    num_more = len(rows) - _ROWS_SHOWN
    if num_more > 0:
        lines.append(f"  ... and {num_more} more")
    return "\n".join(lines)


def describe_tensor(tensor: NamedTensor | None) -> str:
    """Describe a tensor in a few characters for a table."""
    if tensor is None:
        return "missing"
    sides = [str(side) for side in tensor.shape]
    shape = "x".join(sides) or "scalar"
    if tensor.trained:
        return shape
    return f"{shape} frozen"


HostCopy = Callable[[str, str, Tensor], Tensor]
"""Copies one exported tensor, given its name and kind, to the host memory of a save."""
