"""Hold a coupling to its promise: checks for users' own methods, and instances whose optimum is known.

`check_marginal` takes a method, `check_coupler` any function ``(data, noise) -> noise``. Both return a
`MarginalReport`, or raise `MarginalError`, an AssertionError that carries it. The strategies (`translations`,
`planted_permutations`, `sorted_1d`, `convex_gradients`, `batches`) are for Hypothesis, which ``pip install
'couplings[test]'`` brings; the checks work without it.

How the noise is held to its law
--------------------------------
The data is drawn once and stays; every batch brings fresh noise from N(0, I). Of each batch the mean of some
function of the returned rows is taken, minus its mean over the rows that were passed in. Both have the same
expectation if the law is kept, whatever the dependence within the batch, and batches are independent of one
another: a t-test over batches decides. A permutation gives differences of exactly 0; a change that touches
few rows stands out, since all others cancel. The functions are the coordinates (mean), their squares and the
squared norm (variance), the norm, fourth powers (kurtosis), products (correlation) and indicators of
half-spaces (Kolmogorov-Smirnov), along random directions and along those of the data: its mean, its principal
axis, the differences of its classes. Where a condition is given, the same holds for the rows of each class.
How often each position of the noise was used is compared with the binomial law, which bounds rows drawn
independently, or without replacement, from above.
"""

from __future__ import annotations

import inspect
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor

from couplings._names import unknown
from couplings._types import Marginal, Needs
from couplings.assigners.method import Assignment, BrokenPromiseError
from couplings.assigners.registry import find
from couplings.coupling import Coupled, couple
from couplings.diagnostics import ClassLeakage, MarginalDrift, class_leakage, marginal_drift

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

__all__ = [
    "Instance",
    "MarginalError",
    "MarginalReport",
    "Statistic",
    "batches",
    "check_coupler",
    "check_marginal",
    "convex_gradients",
    "planted_permutations",
    "sorted_1d",
    "translations",
]

# Few elements make a coupling strong, and every departure from the law large.
_ROWS, _SHAPE = 32, (2, 2, 2)
_BATCHES = {"permutation": 16, "resampled": 128, "selected": 32}
_POOL = 4
_DIRECTIONS = 8
_QUANTILES = 13
# Means of the same rows in another order differ by rounding.
_ROUNDING = 1e-10
# The drift and the leakage that are reported read at most this many elements.
_KEPT_ELEMENTS = 1 << 22

_CASES: tuple[tuple[int, tuple[int, ...], torch.dtype], ...] = (
    (1, (3,), torch.float32),
    (2, (), torch.float32),
    (7, (5,), torch.float64),
    (16, (3, 4, 4), torch.float32),
    (16, (4, 2, 2), torch.float16),
    (16, (4, 2, 2), torch.bfloat16),
    (33, (2, 3), torch.float32),
)


@dataclass(frozen=True)
class Statistic:
    """One family of tests.

    Attributes
    ----------
    name : str
        What was tested, such as ``"variance"`` or ``"mean | class 1"``.
    value : float
        Departure from the expectation under N(0, I) of the family's worst member, in its own unit (for
        ``"ks"`` the distance, for ``"use of rows"`` the uses per batch beyond what is expected).
    z : float
        That member's test statistic, in standard deviations.
    p_value : float
        Of the family, corrected for the number of its members.
    threshold : float
        The family fails if its p-value is below this.
    """

    name: str
    value: float
    z: float
    p_value: float
    threshold: float

    @property
    def passed(self) -> bool:
        """Whether the p-value reaches the threshold."""
        return self.p_value >= self.threshold


