// A part of Markdown, as models write it: text into blocks, and blocks into elements. Markup in the text stays text. Every loop goes
// forward, and depths are bounded, so that no text takes more than a time proportional to its length.

import { copyButton, make, safeAddress } from "./dom.js";
import { highlight } from "./highlight.js";

/** Most levels of lists and quotes, and of emphasis. What lies deeper stays as it is written. */
const DEPTH = 12;
const FENCE = /^ {0,3}(`{3,}|~{3,})([^\n]*)$/;
const ITEM = /^( {0,3})([-*+]|\d{1,9}[.)])( +|$)/;
const DEEPER_ITEM = /^ +(?:[-*+]|\d{1,9}[.)])(?: |$)/;

/** The blocks of a text. Each has its source in `raw`: blocks with the same source look the same. */
export function parse(text) {
  return blocksOf(text.replaceAll("\r\n", "\n").replaceAll("\t", "    ").split("\n"), 0);
}

function blocksOf(lines, depth) {
  const blocks = [];
  for (let at = 0; at < lines.length; ) {
    if (lines[at].trim() === "") {
      at++;
      continue;
    }
    const [block, end] = blockAt(lines, at, depth);
    block.raw = lines.slice(at, end).join("\n");
    blocks.push(block);
    at = end;
  }
  return blocks;
}

function blockAt(lines, at, depth) {
  const line = lines[at];
  return (
    fenceAt(lines, at) ??
    headingOf(line, at) ??
    (isRule(line) ? [{ type: "rule" }, at + 1] : null) ??
    tableAt(lines, at) ??
    (depth < DEPTH ? (quoteAt(lines, at, depth) ?? listAt(lines, at, depth)) : null) ??
    paragraphAt(lines, at, depth)
  );
}

function startsBlock(lines, at, depth) {
  const line = lines[at];
  const starts = isFence(line) || headingOf(line, at) || isRule(line);
  return starts || (depth < DEPTH && (/^ {0,3}>/.test(line) || (ITEM.test(line) && line.trim().length > 1))) || isTable(lines, at);
}

function isFence(line) {
  const fence = FENCE.exec(line);
  return fence !== null && !(fence[1][0] === "`" && fence[2].includes("`"));
}

function fenceAt(lines, at) {
  if (!isFence(lines[at])) return null;
  const [, mark, words] = FENCE.exec(lines[at]);
  const indent = indentOf(lines[at]);
  const ends = (line) => {
    const end = line.trim();
    return indentOf(line) < 4 && end.length >= mark.length && end === mark[0].repeat(end.length);
  };
  let end = at + 1;
  while (end < lines.length && !ends(lines[end])) end++;
  const code = lines.slice(at + 1, end).map((line) => line.slice(Math.min(indent, indentOf(line))));
  return [{ type: "code", language: words.trim().split(/\s/, 1)[0], text: code.join("\n") }, Math.min(end + 1, lines.length)];
}

function headingOf(line, at) {
  const text = line.trim();
  let level = 0;
  while (text[level] === "#") level++;
  if (level === 0 || level > 6 || indentOf(line) > 3 || (text.length > level && text[level] !== " ")) return null;
  let end = text.length;
  while (text[end - 1] === "#") end--;
  const words = end === text.length || text[end - 1] === " " ? text.slice(level, Math.max(end, level)) : text.slice(level);
  return [{ type: "heading", level, text: words.trim() }, at + 1];
}

function isRule(line) {
  const marks = line.replaceAll(" ", "");
  return marks.length >= 3 && "-*_".includes(marks[0]) && marks === marks[0].repeat(marks.length) && indentOf(line) < 4;
}

function isTable(lines, at) {
  const divider = lines[at + 1];
  if (!lines[at].includes("|") || divider === undefined || !divider.includes("-") || divider.length > 2000) return false;
  const columns = cells(divider);
  return columns.every((cell) => /^:?-+:?$/.test(cell)) && cells(lines[at]).length === columns.length;
}

function tableAt(lines, at) {
  if (!isTable(lines, at)) return null;
  const align = cells(lines[at + 1]).map((cell) => {
    const [left, right] = [cell.startsWith(":"), cell.endsWith(":")];
    return right ? (left ? "center" : "right") : "left";
  });
  let end = at + 2;
  while (end < lines.length && lines[end].includes("|")) end++;
  const rows = lines.slice(at + 2, end).map((line) => {
    const row = cells(line);
    return align.map((_, column) => row[column] ?? "");
  });
  return [{ type: "table", align, head: cells(lines[at]), rows }, end];
}

/** The cells of a row; a bar behind a backslash is text. */
function cells(line) {
  let row = line.trim();
  if (row.startsWith("|")) row = row.slice(1);
  if (row.endsWith("|") && !row.endsWith("\\|")) row = row.slice(0, -1);
  const found = [""];
  for (let at = 0; at < row.length; at++) {
    if (row[at] === "\\" && row[at + 1] === "|") found[found.length - 1] += row[++at];
    else if (row[at] === "|") found.push("");
    else found[found.length - 1] += row[at];
  }
  return found.map((cell) => cell.trim());
}

function quoteAt(lines, at, depth) {
  let end = at;
  while (end < lines.length && /^ {0,3}>/.test(lines[end])) end++;
  if (end === at) return null;
  const inner = lines.slice(at, end).map((line) => line.replace(/^ {0,3}> ?/, ""));
  return [{ type: "quote", blocks: blocksOf(inner, depth + 1) }, end];
}

function listAt(lines, at, depth) {
  const first = ITEM.exec(lines[at]);
  if (!first) return null;
  const kind = first[2].at(-1);
  const items = [];
  let end = at;
  let loose = false;
  while (end < lines.length) {
    const item = ITEM.exec(lines[end]);
    if (!item || item[2].at(-1) !== kind || isRule(lines[end])) break;
    const [inner, next, blank] = itemAt(lines, end, item);
    items.push(blocksOf(inner, depth + 1));
    const more = next < lines.length && ITEM.exec(lines[next])?.[2].at(-1) === kind;
    loose ||= blank && more;
    end = next;
  }
  if (items.length === 0) return null;
  const start = kind === "." || kind === ")" ? Number.parseInt(first[2], 10) : null;
  return [{ type: "list", start, loose, items }, end];
}

/** The lines of an item without its indent, the line behind it, and whether blank lines precede that. */
function itemAt(lines, at, item) {
  const spaces = item[3].length === 0 || item[3].length > 4 ? 1 : item[3].length;
  const indent = item[1].length + item[2].length + spaces;
  const inner = [lines[at].slice(indent)];
  let end = at + 1;
  let blank = 0;
  for (; end < lines.length; end++) {
    const line = lines[end];
    if (line.trim() === "") {
      blank++;
      continue;
    }
    // Models indent inner lists by two spaces, whatever the width of the outer marker.
    const own = indentOf(line) >= indent || (DEEPER_ITEM.test(line) && indentOf(line) >= item[1].length + 2);
    const lazy = blank === 0 && !ITEM.test(line) && !startsBlock(lines, end, 0);
    if (!own && !lazy) break;
    for (; blank > 0; blank--) inner.push("");
    inner.push(line.slice(Math.min(indent, indentOf(line))));
  }
  return [inner, end - blank, blank > 0];
}

function paragraphAt(lines, at, depth) {
  let end = at + 1;
  while (end < lines.length && lines[end].trim() !== "" && !startsBlock(lines, end, depth)) end++;
  const words = lines.slice(at, end).map((line, index) => (index === 0 ? line.trimStart() : line.replace(/^ +/, "")));
  return [{ type: "paragraph", text: words.join("\n").trimEnd() }, end];
}

function indentOf(line) {
  let indent = 0;
  while (line[indent] === " ") indent++;
  return indent;
}

/** The parts of a line of text: text, code, emphasis, links, breaks. */
export function inline(text) {
  const parts = [];
  const brackets = [];
  const runs = backtickRuns(text);
  let plain = "";
  const flush = () => {
    if (plain) parts.push({ type: "text", text: plain });
    plain = "";
  };
  const push = (part) => {
    flush();
    parts.push(part);
  };
  for (let at = 0; at < text.length; ) {
    const char = text[at];
    if (char === "\\" && /[!-/:-@[-`{-~]/.test(text[at + 1] ?? "")) {
      plain += text[at + 1];
      at += 2;
    } else if (char === "\n") {
      plain = plain.replace(/[ \\]{1,8}$/, "");
      push({ type: "break" });
      at++;
    } else if (char === "`") {
      const length = runLength(text, at, "`");
      const end = closing(runs, length, at + length);
      if (end === undefined) plain += "`".repeat(length);
      else push({ type: "code", text: codeOf(text.slice(at + length, end)) });
      at = end === undefined ? at + length : end + length;
    } else if (char === "*" || char === "_" || char === "~") {
      const length = runLength(text, at, char);
      push(delimiter(text, at, length));
      at += length;
    } else if (char === "[" || (char === "!" && text[at + 1] === "[")) {
      const mark = char === "!" ? "![" : "[";
      push({ type: "text", text: mark });
      brackets.push({ place: parts.length - 1, image: char === "!" });
      at += mark.length;
    } else if (char === "]") {
      flush();
      const open = brackets.pop();
      const target = open && targetAt(text, at + 1);
      if (target) {
        const label = emphasise(parts.splice(open.place).slice(1));
        parts.push({ type: "link", address: target.address, image: open.image, parts: label });
        // A link has no links in it.
        brackets.length = 0;
      } else {
        plain += "]";
      }
      at = target ? target.end : at + 1;
    } else {
      const link = char === "<" || char === "h" ? addressAt(text, at) : null;
      if (link) push({ type: "link", address: link.address, parts: [{ type: "text", text: link.address }] });
      else plain += char;
      at = link ? link.end : at + 1;
    }
  }
  flush();
  return emphasise(parts);
}

