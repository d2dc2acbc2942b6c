"""How soon the page of `soundnet-port serve` shows something, and how much memory a long sound takes.

Usage: serve.py [--minutes N] [--repeat N] [--threads N] [--page]

The figures are in benchmarks/README.md. The network has the released widths and made-up parameters. A
server of its own process gets a clip of 10 s several times, and then a sound of an hour, as WAV and as
MP3; requests go over HTTP, as the page's do. With --page, Chromium is given the clip too: the time until it
has painted the first list. Memory is the process's peak (VmHWM), so it needs Linux.
"""

import argparse
import http.client
import json
import os
import shutil
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
        for what in ("results.json", "spectrogram", "activations?layer=conv7&order=similarity"):
            self.ask("GET", f"/sounds/{sound}/{what}")
        self.ask("DELETE", f"/sounds/{sound}")
        return sent - began, first - sent, done - sent


# from choosing a file to the frame after the one with the first list of scenes
OBSERVE = """() => {
  window.times = [];
  let began = 0;
  const begin = ({ target }) => target.id === "file" && (began = performance.now());
  document.addEventListener("change", begin, true);
  new MutationObserver(() => {
    const [started, first] = [began, document.querySelector("#now-scenes li")];
    if (!started || !first || document.querySelector("#name").textContent !== window.expected) return;
    began = 0;
    const finish = () => times.push((performance.now() - started) / 1000);
    requestAnimationFrame(() => requestAnimationFrame(finish));
  }).observe(document.querySelector("#now-lists"), { childList: true, subtree: true });
}"""


def measure_page(address, path, repeat):
    """Seconds until the page has painted the first answer."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page()
        page.goto(address)
        page.wait_for_selector("#track-scenes", state="attached")
        page.evaluate(OBSERVE)
        for number in range(repeat):
            name = f"{number}.wav"
            page.evaluate(f"window.expected = '{name}'")
            content = {"name": name, "mimeType": "audio/wav", "buffer": path.read_bytes()}
            page.set_input_files("#file", content)
            page.wait_for_selector("#downloads:not([hidden])")
            page.wait_for_timeout(500)
        times = page.evaluate("times")
        browser.close()
        return times


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--page", action="store_true", help="measure in Chromium too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder, sound = Path(temporary), medley().numpy() / 256
        weights = made_up_weights(folder / "made-up.safetensors")
        command = [sys.executable, "-m", "soundnet_port", "serve", "-w", weights, "--port", "0"]
        environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        try:
            address = process.stdout.readline().strip()
            site = Site(address, process)
            print(f"started: {site.peak():.0f} MB at most")
            soundfile.write(folder / "clip.wav", sound[: 10 * RATE], RATE)
            firsts = [site.measure(folder / "clip.wav")[1] for _ in range(options.repeat)]
            print(f"10 s: first result after {', '.join(f'{each:.2f}' for each in firsts)} s")
            print(f"  {site.peak():.0f} MB at most", flush=True)
            if options.page:
                times = measure_page(address, folder / "clip.wav", options.repeat)
                print(f"10 s: painted after {', '.join(f'{each:.2f}' for each in times)} s", flush=True)
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
