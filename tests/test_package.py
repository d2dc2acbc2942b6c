"""The package as a whole: light imports, its public names, its version."""

import subprocess
import sys

import pytest
from conftest import CHECKOUT

import soundnet_port as sp


def modules_after(code):
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    )
    return set(done.stdout.split())


def test_importing_the_package_imports_nothing_that_it_does_not_need():
    heavy = {"torch", "numpy", "torchfile", "soundfile", "soxr", "safetensors", "tqdm"}
    assert not heavy & modules_after("import soundnet_port")
    assert "torchfile" not in modules_after(
        "import soundnet_port as sp; sp.SoundNet, sp.load_pretrained, sp.load_audio, sp.predict"
    )


def test_the_public_names_are_there():
    for name in sp.__all__:
        assert getattr(sp, name) is not None
    assert set(sp.__all__) <= set(dir(sp))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = sp.nothing


def test_the_changelog_names_this_version():
    assert f"## {sp.__version__} " in (CHECKOUT / "CHANGELOG.md").read_text("utf-8")
