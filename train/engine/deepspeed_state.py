"""DeepSpeed's training state by parameter name, at every ZeRO stage. The only file that knows its
internals.

Checked on the versions in `CHECKED_VERSIONS` (tests/numerics/test_engine_state.py says so and fails
on another). DeepSpeed's `safe_get_full_*` and `safe_set_*` do the work; four things around them are
not part of its interface:

1. The fp32 weights are copied into the module *before* `deepspeed.initialize`, or frozen tensors
stay fresh.
2. Optimizer state does not exist before the first step: it is made here, one entry a flat
partition.
3. ZeRO 1 and 2 link optimizer state to parameters once, after the step of the *first* parameter
   group; the other groups stay unlinked. They are linked again before every export and import.
4. `safe_set_*` change the fp32 masters only; the working weights are refreshed from them at the
end.

ZeRO 3 cuts parameters into padded pieces, and `safe_set_full_*` fails if a size does not divide
by the world: here the padded piece of this rank is set instead.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from train.engine.named_state import (
    MOMENTS,
    WEIGHT,
    NamedState,
    PlainState,
    make_moments,
    read_adam_step,
    set_adam_step,
)

CHECKED_VERSIONS = ("0.19.8",)
"""DeepSpeed releases on which the tests of this file pass."""
_SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def deepspeed_state(engine: Any, module: nn.Module) -> NamedState:
    """Choose how the state of an engine is reached.

    Args:
        engine: what deepspeed.initialize returned.
        module: the unwrapped model.

    Returns:
        Its state by parameter name.
    """
    optimizer = engine.optimizer
    trained = {
        name: parameter
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    }
    if isinstance(
        optimizer, torch.optim.Optimizer
    ):  # stage 0 with fp32 weights: DeepSpeed does not wrap it
        return PlainState(masters=trained, working=trained, optimizer=optimizer)
    if hasattr(
        optimizer, "fp32_groups"
    ):  # stage 0 with low-precision weights: one fp32 copy a parameter
        masters = _match_masters(optimizer, trained)
        # DeepSpeed takes a step with zero gradients to allocate state; it counts in Adam's bias
        # correction.
        optimizer.optimizer.state.clear()
        return PlainState(
            masters=masters, working=trained, optimizer=optimizer.optimizer
        )
    return _FlatState(optimizer, trained)


def _match_masters(
    optimizer: Any, trained: dict[str, nn.Parameter]
) -> dict[str, Tensor]:
    master_of = {
        id(low): high
        for lows, highs in zip(
            optimizer.fp16_groups, optimizer.fp32_groups, strict=True
        )
        for low, high in zip(lows, highs, strict=True)
    }
    return {name: master_of[id(parameter)] for name, parameter in trained.items()}


class _FlatState(NamedState):
    """State in flat fp32 partitions: ZeRO 1, 2 and 3, and the bf16 optimizer with fp32
    accumulation."""

    def __init__(self, optimizer: Any, trained: dict[str, nn.Parameter]) -> None:
        self._zero = optimizer
        self._inner: torch.optim.Optimizer = optimizer.optimizer
        self._trained = trained
        self._sharded_weights = hasattr(optimizer, "fp32_partitioned_groups_flat")

    def _flat_partitions(self) -> list[Tensor]:
        for attribute in (
            "fp32_partitioned_groups_flat",
            "single_partition_of_fp32_groups",
        ):
            if hasattr(self._zero, attribute):
                return list(getattr(self._zero, attribute))
        return list(self._zero.fp32_groups_flat_partition)

    def prepare(self) -> None:
        """Make the state of every flat partition and link it to the parameters."""
        group = self._inner.param_groups[0]
        for partition in self._flat_partitions():
            make_moments(self._inner, partition, group)
        if not self._sharded_weights:
            self._zero._hp_optimizer_states_linked = False
            self._zero._lazy_init_hp_params_optimizer_state()

    def read(self, name: str) -> dict[str, Tensor]:
        """Gather from all ranks."""
        from deepspeed.utils import (
            safe_get_full_fp32_param,
            safe_get_full_optimizer_state,
        )

        parameter = self._trained[name]
        tensors = {WEIGHT: safe_get_full_fp32_param(parameter)}
        for kind in MOMENTS:
            tensors[kind] = safe_get_full_optimizer_state(parameter, kind)
        return tensors

    def write(self, name: str, kind: str, value: Tensor) -> None:
        """Keep this rank's share."""
        if self._sharded_weights:
            self._write_piece(self._trained[name], kind, value)
            return
        from deepspeed.utils import (
            safe_set_full_fp32_param,
            safe_set_full_optimizer_state,
        )

        if kind == WEIGHT:
            safe_set_full_fp32_param(self._trained[name], value)
        else:
            safe_set_full_optimizer_state(self._trained[name], value, kind)

    def _write_piece(self, parameter: Any, kind: str, value: Tensor) -> None:
        from deepspeed.utils import (
            safe_set_local_fp32_param,
            safe_set_local_optimizer_state,
        )

        length = parameter.ds_tensor.numel()
        start = self._zero._get_param_partition_rank(parameter) * length
        piece = torch.zeros(length, dtype=value.dtype)
        real = value.flatten()[start : start + length]
        piece[: real.numel()] = real
        if kind == WEIGHT:
            safe_set_local_fp32_param(parameter, piece)
        else:
            safe_set_local_optimizer_state(parameter, piece, kind)

    def finish_write(self, adam_step: int) -> None:
        """Set the step count and copy the masters, rounded, to the weights of the forward pass."""
        set_adam_step(self._inner, adam_step)
        if not self._sharded_weights:
            self._zero.update_lp_params()
            return
        for number in range(len(self._flat_partitions())):
            self._zero._reassign_or_swap_out_partitioned_parameters(number)
        persistent = self._zero.persistent_parameters
        if persistent:  # small parameters stay whole on every rank between steps
            persistent[0].partition(persistent)
            persistent[0].all_gather(persistent)

    def adam_step(self) -> int:
        """Return the step count."""
        return read_adam_step(self._inner)


def _dynamic_scaler(engine: Any) -> Any | None:
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    return scaler if getattr(scaler, "dynamic", False) else None


def keep_going_at_lowest_scale(engine: Any) -> None:
    """Skip steps at the lowest loss scale too: DeepSpeed ends the program there, without a rank or
    a sample's name."""
    scaler = _dynamic_scaler(engine)
    if scaler is not None:
        scaler.raise_error_at_min_scale = False


def is_above_floor(engine: Any) -> bool:
    """Tell whether the loss scaler can still go down; False if the loss is not scaled."""
    scaler = _dynamic_scaler(engine)
    return scaler is not None and bool(scaler.cur_scale > scaler.min_scale)


def read_loss_scaler(engine: Any) -> dict[str, Any]:
    """Return the dynamic loss scaler's state; empty if the loss is not scaled."""
    scaler = _dynamic_scaler(engine)
    if scaler is None:
        return {}
    return {
        name: getattr(scaler, name) for name in _SCALER_FIELDS if hasattr(scaler, name)
    }


def write_loss_scaler(engine: Any, state: dict[str, Any]) -> None:
    """Put a loss scaler's state back; one of a run in another precision is left aside."""
    scaler = _dynamic_scaler(engine)
    if scaler is not None:
        for name, value in state.items():
            setattr(scaler, name, value)
