// What the page does. Names of files and categories reach it as text only.

const $ = (id) => document.getElementById(id);
const media = $("media");
const ROW = 24; // pixels of a category over time, as in serve.css
const SHOWN = 5; // categories of a moment
const EMPTY = { state: "sending", seconds: 0, total: null, repeats: 1, edges: 0, quiet: false, ahead: 0, outline: { step: 1, high: [], low: [] }, heads: {} };

let network = null; // what /network says
let sound = null; // {id, name, file, url, tops: {head: [...]}, heat}, a new object for each sound
let view = EMPTY; // what /sounds/ID said last

// ---- small things

function clock(seconds) {
  const whole = Math.floor(seconds + 1e-6);
  const pad = (number) => String(number).padStart(2, "0");
  const [h, m, s] = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60, whole % 60];
  return h ? `${h}:${pad(m)}:${pad(s)}` : `${m}:${pad(s)}`;
}

function percent(probability) {
  return probability >= 0.0995 ? `${Math.round(100 * probability)} %` : `${(100 * probability).toFixed(1)} %`;
}

function made(kind, text, className) {
  const element = document.createElement(kind);
  if (text !== undefined) element.textContent = text;
  if (className) element.className = className;
  return element;
}

function named(head, index, kind = "span") {
  const label = network.heads[head][index];
  const element = made(kind, label, "label");
  element.title = label;
  return element;
}

function complain(text) {
  $("wrong").textContent = text;
  $("wrong").hidden = !text;
}

async function ask(path, options) {
  let answer;
  try {
    answer = await fetch(path, options);
  } catch {
    throw new Error("The server does not answer. Is soundnet-port serve still running?");
  }
  if (answer.ok) return answer.status === 204 ? null : answer.json();
  const { error } = await answer.json().catch(() => ({}));
  throw new Error(error || `The server answered ${answer.status}.`);
}

const paths = (what = "") => `sounds/${sound.id}${what}`;

// scenes first, as on the original's page
const heads = () => Object.keys(network.heads).sort().reverse();

// ---- colours: 256 of them from a list of stops

const ramps = {};

function ramp(name) {
  if (ramps[name]) return ramps[name];
  const text = getComputedStyle(document.documentElement).getPropertyValue(`--${name}`);
  const stops = text.trim().split(/\s+/).map((hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16)));
  const colours = Array.from({ length: 256 }, (_, step) => {
    const at = (step / 255) * (stops.length - 1);
    const low = Math.min(Math.floor(at), stops.length - 2);
    return stops[low].map((value, i) => Math.round(value + (at - low) * (stops[low + 1][i] - value)));
  });
  return (ramps[name] = colours);
}

// the square root lets small probabilities be seen, of which there are many among 1000 objects
const shade = (name, value) => `rgb(${ramp(name)[Math.round(255 * Math.sqrt(Math.min(1, Math.max(0, value))))].join(" ")})`;

function context(canvas, height) {
  const scale = window.devicePixelRatio || 1;
  const width = canvas.clientWidth;
  if (height) canvas.style.height = `${height}px`;
  canvas.width = Math.round(width * scale);
  canvas.height = Math.round((height || canvas.clientHeight) * scale);
  const drawn = canvas.getContext("2d");
  drawn.scale(canvas.width / width, scale);
  return drawn;
}

function legend(name, ticks) {
  const shown = made("span", undefined, "legend");
  const canvas = made("canvas");
  canvas.width = 256;
  canvas.height = 1;
  const drawn = canvas.getContext("2d");
  for (let x = 0; x < 256; x += 1) {
    drawn.fillStyle = shade(name, x / 255);
    drawn.fillRect(x, 0, 1, 1);
  }
  shown.append(made("span", ticks[0]), canvas, made("span", ticks[1]));
  return shown;
}

// ---- time

const finite = (seconds) => (Number.isFinite(seconds) && seconds > 0 ? seconds : null);

