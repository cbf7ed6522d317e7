// Where the view gets its data: from TensorBoard over HTTP, or from the page it is part of.

import { el } from "./draw.js";
import { View } from "./view.js";

async function get(route, parameters = {}) {
  const response = await fetch(`${route}?${new URLSearchParams(parameters)}`);
  if (!response.ok) throw new Error(`${response.status} ${await response.text()}`);
  return response.json();
}

const overHttp = {
  runs: async () => (await get("runs")).runs,
  run: (run) => get("run", { run }),
  view: async (run, step, keys) => (await get("view", { run, step, keys: keys.join(",") })).views,
};

/** The data of a self-contained page: {run: {step, texts: {key: {...}}, views: {key: {...}}}}. */
function fromPage(data) {
  return {
    runs: async () => Object.keys(data),
    run: async (run) => ({ steps: [data[run].step], texts: data[run].texts }),
    view: async (run) => data[run].views,
  };
}

/** TensorBoard calls this in the plugin's frame; a self-contained page calls it itself. */
export function render() {
  document.title = document.title || "Boundaries";
  const embedded = document.getElementById("segmentations");
  if (!embedded) document.head.append(el("link", { rel: "stylesheet", href: "style.css" }));
  const source = embedded ? fromPage(JSON.parse(embedded.textContent)) : overHttp;
  document.body.classList.toggle("page", Boolean(embedded));
  return new View(document.body, source).start();
}
