// The bar above the texts: what is shown, and which step.

import { button, el } from "./dom.js";
import { printable } from "./text.js";

const LONGEST = 60; // letters of a run's name in a list

/** Names short enough for a list, no two alike: the middle is left out, or nothing. */
export function shortened(names) {
  const short = (name) => {
    const letters = [...name];
    const [head, tail] = [letters.slice(0, LONGEST / 2 - 1), letters.slice(1 - LONGEST / 2)];
    return letters.length <= LONGEST ? name : `${head.join("")}…${tail.join("")}`;
  };
  const count = new Map();
  for (const name of names) count.set(short(name), (count.get(short(name)) ?? 0) + 1);
  return new Map(names.map((name) => [name, count.get(short(name)) === 1 ? short(name) : name]));
}

/** Fill a list with [value, text] pairs and keep what was chosen if it is still there. */
export function fill(select, pairs) {
  const before = select.value;
  select.replaceChildren(...pairs.map(([value, text]) => el("option", { value, title: value || null }, printable(text))));
  if (pairs.some(([value]) => value === before)) select.value = before;
}

/** The bar and its controls. `on` has a function for everything a person can do. */
export function makeControls(on) {
  const select = (label, onchange) => el("select", { "aria-label": label, onchange });
  const range = (label, attributes) => el("input", { type: "range", "aria-label": label, ...attributes });
  const c = {
    runs: [0, 1].map((i) => select(i ? "Compare with run" : "Run", (e) => on.run(i, e.target.value || null))),
    levels: el("div", { class: "levels", role: "radiogroup", "aria-label": "Level", onchange: (e) => on.set({ level: e.target.value }) }),
    route: select("Script or route", (e) => on.set({ route: e.target.value })),
    gold: select("Gold boundaries", (e) => on.set({ gold: e.target.value })),
    search: el("input", {
      type: "search", placeholder: "name or words", "aria-label": "Find a text", oninput: (e) => on.query(e.target.value),
    }),
    slider: range("Training step", { class: "step", min: 0, value: 0, oninput: (e) => on.goTo(Number(e.target.value)) }),
    step: el("output", { class: "steplabel" }),
    play: button("▶", "Play the steps", on.play),
    preview: el("input", { type: "checkbox", onchange: on.threshold }),
    threshold: range("Threshold", { min: 0, max: 1, step: 0.01, value: 0.5, disabled: true, oninput: on.threshold }),
    thresholdLabel: el("output", {}),
  };
  const field = (text, ...nodes) => el("label", {}, el("span", {}, text), ...nodes);
  c.bar = el("header", { class: "bar" },
    field("Run", c.runs[0]),
    field("Compare", c.runs[1]),
    el("div", { class: "field" }, el("span", {}, "Level"), c.levels),
    field("Script", c.route),
    field("Gold", c.gold),
    field("Text", c.search),
    button("◐", "Light, dark or automatic colours", on.theme),
    el("div", { class: "time" },
      button("‹", "Previous step", () => on.move(-1)),
      c.slider,
      button("›", "Next step", () => on.move(1)),
      c.play,
      button("↻", "Look for new runs and steps", on.reload),
      c.step,
      el("label", { class: "preview" }, c.preview, "preview p >", c.threshold, c.thresholdLabel),
    ),
  );
  return c;
}

/** The choice of stages, made anew if their number changed; returns the level that is chosen. */
export function fillLevels(box, count, level, nested) {
  const values = Array.from({ length: count }, (_, s) => [String(s), `stage ${s}`]);
  if (count > 1) values.push([nested, "nested"]);
  const chosen = values.some(([value]) => value === level) ? level : "0";
  if (box.children.length !== values.length) {
    const radio = (value) => el("input", { type: "radio", name: "level", value });
    box.replaceChildren(...values.map(([value, text]) => el("label", {}, radio(value), text)));
  }
  for (const input of box.querySelectorAll("input")) input.checked = input.value === chosen;
  return chosen;
}
