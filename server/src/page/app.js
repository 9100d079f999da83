// The page: conversations on the left, the chosen one in the middle, the status of the model on the right.

import { bytes, download, find, make, plural } from "./dom.js";
import { Live } from "./live.js";
import { Messages } from "./messages.js";
import * as store from "./store.js";
import { Refused, ask, stream } from "./stream.js";

/** While an answer comes, it is kept this often, in milliseconds. */
const KEEP_EVERY = 700;

let conversation = store.begin();
let models = [];
/** Answers that are coming, by conversation: the conversation, the message, and what ends it. */
const runs = new Map();

const messages = new Messages(find("messages"), { retry, edit, turn, say });
const live = new Live(chosenModel, connect);

// ---- What is shown -------------------------------------------------------------------------------------------------------------

function show() {
  const empty = make("div", { class: "empty" }, make("p", {}, "Ask something."), make("p", { class: "dim" }, "Nothing leaves this browser and the server."));
  messages.show(conversation, store.path(conversation), empty);
  const title = conversation.title || "New conversation";
  find("title").textContent = title;
  document.title = conversation.title ? `${title} · Sluice` : "Sluice";
  showSend();
  keepFocus();
  showLatest();
}

/** Where the element that had the focus is gone, the message field gets it; not on phones, where a keyboard would come up. */
function keepFocus() {
  if (document.activeElement === document.body && matchMedia("(hover: hover)").matches) find("message").focus({ preventScroll: true });
}

function showSend() {
  const running = runs.has(conversation.id);
  find("send").textContent = running ? "Stop" : "Send";
  find("send").classList.toggle("stops", running);
  find("send").disabled = !running && find("message").value.trim() === "";
}

function open(id) {
  const kept = runs.get(id)?.conversation ?? store.load(id);
  if (!kept) {
    notice("This conversation is damaged or gone.");
    return;
  }
  conversation = kept;
  settle();
  store.setCurrent(id);
  if (conversation.model && models.includes(conversation.model)) find("model").value = conversation.model;
  show();
  showList();
  closePanels();
  scrollDown(true);
}

/** An answer that is kept as coming, though nothing brings it, was cut off. */
function settle() {
  if (runs.has(conversation.id)) return;
  const cut = Object.values(conversation.nodes).filter((node) => node.state === "running");
  cut.forEach((node) => (node.state = "cut"));
  if (cut.length > 0) store.save(conversation);
}

function showList() {
  const items = store.list().map(({ id, title }) => conversationItem(id, title));
  find("conversations").replaceChildren(...items);
}

function conversationItem(id, title) {
  const shown = id === conversation.id;
  const link = make("button", { class: "title", type: "button", "aria-current": shown ? "true" : undefined, on: { click: () => open(id) } }, title);
  if (runs.has(id)) link.append(make("span", { class: "busy", title: "An answer is coming" }));
  const act = (label, run) => make("button", { class: "quiet", type: "button", "aria-label": `${label}: ${title}`, on: { click: run } }, label);
  const item = make("li", { class: shown ? "shown" : undefined }, link);
  const acts = [act("Rename", () => rename(item, id, title)), act("Export", () => exportOne(id)), act("Delete", () => removeOne(id))];
  item.append(make("div", { class: "item-acts" }, ...acts));
  return item;
}

function rename(item, id, title) {
  const field = make("input", { type: "text", "aria-label": "Title of the conversation", maxlength: "200" });
  field.value = title;
  let done = false;
  const end = (keep) => {
    if (done) return;
    done = true;
    const text = field.value.trim();
    const kept = id === conversation.id ? conversation : (runs.get(id)?.conversation ?? store.load(id));
    if (keep && text && kept) {
      kept.title = text;
      keepNow(kept);
    }
    show();
    showList();
  };
  field.addEventListener("keydown", (event) => {
    if (event.key === "Enter") end(true);
    else if (event.key === "Escape") end(false);
    else return;
    event.stopPropagation();
  });
  field.addEventListener("blur", () => end(true));
  item.replaceChildren(field);
  field.select();
}

function exportOne(id) {
  const kept = id === conversation.id ? conversation : store.load(id);
  if (kept) download(`${(kept.title || "conversation").replace(/[^\p{L}\p{N} _-]+/gu, "").slice(0, 60).trim() || "conversation"}.json`, JSON.stringify(kept, null, 2));
}

