"""What comes back from a coupling over ranks, and what it took."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from cases import Case, couple_share, couple_whole, rows_of, told

from couplings import Coupling, couple


def tie_to_noise(case):
    """Couple, then send along what is tied to the noise: numbered rows in several forms."""
    rank = dist.get_rank()
    data, noise, _ = case.share(rank)
    coupled = couple(data, noise, scope="global", **case.all_options)
    first = sum(case.noise_rows[:rank])
    number = torch.arange(first, first + len(noise))
    return {
        "index": coupled.index.numpy(),
        "seeds": coupled.apply(number).numpy(),
        "masks": coupled.apply(number[:, None, None].expand(-1, 2, 3) % 2 == 0).numpy(),
        "array": coupled.apply(number.numpy().astype(np.float16)),
        "noise": bool(torch.equal(coupled.apply(noise), coupled.noise)),
    }


@pytest.mark.parametrize("method", ["auction", "greedy", "independent", "nearest"])
def test_apply_sends_along_what_is_tied_to_the_noise(world, method):
    case = Case(rows_of(world), {"method": method}, spare=2 if method in ("auction", "greedy") else 0)
    for share in world.run(tie_to_noise, case):
        index = share["index"]
        assert np.array_equal(share["seeds"], index)
        assert np.array_equal(share["masks"], np.broadcast_to(index[:, None, None] % 2 == 0, (len(index), 2, 3)))
        assert np.array_equal(share["array"], index.astype(np.float16))
        assert share["noise"]


def test_apply_follows_a_resampling_method(world):
    case = Case(rows_of(world), {"method": "sinkhorn", "draw": "rows", "reg": 5.0})
    for share in world.run(tie_to_noise, case):
        assert np.array_equal(share["seeds"], share["index"])


def couple_arrays(case):
    data, noise, _ = case.share(dist.get_rank())
    before = noise.clone()
    coupled = couple(data.numpy(), noise.numpy(), scope="global")
    kinds = {type(value) for value in (coupled.noise, coupled.index, coupled.cost, coupled.cost_before)}
    return kinds == {np.ndarray} and torch.equal(noise, before), coupled.index


def test_arrays_come_back_as_arrays_and_inputs_stay_as_they_are(world):
    case = Case(rows_of(world))
    shares = world.run(couple_arrays, case)
    assert all(good for good, _ in shares)
    assert np.array_equal(np.concatenate([index for _, index in shares]), couple_whole(case).index.numpy())


def draw_with(case, seeds):
    rank = dist.get_rank()
    generator = torch.Generator().manual_seed(seeds[rank])
    state = generator.get_state()
    global_state = torch.get_rng_state()
    data, noise, _ = case.share(rank)
    coupled = couple(data, noise, "sinkhorn", reg=2.0, scope="global", generator=generator)
    untouched = torch.equal(torch.get_rng_state(), global_state)
    return coupled.index.numpy(), not torch.equal(generator.get_state(), state), untouched


def test_the_first_ranks_generator_decides(world):
    case = Case(rows_of(world))
    data, noise, _ = case.batch()
    whole = couple(data, noise, "sinkhorn", reg=2.0, generator=torch.Generator().manual_seed(7))
    shares = world.run(draw_with, case, [7, 1, 2, 3])
    assert np.array_equal(np.concatenate([index for index, _, _ in shares]), whole.index.numpy())
    assert [advanced for _, advanced, _ in shares] == [True] + [False] * (world.size - 1)
    assert all(untouched for _, _, untouched in shares)
    other = world.run(draw_with, case, [8, 1, 2, 3])
    assert not np.array_equal(np.concatenate([index for index, _, _ in other]), whole.index.numpy())


def test_repeated_calls_give_the_same(world):
    for method in ("auction", "sinkhorn", "sliced"):
        case = Case(rows_of(world), {"method": method}, values="images")
        first, second = world.run(couple_share, case), world.run(couple_share, case)
        for one, other in zip(first, second, strict=True):
            assert np.array_equal(one["index"], other["index"])
            assert one["cost"] == other["cost"]


def couple_both_ways(case):
    data, noise, _ = case.share(dist.get_rank())
    return couple(data, noise).cost.item() * len(data), couple(data, noise, scope="global").cost.item()


def test_no_dearer_than_each_rank_by_itself(world):
    case = Case(rows_of(world), values="images")
    shares = world.run(couple_both_ways, case)
    alone = sum(cost for cost, _ in shares) / sum(case.rows)
    together = shares[0][1]
    assert together <= alone * (1 + 1e-6)
    assert world.size == 1 or together < alone


def test_a_coupling_over_ranks_is_four_exchanges_and_a_sum(three_ranks):
    rows, width = 6, 3 * 4 * 4
    total, others = 3 * rows, 2
    for rank, share in enumerate(three_ranks.run(couple_share, Case((rows,) * 3))):
        received = share["received"]
        assert set(received) == {"header", "noise", "sums", "index" if rank else "costs"}
        assert received["noise"] == others * rows * width * 4
        if rank:
            assert 0 <= received["index"] - 8 * total < 100
        else:
            assert 0 <= received["costs"] - others * rows * total * 4 < 100
        assert received["header"] + received["sums"] < 100 * others


@pytest.mark.parametrize("method", ["nearest", "independent"])
def test_methods_on_a_rows_own_candidates_send_no_noise(three_ranks, method):
    for share in three_ranks.run(couple_share, Case((6,) * 3, {"method": method})):
        assert set(share["received"]) == {"header", "sums"}


def couple_by_node(case, method):
    """Two groups of half the ranks each, as one coupling per node."""
    rank, half = dist.get_rank(), dist.get_world_size() // 2
    groups = [dist.new_group(list(range(half))), dist.new_group(list(range(half, 2 * half)))]
    data, noise, _ = case.share(rank)
    coupled = Coupling(method, scope="global", group=groups[rank // half])(data, noise)
    moved = coupled.apply(torch.arange(len(noise)) + 100 * rank)
    try:
        couple(data, noise, scope="global", group=groups[1 - rank // half])
    except ValueError as error:
        return told(coupled), moved.numpy(), str(error)
    return None


@pytest.mark.parametrize("method", ["auction", "sliced"])
def test_groups_couple_by_themselves(ranks, method):
    world = ranks(4)
    case = Case(rows_of(world))
    shares = world.run(couple_by_node, case, method)
    data, noise, _ = case.batch()
    half = world.size // 2
    for members, rows in (
        (range(half), slice(0, sum(case.rows[:half]))),
        (range(half, 2 * half), slice(sum(case.rows[:half]), None)),
    ):
        whole = couple(data[rows], noise[rows], method)
        index = np.concatenate([shares[rank][0]["index"] for rank in members])
        assert np.array_equal(index, whole.index.numpy())
        numbers = np.concatenate([np.arange(case.rows[rank]) + 100 * rank for rank in members])
        assert np.array_equal(np.concatenate([shares[rank][1] for rank in members]), numbers[index])
        for rank in members:
            assert shares[rank][0]["cost"] == pytest.approx(whole.cost.item(), rel=1e-6)
    assert all(f"rank {rank} is not in the process group" in share[2] for rank, share in enumerate(shares))


def test_without_a_process_group_global_is_local():
    data, noise, _ = Case((9,)).batch()
    alone, coupled = couple(data, noise), couple(data, noise, scope="global")
    assert torch.equal(coupled.index, alone.index)
    with pytest.raises(ValueError, match="no process group"):
        couple(data, noise, scope="global", group=object())
