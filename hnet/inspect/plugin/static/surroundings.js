// What surrounds the view: the legend, keys, the window's width, and the light around it.

import { el } from "./dom.js";

/** What tints and separators mean, as far as the view uses them. */
export function legend({ levels, gold, threshold, query, isCompared }) {
  const item = (sample, text) => el("span", {}, sample, text);
  const chunk = (classes, text) => el("span", { class: `chunk ${classes}` }, text);
  const parts = [
    item(el("span", {}, chunk("tint0", "chunk"), chunk("tint1 depth0", "chunk")), "chunks of one stage"),
    levels.length > 1 ? item(chunk("tint1 depth1", "chunk"), "also starts a chunk of the next stage") : null,
    item(chunk("tint1 depth0 inside", "\\xA9"), "boundary inside a character, or an invalid byte"),
    gold ? item(el("i", { class: "gold hit" }), "gold boundary found") : null,
    gold ? item(el("i", { class: "gold missed" }), "gold boundary missed") : null,
    isCompared ? item(el("i", { class: "only" }), "boundary of this run only") : null,
    isCompared ? item(el("i", { class: "absent" }), "boundary of the other run only") : null,
    query ? item(el("mark", {}, "word"), "found") : null,
    threshold !== null ? el("b", {}, `Preview: boundaries where p > ${threshold.toFixed(2)}, not the model's own`) : null,
  ];
  return el("div", { class: "legend" }, ...parts);
}

/** Dark or light: what TensorBoard shows around us, else what the system prefers, unless chosen. */
export function followTheme() {
  const media = window.matchMedia("(prefers-color-scheme: dark)");
  const choices = ["auto", "light", "dark"];
  let choice = 0;
  const outer = () => outerDocument()?.body;
  const apply = () => {
    const auto = outer()?.classList.contains("dark-mode") ?? media.matches;
    const dark = choice === 0 ? auto : choice === 2;
    document.documentElement.dataset.theme = dark ? "dark" : "light";
  };
  media.addEventListener("change", apply);
  if (outer()) new MutationObserver(apply).observe(outer(), { attributeFilter: ["class"] });
  apply();
  const next = () => {
    choice = (choice + 1) % choices.length;
    apply();
  };
  return { next };
}

const CARET = "input[type=search], textarea";
const CONTROLS = "input, select, textarea, [role=tab], [role=slider], [role=menu], [role=listbox], [contenteditable]";

/** The page around this one, if we may look at it. */
export function outerDocument() {
  try {
    return window.parent === window ? null : window.parent.document;
  } catch {
    return null; // of another origin
  }
}

/** Left and right arrow keys, wherever the focus is, also in the page around this one, unless a
 * caret in a text or a control out there that was reached with the keyboard needs them. */
export function onArrows(move) {
  const listen = (isTaken) => (e) => {
    const by = new Map([["ArrowRight", 1], ["ArrowLeft", -1]]).get(e.key);
    if (!by || isTaken(e.target) || e.defaultPrevented || e.ctrlKey || e.metaKey || e.altKey || e.shiftKey) return;
    e.preventDefault(); // a list or a slider would change too
    e.stopPropagation();
    move(by);
  };
  const inside = (node) => Boolean(node.closest?.(CARET)?.value) || node.ariaLabel === "Threshold";
  document.addEventListener("keydown", listen(inside));
  const outer = outerDocument();
  if (!outer) return;
  const isShown = () => window.frameElement.checkVisibility({ visibilityProperty: true });
  const isByPointer = focusFrom(outer);
  const outside = (node) => !isShown() || (Boolean(node.closest?.(CONTROLS)) && !isByPointer());
  // TensorBoard's page replaces addEventListener by one that makes this passive; ours is the browser's
  EventTarget.prototype.addEventListener.call(outer, "keydown", listen(outside), true);
}

/** Says whether what has the focus got it from a pointer: browsers do not tell after a key was used. */
export function focusFrom(node) {
  let isByPointer = false;
  node.addEventListener("pointerdown", () => (isByPointer = true), true);
  node.addEventListener("keydown", (e) => (isByPointer &&= e.key !== "Tab"), true);
  return () => isByPointer;
}

export function onNewWidth(redraw) {
  let width = window.innerWidth;
  window.addEventListener("resize", () => {
    if (width !== window.innerWidth) redraw();
    width = window.innerWidth;
  });
}
