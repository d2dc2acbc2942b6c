// The list of sounds in the page.

import { $, createElement, state } from "./shared.js";
import { summarize } from "./results.js";

const rows = new Map(); // elements of each sound

let actions = { select() {}, remove() {} };

export const setActions = (chosen) => (actions = chosen);

function createRow(sound) {
  const row = createElement("li");
  const button = createElement("button", undefined, "entry");
  const [name, length, text] = [["name", sound.name], ["length", ""], ["text", ""]].map(([className, content]) => createElement("span", content, className));
  button.type = "button";
  name.title = sound.name;
  button.append(name, length, text);
  button.addEventListener("click", () => actions.select(sound));
  const remove = createElement("button", "×", "remove");
  remove.type = "button";
  remove.title = "Remove";
  remove.setAttribute("aria-label", `Remove ${sound.name}`);
  remove.addEventListener("click", () => actions.remove(sound));
  row.append(button, remove);
  return { row, button, length, text };
}

export function showRow(sound) {
  const elements = rows.get(sound);
  if (!elements) return;
  const { length, text } = summarize(sound);
  elements.length.textContent = length;
  elements.text.textContent = elements.text.title = text;
  elements.row.classList.toggle("failed", Boolean(sound.error));
  if (state.sound === sound) elements.button.setAttribute("aria-current", "true");
  else elements.button.removeAttribute("aria-current");
}

export function showRows(sounds) {
  for (const sound of sounds) {
    if (!rows.has(sound)) {
      rows.set(sound, createRow(sound));
      $("sounds").append(rows.get(sound).row);
    }
    showRow(sound);
  }
  $("queue").hidden = !sounds.length;
  $("queue-count").textContent = sounds.length > 1 ? `${sounds.length} sounds` : "Sounds";
}

export const focusRow = (sound) => rows.get(sound).button.focus();

export function dropRow(sound) {
  if (rows.has(sound)) rows.get(sound).row.remove();
  rows.delete(sound);
}
