"""The data rows of a dataset-level coupling: streamed in chunks, measured from their mean, checked once."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from couplings._transfer import to_device
from couplings.inputs import Array

__all__ = ["Copies", "Rows", "hash_rows", "rows_of"]

# Values of a chunk, 16 MB of float32: products of less lose time where threads meet.
_CHUNK_VALUES = 1 << 22
_CHUNK_ROWS = 8192
_CUDA_CHUNKS = 8  # times as large, where every product is a launch
_FREE_MEMORY = 0.5  # of a device, that the rows may fill; larger data is streamed


@dataclass(frozen=True)
class Copies:
    """Which rows equal each other.

    Attributes
    ----------
    order : (n,) int64 Tensor
        All rows, equal ones together and in ascending order.
    begin, size : (n,) int64 Tensor
        Of each row, where in `order` the rows that equal it begin, itself included, and how many they are.
    """

    order: Tensor
    begin: Tensor
    size: Tensor

    @property
    def first(self) -> Tensor:
        """For each row the first that equals it; ``(n,)``."""
        return self.order[self.begin]


class Rows:
    """Rows of a dataset, read chunk by chunk.

    Parameters
    ----------
    data : (N, *shape) Tensor or array
        Floating; a memmap stays on disk.
    device : torch.device or None
        Where to compute; by default where the data is.
    subset : (n,) int64 Tensor or None
        Rows to look at; all by default.
    mirrored : bool
        Whether each row counts flipped along its last axis as well. Row j flipped has the number ``n + j``.

    Attributes
    ----------
    dtype : torch.dtype
        Of rows and scores: float32, or float64 in one dimension.
    mean : (d,) float64 Tensor
    norms : (n,) Tensor
        Distances from the mean; with `mirrored`, of rows and flipped rows together.
    fingerprint : str
        Of shape and values; float16 and float32 copies of the same values share it.
    copies : Copies or None
        None if all rows differ, flipped or not.
    """

    def __init__(
        self,
        data: Array,
        device: torch.device | None = None,
        subset: Tensor | None = None,
        *,
        mirrored: bool = False,
    ) -> None:
        self.data, self._subset, self.mirrored = _checked(data), subset, mirrored
        at = self.data.device if isinstance(self.data, Tensor) else torch.device("cpu")
        self.device = device or at
        self.shape = tuple(data.shape[1:])
        self.dim = math.prod(self.shape)
        self.count = len(data) if subset is None else len(subset)
        values = _CHUNK_VALUES * (_CUDA_CHUNKS if self.device.type == "cuda" else 1)
        self.chunk = min(max(values // self.dim // 256, 1) * 256, _CHUNK_ROWS)
        # On a line the scores of neighbours differ by 1/N^2: less than float32 holds.
        self.dtype = torch.float64 if self.dim == 1 else torch.float32
        self._double = self.dim == 1 or str(data.dtype).endswith("float64")
        self._shift: Tensor | None = None
        self._held: Tensor | None = None
        if self.device.type == "cuda" and at.type != "cuda":
            self._hold()
        self._survey()

    def chunks(self, first: int = 0, last: int | None = None) -> Iterator[tuple[slice, Tensor]]:
        """Read rows `first` to `last`, all by default.

        Yields
        ------
        slice, (c, d) Tensor
            Of `dtype`, less the mean where it is large enough to cost precision.
        """
        for where in self._slices(first, last):
            yield where, self._centred(self._read(where))

    def _slices(self, first: int = 0, last: int | None = None) -> Iterator[slice]:
        last = self.count if last is None else last
        for start in range(first, last, self.chunk):
            yield slice(start, min(start + self.chunk, last))

    def take(self, index: Tensor) -> Tensor:
        """Read some rows; ``(n, d)``, as they are for `chunks`."""
        parts = [self._centred(self._read(part)) for part in torch.split(index % self.count, _CHUNK_ROWS)]
        rows = torch.cat(parts) if parts else torch.empty(0, self.dim, dtype=self.dtype, device=self.device)
        if self.mirrored:
            rows = torch.where((index >= self.count).to(self.device)[:, None], self.flipped(rows), rows)
        return rows

    def flipped(self, rows: Tensor) -> Tensor:
        """Flip rows, of data or of noise, along the last axis of their shape; ``(n, d)``."""
        return rows.reshape(-1, self.shape[-1]).flip(1).view_as(rows)

    def facing(self, index: Tensor, noise: Tensor) -> Tensor:
        """Find the number of each row, or of the flipped row where that is nearer to the noise; ``(n,)`` int64."""
        if not self.mirrored:
            return index
        numbers = []
        for part, z in zip(torch.split(index, _CHUNK_ROWS), torch.split(noise, _CHUNK_ROWS), strict=True):
            turned = torch.linalg.vecdot(self.take(part % self.count), (self.flipped(z) - z).to(self.dtype)) > 0
            numbers.append(part % self.count + self.count * turned.to(part.device))
        return torch.cat(numbers)

    def from_mean(self, rows: Tensor) -> Tensor:
        """Measure rows that were read from the mean, whether or not it was taken off; ``(n, d)`` in their dtype."""
        return rows if self._shift is not None else rows - self.mean.to(rows.dtype)

    def true(self, rows: Tensor) -> Tensor:
        """Undo what was taken off rows that were read; ``(n, d)``."""
        return rows if self._shift is None else (rows.double() + self._shift).to(rows.dtype)

    def _hold(self) -> None:
        """Keep the rows on the device, in the type of the data, if they fit there."""
        size = self.count * self.dim * self.data.itemsize
        if size > _FREE_MEMORY * torch.cuda.mem_get_info(self.device)[0]:
            return
        held = None
        for where in self._slices():
            rows = self._stored(where)
            if held is None:
                held = torch.empty(self.count, self.dim, dtype=rows.dtype, device=self.device)
            held[where] = rows
        self._held = held

    def _read(self, where: slice | Tensor) -> Tensor:
        if self._held is None:
            rows = self._stored(where)
        else:
            rows = self._held[where.to(self.device) if isinstance(where, Tensor) else where]
        return rows if self._double else rows.float()

    def _stored(self, where: slice | Tensor) -> Tensor:
        """Read rows as they are stored; a device copies them from pinned memory, so that the host need not wait."""
        if self._subset is not None:
            where = self._subset[where.cpu() if isinstance(where, Tensor) else where]
        if isinstance(self.data, Tensor):
            rows = self.data[where.to(self.data.device) if isinstance(where, Tensor) else where].detach()
        else:
            # A copy of the chunk: torch would warn of a read-only view.
            part = self.data[where.cpu().numpy() if isinstance(where, Tensor) else where]
            rows = torch.from_numpy(np.array(part, self.data.dtype.newbyteorder("=")))
        return to_device(rows.reshape(len(rows), self.dim), self.device)

    def _centred(self, rows: Tensor) -> Tensor:
        return (rows if self._shift is None else rows - self._shift).to(self.dtype)

    def _survey(self) -> None:
        """Check that all values are finite; find the mean, the norms and the rows that are equal."""
        total = torch.zeros(self.dim, dtype=torch.float64, device=self.device)
        hashes: list[Tensor] = []
        flipped: list[Tensor] = []
        for where in self._slices():
            rows = self._read(where)
            sums = rows.sum(0, dtype=torch.float64)
            if not bool(torch.isfinite(sums).all()):
                bad = int((~torch.isfinite(rows)).any(1).nonzero()[0]) if not torch.isfinite(rows).all() else 0
                row = where.start + bad if self._subset is None else int(self._subset[where.start + bad])
                msg = f"data contains NaN or infinity (first: row {row}). Find where it comes from, or leave it out."
                raise ValueError(msg)
            total += sums
            hashes.append(hash_rows(_bits(rows)).cpu())
            if self.mirrored:
                flipped.append(hash_rows(_bits(self.flipped(rows))).cpu())
        self.mean = total / self.count
        if self.mirrored:
            self.mean = (self.mean + self.flipped(self.mean)) / 2.0
        self._shift = self.mean if self._double else self.mean.float()
        self.norms = torch.cat([rows.norm(dim=1) for _, rows in self.chunks()])
        # The mean changes no pick, and a small one no digit of a score: then the rows are not copied to take it off.
        if not self._double and float(self.mean.norm()) <= 10.0 * float(self.norms.double().square().mean().sqrt()):
            self._shift = None
        every = torch.cat(hashes)
        if self.mirrored:
            other = torch.cat(flipped)
            every = torch.where((other[:, :1] < every[:, :1]), other, every)
        self.copies = _copies(every, self.device)
        digest = hashlib.blake2b(repr(self.shape).encode(), digest_size=16)
        digest.update(torch.cat(hashes).numpy().tobytes())
        self.fingerprint = digest.hexdigest()


def hash_rows(rows: Tensor) -> Tensor:
    """Hash the bits of each row of a float32 tensor; ``(n, 2)`` int64, the same on every device."""
    bits = (rows + 0.0).contiguous().view(torch.int32)  # adding 0 makes -0.0 equal 0.0
    place = torch.arange(1, rows.shape[1] + 1, device=rows.device)
    hashes = []
    for step in (0x9E3779B97F4A7C15, 0xD1B54A32D192ED03):
        # int64 sums and products wrap around, whatever their order.
        factor = place * (step - 2**64)
        factor = (factor ^ (factor >> 29)) * -0x40A7B892E31B1A47 | 1
        mixed = (bits.long() * factor).sum(1)
        mixed = (mixed ^ ((mixed >> 32) & 0xFFFFFFFF)) * -0x6B2FB644ECCEEE15
        hashes.append(mixed ^ ((mixed >> 29) & 0x7FFFFFFFF))
    return torch.stack(hashes, 1)


def _bits(rows: Tensor) -> Tensor:
    """Give float32 rows that differ wherever the rows do; float64 is the sum of two or more, of which two are kept."""
    high = rows.float()
    if rows.dtype is not torch.float64 or bool((high == rows).all()):
        return high  # zeros after it would not change its hash
    return torch.cat([high, (rows - high).float()], 1)


def rows_of(labels: Tensor, label: Any) -> Tensor:
    """Find the rows of a class; ``(n,)`` int64."""
    return torch.nonzero(labels.eq(label)).flatten()


def _copies(hashes: Tensor, device: torch.device) -> Copies | None:
    distinct, group, sizes = torch.unique(hashes, dim=0, return_inverse=True, return_counts=True)
    if len(distinct) == len(hashes):
        return None
    order = torch.sort(group, stable=True).indices
    begin = (sizes.cumsum(0) - sizes)[group]
    return Copies(*(t.to(device) for t in (order, begin, sizes[group])))


def _checked(data: Any) -> Array:
    if not isinstance(data, Tensor | np.ndarray):
        msg = f"data must be a torch tensor, a NumPy array or a memmap, got {type(data).__name__}."
        raise TypeError(msg)
    floating = data.is_floating_point() if isinstance(data, Tensor) else data.dtype.kind == "f" and data.itemsize <= 8
    if not floating:
        msg = f"data must be floating (float16, float32 or float64), got {data.dtype}. Scale images first."
        raise TypeError(msg)
    if data.ndim < 2 or math.prod(data.shape) == 0:
        msg = f"data must have shape (N, *shape) and hold at least one row and one value, got {tuple(data.shape)}."
        raise ValueError(msg)
    return data
