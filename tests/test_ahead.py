"""Couplings in the background give the answers of couplings in the foreground, in order, and leave nothing behind."""

import gc
import subprocess
import sys
import threading
import traceback

import pytest
import torch

import couplings
from couplings import Coupling, couple, lookahead
from couplings.ahead import _tensors_in


def background_threads():
    return [thread for thread in threading.enumerate() if thread.name == "couplings-ahead"]


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    gc.collect()
    for thread in background_threads():
        thread.join(5)
    assert not background_threads()


def batches(count, rows=4, shape=(3, 2)):
    generator = torch.Generator().manual_seed(count)
    return [torch.rand(rows, *shape, generator=generator) for _ in range(count)]


@pytest.mark.parametrize("info", couplings.methods(), ids=lambda info: info.name)
@pytest.mark.parametrize("condition", [None, torch.arange(12) % 3])
def test_submit_gives_the_answer_of_calling(info, condition):
    data, noise = torch.rand(12, 5), torch.randn(12, 5)
    coupling = Coupling(info.name, metric="l2")
    pending = coupling.submit(data, noise, condition=condition)
    coupled, called = pending.result(), coupling(data, noise, condition=condition)
    assert pending.done()
    assert torch.equal(coupled.index, called.index)
    assert torch.equal(coupled.noise, called.noise)
    assert torch.equal(coupled.cost, called.cost)


def test_submit_keeps_gradients_only_where_they_are_kept():
    data, noise = torch.rand(4, 5), torch.randn(4, 5, requires_grad=True)
    assert Coupling().submit(data, noise).result().noise.requires_grad
    with torch.no_grad():
        pending = Coupling().submit(data, noise)
    assert not pending.result().noise.requires_grad


def test_submit_hands_on_the_error_with_its_traceback():
    def broken(cost, *, generator=None):
        return {}["no such row"]

    pending = Coupling(broken).submit(torch.rand(4, 5), torch.randn(4, 5))
    for _ in range(2):
        with pytest.raises(KeyError, match="no such row") as caught:
            pending.result()
    assert "in broken" in "".join(traceback.format_exception(caught.value))


def test_many_couplings_at_a_time():
    problems = [(torch.rand(30, 4), torch.randn(30, 4)) for _ in range(8)]
    coupling = Coupling()
    for (data, noise), pending in zip(problems, [coupling.submit(*one) for one in problems], strict=True):
        assert torch.equal(pending.result().index, coupling(data, noise).index)


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("count", [8, 7, 3, 1, 0])
def test_batches_come_in_order_and_are_coupled_over_the_window(count, rows):
    loader = batches(count, rows)
    handed = list(lookahead(loader, Coupling(), window=4, seed=3))
    assert [id(batch) for batch, _ in handed] == [id(batch) for batch in loader]
    for start in range(0, count, 4):
        data = torch.cat([batch for batch, _ in handed[start : start + 4]])
        noise = torch.cat([noise for _, noise in handed[start : start + 4]])
        assert noise.shape == data.shape
        # Already optimal over the whole window.
        again = couple(data, noise)
        assert again.cost.item() == pytest.approx(again.cost_before.item(), rel=1e-6)


def test_what_is_coupled_can_be_picked_and_labels_stay_with_their_data():
    labels = [torch.arange(4) % 2, torch.arange(4) % 2]
    loader = [{"image": x, "label": y} for x, y in zip(batches(2), labels, strict=True)]
    drawn = []

    def draw(shape, generator, device):
        drawn.append(torch.randn(shape, generator=generator, device=device))
        return drawn[-1]

    handed = list(
        lookahead(loader, Coupling(), window=2, data=lambda b: b["image"], condition=lambda b: b["label"], noise=draw)
    )
    assert [batch is given for (batch, _), given in zip(handed, loader, strict=True)] == [True, True]
    pool, given = torch.cat(drawn), torch.cat([noise for _, noise in handed])
    of_pool = [int((pool == row).flatten(1).all(1).nonzero()) for row in given]
    assert sorted(of_pool) == list(range(8))
    assert [k % 2 for k in of_pool] == torch.cat(labels).tolist()


def test_tuples_are_coupled_by_their_first_element():
    loader = [(x, torch.arange(4)) for x in batches(3)]
    for given, (batch, noise) in zip(loader, lookahead(loader, Coupling(), window=2), strict=True):
        assert batch is given
        assert noise.shape == given[0].shape


