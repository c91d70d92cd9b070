"""Notices the files in which Hugging Face's image folders keep labels and captions."""

from __future__ import annotations

from pipeline import storage

METADATA_FILES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
"""Names that the format `imagefolder` of Hugging Face's datasets knows."""


def metadata_notes(uri: str) -> list[str]:
    """Return a note for each metadata file of a folder: that it is not read here, and how it is.

    Args:
        uri: Folder of images.
    """
    notes: list[str] = []
    # Looked up by name: the folder itself may hold millions of files.
    for name in METADATA_FILES:
        file = storage.join(uri, name)
        if storage.exists(file):
            shown = storage.redact(file)
            notes.append(
                f"{shown} lies beside the images and is not read. To take images and labels from "
                "it, give the file itself as the source."
            )
    return notes
