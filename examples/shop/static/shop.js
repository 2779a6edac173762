// The shop works without this file. It sends many clicks at once, draws what became of them, and
// puts in fresh parts of the page where a form was sent.

const race = document.querySelector("#race");
const CLICKS = Number(race.dataset.clicks);
const SKU = race.dataset.sku;
const ROW = 15; // pixels; the picture's height is in shop.css
const LEFT = 6; // per cent of its width, for the workers' marks
const RIGHT = 7; // and for the numbers behind the bars
const still = matchMedia("(prefers-reduced-motion: reduce)");
const panels = [...document.querySelectorAll(".panel")].map(panelOf);
const buttons = [...document.querySelectorAll("[data-run]")];

// -- workers and their colours --------------------------------------------------------------------

const COLOURS = 6; // in shop.css
const colours = new Map();

function colourOf(pid) {
  if (!colours.has(String(pid))) colours.set(String(pid), colours.size % COLOURS);
  return colours.get(String(pid));
}

function colourBadges() {
  const badges = [...document.querySelectorAll("[data-pid]")];
  for (const { dataset } of badges) {
    // The order in which the session met its workers is the order of their colours.
    if (dataset.colour && !colours.has(dataset.pid)) colours.set(dataset.pid, Number(dataset.colour));
  }
  for (const { dataset } of badges) dataset.colour = colourOf(dataset.pid);
}

// -- one panel ------------------------------------------------------------------------------------

function panelOf(element) {
  const find = (selector) => element.querySelector(selector);
  return {
    element,
    base: element.dataset.base,
    name: find("h2").textContent,
    button: find("button"),
    result: find(".result"),
    count: find(".count"),
    detail: find(".detail"),
    problem: find(".problem"),
    timeline: find(".timeline"),
    clicks: [],
    longest: 0, // milliseconds
  };
}

async function fetchOk(url, options = {}) {
  let response;
  try {
    response = await fetch(url, { headers: { accept: "application/json" }, ...options });
  } catch {
    throw new Error("The server does not answer. Is it still running?");
  }
  if (!response.ok) {
    const text = response.headers.get("content-type")?.startsWith("text/plain") ? await response.text() : "";
    throw new Error(`${response.status}: ${text.trim() || response.statusText}`);
  }
  return response;
}

const lemons = async (url, options) => {
  const found = await (await fetchOk(url, options)).json();
  if (found.is_new) throw new Error("This browser sends no session cookie back. Are cookies blocked?");
  return found.cart[SKU] ?? 0;
};

async function click(panel, number, before, began) {
  const row = { number, end: null };
  panel.clicks.push(row);
  try {
    const body = new URLSearchParams({ sku: SKU });
    const response = await fetchOk(`${panel.base}/cart`, { method: "POST", body });
    const end = performance.now() - began;
    const { pid, waited, worked, quantity } = await response.json();
    Object.assign(row, { end, pid, waited: waited * 1000, worked: worked * 1000 });
    row.lemons = quantity - before;
  } catch (error) {
    Object.assign(row, { end: performance.now() - began, error: error.message });
  }
}

async function run(panel) {
  Object.assign(panel, { clicks: [], longest: 0 });
  panel.problem.textContent = "";
  show(panel, "running", `0 of ${CLICKS}`, "back");
  try {
    const before = await lemons(`${panel.base}/visit`, { method: "POST" });
    const began = performance.now();
    const all = Promise.all(Array.from({ length: CLICKS }, (_, i) => click(panel, i, before, began)));
    const stop = follow(panel, began);
    await all;
    stop();
    panel.longest = performance.now() - began;
    drawAll();
    finish(panel, (await lemons(`${panel.base}/cart`)) - before);
  } catch (error) {
    show(panel, "failed", "?", "not counted");
    panel.problem.textContent = error.message;
  }
}

function follow(panel, began) {
  let going = true;
  const step = () => {
    if (!going) return;
    panel.longest = performance.now() - began;
    const back = panel.clicks.filter((row) => row.end !== null).length;
    show(panel, "running", `${back} of ${CLICKS}`, "back");
    if (!still.matches) drawAll();
    requestAnimationFrame(step);
  };
  step();
  return () => (going = false);
}

function finish(panel, arrived) {
  const refused = panel.clicks.filter((row) => row.error);
  const lost = CLICKS - refused.length - arrived;
  const parts = [`in ${(panel.longest / 1000).toFixed(2)} s`];
  if (lost > 0) parts.unshift(`${lost} lost`);
  if (refused.length) parts.unshift(`${refused.length} refused`);
  const state = lost > 0 ? "lost" : refused.length ? "refused" : "all";
  show(panel, state, `${arrived} of ${CLICKS}`, `arrived · ${parts.join(" · ")}`);
  const reasons = [...new Set(refused.map((row) => row.error))];
  panel.problem.textContent = reasons.join(" ");
  panel.timeline.setAttribute("aria-label", `${arrived} of ${CLICKS} clicks arrived, ${parts.join(", ")}`);
}

