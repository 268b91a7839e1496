"""Persistent pairs: nearer from step to step, every seed kept exactly once, whatever is killed or damaged."""

import errno
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from couplings import Coupling, persistent
from couplings.noise import normal
from couplings.persistent import Pairs

ROWS, SEEDS, SHAPE = 60, 3, (4, 5)


def drawn(n, *shape, seed=0):
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def data():
    return drawn(ROWS, *SHAPE)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "pairs.bin"


def opened(path, **options):
    return Pairs.open(path, **{"rows": ROWS, "seeds": SEEDS} | options)


def held(pairs):
    return pairs.state_dict()["seeds"]


def everything(pairs):
    return held(pairs).flatten().sort().values


def total(pairs, data):
    """Sum of the squared distances of all pairs."""
    noise = normal(held(pairs).flatten(), SHAPE, dtype=torch.float64).view(ROWS, SEEDS, -1)
    return float((data.double().flatten(1)[:, None] - noise).square().sum())


def epoch(pairs, data, generator, **options):
    for rows in torch.randperm(ROWS, generator=generator).split(16):
        yield rows, pairs.couple(data[rows], rows, generator=generator, **options)


def test_distance_never_rises_and_falls_over_epochs(path, data):
    generator = torch.Generator().manual_seed(1)
    with opened(path) as pairs:
        begin = before = total(pairs, data)
        for _ in range(4):
            for _, coupled in epoch(pairs, data, generator):
                now = total(pairs, data)
                assert now <= before * (1 + 1e-6)
                assert coupled.cost <= coupled.cost_before * (1 + 1e-6)
                before = now
        assert before < 0.85 * begin


def test_noise_is_that_of_the_seeds_that_are_kept(path, data):
    with opened(path) as pairs:
        seeds = everything(pairs)
        for rows, coupled in epoch(pairs, data, torch.Generator()):
            assert coupled.marginal == "permutation"
            kept = normal(held(pairs)[rows].flatten(), SHAPE).view(len(rows), SEEDS, *SHAPE)
            assert (kept == coupled.noise[:, None]).flatten(2).all(2).any(1).all()
        assert torch.equal(everything(pairs), seeds)
        assert len(seeds.unique()) == ROWS * SEEDS


def test_classes_keep_their_seeds(path, data):
    classes = torch.arange(ROWS) % 3
    generator = torch.Generator()
    with opened(path) as pairs:
        before = [held(pairs)[classes == label].flatten().sort().values for label in range(3)]
        for _ in range(2):
            for rows in torch.randperm(ROWS, generator=generator).split(16):
                pairs.couple(data[rows], rows, condition=classes[rows], generator=generator)
        for label, seeds in enumerate(before):
            assert torch.equal(held(pairs)[classes == label].flatten().sort().values, seeds)


def test_arrays_and_half_precision(path, data):
    rows = torch.arange(20)
    with opened(path) as pairs:
        coupled = pairs.couple(data[rows].numpy(), rows.numpy())
        assert isinstance(coupled.noise, np.ndarray)
        assert pairs.couple(data[rows].bfloat16(), rows).noise.dtype is torch.bfloat16


def test_a_coupling_of_ones_own(path, data):
    """`draw` and `keep` are the two halves of `couple`."""
    rows, encoded = torch.arange(30), data[:30].flatten(1)[:, :7]
    with opened(path) as pairs:
        step = pairs.draw(rows, torch.Generator().manual_seed(3))
        assert torch.equal(step.seeds, held(pairs)[rows, step.slots])
        coupled = Coupling("greedy")(encoded, normal(step.seeds, (7,)))
        pairs.keep(step, coupled.apply(step.seeds))
        assert torch.equal(held(pairs)[rows, step.slots], step.seeds[coupled.index])


def test_the_file_is_reopened_as_it_was_left(path, data):
    with opened(path) as pairs:
        list(epoch(pairs, data, torch.Generator()))
        seeds = held(pairs)
    with opened(path) as pairs:
        assert torch.equal(held(pairs), seeds)


