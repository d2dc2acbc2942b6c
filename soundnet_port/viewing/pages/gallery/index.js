"use strict";

// The index: cards of the units that match, a page of them at a time. The address after # holds the view, so
// that the browser's back button leads to where one was. Names are only ever set as text.

const { sounds, top: topCount, strips, classes, files, file_classes, layers } = globalThis.unitGallery;
const find = (id) => document.getElementById(id);
const create = (tag, className = "", text = "") => {
  const element = document.createElement(tag);
  if (className) element.className = className;
  element.textContent = text;
  return element;
};
const format = (number) => number.toLocaleString("en");

const buildUnit = (layer, [number, activation, selectivity, label, hits, p, named, tops], row) => ({
  layer, number, activation, selectivity, hits, p, named, row,
  dead: false,
  few: tops.length < Math.min(3, topCount),
  count: tops.length,
  label: label < 0 ? null : classes[label],
  purity: label < 0 ? -1 : hits / tops.length,
  labels: [...new Set(tops.map((file) => classes[file_classes[file]]).filter(Boolean))],
  files: tops.map((file) => files[file].toLowerCase()),
});
const unitsOf = new Map(layers.map((layer) => {
  const units = layer.units.map((unit, row) => buildUnit(layer, unit, row));
  const dead = layer.dead.map((number) => ({ layer, number, dead: true }));
  return [layer.name, [...units, ...dead].sort((a, b) => a.number - b.number)];
}));

// ---- search: a unit's own class before classes of its sounds before file names

const TIERS = ["name", "class", "a sound's class", "a file name", "number"];

// 0 equal, 1 at the beginning of a word, 2 elsewhere
const compareText = (text, query) => {
  text = text.toLowerCase();
  if (text === query) return 0;
  const position = ` ${text}`.indexOf(` ${query}`);
  return position >= 0 ? 1 : text.includes(query) ? 2 : Infinity;
};
const rankText = (unit, query) => {
  // few digits: a unit's number, since most file names contain digits
  if (/^\d{1,4}$/.test(query)) return unit.number === Number(query) ? 12 : Infinity;
  if (unit.dead) return Infinity;
  const own = unit.label === null ? [] : [unit.label];
  const fields = [unit.named ? own : [], unit.named ? [] : own, unit.labels, unit.files];
  for (const [tier, texts] of fields.entries()) {
    const best = Math.min(...texts.map((text) => compareText(text, query)));
    if (best < 3) return 3 * tier + best;
  }
  return Infinity;
};
// the whole query, or else all of its words: the worst counts
const rankUnit = (unit, query) => {
  const whole = rankText(unit, query);
  if (whole < Infinity || !query.includes(" ")) return whole;
  return Math.max(...query.split(" ").map((word) => rankText(unit, word)));
};

// ---- filters and order

const SHOWN = {
  all: () => true,
  active: (unit) => !unit.dead,
  named: (unit) => unit.named,
  dead: (unit) => unit.dead,
};
// the larger come first; units of few sounds are pure without meaning much
const KEYS = {
  number: () => 0,
  purity: (unit) => (unit.few ? unit.purity - 2 : unit.purity),
  selectivity: (unit) => unit.selectivity ?? -1,
  activation: (unit) => unit.activation,
};

const select = (view, layer) => {
  const query = view.q.trim().toLowerCase().replace(/\s+/g, " ");
  const key = (unit) => (unit.dead && view.sort !== "number" ? -Infinity : KEYS[view.sort](unit));
  const order = (a, b) => a.rank - b.rank || (a.key === b.key ? 0 : b.key - a.key) ||
    (view.sort === "purity" && !a.unit.dead ? a.unit.p - b.unit.p : 0) || a.position - b.position;
  return [...unitsOf].filter(([name]) => !layer || name === layer).flatMap(([, units]) => units)
    .filter((unit) => SHOWN[view.show](unit) && (!view.class || (unit.named && unit.label === view.class)))
    .map((unit, position) => ({ unit, position, rank: query ? rankUnit(unit, query) : 0, key: key(unit) }))
    .filter((match) => match.rank < Infinity)
    .sort(order);
};

// ---- the view, and the address that stands for it

const DEFAULTS = { layer: layers[0].name, q: "", class: "", show: "all", sort: "number", page: 1 };

const readView = () => {
  const hash = location.hash.slice(1);
  if (unitsOf.has(hash)) return { ...DEFAULTS, layer: hash };
  if (hash === "all") return { ...DEFAULTS, layer: "" };
  const view = { ...DEFAULTS, ...Object.fromEntries(new URLSearchParams(hash)) };
  if (!unitsOf.has(view.layer)) view.layer = view.layer === "" ? "" : DEFAULTS.layer;
  if (!classes.includes(view.class)) view.class = "";
  if (!Object.hasOwn(SHOWN, view.show)) view.show = "all";
  if (!Object.hasOwn(KEYS, view.sort)) view.sort = "number";
  view.page = Math.max(1, Math.floor(Number(view.page)) || 1);
  return view;
};
const addressOf = (view) => {
  const changed = Object.entries(view).filter(([key, value]) => key === "layer" || value !== DEFAULTS[key]);
  return `#${new URLSearchParams(changed)}`;
};

// ---- what is shown

