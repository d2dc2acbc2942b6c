// The microphone, for recording.js or live.js: one of them at a time.

import { $, showError } from "./shared.js";

const AUDIO = { echoCancellation: false, noiseSuppression: false, autoGainControl: false };

// Ask for the microphone, and pass its stream on. Until then no button asks again, so that it is opened only once.
export async function openMicrophone(begin) {
  const buttons = [$("record"), $("listen")].filter((button) => !button.disabled);
  const focused = document.activeElement; // disabled buttons lose it
  let stream = null;
  showError("");
  for (const button of buttons) button.disabled = true;
  try {
    stream = await navigator.mediaDevices.getUserMedia({ audio: AUDIO });
    await begin(stream);
  } catch (error) {
    if (stream) closeMicrophone(stream);
    showError(`The microphone cannot be used: ${error.message}`);
  } finally {
    for (const button of buttons) button.disabled = false;
    if (buttons.includes(focused) && [focused, document.body].includes(document.activeElement)) focused.focus();
  }
}

export function closeMicrophone(stream) {
  for (const track of stream.getTracks()) track.stop();
}
