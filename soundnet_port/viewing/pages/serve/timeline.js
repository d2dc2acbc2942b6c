// Everything over time but the units: waveform, spectrogram, categories and the playhead.

import { createBars, createLabel, countPixels, createLegend, decodeLevels, drawEnvelope, drawLevels, getColor, getStyle, poolMaxima, prepareCanvas, toPairs } from "./drawing.js";
import { $, createElement, fetchJson, findFrame, findScale, formatPercent, formatPosition, formatTime, getHeads, getLength, getPath, media, state } from "./shared.js";

const TOP = 5; // categories listed at the playhead
const FREQUENCIES = [10000, 5000, 2000, 1000, 500]; // Hz, beside the spectrogram

export function seek(seconds, play = false) {
  if (!state.sound) return;
  media.currentTime = Math.max(0, Math.min(seconds, getLength()));
  if (play) media.play().catch(() => {});
  updatePlayhead();
}

export function drawWaveform() {
  const canvas = $("waveform");
  const { step, high, low } = state.results.waveform;
  const context = prepareCanvas(canvas);
  const [width, height] = [canvas.clientWidth, canvas.clientHeight];
  const columnWidth = (step * width) / getLength();
  drawEnvelope(context, height, high.map((value, column) => [value, -low[column]]), (column) => (column + 0.5) * columnWidth);
  const length = getLength();
  $("axis").replaceChildren(
    ...computeTicks(length, width).map((seconds) => {
      const tick = createElement("span", length < 60 ? `${Number(seconds.toFixed(1))} s` : formatTime(seconds));
      tick.style.insetInlineStart = `${(100 * seconds) / length}%`;
      return tick;
    }),
  );
}

function computeTicks(seconds, width) {
  const steps = [0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200];
  const step = steps.find((candidate) => (candidate / seconds) * width > 70) || 7200;
  return Array.from({ length: Math.floor(seconds / step) + 1 }, (_, number) => number * step).filter(
    (tick) => tick === 0 || (tick / seconds) * width < width - 18,
  );
}

export async function loadSpectrogram() {
  const current = state.sound;
  if (!current || !current.id) return;
  const spectrogram = await fetchJson(getPath("/spectrogram"));
  current.spectrogram = { ...spectrogram, levels: decodeLevels(spectrogram.levels) };
}

export function drawSpectrogram() {
  const spectrogram = state.sound && state.sound.spectrogram;
  const canvas = $("spectrogram");
  const context = prepareCanvas(canvas);
  $("spectrogram-legend").replaceChildren();
  $("frequencies").replaceChildren();
  if (!spectrogram || !spectrogram.columns) return;
  const { levels, columns, bands, start, step, range, frequencies } = spectrogram;
  const scale = canvas.clientWidth / getLength();
  const width = columns * step * scale;
  const [shownRows, shownColumns] = [Math.min(bands, canvas.height), countPixels(canvas, columns, width)];
  const pooled = poolMaxima(bands, columns, shownRows, shownColumns, (band, column) => levels[band * columns + column]);
  context.imageSmoothingEnabled = shownColumns === columns; // it would average maxima
  context.imageSmoothingQuality = "high";
  drawLevels(context, pooled, shownColumns, shownRows, "spectrogram", start * scale, width, canvas.clientHeight);
  $("spectrogram-legend").append(createLegend("spectrogram", [`−${range}`, "0 dB"], true));
  const mel = (hertz) => Math.log10(1 + hertz / 700);
  const [low, high] = frequencies.map(mel);
  $("frequencies").append(
    ...FREQUENCIES.map((hertz) => {
      const label = createElement("span", hertz < 1000 ? `${hertz} Hz` : `${hertz / 1000} kHz`);
      label.style.insetBlockStart = `${(100 * (high - mel(hertz))) / (high - low)}%`;
      return label;
    }),
  );
}

// the probability at the end of a head's scale: the next round one above the largest of all frames
const getScale = (head) => findScale((state.sound && state.sound.peaks[head]) || 1);

function drawHeadTracks(head, row) {
  const canvas = row.querySelector(".strip canvas");
  const { tracks } = state.results.heads[head];
  // on narrow screens names are above their colors
  const [rowHeight, top] = ["--row-height", "--row-top"].map((name) => parseFloat(getStyle(name, $("timeline"))));
  const context = prepareCanvas(canvas, Math.max(1, tracks.length) * rowHeight);
  const scale = canvas.clientWidth / getLength();
  const { center, step } = state.network.frame;
  const done = state.results.state === "done";
  const end = getScale(head);
  tracks.forEach(([, track], number) => {
    const [y, height] = [number * rowHeight + top, rowHeight - top - 1];
    context.fillStyle = getColor(head, 0);
    context.fillRect(0, y, canvas.clientWidth, height);
    track.forEach((value, frame) => {
      // each moment has the color of the frame whose center is nearest
      const from = frame ? center + (frame - 0.5) * step : 0;
      const to = done && frame === track.length - 1 ? getLength() : center + (frame + 0.5) * step;
      context.fillStyle = getColor(head, value / end);
      context.fillRect(from * scale, y, (to - from) * scale + 0.3, height);
    });
  });
}

export function drawTracks() {
  for (const head of getHeads()) {
    const row = $(`track-${head}`);
    const { tracks } = state.results.heads[head] || { tracks: [] };
    row.querySelector(".names").replaceChildren(...tracks.map(([index]) => createLabel(head, index, "li")));
    row.querySelector(".legend").replaceWith(createLegend(head, ["0", formatPercent(getScale(head))]));
    if (state.results.heads[head]) drawHeadTracks(head, row);
  }
}

// lists change only when another frame is the nearest
export function updatePlayhead() {
  if (!state.sound) return;
  const [now, length] = [media.currentTime || 0, getLength()];
  const [nowText, lengthText] = [formatPosition(now, length), formatPosition(length)];
  $("timeline").style.setProperty("--at", Math.min(1, now / length));
  $("time").textContent = `${formatPosition(now, length, "")} / ${lengthText}`;
  $("now-time").textContent = nowText;
  const position = $("position");
  position.setAttribute("aria-valuemax", length.toFixed(1));
  position.setAttribute("aria-valuenow", Math.min(now, length).toFixed(1));
  const best = [];
  for (const head of getHeads()) {
    const frames = state.sound.frames[head];
    const container = $(`now-${head}`);
    const frame = frames.length ? findFrame(now, frames.length) : -1;
    const categories = frames.length ? toPairs(frames[frame]).slice(0, TOP) : [];
    if (categories.length) best.push(state.network.heads[head][categories[0][0]]);
    if (container.dataset.frame === String(frame)) continue;
    container.dataset.frame = frame;
    const scale = getScale(head);
    $(`now-scale-${head}`).textContent = frame < 0 ? "" : `full bar: ${formatPercent(scale)}`;
    container.replaceChildren(frame < 0 ? createElement("p", "analyzing …", "quiet") : createBars(head, categories, scale));
  }
  position.setAttribute("aria-valuetext", [`${nowText} of ${lengthText}`, ...best].join(", "));
}
