// File and category names are inserted as text only, never as HTML.

const $ = (id) => document.getElementById(id);
const media = $("media");
const NO_SERVER = "The server does not respond. Is soundnet-port serve still running?";
const ROW_HEIGHT = 24; // pixels of a category's track, as in serve.css
const TOP = 5; // categories listed at the playhead
const NO_RESULTS = {
  state: "sending", seconds: 0, announced_seconds: null, repeats: 1, edge_frames: 0, quiet: false, ahead: 0,
  waveform: { step: 1, high: [], low: [] }, heads: {},
};

let network = null; // from /network
let sound = null; // {id, url, frames: {head: [...]}, activations, ...}, a new object for each sound
let results = NO_RESULTS; // the last response of /sounds/ID

// ---- helpers

function formatTime(seconds) {
  const rounded = Math.floor(seconds + 1e-6);
  const pad = (number) => String(number).padStart(2, "0");
  const [h, m, s] = [Math.floor(rounded / 3600), Math.floor(rounded / 60) % 60, rounded % 60];
  return h ? `${h}:${pad(m)}:${pad(s)}` : `${m}:${pad(s)}`;
}

function formatPercent(probability) {
  return probability >= 0.0995 ? `${Math.round(100 * probability)} %` : `${(100 * probability).toFixed(1)} %`;
}

function createElement(tag, text, className) {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  if (className) element.className = className;
  return element;
}

function createLabel(head, index, tag = "span") {
  const label = network.heads[head][index];
  const element = createElement(tag, label, "label");
  element.title = label;
  return element;
}

function showError(text) {
  $("error").textContent = text;
  $("error").hidden = !text;
}

async function fetchJson(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch {
    throw new Error(NO_SERVER);
  }
  if (response.ok) return response.json();
  const { error } = await response.json().catch(() => ({}));
  throw new Error(error || `The server responded with status ${response.status}.`);
}

const getPath = (suffix = "") => `sounds/${sound.id}${suffix}`;

// scenes first, as on the original's page
const getHeads = () => Object.keys(network.heads).sort().reverse();

// ---- color maps: 256 colors from a list of stops

const colorMaps = {};

function getColorMap(name) {
  if (colorMaps[name]) return colorMaps[name];
  const text = getComputedStyle(document.documentElement).getPropertyValue(`--${name}`);
  const stops = text.trim().split(/\s+/).map((hex) => [1, 3, 5].map((start) => parseInt(hex.slice(start, start + 2), 16)));
  const colors = Array.from({ length: 256 }, (_, step) => {
    const position = (step / 255) * (stops.length - 1);
    const low = Math.min(Math.floor(position), stops.length - 2);
    return stops[low].map((value, i) => Math.round(value + (position - low) * (stops[low + 1][i] - value)));
  });
  return (colorMaps[name] = colors);
}

// the square root makes small probabilities visible, which are common among 1000 objects
const getColor = (name, value) => `rgb(${getColorMap(name)[Math.round(255 * Math.sqrt(Math.min(1, Math.max(0, value))))].join(" ")})`;

function prepareCanvas(canvas, height) {
  const scale = window.devicePixelRatio || 1;
  const width = canvas.clientWidth;
  if (height) canvas.style.height = `${height}px`;
  canvas.width = Math.round(width * scale);
  canvas.height = Math.round((height || canvas.clientHeight) * scale);
  const context = canvas.getContext("2d");
  context.scale(canvas.width / width, scale);
  return context;
}

function createLegend(name, labels) {
  const legend = createElement("span", undefined, "legend");
  const canvas = createElement("canvas");
  canvas.width = 256;
  canvas.height = 1;
  const context = canvas.getContext("2d");
  for (let x = 0; x < 256; x += 1) {
    context.fillStyle = getColor(name, x / 255);
    context.fillRect(x, 0, 1, 1);
  }
  legend.append(createElement("span", labels[0]), canvas, createElement("span", labels[1]));
  return legend;
}

// ---- time

// in seconds; while it is unknown, of what was analyzed
function getLength() {
  if (results.state === "done") return results.seconds;
  return Math.max(results.announced_seconds || (Number.isFinite(media.duration) ? media.duration : 0), results.seconds) || 1;
}

const findFrame = (seconds, count) =>
  Math.max(0, Math.min(count - 1, Math.round((seconds - network.frame.center) / network.frame.step)));

function seek(seconds, play = false) {
  if (!sound) return;
  media.currentTime = Math.max(0, Math.min(seconds, getLength()));
  if (play) media.play().catch(() => {});
  updatePlayhead();
}

