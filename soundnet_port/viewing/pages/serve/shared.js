// What the modules of the page share: its state, requests, elements, and words for times and probabilities.
// File and category names are inserted as text only, never as HTML.

export const $ = (id) => document.getElementById(id);
export const media = $("media");
export const NO_SERVER = "The server does not respond. Is soundnet-port serve still running?";
export const NO_RESULTS = {
  state: "unsent", seconds: 0, announced_seconds: null, repeats: 1, edge_frames: 0, quiet: false, ahead: 0,
  waveform: { step: 1, high: [], low: [] }, heads: {},
};

export const state = {
  network: null, // from /network
  sound: null, // the one that is shown, see sounds.js
  get results() { // the last response of /sounds/ID
    return this.sound ? this.sound.results : NO_RESULTS;
  },
};

export async function fetchJson(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch {
    throw new Error(NO_SERVER);
  }
  if (response.ok) return response.json();
  const { error } = await response.json().catch(() => ({}));
  throw Object.assign(new Error(error || `The server responded with status ${response.status}.`), { status: response.status });
}

export function showError(text) {
  $("error").textContent = text;
  $("error").hidden = !text;
}

export const announce = (text) => ($("announcement").textContent = text);

export function createElement(tag, text, className) {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  if (className) element.className = className;
  return element;
}

export function formatTime(seconds) {
  const rounded = Math.floor(seconds + 1e-6);
  const pad = (number) => String(number).padStart(2, "0");
  const [h, m, s] = [Math.floor(rounded / 3600), Math.floor(rounded / 60) % 60, rounded % 60];
  return h ? `${h}:${pad(m)}:${pad(s)}` : `${m}:${pad(s)}`;
}

// a time in a sound, or its length: tenths where the sound is under a minute
export function formatPosition(seconds, length = seconds, unit = " s") {
  return length >= 60 ? formatTime(seconds) : seconds.toFixed(1) + unit;
}

// how much a value hears
export function formatDuration(seconds) {
  if (seconds >= 1) return `${seconds.toFixed(1)} s`;
  const milliseconds = 1000 * seconds;
  return `${milliseconds >= 100 ? Math.round(milliseconds) : Number(milliseconds.toPrecision(2))} ms`;
}

export function formatPercent(probability) {
  return probability >= 0.0995 ? `${Math.round(100 * probability)} %` : `${(100 * probability).toFixed(1)} %`;
}

export const getPath = (suffix = "") => `sounds/${state.sound.id}${suffix}`;

// scenes first, as on the original's page
export const getHeads = () => Object.keys(state.network.heads).sort().reverse();

// in seconds; while it is unknown, of what was analyzed
export function getLength() {
  const { results } = state;
  if (results.state === "done") return results.seconds;
  return Math.max(results.announced_seconds || (Number.isFinite(media.duration) ? media.duration : 0), results.seconds) || 1;
}

export const findFrame = (seconds, count) =>
  Math.max(0, Math.min(count - 1, Math.round((seconds - state.network.frame.center) / state.network.frame.step)));

// the end of a scale for probabilities up to this one
export const findScale = (probability) => [0.02, 0.05, 0.1, 0.2, 0.5, 1].find((end) => end >= probability - 1e-9) || 1;
