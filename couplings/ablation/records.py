"""The JSONL file of an ablation: a line for every finished measurement, whatever happens to the process that writes it.

A line is given to the system before the next measurement is waited for, so that a killed process loses nothing; it is
not forced onto the disk, which can take longer than the measurement.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from couplings._files import locked
from couplings.ablation.grid import Point

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Log", "cells", "read_lines", "read_records"]

Record = dict[str, Any]


def read_records(paths: Iterable[Path]) -> pd.DataFrame:
    """Read files of records into one table.

    Returns
    -------
    DataFrame
        A row for each record, in the order of the files; a column for each field, None where a record has no such
        field. Columns hold objects: lists, dictionaries and whole numbers stay what they are.
    """
    import pandas as pd

    records = [record for path in paths for record in read_lines(path)[0]]
    fields = dict.fromkeys(field for record in records for field in record)
    return pd.DataFrame({field: [record.get(field) for record in records] for field in fields}, dtype=object)


def cells(records: pd.DataFrame) -> pd.DataFrame:
    """Put the quality and the time of each cell beside each other.

    Parameters
    ----------
    records : DataFrame
        From `read_records`.

    Returns
    -------
    DataFrame
        A row for each cell of the grid (each seed is one): the fields of `Point`, ``label`` (the method with its
        options), ``title``, and the fields of the last quality and the last time on record; None or NaN where there are
        none.
    """
    import pandas as pd

    latest: dict[str, dict[str, Record]] = {}
    for record in records.to_dict("records"):
        if record["task"] in ("quality", "time"):
            latest.setdefault(Point.from_dict(record).key, {})[record["task"]] = record
    rows = []
    for measured in latest.values():
        point = Point.from_dict(next(iter(measured.values())))
        row = {**point.to_dict(), "label": point.label, "title": point.title, "skipped": None, "error": None}
        for record in measured.values():
            row |= {field: value for field, value in record.items() if value is not None}
        rows.append(row)
    return pd.DataFrame(rows).drop(columns=["task", "run"], errors="ignore")


def read_lines(path: Path) -> tuple[list[Record], int]:
    """Read the whole lines of a JSONL file.

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
            if not locked(self._file):
                msg = f"{path}: another process is writing to it. Wait for it, or choose another file."
                raise RuntimeError(msg)
            self.records, size = ([], 0) if restart else read_lines(path)
            self._file.truncate(size)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, record: Mapping[str, Any]) -> None:
        """Append a record."""
        self.records.append(dict(record))
        self._file.write(json.dumps(record, allow_nan=False).encode() + b"\n")
        self._file.flush()
