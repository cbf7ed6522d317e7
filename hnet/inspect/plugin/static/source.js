// Where the view gets its data: from TensorBoard over HTTP, or from the page it is part of.

import { el } from "./dom.js";
import { occurrences, prepare } from "./text.js";
import { View } from "./view.js";

async function get(route, parameters = {}) {
  let response;
  try {
    response = await fetch(`${route}?${new URLSearchParams(parameters)}`);
  } catch {
    throw new Error("TensorBoard does not answer");
  }
  if (response.ok) return response.json();
  const isPlain = response.headers.get("content-type")?.startsWith("text/plain"); // else a page
  const why = isPlain ? await response.text() : "";
  throw new Error(`TensorBoard answered ${response.status} ${why}`.trim());
}

const overHttp = {
  runs: async () => (await get("runs")).runs,
  run: (run) => get("run", { run }),
  view: async (run, step, keys) => (await get("view", { run, step, keys: keys.join(",") })).views,
  search: async (run, query) => (await get("search", { run, query })).keys,
};

/** The data of a self-contained page: {run: {step, texts: {key: {...}}, views: {key: {...}}}}. */
function fromPage(data) {
  const runs = new Map(Object.entries(data));
  return {
    runs: async () => [...runs.keys()],
    run: async (run) => ({ steps: [runs.get(run).step], texts: runs.get(run).texts, damaged: 0 }),
    view: async (run) => runs.get(run).views,
    search: async (run, query) =>
      Object.entries(runs.get(run).views).flatMap(([key, view]) => (occurrences(prepare(view), query).size ? [key] : [])),
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
