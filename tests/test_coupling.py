"""Bad input is refused with the type of error that says what kind of mistake it is, and nothing is lost."""

import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from oracles import same_bits, skip_without

import couplings
from couplings import Coupling, couple

X, Y = torch.linspace(-1, 1, 24).reshape(4, 3, 2), torch.linspace(2, -3, 24).reshape(4, 3, 2)


def at(value, side):
    x, y = X.clone(), Y.clone()
    (x if side == "data" else y)[2, 1, 0] = value
    return x, y


BATCHES = {
    "NaN in data": (*at(torch.nan, "data"), ValueError, "data.*NaN.*row 2"),
    "NaN in noise": (*at(torch.nan, "noise"), ValueError, "noise.*NaN.*row 2"),
    "inf in data": (*at(torch.inf, "data"), ValueError, "data.*inf"),
    "minus inf in noise": (*at(-torch.inf, "noise"), ValueError, "noise.*inf"),
    "empty batch": (X[:0], Y[:0], ValueError, r"empty.*\(0, 3, 2\)"),
    "no elements": (X[:, :0], Y[:, :0], ValueError, r"empty.*\(4, 0, 2\)"),
    "scalars": (X[0, 0, 0], Y[0, 0, 0], ValueError, "batch axis"),
    "other shape": (X, Y[:, :2], ValueError, r"\(4, 3, 2\).*\(4, 2, 2\)"),
    "flattened noise": (X, Y.flatten(1), ValueError, r"\(4, 3, 2\).*\(4, 6\)"),
    "too little noise": (X, Y[:3], ValueError, "4 rows of data and 3"),
    "integer data": ((100 * X).int(), (100 * Y).int(), TypeError, "data.*int32.*float"),
    "bytes": ((100 * X).to(torch.uint8), Y, TypeError, "data.*uint8"),
    "integer noise": (X, (100 * Y).long(), TypeError, "noise.*int64"),
    "booleans": (X > 0, Y > 0, TypeError, "data.*bool"),
    "complex": (X.to(torch.complex64), Y.to(torch.complex64), TypeError, "data.*complex64"),
    "mixed dtypes": (X, Y.double(), TypeError, r"float32.*float64.*noise\.to\(data\.dtype\)"),
    "mixed halves": (X.half(), Y.bfloat16(), TypeError, "float16.*bfloat16"),
    "mixed devices": (X, Y.to("meta"), ValueError, r"cpu.*meta.*noise\.to\(data\.device\)"),
    "both without values": (X.to("meta"), Y.to("meta"), ValueError, "meta"),
    "array and tensor": (X.numpy(), Y, TypeError, "ndarray.*Tensor"),
    "tensor and array": (X, Y.numpy(), TypeError, "Tensor.*ndarray"),
    "lists": (X.tolist(), Y.tolist(), TypeError, "list"),
    "None": (X, None, TypeError, "None"),
    "integer arrays": (X.numpy().astype(int), Y.numpy().astype(int), TypeError, "data.*int64"),
    "sparse": (X[:, :, 0].to_sparse(), Y[:, :, 0].to_sparse(), TypeError, "dense"),
}


def kept(value):
    return (
        value.clone() if isinstance(value, torch.Tensor) else value.copy() if isinstance(value, np.ndarray) else value
    )


def unchanged(before, after):
    if isinstance(before, torch.Tensor):
        dense = before.to_dense() if before.is_sparse else before
        return before.device.type == "meta" or same_bits(dense, after.to_dense() if after.is_sparse else after)
    return np.array_equal(before, after)


@pytest.mark.parametrize("name", BATCHES)
def test_a_bad_batch_is_refused_and_left_as_it_was(name):
    data, noise, error, message = BATCHES[name]
    for method in ("auction", "independent", "sliced", "nearest", "greedy"):
        before = kept(data), kept(noise)
        with pytest.raises(error, match=f"(?s){message}"):
            couple(data, noise, method)
        assert unchanged(before[0], data), method
        assert unchanged(before[1], noise), method


