"""Order of the run: tests that start no server come first, so that a mistake shows within seconds."""


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.get_closest_marker("e2e") is not None)
