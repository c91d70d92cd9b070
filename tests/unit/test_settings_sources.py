"""What a file, the command line and the environment give is used, or refused by name."""

from __future__ import annotations

import json
import os
import pwd
from pathlib import Path

import pytest

from pipeline.errors import ConfigError
from train.config import RunConfig
from train.settings.command_line import parse_command, parse_run
from train.settings.layers import setting_types
from train.settings.text import to_toml

ALONE: dict[str, str] = {"PATH": ""}
DATA = ("--data.train", "shards")


def parse(*words: str, env: dict[str, str] | None = None) -> RunConfig:
    # First, so that a file or a later word may give the data.
    given = [] if any("data.train" in word for word in words) else DATA
    return parse_run(["demo", *given, *words], env=env or ALONE)


def problems_of(*words: str, env: dict[str, str] | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(*words, env=env)
    return str(caught.value)


def write(folder: Path, text: str, name: str = "run.toml") -> str:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


# ------------------------------------------------------------------------------------------- files


def test_all_files_are_read_in_their_order(tmp_path: Path) -> None:
    first = write(
        tmp_path, "[optim]\nbeta1 = 0.5\nbeta2 = 0.5\nweight_decay = 0.5\n", "a.toml"
    )
    second = write(tmp_path, "[optim]\nbeta1 = 0.6\nbeta2 = 0.6\n", "b.toml")
    config = parse("--config", first, "--optim.beta2", "0.7", f"--config={second}")
    assert (config.optim.beta1, config.optim.beta2, config.optim.weight_decay) == (
        0.6,
        0.7,
        0.5,
    )
    config = parse("--config", second, "--config", first)
    assert config.optim.beta1 == 0.5


def test_a_later_file_replaces_the_other_one_of_a_pair(tmp_path: Path) -> None:
    first = write(
        tmp_path, "[train]\nepochs = 3\n[optim]\nwarmup_epochs = 1\n", "a.toml"
    )
    second = write(tmp_path, "[train]\nsteps = 30\n", "b.toml")
    config = parse("--config", first, "--config", second)
    assert (config.train.steps, config.train.epochs) == (30, None)
    assert config.optim.warmup_epochs == 1


def test_the_mistakes_of_every_file_are_told(tmp_path: Path) -> None:
    first = write(tmp_path, "[optim]\nbeta7 = 1\n", "a.toml")
    second = write(tmp_path, "[optim]\nbeta8 = 1\n", "b.toml")
    text = problems_of(
        "--config", first, "--config", second, "--config", "/nowhere/c.toml"
    )
    for part in (
        "optim.beta7 in",
        "a.toml",
        "optim.beta8 in",
        "b.toml",
        "/nowhere/c.toml: no such",
    ):
        assert part in text


@pytest.mark.parametrize(
    "text",
    [
        "[optim]\nbase_lr = 0.1\nbase-lr = 0.2\n",
        "optim.base_lr = 0.1\n[optim-x]\n[view]\n[log]\n".replace("[optim-x]\n", "")
        + "[guard]\nskipped-in-a-row = 2\nskipped_in_a_row = 2\n",
        '"optim.base_lr" = 0.1\n[optim]\nbase_lr = 0.2\n',
    ],
)
def test_two_spellings_of_one_setting_are_refused(text: str, tmp_path: Path) -> None:
    said = problems_of("--config", write(tmp_path, text))
    assert "twice, as" in said
    assert "keep one" in said


def test_a_byte_order_mark_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_bytes(b"\xef\xbb\xbf[optim]\r\nbeta1 = 0.5\r\n")
    assert parse("--config", str(path)).optim.beta1 == 0.5


def test_files_that_cannot_be_read_are_told(tmp_path: Path) -> None:
    latin = tmp_path / "latin.toml"
    latin.write_bytes(b'[run]\nname = "\xe4"\n')
    wide = tmp_path / "wide.toml"
    wide.write_bytes("[run]\n".encode("utf-16"))
    deep = write(tmp_path, f"x = {'[' * 5000}{']' * 5000}", "deep.toml")
    for path, part in (
        (str(latin), "not in UTF-8"),
        (str(wide), "not in UTF-8"),
        (deep, "cannot be read"),
        (str(tmp_path), "cannot be read"),
        ("~nosuchuser/run.toml", "no user called 'nosuchuser'"),
    ):
        assert part in problems_of(f"--config={path}"), path


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("train.seed = true", "a whole number, not true or false"),
        ("train.seed = 1.0", "a whole number, not a number with a point"),
        ('train.seed = "3"', "a whole number: write it without quotes"),
        ("engine.zero_stage = true", "a whole number, not true or false"),
        ("engine.zero_stage = 1.0", "a whole number, not a number with a point"),
        ('engine.zero_stage = "1"', "write it without quotes"),
        ("optim.base_lr = true", "a number, not true or false"),
        ('optim.base_lr = "1e-3"', "a number: write it without quotes"),
        ("model.norm_pix_loss = 1", "expected true or false"),
        ('model.norm_pix_loss = "false"', "true or false: write it without quotes"),
        ("run.name = 3", "expected text in quotes"),
        ("run.name = true", "expected text in quotes"),
        ("model.image_size = [64, true]", "not true or false"),
        ("model.image_size = [64.0, 64]", "not a number with a point"),
        ('model.image_size = "64"', "write it without quotes"),
        ("train.epochs = true", "a number, not true or false"),
    ],
)
def test_a_value_of_another_type_is_refused(
    line: str, expected: str, tmp_path: Path
) -> None:
    said = problems_of("--config", write(tmp_path, line))
    assert said.startswith(line.partition(" ")[0])
    assert "run.toml" in said
    assert expected in said


