// The page in a browser. Without --base it is tried against a stand-in for the server, which can also be hostile, slow and broken.
//
//   node tests/browser/page.mjs --modules FOLDER [--base URL] [--key KEY] [--shots FOLDER] [--chromium PATH]
//
// FOLDER is where `npm install playwright-core` was run. Exits with 1 if a test fails.

import assert from "node:assert/strict";
import { mkdtempSync, mkdirSync } from "node:fs";
import { createRequire } from "node:module";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { parseArgs } from "node:util";

import { RICH, start } from "./mock.mjs";

const text = { type: "string" };
const { values: options } = parseArgs({ options: { modules: text, base: text, key: text, shots: text, chromium: text, only: text } });
const { chromium } = createRequire(join(options.modules ?? process.cwd(), "x.js"))("playwright-core");
const shots = options.shots ?? mkdtempSync(join(tmpdir(), "sluice-page-"));
mkdirSync(shots, { recursive: true });

const mock = options.base ? null : await start();
const base = options.base ?? mock.base;
const browser = await chromium.launch({
  executablePath: options.chromium ?? "/usr/bin/chromium",
  args: ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"],
});

/** What a browser complains of, or should not have asked for. */
let complaints = [];

async function open(settings = {}) {
  const context = await browser.newContext({ viewport: { width: 1360, height: 860 }, ...settings });
  await context.addInitScript((key) => {
    globalThis.violations = [];
    document.addEventListener("securitypolicyviolation", (event) => globalThis.violations.push(`${event.violatedDirective} ${event.blockedURI}`));
    if (key) sessionStorage.setItem("sluice.key", key);
  }, options.key);
  // Small models have room for a few answers of this length.
  if (!mock) await context.addInitScript(() => (localStorage["sluice.settings"] ??= '{"maxTokens":100}'));
  const page = await context.newPage();
  page.on("console", (message) => message.type() === "error" && !/Failed to load resource/.test(message.text()) && complaints.push(message.text()));
  page.on("pageerror", (error) => complaints.push(String(error)));
  page.on("request", (request) => !request.url().startsWith(base) && !request.url().startsWith("blob:") && complaints.push(`asked for ${request.url()}`));
  await page.goto(base);
  await page.waitForFunction(() => document.querySelector("#model").options.length > 0);
  return page;
}

const answers = (page) => page.locator(".answered");
const last = (page) => answers(page).last();
const isDone = (page) => page.waitForFunction(() => document.querySelector(".answered:last-child")?.getAttribute("aria-busy") === "false", null, { timeout: 60_000 });

/** A small model has said everything before anybody can stop it: so its words come through a thin pipe. */
async function slowly(page) {
  if (mock) return;
  const session = await page.context().newCDPSession(page);
  await session.send("Network.enable");
  await session.send("Network.emulateNetworkConditions", { offline: false, latency: 0, downloadThroughput: 4000, uploadThroughput: -1 });
}

async function send(page, words) {
  await page.fill("#message", words);
  await page.press("#message", "Enter");
}

async function close(page) {
  assert.deepEqual(await page.evaluate(() => globalThis.violations), [], "violations of the policy");
  assert.deepEqual(complaints, [], "complaints of the browser");
  await page.context().close();
}

