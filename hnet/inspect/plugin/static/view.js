// The page: state, and fetching a view at a time from a source.
//
// A source has runs() -> [name], run(name) -> {steps, texts: {key: {name, bytes, routes, gold}},
// damaged: lines left out}, view(run, step, keys) -> {key: segmentation} and search(run, query) ->
// [key], all promises.

import { address } from "./address.js";
import { drawCard, makeTooltip } from "./card.js";
import { fill, fillLevels, makeControls, shortened } from "./controls.js";
import { button, el } from "./dom.js";
import { drawAgreement, drawSummary } from "./summary.js";
import { followTheme, legend, onArrows, onNewWidth } from "./surroundings.js";
import { prepare, printable, startsAt } from "./text.js";

const PAGE = 8; // texts drawn before "show more"
const BATCH = 32; // texts asked for at once
const CACHED_VIEWS = 1000;
const PLAY_MS = 600;
const TYPING_MS = 150;
const NESTED = "nested";

export class View {
  constructor(root, source) {
    this.source = source;
    this.runs = [];
    this.info = new Map(); // run -> {steps, texts, damaged}
    this.views = new Map(); // run|step|key -> prepared segmentation, the oldest first
    this.found = new Map(); // run|query -> keys of the texts in which it occurs
    this.wanted = [null, null]; // the runs chosen last, which may still be loading
    this.state = { runs: [null, null], step: 0, level: "0", route: "", gold: "", query: "", threshold: null };
    this.shown = PAGE;
    this.turn = 0;
    this.tooltip = makeTooltip();
    this.address = address();
    this.controls = makeControls({
      run: (i, name) => this.chooseRun(i, name),
      set: (change) => this.set(change),
      query: (query) => this.search(query),
      goTo: (step) => this.goTo(step),
      move: (by) => this.moveStep(by),
      play: () => this.togglePlay(),
      reload: () => this.reload(),
      threshold: () => this.setThreshold(),
      theme: () => this.theme.next(),
    });
    this.notice = el("p", { class: "notice", role: "status" }, "Loading…");
    this.main = el("main", {}, this.notice);
    root.append(this.controls.bar, this.main, this.tooltip.node);
    this.listen();
  }

  listen() {
    this.theme = followTheme();
    onArrows((by) => this.moveStep(by));
    onNewWidth(() => this.redrawStrips?.());
    this.address.watch(() => this.guard(() => this.obeyAddress(false)));
    // when the text moves under the pointer, the tooltip is out of place
    document.addEventListener("scroll", () => this.tooltip.hide(), { passive: true });
  }

  async start() {
    await this.guard(async () => {
      await this.findRuns();
      await this.obeyAddress();
    });
  }

  /** Show what the address asks for, as far as it is here. At the start a run that was chosen
   * already comes first, and without any the first run is shown. */
  async obeyAddress(isStart = true) {
    const asked = this.address.read();
    const at = (name) => (this.runs.includes(asked.get(name)) ? asked.get(name) : null);
    this.missing = ["run", "compare"].filter((name) => asked.has(name) && !at(name)).map((name) => asked.get(name));
    const run = (isStart ? this.wanted[0] : null) ?? at("run") ?? this.state.runs[0] ?? this.runs[0];
    if (run === undefined) return this.say("No run here has written segmentations yet.");
    this.takeFilters(asked);
    const step = asked.has("step") && at("run") === run ? Number(asked.get("step")) : NaN;
    this.askedStep = Number.isFinite(step) ? step : null;
    await this.chooseRun(1, at("compare"), false);
    await this.chooseRun(0, run);
  }

  /** Filters of an address; what no list offers is dropped when the lists are filled. */
  takeFilters(asked) {
    const threshold = asked.has("p") ? Number(asked.get("p")) : NaN;
    const isOne = threshold >= 0 && threshold <= 1;
    const text = (name) => asked.get(name) ?? "";
    Object.assign(this.state, {
      level: asked.get("level") ?? "0", route: text("script"), gold: text("gold"), query: text("text"),
      threshold: isOne ? threshold : null,
    });
    this.controls.search.value = this.state.query;
    this.controls.preview.checked = isOne;
    this.controls.threshold.disabled = !isOne;
    if (isOne) this.controls.threshold.value = threshold;
  }

  /** After a moment, since keys that repeat change it often. */
  tellAddress() {
    clearTimeout(this.telling);
    this.telling = setTimeout(() => this.address.write(this.described()), TYPING_MS);
  }

  described() {
    const { runs, level, route, gold, query, threshold } = this.state;
    return new Map([
      ["run", runs[0]], ["compare", runs[1]], ["step", this.stepNumber ?? null], ["level", level === "0" ? "" : level],
      ["script", route], ["gold", gold], ["text", query], ["p", threshold],
    ]);
  }