CALLS = {
    "unknown method": ({"method": "hungarain"}, ValueError, "hungarain.*Did you mean 'hungarian'.*auction"),
    "unknown metric": ({"metric": "sqeuclidian"}, ValueError, "sqeuclidian.*Did you mean 'sqeuclidean'.*l1"),
    "unknown quantizer": ({"quantize": "fp8_e4m4"}, ValueError, "fp8_e4m4.*Did you mean 'fp8_e4m3'.*int8"),
    "unknown scope": ({"scope": "gobal"}, ValueError, "gobal.*Did you mean 'global'.*local"),
    "nothing like any name": ({"method": "zzzzzz"}, ValueError, "zzzzzz.*Known: .*sliced"),
    "method of a wrong type": ({"method": 3}, TypeError, "name or a callable.*int"),
    "metric of a wrong type": ({"metric": 2.0}, TypeError, "name or a callable.*float"),
    "quantizer of a wrong type": ({"quantize": torch.float16}, TypeError, "name or None.*dtype"),
    "unknown option": ({"method": "sinkhorn", "rge": 0.1}, TypeError, "rge.*Did you mean 'reg'"),
    "option of another method": ({"method": "hungarian", "reg": 0.1}, TypeError, "hungarian.*reg"),
    "negative reg": ({"method": "sinkhorn", "reg": -0.1}, ValueError, "reg.*positive.*-0.1"),
    "reg of zero": ({"method": "sinkhorn", "reg": 0.0}, ValueError, "reg.*positive.*0.0"),
    "reg of NaN": ({"method": "sinkhorn", "reg": float("nan")}, ValueError, "reg.*nan"),
    "unknown draw": ({"method": "sinkhorn", "draw": "columns"}, ValueError, "draw.*'rows'.*'columns'"),
    "no iterations": ({"method": "sinkhorn", "max_iterations": 0}, ValueError, "max_iterations.*0"),
    "unknown score": ({"method": "nearest", "score": "cosine"}, ValueError, "score.*'dot'.*'cosine'"),
    "unknown rank": ({"method": "stable", "noise_rank": "norm"}, ValueError, "noise_rank.*'norm'"),
    "no directions": ({"method": "sliced", "directions": 0}, ValueError, "directions.*0"),
    "unknown axes": ({"method": "sliced", "axes": "main"}, ValueError, "axes.*'main'"),
    "sliced with a callable metric": ({"method": "sliced", "metric": torch.cdist}, TypeError, "sliced.*callable"),
    "generator as a seed": ({"generator": 0}, TypeError, r"generator.*int.*manual_seed"),
    "group without global": ({"group": None}, TypeError, "group.*global"),
    "condition of a wrong shape": ({"condition": torch.zeros(3).long()}, ValueError, r"condition.*\(4,\).*\(3,\)"),
    "condition of one float each": ({"condition": torch.zeros(4)}, ValueError, r"condition.*\(4, c\).*unsqueeze"),
    "condition with NaN": ({"condition": torch.full((4, 2), torch.nan)}, ValueError, "condition.*NaN"),
    "condition as a list": ({"condition": [0, 1, 0, 1]}, TypeError, "condition.*list"),
    "complex condition": ({"condition": torch.zeros(4, 2).cfloat()}, TypeError, "condition.*complex"),
    "negative weight": ({"condition_weight": -1.0}, ValueError, "condition_weight.*-1"),
    "weight of a wrong type": ({"condition_weight": "1"}, TypeError, "condition_weight.*str"),
    "unknown condition metric": ({"condition_metric": "cosin"}, ValueError, "cosin.*Did you mean 'cosine'"),
    "metric of a wrong shape": ({"metric": lambda x, y: torch.zeros(4)}, ValueError, r"\(4, 4\).*\(4,\)"),
    "metric without a tensor": ({"metric": lambda x, y: 0.0}, TypeError, "metric.*float"),
    "metric with NaN": ({"metric": lambda x, y: torch.full((4, 4), torch.nan)}, ValueError, "not finite"),
    "metric with integers": ({"metric": lambda x, y: torch.zeros(4, 4).int()}, TypeError, "metric.*int32"),
    "index of a wrong length": ({"method": lambda c, *, generator: torch.arange(3)}, ValueError, r"\(4,\).*\(3,\)"),
    "index out of range": ({"method": lambda c, *, generator: torch.arange(1, 5)}, ValueError, "1 to 4.*0 to 3"),
    "negative index": ({"method": lambda c, *, generator: torch.arange(4) - 1}, ValueError, "-1"),
    "index that repeats": ({"method": lambda c, *, generator: c.argmin(1)}, ValueError, r"register\(.*marginal="),
    "index of floats": ({"method": lambda c, *, generator: torch.zeros(4)}, TypeError, "integer.*float32"),
    "index that is none": ({"method": lambda c, *, generator: None}, TypeError, "index.*None"),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_bad_argument_is_refused_and_the_batch_left_as_it_was(name):
    arguments, error, message = CALLS[name]
    if arguments.get("method") == "sinkhorn":
        pytest.importorskip("ot")
    x, y = X.clone(), Y.clone()
    with pytest.raises(error, match=f"(?s){message}"):
        couple(x, y, **arguments)
    assert same_bits(x, X)
    assert same_bits(y, Y)


_NAMES = [
    "unknown method",
    "unknown metric",
    "unknown quantizer",
    "unknown scope",
    "unknown option",
    "unknown condition metric",
]


@pytest.mark.parametrize("name", _NAMES)
def test_a_bad_name_is_refused_before_any_batch_arrives(name):
    arguments, error, message = CALLS[name]
    with pytest.raises(error, match=message):
        Coupling(**arguments)


@pytest.mark.parametrize("info", couplings.methods(), ids=lambda i: i.name)
def test_more_noise_than_data_is_selected_from_only_if_asked_for(info):
    skip_without(info)
    noise = torch.cat([Y, Y + 1])
    if info.name == "nearest":
        assert couple(X, noise, info.name).marginal == "selected"
        return
    selects = info.name in ("hungarian", "auction", "lapjv", "greedy", "stable")
    with pytest.raises(ValueError, match="(?s)8.*4.*select=True" if selects else f"{info.name}.*8 and 4"):
        couple(X, noise, info.name)
    if selects:
        coupled = couple(X, noise, info.name, select=True)
        assert coupled.marginal == "selected"
        assert len(coupled.index.unique()) == 4
        assert couple(X, Y, info.name, select=True).marginal == "permutation", "as many rows as data are no choice"
    else:
        with pytest.raises((TypeError, ValueError), match="select"):
            couple(X, noise, info.name, select=True)


def test_candidates_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match=r"k \* 4 rows, got 7"):
        couple(X, torch.cat([Y, Y[:3]]), "nearest")