const tests = {
  async "a message is sent and its answer streamed"(page) {
    assert.equal(await page.locator("#send").isDisabled(), true);
    await page.fill("#message", "one");
    await page.press("#message", "Shift+Enter");
    assert.equal(await page.inputValue("#message"), "one\n");
    await slowly(page);
    await send(page, "Say something slow");
    await page.waitForFunction(() => document.querySelector(".answered .prose")?.textContent.length > 3);
    assert.equal(await last(page).getAttribute("aria-busy"), "true");
    assert.equal(await page.locator("#send").textContent(), "Stop");
    await page.keyboard.press("Escape");
    await isDone(page);
    assert.match(await last(page).locator(".problem").textContent(), /Stopped/);
    assert.equal(await page.locator("#send").textContent(), "Send");
    if (mock) {
      await page.waitForTimeout(150);
      assert.equal(mock.state.closed, 1, "the server has been told");
    }
  },

  async "retry gives another answer, and both can be seen"(page) {
    await send(page, "hello");
    await isDone(page);
    await last(page).getByRole("button", { name: "Retry" }).click();
    await isDone(page);
    assert.equal(await answers(page).count(), 1);
    assert.match(await last(page).locator(".turns").textContent(), /2 of 2/);
    await last(page).getByRole("button", { name: "The version before" }).click();
    assert.match(await last(page).locator(".turns").textContent(), /1 of 2/);
  },

  async "an edited message begins a branch"(page) {
    await send(page, "first");
    await isDone(page);
    await send(page, "second");
    await isDone(page);
    await page.locator(".asked").first().getByRole("button", { name: "Edit" }).click();
    await page.locator(".editing textarea").fill("changed");
    await page.keyboard.press("Enter");
    await isDone(page);
    assert.equal(await page.locator(".asked").count(), 1);
    if (mock) assert.deepEqual(mock.state.requests.at(-1).messages, [{ role: "user", content: "changed" }]);
    await page.locator(".asked").first().getByRole("button", { name: "The version before" }).click();
    assert.deepEqual(await page.locator(".asked-text").allTextContents(), ["first", "second"]);
    await page.locator(".asked").first().getByRole("button", { name: "Edit" }).click();
    await page.keyboard.press("Escape");
    assert.equal(await page.locator(".editing").count(), 0);
  },

  async "a reload keeps the conversation, and what was cut off can be retried"(page) {
    await send(page, "hello");
    await isDone(page);
    await slowly(page);
    await send(page, "slow, please");
    await page.waitForFunction(() => document.querySelector(".answered:last-child .prose")?.textContent.length > 30);
    await page.reload();
    assert.equal(await answers(page).count(), 2);
    assert.match(await last(page).locator(".problem").textContent(), /cut off/);
    assert.ok((await last(page).locator(".prose").textContent()).length > 20, "what had come is there");
    await last(page).getByRole("button", { name: "Retry" }).click();
    await page.waitForFunction(() => document.querySelector(".answered:last-child .prose")?.textContent.length > 10);
    await page.click("#send");
    await isDone(page);
    assert.equal(await page.locator("#conversations li").count(), 1);
  },

  async "conversations are listed, renamed, exported, deleted and brought back"(page) {
    await send(page, "hello");
    await isDone(page);
    await page.click("#new");
    await send(page, "other");
    await isDone(page);
    const items = page.locator("#conversations li");
    assert.deepEqual(await page.locator("#conversations .title").allTextContents(), ["other", "hello"]);
    await items.first().getByRole("button", { name: /^Rename/ }).click();
    await page.keyboard.type("Another name");
    await page.keyboard.press("Enter");
    assert.equal(await page.locator("#title").textContent(), "Another name");
    const [file] = await Promise.all([page.waitForEvent("download"), items.first().getByRole("button", { name: /^Export/ }).click()]);
    assert.equal(file.suggestedFilename(), "Another name.json");
    await items.first().getByRole("button", { name: /^Delete/ }).click();
    assert.equal(await items.count(), 1);
    await page.getByRole("button", { name: "Undo" }).click();
    assert.equal(await items.count(), 2);
    assert.equal(await page.locator("#title").textContent(), "Another name");
    await items.nth(1).locator(".title").click();
    assert.equal(await page.locator("#title").textContent(), "hello");
  },

  async "settings are sent, and the key is forgotten with the tab"(page) {
    await page.click("#open-settings");
    await page.fill("#system", "Be brief.");
    await page.fill("#temperature", "0.5");
    await page.fill("#max-tokens", "77");
    await page.fill("#seed", "5");
    await page.selectOption("#thinking", "off");
    await page.keyboard.press("Escape");
    await send(page, "hello");
    await isDone(page);
    const kept = await page.evaluate(() => JSON.stringify(localStorage));
    assert.ok(!kept.includes("secret"));
    if (!mock) return;
    const { messages, temperature, max_completion_tokens, seed, chat_template_kwargs } = mock.state.requests.at(-1);
    assert.deepEqual(messages, [{ role: "system", content: "Be brief." }, { role: "user", content: "hello" }]);
    assert.deepEqual([temperature, max_completion_tokens, seed, chat_template_kwargs.enable_thinking], [0.5, 77, 5, false]);
  },

  async "the status shows what the model does"(page) {
    await page.waitForFunction(() => !document.querySelector("#live-body").hidden);
    assert.match(await page.locator("#expert-count").textContent(), /^[\d,]+ of [\d,]+$/);
    const [before, painted] = await page.locator("#experts").evaluate((canvas) => {
      const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
      return [canvas.width, new Set(new Uint32Array(data.buffer)).size];
    });
    assert.ok(before > 100 && painted >= 1, "the picture is painted");
    assert.ok((await page.locator("#time-bar").getAttribute("aria-label")).length > 0);
  },
};

