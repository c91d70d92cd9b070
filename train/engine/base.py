"""What every engine is, whatever model it trains."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from train.config import RunConfig
from train.engine.named_state import (
    WEIGHT,
    ExportedState,
    HostCopy,
    NamedState,
    StateSource,
    check_same_model,
    list_tensors,
)
from train.process.world import World


def copy_to_host(name: str, kind: str, tensor: Tensor) -> Tensor:
    """Copy one tensor to fresh host memory as fp32."""
    del name, kind
    copied = tensor.detach().to(device="cpu", dtype=torch.float32)
    # On the CPU `to` gives the live tensor back, and the next step would change what is being
    # written.
    if copied.data_ptr() == tensor.data_ptr():
        copied = copied.clone()
    return copied.contiguous()


class Engine(ABC):
    """Forward, backward and optimizer step of one rank.

    Args:
        model: the unwrapped model, on its device, before anything shards it.
        config: settings of the run.
        world: the processes of the run.
    """

    def __init__(self, *, model: nn.Module, config: RunConfig, world: World) -> None:
        self.device = world.device
        self.config = config
        self.world = world
        self.grad_accum_steps = config.train.grad_accum_steps(
            world_size=world.world_size
        )
        self.table = list_tensors(model, parts=world.world_size)
        trained = {row.name for row in self.table if row.trained}
        # Frozen tensors never change, but the engine rounds its own to the precision of the run.
        self._fixed: dict[str, Tensor] = {}
        for name, tensor in model.state_dict().items():
            if name not in trained:
                self._fixed[name] = tensor.detach().float().cpu().clone()
        self._micro_batches = 0
        self._state: NamedState

    @property
    @abstractmethod
    def module(self) -> nn.Module:
        """The unwrapped model; under ZeRO 3 its weights are sharded."""

    @property
    @abstractmethod
    def param_groups(self) -> list[dict[str, Any]]:
        """Groups of the optimizer that takes the steps."""

    @property
    @abstractmethod
    def skipped_steps(self) -> int:
        """Steps without an update, because a gradient was not finite, since this process
        started."""

    @property
    def loss_scale(self) -> float:
        """Factor on the loss; 1 except in fp16."""
        return 1.0

    @property
    def searches_loss_scale(self) -> bool:
        """Whether a skipped step may be the loss scaler on its way down to a scale that fits, and
        not a fault."""
        return False

    @abstractmethod
    def forward_backward(self, *inputs: Tensor) -> Tensor:
        """Run one micro-batch and accumulate its gradients. Does not synchronise with the device.

        Args:
            inputs: arguments of the model's forward pass, on this rank's device; see
                `Objective.inputs`.

        Returns:
            The loss of this rank's micro-batch: a detached float32 scalar on the device.
        """

    @abstractmethod
    def step(self, lr: float) -> None:
        """Clip and take one optimizer step after `grad_accum_steps` micro-batches. All ranks skip
        it together if a gradient is not finite on any.

        Args:
            lr: learning rate of every parameter group.
        """

    @abstractmethod
    def grad_norm(self) -> float | None:
        """Return the global gradient norm of the last step, before clipping; `inf` if the step
        was skipped, None before the first."""

    @abstractmethod
    def eval_context(self) -> contextlib.AbstractContextManager[nn.Module]:
        """Give the model for forward passes without gradients. All ranks enter and leave together;
        between, each may run as many passes as it likes."""

    def export_state(self, copy: HostCopy = copy_to_host) -> ExportedState:
        """Copy this rank's share of the training state to host memory. All ranks call it together.

        Args:
            copy: called for each tensor; must copy, because training goes on while the copies are
                written.

        Returns:
            Whole fp32 tensors by name and kind, for the names that fall to this rank, and the
            scalars.
        """
        self._state.prepare()
        scalars = {
            "adam_step": self._state.adam_step(),
            "loss_scaler": self._loss_scaler(),
        }
        exported = ExportedState(scalars=scalars, table=self.table)
        for row in self.table:
            if row.trained:
                # A collective: every rank takes part in every name, also in those of others.
                whole = self._state.read(row.name)
            else:
                whole = {WEIGHT: self._fixed[row.name]}
            if row.part == self.world.rank:
                copies = {
                    kind: copy(row.name, kind, value) for kind, value in whole.items()
                }
                exported.tensors[row.name] = copies

        # Copies to pinned memory have only been queued, and the next step would overwrite their
        # sources.
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        return exported

    def restore(self, source: StateSource) -> None:
        """Take over saved weights, moments and counters in place, also to roll back. All ranks call
        it together.

        Args:
            source: a checkpoint of the same model, at any world size, stage and precision.

        Raises:
            CheckpointError: it is of another model.
        """
        check_same_model(
            source.table, self.table, where=getattr(source, "uri", "checkpoint")
        )
        self._state.prepare()
        for row in self.table:
            if not row.trained:
                continue
            for kind in row.kinds:
                self._state.write(row.name, kind, source.tensor(row.name, kind))
        adam_step = int(source.engine.get("adam_step", 0))
        self._state.finish_write(adam_step)
        loss_scaler = dict(source.engine.get("loss_scaler", {}))
        self._restore_loss_scaler(loss_scaler)

    def _loss_scaler(self) -> dict[str, Any]:
        return {}

    def _restore_loss_scaler(self, state: dict[str, Any]) -> None:
        del state  # the loss is scaled only by engines that say so

    def _check_micro_batches(self) -> None:
        if self._micro_batches != self.grad_accum_steps:
            raise RuntimeError(
                f"step() after {self._micro_batches} micro-batches, expected grad_accum_steps "
                f"{self.grad_accum_steps}"
            )
        self._micro_batches = 0


def poisoned_if_not_finite(loss: Tensor) -> Tensor:
    """Give the loss itself, with gradients that are not finite if it is not.

    A squared error may overflow while its gradient does not: the step would be taken. No value is
    read back from the device, and a finite loss multiplies the gradients by exactly 1.
    """
    return loss * (loss.detach() * 0 + 1)


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, without gradients, and back."""
    was_training = module.training
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        module.train(was_training)


def autocast(
    config: RunConfig, device: torch.device
) -> contextlib.AbstractContextManager[Any]:
    """Compute in bf16 if the run does so by autocast."""
    if config.engine.precision != "autocast":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)
