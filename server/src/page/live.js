// The status of the model: what it does now, where the time of a token goes, and what is in memory.

import { bytes, count, find, make, plural, short } from "./dom.js";
import { ask } from "./stream.js";

const EVERY = 1000;
const SLOWER = 5000;
/** Points of the traces. */
const TRACE = 60;
/** How many reports an expert that has come stays marked. */
const FRESH = 3;

/** Parts of the time of a token: label, field of the statistics, and shade. The drive has the accent: it is what can be waited for. */
const TIMES = [
  ["Waiting for the drive", "io_wait_seconds", "accent"],
  ["Experts", "expert_seconds", "shade-1"],
  ["Attention", "attention_seconds", "shade-2"],
  ["Output head", "head_seconds", "shade-3"],
  ["Other", "other_seconds", "shade-4"],
];

export class Live {
  /** `model` returns the id of the model to show; `back` is called when the server answers again. */
  constructor(model, back) {
    Object.assign(this, { model, back, failed: false });
    this.traces = { rate: [], drive: [] };
    this.timer = 0;
    this.experts = new Experts(find("experts"), find("expert-caption"));
    document.addEventListener("visibilitychange", () => (document.hidden ? this.pause() : this.poll()));
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.redraw());
    new ResizeObserver(() => this.redraw()).observe(find("live"));
  }

  pause() {
    clearTimeout(this.timer);
  }

  /** Asks now, and then each second while the page can be seen. */
  async poll() {
    this.pause();
    let wait = EVERY;
    try {
      const status = await ask("/status");
      if (this.failed) this.back();
      this.failed = false;
      this.show(status);
    } catch (error) {
      wait = SLOWER;
      this.fail(error);
    }
    this.pause();
    if (!document.hidden) this.timer = setTimeout(() => this.poll(), wait);
  }

  fail(error) {
    this.failed = true;
    const refused = error.status === 401 || error.status === 403;
    find("live-state").textContent = refused ? "The server asks for an API key: see Settings." : "The server does not answer.";
    find("live-state").hidden = false;
    find("pulse-text").textContent = refused ? "Key needed" : "No server";
    find("live").classList.add("away");
  }

  show({ models = [] }) {
    const shown = models.find((model) => model.id === this.model()) ?? models[0];
    find("live").classList.remove("away");
    if (!shown) {
      find("live-state").textContent = "The server has no model.";
      return;
    }
    const { id, status, report } = shown;
    find("live-name").textContent = id;
    const works = status && status.reading + status.decoding > 0;
    find("live-state").textContent = stateOf(status, report);
    find("live-body").hidden = !report;
    find("live").classList.toggle("idle", !works);
    find("pulse-text").textContent = works ? pulseOf(status) : "Idle";
    find("open-live").classList.toggle("works", Boolean(works));
    this.report = report;
    this.status = status;
    if (!report) return;
    this.figures(status ?? {}, report, works);
    this.time(report);
    this.memory(report);
    this.experts.take(id, report.experts ?? []);
    find("about").replaceChildren(
      make("p", {}, `${report.name}, ${report.family}`),
      make("p", {}, `${plural(report.threads, "thread")}, ${report.isa}`),
      make("p", {}, `Read by ${report.read_path}`),
    );
    this.redraw();
  }

  figures(status, report, works) {
    const { window } = report;
    const drive = works ? (window?.drive_bytes_per_second ?? 0) / 1e9 : 0;
    const rate = works ? status.tokens_per_second : 0;
    trace(this.traces.rate, rate);
    trace(this.traces.drive, drive);
    find("rate").textContent = short(works ? rate : (status.tokens_per_second ?? 0));
    find("drive").textContent = short(works ? drive : (window?.drive_bytes_per_second ?? 0) / 1e9);
    find("prompt-rate").textContent = short(status.prompt_tokens_per_second ?? 0);
    const { hits, misses } = report.total;
    const hit = window ? window.hit_rate : hits + misses > 0 ? hits / (hits + misses) : null;
    find("hits").textContent = hit === null ? "–" : (hit * 100).toFixed(hit > 0.995 || hit < 0.1 ? 1 : 0);
    find("queue").textContent = queueOf(status);
  }

  time({ window, total }) {
    const stats = window?.stats ?? total;
    const all = TIMES.reduce((sum, [, field]) => sum + stats[field], 0);
    const token = stats.tokens > 0 ? all / stats.tokens : 0;
    find("token-time").textContent = token > 0 ? milliseconds(token) : "";
    const parts = TIMES.map(([label, field, shade]) => {
      const share = all > 0 ? stats[field] / all : 0;
      return { label, share, shade, text: token > 0 ? milliseconds(token * share) : "–" };
    });
    stack("time", parts, token > 0 ? undefined : "No tokens yet");
  }

  memory({ memory, pages }) {
    const slots = memory.slot_bytes;
    const all = memory.effective || 1;
    const sizes = [
      ["Experts", slots, "accent"],
      ["Dense parts", memory.dense + memory.dense_ring, "shade-1"],
      ["Keys and values", memory.kv_cache, "shade-2"],
      ["Scratch", memory.scratch, "shade-3"],
    ];
    find("memory-total").textContent = bytes(memory.effective);
    stack("memory", sizes.map(([label, size, shade]) => ({ label, shade, share: size / all, text: bytes(size) })));
    find("pages").replaceChildren(
      ...pages.map(({ kind, total, free }) => {
        const meter = make("meter", { max: total, value: total - free, "aria-label": `Pages in use: ${kind}` });
        return make("div", { class: "page-kind" }, make("span", {}, `Pages of ${kind}`), meter, make("span", { class: "dim" }, `${count(total - free)} of ${count(total)}`));
      }),
    );
  }

  redraw() {
    if (!this.report) return;
    drawTrace(find("rate-trace"), this.traces.rate);
    drawTrace(find("drive-trace"), this.traces.drive);
    this.experts.draw();
  }
}