function removeOne(id) {
  stop(id);
  const kept = id === conversation.id ? conversation : store.load(id);
  store.remove(id);
  if (id === conversation.id) fresh();
  showList();
  if (!kept) return;
  const undo = () => {
    store.save(kept);
    open(id);
    notice("");
  };
  notice(`Deleted “${kept.title}”.`, make("button", { class: "quiet", type: "button", on: { click: undo } }, "Undo"));
}

function fresh() {
  conversation = store.begin();
  store.setCurrent(conversation.id);
  show();
  showList();
  closePanels();
  find("message").focus();
}

function notice(text, ...more) {
  find("notice").replaceChildren(text, ...more);
  find("notice").hidden = !text;
}

/** Reads to those who listen instead of looking. */
function say(text) {
  if (text.trim()) find("said").append(make("p", {}, text));
  while (find("said").children.length > 50) find("said").firstChild.remove();
}

// ---- Keeping -------------------------------------------------------------------------------------------------------------------

function keepNow(kept) {
  const problem = store.save(kept);
  if (problem) notice(problem);
}

function touch(kept) {
  kept.updated = Date.now();
  keepNow(kept);
}

// ---- Asking --------------------------------------------------------------------------------------------------------------------

function chosenModel() {
  return find("model").value;
}

function send() {
  const text = find("message").value;
  if (!text.trim() || runs.has(conversation.id)) return;
  find("message").value = "";
  grow();
  const last = store.path(conversation).at(-1) ?? null;
  const asked = store.add(conversation, last?.id ?? null, { role: "user", text, state: "done" });
  answer(conversation, asked);
}

function retry(node) {
  if (runs.has(conversation.id)) return;
  answer(conversation, conversation.nodes[node.parent]);
}

function edit(node, text) {
  if (runs.has(conversation.id)) stop(conversation.id);
  const asked = store.add(conversation, node.parent, { role: "user", text, state: "done" });
  answer(conversation, asked);
}

function turn(node, by) {
  const ids = store.siblings(conversation, node);
  const next = conversation.nodes[ids[ids.indexOf(node.id) + by]];
  if (!next) return;
  store.choose(conversation, next);
  keepNow(conversation);
  show();
  messages.focusTurn(next, by);
}

/** What the server is asked. */
function requestOf(kept, asked) {
  const { system, temperature, maxTokens, seed, thinking } = store.settings();
  const spoken = store.upTo(kept, asked).filter((node) => node.role === "user" || node.text || node.calls.length === 0);
  const body = { messages: spoken.map(({ role, text }) => ({ role, content: text })) };
  if (kept.model) body.model = kept.model;
  if (system?.trim()) body.messages.unshift({ role: "system", content: system });
  if (Number.isFinite(temperature)) body.temperature = temperature;
  if (Number.isInteger(maxTokens)) body.max_completion_tokens = maxTokens;
  if (Number.isInteger(seed)) body.seed = seed;
  // Templates of different families know one or the other name.
  if (thinking) body.chat_template_kwargs = { enable_thinking: thinking === "on", thinking: thinking === "on" };
  return body;
}

async function answer(kept, asked) {
  kept.model = chosenModel();
  const body = requestOf(kept, asked);
  const node = store.add(kept, asked.id, { role: "assistant", text: "", state: "running", model: kept.model, started: Date.now() });
  const run = { conversation: kept, node, control: new AbortController(), dirty: false, kept: 0, timer: 0 };
  runs.set(kept.id, run);
  store.setCurrent(kept.id);
  notice("");
  find("said").replaceChildren();
  touch(kept);
  show();
  showList();
  scrollDown(true);
  const started = performance.now();
  try {
    await stream(body, run.control.signal, (part) => take(run, part, performance.now() - started));
    node.state = "done";
  } catch (error) {
    fail(node, error, run.control.signal.aborted);
  }
  node.millis = performance.now() - started;
  end(run);
}

function take(run, part, millis) {
  const { node } = run;
  if (part.progress) node.progress = part.progress;
  if (part.text || part.thinking || part.call) node.firstAfter ??= millis;
  if (part.thinking) node.thinking += part.thinking;
  if (part.text || part.call) {
    if (node.thinking) node.thoughtFor ??= millis - node.firstAfter;
    node.text += part.text ?? "";
  }
  if (part.call) {
    while (node.calls.length <= part.call.index) node.calls.push({ name: "", arguments: "" });
    node.calls[part.call.index].name ||= part.call.name;
    node.calls[part.call.index].arguments += part.call.arguments;
  }
  if (part.usage) node.usage = part.usage;
  if (part.finish) node.finish = part.finish;
  run.dirty = true;
  run.timer ||= setTimeout(() => paint(run), run.pause ?? 30);
}

