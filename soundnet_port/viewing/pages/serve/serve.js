// The page of `soundnet-port serve`: its start, and what its buttons, pointer and keys do.

import { forgetColorMaps } from "./drawing.js";
import { readLink, writeLink, writeLinkSoon } from "./link.js";
import { setUpLive, stopLive } from "./live.js";
import { setActions } from "./queue.js";
import { toggleRecording } from "./recording.js";
import { buildPage, draw } from "./results.js";
import { $, announce, createElement, fetchJson, getHeads, getLength, media, NO_SERVER, showError, state } from "./shared.js";
import { addSounds, clearSounds, deleteAllOnServer, findSound, handleFailure, keepOnServer, openSound, playDecoded, removeSound, restoreSounds, selectSound, showMissing } from "./sounds.js";
import { seek, updatePlayhead } from "./timeline.js";
import { describeLayer, drawActivations, forgetUnit, loadActivations, moveUnit, showUnitAt } from "./units.js";

$("choose").addEventListener("click", () => $("file").click());
$("file").addEventListener("change", () => {
  addSounds([...$("file").files]);
  $("file").value = "";
});

$("example").addEventListener("click", async () => {
  try {
    const response = await fetch("example.wav");
    openSound(new File([await response.blob()], "waves, baby, helicopter.wav"));
  } catch {
    showError(NO_SERVER);
  }
});

$("record").addEventListener("click", () => toggleRecording(openSound));

for (const type of ["dragenter", "dragover", "dragleave", "drop"]) {
  document.addEventListener(type, (event) => {
    event.preventDefault();
    document.body.classList.toggle("dropping", type === "dragenter" || type === "dragover");
    if (type !== "drop" || !event.dataTransfer.files.length) return;
    stopLive(); // opens what was heard, before what was dropped
    addSounds([...event.dataTransfer.files]);
  });
}

setActions({ select: (sound) => selectSound(sound), remove: removeSound });
$("clear").addEventListener("click", async () => {
  await clearSounds();
  $("choose").focus();
});

const togglePlayback = () => (media.paused ? media.play().catch(() => {}) : media.pause());
$("play").addEventListener("click", togglePlayback);
media.addEventListener("click", togglePlayback);
for (const type of ["play", "pause"]) {
  media.addEventListener(type, () => ($("play").textContent = media.paused ? "Play" : "Pause"));
}
media.addEventListener("error", () => {
  if (state.sound && media.src === state.sound.url) state.sound.unplayable = true; // played once the server has decoded it
  if (state.sound && state.sound.unplayable && state.results.seconds) playDecoded();
});
media.addEventListener("loadedmetadata", () => {
  media.hidden = !media.videoWidth;
  if (state.sound) draw();
});
for (const type of ["seeked", "timeupdate"]) media.addEventListener(type, updatePlayhead);
for (const type of ["seeked", "pause"]) media.addEventListener(type, writeLinkSoon);

function animate() {
  if (!media.paused) updatePlayhead();
  requestAnimationFrame(animate);
}
requestAnimationFrame(animate);

$("timeline").addEventListener("pointerdown", (event) => {
  const strip = event.target.closest(".strip");
  if (!strip || event.button) return;
  const { left, width } = strip.getBoundingClientRect();
  const timeAt = (x) => ((x - left) / width) * getLength();
  const drag = (moveEvent) => seek(timeAt(moveEvent.clientX));
  seek(timeAt(event.clientX), true);
  strip.addEventListener("pointermove", drag);
  strip.setPointerCapture(event.pointerId);
  for (const type of ["pointerup", "pointercancel"]) {
    strip.addEventListener(type, () => strip.removeEventListener("pointermove", drag), { once: true });
  }
});

for (const type of ["pointermove", "pointerdown"]) {
  $("units-strip").addEventListener(type, (event) => showUnitAt(event.clientX, event.clientY));
}

$("link").addEventListener("click", async () => {
  const kept = state.sound.kept !== false && !$("kept").dataset.nothing;
  writeLink();
  try {
    await navigator.clipboard.writeText(location.href);
    $("link").textContent = kept ? "Copied" : "Copied, until reload";
    announce(`The link to this moment is copied.${kept ? "" : " It works until the page is reloaded, as the sound is not kept."}`);
  } catch {
    $("link").textContent = "Copy the address";
  }
  setTimeout(() => ($("link").textContent = "Copy link"), 2000);
});
window.addEventListener("hashchange", () => {
  const { key, time } = readLink();
  const linked = findSound(key);
  if (key && !linked) showMissing();
  else if (linked && linked !== state.sound) selectSound(linked, time);
  else if (time !== null && (linked || !key)) seek(time);
});

const STEPS = { ArrowLeft: -1, ArrowRight: 1, ArrowDown: -1, ArrowUp: 1, PageDown: -10, PageUp: 10 };
document.addEventListener("keydown", (event) => {
  if (!state.sound || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target === $("units-strip") && moveUnitByKey(event.key)) {
    event.preventDefault();
    return;
  }
  const onSlider = event.target === $("position");
  if (event.target.closest("select, input") || (event.target.closest("button, a") && event.key === " ")) return;
  // up and down scroll the page unless the slider has the focus
  const step = onSlider || /Left|Right/.test(event.key) ? STEPS[event.key] : undefined;
  if (event.key === " ") togglePlayback();
  else if (step) seek((media.currentTime || 0) + step);
  else if (onSlider && event.key === "Home") seek(0);
  else if (onSlider && event.key === "End") seek(getLength());
  else return;
  event.preventDefault();
});

const UNIT_STEPS = { ArrowUp: -1, ArrowDown: 1, PageUp: -10, PageDown: 10, Home: -Infinity, End: Infinity };
function moveUnitByKey(key) {
  if (!(key in UNIT_STEPS)) return false;
  moveUnit(UNIT_STEPS[key]);
  return true;
}

for (const select of ["layer", "order"]) {
  $(select).addEventListener("change", () => {
    describeLayer();
    forgetUnit();
    const { sound } = state;
    const id = sound && sound.id;
    loadActivations().then(drawActivations, (error) => handleFailure(sound, error, id));
  });
}
window.addEventListener("resize", draw);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  forgetColorMaps();
  buildPage();
  draw();
});
window.addEventListener("pagehide", deleteAllOnServer);
window.addEventListener("pageshow", (event) => event.persisted && location.reload()); // its sounds were deleted
setInterval(keepOnServer, 60_000);

// ---- start

try {
  state.network = await fetchJson("network");
  const sizes = getHeads().map((head) => `${state.network.heads[head].length.toLocaleString("en")} ${head}`);
  $("network").textContent = [state.network.name, ...sizes].join(" · ");
  const stay = state.network.local ? " Files stay on this computer." : "";
  $("limits").textContent = `, up to ${state.network.max_megabytes.toLocaleString("en")} MB.${stay}`;
  for (const [name, { units }] of Object.entries(state.network.layers)) {
    const option = createElement("option", `${name} (${units})`);
    option.value = name;
    option.selected = name === "pool5" || name === "conv4";
    $("layer").append(option);
  }
  if (!navigator.mediaDevices) {
    $("record").disabled = true;
    $("record").title = "Browsers allow the microphone only on this computer or with https.";
  }
  setUpLive();
  buildPage();
  describeLayer();
  const { key, time } = readLink();
  await restoreSounds(key, time);
} catch (error) {
  showError(error.message);
}
