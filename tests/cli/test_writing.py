"""Every command that writes, where things go wrong around it: whole results or none, and why.

A disk that fills up. It is a small file system in memory, of several sizes: too small for anything, for half
of what the command writes, and for all but a little. What then stands under the name of a result is the
whole result. All of it happens in a folder whose name has a space, a line feed, and letters that are not
ASCII. A home that cannot be written, or is not there. And the same command twice, at the same time.
"""

import json
import os
import re
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import soundfile
from support.cli_processes import run_at_once
from support.networks import DEMO
from support.video_fixtures import write_classifier, write_film

from soundnet_port.cli.main import main
from soundnet_port.network.weights import read_weights

GROWING = {"log.csv", "checkpoint.pt"}  # a training's own; the first is written line by line
ALREADY = re.compile("another run is at work there|is there already")
RATE = 22_050
ODD = "ö 音\nx"


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """Sounds, labels, teachers' probabilities, a film, and a teacher."""
    folder = tmp_path_factory.mktemp("material")
    random = np.random.default_rng(0)
    lines = ["sound\tobjects\tscenes"]
    for number in range(8):
        label = ("low", "high")[number % 2]
        (folder / "sounds" / label).mkdir(parents=True, exist_ok=True)
        path = folder / "sounds" / label / f"{number}.wav"
        wave = np.sin((200, 3000)[number % 2] * np.arange(6 * RATE) / RATE * 2 * np.pi) / 3
        soundfile.write(path, wave + random.normal(0, 0.02, len(wave)), RATE)
        for head, categories in (("objects", 1000), ("scenes", 401)):
            np.save(folder / f"{number}.{head}.npy", random.dirichlet(np.ones(categories), 2).astype("f4"))
        lines.append(f"{path.relative_to(folder)}\t{number}.objects.npy\t{number}.scenes.npy")
    (folder / "clips.tsv").write_text("\n".join(lines) + "\n")
    pytest.importorskip("transformers", reason="needs the extra [videos]")
    write_film(folder / "film.mp4", [number / 10 for number in range(120)])
    write_classifier(folder / "teacher")
    return folder


COMMANDS = {
    "convert": f"convert {DEMO} -o DISK/demo.safetensors",
    "verify": "verify WEIGHTS --save DISK/golden.npz",
    "filters": "filters -w WEIGHTS -o DISK/filters.png",
    "plot": "predict SOUNDS/low/0.wav -w WEIGHTS --plot DISK/0.png",
    "extract to files": "extract SOUNDS -w WEIGHTS -o DISK/out/ -l conv2 --workers 1",
    "extract to npz": "extract SOUNDS -w WEIGHTS -o DISK/out.npz -l conv3 --workers 1",
    "extract to HDF5": "extract SOUNDS -w WEIGHTS -o DISK/out.h5 -l conv3 --workers 1",
    "extract to Parquet": "extract SOUNDS -w WEIGHTS -o DISK/out.parquet -l conv3 --workers 1",
    "extract by workers": "extract SOUNDS -w WEIGHTS -o DISK/out.csv -l pool5 --workers 2",
    "units": "units SOUNDS -w WEIGHTS -o DISK/out --layers conv5 --top 2 --table --workers 1",
    "evaluate": "evaluate SOUNDS -w WEIGHTS -l conv4 --cache DISK/cache -o DISK/out",
    "finetune": "finetune SOUNDS -w WEIGHTS -o DISK/run --epochs 2 --batch 4 --seconds 0.5 --layer conv4",
    "train": "train MATERIAL/clips.tsv -o DISK/run --iterations 3 --batch 2 --save-every 1 "
    "--widths 1,1,2,2,2,2,8 --accelerator cpu",
    "label-videos": "label-videos MATERIAL/film.mp4 -o DISK/lessons --teacher objects=MATERIAL/teacher",
}


def words_of(command, place, material, demo_report):
    """A command's words, with the folder that it writes into and what it reads."""
    named = {"DISK": place, "SOUNDS": material / "sounds", "MATERIAL": material}
    words = COMMANDS[command].split()
    for name, path in named.items():
        words = [word.replace(name, str(path)) for word in words]
    return [str(demo_report.weights) if word == "WEIGHTS" else word for word in words]


