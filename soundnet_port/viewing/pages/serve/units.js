// A layer's units over time, and the one under the pointer.

import { countPixels, createLegend, decodeLevels, drawHatching, drawLevels, poolMaxima, prepareCanvas } from "./drawing.js";
import { $, createElement, fetchJson, formatDuration, formatPosition, getLength, getPath, media, state } from "./shared.js";

let row = 0; // of the unit that was chosen with keys

export async function loadActivations() {
  const [current, layer, order] = [state.sound, $("layer").value, $("order").value];
  if (!current || !current.id) return;
  const activations = await fetchJson(getPath(`/activations?layer=${encodeURIComponent(layer)}&order=${order}`));
  if (layer !== $("layer").value || order !== $("order").value) return;
  const shown = activations.order || Array.from({ length: activations.units }, (_, unit) => unit);
  current.activations = { ...activations, layer, shown, levels: decodeLevels(activations.levels) };
}

export function describeLayer() {
  const { length, step } = state.network.layers[$("layer").value];
  $("layer-words").textContent = `Each value hears ${formatDuration(length)}; there is one every ${formatDuration(step)}.`;
}

export function drawActivations() {
  const activations = state.sound && state.sound.activations;
  const canvas = $("activations");
  const context = prepareCanvas(canvas);
  describeActivations(activations);
  if (activations) $("units-strip").setAttribute("aria-valuemax", Math.max(1, activations.shown.length));
  if (!activations || !activations.columns) return;
  const [width, height] = [canvas.clientWidth, canvas.clientHeight];
  const scale = width / getLength();
  const [left, mapWidth] = [activations.start * scale, activations.columns * activations.step * scale];
  const rows = Math.min(activations.shown.length, canvas.height);
  const columns = countPixels(canvas, activations.columns, mapWidth);
  if (rows) {
    context.imageSmoothingEnabled = false;
    drawLevels(context, poolLevels(activations, rows, columns), columns, rows, "activations", left, mapWidth, height);
  }
  if (state.results.state !== "done") return;
  drawHatching(context, 0, left, height);
  const end = activations.edge_start === null ? left + mapWidth : activations.edge_start * scale;
  drawHatching(context, Math.min(end, width), width, height);
}

// the color of levels where pixels show maxima, as few units of conv7 are ever above 0
function poolLevels({ levels, columns: width, shown, largest, scale }, rows, columns) {
  const gain = Math.sqrt(largest / (scale || 1));
  const colors = Uint8Array.from({ length: 256 }, (_, level) => Math.min(255, Math.round(level * gain)));
  return poolMaxima(shown.length, width, rows, columns, (row, column) => colors[levels[shown[row] * width + column]]);
}

function describeActivations(activations) {
  if (!activations || !activations.columns) {
    $("activations-caption").replaceChildren();
    return;
  }
  const { units, inactive, order, scale, largest, edge_frames: edgeFrames } = activations;
  const count = (number) => number.toLocaleString("en");
  const sentences = [];
  if (inactive) sentences.push(`${count(inactive)} of ${count(units)} units ${inactive === 1 ? "is" : "are"} never active${order ? ", and left out" : ""}.`);
  else sentences.push(`${count(units)} units, all active.`);
  sentences.push(order ? "The first is on top." : "Unit 0 is on top.");
  if (edgeFrames) sentences.push(`Hatched: edge frame, ${state.network.edge_frames ? "not in the scale" : "left out"}.`);
  const legend = createLegend("activations", ["0", largest > scale ? `≥ ${formatValue(scale)}` : formatValue(scale)]);
  legend.title = "The scale ends where 99.5 % of the values above 0 are below.";
  $("activations-caption").replaceChildren(createElement("span", sentences.join(" ")), legend);
}

const formatValue = (value) => (value >= 100 ? value.toFixed(0) : Number(value.toPrecision(value >= 1 ? 3 : 2)).toString());

// the most active of the units from one row up to another, at a time
function describeUnit(first, last, seconds) {
  const { shown, columns, start, step, levels, largest, edge_start: edgeStart } = state.sound.activations;
  const column = Math.floor((seconds - start) / step);
  const at = formatPosition(seconds, getLength());
  if (column < 0 || column >= columns || (edgeStart !== null && seconds >= edgeStart)) return `no ordinary frame at ${at}`;
  const level = (unit) => levels[unit * columns + column];
  const units = shown.slice(first, last);
  const best = units.reduce((unit, other) => (level(other) > level(unit) ? other : unit), units[0]);
  const among = units.length > 1 ? `, largest of ${units.length} units here` : "";
  return `unit ${best} · ${formatValue(largest * (level(best) / 255) ** 2)} at ${at}${among}`;
}

export function showUnitAt(clientX, clientY) {
  const { sound } = state;
  if (!sound || !sound.activations || !sound.activations.shown.length) return;
  const { left, top, width, height } = $("activations").getBoundingClientRect();
  const [count, rows] = [sound.activations.shown.length, Math.min(sound.activations.shown.length, $("activations").height)];
  const pixel = Math.max(0, Math.min(rows - 1, Math.floor(((clientY - top) / height) * rows)));
  row = Math.ceil((pixel * count) / rows);
  $("unit").textContent = describeUnit(row, Math.max(row + 1, Math.ceil(((pixel + 1) * count) / rows)), ((clientX - left) / width) * getLength());
  markRow();
}

export function moveUnit(step) {
  const { sound } = state;
  if (!sound || !sound.activations || !sound.activations.shown.length) return;
  row = Math.max(0, Math.min(sound.activations.shown.length - 1, row + step));
  const text = describeUnit(row, row + 1, media.currentTime || 0);
  $("unit").textContent = text;
  const strip = $("units-strip");
  strip.setAttribute("aria-valuenow", row + 1);
  strip.setAttribute("aria-valuetext", text);
  markRow();
}

function markRow() {
  $("unit-mark").hidden = false;
  $("unit-mark").style.insetBlockStart = `${(100 * (row + 0.5)) / state.sound.activations.shown.length}%`;
}

export function forgetUnit() {
  row = 0;
  $("unit").textContent = "";
  $("unit-mark").hidden = true;
  const strip = $("units-strip");
  strip.setAttribute("aria-valuemax", state.network.layers[$("layer").value].units);
  strip.setAttribute("aria-valuenow", 1);
  strip.removeAttribute("aria-valuetext");
}
