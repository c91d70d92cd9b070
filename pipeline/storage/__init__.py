"""The only door to local disks and object storage: URIs, ranged reads, retries, atomic writes,
redaction."""

from pipeline.storage.door import (
    exists,
    is_folder,
    is_local,
    list_files,
    local_path,
    size_of,
)
from pipeline.storage.hidden import is_hidden
from pipeline.storage.local import FileInfo, OtherEntry
from pipeline.storage.patterns import (
    absolute_named,
    find_named,
    find_one,
    folder_of,
    names_several,
)
from pipeline.storage.reads import (
    open_read,
    read_bytes,
    read_twice,
    read_view,
    reader_below,
)
from pipeline.storage.uri import cache_home, expand_home, join, name_of, redact
from pipeline.storage.writes import (
    delete,
    make_folder,
    put_file,
    put_if_absent,
    write_atomic,
)

__all__ = [
    "FileInfo",
    "OtherEntry",
    "absolute_named",
    "cache_home",
    "delete",
    "exists",
    "expand_home",
    "find_named",
    "find_one",
    "folder_of",
    "is_folder",
    "is_hidden",
    "is_local",
    "join",
    "list_files",
    "local_path",
    "make_folder",
    "name_of",
    "names_several",
    "open_read",
    "put_file",
    "put_if_absent",
    "read_bytes",
    "read_twice",
    "read_view",
    "reader_below",
    "redact",
    "size_of",
    "write_atomic",
]
