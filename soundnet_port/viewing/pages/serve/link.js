// The link to a moment: #sound=KEY&t=SECONDS.

import { media, state } from "./shared.js";

let timer = null;

export function readLink() {
  const parameters = new URLSearchParams(location.hash.slice(1));
  const time = Number.parseFloat(parameters.get("t"));
  return { key: parameters.get("sound"), time: time >= 0 ? time : null };
}

export function writeLink() {
  clearTimeout(timer);
  const { sound } = state;
  const hash = sound ? `#sound=${sound.key}&t=${(media.currentTime || 0).toFixed(1)}` : "#";
  if (location.hash !== hash) history.replaceState(null, "", sound ? hash : location.pathname);
}

// browsers limit how often it may be written
export function writeLinkSoon() {
  clearTimeout(timer);
  timer = setTimeout(writeLink, 250);
}
