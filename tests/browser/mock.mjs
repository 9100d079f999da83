// A small stand-in for the server's API, for tests of the page: what the last message says decides how it answers.

import { readFileSync } from "node:fs";
import { createServer } from "node:http";

const SOURCE = new URL("../../server/src/", import.meta.url);
const KINDS = { html: "text/html", css: "text/css", js: "text/javascript", svg: "image/svg+xml" };

/** The policy as the server sends it. */
function policy() {
  const text = /const POLICY: &str = "([^"]*)"/.exec(readFileSync(new URL("page.rs", SOURCE), "utf8"))[1];
  return text.replace(/\\\n\s*/g, "");
}

export const HOSTILE = [
  "<img src=x onerror=\"window.broken=1\"> and <script>window.broken=1</script> and </script><svg onload=window.broken=1>",
  "",
  "[click](javascript:window.broken=1) [data](data:text/html,<script>window.broken=1</script>) [odd](java\tscript:window.broken=1)",
  "[user](https://trusted.example@evil.example/) ![picture](https://evil.example/track.png) [file](file:///etc/passwd)",
  "[fine](https://example.org/a_(b)) and https://example.org/path?q=1. <https://example.org/angle>",
  "",
  "# <iframe src=//evil.example></iframe>",
  "",
  "| <b>a</b> | b |",
  "|---|---|",
  "| <style>*{display:none}</style> | `x|y` |",
  "",
  "```html\"><img src=x onerror=window.broken=1>",
  "</code></pre><script>window.broken=1</script>",
  "```",
  "",
  "> ".repeat(400) + "deep",
  "",
  "*".repeat(3000) + "a" + "_".repeat(3000) + "[".repeat(3000) + "`".repeat(301) + "~~x~~ ".repeat(300),
  "",
  "- ".repeat(300) + "end <a href=\"javascript:window.broken=1\" onclick=window.broken=1>x</a>",
  "",
  "```js",
  "never closed <script>window.broken=1</script>",
].join("\n");

export const RICH = `The eviction policy decides **which expert leaves** when another one needs its slot. Two facts matter:

1. A cycle of one token touches *every layer once*, so least recently used finds nothing once the cache is smaller than a cycle.
2. Routing has a long memory: an expert that was asked for in the last ten tokens is asked for again \`3.1\` times as often.
   - this holds for all layers but the first,
   - and it holds ~~only~~ also across topics.

| policy | found in memory | GB a token |
|:-------|------:|------:|
| least recently used | 31.2 % | 2.91 |
| least often used | 44.8 % | 2.33 |
| next use | **52.6 %** | 2.00 |

A sketch of the estimate, as a priority that is cheap to keep:

\`\`\`rust
/// When the expert is expected next, in tokens from now.
fn expected(last: u64, now: u64, rate: f32) -> f32 {
    let gap = (now - last) as f32; // since it was used
    match rate > 0.0 {
        true => (1.0 / rate).max(gap * 0.5),
        false => f32::INFINITY,
    }
}
\`\`\`

> A slot that is freed too early costs one read; one that is freed too late costs nothing but patience.

See [the paper](https://example.org/belady) for the bound.`;

const THOUGHT = "The user asks about the policy. Least recently used is the baseline; I should explain why it fails for cycles, then show figures.";

const sleep = (millis) => new Promise((wake) => setTimeout(wake, millis));

