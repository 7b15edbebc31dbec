"""What tests of faults share."""

from collections.abc import Iterator

import pytest
from forks import Forks


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    """Starts commands quickly, each in a process of its own."""
    with Forks() as fork_server:
        yield fork_server