function show(panel, state, count, detail) {
  panel.result.dataset.state = state;
  panel.result.setAttribute("aria-busy", state === "running"); // read out when it is over
  panel.count.textContent = count;
  panel.detail.textContent = detail;
}

// -- the picture ----------------------------------------------------------------------------------

function make(name, attributes) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  return element;
}

// Both pictures have one scale, so that their lengths can be compared.
function drawAll() {
  const most = Math.max(1000, ...panels.map((panel) => panel.longest)); // milliseconds
  for (const panel of panels) panel.timeline.replaceChildren(...picture(panel, most));
}

function picture(panel, most) {
  const width = (ms) => (ms / most) * (100 - LEFT - RIGHT);
  const percent = (ms) => `${LEFT + width(ms)}%`;
  const bottom = CLICKS * ROW;
  const parts = [];
  const block = (kind, row, attributes) =>
    parts.push(make("rect", { class: kind, y: row * ROW + 2, height: ROW - 4, rx: 2, ...attributes }));
  const bar = (kind, row, from, to) => {
    if (to > from) block(kind, row, { x: percent(from), width: `${width(to - from)}%` });
  };
  const write = (kind, text, x, y) => {
    const label = make("text", { class: kind, x, y });
    label.textContent = text;
    parts.push(label);
  };

  for (let ms = 0; ms <= most; ms += 250) {
    parts.push(make("line", { class: "tick", x1: percent(ms), x2: percent(ms), y1: 0, y2: bottom + 3 }));
    if (ms % 500 === 0) write("time", `${ms / 1000} s`, percent(ms), bottom + 16);
  }
  for (let row = 0; row < CLICKS; row += 1) block("worker", row, { x: 0, width: "4%" });
  for (const { number, end, error, pid, waited, worked, lemons } of panel.clicks) {
    if (end === null) {
      bar("queued", number, 0, panel.longest);
    } else if (error) {
      bar("error", number, 0, end);
    } else {
      // What the worker measured, up to the moment when its answer came; before it, the rest.
      const served = Math.max(0, end - worked);
      const asked = Math.max(0, served - waited);
      bar("queued", number, 0, asked);
      bar("waiting", number, asked, served);
      bar("working", number, served, end);
      block("worker", number, { x: 0, width: "4%", "data-colour": colourOf(pid), "data-worker": pid });
      write("lemons", lemons, percent(end), number * ROW + ROW - 4);
    }
  }
  return parts;
}

// -- the rest of the page -------------------------------------------------------------------------

async function refresh() {
  const response = await fetchOk("/live", { headers: { accept: "text/html" } });
  const fresh = new DOMParser().parseFromString(await response.text(), "text/html");
  for (const part of fresh.querySelectorAll("[data-live]")) {
    document.getElementById(part.id).replaceWith(part);
  }
  colourBadges();
}

let fading;

function say(text, isProblem = false) {
  const said = document.querySelector("#said");
  clearTimeout(fading);
  if (!isProblem) fading = setTimeout(() => (said.textContent = ""), 5000);
  said.textContent = text;
  said.dataset.state = isProblem ? "problem" : "";
}

async function busy(work) {
  say("");
  for (const button of buttons) button.disabled = true;
  try {
    await work();
    await refresh();
  } catch (error) {
    say(error.message, true);
  } finally {
    for (const button of buttons) button.disabled = false;
  }
}

for (const panel of panels) {
  panel.button.addEventListener("click", () => busy(() => run(panel)));
}
// One after the other: they would share the browser's six connections.
document.querySelector("[data-run=all]").addEventListener("click", () =>
  busy(async () => {
    for (const panel of panels) {
      panel.element.scrollIntoView({ block: "nearest", behavior: still.matches ? "auto" : "smooth" });
      await run(panel);
    }
  }),
);

document.addEventListener("submit", async (event) => {
  const form = event.target;
  if (!form.dataset.added) return;
  event.preventDefault();
  say("");
  const button = form.querySelector("button");
  button.disabled = true;
  try {
    await fetchOk(form.action, { method: "POST", body: new URLSearchParams(new FormData(form)) });
    await refresh();
    say(`${form.dataset.added}. Total: ${document.querySelector("#cart .total strong").textContent}`);
  } catch (error) {
    say(error.message, true);
  } finally {
    button.disabled = false;
    button.focus();
  }
});

colourBadges();
drawAll();
for (const button of buttons) button.disabled = false;
