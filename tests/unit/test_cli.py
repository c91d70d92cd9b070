"""The command line of a run: precedence, checks, messages, exit codes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from model.config import SIZES
from model.flops import train_flops
from pipeline.errors import ConfigError
from tests.limits import HANG_S
from train.recipes import RECIPES
from train.settings.command_line import HelpRequested, parse_command, parse_run
from train.settings.text import to_toml

DATA = ("--data.train", "shards")
ALONE: dict[str, str] = {"PATH": ""}


def parse(*words: str, env: dict[str, str] | None = None):
    return parse_run([*words], env=env or ALONE)


def problems_of(*words: str, env: dict[str, str] | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(*words, env=env)
    return str(caught.value)


# ------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize(
    ("words", "section", "field", "expected"),
    [
        (("--train.global-batch-size", "8192"), "train", "global_batch_size", 8192),
        (("--train.global_batch_size=8192",), "train", "global_batch_size", 8192),
        (("--optim.base-lr", "1e-3"), "optim", "base_lr", 1e-3),
        (("--engine.zero-stage", "3"), "engine", "zero_stage", 3),
        (("--engine.offload-optimizer", "none"), "engine", "offload_optimizer", "none"),
        (("--model.norm-pix-loss", "false"), "model", "norm_pix_loss", False),
        (("--model.norm-pix-loss",), "model", "norm_pix_loss", True),
        (("--model.no-norm-pix-loss",), "model", "norm_pix_loss", False),
        (("--model.image-size", "224x448"), "model", "image_size", (224, 448)),
        (("--model.image-size", "192,96"), "model", "image_size", (192, 96)),
        (("--model.image-size", "[192, 96]"), "model", "image_size", (192, 96)),
        (
            ("--checkpoint.dir", "s3://bucket/a=b"),
            "checkpoint",
            "dir",
            "s3://bucket/a=b",
        ),
        (("--checkpoint.dir=s3://bucket/a=b",), "checkpoint", "dir", "s3://bucket/a=b"),
        (("--run.name", ""), "run", "name", ""),
    ],
)
def test_a_setting_is_read_in_every_spelling(words, section, field, expected):
    config = parse("mae_vit_b_16", *DATA, *words)
    assert getattr(getattr(config, section), field) == expected


def test_a_negative_number_is_a_value_and_not_an_option():
    assert "optim.base_lr" in problems_of("demo", *DATA, "--optim.base-lr", "-1")


def test_the_launchers_own_argument_is_passed_over():
    config = parse(
        "--local_rank=1",
        "demo",
        "--local_rank",
        "0",
        *DATA,
        "--train.seed",
        "7",
        "--local-rank",
        "3",
    )
    assert config.train.seed == 7


def test_command_line_beats_file_beats_recipe(tmp_path: Path):
    file = tmp_path / "run.toml"
    file.write_text(
        '[optim]\nbase_lr = 0.5\nbeta1 = 0.8\n[data]\ntrain = "from-file"\n'
    )
    config = parse("demo", "--config", str(file), "--optim.beta1", "0.7")
    assert config.optim.base_lr == 0.5
    assert config.optim.beta1 == 0.7
    assert config.data.train == "from-file"
    assert config.optim.warmup_steps == RECIPES["demo"]["optim"]["warmup_steps"]


def test_giving_epochs_replaces_the_recipes_steps_and_the_other_way_round():
    config = parse("demo", *DATA, "--train.epochs", "3", "--optim.warmup-epochs", "1")
    assert (config.train.epochs, config.train.steps) == (3, None)
    assert (config.optim.warmup_epochs, config.optim.warmup_steps) == (1, None)
    config = parse("mae_vit_b_16", *DATA, "--train.steps", "100")
    assert (config.train.epochs, config.train.steps) == (None, 100)


def test_the_views_size_follows_the_models():
    config = parse("demo", *DATA, "--model.image-size", "96x64")
    assert (config.view.height, config.view.width) == (96, 64)
    text = problems_of("demo", *DATA, "--view.height", "224")
    assert "view.height" in text
    assert "64 x 64" in text


# ----------------------------------------------------------------------------------------- mistakes


def test_all_mistakes_of_all_sources_come_at_once(tmp_path: Path):
    file = tmp_path / "run.toml"
    file.write_text("[optim]\nbase_lrr = 1\neps = -1\n[nonsense]\nx = 1\n")
    text = problems_of(
        "demo",
        *(
            "--config",
            str(file),
            "--engine.zero-stage",
            "7",
            "--model.image-size",
            "65",
            "--optim.beta9",
            "1",
        ),
        *("--train.micro-batch-size", "48", "stray"),
    )
    for part in (
        "optim.base_lrr in",
        "did you mean optim.base_lr",
        "optim.eps = -1",
        "nonsense.x",
        "engine.zero_stage = '7'",
        "image_size 65",
        "--optim.beta9",
        "train.global_batch_size 64 is not a multiple",
        "'stray'",
        "data.train is not set",
    ):
        assert part in text, part
    assert text.startswith("9 mistakes")


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("--train.global-batchsize", "train.global_batch_size"),
        ("--global-batch-size", "train.global_batch_size"),
        ("--optim.mask-ratio", "model.mask_ratio"),
        ("--checkpoint.every-step", "checkpoint.every_steps"),
    ],
)
def test_an_unknown_setting_names_the_nearest(word, meant):
    text = problems_of("demo", *DATA, word, "1")
    assert "unknown setting" in text
    assert f"did you mean {meant}" in text


def test_an_unknown_recipe_names_the_nearest():
    assert "did you mean mae_vit_l_16" in problems_of("mae_vit_l16", *DATA)
    assert "no recipe given" in problems_of(*DATA)


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (
            ("--train.steps", "5", "--train.epochs", "5"),
            "exactly one of train.steps and train.epochs",
        ),
        (
            ("--train.steps", "60", "--optim.warmup-steps", "60"),
            "optim.warmup_steps 60",
        ),
        (("--train.steps",), "--train.steps needs a value"),
        (("--config",), "--config needs the path"),
        (("--config", "/nowhere/run.toml"), "no such file"),
        (("--engine.offload-parameters", "cpu"), "needs engine.zero_stage 3"),
        (
            ("--engine.kind", "torch", "--engine.precision", "bf16"),
            "not engine.precision bf16",
        ),
        (
            ("--engine.precision", "fp16", "--engine.zero-stage", "0"),
            "does not scale its loss",
        ),
        (("--model.mask-ratio", "1"), "model.mask_ratio"),
        (("--train.steps", "many"), "train.steps = 'many' (from command line)"),
    ],
)
def test_what_cannot_work_is_refused_with_its_name(words, part):
    assert part in problems_of("demo", *DATA, *words)


def test_what_a_device_cannot_do_is_an_error_of_a_run_and_a_note_of_a_dry_run():
    here = {"CUDA_VISIBLE_DEVICES": ""}
    assert "fp16 needs a GPU" in problems_of(
        "demo", *DATA, "--engine.precision", "fp16", env=here
    )
    done = command("demo", "--engine.precision", "fp16", "--dry-run", **here)
    assert done.returncode == 0, done.stderr
    assert "# not on this machine: engine.precision fp16 needs a GPU" in done.stdout


def test_batch_and_ranks_must_fit():
    sizes = ("--train.global-batch-size", "128", "--train.micro-batch-size", "32")
    text = problems_of("demo", *DATA, *sizes, env={"WORLD_SIZE": "3"})
    assert "x 3 ranks" in text
    assert "use 192" in text
    assert (
        parse("demo", *DATA, *sizes, env={"WORLD_SIZE": "2"}).train.global_batch_size
        == 128
    )


def test_a_file_that_is_no_toml_is_named(tmp_path: Path):
    file = tmp_path / "run.toml"
    file.write_text("[optim\n")
    assert "not TOML" in problems_of("demo", *DATA, "--config", str(file))


# --------------------------------------------------------------------------------------------- text


@pytest.mark.parametrize("recipe", list(RECIPES))
def test_the_printed_settings_read_back_to_the_same_run(recipe: str, tmp_path: Path):
    config = parse(recipe, *DATA, "--run.name", 'quotes " and \\ and ü')
    file = tmp_path / "run.toml"
    file.write_text(to_toml(config), encoding="utf-8")
    assert parse(recipe, "--config", str(file)) == config
    other = "mae_vit_b_16" if recipe == "demo" else "demo"
    again = parse(other, "--config", str(file))
    assert again.model_copy(update={"recipe": recipe}) == config


def test_help_names_settings_units_and_the_recipes_defaults():
    with pytest.raises(HelpRequested) as caught:
        parse_command(["mae_vit_l_16", "--help"])
    text = str(caught.value)
    for part in (
        "--train.global-batch-size",
        "--optim.base-lr",
        "per 256 images",
        "--checkpoint.every-steps",
        "GiB",
    ):
        assert part in text
    assert re.search(
        r"--model.embed-dim INT\s+Width of the encoder[^()]*\(default:\s+1024\)",
        text,
        re.DOTALL,
    )  # ViT-L's width


def test_recipes_are_those_of_the_paper():
    for name, size in (
        ("mae_vit_b_16", "vit_b_16"),
        ("mae_vit_l_16", "vit_l_16"),
        ("mae_vit_h_14", "vit_h_14"),
    ):
        config = parse(name, *DATA)
        assert config.model == SIZES[size].model_copy(update={"norm_pix_loss": True})
        assert (config.train.epochs, config.train.global_batch_size) == (800, 4096)
        optim = config.optim
        assert (
            optim.base_lr,
            optim.warmup_epochs,
            optim.weight_decay,
            optim.grad_clip,
        ) == (
            1.5e-4,
            40,
            0.05,
            0,
        )
        assert (optim.beta1, optim.beta2, optim.min_lr) == (0.9, 0.95, 0)
        view = config.view
        assert (
            view.min_area,
            view.max_area,
            view.flip_probability,
            view.interpolation,
        ) == (
            0.2,
            1.0,
            0.5,
            "bicubic",
        )


# -------------------------------------------------------------------------------------- the command


def command(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-m", "train.pretrain", *words]
    return subprocess.run(
        program,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=HANG_S,
        check=False,
    )


def test_mistakes_end_the_command_with_code_2_and_one_message():
    done = command("demo", "--optim.base-lrr", "1", "--train.micro-batch-size", "48")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: 3 mistakes in the settings:")
    assert "Traceback" not in done.stderr
    silent = command("demo", "--optim.base-lrr", "1", RANK="1", WORLD_SIZE="2")
    assert (silent.returncode, silent.stderr) == (2, "")


def test_a_mistake_is_found_without_torch():
    source = (
        "import sys, train.pretrain as p\n"
        "code = p.main(['demo', '--nothing', '1'])\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
        "sys.exit(code)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", source],
        capture_output=True,
        text=True,
        timeout=HANG_S,
        check=False,
    )
    assert done.returncode == 2, done.stderr


def test_a_dry_run_prints_settings_and_size_and_writes_nothing(tmp_path: Path):
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "train.pretrain",
            "mae_vit_l_16",
            "--dry-run",
            "--run.dir",
            str(tmp_path / "run"),
        ],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=HANG_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "base_lr = 0.00015" in done.stdout
    assert "329,541,888" in done.stdout
    assert f"{train_flops(SIZES['vit_l_16']) / 1e9:.1f} GFLOP" in done.stdout
    assert list(tmp_path.iterdir()) == []
