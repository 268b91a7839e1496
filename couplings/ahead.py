"""Coupling in the background, behind the training step: one batch (`Coupling.submit`), or a whole loader (`lookahead`).

A coupling waits for a solver on the host, and on a GPU for the cost to arrive there. One step ahead, in a thread and on
a stream of its own, neither is on the critical path. Reading ahead also makes a larger pool: `lookahead` couples over
several batches of the loader, whatever the batch size.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache
from itertools import islice
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from couplings._graphs import outside_graphs
from couplings.inputs import Array

if TYPE_CHECKING:
    from couplings.coupling import Coupled, Coupling

__all__ = ["Lookahead", "Pending", "lookahead"]

R = TypeVar("R")
Noise = Callable[[tuple[int, ...], torch.Generator, torch.device], Tensor]


class Pending(Generic[R]):
    """A result that a thread is working on; `Coupling.submit` makes them.

    Parameters
    ----------
    work : callable
        Run once, in a thread of its own and, given a CUDA device, on a stream of its own after all that the calling
        thread has queued so far.
    device : torch.device or None
        Where its inputs and its result are.
    tensors : callable
        The tensors of a result, to be made safe on the stream of whoever asks for it.
    after : Thread, optional
        One that must have ended first.
    """

    def __init__(
        self,
        work: Callable[[], R],
        *,
        device: torch.device | None = None,
        tensors: Callable[[R], Iterable[Any]] = lambda result: (),
        after: threading.Thread | None = None,
    ) -> None:
        self._work, self._tensors, self._after = work, tensors, after
        self._result: R | None = None
        self._error: BaseException | None = None
        self._gradients = torch.is_grad_enabled()
        self._stream: torch.cuda.Stream | None = None
        self._finished: torch.cuda.Event | None = None
        if device is not None and device.type == "cuda":
            self._stream = _side_stream(torch.cuda.current_stream(device).device)
            self._stream.wait_stream(torch.cuda.current_stream(device))
        self.thread = threading.Thread(target=self._run, name="couplings-ahead")
        self.thread.start()

    def _run(self) -> None:
        try:
            if self._after is not None:
                self._after.join()
            with ExitStack() as stack:
                stack.enter_context(torch.set_grad_enabled(self._gradients))
                if self._stream is not None:
                    stack.enter_context(torch.cuda.device(self._stream.device))
                    stack.enter_context(torch.cuda.stream(self._stream))
                self._result = self._work()
                if self._stream is not None:
                    self._finished = self._stream.record_event()
        except BaseException as error:
            self._error = error
        finally:
            del self._work, self._after  # and what they hold, such as the batch

    @outside_graphs
    def done(self) -> bool:
        """Whether `result` would return, or raise, at once."""
        return not self.thread.is_alive()

    @outside_graphs
    def wait(self) -> None:
        """Wait until the thread has ended."""
        self.thread.join()

    @outside_graphs
    def result(self) -> R:
        """Wait for the result.

        Returns
        -------
        Coupled
            Its tensors are safe to use on the current stream, which waits for them where they are on a GPU.

        Raises
        ------
        Exception
            What the work raised, with its traceback.
        """
        self.thread.join()
        if self._error is not None:
            raise self._error
        result: R = self._result  # type: ignore[assignment]
        if self._finished is not None:
            stream = torch.cuda.current_stream(self._stream.device)  # type: ignore[union-attr]
            stream.wait_event(self._finished)
            for tensor in _tensors_in(self._tensors(result)):
                if tensor.is_cuda:
                    tensor.record_stream(stream)
        return result


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream of a GPU that all background work runs on: cuBLAS keeps tens of megabytes for each."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def submit(coupling: Coupling, data: Array, noise: Array, **conditions: Any) -> Pending[Coupled[Any]]:
    """Couple in the background; see `Coupling.submit`."""
    device = noise.device if isinstance(noise, Tensor) else None
    group = _group_of(coupling)

    def start(own: Coupling, after: threading.Thread | None) -> Pending[Coupled[Any]]:
        return Pending(
            lambda: _applied_over(group, own(data, noise, **conditions)),
            device=device,
            tensors=lambda coupled: (coupled.noise, coupled.index, coupled.cost, coupled.cost_before),
            after=after,
        )

    if group is None:
        pending = start(coupling, None)
    else:
        with _lock:  # ranks must exchange in the same order: one after another
            if group not in _background:
                _background[group] = (_new_group_like(group), None)
            background, last = _background[group]
            pending = start(_over(coupling, background), last)
            _background[group] = (background, pending.thread)
    if device is not None and device.type == "cuda":
        for tensor in _tensors_in((data, noise, *conditions.values())):
            if tensor.is_cuda:
                tensor.record_stream(pending._stream)  # type: ignore[arg-type]  # CUDA devices have one
    return pending


# For each process group that couplings were submitted over: the group that they use, and the last one's thread.
_background: dict[Any, tuple[Any, threading.Thread | None]] = {}
_lock = threading.Lock()


def _group_of(coupling: Coupling) -> Any:
    """Return the process group that a coupling exchanges over; None if it does not."""
    if coupling.scope == "local":
        return None
    from couplings.distributed import process_group

    return process_group(coupling.options.get("group"))


def _over(coupling: Coupling, group: Any) -> Coupling:
    options = {**coupling.options, "group": group}
    return type(coupling)(coupling.method, coupling.metric, coupling.quantize, coupling.scope, **options)


def _new_group_like(group: Any) -> Any:
    """Make a process group of the same ranks, for one thread at a time; collective.

    A gloo group: two NCCL communicators that are used from two threads may wait for each other for ever.
    """
    import torch.distributed as dist

    ranks = dist.get_process_group_ranks(group)
    if len(ranks) == dist.get_world_size():
        return dist.new_group(ranks, backend="gloo")
    # Of some ranks the others know nothing. From 2.14 on torch counts such a group on its own ranks alone, and names by
    # that count the groups that all ranks make later: they would wait for each other for ever. It is put back.
    world = dist.distributed_c10d._world
    before = world.group_count
    _made[tuple(ranks)] += 1
    world.group_count = _UNCOUNTED + _made[tuple(ranks)]  # part of the name
    try:
        return dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
    finally:
        world.group_count = before


# Groups made over some of the ranks, and a number that no process counts its groups up to.
_made: Counter[tuple[int, ...]] = Counter()
_UNCOUNTED = 1 << 30


def _applied_over(group: Any, coupled: Coupled[Any]) -> Coupled[Any]:
    """Let `Coupled.apply` exchange over the caller's group: the background one may be in use by then."""
    over = getattr(coupled._apply, "over", None)
    return coupled if over is None else replace(coupled, _apply=over(group))


