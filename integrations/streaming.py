"""Data sets read from beginning to end, neither held in memory nor stored on disk.

Rows are shuffled within windows of neighbouring rows; where windows begin and how each is shuffled are
functions of (seed, epoch), as all random numbers here are. A step number therefore says where in the
stream a run is, and a resumed run goes on there bit for bit. What it costs:

- Mixing reaches as far as a window. A data set that is sorted by class needs a map-style source.
- The number of rows must be known: a data set says it, or the recipe does.
- Every process reads the whole stream and decodes its own rows; one that resumes passes over what the
  epoch has had already, without decoding it.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from .config import Data, RecipeError
from .data import Batch, DataError, Decoder, Piece, Row, Source, subset


class StreamedImages(Source):
    """Encoded images of a ``datasets.IterableDataset``.

    Parameters
    ----------
    table : datasets.IterableDataset
        Has a column of images and, maybe, one of labels.
    config : Data
        How to cut, scale and shuffle them.
    local : bool
        Whether its rows may be counted by reading all of them.

    Raises
    ------
    RecipeError
        If the number of rows is unknown.
    """

    def __init__(self, table: Any, config: Data, *, local: bool = False) -> None:
        import datasets

        features = table.features or table._resolve_features().features
        self.decoder = Decoder(features, config)
        self.table = table.cast_column(self.decoder.image, datasets.Image(decode=False))
        self.config = config
        rows = self._count(local)
        # As a map-style source chooses them, so that both train on the same rows.
        self.chosen = subset(config, rows).tolist() if config.subset_fraction < 1 else range(rows)
        self.decoder.measure(self._rows(0))
        self.shape, self.classes = self.decoder.shape, self.decoder.classes

    def __len__(self) -> int:
        return len(self.chosen)

    def _count(self, local: bool) -> int:
        if self.config.rows is not None:
            return self.config.rows
        described = (self.table.info.splits or {}).get(str(self.table.split))
        if described is not None and described.num_examples:
            return described.num_examples
        if local:
            return sum(1 for _ in self.table)
        msg = f"data.rows: got null, but {self.config.source} does not say how many rows it has; expected their number"
        raise RecipeError(msg)

    def _rows(self, first: int) -> Iterator[Row]:
        """Yield the chosen rows in the order of the files, beginning with the ``first``-th."""
        number, stream = self.chosen[first], iter(self.table.skip(self.chosen[first]))
        for wanted in self.chosen[first:]:
            try:
                values = next(itertools.islice(stream, wanted - number, None))
            except StopIteration:
                msg = f"data.rows: {self.config.source} ended before its row {wanted}: expected the number of its rows"
                raise DataError(msg) from None
            except (OSError, ValueError) as error:
                msg = f"data.source: cannot read row {wanted} of {self.config.source}: {error}"
                raise DataError(msg) from error
            number = wanted + 1
            yield Row(wanted, values)

    def _windows(self, seed: int, epoch: int, place: int) -> Iterator[tuple[int, list[Row], list[int]]]:
        """Yield the windows of an epoch from the one around ``place`` on: its first place, rows and their order."""
        size, rows = self.config.shuffle_buffer, len(self)
        # The first window has another size in every epoch: neighbours of one border are mixed in the next.
        border = 1 + int(torch.randint(size, (), generator=_generator("border", seed, epoch)))
        borders = [0, *range(border, rows, size), rows]
        stream: Iterator[Row] | None = None
        for first, end in itertools.pairwise(borders):
            if end <= place:
                continue
            stream = stream or self._rows(first)
            order = torch.randperm(end - first, generator=_generator("window", seed, epoch, first))
            yield first, list(itertools.islice(stream, end - first)), order.tolist()

    def _read(self, pieces: Iterable[Piece], seed: int, pool: ThreadPoolExecutor | None) -> Iterator[Batch]:
        epoch, first, window, order = -1, 0, [], []
        for piece in pieces:
            if piece.epoch != epoch:
                epoch, first, window, order = piece.epoch, 0, [], []
                windows = self._windows(seed, epoch, piece.first)
            jobs = []
            for place in range(piece.first, piece.last):
                while place >= first + len(window):
                    first, window, order = next(windows)
                jobs.append((order[place - first], window))
            yield Decoder.collate((pool.map if pool else map)(self._decode, jobs))

    def _decode(self, job: tuple[int, list[Row]]) -> tuple[torch.Tensor, int, list[str]]:
        asked, rows = job
        return self.decoder.decode(asked, rows.__getitem__, len(rows))

    def blocks(self, pieces: Iterable[Piece], seed: int, workers: int = 0, pinned: bool = False) -> Iterator[Batch]:
        """Yield the rows of each piece, shuffled within windows; decoded by ``workers`` threads, ahead of their use."""
        if not workers:
            yield from self._read(pieces, seed, None)
            return
        with ThreadPoolExecutor(workers) as pool:
            for batch in _ahead(self._read(pieces, seed, pool)):
                yield Batch(batch.images.pin_memory(), batch.labels, batch.unreadable) if pinned else batch

    def scan(self, size: int, workers: int = 0) -> Iterator[Batch]:
        """Yield all rows in order, ``size`` at a time, decoded by ``workers`` threads."""
        with ThreadPoolExecutor(max(1, workers)) as pool:
            stream = self._rows(0)
            while rows := list(itertools.islice(stream, size)):
                yield Decoder.collate(pool.map(self._decode, ((place, rows) for place in range(len(rows)))))


def _ahead(batches: Iterator[Batch], count: int = 2) -> Iterator[Batch]:
    """Read up to ``count`` batches before they are asked for, in a thread."""
    with ThreadPoolExecutor(1) as reader:
        pending = deque(reader.submit(next, batches, None) for _ in range(count))
        while (batch := pending.popleft().result()) is not None:
            pending.append(reader.submit(next, batches, None))
            yield batch


def _generator(*key: object) -> torch.Generator:
    digest = hashlib.blake2b(" ".join(map(str, key)).encode(), digest_size=4).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))
