"""The package as a whole: light imports, a README that is true, text that ships."""

import re
import subprocess
import sys

import formula
import pytest
import soundfile
from conftest import CHECKOUT, DEMO

import soundnet_port as sp
from soundnet_port.conversion.convert import convert

README = (CHECKOUT / "README.md").read_text("utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


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


def test_the_readme_starts_with_the_two_commands():
    assert [line.split("#")[0].strip() for line in blocks("sh")[0].splitlines()] == [
        "python3 run.py demo",
        "python3 run.py test",
    ]


def test_the_readmes_python_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    soundfile.write("clip.wav", formula.samples(230_000), 22_050)
    list(convert(DEMO))
    for code in blocks("python"):
        exec(compile(code, "README.md", "exec"), {})
    out = capsys.readouterr().out
    assert "torch.Size([1, 64, 8])" in out
    assert "object " in out


def test_the_readmes_commands_exist():
    from soundnet_port.cli import _parser

    lines = [line for block in blocks("sh") for line in block.splitlines()]
    commands = [line.split("#")[0].split() for line in lines if line.startswith("soundnet-port")]
    assert len(commands) >= 7
    for words in commands:
        options = _parser().parse_args(words[1 : words.index(">") if ">" in words else None])
        assert callable(options.run)


@pytest.mark.parametrize("architecture", [sp.SOUNDNET8, sp.SOUNDNET5])
def test_the_readmes_table_of_layers_is_the_architectures(architecture):
    for name, layer in architecture.layers.items():
        branch = f".{1 + list(architecture.head_sizes).index(name)}" if layer.kind == "head" else ""
        row = (
            f"| {name} | {layer.module}{branch} | {layer.channels} | "
            f"{layer.stride:,} | {layer.receptive_field:,} | {layer.stride / 22_050:.4f} s | "
            f"{layer.receptive_field / 22_050:.3f} s | {layer.shortest:,} |"
        )
        assert row in README, row


def test_the_changelog_names_this_version():
    assert f"## {sp.__version__} " in (CHECKOUT / "CHANGELOG.md").read_text("utf-8")
