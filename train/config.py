"""Settings of a run, one class per section. Imports no torch, so that a mistake is reported before
any process is started."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from model.config import ModelConfig
from pipeline.config import LoaderConfig, OrderConfig, Settings, ViewConfig
from pipeline.options import (
    MAX_TIMEOUT_S,
    BatchSize,
    Count,
    CountOrOff,
    Factor,
    Length,
    LocalText,
    Location,
    Rate,
    Seed,
)

ActivationCheckpointing = Literal["none", "selective", "full"]
PositiveRate = Annotated[float, Field(gt=0, le=1e38)]
"""Up to the largest number of fp32."""
LengthOrNone = Annotated[float, Field(ge=0, le=1e6)]
"""A number of epochs of which 0 means none."""
Decay = Annotated[float, Field(ge=0, le=0.999999)]
"""A decay rate: nearer to 1 the mean does not move within a run, and 1 divides by 0."""
Epsilon = Annotated[float, Field(ge=1e-30, le=1)]
"""Below it the number is 0 in fp32, and a weight without a gradient becomes 0 / 0."""
Timeout = Annotated[float, Field(ge=1, le=MAX_TIMEOUT_S)]
"""Seconds that a step may take; below a second the watchdog ends sound steps of small models."""


class RunSection(Settings):
    """Folder and name of a run."""

    dir: LocalText = ""
    """Local folder for metrics, pictures and status. Empty: `runs/<recipe>`."""
    name: str = ""
    """Name of the run in logs and trackers. Empty: the name of the recipe."""


class DataSection(Settings):
    """Datasets of a run; each is the URI of a folder of shards, e.g. `s3://bucket/imagenet/train`,
    or names shards in one folder, e.g. `data/train-*.tar` or `data/train-{0000..0146}.tar`."""

    train: Location = ""
    """Training shards. Required."""
    val: Location = ""
    """Held-out shards, for pictures and the held-out loss. Empty: draw and measure none."""
    on_change: Literal["refuse", "next-epoch"] = "refuse"
    """What to do if the training shards changed since the run started. `refuse`: stop and list the
    changed shards. `next-epoch`: use the new shards from the next epoch on."""


class TrainSection(Settings):
    """Length of the run, and its batches."""

    steps: Count | None = None
    """Length of the run in optimizer steps. Give either this or `epochs`."""
    epochs: Length | None = None
    """Length of the run in passes over the training data. Give either this or `steps`."""
    global_batch_size: BatchSize = 4096
    """Images per optimizer step, summed over all ranks."""
    micro_batch_size: BatchSize = 64
    """Images per forward pass on one rank. The remaining factor, global_batch_size /
    (micro_batch_size x ranks), becomes gradient accumulation."""
    seed: Seed = 0
    """Seed of every random choice: order, crop boxes, flips, masks, initial weights."""

    @model_validator(mode="after")
    def _one_length(self) -> TrainSection:
        # A source that sets one unsets the other, see `layers.EITHER_OR`: both here is one source.
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of train.steps and train.epochs")
        return self

    def grad_accum_steps(self, *, world_size: int) -> int:
        """Derive the micro-batches a rank accumulates for one optimizer step.

        Raises:
            ValueError: micro_batch_size x world_size does not divide global_batch_size.
        """
        # Uneven shares would weigh images unequally, and ranks would wait for each other forever.
        together = self.micro_batch_size * world_size
        if self.global_batch_size % together:
            raise ValueError(
                f"train.global_batch_size {self.global_batch_size} is not a multiple of "
                "train.micro_batch_size "
                f"{self.micro_batch_size} x {world_size} ranks = {together}: "
                f"use {math.ceil(self.global_batch_size / together) * together}, or another micro "
                "batch"
            )
        return self.global_batch_size // together


class OptimSection(Settings):
    """AdamW with a linear warm-up, then a schedule that is set per step (by default the half cosine
    of He et al. 2022, table 8)."""

    base_lr: PositiveRate = 1.5e-4
    """Peak learning rate per 256 images of the global batch. The rate of a run is base_lr x
    global_batch_size / 256, with the batch size that the run was started with: a later change of
    the batch size leaves the rate as it is."""
    min_lr: Rate = 0.0
    """Learning rate at the last step."""
    schedule: Literal["cosine", "constant_cooldown"] = "cosine"
    """What follows the warm-up. `cosine`: half a cosine from the peak to `min_lr`; its length must
    be known at the start. `constant_cooldown`: the peak, then a straight line to `min_lr` over
    `cooldown_share` of the run; before the cooldown begins, the run can be made longer or shorter
    without a jump of the rate."""
    cooldown_share: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Share of the run's length, at its end, over which `constant_cooldown` lowers the rate.
    `cosine` has no cooldown."""
    warmup_epochs: LengthOrNone | None = 40.0
    """Length of the warm-up in epochs. Give either this or `warmup_steps`."""
    warmup_steps: CountOrOff | None = None
    """Length of the warm-up in steps. Give either this or `warmup_epochs`."""
    beta1: Decay = 0.9
    """Decay rate of AdamW's running mean of the gradient."""
    beta2: Decay = 0.95
    """Decay rate of AdamW's running mean of the squared gradient."""
    eps: Epsilon = 1e-8
    """Number that AdamW adds to its denominator."""
    weight_decay: Rate = 0.05
    """Decoupled weight decay. Applies to tensors with two or more dimensions, so not to biases and
    norms."""
    grad_clip: Factor = 0.0
    """Largest global gradient norm; larger gradients are scaled down to it. 0: no clipping, as in
    the paper."""

    @model_validator(mode="after")
    def _one_warmup(self) -> OptimSection:
        # As for the run's length.
        if (self.warmup_steps is None) == (self.warmup_epochs is None):
            raise ValueError(
                "give exactly one of optim.warmup_epochs and optim.warmup_steps"
            )
        return self


