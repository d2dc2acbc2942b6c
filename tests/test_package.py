"""The package as a whole: light imports, its public names, its version."""

import signal
import subprocess
import sys

import pytest
from support.networks import CHECKOUT

import soundnet_port as sp
from soundnet_port.cli.main import main


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


def test_who_cites_the_software_cites_this_version():
    assert f"\nversion: {sp.__version__}\n" in (CHECKOUT / "CITATION.cff").read_text("utf-8")


@pytest.mark.parametrize(
    ("command", "extra", "packages"),
    [
        ("evaluate clips.tsv -w nowhere", "learn", ["sklearn", "matplotlib"]),
        ("train clips.tsv -o out", "learn", ["lightning_fabric", "matplotlib"]),
        ("finetune clips.tsv -o out -w nowhere", "learn", ["lightning_fabric", "matplotlib"]),
        ("export -w nowhere -o out/a.onnx", "onnx", ["onnx", "onnxruntime"]),
        ("label-videos film.mp4 -o out --teacher objects=nowhere", "videos", ["av", "PIL", "transformers"]),
    ],
    ids=["evaluate", "train", "finetune", "export", "label_videos"],
)
def test_a_missing_extra_is_one_line_before_any_work(
    command, extra, packages, demo_report, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    lines = ["file\tlabel\tfold\n"]
    for name in ("x1", "x2", "y1", "y2"):
        (tmp_path / f"{name}.wav").write_text("")
        lines.append(f"{name}.wav\t{name[0]}\t{name[1]}\n")
    (tmp_path / "clips.tsv").write_text("".join(lines))
    for package in packages:
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            patch.delitem(sys.modules, "soundnet_port.learning.video_labeling", raising=False)
            if package == "transformers":
                patch.setitem(sys.modules, "transformers.utils", None)
            arguments = command.replace("nowhere", str(demo_report.weights)).split()
            assert main(arguments) == 2
        said = capsys.readouterr().err
        assert said.endswith(f"{package} is not installed: pip install 'soundnet-port[{extra}]'\n")
        assert said.count("\n") == 1
        assert not (tmp_path / "out").exists()


def test_in_a_checkout_nothing_beside_conversion_becomes_part_of_the_package():
    code = "import importlib.util as u; print([u.find_spec('soundnet_port.' + n) for n in {names}])"
    names = ["run", "hubconf", "tests", "benchmarks"]
    done = subprocess.run(
        [sys.executable, "-c", code.format(names=names)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str([None] * 4)


def test_main_puts_signal_handlers_back():
    before = signal.getsignal(signal.SIGTERM)
    assert main(["info", "nowhere"]) == 2
    assert signal.getsignal(signal.SIGTERM) is before
