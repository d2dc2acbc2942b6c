"""The corpus over a cluster: here a Ray of two workers, against the local run."""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
from support import reference_weights
from support.networks import NETS, model_of

from soundnet_port.cli.main import main
from soundnet_port.corpus import run as corpus
from soundnet_port.corpus.extractor import CorpusError
from soundnet_port.corpus.formats import METADATA_KEY
from soundnet_port.corpus.run import extract_corpus

ray = pytest.importorskip("ray.data", reason="needs the extra [ray]")
parquet = pytest.importorskip("pyarrow.parquet", reason="needs the extra [parquet]")
fsspec = pytest.importorskip("fsspec", reason="needs the extra [ray]")

from soundnet_port.corpus import ray_backend as cluster  # noqa: E402

LAYERS = ["pool5", "conv7"]


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Three groups: short clips, one longer than a block of 2 s, two bad ones."""
    folder = tmp_path_factory.mktemp("cluster") / "clips"
    (folder / "deep").mkdir(parents=True)
    for number in range(150):
        name = folder / ("deep" if number % 2 else "") / f"{number:03}.wav"
        soundfile.write(name, reference_weights.samples(5_000 + 100 * number), 22_050)
    (folder / "070.wav").write_text("text")
    soundfile.write(folder / "140.wav", reference_weights.samples(4_000), 22_050)
    soundfile.write(folder / "100.wav", reference_weights.samples(150_000), 22_050)
    return folder


@pytest.fixture(scope="module")
def two_workers():
    with cluster._connected(2):
        yield


def assert_same_tables(folder, file):
    """The Parquet files of a folder and the local run's one file: all rows, to the bit."""
    ours, theirs = parquet.read_table(folder), parquet.read_table(file)
    assert ours.column_names == theirs.column_names
    assert ours.equals(theirs)
    assert ours.schema.metadata[METADATA_KEY.encode()] == theirs.schema.metadata[METADATA_KEY.encode()]


def contents(folder):
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}


@pytest.mark.usefixtures("two_workers")
def test_output_is_complete_and_equal_to_the_local_runs(clips, model, tmp_path):
    local, out = tmp_path / "local.parquet", tmp_path / "out"
    settings = {"layers": LAYERS, "batch_seconds": 2}
    expected = extract_corpus(model, [clips], local, workers=1, **settings)
    seen = []
    made = cluster.extract_on_cluster(
        model, [clips], f"file://{out}", workers=2, progress=seen.append, **settings
    )
    assert (made.files, made.extracted, made.there) == (150, 148, 0)
    assert made.seconds == pytest.approx(expected.seconds)
    assert seen[-1].files == 150
    assert_same_tables(out, local)
    # bad files, as in the local run
    assert sorted(map(str, made.failures)) == sorted(map(str, expected.failures))
    assert (out / "_errors.tsv").read_bytes() == expected.report.read_bytes()
    assert made.report == f"file://{out}/_errors.tsv"
    groups = {"000000.parquet", "000001.parquet", "000002.parquet"}
    assert set(contents(out)) == {*groups, "_000000.tsv", "_000001.tsv", "_errors.tsv", "_extract.json"}

    # again: nothing to do; what is missing is made, and nothing else
    before = contents(out)
    again = cluster.extract_on_cluster(model, [clips], out, workers=2, **settings)
    assert (again.extracted, again.there, len(again.failures)) == (0, 148, 2)
    assert all(contents(out)[name] == before[name] for name in before if name.endswith("parquet"))
    (out / "000001.parquet").unlink()
    resumed = cluster.extract_on_cluster(model, [f"file://{clips}"], str(out), workers=2, **settings)
    assert (resumed.extracted, resumed.there) == (63, 85)
    after = contents(out)
    assert after["000001.parquet"][0] == before["000001.parquet"][0]
    assert after["000000.parquet"] == before["000000.parquet"]

    # other settings, or other inputs
    for inputs, other, said in (
        ([clips], {"pool": "mean"}, "pool: none there"),
        ([clips / "deep"], {}, "inputs"),
    ):
        with pytest.raises(CorpusError, match=f"other settings.*{said}.*--force"):
            cluster.extract_on_cluster(model, inputs, out, workers=2, **settings | other)
    with pytest.raises(CorpusError, match=r"holds Parquet files, but not _extract\.json"):
        cluster.extract_on_cluster(model, [clips], tmp_path)


