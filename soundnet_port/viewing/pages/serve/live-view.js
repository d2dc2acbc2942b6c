// What is shown while the microphone is live.

import { createBar, createLabel, createLegend, decodeLevels, getColor, getStyle } from "./drawing.js";
import { AnswerHistory, ColumnStrip, drawLiveWaveform } from "./live-strips.js";
import { BLOCK } from "./live-recording.js";
import { $, createElement, findScale, formatDuration, formatPercent, getHeads, state } from "./shared.js";

const SECONDS = 60; // that are drawn; half of that on narrow screens
const NARROW = 480; // pixels
const TOP = 5; // categories listed, and drawn over time
const LOWEST = -80; // dB, the left end of the level
const ANNOUNCE = 5000; // ms between what screen readers are told

let warnings = {};
let announced = { time: 0, text: "" };

export function buildLive() {
  const view = { power: 0, delays: [], histories: {} };
  for (const head of getHeads()) view.histories[head] = new AnswerHistory(SECONDS, TOP);
  view.spectrogram = Object.assign(new ColumnStrip(SECONDS), { next: 0 });
  view.resetUnits = () => (view.units = Object.assign(new ColumnStrip(SECONDS), { next: 0 }));
  view.resetUnits();
  view.begin = (session) => beginView(view, session);
  $("live-lists").replaceChildren(
    ...getHeads().map((head) => {
      const [section, title, list] = [createElement("div"), createElement("div", undefined, "title"), createElement("ol", undefined, "bars")];
      list.id = `live-${head}`;
      title.append(createElement("h3", head), createElement("span", "", "scale"));
      section.append(title, list);
      return section;
    }),
  );
  $("live-tracks").replaceChildren(
    ...getHeads().map((head) => {
      const row = createElement("div", undefined, "row track");
      row.id = `live-track-${head}`;
      const title = createElement("h3", head);
      title.append(createElement("span", "", "legend"));
      const [strip, canvas] = [createElement("div", undefined, "strip"), createElement("canvas")];
      canvas.setAttribute("role", "img");
      canvas.setAttribute("aria-label", `Probabilities of ${head} in the last minute`);
      strip.append(canvas);
      row.append(title, createElement("ol", undefined, "names"), strip);
      return row;
    }),
  );
  if (!$("live-layer").options.length) {
    for (const option of $("layer").options) $("live-layer").append(option.cloneNode(true));
    $("live-layer").value = $("layer").value;
  }
  return view;
}

function beginView(view, session) {
  view.spectrogram.next = view.units.next = 0; // the server counts from its beginning
  if ($("live-window").options.length) return;
  for (const seconds of session.windows) {
    const option = createElement("option", `the last ${Math.round(seconds)} s`);
    option.value = seconds;
    option.selected = seconds === session.window;
    $("live-window").append(option);
  }
  const meter = $("live-meter");
  meter.setAttribute("aria-valuemin", LOWEST);
  for (const [name, level] of [["quiet", session.quiet], ["normalized", session.normalized]]) {
    meter.style.setProperty(`--${name}-at`, 1 - level / LOWEST);
  }
}

export function clearLive() {
  warnings = {};
  announced = { time: 0, text: "" };
  for (const id of ["live-warning", "live-announcement", "live-delay", "live-hears"]) $(id).textContent = "";
  $("live").classList.remove("too-quiet");
}

// Show or, without a text, withdraw a warning of some kind.
export function showWarning(kind, text) {
  warnings[kind] = text;
  const shown = Object.values(warnings).filter(Boolean).join(" ");
  if ($("live-warning").textContent !== shown) $("live-warning").textContent = shown;
}

// of a block; the meter falls slowly
export function showLevel({ view, recording }, power) {
  const decay = Math.exp(-BLOCK / recording.rate / 0.3);
  view.power = decay * view.power + (1 - decay) * power;
  const level = Math.max(LOWEST, 10 * Math.log10(view.power + 1e-12));
  const meter = $("live-meter");
  meter.style.setProperty("--level", 1 - level / LOWEST);
  meter.setAttribute("aria-valuenow", Math.round(level));
  meter.setAttribute("aria-valuetext", `${Math.round(level)} dB of full scale`);
  $("live-decibels").textContent = level > LOWEST ? `${Math.round(level)} dB`.replace("-", "−") : "silence";
}

// `from` and `to`: seconds since the recording's beginning, what is new in the answer
export function showAnswer({ view, session, base }, { answer, spectrogram, units }, from, to) {
  for (const [strip, columns] of [[view.spectrogram, spectrogram], [view.units, units]]) {
    if (columns.layer && columns.layer !== $("live-layer").value) continue; // another has been chosen meanwhile
    strip.add(columns, base);
    strip.next = columns.first + columns.columns;
  }
  view.units.updateScale();
  view.to = to;
  if (!answer) {
    $("live-hears").textContent = getHeads().length ? "Listening …" : "This network has no heads, so it cannot name sounds.";
    return;
  }
  for (const head of getHeads()) {
    const { top, levels } = answer.heads[head];
    view.histories[head].add(from, to, decodeLevels(levels));
    showBars($(`live-${head}`), head, top.slice(0, TOP), findScale(view.histories[head].peak));
  }
  describe(answer, session);
  announce(answer);
}

