// Recording with the microphone.

import { closeMicrophone, openMicrophone } from "./microphone.js";
import { $, formatTime } from "./shared.js";

let recorder = null;

// starts, or stops and passes the file on
export function toggleRecording(onFile) {
  if (recorder) recorder.stop();
  else openMicrophone((microphone) => record(microphone, onFile));
}

function record(microphone, onFile) {
  const parts = [];
  const started = new MediaRecorder(microphone);
  started.start(1000);
  recorder = started;
  const start = Date.now();
  const button = $("record");
  const timer = setInterval(() => (button.textContent = `Stop (${formatTime((Date.now() - start) / 1000)})`), 250);
  button.textContent = "Stop (0:00)";
  button.classList.add("recording");
  started.addEventListener("dataavailable", (event) => parts.push(event.data));
  started.addEventListener("stop", () => {
    clearInterval(timer);
    closeMicrophone(microphone);
    const type = started.mimeType || "audio/webm";
    const suffix = type.includes("mp4") ? "mp4" : type.includes("ogg") ? "ogg" : "webm";
    recorder = null;
    button.textContent = "Record";
    button.classList.remove("recording");
    onFile(new File(parts, `recording.${suffix}`, { type }));
  });
}
