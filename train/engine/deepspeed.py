"""The engine on DeepSpeed.

deepspeed is imported only inside functions: importing this file stays cheap.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import os
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from train.config import RunConfig
from train.engine.base import Engine, autocast, evaluating, poisoned_if_not_finite
from train.engine.deepspeed_config import render_deepspeed_config
from train.engine.deepspeed_state import (
    deepspeed_state,
    is_above_floor,
    keep_going_at_lowest_scale,
    read_loss_scaler,
    write_loss_scaler,
)
from train.engine.optim import build_optimizer, set_lr
from train.process.world import World


class DeepSpeedEngine(Engine):
    """DeepSpeed at ZeRO 0 to 3.

    Args:
        model: the unwrapped model with its first or saved weights; sharded in place at stage 3.
        config: settings of the run.
        world: the processes of the run.
    """

    def __init__(self, *, model: nn.Module, config: RunConfig, world: World) -> None:
        super().__init__(model=model, config=config, world=world)
        deepspeed = _import_deepspeed()
        stage = config.engine.zero_stage
        # ZeRO 3 shards the model in place; evaluation then runs on a plain copy that is filled when
        # needed.
        self._twin = None
        if stage == 3:
            self._twin = _empty_copy(model)
        device = _optimizer_device(config, world)
        optimizer = build_optimizer(model, config.optim, device=device)
        rendered = render_deepspeed_config(config, world_size=world.world_size)
        # It prints lines about memory, which the output of --json must not hold.
        with contextlib.redirect_stdout(io.StringIO()):
            initialized = deepspeed.initialize(
                model=model, optimizer=optimizer, config=rendered
            )
        self._engine = initialized[0]
        self._module = model
        # Without a wrapper around the optimizer DeepSpeed does not look for gradients that are not
        # finite.
        self._checks_itself = isinstance(self._engine.optimizer, torch.optim.Optimizer)
        self._skipped_by_us = 0
        self._own_norm: float | None = None
        self._state = deepspeed_state(self._engine, model)
        keep_going_at_lowest_scale(self._engine)
        if config.engine.compile == "on":
            self._engine.compile()

    @property
    def module(self) -> nn.Module:
        """The model."""
        return self._module

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Groups of the inner AdamW; what wraps it hands them through."""
        groups: list[dict[str, Any]] = self._engine.optimizer.param_groups
        return groups

    @property
    def skipped_steps(self) -> int:
        """Steps without an update."""
        return int(self._engine.skipped_steps) + self._skipped_by_us

    @property
    def loss_scale(self) -> float:
        """The loss scaler's factor."""
        # Without a scaler the loss is taken as it is.
        scale = getattr(self._engine.optimizer, "loss_scale", 1.0)
        return float(scale)

    @property
    def searches_loss_scale(self) -> bool:
        """Whether the dynamic scaler is above its floor."""
        return is_above_floor(self._engine)

    def forward_backward(self, *inputs: Tensor) -> Tensor:
        """Run one micro-batch."""
        self._engine.train()
        output = self._engine(*inputs)
        loss: Tensor = output.loss
        checked = poisoned_if_not_finite(loss)
        self._engine.backward(checked)
        self._micro_batches += 1
        # Before the last micro-batch this only moves DeepSpeed's count of them on; on the last one
        # it would take the step, which is for `step` to do.
        if self._micro_batches < self.grad_accum_steps:
            self._engine.step()
        return loss.detach()

    def step(self, lr: float) -> None:
        """Take one step."""
        self._check_micro_batches()
        set_lr(self.param_groups, lr)
        if self._checks_itself:
            self._check_gradients()
        self._engine.step()

    def _check_gradients(self) -> None:
        trained = list(self._module.parameters())
        gradients = [
            parameter.grad for parameter in trained if parameter.grad is not None
        ]
        norm = nn.utils.get_total_norm(gradients)
        if torch.isfinite(norm):
            self._own_norm = float(norm)
            return
        # One value for all kinds of not finite.
        self._own_norm = float("inf")
        self._skipped_by_us += 1
        # AdamW passes over parameters without a gradient: DeepSpeed's step changes no weight.
        for parameter in trained:
            parameter.grad = None

    def grad_norm(self) -> float | None:
        """Return the last step's norm."""
        if self._checks_itself:
            return self._own_norm
        norm = self._engine.get_global_grad_norm()
        # Before the first step there is none.
        if norm is None:
            return None
        return float(norm)

    @contextlib.contextmanager
    def eval_context(self) -> Iterator[nn.Module]:
        """Give the model, or at stage 3 a gathered copy of it."""
        module = self._module
        if self._twin is not None:
            module = self._gather_twin()
        try:
            with evaluating(module), autocast(self.config, self.device):
                yield module
        finally:
            if self._twin is not None:
                self._twin = _empty_copy(self._twin)

    def _gather_twin(self) -> nn.Module:
        import deepspeed

        assert self._twin is not None
        twin = self._twin.to_empty(device=self.device)
        twins = twin.state_dict(keep_vars=True)
        with torch.no_grad():
            for name, parameter in self._module.named_parameters():
                with deepspeed.zero.GatheredParameters([parameter]):
                    twins[name].data = parameter.detach().clone()
            # Buffers are not sharded.
            for name, buffer in self._module.named_buffers():
                own_buffer = twin.get_buffer(name)
                own_buffer.data = buffer.detach().clone()
        return twin

    def _loss_scaler(self) -> dict[str, Any]:
        return read_loss_scaler(self._engine)

    def _restore_loss_scaler(self, state: dict[str, Any]) -> None:
        write_loss_scaler(self._engine, state)


def _empty_copy(model: nn.Module) -> nn.Module:
    """Copy a model's structure without its weights."""
    # Tensors are replaced while copying, so that no second set of weights is ever held.
    tensors = [*model.parameters(), *model.buffers()]
    memo: dict[int, Any] = {}
    for tensor in tensors:
        empty = torch.empty_like(tensor, device="meta")
        if isinstance(tensor, nn.Parameter):
            empty = nn.Parameter(empty, requires_grad=False)
        memo[id(tensor)] = empty
    return copy.deepcopy(model, memo)


def _import_deepspeed() -> Any:
    """Import DeepSpeed without its start-up costs: no log lines, no compiler."""
    accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    os.environ.setdefault("DS_ACCELERATOR", accelerator)
    import deepspeed
    from deepspeed.ops import __compatible_ops__
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    # DeepSpeed calls two functions by names that torch 2.13 is about to retire; a user can do
    # nothing about it.
    warnings.filterwarnings(
        "ignore", r".*(all_gather_into_tensor|reduce_scatter_tensor).*", FutureWarning
    )
    # A shared-memory all-reduce that only inference uses. Loading it compiles for half a minute if
    # it is not prebuilt, and every process that is killed would leave 69 MB in /dev/shm.
    __compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _optimizer_device(config: RunConfig, world: World) -> torch.device:
    if config.engine.offload_optimizer == "cpu":
        return torch.device("cpu")
    return world.device
