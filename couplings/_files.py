"""Files that appear complete or not at all."""

from __future__ import annotations

import glob
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

__all__ = ["check_target", "locked", "written_atomically"]


def check_target(path: Path, *, force: bool) -> None:
    """Raise an OSError if a file cannot be written there, or is there and `force` is not set."""
    _check_free(path, force=force)
    with _naming(path):
        partial, file = _opened_beside(path.resolve())
    file.close()
    partial.unlink(missing_ok=True)


def _check_free(path: Path, *, force: bool) -> None:
    if path.is_dir():
        msg = f"{path}: this is a folder; name a file in it."
        raise IsADirectoryError(msg)
    if not path.parent.is_dir():
        msg = f"{path}: the folder {path.parent} does not exist. Make it first."
        raise FileNotFoundError(msg)
    if path.exists() and not force:
        msg = f"{path} exists. Choose another name, or pass --force to overwrite it."
        raise FileExistsError(msg)


def locked(file: IO[bytes], *, wait: bool = False) -> bool:
    """Lock a file until it is closed or its process ends, however it ends; return whether that could be done.

    It cannot if another has locked it, unless that is waited for. A system without such locks locks nothing.
    """
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def written_atomically(path: Path, *, force: bool) -> Iterator[IO[bytes]]:
    """Open a file beside `path` that takes its place once it is complete and on disk, as far as `force` allows."""
    _check_free(path, force=force)
    target = path.resolve()  # a link is followed, not replaced
    _remove_remains(target)
    with _naming(path):
        partial, file = _opened_beside(target)
    try:
        with file:
            yield file
            with _naming(path):
                file.flush()
                os.fsync(file.fileno())
            if os.name == "nt":  # where no open file can be moved
                file.close()
            _check_free(path, force=force)
            with _naming(path):
                _put_in_place(partial, target, force=force)  # while it is locked: nobody takes it for remains
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Name the path as it was given in errors of the system, instead of the file beside it."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def _put_in_place(partial: Path, target: Path, *, force: bool) -> None:
    """Give a file its name; without `force` only if nobody has taken that name, at this very moment."""
    if not force:
        try:
            os.link(partial, target)
        except FileExistsError:
            raise
        except OSError:  # a file system without hard links
            pass
        else:
            return
    partial.replace(target)


def _opened_beside(target: Path) -> tuple[Path, IO[bytes]]:
    """Open a new file, locked for as long as it is written."""
    while True:
        partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
        file = partial.open("xb")
        with suppress(OSError):  # a file system without locks
            locked(file, wait=True)
        if partial.exists():
            return partial, file
        file.close()  # it was taken for remains before it was locked


def _remove_remains(target: Path) -> None:
    """Remove what processes left that were killed while they wrote: nobody has it locked."""
    for partial in target.parent.glob(f".{glob.escape(target.name)}.*.part"):
        with suppress(OSError), partial.open("rb") as file:
            if locked(file):
                partial.unlink()
