"""Which names are left behind by operating systems and tools, and are no part of anybody's data."""

from __future__ import annotations

import re

_HIDDEN = re.compile(
    # A leading dot: .DS_Store and ._files of macOS, .git, .ipynb_checkpoints; not `./` itself.
    r"(^|/)("
    r"\.(?!\.?(/|$))|"
    # Folders: macOS archives, Synology and QNAP, the roots of ext4 and of Windows disks.
    r"(__MACOSX|@eaDir|#recycle|@Recycle|lost\+found)(/|$)|"
    r"(\$RECYCLE\.BIN|System Volume Information)(/|$)|"
    # Files that Windows writes into folders of pictures.
    r"(Thumbs\.db|ehthumbs(_vista)?\.db|desktop\.ini)$"
    r")",
    re.IGNORECASE,
)


def is_hidden(name: str) -> bool:
    """Tell whether a file or folder decides nothing: what a folder is, which classes it has.

    Args:
        name: Path below the folder that is looked at, with `/`.
    """
    return _HIDDEN.search(name) is not None