class EngineSection(Settings):
    """How a step is executed. Changes the results by rounding only."""

    kind: Literal["deepspeed", "torch"] = "deepspeed"
    """`deepspeed`: any number of ranks. `torch`: one process in plain torch, in `fp32` or
    `autocast`; the reference that the tests compare with."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """DeepSpeed ZeRO stage, i.e. what is sharded over the ranks. 0: no part. 1: the optimizer
    state. 2: gradients too. 3: weights too."""
    precision: Literal["bf16", "fp16", "fp32", "autocast"] = "bf16"
    """`bf16`, `fp16`: 16-bit weights with an fp32 copy that is optimised. `autocast`: fp32 weights,
    bf16 matrix products. `fp16` needs a GPU and `zero_stage` 1, 2 or 3; `bf16` and `autocast` need
    a CPU or a GPU of compute capability 8.0 or higher."""
    activation_checkpointing: ActivationCheckpointing = "none"
    """Which encoder blocks recompute their activations in the backward pass, to save memory.
    `selective`: every second block. `full`: every block."""
    decoder_activation_checkpointing: ActivationCheckpointing = "none"
    """The same choice for the decoder's blocks."""
    compile: Literal["off", "on"] = "off"
    """`on`: compile the model with torch.compile."""
    offload_optimizer: Literal["none", "cpu"] = "none"
    """`cpu`: keep the optimizer state in host memory. Needs `zero_stage` 1, 2 or 3."""
    offload_parameters: Literal["none", "cpu"] = "none"
    """`cpu`: keep the sharded weights in host memory. Needs `zero_stage` 3."""
    device_memory_gib: Factor = 0.0
    """Memory of one GPU in GiB, for the advice that `--dry-run` gives. 0: ask nvidia-smi."""
    device_tflops: Factor = 0.0
    """Dense 16-bit peak of one GPU in 10^12 operations per second, from which the log computes MFU.
    0: look it up by the device's name."""
    # Also the process groups' patience, times `world.GROUP_PATIENCE`.
    timeout_s: Timeout = 600.0
    """Longest time in seconds that a rank waits for the others, or that one step may take. After
    it the run writes the stacks of all ranks and ends with exit code 76."""


class CheckpointSection(Settings):
    """When and where the state is saved. The same command line resumes from the newest checkpoint
    whose hashes match."""

    dir: Location = ""
    """URI of the folder of checkpoints. Empty: `<run.dir>/checkpoints`."""
    every_steps: Count = 500
    """Steps between two checkpoints. The last step is always saved."""
    keep_last: Count = 3
    """How many of the newest checkpoints to keep."""
    keep_every: CountOrOff = 0
    """Also keep every checkpoint whose step is a multiple of this number. 0: off."""
    mode: Literal["async", "sync"] = "async"
    """`async`: training waits only for the copy to host memory; a thread then hashes, writes and
    uploads. `sync`: training waits for all of it. In both modes a rank keeps its share of the state
    in host memory: 12 bytes per parameter, divided by the number of ranks."""


