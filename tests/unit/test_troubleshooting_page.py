"""docs/troubleshooting.md quotes messages that the program has, and explains every exit code."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from pipeline import console, errors
from train import errors as train_errors
from train.config import RunConfig
from train.settings.layers import setting_types

REPOSITORY = Path(__file__).resolve().parents[2]
PAGE = (REPOSITORY / "docs/troubleshooting.md").read_text()


def texts_of_source() -> str:
    """Give every string of the program, a blank in place of what is filled in."""
    texts = []
    for folder in ("pipeline", "model", "train"):
        for path in (REPOSITORY / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.JoinedStr):
                    parts = [
                        part.value if isinstance(part, ast.Constant) else "\0"
                        for part in node.values
                    ]
                    texts.append("".join(map(str, parts)))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    texts.append(node.value)
    return "\n".join(texts)


def quoted_messages() -> list[str]:
    """Give the quotations in the first column of the tables of messages."""
    sections = re.split(r"^## ", PAGE, flags=re.MULTILINE)
    rows = [
        line
        for section in sections
        if re.match(r"\d", section)
        for line in section.splitlines()
        if line.startswith("| `")
    ]
    return [
        quote for row in rows for quote in re.findall(r"`([^`]+)`", row.split("|")[1])
    ]


def test_every_quoted_message_is_one_of_the_program() -> None:
    source = texts_of_source()
    quotes = quoted_messages()
    assert len(quotes) > 40
    assert [quote for quote in quotes if quote not in source] == []


def test_every_exit_code_is_explained() -> None:
    codes = {
        kind.exit_code
        for module in (errors, train_errors)
        for kind in vars(module).values()
        if isinstance(kind, type) and issubclass(kind, errors.MaelstromError)
    }
    explained = {
        int(code) for code in re.findall(r"^\| \[?(\d+)\b", PAGE, re.MULTILINE)
    }
    assert codes | {0, console.EXIT_INTERRUPTED} <= explained


def test_settings_that_are_named_exist() -> None:
    sections = "|".join(name for name in RunConfig.model_fields if name != "recipe")
    named = set(re.findall(rf"`(?:--)?((?:{sections})\.[a-z_-]+)", PAGE))
    known = {name.replace("_", "-") for name in setting_types()}
    modules = {"train.evaluate", "train.step-bench", "train.pretrain"}
    assert {name.replace("_", "-") for name in named} - known - modules == set()
