import pytest

import fake


@pytest.fixture(scope="module")
def device() -> None:
    """The device that computes nothing; without it the tests are skipped, with the reason."""
    fake.require()
