"""fetch from a server on localhost with all the faults of servers."""

import http.server
import threading
import time
import zipfile

import pytest
from support.networks import file

from soundnet_port import WeightsError, load_pretrained
from soundnet_port.cli.main import main

PATH = "/soundnet/soundnet_models_public.zip"


@pytest.fixture
def released(tmp_path):
    """A zip with two reference networks in the released layout."""
    path = tmp_path / "released.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(file("n8_d16_cudnnA.t7"), "soundnet_models_public/soundnet8_final.t7")
        archive.write(file("n5_d8_cudnnA.t7"), "soundnet_models_public/soundnet5_final.t7")
    return path.read_bytes()


@pytest.fixture
def serve(monkeypatch, tmp_path):
    """Start a server with the given behavior; return the zip's address and the request counter."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    servers = []

    def start(answer):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                server.requests += 1
                answer(self)

            def log_message(self, *_):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.requests = 0
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}{PATH}", server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def send(handler, body, length=None, code=200):
    handler.send_response(code)
    if length != "none":
        handler.send_header("Content-Length", str(len(body) if length is None else length))
    handler.end_headers()
    handler.wfile.write(body)


def cached_files(tmp_path):
    return [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]


def test_both_networks_end_to_end(serve, released, tmp_path, capsys):
    url, server = serve(lambda h: send(h, released))
    assert main(["fetch", "--url", url]) == 0
    out, err = capsys.readouterr()
    assert out.count("parity check passed: worst") == 2
    assert f"soundnet-port: fetching soundnet_models_public.zip (101 MB) from {url}" in err
    assert main(["fetch", "--url", url]) == 0
    assert server.requests == 1  # the download was cached
    assert capsys.readouterr().out.count("unchanged") == 2


def test_an_unrecognized_network_does_not_get_the_name_of_a_released_one(serve, released, capsys):
    """Over http anybody may send anything."""
    url, _ = serve(lambda h: send(h, released))
    assert main(["fetch", "--url", url]) == 0
    out = capsys.readouterr().out
    assert "not recognized as MIT's, therefore not soundnet8 by name but soundnet8_final" in out
    assert "not soundnet5 by name but soundnet5_final" in out
    assert load_pretrained("soundnet8_final").architecture.widths == (1, 2, 4, 8, 16, 32, 64)
    with pytest.raises(WeightsError):
        load_pretrained("soundnet8")


def test_a_recognized_network_gets_the_name_and_vouches_for_its_neighbor(
    serve, released, pretend_released, capsys
):
    url, _ = serve(lambda h: send(h, released))
    assert main(["fetch", "--url", url]) == 0
    assert "tensors bit for bit" in capsys.readouterr().out
    assert load_pretrained("soundnet8").architecture.widths == (1, 2, 4, 8, 16, 32, 64)
    assert load_pretrained("soundnet5").architecture.widths == (4, 8, 16, 32)


def test_a_slow_server_and_redirects_are_followed(serve, released, tmp_path):
    def slow(handler):
        if not handler.path.endswith("moved"):
            handler.send_response(302)
            handler.send_header("Location", PATH + "moved")
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(released)))
        handler.end_headers()
        for start in range(0, len(released), 20_000):
            handler.wfile.write(released[start : start + 20_000])
            time.sleep(0.01)

    assert main(["fetch", "--url", serve(slow)[0]]) == 0
    assert load_pretrained("soundnet5_final")


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda h, z: send(h, z[: len(z) // 2], len(z)), "broke off"),
        (lambda h, z: send(h, z, len(z) + 1000), "broke off"),
        (lambda h, z: send(h, z[: len(z) // 2], "none"), "damaged"),
        (lambda h, z: send(h, z, len(z) - 1000), "damaged"),
        (lambda h, z: send(h, b"gone", code=404), "the server answered 404"),
        (lambda h, z: send(h, b"oops", code=500), "the server answered 500"),
        (lambda h, z: send(h, b"<html>Moved to a new page</html>"), "no zip"),
        (lambda h, z: send(h, b""), "no zip"),
        (lambda h, z: h.connection.close(), "failed or broke off"),
        (lambda h, z: send(h, z[:50_000] + bytes(100) + z[50_100:]), "found"),
    ],
)
def test_anything_but_the_complete_zip_leaves_nothing_behind(
    serve, released, tmp_path, capsys, answer, message
):
    url, _ = serve(lambda h: answer(h, released))
    assert main(["fetch", "--url", url]) == 2
    captured = capsys.readouterr()
    errors = [line for line in captured.err.splitlines() if line.startswith("soundnet-port: ")]
    assert len(errors) == 2  # the step, and the error
    assert message in errors[1]
    assert url in errors[1]
    assert captured.out == ""
    assert cached_files(tmp_path) == []
    assert not (tmp_path / "soundnet-weights").exists()


def test_another_zip_is_not_kept(serve, tmp_path, capsys):
    path = tmp_path / "other.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "not here")
    url, _ = serve(lambda h: send(h, path.read_bytes()))
    assert main(["fetch", "--url", url]) == 2
    assert "readme.txt" in capsys.readouterr().err
    assert cached_files(tmp_path) == []


def test_a_silent_server_is_given_up(serve, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("soundnet_port.conversion.fetch.TIMEOUT", 0.3)
    url, _ = serve(lambda h: time.sleep(2))
    assert main(["fetch", "--url", url]) == 2
    assert "no answer for 0.3 s" in capsys.readouterr().err


def test_nobody_listening_and_files(serve, released, tmp_path, capsys):
    url, server = serve(lambda h: send(h, released))
    server.shutdown()
    server.server_close()
    assert main(["fetch", "--url", url]) == 2
    assert "--url" in capsys.readouterr().err
    assert main(["fetch", "--url", str(tmp_path / "released.zip")]) == 0
    assert main(["fetch", "--url", (tmp_path / "released.zip").as_uri()]) == 0
    assert main(["fetch", "--url", str(tmp_path / "gone.zip")]) == 2
