"""One rank of the engine tests: runs a list of cases in one process, because starting one takes
seconds.

Usage: engine_worker.py CASES.json OUT, with the variables of a launcher or without. Each case
trains a tiny model on fixed images and leaves its losses, hashes and whatever it was asked for in
OUT/<rank>.json.

Shapes: B images, C channels, H height, W width, N patches.
"""

from __future__ import annotations

import json
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from model.config import ModelConfig
from model.objectives.mae import MAEOutput, MaskedAutoencoder
from train.checkpoint.store import CheckpointStore
from train.config import RunConfig
from train.engine.base import Engine
from train.engine.build import build_engine
from train.engine.optim import lr_at
from train.process.world import World, init_world

GLOBAL_BATCH_SIZE = 8
TINY = ModelConfig(
    image_size=16,
    patch_size=4,
    embed_dim=32,
    depth=2,
    num_heads=2,
    decoder_embed_dim=16,
    decoder_depth=1,
    decoder_num_heads=2,
)


class OddModel(MaskedAutoencoder):
    """A tiny MAE with what usually breaks sharding: an odd-sized parameter, frozen tables, a saved
    buffer."""

    def __init__(self) -> None:
        super().__init__(TINY)
        self.gain = nn.Parameter(torch.zeros(3, 1, 1))
        self.register_buffer("offset", torch.full((1,), 0.25))

    def forward(self, images_BCHW: Tensor, noise_BN: Tensor) -> MAEOutput:  # type: ignore[override]
        offset = self.get_buffer("offset")
        return super().forward(images_BCHW * (1 + self.gain) + offset, noise_BN)


def build_model(seed: int = 0) -> OddModel:
    torch.manual_seed(seed)
    return OddModel()


def make_config(case: dict[str, Any], *, world: World) -> RunConfig:
    accumulate = case.get("grad_accum_steps", 1)
    return RunConfig.model_validate(
        {
            "train": {
                "steps": 20,
                "global_batch_size": GLOBAL_BATCH_SIZE,
                "micro_batch_size": GLOBAL_BATCH_SIZE
                // (accumulate * world.world_size),
            },
            "optim": {
                "base_lr": 0.064,
                "warmup_steps": 2,
                "warmup_epochs": None,
                **case.get("optim", {}),
            },
            "engine": {
                "zero_stage": case.get("zero_stage", 1),
                "precision": case.get("precision", "fp32"),
                "kind": case.get("kind", "deepspeed"),
                "activation_checkpointing": case.get(
                    "activation_checkpointing", "none"
                ),
                "decoder_activation_checkpointing": case.get(
                    "activation_checkpointing", "none"
                ),
                "compile": case.get("compile", "off"),
                "offload_optimizer": case.get("offload_optimizer", "none"),
            },
        }
    )


def batch_of(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    images_BCHW = torch.randn(GLOBAL_BATCH_SIZE, 3, 16, 16, generator=generator)
    return images_BCHW, torch.rand(GLOBAL_BATCH_SIZE, 16, generator=generator)


def train_step(
    engine: Engine, step: int, *, config: RunConfig, world: World, poison: bool = False
) -> float:
    images_BCHW, noise_BN = batch_of(step)
    if poison:
        images_BCHW[-1] = float("nan")  # the last image falls to the last rank only
    size = config.train.micro_batch_size
    losses = []
    for micro in range(engine.grad_accum_steps):
        start = (micro * world.world_size + world.rank) * size
        part = slice(start, start + size)
        losses.append(
            engine.forward_backward(
                images_BCHW[part].to(world.device), noise_BN[part].to(world.device)
            )
        )
    engine.step(lr_at(step, config=config, steps_per_epoch=10, total_steps=20))
    return world.mean([float(torch.stack(losses).mean())])[0]


def gather_hashes(engine: Engine, *, world: World) -> dict[str, str]:
    exported = engine.export_state()
    mine = {
        f"{name}/{kind}": sha256(value.numpy().tobytes()).hexdigest()
        for name, kinds in exported.tensors.items()
        for kind, value in kinds.items()
    }
    return {name: value for part in world.gather(mine) for name, value in part.items()}


def eval_loss(engine: Engine, *, world: World) -> float:
    images_BCHW, noise_BN = batch_of(9999)
    with engine.eval_context() as module:
        # A rank that runs fewer passes than the others must not make them wait.
        for _ in range(1 + world.rank):
            loss = module(images_BCHW.to(world.device), noise_BN.to(world.device)).loss
        assert not module.training
    return float(loss)


def run_case(case: dict[str, Any], *, world: World) -> dict[str, Any]:
    config = make_config(case, world=world)
    state = None
    if "resume" in case:
        state = CheckpointStore(case["resume"], keep_last=9, keep_every=0).latest(world)
        assert state is not None
    # A resumed run gets other first weights, so that nothing is right by accident.
    engine = build_engine(
        config, model=build_model(seed=7 if state else 0), resume=state, world=world
    )
    first = state.step if state else 0
    result: dict[str, Any] = {"losses": [], "norms": []}
    if case.get("hash_first"):
        result["first_hashes"] = gather_hashes(engine, world=world)
    for step in range(first, first + case["steps"]):
        poison = step in case.get("poison", [])
        result["losses"].append(
            train_step(engine, step, config=config, world=world, poison=poison)
        )
        result["norms"].append(engine.grad_norm())
        if step + 1 in case.get("hash_at", []):
            result.setdefault("hashes_at", {})[str(step + 1)] = gather_hashes(
                engine, world=world
            )
        if case.get("save") and step + 1 == case["save_at"]:
            store = CheckpointStore(case["save"], keep_last=9, keep_every=0)
            store.save(step + 1, engine, {"position": step + 1}, world=world)
    result["skipped_steps"] = engine.skipped_steps
    result["eval_loss"] = eval_loss(engine, world=world)
    result["hashes"] = gather_hashes(engine, world=world)
    if case.get("roll_back"):
        rolled = CheckpointStore(case["roll_back"], keep_last=9, keep_every=0).latest(
            world
        )
        assert rolled is not None
        engine.restore(rolled)
        steps = range(rolled.step, rolled.step + 2)
        result["rolled_back"] = [
            train_step(engine, step, config=config, world=world) for step in steps
        ]
    return result


def main() -> None:
    torch.set_num_threads(1)
    cases = json.loads(Path(sys.argv[1]).read_text())
    world = init_world(RunConfig())
    results = {case["name"]: run_case(case, world=world) for case in cases}
    Path(sys.argv[2]).joinpath(f"{world.rank}.json").write_text(json.dumps(results))
    world.end()


if __name__ == "__main__":
    main()
