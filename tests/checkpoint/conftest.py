"""Work directories with checkpoints."""

import pytest

from hnet.checkpoint.save import Checkpointer
from tests.checkpoint.states import make_state


@pytest.fixture
def two(tmp_path):
    """A work directory with steps 1 and 2."""
    with Checkpointer(tmp_path) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, make_state(step), {"n": step})
    return tmp_path
