// Recording with the microphone.

import { $, formatTime, showError } from "./shared.js";

let recorder = null;

// starts, or stops and passes the file on
export async function toggleRecording(onFile) {
  if (recorder) {
    recorder.stop();
    return;
  }
  showError("");
  let microphone;
  try {
    const audio = { echoCancellation: false, noiseSuppression: false, autoGainControl: false };
    microphone = await navigator.mediaDevices.getUserMedia({ audio });
  } catch (error) {
    showError(`The microphone cannot be used: ${error.message}`);
    return;
  }
  const parts = [];
  const start = Date.now();
  recorder = new MediaRecorder(microphone);
  recorder.addEventListener("dataavailable", (event) => parts.push(event.data));
  const button = $("record");
  const timer = setInterval(() => (button.textContent = `Stop (${formatTime((Date.now() - start) / 1000)})`), 250);
  button.textContent = "Stop (0:00)";
  button.classList.add("recording");
  recorder.addEventListener("stop", () => {
    clearInterval(timer);
    for (const track of microphone.getTracks()) track.stop();
    const type = recorder.mimeType || "audio/webm";
    const suffix = type.includes("mp4") ? "mp4" : type.includes("ogg") ? "ogg" : "webm";
    recorder = null;
    button.textContent = "Record";
    button.classList.remove("recording");
    onFile(new File(parts, `recording.${suffix}`, { type }));
  });
  recorder.start(1000);
}