/** What is streamed for a message: parts, each with its delta or more, and the time before it. */
function* script(text) {
  const words = (content, pause) => content.match(/\S+\s*|\s+/g).map((piece) => [{ delta: { content: piece } }, pause]);
  const thoughts = (content) => content.match(/\S+\s*/g).map((piece) => [{ delta: { reasoning_content: piece } }, 4]);
  if (text.includes("queue")) {
    for (let ahead = 2; ahead >= 0; ahead--) yield [{ delta: {}, progress: { state: "queued", ahead } }, 150];
    for (let read = 0; read <= 8000; read += 2000) yield [{ delta: {}, progress: { state: "reading", read, prompt: 8000 } }, 150];
  }
  if (text.includes("think")) yield* thoughts(THOUGHT);
  if (text.includes("tool")) {
    yield [{ delta: { tool_calls: [{ index: 0, id: "c1", type: "function", function: { name: "look_up", arguments: '{"wo' } }] } }, 5];
    yield [{ delta: { tool_calls: [{ index: 0, function: { arguments: 'rd":"<b>x</b>"}' } }] } }, 5];
  } else if (text.includes("hostile")) yield* [...HOSTILE].reduce((all, _, at) => (at % 97 ? all : [...all, [{ delta: { content: HOSTILE.slice(at, at + 97) } }, 1]]), []);
  else if (text.includes("rich")) yield* words(RICH, 4);
  else if (text.includes("slow")) yield* words("Slowly, one word comes after the other. ".repeat(60), 30);
  else if (text.includes("cut")) yield* [...words("This will be cut", 5), ["cut", 0]];
  else if (text.includes("fail")) yield* [...words("Half an ", 5), ["fail", 5]];
  else yield* words(`You said: ${text}`, 5);
}

async function answer(request, response, state) {
  let json = "";
  for await (const piece of request) json += piece;
  const body = JSON.parse(json);
  state.requests.push(body);
  const text = body.messages.at(-1).content;
  if (text.includes("busy")) {
    response.writeHead(429, { "Content-Type": "application/json", "Retry-After": "7" });
    response.end(JSON.stringify({ error: { message: "the queue is full", type: "rate_limit_error" } }));
    return;
  }
  response.writeHead(200, { "Content-Type": "text/event-stream" });
  response.on("close", () => (state.closed += response.writableFinished ? 0 : 1));
  const send = (part) => response.write(`data: ${JSON.stringify({ object: "chat.completion.chunk", ...part })}\n\n`);
  response.write(": comment\r\n\r\n");
  let tokens = 0;
  for (const [part, pause] of script(text)) {
    if (response.destroyed) return;
    if (pause) await sleep(pause);
    if (part === "cut") return void response.destroy();
    if (part === "fail") {
      send({ error: { message: "an extent is damaged: layer 3 expert 5" } });
      return void response.end();
    }
    const { progress, delta } = part;
    tokens++;
    send({ choices: [{ index: 0, delta, finish_reason: null }], ...(progress && { progress }) });
  }
  send({ choices: [{ index: 0, delta: {}, finish_reason: "stop" }] });
  send({ choices: [], usage: { prompt_tokens: 8012, completion_tokens: tokens, prompt_tokens_details: { cached_tokens: 7936 } } });
  response.end("data: [DONE]\n\n");
}