def test_shapes_are_coupled_among_themselves():
    loader = [*batches(2), torch.rand(3, 7), *batches(1), torch.rand(2, 7)]
    handed = list(lookahead(loader, Coupling(), window=5))
    assert [noise.shape for _, noise in handed] == [batch.shape for batch in loader]


def test_nearest_draws_its_candidates():
    handed = list(lookahead(batches(3), Coupling("nearest", k=4), window=2))
    assert [noise.shape for _, noise in handed] == [(4, 3, 2)] * 3
    with pytest.raises(ValueError, match="k=4"):
        list(lookahead(batches(3), Coupling("nearest")))


def test_the_noise_depends_on_the_seed_and_the_pass_alone():
    def passes(seed):
        loop = lookahead(batches(5), Coupling("sinkhorn"), window=2, seed=seed)
        return [torch.cat([noise for _, noise in loop]) for _ in range(2)]

    first, second = passes(0)
    assert torch.equal(first, passes(0)[0])
    assert torch.equal(second, passes(0)[1])
    assert not torch.equal(first, second)
    assert not torch.equal(first, passes(1)[0])


class Stateful:
    """A loader that can be put back, as torchdata's."""

    def __init__(self, count):
        self.batches, self.at = batches(count), 0

    def __iter__(self):
        while self.at < len(self.batches):
            self.at += 1
            yield self.batches[self.at - 1]
        self.at = 0

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


@pytest.mark.parametrize("loader", [lambda: batches(11), lambda: Stateful(11)], ids=["plain", "stateful"])
@pytest.mark.parametrize("stop", range(1, 11))
def test_a_loop_can_be_resumed_anywhere(loader, stop):
    whole = [noise for _, noise in lookahead(loader(), Coupling(), window=3)]
    loop = lookahead(loader(), Coupling(), window=3)
    running = iter(loop)
    for _ in range(stop):
        next(running)
    state = loop.state_dict()
    running.close()
    resumed = lookahead(loader(), Coupling(), window=3)
    resumed.load_state_dict(state)
    rest = [noise for _, noise in resumed]
    assert len(rest) == 11 - stop
    for one, other in zip(rest, whole[stop:], strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("where", ["loader", "data", "solve"])
def test_an_error_surfaces_in_the_loop_with_its_traceback(where):
    def loader():
        yield from batches(5)
        if where == "loader":
            raise OSError("the disk is gone")
        yield from batches(5)

    seen = []

    def data(batch):
        seen.append(batch)
        if where == "data" and len(seen) == 6:
            raise OSError("the disk is gone")
        return batch

    def method(cost, *, generator=None):
        if where == "solve" and len(seen) > 5:
            raise OSError("the disk is gone")
        return torch.arange(len(cost))

    loop = iter(lookahead(loader(), Coupling(method), window=3, data=data))
    handed = []
    with pytest.raises(OSError, match="the disk is gone") as caught:
        handed.extend(noise for _, noise in loop)
    assert len(handed) == 3
    assert f"in {'method' if where == 'solve' else where}" in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("leave", ["break", "forget", "close"])
def test_leaving_the_loop_ends_the_thread(leave):
    loop = iter(lookahead(batches(40), Coupling(), window=2))
    next(loop)
    if leave == "close":
        loop.close()
    elif leave == "break":
        for _ in loop:
            break
    del loop


def test_the_interpreter_ends_with_work_in_flight():
    program = (
        "import torch\n"
        "from couplings import Coupling, lookahead\n"
        "pending = Coupling().submit(torch.rand(600, 8), torch.randn(600, 8))\n"
        "loop = iter(lookahead([torch.rand(8, 8)] * 9, Coupling(), window=2))\n"
        "next(loop)\n"
        "print('done')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


def test_a_window_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least 1"):
        lookahead([], Coupling(), window=0)


def test_tensors_are_found_wherever_a_batch_keeps_them():
    tensors = list(torch.arange(5))
    batch = ({"image": tensors[0], "more": [tensors[1], "text"]}, (tensors[2], None), iter([tensors[3], [tensors[4]]]))
    assert [int(tensor) for tensor in _tensors_in(batch)] == [0, 1, 2, 3, 4]
