"use strict";

// A unit's page: a button to play each sound, one at a time, playheads, keyboard shortcuts.

const players = [...document.querySelectorAll("audio")];
const loop = document.getElementById("loop");
const keys = document.getElementById("keys");
let currentPlayer = players[0];

// not all browsers give file: pages a localStorage
const storeSetting = (name, value) => {
  try {
    localStorage.setItem(`soundnet-port-${name}`, value);
  } catch {}
};
const readSetting = (name) => {
  try {
    return localStorage.getItem(`soundnet-port-${name}`);
  } catch {
    return null;
  }
};

const togglePlayer = (player) => {
  if (!player) return;
  if (!player.paused) return player.pause();
  player.play().catch(() => {}); // "error" tells the reader
  player.closest("figure").scrollIntoView({ block: "nearest" });
};

for (const player of players) {
  const item = player.closest("li");
  const playhead = item.querySelector(".playhead");
  const button = item.querySelector(".play");
  const name = button.getAttribute("aria-label").replace(/^Play /, "");
  const [left, width] = [player.dataset.left, player.dataset.width].map(Number);
  player.controls = false;
  button.hidden = false;
  button.addEventListener("click", () => togglePlayer(player));
  const movePlayhead = () => {
    playhead.style.left = `${left + (width * player.currentTime) / (player.duration || 1)}%`;
    if (!player.paused) requestAnimationFrame(movePlayhead);
  };
  const showState = () => {
    item.classList.toggle("playing", !player.paused);
    button.setAttribute("aria-label", `${player.paused ? "Play" : "Pause"} ${name}`);
  };
  player.addEventListener("play", () => {
    currentPlayer = player;
    for (const other of players) if (other !== player) other.pause();
    playhead.hidden = false;
    showState();
    movePlayhead();
  });
  player.addEventListener("pause", showState);
  player.addEventListener("ended", () => { playhead.hidden = true; });
  player.addEventListener("error", () => {
    button.disabled = true;
    item.querySelector("figcaption").append(" This browser cannot play it.");
  });
}

const applySettings = () => {
  for (const player of players) player.loop = loop.checked;
  storeSetting("loop", loop.checked ? "on" : "off");
  storeSetting("keys", keys.checked ? "on" : "off");
};
loop.checked = readSetting("loop") === "on";
keys.checked = readSetting("keys") !== "off";
applySettings();
loop.addEventListener("change", applySettings);
keys.addEventListener("change", applySettings);
document.getElementById("options").hidden = false;

const openUnit = (relation) => document.querySelector(`a[rel="${relation}"]`)?.click();

document.addEventListener("keydown", (event) => {
  if (!keys.checked || event.ctrlKey || event.metaKey || event.altKey || event.shiftKey) return;
  const hasOwnKeys = event.target.closest("a, button, input, select");
  if (event.key === "n" || (event.key === "ArrowRight" && !hasOwnKeys)) openUnit("next");
  else if (event.key === "p" || (event.key === "ArrowLeft" && !hasOwnKeys)) openUnit("prev");
  else if (event.key === " " && !hasOwnKeys) togglePlayer(currentPlayer);
  else if (event.key === "r") loop.click();
  else if (/^[1-9]$/.test(event.key)) togglePlayer(players[event.key - 1]);
  else return;
  event.preventDefault();
});
