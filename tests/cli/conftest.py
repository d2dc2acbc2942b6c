"""Sounds for the command line's tests."""

import pytest
import soundfile
from support import reference_weights

from soundnet_port.cli import reporting


@pytest.fixture
def sound(tmp_path):
    """A WAV file of 20 s."""
    path = tmp_path / "sound.wav"
    soundfile.write(path, reference_weights.samples(441_000), 22_050)
    return path


@pytest.fixture
def clock(monkeypatch):
    """The time in seconds, to be set as `clock.now`."""

    class Clock:
        now = 1000.0

    monkeypatch.setattr(reporting.time, "monotonic", lambda: Clock.now)
    return Clock
