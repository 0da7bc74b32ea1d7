"""One warm process for all runs of this folder."""

import pytest

from tests.remote.warm import Warm


@pytest.fixture(scope="session")
def warm():
    """Starts training processes within a second."""
    made = Warm()
    yield made
    made.end()