  async findRuns() {
    this.runs = await this.source.runs();
    const short = shortened(this.runs);
    const pairs = this.runs.map((name) => [name, short.get(name)]);
    fill(this.controls.runs[0], pairs);
    fill(this.controls.runs[1], [["", "no other run"], ...pairs]);
  }

  /** Look for new runs and steps; a view of the newest step follows it. */
  async reload() {
    await this.guard(async () => {
      await this.findRuns();
      if (this.state.runs[0] === null) return this.obeyAddress();
      const before = this.state.runs.filter((run) => run !== null);
      const isShown = (run) => this.state.runs.includes(run);
      const found = new Map(before.map((run) => [run, this.source.run(run)]));
      await Promise.all(before.map((run) => stillWanted(found.get(run), () => isShown(run))));
      const { atEnd } = this;
      // A run that was chosen meanwhile stays; others are asked for again when they are chosen.
      for (const run of this.info.keys()) if (!isShown(run)) this.info.delete(run);
      for (const run of before.filter(isShown)) this.info.set(run, await found.get(run));
      this.views.clear();
      this.found.clear();
      this.fillFilters();
      await this.goTo(atEnd ? this.steps.length - 1 : this.state.step);
    });
  }

  /** Show a run first (i = 0) or beside it, at the last step not after the one shown; at its newest
   * step if that was shown of the run before. Of several choices the last one counts, in whatever
   * order they load. */
  async chooseRun(i, name, isDrawn = true) {
    this.wanted[i] = name;
    await this.guard(async () => {
      if (!(await stillWanted(name && this.load(name), () => this.wanted[i] === name))) return;
      const before = this.askedStep ?? (this.atEnd ? Infinity : this.stepNumber);
      this.state.runs[i] = name;
      this.controls.runs[i].value = name ?? "";
      if (!isDrawn) return;
      this.askedStep = null;
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

  get chosen() {
    return this.state.runs.filter((run) => run !== null);
  }

  /** Texts of the chosen runs that pass the filters: [[key, text]]. */
  texts(found) {
    const all = new Map();
    for (const run of this.state.runs) {
      for (const [key, text] of Object.entries(this.info.get(run)?.texts ?? {})) {
        const routes = [...new Set([...(all.get(key)?.routes ?? []), ...text.routes])]; // runs may name others
        all.set(key, { ...text, routes });
      }
    }
    const { route, query } = this.state;
    const isNamed = (text) => printable(text.name).toLowerCase().includes(query.toLowerCase());
    return [...all].filter(
      ([key, text]) => (!route || text.routes.includes(route)) && (!query || isNamed(text) || found.has(key)),
    );
  }

  fillFilters() {
    const texts = this.state.runs.flatMap((run) => Object.values(this.info.get(run)?.texts ?? {}));
    for (const [field, name, none] of [["route", "routes", "all"], ["gold", "gold", "none"]]) {
      const names = [...new Set(texts.flatMap((text) => text[name]))].sort();
      fill(this.controls[field], [["", none], ...names.map((n) => [n, n])]);
      if (!names.includes(this.state[field])) this.state[field] = "";
      this.controls[field].value = this.state[field];
    }
    this.controls.slider.max = Math.max(this.steps.length - 1, 0);
  }

  set(change) {
    Object.assign(this.state, change);
    if ("route" in change || "query" in change) this.shown = PAGE;
    return this.guard(() => this.refresh());
  }

  search(query) {
    clearTimeout(this.typing);
    this.typing = setTimeout(() => this.set({ query }), TYPING_MS);
  }

  setThreshold() {
    const { preview, threshold } = this.controls;
    threshold.disabled = !preview.checked;
    this.set({ threshold: preview.checked ? Number(threshold.value) : null });
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
    this.controls.play.textContent = this.timer ? "❚❚" : "▶";
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

  /** Keys of the chosen runs' texts in which the query occurs. */
  async searched() {
    const { query } = this.state;
    const name = (run) => JSON.stringify([run, query]);
    for (const run of query ? this.chosen : []) {
      if (!this.found.has(name(run))) this.found.set(name(run), await this.source.search(run, query));
    }
    return new Set(query ? this.chosen.flatMap((run) => this.found.get(name(run))) : []);
  }

  /** Fetch what the state asks for and draw it, unless a newer state came meanwhile: the first texts
   * as cards, then all of them for the summary. */
  async refresh() {
    const turn = ++this.turn;
    const isWanted = () => turn === this.turn;
    this.showStep();
    this.loading = true;
    const searching = this.searched();
    if (!(await stillWanted(searching, isWanted))) return;
    const texts = this.texts(await searching);
    const runs = this.chosen.map((run) => ({ run, step: this.stepOf(run), found: new Map() }));
    const fetch = async (keys) => {
      const fetching = Promise.all(runs.map(({ run, step }) => this.fetchViews(run, step, keys)));
      if (!(await stillWanted(fetching, isWanted))) return false;
      (await fetching).forEach((found, i) => found.forEach((seg, key) => runs[i].found.set(key, seg)));
      return true;
    };
    const keys = texts.map(([key]) => key);
    if (!(await fetch(keys.slice(0, this.shown)))) return;
    this.loading = false;
    const at = (step) => (step === null ? "" : ` · step ${step.toLocaleString("en")}`); // a page may know none
    for (const run of runs) run.label = printable(run.run) + at(run.step);
    this.tellAddress();
    const options = this.draw(runs, texts);
    for (let first = this.shown; first < keys.length; first += BATCH) {
      if (!(await fetch(keys.slice(first, first + BATCH)))) return;
    }
    this.drawFigures(runs, keys, options);
  }

  showStep() {
    const { slider, step, threshold, thresholdLabel } = this.controls;
    slider.value = this.state.step;
    const number = this.stepNumber?.toLocaleString("en") ?? "none";
    slider.setAttribute("aria-valuetext", `step ${number}`);
    step.textContent = `step ${number} (${this.state.step + 1} of ${this.steps.length})`;
    thresholdLabel.textContent = Number(threshold.value).toFixed(2);
  }

  /** The cards of the first texts, and a place for the figures of all. */
  draw(runs, texts) {
    const { gold, threshold, query } = this.state;
    const all = runs.flatMap(({ found }) => [...found.values()]).filter(Boolean);
    const count = Math.max(0, ...all.map((seg) => seg.stages.length));
    if (count) this.state.level = fillLevels(this.controls.levels, count, this.state.level, NESTED);
    const levels = this.state.level === NESTED ? Array.from({ length: count }, (_, s) => s) : [Number(this.state.level)];
    const kinds = [...new Set(all.flatMap((seg) => [...seg.gold.keys()]))];
    const options = { levels, gold, threshold, kinds, query, isCompared: runs.length > 1 };
    const drawn = texts.slice(0, this.shown);
    const cards = drawn.map(([key, text]) => drawCard(text, this.viewsOf(runs, key), runs, options, this.tooltip));
    const rest = texts.length - drawn.length;
    const label = `Show ${Math.min(rest, PAGE)} of ${rest} more text${rest === 1 ? "" : "s"}`;
    const showMore = () => {
      this.shown += PAGE;
      this.set({});
    };
    const labels = el("div", { class: "columns runnames" }, ...runs.map((run) => el("div", {}, run.label)));
    this.figures = el("div", { class: "figures" });
    this.main.dataset.level = this.state.level;
    this.main.replaceChildren(
      ...[this.told(), legend(options), this.figures, labels, ...cards.map(({ card }) => card)].filter(Boolean),
      ...(rest > 0 ? [button(label, label, showMore, "more")] : []),
    );
    if (!cards.length) this.main.append(el("p", { class: "notice" }, "No text passes the filters."));
    this.redrawStrips = () => cards.forEach(({ redraw }) => redraw());
    this.redrawStrips();
    this.drawFigures(runs, drawn.map(([key]) => key), options, texts.length);
    return options;
  }

  /** [segmentation or null, its starts] of a text in each run. */
  viewsOf(runs, key) {
    return runs.map(({ found }) => {
      const seg = found.get(key);
      return [seg, seg ? startsAt(seg, this.state.threshold) : null];
    });
  }

  /** The summary and the agreement, of all texts or of those that are here already. */
  drawFigures(runs, keys, { levels }, total = keys.length) {
    const views = keys.map((key) => this.viewsOf(runs, key));
    const rows = runs.map((run, i) => ({ ...run, pairs: views.map((of) => of[i]).filter(([seg]) => seg) }));
    const of = keys.length < total ? `${keys.length} of ${total} texts…` : `all ${total} texts`;
    const parts = [drawSummary(rows, levels, of), drawAgreement(views, levels)];
    this.figures.replaceChildren(...parts.filter(Boolean));
  }

  /** What people should know of the runs: damaged lines, and runs of the address that are not here. */
  told() {
    const damaged = this.chosen.flatMap((run) => {
      const count = this.info.get(run)?.damaged ?? 0;
      return count ? [`${printable(run)}: ${count} damaged line${count === 1 ? "" : "s"} of its index left out`] : [];
    });
    const told = [...damaged, ...(this.missing ?? []).map((run) => `There is no run ${printable(run)} here.`)];
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