function stateOf(status, report) {
  if (!status) return "Not loaded: the first request opens it.";
  if (report?.at_rest) return "At rest: its memory is with the system until the next request.";
  if (status.decoding > 0) return "Generating";
  if (status.reading > 0) return "Reading a prompt";
  return report ? "Idle. The figures are of its latest work." : "Idle";
}

function pulseOf(status) {
  return status.tokens_per_second > 0 && status.decoding > 0 ? `${short(status.tokens_per_second)} tokens/s` : "Reading";
}

function queueOf({ decoding = 0, reading = 0, queued = 0, saved = 0 }) {
  const parts = [
    [decoding, "generating"],
    [reading, "reading a prompt"],
    [queued, "waiting"],
    [saved, "set aside"],
  ];
  const words = parts.filter(([number]) => number > 0).map(([number, what]) => `${count(number)} ${what}`);
  return words.length > 0 ? words.join(", ") : "Nobody is waiting.";
}

const milliseconds = (seconds) => (seconds >= 1 ? `${short(seconds)} s` : `${short(seconds * 1000)} ms`);

/** A bar of parts, and its legend. */
function stack(name, parts, nothing) {
  const bar = find(`${name}-bar`);
  const legend = find(`${name}-legend`);
  if (bar.children.length !== parts.length) {
    bar.replaceChildren(...parts.map(({ shade }) => make("span", { class: shade })));
    legend.replaceChildren(
      ...parts.map(({ shade, label }) => make("div", {}, make("dt", {}, make("span", { class: `swatch ${shade}` }), label), make("dd"))),
    );
  }
  const percent = (share) => `${Math.round(share * 100)} %`;
  parts.forEach(({ share, text }, index) => {
    bar.children[index].style.flexGrow = String(share);
    legend.children[index].lastChild.replaceChildren(text, make("span", { class: "dim" }, percent(share)));
  });
  bar.setAttribute("aria-label", nothing ?? parts.map(({ label, share }) => `${label} ${percent(share)}`).join(", "));
}

function trace(points, value) {
  points.push(Number.isFinite(value) ? value : 0);
  if (points.length > TRACE) points.shift();
}

/** A canvas of its size in device pixels, cleared; null while it has none. */
function cleared(canvas, height) {
  const width = canvas.clientWidth;
  const scale = devicePixelRatio || 1;
  if (width === 0) return null;
  canvas.width = Math.round(width * scale);
  canvas.height = Math.round((height ?? canvas.clientHeight) * scale);
  return canvas.getContext("2d");
}

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function drawTrace(canvas, points) {
  const context = cleared(canvas);
  if (!context || points.length < 2) return;
  const { width, height } = canvas;
  const most = Math.max(...points) || 1;
  const line = 1.5 * (devicePixelRatio || 1);
  const x = (index) => width - ((points.length - 1 - index) / (TRACE - 1)) * width;
  const y = (value) => height - line - (value / most) * (height - 2 * line);
  context.beginPath();
  points.forEach((value, index) => context.lineTo(x(index), y(value)));
  context.lineWidth = line;
  context.lineJoin = "round";
  context.strokeStyle = colour("--accent");
  context.stroke();
  context.lineTo(width, height);
  context.lineTo(x(0), height);
  context.globalAlpha = 0.12;
  context.fillStyle = colour("--accent");
  context.fill();
}

