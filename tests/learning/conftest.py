"""What several tests of training use."""

import pytest
import torch
from support.distillation import write_manifest


@pytest.fixture
def one_thread():
    """Sum in the same order here and in the processes that tests start."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """The manifest of small sounds for distillation."""
    return write_manifest(tmp_path_factory.mktemp("clips"))