// of the whole sound; while it is not known, what was heard
function length() {
  if (view.state === "done") return view.seconds;
  return Math.max(view.total || finite(media.duration) || 0, view.seconds) || 1;
}

const frameAt = (seconds, count) =>
  Math.max(0, Math.min(count - 1, Math.round((seconds - network.frame.center) / network.frame.step)));

function seek(seconds, play = false) {
  if (!sound) return;
  media.currentTime = Math.max(0, Math.min(seconds, length()));
  if (play) media.play().catch(() => {});
  moved();
}

// ---- drawing

function drawWaveform() {
  const canvas = $("waveform");
  const { step, high, low } = view.outline;
  const drawn = context(canvas);
  const [width, height] = [canvas.clientWidth, canvas.clientHeight];
  const reach = Math.max(0.01, ...high, ...low) * 1.05;
  drawn.fillStyle = getComputedStyle(document.documentElement).getPropertyValue("--wave");
  const wide = (step * width) / length();
  const tall = height / 2 / reach;
  drawn.beginPath(); // along the highest samples, and back along the lowest
  high.forEach((value, column) => drawn.lineTo((column + 0.5) * wide, height / 2 - 0.4 - value * tall));
  low.forEach((_, turned) => {
    const column = low.length - 1 - turned;
    drawn.lineTo((column + 0.5) * wide, height / 2 + 0.4 + low[column] * tall);
  });
  drawn.fill();
  $("axis").replaceChildren(
    ...ticks(length(), width).map((seconds) => {
      const tick = made("span", clock(seconds));
      tick.style.insetInlineStart = `${(100 * seconds) / length()}%`;
      return tick;
    }),
  );
}

function ticks(seconds, width) {
  const steps = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200];
  const step = steps.find((each) => (each / seconds) * width > 70) || 7200;
  return Array.from({ length: Math.floor(seconds / step) + 1 }, (_, number) => number * step).filter(
    (each) => each === 0 || (each / seconds) * width < width - 14,
  );
}

function drawTrack(head, shown) {
  const canvas = shown.querySelector(".strip canvas");
  const { rows } = view.heads[head];
  const drawn = context(canvas, Math.max(1, rows.length) * ROW);
  const scale = canvas.clientWidth / length();
  const { center, step } = network.frame;
  const done = view.state === "done";
  drawn.fillStyle = shade(head, 0);
  drawn.fillRect(0, 0, canvas.clientWidth, canvas.clientHeight);
  rows.forEach(([, track], row) => {
    track.forEach((value, frame) => {
      // every moment has the colour of the frame whose center is nearest
      const from = frame ? center + (frame - 0.5) * step : 0;
      const to = done && frame === track.length - 1 ? length() : center + (frame + 0.5) * step;
      drawn.fillStyle = shade(head, value);
      drawn.fillRect(from * scale, row * ROW + 1, (to - from) * scale + 0.3, ROW - 2);
    });
  });
}

function drawTracks() {
  for (const head of heads()) {
    const shown = $(`track-${head}`);
    const { rows } = view.heads[head] || { rows: [] };
    shown.querySelector(".names").replaceChildren(...rows.map(([index]) => named(head, index, "li")));
    if (view.heads[head]) drawTrack(head, shown);
  }
}

function drawHeat() {
  const heat = sound && sound.heat;
  const canvas = $("heat");
  const drawn = context(canvas);
  if (!heat || !heat.columns) return;
  const scale = canvas.clientWidth / length();
  const [left, width] = [heat.first * scale, heat.columns * heat.step * scale];
  const rows = Math.min(heat.units, canvas.height);
  const columns = Math.min(heat.columns, Math.ceil((width * canvas.width) / canvas.clientWidth));
  const values = largest(Uint8Array.from(atob(heat.values), (each) => each.charCodeAt(0)), heat, rows, columns);
  const picture = new ImageData(columns, rows);
  const colours = new Uint32Array(new Uint8Array(ramp("heat").flatMap((colour) => [...colour, 255])).buffer);
  new Uint32Array(picture.data.buffer).set(Uint32Array.from(values, (value) => colours[value]));
  const small = new OffscreenCanvas(columns, rows);
  small.getContext("2d").putImageData(picture, 0, 0);
  drawn.imageSmoothingEnabled = false;
  drawn.drawImage(small, left, 0, width, canvas.clientHeight);
}