/** The picture of which experts are in memory: a row for each layer, a mark for each expert. */
class Experts {
  constructor(canvas, caption) {
    this.canvas = canvas;
    this.caption = caption;
    this.usual = [...caption.childNodes];
    this.layers = [];
    this.pointed = null;
    const point = (event) => this.point(event);
    canvas.addEventListener("pointermove", point);
    canvas.addEventListener("pointerdown", point);
    canvas.addEventListener("pointerleave", () => this.caption.replaceChildren(...this.usual));
  }

  /** Takes a report's layers; an expert that was not there in the last report has just come. */
  take(id, layers) {
    const before = this.id === id ? this.layers : [];
    this.id = id;
    this.layers = layers.map(({ layer, experts, resident }, index) => {
      const bits = bitsOf(resident, experts);
      const old = before[index];
      const ages = bits.map((bit, expert) => {
        if (!bit) return -1;
        const age = old?.ages[expert];
        return old === undefined ? FRESH : age === undefined || age < 0 ? 0 : Math.min(age + 1, FRESH);
      });
      return { layer, ages };
    });
    const [there, all] = this.layers.reduce(([n, m], { ages }) => [n + ages.filter((age) => age >= 0).length, m + ages.length], [0, 0]);
    find("expert-count").textContent = `${count(there)} of ${count(all)}`;
    this.canvas.setAttribute("aria-label", `${count(there)} of ${count(all)} experts are in memory, in ${plural(layers.length, "layer")}`);
    this.canvas.closest("section").hidden = all === 0;
  }

  draw() {
    const columns = Math.max(1, ...this.layers.map(({ ages }) => ages.length));
    const cell = this.canvas.clientWidth / columns;
    const height = Math.min(16, Math.max(3, cell, 180 / Math.max(1, this.layers.length)));
    this.canvas.style.height = `${height * Math.max(1, this.layers.length)}px`;
    const context = cleared(this.canvas, height * this.layers.length);
    if (!context || this.layers.length === 0) return;
    const [across, down] = [this.canvas.width / columns, this.canvas.height / this.layers.length];
    // Between marks of a few pixels, gaps would be all that one sees.
    const gap = Math.min(across, down) >= 4 ? Math.round(Math.min(across, down) / 5) : 0;
    const colours = [colour("--rule"), colour("--accent"), colour("--shade-2")];
    this.layers.forEach(({ ages }, row) => {
      const top = Math.round(row * down);
      const tall = Math.round((row + 1) * down) - top - gap;
      ages.forEach((age, column) => {
        const left = Math.round(column * across);
        const wide = Math.max(1, Math.round((column + 1) * across) - left - gap);
        context.fillStyle = colours[age < 0 ? 0 : age < FRESH ? 1 : 2];
        context.fillRect(left, top, wide, tall);
      });
    });
  }

  point({ offsetX, offsetY }) {
    const row = this.layers[Math.floor((offsetY / this.canvas.clientHeight) * this.layers.length)];
    const columns = Math.max(1, ...this.layers.map(({ ages }) => ages.length));
    const expert = Math.floor((offsetX / this.canvas.clientWidth) * columns);
    if (row?.ages[expert] === undefined) return;
    const where = row.ages[expert] < 0 ? "on the drive" : row.ages[expert] < FRESH ? "just come to memory" : "in memory";
    this.caption.textContent = `Layer ${row.layer}, expert ${expert}: ${where}`;
  }
}

/** For each expert whether it is in memory: hexadecimal digits of four experts each, the first the highest bit. */
function bitsOf(digits, experts) {
  return Array.from({ length: Math.min(experts, 1 << 16) }, (_, expert) => {
    const four = Number.parseInt(digits[expert >> 2] ?? "0", 16);
    return ((four >> (3 - (expert & 3))) & 1) === 1;
  });
}