def test_without_a_generator_steps_draw_anew_and_runs_agree(tmp_path, data):
    rows, both = torch.arange(30), []
    for name in ("a", "b"):
        with opened(tmp_path / name) as pairs:
            first = pairs.draw(rows).slots
            assert torch.equal(pairs.draw(rows).slots, first)
            pairs.couple(data[rows], rows)
            assert not torch.equal(pairs.draw(rows).slots, first)
        with opened(tmp_path / name) as pairs:
            both.append(pairs.draw(rows).slots)
    assert torch.equal(*both)
    with opened(tmp_path / "c", seed=1) as pairs, opened(tmp_path / "d") as other:
        assert not torch.isin(held(pairs), held(other)).any()


def test_a_state_brings_back_the_same_steps(path, data):
    with opened(path) as pairs:
        list(epoch(pairs, data, torch.Generator()))
        state = pairs.state_dict()
        expected = [coupled.noise for _, coupled in epoch(pairs, data, torch.Generator().manual_seed(5))]
    with opened(path) as pairs:  # a run that went on after its checkpoint, and was killed
        list(epoch(pairs, data, torch.Generator()))
        pairs.load_state_dict(state)
        assert torch.equal(held(pairs), state["seeds"])
        again = [coupled.noise for _, coupled in epoch(pairs, data, torch.Generator().manual_seed(5))]
    assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))


def test_a_step_that_is_done_again_corrupts_nothing(path, data):
    with opened(path) as pairs:
        seeds = everything(pairs)
        step = pairs.draw(torch.arange(20), torch.Generator())
        pairs.keep(step, step.seeds.flip(0))
        with pytest.raises(ValueError, match="Draw it again"):
            pairs.keep(step, step.seeds.flip(0))
        again = pairs.draw(torch.arange(20), torch.Generator())
        for seeds_to_keep in (again.seeds[:1].expand(20), again.seeds[:10], again.seeds + 1):
            with pytest.raises(ValueError, match="a permutation of those that were drawn"):
                pairs.keep(again, seeds_to_keep)
        pairs.keep(again, step.seeds)
        assert torch.equal(everything(pairs), seeds)


@pytest.mark.parametrize("written", [0, 1, 7, 19, 20])
def test_the_journal_completes_a_step_that_was_cut_off(path, written):
    with opened(path) as pairs:
        step = pairs.draw(torch.arange(20), torch.Generator())
        pairs.keep(step, step.seeds.flip(0))
        done = held(pairs)
        # As if the process had been killed after so many of the seeds: the journal was complete by then.
        pairs._stored[(step.rows * SEEDS + step.slots)[written:].numpy()] = step.seeds[written:].numpy()
    with opened(path) as pairs:
        assert torch.equal(held(pairs), done)


@pytest.mark.parametrize("part", ["_head", "_body"])
def test_a_journal_that_was_cut_off_is_left_alone(path, part):
    with opened(path) as pairs:
        before = held(pairs)
        step = pairs.draw(torch.arange(20), torch.Generator())
        pairs.keep(step, step.seeds.flip(0))
        pairs._stored[:] = before.flatten().numpy()  # the journal comes first
        getattr(pairs, part)[1] += 1
    with opened(path) as pairs:
        assert torch.equal(held(pairs), before)


KILLS = """
import os, random, signal, sys, time, torch
from couplings.persistent import Pairs

def opened():
    return Pairs.open(sys.argv[1], rows=2000, seeds=2)

def write(kill):
    generator = torch.Generator().manual_seed(kill)
    pairs = opened()
    while True:
        step = pairs.draw(torch.randperm(2000, generator=generator)[:1500], generator)
        pairs.keep(step, step.seeds[torch.randperm(1500, generator=generator)])

times, before = random.Random(0), 0
for kill in range(20):
    writer = os.fork()
    if writer == 0:
        write(kill)
    time.sleep(times.uniform(0.05, 0.15))
    os.kill(writer, signal.SIGKILL)
    assert os.waitpid(writer, 0)[1] == signal.SIGKILL
    with opened() as pairs:  # checks that every seed is there once
        assert pairs.state_dict()["number"] > before or kill == 0
        before = pairs.state_dict()["number"]
"""


