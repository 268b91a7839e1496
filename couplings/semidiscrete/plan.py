"""`fit`, which finds a dataset-level coupling, and `Semidiscrete`, the coupling that it finds."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from couplings._files import check_target
from couplings.inputs import Array
from couplings.semidiscrete import storage
from couplings.semidiscrete.ascent import State, ascend, start
from couplings.semidiscrete.progress import reporting
from couplings.semidiscrete.rows import Rows, hash_rows, rows_of
from couplings.semidiscrete.search import Search

if TYPE_CHECKING:
    from couplings.collectives import Ranks
    from couplings.semidiscrete.loader import PairLoader
    from couplings.semidiscrete.quality import Quality

__all__ = ["Semidiscrete", "fit"]

logger = logging.getLogger(__name__)

_STEPS = 3000


@dataclass(frozen=True)
class Part:
    """Rows that are coupled by themselves: those of one class, or all.

    Attributes
    ----------
    label : int or None
        The class.
    members : (n,) int64 Tensor or None
        Their numbers in the dataset, on the CPU; None for all.
    rows : Rows
    """

    label: int | None
    members: Tensor | None
    rows: Rows

    def number(self, index: Tensor, count: int) -> Tensor:
        """Find the numbers of rows of the part, flipped or not, in a dataset of `count` rows."""
        if self.members is None:
            return index
        return self.members[index % self.rows.count] + index // self.rows.count * count


@dataclass(frozen=True, eq=False)
class Semidiscrete:
    """A coupling of normal noise with a whole dataset: each noise row picks the data row it trains with.

    Noise z picks the row j of highest ``potentials[j] + <x_j, z>``; given its class, among the rows of that class.
    Where the data is mirrored, x_j is the nearer one of the row and the flipped row. The noise is used as it was drawn,
    so its law is exact; how evenly the data is used is what `chi2` measures.

    Attributes
    ----------
    potentials : (N,) Tensor
        float32, of data in one dimension float64; on the CPU. Of mean 0, within each class.
    chi2 : float
        ``N sum_j (p_j - 1/N)^2`` of the probabilities p of picking each row, estimated on fresh noise without bias; 0
        if all rows are picked equally often. Over classes the mean, weighted by their rows.
    classes : (N,) int64 Tensor or None
    shape : tuple of int
        Of a row.
    fingerprint : str
        Of the data.
    mirrored : bool
        Whether each row counts flipped along its last axis as well.
    """

    potentials: Tensor
    chi2: float
    classes: Tensor | None
    shape: tuple[int, ...]
    fingerprint: str
    mirrored: bool = False
    _parts: list[Part] | None = field(default=None, repr=False)

    def __len__(self) -> int:
        """Rows of data."""
        return len(self.potentials)

    @property
    def parts(self) -> list[Part]:
        """The data, class by class.

        Raises
        ------
        ValueError
            If the plan was loaded without it.
        """
        if self._parts is None:
            msg = "this plan was loaded without its data. Type: Semidiscrete.load(path, data=data)"
            raise ValueError(msg)
        return self._parts

    @cached_property
    def _by_part(self) -> list[Tensor]:
        """Potentials of each part, where its rows are searched."""
        return [
            (self.potentials if part.members is None else self.potentials[part.members]).to(part.rows.device)
            for part in self.parts
        ]

    def assign(self, noise: Any, classes: Any = None) -> Any:
        """Find the data row of each noise row.

        Parameters
        ----------
        noise : (n, *shape) Tensor or array
        classes : (n,) integer Tensor or array, optional
            Of the noise rows; required if the plan has classes.

        Returns
        -------
        (n,) int64 Tensor or array
            Numbers of data rows, where the noise is; with mirrored data, ``N + j`` is row j flipped. Of rows that equal
            each other the noise chooses one evenly.

        Raises
        ------
        ValueError
            For another shape, NaN, a class without data, or if the plan was loaded without its data.
        TypeError
            If the noise is not floating or the classes are no integers.

        Notes
        -----
        One product of the noise with the data, in chunks of both.

        Examples
        --------
        >>> import torch
        >>> from couplings import semidiscrete
        >>> plan = semidiscrete.fit(torch.tensor([[-1.0], [1.0]]))
        >>> plan.assign(torch.tensor([[0.3], [-2.0], [0.1]]))
        tensor([1, 0, 1])
        """
        given = torch.from_numpy(np.array(noise)) if isinstance(noise, np.ndarray) else noise
        if not isinstance(given, Tensor) or not given.is_floating_point():
            kind = given.dtype if isinstance(given, Tensor) else type(given).__name__
            msg = f"noise must be a floating tensor or array, got {kind}."
            raise TypeError(msg)
        if tuple(given.shape[1:]) != self.shape or given.dim() == 0:
            expected = ", ".join(map(str, ("n", *self.shape)))
            msg = f"noise must have shape ({expected}), rows like those of the data, got {tuple(given.shape)}."
            raise ValueError(msg)
        labels = self._labels(classes, len(given))
        z = given.detach().flatten(1).float()
        if not bool(torch.isfinite(z).all()):
            msg = "noise contains NaN or infinity."
            raise ValueError(msg)
        index = torch.empty(len(z), dtype=torch.int64)
        for part, potentials in zip(self.parts, self._by_part, strict=True):
            if labels is None:
                index = _assign(part, potentials, z, len(self))
            else:
                mine = rows_of(labels, part.label)
                if len(mine):
                    index[mine] = _assign(part, potentials, z[mine.to(z.device)], len(self))
        return index.numpy() if isinstance(noise, np.ndarray) else index.to(given.device)

    def _labels(self, classes: Any, count: int) -> Tensor | None:
        if self.classes is None:
            if classes is not None:
                msg = "classes= was given, but the plan has none. Type: fit(data, classes=...)"
                raise ValueError(msg)
            return None
        if classes is None:
            msg = "the plan has classes: pass classes=, an (n,) integer tensor with the class of each noise row."
            raise ValueError(msg)
        labels = check_classes(classes, count)
        known = torch.tensor([part.label for part in self.parts])
        foreign = labels[~torch.isin(labels, known)]
        if len(foreign):
            msg = f"class {int(foreign[0])} has no data; the plan has the classes {known.tolist()[:20]}."
            raise ValueError(msg)
        return labels

    def quality(self, *, rows: int = 4096, seed: int = 0) -> Quality:
        """Compare the pairs with those of other couplings; see `Quality`.

        Parameters
        ----------
        rows : int
            Noise rows to measure on, at least 2,048.
        seed : int
        """
        from couplings.semidiscrete.quality import measure

        return measure(self, rows, seed)

    def loader(
        self,
        dataset: Any,
        batch_size: int,
        *,
        seed: int = 0,
        balanced: bool = True,
        mirror: Callable[[Any], Any] | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        **dataloader_options: Any,
    ) -> PairLoader:
        """Load batches of data that noise has picked, with that noise.

        Parameters
        ----------
        dataset : map-style dataset
            ``dataset[i]`` is what row i of the data stands for: an augmented image, a dictionary with its label.
        batch_size : int
            Pairs of a batch, on each rank.
        seed : int
            Of the noise; the same on every rank.
        balanced : bool
            Whether every row is used exactly once an epoch. Noise that picked a row picked before moves to one
            that nothing picked, where that costs least.
        mirror : callable, optional
            Flips an item of the dataset, where the data is mirrored. By default a tensor or an array is flipped along
            its last axis, and the first element of a tuple.
        rank, world_size : int, optional
            By default those of the process group, if there is one.
        **dataloader_options
            Of `torch.utils.data.DataLoader`: ``num_workers``, ``collate_fn``, ``pin_memory``, ...

        Returns
        -------
        PairLoader
            Iterate over it: ``(batch, noise)``, as many pairs an epoch as there is data. The noise is made where the
            plan searches, see ``fit(..., device=)``.
        """
        from couplings.semidiscrete.loader import PairLoader

        return PairLoader(
            self,
            dataset,
            batch_size,
            seed=seed,
            balanced=balanced,
            mirror=mirror,
            rank=rank,
            world_size=world_size,
            options=dataloader_options,
        )

    def save(self, path: str | Path) -> None:
        """Write the plan, without the data, as safetensors; a file that is there is replaced at once or not at all.

        Raises
        ------
        ImportError
            If the extra ``cli`` is not installed.
        """
        tensors = {"potentials": self.potentials}
        if self.classes is not None:
            tensors["classes"] = self.classes
        about = {"chi2": self.chi2, "shape": list(self.shape), "fingerprint": self.fingerprint}
        about["mirrored"] = self.mirrored
        storage.write(Path(path), "plan", tensors, about)

    @classmethod
    def load(cls, path: str | Path, data: Array | None = None, *, device: Any = None) -> Semidiscrete:
        """Read a plan.

        Parameters
        ----------
        path : path
        data : (N, *shape) Tensor or array, optional
            What it was fitted to. Without it the plan can be looked at, but assigns nothing.
        device : torch.device, optional
            Where to search; by default where the data is.

        Raises
        ------
        ValueError
            If the file is damaged or no plan, or the data is not that of the fit.
        """
        tensors, about = storage.read(Path(path), "plan", ("potentials",))
        classes, shape, mirrored = tensors.get("classes"), tuple(about["shape"]), about["mirrored"]
        parts = None
        if data is not None:
            if not isinstance(data, Tensor | np.ndarray):
                msg = f"data must be a torch tensor, a NumPy array or a memmap, got {type(data).__name__}."
                raise TypeError(msg)
            if tuple(data.shape) != (len(tensors["potentials"]), *shape):
                expected = (len(tensors["potentials"]), *shape)
                msg = f"{path} was fitted to data of shape {expected}, got {tuple(data.shape)}."
                raise ValueError(msg)
            parts = _parts_of(data, classes, device, mirrored)
            if fingerprint_of(parts) != about["fingerprint"]:
                msg = f"{path} was fitted to other data: its values differ. Pass that data, or fit again."
                raise ValueError(msg)
        return cls(tensors["potentials"], about["chi2"], classes, shape, about["fingerprint"], mirrored, parts)


def fit(
    data: Array,
    *,
    classes: Any = None,
    mirrored: bool = False,
    batch_size: int = 1024,
    steps: int | None = None,
    tolerance: float = 0.05,
    seed: int = 0,
    device: Any = None,
    group: Any = None,
    progress: bool | Callable[[float, str], None] = False,
    checkpoint: str | Path | None = None,
) -> Semidiscrete:
    """Couple standard normal noise with a dataset by semidiscrete optimal transport.

    Parameters
    ----------
    data : (N, *shape) Tensor or array
        Floating, float16 too; read in chunks and never copied whole, so that a memmap will do.
    classes : (N,) integer Tensor or array, optional
        Noise then picks among the rows of its own class.
    mirrored : bool
        Whether each row counts flipped along its last axis as well, without being stored twice. The law of the noise
        is the same flipped, and a row and its mirror image are picked equally often by themselves.
    batch_size : int
        Noise rows of a step, rounded up to a multiple of 8.
    steps : int, optional
        To end at for each class, if `tolerance` is not reached before; 3,000 by default.
    tolerance : float
        Of `Semidiscrete.chi2`, which is told from it down to about 0.0003.
    seed : int
    device : torch.device, optional
        Where to compute; by default where the data is.
    group : ProcessGroup, optional
        Ranks to share the search. Every one passes the same data, such as one memmap, and gets the same plan.
    progress : bool or callable
        Whether to show a bar and the time left, with tqdm if that is installed, else to log each measurement at INFO.
        A callable is given an estimate of the share of the work that is done, and a line with step and chi^2.
    checkpoint : path, optional
        A file to keep the state in. If it is there the fit goes on from it, as if it had never stopped.

    Returns
    -------
    Semidiscrete

    Raises
    ------
    ValueError
        For NaN, wrong shapes, or a checkpoint of another fit.
    TypeError
        For data that is not floating.
    ImportError
        If `checkpoint` is given and the extra ``cli`` is not installed.

    Notes
    -----
    A step is a product of ``batch_size`` noise rows with all data, O(batch_size N d), from which 30 picks a row are
    read. Beside the data, memory is O(N + batch_size d) and a chunk. A GPU keeps the data, in its own type, where it
    fills at most half of the free memory; larger data comes through pinned memory at every step. If the tolerance is
    not reached a warning is logged, and the plan has the `chi2` that was.

    While the scores of the best two rows are far enough apart, products of a step are rounded to bfloat16 (errors about
    2^-9 of a score, a small part of that gap), on GPUs and processors that have it. chi^2 and picks of the plan are
    measured in float32, by the process's own setting of float32 products.

    References
    ----------
    Semidiscrete couplings for flow matching: arXiv 2509.25519.
    """
    steps = _STEPS if steps is None else steps
    ranks = _ranks(group)
    settings: dict[str, Any] = {"batch_size": batch_size, "seed": seed, "mirrored": mirrored}

    def prepare() -> tuple[Tensor | None, list[Part]]:
        _check_options(batch_size, steps, tolerance)
        if checkpoint is not None:
            storage.require()
            if ranks is None or ranks.rank == 0:
                check_target(Path(checkpoint), force=True)
        labels = None if classes is None else check_classes(classes, len(data))
        return labels, _parts_of(data, labels, device, mirrored)

    labels, parts = _agreed(ranks, prepare, {**settings, "steps": steps, "tolerance": tolerance})
    fingerprint = settings["fingerprint"] = fingerprint_of(parts)
    states = _resumed(checkpoint, settings, parts)
    with reporting(progress, len(parts), steps, tolerance) as report:
        for number, part in enumerate(parts):
            search = Search(part.rows, ranks)
            if number == len(states):
                states.append(start(part.rows, search, seed))

            def checked(state: State, number: int = number) -> None:
                report.measured(number, state)
                if checkpoint is not None and (ranks is None or ranks.rank == 0):
                    _write_checkpoint(Path(checkpoint), settings, states)

            ascend(
                part.rows,
                search,
                states[number],
                batch_size=batch_size,
                steps=steps,
                tolerance=tolerance,
                seed=seed,
                checked=checked,
                stepped=partial(report.stepped, number),
            )
            if states[number].chi2 >= tolerance:
                logger.warning(
                    "%schi^2 is %.3g after %d steps, and tolerance=%g was not reached: allow more steps=, or a "
                    "larger batch_size=",
                    "" if part.label is None else f"class {part.label}: ",
                    states[number].chi2,
                    states[number].step,
                    tolerance,
                )
    potentials = torch.empty(len(data), dtype=parts[0].rows.dtype)
    for part, state in zip(parts, states, strict=True):
        potentials[slice(None) if part.members is None else part.members] = (state.average - state.average.mean()).cpu()
    chi2 = sum(part.rows.count * state.chi2 for part, state in zip(parts, states, strict=True)) / len(data)
    return Semidiscrete(potentials, chi2, labels, tuple(data.shape[1:]), fingerprint, mirrored, parts)


def check_classes(classes: Any, count: int) -> Tensor:
    """Check classes, of data or of noise; ``(count,)`` int64 on the CPU."""
    labels = torch.as_tensor(classes).detach().cpu()
    if labels.is_floating_point() or labels.is_complex():
        msg = f"classes= must be integers, got {labels.dtype}. Type: classes.long()"
        raise TypeError(msg)
    if labels.shape != (count,):
        msg = f"classes= must have shape ({count},), a class for each row, got {tuple(labels.shape)}."
        raise ValueError(msg)
    return labels.long()


def fingerprint_of(parts: list[Part]) -> str:
    """Give what tells the data, and its classes, from other data."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(f"{part.label} {part.rows.fingerprint} ".encode())
        if part.members is not None:
            digest.update(part.members.numpy().tobytes())
    return digest.hexdigest()