function runLength(text, at, char) {
  let end = at;
  while (text[end] === char) end++;
  return end - at;
}

/** Where runs of backticks begin, by length. */
function backtickRuns(text) {
  const runs = new Map();
  for (let at = text.indexOf("`"); at >= 0; at = text.indexOf("`", at)) {
    const length = runLength(text, at, "`");
    if (!runs.has(length)) runs.set(length, { places: [], next: 0 });
    runs.get(length).places.push(at);
    at += length;
  }
  return runs;
}

function closing(runs, length, from) {
  const run = runs.get(length);
  while (run.places[run.next] < from) run.next++;
  return run.places[run.next];
}

function codeOf(text) {
  const code = text.replaceAll("\n", " ");
  return code.startsWith(" ") && code.endsWith(" ") && code.trim() !== "" ? code.slice(1, -1) : code;
}

/** Where a link leads: `(address "title")`. */
function targetAt(text, at) {
  if (text[at] !== "(") return null;
  let depth = 0;
  for (let end = at; end < text.length && end - at < 2000; end++) {
    const char = text[end];
    if (char === "\n") return null;
    if (char === "(") depth++;
    if (char === ")" && --depth === 0) {
      const inside = text.slice(at + 1, end).trim();
      const address = inside.startsWith("<") ? inside.slice(1).split(">", 1)[0] : inside.split(" ", 1)[0];
      return { address, end: end + 1 };
    }
  }
  return null;
}

