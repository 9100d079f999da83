// The messages of a conversation as elements.

import { copyButton, count, make, plural, short } from "./dom.js";
import { Markdown } from "./markdown.js";
import { siblings } from "./store.js";

/** Shows the messages of one conversation. `actions`: `retry(node)`, `edit(node, text)`, `turn(node, by)`, `say(text)`. */
export class Messages {
  constructor(element, actions) {
    this.element = element;
    this.actions = actions;
    this.views = [];
  }

  /** Shows these messages. Views of messages that stay are kept, with what the user has opened in them. */
  show(conversation, nodes, empty) {
    const kept = new Map(this.views.filter((view) => view.conversation === conversation).map((view) => [view.node.id, view]));
    this.views = nodes.map((node) => kept.get(node.id) ?? this.make(conversation, node));
    this.element.replaceChildren(...(nodes.length > 0 ? this.views.map((view) => view.element) : [empty]));
    this.views.forEach((view, index) => view.update(index === nodes.length - 1));
  }

  make(conversation, node) {
    return node.role === "user" ? new Asked(conversation, node, this.actions) : new Answered(conversation, node, this.actions);
  }

  /** A message has changed. */
  update(node) {
    this.views.find((view) => view.node === node)?.update(this.views.at(-1)?.node === node);
  }

  /** Puts the focus on the button that leads on, or back where there is no more. */
  focusTurn(node, by) {
    const view = this.views.find((view) => view.node === node);
    const buttons = [...(view?.element.querySelectorAll(".turns button") ?? [])];
    if (by > 0) buttons.reverse();
    buttons.find((button) => !button.disabled)?.focus();
  }
}

/** The buttons that lead to the siblings of a message. */
function turns(conversation, node, actions) {
  const ids = siblings(conversation, node);
  if (ids.length < 2) return [];
  const at = ids.indexOf(node.id);
  const step = (by, label, sign) =>
    make("button", { class: "quiet", type: "button", "aria-label": label, disabled: !(at + by in ids), on: { click: () => actions.turn(node, by) } }, sign);
  const place = make("span", { class: "dim" }, `${at + 1} of ${ids.length}`);
  return [make("span", { class: "turns" }, step(-1, "The version before", "‹"), place, step(1, "The version after", "›"))];
}

/** What the user wrote. */
class Asked {
  constructor(conversation, node, actions) {
    Object.assign(this, { conversation, node, actions });
    this.text = make("div", { class: "asked-text" }, node.text);
    this.foot = make("footer", { class: "acts" });
    this.element = make("article", { class: "message asked", "aria-label": "You" }, this.text, this.foot);
  }

  update() {
    const edit = make("button", { class: "quiet", type: "button", on: { click: () => this.edit() } }, "Edit");
    this.foot.replaceChildren(copyButton(() => this.node.text), edit, ...turns(this.conversation, this.node, this.actions));
  }

  edit() {
    const field = make("textarea", { class: "edit", "aria-label": "Edit your message", rows: "1" });
    field.value = this.node.text;
    const close = () => {
      form.replaceWith(this.text);
      this.foot.hidden = false;
      this.foot.querySelector("button:nth-of-type(2)")?.focus();
    };
    const send = () => field.value.trim() && this.actions.edit(this.node, field.value);
    field.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        send();
      } else if (event.key === "Escape") {
        event.stopPropagation();
        close();
      }
    });
    const buttons = [
      make("button", { class: "main", type: "button", on: { click: send } }, "Send"),
      make("button", { class: "quiet", type: "button", on: { click: close } }, "Cancel"),
    ];
    const form = make("div", { class: "editing" }, field, make("div", { class: "acts" }, ...buttons));
    this.text.replaceWith(form);
    this.foot.hidden = true;
    field.focus();
    field.setSelectionRange(field.value.length, field.value.length);
  }
}

/** What the model answered. */
class Answered {
  constructor(conversation, node, actions) {
    Object.assign(this, { conversation, node, actions });
    this.label = make("summary", {});
    this.thought = make("div", { class: "thought" });
    this.thinking = make("details", { class: "thinking", hidden: true }, this.label, this.thought);
    this.body = make("div", { class: "prose" });
    this.calls = make("div", { class: "calls" });
    this.wait = make("div", { class: "wait", hidden: true });
    this.problem = make("p", { class: "problem", hidden: true });
    this.foot = make("footer", { class: "acts" });
    this.element = make("article", { class: "message answered", "aria-label": "Answer" });
    this.element.append(this.thinking, this.body, this.calls, this.wait, this.problem, this.foot);
    this.markdown = new Markdown(this.body);
    this.shown = null;
    this.said = 0;
    // Only what comes while it is watched is read aloud.
    this.speaks = node.state === "running";
  }

