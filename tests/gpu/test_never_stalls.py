"""How often the host waits for the device, and that nothing runs before what it needs, or keeps others waiting."""

import gc
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from oracles import skip_without

import couplings
from benchmarks.waits import counted
from couplings import Coupling, lookahead

TENTH_OF_A_SECOND = 200_000_000  # cycles of the device's clock, about
ON_POINTS = [info.name for info in couplings.methods() if info.needs == "points"]
ON_COSTS = [info for info in couplings.methods() if info.needs == "cost"]
ITERATIONS = 40
OPTIONS = {"sinkhorn": {"max_iterations": ITERATIONS}}


def batch(device, rows=128, width=48, pool=1, dtype=torch.float32, seed=0):
    generator = torch.Generator(device).manual_seed(seed)
    data = torch.rand(rows, width, generator=generator, device=device).to(dtype)
    return data, torch.randn(pool * rows, width, generator=generator, device=device).to(dtype)


def condition(kind, device, rows=128):
    classes = torch.arange(rows, device=device) % 10
    features = torch.rand(rows, 5, generator=torch.Generator(device).manual_seed(1), device=device)
    return {"none": None, "classes": classes, "features": features, "both": (classes, features)}[kind]


def waits_of(coupling, data, noise, given=None):
    for _ in range(2):  # what is made at the first call, such as pinned memory, is kept
        coupling(data, noise, condition=given)
    torch.cuda.synchronize()
    with counted() as waits:
        coupling(data, noise, condition=given)
    return waits


