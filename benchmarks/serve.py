"""How soon the page of `soundnet-port serve` shows something, and how much memory a long sound takes.

Usage: serve.py [--minutes N] [--repeat N] [--threads N]

The figures are in benchmarks/README.md. The network has the released widths and made-up parameters. A
server of its own process gets a clip of 10 s several times, and then a sound of an hour, as WAV and as
MP3; requests go over HTTP, as the page's do. Memory is the process's peak (VmHWM), so it needs Linux.
"""

import argparse
import http.client
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path

import soundfile
from extraction import made_up_weights, megabytes

from soundnet_port.audio.examples import medley

RATE = 22_050


class Site:
    def __init__(self, address, process):
        self.host, self.process = address.split("/")[2], process

    def ask(self, method, path, body=None):
        with closing(http.client.HTTPConnection(self.host, timeout=600)) as connection:
            connection.request(method, path, body)
            answer = connection.getresponse()
            content = answer.read()
            assert answer.status < 300, content
            return json.loads(content) if content else None

    def peak(self):
        return megabytes("VmHWM", self.process.pid)

    def measure(self, path):
        """(seconds to send the file, from then to the first result, from then to the end)."""
        began = time.perf_counter()
        with open(path, "rb") as file:
            sound = self.ask("POST", f"/sounds?name={path.name}", file)["id"]
        sent, first, known = time.perf_counter(), None, 0
        while True:
            view = self.ask("GET", f"/sounds/{sound}?first_frame={known}")
            assert view["state"] != "failed", view
            known += len(view["heads"]["scenes"]["frames"])
            if known and first is None:
                first = time.perf_counter()
            if view["state"] == "done":
                break
            time.sleep(0.5 if known else 0.02)  # as the page does
        done = time.perf_counter()
        for what in ("results.json", "activations?layer=conv7"):
            self.ask("GET", f"/sounds/{sound}/{what}")
        self.ask("DELETE", f"/sounds/{sound}")
        return sent - began, first - sent, done - sent


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder, sound = Path(temporary), medley().numpy() / 256
        weights = made_up_weights(folder / "made-up.safetensors")
        command = [sys.executable, "-m", "soundnet_port", "serve", "-w", weights, "--port", "0"]
        environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        try:
            site = Site(process.stdout.readline(), process)
            print(f"started: {site.peak():.0f} MB at most")
            soundfile.write(folder / "clip.wav", sound[: 10 * RATE], RATE)
            firsts = [site.measure(folder / "clip.wav")[1] for _ in range(options.repeat)]
            print(f"10 s: first result after {', '.join(f'{each:.2f}' for each in firsts)} s")
            print(f"  {site.peak():.0f} MB at most", flush=True)
            for form in ("WAV", "MP3"):
                path = folder / f"long.{form.lower()}"
                with soundfile.SoundFile(path, "w", RATE, 1, format=form) as file:
                    for _ in range(round(options.minutes * 60 / 45)):
                        file.write(sound)
                sent, first, done = site.measure(path)
                size = path.stat().st_size / 1e6
                print(
                    f"{options.minutes:g} min as {form}, {size:.0f} MB: sent in {sent:.1f} s, "
                    f"first result {first:.2f} s later, all after {done:.1f} s"
                )
                print(f"  {site.peak():.0f} MB at most", flush=True)
        finally:
            process.send_signal(signal.SIGINT)
            print("exit code", process.wait())


if __name__ == "__main__":
    main()
