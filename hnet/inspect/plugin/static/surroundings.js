// What surrounds the view: the legend, keys, the window's width, and the light around it.

import { el } from "./draw.js";

/** What tints and separators mean, as far as the view uses them. */
export function legend(levels, gold, threshold) {
  const item = (sample, text) => el("span", {}, sample, text);
  const chunk = (classes, text) => el("span", { class: `chunk ${classes}` }, text);
  const parts = [
    item(el("span", {}, chunk("tint0", "chunk"), chunk("tint1 depth0", "chunk")), "chunks of one stage"),
    levels.length > 1 ? item(chunk("tint1 depth1", "chunk"), "also starts a chunk of the next stage") : null,
    item(chunk("tint1 depth0 inside", "\\xA9"), "boundary inside a character, or a byte of none"),
    gold ? item(el("i", { class: "gold hit" }), "gold boundary found") : null,
    gold ? item(el("i", { class: "gold missed" }), "gold boundary missed") : null,
    threshold !== null ? el("b", {}, `Preview: boundaries where p > ${threshold.toFixed(2)}, not the model's own`) : null,
  ];
  return el("div", { class: "legend" }, ...parts);
}

/** Dark or light: what TensorBoard shows around us, else what the system prefers, unless chosen. */
export function followTheme(changed) {
  const media = window.matchMedia("(prefers-color-scheme: dark)");
  const choices = ["auto", "light", "dark"];
  let choice = 0;
  const outer = () => {
    try {
      return window.parent === window ? null : window.parent.document.body;
    } catch {
      return null; // framed by a page of another origin
    }
  };
  const apply = () => {
    const auto = outer()?.classList.contains("dark-mode") ?? media.matches;
    const dark = choice === 0 ? auto : choice === 2;
    document.documentElement.dataset.theme = dark ? "dark" : "light";
    changed();
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

/** Left and right arrow keys, unless what has the focus uses them itself. */
export function onArrows(move) {
  document.addEventListener("keydown", (e) => {
    const by = { ArrowRight: 1, ArrowLeft: -1 }[e.key];
    const taken = e.target.closest?.("input, select, textarea");
    if (by && !taken && !e.ctrlKey && !e.metaKey && !e.altKey) move(by);
  });
}

export function onNewWidth(redraw) {
  let width = window.innerWidth;
  window.addEventListener("resize", () => {
    if (width !== window.innerWidth) redraw();
    width = window.innerWidth;
  });
}
