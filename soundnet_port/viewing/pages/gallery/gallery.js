"use strict";

// Index: search and sorting.

const tools = document.getElementById("tools");
if (tools) {
  const cards = [...document.querySelectorAll(".cards > li")];
  const search = document.getElementById("search");
  const sort = document.getElementById("sort");
  const count = document.getElementById("count");

  // only digits: a unit's number, since most file names contain digits
  const matches = (card, words) =>
    words.every((word) =>
      /^\d+$/.test(word) ? card.dataset.number === word : card.dataset.words.includes(word));

  const filterCards = () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const card of cards) {
      card.hidden = !matches(card, words);
      shown += !card.hidden;
    }
    count.textContent = words.length ? `${shown} of ${cards.length} units` : "";
  };

  const sortCards = () => {
    const key = sort.value;
    const value = (card) => (card.dataset[key] === "" ? -1 : Number(card.dataset[key]));
    const number = (card) => Number(card.dataset.number);
    for (const list of document.querySelectorAll(".cards")) {
      const sorted = [...list.children].sort((a, b) =>
        (key === "number" ? 0 : value(b) - value(a)) || number(a) - number(b));
      list.append(...sorted);
    }
  };

  search.addEventListener("input", filterCards);
  sort.addEventListener("change", sortCards);
  tools.addEventListener("submit", (event) => event.preventDefault());
  tools.hidden = false;
  filterCards(); // browsers restore form values
  sortCards();
}

// Unit pages: one sound at a time, playheads, keyboard shortcuts.

const players = [...document.querySelectorAll("audio")];
let currentPlayer = players[0];

for (const player of players) {
  const item = player.closest("li");
  const playhead = item.querySelector(".playhead");
  const movePlayhead = () => {
    playhead.style.left = `${(100 * player.currentTime) / (player.duration || 1)}%`;
    if (!player.paused) requestAnimationFrame(movePlayhead);
  };
  player.addEventListener("play", () => {
    currentPlayer = player;
    for (const other of players) if (other !== player) other.pause();
    item.classList.add("playing");
    playhead.hidden = false;
    movePlayhead();
  });
  player.addEventListener("pause", () => item.classList.remove("playing"));
  player.addEventListener("ended", () => { playhead.hidden = true; });
}

const keys = document.getElementById("keys");
if (keys) {
  // not all browsers give file: pages a localStorage
  const STORAGE_KEY = "soundnet-port-keys";
  const storeSetting = (value) => {
    try {
      localStorage.setItem(STORAGE_KEY, value);
    } catch {}
  };
  const readSetting = () => {
    try {
      return localStorage.getItem(STORAGE_KEY);
    } catch {
      return null;
    }
  };
  keys.checked = readSetting() !== "off";
  keys.addEventListener("change", () => storeSetting(keys.checked ? "on" : "off"));
  keys.closest("p").hidden = false;

  const togglePlayer = (player) => {
    if (!player) return;
    if (!player.paused) return player.pause();
    player.play();
    player.scrollIntoView({ block: "nearest" });
  };
  const openUnit = (relation) => document.querySelector(`a[rel="${relation}"]`)?.click();

  document.addEventListener("keydown", (event) => {
    if (!keys.checked || event.ctrlKey || event.metaKey || event.altKey || event.shiftKey) return;
    const hasOwnKeys = event.target.closest("a, button, input, select, audio");
    if (event.key === "n" || (event.key === "ArrowRight" && !hasOwnKeys)) openUnit("next");
    else if (event.key === "p" || (event.key === "ArrowLeft" && !hasOwnKeys)) openUnit("prev");
    else if (event.key === " " && !hasOwnKeys) togglePlayer(currentPlayer);
    else if (/^[1-9]$/.test(event.key)) togglePlayer(players[event.key - 1]);
    else return;
    event.preventDefault();
  });
}
