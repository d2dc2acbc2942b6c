"""Every command that writes, under trouble: results are complete or absent, and the reason is printed.

A disk that fills up: file systems in memory of several sizes, too small for anything, for half of the
output, and for the last of it. A folder whose name has a space, a line feed and letters beyond ASCII. A
home that is read-only or missing. The same command twice at the same time. Ctrl-C.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest
import soundfile
from support.cli_processes import run_at_once, start
from support.networks import DEMO
from support.video_fixtures import write_classifier, write_video

from soundnet_port.cli.main import main
from soundnet_port.network.weights import read_weights

GROWING = {"log.csv", "checkpoint.pt"}  # of a training run, which writes the first line by line
ALREADY = re.compile("another run is at work there|already exists|already has")
RATE = 22_050
ODD_NAME = "ö 音\nx"


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A folder with sounds, labels, teachers' probabilities, a video, and a teacher."""
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
    write_video(folder / "video.mp4", [number / 10 for number in range(120)])
    write_classifier(folder / "teacher")
    return folder


COMMANDS = {
    "convert": f"convert {DEMO} -o DISK/demo.safetensors",
    "verify": "verify WEIGHTS --save DISK/golden.npz",
    "filters": "filters -w WEIGHTS -o DISK/filters.png",
    "plot": "predict SOUNDS/low/0.wav -w WEIGHTS --plot DISK/0.png",
    "predict to files": "predict SOUNDS -w WEIGHTS -o DISK/labels --format raven",
    "predict to a table": "predict SOUNDS -w WEIGHTS -o DISK/clips.csv --format wide-csv",
    "extract to files": "extract SOUNDS -w WEIGHTS -o DISK/out/ -l conv2 --workers 1",
    "extract to npz": "extract SOUNDS -w WEIGHTS -o DISK/out.npz -l conv3 --workers 1",
    "extract to HDF5": "extract SOUNDS -w WEIGHTS -o DISK/out.h5 -l conv3 --workers 1",
    "extract to Parquet": "extract SOUNDS -w WEIGHTS -o DISK/out.parquet -l conv3 --workers 1",
    "extract by workers": "extract SOUNDS -w WEIGHTS -o DISK/out.csv -l pool5 --workers 2",
    "units": "units SOUNDS -w WEIGHTS -o DISK/out -l conv5 --top 2 --table --workers 1",
    "evaluate": "evaluate SOUNDS -w WEIGHTS -l conv4 --cache DISK/cache -o DISK/out",
    "finetune": "finetune SOUNDS -w WEIGHTS -o DISK/run --epochs 2 --batch 4 --seconds 0.5 --layer conv4",
    "train": "train MATERIAL/clips.tsv -o DISK/run --iterations 3 --batch 2 --save-every 1 "
    "--widths 1,1,2,2,2,2,8 --device cpu",
    "label-sounds": "label-sounds SOUNDS -w WEIGHTS -o DISK/labels",
    "label-videos": "label-videos MATERIAL/video.mp4 -o DISK/labels --teacher objects=MATERIAL/teacher",
}


def command_line(command, folder, material, demo_report):
    """Return a command's arguments, with the folder it writes to and what it reads."""
    paths = {"DISK": folder, "SOUNDS": material / "sounds", "MATERIAL": material}
    words = COMMANDS[command].split()
    for name, path in paths.items():
        words = [word.replace(name, str(path)) for word in words]
    return [str(demo_report.weights) if word == "WEIGHTS" else word for word in words]


def files(folder):
    return {path.relative_to(folder): path for path in sorted(folder.rglob("*")) if path.is_file()}