@dataclass(frozen=True)
class MarginalReport:
    """What a check found.

    Attributes
    ----------
    subject : str
        What was checked.
    marginal : str
        What it was held to.
    permutation : bool
        Whether every batch came back as the same multiset of rows, bit for bit.
    batches, rows, dim : int
        Batches of the statistics, rows in each, elements in a row.
    false_alarm : float
        Chance that the statistics fail a function that keeps the law.
    statistics : tuple of Statistic
    drift : MarginalDrift or None
        The returned noise against the noise that was passed in; None if no batch came back whole.
    leakage : ClassLeakage or None
        Whether the class can be told from the noise, where a condition was given.
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
    drift: MarginalDrift | None
    leakage: ClassLeakage | None
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
        if self.drift is not None:
            lines.append(f"  {self.drift}")
        if self.leakage is not None:
            lines.append(f"  {self.leakage}")
        return "\n".join(lines)


class MarginalError(AssertionError):
    """A broken promise.

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
    """Hold a method to what it promises about the distribution of the noise.

    Parameters
    ----------
    method : str or callable
        A registered name, or ``fn(cost, *, generator=None, **options) -> (n,) index``.
    marginal : {"permutation", "resampled", "selected"}
        The promise. ``"permutation"``: the same multiset of rows, bit for bit, on batches of several sizes,
        shapes and dtypes, with duplicated rows among them. ``"resampled"``: rows of the noise, whose law is
        N(0, I) averaged over the data, each used equally often on average (see the notes of this module).
        ``"selected"``: rows of the noise; how far the law moved is reported only.
    needs : {"cost", "points"}
        For a callable: ``"points"`` calls ``fn(data, noise, *, generator=None, **options)`` on ``(n, d)``
        tensors. A callable that is held to ``"selected"``, or a name that declares it, chooses from 4 rows of
        noise per row of data.
    batches : int, optional
        Batches of the statistics; by default 16, 128 or 32 for the three marginals.
    seed : int
        Of the data and the noise. The check draws nothing from the global random state.
    false_alarm : float
        Chance that the statistics fail a method that keeps its promise, over all of them (Bonferroni).
    **options
        Passed on: options of the method; with a name also those of `couplings.couple`, such as ``metric=``.

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
    couplings.testing.MarginalError: ...
    """
    _check_arguments(marginal, batches, false_alarm)
    if needs not in get_args(Needs):
        raise ValueError(unknown("needs", needs, get_args(Needs)))
    entry = find(method)
    declared = entry.info.marginal if isinstance(method, str) else marginal
    pool = _POOL if declared == "selected" else 1
    draw = torch.Generator().manual_seed(seed)
    choose = torch.Generator().manual_seed(seed + 1)

    def run(data: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        if isinstance(method, str):
            coupled = couple(data, noise, method, generator=choose, **options)
            return coupled.noise, coupled.index
        x, y = (
            rows.reshape(len(rows), -1).to(torch.promote_types(rows.dtype, torch.float32)) for rows in (data, noise)
        )
        operands = (x, y) if needs == "points" else (torch.cdist(x, y).square(),)
        answer = method(*operands, generator=choose, **options)
        index = answer.index if isinstance(answer, Assignment) else answer
        index = entry.checked_index(index, len(data), len(noise), "resampled")
        return noise[index], index

    ledger = _Ledger(entry.info.name, marginal, false_alarm)
    for n, shape, dtype in _CASES:
        data, noise = _data(n, shape, dtype, draw), torch.randn(n * pool, *shape, generator=draw).to(dtype)
        _check_case(ledger, run, data, noise)
        # Duplicated rows, and zeros that differ in sign only: equal to the eye, not bit for bit.
        noise[len(noise) // 2 :] = noise[: len(noise) - len(noise) // 2].clone()
        noise[0] = -0.0
        _check_case(ledger, run, data, noise)
    data = _data(_ROWS, _SHAPE, torch.float32, draw)
    ledger.start(data, None, draw)
    for _ in range(batches or _BATCHES[marginal]):
        noise = torch.randn(_ROWS * pool, *_SHAPE, generator=draw)
        if not _check_case(ledger, run, data, noise, measure=True):
            break
    return ledger.close()


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
    """Hold any function that pairs noise with data to its law: N(0, I), and N(0, I) given the class.

    Parameters
    ----------
    fn : callable
        ``fn(data, noise) -> noise`` or ``fn(data, noise, condition) -> noise`` (``condition`` also by
        keyword) for float32 tensors ``(n, *shape)`` and ``(n,)`` int64 classes. A `Coupling` will do. It must
        return n rows of the noise that it was given, unchanged, and leave its inputs alone.
    condition : bool or (n,) integer Tensor, optional
        True: couple conditional data, of two classes far apart, and require p(noise | class) to be N(0, I)
        too. A tensor: the same with these classes. False: no condition. By default True if `fn` requires a
        third argument, or has one named ``condition``, and False otherwise. A function of two arguments is
        not told the classes; a third one that is None by default is told them if `condition` is given.
    data : (n, *shape) Tensor, optional
        Data to couple; by default 32 rows of ``(2, 2, 2)`` in two clusters. Noise is drawn in its dtype, onto
        its device.
    marginal : {"permutation", "resampled", "selected"}
        ``"permutation"``: the same multiset of rows, bit for bit, in every batch, and the law. ``"resampled"``:
        the law only, rows may repeat. ``"selected"``: rows of the noise, the rest is reported.
    batches : int
        Calls of `fn`.
    seed : int
        Of the data and the noise. The check draws nothing from the global random state.
    false_alarm : float
        Chance that the statistics fail a function that keeps the law, over all of them (Bonferroni).

    Returns
    -------
    MarginalReport

    Raises
    ------
    MarginalError
        An AssertionError, if anything is off; it carries the report.
    ValueError, TypeError
        If an argument is wrong.

    Notes
    -----
    A row that is dropped at random, independently of its values, its position and the data, leaves the law as
    it was: only ``marginal="permutation"``, the default, finds that.

    Examples
    --------
    >>> from couplings import couple
    >>> from couplings.testing import check_coupler
    >>> check_coupler(lambda data, noise: couple(data, noise).noise).passed
    True
    >>> check_coupler(lambda data, noise: 1.02 * noise)
    Traceback (most recent call last):
    couplings.testing.MarginalError: ...
    """
    _check_arguments(marginal, batches, false_alarm)
    draw = torch.Generator().manual_seed(seed)
    call, wanted = _calling(fn, conditional=condition is not None and condition is not False)
    labels: Tensor | None = None
    if condition is True or (condition is None and wanted):
        labels = torch.arange(_ROWS if data is None else len(data)) % 2
    elif condition is not None and condition is not False:
        labels = _labels(condition, None if data is None else len(data))
    if data is None:
        data = _data(_ROWS if labels is None else len(labels), _SHAPE, torch.float32, draw, labels)
    elif not data.is_floating_point() or data.ndim == 0 or data.numel() == 0:
        msg = f"data must be a floating tensor with at least one row, got {data.dtype} of shape {tuple(data.shape)}."
        raise ValueError(msg)
    told = None if labels is None else labels.to(data.device)

    def run(x: Tensor, noise: Tensor) -> tuple[object, Tensor | None]:
        out = call(x, noise, None if told is None else told.clone())
        return (out.noise if isinstance(out, Coupled) else out), None

    ledger = _Ledger(getattr(fn, "__name__", type(fn).__name__), marginal, false_alarm)
    ledger.start(data, labels, draw)
    for _ in range(batches):
        noise = torch.randn(data.shape, generator=draw).to(data)
        if not _check_case(ledger, run, data, noise, measure=True):
            break
    return ledger.close()


def _check_arguments(marginal: str, batches: int | None, false_alarm: float) -> None:
    if marginal not in get_args(Marginal):
        raise ValueError(unknown("marginal", marginal, get_args(Marginal)))
    if batches is not None and batches < 8:
        msg = f"batches= must be at least 8 for a test over batches, got {batches}."
        raise ValueError(msg)
    if not 0.0 < false_alarm < 1.0:
        msg = f"false_alarm= is a probability between 0 and 1, got {false_alarm}."
        raise ValueError(msg)


def _labels(condition: object, n: int | None) -> Tensor:
    labels = torch.as_tensor(condition).cpu()
    if labels.is_floating_point() or labels.is_complex() or labels.ndim != 1 or n not in (None, len(labels)):
        msg = (
            f"condition= must be True, False or integer classes of shape ({'n' if n is None else n},), "
            f"got {labels.dtype} of shape {tuple(labels.shape)}."
        )
        raise ValueError(msg)
    return labels.long()


def _calling(
    fn: Callable[..., Any], *, conditional: bool
) -> tuple[Callable[[Tensor, Tensor, Tensor | None], Any], bool]:
    """How to hand `fn` its condition, and whether it asks for one.

    A third argument that may be left out, and is None then, is taken for the condition if the caller speaks of one.
    """
    try:
        parameters = inspect.signature(fn).parameters
    except (TypeError, ValueError):  # some builtins have no signature
        return (lambda x, noise, _: fn(x, noise)), False
    positional = [p for p in parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    named = parameters.get("condition")
    if named is not None and named.kind is not named.POSITIONAL_ONLY:
        return (lambda x, noise, c: fn(x, noise, condition=c)), True
    if len(positional) > 2 and positional[2].default in (inspect.Parameter.empty, *([None] if conditional else [])):
        return (lambda x, noise, c: fn(x, noise, c)), True
    return (lambda x, noise, _: fn(x, noise)), False


def _data(
    n: int, shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator, labels: Tensor | None = None
) -> Tensor:
    """Two clusters (or one per class), off the origin: whatever follows the data is led somewhere."""
    d = math.prod(shape)
    classes = torch.arange(n) % 2 if labels is None else torch.unique(labels, return_inverse=True)[1]
    centres = torch.randn(int(classes.max()) + 1, d, generator=generator)
    centres = 2.0 * math.sqrt(d) * torch.nn.functional.normalize(centres, dim=1)
    rows = 0.5 + centres[classes] + 0.5 * torch.randn(n, d, generator=generator)
    return rows.reshape(n, *shape).to(dtype)


def _check_case(
    ledger: _Ledger,
    run: Callable[[Tensor, Tensor], tuple[object, Tensor | None]],
    data: Tensor,
    noise: Tensor,
    *,
    measure: bool = False,
) -> bool:
    """Run one batch and book it; False if there is nothing to measure."""
    given_data, given_noise = data.clone(), noise.clone()
    try:
        out, index = run(given_data, given_noise)
    except BrokenPromiseError as error:
        return ledger.fail(str(error))
    if not (_same_bits(given_data, data) and _same_bits(given_noise, noise)):
        ledger.fail("it modified its inputs")
    if not isinstance(out, Tensor):
        return ledger.fail(f"it returned {type(out).__name__}, not a tensor")
    out = out.detach()
    if out.shape != data.shape:
        return ledger.fail(f"it returned shape {tuple(out.shape)} for data of shape {tuple(data.shape)}")
    if out.dtype is not noise.dtype or out.device != noise.device:
        return ledger.fail(f"it returned {out.dtype} on {out.device} for noise of {noise.dtype} on {noise.device}")
    if not bool(out.isfinite().all()):
        return ledger.fail("it returned NaN or inf")
    if index is not None and not _same_bits(out, noise[index]):
        ledger.fail("the returned noise is not noise[index]")
    ledger.count(out, noise, measure=measure)
    return True


def _bytes(rows: Tensor) -> list[bytes]:
    flat = rows.reshape(len(rows), -1).cpu().contiguous().view(torch.uint8).numpy()
    return [row.tobytes() for row in flat]


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and _bytes(a) == _bytes(b)


@dataclass
class _Ledger:
    """What the batches showed so far."""

    subject: str
    marginal: Marginal
    false_alarm: float
    failures: dict[str, int] = field(default_factory=dict)
    permutation: bool = True
    data: Tensor = field(default_factory=lambda: torch.empty(0))
    labels: Tensor | None = None
    rows: int = 0
    dim: int = 0
    directions: Tensor | None = None
    differences: dict[str, list[Tensor]] = field(default_factory=dict)
    uses: list[Tensor] = field(default_factory=list)
    measured: int = 0
    kept: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def fail(self, reason: str) -> bool:
        self.failures[reason] = self.failures.get(reason, 0) + 1
        return False

    def start(self, data: Tensor, labels: Tensor | None, generator: torch.Generator) -> None:
        """Choose the directions to look along."""
        x = data.detach().reshape(len(data), -1).double().cpu()
        self.data, self.rows, self.dim, self.labels = x, len(x), x.shape[1], labels
        basis = torch.randn(self.dim, min(self.dim, _DIRECTIONS), generator=generator, dtype=torch.float64)
        centre = x.mean(0)
        led = [centre, torch.linalg.svd(x - centre, full_matrices=False).Vh[0]]
        if labels is not None:
            led += [x[labels == c].mean(0) - centre for c in torch.unique(labels)[:_DIRECTIONS]]
        columns = [*torch.linalg.qr(basis).Q.T, *(v for v in led if float(v.norm()) > 1e-9)]
        self.directions = torch.stack([v / v.norm() for v in columns], 1)

    def count(self, out: Tensor, noise: Tensor, *, measure: bool) -> None:
        """Book a batch: where its rows came from and, if it is to be measured, what they are like."""
        returned, passed = _bytes(out), _bytes(noise)
        available, taken = Counter(passed), Counter(returned)
        strangers = sum(row not in available for row in returned)
        if strangers:
            self.fail("it returned rows that are not rows of the noise")
        if taken != available:
            self.permutation = False
            if self.marginal == "permutation":
                self.fail(
                    "the returned rows are not the same multiset: rows of the noise were lost, repeated or changed"
                )
        if not measure or self.directions is None:
            return
        where = {row: j for j, row in enumerate(passed)}
        self.uses.append(
            torch.bincount(torch.tensor([where[row] for row in returned if row in where]).long(), minlength=len(passed))
        )
        self.measured += 1
        x, y = (rows.reshape(len(rows), -1).double().cpu() for rows in (out, noise))
        if sum(a.numel() for a, _ in self.kept) < _KEPT_ELEMENTS:
            self.kept.append((x, y))
        of_x, of_y = _features(x, self.directions), _features(y, self.directions)
        for name in of_x:
            self._book(name, of_x[name].mean(0) - of_y[name].mean(0))
            if self.labels is not None:
                for c in torch.unique(self.labels):
                    mine = self.labels == c
                    self._book(f"{name} | class {int(c)}", of_x[name][mine].mean(0) - of_y[name][mine].mean(0))

    def _book(self, name: str, difference: Tensor) -> None:
        self.differences.setdefault(name, []).append(
            torch.where(difference.abs() <= _ROUNDING, torch.zeros_like(difference), difference)
        )

    def close(self) -> MarginalReport:
        """Test, report and raise."""
        statistics = self._statistics() if self.measured >= 8 else ()
        failures = [f"{reason} ({times} of the batches)" for reason, times in self.failures.items()]
        if self.marginal != "selected":
            failures += [
                f"{s.name}: off by {s.value:.3g}, z = {s.z:.1f}, p = {s.p_value:.1g}"
                for s in statistics
                if not s.passed
            ]
        drift = leakage = None
        if self.kept:
            out, drawn = (torch.cat(rows) for rows in zip(*self.kept, strict=True))
            drift = marginal_drift(out, drawn)
            if self.labels is not None and len(torch.unique(self.labels)) > 1:
                times = len(self.kept)
                leakage = class_leakage(out, self.labels.repeat(times), data=self.data.repeat(times, 1), shuffles=50)
        report = MarginalReport(
            subject=self.subject,
            marginal=self.marginal,
            permutation=self.permutation and not self.failures,
            batches=self.measured,
            rows=self.rows,
            dim=self.dim,
            false_alarm=self.false_alarm,
            statistics=statistics,
            drift=drift,
            leakage=leakage,
            failures=tuple(failures),
        )
        if failures:
            raise MarginalError(report)
        return report

    def _statistics(self) -> tuple[Statistic, ...]:
        threshold = self.false_alarm / (len(self.differences) + 1)
        families = [_worst(name, torch.stack(difference), threshold) for name, difference in self.differences.items()]
        used = torch.stack(self.uses).sum(0)
        # Rows from elsewhere are a failure of their own; counting those that are left would say no more.
        whole = int(used.sum()) == self.measured * self.rows
        return (*families, self._use_of_rows(used, threshold)) if whole else tuple(families)

    def _use_of_rows(self, used: Tensor, threshold: float) -> Statistic:
        from scipy.special import bdtr, bdtrc, ndtri

        trials, share = self.measured * self.rows, 1.0 / len(used)
        few, many = bdtr(used.numpy(), trials, share), bdtrc(used.numpy() - 1, trials, share)
        p_values = torch.as_tensor(2.0 * few).minimum(torch.as_tensor(2.0 * many))
        p, worst = float(p_values.min()), int(p_values.argmin())
        excess = float(used[worst]) - trials * share
        z = math.copysign(-float(ndtri(max(min(p / 2.0, 0.5), 1e-300))), excess) if excess else 0.0
        return Statistic("use of rows", excess / self.measured, z, min(1.0, p * len(used)), threshold)


def _features(x: Tensor, directions: Tensor) -> dict[str, Tensor]:
    """Functions of single rows whose means make up the statistics: ``(rows, members)`` each."""
    z = x @ directions
    squared_norm = x.square().sum(1, keepdim=True)
    first, second = torch.triu_indices(z.shape[1], z.shape[1], offset=1)
    levels = torch.special.ndtri(torch.linspace(0.05, 0.95, _QUANTILES, dtype=z.dtype))
    return {
        "mean": z,
        "variance": torch.cat([z.square(), squared_norm / x.shape[1]], 1),
        "norm": squared_norm.sqrt(),
        "kurtosis": z.pow(4),
        "correlation": z[:, first] * z[:, second],
        "ks": (z[:, :, None] <= levels).flatten(1).to(z.dtype),
    }


def _worst(name: str, differences: Tensor, threshold: float) -> Statistic:
    """Test that every column has mean 0, and report the one that is farthest from it."""
    from scipy.special import stdtr

    t = _t_statistics(differences)
    worst = int(t.abs().argmax())
    size, members = differences.shape
    p = 2.0 * float(stdtr(size - 1, -abs(float(t[worst])))) * members
    return Statistic(name, float(differences[:, worst].mean()), float(t[worst]), min(1.0, p), threshold)


def _t_statistics(differences: Tensor) -> Tensor:
    """Student's t per column, or its correction for skewness where that is smaller.

    Skewed differences give Student's t one heavy tail, which at these levels is off by orders of magnitude; the
    cubic transformation removes it (Hall 1992, J. R. Statist. Soc. B 54, 221-228). It inflates the other tail where
    few batches differ from 0 at all, so the smaller of the two counts.
    """
    size = len(differences)
    mean, deviation = differences.mean(0), differences.std(0, correction=0)
    # Equal numbers have a deviation of rounding; the floor leaves a statistic that is huge, or 0 for zeros.
    s = mean / deviation.clamp_min(1e-12).maximum(1e-9 * mean.abs())
    skewness = ((differences - mean) / deviation.clamp_min(1e-12)).pow(3).mean(0)
    hall = s + skewness * s**2 / 3 + skewness**2 * s**3 / 27 + skewness / (6 * size)
    smaller = torch.where(hall * s > 0, torch.minimum(s.abs(), hall.abs()), 0.0)
    return smaller.copysign(s) * math.sqrt(size - 1)


@dataclass(frozen=True, eq=False)
class Instance:
    """A batch whose optimal pairing is known.

    Attributes
    ----------
    data, noise : (n, *shape) Tensor
    index : (n,) int64 Tensor
        An optimal pairing: row i of the data with row ``index[i]`` of the noise. Others may cost the same.
    metrics : tuple of str
        The metrics that it is optimal for.
    """

    data: Tensor
    noise: Tensor
    index: Tensor
    metrics: tuple[str, ...]


def translations(
    *, max_rows: int = 8, max_dim: int = 4, dtype: torch.dtype = torch.float32
) -> SearchStrategy[Instance]:
    """Noise that is the data moved by one vector, and shuffled.

    Every cost that is convex in the difference is at its least where all differences are equal (Jensen).

    Parameters
    ----------
    max_rows, max_dim : int
    dtype : torch.dtype
        Values are multiples of 1/8 up to 8: exact in every floating type but the 8-bit ones.

    Returns
    -------
    SearchStrategy of Instance

    Raises
    ------
    ImportError
        If Hypothesis is not installed.
    """
    st = _strategies()

    @st.composite  # type: ignore[untyped-decorator, unused-ignore]
    def build(draw: Any) -> Instance:
        data = _grid(draw, st, max_rows, max_dim)
        vector = torch.tensor(draw(st.lists(_eighths(st), min_size=data.shape[1], max_size=data.shape[1])))
        return _shuffled(draw, st, data, data + vector, dtype, ("sqeuclidean", "dot", "l2", "l1"))

    strategy: SearchStrategy[Instance] = build()
    return strategy


def planted_permutations(
    *, max_rows: int = 8, max_dim: int = 4, dtype: torch.dtype = torch.float32
) -> SearchStrategy[Instance]:
    """Noise that is the data, shaken by less than a quarter of its least distance, and shuffled.

    Each row and its partner are nearest to one another: the pairing is the only optimum, and what `greedy`
    and `stable` must find too.

    Parameters
    ----------
    max_rows, max_dim : int
    dtype : torch.dtype

    Returns
    -------
    SearchStrategy of Instance

    Raises
    ------
    ImportError
        If Hypothesis is not installed.
    """
    st = _strategies()

    @st.composite  # type: ignore[untyped-decorator, unused-ignore]
    def build(draw: Any) -> Instance:
        data = 8.0 * _grid(draw, st, max_rows, max_dim, unique=True)
        n, d = data.shape
        shaken = draw(st.lists(st.lists(st.integers(-1, 1), min_size=d, max_size=d), min_size=n, max_size=n))
        # Distinct rows are 1 apart in every metric; a row moves by at most 3/16 in l1.
        noise = data + torch.tensor(shaken).float() * (3.0 / 16.0 / d)
        return _shuffled(draw, st, data, noise, dtype, ("sqeuclidean", "dot", "l2", "l1"))

    strategy: SearchStrategy[Instance] = build()
    return strategy


def sorted_1d(*, max_rows: int = 8, dtype: torch.dtype = torch.float32) -> SearchStrategy[Instance]:
    """Numbers, of shape ``(n,)``: pairing them in order is optimal for every cost convex in the difference.

    Parameters
    ----------
    max_rows : int
    dtype : torch.dtype

    Returns
    -------
    SearchStrategy of Instance

    Raises
    ------
    ImportError
        If Hypothesis is not installed.
    """
    st = _strategies()

    @st.composite  # type: ignore[untyped-decorator, unused-ignore]
    def build(draw: Any) -> Instance:
        data = _grid(draw, st, max_rows, 1).flatten()
        noise = torch.tensor(draw(st.lists(_eighths(st), min_size=len(data), max_size=len(data))))
        index = torch.empty(len(data), dtype=torch.int64)
        index[data.argsort(stable=True)] = noise.argsort(stable=True)
        return Instance(data.to(dtype), noise.to(dtype), index, ("sqeuclidean", "dot", "l2", "l1"))

    strategy: SearchStrategy[Instance] = build()
    return strategy


def convex_gradients(
    *, max_rows: int = 8, max_dim: int = 4, dtype: torch.dtype = torch.float32
) -> SearchStrategy[Instance]:
    """Noise that is the gradient of a convex function at the data, shuffled.

    Optimal for squared distances (Brenier). The function is ``|B x|^2 / 2 + sum(a x^2 / 2 + 8 b exp(x / 8))`` with
    a, b >= 0.

    Parameters
    ----------
    max_rows, max_dim : int
    dtype : torch.dtype

    Returns
    -------
    SearchStrategy of Instance

    Raises
    ------
    ImportError
        If Hypothesis is not installed.
    """
    st = _strategies()

    @st.composite  # type: ignore[untyped-decorator, unused-ignore]
    def build(draw: Any) -> Instance:
        data = _grid(draw, st, max_rows, max_dim)
        d = data.shape[1]
        matrix = torch.tensor(draw(st.lists(st.integers(-2, 2), min_size=d * d, max_size=d * d))).float()
        root = matrix.reshape(d, d)
        a, b = draw(st.integers(0, 2)), draw(st.integers(0, 2))
        noise = data @ (root.T @ root) + a * data + b * (data / 8.0).exp()
        return _shuffled(draw, st, data, noise, dtype, ("sqeuclidean", "dot"))

    strategy: SearchStrategy[Instance] = build()
    return strategy


def batches(
    *,
    max_rows: int = 12,
    min_rows: int = 1,
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.float64, torch.float16, torch.bfloat16),
    pool: int = 1,
) -> SearchStrategy[tuple[Tensor, Tensor]]:
    """Arbitrary data and noise, for what must hold on every batch.

    Numbers, vectors and images; Gaussian values, a few integers (ties, duplicated rows) or one constant.

    Parameters
    ----------
    max_rows, min_rows : int
        Rows of the data.
    dtypes : sequence of torch.dtype
    pool : int
        Rows of noise per row of data.

    Returns
    -------
    SearchStrategy of (Tensor, Tensor)
        ``(n, *shape)`` data and ``(pool * n, *shape)`` noise.

    Raises
    ------
    ImportError
        If Hypothesis is not installed.
    """
    st = _strategies()

    @st.composite  # type: ignore[untyped-decorator, unused-ignore]
    def build(draw: Any) -> tuple[Tensor, Tensor]:
        n = draw(st.integers(min_rows, max_rows))
        shape = draw(st.sampled_from([(), (1,), (5,), (3, 2, 2), (2, 3)]))
        dtype = draw(st.sampled_from(list(dtypes)))
        generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))

        def values(rows: int) -> Tensor:
            kind = draw(st.sampled_from(["gaussian", "integers", "constant"]))
            if kind == "gaussian":
                return torch.randn(rows, *shape, generator=generator).to(dtype)
            if kind == "integers":
                return torch.randint(-1, 2, (rows, *shape), generator=generator).to(dtype)
            return torch.full((rows, *shape), draw(_eighths(st)), dtype=dtype)

        return values(n), values(pool * n)

    strategy: SearchStrategy[tuple[Tensor, Tensor]] = build()
    return strategy


def _strategies() -> Any:
    try:
        from hypothesis import strategies
    except ImportError as error:
        msg = "the strategies need Hypothesis, which is not installed. Type: pip install 'couplings[test]'"
        raise ImportError(msg) from error
    return strategies


def _eighths(st: Any) -> Any:
    return st.integers(-64, 64).map(lambda k: k / 8.0)


def _grid(draw: Any, st: Any, max_rows: int, max_dim: int, *, unique: bool = False) -> Tensor:
    """``(n, d)`` multiples of 1/8."""
    d = draw(st.integers(1, max_dim))
    row = st.tuples(*[_eighths(st)] * d)
    return torch.tensor(draw(st.lists(row, min_size=1, max_size=max_rows, unique=unique)), dtype=torch.float32)


def _shuffled(
    draw: Any, st: Any, data: Tensor, noise: Tensor, dtype: torch.dtype, metrics: tuple[str, ...]
) -> Instance:
    order = torch.tensor(draw(st.permutations(range(len(data)))))
    return Instance(data.to(dtype), noise[order].to(dtype), order.argsort(), metrics)