// ---- drawing

function drawWaveform() {
  const canvas = $("waveform");
  const { step, high, low } = results.waveform;
  const context = prepareCanvas(canvas);
  const [width, height] = [canvas.clientWidth, canvas.clientHeight];
  const limit = Math.max(0.01, ...high, ...low) * 1.05;
  context.fillStyle = getComputedStyle(document.documentElement).getPropertyValue("--wave");
  const columnWidth = (step * width) / getLength();
  const scale = height / 2 / limit;
  context.beginPath(); // along the maxima, and back along the minima
  high.forEach((value, column) => context.lineTo((column + 0.5) * columnWidth, height / 2 - 0.4 - value * scale));
  low.forEach((_, number) => {
    const column = low.length - 1 - number;
    context.lineTo((column + 0.5) * columnWidth, height / 2 + 0.4 + low[column] * scale);
  });
  context.fill();
  $("axis").replaceChildren(
    ...computeTicks(getLength(), width).map((seconds) => {
      const tick = createElement("span", formatTime(seconds));
      tick.style.insetInlineStart = `${(100 * seconds) / getLength()}%`;
      return tick;
    }),
  );
}

function computeTicks(seconds, width) {
  const steps = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200];
  const step = steps.find((candidate) => (candidate / seconds) * width > 70) || 7200;
  return Array.from({ length: Math.floor(seconds / step) + 1 }, (_, number) => number * step).filter(
    (tick) => tick === 0 || (tick / seconds) * width < width - 14,
  );
}

function drawHeadTracks(head, row) {
  const canvas = row.querySelector(".strip canvas");
  const { tracks } = results.heads[head];
  const context = prepareCanvas(canvas, Math.max(1, tracks.length) * ROW_HEIGHT);
  const scale = canvas.clientWidth / getLength();
  const { center, step } = network.frame;
  const done = results.state === "done";
  context.fillStyle = getColor(head, 0);
  context.fillRect(0, 0, canvas.clientWidth, canvas.clientHeight);
  tracks.forEach(([, track], number) => {
    track.forEach((value, frame) => {
      // each moment has the color of the frame whose center is nearest
      const from = frame ? center + (frame - 0.5) * step : 0;
      const to = done && frame === track.length - 1 ? getLength() : center + (frame + 0.5) * step;
      context.fillStyle = getColor(head, value);
      context.fillRect(from * scale, number * ROW_HEIGHT + 1, (to - from) * scale + 0.3, ROW_HEIGHT - 2);
    });
  });
}

function drawTracks() {
  for (const head of getHeads()) {
    const row = $(`track-${head}`);
    const { tracks } = results.heads[head] || { tracks: [] };
    row.querySelector(".names").replaceChildren(...tracks.map(([index]) => createLabel(head, index, "li")));
    if (results.heads[head]) drawHeadTracks(head, row);
  }
}

function drawActivations() {
  const activations = sound && sound.activations;
  const canvas = $("activations");
  const context = prepareCanvas(canvas);
  if (!activations || !activations.columns) return;
  const scale = canvas.clientWidth / getLength();
  const [left, width] = [activations.start * scale, activations.columns * activations.step * scale];
  const rows = Math.min(activations.units, canvas.height);
  const columns = Math.min(activations.columns, Math.ceil((width * canvas.width) / canvas.clientWidth));
  const bytes = Uint8Array.from(atob(activations.levels), (letter) => letter.charCodeAt(0));
  const levels = poolLevels(bytes, activations, rows, columns);
  const image = new ImageData(columns, rows);
  const colors = new Uint32Array(
    new Uint8Array(getColorMap("activations").flatMap((color) => [...color, 255])).buffer,
  );
  new Uint32Array(image.data.buffer).set(Uint32Array.from(levels, (level) => colors[level]));
  const small = new OffscreenCanvas(columns, rows);
  small.getContext("2d").putImageData(image, 0, 0);
  context.imageSmoothingEnabled = false;
  context.drawImage(small, left, 0, width, canvas.clientHeight);
}

// maxima of the units and columns that share a pixel, as few units of conv7 are ever above 0
function poolLevels(bytes, { units, columns: width }, rows, columns) {
  const levels = new Uint8Array(rows * columns);
  for (let unit = 0; unit < units; unit += 1) {
    const row = Math.floor((unit * rows) / units) * columns;
    for (let column = 0; column < width; column += 1) {
      const pixel = row + Math.floor((column * columns) / width);
      levels[pixel] = Math.max(levels[pixel], bytes[unit * width + column]);
    }
  }
  return levels;
}