def _tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in a batch: in tuples, lists, dictionaries and what is iterated over."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors_in(tuple(value.values()))
    elif isinstance(value, tuple | list | Iterator):
        for part in value:
            yield from _tensors_in(part)


def lookahead(
    loader: Iterable[Any],
    coupling: Coupling,
    *,
    window: int = 4,
    data: Callable[[Any], Array] | None = None,
    condition: Callable[[Any], Any] | None = None,
    noise: Noise | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
) -> Lookahead:
    """Read batches ahead, couple each window of them as one, and hand out every batch with its noise.

    Parameters
    ----------
    loader : iterable
        Of batches: tensors, or anything that `data` picks a tensor from. Each batch is handed out as it came.
    coupling : Coupling
        The optimal transport batch is ``window`` times the batch size.
    window : int
        Batches that are coupled together.
    data : callable, optional
        What of a batch is coupled, such as ``lambda batch: batch["image"]`` or an encoder; ``(n, *shape)`` floating. By
        default the batch itself, or its first element if it is a tuple or a list. Called in a thread.
    condition : callable, optional
        ``condition=`` of a batch: see `couple`.
    noise : callable, optional
        ``noise(shape, generator, device) -> Tensor``; by default standard normal, in the dtype of the data.
    seed : int
        Of the noise. Ranks need different ones.
    device : torch.device, optional
        Where the noise is drawn and the coupling computed; by default where the data is.

    Returns
    -------
    Lookahead
        Iterate over it: ``(batch, noise)`` in the order of the loader.

    Raises
    ------
    ValueError
        If `window` is less than 1.

    Notes
    -----
    While one window is trained on, the next is read and coupled, in a thread: up to two windows of batches are held.
    Batches of different shapes are coupled within their shape. The noise is a function of `seed`, of how often the
    loader was gone through, and of the batches. An error of the loader, of `data` or of the coupling is raised where
    the window that it belongs to would have been handed out. Leaving the loop ends the thread.

    Examples
    --------
    >>> import torch
    >>> from couplings import Coupling, lookahead
    >>> batches = [torch.rand(2, 3) for _ in range(6)]
    >>> [tuple(noise.shape) for batch, noise in lookahead(batches, Coupling(), window=4)]
    [(2, 3), (2, 3), (2, 3), (2, 3), (2, 3), (2, 3)]
    """
    if window < 1:
        msg = f"window= must be at least 1 batch, got {window}."
        raise ValueError(msg)
    where = None if device is None else torch.device(device)
    return Lookahead(loader, coupling, window, data or _first, condition, noise or _normal, seed, where)


