"""The live microphone of `soundnet-port serve`: delay, load, and how soon answers follow a change of sound.

Usage: live.py [WEIGHTS] [--seconds N] [--threads N] [--corpus ESC-10] [--browser]

The figures are in benchmarks/README.md; WEIGHTS are the released ones by default. A server of its own process
gets the examples at 48 kHz in chunks of 0.25 s as they would be recorded. With --browser a Chromium whose
microphone plays them does the same, and says what its page measures from sound to screen. With --corpus every
clip follows another of its fold, and answers with windows of several lengths are asked for at several times
after the change: how many have the scene that `predict` has for the whole clip among its three first, and for
how many a linear classifier of all probabilities, fitted to whole clips of the other folds, is right.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import soundfile
import soxr
import torch
from serve import Site

import soundnet_port as sp
from soundnet_port.audio.examples import medley
from soundnet_port.learning.datasets import read_labeled

RATE, LIVE_RATE, CHUNK = 22_050, 48_000, 12_000
LAGS = (0.5, 1, 1.5, 2, 3, 4, 5, 7.5, 10)  # seconds after the change
WINDOWS = (1, 2, 3, 5, 8, 10.98)


@contextmanager
def run_server(weights, threads):
    command = [sys.executable, "-m", "soundnet_port", "serve", "-w", weights, "--port", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        yield Site(process.stdout.readline().strip(), process)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait()


def cpu_seconds(process):
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def describe(name, values):
    low, middle, high = np.percentile(values, [5, 50, 95])
    print(f"  {name}: {middle:.1f} ms (5 % below {low:.1f}, 5 % above {high:.1f})")


def measure_chunks(site, seconds):
    samples = soxr.resample(medley().numpy() / 256, RATE, LIVE_RATE)
    pcm = np.round(32_767 * np.clip(samples, -1, 1)).astype("<i2")
    session = site.ask("POST", f"/live?rate={LIVE_RATE}")["id"]
    for window in (2, 3, 5, 10.99):
        computed, trips, spectrum, units = [], [], 0, 0
        start, before = time.perf_counter(), cpu_seconds(site.process.pid)
        for number in range(int(seconds * LIVE_RATE / CHUNK)):
            time.sleep(max(0, start + number * CHUNK / LIVE_RATE - time.perf_counter()))
            position = number * CHUNK % (len(pcm) - CHUNK)
            query = f"window={window}&layer=pool5&units={units}&spectrogram={spectrum}"
            sent = time.perf_counter()
            body = pcm[position : position + CHUNK].tobytes()
            response = site.ask("POST", f"/live/{session}?{query}", body)
            trips.append(1000 * (time.perf_counter() - sent))
            computed.append(1000 * response["computed"])
            units, spectrum = (
                response[name]["first"] + response[name]["columns"] for name in ("units", "spectrogram")
            )
        share = (cpu_seconds(site.process.pid) - before) / (time.perf_counter() - start)
        print(f"answers of {window} s, four a second: {share:.1%} of a CPU")
        describe("computing", computed[4:])
        describe("from request to response", trips[4:])
    site.ask("DELETE", f"/live/{session}")
    print(f"{site.peak():.0f} MB at most", flush=True)


def measure_page(site, seconds):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
    from playwright.sync_api import sync_playwright
    from support.browser import CHROMIUM, FLAGS

    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        path = Path(folder) / "microphone.wav"
        soundfile.write(path, medley().numpy() / 256, RATE)
        flags = [*FLAGS, f"--use-file-for-fake-audio-capture={path}%noloop"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        page = browser.new_page()
        page.goto(f"http://{site.host}/")
        page.click("#listen:not([disabled])")
        delays, before, start = [], cpu_seconds(site.process.pid), time.perf_counter()
        while time.perf_counter() - start < seconds:
            page.wait_for_timeout(500)
            delays.append(page.evaluate("({ ...document.querySelector('#live-delay').dataset })"))
        share = (cpu_seconds(site.process.pid) - before) / (time.perf_counter() - start)
        browser.close()
    print(f"page, for {seconds:g} s: the server takes {share:.1%} of a CPU")
    for name in ("newest", "oldest"):
        describe(f"from sound to screen, {name}", [1000 * float(d[name]) for d in delays[3:] if d])


def measure_changes(model, corpus):
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    def answer(waveform):
        heads = sp.predict(model, waveform, top=1).heads.values()
        return np.concatenate([head.probabilities.mean(1).log().clamp(min=-20).numpy() for head in heads])

    labeled = read_labeled(corpus)
    sounds = [sp.load_audio(sound.path) for sound in labeled.sounds]
    labels, folds = (np.array([getattr(s, name) for s in labeled.sounds]) for name in ("label", "fold"))
    generator = np.random.default_rng(0)
    whole = np.stack([answer(sound) for sound in sounds])
    answers = np.zeros((len(sounds), len(LAGS), len(WINDOWS), whole.shape[1]), np.float32)
    for number, sound in enumerate(sounds):
        others = np.flatnonzero((labels != labels[number]) & (folds == folds[number]))
        before = sounds[generator.choice(others)].repeat(3)[-11 * RATE :]
        waveform = torch.cat([before, sound.repeat(3)])
        for i, lag in enumerate(LAGS):
            for j, window in enumerate(WINDOWS):
                end = len(before) + round(lag * RATE)
                answers[number, i, j] = answer(waveform[end - round(window * RATE) : end])
    correct = np.zeros(answers.shape[:3], bool)
    for fold in np.unique(folds):
        train, test = folds != fold, folds == fold
        classifier = make_pipeline(StandardScaler(), LogisticRegression(C=0.001, max_iter=300))
        classifier.fit(whole[train], labels[train])
        for i, j in np.ndindex(len(LAGS), len(WINDOWS)):
            correct[test, i, j] = classifier.predict(answers[test, i, j]) == labels[test]
    scenes = slice(-len(model.categories["scenes"]), None)
    best = np.argsort(-whole[:, scenes], 1)[:, :3]
    agree = (answers[..., scenes].argmax(3)[..., None] == best[:, None, None]).any(3)
    for title, values in (("scene among the clip's three first", agree), ("classifier right", correct)):
        print(f"{title}, %; windows of {', '.join(map(str, WINDOWS))} s")
        for lag, row in zip(LAGS, 100 * values.mean(0), strict=True):
            print(f"  {lag:4g} s after the change: {'  '.join(f'{value:5.1f}' for value in row)}")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("weights", nargs="?", default="soundnet8")
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--corpus")
    parser.add_argument("--browser", action="store_true")
    options = parser.parse_args()
    with run_server(options.weights, options.threads) as site:
        measure_chunks(site, options.seconds)
        if options.browser:
            measure_page(site, options.seconds)
    if options.corpus:
        torch.set_num_threads(options.threads)
        measure_changes(sp.load_pretrained(options.weights), options.corpus)


if __name__ == "__main__":
    main()
