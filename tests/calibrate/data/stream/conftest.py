"""One Ray cluster for all tests of a process: starting it takes longer than they do."""

import pytest


@pytest.fixture(scope="session")
def cluster():
    """Runs until the last test; whoever asks for Ray meanwhile joins it."""
    import ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()
