"""Check that a coupling keeps the distribution of the noise: `check_marginal` and `check_coupler`."""

from __future__ import annotations

import inspect
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor

from couplings._names import unknown
from couplings._types import Marginal, Needs
from couplings.assigners.method import BrokenPromiseError
from couplings.assigners.registry import find
from couplings.coupling import Coupled, Coupling
from couplings.testing.statistics import Statistic, directions_to_test, equal_use, mean_differences, zero_mean

# Few elements make a coupling strong, and every departure from N(0, I) large.
_ROWS, _SHAPE = 32, (2, 2, 2)
_BATCHES = {"permutation": 16, "resampled": 128, "selected": 32}
_FEWEST_BATCHES = 8
# Rows of noise per row of data for a method that selects.
_POOL = 4
_FOREIGN_ROWS = "it returned rows that are not rows of the noise"
_NOT_THE_SAME = "the returned rows are not the same multiset: rows of the noise were lost, repeated or changed"

# Batches on which the returned rows are compared bit by bit: rows, shape of a row, dtype.
_EXACT_CASES: tuple[tuple[int, tuple[int, ...], torch.dtype], ...] = (
    (1, (3,), torch.float32),
    (2, (), torch.float32),
    (7, (5,), torch.float64),
    (16, (3, 4, 4), torch.float32),
    (16, (4, 2, 2), torch.float16),
    (16, (4, 2, 2), torch.bfloat16),
    (33, (2, 3), torch.float32),
)


