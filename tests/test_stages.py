"""Where the time of a coupling goes: the stages add up, and nobody is watched who did not ask."""

import threading

import pytest
import torch

from couplings import couple
from couplings.stages import STAGES, recorded, stage


class Clock:
    """Advances by one at every look."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        self.now += 1.0
        return self.now


def test_a_stage_inside_another_is_counted_once():
    with recorded(Clock()) as record, stage("solve"), stage("conversion"):
        pass
    assert {name: value for name, value in record.seconds.items() if value} == {"other": 2, "solve": 2, "conversion": 1}


@pytest.mark.parametrize("method", ["auction", "hungarian", "lapjv", "emd", "greedy", "stable", "sinkhorn"])
def test_every_stage_of_a_method_on_the_cost_takes_time(method):
    clock = Clock()
    with recorded(clock) as record:
        couple(torch.rand(12, 3), torch.randn(12, 3), method)
    seconds = record.seconds
    assert set(seconds) == {*STAGES, "other"}
    assert all(seconds[name] > 0 for name in STAGES), seconds
    assert sum(seconds.values()) == clock.now - 1
    assert record.received == {}


def test_a_recording_ends_and_sees_its_own_thread_only():
    with recorded(Clock()) as record:
        other = threading.Thread(target=couple, args=(torch.rand(4, 3), torch.randn(4, 3)))
        other.start()
        other.join()
    couple(torch.rand(4, 3), torch.randn(4, 3))
    assert {name for name, value in record.seconds.items() if value} == {"other"}