def test_what_a_file_may_write_is_read(tmp_path: Path) -> None:
    text = """
    optim.base_lr = 1
    optim.min_lr = 0
    model.image_size = [96, 64]
    model.norm_pix_loss = true
    run.name = "3"
    train.epochs = 3
    optim.warmup_epochs = 1
    """
    config = parse("--config", write(tmp_path, text))
    assert config.optim.base_lr == 1.0
    assert config.model.image_size == (96, 64)
    assert config.run.name == "3"


def test_a_file_cannot_choose_the_recipe_but_may_name_it(tmp_path: Path) -> None:
    path = write(tmp_path, 'recipe = "mae_vit_b_16"\n')
    assert "first word of the command line" in problems_of("--config", path)
    assert parse("--config", write(tmp_path, 'recipe = "demo"\n')).recipe == "demo"


def test_empty_tables_are_told_unless_they_are_sections(tmp_path: Path) -> None:
    assert parse("--config", write(tmp_path, "[optim]\n[engine]\n")).recipe == "demo"
    assert "optimm" in problems_of("--config", write(tmp_path, "[optimm]\n"))


@pytest.mark.parametrize(
    "name", ["🙂", "\x7f", 'a"b\\c', "two\nlines\ttab", "é\u2028", "\u0000"]
)
def test_names_of_any_letters_survive_the_written_settings(
    name: str, tmp_path: Path
) -> None:
    config = parse("--run.name", name)
    again = parse("--config", write(tmp_path, to_toml(config)))
    assert again == config


def test_numbers_of_any_size_survive_the_written_settings(tmp_path: Path) -> None:
    words = (
        "--optim.grad-clip",
        "1e9",
        "--optim.eps",
        "1e-30",
        "--train.seed",
        str(2**63 - 1),
    )
    config = parse(*words, "--optim.base-lr", "1e22")
    assert parse("--config", write(tmp_path, to_toml(config))) == config


def test_flags_take_no_value() -> None:
    assert "--dry-run takes no value" in problems_of("--dry-run=false")


# --------------------------------------------------------------------------------------------- home