def test_a_process_killed_at_any_moment_leaves_a_valid_file(path):
    subprocess.run([sys.executable, "-c", KILLS, str(path)], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


# --- wrong input


def test_a_file_is_open_once(path):
    with opened(path) as pairs:
        with pytest.raises(BlockingIOError, match="a file of its own"):
            opened(path)
        pairs.close()
        opened(path).close()


@pytest.mark.parametrize("options", [{"rows": ROWS + 1}, {"seeds": SEEDS + 1}, {"seed": 1}])
def test_a_file_made_with_other_numbers_is_refused(path, options):
    opened(path).close()
    [(name, value)] = options.items()
    with pytest.raises(ValueError, match=f"was made with {name}=.*, not {value}"):
        opened(path, **options)


def test_damaged_files_are_refused(path):
    opened(path).close()
    whole = path.read_bytes()
    cut, short, other = whole[:100], whole[:-8], b"\x93NUMPY" + whole[6:]
    for damaged in (b"", cut, short, other, whole + b"\0", whole[:30] + b"\0" * 10 + whole[40:]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="is no file of pairs, or it is damaged"):
            opened(path)
    path.write_bytes(whole[:4096] + whole[4104:4112] + whole[4104:])  # the second seed twice
    with pytest.raises(ValueError, match="does not hold every seed once"):
        opened(path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        opened(path.parent / "missing" / "pairs")


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        ([0, 60], ValueError, "rows 0 to 59, got row 60"),
        ([-1, 3], ValueError, "got row -1"),
        ([3, 3], ValueError, "all be different"),
        ([0.5, 1.0], TypeError, "rows must be integers"),
        ([[1], [2]], ValueError, "one dimension"),
        ([1, 2, 3], ValueError, "number each row of the data, got 3 and 2"),
    ],
)
def test_wrong_rows_are_refused(path, data, rows, error, message):
    with opened(path) as pairs, pytest.raises(error, match=message):
        pairs.couple(data[:2], rows)


@pytest.mark.parametrize("coupling", [Coupling("nearest"), Coupling(scope="global")])
def test_couplings_that_do_not_permute_are_refused(path, data, coupling):
    with opened(path) as pairs:
        seeds = everything(pairs)
        with pytest.raises(ValueError, match="permut"):
            pairs.couple(data, torch.arange(ROWS), coupling=coupling)
        assert torch.equal(everything(pairs), seeds)


@pytest.mark.parametrize("options", [{"rows": 0}, {"seeds": 0}, {"rows": 1.5}, {"seeds": True}])
def test_wrong_numbers_are_refused(path, options):
    with pytest.raises(ValueError, match="must be an integer of at least 1"):
        opened(path, **options)
    assert not path.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": 1}, r"with seed=1, but .*a was made with seed=0.*Pairs.open\(..., seed=1\)"),
        ({"rows": 3, "seeds": 60}, r"with rows=3, seeds=60, but .*a was made with rows=60, seeds=3"),
    ],
)
def test_a_state_of_another_file_is_refused(tmp_path, options, message):
    with opened(tmp_path / "a") as pairs, opened(tmp_path / "b", **options) as other:
        before = held(pairs)
        with pytest.raises(ValueError, match=message):
            pairs.load_state_dict(other.state_dict())
        assert torch.equal(held(pairs), before)


def test_a_state_without_its_seed_is_taken_or_refused(tmp_path):
    with opened(tmp_path / "a") as pairs, opened(tmp_path / "b", seed=1) as other:
        pairs.load_state_dict({"seeds": held(pairs).flip(0), "number": 0})
        with pytest.raises(ValueError, match="with another seed=, or damaged"):
            pairs.load_state_dict({"seeds": held(other), "number": 0})
        with pytest.raises(ValueError, match="once: it is damaged"):
            pairs.load_state_dict({**pairs.state_dict(), "seeds": held(pairs)[:1].expand(ROWS, SEEDS)})


