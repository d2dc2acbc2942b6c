// What is shown of the sound: lists, tables, and the state of its analysis in words.

import { createBar, createLabel, createLegend } from "./drawing.js";
import { $, createElement, findScale, formatDuration, formatPercent, formatPosition, formatTime, getHeads, getLength, getPath, state } from "./shared.js";
import { drawSpectrogram, drawTracks, drawWaveform, updatePlayhead } from "./timeline.js";
import { drawActivations } from "./units.js";

export function buildPage() {
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
      const [title, scale] = [createElement("div", undefined, "title"), createElement("span", "", "scale")];
      scale.id = `now-scale-${head}`;
      title.append(createElement("h4", head), scale);
      section.append(title, container);
      return section;
    }),
  );
  $("now").hidden = $("clip").hidden = !getHeads().length;
}

export function draw() {
  if (!state.sound || $("results").hidden) return;
  describeState();
  for (const head of getHeads()) delete $(`now-${head}`).dataset.frame;
  updatePlayhead();
  drawTables();
  drawTracks();
  drawWaveform();
  drawSpectrogram();
  drawActivations();
}

function drawTables() {
  $("tables").replaceChildren(
    ...getHeads().map((head) => {
      const { clip } = state.results.heads[head] || { clip: [] };
      const scale = findScale(clip.length ? clip[0][1] : 1);
      const table = createElement("table");
      const caption = createElement("caption", head);
      if (clip.length) caption.append(createElement("span", `full bar: ${formatPercent(scale)}`, "scale"));
      table.append(caption);
      const [header, titles, body] = ["thead", "tr", "tbody"].map((tag) => createElement(tag));
      for (const text of ["Category", "Probability"]) {
        const cell = createElement("th", text);
        cell.scope = "col";
        titles.append(cell);
      }
      header.append(titles);
      for (const [index, probability] of clip) {
        const [row, number] = [createElement("tr"), createElement("td", formatPercent(probability))];
        const name = createElement("td");
        name.append(createLabel(head, index), createBar(head, probability, scale));
        row.append(name, number);
        body.append(row);
      }
      table.append(header, body);
      return table;
    }),
  );
}

export function describeState() {
  const { state: progress, seconds, ahead } = state.results;
  const total = getLength() > seconds ? ` of ${formatPosition(getLength())}` : "";
  const texts = {
    unsent: "Waiting to be sent",
    sending: "Sending …",
    waiting: ahead ? `Waiting, ${ahead} ahead of this one` : "Waiting",
    computing: `Analyzed ${formatPosition(seconds, getLength())}${total}`,
    classifying: "Finding its classes …",
  };
  $("status").hidden = !(progress in texts);
  $("progress-text").textContent = texts[progress] || "";
  if (progress === "computing" && total) $("progress").value = seconds / getLength();
  else $("progress").removeAttribute("value");
  $("downloads").hidden = progress !== "done" || !state.network.frame || !state.sound.id;
  if (!$("downloads").hidden) for (const link of document.querySelectorAll("#downloads a")) link.href = getPath(`/${link.dataset.file}`);
  $("note").textContent = describeFrames().join(" ");
}

function describeFrames() {
  const { seconds, repeats, edge_frames: edgeFrames, quiet } = state.results;
  const { frame, pooled, edge_frames: shown } = state.network;
  const notes = [];
  if (repeats > 1) {
    const what = pooled ? "for the layers it was" : "it was";
    notes.push(`The clip is short (${formatPosition(seconds)}), so ${what} played ${repeats} times in a row. Times refer to the first.`);
  }
  if (pooled) {
    notes.push(`Classes are of windows of ${formatDuration(frame.length)}, one every ${formatDuration(frame.step)}; the last one ends with the sound.`);
  } else if (frame) {
    notes.push(`Each frame of ${getHeads().join(" and ")} hears ${formatDuration(frame.length)} around its position; there is one every ${formatDuration(frame.step)}.`);
    if (edgeFrames) notes.push(`The last one covers zeros after the end; this edge frame is ${shown ? "shown" : "left out"}.`);
  } else {
    notes.push("This network has no heads, so it cannot name sounds; its layers are shown.");
  }
  if (quiet) notes.push("The sound is quiet: the network was trained on louder sounds, so its results may be wrong.");
  return notes;
}

// for the list of sounds: its length, and what it is or what happens to it
export function summarize(sound) {
  const { state: progress, seconds, announced_seconds: announced, heads } = sound.results;
  const length = progress === "done" ? formatPosition(seconds) : announced ? formatPosition(announced) : "";
  if (sound.error) return { length, text: sound.error.replace(`${sound.name}: `, "") };
  if (progress !== "done") {
    const texts = { unsent: "waiting", sending: "sending …", waiting: "waiting", computing: `analyzing … ${formatTime(seconds)}` };
    return { length, text: texts[progress] || "analyzing …" };
  }
  const best = Object.keys(heads).sort().reverse().filter((head) => heads[head].clip.length);
  const text = best.map((head) => `${state.network.heads[head][heads[head].clip[0][0]]} ${formatPercent(heads[head].clip[0][1])}`);
  if (!text.length) text.push("done");
  if (sound.kept === false) text.push("not kept: no room");
  return { length, text: text.join(" · ") };
}