function createBars(head, categories) {
  const list = createElement("ol", undefined, "bars");
  for (const [index, probability] of categories) {
    const item = createElement("li");
    item.append(createLabel(head, index), createBar(head, probability), createElement("span", formatPercent(probability), "number"));
    list.append(item);
  }
  return list;
}

function createBar(head, probability) {
  const outer = createElement("span", undefined, "bar");
  const inner = createElement("i");
  inner.style.width = `${100 * probability}%`;
  inner.style.background = getColor(head, 0.45);
  outer.append(inner);
  return outer;
}

function toPairs(flat) {
  return Array.from({ length: flat.length / 2 }, (_, number) => flat.slice(2 * number, 2 * number + 2));
}

// lists change only when another frame is the nearest
function updatePlayhead() {
  const now = media.currentTime || 0;
  const fraction = Math.min(1, now / getLength());
  $("cursor").style.setProperty("--at", fraction);
  $("time").textContent = `${formatTime(now)} / ${formatTime(getLength())}`;
  $("now-time").textContent = formatTime(now);
  const position = $("position");
  position.setAttribute("aria-valuemax", getLength().toFixed(1));
  position.setAttribute("aria-valuenow", Math.min(now, getLength()).toFixed(1));
  const best = [];
  for (const head of getHeads()) {
    const frames = sound.frames[head];
    const container = $(`now-${head}`);
    const frame = frames.length ? findFrame(now, frames.length) : -1;
    const categories = frames.length ? toPairs(frames[frame]).slice(0, TOP) : [];
    if (categories.length) best.push(network.heads[head][categories[0][0]]);
    if (container.dataset.frame === String(frame)) continue;
    container.dataset.frame = frame;
    container.replaceChildren(frame < 0 ? createElement("p", "analyzing …", "quiet") : createBars(head, categories));
  }
  position.setAttribute("aria-valuetext", [`${formatTime(now)} of ${formatTime(getLength())}`, ...best].join(", "));
}

function drawTables() {
  $("tables").replaceChildren(
    ...getHeads().map((head) => {
      const { clip } = results.heads[head] || { clip: [] };
      const table = createElement("table");
      table.append(createElement("caption", head));
      const titles = createElement("tr");
      for (const text of ["Category", "", "Probability"]) {
        const cell = text ? createElement("th", text) : createElement("td");
        if (text) cell.scope = "col";
        titles.append(cell);
      }
      const [header, body] = [createElement("thead"), createElement("tbody")];
      header.append(titles);
      for (const [index, probability] of clip) {
        const [row, middle] = [createElement("tr"), createElement("td")];
        middle.append(createBar(head, probability));
        row.append(createLabel(head, index, "td"), middle, createElement("td", formatPercent(probability)));
        body.append(row);
      }
      table.append(header, body);
      return table;
    }),
  );
}

function draw() {
  if (!sound || $("results").hidden) return;
  drawWaveform();
  drawTracks();
  drawActivations();
  drawTables();
  describeState();
  for (const head of getHeads()) delete $(`now-${head}`).dataset.frame;
  updatePlayhead();
}

function describeState() {
  const { state, seconds, repeats, edge_frames: edgeFrames, quiet, ahead } = results;
  const done = state === "done";
  const total = getLength() > seconds ? ` of ${formatTime(getLength())}` : "";
  const texts = {
    sending: "Sending …",
    waiting: ahead ? `Waiting, ${ahead} ahead of this one` : "Waiting",
    computing: `Analyzed ${formatTime(seconds)}${total}`,
  };
  $("status").hidden = !(state in texts);
  $("progress-text").textContent = texts[state] || "";
  if (state === "computing" && total) $("progress").value = seconds / getLength();
  else $("progress").removeAttribute("value");
  $("downloads").hidden = !done || !network.frame;
  const notes = [];
  if (repeats > 1) {
    notes.push(`The clip is short (${seconds.toFixed(1)} s), so it was played ${repeats} times in a row. Times refer to the first.`);
  }
  if (network.frame) {
    notes.push(`Each frame covers ${network.frame.length.toFixed(1)} s around its position; there is one every ${network.frame.step.toFixed(1)} s.`);
    if (edgeFrames) notes.push(`The last one covers zeros after the end; this edge frame is ${network.edge_frames ? "shown" : "left out"}.`);
  } else {
    notes.push("This network has no heads, so it cannot name sounds; its layers are shown below.");
  }
  if (quiet) notes.push("The sound is quiet: the network was trained on louder sounds, so its results may be wrong.");
  $("note").textContent = notes.join(" ");
}

// ---- sending a sound and following its analysis

