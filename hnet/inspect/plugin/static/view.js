// The page: controls, state, and fetching a view at a time from a source.
//
// A source has runs() -> [name], run(name) -> {steps, texts: {key: {name, bytes, routes, gold}},
// damaged: lines left out} and view(run, step, keys) -> {key: segmentation}, all promises.

import { drawAgreement, drawCard, drawSummary, makeTooltip } from "./card.js";
import { el } from "./draw.js";
import { followTheme, legend, onArrows, onNewWidth } from "./surroundings.js";
import { prepare, printable, startsAt } from "./text.js";

const PAGE = 8; // texts drawn before "show more"
const CACHED_VIEWS = 400;
const PLAY_MS = 600;
const NESTED = "nested";

export class View {
  constructor(root, source) {
    this.source = source;
    this.runs = [];
    this.info = new Map(); // run -> {steps, texts}
    this.views = new Map(); // run|step|key -> prepared segmentation, the oldest first
    this.wanted = [null, null]; // the runs chosen last, which may still be loading
    this.state = { runs: [null, null], step: 0, level: "0", route: "", gold: "", query: "", threshold: null };
    this.shown = PAGE;
    this.turn = 0;
    this.tooltip = makeTooltip();
    this.buildControls();
    root.append(this.bar, this.main, this.tooltip.node);
    this.listen();
  }

  buildControls() {
    const change = (name) => (e) => this.set({ [name]: e.target.value });
    const select = (label, onchange, width) => el("select", { "aria-label": label, onchange, class: width });
    this.runSelects = [0, 1].map((i) =>
      select(i ? "Compare with run" : "Run", (e) => this.chooseRun(i, e.target.value || null)),
    );
    this.levels = el("div", { class: "levels", role: "radiogroup", "aria-label": "Level", onchange: change("level") });
    this.routeSelect = select("Script or route", change("route"), "short");
    this.goldSelect = select("Gold boundaries", change("gold"), "short");
    this.search = el("input", { type: "search", placeholder: "name of a text", "aria-label": "Find a text", oninput: change("query") });
    this.slider = el("input", {
      type: "range", class: "step", min: 0, value: 0, "aria-label": "Training step",
      oninput: (e) => this.goTo(Number(e.target.value)),
    });
    this.stepLabel = el("output", { class: "steplabel" });
    const button = (text, label, onclick, name) =>
      el("button", { type: "button", class: name, title: label, "aria-label": label, onclick }, text);
    this.play = button("▶", "Play the steps", () => this.togglePlay());
    this.threshold = el("input", {
      type: "range", min: 0, max: 1, step: 0.01, value: 0.5, disabled: true, "aria-label": "Threshold",
      oninput: () => this.setThreshold(),
    });
    this.preview = el("input", { type: "checkbox", onchange: () => this.setThreshold() });
    this.thresholdLabel = el("output", {});
    const field = (text, ...nodes) => el("label", {}, el("span", {}, text), ...nodes);
    this.bar = el(
      "header",
      { class: "bar" },
      field("Run", this.runSelects[0]),
      field("Compare", this.runSelects[1]),
      el("div", { class: "field" }, el("span", {}, "Level"), this.levels),
      field("Script", this.routeSelect),
      field("Gold", this.goldSelect),
      field("Text", this.search),
      button("◐", "Light, dark or automatic colours", () => this.theme.next()),
      el(
        "div",
        { class: "time" },
        button("‹", "Previous step", () => this.moveStep(-1)),
        this.slider,
        button("›", "Next step", () => this.moveStep(1)),
        this.play,
        button("↻", "Look for new runs and steps", () => this.reload()),
        this.stepLabel,
        el("label", { class: "preview" }, this.preview, "preview p >", this.threshold, this.thresholdLabel),
      ),
    );
    this.notice = el("p", { class: "notice", role: "status" }, "Loading…");
    this.main = el("main", {}, this.notice);
  }

  listen() {
    this.theme = followTheme(() => this.redrawStrips?.());
    onArrows((by) => this.moveStep(by));
    onNewWidth(() => this.redrawStrips?.());
    // when the text moves under the pointer, the tooltip is out of place
    document.addEventListener("scroll", () => this.tooltip.hide(), { passive: true });
  }

  async start() {
    await this.guard(async () => {
      await this.findRuns();
      await this.showFirst();
    });
  }

  /** Show the run that was chosen already, else the first one. */
  async showFirst() {
    const run = this.wanted[0] ?? this.runs[0];
    if (run === undefined) this.say("No run here has written segmentations yet.");
    else await this.chooseRun(0, run);
  }

  async findRuns() {
    this.runs = await this.source.runs();
    this.fill(this.runSelects[0], this.runs.map((name) => [name, name]));
    this.fill(this.runSelects[1], [["", "no other run"], ...this.runs.map((name) => [name, name])]);
  }

