"""Inputs from bug reports of the field: far from the origin, near duplicates, heavy entries, unusual tensors."""

import subprocess
import sys
import textwrap
import warnings
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from oracles import distances, optimum, paired, skip_without
from scipy.optimize import linear_sum_assignment

import couplings
from couplings import couple

ROOT = Path(__file__).parents[1]
EXACT = [info for info in couplings.methods() if info.exact]
NEVER_FORBIDDEN = [info for info in couplings.methods() if info.exact or info.name in ("greedy", "stable")]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def run(program, timeout=120, env=None):
    """Run a program in a process of its own; a hang is a failure."""
    command = [sys.executable, "-c", textwrap.dedent(program)]
    try:
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        pytest.fail(f"it did not end within {timeout} s")
    assert done.returncode == 0, done.stderr
    return done


def given(cost):
    """Data, noise and a metric for which the cost is this matrix."""
    data, noise = (torch.zeros(rows, 1, dtype=cost.dtype) for rows in cost.shape)
    return {"data": data, "noise": noise, "metric": lambda x, y: cost.clone()}


# Far from the origin.


def offsets():
    """Batches far from the origin, by name: one offset, one a column, at up to 1e6 times the spread."""
    metres = torch.tensor([5e5, 4.6e6])
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    return {
        "near the origin": (normal(256, 3), normal(256, 3)),
        "at 1000": (normal(256, 3) + 1000, normal(256, 3) + 1000),
        "at -1e5": (normal(128, 8) - 1e5, normal(128, 8) - 1e5),
        "at 1e6": (normal(128, 4) + 1e6, normal(128, 4) + 1e6),
        "metres on a map": (metres + 2e3 * normal(256, 2), metres + 2e3 * normal(256, 2)),
        "a column of years": tuple(normal(128, 6) + torch.tensor([2000.0, 0, 0, 0, 0, 0]) for _ in range(2)),
        "small at 1": (1 + 1e-4 * normal(64, 5), 1 + 1e-4 * normal(64, 5)),
    }


@pytest.mark.parametrize(("metric", "right"), [("sqeuclidean", 0.3788), ("l2", 0.5172)])
def test_a_batch_at_1000_reaches_the_optimum(metric, right):
    data, noise = torch.randn(256, 3) + 1000, torch.randn(256, 3) + 1000
    coupled = couple(data, noise, metric=metric)
    assert coupled.cost.item() == pytest.approx(right, abs=5e-5)
    assert coupled.gap == pytest.approx(0, abs=1e-5)


def test_metres_on_a_map_reach_the_optimum():
    offset = torch.tensor([5e5, 4.6e6])
    data, noise = offset + 2e3 * torch.randn(256, 2), offset + 2e3 * torch.randn(256, 2)
    assert couple(data, noise).cost.item() == pytest.approx(755_336, abs=1)


@pytest.mark.parametrize("info", EXACT, ids=lambda info: info.name)
@pytest.mark.parametrize("name", offsets())
def test_exact_methods_reach_the_float64_optimum_of_float32_inputs(info, name):
    skip_without(info)
    data, noise = offsets()[name]
    for metric in ("sqeuclidean", "l2", "dot"):
        coupled = couple(data, noise, info.name, metric=metric)
        least = optimum(distances(data, noise, "l2" if metric == "l2" else "sqeuclidean"))
        reached = paired(data, coupled.noise, metric)
        assert reached == pytest.approx(least, rel=1e-5), metric
        assert coupled.cost.item() == pytest.approx(reached, rel=1e-5), metric


@pytest.mark.parametrize("info", couplings.methods(), ids=lambda info: info.name)
def test_every_method_saves_as_much_far_from_the_origin_as_in_float64(info):
    skip_without(info)
    data, noise = torch.randn(128, 4) + 1000, torch.randn(256 if info.name == "nearest" else 128, 4) + 1000
    for metric in ("sqeuclidean", "l2", "dot"):
        single, double = (
            couple(x, y, info.name, metric=metric, generator=torch.Generator().manual_seed(0)).reduction.item()
            for x, y in ((data, noise), (data.double(), noise.double()))
        )
        # Draws from nearly equal plans differ now and then; nothing else does.
        assert single == pytest.approx(double, abs=0.03 if info.name == "sinkhorn" else 1e-3), metric


