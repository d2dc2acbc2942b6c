// The sounds of the page: their list, sending them, and following their analyses.
//
// A sound is {key, name, file, size, added, id, url, results, frames, peaks, error, busy, ...}: `id` is the server's
// while it holds the sound, `frames` are the lists of frames by head, `peaks` each head's largest probability, and `kept`
// is false if there was no room for it in this browser.

import { writeLink } from "./link.js";
import { dropRow, focusRow, showRow, showRows } from "./queue.js";
import { describeState, draw } from "./results.js";
import { $, announce, fetchJson, getHeads, getPath, media, NO_RESULTS, showError, state } from "./shared.js";
import { forget, forgetAll, isKept, keep, loadKept } from "./storage.js";
import { loadSpectrogram } from "./timeline.js";
import { forgetUnit, loadActivations } from "./units.js";

const PARALLEL = 2; // sounds that are sent and analyzed at a time, as on the server
const HELD = 10; // sounds that the server holds after their analysis; others are sent again if needed

const sounds = [];
let turn = 0; // counts selections

const isDone = (sound) => sound.results.state === "done";
const isListed = (sound) => sounds.includes(sound);
const getNetworkKey = () => `${state.network.sha256} ${state.network.edge_frames}`; // of which results are

function createSound(record) {
  const sound = { id: null, url: null, results: NO_RESULTS, frames: {}, peaks: {}, error: "", busy: false, selected: 0, ...record };
  for (const head of getHeads()) sound.frames[head] ||= [];
  measurePeaks(sound);
  return sound;
}

function measurePeaks(sound) {
  for (const head of getHeads()) sound.peaks[head] = sound.frames[head].reduce((peak, frame) => Math.max(peak, frame[1]), 0);
}

// ---- the list

export const openSound = (file) => addSounds([file]);

export async function addSounds(files) {
  if (!state.network || !files.length) return;
  const limit = state.network.max_megabytes;
  const added = files.map((file, number) => {
    const key = Array.from(crypto.getRandomValues(new Uint32Array(2)), (part) => part.toString(36)).join("");
    const error = file.size > limit * 1e6 ? `${file.name}: larger than ${limit.toLocaleString("en")} MB, the limit of this server.` : "";
    return createSound({ key, name: file.name, file, size: file.size, added: Date.now() + number / 1000, error, unusable: Boolean(error) });
  });
  sounds.push(...added);
  showRows(sounds);
  selectSound(added[0]);
  for (const sound of added) if (!sound.unusable) await keepSound(sound); // those that could not be sent, too
}

async function keepSound(sound) {
  const { key, name, file, size, added, results, frames } = sound;
  const record = { key, name, file, size, added };
  if (isDone(sound)) Object.assign(record, { network: getNetworkKey(), results, frames });
  sound.kept = await keep(record);
  if (!isListed(sound) || sound.unusable) await forget(key); // removed, or found to be no sound, meanwhile
  for (const other of sounds) if (other.kept) other.kept = isKept(other.key); // some may have made room
  showRows(sounds);
}

// those that were kept; shows the one that is linked, or the last one
export async function restoreSounds(linkedKey, time) {
  const records = await loadKept();
  if (!records) {
    $("kept").textContent = "not kept: this browser keeps nothing of this page";
    $("kept").dataset.nothing = true;
  }
  for (const { network, results, frames, ...record } of records || []) {
    record.kept = true;
    sounds.push(createSound(network === getNetworkKey() ? { ...record, results, frames } : record));
  }
  showRows(sounds);
  if (state.sound) return;
  const selected = linkedKey ? findSound(linkedKey) : sounds[sounds.length - 1];
  if (selected) selectSound(selected, time);
  else if (linkedKey) showMissing();
}

export function showMissing() {
  closeSound();
  showError("The linked sound is not kept in this browser.");
}

export const findSound = (key) => sounds.find((sound) => sound.key === key);

export function removeSound(sound) {
  const number = sounds.indexOf(sound);
  sounds.splice(number, 1);
  dropRow(sound);
  showRows(sounds);
  deleteOnServer(sound);
  forget(sound.key);
  const next = sounds[number] || sounds[number - 1];
  if (state.sound === sound) {
    if (next) selectSound(next);
    else closeSound();
  }
  if (next) focusRow(next);
  else $("choose").focus();
}

export async function clearSounds() {
  closeSound();
  for (const sound of sounds.splice(0)) {
    dropRow(sound);
    deleteOnServer(sound);
  }
  showRows(sounds);
  await forgetAll();
}

// ---- the one that is shown

// again, if it failed
export function selectSound(sound, time = state.sound === sound ? media.currentTime : 0) {
  if (state.sound === sound && (!sound.error || sound.unusable)) return;
  closeSound();
  if (!sound.unusable) Object.assign(sound, { error: "", again: false }); // the server may be back
  state.sound = sound;
  sound.selected = turn += 1;
  document.body.classList.remove("empty");
  $("results").hidden = Boolean(sound.error);
  $("cursor").hidden = false;
  $("name").textContent = sound.name;
  announce(isDone(sound) || sound.error ? sound.name : `Analyzing ${sound.name}`);
  showError(sound.error);
  media.hidden = true;
  sound.unplayable = false;
  sound.url = URL.createObjectURL(sound.file);
  media.src = sound.url;
  if (time) media.currentTime = time;
  showRows(sounds);
  writeLink();
  draw();
  if (isDone(sound) && sound.id) showPictures(sound).then(() => showDone(sound), (error) => handleFailure(sound, error));
  sendNext();
}

