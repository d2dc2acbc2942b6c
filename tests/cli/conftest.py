"""Sounds for the command line's tests."""

import pytest
import soundfile
from support import reference_weights


@pytest.fixture
def sound(tmp_path):
    """A WAV file of 20 s."""
    path = tmp_path / "sound.wav"
    soundfile.write(path, reference_weights.samples(441_000), 22_050)
    return path
