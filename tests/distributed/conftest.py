import pytest
from world import World


@pytest.fixture(scope="session", params=[1, 2, 3, 4], ids="{}-ranks".format)
def world(request):
    world = World(request.param)
    yield world
    assert world.close()


@pytest.fixture(scope="session")
def three_ranks():
    world = World(3)
    yield world
    assert world.close()
