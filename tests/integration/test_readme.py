"""README.md and the tutorial do what they say: commands exist, the marked ones run, links lead
somewhere.

Each ```bash block is preceded by a comment that says whether it runs here:

    <!-- run: fast -->                     seconds on a CPU
    <!-- run: slow -->                     minutes on a CPU
    <!-- run: slow, 400 -> 4, 40 -> 1 -->  the same, with other numbers than the reader's; a number
                                           may bring settings: 400 -> 4 --train.global-batch-size 4
    <!-- run: no, needs a GPU -->          not run; the reason is required

A block of `make` targets alone needs no comment: its targets must exist. The marked blocks of a
page run in order in one folder that looks like the repository, with photographs in ~/Pictures: a
block may use what an earlier one has made. On the other pages only links, targets and commands are
checked.
"""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import launch
from tests.limits import HANG_S

REPOSITORY = Path(__file__).resolve().parents[2]
RUN_PAGES = ("README.md", "docs/tutorial.md")


@dataclasses.dataclass(frozen=True)
class Block:
    """One fenced block of shell commands."""

    line: int
    text: str
    run: str
    """`fast`, `slow`, `no` or `make`; empty if no valid comment says so."""
    page: str = ""

    def __str__(self) -> str:
        """Give the name of the test."""
        return f"{self.page} line {self.line}".strip()


def extract_blocks(markdown: str, *, page: str = "") -> list[Block]:
    """Find the shell blocks of a page with the comment before each; numbers are exchanged as it
    asks."""
    blocks: list[Block] = []
    comment, fence, start, body = "", "", 0, list[str]()
    for number, line in enumerate(markdown.splitlines(), start=1):
        stripped = line.strip()
        if fence:
            if stripped == fence[: len(fence) - len(fence.lstrip("`"))]:
                if re.fullmatch(r"`{3,}(bash|sh|shell|console)\b.*", fence):
                    text = "\n".join(body) + "\n"
                    run = _mode(comment, text)
                    blocks.append(Block(start, _exchange(comment, text), run, page))
                comment, fence, body = "", "", []
            else:
                body.append(line)
        elif stripped.startswith("```"):
            fence, start = stripped, number
        elif stripped:
            comment = stripped
    return blocks


def _mode(comment: str, text: str) -> str:
    found = re.fullmatch(r"<!-- run: (fast|slow|no)(?:, (\S.*?))? -->", comment)
    if found:
        # `no` needs a reason; the others may only be followed by numbers to exchange.
        valid = (
            bool(found[2])
            if found[1] == "no"
            else _exchanges(found[2] or "") is not None
        )
        return found[1] if valid else ""
    commands = [
        line
        for line in text.splitlines()
        if line.strip() and not line.lstrip().startswith("#")
    ]
    return (
        "make"
        if commands
        and all(re.match(r"(cd |git clone |make )", command) for command in commands)
        else ""
    )


def _exchanges(note: str) -> list[tuple[str, str]] | None:
    """Read `400 -> 4 --some.setting 1, 40 -> 1`; None if it is something else."""
    pattern = r"(\d+) -> (\d+(?: --[\w.-]+ [\w.-]+)*)"
    pairs = [re.fullmatch(pattern, part) for part in note.split(", ") if note]
    return None if None in pairs else [(pair[1], pair[2]) for pair in pairs if pair]


def _exchange(comment: str, text: str) -> str:
    found = re.fullmatch(r"<!-- run: (?:fast|slow), (\S.*?) -->", comment)
    for old, new in (_exchanges(found[1]) or []) if found else []:
        text = re.sub(rf"\b{old}\b", new, text)
    return text


def extract_modules(markdown: str) -> list[str]:
    """Name every command of ours that a page mentions, once."""
    pattern = r"(?:-m|--module)[ =]((?:pipeline|model|train|deploy)(?:\.\w+)+)"
    return sorted(set(re.findall(pattern, markdown)))


