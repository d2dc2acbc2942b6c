"use strict";

// All units: search and sort. The page is complete without them.

const tools = document.getElementById("tools");
if (tools) {
  const cards = [...document.querySelectorAll(".cards > li")];
  const search = document.getElementById("search");
  const sort = document.getElementById("sort");
  const count = document.getElementById("count");

  // digits alone are a unit's number, for they are in every other file's name
  const found = (card, words) =>
    words.every((word) =>
      /^\d+$/.test(word) ? card.dataset.number === word : card.dataset.words.includes(word));

  const filter = () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const card of cards) {
      card.hidden = !found(card, words);
      shown += !card.hidden;
    }
    count.textContent = words.length ? `${shown} of ${cards.length} units` : "";
  };

  const order = () => {
    const key = sort.value;
    const value = (card) => (card.dataset[key] === "" ? -1 : Number(card.dataset[key]));
    const number = (card) => Number(card.dataset.number);
    for (const list of document.querySelectorAll(".cards")) {
      const sorted = [...list.children].sort((a, b) =>
        (key === "number" ? 0 : value(b) - value(a)) || number(a) - number(b));
      list.append(...sorted);
    }
  };

  search.addEventListener("input", filter);
  sort.addEventListener("change", order);
  tools.addEventListener("submit", (event) => event.preventDefault());
  tools.hidden = false;
  filter(); // what a browser has kept
  order();
}

// A unit: one sound at a time, a line where it is, keys.

const players = [...document.querySelectorAll("audio")];
let current = players[0];

for (const player of players) {
  const item = player.closest("li");
  const line = item.querySelector(".playhead");
  const follow = () => {
    line.style.left = `${(100 * player.currentTime) / (player.duration || 1)}%`;
    if (!player.paused) requestAnimationFrame(follow);
  };
  player.addEventListener("play", () => {
    current = player;
    for (const other of players) if (other !== player) other.pause();
    item.classList.add("playing");
    line.hidden = false;
    follow();
  });
  player.addEventListener("pause", () => item.classList.remove("playing"));
  player.addEventListener("ended", () => { line.hidden = true; });
}

const keys = document.getElementById("keys");
if (keys) {
  // remembered, where pages of files may remember anything
  const kept = (value) => {
    try {
      if (value !== undefined) localStorage.setItem("soundnet-port-keys", value);
      return localStorage.getItem("soundnet-port-keys");
    } catch {
      return null;
    }
  };
  keys.checked = kept() !== "off";
  keys.addEventListener("change", () => kept(keys.checked ? "on" : "off"));
  keys.closest("p").hidden = false;

  const play = (player) => {
    if (!player) return;
    if (!player.paused) return player.pause();
    player.play();
    player.scrollIntoView({ block: "nearest" });
  };
  const go = (relation) => document.querySelector(`a[rel="${relation}"]`)?.click();

  document.addEventListener("keydown", (event) => {
    if (!keys.checked || event.ctrlKey || event.metaKey || event.altKey || event.shiftKey) return;
    const own = event.target.closest("a, button, input, select, audio"); // these have keys of their own
    if (event.key === "n" || (event.key === "ArrowRight" && !own)) go("next");
    else if (event.key === "p" || (event.key === "ArrowLeft" && !own)) go("prev");
    else if (event.key === " " && !own) play(current);
    else if (/^[1-9]$/.test(event.key)) play(players[event.key - 1]);
    else return;
    event.preventDefault();
  });
}
