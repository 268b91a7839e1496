"""Noise that stays with its data: a few seeds for each data row in one file, coupled again whenever they are drawn.

Each step draws one of the seeds of each row of the batch, couples that noise with the batch exactly and writes the
seeds back to the rows they were paired with. The pairs of the whole file can only come nearer from step to step.

>>> import tempfile, torch
>>> from couplings.persistent import Pairs
>>> images = torch.rand(60, 3, 4, 4)
>>> with tempfile.TemporaryDirectory() as folder, Pairs.open(f"{folder}/pairs.bin", rows=60, seeds=4) as pairs:
...     rows = torch.arange(20)  # of the batch
...     noise = pairs.couple(images[rows], rows).noise

References
----------
LOOM: arXiv 2603.15279.
"""

from __future__ import annotations

import errno
import json
import os
import weakref
import zlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, SupportsIndex

import numpy as np
import torch
from torch import Tensor

from couplings._files import check_target, locked, written_atomically
from couplings.coupling import Condition, Coupled, Coupling
from couplings.inputs import Array, as_tensor
from couplings.noise import STREAMS, as_seed, normal, row_seeds

__all__ = ["Drawn", "Pairs"]

_FORMAT = 1
_HEADER = 4096  # bytes
_NUMBER, _COUNT, _CHECKSUM = range(3)  # what the journal begins with; then positions, then seeds


@dataclass(frozen=True, eq=False)
class Drawn:
    """Seeds that were drawn for a step.

    Attributes
    ----------
    rows : (n,) int64 Tensor
        Data rows.
    slots : (n,) int64 Tensor
        Which of its seeds each row drew.
    seeds : (n,) int64 Tensor
        For `couplings.noise.normal`. All three are on the CPU.
    """

    rows: Tensor
    slots: Tensor
    seeds: Tensor


