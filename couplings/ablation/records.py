"""The JSONL file of an ablation: a line for every finished cell, whatever happens to the process that writes it.

A line is given to the system before the next cell is waited for, so that a killed process loses nothing; it is not
forced onto the disk, which can take longer than the cell.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

__all__ = ["Log", "read_records"]

Record = dict[str, Any]


def read_records(path: Path) -> tuple[list[Record], int]:
    """Read the whole lines of a JSONL file.

    Parameters
    ----------
    path : Path

    Returns
    -------
    list of dict, int
        The records, and how many bytes they take: what follows is a line that was cut off.

    Raises
    ------
    ValueError
        If a line is no JSON object.
    """
    records, size = [], 0
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
        if not line.endswith(b"\n"):
            break  # its writer was killed
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict):
            msg = f"{path}, line {number}: not a JSON object. Is it a file of records?"
            raise ValueError(msg)
        records.append(record)
        size += len(line)
    return records, size


class Log:
    """Records that are appended to a file one by one.

    Parameters
    ----------
    path : Path
        Need not exist. A line that was cut off is removed.
    restart : bool
        Drop what is there.

    Raises
    ------
    RuntimeError
        If another process writes to it.
    ValueError
        If it holds something else.
    """

    def __init__(self, path: Path, *, restart: bool = False) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: IO[bytes] = path.open("ab")
        try:
            _lock(self._file, path)
            self.records, size = ([], 0) if restart else read_records(path)
            self._file.truncate(size)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Log:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()

    def add(self, record: Mapping[str, Any]) -> None:
        """Append a record."""
        self.records.append(dict(record))
        self._file.write(json.dumps(record, allow_nan=False).encode() + b"\n")
        self._file.flush()


def _lock(file: IO[bytes], path: Path) -> None:
    """Hold the file until this process ends, however it ends; where the system has no such locks, do not."""
    try:
        import fcntl
    except ImportError:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        msg = f"{path}: another process is writing to it. Wait for it, or choose another file."
        raise RuntimeError(msg) from error