def extract_make_targets(markdown: str) -> list[str]:
    """Name every make target that a page mentions in code, once."""
    code = [block.text for block in extract_blocks(markdown)] + re.findall(
        r"`([^`\n]+)`", markdown
    )
    return sorted(
        {
            target
            for text in code
            for target in re.findall(r"(?:^|[|&;] *)make ([a-z][a-z-]*)", text, re.M)
        }
    )


def extract_links(markdown: str) -> list[str]:
    """Name every file of the repository that a page links to, once."""
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)|(?:src|href)=\"([^\"#]+)\"", markdown)
    return sorted({a or b for a, b in targets if not re.match(r"[a-z]+:", a or b)})


def extract_anchors(markdown: str) -> list[tuple[str, str]]:
    """Give every (file, anchor) that a page links to; the file is empty for the page itself."""
    return sorted(set(re.findall(r"\]\(([\w./-]*)#([^)]+)\)", markdown)))


def headings(markdown: str) -> set[str]:
    """Give the anchors of a page's headings, as GitHub names them."""
    outside = re.sub(r"^```.*?^```", "", markdown, flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", outside, re.MULTILINE)
    return {
        re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-")
        for title in titles
    }


PAGES = [
    REPOSITORY / "README.md",
    *sorted((REPOSITORY / "docs").rglob("*.md")),
    REPOSITORY / "CONTRIBUTING.md",
]
PAGE_NAMES = [str(page.relative_to(REPOSITORY)) for page in PAGES]
MODULES = sorted(
    {module for page in PAGES for module in extract_modules(page.read_text())}
)
BLOCKS = [
    block
    for name in RUN_PAGES
    for block in extract_blocks((REPOSITORY / name).read_text(), page=name)
]


# ---------------------------------------------------------------------------------------- the pages


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_every_block_says_whether_it_runs(block: Block) -> None:
    assert block.run, (
        f"{block}: put <!-- run: fast --> or <!-- run: no, reason --> before it"
    )


@pytest.mark.parametrize("page", PAGES, ids=PAGE_NAMES)
def test_make_targets_exist(page: Path) -> None:
    targets = set(
        re.findall(
            r"^([a-z][a-z-]*):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE
        )
    )
    assert not set(extract_make_targets(page.read_text())) - targets


@pytest.mark.parametrize("page", PAGES, ids=PAGE_NAMES)
def test_links_lead_to_files(page: Path) -> None:
    missing = [
        link
        for link in extract_links(page.read_text())
        if not (page.parent / link).exists()
    ]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=PAGE_NAMES)
def test_anchors_lead_to_headings(page: Path) -> None:
    missing = []
    for link, anchor in extract_anchors(page.read_text()):
        target = page.parent / link if link else page
        if anchor not in headings(target.read_text()):
            missing.append(f"{link}#{anchor}")
    assert missing == []