  /** Look for new runs and steps; a view of the newest step follows it. */
  async reload() {
    await this.guard(async () => {
      await this.findRuns();
      if (this.state.runs[0] === null) return this.showFirst();
      const before = this.state.runs.filter((run) => run !== null);
      const isShown = (run) => this.state.runs.includes(run);
      const found = new Map(before.map((run) => [run, this.source.run(run)]));
      await Promise.all(before.map((run) => stillWanted(found.get(run), () => isShown(run))));
      const { atEnd } = this;
      // A run that was chosen meanwhile stays; others are asked for again when they are chosen.
      for (const run of this.info.keys()) if (!isShown(run)) this.info.delete(run);
      for (const run of before.filter(isShown)) this.info.set(run, await found.get(run));
      this.views.clear();
      this.fillFilters();
      await this.goTo(atEnd ? this.steps.length - 1 : this.state.step);
    });
  }

  /** Show a run first (i = 0) or beside it, at the last step not after the one shown; at its newest
   * step if that was shown of the run before. Of several choices the last one counts, in whatever
   * order they load. */
  async chooseRun(i, name) {
    this.wanted[i] = name;
    await this.guard(async () => {
      if (!(await stillWanted(name && this.load(name), () => this.wanted[i] === name))) return;
      const before = this.atEnd ? Infinity : this.stepNumber;
      this.state.runs[i] = name;
      this.runSelects[i].value = name ?? "";
      this.state.step = Math.max(this.steps.findLastIndex((s) => s <= before), 0);
      this.fillFilters();
      await this.refresh();
    });
  }

  async load(name) {
    if (!this.info.has(name)) this.info.set(name, await this.source.run(name));
  }

  get steps() {
    return this.info.get(this.state.runs[0])?.steps ?? [];
  }

  /** Texts of the chosen runs that pass the filters: [[key, text]]. */
  get texts() {
    const all = new Map();
    for (const run of this.state.runs) {
      for (const [key, text] of Object.entries(this.info.get(run)?.texts ?? {})) {
        const routes = [...new Set([...(all.get(key)?.routes ?? []), ...text.routes])]; // runs may name others
        all.set(key, { ...text, routes });
      }
    }
    const { route, query } = this.state;
    return [...all].filter(
      ([, text]) =>
        (!route || text.routes.includes(route)) && text.name.toLowerCase().includes(query.toLowerCase()),
    );
  }

  fill(select, pairs) {
    const before = select.value;
    select.replaceChildren(...pairs.map(([value, text]) => el("option", { value }, printable(text))));
    if (pairs.some(([value]) => value === before)) select.value = before;
  }

  fillFilters() {
    const texts = this.state.runs.flatMap((run) => Object.values(this.info.get(run)?.texts ?? {}));
    const names = (field) => [...new Set(texts.flatMap((text) => text[field]))].sort();
    this.fill(this.routeSelect, [["", "all"], ...names("routes").map((n) => [n, n])]);
    this.fill(this.goldSelect, [["", "none"], ...names("gold").map((n) => [n, n])]);
    this.state.route = this.routeSelect.value;
    this.state.gold = this.goldSelect.value;
    this.slider.max = Math.max(this.steps.length - 1, 0);
  }

  fillLevels(count) {
    const values = Array.from({ length: count }, (_, s) => [String(s), `stage ${s}`]);
    if (count > 1) values.push([NESTED, "nested"]);
    if (this.levels.children.length === values.length) return;
    if (!values.some(([value]) => value === this.state.level)) this.state.level = "0";
    this.levels.replaceChildren(
      ...values.map(([value, text]) =>
        el("label", {}, el("input", { type: "radio", name: "level", value, checked: value === this.state.level }), text),
      ),
    );
  }

  set(change) {
    Object.assign(this.state, change);
    if ("route" in change || "query" in change) this.shown = PAGE;
    return this.guard(() => this.refresh());
  }

  setThreshold() {
    this.threshold.disabled = !this.preview.checked;
    this.set({ threshold: this.preview.checked ? Number(this.threshold.value) : null });
  }

  goTo(step) {
    return this.set({ step: Math.max(0, Math.min(step, this.steps.length - 1)) });
  }

  moveStep(by) {
    return this.goTo(this.state.step + by);
  }

  get atEnd() {
    return this.state.step >= this.steps.length - 1;
  }

  get stepNumber() {
    return this.steps[this.state.step];
  }

  togglePlay() {
    if (this.timer) {
      clearInterval(this.timer);
      this.timer = null;
    } else {
      if (this.atEnd) this.goTo(0);
      this.timer = setInterval(() => {
        if (this.atEnd) this.togglePlay();
        else if (!this.loading) this.moveStep(1);
      }, PLAY_MS);
    }
    this.play.textContent = this.timer ? "❚❚" : "▶";
  }

  /** The step of a run to show beside the first run's: the last one not after it. */
  stepOf(run) {
    const steps = this.info.get(run).steps;
    return steps.findLast((s) => s <= this.stepNumber) ?? steps[0];
  }

