"""What starts the runs of this folder."""

import pytest

from tests.remote.warm import Warm


@pytest.fixture(scope="session")
def warm(python):
    """Starts training processes within a second."""
    made = Warm(python)
    yield made
    made.end()