@pytest.mark.parametrize("name", ["at 1000", "metres on a map", "a column of years"])
def test_quantizers_keep_the_saving_far_from_the_origin(name):
    data, noise = offsets()[name]
    centre = torch.cat([data, noise]).double().mean(0)
    near = [(x.double() - centre).float() for x in (data, noise)]
    for quantize, metric in product(couplings.quantizers(), ("sqeuclidean", "l2", "dot")):
        far, expected = (
            couple(*batch, metric=metric, quantize=quantize).reduction.item() for batch in ((data, noise), near)
        )
        assert far > 0.85 * expected > 0, (quantize, metric)


def test_a_condition_far_from_the_origin_counts_by_its_differences():
    data, noise = torch.randn(64, 4), torch.randn(64, 4)
    features = torch.randn(64, 3).double()
    for metric in ("sqeuclidean", "cosine"):
        far = (features + (1000 if metric == "sqeuclidean" else 0)).float()
        coupled = couple(data, noise, condition=far, condition_weight=5.0, condition_metric=metric)
        cost = distances(data, noise, "sqeuclidean") + 5.0 * distances(far, far, metric)
        assert cost[torch.arange(64), coupled.index].mean().item() == pytest.approx(optimum(cost), rel=1e-5)


# Heavy entries.


@pytest.mark.parametrize("info", EXACT, ids=lambda info: info.name)
def test_exact_methods_reach_the_optimum_beside_heavy_blocks(info):
    skip_without(info)
    for scale, heavy in product((1e-8, 1.0, 1e8), (1e18, 1e6)):
        cost = torch.rand(12, 12).double()
        cost[:6, 6:] = cost[6:, :6] = heavy
        cost *= scale
        coupled = couple(method=info.name, **given(cost))
        assert coupled.cost.item() == pytest.approx(optimum(cost), rel=1e-6), (scale, heavy)


@pytest.mark.parametrize("info", EXACT, ids=lambda info: info.name)
def test_exact_methods_reach_the_optimum_of_heavy_tails(info):
    skip_without(info)
    for seed in range(5):
        rows = np.random.default_rng(seed).pareto(0.3, size=(24, 24))
        cost = torch.from_numpy(rows)
        assert couple(method=info.name, **given(cost)).cost.item() == pytest.approx(optimum(cost), rel=1e-6), seed


def saving(data, noise, coupled, rows):
    before, after = ((data[rows] - y[rows]).square().sum().item() for y in (noise, coupled.noise))
    return 1 - after / before


def test_sinkhorn_couples_within_heavy_conditions_as_within_classes():
    pytest.importorskip("ot")
    data, noise, labels = torch.randn(128, 16), torch.randn(128, 16), torch.arange(128) % 4
    one_hot = torch.nn.functional.one_hot(labels).float()
    heavy = couple(data, noise, "sinkhorn", condition=one_hot, condition_weight=100.0)
    assert (labels[heavy.index] == labels).double().mean() > 0.95
    assert heavy.reduction > 0.8 * couple(data, noise, "sinkhorn", condition=labels).reduction


def test_sinkhorn_couples_the_other_rows_beside_one_far_away():
    pytest.importorskip("ot")
    data, noise, others = torch.randn(128, 16), torch.randn(128, 16), slice(1, None)
    expected = saving(data, noise, couple(data, noise, "sinkhorn"), others)
    data[0] += 100
    assert saving(data, noise, couple(data, noise, "sinkhorn"), others) > 0.8 * expected > 0.1


# Near duplicates: a solver that loops for ever is ended by a watchdog.


@pytest.mark.parametrize("name", ["lapjv", "auction", "hungarian", "emd"])
def test_near_duplicates_end(name):
    skip_without(couplings.methods(name)[0])
    run(
        f"""
        import itertools, torch
        from couplings import couple
        for spread, d, metric in itertools.product((1e-9, 1e-12, 1e-15), (2, 8, 64), ("sqeuclidean", "l2", "l1")):
            torch.manual_seed(0)
            x, y = (1 + spread * torch.randn(31, d).double() for _ in range(2))
            index = couple(x, y, {name!r}, metric=metric).index
            assert sorted(index.tolist()) == list(range(31))
        """,
        timeout=60,
    )


