"""Methods and metrics of others: by callable, by registration, and from an installed package."""

import os
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from oracles import distances, paired, same_bits

import couplings
from couplings import Coupling, couple
from couplings.assigners import registry

TESTS = Path(__file__).parent


@pytest.fixture(autouse=True)
def own_registry(monkeypatch):
    """What a test registers is gone after it."""
    couplings.methods()  # entry points are read before the copy
    monkeypatch.setattr(registry, "_registry", dict(registry._registry))


def batch(n=6, m=None):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, 3, 2, 2, generator=generator), torch.randn(m or n, 3, 2, 2, generator=generator)


def rolled(cost, *, generator=None, by=1):
    """Each row takes the noise of its neighbour."""
    return torch.arange(len(cost)).roll(by)


def test_a_registered_method_works_wherever_a_name_does():
    couplings.register("Rolled", rolled, marginal="permutation")
    data, noise = batch()
    info = couplings.methods("rolled")[0]
    assert (info.name, info.summary) == ("rolled", "Each row takes the noise of its neighbour.")
    assert (info.exact, info.marginal, info.needs, info.shift_invariant) == (False, "permutation", "cost", False)
    assert couple(data, noise, "ROLLED").index.tolist() == [5, 0, 1, 2, 3, 4]
    coupling = Coupling("rolled", metric="l1", by=2)
    assert coupling(data, noise).index.tolist() == [4, 5, 0, 1, 2, 3]
    assert Coupling.from_dict(coupling.to_dict()) == coupling
    assert pickle.loads(pickle.dumps(coupling)) == coupling
    assert couple(data, noise, "rolled", condition=torch.arange(6) % 2).index.tolist() == [4, 5, 0, 1, 2, 3]
    with pytest.raises(TypeError, match="by"):
        couple(data, noise, "rolled", bye=3)


def test_methods_can_be_filtered_by_pattern():
    couplings.register("rolled-once", rolled, marginal="permutation", summary="mine")
    assert [info.summary for info in couplings.methods("ROLLED-*")] == ["mine"]
    assert couplings.methods("nothing*") == []
    assert couplings.methods()[-1].name == "rolled-once"


@pytest.mark.parametrize("name", ["rolled", "Rolled", "auction", "Hungarian", "exact", "none"])
def test_a_taken_name_is_refused(name):
    couplings.register("rolled", rolled, marginal="permutation")
    with pytest.raises(ValueError, match=f"{name.lower()}.*taken"):
        couplings.register(name, rolled, marginal="permutation")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"marginal": "permuted"}, ValueError, "Did you mean 'permutation'"),
        ({"needs": "matrix"}, ValueError, "matrix.*points"),
        ({"fn": "rolled"}, TypeError, "function.*str"),
        ({"name": 3}, TypeError, "string.*int"),
        ({"name": " "}, ValueError, "empty"),
    ],
)
def test_a_wrong_registration_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        couplings.register(**{"name": "mine", "fn": rolled, "marginal": "permutation", **arguments})
    assert couplings.methods("mine") == []


def test_marginal_has_to_be_declared():
    with pytest.raises(TypeError, match="marginal"):
        couplings.register("mine", rolled)


def test_methods_get_the_true_matrix_unless_they_declare_that_shifts_do_not_matter():
    seen = []

    def spy(cost, *, generator=None):
        seen.append(cost)
        return torch.arange(len(cost))

    couplings.register("true", spy, marginal="permutation")
    couplings.register("shifted", spy, marginal="permutation", shift_invariant=True)
    data, noise = batch()
    for name in ("true", "shifted", spy):
        couple(data, noise, name)
    true = distances(data, noise, "sqeuclidean")
    for cost in (seen[0], seen[2]):
        assert torch.allclose(cost.double(), true, rtol=1e-5)
        assert cost.dtype is torch.float32
    # Equal up to constants on rows and columns, and in the same unit.
    difference = seen[1].double() - true
    centred = difference - difference.mean(0) - difference.mean(1, keepdim=True) + difference.mean()
    assert centred.abs().max() < 1e-4


def test_a_method_on_points_gets_flat_points_and_its_options():
    def own(data, noise, *, generator=None, score=1.0):
        assert data.shape == noise.shape == (6, 12)
        assert isinstance(generator, torch.Generator)
        assert score == 2.0
        return torch.randint(6, (6,), generator=generator)

    couplings.register("own", own, marginal="resampled", needs="points")
    data, noise = batch()
    coupled = couple(data, noise, "own", score=2.0)
    assert coupled.marginal == "resampled"
    assert coupled.gap is None
    assert same_bits(coupled.noise, noise[coupled.index])


def test_a_selecting_method_on_points_takes_more_noise():
    couplings.register(
        "first", lambda x, y, *, generator=None: torch.arange(len(x)), marginal="selected", needs="points"
    )
    assert couple(*batch(4, 10), "first").marginal == "selected"


def test_a_registered_promise_is_held_to():
    couplings.register("liar", lambda cost, *, generator=None: cost.argmin(1) * 0, marginal="permutation")
    with pytest.raises(ValueError, match=r"liar.*1 different noise rows for 6"):
        couple(*batch(), "liar")
    from couplings.testing import check_marginal

    with pytest.raises(AssertionError, match="liar"):
        check_marginal("liar")


