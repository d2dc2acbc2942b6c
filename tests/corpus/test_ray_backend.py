"""Extraction on a cluster: here a Ray with two CPUs, compared with the local run."""

import importlib.util
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import soundfile
from support import reference_weights
from support.networks import NETS, model_of

from soundnet_port.cli.main import main
from soundnet_port.corpus import inputs, ray_backend, remote_files
from soundnet_port.corpus.errors import CorpusError
from soundnet_port.corpus.features import METADATA_KEY
from soundnet_port.corpus.run import extract_corpus
from soundnet_port.corpus.settings import resolve_model
from soundnet_port.corpus.workers import serialize_model

# Ray must be imported by the code under test, which makes it listen to this machine only
if not importlib.util.find_spec("ray"):
    pytest.skip("needs the extra [ray]", allow_module_level=True)
parquet = pytest.importorskip("pyarrow.parquet", reason="needs the extra [parquet]")
fsspec = pytest.importorskip("fsspec", reason="needs the extra [ray]")

LAYERS = ["pool5", "conv7"]


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Three groups: short clips, one longer than a block of 2 s, two unusable ones."""
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
def ray():
    ray = ray_backend.import_ray()
    with ray_backend._connect(ray, 2):
        yield ray


def assert_same_tables(folder, file):
    """Compare the Parquet files of a folder with the local run's single file, bit by bit."""
    cluster, local = parquet.read_table(folder), parquet.read_table(file)
    assert cluster.column_names == local.column_names
    assert cluster.equals(local)
    assert cluster.schema.metadata[METADATA_KEY.encode()] == local.schema.metadata[METADATA_KEY.encode()]


def read_files(folder):
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}


@pytest.mark.usefixtures("ray")
def test_results_are_complete_and_equal_the_local_run(clips, model, tmp_path):
    local, out = tmp_path / "local.parquet", tmp_path / "out"
    settings = {"layers": LAYERS, "batch_seconds": 2}
    expected = extract_corpus(model, [clips], local, workers=1, **settings)
    reports = []
    result = ray_backend.extract_on_cluster(
        model, [clips], f"file://{out}", workers=2, progress=reports.append, **settings
    )
    assert (result.total, result.extracted, result.already_done) == (150, 148, 0)
    assert result.seconds == pytest.approx(expected.seconds)
    assert reports[-1].done == 150
    assert_same_tables(out, local)
    # failed inputs, as in the local run
    assert sorted(map(str, result.failures)) == sorted(map(str, expected.failures))
    assert sorted(report.message for report in reports if report.failure) == sorted(map(str, result.failures))
    assert (out / "_errors.tsv").read_bytes() == expected.report.read_bytes()
    assert result.report == f"file://{out}/_errors.tsv"
    groups = {"000000.parquet", "000001.parquet", "000002.parquet"}
    assert set(read_files(out)) == {*groups, "_000000.tsv", "_000001.tsv", "_errors.tsv", "_extract.json"}

    # the next run computes missing groups, and nothing else
    before = read_files(out)
    repeated = ray_backend.extract_on_cluster(model, [clips], out, workers=2, **settings)
    assert (repeated.extracted, repeated.already_done, len(repeated.failures)) == (0, 148, 2)
    assert all(read_files(out)[name] == before[name] for name in before if name.endswith("parquet"))
    (out / "000001.parquet").unlink()
    resumed = ray_backend.extract_on_cluster(model, [f"file://{clips}"], str(out), workers=2, **settings)
    assert (resumed.extracted, resumed.already_done) == (63, 85)
    after = read_files(out)
    assert after["000001.parquet"][0] == before["000001.parquet"][0]
    assert after["000000.parquet"] == before["000000.parquet"]

    # other settings, or other inputs
    for sounds, options, message in (
        ([clips], {"pool": "mean"}, "pool: none before"),
        ([clips / "deep"], {}, "inputs"),
    ):
        with pytest.raises(CorpusError, match=f"other settings.*{message}.*--force"):
            ray_backend.extract_on_cluster(model, sounds, out, workers=2, **settings | options)
    with pytest.raises(CorpusError, match=r"holds Parquet files without .* _extract\.json"):
        ray_backend.extract_on_cluster(model, [clips], tmp_path)


