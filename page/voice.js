// Voice notes as WhatsApp sends them: Opus in Ogg. Firefox records that; Chromium records Opus in WebM, whose packets
// are put into Ogg pages here (RFC 3533, RFC 7845; WebM: RFC 8794 and RFC 9559).

const RECORDABLE = ["audio/ogg;codecs=opus", "audio/webm;codecs=opus", "audio/mp4"];

/** Start recording; resolves to an object with `stop()`, a promise of the file, and `cancel()`. */
export async function record() {
  const stream = await navigator.mediaDevices.getUserMedia({ audio: { channelCount: 1 } });
  const mimeType = RECORDABLE.find((type) => MediaRecorder.isTypeSupported(type));
  const recorder = new MediaRecorder(stream, { mimeType, audioBitsPerSecond: 24000 });
  const chunks = [];
  recorder.ondataavailable = ({ data }) => chunks.push(data);
  const ended = new Promise((resolve) => { recorder.onstop = resolve; });
  recorder.start();
  const finish = async () => {
    if (recorder.state !== "inactive") recorder.stop();
    stream.getTracks().forEach((track) => track.stop());
    await ended;
  };
  return {
    cancel: finish,
    async stop() {
      await finish();
      const file = new Blob(chunks, { type: mimeType.split(";")[0] });
      return file.type === "audio/webm" ? toOgg(await file.arrayBuffer()) : file;
    },
  };
}

/** The heights (0 to 1) of `count` bars, and the seconds, of an audio file. */
export async function waveform(url, count) {
  const data = await (await fetch(url)).arrayBuffer();
  const audio = await new OfflineAudioContext(1, 1, 48000).decodeAudioData(data);
  const samples = audio.getChannelData(0);
  const step = Math.max(1, Math.floor(samples.length / count));
  const peaks = Array.from({ length: count }, (_, bar) => {
    let peak = 0;
    for (let i = bar * step; i < (bar + 1) * step; i += 8) peak = Math.max(peak, Math.abs(samples[i] ?? 0));
    return peak;
  });
  const highest = Math.max(...peaks, 0.01);
  return { bars: peaks.map((peak) => peak / highest), seconds: audio.duration };
}

// WebM

const CONTAINERS = new Set([0x18538067, 0x1654ae6b, 0xae, 0x1f43b675, 0xa0]); // Segment Tracks TrackEntry Cluster BlockGroup
const CODEC_PRIVATE = 0x63a2;
const BLOCKS = new Set([0xa3, 0xa1]); // SimpleBlock, Block

function variableInteger(bytes, at, keepMarker) {
  const length = Math.clz32(bytes[at]) - 23;
  let value = keepMarker ? bytes[at] : bytes[at] & (0xff >> length);
  for (let i = 1; i < length; i++) value = value * 256 + bytes[at + i];
  return [value, at + length];
}

/** The codec's header and the packets of a WebM file with one audio track. */
function unpack(buffer) {
  const bytes = new Uint8Array(buffer);
  const found = { head: null, packets: [] };
  let at = 0;
  while (at < bytes.length) {
    const [id, afterId] = variableInteger(bytes, at, true);
    const [size, start] = variableInteger(bytes, afterId, false);
    at = CONTAINERS.has(id) ? start : start + size;
    if (id === CODEC_PRIVATE) found.head = bytes.slice(start, at);
    if (BLOCKS.has(id)) found.packets.push(bytes.slice(variableInteger(bytes, start, false)[1] + 3, at));
  }
  return found;
}

// Ogg

const CRC = Uint32Array.from({ length: 256 }, (_, index) => {
  let crc = index << 24;
  for (let bit = 0; bit < 8; bit++) crc = (crc << 1) ^ (crc & 0x80000000 ? 0x04c11db7 : 0);
  return crc >>> 0;
});

function checksum(bytes) {
  let crc = 0;
  for (const byte of bytes) crc = ((crc << 8) ^ CRC[(crc >>> 24) ^ byte]) >>> 0;
  return crc;
}

/** The samples (at 48 kHz) in an Opus packet, from its first bytes. */
function samples(packet) {
  const config = packet[0] >> 3;
  const frame = config < 12 ? [480, 960, 1920, 2880][config % 4]
    : config < 16 ? [480, 960][config % 2] : [120, 240, 480, 960][config % 4];
  return frame * [1, 2, 2, packet[1] & 63][packet[0] & 3];
}

const lacing = (packet) => [...Array(Math.floor(packet.length / 255)).fill(255), packet.length % 255];

function page(packets, flags, granule, sequence) {
  const segments = packets.flatMap(lacing);
  const header = new DataView(new ArrayBuffer(27));
  [0x4f, 0x67, 0x67, 0x53, 0, flags].forEach((byte, index) => header.setUint8(index, byte)); // "OggS", version 0
  header.setBigUint64(6, BigInt(granule), true);
  header.setUint32(14, 1, true);
  header.setUint32(18, sequence, true);
  header.setUint8(26, segments.length);
  const bytes = Uint8Array.from([...new Uint8Array(header.buffer), ...segments, ...packets.flatMap((p) => [...p])]);
  new DataView(bytes.buffer).setUint32(22, checksum(bytes), true);
  return bytes;
}

function tags() {
  const vendor = new TextEncoder().encode("Hilo");
  return Uint8Array.from([...new TextEncoder().encode("OpusTags"), vendor.length, 0, 0, 0, ...vendor, 0, 0, 0, 0]);
}

/** An Ogg file with the packets of a WebM recording. */
function toOgg(webm) {
  const { head, packets } = unpack(webm);
  const pages = [page([head], 2, 0, 0), page([tags()], 0, 0, 1)];
  let granule = new DataView(head.buffer).getUint16(10, true); // the decoder's pre-skip
  for (let first = 0; first < packets.length; first += 25) {
    const group = packets.slice(first, first + 25);
    granule += group.reduce((sum, packet) => sum + samples(packet), 0);
    pages.push(page(group, first + 25 >= packets.length ? 4 : 0, granule, pages.length));
  }
  return new Blob(pages, { type: "audio/ogg" });
}