// the largest of the units and columns that share a pixel: few units of conv7 are ever above 0
function largest(bytes, { units, columns: wide }, rows, columns) {
  const values = new Uint8Array(rows * columns);
  for (let unit = 0; unit < units; unit += 1) {
    const row = Math.floor((unit * rows) / units) * columns;
    for (let column = 0; column < wide; column += 1) {
      const at = row + Math.floor((column * columns) / wide);
      values[at] = Math.max(values[at], bytes[unit * wide + column]);
    }
  }
  return values;
}

function bars(head, list) {
  const shown = made("ol", undefined, "bars");
  for (const [index, probability] of list) {
    const item = made("li");
    item.append(named(head, index), bar(head, probability), made("span", percent(probability), "number"));
    shown.append(item);
  }
  return shown;
}

function bar(head, probability) {
  const outer = made("span", undefined, "bar");
  const inner = made("i");
  inner.style.width = `${100 * probability}%`;
  inner.style.background = shade(head, 0.45);
  outer.append(inner);
  return outer;
}

function pairs(flat) {
  return Array.from({ length: flat.length / 2 }, (_, at) => [flat[2 * at], flat[2 * at + 1]]);
}

// what moves with the playhead; lists only where another frame has become the nearest
function moved() {
  const now = media.currentTime || 0;
  const fraction = Math.min(1, now / length());
  $("cursor").style.setProperty("--at", fraction);
  $("time").textContent = `${clock(now)} / ${clock(length())}`;
  $("now-time").textContent = clock(now);
  const position = $("position");
  position.setAttribute("aria-valuemax", length().toFixed(1));
  position.setAttribute("aria-valuenow", Math.min(now, length()).toFixed(1));
  const best = [];
  for (const head of heads()) {
    const tops = sound.tops[head];
    const place = $(`now-${head}`);
    const frame = tops.length ? frameAt(now, tops.length) : -1;
    const shown = tops.length ? pairs(tops[frame]).slice(0, SHOWN) : [];
    if (shown.length) best.push(network.heads[head][shown[0][0]]);
    if (place.dataset.frame === String(frame)) continue;
    place.dataset.frame = frame;
    place.replaceChildren(frame < 0 ? made("p", "listening …", "quiet") : bars(head, shown));
  }
  position.setAttribute("aria-valuetext", [`${clock(now)} of ${clock(length())}`, ...best].join(", "));
}

function drawTables() {
  $("tables").replaceChildren(
    ...heads().map((head) => {
      const { clip } = view.heads[head] || { clip: [] };
      const table = made("table");
      table.append(made("caption", head));
      const top = made("tr");
      for (const text of ["Category", "", "Probability"]) {
        const cell = text ? made("th", text) : made("td");
        if (text) cell.scope = "col";
        top.append(cell);
      }
      const [header, body] = [made("thead"), made("tbody")];
      header.append(top);
      for (const [index, probability] of clip) {
        const [row, middle] = [made("tr"), made("td")];
        middle.append(bar(head, probability));
        row.append(named(head, index, "td"), middle, made("td", percent(probability)));
        body.append(row);
      }
      table.append(header, body);
      return table;
    }),
  );
}

function draw() {
  if (!sound || $("heard").hidden) return;
  drawWaveform();
  drawTracks();
  drawHeat();
  drawTables();
  describe();
  for (const head of heads()) delete $(`now-${head}`).dataset.frame;
  moved();
}

