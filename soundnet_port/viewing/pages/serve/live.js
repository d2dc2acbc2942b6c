// The microphone live: sends its sound to the server a quarter of a second at a time, and shows what comes back.

import { buildLive, clearLive, drawLive, showAnswer, showDelay, showLevel, showWarning } from "./live-view.js";
import { BLOCK, Recording } from "./live-recording.js";
import { closeMicrophone, openMicrophone } from "./microphone.js";
import { $, fetchJson, formatTime, showError, state } from "./shared.js";
import { closeSound, openSound } from "./sounds.js";

const CHUNK = 0.25; // seconds that are sent at once, or more if the server is slow
const BACKLOG = 15; // seconds; if more is waiting, the oldest is left out
const KEPT = 600; // seconds that are kept as a recording, if the server takes files as large
const RETRY = 1000; // ms, before the server is asked again

let run = null; // what is live: {stream, context, recording, session, ...}

export function setUpLive() {
  const button = $("listen");
  button.disabled = !navigator.mediaDevices || !window.AudioWorkletNode;
  if (button.disabled) button.title = "Browsers allow the microphone only on this computer or with https.";
  button.addEventListener("click", start);
  $("live-stop").addEventListener("click", () => stopLive());
  $("live-layer").addEventListener("change", () => run && run.view.resetUnits());
  for (const event of ["resize", "visibilitychange"]) {
    (event === "resize" ? window : document).addEventListener(event, () => {
      if (!run) return;
      if (run.context.state === "suspended") run.context.resume();
      drawLive(run);
    });
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => run && drawLive(run));
  window.addEventListener("pagehide", () => run && endSession(run));
}

function start() {
  if (run || !state.network || $("record").classList.contains("recording")) return;
  openMicrophone(async (stream) => {
    const context = new AudioContext({ latencyHint: "interactive" });
    await context.audioWorklet.addModule("live-worklet.js");
    begin(stream, context);
  });
}

function begin(stream, context) {
  closeSound();
  const largest = Math.floor((state.network.max_megabytes * 1e6 - 100) / 2 / context.sampleRate) - 1;
  const recording = new Recording(context.sampleRate, Math.max(30, Math.min(KEPT, largest)));
  const [track] = stream.getAudioTracks();
  const started = { stream, context, track, recording, session: null, sent: 0, answered: 0, base: 0, wake: null, view: null };
  run = started;
  document.body.classList.add("listening");
  document.body.classList.remove("empty");
  $("live").hidden = false;
  started.view = buildLive();
  const capture = new AudioWorkletNode(context, "capture", { channelCountMode: "max" });
  capture.port.addEventListener("message", ({ data: { samples, time } }) => {
    showLevel(started, recording.push(samples, time));
    $("live-time").textContent = formatTime(recording.end / recording.rate);
    if (started.wake && recording.end - started.sent >= CHUNK * recording.rate) started.wake();
  });
  capture.port.start();
  context.createMediaStreamSource(stream).connect(capture).connect(context.destination); // silence, but pulled
  context.addEventListener("statechange", () => run === started && context.state === "suspended" && context.resume());
  track.addEventListener("ended", () => run === started && stopLive("The microphone was disconnected."));
  track.addEventListener("mute", () => showWarning("muted", "The microphone is muted."));
  track.addEventListener("unmute", () => showWarning("muted", ""));
  $("live-stop").focus();
  follow(started);
}

// opens what was recorded, as a file
export function stopLive(message = "") {
  if (!run) return;
  const { stream, context, recording } = run;
  endSession(run);
  run = null;
  closeMicrophone(stream);
  context.close();
  clearLive();
  document.body.classList.remove("listening");
  document.body.classList.add("empty");
  $("live").hidden = true;
  $("listen").focus();
  showError(message);
  if (recording.end < 0.1 * recording.rate) return;
  const time = new Date().toLocaleTimeString("en", { hour12: false }).replaceAll(":", ".");
  openSound(recording.toWav(`live ${time}.wav`));
  if (message) showError(message);
}

function endSession(ended) {
  if (ended.session) fetch(`live/${ended.session.id}`, { method: "DELETE", keepalive: true }).catch(() => {});
  ended.session = null;
}

async function follow(followed) {
  const { recording } = followed;
  for (let failures = 0; run === followed; ) {
    if (recording.end - followed.sent < CHUNK * recording.rate) {
      await new Promise((resolve) => (followed.wake = resolve));
      continue;
    }
    try {
      if (!followed.session) await beginSession(followed);
      if (run === followed) await update(followed);
      failures = 0;
      showWarning("server", "");
    } catch (error) {
      // it has been restarted, or closed the session while this computer slept; or it is gone, or too slow
      endSession(followed);
      failures += 1;
      if (failures > 1) showWarning("server", `${error.message} Still recording; trying again.`);
      await new Promise((resolve) => setTimeout(resolve, failures > 1 ? RETRY : 0));
    }
  }
}

async function beginSession(followed) {
  const { recording } = followed;
  followed.session = await fetchJson(`live?rate=${recording.rate}`, { method: "POST" });
  if (run !== followed) {
    endSession(followed);
    return;
  }
  // with the sound that the first answer hears, if there was any
  const back = Math.floor((Math.max(...followed.session.windows) * recording.rate) / BLOCK) * BLOCK;
  followed.sent = Math.max(recording.start, recording.end - back);
  followed.base = followed.sent / recording.rate;
  followed.view.begin(followed.session);
}

async function update(followed) {
  const { recording, view } = followed;
  const [begin, end] = [followed.sent, recording.end];
  if (end - begin > BACKLOG * recording.rate) throw new Error("The server is too slow.");
  const last = Math.max(followed.answered, recording.start);
  const times = [recording.getTime(last), recording.getTime(end - 1)]; // of what is new
  const query = new URLSearchParams({
    window: $("live-window").value,
    normalize: Number($("live-normalize").checked),
    spectrogram: view.spectrogram.next,
    layer: $("live-layer").value,
    units: view.units.next,
  });
  const body = recording.read(begin, end);
  const response = await fetchJson(`live/${followed.session.id}?${query}`, { method: "POST", body });
  if (run !== followed) return;
  followed.sent = end;
  followed.answered = end;
  showAnswer(followed, response, last / recording.rate, end / recording.rate);
  drawLive(followed);
  // painted before the frame after the next one begins
  requestAnimationFrame(() => requestAnimationFrame(() => run === followed && showDelay(followed, times, response)));
}