function describe({ seconds, repeats, level, quiet }, session) {
  const repeated = repeats > 1 ? `, played ${repeats} times in a row as short clips are` : "";
  $("live-hears").textContent = `The answers hear the last ${seconds.toFixed(1)} s${repeated}.`;
  const normalized = $("live-normalize").checked;
  $("live").classList.toggle("too-quiet", quiet && !normalized);
  if (level === null) {
    showWarning("quiet", "The microphone gives digital silence. Is it muted, or another one selected?");
  } else if (quiet && !normalized) {
    const typical = Math.abs(session.normalized);
    showWarning("quiet", `Too quiet for the network: below −${Math.abs(session.quiet)} dB, where it was trained at −${typical} dB or so. Come closer, turn the microphone up, or choose “Raise quiet sound”.`);
  } else {
    showWarning("quiet", "");
  }
}

function announce({ heads }) {
  const text = getHeads().map((head) => `${head}: ${state.network.heads[head][heads[head].top[0][0]]}`).join(", ");
  if (text === announced.text || Date.now() - announced.time < ANNOUNCE) return;
  announced = { time: Date.now(), text };
  $("live-announcement").textContent = text;
}

// Bars grow and change places smoothly: a category keeps its element.
function showBars(list, head, categories, scale) {
  list.previousSibling.querySelector(".scale").textContent = `full bar: ${formatPercent(scale)}`;
  const items = new Map([...list.children].map((item) => [Number(item.dataset.index), item]));
  const before = new Map([...items].map(([index, item]) => [index, item.offsetTop]));
  for (const [index, item] of items) if (!categories.some(([kept]) => kept === index)) item.remove();
  categories.forEach(([index, probability], rank) => {
    let item = items.get(index);
    if (!item) {
      item = createElement("li");
      item.dataset.index = index;
      item.append(createLabel(head, index), createBar(head, 0), createElement("span", "", "number"));
      list.append(item);
    }
    item.style.order = item.dataset.rank = rank;
    Object.assign(item.querySelector(".bar i").style, {
      width: `${100 * Math.min(1, probability / scale)}%`,
      background: getColor(head, 0.45), // dark and light may change
    });
    item.querySelector(".number").textContent = formatPercent(probability);
  });
  if (matchMedia("(prefers-reduced-motion: reduce)").matches) return;
  for (const item of list.children) {
    const [from, options] = [before.get(Number(item.dataset.index)), { duration: 150, easing: "ease-out" }];
    if (from === undefined) item.animate([{ opacity: 0 }, { opacity: 1 }], options);
    else if (from !== item.offsetTop) item.animate([{ transform: `translateY(${from - item.offsetTop}px)` }, { transform: "none" }], options);
  }
}

// From the oldest and the newest of the samples that an answer was the first to hear, to its picture. The resampler
// holds back the last ones, by `delay` seconds.
export function showDelay({ view }, times, { delay }) {
  view.delays.push(times.map((time) => (Date.now() - time) / 1000 + delay));
  view.delays.splice(0, view.delays.length - 20);
  const [oldest, newest] = [0, 1].map((number) => median(view.delays.map((pair) => pair[number])));
  const element = $("live-delay");
  Object.assign(element.dataset, { oldest: oldest.toFixed(3), newest: newest.toFixed(3) });
  element.textContent = `From sound to screen: ${newest.toFixed(2)} to ${oldest.toFixed(2)} s.`;
}

const median = (values) => values.sort((a, b) => a - b)[Math.floor(values.length / 2)];

export function drawLive({ view, recording }) {
  const to = recording.end / recording.rate;
  const from = to - ($("live-waveform").clientWidth < NARROW ? SECONDS / 2 : SECONDS);
  const block = BLOCK / recording.rate;
  drawLiveWaveform($("live-waveform"), recording.blocks, recording.dropped * block, block, from, to);
  view.spectrogram.draw($("live-spectrogram"), from, to, "spectrogram");
  view.units.draw($("live-units"), from, to, "activations");
  const [rowHeight, top] = ["--row-height", "--row-top"].map((name) => parseFloat(getStyle(name, $("live-timeline"))));
  for (const head of getHeads()) {
    const [row, history] = [$(`live-track-${head}`), view.histories[head]];
    const end = findScale(history.peak);
    row.querySelector(".legend").replaceWith(createLegend(head, ["0", formatPercent(end)]));
    if (history.rows.join() !== row.dataset.rows) {
      row.dataset.rows = history.rows.join();
      row.querySelector(".names").replaceChildren(...history.rows.map((index) => createLabel(head, index, "li")));
    }
    history.draw(row.querySelector(".strip canvas"), from, to, head, end, rowHeight, top);
  }
  drawAxis(to - from);
  const { scale } = view.units;
  const { length, step } = state.network.layers[$("live-layer").value];
  $("live-units-caption").replaceChildren(
    createElement("span", `Unit 0 is on top. Each value hears ${formatDuration(length)}; there is one every ${formatDuration(step)}.`),
    ...(scale ? [createLegend("activations", ["0", `≥ ${scale.toPrecision(2)}`])] : []),
  );
}

function drawAxis(seconds) {
  if ($("live-axis").dataset.seconds === String(seconds)) return;
  $("live-axis").dataset.seconds = seconds;
  $("live-axis").replaceChildren(
    ...(seconds < SECONDS ? [1, 0.5, 0] : [1, 0.75, 0.5, 0.25, 0]).map((fraction) => {
      const tick = createElement("span", fraction ? `−${seconds * fraction} s` : "now");
      tick.style.insetInlineStart = `${100 * (1 - fraction)}%`;
      return tick;
    }),
  );
}