def test_a_callable_is_taken_where_a_name_is():
    data, noise = batch()
    coupled = couple(data, noise, rolled, by=2)
    assert coupled.index.tolist() == [4, 5, 0, 1, 2, 3]
    assert coupled.marginal == "permutation"
    assert couple(data, noise, lambda cost, *, generator: list(range(5, -1, -1))).index.tolist() == [5, 4, 3, 2, 1, 0]
    as_array = couple(
        data, noise, lambda cost, *, generator: cost.numpy().argsort(1)[:, 0] * 0 + torch.arange(6).numpy()
    )
    assert as_array.index.tolist() == list(range(6))


def test_a_callable_gets_the_callers_generator_and_tensors_even_for_arrays():
    mine = torch.Generator().manual_seed(3)

    def method(cost, *, generator):
        assert generator is mine
        assert isinstance(cost, torch.Tensor)
        return torch.arange(len(cost))

    couple(*(x.numpy() for x in batch()), method, generator=mine)


def test_a_callable_metric_is_solved_and_reported():
    data, noise = batch(8)

    def fourth(x, y):
        assert x.shape == y.shape == (8, 12)
        return (x[:, None] - y[None]).pow(4).sum(2)

    for method in ("hungarian", "auction", "greedy"):
        coupled = couple(data, noise, method, metric=fourth)
        cost = fourth(data.flatten(1), noise.flatten(1)).double()
        assert coupled.cost.item() == pytest.approx(cost[torch.arange(8), coupled.index].mean().item(), rel=1e-6)
        assert coupled.cost_before.item() == pytest.approx(cost.diagonal().mean().item(), rel=1e-6)
    named = couple(data, noise, metric="l1")
    assert torch.equal(couple(data, noise, metric=lambda x, y: torch.cdist(x, y, p=1)).index, named.index)
    assert named.cost.item() == pytest.approx(paired(data, named.noise, "l1"), rel=1e-5)


_PACKAGE = """
    import couplings, time, torch
    from scipy.optimize import linear_sum_assignment

    def thirdparty(cost, *, generator=None):
        "Exact, by somebody else."
        return torch.from_numpy(linear_sum_assignment(cost.double().numpy())[1])

    def wrong(cost, *, generator=None):
        "Says that it is exact, and is not."
        return torch.arange(len(cost)).flip(0)

    def register():
        time.sleep(0.2)  # long enough for a second thread to ask for the methods
        couplings.register("thirdparty", thirdparty, marginal="permutation", exact=True, shift_invariant=True)
        couplings.register("thirdwrong", wrong, marginal="permutation", exact=True, shift_invariant=True)
"""


@pytest.fixture
def installed(tmp_path):
    """Environment of a process in which another package with the entry point is installed."""
    (tmp_path / "somebody.py").write_text(textwrap.dedent(_PACKAGE))
    info = tmp_path / "somebody-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: somebody\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[couplings.methods]\nsomebody = somebody:register\n")
    paths = [str(tmp_path), str(TESTS.parent), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def run(arguments, env):
    return subprocess.run(
        [sys.executable, *arguments], env=env, cwd=TESTS.parent, capture_output=True, text=True, timeout=250
    )


def test_an_installed_package_registers_its_methods(installed):
    program = """
from concurrent.futures import ThreadPoolExecutor
import torch, couplings
x = torch.eye(4)
with ThreadPoolExecutor(2) as pool:
    for answer in pool.map(lambda name: couplings.couple(x, x.flip(0), name).index.tolist(), ["ThirdParty"] * 2):
        print(answer)
print([info.summary for info in couplings.methods("third*")])
"""
    done = run(["-c", program], installed)
    assert done.stdout.splitlines() == [
        "[3, 2, 1, 0]",
        "[3, 2, 1, 0]",
        "['Exact, by somebody else.', 'Says that it is exact, and is not.']",
    ], done.stderr


def test_an_installed_method_is_covered_by_the_property_tests(installed):
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/property", "-k"]
    done = run([*command, "third and (worse or multiset or known_optimum)"], installed)
    lines = [line.partition(" - ")[0] for line in done.stdout.splitlines() if line.startswith("FAILED")]
    assert len(lines) == 2, done.stdout[-3000:]
    assert all("thirdwrong" in line for line in lines)
    assert {line.rpartition("::")[2].partition("[")[0] for line in lines} == {
        "test_property",
        "test_exact_methods_solve_instances_of_known_optimum",
    }
    assert "2 failed, 4 passed" in done.stdout


@pytest.mark.parametrize("spoiled", ["cost", "metric", "points"])
def test_a_callable_that_computes_in_place_spoils_neither_the_batch_nor_the_report(spoiled):
    data, noise = batch(6)
    kept, cost = (data.clone(), noise.clone()), torch.cdist(data.flatten(1), noise.flatten(1))

    def method(*operands, generator=None):
        for operand in operands:
            operand.zero_()
        return torch.arange(6).flip(0)

    def metric(x, y):
        return x.zero_() @ y.zero_().T

    expected = cost.flip(1).diagonal().mean().item()
    if spoiled == "cost":
        held = cost.clone()
        assert couple(data, noise, method, metric=lambda x, y: held).cost.item() == pytest.approx(expected)
        assert torch.equal(held, cost)
    elif spoiled == "metric":
        couple(data, noise, metric=metric)
    else:
        couplings.register("spoiler", method, marginal="permutation", needs="points")
        assert couple(data, noise, "spoiler", metric="l2").cost.item() == pytest.approx(expected)
    assert same_bits(data, kept[0])
    assert same_bits(noise, kept[1])
