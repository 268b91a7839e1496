"""Random calls of `couple` and `Coupling`: each must give a right answer or a documented error.

What is called is drawn from a seed: shapes, types, strides, values, method, metric, quantizer, condition, options, and
now and then something that no call may have. A right answer is rows of the noise, bit for bit, by an index that keeps
what the method promises; for exact methods no total is above SciPy's on float64 costs. An error is documented if the
library raised it itself, in one line. What can be coupled must be, and what cannot must not.
"""

from __future__ import annotations

import copy
import math
import pickle
import random
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

import couplings
from couplings import Coupled, Coupling, couple
from couplings.assigners.registry import ALIASES, find
from couplings.testing.oracles import distances, paired, rows_of, same_bits

from ..record import ROOT
from .trial import Outcome, judged, sized

CALLS = 10_000
PATIENCE = 120.0  # seconds for one call, and for what it compiles
LONGEST = 1000  # letters of an error

LIBRARY = Path(couplings.__file__).parent
TRAINERS = ROOT / "integrations"
METHODS = (*(info.name for info in couplings.methods()), *ALIASES)
SHAPES = ((), (1,), (5,), (64,), (2, 3), (3, 4, 4), (1, 8, 8), (2, 2, 2, 2))
FLOATS = (torch.float32, torch.float32, torch.float64, torch.float16, torch.bfloat16)
OTHER_TYPES = (torch.int64, torch.uint8, torch.bool, torch.complex64)
VALUES: dict[str, Callable[[Any, tuple[int, ...]], Any]] = {
    "normal": lambda rng, shape: rng.standard_normal(shape),
    "image": lambda rng, shape: rng.uniform(-1, 1, shape),
    "integers": lambda rng, shape: rng.integers(-1, 2, shape),
    "constant": lambda rng, shape: np.full(shape, rng.normal()),
    "zeros": lambda _, shape: np.zeros(shape),
    "repeated": lambda rng, shape: np.repeat(rng.standard_normal(shape), 2, 0)[: shape[0]],
    "far": lambda rng, shape: rng.standard_normal(shape) + 10.0 ** rng.integers(1, 5),
    "small": lambda rng, shape: rng.standard_normal(shape) * 10.0 ** -rng.integers(3, 40),
    "large": lambda rng, shape: rng.standard_normal(shape) * 10.0 ** rng.integers(3, 20),
    "one huge": lambda rng, shape: np.where(rng.random(shape) < 0.02, 1e15, rng.standard_normal(shape)),
    "NaN": lambda rng, shape: np.where(rng.random(shape) < 0.1, np.nan, rng.standard_normal(shape)),
    "infinity": lambda rng, shape: np.where(rng.random(shape) < 0.1, -np.inf, rng.standard_normal(shape)),
}
TENSORS: dict[str, Callable[[Tensor], Any]] = {
    "as made": lambda t: t,
    "every other row": lambda t: t.repeat_interleave(2, 0)[::2],
    "axes backwards": lambda t: t.permute(*range(t.ndim)[::-1]).contiguous().permute(*range(t.ndim)[::-1]),
    "expanded": lambda t: t[:1].expand(t.shape),
    "channels last": lambda t: t.to(memory_format=torch.channels_last) if t.ndim == 4 else t,
    "negated view": lambda t: torch.complex(t, -t).conj().imag if t.dtype in (torch.float32, torch.float64) else t,
    "part of another": lambda t: torch.cat([t.flatten(), t.flatten()])[t.numel() :].view(t.shape),
    "leaf": lambda t: t.requires_grad_() if t.is_floating_point() else t,
    "graph": lambda t: t.requires_grad_() * 1 if t.is_floating_point() else t,
    "parameter": lambda t: torch.nn.Parameter(t, requires_grad=t.is_floating_point()),
}
ARRAYS: dict[str, Callable[[Any], Any]] = {
    "as made": lambda a: a,
    "every other row": lambda a: np.repeat(a, 2, 0)[::2],
    "backwards": lambda a: a[::-1].copy()[::-1],
    "Fortran": lambda a: np.asfortranarray(a),
    "read only": lambda a: np.frombuffer(a.tobytes(), a.dtype).reshape(a.shape),
    "big endian": lambda a: a.astype(a.dtype.newbyteorder(">")),
}
# Options that methods take, and some that they refuse.
OPTIONS: dict[str, tuple[dict[str, Any], ...]] = {
    "auction": ({}, {}, {"tolerance": 0.01}, {"max_bids": 1}, {"max_seconds": 1e-9}),
    "emd": ({}, {"max_iterations": 100_000}),
    "nearest": ({}, {"score": "dot"}),
    "sinkhorn": ({}, {"reg": 1.0}, {"draw": "rows"}, {"reg": 0.05, "max_iterations": 3}),
    "sliced": ({}, {"axes": "random"}, {"directions": 1}),
    "stable": ({}, {"noise_rank": "dot"}),
}
WRONG_OPTIONS: dict[str, Any] = {
    "reg": -1.0,
    "colour": "red",
    "condition_weight": -1.0,
    "condition_ratio": 0.5,
    "condition_metric": "l7",
    "group": 3,
    "directions": 0,
    "noise_rank": "none",
}


