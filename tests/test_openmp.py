"""Small couplings stay on one thread, and no other thread, before or after, notices."""

import threading

import pytest
import torch

from couplings import couple
from couplings._openmp import one_thread


def seen_by_another_thread():
    seen = []
    thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return seen[0]


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_the_limit_is_this_threads_and_ends():
    with one_thread():
        assert torch.get_num_threads() == 1
        assert seen_by_another_thread() == 2
    assert torch.get_num_threads() == 2
    with pytest.raises(ZeroDivisionError), one_thread():
        raise ZeroDivisionError
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("two_threads")
def test_a_users_function_runs_on_as_many_threads_as_the_user_chose():
    seen = []

    def metric(data, noise):
        seen.append(torch.get_num_threads())
        return torch.cdist(data, noise)

    couple(torch.rand(4, 3), torch.randn(4, 3), metric=metric)
    couple(torch.rand(4, 3), torch.randn(4, 3))
    assert seen == [2]
    assert torch.get_num_threads() == 2
