"""The Boundaries tab in a real browser, by a real TensorBoard process, on runs just trained."""

import csv
import io
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import unicodedata
from dataclasses import replace
from importlib.metadata import entry_points
from pathlib import Path
from urllib.parse import quote_plus, unquote
from xml.etree import ElementTree

import jax
import numpy as np
import pytest

from hnet.config import ChunkingConfig, HNetConfig, StageConfig
from hnet.data import DataConfig
from hnet.inspect.index import FOLDER, INDEX, SegmentationIndex
from hnet.inspect.page import to_html
from hnet.inspect.segmentation import (
    Segmentation,
    StageBoundaries,
    characters,
    is_invalid,
    read_segmentations,
)
from hnet.inspect.store import SegmentationLog
from hnet.train.config import CheckpointConfig, EvalConfig, TrainConfig
from tests.inspect_samples import HOSTILE, TEXTS, probe_texts
from tests.training import run, tiny_run

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
sync_api = pytest.importorskip(
    "playwright.sync_api", reason="playwright is not installed: pip install -e '.[browser]'"
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium found: apt install chromium")
RUN, OTHER = "seed 1", "seed 2"
GROWING = "outer"  # the other run's outer stage, without routes
STEPS = {RUN: [0, 10, 20, 30], OTHER: [0, 15, 30]}
NEWEST = 30
BUILT_IN = 5  # probe texts that every run has
PLUGIN = "data/plugin_entry.html?name=boundaries"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Log folder of two short runs on the sample texts, which are also their probe texts."""
    root = tmp_path_factory.mktemp("runs")
    (root / "text.txt").write_text(30 * "\n".join(text for _, text in TEXTS.values()))
    lines = [json.dumps(text.to_json()) + "\n" for text in probe_texts()]
    (root / "probes.jsonl").write_text("".join(lines))
    outer = StageConfig(("t1", ""), 16, num_heads=2, rotary_emb_dim=4, chunking=ChunkingConfig(2))
    main = StageConfig(("T1",), 16, 32, num_heads=2, rotary_emb_dim=4)
    for seed, (name, steps) in enumerate(STEPS.items(), 1):
        config = tiny_run(
            root / name,
            model=HNetConfig((outer, outer, main)),
            seed=seed,
            data=DataConfig((str(root / "text.txt"),), batch_size=4, seq_len=64),
            train=TrainConfig(steps=steps[-1], log_every=5),
            eval=EvalConfig(
                every=steps[1],
                max_bytes=600,
                probe_texts=20,
                probe_files=(str(root / "probes.jsonl"),),
            ),
            checkpoint=CheckpointConfig(every=0),
        )
        run(config, devices=jax.devices()[:1])
    return root


@pytest.fixture(scope="module")
def stored(trained):
    """(run, step, name) -> segmentation that the run wrote."""
    found = {}
    for name in STEPS:
        index = SegmentationIndex(trained / name / "tensorboard" / FOLDER)
        index.refresh()
        assert index.steps == STEPS[name]
        for step in index.steps:
            for content in index.read(step, index.keys(step)).values():
                seg = Segmentation.from_json(content)
                found[name, step, seg.name] = seg
    return found


@pytest.fixture(scope="module")
def grow(trained, stored):
    """Makes a third run write its next step; it has two."""
    log = SegmentationLog(trained / GROWING / "tensorboard")

    def write(step):
        texts = [seg for (*of, _), seg in stored.items() if of == [OTHER, step]]
        log.write(step, [replace(seg, stages=seg.stages[:1], routes=()) for seg in texts])

    write(0)
    write(15)
    yield lambda: write(30)
    log.close()


@pytest.fixture(scope="module")
def address(trained, grow, tmp_path_factory):
    """Address of a TensorBoard that discovered the plugin by itself."""
    assert "boundaries" in entry_points(group="tensorboard_plugins").names, "run pip install -e ."
    log = tmp_path_factory.mktemp("log") / "tensorboard.log"
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(trained)]
    options = ["--host", "127.0.0.1", "--port", "0", "--load_fast", "false"]
    with open(log, "wb") as f:
        process = subprocess.Popen([*command, *options], stdout=f, stderr=f)
    try:
        for _ in range(600):
            if found := re.search(r"at (http://[^ ]+/) ", log.read_text()):
                break
            try:
                process.wait(0.1)
                pytest.fail(f"tensorboard ended: {log.read_text()}")
            except subprocess.TimeoutExpired:
                continue
        yield found[1]
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(20)


@pytest.fixture(scope="module")
def browser():
    root = os.geteuid() == 0
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox"] if root else []
        )
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def watched(browser):
    """One page for all tests, and its problems: errors, dialogs, foreign requests."""
    page, problems = browser.new_page(), []
    page.set_default_timeout(30_000)  # for busy machines
    sync_api.expect.set_options(timeout=30_000)
    page.on("pageerror", lambda e: problems.append(str(e)))
    page.on("dialog", lambda d: (problems.append(d.message), d.dismiss()))
    allowed = ("http://127.0.0.1:", "file://", "about:", "data:", "blob:")
    page.on("request", lambda r: r.url.startswith(allowed) or problems.append(r.url))
    yield page, problems
    page.close()


@pytest.fixture
def open_page(watched):
    page, problems = watched

    def open_page(url, width=1280, dark=False):
        page.set_viewport_size({"width": width, "height": 900})
        page.emulate_media(color_scheme="dark" if dark else "light")
        page.goto("about:blank")  # so that a change is never of the fragment only
        page.goto(url)
        return page

    yield open_page
    assert not problems


@pytest.fixture
def view(open_page, address):
    page = open_page(address + PLUGIN)
    page.get_by_label("Run", exact=True).select_option(RUN)
    page.locator(".runnames", has_text=f"{RUN} · step {NEWEST}").wait_for()
    return page


def card(page, name):
    return page.locator(".card").filter(has=page.locator(".name", has_text=re.compile(f"^{name}$")))


def chunks(page, name, column=0):
    return card(page, name).locator(".text").nth(column).locator(".chunk")


def cut_text(page, name, column=0):
    return chunks(page, name, column).all_text_contents()


def shown(seg, stage):
    """Text shown in each chunk: split characters as character and bytes; invisible ones by name."""
    edges = [*seg.stages[stage].starts, len(seg.data)]
    return ["".join(_signs(seg.data, a, b, edges)) for a, b in itertools.pairwise(edges)]


def _signs(data, first, last, edges):
    for start, end, char in characters(data):
        if end <= first or start >= last:
            continue
        boxes = [rf"\x{byte:02X}" for byte in data[max(start, first) : min(end, last)]]
        category = unicodedata.category(char)
        hidden = category in ("Cc", "Cf", "Zl", "Zp", "Co", "Cn")
        separate = "◌" + char if category[0] == "M" else char
        if is_invalid(char):
            yield boxes[0]
        elif set(edges) & set(range(start + 1, end)):
            if start >= first:
                yield f"U+{ord(char):04X}" if hidden else separate
            yield from boxes
        elif char in "\t\n":
            yield {"\t": "⇥\t", "\n": "↵\n"}[char]
        elif hidden and char != "\u200d":
            yield f"U+{ord(char):04X}"
        else:
            yield separate if start == first else char


def is_inside(seg, offset):
    return 0x80 <= seg.data[offset] < 0xC0


def show_all(page):
    more, cards = page.locator("button.more"), page.locator(".card")
    while more.count():
        before = cards.count()
        more.click()
        sync_api.expect(cards).not_to_have_count(before)


PROBABILITY, SURPRISAL = ".strip[aria-label^=probability]", ".strip[aria-label^=surprisal]"


def strips(page, name):
    return card(page, name).locator(PROBABILITY)


def to_step(page, i):
    """Slide the first run there."""
    page.get_by_label("Training step").fill(str(i))
    page.locator(".steplabel", has_text=f"({i + 1} of").wait_for()
    page.locator(".runnames", has_text=f"step {STEPS[RUN][i]}").wait_for()


def test_tab_in_tensorboard_shows_the_newest_step(open_page, address, stored):
    page = open_page(address + "#boundaries")
    page.get_by_role("tab", name="Boundaries").wait_for(timeout=30_000)
    frame = page.frame_locator("iframe")
    frame.get_by_label("Run", exact=True).select_option(RUN)
    frame.locator(".runnames", has_text=f"{RUN} · step {NEWEST}").wait_for()
    texts = [name for *of, name in stored if of == [RUN, NEWEST]]
    assert set(TEXTS) < set(texts)
    found = frame.locator(".card .name").all_text_contents()
    assert found == texts[: len(found)]
    cut = frame.locator(".card").nth(texts.index("english")).locator(".chunk").all_text_contents()
    assert cut == shown(stored[RUN, NEWEST, "english"], 0)


def test_sliding_through_training(view, stored):
    english = [stored[RUN, step, "english"] for step in STEPS[RUN]]
    assert len({seg.stages[0].starts for seg in english}) == len(english)  # it has learned
    for i in (0, 2):
        to_step(view, i)
        assert cut_text(view, "english") == shown(english[i], 0)
    view.locator("h2").first.click()
    for key, i in (("ArrowRight", 3), ("ArrowLeft", 2), ("ArrowLeft", 1)):
        view.keyboard.press(key)
        view.locator(".runnames", has_text=f"step {STEPS[RUN][i]}").wait_for()
    view.get_by_role("button", name="Next step").click()
    view.locator(".steplabel", has_text="step 20").wait_for()
    view.get_by_role("button", name="Play the steps").click()
    view.locator(".runnames", has_text=f"step {NEWEST}").wait_for()


def test_every_text_is_shown_byte_for_byte(view, stored):
    show_all(view)
    for (*of, name), seg in stored.items():
        if of == [RUN, NEWEST]:
            assert cut_text(view, name) == shown(seg, 0)


def test_switching_stages(view, stored):
    seg = stored[RUN, NEWEST, "turkish"]
    view.get_by_label("Find a text").fill("turkish")
    assert cut_text(view, "turkish") == shown(seg, 0)
    view.get_by_text("nested", exact=True).click()
    inner = chunks(view, "turkish").locator("xpath=self::*[contains(@class, 'depth1')]")
    sync_api.expect(inner).to_have_count(len(seg.stages[1].starts) - 1)
    assert cut_text(view, "turkish") == shown(seg, 0)
    assert strips(view, "turkish").count() == 2
    view.get_by_text("stage 1", exact=True).first.click()
    sync_api.expect(inner).to_have_count(0)
    assert cut_text(view, "turkish") == shown(seg, 1)


def test_comparing_two_runs(view, stored):
    view.get_by_label("Compare with run").select_option(OTHER)
    view.locator(".divergence").wait_for()
    to_step(view, 2)
    view.locator(".runnames", has_text=f"{OTHER} · step 15").wait_for()  # the last before 20
    both = [(RUN, 20), (OTHER, 15)]
    pairs = [stored[run, step, "english"] for run, step in both]
    assert pairs[0].stages[0].starts != pairs[1].stages[0].starts
    for column, seg in enumerate(pairs):
        assert cut_text(view, "english", column) == shown(seg, 0)
    a, b = ([seg for (*of, _), seg in stored.items() if tuple(of) == run] for run in both)
    view.locator(".caption", has_text="all").wait_for()
    cuts = [(set(x.stages[0].starts[1:]), set(y.stages[0].starts[1:])) for x, y in zip(a, b)]
    f1 = 2 * sum(len(x & y) for x, y in cuts) / sum(len(x) + len(y) for x, y in cuts)
    sync_api.expect(view.locator(".divergence")).to_contain_text(f"stage 0: F1 {f1:.3f}")
    view.get_by_label("Compare with run").select_option("")
    sync_api.expect(card(view, "english").locator(".text")).to_have_count(1)


def test_comparing_with_a_run_of_fewer_stages(view, stored):
    view.get_by_label("Compare with run").select_option(GROWING)
    view.get_by_text("nested", exact=True).click()
    # the same text, though one of the runs knows no routes
    columns = card(view, "english").locator(".column")
    sync_api.expect(card(view, "english").locator(".route")).to_have_text(["Latin"])
    sync_api.expect(columns.nth(0).locator(PROBABILITY)).to_have_count(2)
    sync_api.expect(columns.nth(1).locator(PROBABILITY)).to_have_count(1)
    sync_api.expect(view.locator(".divergence")).to_have_text(re.compile("boundaries: stage 0: F1"))
    view.get_by_text("stage 1", exact=True).first.click()
    sync_api.expect(columns.nth(1)).to_have_text("no stage 1 here")
    assert cut_text(view, "english") == shown(stored[RUN, NEWEST, "english"], 1)


def test_a_running_run_grows_and_the_view_follows(view, grow):
    view.get_by_label("Run", exact=True).select_option(GROWING)
    view.locator(".steplabel", has_text="step 15 (2 of 2)").wait_for()
    grow()
    view.get_by_role("button", name="Look for new").click()
    view.locator(".steplabel", has_text="step 30 (3 of 3)").wait_for()
    view.locator(".runnames", has_text="step 30").wait_for()


@pytest.fixture
def held(watched):
    """Delays the responses about a run: (run) -> function that releases them."""
    page, _ = watched
    matching = []

    def hold(name):
        waiting = []
        matching.append(re.compile(r"/run\?run=" + re.escape(quote_plus(name))))
        page.route(matching[-1], lambda route: waiting.append(route))

        def let_go():
            for _ in range(600):  # until the page has asked
                if waiting:
                    break
                page.wait_for_timeout(50)
            with page.expect_response(matching[-1]):
                waiting.pop().continue_()

        return let_go

    yield hold
    for pattern in matching:
        page.unroute(pattern)


def test_the_run_chosen_last_is_shown_though_another_loads_later(open_page, address, held):
    let_go = held(GROWING)  # the first one, which is shown until another is chosen
    page = open_page(address + PLUGIN)
    page.get_by_label("Run", exact=True).select_option(RUN)
    page.locator(".runnames", has_text=f"{RUN} · step {NEWEST}").wait_for()
    let_go()
    to_step(page, 2)
    assert page.get_by_label("Run", exact=True).input_value() == RUN


def test_the_view_is_usable_while_new_steps_are_looked_for(view, held):
    let_go = held(RUN)
    view.get_by_role("button", name="Look for new").click()
    to_step(view, 1)
    let_go()
    to_step(view, 2)


def test_another_run_is_shown_at_the_nearest_step_before(view):
    to_step(view, 2)
    view.get_by_label("Run", exact=True).select_option(OTHER)
    view.locator(".steplabel", has_text="step 15 (2 of 3)").wait_for()


def test_hover_tells_offsets_bytes_and_probability(view, stored):
    seg = stored[RUN, NEWEST, "english"]
    starts = seg.stages[0].starts
    chunk = next(i for i, start in enumerate(starts) if start in seg.gold["words"])
    start, end = starts[chunk : chunk + 2]
    chunks(view, "english").nth(chunk).hover()
    tip = view.locator(".tooltip")
    sync_api.expect(tip).to_contain_text(f"{start} to {end}, {end - start} byte")
    sync_api.expect(tip).to_contain_text(seg.data[start:end].hex(" ").upper())
    sync_api.expect(tip).to_contain_text(f"{seg.stages[0].probs[start]:.3f}")
    sync_api.expect(tip).to_contain_text("Latin")
    sync_api.expect(tip).to_contain_text("gold words, characters")
    view.locator("h2").first.hover()
    sync_api.expect(tip).to_be_hidden()
    for strip in (strips(view, "english"), card(view, "english").locator(SURPRISAL)):
        view.locator("h2").first.hover()
        sync_api.expect(tip).to_be_hidden()
        width = strip.bounding_box()["width"]
        strip.hover(position={"x": width * (start + 0.5) / len(seg.data), "y": 20})
        sync_api.expect(tip).to_contain_text(f"{start} to {end}")
    bits = sum(seg.bits[start:end])
    sync_api.expect(tip).to_contain_text(f"{bits:.2f} bits, first byte {seg.bits[start]:.2f}")


def test_keyboard_walks_through_chunks(view):
    text = card(view, "english").locator(".text")
    text.focus()
    for _ in range(3):
        view.keyboard.press("ArrowRight")
    sync_api.expect(text.locator(".chosen")).to_have_attribute("data-chunk", "2")
    sync_api.expect(view.locator(".tooltip")).to_contain_text("chunk")
    assert f"step {NEWEST}" in view.locator(".steplabel").inner_text()  # arrows here change no step
    view.keyboard.press("Escape")
    sync_api.expect(view.locator(".tooltip")).to_be_hidden()
    view.keyboard.press("Shift+Tab")
    view.keyboard.press("Tab")
    outline = text.evaluate("e => getComputedStyle(e).outlineStyle")
    assert outline == "solid"


def test_filters(view, stored):
    texts = [name for *of, name in stored if of == [RUN, NEWEST]]
    assert len(texts) == 1 + len(TEXTS) + 1 + BUILT_IN  # held-out text, samples, invalid bytes
    names = view.locator(".card .name")
    sync_api.expect(names).to_have_text(texts[:8])
    show_all(view)
    sync_api.expect(names).to_have_text(texts)
    view.get_by_label("Script or route").select_option("Thai")
    thai = [name for name in texts if "Thai" in stored[RUN, NEWEST, name].route_names()]
    sync_api.expect(names).to_have_text(thai)
    assert thai[-2:] == ["thai", "scripts"]
    view.get_by_label("Script or route").select_option("")
    view.get_by_label("Find a text").fill("HI")
    content = {name: seg.data.decode(errors="replace") for (*of, name), seg in stored.items()}
    with_hi = [name for name in texts if "hi" in name or "hi" in content[name].lower()]
    assert "hindi" in with_hi and any("hi" not in name for name in with_hi)
    sync_api.expect(names).to_have_text(with_hi[:8])
    view.get_by_label("Find a text").fill("nothing at all")
    sync_api.expect(view.locator(".notice")).to_contain_text("No text passes")


def test_gold_marks_and_f1(view, stored):
    to_step(view, 1)
    view.get_by_label("Gold boundaries").select_option("words")
    seg = stored[RUN, 10, "english"]
    hits = len(set(seg.stages[0].starts) & set(seg.gold["words"]))
    assert 0 < hits < len(seg.gold["words"])
    text = card(view, "english").locator(".text")
    sync_api.expect(text.locator(".gold.hit")).to_have_count(hits)
    sync_api.expect(text.locator(".gold.missed")).to_have_count(len(seg.gold["words"]) - hits)
    f1 = 2 * hits / (len(seg.stages[0].starts) - 1 + len(seg.gold["words"]))
    assert f"words F1 {f1:.2f}" in card(view, "english").locator(".facts").inner_text()


def test_threshold_preview(view, stored):
    to_step(view, 2)
    stage = stored[RUN, 20, "english"].stages[0]
    count = lambda t: 1 + sum(p > t for p in stage.probs[1:])
    threshold = next(t / 100 for t in range(51, 100) if count(t / 100) < len(stage.starts))
    assert 1 < count(threshold)
    view.get_by_label("preview p >").check()
    view.get_by_label("Threshold").fill(str(threshold))
    sync_api.expect(chunks(view, "english")).to_have_count(count(threshold))
    sync_api.expect(view.locator(".legend")).to_contain_text(f"p > {threshold:.2f}")
    view.get_by_label("preview p >").uncheck()
    sync_api.expect(chunks(view, "english")).to_have_count(len(stage.starts))


def test_hostile_and_broken_text_is_shown_as_text(view):
    show_all(view)
    assert "".join(cut_text(view, "hostile")) == HOSTILE
    assert view.locator("img, script[src*=x], .text b").count() == 0
    assert "pwned" not in view.title()
    broken = card(view, "invalid bytes").locator(".byte").all_text_contents()
    assert r"\xFF\xFE" in "".join(broken)
    assert {"U+0000", "U+001B"} <= set(broken)
    for step in range(len(STEPS[RUN])):  # whether a boundary splits it or not
        to_step(view, step)
        assert "U+202E" in card(view, "emoji").locator(".byte").all_text_contents()
        assert "\u202e" not in "".join(cut_text(view, "emoji"))
    assert "⇥" in "".join(cut_text(view, "tabs"))


def test_a_boundary_inside_a_character_is_seen(view, stored):
    to_step(view, 0)
    seg = stored[RUN, 0, "chinese"]
    split = [o for o in seg.stages[0].starts if is_inside(seg, o)]
    assert len(split) > 3
    sync_api.expect(card(view, "chinese").locator(".chunk.inside")).to_have_count(len(split))
    assert card(view, "chinese").locator(".cut").count() > 3
    assert "inside characters" in card(view, "chinese").locator(".facts").inner_text()


def test_right_to_left_text_runs_to_the_left(view, stored):
    boxes = [chunks(view, "arabic").nth(i).bounding_box()["x"] for i in range(3)]
    assert boxes[0] > boxes[1] > boxes[2]
    # a separator stands where reading begins, also for English in a Hebrew line
    edges = "e => [getComputedStyle(e).borderLeftWidth, getComputedStyle(e).borderRightWidth]"
    seg = stored[RUN, NEWEST, "hebrew"]
    for letters, expected in (("אבהיצרלדמקש", ["0px", "1px"]), ("andEnglish", ["1px", "0px"])):
        i = next(
            i
            for i, chunk in enumerate(seg.chunks(0))
            if i
            and chunk.decode(errors="ignore")[:1] in set(letters) - {""}
            and not is_inside(seg, seg.stages[0].starts[i])
        )
        assert chunks(view, "hebrew").nth(i).evaluate(edges) == expected


def test_nothing_overflows_or_is_hidden(open_page, address, stored):
    page = open_page(address + PLUGIN, 320)
    page.get_by_label("Run", exact=True).select_option(RUN)
    page.get_by_label("Compare with run").select_option(OTHER)
    page.get_by_label("Gold boundaries").select_option("words")
    page.get_by_text("nested", exact=True).click()
    show_all(page)
    page.locator(".caption", has_text=re.compile(r"all \d+ texts")).wait_for()
    for width, media in itertools.product([320, 600, 899, 901, 1101, 1920], ["screen", "print"]):
        page.set_viewport_size({"width": width, "height": 900})
        page.emulate_media(media=media)
        expect_all_to_be_seen(page, width, media)
    page.emulate_media(media="screen")


def expect_all_to_be_seen(page, width, media):
    how = width, media
    assert page.evaluate("document.documentElement.scrollWidth") == width, how
    boxes = page.locator(".card, .bar, .summary, .text, .facts, td, th, .legend, h2, main, .column")
    too_wide = "e => e.scrollWidth > e.clientWidth + 1 && e.clientWidth"
    assert boxes.evaluate_all(f"all => all.filter({too_wide}).map(e => e.outerHTML)") == [], how
    # each text to its last chunk: nothing is hidden by a box that scrolls or is too low
    inside = """all => all.every(box => {
      const last = box.querySelector(".chunk:last-child");
      const [a, b] = [box.getBoundingClientRect(), last.getBoundingClientRect()];
      const isWhole = box.scrollHeight <= box.clientHeight + 1;
      return isWhole && b.bottom <= a.bottom + 6 && b.right <= a.right + 1;
    })"""
    drawn = page.locator(".strip .value, .histogram .count, .text i").evaluate_all(
        "all => all.map(e => getComputedStyle(e, e.tagName == 'I' ? '::before' : null).display)"
    )
    assert len(drawn) > 100 and "none" not in drawn, how
    texts = page.locator(".text")
    assert texts.count() == 2 * (1 + len(TEXTS) + 1 + BUILT_IN)
    assert texts.evaluate_all(inside), how
    tops = (
        page.locator(".card")
        .first.locator(".column")
        .evaluate_all("all => all.map(e => e.getBoundingClientRect().top)")
    )
    assert (tops[0] == tops[1]) == (width > 900 and media == "screen"), how


def test_dark_on_screen_is_light_on_paper(open_page, address):
    page = open_page(address + PLUGIN, dark=True)
    page.locator(".card").first.wait_for()
    colour = "getComputedStyle(document.documentElement).getPropertyValue('--panel')"
    assert page.evaluate(colour).strip() == "#252a31"
    page.emulate_media(media="print")
    assert page.evaluate(colour).strip() == "#ffffff"
    page.emulate_media(media="screen")


@pytest.mark.parametrize("width", [1280, 1920])
def test_nothing_overflows_and_dark_is_dark(open_page, address, width):
    page = open_page(address + PLUGIN, width, dark=True)
    page.get_by_label("Run", exact=True).select_option(RUN)
    page.get_by_label("Compare with run").select_option(OTHER)
    page.locator(".divergence").wait_for()
    page.get_by_text("nested", exact=True).click()
    page.locator(PROBABILITY).nth(3).wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") == width
    boxes = page.locator(".card, .bar, .summary")
    assert boxes.evaluate_all("all => all.every(e => e.scrollWidth <= e.clientWidth)")

    def brightness():
        colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
        return np.mean([int(n) for n in re.findall(r"\d+", colour)])

    assert brightness() < 60
    page.get_by_role("button", name=re.compile("Light, dark")).click()
    assert brightness() > 200
    page.emulate_media(color_scheme="light")
    page.get_by_role("button", name=re.compile("Light, dark")).click()
    assert brightness() < 60


def test_self_contained_page(open_page, tmp_path, stored):
    runs = {
        name: [seg for (*of, _), seg in stored.items() if of == [name, NEWEST]]
        for name in (RUN, OTHER)
    }
    (tmp_path / "page.html").write_text(to_html(runs, title="Two models"), encoding="utf-8")
    page = open_page((tmp_path / "page.html").as_uri())
    assert page.title() == "Two models"
    sync_api.expect(page.locator(".runnames")).to_have_text(RUN)  # and no step, for none is known
    page.get_by_label("Compare with run").select_option(OTHER)
    show_all(page)
    for column, name in enumerate(runs):
        assert cut_text(page, "english", column) == shown(stored[name, NEWEST, "english"], 0)
    assert "".join(cut_text(page, "hostile")) == HOSTILE
    assert "pwned" not in page.title()


def test_kinds_and_names_of_any_spelling(open_page, tmp_path):
    evil = "constructor", "__proto__", "toString", "\u202e\x1b[2J\n<b>", "hasOwnProperty"
    gold = {kind: (2, 4) for kind in evil}
    stage = StageBoundaries((0, 2, 5), (1.0, 0.1, 0.9, 0.2, 0.3, 0.8))
    texts = [
        Segmentation(b"abcdef", "plain", (stage,)),
        Segmentation(b"abcdef", evil[3], (stage,), ((0, evil[3]),), gold),
        Segmentation(b"abcdef", "__proto__", (stage,), ((0, "constructor"),), gold),
    ]
    page_file = tmp_path / "page.html"
    page_file.write_text(to_html({name: texts for name in evil}, title=evil[3]), encoding="utf-8")
    page = open_page(page_file.as_uri())
    spelled = "\\u{202e}\\u{001b}[2J\\n<b>"
    assert page.title() == spelled
    for name in evil:
        page.get_by_label("Run", exact=True).select_option(name)
        page.get_by_label("Gold boundaries").select_option(name)
        sync_api.expect(page.locator(".text .gold.hit")).to_have_count(2)
        sync_api.expect(page.locator(".text .gold.missed")).to_have_count(2)
    assert page.locator(".card .name").all_text_contents() == ["plain", spelled, "__proto__"]
    assert page.locator(".route").all_text_contents() == [spelled, "constructor"]
    assert not re.search("[\u202e\x1b]", page.locator("body").inner_text())


def test_an_error_is_told_in_words(view, watched):
    page, _ = watched
    page.route(
        "**/view?*",
        lambda route: route.fulfill(status=502, content_type="text/html", body="<html>"),
    )
    to_first = view.get_by_label("Training step")
    to_first.fill("1")
    notice = view.locator(".notice")
    sync_api.expect(notice).to_have_text(
        re.compile("could not be loaded: TensorBoard answered 502$")
    )
    page.unroute("**/view?*")
    page.route("**/view?*", lambda route: route.abort())
    to_first.fill("2")
    sync_api.expect(notice).to_contain_text("TensorBoard does not answer")
    page.unroute("**/view?*")
    to_first.fill("1")
    card(view, "english").wait_for()


def test_damage_of_a_run_is_told(trained, open_page, address):
    folder = trained / "worn" / "tensorboard"
    shutil.copytree(trained / RUN / "tensorboard" / FOLDER, folder / FOLDER)
    with open(folder / FOLDER / INDEX, "ab") as f:
        f.write(b'{"step": Infinity, "rows": {}}\n\xff\n')
    for _ in range(60):  # TensorBoard looks for new runs now and then
        page = open_page(address + PLUGIN)
        if page.get_by_label("Run", exact=True).locator("option", has_text="worn").count():
            break
        page.wait_for_timeout(500)
    page.get_by_label("Run", exact=True).select_option("worn")
    told = page.locator(".notice", has_text="worn: 2 damaged lines of its index left out")
    told.wait_for()
    card(page, "english").wait_for()
    shutil.rmtree(trained / "worn")


# --- the address ---------------------------------------------------------------------------------


def choose_everything(page):
    page.get_by_label("Run", exact=True).select_option(OTHER)
    page.get_by_label("Compare with run").select_option(RUN)
    page.get_by_label("Training step").fill("1")
    page.get_by_text("nested", exact=True).click()
    page.get_by_label("Gold boundaries").select_option("words")
    page.get_by_label("Script or route").select_option("Latin")
    page.get_by_label("Find a text").fill("the")
    page.get_by_label("preview p >").check()
    page.get_by_label("Threshold").fill("0.3")
    page.locator(".legend", has_text="p > 0.30").wait_for()


def chosen(page):
    """State of the controls, and the chunks of the first texts."""
    labels = ("Run", "Compare with run", "Training step", "Gold boundaries", "Script or route",
              "Find a text", "Threshold")  # fmt: skip
    texts = [chunk.all_text_contents() for chunk in page.locator(".text").all()]
    return (
        [page.get_by_label(label, exact=True).input_value() for label in labels],
        page.locator(".levels input:checked").get_attribute("value"),
        page.get_by_label("preview p >").is_checked(),
        page.locator(".runnames > div").all_text_contents(),
        page.locator(".card .name").all_text_contents(),
        texts,
    )


SAID = {
    "run": OTHER, "compare": RUN, "step": "15", "level": "nested", "gold": "words",
    "script": "Latin", "text": "the", "p": "0.3",
}  # fmt: skip


def fragment(page):
    return page.url.partition("#")[2]


def said(page, prefix=""):
    parts = dict(p.split("=", 1) for p in fragment(page).split("&") if "=" in p)
    return {name.removeprefix(prefix): unquote(value) for name, value in parts.items()}


def wait_for_address(page, expected, prefix=""):
    for _ in range(100):
        if said(page, prefix) == expected:
            return
        page.wait_for_timeout(50)
    assert said(page, prefix) == expected


def test_the_address_says_what_is_shown(open_page, address):
    page = open_page(address + PLUGIN)
    choose_everything(page)
    wait_for_address(page, SAID)
    before, link = chosen(page), page.url
    assert len(before[4]) > 1 and all(before[5])
    page.reload()
    page.locator(".legend", has_text="p > 0.30").wait_for()
    assert chosen(page) == before
    page = open_page(link)  # as if sent to another user
    page.locator(".legend", has_text="p > 0.30").wait_for()
    assert chosen(page) == before
    wait_for_address(page, SAID)


def test_an_address_that_a_person_changes_is_obeyed(view):
    view.evaluate("location.hash = '#run=seed%202&step=20'")
    view.locator(".runnames", has_text=re.compile(rf"^{OTHER} · step 15$")).wait_for()
    wait_for_address(view, {"run": OTHER, "step": "15"})
    view.evaluate(f"location.hash = '#run={RUN}&compare={OTHER}&step=10&level=1'")
    view.locator(".runnames > div").nth(1).wait_for()
    assert view.locator(".runnames > div").all_text_contents() == [
        f"{RUN} · step 10", f"{OTHER} · step 0",
    ]  # fmt: skip
    assert view.locator(".levels input:checked").get_attribute("value") == "1"
    view.evaluate(f"location.hash = '#run={RUN}'")
    sync_api.expect(view.locator(".runnames > div")).to_have_count(1)


@pytest.mark.parametrize(
    "hash", ["run=gone", "run=%E0%A4%A", "step=NaN&level=99&script=Klingon&gold=x&p=7", "&&=&b.x=1",
             "run=seed%201&compare=gone&step=1e99", "level=__proto__&p=nonsense"],
)  # fmt: skip
def test_an_address_with_what_is_not_here(open_page, address, hash):
    page = open_page(address + PLUGIN + "#" + hash)
    card(page, "english").wait_for()
    assert page.locator(".levels input:checked").get_attribute("value") == "0"
    told = page.locator(".notice.warn")
    if "gone" in hash:
        sync_api.expect(told).to_contain_text("There is no run gone here")
    else:
        assert told.count() == 0
    assert not page.get_by_label("preview p >").is_checked()


def test_within_tensorboard_the_address_is_that_of_its_page(open_page, address):
    page = open_page(address + "#boundaries")
    frame = page.frame_locator("iframe").first
    frame.locator(".card").first.wait_for()
    choose_everything(frame)
    wait_for_address(page, SAID, "b.")
    link = page.url
    assert fragment(page).startswith("boundaries&")
    page.get_by_role("tab", name="Scalars").first.click()
    page.wait_for_function("location.hash.startsWith('#scalars')")
    page.get_by_role("tab", name="Boundaries").first.click()
    page.wait_for_function("location.hash.startsWith('#boundaries')")
    frame.get_by_label("preview p >").uncheck()
    without = {name: value for name, value in SAID.items() if name != "p"}
    wait_for_address(page, without, "b.")
    page = open_page(link)
    frame = page.frame_locator("iframe").first
    frame.locator(".legend", has_text="p > 0.30").wait_for()
    assert frame.locator(".runnames > div").all_text_contents()[0] == f"{OTHER} · step 15"
    assert frame.locator(".text mark").count() > 0


# --- keys ----------------------------------------------------------------------------------------


def at_step(page, number):
    sync_api.expect(page.locator(".steplabel")).to_contain_text(f"step {number} ")


def test_arrow_keys_change_the_step_wherever_the_focus_is(view):
    at_step(view, 30)
    places = {
        "list": lambda: view.get_by_label("Run", exact=True).focus(),
        "level": lambda: view.locator(".levels input").first.focus(),
        "slider": lambda: view.get_by_label("Training step").focus(),
        "search": lambda: view.get_by_label("Find a text").focus(),
        "button": lambda: view.get_by_role("button", name="Play").focus(),
        "check": lambda: view.get_by_label("preview p >").focus(),
        "clicked text": lambda: card(view, "english").locator(".text").click(),
        "nothing": lambda: view.locator("h2").first.click(),
    }
    for focus in places.values():
        focus()
        view.keyboard.press("ArrowLeft")
        at_step(view, 20)
        view.keyboard.press("ArrowRight")
        at_step(view, 30)
    assert view.get_by_label("Run", exact=True).input_value() == RUN
    assert view.locator(".levels input:checked").get_attribute("value") == "0"
    view.get_by_label("Find a text").fill("ab")  # here arrows move the caret
    view.keyboard.press("ArrowLeft")
    view.keyboard.type("c")
    assert view.get_by_label("Find a text").input_value() == "acb"
    at_step(view, 30)


def test_arrow_keys_within_tensorboard(open_page, address):
    page = open_page(address + "#boundaries&b.run=seed%201")
    frame = page.frame_locator("iframe").first
    frame.locator(".card").first.wait_for()
    at_step(frame, 30)
    for label in ("Scalars", "Boundaries"):
        page.get_by_role("tab", name=label).first.click()
        page.wait_for_function(f"location.hash.startsWith('#{label.lower()}')")
        page.keyboard.press("ArrowLeft")  # in the other tab it does nothing here
    at_step(frame, 20)
    page.keyboard.press("ArrowLeft")
    at_step(frame, 10)


# --- two runs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", ["0", "1", "nested"])
def test_marks_where_two_runs_differ(view, stored, level):
    view.get_by_label("Compare with run").select_option(OTHER)
    view.locator(f".levels input[value='{level}']").check(force=True)
    view.locator(".legend", has_text="boundary of the other run only").wait_for()
    to_step(view, 2)
    view.locator(".runnames", has_text=f"{OTHER} · step 15").wait_for()
    pair = [stored[RUN, 20, "turkish"], stored[OTHER, 15, "turkish"]]
    stage = 1 if level == "1" else 0
    cuts = [set(map(int, seg.boundaries(stage))) for seg in pair]
    assert cuts[0] != cuts[1]
    for column, (own, other) in enumerate([cuts, cuts[::-1]]):
        text = card(view, "turkish").locator(".text").nth(column)
        sync_api.expect(text.locator(".only")).to_have_count(len(own - other))
        starts = [0, *sorted(own)]
        marked = text.locator(".chunk:has(.only)").evaluate_all(
            "all => all.map(e => e.dataset.chunk)"
        )
        assert {starts[int(i)] for i in marked} == own - other
        whole = {o for o in other - own if not is_inside(pair[0], o)}
        assert text.locator(".absent").count() >= len(whole) > 0
        facts = card(view, "turkish").locator(".column").nth(column).locator(".facts").first
        only, absent = len(own - other), len(other - own)
        said = f"{only} boundar{'y' if only == 1 else 'ies'} only here, {absent} only there"
        sync_api.expect(facts).to_contain_text(said)


def test_one_run_has_no_marks_of_another(view):
    assert view.locator(".text .only, .text .absent, .legend .only").count() == 0


def test_long_names_of_runs_stay_apart(open_page, tmp_path, stored):
    head, tail = "a" * 50, "z" * 50
    names = [f"{head}/lr=1/{tail}", f"{head}/lr=2/{tail}", f"x/{head}/{tail}", "short"]
    seg = stored[RUN, 0, "english"]
    (tmp_path / "page.html").write_text(to_html({n: [seg] for n in names}), encoding="utf-8")
    page = open_page((tmp_path / "page.html").as_uri())
    options = page.get_by_label("Run", exact=True).locator("option").all_text_contents()
    assert options[:2] == names[:2]  # alike if they were short
    assert len(options[2]) == 59 and options[2] == f"x/{head}"[:29] + "…" + tail[-29:]
    assert options[3] == "short"
    page.get_by_label("Run", exact=True).select_option(names[2])
    sync_api.expect(page.locator(".runnames")).to_have_text(names[2])  # whole
    assert page.evaluate("document.documentElement.scrollWidth") == 1280


# --- search, surprisal, summary, files -----------------------------------------------------------


def test_words_are_found_in_texts_and_marked(view, stored):
    names = view.locator(".card .name")
    content = {n: seg.data for (*of, n), seg in stored.items() if of == [RUN, NEWEST]}
    view.get_by_label("Find a text").fill("UNBREAKABLE fog")
    sync_api.expect(names).to_have_text([n for n in content if b"unbreakable fog" in content[n]])
    marked = "".join(card(view, "english").locator(".text mark").all_text_contents())
    assert marked == "unbreakable fog"
    view.get_by_label("Find a text").fill("\ufffd")  # bytes that are not a character
    broken = [n for n in content if "\ufffd" in content[n].decode(errors="replace")]
    sync_api.expect(names).to_have_text(broken)
    assert {"invalid bytes", "random bytes"} <= set(broken)
    view.get_by_label("Find a text").fill("")
    sync_api.expect(view.locator(".text mark")).to_have_count(0)


def test_surprisal_stands_beside_p(view, stored):
    seg = stored[RUN, NEWEST, "english"]
    strip = card(view, "english").locator(SURPRISAL)
    bars = strip.locator(".value").evaluate_all("all => all.map(e => e.getAttribute('d'))")
    assert sum(d.count("M") for d in bars) == len(seg.data)
    assert bars[1].count("M") == len(seg.stages[0].starts) - 1  # where chunks start
    caps = strip.locator(".cap").get_attribute("d")
    assert caps.count("M") == sum(bits > 8 for bits in seg.bits)
    bpb = sum(seg.bits) / len(seg.bits)
    assert f"{bpb:.3f} bits per byte" in card(view, "english").locator(".facts").inner_text()


def test_without_surprisal_nothing_is_made_up(open_page, tmp_path, stored):
    seg = replace(stored[RUN, 0, "english"], bits=())
    (tmp_path / "page.html").write_text(to_html([seg]), encoding="utf-8")
    page = open_page((tmp_path / "page.html").as_uri())
    strips(page, "english").wait_for()
    assert page.locator(SURPRISAL).count() == 0
    assert "bits per byte" not in page.locator("main").inner_text()


def test_the_summary_is_of_all_texts(view, stored):
    texts = [seg for (*of, _), seg in stored.items() if of == [RUN, NEWEST]]
    assert len(texts) > 8 == view.locator(".card").count()
    caption = view.locator(".caption > span")
    sync_api.expect(caption).to_have_text(f"all {len(texts)} texts")
    chunks = sum(len(seg.stages[0].starts) for seg in texts)
    cells = view.locator(".summary tbody td")
    sync_api.expect(cells.first).to_have_text(str(chunks))
    bpb = sum(sum(seg.bits) for seg in texts) / sum(len(seg.bits) for seg in texts)
    assert cells.nth(2).inner_text() == f"{bpb:.3f}"
    view.get_by_label("Script or route").select_option("Thai")
    thai = [seg for seg in texts if "Thai" in seg.route_names()]
    sync_api.expect(caption).to_have_text(f"all {len(thai)} texts")


def saved(page, button):
    with page.expect_download() as waiting:
        button.click()
    download = waiting.value
    return download.suggested_filename, Path(download.path()).read_bytes()


def test_boundaries_as_json_lines_and_csv(view, stored, tmp_path):
    view.get_by_label("Compare with run").select_option(OTHER)
    view.locator(".divergence").wait_for()
    show_all(view)
    both = [stored[run, NEWEST, "hostile"] for run in (RUN, OTHER)]
    buttons = card(view, "hostile").locator(".actions button")
    name, content = saved(view, buttons.nth(1))
    assert name == f"seed_1-seed_2-{NEWEST}-hostile.jsonl"
    (tmp_path / name).write_bytes(content)
    assert read_segmentations(tmp_path / name) == both
    first = json.loads(content.splitlines()[1])
    assert (first["run"], first["step"]) == (OTHER, NEWEST)

    _, content = saved(view, buttons.nth(2))
    rows = list(csv.DictReader(io.StringIO(content.decode(), newline="")))
    expected = [
        (run, str(s), str(start), bytes(seg.data[start:end]))
        for run, seg in zip((RUN, OTHER), both)
        for s, stage in enumerate(seg.stages)
        for start, end in itertools.pairwise([*stage.starts, len(seg.data)])
    ]
    read = [(r["run"], r["stage"], r["start"], bytes.fromhex(r["hex"])) for r in rows]
    assert read == expected
    own = both[0].stages[0]
    for row, start in zip(rows, own.starts):
        assert float(row["p"]) == own.probs[start]
    total = sum(float(row["bits"]) for row in rows if (row["run"], row["stage"]) == (RUN, "0"))
    assert total == pytest.approx(sum(both[0].bits), abs=0.1)

    _, content = saved(view, view.locator(".summary .actions button").first)
    texts = [seg for (*of, _), seg in stored.items() if of in ([RUN, NEWEST], [OTHER, NEWEST])]
    (tmp_path / "all").write_bytes(content)
    key = lambda seg: (seg.name, seg.stages[0].probs)
    assert sorted(read_segmentations(tmp_path / "all"), key=key) == sorted(texts, key=key)


def test_no_cell_of_a_table_is_a_formula(open_page, tmp_path):
    text = b'=1+1,"x"\n-2 @a +b'
    starts = (0, 4, 9, 10, 13, 16)
    stage = StageBoundaries(starts, (0.5,) * len(text))
    (tmp_path / "page.html").write_text(to_html([Segmentation(text, "=cmd", (stage,))]))
    page = open_page((tmp_path / "page.html").as_uri())
    _, content = saved(page, page.locator(".card .actions button").nth(2))
    rows = list(csv.DictReader(io.StringIO(content.decode(), newline="")))
    assert [row["shown"] for row in rows] == ["'=1+1", ',"x"\\n', "'-", "2 @", "a +", "b"][:6]
    assert {row["text"] for row in rows} == {"'=cmd"}
    assert b"".join(bytes.fromhex(row["hex"]) for row in rows) == text


@pytest.mark.parametrize("name", ["english", "hostile", "arabic", "invalid bytes", "chinese"])
def test_a_card_as_svg(open_page, tmp_path, view, stored, name):
    view.get_by_label("Compare with run").select_option(OTHER)
    view.get_by_label("Gold boundaries").select_option("words")
    view.locator(".divergence").wait_for()
    show_all(view)
    drawn = card(view, name)
    drawn.scroll_into_view_if_needed()
    size = drawn.bounding_box()
    file, content = saved(view, drawn.locator(".actions button").first)
    assert file.endswith(".svg")
    root = ElementTree.fromstring(content)
    space = "{http://www.w3.org/2000/svg}"
    assert root.tag == space + "svg" and abs(float(root.get("width")) - size["width"]) <= 1
    tags = {element.tag.removeprefix(space) for element in root.iter()}
    assert tags <= {"svg", "rect", "line", "path", "text", "title"}  # nothing that runs or loads
    drawn_text = "".join(e.text or "" for e in root.iter(space + "text"))
    squeezed = lambda text: re.sub(r"\s", "", text)
    for column in range(2):
        for chunk in cut_text(view, name, column):
            assert squeezed(chunk) in squeezed(drawn_text)
    assert {len(seg.data) for seg in (stored[RUN, NEWEST, name],)} and "stage 0" in drawn_text
    assert not re.search(rb"[\x00-\x08\x0b\x0c\x0e-\x1f]", content)
    (tmp_path / "card.svg").write_bytes(content)  # shown by itself it has the page's colours
    page = open_page((tmp_path / "card.svg").as_uri())
    assert page.evaluate("document.documentElement.getBBox().width") > 500
