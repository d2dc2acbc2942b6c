// Color maps, canvases, legends and bars.

import { createElement, formatPercent, state } from "./shared.js";

const colorMaps = {}; // 256 colors each, from a list of stops

function getColorMap(name) {
  if (colorMaps[name]) return colorMaps[name];
  const stops = getStyle(`--${name}`).split(/\s+/).map((hex) => [1, 3, 5].map((start) => parseInt(hex.slice(start, start + 2), 16)));
  const colors = Array.from({ length: 256 }, (_, step) => {
    const position = (step / 255) * (stops.length - 1);
    const low = Math.min(Math.floor(position), stops.length - 2);
    return stops[low].map((value, i) => Math.round(value + (position - low) * (stops[low + 1][i] - value)));
  });
  return (colorMaps[name] = colors);
}

// after a change between light and dark
export function forgetColorMaps() {
  for (const name of Object.keys(colorMaps)) delete colorMaps[name];
}

export const getStyle = (property, element = document.documentElement) => getComputedStyle(element).getPropertyValue(property).trim();

const clip = (value) => Math.min(1, Math.max(0, value));
const toColor = (name, fraction) => `rgb(${getColorMap(name)[Math.round(255 * clip(fraction))].join(" ")})`;

// the square root makes small probabilities visible, which are common among 1000 objects
export const getColor = (name, value) => toColor(name, Math.sqrt(clip(value)));

export function prepareCanvas(canvas, height) {
  const scale = window.devicePixelRatio || 1;
  const width = canvas.clientWidth;
  if (height) canvas.style.height = `${height}px`;
  canvas.width = Math.round(width * scale);
  canvas.height = Math.round((height || canvas.clientHeight) * scale);
  const context = canvas.getContext("2d");
  context.scale(canvas.width / width, scale);
  return context;
}

// how many columns can be told apart in a width, at least a pixel each
export const countPixels = (canvas, columns, width) =>
  Math.max(1, Math.min(columns, Math.floor((width * canvas.width) / canvas.clientWidth)));

// Fewer rows and columns: maxima of the values that share a pixel, as what is rare would vanish in averages.
// `read(row, column)`: a value, 0 to 255; `findPixel(column)`: where a column is in the pooled ones
export function poolMaxima(height, width, rows, columns, read, findPixel = (column) => Math.floor((column * columns) / width)) {
  const pixels = Uint32Array.from({ length: width }, (_, column) => findPixel(column));
  const pooled = new Uint8Array(rows * columns);
  for (let row = 0; row < height; row += 1) {
    const start = Math.floor((row * rows) / height) * columns;
    for (let column = 0; column < width; column += 1) {
      const pixel = start + pixels[column];
      pooled[pixel] = Math.max(pooled[pixel], read(row, column));
    }
  }
  return pooled;
}

// bytes from 0 to 255 as an image of so many columns
export function drawLevels(context, levels, columns, rows, colorName, left, width, height) {
  const colors = new Uint32Array(new Uint8Array(getColorMap(colorName).flatMap((color) => [...color, 255])).buffer);
  const image = new ImageData(columns, rows);
  new Uint32Array(image.data.buffer).set(Uint32Array.from(levels, (level) => colors[level]));
  const small = new OffscreenCanvas(columns, rows);
  small.getContext("2d").putImageData(image, 0, 0);
  context.drawImage(small, left, 0, width, height);
}

// A waveform from [highest, lowest] sample of its columns; `x(column)`: where one is
export function drawEnvelope(context, height, columns, x) {
  const limit = columns.reduce((most, [high, low]) => Math.max(most, high, -low), 0.01) * 1.05;
  const y = (value) => (height / 2) * (1 - value / limit);
  context.fillStyle = getStyle("--wave");
  context.beginPath(); // along the maxima, and back along the minima
  columns.forEach(([high], column) => context.lineTo(x(column), y(high) - 0.4));
  for (let column = columns.length - 1; column >= 0; column -= 1) context.lineTo(x(column), y(columns[column][1]) + 0.4);
  context.fill();
}

export function drawHatching(context, left, right, height) {
  if (right - left < 4) return; // less is no frame, but rounding
  context.save();
  context.beginPath();
  context.rect(left, 0, right - left, height);
  context.clip();
  context.strokeStyle = getStyle("--hatching");
  context.lineWidth = 1;
  context.beginPath();
  for (let x = left - height; x < right; x += 6) {
    context.moveTo(x, height);
    context.lineTo(x + height, 0);
  }
  context.stroke();
  context.restore();
}

export const decodeLevels = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));

// `linear`: of levels, not of values whose square roots are the levels
export function createLegend(name, labels, linear = false) {
  const legend = createElement("span", undefined, "legend");
  const canvas = createElement("canvas");
  canvas.width = 256;
  canvas.height = 1;
  const context = canvas.getContext("2d");
  for (let x = 0; x < 256; x += 1) {
    context.fillStyle = linear ? toColor(name, x / 255) : getColor(name, x / 255);
    context.fillRect(x, 0, 1, 1);
  }
  legend.append(createElement("span", labels[0]), canvas, createElement("span", labels[1]));
  return legend;
}

export function createLabel(head, index, tag = "span") {
  const label = state.network.heads[head][index];
  const element = createElement(tag, label, "label");
  element.title = label;
  return element;
}

// `scale` is the probability of a full bar
export function createBar(head, probability, scale = 1) {
  const outer = createElement("span", undefined, "bar");
  const inner = createElement("i");
  inner.style.width = `${100 * clip(probability / scale)}%`;
  inner.style.background = getColor(head, 0.45);
  outer.append(inner);
  return outer;
}

export function createBars(head, categories, scale = 1) {
  const list = createElement("ol", undefined, "bars");
  for (const [index, probability] of categories) {
    const item = createElement("li");
    item.append(createLabel(head, index), createBar(head, probability, scale), createElement("span", formatPercent(probability), "number"));
    list.append(item);
  }
  return list;
}

export function toPairs(flat) {
  return Array.from({ length: flat.length / 2 }, (_, number) => flat.slice(2 * number, 2 * number + 2));
}