@pytest.mark.parametrize("module", MODULES)
def test_commands_exist_and_explain_themselves(module: str) -> None:
    done = launch.run(["-m", module, "--help"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "usage" in done.stdout.lower()


@pytest.fixture(scope="module")
def checkouts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Give for each page a folder that looks like the repository, where its commands may write."""
    folders = {}
    for page in RUN_PAGES:
        folders[page] = tmp_path_factory.mktemp("checkout")
        for entry in REPOSITORY.iterdir():
            if entry.name not in {"runs", "data", "photos", ".git", ".pytest_cache"}:
                (folders[page] / entry.name).symlink_to(entry)
    return folders


@pytest.fixture(scope="module")
def home(
    make_class_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Give a home folder with photographs in `Pictures`, as the reader has."""
    folder = tmp_path_factory.mktemp("home")
    make_class_folder(num_classes=4, per_class=6, size_px=96, root=folder / "Pictures")
    return folder


@pytest.mark.parametrize(
    "block",
    [
        pytest.param(
            block,
            id=str(block),
            marks=[pytest.mark.slow] if block.run == "slow" else [],
        )
        for block in BLOCKS
        if block.run in ("fast", "slow")
    ],
)
def test_marked_blocks_run(
    block: Block, checkouts: dict[str, Path], home: Path
) -> None:
    done = run_block(block, cwd=checkouts[block.page], home=home)
    assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"


def run_block(
    block: Block, *, cwd: Path, home: Path
) -> subprocess.CompletedProcess[str]:
    """Run a block as a reader would with .venv activated; the first command that fails ends it."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {
        **os.environ,
        "PATH": path,
        "HOME": str(home),
        "XDG_CACHE_HOME": str(home / ".cache"),
    }
    text = "\n".join(line.removeprefix("$ ") for line in block.text.splitlines())
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", text],
        cwd=cwd,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=HANG_S,
    )


# ----------------------------------------------------------------------------------- the extractors

PAGE = """# Title
<!-- run: fast -->
```bash
$ echo one
python -m train.demo --src x   # and `make demo`
```

<!-- run: no, needs a GPU -->

```sh
deepspeed --module train.pretrain vit_b
```
Then, unmarked:
```bash
echo two
```
```bash
make check && make test-unit
```
```python
print("make nothing")
```
<!-- run: no -->
```bash
false
```
See [the notes](docs/notes.md#top),
[a site](https://example.org/x) and <img src="docs/picture.png">.
`torchrun -m train.pretrain` and `make setup`, but never make haste.
"""


def test_blocks_are_found_with_their_modes() -> None:
    blocks = extract_blocks(PAGE)
    assert [block.run for block in blocks] == ["fast", "no", "", "make", ""]
    assert [block.line for block in blocks] == [3, 10, 14, 17, 24]
    assert blocks[0].text.startswith("$ echo one\npython -m train.demo")


def test_a_comment_counts_for_the_next_block_only() -> None:
    assert [
        block.run
        for block in extract_blocks(
            "<!-- run: fast -->\n```bash\na\n```\n```bash\nb\n```\n"
        )
    ] == [
        "fast",
        "",
    ]


def test_numbers_are_exchanged_as_the_comment_asks() -> None:
    command = "run --steps 400 --warm 40 --size 4000"
    (block,) = extract_blocks(
        f"<!-- run: slow, 400 -> 4, 40 -> 1 -->\n```bash\n{command}\n```\n"
    )
    assert (block.run, block.text) == ("slow", "run --steps 4 --warm 1 --size 4000\n")
    comment = "<!-- run: slow, 400 -> 2 --train.batch 4, 40 -> 1 -->"
    (block,) = extract_blocks(f"{comment}\n```bash\n{command}\n```\n")
    assert block.text == "run --steps 2 --train.batch 4 --warm 1 --size 4000\n"


@pytest.mark.parametrize(
    "comment",
    [
        "<!-- run: no -->",
        "<!-- run: maybe -->",
        "<!-- run: fast, soon -->",
        "run: fast",
        "",
    ],
)
def test_a_block_without_a_valid_comment_has_no_mode(comment: str) -> None:
    assert [
        block.run for block in extract_blocks(f"{comment}\n```bash\nls\n```\n")
    ] == [""]


def test_modules_targets_and_links_are_found() -> None:
    assert extract_modules(PAGE) == ["train.demo", "train.pretrain"]
    assert extract_make_targets(PAGE) == ["check", "demo", "setup", "test-unit"]
    assert extract_links(PAGE) == ["docs/notes.md", "docs/picture.png"]
    assert extract_anchors(f"{PAGE} [below](#two)") == [
        ("", "two"),
        ("docs/notes.md", "top"),
    ]
    assert headings("# 3: data\n```\n# no\n```\n### `a.b`\n## One two\n") == {
        "3-data",
        "ab",
        "one-two",
    }


def test_a_block_runs_with_our_python_and_stops_at_the_first_failure(
    tmp_path: Path,
) -> None:
    good = Block(
        line=1,
        text="$ python -c 'import sys; print(sys.executable)'\ntouch made\n",
        run="fast",
    )
    done = run_block(good, cwd=tmp_path, home=tmp_path)
    assert done.returncode == 0
    assert Path(done.stdout.strip()).parent == Path(sys.executable).parent
    assert (tmp_path / "made").exists()
    assert (
        run_block(
            Block(line=1, text="false\ntrue\n", run="fast"), cwd=tmp_path, home=tmp_path
        ).returncode
        == 1
    )