@dataclass(frozen=True)
class MarginalReport:
    """What a check found.

    Attributes
    ----------
    subject : str
        Name of the method or function.
    marginal : {"permutation", "resampled", "selected"}
        What it was checked against.
    permutation : bool
        Whether every batch came back as the same multiset of rows, bit for bit.
    batches, rows, dim : int
        Batches of the statistics, rows in each, elements in a row.
    false_alarm : float
        Probability that the statistics fail a function that keeps the distribution.
    statistics : tuple of Statistic
    failures : tuple of str
        Empty if the promise was kept.
    """

    subject: str
    marginal: Marginal
    permutation: bool
    batches: int
    rows: int
    dim: int
    false_alarm: float
    statistics: tuple[Statistic, ...]
    failures: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether the promise was kept."""
        return not self.failures

    def __str__(self) -> str:
        verdict = "keeps" if self.passed else "breaks"
        lines = [
            f"{self.subject} {verdict} the marginal {self.marginal!r}"
            f" ({self.batches} batches of {self.rows} x {self.dim}, false alarms {self.false_alarm:g})"
        ]
        lines += [f"  - {failure}" for failure in self.failures]
        if self.statistics:
            lines.append(f"  {'statistic':<26}{'departure':>12}{'z':>9}{'p':>11}{'threshold':>11}")
        for s in self.statistics:
            flag = "" if s.passed else "  <-"
            lines.append(f"  {s.name:<26}{s.value:>12.4g}{s.z:>9.1f}{s.p_value:>11.2g}{s.threshold:>11.2g}{flag}")
        return "\n".join(lines)


class MarginalError(AssertionError):
    """A method or function does not keep the distribution of the noise.

    Attributes
    ----------
    report : MarginalReport
        The statistics; also the message.
    """

    def __init__(self, report: MarginalReport) -> None:
        super().__init__(str(report))
        self.report = report


def check_marginal(
    method: str | Callable[..., Any],
    *,
    marginal: Marginal = "permutation",
    needs: Needs = "cost",
    batches: int | None = None,
    seed: int = 0,
    false_alarm: float = 1e-6,
    **options: Any,
) -> MarginalReport:
    """Check that a method does to the distribution of the noise what it promises.

    Parameters
    ----------
    method : str or callable
        A registered name, or ``fn(cost, *, generator=None, **options) -> (n,) index``.
    marginal : {"permutation", "resampled", "selected"}
        The promise. ``"permutation"``: the same multiset of rows, bit for bit, on batches of several sizes, shapes and
        dtypes, with duplicated rows among them. ``"resampled"``: rows of the noise, whose distribution is N(0, I)
        averaged over the data, each used equally often on average. ``"selected"``: rows of the noise; how far the
        distribution moved is reported only.
    needs : {"cost", "points"}
        For a callable: ``"points"`` calls ``fn(data, noise, *, generator=None, **options)`` on ``(n, d)`` tensors. A
        callable that is checked against ``"selected"``, or a name that declares it, chooses from 4 rows of noise per
        row of data.
    batches : int, optional
        Batches of the statistics; by default 16, 128 or 32 for the three marginals.
    seed : int
        Of the data and the noise. Global random state is not touched.
    false_alarm : float
        Probability that the statistics fail a method that keeps its promise, over all of them (Bonferroni).
    **options
        Options of the method; with a name also those of `couplings.Coupling`, such as ``metric=``.

    Returns
    -------
    MarginalReport

    Raises
    ------
    MarginalError
        An AssertionError, if the promise is broken; it carries the report.
    ValueError, TypeError
        If an argument is wrong.

    Examples
    --------
    >>> from couplings.testing import check_marginal
    >>> check_marginal("auction").permutation
    True
    >>> check_marginal(lambda cost, *, generator=None: cost.argmin(1))
    Traceback (most recent call last):
    couplings.testing.checks.MarginalError: ...
    """
    _check_arguments(marginal, batches, false_alarm)
    if needs not in get_args(Needs):
        raise ValueError(unknown("needs", needs, get_args(Needs)))
    draw, choose = (torch.Generator().manual_seed(seed + k) for k in (0, 1))

    if isinstance(method, str):
        coupling = Coupling(method, **options)
        name, declared = str(coupling.method), find(method).info.marginal

        def run(data: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
            coupled = coupling(data, noise, generator=choose)
            return coupled.noise, coupled.index
    else:
        name, declared = _name(method), marginal

        def run(data: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
            x, y = (rows.reshape(len(rows), -1) for rows in (data, noise))
            x, y = (rows.to(torch.promote_types(rows.dtype, torch.float32)) for rows in (x, y))
            operands = (x, y) if needs == "points" else (torch.cdist(x, y).square(),)
            index = _as_index(method(*operands, generator=choose, **options), len(x), len(y))
            return noise[index], index

    pool = _POOL if declared == "selected" else 1
    failures: Counter[str] = Counter()
    for n, shape, dtype in _EXACT_CASES:
        data, noise = _clusters(n, shape, dtype, draw), torch.randn(n * pool, *shape, generator=draw).to(dtype)
        _check_batch(run, data, noise, failures)
        # Duplicated rows, and a zero that differs from 0.0 in its sign bit only.
        noise[len(noise) // 2 :] = noise[: len(noise) - len(noise) // 2].clone()
        noise[0] = -0.0
        _check_batch(run, data, noise, failures)
    data = _clusters(_ROWS, _SHAPE, torch.float32, draw)
    noises = (torch.randn(_ROWS * pool, *_SHAPE, generator=draw) for _ in range(batches or _BATCHES[marginal]))
    measured, statistics = _test_batches(run, data, noises, None, failures, false_alarm, draw)
    return _judge(name, marginal, data, measured, statistics, failures, false_alarm)


def check_coupler(
    fn: Callable[..., Any],
    *,
    condition: bool | Tensor | Sequence[int] | None = None,
    data: Tensor | None = None,
    marginal: Marginal = "permutation",
    batches: int = 128,
    seed: int = 0,
    false_alarm: float = 1e-6,
) -> MarginalReport:
    """Check that any function which pairs noise with data keeps its distribution: N(0, I), also given the class.

    Parameters
    ----------
    fn : callable
        ``fn(data, noise) -> noise`` or ``fn(data, noise, condition) -> noise`` (``condition`` also by keyword) for
        float32 tensors ``(n, *shape)`` and ``(n,)`` int64 classes; a `Coupling` will do. It must return n rows of the
        noise that it was given, unchanged, and leave its inputs alone.
    condition : bool or (n,) integer Tensor, optional
        Classes, or True for two classes far apart: p(noise | class) must be N(0, I) too. By default True if `fn`
        requires a third argument or has one named ``condition``. A third argument that is None by default is passed
        only if `condition` is given here.
    data : (n, *shape) Tensor, optional
        Data to couple; by default 32 rows of ``(2, 2, 2)`` in two clusters. Noise has its dtype and device.
    marginal, batches, seed, false_alarm
        As in `check_marginal`.

    Returns
    -------
    MarginalReport

    Raises
    ------
    MarginalError
        An AssertionError, if the check fails; it carries the report.
    ValueError, TypeError
        If an argument is wrong.

    Notes
    -----
    A row that is dropped at random, independently of its values, its position and the data, leaves the distribution
    as it was: only ``marginal="permutation"``, the default, finds that.

    Examples
    --------
    >>> from couplings import couple
    >>> from couplings.testing import check_coupler
    >>> check_coupler(lambda data, noise: couple(data, noise).noise).passed
    True
    >>> check_coupler(lambda data, noise: 1.02 * noise)
    Traceback (most recent call last):
    couplings.testing.checks.MarginalError: ...
    """
    _check_arguments(marginal, batches, false_alarm)
    if data is not None and (not data.is_floating_point() or data.ndim == 0 or data.numel() == 0):
        msg = f"data must be a floating tensor with at least one row, got {data.dtype} of shape {tuple(data.shape)}."
        raise ValueError(msg)
    draw = torch.Generator().manual_seed(seed)
    call, asks = _with_condition(fn, given=condition is not None and condition is not False)
    labels = None
    if condition is True or (condition is None and asks):
        labels = torch.arange(_ROWS if data is None else len(data)) % 2
    elif condition is not None and condition is not False:
        labels = _as_labels(condition, None if data is None else len(data))
    if data is None:
        data = _clusters(_ROWS if labels is None else len(labels), _SHAPE, torch.float32, draw, labels)
    like = data

    def run(x: Tensor, noise: Tensor) -> tuple[object, None]:
        out = call(x, noise, None if labels is None else labels.to(x.device, copy=True))
        return (out.noise if isinstance(out, Coupled) else out), None

    failures: Counter[str] = Counter()
    noises = (torch.randn(like.shape, generator=draw).to(like) for _ in range(batches))
    measured, statistics = _test_batches(run, data, noises, labels, failures, false_alarm, draw)
    return _judge(_name(fn), marginal, data, measured, statistics, failures, false_alarm)


def broken_promise(coupling: Coupling) -> str | None:
    """Measure whether a method that is not built in keeps the marginal that it declares; for trainers to warn of.

    Parameters
    ----------
    coupling : Coupling
        Its method and the method's options are measured.

    Returns
    -------
    str or None
        What is broken, in a line; None if nothing is, or the method is a built-in one.

    Notes
    -----
    Takes about a second: `check_marginal` on small batches. An error that the method raises is left to the training.

    Examples
    --------
    >>> import couplings
    >>> from couplings.testing import broken_promise
    >>> broken_promise(couplings.Coupling(lambda cost, *, generator=None: cost.argmin(1)))
    "the method <lambda> declares the marginal 'permutation' and breaks it: ..."
    """
    method = find(coupling.method)
    if method.builtin:
        return None
    options = {name: value for name, value in coupling.options.items() if name in (method.option_names or ())}
    name, declared = method.info.name, method.info.marginal
    needs: Any = {} if isinstance(coupling.method, str) else {"needs": method.info.needs}
    try:
        check_marginal(coupling.method, marginal=declared, **needs, **options)
    except MarginalError as error:
        return f"the method {name} declares the marginal {declared!r} and breaks it: {'; '.join(error.report.failures)}"
    except Exception:
        return None
    return None


_Run = Callable[[Tensor, Tensor], tuple[object, Tensor | None]]  # (data, noise) -> returned noise, index if known


class _BadIndexError(Exception):
    """A callable method returned something that is not n rows of the noise."""


def _check_batch(run: _Run, data: Tensor, noise: Tensor, failures: Counter[str]) -> Tensor | None:
    """Couple once and count what is wrong; the returned noise, or None if there is nothing to measure."""
    given_data, given_noise = data.clone(), noise.clone()
    try:
        out, index = run(given_data, given_noise)
    except (BrokenPromiseError, _BadIndexError) as error:
        failures[str(error)] += 1
        return None
    if not (_same_bits(given_data, data) and _same_bits(given_noise, noise)):
        failures["it modified its inputs"] += 1
    if not isinstance(out, Tensor):
        wrong = f"it returned {type(out).__name__}, not a tensor"
    elif out.shape != data.shape:
        wrong = f"it returned shape {tuple(out.shape)} for data of shape {tuple(data.shape)}"
    elif out.dtype is not noise.dtype or out.device != noise.device:
        wrong = f"it returned {out.dtype} on {out.device} for noise of {noise.dtype} on {noise.device}"
    elif not bool(out.isfinite().all()):
        wrong = "it returned NaN or inf"
    else:
        out = out.detach()
        if index is not None and not _same_bits(out, noise[index]):
            failures["the returned noise is not noise[index]"] += 1
        returned, passed = Counter(_row_bytes(out)), Counter(_row_bytes(noise))
        if not returned.keys() <= passed.keys():
            failures[_FOREIGN_ROWS] += 1
        if returned != passed:
            failures[_NOT_THE_SAME] += 1
        return out
    failures[wrong] += 1
    return None


def _test_batches(
    run: _Run,
    data: Tensor,
    noises: Iterable[Tensor],
    labels: Tensor | None,
    failures: Counter[str],
    false_alarm: float,
    generator: torch.Generator,
) -> tuple[int, list[Statistic]]:
    """Couple every batch of noise; the number of batches that could be measured, and the statistics."""
    x = _flat(data)
    directions = directions_to_test(x, labels, generator)
    differences: dict[str, list[Tensor]] = {}
    uses: list[Tensor] = []
    for noise in noises:
        out = _check_batch(run, data, noise, failures)
        if out is None:
            break
        uses.append(_times_used(out, noise))
        for name, difference in mean_differences(_flat(out), _flat(noise), directions, labels).items():
            differences.setdefault(name, []).append(difference)
    if len(uses) < _FEWEST_BATCHES:
        return len(uses), []
    threshold = false_alarm / (len(differences) + 1)
    statistics = [zero_mean(name, torch.stack(parts), threshold) for name, parts in differences.items()]
    counts = torch.stack(uses).sum(0)
    # Rows that are not of the noise are a failure of their own; counting the others would say no more.
    if int(counts.sum()) == len(uses) * len(x):
        statistics.append(equal_use(counts, len(uses), threshold))
    return len(uses), statistics


def _judge(
    subject: str,
    marginal: Marginal,
    data: Tensor,
    batches: int,
    statistics: list[Statistic],
    failures: Counter[str],
    false_alarm: float,
) -> MarginalReport:
    """Make the report, and raise it if the promise was broken."""
    permutation = not failures
    if marginal != "permutation":
        del failures[_NOT_THE_SAME]
    broken = [f"{reason} ({times} of the batches)" for reason, times in failures.items()]
    if marginal != "selected":
        broken += [
            f"{s.name}: off by {s.value:.3g}, z = {s.z:.1f}, p = {s.p_value:.1g}" for s in statistics if not s.passed
        ]
    rows, dim = _flat(data).shape
    report = MarginalReport(
        subject, marginal, permutation, batches, rows, dim, false_alarm, tuple(statistics), tuple(broken)
    )
    if not report.passed:
        raise MarginalError(report)
    return report


def _as_index(answer: Any, n: int, m: int) -> Tensor:
    """Check what a callable method returned."""
    index = torch.as_tensor(answer)
    if index.is_floating_point() or index.is_complex() or index.dtype is torch.bool or index.shape != (n,):
        msg = f"it returned {index.dtype} of shape {tuple(index.shape)}, not an integer index of shape ({n},)"
        raise _BadIndexError(msg)
    if int(index.min()) < 0 or int(index.max()) >= m:
        raise _BadIndexError(_FOREIGN_ROWS)
    return index.long()


def _as_labels(condition: object, n: int | None) -> Tensor:
    labels = torch.as_tensor(condition).cpu()
    if labels.is_floating_point() or labels.is_complex() or labels.ndim != 1 or n not in (None, len(labels)):
        msg = (
            f"condition= must be True, False or integer classes of shape ({'n' if n is None else n},), "
            f"got {labels.dtype} of shape {tuple(labels.shape)}."
        )
        raise ValueError(msg)
    return labels.long()


def _with_condition(
    fn: Callable[..., Any], *, given: bool
) -> tuple[Callable[[Tensor, Tensor, Tensor | None], Any], bool]:
    """Make `fn` a function of three arguments, and say whether it asks for a condition.

    A third argument that is None by default is taken for the condition only if the caller gave one.
    """
    try:
        parameters = inspect.signature(fn).parameters
    except (TypeError, ValueError):  # some builtins have no signature
        return (lambda x, noise, _: fn(x, noise)), False
    named = parameters.get("condition")
    if named is not None and named.kind is not named.POSITIONAL_ONLY:
        return (lambda x, noise, c: fn(x, noise, condition=c)), True
    positional = [p for p in parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    optional = (inspect.Parameter.empty, None) if given else (inspect.Parameter.empty,)
    if len(positional) > 2 and positional[2].default in optional:
        return (lambda x, noise, c: fn(x, noise, c)), True
    return (lambda x, noise, _: fn(x, noise)), False


def _check_arguments(marginal: str, batches: int | None, false_alarm: float) -> None:
    if marginal not in get_args(Marginal):
        raise ValueError(unknown("marginal", marginal, get_args(Marginal)))
    if batches is not None and batches < _FEWEST_BATCHES:
        msg = f"batches= must be at least {_FEWEST_BATCHES} for a test over batches, got {batches}."
        raise ValueError(msg)
    if not 0.0 < false_alarm < 1.0:
        msg = f"false_alarm= is a probability between 0 and 1, got {false_alarm}."
        raise ValueError(msg)


def _clusters(
    n: int, shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator, labels: Tensor | None = None
) -> Tensor:
    """Draw data in two clusters (or one per class) off the origin, so that noise which follows the data is biased."""
    d = math.prod(shape)
    classes = torch.arange(n) % 2 if labels is None else torch.unique(labels, return_inverse=True)[1]
    centres = torch.randn(int(classes.max()) + 1, d, generator=generator)
    centres = 2.0 * math.sqrt(d) * torch.nn.functional.normalize(centres, dim=1)
    rows = 0.5 + centres[classes] + 0.5 * torch.randn(n, d, generator=generator)
    return rows.reshape(n, *shape).to(dtype)


def _times_used(out: Tensor, noise: Tensor) -> Tensor:
    """``(m,)`` counts: how often each row of the noise was returned."""
    position = {row: j for j, row in enumerate(_row_bytes(noise))}
    found = [position[row] for row in _row_bytes(out) if row in position]
    return torch.bincount(torch.tensor(found, dtype=torch.int64), minlength=len(noise))


def _flat(rows: Tensor) -> Tensor:
    return rows.detach().reshape(len(rows), -1).double().cpu()


def _row_bytes(rows: Tensor) -> list[bytes]:
    flat = rows.reshape(len(rows), -1).cpu().contiguous().view(torch.uint8).numpy()
    return [row.tobytes() for row in flat]


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and _row_bytes(a) == _row_bytes(b)


def _name(fn: Callable[..., Any]) -> str:
    return str(getattr(fn, "__name__", type(fn).__name__))