const createStrip = (unit) => {
  const strip = create("span", "strip");
  const sheet = Math.floor(unit.row / strips);
  const rows = Math.min(strips, unit.layer.units.length - sheet * strips);
  for (let column = 0; column < Math.min(3, unit.count); column++) {
    const picture = create("span");
    picture.style.backgroundImage = `url("sheets/${unit.layer.name}-${sheet}.jpg")`;
    picture.style.backgroundSize = `300% ${100 * rows}%`;
    picture.style.backgroundPosition = `${50 * column}% ${rows > 1 ? (100 * (unit.row % strips)) / (rows - 1) : 0}%`;
    strip.append(picture);
  }
  return strip;
};

const createCard = (unit, withLayer) => {
  const item = create("li", unit.dead ? "dead" : "");
  item.dataset.number = unit.number;
  const title = create("span", "title");
  if (withLayer) title.append(create("span", "layer", unit.layer.name));
  title.append(create("span", "number", unit.number));
  if (unit.dead) {
    const note = create("span", "note", "never active");
    note.append(create("span", "unseen", ` on these ${format(sounds)} sounds`));
    item.append(title, " ", note);
    item.title = note.textContent;
    return item;
  }
  const link = create("a");
  link.href = `${unit.layer.name}/${unit.number}.html`;
  if (unit.named) title.append(" ", create("span", "name", `${unit.label}-like`));
  else if (unit.few) title.append(" ", create("span", "quiet", unit.count === 1 ? "one sound" : "few sounds"));
  const facts = create("span", "facts");
  if (unit.label !== null)
    facts.append(create("span", "", `${unit.hits} of ${unit.count}${unit.named ? "" : ` ${unit.label}`}`), " ");
  if (unit.selectivity !== null) facts.append(create("span", "", `selectivity ${unit.selectivity.toFixed(2)}`));
  link.append(title, createStrip(unit), facts);
  item.append(link);
  return item;
};

const showPages = (view, pages) => {
  const shown = new Set([1, pages, view.page - 1, view.page, view.page + 1].filter((page) => page >= 1 && page <= pages));
  const createLink = (page, text, name) => {
    const link = create("a", "", text);
    link.href = addressOf({ ...view, page });
    if (name) link.setAttribute("aria-label", name);
    if (page === view.page) link.setAttribute("aria-current", "page");
    return link;
  };
  const parts = [];
  if (view.page > 1) parts.push(createLink(view.page - 1, "←", "Previous page"));
  let before = 0;
  for (const page of [...shown].sort((a, b) => a - b)) {
    if (page > before + 1) parts.push(create("span", "", "…"));
    parts.push(createLink(page, page, `Page ${page}`));
    before = page;
  }
  if (view.page < pages) parts.push(createLink(view.page + 1, "→", "Next page"));
  find("pages").replaceChildren(...parts);
  find("pages").hidden = pages < 2;
};

const describeCount = (view, matches) => {
  const total = layers.filter(({ name }) => !view.layer || name === view.layer)
    .reduce((sum, { units, dead }) => sum + units.length + dead.length, 0);
  const words = `${format(matches.length)} of ${format(total)} units`;
  if (!view.q.trim() || !matches.length) return words;
  const counts = TIERS.map((tier, number) =>
    [tier, matches.filter(({ rank }) => Math.floor(rank / 3) === number).length]);
  return `${words}: ${counts.filter(([, count]) => count).map(([tier, count]) => `${format(count)} by ${tier}`).join(", ")}`;
};

const showClasses = (view) => {
  const named = [...unitsOf].filter(([name]) => !view.layer || name === view.layer)
    .flatMap(([, units]) => units).filter((unit) => unit.named);
  const options = classes.map((label) =>
    new Option(`${label} (${named.filter((unit) => unit.label === label).length})`, label));
  find("class")?.replaceChildren(new Option("any", ""), ...options);
};

const show = (view) => {
  const matches = select(view, view.layer);
  const pages = Math.max(1, Math.ceil(matches.length / strips));
  view.page = Math.min(view.page, pages);
  showClasses(view);
  for (const [id, key] of [["search", "q"], ["class", "class"], ["show", "show"], ["sort", "sort"]])
    if (find(id) && find(id).value !== view[key]) find(id).value = view[key];
  for (const section of document.querySelectorAll("main section"))
    section.hidden = view.layer !== "" && section.id !== view.layer;
  for (const link of find("layers").querySelectorAll("a")) {
    const { layer } = link.dataset;
    link.hidden = false;
    link.textContent = `${layer || "all"} `;
    link.append(create("span", "quiet", format(select(view, layer).length)));
    link.href = addressOf({ ...view, layer, page: 1 });
    if (layer === view.layer) link.setAttribute("aria-current", "true");
    else link.removeAttribute("aria-current");
  }
  const first = (view.page - 1) * strips;
  const cards = matches.slice(first, first + strips).map(({ unit }) => createCard(unit, !view.layer));
  find("cards").replaceChildren(...cards);
  find("count").textContent = describeCount(view, matches);
  showPages(view, pages);
};

let timer;
const change = () => {
  const view = { ...readView(), q: find("search").value, class: find("class")?.value ?? "" };
  Object.assign(view, { show: find("show").value, sort: find("sort").value, page: 1 });
  show(view);
  clearTimeout(timer); // browsers limit how often the address changes
  timer = setTimeout(() => location.replace(addressOf(view)), 250);
};
find("tools").addEventListener("input", change);
find("tools").addEventListener("submit", (event) => event.preventDefault());
find("tools").hidden = false;
find("pages").addEventListener("click", () => find("count").scrollIntoView());
addEventListener("hashchange", () => show(readView()));
show(readView());
