"""Nothing waits for a device but the copy of the costs: tensors on ``meta`` have no values that could be waited for.

Reading one raises; copies from the host are recorded, and must be of the kind that no host waits for. What CUDA itself
waits for is counted on one (`tests/gpu`).
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import couplings
from couplings import inputs, problem
from couplings.assigners.registry import find

N = 32
CONDITIONS = {
    "none": lambda: None,
    "classes": lambda: torch.zeros(N, dtype=torch.int64, device="meta"),
    "features": lambda: torch.randn(N, 4, device="meta"),
    "both": lambda: (torch.zeros(N, dtype=torch.int64, device="meta"), torch.randn(N, 4, device="meta")),
}


class Copied(TorchDispatchMode):
    """Refuse copies between devices that the host waits for."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function is torch.ops.aten._to_copy.default and args[0].device != out.device:
            assert (kwargs or {}).get("non_blocking"), f"{args[0].device} to {out.device}"
        assert function is not torch.ops.aten.copy_.default or args[0].device == args[1].device
        return out


class Arrived(Exception):  # noqa: N818  # no error: the copy that is waited for
    pass


@pytest.fixture(autouse=True)
def _on_no_device(monkeypatch):
    def arrive(*tensors):
        raise Arrived

    monkeypatch.setattr(problem, "to_host", arrive)
    monkeypatch.setattr(inputs, "as_tensor", lambda value, name: value)  # which refuses meta


def batch(metric, quantizer, condition, dtype=torch.float32, **pricing):
    data, noise = inputs.check_pair(*torch.randn(2, N, 3, 4, 4, device="meta", dtype=dtype))
    conditions = inputs.check_conditions(CONDITIONS[condition](), None, data, noise, rows_apart=False)
    return problem.Problem.of(data, noise, problem.Pricing(metric, quantizer, **pricing), conditions)


@pytest.mark.parametrize("quantizer", [None, *couplings.quantizers()])
@pytest.mark.parametrize("metric", [*couplings.metrics(), torch.cdist])
def test_a_cost_is_made_and_reported_without_waiting(metric, quantizer):
    for condition in CONDITIONS:
        for method in ("auction", "greedy"):
            with Copied(), pytest.raises(Arrived):
                batch(metric, quantizer, condition).cost(find(method))
        with Copied():
            index = torch.zeros(N, dtype=torch.int64, device="meta")
            assert batch(metric, quantizer, condition, torch.float16).distances(index).after.device.type == "meta"


def test_a_weight_is_found_without_waiting():
    with Copied(), pytest.raises(Arrived):
        batch("l2", None, "features", condition_weight="auto", condition_ratio=0.1).cost(find("auction"))


@pytest.mark.parametrize("method", ["independent", "nearest", "sliced"])
@pytest.mark.parametrize("metric", ["sqeuclidean", "l1"])
def test_methods_on_points_never_wait(method, metric):
    with Copied():
        answer = batch(metric, None, "none").solve(find(method), None, {}, None)
    assert answer.index.device.type == "meta"
