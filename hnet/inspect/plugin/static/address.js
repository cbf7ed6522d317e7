// What is shown, kept in the address, so that it survives a reload and can be sent to somebody.
//
// In TensorBoard the address that people see is that of the page around this one, whose fragment
// is "#boundaries", followed by TensorBoard's own "&name=value"; ours begin with "b.". On a page of
// our own the fragment is ours.

import { outerDocument } from "./surroundings.js";

const PLUGIN = "boundaries";
const PREFIX = "b.";

const parts = (hash) => hash.replace(/^#/, "").split("&").filter(Boolean);

export function address() {
  const isOuter = outerDocument() !== null;
  const page = isOuter ? window.parent : window;
  const prefix = isOuter ? PREFIX : "";
  let written = null;

  /** What the address says: Map of name -> value. */
  const read = () => {
    const found = new Map();
    for (const part of parts(page.location.hash)) {
      const [name, value] = part.split(/=(.*)/s);
      if (value === undefined || !name.startsWith(prefix)) continue;
      try {
        found.set(name.slice(prefix.length), decodeURIComponent(value));
      } catch {
        // not written by us
      }
    }
    return found;
  };

  /** Put what is shown into the address; empty values are left out. */
  const write = (values) => {
    const others = isOuter ? parts(page.location.hash).filter((part) => !part.startsWith(PREFIX)) : [];
    if (isOuter && others.length && others[0] !== PLUGIN) return; // another tab is in front
    const own = [...values].filter(([, value]) => value !== null && value !== "");
    const ours = own.map(([name, value]) => `${prefix}${name}=${encodeURIComponent(value)}`);
    const hash = [...(isOuter && !others.length ? [PLUGIN] : others), ...ours].join("&");
    written = `#${hash}`;
    if (page.location.hash === written || (!hash && !page.location.hash)) return;
    page.history.replaceState(page.history.state, "", `${page.location.pathname}${page.location.search}${written}`);
  };

  /** Call `changed` when a person has changed the address. */
  const watch = (changed) =>
    page.addEventListener("hashchange", () => {
      if (page.location.hash !== written && (!isOuter || parts(page.location.hash)[0] === PLUGIN)) changed();
    });

  return { read, write, watch };
}
