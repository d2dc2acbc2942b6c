"""A server of the web application, and a sound for it."""

import contextlib
import tempfile
import threading

import pytest
from support.web_site import RATE, run_site

import soundnet_port as sp
from soundnet_port.audio.examples import medley


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of temporary files; must be empty at the end."""
    path = tmp_path_factory.mktemp("temporary")
    before, tempfile.tempdir = tempfile.tempdir, str(path)
    yield path
    tempfile.tempdir = before
    assert not list(path.iterdir())


@pytest.fixture(scope="module")
def network():
    return sp.load_pretrained("demo")


@pytest.fixture(scope="module")
def site(network, folder):
    with run_site(network, max_megabytes=30) as running_site:
        yield running_site


@pytest.fixture(scope="module")
def example():
    """25 s: waves, then a crying baby."""
    return medley().numpy()[: 25 * RATE] / 256


@pytest.fixture
def resume(monkeypatch):
    """An event; decoding stops after two blocks, 24 s, until it is set."""
    from soundnet_port.viewing import session

    event, open_sound = threading.Event(), session.open_sound

    @contextlib.contextmanager
    def open_slowly(*arguments):
        with open_sound(*arguments) as sound:
            blocks = sound.blocks

            def read_slowly(samples):
                for number, block in enumerate(blocks(samples)):
                    yield block
                    if number:
                        event.wait(60)

            object.__setattr__(sound, "blocks", read_slowly)
            yield sound

    monkeypatch.setattr(session, "open_sound", open_slowly)
    yield event
    event.set()