/** Tests that need a server that says odd things. */
const odd = {
  async "what a model says never becomes markup or script"(page) {
    await send(page, "be hostile");
    await isDone(page);
    const found = await page.evaluate(() => {
      const answer = document.querySelector(".answered");
      const elements = [...answer.querySelectorAll("*")];
      return {
        broken: globalThis.broken,
        tags: [...new Set(elements.map((element) => element.localName))],
        odd: elements.flatMap((element) => [...element.attributes].map(({ name }) => name)).filter((name) => name.startsWith("on") || ["src", "srcdoc", "style"].includes(name)),
        links: [...answer.querySelectorAll("a")].map((link) => [link.href, link.rel, link.target]),
      };
    });
    assert.equal(found.broken, undefined);
    for (const tag of ["script", "img", "svg", "iframe", "style", "b", "object", "link"]) assert.ok(!found.tags.includes(tag), `there is a ${tag}`);
    assert.deepEqual(found.odd, []);
    const rel = "noopener noreferrer nofollow";
    assert.deepEqual(found.links, [
      ["https://evil.example/track.png", rel, "_blank"],
      ["https://example.org/a_(b)", rel, "_blank"],
      ["https://example.org/path?q=1", rel, "_blank"],
      ["https://example.org/angle", rel, "_blank"],
    ]);
    const words = await page.locator(".answered .prose").textContent();
    assert.ok(words.includes("<img src=x onerror=") && words.includes("</script><svg onload="), "markup is shown as it was written");
    // A title and the list are made of the model's and the user's words as well.
    assert.equal(await page.locator("#latest").isVisible(), false, "the end is in view");
    await page.locator("#scroll").evaluate((area) => (area.scrollTop = 0));
    await page.locator("#latest").waitFor();
    await page.click("#new");
    await page.locator("#latest").waitFor({ state: "hidden" });
    await send(page, "<img src=x onerror=window.broken=1>");
    await isDone(page);
    assert.equal(await page.locator("#conversations img").count(), 0);
    assert.equal(await page.evaluate(() => globalThis.broken), undefined);
  },

  async "a text without end takes no time without end"(page) {
    const millis = await page.evaluate(async () => {
      const { inline, parse } = await import("/page/markdown.js");
      const { highlight } = await import("/page/highlight.js");
      const many = (piece, length = 100_000) => piece.repeat(length / piece.length);
      const texts = ["*a ", "**a", "[", "](", "[a](", "`", "``` ", "_a_", "a-a", "| ", "> ", "- ", "1. ", "~~", "<https://", "https://a(", "# ", "\\", "*_`["].map((piece) => many(piece));
      const code = ["a-", "[", "{", "\"", "'", "/*", "<", "&", "$", "#", "r#\"", "a:", "--", "0x"].map((piece) => many(piece, 90_000));
      const times = {};
      const measure = (name, run) => {
        const started = performance.now();
        run();
        times[name] = performance.now() - started;
      };
      for (const text of texts) measure(text.slice(0, 10), () => parse(text + "\n" + text).forEach((block) => block.text && inline(block.text)));
      for (const text of texts) measure(`lines of ${text.slice(0, 10)}`, () => parse(text.replaceAll(/(.{20})/g, "$1\n")).forEach((block) => block.text && inline(block.text)));
      for (const text of code) for (const name of ["js", "py", "rs", "c", "go", "java", "sh", "json", "yaml", "toml", "sql", "css", "html", "ruby", "swift"]) measure(`${name} ${text.slice(0, 6)}`, () => highlight(text, name));
      return Object.entries(times).sort((a, b) => b[1] - a[1]).slice(0, 5);
    });
    console.log("    slowest:", millis.map(([name, time]) => `${JSON.stringify(name)} ${time.toFixed(0)} ms`).join(", "));
    // This only tells what hangs from what does not: a quadratic one takes a minute and more.
    assert.ok(millis[0][1] < 10_000, String(millis[0]));
  },

  async "Markdown is shown, and grows as it would be shown at once"(page) {
    await send(page, "something rich");
    await isDone(page);
    const grown = await page.locator(".answered .prose").evaluate((element) => element.cloneNode(true).innerHTML);
    const whole = await page.evaluate(async (text) => {
      const { Markdown } = await import("/page/markdown.js");
      const element = document.createElement("div");
      new Markdown(element).show(text);
      return element.innerHTML;
    }, RICH);
    assert.equal(grown, whole);
    for (const selector of ["ol > li", "ol ul > li", "table td", "pre .code-keyword", "pre .code-comment", "blockquote", "strong", "em", "s", "a"]) {
      assert.ok((await page.locator(`.answered .prose ${selector}`).count()) > 0, selector);
    }
    assert.equal(await page.locator("#said").textContent().then((said) => said.includes("costs nothing but patience")), true, "it is said");
    await page.context().grantPermissions(["clipboard-read", "clipboard-write"]);
    await page.locator(".code-head button").click();
    assert.match(await page.evaluate(() => navigator.clipboard.readText()), /^\/\/\/ When the expert/);
  },

  async "thinking is folded"(page) {
    await send(page, "think about it");
    await isDone(page);
    const thinking = last(page).locator(".thinking");
    assert.equal(await thinking.evaluate((details) => details.open), false);
    assert.match(await thinking.locator("summary").textContent(), /^Thought for/);
    await thinking.locator("summary").focus();
    await page.keyboard.press("Enter");
    assert.equal(await thinking.locator(".thought").isVisible(), true);
    await send(page, "next");
    await isDone(page);
    assert.ok(!JSON.stringify(mock.state.requests.at(-1)).includes("baseline"), "thoughts are not sent back");
  },

  async "waiting and reading can be seen"(page) {
    await send(page, "queue");
    await page.locator(".wait", { hasText: "Waiting: 2 requests before this one" }).waitFor();
    await page.locator(".wait", { hasText: /Reading the prompt: [1-9][\d,]* of 8,000 tokens/ }).waitFor();
    assert.ok(Number(await page.locator(".wait progress").getAttribute("value")) >= 0);
    await isDone(page);
    assert.equal(await last(page).locator(".wait").isVisible(), false);
    assert.match(await last(page).locator(".figures-of").textContent(), /7,936 of them known/);
  },

  async "what goes wrong is said"(page) {
    await send(page, "busy");
    await isDone(page);
    assert.match(await last(page).locator(".problem").textContent(), /busy: try again in 7 s/);
    await send(page, "fail");
    await isDone(page);
    assert.match(await last(page).locator(".problem").textContent(), /an extent is damaged/);
    await send(page, "cut");
    await isDone(page);
    assert.match(await last(page).locator(".problem").textContent(), /cut off/);
    await send(page, "tool");
    await isDone(page);
    assert.equal(await last(page).locator(".call pre").textContent(), '{"word":"<b>x</b>"}');
    mock.state.key = "secret";
    await send(page, "hello");
    await page.locator("#settings[open]").waitFor();
    await page.fill("#key", "secret");
    await page.keyboard.press("Escape");
    await last(page).getByRole("button", { name: "Retry" }).click();
    await isDone(page);
    assert.match(await last(page).locator(".prose").textContent(), /You said: hello/);
    assert.ok(!(await page.evaluate(() => JSON.stringify(localStorage))).includes("secret"));
    mock.state.key = undefined;
  },

  async "the server's sessions are listed and deleted"(page) {
    await page.locator("#kept summary").click();
    assert.equal(await page.locator("#sessions li").count(), 2);
    await page.locator("#sessions li").first().getByRole("button").click();
    await page.waitForFunction(() => document.querySelectorAll("#sessions li").length === 1);
  },

  async "a server that is gone is said, and found again"(page) {
    await page.route("**/status", (route) => route.abort());
    await page.getByText("The server does not answer.").waitFor();
    await page.unroute("**/status");
    await page.getByText("Generating", { exact: true }).waitFor({ timeout: 15_000 });
    assert.equal(await page.locator("#model option").count(), 2);
  },

  async "everything can be reached by the keyboard"(page) {
    await send(page, "hello");
    await isDone(page);
    await last(page).getByRole("button", { name: "Retry" }).focus();
    await page.keyboard.press("Enter");
    await isDone(page);
    assert.equal(await page.evaluate(() => document.activeElement.id), "message", "the focus is not lost");
    await last(page).getByRole("button", { name: "The version before" }).focus();
    await page.keyboard.press("Enter");
    await page.keyboard.press("Enter");
    assert.match(await last(page).locator(".turns").textContent(), /2 of 2/, "there and back");
    const seen = new Set();
    for (let presses = 0; presses < 40; presses++) {
      await page.keyboard.press("Tab");
      seen.add(await page.evaluate(() => document.activeElement.id || document.activeElement.textContent));
    }
    for (const name of ["message", "send", "new", "open-settings", "model", "Rename", "Export", "Delete", "Copy", "Edit", "Retry"]) {
      assert.ok(name === "send" || seen.has(name), `${name} is not among ${[...seen].join(", ")}`);
    }
  },

  async "damaged storage does no harm"(page) {
    await send(page, "hello");
    await isDone(page);
    await page.evaluate(() => {
      const name = Object.keys(localStorage).find((key) => key.startsWith("sluice.conversation."));
      localStorage.setItem(name, localStorage.getItem(name).replace('"children":[2]', '"children":[99]'));
      localStorage.setItem("sluice.conversation.x", "{broken");
      localStorage.setItem("sluice.settings", "[");
    });
    await page.reload();
    await send(page, "again");
    await isDone(page);
    assert.match(await last(page).locator(".prose").textContent(), /You said: again/);
  },
};

