// Strips of the last minute of a live sound: columns that come a few at a time, and answers over time.

import { decodeLevels, drawEnvelope, drawLevels, getColor, poolMaxima, prepareCanvas } from "./drawing.js";

// Columns of units, or of mel bands, from 0 up; those that are missing are null.
export class ColumnStrip {
  columns = [];
  start = 0; // seconds, of the first column that is kept
  number = 0; // of that column, since the strip's beginning
  scale = 0; // the value where the colors end

  constructor(seconds) {
    this.seconds = seconds;
  }

  get end() {
    return this.start + this.columns.length * this.step;
  }

  // `base`: when the server's time began
  add({ first, columns: count, units, start, step, largest = 1, levels }, base) {
    const begin = base + start + first * step;
    if (!count) return;
    if (!this.columns.length) Object.assign(this, { start: begin, step, units });
    // after an interruption some are missing, or come again
    for (let gap = Math.round((begin - this.end) / step); gap; gap -= Math.sign(gap)) {
      if (gap > 0) this.columns.push(null);
      else if (this.columns.length) this.columns.pop();
      else this.shift(-1);
    }
    const bytes = decodeLevels(levels);
    for (let column = 0; column < count; column += 1) {
      this.columns.push(Float32Array.from({ length: units }, (_, unit) => largest * (bytes[unit * count + column] / 255) ** 2));
    }
    const surplus = Math.max(0, this.columns.length - Math.ceil(this.seconds / step));
    this.columns.splice(0, surplus);
    this.shift(surplus);
  }

  shift(columns) {
    this.number += columns;
    this.start += columns * this.step;
  }

  // Let the colors end at a percentile of the values above 0, without leaps.
  updateScale(percentile = 0.995, bins = 512) {
    let [largest, total] = [0, 0];
    for (const column of this.columns) if (column) for (const value of column) largest = Math.max(largest, value);
    if (!largest) return;
    const counts = new Uint32Array(bins);
    for (const column of this.columns) {
      if (!column) continue;
      for (const value of column) {
        if (value <= 0) continue;
        counts[Math.min(bins - 1, Math.floor(bins * Math.sqrt(value / largest)))] += 1;
        total += 1;
      }
    }
    let bin = bins - 1;
    for (let above = counts[bin]; bin > 0 && above <= (1 - percentile) * total; above += counts[bin]) bin -= 1;
    const scale = largest * ((bin + 1) / bins) ** 2;
    this.scale = this.scale ? this.scale + 0.2 * (scale - this.scale) : scale;
  }

  // Rows and columns that share a pixel show their maximum. The columns that do stay the same ones as time goes, and move
  // by whole pixels, as maxima would flicker otherwise.
  draw(canvas, from, to, colorName) {
    const context = prepareCanvas(canvas);
    const count = this.columns.length;
    if (!count) return;
    const rows = Math.min(this.units, canvas.height);
    const ratio = canvas.width / canvas.clientWidth;
    const scale = canvas.width / Number((to - from).toFixed(3)); // the same all the time, but for rounding
    const width = Math.min(1, this.step * scale); // of a column in the image, whose pixels are wider if they are few
    const pixel = (number) => Math.floor(number * width);
    const [first, last] = [pixel(this.number), pixel(this.number + count - 1)];
    const columns = last - first + 1;
    const read = (unit, x) => (this.columns[x] ? Math.round(255 * Math.sqrt(Math.min(1, this.columns[x][unit] / (this.scale || 1)))) : 0);
    const levels = poolMaxima(this.units, count, rows, columns, read, (x) => pixel(this.number + x) - first);
    const left = (this.start - from) * scale;
    const [shownLeft, shownWidth] = width < 1 ? [Math.round(left - this.number * width) + first, columns] : [left, count * this.step * scale];
    context.imageSmoothingEnabled = false;
    drawLevels(context, levels, columns, rows, colorName, shownLeft / ratio, shownWidth / ratio, canvas.clientHeight);
  }
}

// The answers of the last minute: all probabilities of a head, as bytes of 255 times their square roots.
export class AnswerHistory {
  answers = []; // {from, to, levels}
  rows = []; // indices of the categories that are drawn

  constructor(seconds, count) {
    this.seconds = seconds;
    this.count = count;
  }

  add(from, to, levels) {
    this.answers.push({ from, to, levels });
    while (this.answers[0].to < to - this.seconds) this.answers.shift();
    this.chooseRows();
  }

  // Keep the categories that are most probable on average. A row changes only when another is much more so.
  chooseRows() {
    const sums = new Float32Array(this.answers[0].levels.length);
    for (const { levels } of this.answers) levels.forEach((level, index) => (sums[index] += level * level));
    const order = [...sums.keys()].sort((a, b) => sums[b] - sums[a]);
    if (this.rows.length < this.count) this.rows = order.slice(0, this.count);
    for (const index of order.slice(0, this.count)) {
      if (this.rows.includes(index)) continue;
      const weakest = this.rows.reduce((a, b) => (sums[b] < sums[a] ? b : a));
      if (sums[index] > 1.3 * sums[weakest]) this.rows[this.rows.indexOf(weakest)] = index;
    }
  }

  // the largest probability
  get peak() {
    const levels = this.answers.flatMap(({ levels }) => this.rows.map((index) => levels[index]));
    return (Math.max(0, ...levels) / 255) ** 2;
  }

  // `end`: the probability at the end of the scale; `top`: above each row's colors
  draw(canvas, from, to, head, end, rowHeight, top) {
    const context = prepareCanvas(canvas, Math.max(1, this.rows.length) * rowHeight);
    const scale = canvas.clientWidth / (to - from);
    this.rows.forEach((index, row) => {
      const [y, height] = [row * rowHeight + top, rowHeight - top - 1];
      context.fillStyle = getColor(head, 0);
      context.fillRect(0, y, canvas.clientWidth, height);
      for (const answer of this.answers) {
        context.fillStyle = getColor(head, (answer.levels[index] / 255) ** 2 / end);
        context.fillRect((answer.from - from) * scale, y, (answer.to - answer.from) * scale + 0.3, height);
      }
    });
  }
}

// `blocks` of a recording, of `seconds` each, the first one at `start`
export function drawLiveWaveform(canvas, blocks, start, seconds, from, to) {
  const context = prepareCanvas(canvas);
  const [width, height] = [canvas.clientWidth, canvas.clientHeight];
  const scale = width / (to - from);
  const first = Math.max(0, Math.floor((from - start) / seconds));
  const columns = blocks.slice(first).map(({ high, low }) => [high, low]);
  drawEnvelope(context, height, columns, (number) => (start + (first + number + 0.5) * seconds - from) * scale);
}
