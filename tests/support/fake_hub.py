"""A hub on localhost, as far as one network needs it: repositories, commits, downloads."""

import base64
import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub(BaseHTTPRequestHandler):
    """Keeps every file of every commit in `server.files`, {"owner/name": {path: bytes}}."""

    def do_POST(self):
        sent = self.rfile.read(int(self.headers["Content-Length"]))
        place = self.path.split("?")[0]
        repository = "/".join(place.split("/")[3:5])
        if place == "/api/repos/create":
            made = json.loads(sent)
            repository = "/".join(filter(None, [made.get("organization"), made["name"]]))
            self.server.files[repository] = {}
            self.answer({"url": f"http://{self.headers['Host']}/{repository}"})
        elif place == "/api/validate-yaml":  # of the model card
            self.answer({"warnings": [], "errors": []})
        elif "/preupload/" in place:
            files = [each["path"] for each in json.loads(sent)["files"]]
            modes = [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in files]
            self.answer({"files": modes})
        elif "/commit/" in place:
            for line in map(json.loads, sent.decode().splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.server.files[repository][line["value"]["path"]] = content
            self.answer({"commitUrl": f"http://{self.headers['Host']}/{repository}", "commitOid": COMMIT})
        else:
            self.send_error(404)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        owner, name, _, _, path = (*self.path.strip("/").split("/", 4), "", "", "")[:5]
        content = self.server.files.get(f"{owner}/{name}", {}).get(path)
        if content is None:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def answer(self, content):
        text = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_):
        pass


@contextmanager
def fake_hub():
    """The running server: `.files`, and `.url` for HF_ENDPOINT."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    server.files, server.url = {}, f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