async function pictures() {
  const looks = [
    ["desktop-light", { viewport: { width: 1360, height: 860 }, colorScheme: "light" }],
    ["desktop-dark", { viewport: { width: 1360, height: 860 }, colorScheme: "dark" }],
    ["phone-light", { viewport: { width: 360, height: 740 }, colorScheme: "light", hasTouch: true, isMobile: true, deviceScaleFactor: 2 }],
    ["phone-dark", { viewport: { width: 360, height: 740 }, colorScheme: "dark", hasTouch: true, isMobile: true, deviceScaleFactor: 2 }],
  ];
  for (const [name, settings] of looks) {
    const page = await open({ reducedMotion: "reduce", ...settings });
    const shot = (part) => page.screenshot({ path: join(shots, `${name}-${part}.png`) });
    await shot("empty");
    await send(page, "Please think: what should a rich eviction policy know of the future?");
    await isDone(page);
    await page.waitForTimeout(2500);
    await shot("end");
    await page.locator("#scroll").evaluate((area) => (area.scrollTop = 0));
    await shot("start");
    const wide = await page.evaluate(() => document.documentElement.scrollWidth - innerWidth);
    assert.ok(wide <= 0, `${name}: the page is ${wide} pixels too wide`);
    if (name.startsWith("phone")) {
      await page.click("#open-live");
      await page.waitForTimeout(1200);
      await shot("status");
      assert.equal(await page.locator("#chat").evaluate((chat) => chat.inert), true);
      await page.keyboard.press("Escape");
      await page.click("#open-side");
      await page.waitForTimeout(300);
      await shot("list");
      await page.click("#close-side");
    }
    await page.evaluate(() => document.querySelector("#open-settings").click());
    await page.waitForTimeout(200);
    await shot("settings");
    await close(page);
  }
  console.log(`pictures are in ${shots}`);
}

let failed = 0;
const chosen = Object.entries(mock ? { ...tests, ...odd } : tests).filter(([name]) => name.includes(options.only ?? ""));
for (const [name, test] of chosen) {
  complaints = [];
  if (mock) mock.state.closed = 0;
  try {
    const page = await open();
    await test(page);
    await close(page);
    console.log(`ok   ${name}`);
  } catch (error) {
    failed++;
    console.log(`FAIL ${name}\n     ${error.stack.split("\n").slice(0, 8).join("\n     ")}`);
  }
}
if (!mock) console.log(`skipped, since they need the stand-in: ${Object.keys(odd).join("; ")}`);
if (!options.only) {
  complaints = [];
  await pictures().catch((error) => {
    failed++;
    console.log(`FAIL pictures\n     ${error.stack}`);
  });
}
await browser.close();
mock?.stop();
console.log(failed ? `${failed} failed` : "all passed");
process.exit(failed ? 1 : 0);