def assert_complete(path):
    """Read a file to its end."""
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

        with h5py.File(path) as file:
            file.visititems(lambda _, item: item[()] if isinstance(item, h5py.Dataset) else None)
    elif kind == ".parquet":
        from pyarrow import parquet

        parquet.read_table(path)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_full_disk_is_reported_and_leaves_complete_results(
    command, material, demo_report, disk, tmp_path, capsys
):
    def run(folder):
        (folder / ODD_NAME).mkdir()
        code = main(command_line(command, folder / ODD_NAME, material, demo_report))
        return code, capsys.readouterr().err

    large_disk = disk(64 << 20)
    code, err = run(large_disk)
    assert code == 0, err
    expected = files(large_disk)
    # in order of size, so that each file in turn finds no room
    needed = sum(-(-path.stat().st_size // 4096) * 4096 for path in expected.values())
    for size in sorted({4096, needed // 2, needed - 4096}):
        folder = disk(max(4096, size))
        code, err = run(folder)
        assert code in (0, 1, 2), err  # 0: the estimate was larger than what the run needs at a time
        assert "Traceback" not in err
        if code:
            assert "No space left" in err or "are free" in err or "cannot be written" in err, err
        for name, path in files(folder).items():
            if name.name not in GROWING:
                assert_complete(path)
                assert path.stat().st_size > 0, name
                assert name in expected or ".parts" in str(name), f"{name} was left behind"


@pytest.mark.skipif(os.name == "nt", reason="needs file locks")
@pytest.mark.parametrize("command", COMMANDS)
def test_two_at_once_do_each_other_no_harm(command, material, demo_report, tmp_path):
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    alone.mkdir()
    shared.mkdir()
    outputs = [tmp_path / name for name in ("output alone", "first output", "second output")]
    single, double = (command_line(command, folder, material, demo_report) for folder in (alone, shared))
    assert run_at_once([single], outputs[:1]) == [0], outputs[0].read_text()
    codes = run_at_once([double, double], outputs[1:])
    texts = [path.read_text() for path in outputs[1:]]
    assert sorted(codes) in ([0, 0], [0, 2]), texts
    for code, text in zip(codes, texts, strict=True):
        assert not code or ALREADY.search(text), text
    expected, results = files(alone), files(shared)
    assert results.keys() == expected.keys(), texts
    for name, path in results.items():
        assert_complete(path)
        if path.suffix in (".npy", ".npz", ".safetensors", ".png"):
            assert path.read_bytes() == expected[name].read_bytes(), name


@pytest.mark.skipif(os.name == "nt", reason="needs signals")
def test_ctrl_c_ends_workers_and_leaves_one_line(material, demo_report, tmp_path):
    (tmp_path / "sounds").mkdir()
    for number in range(400):
        (tmp_path / "sounds" / f"{number}.wav").symlink_to(material / "sounds" / "low" / "0.wav")
    output, results = tmp_path / "output", tmp_path / "results"
    command = ["extract", tmp_path / "sounds", "-o", results, "-w", demo_report.weights, "--workers", "2"]
    process = start(list(map(str, command)), output)
    while not list(results.glob("*.npz")):
        assert process.is_alive(), output.read_text()
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does, to the workers too
    process.join()
    assert process.exitcode == 130
    *progress, last = output.read_text().splitlines()
    assert last == "soundnet-port: interrupted; the same command goes on from here"
    assert all(re.match(r"soundnet-port: \d+ of 400 files, ", line) for line in progress)


def test_a_home_that_cannot_be_written_is_not_needed(material, demo_report, disk, tmp_path):
    """In processes that fork before matplotlib is imported, since it chooses its folders then."""
    commands = [
        f"evaluate {material / 'sounds'} -w {demo_report.weights} -l conv4",  # caches features there
        f"extract {material / 'sounds' / 'low' / '0.wav'} -w demo -l conv7 --csv",
        f"predict {material / 'sounds' / 'low' / '0.wav'} -w demo --plot {tmp_path}/HOME.png",  # caches fonts
    ]
    code = """if True:
        import os, sys
        import sklearn.svm, torch
        from soundnet_port.cli.main import main

        def run(number):
            return max(main(command.replace("HOME", number).split()) for command in sys.argv[3:])

        assert "matplotlib" not in sys.modules
        for number, home in enumerate(sys.argv[1:3]):
            if not os.fork():
                os.environ["HOME"] = home
                sys.exit(run(str(number)))
        sys.exit(max(os.waitstatus_to_exitcode(os.wait()[1]) for _ in range(2)))"""
    process = subprocess.run(
        [sys.executable, "-c", code, str(disk(0)), str(tmp_path / "nowhere"), *commands],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1"},
    )
    assert process.returncode == 0, process.stderr
    assert "Traceback" not in process.stderr
    assert all((tmp_path / f"{number}.png").exists() for number in range(2))
