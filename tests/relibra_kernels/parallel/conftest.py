"""Groups of ranks, started once for all tests of this folder."""

import pytest
from ranks import Ranks


@pytest.fixture(scope="session")
def ranks():
    """`ranks(n)`: n processes in one gloo group."""
    groups: dict[int, Ranks] = {}

    def of_size(size: int) -> Ranks:
        if size in groups and groups[size].broken:
            groups.pop(size).close()
        if size not in groups:
            groups[size] = Ranks(size)
        return groups[size]

    yield of_size
    for group in groups.values():
        group.close()