def find_tasks():
    """Return the ids of processes that compute groups, among this process's descendants."""
    parents, tasks = {}, []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            number = int(process.name)
            parents[number] = int((process / "stat").read_text().rpartition(")")[2].split()[1])
            if (process / "cmdline").read_bytes().startswith(b"ray::compute_group"):
                tasks.append(number)
        except OSError:
            pass

    def is_descendant(number):
        while number not in (0, os.getpid()):
            number = parents.get(number, 0)
        return number

    return list(filter(is_descendant, tasks))


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="looks for processes in /proc")
@pytest.mark.usefixtures("ray")
def test_killed_processes_change_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "GROUP_FILES", 2)
    network, clips, out = model_of(NETS["full8"]), tmp_path / "clips", tmp_path / "out"
    clips.mkdir()
    for number in range(24):
        soundfile.write(clips / f"{number:02}.wav", reference_weights.samples(22_050 * 20 + number), 22_050)
    complete_groups = []  # at each death

    def kill():
        while not list(out.glob("0*.parquet")):
            time.sleep(0.005)
        while not (tasks := find_tasks()):
            time.sleep(0.005)
        for process in tasks:
            os.kill(process, signal.SIGKILL)
            complete_groups.append(len(list(out.glob("0*.parquet"))))

    killer = threading.Thread(target=kill)
    killer.start()
    result = ray_backend.extract_on_cluster(network, [clips], out, pool="mean+std", workers=2)
    killer.join()
    assert complete_groups
    assert complete_groups[0] < 12
    assert (result.extracted, result.failures) == (24, ())
    assert len(list(out.glob("0*.parquet"))) == 12
    assert not (out / ".extract").exists()
    extract_corpus(network, [clips], tmp_path / "local.parquet", pool="mean+std", workers=1)
    assert_same_tables(out, tmp_path / "local.parquet")


@pytest.mark.usefixtures("ray")
def test_an_input_that_kills_its_process_costs_its_group(tmp_path, model, monkeypatch):
    monkeypatch.setattr(inputs, "GROUP_FILES", 2)
    for number in range(6):
        name = f"{number}{'kills' * (number == 3)}.wav"
        soundfile.write(tmp_path / name, reference_weights.samples(20_000), 22_050)
    compute_group = ray_backend.compute_group

    def compute_or_die(run_id, job, serialized, group, store):
        if any("kills" in source.name for source in group.inputs):
            os.kill(os.getpid(), signal.SIGKILL)
        return compute_group(run_id, job, serialized, group, store)

    monkeypatch.setattr(ray_backend, "compute_group", compute_or_die)
    result = ray_backend.extract_on_cluster(model, [tmp_path], tmp_path / "out", workers=2)
    assert (result.total, result.extracted) == (6, 4)
    assert [Path(failure.path).name for failure in result.failures] == ["2.wav", "3kills.wav"]
    assert all("the process died each time" in failure.reason for failure in result.failures)
    assert not (tmp_path / "out" / "000001.parquet").exists()


@pytest.mark.usefixtures("ray")
def test_inputs_and_results_may_be_at_urls(clips, model, tmp_path):
    """In this process, whose memory is the store."""
    memory = fsspec.filesystem("memory")
    for path in sorted(clips.rglob("*.wav"))[10:80]:
        memory.pipe_file(f"/in/{path.relative_to(clips)}", path.read_bytes())
    memory.pipe_file("/in/long.wav", (clips / "100.wav").read_bytes())
    (tmp_path / "list.txt").write_text("memory://in/deep/*.wav\nmemory://in/long.wav\nmemory://in/no.wav\n")
    sources, failures = remote_files.list_remote_inputs(
        [f"@{tmp_path}/list.txt", "memory://in"], "memory://in"
    )
    assert len(sources) == 71
    assert {source.name for source in sources} >= {"long.wav", "020.wav", "deep/001.wav"}
    assert [failure.path for failure in failures] == ["memory://in/no.wav"]
    with pytest.raises(CorpusError, match="not inside"):
        remote_files.list_remote_inputs(["memory://in/long.wav"], "memory://in/deep")

    copies = tmp_path / "copies"
    for source in sources:
        (copies / source.name).parent.mkdir(parents=True, exist_ok=True)
        (copies / source.name).write_bytes(memory.cat_file(source.file))
    settings = {"layers": LAYERS, "batch_seconds": 2}
    extract_corpus(model, [copies], tmp_path / "local.parquet", workers=1, **settings)
    block = 2 * 22_050
    store = remote_files.ResultStore("memory://out")
    _, spec = resolve_model(model, LAYERS, format_name="parquet", block=block)
    job = ray_backend.Job(spec, "parquet", "auto", block, Path(), Path(), True)
    assert store.prepare({"a": 1}, force=False) == (set(), [])
    serialized = serialize_model(model)
    for group in inputs.group_inputs(sources):
        result = ray_backend.compute_group("run", job, serialized, group, store)
        assert result.seconds > 0
    store.finish([])
    assert store.names() >= {"000000.parquet", "000001.parquet", "_extract.json"}
    assert store.prepare({"a": 1}, force=False)[0] == {0, 1}
    memory.get("/out/", str(tmp_path / "out"), recursive=True)
    assert_same_tables(tmp_path / "out", tmp_path / "local.parquet")
    assert store.prepare({"a": 2}, force=True) == (set(), [])
    store.finish([])
    assert store.names() == {"_extract.json"}
    with pytest.raises(CorpusError, match="this process's memory"):
        ray_backend.extract_on_cluster(model, [copies], "memory://out")