/** Shows what has come. The longer that takes, the less often it is done. */
function paint(run) {
  run.timer = 0;
  const started = performance.now();
  if (run.conversation === conversation) {
    const follow = isAtEnd();
    messages.update(run.node);
    if (follow) scrollDown();
  }
  if (started - run.kept > KEEP_EVERY && run.dirty) {
    run.kept = started;
    run.dirty = false;
    keepNow(run.conversation);
  }
  run.pause = Math.max(30, 4 * (performance.now() - started));
}

function fail(node, error, stopped) {
  if (stopped) {
    node.state = "stopped";
    return;
  }
  const refused = error instanceof Refused;
  node.state = !refused && (node.text || node.thinking) ? "cut" : "failed";
  if (refused && error.status === 429) node.error = `The server is busy${error.retryAfter > 0 ? `: try again in ${error.retryAfter} s` : ""}.`;
  else if (refused) node.error = error.message;
  else node.error = "The server does not answer.";
  if (refused && error.status === 401) {
    node.error = "The server asks for an API key.";
    openSettings("key");
  }
}

function end(run) {
  clearTimeout(run.timer);
  delete run.node.progress;
  if (runs.get(run.conversation.id) === run) runs.delete(run.conversation.id);
  if (store.isKept(run.conversation.id)) touch(run.conversation);
  if (run.conversation === conversation) {
    const follow = isAtEnd();
    messages.update(run.node);
    showSend();
    if (follow) scrollDown();
  }
  showList();
  showSessions();
}

function stop(id) {
  const run = runs.get(id);
  if (!run) return;
  runs.delete(id);
  run.control.abort();
}

// ---- Scrolling -----------------------------------------------------------------------------------------------------------------

const isAtEnd = () => find("scroll").scrollHeight - find("scroll").scrollTop - find("scroll").clientHeight < 60;

function scrollDown(always = false) {
  const area = find("scroll");
  area.scrollTop = area.scrollHeight;
  if (always) requestAnimationFrame(() => (area.scrollTop = area.scrollHeight));
}

/** The way down is shown to those who are not there. */
function showLatest() {
  find("latest").hidden = isAtEnd();
}

find("scroll").addEventListener("scroll", showLatest, { passive: true });
new ResizeObserver(showLatest).observe(find("messages"));
find("latest").addEventListener("click", () => scrollDown(true));

// ---- The message field ---------------------------------------------------------------------------------------------------------

function grow() {
  const field = find("message");
  field.style.height = "auto";
  field.style.height = `${Math.min(field.scrollHeight, innerHeight * 0.4)}px`;
  showSend();
}

/** While letters are composed, Enter chooses among them; Safari says so by a code only. */
const isComposing = (event) => event.isComposing || event.keyCode === 229;

find("message").addEventListener("input", grow);
find("message").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || isComposing(event)) return;
  event.preventDefault();
  send();
});
find("send").addEventListener("click", () => (runs.has(conversation.id) ? stop(conversation.id) : send()));
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || find("settings").open) return;
  if (closePanels()) return;
  stop(conversation.id);
});

// ---- Panels --------------------------------------------------------------------------------------------------------------------

const PANELS = ["side", "live"];

function openPanel(name, shown) {
  const panel = find(name);
  document.body.classList.toggle(`with-${name}`, shown);
  find(`open-${name}`).setAttribute("aria-expanded", String(shown));
  if (shown) panel.querySelector(".close").focus();
  live.redraw();
  fit();
}

function closePanels() {
  const open = PANELS.filter((name) => document.body.classList.contains(`with-${name}`));
  open.forEach((name) => openPanel(name, false));
  if (open.length > 0) find(`open-${open[0]}`).focus();
  return open.length > 0;
}

/** What is not seen cannot have the focus either. */
function fit() {
  const over = PANELS.filter((name) => getComputedStyle(find(name)).position === "fixed");
  const open = over.filter((name) => document.body.classList.contains(`with-${name}`));
  PANELS.forEach((name) => (find(name).inert = over.includes(name) && !open.includes(name)));
  find("chat").inert = open.length > 0;
}

PANELS.forEach((name) => {
  find(`open-${name}`).addEventListener("click", () => openPanel(name, !document.body.classList.contains(`with-${name}`)));
  find(`close-${name}`).addEventListener("click", closePanels);
});
addEventListener("resize", fit);
find("new").addEventListener("click", fresh);

