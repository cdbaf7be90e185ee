"""Files that are replaced as a whole: whenever that is cut short, the old one is there, or the new one."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

TEMPORARY = ".quarot-"  # what the names of files begin with that are not in their places yet


def write_text(path: Path, text: str) -> None:
    """Replace a file by another text, in one step."""
    handle, temporary = tempfile.mkstemp(prefix=TEMPORARY, dir=path.parent)
    with open(handle, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    put_in_place(temporary, path)
    sync_folder(path.parent)


def put_in_place(temporary: str, path: Path) -> None:
    """Give a temporary file its name, and the permissions of a file that was made in the usual way."""
    umask = os.umask(0)
    os.umask(umask)
    os.chmod(temporary, 0o666 & ~umask)
    os.replace(temporary, path)


def sync_folder(folder: Path) -> None:
    """Let the names in a folder reach the disk."""
    if os.name == "posix":  # elsewhere a folder cannot be opened
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