def actors():
    """Process ids of those that hold the network, among this process's descendants."""
    parents, found = {}, []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            number = int(process.name)
            parents[number] = int((process / "stat").read_text().rpartition(")")[2].split()[1])
            if (process / "cmdline").read_bytes().startswith(b"ray::MapWorker(Map(_Network))"):
                found.append(number)
        except OSError:
            pass

    def ours(number):
        while number not in (0, os.getpid()):
            number = parents.get(number, 0)
        return number

    return list(filter(ours, found))


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="looks for processes in /proc")
@pytest.mark.usefixtures("two_workers")
def test_an_actor_killed_in_the_middle_changes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "GROUP_FILES", 2)
    wide, clips, out = model_of(NETS["full8"]), tmp_path / "clips", tmp_path / "out"
    clips.mkdir()
    for number in range(24):
        soundfile.write(clips / f"{number:02}.wav", reference_weights.samples(22_050 * 20 + number), 22_050)
    killed = []

    def kill():
        while not list(out.glob("0*.parquet")):
            time.sleep(0.005)
        for process in actors():
            os.kill(process, signal.SIGKILL)
            killed.append(len(list(out.glob("0*.parquet"))))

    killer = threading.Thread(target=kill)
    killer.start()
    made = cluster.extract_on_cluster(wide, [clips], out, pool="mean+std", workers=2)
    killer.join()
    assert killed
    assert killed[0] < 12  # groups: work was left
    assert (made.extracted, made.failures) == (24, ())
    assert len(list(out.glob("0*.parquet"))) == 12
    assert not (out / ".extract").exists()
    extract_corpus(wide, [clips], tmp_path / "local.parquet", pool="mean+std", workers=1)
    assert_same_tables(out, tmp_path / "local.parquet")


@pytest.mark.usefixtures("two_workers")
def test_inputs_and_results_may_be_behind_urls(clips, model, tmp_path):
    """In this process, whose memory is the store."""
    store = fsspec.filesystem("memory")
    for path in sorted(clips.rglob("*.wav"))[10:80]:
        store.pipe_file(f"/in/{path.relative_to(clips)}", path.read_bytes())
    store.pipe_file("/in/long.wav", (clips / "100.wav").read_bytes())
    (tmp_path / "list.txt").write_text("memory://in/deep/*.wav\nmemory://in/long.wav\nmemory://in/no.wav\n")
    found, failures = cluster._found([f"@{tmp_path}/list.txt", "memory://in"], "memory://in")
    assert len(found) == 71
    assert {each.name for each in found} >= {"long.wav", "020.wav", "deep/001.wav"}
    assert [failure.path for failure in failures] == ["memory://in/no.wav"]
    with pytest.raises(CorpusError, match="not inside"):
        cluster._found(["memory://in/long.wav"], "memory://in/deep")

    near = tmp_path / "near"
    for each in found:
        (near / each.name).parent.mkdir(parents=True, exist_ok=True)
        (near / each.name).write_bytes(store.cat_file(each.file))
    settings = {"layers": LAYERS, "batch_seconds": 2}
    extract_corpus(model, [near], tmp_path / "local.parquet", workers=1, **settings)
    block = 2 * 22_050
    place = cluster._Place("memory://out")
    _, held = corpus.resolve_model(model, LAYERS, "parquet", "none", "auto", block)
    job = cluster.Job(tuple(LAYERS), held, "parquet", "auto", block, Path(), Path(), True)
    assert place.cleared({"a": 1}, force=False) == (set(), [])
    network = cluster._Network(job, sys.modules["ray"].put(cluster.serialize_model(model)), place)
    for group in corpus.grouped(found):
        result = json.loads(
            network(cluster._decode({"group": cluster._as_json(group)}, "auto", block))["result"]
        )
        assert result["number"] == group.number
    place.report([])
    assert place.names() >= {"000000.parquet", "000001.parquet", "_extract.json"}
    assert place.cleared({"a": 1}, force=False)[0] == {0, 1}
    store.get("/out/", str(tmp_path / "out"), recursive=True)
    assert_same_tables(tmp_path / "out", tmp_path / "local.parquet")
    assert place.cleared({"a": 2}, force=True) == (set(), [])
    place.report([])
    assert place.names() == {"_extract.json"}
    with pytest.raises(CorpusError, match="this process's memory"):
        cluster.extract_on_cluster(model, [near], "memory://out")