/** An address that stands in the text by itself, or in angle brackets. */
function addressAt(text, at) {
  const angled = text[at] === "<";
  if (!angled && /\w/.test(text[at - 1] ?? "")) return null;
  const found = /^https?:\/\/[^\s<>"`]{1,2000}/.exec(text.slice(at + (angled ? 1 : 0), at + 2010));
  if (!found) return null;
  let address = found[0];
  if (angled) return text[at + 1 + address.length] === ">" ? { address, end: at + address.length + 2 } : null;
  for (;;) {
    const last = address.at(-1);
    const unbalanced = last === ")" && address.split(")").length > address.split("(").length;
    if (!unbalanced && !".,:;!?'*_~]".includes(last)) break;
    address = address.slice(0, -1);
  }
  return address.length > 8 ? { address, end: at + address.length } : null;
}

/** A run of marks that may open or close emphasis (CommonMark 0.31, 6.2). */
function delimiter(text, at, length) {
  const char = text[at];
  const [before, after] = [text[at - 1] ?? " ", text[at + length] ?? " "];
  const isSpace = (c) => /\s/.test(c);
  const isMark = (c) => /[\p{P}\p{S}]/u.test(c);
  const left = !isSpace(after) && (!isMark(after) || isSpace(before) || isMark(before));
  const right = !isSpace(before) && (!isMark(before) || isSpace(after) || isMark(after));
  const opens = char === "_" ? left && (!right || isMark(before)) : left;
  const closes = char === "_" ? right && (!left || isMark(after)) : right;
  const usable = char !== "~" || length === 2;
  return { type: "marks", char, count: length, length, opens: opens && usable, closes: closes && usable };
}

/** Pairs marks, and puts what is between them into emphasis. */
function emphasise(parts) {
  const out = [];
  const openers = [];
  // Below these, no opener fits a closer of the kind: without this, many closers would each look at all openers.
  const bottoms = new Map();
  for (const part of parts) {
    if (part.type !== "marks") {
      out.push(part);
      continue;
    }
    const kind = `${part.char}${part.opens}${part.length % 3}`;
    while (part.closes && part.count > 0) {
      const found = openerFor(part, openers, bottoms.get(kind) ?? 0);
      if (found < 0) {
        bottoms.set(kind, openers.length);
        break;
      }
      enclose(out, openers, found, part);
      for (const [other, bottom] of bottoms) bottoms.set(other, Math.min(bottom, openers.length));
    }
    if (part.count > 0) {
      out.push(part);
      if (part.opens) openers.push({ place: out.length - 1, marks: part });
    }
  }
  return out;
}

function openerFor(closer, openers, bottom) {
  for (let at = openers.length - 1; at >= bottom; at--) {
    const { marks } = openers[at];
    if (marks.char !== closer.char) continue;
    const both = marks.closes || closer.opens;
    const odd = both && (marks.length + closer.length) % 3 === 0 && (marks.length % 3 !== 0 || closer.length % 3 !== 0);
    if (!odd) return at;
  }
  return -1;
}

function enclose(out, openers, at, closer) {
  const { place, marks } = openers[at];
  const inner = out.splice(place + 1);
  const used = marks.count >= 2 && closer.count >= 2 ? 2 : 1;
  const depth = 1 + inner.reduce((most, part) => Math.max(most, part.depth ?? 0), 0);
  marks.count -= used;
  closer.count -= used;
  openers.length = marks.count === 0 ? at : at + 1;
  if (marks.count === 0) out.pop();
  if (depth > DEPTH) {
    const written = { type: "text", text: marks.char.repeat(used) };
    out.push(written, ...inner, written);
    return;
  }
  const type = marks.char === "~" ? "struck" : used === 2 ? "strong" : "emphasis";
  out.push({ type, parts: inner, depth });
}

/** Shows Markdown in an element. While a text grows, only blocks that have changed are made anew. */
export class Markdown {
  constructor(element) {
    this.element = element;
    this.shown = [];
  }

  /** Shows this text. Returns how many blocks stand before the one that may still grow. */
  show(text) {
    const blocks = parse(text);
    let same = 0;
    while (same < blocks.length && this.shown[same] === blocks[same].raw) same++;
    while (this.element.childNodes.length > same) this.element.lastChild.remove();
    this.element.append(...blocks.slice(same).map(elementOf));
    this.shown = blocks.map((block) => block.raw);
    return Math.max(0, blocks.length - 1);
  }
}

const INLINE = { strong: "strong", emphasis: "em", struck: "s" };

function partsOf(text) {
  return inline(text).map(partElement);
}

function partElement(part) {
  switch (part.type) {
    case "text":
      return part.text;
    case "marks":
      return part.char.repeat(part.count);
    case "break":
      return make("br");
    case "code":
      return make("code", {}, part.text);
    case "link":
      return linkElement(part);
    default:
      return make(INLINE[part.type], {}, ...part.parts.map(partElement));
  }
}

/** A link leads to the web only; an image becomes a link, since nothing is fetched that the user has not asked for. */
function linkElement({ address, image, parts }) {
  const label = parts.map(partElement);
  if (image) label.unshift(parts.length > 0 ? "Image: " : "Image");
  if (!safeAddress(address)) return make("span", { class: "no-link" }, ...label, ` (${address})`);
  return make("a", { href: address }, ...(label.length > 0 ? label : [address]));
}

function elementOf(block) {
  switch (block.type) {
    case "code":
      return codeElement(block);
    case "heading":
      // The page has the first two levels.
      return make(`h${Math.min(block.level + 2, 6)}`, { class: `level-${block.level}` }, ...partsOf(block.text));
    case "rule":
      return make("hr");
    case "table":
      return tableElement(block);
    case "quote":
      return make("blockquote", {}, ...block.blocks.map(elementOf));
    case "list":
      return listElement(block);
    default:
      return make("p", {}, ...partsOf(block.text));
  }
}

function codeElement({ language, text }) {
  const code = make("code", {}, ...highlight(text, language));
  const head = make("div", { class: "code-head" }, make("span", {}, language.slice(0, 40) || "text"), copyButton(() => text));
  return make("figure", { class: "code" }, head, make("pre", { tabindex: "0", "aria-label": `Code: ${language || "text"}` }, code));
}

function listElement({ start, loose, items }) {
  const item = (blocks) => {
    const task = blocks[0]?.type === "paragraph" && /^\[([ xX])\] /.exec(blocks[0].text);
    if (task) blocks[0] = { ...blocks[0], text: `${task[1] === " " ? "☐" : "☑"} ${blocks[0].text.slice(4)}` };
    const inner = blocks.flatMap((block) => (!loose && block.type === "paragraph" ? partsOf(block.text) : [elementOf(block)]));
    return make("li", { class: task ? "task" : undefined }, ...inner);
  };
  const from = start !== null && start !== 1 ? start : undefined;
  return make(start === null ? "ul" : "ol", { start: from }, ...items.map(item));
}

function tableElement({ align, head, rows }) {
  const row = (tag, values) =>
    make("tr", {}, ...values.map((value, column) => make(tag, { class: `to-${align[column]}` }, ...partsOf(value))));
  const table = make("table", {}, make("thead", {}, row("th", head)), make("tbody", {}, ...rows.map((values) => row("td", values))));
  return make("div", { class: "table", tabindex: "0", role: "region", "aria-label": "Table" }, table);
}