// shows none; their analyses go on
export function closeSound() {
  const last = state.sound;
  showError("");
  if (!last) return;
  state.sound = null;
  forgetUnit();
  media.pause();
  media.removeAttribute("src");
  media.load();
  URL.revokeObjectURL(last.url);
  $("results").hidden = true;
  document.body.classList.add("empty");
  showRows(sounds);
  writeLink();
}

async function showPictures(sound) {
  await Promise.all([loadActivations(), loadSpectrogram()]);
  if (state.sound === sound) draw();
}

function showDone(sound) {
  if (state.sound !== sound) return;
  if (media.duration === Infinity || sound.unplayable) playDecoded(); // a recording: has no duration, so it cannot be sought in
  const best = getHeads().map((head) => `${head}: ${state.network.heads[head][sound.results.heads[head].clip[0][0]]}`);
  announce(["Done", ...best].join(", "));
}

// for sounds that the browser cannot play
export function playDecoded() {
  const [time, playing] = [media.currentTime || 0, !media.paused];
  if (!state.sound.id) return;
  state.sound.unplayable = false;
  media.src = getPath("/sound.wav");
  media.currentTime = time;
  if (playing) media.play().catch(() => {});
}

// ---- sending, and following the analyses

// the one that is shown needs the server for pictures and downloads, even if its results are known
const isNeeded = (sound) => !sound.id && !sound.busy && !sound.error && (!isDone(sound) || sound === state.sound);

function sendNext() {
  if (sounds.filter((sound) => sound.busy).length >= PARALLEL && !(state.sound && isNeeded(state.sound))) return;
  const next = [state.sound, ...sounds].find((sound) => sound && isListed(sound) && isNeeded(sound));
  if (!next) return;
  next.busy = true;
  analyze(next)
    .catch((error) => error)
    .then((error) => {
      next.busy = false;
      if (error) handleFailure(next, error);
      else if (next.missed && state.sound === next) showPictures(next).catch((failure) => handleFailure(next, failure));
      next.missed = false;
      if (isListed(next)) showRow(next);
      sendNext();
    });
  sendNext();
}

async function analyze(sound) {
  if (!isDone(sound)) sound.results = { ...NO_RESULTS, state: "sending" };
  showRow(sound);
  if (state.sound === sound) draw();
  const { id } = await fetchJson(`sounds?name=${encodeURIComponent(sound.name)}`, { method: "POST", body: sound.file });
  sound.id = id;
  if (!isListed(sound)) {
    deleteOnServer(sound);
    return;
  }
  await followAnalysis(sound);
  releaseOld();
}

async function followAnalysis(sound) {
  const [restored, frames] = [isDone(sound), Object.fromEntries(getHeads().map((head) => [head, []]))];
  for (let [pause, drawn] = [20, 0]; ; pause = Math.min(500, pause * 1.4)) {
    const first = Math.max(0, ...Object.values(frames).map((list) => list.length));
    const response = await fetchJson(`sounds/${sound.id}?first_frame=${first}`);
    if (!isListed(sound)) return;
    if (response.state === "failed") throw Object.assign(new Error(response.error), { unusable: true });
    const done = response.state === "done";
    for (const [head, { frames: more }] of Object.entries(response.heads)) frames[head].push(...more);
    if (!restored || done) {
      Object.assign(sound, { results: response, frames });
      measurePeaks(sound);
    }
    if (state.sound === sound) {
      if (sound.unplayable && response.seconds) playDecoded();
      if (done || (response.seconds > drawn && !restored)) {
        drawn = response.seconds;
        draw(); // answers first
        await showPictures(sound);
      } else {
        describeState();
      }
    }
    showRow(sound);
    if (done) break;
    await new Promise((resolve) => setTimeout(resolve, pause));
  }
  sound.again = false;
  showDone(sound);
  if (!restored) await keepSound(sound);
}

// `id`: the server's, when it was asked
export function handleFailure(sound, error, id = sound.id) {
  if (sound.busy) sound.missed = true; // asked for again after the analysis, which may fail by itself
  if (sound.busy || sound.id !== id) return; // sent again meanwhile
  deleteOnServer(sound);
  if (!isListed(sound)) return;
  if (error.status === 404 && !sound.again) { // the server has removed it, or was started anew
    sound.again = true;
    sendNext();
    return;
  }
  sound.error = error.message;
  sound.unusable = Boolean(error.unusable);
  if (sound.unusable) forget(sound.key);
  showRow(sound);
  if (state.sound !== sound) return;
  $("results").hidden = !isDone(sound);
  media.pause();
  showError(error.message);
  announce("");
}

function releaseOld() {
  const held = sounds.filter((sound) => sound.id && isDone(sound) && sound !== state.sound);
  held.sort((a, b) => b.selected - a.selected || b.added - a.added);
  for (const sound of held.slice(HELD)) deleteOnServer(sound);
}

function deleteOnServer(sound) {
  if (sound.id) fetch(`sounds/${sound.id}`, { method: "DELETE", keepalive: true }).catch(() => {});
  sound.id = null;
}

export const deleteAllOnServer = () => sounds.forEach(deleteOnServer);

// the server removes what nobody asks for
export function keepOnServer() {
  for (const sound of sounds) {
    const { id } = sound;
    if (!id) continue;
    fetchJson(`sounds/${id}?first_frame=999999999`).catch((error) => error.status === 404 && handleFailure(sound, error, id));
  }
}