async function openSound(file) {
  if (!network) return;
  closeSound();
  showError("");
  if (file.size > network.max_megabytes * 1e6) {
    showError(`${file.name}: larger than ${network.max_megabytes.toLocaleString("en")} MB, the limit of this server.`);
    return;
  }
  const opened = { id: null, url: URL.createObjectURL(file), frames: {}, activations: null, unplayable: false };
  for (const head of getHeads()) opened.frames[head] = [];
  [sound, results] = [opened, NO_RESULTS];
  document.body.classList.remove("empty");
  $("results").hidden = false;
  $("cursor").hidden = false;
  $("name").textContent = file.name;
  $("announcement").textContent = `Analyzing ${file.name}`;
  media.hidden = true;
  media.src = opened.url;
  draw();
  try {
    const { id } = await fetchJson(`sounds?name=${encodeURIComponent(file.name)}`, { method: "POST", body: file });
    opened.id = id;
    if (sound !== opened) {
      deleteSound(opened);
      return;
    }
    await followAnalysis(opened);
  } catch (error) {
    if (sound !== opened) return;
    closeSound();
    showError(error.message);
    $("announcement").textContent = "";
  }
}

async function followAnalysis(followed) {
  for (let pause = 80; ; pause = Math.min(500, pause * 1.3)) {
    const first = Math.max(0, ...Object.values(followed.frames).map((frames) => frames.length));
    const response = await fetchJson(`sounds/${followed.id}?first_frame=${first}`);
    if (sound !== followed) return;
    if (response.state === "failed") throw new Error(response.error);
    results = response;
    if (followed.unplayable && results.seconds) playDecoded();
    for (const [head, { frames }] of Object.entries(results.heads)) followed.frames[head].push(...frames);
    if (results.state === "done" || results.seconds > (followed.drawnSeconds || 0)) {
      followed.drawnSeconds = results.seconds;
      await loadActivations();
      if (sound !== followed) return;
    }
    draw();
    if (results.state === "done") break;
    await new Promise((resolve) => setTimeout(resolve, pause));
  }
  for (const link of document.querySelectorAll("#downloads a")) link.href = getPath(`/${link.dataset.file}`);
  if (media.duration === Infinity) playDecoded(); // a recording: has no duration, so it cannot be sought in
  const best = getHeads().map((head) => `${head}: ${network.heads[head][results.heads[head].clip[0][0]]}`);
  $("announcement").textContent = ["Done", ...best].join(", ");
}

async function loadActivations() {
  const [current, layer] = [sound, $("layer").value];
  if (!current || !current.id) return;
  const activations = await fetchJson(getPath(`/activations?layer=${encodeURIComponent(layer)}`));
  if (sound !== current || layer !== $("layer").value) return;
  current.activations = activations;
  const scale = createLegend("activations", ["0", activations.largest.toPrecision(3)]);
  const note = activations.edge_frames && !network.edge_frames ? "; the edge frame at the end is left out" : "";
  $("activations-caption").replaceChildren(
    createElement("span", `${activations.units} units, the first on top${note}`), scale,
  );
}

// for sounds that the browser cannot play
function playDecoded() {
  const [time, playing] = [media.currentTime || 0, !media.paused];
  sound.unplayable = false;
  media.src = getPath("/sound.wav");
  media.currentTime = time;
  if (playing) media.play().catch(() => {});
}

function deleteSound({ id, url }) {
  if (id) fetch(`sounds/${id}`, { method: "DELETE", keepalive: true }).catch(() => {});
  URL.revokeObjectURL(url);
}

function closeSound() {
  if (!sound) return;
  const last = sound;
  sound = null;
  results = NO_RESULTS;
  media.pause();
  media.removeAttribute("src");
  media.load();
  $("results").hidden = true;
  document.body.classList.add("empty");
  deleteSound(last);
}

// ---- events

