"""On a CUDA device every call gives the answer that it gives on the CPU."""

from itertools import product

import pytest
import torch
from oracles import MODULES, multiset, paired, same_bits, skip_without

import couplings
from couplings import Coupling, couple

ROWS, SHAPE = 48, (3, 4, 4)
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
QUANTIZERS = (None, *couplings.quantizers())
CONDITIONS = ("none", "classes", "features", "both")
EXACT = [info for info in couplings.methods() if info.exact]


def batch(dtype=torch.float32, rows=ROWS, shape=SHAPE, pool=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    data = torch.rand(rows, *shape, generator=generator) * 2 - 1
    return data.to(dtype), torch.randn(pool * rows, *shape, generator=generator).to(dtype)


def condition(kind, rows=ROWS):
    classes = torch.arange(rows) % 3
    features = torch.rand(rows, 5, generator=torch.Generator().manual_seed(1))
    return {"none": None, "classes": classes, "features": features, "both": (classes, features)}[kind]


def on(device, value):
    if isinstance(value, tuple):
        return tuple(on(device, part) for part in value)
    return value.to(device) if isinstance(value, torch.Tensor) else value


def outcome(coupling, data, noise, given):
    """The result, or the type of the error."""
    try:
        return coupling(data, noise, condition=given, generator=torch.Generator().manual_seed(7))
    except ValueError as error:
        return type(error)


def difference(info, metric, quantize, here, there, noise):
    """What is wrong with an answer of the device, in words; None if nothing is."""
    if isinstance(here, type) or isinstance(there, type):
        return None if here is there else f"{here} on the CPU, {there} on the device"
    if not there.index.is_cuda or there.index.dtype is not torch.int64 or not there.cost.is_cuda:
        return f"index on {there.index.device} as {there.index.dtype}, cost on {there.cost.device}"
    if not same_bits(there.noise.cpu(), noise[there.index.cpu()]):
        return "noise is not noise_in[index]"
    if here.marginal != there.marginal:
        return f"{here.marginal} on the CPU, {there.marginal} on the device"
    if there.marginal == "permutation" and multiset(there.noise.cpu()) != multiset(noise):
        return "not the same multiset"
    wide = torch.float64
    before = here.cost_before.to(wide).item()
    if abs(there.cost_before.cpu().to(wide).item() - before) > 1e-2 * before + 1e-30 and noise.dtype.itemsize == 2:
        return "cost_before differs"
    if noise.dtype.itemsize > 2 and abs(there.cost_before.cpu().to(wide).item() - before) > 1e-5 * before:
        return "cost_before differs"
    if torch.equal(here.index, there.index.cpu()):
        return None
    integers = quantize == "int8" and metric in ("sqeuclidean", "dot") and info.shift_invariant
    if integers and info.name != "sinkhorn":
        return "int8 is exact on every device, and the index differs"
    # Almost tied: another answer, about as good. What rounds each side apart decides how much that can be.
    exactly = info.exact and quantize is None and noise.dtype.itemsize > 2
    allowed = 1e-5 if exactly else 1e-2
    apart = abs(there.cost.to(wide).item() - here.cost.to(wide).item()) / before
    return None if apart <= allowed else f"cost differs by {apart:.1e} of what it was before"


@pytest.mark.parametrize("metric", couplings.metrics())
@pytest.mark.parametrize("info", couplings.methods(), ids=lambda info: info.name)
def test_every_method_metric_quantizer_dtype_and_condition(device, info, metric):
    skip_without(info)
    options = {"sinkhorn": {"max_iterations": 200}}.get(info.name, {})
    # An iterative method on the device takes a hundred times as long as the others there.
    conditions = CONDITIONS if info.name != "sinkhorn" else ("none", "both")
    wrong, same, compared = [], 0, 0
    for quantize, dtype, kind in product(QUANTIZERS, DTYPES, conditions):
        coupling = Coupling(info.name, metric, quantize, **options)
        data, noise = batch(dtype, pool=3 if info.marginal == "selected" else 1)
        here = outcome(coupling, data, noise, condition(kind))
        there = outcome(coupling, data.to(device), noise.to(device), on(device, condition(kind)))
        found = difference(info, metric, quantize, here, there, noise)
        if found is not None:
            wrong.append(f"{quantize}, {dtype}, {kind}: {found}")
        # Rounded to few values costs are tied; and one draw that differs changes all that follow it.
        if quantize is None and info.name != "sinkhorn" and not isinstance(here, type):
            compared += 1
            same += not isinstance(there, type) and torch.equal(here.index, there.index.cpu())
    assert not wrong, "\n".join(wrong)
    assert same >= 0.9 * compared


@pytest.mark.parametrize("quantize", couplings.quantizers())
@pytest.mark.parametrize(("rows", "width"), [(5, 3), (17, 40), (50, 45), (130, 1072)])
def test_sizes_that_the_hardware_does_not_multiply_natively(device, quantize, rows, width):
    data, noise = batch(rows=rows, shape=(width,))
    for metric in ("sqeuclidean", "l2"):
        here = couple(data, noise, metric=metric, quantize=quantize)
        there = couple(data.to(device), noise.to(device), metric=metric, quantize=quantize)
        if not (quantize == "int8" and metric == "sqeuclidean"):
            assert there.cost.item() == pytest.approx(here.cost.item(), rel=1e-3)
        else:
            assert torch.equal(there.index.cpu(), here.index)


@pytest.mark.parametrize("size", [1e-30, 1e30])
@pytest.mark.parametrize("quantize", QUANTIZERS)
def test_no_finite_input_overflows_or_vanishes(device, quantize, size):
    data, noise = (size * side for side in batch())
    here = couple(data, noise, metric="cosine", quantize=quantize)
    there = couple(data.to(device), noise.to(device), metric="cosine", quantize=quantize)
    assert paired(data, there.noise.cpu(), "cosine") == pytest.approx(paired(data, here.noise, "cosine"), rel=1e-3)
    assert there.cost.item() == pytest.approx(here.cost.item(), rel=1e-3)


@pytest.mark.parametrize("offset", [0.0, 1e3, 1e6])
@pytest.mark.parametrize("metric", ["sqeuclidean", "l2", "dot"])
def test_a_common_offset_changes_no_answer(device, metric, offset):
    data, noise = (side + offset for side in batch(torch.float32))
    best = couple(data.double(), noise.double(), metric=metric)
    there = couple(data.to(device), noise.to(device), metric=metric)
    chosen = (data.double() - noise.double()[there.index.cpu()]).square().sum(1)
    optimum = (data.double() - best.noise).square().sum(1)
    if metric == "l2":
        chosen, optimum = chosen.sqrt(), optimum.sqrt()
    assert chosen.mean().item() <= optimum.mean().item() * (1 + 1e-5)


@pytest.mark.parametrize("info", EXACT, ids=lambda info: info.name)
def test_the_gap_is_certified_from_the_matrix_on_the_device(device, info):
    skip_without(info)
    data, noise = batch(rows=96)
    here, there = couple(data, noise, info.name), couple(data.to(device), noise.to(device), info.name)
    if here.gap is None:
        assert there.gap is None
    else:
        assert 0 <= there.gap <= 1e-6


@pytest.mark.parametrize("name", ["hungarian", "auction", "lapjv", "greedy", "stable"])
def test_more_noise_than_data_can_be_chosen_from(device, name):
    (info,) = couplings.methods(name)
    skip_without(info)
    data, noise = batch(pool=3)
    here = couple(data, noise, name, select=True)
    there = couple(data.to(device), noise.to(device), name, select=True)
    assert there.marginal == "selected"
    assert there.cost.item() == pytest.approx(here.cost.item(), rel=1e-5)


def test_weights_of_conditions_are_found_on_the_device(device):
    data, noise = batch()
    given = condition("features")
    options = {"condition_weight": "auto", "condition_ratio": 0.1}
    here = couple(data, noise, condition=given, **options)
    there = couple(data.to(device), noise.to(device), condition=given.to(device), **options)
    assert torch.equal(there.index.cpu(), here.index)


def test_noise_has_conditions_of_its_own(device):
    data, noise = batch()
    given, of_noise = condition("both"), on("cpu", tuple(part.flip(0) for part in condition("both")))
    here = couple(data, noise, condition=given, noise_condition=of_noise)
    there = couple(data.to(device), noise.to(device), condition=on(device, given), noise_condition=on(device, of_noise))
    assert torch.equal(there.index.cpu(), here.index)


def test_forbidden_pairs_are_respected_and_missing_ones_are_named(device):
    def apart(x, y):
        cost = torch.cdist(x, y)
        return cost.masked_fill(torch.ones_like(cost).tril(-1).bool(), torch.inf)

    def nowhere(x, y):
        return torch.full((len(x), len(y)), torch.inf, device=x.device)

    data, noise = (side.to(device) for side in batch())
    for info in EXACT:
        if all(map(_installed, info.requires)):
            assert torch.equal(couple(data, noise, info.name, metric=apart).index.cpu(), torch.arange(ROWS))
    with pytest.raises(ValueError, match="row"):
        couple(data, noise, metric=nowhere)
    with pytest.raises(ValueError, match="forbids"):
        couple(data, noise, "sinkhorn", metric=apart)


def _installed(extra):
    import importlib.util

    return importlib.util.find_spec(MODULES[extra]) is not None


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("info", couplings.methods(), ids=lambda info: info.name)
def test_what_is_not_finite_is_refused_with_its_row(device, info, bad):
    skip_without(info)
    data, noise = batch()
    data[5, 0] = bad
    with pytest.raises(ValueError, match=r"data contains NaN or infinity in 1 of 48 rows \(first: row 5\)"):
        couple(data.to(device), noise.to(device), info.name)


@pytest.mark.parametrize("info", couplings.methods(), ids=lambda info: info.name)
def test_no_random_state_of_the_process_is_touched_and_answers_repeat(device, info):
    skip_without(info)
    data, noise = (side.to(device) for side in batch())
    states = torch.get_rng_state(), torch.cuda.get_rng_state()
    first, second = (couple(data, noise, info.name) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert torch.equal(torch.cuda.get_rng_state(), states[1])
    assert torch.equal(first.index, second.index)


def test_a_generator_of_the_device_decides_draws(device):
    data, noise = (side.to(device) for side in batch())
    for name in ("sinkhorn", "sliced"):
        first, second = (
            couple(data, noise, name, generator=torch.Generator(device).manual_seed(3)).index for _ in range(2)
        )
        assert torch.equal(first, second)


def test_autocast_does_not_reach_inside(device):
    data, noise = (side.to(device) for side in batch(rows=128))
    plain = couple(data, noise, metric="l2")
    for dtype in (torch.float16, torch.bfloat16):
        with torch.autocast("cuda", dtype=dtype):
            inside = couple(data, noise, metric="l2")
            assert torch.is_autocast_enabled("cuda")
        assert torch.equal(inside.index, plain.index)
        assert torch.equal(inside.cost, plain.cost)


def test_gradients_and_memory_formats_of_the_noise_are_kept(device):
    data, noise = (side.to(device) for side in batch())
    leaf = noise.clone().requires_grad_()
    coupled = couple(data, leaf)
    (coupled.noise * torch.arange(ROWS, device=device)[:, None, None, None]).sum().backward()
    expected = torch.empty_like(noise)
    expected[coupled.index] = torch.arange(ROWS, device=device, dtype=noise.dtype)[:, None, None, None].expand_as(noise)
    assert torch.equal(leaf.grad, expected)
    last = couple(data, noise.contiguous(memory_format=torch.channels_last))
    assert last.noise.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(last.index, coupled.index)


def test_what_is_tied_to_the_noise_follows_it_wherever_it_is(device):
    data, noise = (side.to(device) for side in batch())
    coupled = couple(data, noise)
    seeds = torch.arange(ROWS)
    assert torch.equal(coupled.apply(seeds), coupled.index.cpu())
    assert torch.equal(coupled.apply(seeds.to(device)), coupled.index)


def test_noise_of_a_seed_is_the_same_on_the_device(device):
    seeds = couplings.noise.row_seeds(11, 5, 1000)
    assert torch.equal(couplings.noise.row_seeds(11, 5, 1000, device=device).cpu(), seeds)
    for dtype, apart in ((torch.float32, 1e-5), (torch.float64, 1e-13)):
        here = couplings.noise.normal(seeds, (3, 7), dtype=dtype)
        there = couplings.noise.normal(seeds, (3, 7), dtype=dtype, device=device)
        torch.testing.assert_close(there.cpu(), here, rtol=apart, atol=apart)


@pytest.mark.parametrize("classes", [False, True])
def test_a_dataset_level_coupling_is_that_of_the_cpu(device, tmp_path, classes):
    pytest.importorskip("safetensors")
    generator = torch.Generator().manual_seed(2)
    data = torch.randn(256, 2, 3, generator=generator) + 2 * torch.randn(4, 2, 3, generator=generator).repeat(64, 1, 1)
    labels = torch.arange(256) % 2 if classes else None
    options = {"classes": labels, "batch_size": 512, "steps": 60, "tolerance": 0.1}
    here = couplings.semidiscrete.fit(data, **options)
    there = couplings.semidiscrete.fit(data.to(device), **options)
    assert there.chi2 == pytest.approx(here.chi2, abs=0.1)
    assert torch.corrcoef(torch.stack([here.potentials, there.potentials]))[0, 1].item() > 0.99

    noise = torch.randn(2000, 2, 3, generator=generator)
    of_noise = torch.arange(2000) % 2 if classes else None
    here.save(tmp_path / "plan.safetensors")
    moved = couplings.semidiscrete.Semidiscrete.load(tmp_path / "plan.safetensors", data, device=device)
    for plan, where in ((moved, "cpu"), (moved, device)):
        picked = plan.assign(noise.to(where), of_noise)
        assert picked.device.type == torch.device(where).type
        assert (picked.cpu() == here.assign(noise, of_noise)).float().mean().item() > 0.995
