"""What several tests of training use."""

import sys
from pathlib import Path

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


@pytest.fixture(autouse=True)
def _without_curves(request, monkeypatch):
    """Runs write an empty curves.png, whose drawing would take half of the time of these tests.

    Not in fixtures of whole modules, in other processes, or with the fixture `curves`.
    """
    if "curves" in request.fixturenames:
        return
    for name in ("finetune_loop", "training_loop", "encoding_finetune_loop"):
        if module := sys.modules.get(f"soundnet_port.learning.{name}"):
            monkeypatch.setattr(module, "plot_curves", lambda log, png: Path(png).write_bytes(b""))


@pytest.fixture
def curves():
    """Draw curves."""
