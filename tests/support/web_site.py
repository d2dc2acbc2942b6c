"""A running server of the web application, and requests to it."""

import contextlib
import http.client
import io
import json
import socket
import threading
import time
from urllib.parse import quote

import soundfile

RATE = 22_050


class Site:
    """Requests to a running server."""

    def __init__(self, port):
        self.port, self.url = port, f"http://127.0.0.1:{port}/"

    def request(self, path, method="GET", body=None, **headers):
        """Return status, headers and body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        with contextlib.closing(connection):
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            return response.status, response.headers, response.read()

    def get(self, path):
        status, _, body = self.request(path)
        assert status == 200, body
        return json.loads(body)

    def send(self, content, name="a.wav"):
        """Send a sound and return its id."""
        status, _, body = self.request(f"/sounds?name={quote(name)}", "POST", content)
        assert status == 201, body
        return json.loads(body)["id"]

    def wait(self, sound):
        """Return the results of a sound once its analysis has ended."""
        for _ in range(12_000):
            results = self.get(f"/sounds/{sound}")
            if results["state"] in ("done", "failed"):
                return results
            time.sleep(0.005)
        raise AssertionError(results["state"])


@contextlib.contextmanager
def run_site(model, **settings):
    """Run a server in a thread until the block ends."""
    import uvicorn

    from soundnet_port.viewing.web_app import create_app

    with socket.create_server(("127.0.0.1", 0)) as listener:
        hosts = frozenset({"127.0.0.1", "localhost"})
        app = create_app(model, allowed_hosts=hosts, **settings)
        server = uvicorn.Server(
            uvicorn.Config(app, log_level="error", ws="none", timeout_graceful_shutdown=1)
        )
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            yield Site(listener.getsockname()[1])
        finally:
            server.should_exit = True
            thread.join()


def wav(samples, rate=RATE):
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format="WAV")
    return file.getvalue()


def wait_for(condition):
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.02)
    raise AssertionError("timed out")