/** A model at work: 58 layers of 256 experts, some of which change with each look. */
function status(state) {
  const look = state.looks++;
  const random = (seed) => ((Math.imul(seed ^ 0x9e3779b9, 0x85ebca6b) >>> 7) % 1000) / 1000;
  const digits = (layer) =>
    Array.from({ length: 64 }, (_, four) => {
      let digit = 0;
      for (let bit = 0; bit < 4; bit++) {
        const expert = four * 4 + bit;
        const hot = random(layer * 7919 + expert * 104_729) < 0.22;
        const comes = random(layer * 31 + expert * 17 + look * 65_537) < 0.015;
        digit = digit * 2 + (hot || comes ? 1 : 0);
      }
      return digit.toString(16);
    }).join("");
  const experts = Array.from({ length: 58 }, (_, layer) => ({ layer: layer + 3, experts: 256, resident: digits(layer + 3) }));
  const rate = 9.2 + Math.sin(look / 3);
  const stats = {
    tokens: 46, seconds: 4.96, attention_seconds: 0.71, expert_seconds: 1.62, io_wait_seconds: 2.05, head_seconds: 0.21,
    other_seconds: 0.37, hits: 11_300, misses: 10_044, prefetched: 3100, prefetched_used: 2700, prefetched_wasted: 300,
    expert_bytes_read: 26_400_000_000, dense_bytes_read: 0, replaced: 0, warmed: 0, warmed_bytes: 0,
  };
  const report = {
    name: "deepseek-v3.2-q4", family: "deepseek_v32", at_rest: false, read_path: "io_uring (registered buffers), direct", isa: "avx512",
    threads: 16, total: stats,
    window: { seconds: 5, stats, tokens_per_second: rate, hit_rate: 0.529, drive_bytes_per_second: 5.3e9 + 4e8 * Math.sin(look) },
    memory: {
      requested: 64e9, available: 120e9, effective: 64e9, dense: 11.2e9, dense_streamed: 0, dense_ring: 0, kv_cache: 6.4e9, kv_type: "f16",
      sequences: 4, context: 65_536, scratch: 1.1e9, rows: 512, slots: 3775, slot_len: 12e6, experts: 14_848,
    },
    pages: [{ kind: "64 tokens", bytes: 1_500_000, total: 4096, free: 2710 }],
    experts,
  };
  const works = { queued: 2, reading: 1, decoding: 2, saved: 0, preemptions: 0, proposed: 0, came_true: 0, prompt_tokens_per_second: 118, tokens_per_second: rate };
  return { models: [{ id: "deepseek-v3.2", status: works, report }, { id: "qwen3-next", status: null, report: null }] };
}

function json(response, value, code = 200) {
  response.writeHead(code, { "Content-Type": "application/json" });
  response.end(JSON.stringify(value));
}

function page(path, response) {
  const name = path === "/" ? "index.html" : path.slice("/page/".length);
  let text;
  try {
    if (!/^[a-z]+\.[a-z]+$/.test(name)) throw new Error("no such file");
    text = readFileSync(new URL(`page/${name}`, SOURCE));
  } catch {
    return json(response, { error: { message: "not found" } }, 404);
  }
  const kind = KINDS[name.split(".").at(-1)];
  response.writeHead(200, { "Content-Type": `${kind}; charset=utf-8`, "Content-Security-Policy": policy(), "X-Content-Type-Options": "nosniff" });
  response.end(text);
}

/** Starts the stand-in on a free port. */
export async function start({ key } = {}) {
  const state = { requests: [], closed: 0, looks: 0, key };
  state.sessions = [
    { id: "a1", title: "The eviction policy decides", tokens: 8400, bytes: 1_930_000_000, created: 1_795_000_000, used: 1_795_003_600 },
    { id: "b2", title: "", tokens: 512, bytes: 120_000_000, created: 1_795_000_000, used: 1_795_000_100 },
  ];
  const server = createServer((request, response) => {
    const path = new URL(request.url, "http://x").pathname;
    if (path === "/" || path.startsWith("/page/")) return page(path, response);
    if (state.key && request.headers.authorization !== `Bearer ${state.key}`) return json(response, { error: { message: "no key" } }, 401);
    if (path === "/v1/chat/completions") return answer(request, response, state).catch(() => response.destroy());
    if (path === "/v1/models") return json(response, { data: [{ id: "deepseek-v3.2" }, { id: "qwen3-next" }] });
    if (path === "/status") return json(response, status(state));
    if (path === "/sessions") return json(response, { data: state.sessions });
    if (path.startsWith("/sessions/") && request.method === "DELETE") {
      state.sessions = state.sessions.filter(({ id }) => id !== path.slice("/sessions/".length));
      response.writeHead(204);
      return response.end();
    }
    return json(response, { error: { message: "not found" } }, 404);
  });
  await new Promise((ready) => server.listen(0, "127.0.0.1", ready));
  return { base: `http://127.0.0.1:${server.address().port}`, state, stop: () => (server.closeAllConnections(), server.close()) };
}