  update() {
    const { node } = this;
    const running = node.state === "running";
    if (this.shown !== node.text) this.showText(running);
    this.showThinking(running);
    this.showCalls();
    this.showWait(running);
    this.element.setAttribute("aria-busy", String(running));
    const problem = problemOf(node);
    this.problem.hidden = !problem;
    this.problem.textContent = problem;
    if (running || this.settled === undefined || this.settled !== siblings(this.conversation, node).length) this.showFoot(running);
    if (!running && this.speaks) this.finish();
  }

  showText(running) {
    const done = this.markdown.show(this.node.text);
    this.shown = this.node.text;
    if (running) this.speak(done);
  }

  /** Says the blocks that are complete. */
  speak(done) {
    const blocks = [...this.body.children].slice(this.said, done);
    this.said = Math.max(this.said, done);
    blocks.forEach((block) => this.actions.say(block.textContent));
  }

  finish() {
    this.speak(this.body.children.length);
    this.speaks = false;
    const problem = problemOf(this.node);
    if (problem) this.actions.say(problem);
  }

  showThinking(running) {
    const { thinking, text, thoughtFor } = this.node;
    this.thinking.hidden = !thinking;
    if (!thinking) return;
    const still = running && !text && this.node.calls.length === 0;
    const time = thoughtFor > 0 ? ` for ${duration(thoughtFor)}` : "";
    this.label.textContent = still ? "Thinking" : `Thought${time}`;
    this.thinking.classList.toggle("still", still);
    // Appending keeps what the user has selected.
    const there = this.thought.textContent.length;
    if (thinking.length > there) this.thought.append(thinking.slice(there));
  }

  showCalls() {
    const { calls } = this.node;
    while (this.calls.children.length < calls.length) {
      this.calls.append(make("figure", { class: "call" }, make("figcaption"), make("pre", { tabindex: "0" })));
    }
    calls.forEach((call, index) => {
      const [name, json] = this.calls.children[index].children;
      name.textContent = `Calls ${call.name || "a tool"}`;
      json.textContent = call.arguments;
    });
  }

  showWait(running) {
    const { progress, text, thinking } = this.node;
    const waits = running && !text && !thinking;
    this.wait.hidden = !waits;
    if (!waits) return;
    const [words, part] = waiting(progress);
    if (this.waitsFor !== progress?.state) this.actions.say(words);
    this.waitsFor = progress?.state;
    if (!this.words) {
      this.words = make("span");
      this.meter = make("progress", { max: "1", "aria-label": "Part of the prompt that has been read" });
      this.wait.append(this.words, this.meter);
    }
    if (this.words.textContent !== words) this.words.textContent = words;
    this.meter.hidden = part === null;
    this.meter.value = part ?? 0;
  }

  showFoot(running) {
    const { node, conversation, actions } = this;
    this.settled = running ? undefined : siblings(conversation, node).length;
    if (running) {
      this.foot.replaceChildren();
      return;
    }
    const retry = make("button", { class: "quiet retry", type: "button", on: { click: () => actions.retry(node) } }, "Retry");
    const figures = make("span", { class: "dim figures-of" }, figuresOf(node));
    const copy = node.text ? [copyButton(() => node.text)] : [];
    this.foot.replaceChildren(...copy, retry, ...turns(conversation, node, actions), figures);
  }
}

function waiting(progress) {
  if (progress?.state === "queued") {
    const ahead = Number(progress.ahead) || 0;
    return [ahead > 0 ? `Waiting: ${plural(ahead, "request")} before this one` : "Waiting: next in the queue", null];
  }
  if (progress?.state === "reading") {
    const [read, prompt] = [Number(progress.read) || 0, Number(progress.prompt) || 0];
    return [`Reading the prompt: ${count(read)} of ${plural(prompt, "token")}`, prompt > 0 ? Math.min(1, read / prompt) : null];
  }
  return ["Waiting for the server", null];
}

function problemOf({ state, error, finish }) {
  if (state === "stopped") return "Stopped.";
  if (state === "cut") return "This answer was cut off. Retry asks for it once more.";
  if (state === "failed") return error || "Something went wrong.";
  if (state === "done" && finish === "length") return "The answer has reached the most tokens that it may have.";
  return "";
}

function figuresOf({ usage, millis, firstAfter }) {
  if (!usage) return "";
  const generated = Number(usage.completion_tokens) || 0;
  const [prompt, cached] = [Number(usage.prompt_tokens) || 0, Number(usage.prompt_tokens_details?.cached_tokens) || 0];
  const seconds = (millis - (firstAfter ?? 0)) / 1000;
  const speed = generated > 1 && seconds > 0 ? `, ${short((generated - 1) / seconds)} a second` : "";
  const known = cached > 0 ? `, ${count(cached)} of them known` : "";
  return `${plural(generated, "token")}${speed}. Prompt: ${count(prompt)}${known}.`;
}

function duration(millis) {
  const seconds = millis / 1000;
  if (seconds < 60) return seconds < 10 ? `${Math.max(0.1, seconds).toFixed(1)} s` : `${Math.round(seconds)} s`;
  return `${Math.floor(seconds / 60)} min ${Math.round(seconds % 60)} s`;
}