@pytest.mark.parametrize("name", ["lapjv", "auction", "hungarian"])
def test_near_duplicates_end_where_noise_is_selected(name):
    skip_without(couplings.methods(name)[0])
    done = run(
        f"""
        import torch
        from couplings import couple
        torch.manual_seed(0)
        x, y = 1 + 1e-9 * torch.randn(4, 2).double(), torch.randn(6, 2).double()
        print(couple(x, y, {name!r}, select=True).index.tolist())
        x, y = 1 + 1e-9 * torch.randn(128, 2).double(), torch.randn(160, 2).double()
        assert len(couple(x, y, {name!r}, select=True).index.unique()) == 128
        """,
        timeout=60,
    )
    assert done.stdout.strip() == "[1, 2, 0, 4]"


# Where and how it is called.


@pytest.mark.parametrize("call", ["couple(a, b).noise", "coupling(a, b).noise * 2 + a.sum()"])
def test_a_compiled_function_breaks_its_graph_by_itself(call):
    run(
        f"""
        import sys, torch, couplings
        from couplings import Coupling, couple
        assert "torch._dynamo" not in sys.modules, "the library imports dynamo"
        coupling = Coupling("auction", metric="l2")
        x, y = torch.randn(16, 3), torch.randn(16, 3)
        function = lambda a, b: {call}
        assert torch.equal(torch.compile(function, backend="eager")(x, y), function(x, y))
        """
    )


_CACHE = """
    import logging, torch
    seen = []
    class Handler(logging.Handler):
        def emit(self, record):
            seen.append(record.getMessage())
    logging.getLogger("couplings").addHandler(Handler())
    logging.getLogger("couplings").setLevel(logging.INFO)
    torch.manual_seed(0)
    from couplings import couple
    print(couple(torch.randn(8, 3), torch.randn(8, 3), "independent", metric="l1").cost.item())
    print(*[message for message in seen if "cache" in message], sep="\\n")
"""


@pytest.fixture
def cache(tmp_path):
    """Environment whose kernels are cached in a folder of the test."""
    import os

    return {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}, tmp_path


@pytest.mark.parametrize("left", [100, 0])
@pytest.mark.parametrize("kind", [".nbi", ".nbc"])
def test_a_truncated_cache_is_not_used(cache, left, kind):
    env, folder = cache
    expected = run(_CACHE, env=env).stdout.splitlines()[0]
    files = list(folder.rglob(f"*{kind}"))
    assert files
    for file in files:
        file.write_bytes(file.read_bytes()[:left])
    cost, *said = run(_CACHE, env=env).stdout.splitlines()
    assert cost == expected
    assert len(said) == 1, "it is logged once"


def test_a_full_disk_leaves_the_kernels_uncached(cache):
    env, _ = cache
    limit = """
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
"""
    cost, *said = run(textwrap.dedent(limit) + textwrap.dedent(_CACHE), env=env).stdout.splitlines()
    assert cost
    assert len(said) == 1, "it is logged once"


@pytest.mark.parametrize("n", [64, 1500])
def test_a_thread_may_couple_after_the_main_thread_has_ended(n):
    done = run(
        f"""
        import threading, torch
        from couplings import couple
        torch.set_num_threads(2)
        def late():
            threading.main_thread().join()
            print(couple(torch.randn({n}, 3), torch.randn({n}, 3), metric="l1").marginal)
        threading.Thread(target=late).start()
        """
    )
    assert done.stdout.strip() == "permutation", done.stderr


# Unusual tensors.


def test_a_nested_tensor_is_refused_by_name():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls them a prototype
        nested = torch.nested.nested_tensor([torch.randn(3, 2), torch.randn(4, 2)], layout=torch.strided)
    for batch in ((nested, nested), (torch.randn(2, 3, 2), nested)):
        with pytest.raises(TypeError, match="nested"):
            couple(*batch)


@pytest.mark.parametrize("side", ["data", "noise", "both"])
def test_a_tensor_with_a_negative_bit_is_coupled_as_its_values(side):
    data, noise = torch.randn(12, 3), torch.randn(12, 3)
    expected = couple(data, noise)

    def negative(x):
        out = torch.complex(x, -x).conj().imag
        assert out.is_neg()
        return out

    coupled = couple(
        negative(data) if side in ("data", "both") else data, negative(noise) if side in ("noise", "both") else noise
    )
    assert torch.equal(coupled.index, expected.index)
    assert torch.equal(coupled.noise, expected.noise)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (torch.randn(4, 3, dtype=torch.complex64), "floating.*complex64"),
        (torch.randn(4, 3, dtype=torch.complex64).conj(), "floating.*complex64"),
        (torch.randint(50_000, (4, 16)), "(?i)int64.*embed"),
        (np.zeros((4, 3), np.longdouble), "float64"),
        (torch.zeros(4, 3, dtype=torch.uint8), "Scale images"),
    ],
    ids=["complex", "conjugate", "tokens", "longdouble", "images"],
)
def test_what_is_not_floating_is_told_what_to_make_of_it(batch, message):
    with pytest.raises(TypeError, match=message) as caught:
        couple(batch, batch)
    assert "images" not in str(caught.value) or batch.dtype in (torch.uint8, torch.int64)