@dataclass(frozen=True)
class _Window:
    """Batches with their noise, and the state of the loader after them."""

    pairs: list[tuple[Any, Any]]
    loader_state: Any
    exhausted: bool


class Lookahead:
    """What `lookahead` returns: an iterable of batches with their noise, that can be resumed in the middle."""

    def __init__(
        self,
        loader: Iterable[Any],
        coupling: Coupling,
        window: int,
        data: Callable[[Any], Array],
        condition: Callable[[Any], Any] | None,
        noise: Noise,
        seed: int,
        device: torch.device | None,
    ) -> None:
        self.loader, self.window, self.seed, self.device = loader, window, seed, device
        group = _group_of(coupling)
        self.coupling = coupling if group is None else _over(coupling, _new_group_like(group))
        self._data, self._condition, self._noise = data, condition, noise
        self._epoch = 0
        self._position = {"window": 0, "handed": 0}
        self._loader_state: Any = None  # before the window that is being handed out
        self._resume: dict[str, Any] | None = None

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        start, resumed = self._begin()
        batches = iter(self.loader)
        if resumed is not None and resumed["loader"] is None:
            # The loader cannot be told where to start: read on until there.
            batches = islice(batches, start["window"] * self.window, None)
        number, handed = start["window"], start["handed"]
        state = None if resumed is None else resumed["loader"]
        stopped = threading.Event()
        pending = self._couple_next(batches, number, stopped)
        try:
            while True:
                window = pending.result()
                self._loader_state, self._position = state, {"window": number, "handed": handed}
                if not window.exhausted:
                    pending = self._couple_next(batches, number + 1, stopped)
                for pair in window.pairs[handed:]:
                    self._position["handed"] += 1
                    yield pair
                if window.exhausted:
                    break
                number, handed, state = number + 1, 0, window.loader_state
        finally:
            stopped.set()
            pending.wait()
        self._epoch += 1
        self._position, self._loader_state = {"window": 0, "handed": 0}, None

    def _begin(self) -> tuple[dict[str, int], dict[str, Any] | None]:
        resumed, self._resume = self._resume, None
        if resumed is None:
            self._position, self._loader_state = {"window": 0, "handed": 0}, None
            return {"window": 0, "handed": 0}, None
        if resumed["loader"] is not None:
            self.loader.load_state_dict(resumed["loader"])  # type: ignore[attr-defined]
        return dict(resumed["position"]), resumed

    def state_dict(self) -> dict[str, Any]:
        """Where the loop is: how much of which window was handed out, and the state of the loader before it."""
        return {"epoch": self._epoch, "position": dict(self._position), "loader": self._loader_state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Begin the next loop after the batch that was handed out last when `state` was taken.

        A loader with a ``state_dict`` of its own (torchdata's ``StatefulDataLoader``) is put back to the window; any
        other is read from its start, and must give the same batches again.
        """
        self._epoch, self._resume = state["epoch"], state
        self._position, self._loader_state = dict(state["position"]), state["loader"]

    def _couple_next(self, batches: Iterator[Any], number: int, stopped: threading.Event) -> Pending[_Window]:
        return Pending(
            lambda: self._read_and_couple(batches, number, stopped),
            device=self.device or _current_device(),
            tensors=lambda window: _tensors_in(window.pairs),
        )

    def _read_and_couple(self, batches: Iterator[Any], number: int, stopped: threading.Event) -> _Window:
        read: list[Any] = []
        for batch in batches:
            read.append(batch)
            if len(read) == self.window or stopped.is_set():
                break
        exhausted = len(read) < self.window
        stateful = getattr(self.loader, "state_dict", None)
        state = stateful() if callable(stateful) else None
        if stopped.is_set() or not read:
            return _Window([], state, exhausted)
        data = [self._on_device(self._data(batch)) for batch in read]
        # A generator for each window: what is drawn does not depend on what was read before.
        seed = int(np.random.SeedSequence([self.seed, self._epoch, number]).generate_state(1, np.uint64)[0]) >> 1
        device = data[0].device
        generator = torch.Generator(device).manual_seed(seed)
        choices = torch.Generator().manual_seed(seed)  # of methods that draw, the same on every device
        drawn = [self._draw(part, generator) for part in data]
        conditions = None if self._condition is None else [self._condition(batch) for batch in read]
        noise: list[Tensor | None] = [None] * len(read)
        for alike in _grouped(data):
            together = None if conditions is None else _joined([conditions[k] for k in alike])
            pool, source = torch.cat([data[k] for k in alike]), torch.cat([drawn[k] for k in alike])
            coupled = self.coupling(pool, source, condition=together, generator=choices)
            for k, part in zip(alike, torch.split(coupled.noise, [len(data[k]) for k in alike]), strict=True):
                noise[k] = part
        return _Window(list(zip(read, noise, strict=True)), state, exhausted)

    def _on_device(self, data: Array) -> Tensor:
        tensor = torch.as_tensor(data)
        return tensor if self.device is None else tensor.to(self.device, non_blocking=True)

    def _draw(self, data: Tensor, generator: torch.Generator) -> Tensor:
        candidates = 1
        if self.coupling.method == "nearest":
            candidates = self.coupling.options.get("k", 0)
            if not candidates:
                msg = "lookahead() draws the candidates of nearest: say how many, Coupling('nearest', k=4)."
                raise ValueError(msg)
        shape = (candidates * len(data), *data.shape[1:])
        return self._noise(shape, generator, data.device).to(data.dtype)


def _current_device() -> torch.device | None:
    """Return the GPU that this process works on, if any: encoders and couplings run there beside the training step."""
    initialised = torch.cuda.is_available() and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return torch.device("cuda", torch.cuda.current_device()) if initialised else None


def _first(batch: Any) -> Any:
    return batch[0] if isinstance(batch, tuple | list) else batch


def _normal(shape: tuple[int, ...], generator: torch.Generator, device: torch.device) -> Tensor:
    return torch.randn(shape, generator=generator, device=device)


def _grouped(data: list[Tensor]) -> list[list[int]]:
    """Positions of the batches that can be coupled together."""
    groups: dict[Any, list[int]] = {}
    for k, part in enumerate(data):
        groups.setdefault((part.shape[1:], part.dtype), []).append(k)
    return list(groups.values())


def _joined(parts: list[Any]) -> Any:
    """Concatenate the conditions of batches, alone or in tuples."""
    if isinstance(parts[0], tuple):
        return tuple(_joined(list(column)) for column in zip(*parts, strict=True))
    return torch.cat([torch.as_tensor(part) for part in parts])
