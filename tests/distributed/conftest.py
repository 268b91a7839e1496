from functools import cache

import pytest
from world import World


@pytest.fixture(scope="session")
def ranks():
    """`ranks(size)`: a world of that many ranks, started when first asked for."""
    started = []

    @cache
    def start(size):
        started.append(World(size))
        return started[-1]

    yield start
    ended = [world.close() for world in started]
    assert all(ended)


@pytest.fixture
def three_ranks(ranks):
    return ranks(3)


@pytest.fixture(params=[pytest.param(n, marks=() if n == 3 else pytest.mark.thorough) for n in (1, 2, 3, 4)])
def world(request, ranks):
    """Three ranks with batches of unequal sizes; with --thorough also one, two and four."""
    return ranks(request.param)