def test_candidates_in_an_axis_of_their_own_are_told_where_they_go():
    data, noise = torch.randn(4, 3), torch.randn(4, 5, 3)
    with pytest.raises(ValueError, match=r"flatten\(0, 1\)"):
        couple(data, noise, "nearest")
    assert couple(data, noise.flatten(0, 1), "nearest").noise.shape == (4, 3)


@pytest.mark.parametrize(
    ("condition", "mend"),
    [
        (torch.nn.functional.one_hot(torch.arange(4) % 2), r"argmax\(1\)"),
        ((torch.arange(4) % 2)[:, None], r"squeeze\(1\)|flatten\(\)|\[:, 0\]"),
    ],
    ids=["one-hot", "a column"],
)
def test_integer_classes_of_two_axes_are_told_how_to_become_one(condition, mend):
    with pytest.raises(ValueError, match=mend):
        couple(torch.randn(4, 3), torch.randn(4, 3), condition=condition)


@pytest.mark.parametrize("method", ["auction", "greedy", "independent"])
def test_a_metric_that_knows_the_whole_batch_is_called_on_it_once_with_classes(method):
    data, noise, labels = torch.randn(12, 3), torch.randn(12, 3), torch.arange(12) % 3
    weight = torch.rand(12, 1)
    calls = []

    def metric(x, y):
        calls.append(len(x))
        return weight * torch.cdist(x, y)

    coupled = couple(data, noise, method, metric=metric, condition=labels)
    assert calls == [12]
    assert torch.equal(labels[coupled.index], labels)
    cost = weight * torch.cdist(data, noise)
    assert coupled.cost.item() == pytest.approx(cost[torch.arange(12), coupled.index].mean().item(), rel=1e-6)
    if method == "auction":
        cost[labels[:, None] != labels[None]] = 1e3
        assert coupled.cost.item() == pytest.approx(optimum(cost.double()), rel=1e-5)


@pytest.mark.parametrize("side", ["data", "noise", "condition"])
def test_a_masked_array_is_refused(side):
    batch = {
        "data": np.random.default_rng(0).normal(size=(4, 3)),
        "noise": np.random.default_rng(1).normal(size=(4, 3)),
        "condition": np.arange(4) % 2,
    }
    batch[side] = np.ma.masked_array(batch[side], mask=np.zeros_like(batch[side], dtype=bool))
    with pytest.raises(TypeError, match=r"mask.*\.filled\("):
        couple(**batch)


@pytest.mark.parametrize("metric", couplings.metrics())
@pytest.mark.parametrize("largest", [1.7e308, 1e200, 1e155])
def test_values_near_the_end_of_float64_are_coupled_or_refused_by_name(metric, largest):
    data, noise = (largest * torch.rand(8, 3, dtype=torch.float64) for _ in range(2))
    for info in NEVER_FORBIDDEN:
        if info.requires:
            continue
        check_coupled_or_refused({"data": data, "noise": noise, "method": info.name, "metric": metric})


@pytest.mark.parametrize("info", NEVER_FORBIDDEN, ids=lambda info: info.name)
def test_costs_near_the_end_of_float64_are_solved_or_refused_by_name(info):
    skip_without(info)
    for low, high in ((0.0, 1.7e308), (-1.7e308, 1.7e308), (1e308, 1.7e308)):
        u = torch.rand(8, 8, dtype=torch.float64)
        cost = low * (1 - u) + high * u
        assert cost.isfinite().all()
        check_coupled_or_refused({"method": info.name, **given(cost)})


def check_coupled_or_refused(call):
    try:
        coupled = couple(**call)
    except ValueError as error:
        if "finite" not in str(error):
            raise
        return
    assert coupled.cost.isfinite()
    assert sorted(coupled.index.tolist()) == list(range(8))