def files(place):
    return {path.relative_to(place): path for path in sorted(place.rglob("*")) if path.is_file()}


def assert_whole(path):
    """A file that can be read to its end."""
    kind = path.suffix
    if kind == ".safetensors":
        read_weights(path)
    elif kind == ".npy":
        np.load(path)
    elif kind == ".npz":
        assert zipfile.ZipFile(path).testzip() is None
    elif kind == ".json":
        json.loads(path.read_text())
    elif kind == ".png":
        assert path.read_bytes().endswith(b"IEND\xaeB`\x82")
    elif kind == ".h5":
        import h5py

        with h5py.File(path) as held:
            held.visititems(lambda _, each: each[()] if isinstance(each, h5py.Dataset) else None)
    elif kind == ".parquet":
        from pyarrow import parquet

        parquet.read_table(path)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_full_disk_is_said_and_nothing_is_half_written(
    command, material, demo_report, disk, tmp_path, capsys
):
    def run(place):
        (place / ODD).mkdir()
        code = main(words_of(command, place / ODD, material, demo_report))
        return code, capsys.readouterr().err

    plenty = disk(64 << 20)
    code, err = run(plenty)
    assert code == 0, err
    whole = files(plenty)
    # in order of size, so that each file in turn is the one that has no room
    needed = sum(-(-path.stat().st_size // 4096) * 4096 for path in whole.values())
    for size in sorted({4096, needed // 2, needed - 4096}):
        place = disk(max(4096, size))
        code, err = run(place)
        assert code in (0, 1, 2), err  # 0: what was needed in between was less than it might have been
        assert "Traceback" not in err
        if code:
            assert "No space left" in err or "are free" in err or "cannot be written" in err, err
        for name, path in files(place).items():
            if name.name not in GROWING:
                assert_whole(path)
                assert path.stat().st_size > 0, name
                assert name in whole or ".parts" in str(name), f"{name} is left"


@pytest.mark.skipif(os.name == "nt", reason="needs file locks")
@pytest.mark.parametrize("command", COMMANDS)
def test_two_at_once_do_each_other_no_harm(command, material, demo_report, tmp_path):
    alone, both = tmp_path / "alone", tmp_path / "both"
    alone.mkdir()
    both.mkdir()
    said = [tmp_path / name for name in ("said alone", "said first", "said second")]
    one, same = (words_of(command, place, material, demo_report) for place in (alone, both))
    assert run_at_once([one], said[:1]) == [0], said[0].read_text()
    codes = run_at_once([same, same], said[1:])
    texts = [path.read_text() for path in said[1:]]
    assert sorted(codes) in ([0, 0], [0, 2]), texts
    for code, text in zip(codes, texts, strict=True):
        assert not code or ALREADY.search(text), text
    expected, made = files(alone), files(both)
    assert made.keys() == expected.keys(), texts
    for name, path in made.items():
        assert_whole(path)
        if path.suffix in (".npy", ".npz", ".safetensors", ".png"):
            assert path.read_bytes() == expected[name].read_bytes(), name


@pytest.mark.parametrize("home", ["read-only", "missing"])
def test_a_home_that_cannot_be_written_is_not_needed(home, material, demo_report, disk, tmp_path):
    place = disk(0) if home == "read-only" else tmp_path / "nowhere"
    sound = material / "sounds" / "low" / "0.wav"
    commands = [
        f"evaluate {material / 'sounds'} -w {demo_report.weights} -l conv4",  # which keeps features there
        f"extract {sound} -w demo --layer conv7 --csv",
        f"predict {sound} -w demo --plot {tmp_path / '0.png'}",  # matplotlib, which keeps a list of fonts
    ]
    code = "import sys; from soundnet_port.cli.main import main; sys.exit(max(main(c.split()) for c in sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", code, *commands],
        capture_output=True,
        text=True,
        env={"PATH": os.environ["PATH"], "HOME": str(place)},
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
