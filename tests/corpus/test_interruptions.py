"""Interrupted, killed and simultaneous runs: the same bytes."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.corpus_files import POOLED_LAYERS, read_tree, run_killable_worker

from soundnet_port.corpus import run as corpus
from soundnet_port.corpus import workers
from soundnet_port.corpus.errors import CorpusError
from soundnet_port.corpus.processes import PACKAGE_FILE, start_process
from soundnet_port.corpus.run import extract_corpus
from soundnet_port.corpus.workers import run_in_process


def start(*arguments):
    command = [sys.executable, "-m", "soundnet_port", "extract", *map(str, arguments)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)


@pytest.mark.parametrize("output", ["out", "out.h5"])
def test_interrupted_anywhere_results_are_identical(clips, model, uninterrupted, tmp_path, output):
    generator = random.Random(output)
    settings = {"layers": POOLED_LAYERS, "pool": "mean+std", "workers": 1}
    interrupted = 0
    for _ in range(6):
        left = generator.randrange(1, 70)

        def stop(progress, left=left, before=[]):  # noqa: B006
            before.append(progress.done)
            if progress.done - before[0] >= left:
                raise KeyboardInterrupt

        try:
            extract_corpus(model, [clips], tmp_path / output, progress=stop, **settings)
        except KeyboardInterrupt:
            interrupted += 1
    extract_corpus(model, [clips], tmp_path / output, **settings)
    assert interrupted >= 3
    is_expected = re.compile(rf"{output}(/|$|\.(json|errors\.tsv)$)").match
    expected = {name: data for name, data in read_tree(uninterrupted).items() if is_expected(name)}
    assert read_tree(tmp_path) == expected


def test_decoding_ahead_changes_nothing(clips, model, uninterrupted, tmp_path, monkeypatch):
    """As with a model on a GPU, whose results differ in the last bits."""
    monkeypatch.setattr(
        corpus, "run_in_process", lambda extractor, groups, threads: run_in_process(extractor, groups, 3)
    )
    extract_corpus(model, [clips], tmp_path / "out", layers=POOLED_LAYERS, pool="mean+std", workers=1)
    assert read_tree(tmp_path / "out") == read_tree(uninterrupted / "out")


@pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")
def test_killed_runs_with_two_workers_leave_identical_results(
    clips, demo_report, uninterrupted, tmp_path, run
):
    """SIGKILL of the run alone, whose workers must end by themselves, and SIGTERM."""
    command = [clips, "-o", tmp_path / "out", "-w", demo_report.weights, "--pool", "mean+std"]
    command += [word for layer in POOLED_LAYERS for word in ("-l", layer)]
    for signal_number, files in ((signal.SIGKILL, 3), (signal.SIGTERM, 90)):
        process = start(*command, "--workers", 2)
        deadline = time.monotonic() + 300  # the machine may be busy
        while len(list((tmp_path / "out").glob("*.npz"))) < files:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal_number)
        _, err = process.communicate()
        assert "Traceback" not in err
        assert process.returncode == (143 if signal_number == signal.SIGTERM else -signal_number)
    assert not (tmp_path / "out" / ".extract").exists()  # SIGTERM removes unfinished files, also earlier ones
    code, err = run(*command, "--workers", 1)
    assert code == 1, err  # two failed inputs
    assert "already done" in err
    assert read_tree(tmp_path / "out") == read_tree(uninterrupted / "out")


@pytest.mark.skipif(os.name == "nt", reason="needs file locks")
def test_simultaneous_runs_do_no_harm(clips, model, uninterrupted, tmp_path, monkeypatch):
    """One runs inside the other, at its tenth file."""
    monkeypatch.setattr("soundnet_port.files._SHORT_PATIENCE", 0.1)
    settings = {"layers": POOLED_LAYERS, "pool": "mean+std", "workers": 1}
    refused = []

    def run_in_folder(progress):
        if progress.done == 10 and not refused:
            refused.append(None)
            result = extract_corpus(model, [clips], tmp_path / "out", **settings)
            assert result.extracted > 130
            with pytest.raises(CorpusError, match="another run is at work there"):
                extract_corpus(model, [clips], tmp_path / "out", force=True, **settings)

    extract_corpus(model, [clips], tmp_path / "out", progress=run_in_folder, **settings)
    assert read_tree(tmp_path / "out") == read_tree(uninterrupted / "out")

    def run_in_file(progress):
        if progress.done == 10 and len(refused) == 1:
            refused.append(None)
            with pytest.raises(CorpusError, match="another run is at work there"):
                extract_corpus(model, [clips], tmp_path / "out.h5", **settings)

    extract_corpus(model, [clips], tmp_path / "out.h5", progress=run_in_file, **settings)
    assert (tmp_path / "out.h5").read_bytes() == (uninterrupted / "out.h5").read_bytes()
    assert len(refused) == 2


@pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")
def test_an_input_that_kills_its_worker_fails(clips, model, uninterrupted, tmp_path, monkeypatch):
    """Its group is computed as if it could not be read."""
    monkeypatch.setattr(workers, "worker_main", run_killable_worker)
    done = []
    result = extract_corpus(
        model,
        [clips],
        tmp_path / "out",
        layers=POOLED_LAYERS,
        pool="mean+std",
        workers=2,
        progress=lambda progress: done.append(progress.done),
    )
    assert (result.total, result.extracted) == (150, 148)
    assert done == list(range(151))
    reasons = {Path(f.path).name: f.reason for f in result.failures}
    assert set(reasons) == {"070.wav", "140.wav"}
    assert "SIGKILL" in reasons["070.wav"]
    expected = read_tree(uninterrupted / "out")
    files = read_tree(tmp_path / "out")
    assert files.pop("errors.tsv") != expected.pop("errors.tsv")
    assert files == expected


@pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")
def test_an_input_that_kills_a_worker_of_the_command_line_fails(clips, tmp_path, run, monkeypatch):
    """There workers are forks of a server."""
    monkeypatch.setattr(workers, "worker_main", run_killable_worker)
    code, err = run(clips, "-o", tmp_path / "out", "-l", "pool1", "--workers", 2)
    assert code == 1
    assert "070.wav: the process that read it died (signal SIGKILL" in err
    assert len(list((tmp_path / "out").glob("*.npz"))) == 149


def test_files_beside_the_command_line_are_not_imported(clips, demo_report, tmp_path):
    """A new interpreter such as the workers' server looks for modules in its own folder first."""
    (tmp_path / "random.py").write_text("raise SystemExit('the wrong module')")
    program = "import sys; del sys.path[0]; from soundnet_port.cli.main import main; sys.exit(main())"
    command = [sys.executable, "-c", program, "extract", clips, "-o", "out", "-w", demo_report.weights]
    run = subprocess.run(
        [*command, "-l", "pool1", "--workers", "2"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert "Traceback" not in run.stderr
    assert "wrong module" not in run.stderr
    assert run.returncode == 1  # of an unreadable clip
    assert len(list((tmp_path / "out").glob("*.npz"))) == 149


def test_workers_of_another_copy_of_the_package_are_replaced(
    clips, model, uninterrupted, tmp_path, monkeypatch
):
    """As where the server found one that is installed, and this is a checkout."""
    monkeypatch.setattr(workers, "PACKAGE_FILE", "elsewhere/processes.py")
    started = []

    def start(main):
        started.append(main)
        if len(started) == 3:
            monkeypatch.setattr(workers, "PACKAGE_FILE", PACKAGE_FILE)
        return start_process(main)

    monkeypatch.setattr(workers, "start_process", start)
    extract_corpus(model, [clips], tmp_path / "out", layers=POOLED_LAYERS, pool="mean+std", workers=2)
    assert len(started) >= 3
    assert read_tree(tmp_path / "out") == read_tree(uninterrupted / "out")


def test_workers_do_not_run_the_calling_script(tmp_path):
    """So it needs no guard, and can come from standard input, where there is no file to run again."""
    script = (
        "import sys\nimport soundnet_port as sp\nprint('once')\n"
        "sounds = [sp.example('waves'), sp.example('baby')]\n"
        "sp.extract_corpus('demo', sounds, sys.argv[1], layers=['conv1'], pool='mean', workers=2)\n"
    )
    output = tmp_path / "out.h5"
    command = [sys.executable, "-", str(output)]
    run = subprocess.run(command, input=script, capture_output=True, text=True, check=True)
    assert run.stdout == "once\n"
    assert output.exists()
