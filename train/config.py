"""Settings of a run, one class a section. Imports no torch: a mistake is reported before anything
is started."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, model_validator

from model.config import ModelConfig
from pipeline.config import LoaderConfig, OrderConfig, Settings, ViewConfig

ActivationCheckpointing = Literal["none", "selective", "full"]


class RunSection(Settings):
    """Where a run keeps what it writes."""

    dir: str = ""
    """Local folder of the run: metrics, pictures, status. Empty: `runs/<recipe>`."""
    name: str = ""
    """Name shown in logs. Empty: the recipe's name."""


class DataSection(Settings):
    """Which datasets a run reads; each is the URI of a folder of shards."""

    train: str = ""
    """Training shards. Required."""
    val: str = ""
    """Held-out shards, for pictures and the held-out loss. Empty: none."""
    on_change: Literal["refuse", "next-epoch"] = "refuse"
    """Where the training shards are not those that the run was started on: stop and name them, or
    go on with them from the next epoch."""


class TrainSection(Settings):
    """How long, and in which batches."""

    steps: int | None = Field(default=None, ge=1)
    """Optimizer steps. Give this or `epochs`."""
    epochs: float | None = Field(default=None, gt=0)
    """Passes over the training data. Give this or `steps`."""
    global_batch_size: int = Field(default=4096, ge=1)
    """Images of one optimizer step, over all ranks."""
    micro_batch_size: int = Field(default=64, ge=1)
    """Images of one forward pass on one rank; the rest is gradient accumulation."""
    seed: int = Field(default=0, ge=0, le=2**63 - 1)
    """Key of every random choice: order, boxes, flips, masks, initial weights."""

    @model_validator(mode="after")
    def _one_length(self) -> TrainSection:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of train.steps and train.epochs")
        return self

    def grad_accum_steps(self, *, world_size: int) -> int:
        """Derive the micro-batches a rank accumulates for one optimizer step.

        Raises:
            ValueError: where micro_batch_size x world_size does not divide global_batch_size.
        """
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
    """AdamW with a linear warm-up and a half-cosine decay, per step (He et al. 2022, table 8)."""

    base_lr: float = Field(default=1.5e-4, gt=0)
    """Learning rate per 256 images of the global batch: lr = base_lr x global_batch_size / 256."""
    min_lr: float = Field(default=0.0, ge=0)
    """Learning rate at the last step."""
    warmup_epochs: float | None = Field(default=40.0, ge=0)
    """Length of the warm-up in epochs. Give this or `warmup_steps`."""
    warmup_steps: int | None = Field(default=None, ge=0)
    """Length of the warm-up in steps. Give this or `warmup_epochs`."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """AdamW's first decay rate."""
    beta2: float = Field(default=0.95, ge=0, lt=1)
    """AdamW's second decay rate."""
    eps: float = Field(default=1e-8, gt=0)
    """AdamW's denominator term."""
    weight_decay: float = Field(default=0.05, ge=0)
    """Decoupled weight decay of tensors with two or more dimensions; none on biases and norms."""
    grad_clip: float = Field(default=0.0, ge=0)
    """Largest global gradient norm; 0 does not clip (the paper's recipe)."""

    @model_validator(mode="after")
    def _one_warmup(self) -> OptimSection:
        if (self.warmup_steps is None) == (self.warmup_epochs is None):
            raise ValueError("give exactly one of optim.warmup_epochs and optim.warmup_steps")
        return self