@pytest.mark.parametrize("condition", [torch.zeros(4).long(), torch.zeros(4, 2)])
def test_a_condition_needs_as_much_noise_as_data(condition):
    with pytest.raises(ValueError, match=r"condition.*8 and 4"):
        couple(X, torch.cat([Y, Y]), condition=condition, select=True)


def test_overflow_of_the_cost_is_an_error_and_not_a_pairing():
    x, y = X * 1e30, Y * 1e30
    with pytest.raises(ValueError, match=r"finite.*float32.*float64"):
        couple(x, y, metric="sqeuclidean")
    assert couple(x.double(), y.double()).cost.isfinite()


@pytest.mark.parametrize(("method", "module", "extra"), [("emd", "ot", "pot"), ("lapjv", "lapjv", "lapjv")])
def test_a_missing_package_is_named_with_its_extra(monkeypatch, method, module, extra):
    for name in [m for m in sys.modules if m.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    x, y = X.clone(), Y.clone()
    with pytest.raises(ImportError, match=rf"{method}.*pip install 'couplings\[{extra}\]'"):
        couple(x, y, method)
    assert same_bits(x, X)
    assert same_bits(y, Y)
    assert couple(x, y, "hungarian").marginal == "permutation"
    assert extra in next(i for i in couplings.methods(method)).requires


@pytest.mark.parametrize("name", ["AUCTION", "Hungarian", " greedy "])
def test_names_are_case_insensitive(name):
    assert Coupling(name) == Coupling(name.strip().lower())
    assert couple(X, Y, name, metric="L2", quantize="INT8").marginal == "permutation"


@pytest.mark.parametrize(
    ("alias", "name"), [("exact", "auction"), ("jv", "lapjv"), ("none", "independent"), ("knn", "nearest")]
)
def test_aliases_stand_for_their_methods(alias, name):
    assert Coupling(alias).to_dict()["method"] == name
    assert Coupling(alias) == Coupling(name)


def test_apply_refuses_what_is_not_tied_to_the_noise():
    coupled = couple(X, Y)
    with pytest.raises(ValueError, match=r"4 rows.*\(3, 3, 2\)"):
        coupled.apply(X[:3])
    with pytest.raises(TypeError, match="list"):
        coupled.apply([1, 2, 3, 4])


def test_coupled_and_coupling_are_frozen():
    with pytest.raises(AttributeError):
        couple(X, Y).noise = Y
    with pytest.raises(AttributeError):
        Coupling().method = "greedy"


def test_a_coupled_is_shown_in_one_line_without_its_tensors():
    shown = repr(couple(torch.randn(256, 3, 8, 8), torch.randn(256, 3, 8, 8)))
    assert "\n" not in shown
    assert "tensor(" not in shown
    assert "permutation" in shown
    assert "(256, 3, 8, 8)" in shown
    assert len(shown) < 200


@pytest.mark.parametrize("info", couplings.methods(), ids=lambda i: i.name)
def test_a_gradient_that_the_noise_carries_is_kept(info):
    skip_without(info)
    rows = 8 if info.name == "nearest" else 4
    data = torch.randn(4, 3, requires_grad=True)
    source = torch.randn(rows, 3, requires_grad=True)
    coupled = couple(data, 2 * source, info.name)
    weight = torch.arange(12.0).reshape(4, 3)
    (coupled.noise * weight).sum().backward()
    expected = torch.zeros(rows, 3).index_add(0, coupled.index, 2 * weight)
    assert torch.equal(source.grad, expected)
    assert data.grad is None
    assert not coupled.cost.requires_grad
    assert not couple(data, source.detach(), info.name).noise.requires_grad


def test_the_decision_is_made_without_gradients():
    def method(cost, *, generator=None):
        assert not torch.is_grad_enabled()
        assert not cost.requires_grad
        return torch.arange(len(cost))

    couple(X.clone().requires_grad_(), Y.clone().requires_grad_(), method)


def drawn(cost, *, generator=None):
    return torch.randperm(len(cost), generator=generator)


def test_without_a_generator_new_noise_brings_new_draws_and_the_same_noise_the_same():
    data, noise = torch.randn(64, 3), torch.randn(64, 3)
    first = couple(data, noise, drawn).index
    assert torch.equal(couple(data, noise, drawn).index, first)
    assert torch.equal(couple(data, noise.clone(), drawn).index, first)
    assert torch.equal(couple(data, noise.T.contiguous().T, drawn).index, first), "whatever its memory layout"
    assert not torch.equal(couple(data, torch.randn(64, 3), drawn).index, first)


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_no_switch_of_the_process_is_touched(precision):
    saved = torch.get_float32_matmul_precision()
    seen = []

    def switches():
        return torch.get_float32_matmul_precision(), torch.backends.mkldnn.matmul.fp32_precision, list(warnings.filters)

    def metric(x, y):
        seen.append(switches())
        return torch.cdist(x, y)

    def method(cost, *, generator=None):
        seen.append(switches())
        return torch.arange(len(cost))

    try:
        torch.set_float32_matmul_precision(precision)
        before = switches()
        couple(X, Y, method, metric=metric)
        assert seen == [before, before]
        assert switches() == before
    finally:
        torch.set_float32_matmul_precision(saved)


@pytest.mark.parametrize("name", ["emd", "sinkhorn"])
def test_the_filters_of_warnings_are_not_replaced(name, monkeypatch):
    # `warnings.catch_warnings` replaces those of the whole process, for threads beside it too.
    pytest.importorskip("ot")
    callers = []
    original = warnings.catch_warnings

    def watched(*args, **kwargs):
        callers.append(sys._getframe(1).f_globals["__name__"])
        return original(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(warnings, "catch_warnings", watched)
        couple(torch.randn(8, 3), torch.randn(8, 3), name)
    assert not [caller for caller in callers if caller.startswith("couplings")]


def test_a_coupling_may_be_called_from_several_threads():
    coupling = Coupling("auction", metric="l2")
    batches = [(torch.randn(64, 8), torch.randn(64, 8)) for _ in range(8)]
    expected = [coupling(*batch).index for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        for index, coupled in zip(expected, pool.map(lambda batch: coupling(*batch), batches), strict=True):
            assert torch.equal(coupled.index, index)


def test_values_may_go_unchecked():
    for method in ("auction", "independent", "sliced"):
        unchecked = couple(X, Y, method, check_finite=False)
        assert torch.equal(unchecked.index, couple(X, Y, method).index)
        assert torch.equal(unchecked.cost, couple(X, Y, method).cost)


def test_gap_is_a_plain_number():
    assert type(couple(X, Y).gap) is float
    assert couple(X, Y, "greedy").gap is None


@pytest.mark.parametrize("key", ["methd", "reg"])
def test_from_dict_refuses_unknown_keys(key):
    with pytest.raises(ValueError, match=key):
        Coupling.from_dict({key: "auction"})


@pytest.mark.parametrize("arguments", [{"method": lambda c, *, generator: None}, {"metric": torch.cdist}])
def test_to_dict_refuses_callables(arguments):
    with pytest.raises(TypeError, match="register"):
        Coupling(**arguments).to_dict()


@pytest.mark.parametrize("method", ["independent", "nearest", "sliced", "greedy"])
def test_overflow_of_the_reported_distance_is_an_error_too(method):
    x, y = X * 1e30, Y * 1e30
    with pytest.raises(ValueError, match=r"finite.*float32.*float64"):
        couple(x, y, method)
    assert couple(x.double(), y.double(), method).cost.isfinite()
    assert couple(x, y, method, metric="l1").cost.isfinite()


def test_names_of_conditions_are_case_insensitive_too():
    condition = torch.linspace(-1, 1, 8).reshape(4, 2)
    found = couple(X, Y, metric=" L1 ", quantize=" Int8 ", condition=condition, condition_metric=" COSINE ")
    assert torch.equal(
        found.index, couple(X, Y, metric="l1", quantize="int8", condition=condition, condition_metric="cosine").index
    )
    assert Coupling(condition_metric="Cosine") == Coupling(condition_metric="cosine")


@pytest.mark.parametrize("index", [[0, 1, 2, 4], [0, 1, 2], [0, 0, 1, 2], [-1, 0, 1, 2]])
def test_a_function_that_returns_no_permutation_is_told_how_to_declare_it(index):
    with pytest.raises(ValueError, match=r"register\(.*marginal="):
        couple(X, Y, lambda cost, *, generator=None: torch.tensor(index))


def test_reduction_of_pairs_that_were_equal_is_minus_infinity_for_arrays_as_for_tensors():
    x, y = torch.ones(2, 3), torch.cat([torch.ones(2, 3), 2 * torch.ones(2, 3)])
    for data, noise in ((x, y), (x.numpy(), y.numpy())):
        assert couple(data, noise, "nearest", score="dot").reduction == -np.inf
