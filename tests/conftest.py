"""How the tests run: in which order, and with a garbage collector that looks at tests only."""

import gc


def pytest_configure():
    gc.disable()


def pytest_collection_modifyitems(items):
    """Tests that start no server come first, so that a mistake shows within seconds."""
    items.sort(key=lambda item: item.get_closest_marker("e2e") is not None)


def pytest_collection_finish():
    """Keep what the imports made out of collections: a million objects of torch and vLLM, half a second each time."""
    gc.freeze()
    gc.enable()


def pytest_unconfigure():
    gc.unfreeze()  # some libraries complain at the exit of what was never freed