@pytest.mark.usefixtures("two_workers")
def test_the_command(clips, demo_report, tmp_path, capsys):
    arguments = ["extract", str(clips), "-w", str(demo_report.weights), "-l", "conv7", "--pool", "mean"]
    ray_arguments = [*arguments, "--engine", "ray"]
    assert main([*ray_arguments, "-o", str(tmp_path / "out")]) == 1
    err = capsys.readouterr().err
    assert "Traceback" not in err
    assert "070.wav: cannot be decoded" in err
    assert f"{tmp_path}/out: 148 files" in err
    assert main([*arguments, "-o", str(tmp_path / "local.parquet"), "--workers", "1"]) == 1
    assert_same_tables(tmp_path / "out", tmp_path / "local.parquet")
    capsys.readouterr()
    for more, said in (
        ([], "name a folder or URL"),
        (["-o", "x", "--format", "npz"], "writes parquet, not npz"),
        (["-o", "nosuch://x/y"], "Protocol not known"),
        (["-o", str(tmp_path / "no"), "--workers", "99"], "99 workers and decoding need 100"),
    ):
        assert main([*ray_arguments, *more]) == 2
        assert said in capsys.readouterr().err


def test_without_ray_a_line_says_which_extra(clips, demo_report, tmp_path, monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "soundnet_port.corpus.ray_backend")
    monkeypatch.setitem(sys.modules, "ray", None)
    command = ["extract", str(clips), "-w", str(demo_report.weights), "-o", str(tmp_path), "--engine", "ray"]
    assert main(command) == 2
    said = capsys.readouterr().err
    assert said == "soundnet-port: --engine ray: Ray is not installed: pip install 'soundnet-port[ray]'\n"


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ("init", "Ray cannot be reached: The current node timed out"),
        ("nodes", "listens to other machines (10.0.0.1)"),
        ("_results", "Ray: KeyError: 'last line'"),
    ],
)
def test_whatever_ray_raises_is_one_line(clips, demo_report, tmp_path, monkeypatch, capsys, broken, said):
    """Not only errors of its own kind; and it is shut down."""

    def trouble(*_, **__):
        raise Exception("The current node timed out") if broken == "init" else KeyError("last line")

    ended = []
    address = "10.0.0.1" if broken == "nodes" else "127.0.0.1"
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(cluster.ray, "init", trouble if broken == "init" else lambda *_, **__: None)
    monkeypatch.setattr(cluster.ray, "nodes", lambda: [{"NodeManagerAddress": address}])
    monkeypatch.setattr(cluster.ray, "cluster_resources", lambda: {"CPU": 4})
    monkeypatch.setattr(cluster.ray, "shutdown", lambda: ended.append(None))
    monkeypatch.setattr(cluster, "_results", trouble)
    arguments = ["extract", str(clips), "-w", str(demo_report.weights), "-o", str(tmp_path / "out")]
    assert main([*arguments, "--engine", "ray"]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1
    assert len(ended) == (broken != "init")


@pytest.mark.usefixtures("two_workers")
def test_a_ray_of_its_own_listens_on_this_machine_only():
    assert np.all([node["NodeManagerAddress"] == "127.0.0.1" for node in sys.modules["ray"].nodes()])
