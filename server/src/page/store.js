// Conversations, kept in this browser. A conversation is a tree: a message that is edited, or an answer that is requested again, gets
// a sibling, and `chosen` says which of them are shown.

const PREFIX = "sluice.conversation.";
const SETTINGS = "sluice.settings";
const CURRENT = "sluice.current";

/** A new conversation; it is kept once it has a message. */
export function begin() {
  const now = Date.now();
  const id = `${now.toString(36)}${Math.random().toString(36).slice(2, 8)}`;
  return { version: 1, id, title: "", model: "", created: now, updated: now, next: 1, nodes: {}, roots: [], chosen: {} };
}

/** Adds a message below `parent` (null: at the top), and shows it. */
export function add(conversation, parent, message) {
  const node = { thinking: "", calls: [], children: [], ...message, id: conversation.next++, parent };
  conversation.nodes[node.id] = node;
  siblings(conversation, node).push(node.id);
  choose(conversation, node);
  if (!conversation.title && node.role === "user") conversation.title = titleOf(node.text);
  return node;
}

function titleOf(text) {
  const line = text.trim().split("\n", 1)[0].trim();
  return line.length > 60 ? `${line.slice(0, 59).trimEnd()}…` : line;
}

/** The ids of the message and of those in whose place it can be shown. */
export function siblings(conversation, node) {
  return node.parent === null ? conversation.roots : conversation.nodes[node.parent].children;
}

export function choose(conversation, node) {
  conversation.chosen[node.parent ?? ""] = node.id;
}

/** The messages that are shown, in order. */
export function path(conversation) {
  const nodes = [];
  let ids = conversation.roots;
  let parent = "";
  while (ids.length > 0) {
    const id = ids.includes(conversation.chosen[parent]) ? conversation.chosen[parent] : ids.at(-1);
    const node = conversation.nodes[id];
    nodes.push(node);
    ids = node.children;
    parent = id;
  }
  return nodes;
}

/** The messages from the top to this one. */
export function upTo(conversation, node) {
  const nodes = [];
  for (let at = node; at; at = at.parent === null ? null : conversation.nodes[at.parent]) nodes.unshift(at);
  return nodes;
}

/** Keeps a conversation. Returns what went wrong, or null. */
export function save(conversation) {
  try {
    localStorage.setItem(PREFIX + conversation.id, JSON.stringify(conversation));
    return null;
  } catch {
    return "This browser has no room left for conversations: export and delete some, or this one will be lost.";
  }
}

export function remove(id) {
  localStorage.removeItem(PREFIX + id);
}

/** A conversation as it was kept; null if there is none, or it is damaged. */
export function load(id) {
  return parse(localStorage.getItem(PREFIX + id));
}

function parse(json) {
  try {
    const conversation = JSON.parse(json);
    return isWhole(conversation) ? conversation : null;
  } catch {
    return null;
  }
}

const isList = (ids, nodes, parent) =>
  Array.isArray(ids) && ids.every((id) => Object.hasOwn(nodes, id) && nodes[id].id === id && nodes[id].parent === parent);

function isWhole(conversation) {
  if (conversation?.version !== 1 || !conversation.nodes || typeof conversation.nodes !== "object" || typeof conversation.title !== "string") return false;
  const { nodes, roots, chosen, next } = conversation;
  const isMessage = (node) =>
    ["user", "assistant"].includes(node?.role) &&
    typeof node.text === "string" &&
    node.id < next &&
    (node.parent === null || node.parent < node.id) &&
    typeof node.thinking === "string" &&
    Array.isArray(node.calls) &&
    node.calls.every((call) => typeof call?.name === "string" && typeof call.arguments === "string") &&
    isList(node.children, nodes, node.id);
  return Boolean(chosen) && typeof chosen === "object" && isList(roots, nodes, null) && Object.values(nodes).every(isMessage);
}

/** All conversations, the latest first: id, title and time. */
export function list() {
  const found = [];
  for (let index = 0; index < localStorage.length; index++) {
    const name = localStorage.key(index);
    if (!name.startsWith(PREFIX)) continue;
    const { title, updated } = peek(localStorage.getItem(name)) ?? {};
    if (title !== undefined) found.push({ id: name.slice(PREFIX.length), title: title || "Untitled", updated });
  }
  return found.sort((a, b) => b.updated - a.updated);
}

/** Title and time, which stand first, without reading all of a long conversation. */
function peek(json) {
  const head = /^\{"version":1,"id":"[^"]*","title":("(?:[^"\\]|\\.)*"),"model":"(?:[^"\\]|\\.)*","created":\d+,"updated":(\d+),/.exec(json);
  if (head) return { title: JSON.parse(head[1]), updated: Number(head[2]) };
  return parse(json);
}

export const isKept = (id) => localStorage.getItem(PREFIX + id) !== null;
export const idOf = (storageKey) => (storageKey?.startsWith(PREFIX) ? storageKey.slice(PREFIX.length) : null);

export const current = () => sessionStorage.getItem(CURRENT) ?? localStorage.getItem(CURRENT);

/** Each tab shows its own conversation; a new tab begins with the latest. */
export function setCurrent(id) {
  sessionStorage.setItem(CURRENT, id);
  try {
    localStorage.setItem(CURRENT, id);
  } catch {
    // Without room it is only this tab that remembers.
  }
}

export function settings() {
  try {
    const kept = JSON.parse(localStorage.getItem(SETTINGS));
    return kept && typeof kept === "object" ? kept : {};
  } catch {
    return {};
  }
}

export function setSettings(values) {
  try {
    localStorage.setItem(SETTINGS, JSON.stringify(values));
  } catch {
    // They hold until the page is closed.
  }
}
