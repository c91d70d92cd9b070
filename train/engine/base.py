"""What every engine is, and the one in plain torch that the others are tested against.

Shapes: B images, C channels, H height, W width, N patches.
"""

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
    NamedState,
    Place,
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
    return (copied.clone() if copied.data_ptr() == tensor.data_ptr() else copied).contiguous()


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
        self.grad_accum_steps = config.train.grad_accum_steps(world_size=world.world_size)
        self.table = list_tensors(model, parts=world.world_size)
        trained = {tensor.name for tensor in self.table if tensor.trained}
        # Frozen tensors never change, but the engine rounds its own to the precision of the run.
        self._fixed = {
            n: t.detach().float().cpu().clone()
            for n, t in model.state_dict().items()
            if n not in trained
        }
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
        """Whether a skipped step is no fault, but the loss scaler on its way down to a scale that
        fits."""
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
        it together where a gradient is not finite on any.

        Args:
            lr: learning rate of every parameter group.
        """

    @abstractmethod
    def grad_norm(self) -> float | None:
        """Return the global gradient norm of the last step, before clipping; `inf` where the step
        was skipped, None before the first."""

    @abstractmethod
    def eval_context(self) -> contextlib.AbstractContextManager[nn.Module]:
        """Give the model for forward passes without gradients. All ranks enter and leave together;
        between, each may run as many passes as it likes."""

    def export_state(self, place: Place = copy_to_host) -> ExportedState:
        """Copy this rank's share of the training state to host memory. All ranks call it together.

        Args:
            place: where to; must copy, because training goes on while the copies are written.

        Returns:
            Whole fp32 tensors by name and kind, for the names that fall to this rank, and the
            scalars.
        """
        self._state.prepare()
        scalars = {"adam_step": self._state.adam_step(), "loss_scaler": self._loss_scaler()}
        exported = ExportedState(scalars=scalars, table=self.table)
        for tensor in self.table:
            mine = tensor.part == self.world.rank
            if not tensor.trained:
                if mine:
                    exported.tensors[tensor.name] = {
                        WEIGHT: place(tensor.name, WEIGHT, self._fixed[tensor.name])
                    }
                continue
            whole = self._state.read(
                tensor.name
            )  # a collective: every rank takes part in every name
            if mine:
                exported.tensors[tensor.name] = {
                    kind: place(tensor.name, kind, value) for kind, value in whole.items()
                }
        if self.device.type == "cuda":
            torch.cuda.current_stream(
                self.device
            ).synchronize()  # copies to pinned memory have only been queued
        return exported

    def restore(self, source: StateSource) -> None:
        """Take over saved weights, moments and counters in place, also to roll back. All ranks call
        it together.

        Args:
            source: a checkpoint of the same model, at any world size, stage and precision.

        Raises:
            CheckpointError: it is of another model.
        """
        check_same_model(source.table, self.table, where=getattr(source, "uri", "checkpoint"))
        self._state.prepare()
        for tensor in self.table:
            if tensor.trained:
                for kind in tensor.kinds:
                    self._state.write(tensor.name, kind, source.tensor(tensor.name, kind))
        self._state.finish_write(int(source.engine.get("adam_step", 0)))
        self._restore_loss_scaler(dict(source.engine.get("loss_scaler", {})))

    def _loss_scaler(self) -> dict[str, Any]:
        return {}

    def _restore_loss_scaler(self, state: dict[str, Any]) -> None:
        del state  # nothing scales the loss unless an engine says so

    def _check_micro_batches(self) -> None:
        if self._micro_batches != self.grad_accum_steps:
            raise RuntimeError(
                f"step() after {self._micro_batches} micro-batches, expected grad_accum_steps "
                f"{self.grad_accum_steps}"
            )
        self._micro_batches = 0


def poisoned_if_not_finite(loss: Tensor) -> Tensor:
    """Give the loss itself, with gradients that are not finite where it is not.

    A squared error may overflow while its gradient does not: the step would be taken. Nothing is
    read back from the device, and where the loss is finite the gradients are multiplied by exactly
    1.
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


def autocast(config: RunConfig, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Compute in bf16 where the run does so by autocast."""
    if config.engine.precision != "autocast":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)