def reverse(cost: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """Pair in the opposite order."""
    return torch.arange(len(cost) - 1, -1, -1)


def manhattan(x: Tensor, y: Tensor) -> Tensor:
    """Sum absolute differences, in place where it can."""
    return x[:, None].sub(y[None]).abs_().sum(2)


def some_forbidden(x: Tensor, y: Tensor) -> Tensor:
    """Forbid a third of the pairs, never the identity."""
    i, j = torch.arange(len(x))[:, None], torch.arange(len(y))
    return manhattan(x, y).masked_fill((i + 2 * j) % 3 == 1, math.inf).where(i != j, manhattan(x, y))


@dataclass
class Call:
    """One call, and what may come of it.

    Attributes
    ----------
    data, noise : object
    method, metric, quantize : object
    options, given : dict
        Of the coupling, and of the call.
    way : str
        How it is made.
    must_fail : list of str
        Why it must be refused.
    may_fail : list of str
        Why it may be.
    """

    data: Any
    noise: Any
    method: Any
    metric: Any = "sqeuclidean"
    quantize: Any = None
    options: dict[str, Any] = field(default_factory=dict)
    given: dict[str, Any] = field(default_factory=dict)
    way: str = "couple"
    must_fail: list[str] = field(default_factory=list)
    may_fail: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        sides = " and ".join(f"{x.dtype}{tuple(x.shape)}" if hasattr(x, "dtype") else str(x) for x in self.sides)
        given = {name: value for name, value in self.given.items() if value is not None}
        shown = {name: tuple(v.shape) if hasattr(v, "shape") else type(v).__name__ for name, v in given.items()}
        return f"{self.way}({sides}, {self.method}, {self.metric}, {self.quantize}, {self.options}, {shown})"

    @property
    def sides(self) -> tuple[Any, Any]:
        """Data and noise."""
        return self.data, self.noise

    def run(self) -> Coupled[Any]:
        """Make the call."""
        choices = {"metric": self.metric, "quantize": self.quantize, **self.options}
        if self.way == "couple":
            return couple(self.data, self.noise, self.method, **choices, **self.given)
        coupling = Coupling(self.method, **choices)
        if self.way == "pickled":
            coupling = pickle.loads(pickle.dumps(coupling))  # nosec B301: of bytes made here
        if self.way == "copied":
            plain = isinstance(self.method, str) and isinstance(self.metric, str)
            coupling = Coupling.from_dict(coupling.to_dict()) if plain else copy.deepcopy(coupling)
        if self.way == "submitted":
            return coupling.submit(self.data, self.noise, **self.given).result()
        if self.way == "autocast":
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return coupling(self.data, self.noise, **self.given)
        return coupling(self.data, self.noise, **self.given)


def make(seed: int) -> Call:
    """Draw a call."""
    rng = np.random.default_rng(seed)

    def one_of(values: Any) -> Any:
        values = list(values)
        return values[rng.integers(len(values))]

    def now_and_then(share: float) -> bool:
        return bool(rng.random() < share)

    n = 0 if now_and_then(0.02) else 1 if now_and_then(0.08) else int(rng.integers(2, 40))
    method = reverse if now_and_then(0.05) else one_of(METHODS)
    name = find(method).info.name
    options = dict(one_of(OPTIONS.get(name, ({},))))
    unsure = ["Sinkhorn may not converge"] if options.get("draw") == "rows" else []
    call = Call(None, None, method, one_of(couplings.metrics()), options=options, may_fail=unsure)
    m = n
    if name == "nearest":
        k = int(rng.integers(1, 5))
        m = k * n
        if now_and_then(0.5):
            options["k"] = k
    elif find(method).rectangular and now_and_then(0.15):
        options["select"] = True
        m = n + int(rng.integers(0, 10))
    shape = (*one_of(SHAPES),)
    if now_and_then(0.01):
        shape = (3, 0)
    _draw_sides(call, rng, one_of, now_and_then, n, m, shape)
    if now_and_then(0.2):
        call.metric = one_of([manhattan, manhattan, some_forbidden])
        if name == "sliced":  # where no class has two rows, it is not asked
            call.may_fail.append("sliced takes no callable metric")
        if call.metric is some_forbidden and not find(method).info.exact:
            call.may_fail.append("forbidden pairs")
    if now_and_then(0.2):
        call.quantize = one_of(couplings.quantizers())
    if now_and_then(0.35):
        _draw_condition(call, rng, one_of, now_and_then, n, m)
    if now_and_then(0.05):
        call.options = {"scope": "global", **call.options}
    if now_and_then(0.5):
        call.given["generator"] = torch.Generator().manual_seed(seed)
    if now_and_then(0.1):
        call.options["check_finite"] = False
    call.way = one_of(["couple", "couple", "called", "pickled", "copied", "submitted", "autocast"])
    if now_and_then(0.1):
        _spoil(call, one_of)
    return call


def _draw_sides(call: Call, rng: Any, one_of: Any, now_and_then: Any, n: int, m: int, shape: tuple[int, ...]) -> None:
    dtype = one_of(FLOATS)
    arrays = now_and_then(0.2)
    likely = [*["normal", "image"] * 5, *VALUES]
    made = []
    for rows in (n, m):
        drawn = np.asarray(VALUES[one_of(likely)](rng, (max(rows, 1), *shape)), dtype=np.float64)[:rows]
        tensor = torch.from_numpy(np.ascontiguousarray(drawn)).to(dtype)
        if now_and_then(0.01):
            tensor = tensor.nan_to_num().to(one_of(OTHER_TYPES))
            call.must_fail.append(f"{tensor.dtype}")
        if arrays and tensor.dtype is not torch.bfloat16:
            made.append(ARRAYS[one_of(ARRAYS)](tensor.numpy()))
        else:
            made.append(TENSORS[one_of(TENSORS)](tensor) if rows else tensor)
    call.data, call.noise = made
    if m == n and not call.must_fail and now_and_then(0.02):
        call.noise = call.data
    _judge_sides(call, n, m, shape)


def _judge_sides(call: Call, n: int, m: int, shape: tuple[int, ...]) -> None:
    """Say why these data and noise must be, or may be, refused."""
    if not n or not math.prod(shape):
        call.must_fail.append("nothing in it")
    types = [x.dtype.newbyteorder("=") if isinstance(x, np.ndarray) else x.dtype for x in call.sides]
    if types[0] != types[1]:
        call.must_fail.append("two types")
    if call.must_fail:
        return
    flat = [_float64(x) for x in call.sides]
    if not all(bool(x.isfinite().all()) for x in flat):
        call.must_fail.append("NaN or infinity")
        return
    limit = 3e38 if call.data.dtype not in (torch.float64, np.float64) and "f8" not in str(call.data.dtype) else 1e307
    largest = max(float(x.abs().max()) for x in flat)
    if 16 * max(n, m) * math.prod(shape) * max(largest, 1.0) ** 2 > limit:
        call.may_fail.append("costs overflow")


def _float64(values: Any) -> Tensor:
    if isinstance(values, np.ndarray):
        return torch.from_numpy(values.astype(np.float64)).reshape(len(values), -1)
    return values.detach().resolve_neg().double().reshape(len(values), -1)


def _draw_condition(call: Call, rng: Any, one_of: Any, now_and_then: Any, n: int, m: int) -> None:
    method = find(call.method)
    classes = torch.from_numpy(rng.integers(0, one_of([1, 2, 3, 50]), n)).to(
        one_of([torch.int64, torch.int32, torch.uint8, torch.bool, torch.int16])
    )
    features = torch.from_numpy(rng.standard_normal((n, one_of([1, 4])))).to(one_of(FLOATS))
    condition = one_of([classes, classes, features, (classes, features)])
    if isinstance(condition, Tensor) and condition.dtype is not torch.bfloat16 and now_and_then(0.2):
        condition = condition.numpy()
    call.given["condition"] = condition
    if method.ignores_condition:
        return
    if m != n:
        call.must_fail.append("conditions, and more noise than data")
    elif now_and_then(0.3):
        order = torch.from_numpy(rng.permutation(n))
        parts = condition if isinstance(condition, tuple) else (condition,)
        moved = tuple(torch.as_tensor(part)[order] for part in parts)
        call.given["noise_condition"] = moved if isinstance(condition, tuple) else moved[0]
    elif now_and_then(0.1):
        call.given["noise_condition"] = torch.full((n,), 77)
        call.must_fail.append("other classes of the noise")
    if call.metric is some_forbidden:
        call.may_fail.append("no way between classes and forbidden pairs")
    if condition is classes or (isinstance(condition, np.ndarray) and condition.ndim == 1):
        return
    if method.info.needs == "points":
        call.must_fail.append("features, and no cost to add them to")
    if now_and_then(0.2):
        call.options |= {"condition_weight": "auto", "condition_ratio": 0.1}
        if isinstance(condition, tuple):
            call.must_fail.append("classes, and a weight to be found")
    else:
        call.options |= {"condition_weight": float(one_of([0.0, 0.5, 1.0, 100.0]))}
        if call.options["condition_weight"] == 0.0:
            call.may_fail += call.must_fail
            call.must_fail.clear()
    if now_and_then(0.3):
        call.options["condition_metric"] = "cosine"


def _spoil(call: Call, one_of: Any) -> None:
    """Make one thing wrong."""
    x, y = call.sides

    def reshaped() -> None:
        call.noise = y[..., None]

    def fewer() -> None:
        call.noise = y[: len(x) - 1]

    def mixed() -> None:
        call.noise = np.zeros(y.shape) if isinstance(y, Tensor) else torch.zeros(y.shape)

    def listed() -> None:
        call.data = x.tolist()

    def scalar() -> None:
        call.data = x.sum() if isinstance(x, Tensor) else np.asarray(x.sum())

    def sparse() -> None:
        call.data, call.noise = (torch.zeros(3, 2).to_sparse() for _ in range(2))

    def nowhere() -> None:
        call.data, call.noise = (torch.zeros(3, 2, device="meta") for _ in range(2))

    def nested() -> None:
        parts = [torch.zeros(2, 2), torch.zeros(3, 2)]
        call.data = call.noise = torch.nested.as_nested_tensor(parts, layout=torch.jagged)

    def masked() -> None:
        call.data, call.noise = (np.ma.masked_array(np.zeros((3, 2)), mask=True) for _ in range(2))

    def text() -> None:
        call.data, call.noise = (np.array([["a"], ["b"]]) for _ in range(2))

    def unknown_method() -> None:
        call.method = one_of(["acution", "", "optimal", 7, None, "no.such:thing", "os:nothing", "a:b:c"])

    def unknown_metric() -> None:
        call.metric = one_of(["euclid", "", 3, None])

    def strange_metric() -> None:
        call.metric, call.way = (
            one_of([lambda a, b: 3.0, lambda a, b: torch.zeros(1), lambda a, b: a.long() @ b.T.long()]),
            "couple",
        )
        call.may_fail.append("independent of the metric")

    def unknown_quantizer() -> None:
        call.quantize = one_of(["int7", "", 8, torch.int8])

    def unknown_scope() -> None:
        call.options = {**call.options, "scope": one_of(["everywhere", "", 3])}

    def wrong_option() -> None:
        name = one_of(WRONG_OPTIONS)
        call.options = {**call.options, name: WRONG_OPTIONS[name]}

    def wrong_generator() -> None:
        call.given["generator"] = one_of([0, np.random.default_rng(0)])

    def wrong_condition() -> None:
        call.given["condition"] = one_of([torch.zeros(1000).long(), torch.zeros(len(x), 1).long(), [0] * len(x), "red"])

    def not_an_index() -> None:
        call.method = one_of([lambda cost, **_: None, lambda cost, **_: torch.zeros(1), lambda cost, **_: cost.sum()])
        call.options, call.way = {}, "couple"

    how = one_of(
        [
            *(reshaped, fewer, mixed, listed, scalar, sparse, nowhere, nested, masked, text, unknown_method),
            *(unknown_metric, strange_metric, unknown_quantizer, unknown_scope, wrong_option, wrong_generator),
            *(wrong_condition, not_an_index),
        ]
    )
    how()
    # Neither is looked at where every class has one row.
    spoilt = call.may_fail if how in (strange_metric, not_an_index) else call.must_fail
    spoilt.append(how.__name__)


# --- what came of it


def judge(call: Call, run: Callable[[Call], Coupled[Any]] = Call.run) -> tuple[str, str]:
    """Make a call: ``("right" or "refused" or "lost", what)``."""
    before, state = [_bytes(side) for side in call.sides], _random_state()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            coupled, error = run(call), None
        except Exception as caught:
            coupled, error = None, caught
    if warned:
        return "lost", f"it warned: {warned[0].message}"
    if before != [_bytes(side) for side in call.sides]:
        return "lost", "it changed its inputs"
    if state != _random_state():
        return "lost", "it touched the global random state"
    if error is not None:
        wrong = undocumented(error)
        if wrong:
            return "lost", wrong
        if not call.must_fail and not call.may_fail:
            return "lost", f"refused what can be coupled: {error}"
        return "refused", (call.must_fail or call.may_fail)[0]
    if call.must_fail and "NaN or infinity" not in call.must_fail[0]:
        return "lost", f"answered in spite of: {call.must_fail[0]}"
    if call.must_fail and call.options.get("check_finite", True):
        return "lost", "answered NaN or infinity"
    wrong = _wrong(call, coupled)
    repeatable = call.way == "called" and not call.given.get("generator") and "max_seconds" not in call.options
    if not wrong and repeatable and not np.array_equal(coupled.index, run(call).index):
        wrong = "another answer the second time"
    return ("lost", wrong) if wrong else ("right", "")


def undocumented(error: BaseException, further: tuple[type[BaseException], ...] = ()) -> str:
    """Say what is wrong with an error, if anything: its type, its message, or where it comes from."""
    name, message = type(error).__name__, str(error)
    if not isinstance(error, (ValueError, TypeError, RuntimeError, ImportError, *further)):
        return f"{name}: {message[:200]}"
    if not message.strip() or "\n" in message or len(message) > LONGEST:
        return f"{name} without a message of one line: {message[:200]!r}"
    raised = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    if not raised.is_relative_to(LIBRARY) and not raised.is_relative_to(TRAINERS) and not isinstance(error, further):
        return f"{name} from {raised.name}: {message[:200]}"
    return ""


def _random_state() -> tuple[bytes, ...]:
    of_numpy = np.random.get_state()[1]  # noqa: NPY002  # the global state, which nothing may touch
    return torch.get_rng_state().numpy().tobytes(), of_numpy.tobytes(), repr(random.getstate()).encode()


def _bytes(side: Any) -> Any:
    if isinstance(side, Tensor) and side.layout is torch.strided and side.device.type == "cpu" and not side.is_nested:
        return rows_of(side.detach().resolve_neg().clone()) if side.dtype is not torch.complex64 else None
    return side.tobytes() if isinstance(side, np.ndarray) else None


def _wrong(call: Call, coupled: Coupled[Any]) -> str:
    """Say what is wrong with an answer, if anything."""
    method = find(call.method)
    (x, y), n, m = call.sides, len(call.data), len(call.noise)
    if type(coupled.noise) is not type(y) and not isinstance(y, Tensor):
        return f"noise is {type(coupled.noise).__name__}"
    dtype = y.dtype.newbyteorder("=") if isinstance(y, np.ndarray) else y.dtype
    if tuple(coupled.noise.shape) != tuple(x.shape) or coupled.noise.dtype != dtype:
        return f"noise is {coupled.noise.dtype}{tuple(coupled.noise.shape)}"
    index = torch.as_tensor(coupled.index)
    if index.shape != (n,) or index.dtype is not torch.int64 or int(index.min()) < 0 or int(index.max()) >= m:
        return f"index is {index.dtype}{tuple(index.shape)}"
    given = torch.from_numpy(y.astype(y.dtype.newbyteorder("="))) if isinstance(y, np.ndarray) else y.detach()
    if not same_bits(torch.as_tensor(coupled.noise).detach().resolve_neg(), given.resolve_neg()[index]):
        return "the noise is not noise[index]"
    distinct = len(set(index.tolist()))
    marginal = {"sinkhorn": "resampled" if call.options.get("draw") == "rows" else "permutation"}
    promised = "selected" if m > n else marginal.get(method.info.name, method.info.marginal)
    if coupled.marginal not in (promised, "permutation"):  # one row to draw from is a permutation of it
        return f"the marginal is {coupled.marginal}, not {promised}"
    if coupled.marginal == "permutation" and distinct != m:
        return "no permutation"
    if coupled.marginal == "selected" and method.info.name != "nearest" and distinct != n:
        return "a row of noise is used twice"
    if method.info.name == "nearest" and bool((index // (m // n) != torch.arange(n)).any()):
        return "a candidate of another row"
    if isinstance(y, Tensor) and coupled.noise.requires_grad != y.requires_grad:
        return "the gradient of the noise is lost"
    if not all(bool(torch.as_tensor(s).isfinite().all()) for s in (_float64(x), _float64(y))):
        return ""
    return _wrong_pairs(call, coupled, index)


def _wrong_pairs(call: Call, coupled: Coupled[Any], index: Tensor) -> str:
    """Say what is wrong with the pairs, and with what is reported of them."""
    method, (x, y), n = find(call.method), [_float64(side) for side in call.sides], len(call.data)
    rows = torch.arange(n)
    cost = distances(x, y, call.metric) if isinstance(call.metric, str) else call.metric(x, y)
    wide = "64" in str(call.data.dtype) or "f8" in str(call.data.dtype)
    close = 1e-9 if wide else 1e-4
    reported = paired(x, y[index], call.metric) if isinstance(call.metric, str) else float(cost[rows, index].mean())
    least = float(torch.finfo(torch.float64 if wide else torch.float32).tiny) * max(1, x.shape[1])
    size = float(x.square().sum(1).mean() + y.square().sum(1).mean())
    rounded = callable(call.metric) and call.quantize is not None  # such a metric is given, and reported, rounded
    noticed = close * (abs(reported) + (call.metric == "cosine")) + least
    if math.isinf(reported) or math.isinf(float(coupled.cost)):
        if call.options.get("check_finite", True):
            return "it reports infinity"
    elif not rounded and not abs(float(coupled.cost) - reported) <= noticed:
        return f"the cost is {reported:.6g} and it reports {float(coupled.cost):.6g}"
    condition, tags = call.given.get("condition"), call.given.get("noise_condition")
    if condition is not None and not method.ignores_condition:
        of_data = [torch.as_tensor(part) for part in (condition if isinstance(condition, tuple) else (condition,))]
        tags = condition if tags is None else tags
        of_noise = [torch.as_tensor(part) for part in (tags if isinstance(tags, tuple) else (tags,))]
        for c, d in zip(of_data, of_noise, strict=True):
            if not c.is_floating_point():
                if bool((c != d[index]).any()):
                    return "a pair of two classes"
                cost = cost.masked_fill(c[:, None] != d, math.inf)
            elif call.options.get("condition_weight", 1.0) == "auto":
                return ""
            else:
                metric = call.options.get("condition_metric", "sqeuclidean")
                cost = cost + call.options.get("condition_weight", 1.0) * distances(c, d, metric)
    total = float(cost[rows, index].mean())
    if math.isinf(total) and method.forbids:
        return "a forbidden pair"
    shortened = call.options.keys() & {"tolerance", "max_bids", "max_seconds"}
    if not method.info.exact or call.quantize is not None or shortened:
        return ""
    optimum = cost[linear_sum_assignment(cost.numpy())].mean().item()
    finite = cost[cost.isfinite()]
    allowed = (1e-9 if wide else 1e-5) * (abs(optimum) + float((finite - finite.mean()).abs().mean())) + least
    allowed += (1e-12 if wide else 1e-7) * (size if call.metric in ("sqeuclidean", "dot") else 0.0)
    if total > optimum + allowed:
        return f"{total:.8g}, and the optimum is {optimum:.8g}"
    if coupled.gap is not None and math.isfinite(optimum) and coupled.gap < 0:
        return f"gap {coupled.gap}"
    return ""


# --- many of them


def judge_seed(seed: int) -> tuple[str, str]:
    """Make call number `seed`."""
    call = make(seed)
    kind, what = judge(call)
    return (kind, f"{make(seed)}: {what}") if kind == "lost" else (kind, what)


def make_calls(share: float) -> Outcome:
    """Make the first of 10,000 calls; seed and number of a call are the same."""
    return judged(judge_seed, range(sized(CALLS, share)), PATIENCE)


PARTS = {"calls": make_calls}
