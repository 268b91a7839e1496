"""Couplings over ranks in the background: the answers of the foreground, while the foreground goes on exchanging."""

import torch
import torch.distributed as dist
from cases import Case

from couplings import Coupling, lookahead


def submit_and_go_on(case):
    data, noise, _ = case.share(dist.get_rank())
    coupling = Coupling(scope="global", **case.options)
    pending = [coupling.submit(data, noise + k) for k in range(3)]
    called = [coupling(data, noise + k) for k in range(3)]
    same = []
    for one, other in zip(pending, called, strict=True):
        coupled = one.result()
        # Collective over the caller's group, while later couplings exchange over their own.
        same += [torch.equal(coupled.index, other.index), torch.equal(coupled.apply(noise), other.apply(noise))]
    return same


def test_submit_gives_the_answers_of_calling(three_ranks):
    case = Case((5, 4, 6))
    assert all(all(same) for same in three_ranks.run(submit_and_go_on, case))


def submit_in_a_group(case):
    rank = dist.get_rank()
    pair = dist.new_group([0, 1])
    data, noise, _ = case.share(rank)
    done = True
    if rank < 2:
        coupling = Coupling(scope="global", group=pair)
        done = torch.equal(coupling.submit(data, noise).result().index, coupling(data, noise).index)
        done = done and len(list(lookahead([data] * 2, coupling, window=2, seed=0))) == 2
    dist.barrier(dist.new_group())  # all make it, whatever groups the pair has made
    return done


def test_only_the_ranks_of_a_group_take_part(three_ranks):
    assert all(three_ranks.run(submit_in_a_group, Case((4, 3, 5))))


def look_ahead(case):
    data, _, _ = case.share(dist.get_rank())
    coupling = Coupling(scope="global")
    loops = [lookahead([data] * 5, coupling, window=2, seed=seed + dist.get_rank()) for seed in (0, 10)]
    handed = [noise for pair in zip(*loops, strict=True) for _, noise in pair]
    pending = coupling.submit(data, torch.ones_like(data) * dist.get_rank())
    return len(handed), pending.result().noise.shape == data.shape


def test_loops_over_ranks_run_beside_each_other(three_ranks):
    assert three_ranks.run(look_ahead, Case((3, 3, 3), values="images")) == [(10, True)] * 3
