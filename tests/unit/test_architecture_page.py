"""docs/architecture.md shows the house as it is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PAGE = (REPOSITORY / "docs/architecture.md").read_text()
PACKAGES = ("pipeline", "model", "train", "deploy")


def tree_of_page() -> set[str]:
    """Give the folders that the drawing of the tree names."""
    drawing = PAGE.split("## The tree")[1].split("```")[1]
    folders, package = set(), ""
    for line in drawing.splitlines():
        found = re.match(r"( *)(\w+)/", line)
        if found and not found[1]:
            package = found[2]
        elif found:
            folders.add(f"{package}/{found[2]}")
    return folders


def test_the_tree_names_every_folder() -> None:
    real = {
        str(folder.parent.relative_to(REPOSITORY))
        for package in PACKAGES
        for folder in (REPOSITORY / package).glob("*/__init__.py")
    }
    assert tree_of_page() == real


def test_every_file_that_is_named_exists() -> None:
    named = set(
        re.findall(r"`((?:pipeline|model|train|deploy|docs|tests)/[\w/.-]+)`", PAGE)
    )
    assert len(named) > 12
    missing = [path for path in sorted(named) if not (REPOSITORY / path).exists()]
    assert [path for path in missing if "NAME" not in path] == []


@pytest.mark.parametrize("package", ["pipeline", "train", "model"])
def test_the_floors_name_every_part_of_a_package(package: str) -> None:
    table = PAGE.split("## Layers")[1].split("## ")[0]
    column = ["pipeline", "train", "model"].index(package) + 2
    cells = [
        row.split("|")[column] for row in table.splitlines() if re.match(r"\| \d", row)
    ]
    named = set(re.findall(r"`(\w+)`", " ".join(cells)))
    parts = {
        path.stem if path.is_file() else path.name
        for path in (REPOSITORY / package).iterdir()
        if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    if package == "train":  # the table says "commands" for them
        parts -= {path.stem for path in (REPOSITORY / package).glob("*.py")} | {"demo"}
        parts |= {"config", "recipes", "errors"}
    assert named == parts - {"__init__"}


def test_the_types_on_the_arrows_exist() -> None:
    drawing = PAGE.split("## The data path")[1].split("```")[1]
    types = {"Listing", "ShardTable", "Manifest", "Order", "RankBatch", "SampleSource"}
    types |= {
        "Encoded",
        "Decoder",
        "Decoded",
        "DeviceCopier",
        "Batch",
        "Engine",
        "ExportedState",
    }
    types |= {"CheckpointStore", "ShardReader", "Sampling", "Objective"}
    source = "\n".join(
        path.read_text()
        for package in ("pipeline", "train")
        for path in (REPOSITORY / package).rglob("*.py")
    )
    for name in types:
        assert re.search(rf"\b{name}\b", drawing), name
        assert re.search(rf"^class {name}\b", source, re.MULTILINE), name
