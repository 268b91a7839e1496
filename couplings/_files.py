"""Files that appear complete or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

__all__ = ["check_target", "written_atomically"]


def check_target(path: Path, *, force: bool) -> None:
    """Raise an OSError if the folder does not exist, or the file does and `force` is not set."""
    if path.is_dir():
        msg = f"{path}: this is a folder; name a file in it."
        raise IsADirectoryError(msg)
    if not path.parent.is_dir():
        msg = f"{path}: the folder {path.parent} does not exist. Make it first."
        raise FileNotFoundError(msg)
    if path.exists() and not force:
        msg = f"{path} exists. Choose another name, or pass --force to overwrite it."
        raise FileExistsError(msg)


@contextmanager
def written_atomically(path: Path, *, force: bool) -> Iterator[IO[bytes]]:
    """Open a file beside `path` that takes its place once it is complete and on disk, as far as `force` allows."""
    target = path.resolve()  # a link is followed, not replaced
    partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
    try:
        with partial.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        check_target(path, force=force)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