def limit(info, kind):
    """Most waits of one call: one, and where the method itself works on the device some for each class."""
    if info.name != "sinkhorn":
        return 1
    # A look at the error in every ten iterations, and the plan that is drawn from.
    return 2 + (1 + ITERATIONS // 10) * (10 if kind in ("classes", "both") else 1)


def test_a_wait_is_counted_once(device):
    value = torch.ones(3, device=device)
    explicit = {
        "item": lambda: value.sum().item(),
        "copy": value.cpu,
        "device": lambda: torch.cuda.synchronize(),
        "stream": lambda: torch.cuda.current_stream().synchronize(),
        "event": lambda: torch.cuda.current_stream().record_event().synchronize(),
    }
    for name, wait in explicit.items():
        with counted() as waits:
            wait()
        assert len(waits) == 1, (name, waits)
    with counted() as waits:
        value.add_(1).sum()
    assert not waits


@pytest.mark.parametrize("kind", ["none", "classes", "features", "both"])
@pytest.mark.parametrize("info", ON_COSTS, ids=lambda info: info.name)
def test_a_call_waits_once_whatever_the_options(device, info, kind):
    skip_without(info)
    wrong = []
    for metric in couplings.metrics():
        for quantize in (None, *couplings.quantizers()):
            coupling = Coupling(info.name, metric, quantize, **OPTIONS.get(info.name, {}))
            waits = waits_of(coupling, *batch(device), condition(kind, device))
            if not 1 <= len(waits) <= limit(info, kind):
                wrong.append(f"{metric}, {quantize}: {waits}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("rows", [64, 100, 256, 1024])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_a_call_waits_once_whatever_the_size_and_dtype(device, rows, dtype):
    for options in ({}, {"metric": "l2", "quantize": "fp16"}):
        assert len(waits_of(Coupling(**options), *batch(device, rows, dtype=dtype))) == 1
    given = condition("classes", device, rows)
    assert len(waits_of(Coupling(), *batch(device, rows, dtype=dtype), given)) == 1


@pytest.mark.parametrize(
    "options",
    [
        {"select": True},
        {"metric": lambda x, y: torch.cdist(x, y)},
        {"condition_weight": "auto", "condition_ratio": 0.1},
    ],
    ids=["select", "callable", "auto"],
)
def test_a_call_waits_once_with_further_options(device, options):
    given = condition("features", device) if "condition_weight" in options else None
    pool = 2 if "select" in options else 1
    assert len(waits_of(Coupling(**options), *batch(device, pool=pool), given)) == 1


@pytest.mark.parametrize("name", ON_POINTS)
def test_methods_on_points_wait_for_the_check_alone(device, name):
    pool = 4 if name == "nearest" else 1
    for metric in couplings.metrics():
        assert not waits_of(Coupling(name, metric, check_finite=False), *batch(device, pool=pool))
        assert len(waits_of(Coupling(name, metric), *batch(device, pool=pool))) == 1
    within = waits_of(Coupling(name, check_finite=False), *batch(device, pool=pool), condition("classes", device))
    assert len(within) <= (name == "sliced")  # it sorts by class on the host


def test_the_gap_is_read_lazily(device):
    coupling, (data, noise) = Coupling(), batch(device)
    coupling(data, noise)
    with counted() as waits:
        coupled = coupling(data, noise)
        assert len(waits) <= 1
        reduction = coupled.reduction
    assert len(waits) == 1
    assert reduction.is_cuda
    assert 0 <= coupled.gap <= 1e-6


@pytest.mark.parametrize("kind", ["none", "classes"])
@pytest.mark.parametrize("info", couplings.methods(), ids=lambda info: info.name)
def test_submitting_leaves_a_busy_stream_alone_and_gives_the_answer_of_calling(device, info, kind):
    skip_without(info)
    coupling = Coupling(info.name, **OPTIONS.get(info.name, {}))
    data, noise = batch(device, pool=2 if info.marginal == "selected" else 1)
    given = condition(kind, device)
    called = coupling(data, noise, condition=given)
    coupling.submit(data, noise, condition=given).result()
    torch.cuda.synchronize()
    stream = torch.cuda.current_stream()
    torch.cuda._sleep(TENTH_OF_A_SECOND)
    pending = coupling.submit(data, noise, condition=given)
    assert not stream.query()
    coupled = pending.result()
    assert pending.done()
    assert torch.equal(coupled.index, called.index)
    assert torch.equal(coupled.noise, called.noise)
    assert torch.equal(coupled.cost, called.cost)


def test_a_result_is_only_there_when_its_inputs_were(device):
    coupling, (data, noise) = Coupling(), batch(device)
    coupling.submit(data, noise).result()
    torch.cuda.synchronize()
    torch.cuda._sleep(3 * TENTH_OF_A_SECOND)
    assert not coupling.submit(data, noise).done()


def test_what_the_caller_queues_later_is_not_waited_for(device):
    coupling, (data, noise) = Coupling(), batch(device)
    coupling.submit(data, noise).result()
    torch.cuda.synchronize()
    pending = coupling.submit(data, noise)
    torch.cuda._sleep(5 * TENTH_OF_A_SECOND)
    stream = torch.cuda.current_stream()
    pending.wait()
    assert not stream.query()
    assert torch.equal(pending.result().index, coupling(data, noise).index)


@pytest.mark.parametrize("inline", [True, False])
def test_inputs_made_on_a_busy_stream_are_waited_for(device, inline):
    coupling, (data, noise) = Coupling(), batch(device)
    expected = coupling(data, noise)
    busy = torch.cuda.Stream()
    busy.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(busy):
        late_data, late_noise = torch.zeros_like(data), torch.zeros_like(noise)
        torch.cuda._sleep(TENTH_OF_A_SECOND)
        late_data.copy_(data)
        late_noise.copy_(noise)
        coupled = coupling(late_data, late_noise) if inline else coupling.submit(late_data, late_noise).result()
        index, moved = coupled.index.clone(), coupled.noise.clone()
    torch.cuda.synchronize()
    assert torch.equal(index, expected.index)
    assert torch.equal(moved, expected.noise)


def test_a_result_is_used_at_once_on_another_stream(device):
    coupling, (data, noise) = Coupling(), batch(device, rows=512)
    expected = coupling(data, noise)
    for _ in range(20):
        stream = torch.cuda.Stream()
        pending = coupling.submit(data, noise)
        with torch.cuda.stream(stream):
            moved = pending.result().noise.clone()
        stream.synchronize()
        assert torch.equal(moved, expected.noise)


def test_memory_of_inputs_and_results_is_not_reused_too_early(device):
    coupling, (data, noise) = Coupling(), batch(device, rows=512)
    expected = coupling(data, noise)
    for _ in range(20):
        given = data.clone(), noise.clone()
        pending = coupling.submit(*given)
        del given
        for _ in range(4):  # takes the memory that was given back
            torch.full_like(data, torch.nan), torch.full_like(noise, torch.nan)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            coupled = pending.result()
            torch.cuda._sleep(TENTH_OF_A_SECOND // 20)
            moved = coupled.noise.clone()
        del coupled, pending
        for _ in range(4):
            torch.full_like(noise, torch.nan)
        stream.synchronize()
        assert torch.equal(moved, expected.noise)


def test_memory_does_not_grow_with_every_submission(device):
    coupling, (data, noise) = Coupling(), batch(device)

    def submit(times):
        for _ in range(times):
            coupling.submit(data, noise).result()
        gc.collect()
        return torch.cuda.memory_allocated()

    # A matrix product on a new stream takes a work space of some 30 MB, which is kept.
    before = submit(5)
    assert submit(40) - before < 2**26


def test_staging_is_not_reused_while_another_call_reads_it(device):
    """Calls of different sizes and dtypes in turn, inline and ahead, each with its own answer."""
    dtypes = (torch.float32, torch.float64)
    problems = [batch(device, rows, seed=rows, dtype=dtype) for rows in (64, 300, 129) for dtype in dtypes]
    coupling = Coupling("hungarian")
    expected = [coupling(*problem).index for problem in problems]
    for _ in range(5):
        pending = [coupling.submit(*problem) for problem in problems]
        called = [coupling(*problem).index for problem in problems]
        for a, b, c in zip(pending, called, expected, strict=True):
            assert torch.equal(a.result().index, c)
            assert torch.equal(b, c)


def test_threads_share_a_coupling(device):
    coupling = Coupling("auction", metric="l2", quantize="fp16")
    problems = [batch(device, 200, seed=seed) for seed in range(24)]
    expected = [coupling(*problem).index for problem in problems]
    torch.cuda.synchronize()

    def work(problem):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            index = coupling(*problem).index
        stream.synchronize()
        return index

    with ThreadPoolExecutor(4) as pool:
        for index, right in zip(pool.map(work, problems), expected, strict=True):
            assert torch.equal(index, right)


@pytest.fixture
def little_memory(device):
    """Leave some 700 MB of the device's memory to this process."""
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 700 * 2**20) / total)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.parametrize("ahead", [False, True])
def test_running_out_of_memory_breaks_nothing(device, little_memory, ahead):
    coupling, small = Coupling(), batch(device)
    expected = coupling(*small)
    data, noise = batch(device, rows=16_000, width=4)  # a cost of 1 GB
    gc.collect()
    held = torch.cuda.memory_allocated()
    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError):
            coupling.submit(data, noise).result() if ahead else coupling(data, noise)
        gc.collect()
        assert torch.cuda.memory_allocated() <= held + 2**27  # what cuBLAS keeps; the cost takes eight times as much
        assert torch.equal(coupling(*small).index, expected.index)
        assert torch.equal(coupling.submit(*small).result().noise, expected.noise)