function describe() {
  const { state, seconds, repeats, edges, quiet, ahead } = view;
  const done = state === "done";
  const of = length() > seconds ? ` of ${clock(length())}` : "";
  const texts = {
    sending: "Sending …",
    waiting: ahead ? `Waiting, ${ahead} before this one` : "Waiting",
    computing: `Heard ${clock(seconds)}${of}`,
  };
  $("going").hidden = !(state in texts);
  $("so-far").textContent = texts[state] || "";
  if (state === "computing" && of) $("progress").value = seconds / length();
  else $("progress").removeAttribute("value");
  $("downloads").hidden = !done || !network.frame;
  const notes = [];
  if (repeats > 1) {
    notes.push(`At ${seconds.toFixed(1)} s the clip is too short: it was played ${repeats} times in a row. Times are those of the first playing.`);
  }
  if (network.frame) {
    notes.push(`A frame hears ${network.frame.hears.toFixed(1)} s around where it is drawn, and there is one every ${network.frame.step.toFixed(1)} s.`);
    if (edges) notes.push(`The last one hears zeros after the end; this edge frame is ${network.edge_frames ? "shown all the same" : "left out"}.`);
  } else {
    notes.push("These weights have no heads: they cannot name sounds, but here is what their layers do.");
  }
  if (quiet) notes.push("The sound is quiet: the network learned from louder ones and may answer amiss.");
  $("note").textContent = notes.join(" ");
}

// ---- a sound's way

async function open(file) {
  if (!network) return;
  forget();
  complain("");
  if (file.size > network.megabytes * 1e6) {
    complain(`${file.name}: larger than ${network.megabytes.toLocaleString("en")} MB, the most that is taken here.`);
    return;
  }
  const mine = { id: null, name: file.name, url: URL.createObjectURL(file), tops: {}, heat: null, unplayable: false };
  for (const head of heads()) mine.tops[head] = [];
  [sound, view] = [mine, EMPTY];
  document.body.classList.remove("empty");
  $("heard").hidden = false;
  $("cursor").hidden = false;
  $("name").textContent = file.name;
  $("said").textContent = `Listening to ${file.name}`;
  media.hidden = true;
  media.src = mine.url;
  draw();
  try {
    const { id } = await ask(`sounds?name=${encodeURIComponent(file.name)}`, { method: "POST", body: file });
    mine.id = id;
    if (sound !== mine) {
      remove(mine);
      return;
    }
    await follow(mine);
  } catch (error) {
    if (sound !== mine) return;
    forget();
    complain(error.message);
    $("said").textContent = "";
  }
}

async function follow(mine) {
  for (let pause = 80; ; pause = Math.min(500, pause * 1.3)) {
    const since = Math.max(0, ...Object.values(mine.tops).map((tops) => tops.length));
    const news = await ask(`sounds/${mine.id}?since=${since}`);
    if (sound !== mine) return;
    if (news.state === "failed") throw new Error(news.error);
    view = news;
    if (mine.unplayable && news.seconds) playServers();
    for (const [head, { tops }] of Object.entries(news.heads)) mine.tops[head].push(...tops);
    if (news.state === "done" || news.seconds > (mine.drawn || 0)) {
      mine.drawn = news.seconds;
      await lookAtLayer();
      if (sound !== mine) return;
    }
    draw();
    if (news.state === "done") break;
    await new Promise((resolve) => setTimeout(resolve, pause));
  }
  for (const link of document.querySelectorAll("#downloads a")) link.href = paths(`/${link.dataset.what}`);
  if (media.duration === Infinity) playServers(); // a recording: it says no duration, and cannot be sought in
  const best = heads().map((head) => `${head}: ${network.heads[head][view.heads[head].clip[0][0]]}`);
  $("said").textContent = ["All heard", ...best].join(", ");
}