@pytest.mark.usefixtures("ray")
def test_the_command(clips, demo_report, tmp_path, capsys):
    arguments = ["extract", str(clips), "-w", str(demo_report.weights), "-l", "pool5", "--pool", "mean"]
    ray_arguments = [*arguments, "--backend", "ray"]
    assert main([*ray_arguments, "-o", str(tmp_path / "out")]) == 1
    err = capsys.readouterr().err
    assert "Traceback" not in err
    assert "070.wav: cannot be decoded" in err
    assert f"{tmp_path}/out: 148 files" in err
    assert main([*arguments, "-o", str(tmp_path / "local.parquet"), "--workers", "1"]) == 1
    assert_same_tables(tmp_path / "out", tmp_path / "local.parquet")
    capsys.readouterr()
    for options, message in (
        ([], "name a folder or URL"),
        (["-o", "x", "--format", "npz"], "writes parquet, not npz"),
        (["-o", "nosuch://x/y"], "Protocol not known"),
        (["-o", str(tmp_path / "no"), "--workers", "99"], "Ray has 2 CPUs, fewer than 99 workers need"),
        (["-o", str(clips / "070.wav")], "070.wav: cannot be written"),
    ):
        assert main([*ray_arguments, *options]) == 2
        assert message in capsys.readouterr().err


def test_without_ray_the_extra_is_named(clips, demo_report, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    out = tmp_path / "out"
    command = ["extract", str(clips), "-w", str(demo_report.weights), "-o", str(out), "--backend", "ray"]
    assert main(command) == 2
    assert capsys.readouterr().err == (
        "soundnet-port: ray is not installed: pip install 'soundnet-port[ray]'\n"
    )
    assert not out.exists()


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("init", "Ray cannot be reached: The current node timed out"),
        ("nodes", "listens to other machines (10.0.0.1)"),
        ("tasks", "Ray: KeyError: 'last line'"),
    ],
)
def test_all_errors_of_ray_are_one_line(
    clips, demo_report, tmp_path, monkeypatch, capsys, broken, message, ray
):
    """Errors of other classes than Ray's too; and Ray is shut down."""

    def fail(*_, **__):
        raise Exception("The current node timed out") if broken == "init" else KeyError("last line")

    shutdowns = []
    address = "10.0.0.1" if broken == "nodes" else "127.0.0.1"
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", fail if broken == "init" else lambda *_, **__: None)
    monkeypatch.setattr(ray, "nodes", lambda: [{"NodeManagerAddress": address}])
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 4})
    monkeypatch.setattr(ray, "shutdown", lambda: shutdowns.append(None))
    monkeypatch.setattr(ray_backend, "_submit_tasks", fail)
    arguments = ["extract", str(clips), "-w", str(demo_report.weights), "-o", str(tmp_path / "out")]
    assert main([*arguments, "--backend", "ray"]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert len(shutdowns) == (broken != "init")


def test_a_ray_of_its_own_listens_to_this_machine_only(ray):
    assert {node["NodeManagerAddress"] for node in ray.nodes()} == {"127.0.0.1"}