def test_a_failing_method_breaks_nothing(device):
    def broken(cost, *, generator=None):
        raise ArithmeticError("no")

    data, noise = batch(device)
    for _ in range(2):
        with pytest.raises(ArithmeticError):
            Coupling(broken).submit(data, noise).result()
    assert torch.equal(Coupling().submit(data, noise).result().index, Coupling()(data, noise).index)


def loader(count=7, rows=8):
    generator = torch.Generator().manual_seed(count)
    return [(torch.rand(rows, 3, 4, generator=generator), torch.arange(rows) % 2) for _ in range(count)]


def in_order(seed):
    """Noise drawn on the CPU, one batch after the other, wherever it goes."""
    own = torch.Generator().manual_seed(seed)
    return lambda shape, generator, device: torch.randn(shape, generator=own).to(device)


@pytest.mark.parametrize("method", ["auction", "nearest", "sliced", "independent"])
def test_reading_ahead_on_the_device_hands_out_what_it_does_on_the_cpu(device, method):
    coupling = Coupling(method, **({"k": 3} if method == "nearest" else {}))
    options = {"window": 3, "condition": lambda b: b[1]}
    here = list(lookahead(loader(), coupling, noise=in_order(5), **options))
    there = list(lookahead(loader(), coupling, noise=in_order(5), device=device, **options))
    assert len(here) == len(there) == 7
    for (_, ours), (batch_there, theirs) in zip(here, there, strict=True):
        assert not batch_there[0].is_cuda  # handed out as it came
        assert theirs.is_cuda
        assert torch.equal(theirs.cpu(), ours)


def test_noise_drawn_on_the_device_depends_on_the_seed_alone(device):
    def passes(seed):
        return [noise for _, noise in lookahead(loader(), Coupling(), window=3, seed=seed, device=device)]

    for one, other in zip(passes(1), passes(1), strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(passes(1)[0], passes(2)[0])


def test_leaving_a_loop_on_the_device_ends_its_thread_and_what_comes_next_is_right(device):
    loop = iter(lookahead(loader(40), Coupling(), window=4, device=device))
    next(loop)
    loop.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "couplings-ahead"]
    assert len(list(lookahead(loader(), Coupling(), window=2, device=device))) == 7
