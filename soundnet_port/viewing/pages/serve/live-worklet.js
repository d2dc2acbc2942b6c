// Runs in the audio thread: hands the microphone's first channel to the page in blocks, with the time of each.

const BLOCK = 1024; // samples, as in live-recording.js

class Capture extends AudioWorkletProcessor {
  block = new Float32Array(BLOCK);
  filled = 0;

  process([[channel]]) {
    if (!channel) return true; // the microphone has ended
    for (let read = 0; read < channel.length; ) {
      const count = Math.min(channel.length - read, BLOCK - this.filled);
      this.block.set(channel.subarray(read, read + count), this.filled);
      read += count;
      this.filled += count;
      if (this.filled === BLOCK) {
        this.port.postMessage({ samples: this.block, time: Date.now() }, [this.block.buffer]);
        this.block = new Float32Array(BLOCK);
        this.filled = 0;
      }
    }
    return true;
  }
}

registerProcessor("capture", Capture);