  async fetchViews(run, step, keys) {
    const name = (key) => JSON.stringify([run, step, key]);
    const missing = keys.filter((key) => !this.views.has(name(key)));
    const found = missing.length ? await this.source.view(run, step, missing) : {};
    const has = (key) => Object.hasOwn(found, key);
    for (const key of missing) this.views.set(name(key), has(key) ? prepare(found[key]) : null);
    const result = new Map(keys.map((key) => [key, this.views.get(name(key))]));
    for (const old of this.views.keys()) {
      if (this.views.size <= CACHED_VIEWS) break;
      this.views.delete(old);
    }
    return result;
  }

  /** Fetch what the state asks for and draw it, unless a newer state came meanwhile. */
  async refresh() {
    const turn = ++this.turn;
    const texts = this.texts;
    const keys = texts.slice(0, this.shown).map(([key]) => key);
    const chosen = this.state.runs.filter((run) => run !== null);
    const steps = chosen.map((run) => this.stepOf(run));
    this.showStep();
    this.loading = true;
    const fetching = Promise.all(chosen.map((run, i) => this.fetchViews(run, steps[i], keys)));
    if (!(await stillWanted(fetching, () => turn === this.turn))) return;
    this.loading = false;
    const fetched = await fetching;
    const at = (step) => (step === null ? "" : ` · step ${step.toLocaleString("en")}`); // a page may know none
    const runs = chosen.map((run, i) => ({ label: printable(run) + at(steps[i]), found: fetched[i] }));
    this.draw(runs, texts, keys);
  }

  showStep() {
    this.slider.value = this.state.step;
    const number = this.stepNumber?.toLocaleString("en") ?? "none";
    this.slider.setAttribute("aria-valuetext", `step ${number}`);
    this.stepLabel.textContent = `step ${number} (${this.state.step + 1} of ${this.steps.length})`;
    this.thresholdLabel.textContent = Number(this.threshold.value).toFixed(2);
  }

  draw(runs, texts, keys) {
    const { gold, threshold, level } = this.state;
    const all = runs.flatMap(({ found }) => [...found.values()]).filter(Boolean);
    const count = Math.max(0, ...all.map((seg) => seg.stages.length));
    this.fillLevels(count);
    const levels = this.state.level === NESTED ? Array.from({ length: count }, (_, s) => s) : [Number(this.state.level)];
    const kinds = [...new Set(all.flatMap((seg) => [...seg.gold.keys()]))];
    const options = { levels, gold, threshold, kinds };
    const cards = keys.map((key) => {
      const views = runs.map(({ found }) => {
        const seg = found.get(key);
        return [seg, seg ? startsAt(seg, threshold) : null];
      });
      return { views, ...drawCard(new Map(texts).get(key), views, options, this.tooltip) };
    });
    const pairs = (i) => cards.map(({ views }) => views[i]).filter(([seg]) => seg);
    const summary = drawSummary(runs.map(({ label }, i) => ({ label, pairs: pairs(i) })), levels);
    const rest = texts.length - keys.length;
    const more = rest > 0
      ? el("button", { type: "button", class: "more", onclick: () => { this.shown += PAGE; this.set({}); } }, `Show ${Math.min(rest, PAGE)} of ${rest} more text${rest === 1 ? "" : "s"}`)
      : null;
    const labels = el("div", { class: "columns runnames" }, ...runs.map(({ label }) => el("div", {}, label)));
    this.main.dataset.level = level;
    this.main.replaceChildren(
      ...[this.damage(), legend(levels, gold, threshold), summary, drawAgreement(cards.map(({ views }) => views), levels), labels, ...cards.map(({ card }) => card), more].filter(Boolean),
    );
    if (!cards.length) this.main.append(el("p", { class: "notice" }, "No text passes the filters."));
    this.redrawStrips = () => cards.forEach(({ redraw }) => redraw());
    this.redrawStrips();
  }

  /** A line for each shown run whose files hold lines that cannot be read. */
  damage() {
    const told = this.state.runs.flatMap((run) => {
      const count = this.info.get(run)?.damaged ?? 0;
      return count ? [`${printable(run)}: ${count} damaged line${count === 1 ? "" : "s"} of its index left out`] : [];
    });
    return told.length ? el("p", { class: "notice warn", role: "status" }, told.join("; ")) : null;
  }

  say(text) {
    this.notice.textContent = text;
    this.main.replaceChildren(this.notice);
  }

  async guard(action) {
    try {
      await action();
    } catch (e) {
      this.loading = false;
      this.say(`This view could not be loaded: ${e.message}`);
    }
  }
}

/** Wait for an answer, then say whether it is still asked for; if not, an error is no news either. */
async function stillWanted(answer, isWanted) {
  try {
    await answer;
  } catch (e) {
    if (isWanted()) throw e;
  }
  return isWanted();
}