async function lookAtLayer() {
  const [mine, layer] = [sound, $("layer").value];
  if (!mine || !mine.id) return;
  const heat = await ask(paths(`/heat?layer=${encodeURIComponent(layer)}`));
  if (sound !== mine || layer !== $("layer").value) return;
  mine.heat = heat;
  const scale = legend("heat", ["0", heat.largest.toPrecision(3)]);
  const edge = heat.edges && !network.edge_frames ? "; the edge frame at the end left out" : "";
  $("heat-says").replaceChildren(made("span", `${heat.units} units, the first on top${edge}`), scale);
}

// the sound as the server decodes it, for what the browser cannot play
function playServers() {
  const [at, playing] = [media.currentTime || 0, !media.paused];
  sound.unplayable = false;
  media.src = paths("/sound.wav");
  media.currentTime = at;
  if (playing) media.play().catch(() => {});
}

function remove(which) {
  if (which.id) fetch(`sounds/${which.id}`, { method: "DELETE", keepalive: true }).catch(() => {});
  URL.revokeObjectURL(which.url);
}

function forget() {
  if (!sound) return;
  const last = sound;
  sound = null;
  view = EMPTY;
  media.pause();
  media.removeAttribute("src");
  media.load();
  $("heard").hidden = true;
  document.body.classList.add("empty");
  remove(last);
}

// ---- what the user does

$("choose").addEventListener("click", () => $("file").click());
$("file").addEventListener("change", () => {
  if ($("file").files.length) open($("file").files[0]);
  $("file").value = "";
});

$("example").addEventListener("click", async () => {
  try {
    const answer = await fetch("example.wav");
    open(new File([await answer.blob()], "waves, baby, helicopter.wav"));
  } catch {
    complain("The server does not answer. Is soundnet-port serve still running?");
  }
});

let recorder = null;
$("record").addEventListener("click", async () => {
  if (recorder) {
    recorder.stop();
    return;
  }
  complain("");
  let microphone;
  try {
    const audio = { echoCancellation: false, noiseSuppression: false, autoGainControl: false };
    microphone = await navigator.mediaDevices.getUserMedia({ audio });
  } catch (error) {
    complain(`The microphone cannot be used: ${error.message}`);
    return;
  }
  const parts = [];
  const began = Date.now();
  recorder = new MediaRecorder(microphone);
  recorder.addEventListener("dataavailable", (event) => parts.push(event.data));
  const button = $("record");
  const timer = setInterval(() => (button.textContent = `Stop (${clock((Date.now() - began) / 1000)})`), 250);
  button.textContent = "Stop (0:00)";
  button.classList.add("recording");
  recorder.addEventListener("stop", () => {
    clearInterval(timer);
    for (const track of microphone.getTracks()) track.stop();
    const kind = recorder.mimeType || "audio/webm";
    const suffix = kind.includes("mp4") ? "mp4" : kind.includes("ogg") ? "ogg" : "webm";
    recorder = null;
    button.textContent = "Record";
    button.classList.remove("recording");
    open(new File(parts, `recording.${suffix}`, { type: kind }));
  });
  recorder.start(1000);
});

for (const kind of ["dragenter", "dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    document.body.classList.toggle("dropping", kind === "dragenter" || kind === "dragover");
    if (kind === "drop" && event.dataTransfer.files.length) open(event.dataTransfer.files[0]);
  });
}

const toggle = () => (media.paused ? media.play().catch(() => {}) : media.pause());
$("play").addEventListener("click", toggle);
media.addEventListener("click", toggle);
for (const kind of ["play", "pause"]) {
  media.addEventListener(kind, () => ($("play").textContent = media.paused ? "Play" : "Pause"));
}
media.addEventListener("error", () => {
  if (sound && media.src === sound.url) sound.unplayable = true; // once the server knows the sound, it plays that
  if (sound && sound.unplayable && view.seconds) playServers();
});
media.addEventListener("loadedmetadata", () => {
  media.hidden = !media.videoWidth;
  if (sound) draw();
});
for (const kind of ["seeked", "timeupdate"]) media.addEventListener(kind, () => sound && moved());