class GuardSection(Settings):
    """What to do about losses and gradients that are not finite, and about losses that jump."""

    skipped_in_a_row: Count = 5
    """Steps in a row that may be skipped because a loss or gradient is not finite. At this number
    the weights go back to the last checkpoint before those steps, and the data continues after
    them. Steps that the fp16 loss scaler skips count only once its scale has reached its floor."""
    roll_backs: CountOrOff = 3
    """How many times one start of the program may go back before it stops with exit code 5."""
    spike_factor: Factor = 2.0
    """Warn and save an extra checkpoint if the loss of a log line is more than this many times the
    median of the last 20 lines. 0: off."""
    checksum_every_steps: CountOrOff = 1000
    """Steps between two comparisons of the weights of all ranks, which must be equal bit for bit
    (ZeRO 0-2). 0: off."""


class LogSection(Settings):
    """What a run reports, and how often."""

    every_steps: Count = 20
    """Steps between two lines of metrics.jsonl. Only these steps wait for the device."""
    pictures_every_steps: CountOrOff = 0
    """Steps between two reconstruction pictures of the same held-out images. 0: draw them only at
    the end."""
    num_pictures: Annotated[int, Field(ge=0, le=4096)] = 8
    """How many held-out images to draw and measure."""
    tensorboard: Literal["on", "off"] = "on"
    """`on`: write TensorBoard event files to `<run.dir>/tensorboard`."""
    wandb: Literal["on", "off"] = "off"
    """`on`: log to Weights & Biases too (extra `tracking`). With WANDB_MODE=offline in the
    environment the log stays on this machine."""
    wandb_project: str = Field(default="maelstrom", min_length=1)
    """Name of the Weights & Biases project."""
    mlflow: Literal["on", "off"] = "off"
    """`on`: log to MLflow too (extra `tracking`)."""
    mlflow_uri: Location = ""
    """Server or local folder of MLflow. Empty: MLFLOW_TRACKING_URI from the environment, or else
    `<run.dir>/mlruns`."""
    mlflow_experiment: str = Field(default="maelstrom", min_length=1)
    """Name of the MLflow experiment."""


class ResumeSection(Settings):
    """What a start takes over from a checkpoint although its settings differ."""

    accept: str = ""
    """Settings that define the run and whose new values are to be taken at a resume, e.g.
    `optim.base_lr,view.min_area`. What was accepted is written to history.jsonl and into the next
    checkpoints. `train.seed` and `order.*` then apply from the next epoch on."""

    @field_validator("accept", mode="before")
    @classmethod
    def _join(cls, value: Any) -> Any:
        # A list is the natural form in a TOML file.
        if isinstance(value, list | tuple) and all(
            isinstance(name, str) for name in value
        ):
            return ",".join(value)
        return value


class RunConfig(Settings):
    """Everything that defines a pre-training run."""

    # Not a section: it is the first word of the command line, and no file may set it.
    recipe: str = "custom"
    """Name of the recipe these settings came from."""
    run: RunSection = RunSection()
    data: DataSection = DataSection()
    model: ModelConfig = ModelConfig()
    view: ViewConfig = ViewConfig()
    order: OrderConfig = OrderConfig()
    loader: LoaderConfig = LoaderConfig()
    optim: OptimSection = OptimSection()
    train: TrainSection = TrainSection(epochs=800)
    engine: EngineSection = EngineSection()
    checkpoint: CheckpointSection = CheckpointSection()
    resume: ResumeSection = ResumeSection()
    guard: GuardSection = GuardSection()
    log: LogSection = LogSection()

    @property
    def run_dir(self) -> str:
        """Local folder of this run."""
        return self.run.dir or f"runs/{self.recipe}"

    @property
    def checkpoint_dir(self) -> str:
        """URI of the folder of checkpoints."""
        return self.checkpoint.dir or f"{self.run_dir}/checkpoints"