class Pairs:
    """A file of N x C seeds of noise, C for each data row; open one with `Pairs.open`.

    Attributes
    ----------
    rows, seeds : int
        N and C.

    Notes
    -----
    **Distribution.** The noise of all training is one sample of N C rows from the normal law, fixed when the file is
    made: each row comes again after C epochs on average. Within a step it is a permutation of what was drawn. A small
    C lets a model learn this sample instead of the law.

    **Crashes.** A write goes to a journal first, which is read again when the file is opened: a process that is killed
    at any moment leaves a file that holds every seed exactly once. After a power failure it may not, unless `flush`
    was called since the last write; opening it then says so.

    **Ranks.** Each process has a file of its own, made with a seed of its own: a second process that opens a file is
    refused. A rank's file may have all rows of the data, whichever of them it comes to see.
    """

    def __init__(self, path: Path, file: IO[bytes], shape: tuple[int, int], seed: int) -> None:
        self.path, self.rows, self.seeds, self._seed = path, *shape, seed
        self._attach(file)

    @classmethod
    def open(cls, path: str | Path, *, rows: int, seeds: int, seed: SupportsIndex = 0) -> Pairs:
        """Open a file of pairs; make it if there is none.

        Parameters
        ----------
        path : path
        rows : int
            Rows of data.
        seeds : int
            Of each row. More seeds are nearer to fresh noise, and take longer to find their pairs.
        seed : int
            From which the others derive.

        Raises
        ------
        ValueError
            If the file is damaged, or was made with other numbers.
        TypeError
            If the seed is no integer.
        BlockingIOError
            If another process, or another `Pairs`, has it open.

        Notes
        -----
        ``8 N C`` bytes on disk and a journal of 16 for each row of the largest batch. Opening reads all seeds once.
        """
        target, seed = Path(path), as_seed(seed)
        for name, value in (("rows", rows), ("seeds", seeds)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                msg = f"{name}= must be an integer of at least 1, got {value!r}."
                raise ValueError(msg)
        about = {"format": _FORMAT, "rows": rows, "seeds": seeds, "seed": seed}
        if not target.exists():
            with suppress(FileExistsError):  # another process has made it meanwhile
                check_target(target, force=False)
                _write(target, about, _all_seeds(seed, rows, seeds), force=False)
        file = _opened(target)
        try:
            _check_header(target, file, about)
            pairs = cls(target, file, (rows, seeds), seed)
            pairs._check_seeds()
        except BaseException:
            file.close()
            raise
        return pairs

    def draw(self, rows: Any, generator: torch.Generator | None = None) -> Drawn:
        """Draw one of the seeds of each of some data rows. The file is left as it is.

        Parameters
        ----------
        rows : (n,) integer Tensor or array
            All different.
        generator : torch.Generator, optional
            On the CPU. Without one, what is drawn is a function of the file's seed and of how often it was written to.
        """
        self._check_open()
        index = torch.as_tensor(rows).detach().cpu()
        if index.is_floating_point() or index.is_complex() or index.dtype is torch.bool:
            msg = f"rows must be integers, the numbers of the data rows, got {index.dtype}."
            raise TypeError(msg)
        if index.dim() != 1:
            msg = f"rows must have one dimension, got shape {tuple(index.shape)}."
            raise ValueError(msg)
        index = index.long()
        outside = index[(index < 0) | (index >= self.rows)]
        if len(outside):
            msg = f"{self.path} has the rows 0 to {self.rows - 1}, got row {int(outside[0])}."
            raise ValueError(msg)
        if len(torch.unique(index)) < len(index):
            msg = "rows must all be different: a seed can be given to one row only."
            raise ValueError(msg)
        if generator is None:
            generator = torch.Generator().manual_seed(
                int(row_seeds(self._seed, int(self._head[_NUMBER]), 1, stream=STREAMS["slots"]))
            )
        slots = torch.randint(self.seeds, (len(index),), generator=generator)
        return Drawn(index, slots, torch.from_numpy(self._stored[self._positions(index, slots)]))

    def keep(self, drawn: Drawn, seeds: Any) -> None:
        """Write the seeds of a step back, in a new order.

        Parameters
        ----------
        drawn : Drawn
        seeds : (n,) integer Tensor or array
            ``coupled.apply(drawn.seeds)``: the seeds that were drawn, as the coupling has paired them with the rows.

        Raises
        ------
        ValueError
            If they are not those that were drawn, or the file no longer has them where they were drawn.
        OSError
            If the disk is full; the file is left as it is.
        """
        self._check_open()
        new = torch.as_tensor(seeds).detach().cpu().long().numpy()
        old, at = drawn.seeds.numpy(), self._positions(drawn.rows, drawn.slots)
        if new.shape != old.shape or not np.array_equal(np.sort(new), np.sort(old)):
            msg = "the seeds to keep must be a permutation of those that were drawn."
            raise ValueError(msg)
        if not np.array_equal(self._stored[at], old):
            msg = "the pairs were written to since this step was drawn. Draw it again."
            raise ValueError(msg)
        n = len(at)
        self._allocate_journal(n)
        self._body[:n], self._body[n : 2 * n] = at, new
        head = np.array([self._head[_NUMBER] + 1, n, 0])
        head[_CHECKSUM] = self._checksum(head)
        self._head[:] = head
        self._stored[at] = new

    def couple(
        self,
        data: Array,
        rows: Any,
        *,
        coupling: Coupling | None = None,
        condition: Condition | None = None,
        generator: torch.Generator | None = None,
    ) -> Coupled[Any]:
        """Couple a batch with noise of the seeds of its rows, and keep the pairs.

        Parameters
        ----------
        data : (n, *shape) Tensor or array
        rows : (n,) integer Tensor or array
            The numbers of its rows in the dataset, all different.
        coupling : Coupling, optional
            By default exact, so that the distance of the pairs never rises. Its method must permute the noise.
        condition : optional
            As `couplings.couple` takes it: integer classes keep the noise of each class apart.
        generator : torch.Generator, optional
            Of `draw`, and of the method.

        Returns
        -------
        Coupled
            Its noise is what was drawn for the batch, permuted.

        Raises
        ------
        TypeError
            If the data is no tensor or array, or not floating.
        """
        chosen = Coupling() if coupling is None else coupling
        if chosen.scope != "local" or chosen._method.info.marginal != "permutation":
            msg = (
                "the seeds of a file are permuted within a process: pairs need a coupling with scope='local' and a "
                f"method of marginal 'permutation', got {chosen!r}."
            )
            raise ValueError(msg)
        like = as_tensor(data, "data")
        drawn = self.draw(rows, generator)
        if len(drawn.rows) != len(data):
            msg = f"rows must number each row of the data, got {len(drawn.rows)} and {len(data)}."
            raise ValueError(msg)
        noise: Any = normal(drawn.seeds, data.shape[1:], device=like.device, dtype=like.dtype)
        if isinstance(data, np.ndarray):
            noise = noise.numpy()
        coupled = chosen(data, noise, condition=condition, generator=generator)
        self.keep(drawn, drawn.seeds[torch.as_tensor(coupled.index).cpu()])
        return coupled

    def flush(self) -> None:
        """Wait until all that was written is on disk."""
        self._check_open()
        self._memory.flush()

    def close(self) -> None:
        """Let others open the file. Nothing is lost without it."""
        if not self._file.closed:
            del self._memory, self._stored, self._head, self._body
            self._file.close()

    def state_dict(self) -> dict[str, Any]:
        """Give all seeds, ``(N, C)`` int64, how often they were written to, and ``seed=``: what a checkpoint needs."""
        self._check_open()
        seeds = torch.from_numpy(self._stored.copy()).view(self.rows, self.seeds)
        return {"seeds": seeds, "number": int(self._head[_NUMBER]), "seed": self._seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to a state; the file is replaced at once or not at all.

        Raises
        ------
        ValueError
            If the state is of pairs with other numbers, or damaged.
        BlockingIOError
            If another process takes the file at this moment; the pairs are then closed.
        """
        self._check_open()
        seeds = torch.as_tensor(state["seeds"]).detach().cpu().numpy()
        self._check_state(seeds, state.get("seed"))
        about = {"format": _FORMAT, "rows": self.rows, "seeds": self.seeds, "seed": self._seed}
        _write(self.path, about, seeds, number=state["number"], force=True)
        self.close()
        self._attach(_opened(self.path))

    def __enter__(self) -> Pairs:
        self._check_open()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _attach(self, file: IO[bytes]) -> None:
        self._file, self._allocated = file, 0
        weakref.finalize(self, file.close)
        self._memory = np.memmap(file, np.uint8, mode="r+")
        numbers = np.asarray(self._memory[_HEADER:]).view(np.int64)
        count = self.rows * self.seeds
        self._stored, self._head, self._body = numbers[:count], numbers[count : count + 3], numbers[count + 3 :]
        # What the journal holds in full may have been written in part; writing it again changes nothing else.
        n = int(self._head[_COUNT])
        if 0 <= n <= self.rows and self._head[_CHECKSUM] == self._checksum(self._head):
            self._stored[self._body[:n]] = self._body[n : 2 * n]

    def _allocate_journal(self, rows: int) -> None:
        """Take space on disk for a journal of so many rows: writing to memory that has none would end the process."""
        if rows <= self._allocated or not hasattr(os, "posix_fallocate"):
            return
        begin = _HEADER + 8 * (self.rows * self.seeds + 3)
        try:
            os.posix_fallocate(self._file.fileno(), begin, 16 * rows)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # a file system that cannot
                raise OSError(error.errno, error.strerror, str(self.path)) from error
        self._allocated = rows

    def _checksum(self, head: Any) -> int:
        """Checksum of the journal, were this its head."""
        return zlib.crc32(self._body[: 2 * int(head[_COUNT])].tobytes(), zlib.crc32(head[:_CHECKSUM].tobytes()))

    def _positions(self, rows: Tensor, slots: Tensor) -> Any:
        return (rows * self.seeds + slots).numpy()

    def _check_open(self) -> None:
        if self._file.closed:
            msg = (
                f"the pairs are closed. Type: Pairs.open({str(self.path)!r}, rows={self.rows}, seeds={self.seeds}, ...)"
            )
            raise ValueError(msg)

    def _check_seeds(self) -> None:
        if not self._has_every(self._stored):
            msg = f"{self.path} is damaged: it does not hold every seed once. Remove the file to begin with new pairs."
            raise ValueError(msg)

    def _check_state(self, seeds: Any, seed: int | None) -> None:
        """Check that a state is of pairs with the numbers of these; older states do not tell their seed."""
        if seeds.ndim != 2:
            msg = f"the seeds of a state must have shape (rows, seeds), got {seeds.shape}."
            raise ValueError(msg)
        own = {"rows": self.rows, "seeds": self.seeds, "seed": self._seed}
        told = dict(zip(own, (*seeds.shape, self._seed if seed is None else seed), strict=True))
        if told != own:
            differing = [name for name in own if told[name] != own[name]]
            theirs, ours = (", ".join(f"{name}={each[name]}" for name in differing) for each in (told, own))
            msg = (
                f"the state is of pairs with {theirs}, but {self.path} was made with {ours}. "
                f"Load it into another file: Pairs.open(..., {theirs})"
            )
            raise ValueError(msg)
        if not self._has_every(seeds):
            other = "it is damaged" if seed is not None else "it is of pairs with another seed=, or damaged"
            msg = f"the state does not hold every seed of {self.path} (seed={self._seed}) once: {other}."
            raise ValueError(msg)

    def _has_every(self, seeds: Any) -> bool:
        """Whether each seed is there once."""
        return np.array_equal(np.sort(seeds, None), np.sort(_all_seeds(self._seed, self.rows, self.seeds)))


def _all_seeds(seed: int, rows: int, seeds: int) -> Any:
    return row_seeds(seed, 0, rows * seeds, stream=STREAMS["persistent"]).numpy()


def _write(path: Path, about: dict[str, int], seeds: Any, *, number: int = 0, force: bool) -> None:
    header = b"couplings.persistent " + json.dumps(about).encode() + b"\n"
    with written_atomically(path, force=force) as file:
        file.write(header.ljust(_HEADER, b"\0"))
        file.write(seeds.tobytes())
        head = np.array([number, 0, 0])
        head[_CHECKSUM] = zlib.crc32(head[:_CHECKSUM].tobytes())
        file.write(head.tobytes())
        file.truncate(_size(about))  # the journal takes no space on disk before it is used


def _size(about: dict[str, int]) -> int:
    return _HEADER + 8 * (about["rows"] * about["seeds"] + 3 + 2 * about["rows"])


def _opened(path: Path) -> IO[bytes]:
    while True:
        file = path.open("r+b")
        if not locked(file):
            file.close()
            msg = f"{path} is open in another process or another Pairs; each process needs a file of its own."
            raise BlockingIOError(msg)
        # Whoever had it locked may have put another in its place meanwhile: a lock on the old one keeps nobody out.
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
        file.close()


def _check_header(path: Path, file: IO[bytes], about: dict[str, int]) -> None:
    held: dict[str, int] = {}
    name, _, described = file.read(_HEADER).partition(b"\n")[0].partition(b" ")
    with suppress(ValueError):
        held = json.loads(described)
    if name != b"couplings.persistent" or held.keys() != about.keys() or os.fstat(file.fileno()).st_size != _size(held):
        msg = f"{path} is no file of pairs, or it is damaged. Choose another name, or remove it to begin anew."
        raise ValueError(msg)
    for key, value in about.items():
        if held[key] != value:
            msg = f"{path} was made with {key}={held[key]}, not {value}. Pass that, or choose another name."
            raise ValueError(msg)