function run() {
  if (sound && !media.paused) moved();
  requestAnimationFrame(run);
}
requestAnimationFrame(run);

$("timeline").addEventListener("pointerdown", (event) => {
  const strip = event.target.closest(".strip");
  if (!strip || event.button) return;
  const { left, width } = strip.getBoundingClientRect();
  const at = (x) => ((x - left) / width) * length();
  const drag = (moving) => seek(at(moving.clientX));
  seek(at(event.clientX), true);
  strip.addEventListener("pointermove", drag);
  strip.setPointerCapture(event.pointerId);
  for (const kind of ["pointerup", "pointercancel"]) {
    strip.addEventListener(kind, () => strip.removeEventListener("pointermove", drag), { once: true });
  }
});

const MOVES = { ArrowLeft: -1, ArrowRight: 1, ArrowDown: -1, ArrowUp: 1, PageDown: -10, PageUp: 10 };
document.addEventListener("keydown", (event) => {
  if (!sound || event.ctrlKey || event.metaKey || event.altKey) return;
  const slider = event.target === $("position");
  if (event.target.closest("select, input") || (event.target.closest("button, a") && event.key === " ")) return;
  // up and down scroll the page, except from the waveform
  const move = slider || /Left|Right/.test(event.key) ? MOVES[event.key] : undefined;
  if (event.key === " ") toggle();
  else if (move) seek((media.currentTime || 0) + move);
  else if (slider && event.key === "Home") seek(0);
  else if (slider && event.key === "End") seek(length());
  else return;
  event.preventDefault();
});

$("layer").addEventListener("change", () => lookAtLayer().then(drawHeat, (error) => complain(error.message)));
window.addEventListener("resize", draw);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  for (const name of Object.keys(ramps)) delete ramps[name];
  begin();
  draw();
});
window.addEventListener("pagehide", () => sound && remove(sound));
window.addEventListener("pageshow", (event) => event.persisted && location.reload()); // its sound is gone
setInterval(() => sound && sound.id && fetch(paths("?since=999999999")).catch(() => {}), 60_000); // it is still looked at

// ---- the beginning

function begin() {
  $("tracks").replaceChildren(
    ...heads().map((head) => {
      const row = made("div", undefined, "row track");
      row.id = `track-${head}`;
      const title = made("h3", head);
      title.append(legend(head, ["0", "1"]));
      const strip = made("div", undefined, "strip");
      const canvas = made("canvas");
      canvas.setAttribute("role", "img");
      canvas.setAttribute("aria-label", `Probabilities of ${head} over time`);
      strip.append(canvas);
      row.append(title, made("ol", undefined, "names"), strip);
      return row;
    }),
  );
  $("now-lists").replaceChildren(
    ...heads().map((head) => {
      const [list, place] = [made("div"), made("div")];
      place.id = `now-${head}`;
      list.append(made("h4", head), place);
      return list;
    }),
  );
  $("now").hidden = $("whole").hidden = !heads().length;
}

try {
  network = await ask("network");
  const sizes = heads().map((head) => `${network.heads[head].length.toLocaleString("en")} ${head}`);
  $("network").textContent = [`${network.name} listens`, ...sizes].join(" · ");
  const stay = network.local ? " Files stay on this computer." : "";
  $("limits").textContent = `, up to ${network.megabytes.toLocaleString("en")} MB.${stay}`;
  for (const [name, units] of Object.entries(network.layers)) {
    const option = made("option", `${name} (${units})`);
    option.value = name;
    option.selected = name === "pool5" || name === "conv4";
    $("layer").append(option);
  }
  if (!navigator.mediaDevices) {
    $("record").disabled = true;
    $("record").title = "Browsers give the microphone to pages of this computer or with https only.";
  }
  begin();
} catch (error) {
  complain(error.message);
}