def _assign(part: Part, potentials: Tensor, noise: Tensor, count: int) -> Tensor:
    z = noise.to(part.rows.device)
    index = Search(part.rows).highest(potentials, z)[1][:, 0]
    if part.rows.copies is not None:
        first, turn = part.rows.copies, hash_rows(z)[:, 0] & 0x7FFFFFFFFFFFFFFF
        begin, size = first.begin[index], first.size[index]
        index = first.order[begin + turn % size]
    return part.number(part.rows.facing(index, z).cpu(), count)


def _ranks(group: Any) -> Ranks | None:
    if group is None:
        return None
    from couplings.collectives import Ranks
    from couplings.distributed import process_group

    found = process_group(group)
    return None if found is None else Ranks(found)


def _check_options(batch_size: object, steps: object, tolerance: float) -> None:
    for name, value in (("batch_size", batch_size), ("steps", steps)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            msg = f"{name}= must be an integer of at least 1, got {value!r}."
            raise ValueError(msg)
    if not tolerance > 0.0:
        msg = f"tolerance= must be above 0, got {tolerance}."
        raise ValueError(msg)


def _parts_of(data: Array, labels: Tensor | None, device: Any, mirrored: bool) -> list[Part]:
    where = None if device is None else torch.device(device)
    if labels is None:
        return [Part(None, None, Rows(data, where, mirrored=mirrored))]
    found = []
    for label in torch.unique(labels).tolist():
        members = rows_of(labels, label)
        found.append(Part(label, members, Rows(data, where, members, mirrored=mirrored)))
    return found


def _agreed(
    ranks: Ranks | None,
    prepare: Callable[[], tuple[Tensor | None, list[Part]]],
    settings: dict[str, Any],
) -> tuple[Tensor | None, list[Part]]:
    """Prepare the data on every rank; raise together if one cannot, or if what they passed differs."""
    if ranks is None:
        return prepare()
    prepared = ranks.attempt("checks", prepare)
    own = None if prepared.error else {**settings, "data": fingerprint_of(prepared.value[1])}
    said = ranks.all_gather_objects("settings", own)
    if any(one is None for one in said):
        ranks.fail(prepared.error)
    for name in said[0] or {}:
        if len({one[name] for one in said if one is not None}) > 1:
            msg = f"every rank must pass the same {name} to fit(..., group=)."
            raise ValueError(msg)
    return prepared.value


def _resumed(checkpoint: Any, settings: dict[str, Any], parts: list[Part]) -> list[State]:
    if checkpoint is None or not Path(checkpoint).exists():
        return []
    tensors, about = storage.read(Path(checkpoint), "checkpoint", ())
    for name, value in settings.items():
        if about["settings"].get(name) != value:
            msg = (
                f"{checkpoint} is the checkpoint of a fit with {name}={about['settings'].get(name)}, not {value}. "
                "Pass another checkpoint=, or remove the file."
            )
            raise ValueError(msg)
    return [
        State(
            tensors[f"potentials.{k}"].to(parts[k].rows.device),
            tensors[f"average.{k}"].to(parts[k].rows.device),
            **numbers,
        )
        for k, numbers in enumerate(about["states"])
    ]


def _write_checkpoint(path: Path, settings: dict[str, Any], states: list[State]) -> None:
    tensors: dict[str, Tensor] = {}
    numbers = []
    for k, state in enumerate(states):
        tensors |= {f"potentials.{k}": state.potentials, f"average.{k}": state.average}
        numbers.append({name: getattr(state, name) for name in ("step", "next_check", "gap", "chi2", "rough")})
    storage.write(path, "checkpoint", tensors, {"settings": settings, "states": numbers})
