// Requests to the server, and the events of an answer that is streamed.

/** Longest line that an event may have, in characters: a broken server must not fill the memory. */
const LINE = 8 << 20;
/** Most tool calls of an answer. */
const CALLS = 128;

/** What the server said instead of an answer. */
export class Refused extends Error {
  constructor(status, message, retryAfter) {
    super(message);
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

export const key = () => sessionStorage.getItem("sluice.key") ?? "";

function headers(more = {}) {
  return key() ? { ...more, Authorization: `Bearer ${key()}` } : more;
}

/** Asks for JSON. */
export async function ask(path, options = {}) {
  const response = await fetch(path, { ...options, headers: headers(options.headers), cache: "no-store" });
  if (!response.ok) throw await refusal(response);
  return response.status === 204 ? null : response.json();
}

async function refusal(response) {
  let message = "";
  try {
    const { error } = JSON.parse((await response.text()).slice(0, 100_000));
    message = typeof error === "string" ? error : (error?.message ?? "");
  } catch {
    // Whatever stands before the server, such as a proxy, need not speak JSON.
  }
  const after = Number.parseInt(response.headers.get("retry-after") ?? "", 10);
  return new Refused(response.status, String(message) || `The server answered with status ${response.status}.`, after);
}

/**
 * Streams an answer. `take` is told of changes: `{progress}`, `{text}`, `{thinking}`, `{call: {index, name, arguments}}`, `{usage}`,
 * `{finish}`. Returns when the stream has ended. Throws what went wrong, also if the stream ended too early.
 */
export async function stream(body, signal, take) {
  const response = await fetch("/v1/chat/completions", {
    method: "POST",
    headers: headers({ "Content-Type": "application/json", Accept: "text/event-stream" }),
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
    cache: "no-store",
  });
  if (!response.ok) throw await refusal(response);
  let finished = false;
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const part = JSON.parse(data);
    if (part.error) throw new Refused(0, String(part.error.message ?? part.error));
    if (part.progress) take({ progress: part.progress });
    const choice = part.choices?.[0];
    if (choice) {
      const { progress, delta = {}, finish_reason: finish } = choice;
      if (progress ?? delta.progress) take({ progress: progress ?? delta.progress });
      if (delta.reasoning_content) take({ thinking: String(delta.reasoning_content) });
      if (delta.content) take({ text: String(delta.content) });
      for (const call of delta.tool_calls ?? []) takeCall(call, take);
      if (finish) {
        finished = true;
        take({ finish: String(finish) });
      }
    }
    if (part.usage) take({ usage: part.usage });
  }
  if (!finished) throw new Error("The connection ended before the answer did.");
}

function takeCall(call, take) {
  const index = Number(call.index ?? 0);
  if (!Number.isInteger(index) || index < 0 || index >= CALLS) return;
  const { name = "", arguments: more = "" } = call.function ?? {};
  take({ call: { index, name: String(name), arguments: String(more) } });
}

/** The data of server-sent events (WHATWG HTML, 9.2.6). */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let [rest, data] = ["", []];
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      // A carriage return at the end may be half of a line's end.
      const text = rest + value;
      const whole = text.endsWith("\r") ? text.slice(0, -1) : text;
      const lines = whole.split(/\r\n|\n|\r/);
      rest = lines.pop() + text.slice(whole.length);
      if (rest.length > LINE) throw new Error("The server sent an event that is too long.");
      for (const line of lines) {
        if (line === "" && data.length > 0) {
          yield data.join("\n");
          data = [];
        } else if (line.startsWith("data:")) {
          data.push(line.slice(line[5] === " " ? 6 : 5));
        }
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