class EngineSection(Settings):
    """How a step is executed. Never changes what is computed, beyond rounding."""

    kind: Literal["deepspeed", "torch"] = "deepspeed"
    """`torch`: one process, plain torch; the reference that the tests compare with."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """DeepSpeed ZeRO stage: what is sharded over the ranks (1 optimizer state, 2 + gradients, 3 +
    weights)."""
    precision: Literal["bf16", "fp16", "fp32", "autocast"] = "bf16"
    """`bf16`/`fp16`: low-precision weights with fp32 masters. `autocast`: fp32 weights, bf16 matrix
    products."""
    activation_checkpointing: ActivationCheckpointing = "none"
    """Recompute the encoder's activations in the backward pass: none, every second block, or
    all."""
    decoder_activation_checkpointing: ActivationCheckpointing = "none"
    """The same for the decoder."""
    compile: Literal["off", "on"] = "off"
    """Compile the model with torch.compile."""
    offload_optimizer: Literal["none", "cpu"] = "none"
    """Where optimizer state lives (ZeRO 1-3)."""
    offload_parameters: Literal["none", "cpu"] = "none"
    """Where sharded weights live (ZeRO 3)."""
    device_memory_gib: float = Field(default=0.0, ge=0)
    """Memory of one GPU in GiB, for the advice of `--dry-run`; 0: what nvidia-smi says."""
    device_tflops: float = Field(default=0.0, ge=0)
    """Dense 16-bit peak of one GPU in 10^12 operations a second, for the MFU of the log; 0: by the
    device's name."""
    timeout_s: float = Field(default=600.0, gt=0)
    """Seconds a rank waits for the others, or a step may take, before the run ends with the stacks
    of all ranks."""


class CheckpointSection(Settings):
    """When and where the state is saved. The same command line resumes from the newest one that
    verifies."""

    dir: str = ""
    """URI of the folder of checkpoints. Empty: `<run.dir>/checkpoints`."""
    every_steps: int = Field(default=500, ge=1)
    """Steps between checkpoints; the last step is always saved."""
    keep_last: int = Field(default=3, ge=1)
    """Checkpoints kept besides those of `keep_every`."""
    keep_every: int = Field(default=0, ge=0)
    """Keep every checkpoint whose step is a multiple of this; 0 keeps none for that reason."""
    mode: Literal["async", "sync"] = "async"
    """`async`: training waits for the copy to host memory only; hashing, writing and uploading go
    on beside it. `sync`: it waits for all of that. Either way a rank keeps its share of the state
    in host memory: 12 bytes a parameter, divided by the ranks."""


class GuardSection(Settings):
    """What is done about numbers that go wrong."""

    skipped_in_a_row: int = Field(default=5, ge=1)
    """Steps in a row that may be skipped for a loss or gradient that is not finite. Then the
    weights go back to the last checkpoint from before them, and the data goes on behind them. Steps
    that an fp16 loss scaler skips do not count while its scale is above its floor."""
    roll_backs: int = Field(default=3, ge=0)
    """How often one start of the program may go back like that before it stops with exit code 5."""
    spike_factor: float = Field(default=2.0, ge=0)
    """Warn, and save an extra checkpoint, where the loss of a line is this many times the median of
    the last 20 lines; 0 never does."""
    checksum_every_steps: int = Field(default=1000, ge=0)
    """Steps between comparisons of the weights of all ranks (ZeRO 0-2), which must be equal to the
    last bit; 0 never compares."""


class LogSection(Settings):
    """What a run reports, and how often."""

    every_steps: int = Field(default=20, ge=1)
    """Steps between lines of metrics.jsonl and the progress display; the only moments that
    synchronise."""
    pictures_every_steps: int = Field(default=0, ge=0)
    """Steps between reconstruction pictures of the same held-out images; 0 draws them at the end
    only."""
    num_pictures: int = Field(default=8, ge=0)
    """Held-out images that are drawn and measured."""
    tensorboard: Literal["on", "off"] = "on"
    """Write TensorBoard event files into the run folder."""
    wandb: Literal["on", "off"] = "off"
    """Show the run in Weights & Biases (extra `tracking`); WANDB_MODE=offline in the environment
    keeps it local."""
    wandb_project: str = Field(default="maelstrom", min_length=1)
    """Project it is shown in."""
    mlflow: Literal["on", "off"] = "off"
    """Show the run in MLflow (extra `tracking`)."""
    mlflow_uri: str = ""
    """MLflow's server or local folder. Empty: MLFLOW_TRACKING_URI, else `<run.dir>/mlruns`."""
    mlflow_experiment: str = Field(default="maelstrom", min_length=1)
    """Experiment it is shown in."""


class RunConfig(Settings):
    """Everything that defines a pre-training run."""

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
