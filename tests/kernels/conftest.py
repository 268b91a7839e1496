"""A marker for the many equal cases of one property: skipped unless asked for with ``-m thorough``."""

import pytest


def pytest_configure(config):
    config.addinivalue_line("markers", "thorough: more cases of a property that is tested anyway; run by -m thorough")


def pytest_collection_modifyitems(config, items):
    if "thorough" not in (config.option.markexpr or ""):
        for item in items:
            if item.get_closest_marker("thorough"):
                item.add_marker(pytest.mark.skip(reason="needs -m thorough"))