def test_two_that_make_a_file_at_once_get_one_file(path, data, monkeypatch):
    """The second makes it, and works in it, while the first is about to."""
    original, second = persistent._all_seeds, []

    def interrupted(*args):
        monkeypatch.undo()
        second.append(opened(path))
        return original(*args)

    monkeypatch.setattr(persistent, "_all_seeds", interrupted)
    with pytest.raises(BlockingIOError, match="a file of its own"):
        opened(path)
    with second[0] as pairs:
        pairs.couple(data[:16], torch.arange(16))
        seeds = held(pairs)
    with opened(path) as pairs:
        assert torch.equal(held(pairs), seeds)
    assert list(path.parent.iterdir()) == [path]


RACE = """
import sys
from couplings.persistent import Pairs

print("ready", flush=True)
sys.stdin.readline()
try:
    pairs = Pairs.open(sys.argv[1], rows=20000, seeds=8)
except BlockingIOError:
    print("refused", flush=True)
else:
    print("opened", flush=True)
sys.stdin.readline()
"""


def test_of_two_processes_that_make_a_file_one_is_refused(path):
    command = [sys.executable, "-c", RACE, str(path)]
    racers = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [racer.stdout.readline() for racer in racers] == ["ready\n"] * 2
    for racer in racers:
        racer.stdin.write("\n")
        racer.stdin.flush()
    assert sorted(racer.stdout.readline() for racer in racers) == ["opened\n", "refused\n"]
    for racer in racers:
        racer.communicate("\n")
    assert list(path.parent.iterdir()) == [path]


def test_a_file_that_was_replaced_before_it_was_locked_is_opened_anew(path, monkeypatch):
    with opened(path) as pairs:
        state = pairs.state_dict()
    original = persistent.locked

    def late(file):
        monkeypatch.undo()
        with opened(path) as other:
            other.load_state_dict({**state, "seeds": state["seeds"].flip(0)})
        return original(file)

    monkeypatch.setattr(persistent, "locked", late)
    with opened(path) as pairs:
        assert torch.equal(held(pairs), state["seeds"].flip(0))
        with pytest.raises(BlockingIOError, match="a file of its own"):
            opened(path)


def test_closed_pairs_say_so(path, data):
    pairs = opened(path)
    step, state = pairs.draw(torch.arange(4)), pairs.state_dict()
    pairs.close()
    pairs.close()
    for use in (
        lambda: pairs.couple(data, torch.arange(ROWS)),
        lambda: pairs.draw(torch.arange(4)),
        lambda: pairs.keep(step, step.seeds),
        lambda: pairs.load_state_dict(state),
        pairs.__enter__,
        pairs.flush,
        pairs.state_dict,
    ):
        with pytest.raises(ValueError, match=r"the pairs are closed. Type: Pairs.open\('.*pairs.bin', rows=60"):
            use()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (torch.zeros(2, 3, dtype=torch.uint8), r"data must be floating .*, got torch.uint8. Scale images first"),
        (np.zeros((2, 3), np.uint8), r"data must be floating .*, got uint8. Scale images first"),
        ([[0.0], [1.0]], "data must be a torch tensor or a NumPy array, got list"),
    ],
)
def test_data_that_cannot_be_coupled_is_refused(path, data, message):
    with opened(path) as pairs, pytest.raises(TypeError, match=message):
        pairs.couple(data, torch.arange(2))


def test_any_integer_is_a_seed(path):
    opened(path, seed=np.int64(3)).close()
    opened(path, seed=3).close()
    for seed in ("a", 1.5, None):
        with pytest.raises(TypeError, match="seed= must be an integer, got"):
            opened(path, seed=seed)


def test_a_full_disk_is_an_error_before_anything_is_written(path, data, monkeypatch):
    def full(descriptor, begin, size):
        raise OSError(errno.ENOSPC, "No space left on device")

    with opened(path) as pairs:
        before = path.read_bytes()
        monkeypatch.setattr(os, "posix_fallocate", full)
        with pytest.raises(OSError, match=r"No space left on device: .*pairs.bin"):
            pairs.couple(data[:16], torch.arange(16))
        assert path.read_bytes() == before
        monkeypatch.undo()
        pairs.couple(data[:16], torch.arange(16))
        assert path.read_bytes() != before
