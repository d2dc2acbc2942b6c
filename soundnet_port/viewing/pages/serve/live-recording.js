// The last minutes of a live sound, as 16-bit samples: what is sent to the server, and what is kept as a file.

export const BLOCK = 1024; // samples, as in live-worklet.js

export class Recording {
  constructor(rate, seconds) {
    this.rate = rate;
    this.limit = Math.ceil((seconds * rate) / BLOCK);
    this.blocks = []; // {samples, high, low, time}; time in ms when its last sample was recorded
    this.dropped = 0; // blocks from the beginning
  }

  // both in samples since the beginning
  get start() {
    return this.dropped * BLOCK;
  }

  get end() {
    return (this.dropped + this.blocks.length) * BLOCK;
  }

  // returns the block's power, 1 for a full-scale square wave
  push(floats, time) {
    const samples = new Int16Array(BLOCK);
    let [high, low, power] = [0, 0, 0];
    floats.forEach((value, number) => {
      samples[number] = Math.max(-32768, Math.min(32767, Math.round(32768 * value)));
      high = Math.max(high, value);
      low = Math.min(low, value);
      power += value * value;
    });
    this.blocks.push({ samples, high, low, time });
    if (this.blocks.length > this.limit) {
      this.blocks.shift();
      this.dropped += 1;
    }
    return power / BLOCK;
  }

  // when a sample was recorded, in ms
  getTime(sample) {
    const { time } = this.blocks[Math.floor(sample / BLOCK) - this.dropped];
    return time - (1000 * (BLOCK - (sample % BLOCK))) / this.rate;
  }

  // begin and end are the bounds of blocks; little-endian, as all computers with browsers are
  read(begin, end) {
    const blocks = this.blocks.slice(begin / BLOCK - this.dropped, end / BLOCK - this.dropped);
    const samples = new Int16Array(blocks.length * BLOCK);
    blocks.forEach((block, number) => samples.set(block.samples, number * BLOCK));
    return samples;
  }

  toWav(name) {
    const bytes = this.read(this.start, this.end);
    const header = new DataView(new ArrayBuffer(44));
    const write = (offset, text) => [...text].forEach((letter, i) => header.setUint8(offset + i, letter.charCodeAt(0)));
    write(0, "RIFF");
    header.setUint32(4, 36 + bytes.byteLength, true);
    write(8, "WAVEfmt ");
    header.setUint32(16, 16, true); // size of the format
    header.setUint16(20, 1, true); // PCM
    header.setUint16(22, 1, true); // channels
    header.setUint32(24, this.rate, true);
    header.setUint32(28, 2 * this.rate, true);
    header.setUint16(32, 2, true);
    header.setUint16(34, 16, true);
    write(36, "data");
    header.setUint32(40, bytes.byteLength, true);
    return new File([header, bytes], name, { type: "audio/wav" });
  }
}