PATHS = ("run.dir", "data.train", "data.val", "checkpoint.dir", "loader.tuning_file")
MORE_PATHS = ("loader.cache_dir", "log.mlflow_uri")
NO_PATHS = {"run.name", "log.wandb_project", "log.mlflow_experiment", "resume.accept"}


def value_of(config: RunConfig, name: str) -> str:
    section, _, field = name.partition(".")
    return getattr(getattr(config, section), field)


def test_every_text_is_a_path_or_known_not_to_be_one() -> None:
    texts = {name for name, kind in setting_types().items() if kind is str}
    assert texts - NO_PATHS == {*PATHS, *MORE_PATHS}


@pytest.mark.parametrize("name", [*PATHS, *MORE_PATHS])
def test_the_home_folder_is_expanded_once_in_every_path(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    me = pwd.getpwuid(os.getuid())
    file = write(tmp_path, f'{name} = "~/x/~y"\n')
    for words in ((f"--{name}=~/x/~y",), (f"--{name}", "~/x/~y")):
        assert value_of(parse(*words, "--dry-run"), name) == f"{tmp_path}/x/~y", words
    for path in (file, "~/run.toml"):
        # Not through `parse`, whose own data.train would win over the file's.
        config = parse_run(["demo", f"--config={path}", "--dry-run"], env=ALONE)
        assert value_of(config, name) == f"{tmp_path}/x/~y"
    assert (
        value_of(parse(f"--{name}=~{me.pw_name}/x", "--dry-run"), name)
        == f"{me.pw_dir}/x"
    )
    assert value_of(parse(f"--{name}=a/~/x", "--dry-run"), name) == "a/~/x"
    said = problems_of(f"--{name}=~nosuchuser/x")
    assert said.startswith(f"{name} = '~nosuchuser/x' (from command line)")
    assert "no user called 'nosuchuser'" in said


def test_object_storage_has_no_home() -> None:
    assert parse("--checkpoint.dir=s3://bucket/~x").checkpoint.dir == "s3://bucket/~x"


@pytest.mark.parametrize("name", ["run.dir", "loader.cache_dir", "loader.tuning_file"])
@pytest.mark.parametrize("value", ["s3://bucket/run", "file:///tmp/run"])
def test_a_local_path_is_not_a_uri(name: str, value: str) -> None:
    assert "a local path was expected" in problems_of(f"--{name}={value}")


def test_no_path_holds_control_characters(tmp_path: Path) -> None:
    path = write(tmp_path, f"run.dir = {json.dumps(chr(0) + 'x')}\n")
    assert "control characters" in problems_of("--config", path)


# -------------------------------------------------------------------------------------- environment


@pytest.mark.parametrize(
    ("env", "named"),
    [
        ({"WORLD_SIZE": "3"}, "WORLD_SIZE in the environment"),
        ({"SLURM_STEP_NUM_TASKS": "3"}, "SLURM_STEP_NUM_TASKS in the environment"),
        ({"OMPI_COMM_WORLD_SIZE": "3"}, "OMPI_COMM_WORLD_SIZE in the environment"),
    ],
)
def test_the_variable_that_says_how_many_ranks_is_named(
    env: dict[str, str], named: str
) -> None:
    said = problems_of(env={**ALONE, **env})
    assert "x 3 ranks" in said
    assert f"3 ranks: {named}" in said


def test_a_world_size_that_no_launcher_has_set_is_refused_at_a_start(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from train import pretrain

    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    words = ["demo", "--data.train", str(tmp_path), "--run.dir", str(tmp_path / "run")]
    assert pretrain.main(words) == 2
    assert "WORLD_SIZE is 2 but RANK is not set" in capsys.readouterr().err
    # A dry run may be of a run for another machine.
    assert (
        parse_command([*words, "--dry-run"], env={"WORLD_SIZE": "2"}).action
        == "dry-run"
    )