# Other packages.


@pytest.fixture
def two_packages(tmp_path):
    """Environment with two packages that register methods, of which one is broken."""
    import os

    modules = {
        "healthy": """
            import couplings, torch
            def register():
                couplings.register("theirs", lambda cost, *, generator=None: torch.arange(len(cost)).flip(0),
                                   marginal="permutation")
        """,
        "broken": """
            import couplings, torch
            def register():
                couplings.register("half", lambda cost, *, generator=None: torch.arange(len(cost)),
                                   marginal="permutation")
                raise ZeroDivisionError("mine")
        """,
    }
    for name, source in modules.items():
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(source))
        info = tmp_path / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[couplings.methods]\n{name} = {name}:register\n")
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}


def test_a_package_that_cannot_register_stops_no_other_method_and_is_named(two_packages):
    done = run(
        """
        import torch, couplings
        x = torch.eye(4)
        assert couplings.couple(x, x.flip(0)).index.tolist() == [3, 2, 1, 0]
        assert couplings.couple(x, x, "hungarian").marginal == "permutation"
        assert couplings.couple(x, x, "theirs").index.tolist() == [3, 2, 1, 0]
        names = [info.name for info in couplings.methods()]
        assert "theirs" in names
        assert "half" not in names, "what a package registered before it broke is not left behind"
        try:
            couplings.couple(x, x, "half")
        except ValueError as error:
            assert "broken" in str(error) and "ZeroDivisionError: mine" in str(error), error
        """,
        env=two_packages,
    )
    assert "broken:register" in done.stderr
    assert done.stderr.count("broken:register") == 1, "it is logged once"


# Forbidden pairs.


@pytest.mark.parametrize("info", NEVER_FORBIDDEN, ids=lambda info: info.name)
def test_forbidden_pairs_are_never_chosen(info):
    skip_without(info)
    for n, allowed in product((1, 6, 40), (0.3, 0.8)):
        cost = torch.rand(n, n)
        cost[torch.rand(n, n) > allowed] = torch.inf
        # Greedy and stable matching may paint themselves into a corner: leave them one way out per row.
        cost[torch.arange(n), torch.randperm(n)] = 0.0
        coupled = couple(method=info.name, **given(cost))
        chosen = cost[torch.arange(n), coupled.index]
        assert chosen.isfinite().all()
        if info.exact:
            rows, columns = linear_sum_assignment(cost.numpy())
            assert chosen.mean().item() == pytest.approx(cost.numpy()[rows, columns].mean(), rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("info", NEVER_FORBIDDEN, ids=lambda info: info.name)
def test_an_infeasible_cost_says_how_many_rows_have_no_partner(info):
    skip_without(info)
    one_row, two_for_one, everything = (torch.rand(6, 6) for _ in range(3))
    one_row[2] = torch.inf
    two_for_one[2:4, :5] = two_for_one[[0, 1, 4, 5], 5] = torch.inf
    everything[:] = torch.inf
    for cost, unmatched in ((one_row, 1), (two_for_one, 1), (everything, 6)):
        with pytest.raises(ValueError, match=rf"\b{unmatched} (of (the )?6 )?rows?\b"):
            couple(method=info.name, **given(cost))


@pytest.mark.parametrize("bad", [torch.nan, -torch.inf])
def test_a_cost_that_is_nan_or_minus_infinity_is_refused(bad):
    cost = torch.rand(6, 6)
    cost[1, 2] = bad
    with pytest.raises(ValueError, match=r"NaN|-inf|finite"):
        couple(**given(cost))


def test_the_solver_behind_scipys_signature_takes_forbidden_pairs():
    from couplings.kernels import linear_sum_assignment as ours

    generator = np.random.default_rng(0)
    for shape, maximize in product([(5, 5), (4, 7), (7, 4), (0, 3)], [False, True]):
        cost = generator.random(shape)
        cost[generator.random(shape) > 0.8] = -np.inf if maximize else np.inf
        rows, columns = linear_sum_assignment(cost, maximize)
        found = ours(cost, maximize)
        assert np.array_equal(found[0], rows)
        assert cost[found].sum() == pytest.approx(cost[rows, columns].sum())
    with pytest.raises(ValueError, match="infeasible"):
        ours(np.full((2, 2), np.inf))
    with pytest.raises(ValueError, match="invalid numeric entries"):
        ours(np.full((2, 2), np.nan))