// ---- Settings ------------------------------------------------------------------------------------------------------------------

const NUMBERS = { temperature: "temperature", "max-tokens": "maxTokens", seed: "seed" };

function openSettings(focus) {
  const values = store.settings();
  find("system").value = values.system ?? "";
  find("thinking").value = values.thinking ?? "";
  for (const [id, name] of Object.entries(NUMBERS)) find(id).value = values[name] ?? "";
  find("key").value = sessionStorage.getItem("sluice.key") ?? "";
  if (!find("settings").open) find("settings").showModal();
  if (focus) find(focus).focus();
}

function takeSettings() {
  const values = { system: find("system").value, thinking: find("thinking").value };
  for (const [id, name] of Object.entries(NUMBERS)) {
    const field = find(id);
    if (field.value !== "" && field.validity.valid) values[name] = field.valueAsNumber;
  }
  store.setSettings(values);
  const before = sessionStorage.getItem("sluice.key") ?? "";
  sessionStorage.setItem("sluice.key", find("key").value.trim());
  if (before !== find("key").value.trim()) {
    connect();
    live.poll();
  }
}

find("open-settings").addEventListener("click", () => openSettings());
find("close-settings").addEventListener("click", () => find("settings").close());
find("settings").addEventListener("close", takeSettings);
find("settings").addEventListener("click", (event) => event.target === find("settings") && find("settings").close());

// ---- The server ----------------------------------------------------------------------------------------------------------------

async function connect() {
  showSessions();
  try {
    const { data = [] } = await ask("/v1/models");
    models = data.map((model) => String(model.id));
  } catch {
    // The status says what is wrong.
    return;
  }
  const before = conversation.model || localStorage.getItem("sluice.model");
  find("model").replaceChildren(...models.map((id) => make("option", { value: id }, id)));
  if (models.includes(before)) find("model").value = before;
  find("choice").hidden = models.length < 2;
}

find("model").addEventListener("change", () => {
  localStorage.setItem("sluice.model", chosenModel());
  live.poll();
});

/** The sequences that the server keeps; a server without them has no list. */
async function showSessions() {
  let sessions;
  try {
    sessions = (await ask("/sessions")).data ?? [];
  } catch {
    find("kept").hidden = true;
    return;
  }
  find("kept").hidden = sessions.length === 0;
  const total = sessions.reduce((sum, session) => sum + (Number(session.bytes) || 0), 0);
  find("kept-total").textContent = `${sessions.length}, ${bytes(total)}`;
  find("sessions").replaceChildren(...sessions.slice(0, 500).map(sessionItem));
}

function sessionItem({ id, title, tokens, bytes: size, used }) {
  const name = title ? String(title) : `Session ${String(id).slice(0, 8)}`;
  const when = timeOf(used);
  const about = [plural(Number(tokens) || 0, "token"), bytes(Number(size) || 0), when].filter(Boolean).join(", ");
  const drop = async () => {
    try {
      await ask(`/sessions/${encodeURIComponent(id)}`, { method: "DELETE" });
    } catch (error) {
      notice(`The server keeps it: ${error.message}`);
    }
    showSessions();
  };
  const remove = make("button", { class: "quiet", type: "button", "aria-label": `Delete from the server: ${name}`, on: { click: drop } }, "Delete");
  return make("li", {}, make("span", { class: "title" }, name, make("span", { class: "dim about" }, about)), make("div", { class: "item-acts" }, remove));
}

/** A time in seconds since 1970, or as ISO 8601. */
function timeOf(value) {
  const date = new Date(typeof value === "number" ? value * 1000 : value);
  return Number.isNaN(date.getTime()) ? "" : date.toLocaleString([], { dateStyle: "medium", timeStyle: "short" });
}

// ---- The start -----------------------------------------------------------------------------------------------------------------

/** Another tab has changed a conversation. */
addEventListener("storage", ({ key }) => {
  const id = store.idOf(key);
  if (!id) return;
  if (id === conversation.id && !runs.has(id)) {
    const changed = store.load(id);
    if (changed) conversation = changed;
    show();
  }
  showList();
});

/** What has come is kept, whatever ends the page. */
addEventListener("pagehide", () => runs.forEach((run) => store.save(run.conversation)));

const last = store.current();
if (last && store.isKept(last)) open(last);
else show();
showList();
fit();
connect();
live.poll();
