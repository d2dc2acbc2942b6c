"""The package as a whole: light imports, its public names, its version."""

import signal
import subprocess
import sys

import pytest
from support.networks import CHECKOUT

import soundnet_port as sp
from soundnet_port.cli.main import main


def run_python(code):
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return process.stdout


def imported_by(code):
    return set(run_python(f"{code}\nimport sys; print(*sys.modules)").split())


def test_the_package_imports_lazily():
    heavy = {"torch", "numpy", "torchfile", "soundfile", "soxr", "safetensors", "tqdm"}
    assert not heavy & imported_by("import soundnet_port")
    assert "torchfile" not in imported_by(
        "import soundnet_port as sp; sp.SoundNet, sp.load_pretrained, sp.load_audio, sp.predict"
    )


def test_help_needs_no_torch():
    modules = imported_by("from soundnet_port.cli.main import build_parser; build_parser().format_help()")
    assert not {"torch", "torchfile", "tqdm", "soundnet_port.network.model"} & modules


def test_every_public_name_exists():
    for name in sp.__all__:
        assert getattr(sp, name) is not None
    assert set(sp.__all__) <= set(dir(sp))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = sp.nothing


def test_the_changelog_names_this_version():
    assert f"## {sp.__version__} " in (CHECKOUT / "CHANGELOG.md").read_text("utf-8")


def test_the_citation_names_this_version():
    assert f"\nversion: {sp.__version__}\n" in (CHECKOUT / "CITATION.cff").read_text("utf-8")


@pytest.mark.parametrize(
    ("command", "extra", "packages"),
    [
        ("evaluate clips.tsv -w nowhere", "learn", ["sklearn", "matplotlib"]),
        ("train clips.tsv -o out", "learn", ["lightning_fabric", "matplotlib"]),
        ("finetune clips.tsv -o out -w nowhere", "learn", ["lightning_fabric", "matplotlib"]),
        ("export -w nowhere -o out/a.onnx", "onnx", ["onnx", "onnxruntime"]),
        ("label-videos video.mp4 -o out --teacher objects=nowhere", "videos", ["av", "PIL", "transformers"]),
    ],
    ids=["evaluate", "train", "finetune", "export", "label_videos"],
)
def test_a_missing_extra_is_reported_in_one_line_before_any_work(
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
        error = capsys.readouterr().err
        assert error.endswith(f"{package} is not installed: pip install 'soundnet-port[{extra}]'\n")
        assert error.count("\n") == 1
        assert not (tmp_path / "out").exists()


def test_of_a_checkouts_other_folders_only_conversion_is_in_the_package():
    names = ["run", "hubconf", "tests", "benchmarks"]
    code = f"import importlib.util as u; print([u.find_spec('soundnet_port.' + n) for n in {names}])"
    assert run_python(code).strip() == str([None] * 4)


def test_main_restores_signal_handlers():
    handler = signal.getsignal(signal.SIGTERM)
    assert main(["info", "nowhere"]) == 2
    assert signal.getsignal(signal.SIGTERM) is handler