$("choose").addEventListener("click", () => $("file").click());
$("file").addEventListener("change", () => {
  if ($("file").files.length) openSound($("file").files[0]);
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

let recorder = null;
$("record").addEventListener("click", async () => {
  if (recorder) {
    recorder.stop();
    return;
  }
  showError("");
  let microphone;
  try {
    const audio = { echoCancellation: false, noiseSuppression: false, autoGainControl: false };
    microphone = await navigator.mediaDevices.getUserMedia({ audio });
  } catch (error) {
    showError(`The microphone cannot be used: ${error.message}`);
    return;
  }
  const parts = [];
  const start = Date.now();
  recorder = new MediaRecorder(microphone);
  recorder.addEventListener("dataavailable", (event) => parts.push(event.data));
  const button = $("record");
  const timer = setInterval(() => (button.textContent = `Stop (${formatTime((Date.now() - start) / 1000)})`), 250);
  button.textContent = "Stop (0:00)";
  button.classList.add("recording");
  recorder.addEventListener("stop", () => {
    clearInterval(timer);
    for (const track of microphone.getTracks()) track.stop();
    const type = recorder.mimeType || "audio/webm";
    const suffix = type.includes("mp4") ? "mp4" : type.includes("ogg") ? "ogg" : "webm";
    recorder = null;
    button.textContent = "Record";
    button.classList.remove("recording");
    openSound(new File(parts, `recording.${suffix}`, { type }));
  });
  recorder.start(1000);
});

for (const type of ["dragenter", "dragover", "dragleave", "drop"]) {
  document.addEventListener(type, (event) => {
    event.preventDefault();
    document.body.classList.toggle("dropping", type === "dragenter" || type === "dragover");
    if (type === "drop" && event.dataTransfer.files.length) openSound(event.dataTransfer.files[0]);
  });
}

const togglePlayback = () => (media.paused ? media.play().catch(() => {}) : media.pause());
$("play").addEventListener("click", togglePlayback);
media.addEventListener("click", togglePlayback);
for (const type of ["play", "pause"]) {
  media.addEventListener(type, () => ($("play").textContent = media.paused ? "Play" : "Pause"));
}
media.addEventListener("error", () => {
  if (sound && media.src === sound.url) sound.unplayable = true; // played once the server has decoded it
  if (sound && sound.unplayable && results.seconds) playDecoded();
});
media.addEventListener("loadedmetadata", () => {
  media.hidden = !media.videoWidth;
  if (sound) draw();
});
for (const type of ["seeked", "timeupdate"]) media.addEventListener(type, () => sound && updatePlayhead());

function animate() {
  if (sound && !media.paused) updatePlayhead();
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

const STEPS = { ArrowLeft: -1, ArrowRight: 1, ArrowDown: -1, ArrowUp: 1, PageDown: -10, PageUp: 10 };
document.addEventListener("keydown", (event) => {
  if (!sound || event.ctrlKey || event.metaKey || event.altKey) return;
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

$("layer").addEventListener("change", () => loadActivations().then(drawActivations, (error) => showError(error.message)));
window.addEventListener("resize", draw);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  for (const name of Object.keys(colorMaps)) delete colorMaps[name];
  buildPage();
  draw();
});
window.addEventListener("pagehide", () => sound && deleteSound(sound));
window.addEventListener("pageshow", (event) => event.persisted && location.reload()); // its sound was deleted
setInterval(() => sound && sound.id && fetch(getPath("?first_frame=999999999")).catch(() => {}), 60_000); // keeps the sound on the server

// ---- start

function buildPage() {
  $("tracks").replaceChildren(
    ...getHeads().map((head) => {
      const row = createElement("div", undefined, "row track");
      row.id = `track-${head}`;
      const title = createElement("h3", head);
      title.append(createLegend(head, ["0", "1"]));
      const strip = createElement("div", undefined, "strip");
      const canvas = createElement("canvas");
      canvas.setAttribute("role", "img");
      canvas.setAttribute("aria-label", `Probabilities of ${head} over time`);
      strip.append(canvas);
      row.append(title, createElement("ol", undefined, "names"), strip);
      return row;
    }),
  );
  $("now-lists").replaceChildren(
    ...getHeads().map((head) => {
      const [section, container] = [createElement("div"), createElement("div")];
      container.id = `now-${head}`;
      section.append(createElement("h4", head), container);
      return section;
    }),
  );
  $("now").hidden = $("clip").hidden = !getHeads().length;
}

try {
  network = await fetchJson("network");
  const sizes = getHeads().map((head) => `${network.heads[head].length.toLocaleString("en")} ${head}`);
  $("network").textContent = [network.name, ...sizes].join(" · ");
  const stay = network.local ? " Files stay on this computer." : "";
  $("limits").textContent = `, up to ${network.max_megabytes.toLocaleString("en")} MB.${stay}`;
  for (const [name, units] of Object.entries(network.layers)) {
    const option = createElement("option", `${name} (${units})`);
    option.value = name;
    option.selected = name === "pool5" || name === "conv4";
    $("layer").append(option);
  }
  if (!navigator.mediaDevices) {
    $("record").disabled = true;
    $("record").title = "Browsers allow the microphone only on this computer or with https.";
  }
  buildPage();
} catch (error) {
  showError(error.message);
}
