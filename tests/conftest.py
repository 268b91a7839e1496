"""`--thorough` runs every case and 1000 examples a property; without it a kind is covered by one case of it.

What is marked slow runs with ``-m slow`` only.
"""

import torch
from hypothesis import HealthCheck, settings

# Small tensors: a second thread costs more than it saves. Tests of threads set their own number.
torch.set_num_threads(1)

_COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large]}
settings.register_profile("fast", derandomize=True, max_examples=10, database=None, **_COMMON)
settings.register_profile("thorough", max_examples=1000, print_blob=True, **_COMMON)


def pytest_addoption(parser):
    parser.addoption("--thorough", action="store_true", help="run the tests marked thorough and search longer")


def pytest_configure(config):
    config.addinivalue_line("markers", "thorough: more cases of what other tests cover; runs with --thorough only")
    settings.load_profile("thorough" if config.getoption("--thorough") else "fast")


def pytest_collection_modifyitems(config, items):
    wanted = {"thorough": config.getoption("--thorough"), "slow": "slow" in config.getoption("markexpr")}
    unwanted = [name for name, runs in wanted.items() if not runs]
    left_out = [item for item in items if any(map(item.get_closest_marker, unwanted))]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
