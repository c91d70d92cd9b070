"""The engine in plain torch, which the others are tested against."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from train.config import RunConfig
from train.engine.base import Engine, autocast, evaluating, poisoned_if_not_finite
from train.engine.named_state import PlainState
from train.engine.optim import build_optimizer, set_lr
from train.process.world import World


class TorchEngine(Engine):
    """One process, plain torch: the reference."""

    def __init__(self, *, model: nn.Module, config: RunConfig, world: World) -> None:
        super().__init__(model=model, config=config, world=world)
        self._module = model
        self._optimizer = build_optimizer(model, config.optim, device=world.device)
        trained = {
            name: parameter
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }
        self._trained = list(trained.values())
        # Masters and working weights are the same tensors: `autocast` keeps the weights in fp32.
        self._state = PlainState(
            masters=trained, working=trained, optimizer=self._optimizer
        )
        self._grad_norm: float | None = None
        self._skipped_steps = 0
        if config.engine.compile == "on":
            model.compile()

    @property
    def module(self) -> nn.Module:
        """The model."""
        return self._module

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """AdamW's groups."""
        return self._optimizer.param_groups

    @property
    def skipped_steps(self) -> int:
        """Steps without an update."""
        return self._skipped_steps

    def forward_backward(self, *inputs: Tensor) -> Tensor:
        """Run one micro-batch."""
        self._module.train()
        with autocast(self.config, self.device):
            loss: Tensor = self._module(*inputs).loss
        torch.autograd.backward(poisoned_if_not_finite(loss) / self.grad_accum_steps)
        self._micro_batches += 1
        return loss.detach()

    def step(self, lr: float) -> None:
        """Take one step."""
        self._check_micro_batches()
        set_lr(self.param_groups, lr)
        # With an infinite limit the same call measures the norm and clips by a factor of 1.
        limit = self.config.optim.grad_clip or float("inf")
        norm = nn.utils.clip_grad_norm_(self._trained, limit)
        self._grad_norm = float(norm)
        if torch.isfinite(torch.tensor(self._grad_norm)):
            self._optimizer.step()
        else:
            self._grad_norm = float("inf")
            self._skipped_steps += 1
        self._optimizer.zero_grad(set_to_none=True)

    def grad_norm(self) -> float | None:
        """Return the last step's norm."""
        return self._grad_norm

    @contextlib.contextmanager
    def eval_context(self) -> Iterator[nn.Module]:
        """Give the model in eval mode."""
        with evaluating(self._module), autocast(self.config, self.device):
            yield self._module
