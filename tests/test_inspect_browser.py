"""The Boundaries tab in a real browser, against a real TensorBoard process on loopback."""

import os
import re
import shutil
import signal
import subprocess
import sys
from importlib.metadata import entry_points

import numpy as np
import pytest
from inspect_samples import HOSTILE, TEXTS, probe_texts, segment, write_run

from hnet.inspect.page import to_html
from hnet.inspect.segmentation import Segmentation
from hnet.inspect.store import FOLDER, SegmentationIndex

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
sync_api = pytest.importorskip(
    "playwright.sync_api", reason="playwright is not installed: pip install -e '.[browser]'"
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium found: apt install chromium")
STEPS = [0, 100, 200, 400]
OTHER_STEPS = [0, 150, 300]
RUN, OTHER, GROWING = "learned/tensorboard", "slow/tensorboard", "new/tensorboard"
PLUGIN = "data/plugin_entry.html?name=boundaries"


@pytest.fixture(scope="module")
def logdir(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    write_run(root / RUN, STEPS, seed=1, summaries=False)
    write_run(root / OTHER, OTHER_STEPS, seed=2, learn=0.5, summaries=False)
    write_run(root / GROWING, [0, 50], stages=1, routes=False, summaries=False)
    return root


@pytest.fixture(scope="module")
def address(logdir, tmp_path_factory):
    """Address of a TensorBoard that found the plugin by itself."""
    assert "boundaries" in entry_points(group="tensorboard_plugins").names, "run pip install -e ."
    log = tmp_path_factory.mktemp("log") / "tensorboard.log"
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(logdir)]
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
    """One page for all tests, and what went wrong in it: errors, dialogs, foreign requests."""
    page, problems = browser.new_page(), []
    page.set_default_timeout(30_000)  # for machines that are busy with other things
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
        page.goto("about:blank")  # so that only the fragment never changes
        page.goto(url)
        return page

    yield open_page
    assert not problems


@pytest.fixture
def view(open_page, address):
    page = open_page(address + PLUGIN)
    page.locator(".runnames", has_text=f"{RUN} · step 400").wait_for()
    return page


@pytest.fixture(scope="module")
def stored(logdir):
    """(run, step, name) -> what the run wrote."""
    found = {}
    for run in (RUN, OTHER):
        index = SegmentationIndex(logdir / run / FOLDER)
        index.refresh()
        for step in index.steps:
            for content in index.read(step, index.keys(step)).values():
                seg = Segmentation.from_json(content)
                found[run, step, seg.name] = seg
    return found


def card(page, name):
    return page.locator(".card").filter(has=page.locator(".name", has_text=re.compile(f"^{name}$")))


def chunks(page, name, column=0):
    return card(page, name).locator(".text").nth(column).locator(".chunk")


def cut_text(page, name, column=0):
    return chunks(page, name, column).all_text_contents()


def decoded(seg, stage):
    return [c.decode() for c in seg.chunks(stage)]


def to_step(page, i):
    """Slide the first run there."""
    page.get_by_label("Training step").fill(str(i))
    page.locator(".steplabel", has_text=f"({i + 1} of").wait_for()
    page.locator(".runnames", has_text=f"step {STEPS[i]}").wait_for()


def test_tab_in_tensorboard_shows_the_newest_step(open_page, address, stored):
    page = open_page(address + "#boundaries")
    page.get_by_role("tab", name="Boundaries").wait_for(timeout=30_000)
    frame = page.frame_locator("iframe")
    frame.get_by_label("Run", exact=True).select_option(RUN)
    frame.locator(".runnames", has_text=f"{RUN} · step 400").wait_for()
    shown = frame.locator(".card").first.locator(".chunk").all_text_contents()
    assert shown == decoded(stored[RUN, 400, "english"], 0)


def test_sliding_through_training(view, stored):
    for i in (0, 2):
        to_step(view, i)
        assert cut_text(view, "english") == decoded(stored[RUN, STEPS[i], "english"], 0)
    view.locator("h2").first.click()
    for key, i in (("ArrowRight", 3), ("ArrowLeft", 2), ("ArrowLeft", 1)):
        view.keyboard.press(key)
        view.locator(".runnames", has_text=f"step {STEPS[i]}").wait_for()
    view.get_by_role("button", name="Next step").click()
    view.locator(".steplabel", has_text="step 200").wait_for()
    view.get_by_role("button", name="Play the steps").click()
    view.locator(".runnames", has_text="step 400").wait_for()


def test_switching_stages(view, stored):
    seg = stored[RUN, 400, "turkish"]
    assert cut_text(view, "turkish") == decoded(seg, 0)
    view.get_by_text("nested", exact=True).click()
    inner = chunks(view, "turkish").locator("xpath=self::*[contains(@class, 'depth1')]")
    sync_api.expect(inner).to_have_count(len(seg.stages[1].starts) - 1)
    assert cut_text(view, "turkish") == decoded(seg, 0)
    assert card(view, "turkish").locator("canvas").count() == 2
    view.get_by_text("stage 1", exact=True).first.click()
    sync_api.expect(inner).to_have_count(0)
    assert cut_text(view, "turkish") == decoded(seg, 1)


def test_comparing_two_runs(view, stored):
    view.get_by_label("Compare with run").select_option(OTHER)
    view.locator(".divergence").wait_for()
    to_step(view, 2)
    view.locator(".runnames", has_text=f"{OTHER} · step 150").wait_for()  # the last before 200
    for column, (run, step) in enumerate([(RUN, 200), (OTHER, 150)]):
        assert cut_text(view, "english", column) == decoded(stored[run, step, "english"], 0)
    view.get_by_label("Compare with run").select_option("")
    sync_api.expect(card(view, "english").locator(".text")).to_have_count(1)


def test_comparing_with_a_run_of_fewer_stages(view, stored):
    view.get_by_label("Compare with run").select_option(GROWING)
    view.get_by_text("nested", exact=True).click()
    # the same text, though this run knows no routes
    columns = card(view, "english").locator(".column")
    sync_api.expect(card(view, "english").locator(".route")).to_have_text(["Latin"])
    sync_api.expect(columns.nth(0).locator("canvas")).to_have_count(2)
    sync_api.expect(columns.nth(1).locator("canvas")).to_have_count(1)
    sync_api.expect(view.locator(".divergence")).to_have_text(re.compile("boundaries: stage 0: F1"))
    view.get_by_text("stage 1", exact=True).first.click()
    sync_api.expect(columns.nth(1)).to_have_text("no stage 1 here")
    assert cut_text(view, "english") == decoded(stored[RUN, 400, "english"], 1)


def test_a_running_run_grows_and_the_view_follows(view, logdir):
    view.get_by_label("Run", exact=True).select_option(GROWING)
    view.locator(".steplabel", has_text="step 50 (2 of 2)").wait_for()
    write_run(logdir / GROWING, [70], stages=1, routes=False, summaries=False)
    view.get_by_role("button", name="Look for new").click()
    view.locator(".steplabel", has_text="step 70 (3 of 3)").wait_for()
    view.locator(".runnames", has_text="step 70").wait_for()


def test_another_run_is_shown_at_the_nearest_step_before(view):
    to_step(view, 2)
    view.get_by_label("Run", exact=True).select_option(OTHER)
    view.locator(".steplabel", has_text="step 150 (2 of 3)").wait_for()


def test_hover_tells_offsets_bytes_and_probability(view, stored):
    seg = stored[RUN, 400, "english"]
    start, end = seg.stages[0].starts[2:4]
    chunks(view, "english").nth(2).hover()
    tip = view.locator(".tooltip")
    sync_api.expect(tip).to_contain_text(f"{start} to {end}, {end - start} bytes")
    sync_api.expect(tip).to_contain_text(seg.data[start:end].hex(" ").upper())
    sync_api.expect(tip).to_contain_text(f"{seg.stages[0].probs[start]:.3f}")
    sync_api.expect(tip).to_contain_text("Latin")
    sync_api.expect(tip).to_contain_text("gold words")
    view.locator("h2").first.hover()
    sync_api.expect(tip).to_be_hidden()
    canvas = card(view, "english").locator("canvas")
    canvas.hover(
        position={"x": canvas.bounding_box()["width"] * (start + 0.5) / len(seg.data), "y": 20}
    )
    sync_api.expect(tip).to_contain_text(f"{start} to {end}")


def test_keyboard_walks_through_chunks(view):
    text = card(view, "english").locator(".text")
    text.focus()
    for _ in range(3):
        view.keyboard.press("ArrowRight")
    sync_api.expect(text.locator(".chosen")).to_have_attribute("data-chunk", "2")
    sync_api.expect(view.locator(".tooltip")).to_contain_text("chunk")
    assert "step 400" in view.locator(".steplabel").inner_text()  # arrows here change no step
    view.keyboard.press("Escape")
    sync_api.expect(view.locator(".tooltip")).to_be_hidden()
    view.keyboard.press("Shift+Tab")
    view.keyboard.press("Tab")
    outline = text.evaluate("e => getComputedStyle(e).outlineStyle")
    assert outline == "solid"


def test_filters(view):
    names = view.locator(".card .name")
    sync_api.expect(names).to_have_count(8)
    view.get_by_role("button", name="Show 3 more").click()
    sync_api.expect(names).to_have_count(len(TEXTS) + 1)
    view.get_by_label("Script or route").select_option("Han")
    sync_api.expect(names).to_have_text(["chinese"])
    view.get_by_label("Script or route").select_option("")
    view.get_by_label("Find a text").fill("H")
    sync_api.expect(names).to_have_text(
        ["english", "hebrew", "hindi", "chinese", "thai", "turkish", "hostile"]
    )
    view.get_by_label("Find a text").fill("nothing")
    sync_api.expect(view.locator(".notice")).to_contain_text("No text passes")


def test_gold_marks_and_f1(view, stored):
    to_step(view, 1)
    view.get_by_label("Gold boundaries").select_option("words")
    seg = stored[RUN, 100, "english"]
    hits = len(set(seg.stages[0].starts) & set(seg.gold["words"]))
    text = card(view, "english").locator(".text")
    sync_api.expect(text.locator(".gold.hit")).to_have_count(hits)
    sync_api.expect(text.locator(".gold.missed")).to_have_count(len(seg.gold["words"]) - hits)
    f1 = 2 * hits / (len(seg.stages[0].starts) - 1 + len(seg.gold["words"]))
    assert f"words F1 {f1:.2f}" in card(view, "english").locator(".facts").inner_text()


def test_threshold_preview(view, stored):
    to_step(view, 2)
    stage = stored[RUN, 200, "english"].stages[0]
    view.get_by_label("preview p >").check()
    view.get_by_label("Threshold").fill("0.7")
    expected = 1 + sum(p > 0.7 for p in stage.probs[1:])
    assert 1 < expected < len(stage.starts)
    sync_api.expect(chunks(view, "english")).to_have_count(expected)
    sync_api.expect(view.locator(".legend")).to_contain_text("p > 0.70")
    view.get_by_label("preview p >").uncheck()
    sync_api.expect(chunks(view, "english")).to_have_count(len(stage.starts))


def test_hostile_and_broken_text_is_shown_as_text(view, stored):
    view.get_by_role("button", name="Show 3 more").click()
    assert "".join(cut_text(view, "hostile")) == HOSTILE
    assert view.locator("img, script[src*=x], .text b").count() == 0
    assert "pwned" not in view.title()
    broken = card(view, "invalid bytes").locator(".byte").all_text_contents()
    assert [b for b in broken if b.startswith(r"\x")][:2] == [r"\xFF", r"\xFE"]
    assert {"U+0000", "U+001B"} <= set(broken)
    assert "U+202E" in card(view, "emoji").locator(".byte").all_text_contents()
    assert "⇥" in "".join(cut_text(view, "code"))


def test_a_boundary_inside_a_character_is_seen(view, stored):
    to_step(view, 0)
    seg = stored[RUN, 0, "chinese"]
    split = [o for o in seg.stages[0].starts if 0x80 <= seg.data[o] < 0xC0]
    assert len(split) > 3
    sync_api.expect(card(view, "chinese").locator(".chunk.inside")).to_have_count(len(split))
    assert card(view, "chinese").locator(".cut").count() > 3
    assert "inside characters" in card(view, "chinese").locator(".facts").inner_text()


def test_right_to_left_text_runs_to_the_left(view):
    boxes = [chunks(view, "arabic").nth(i).bounding_box()["x"] for i in range(3)]
    assert boxes[0] > boxes[1] > boxes[2]
    # a separator stands where reading begins, also for English in a Hebrew line
    edges = "e => [getComputedStyle(e).borderLeftWidth, getComputedStyle(e).borderRightWidth]"
    assert chunks(view, "hebrew").nth(1).evaluate(edges) == ["0px", "1px"]
    english = chunks(view, "hebrew").filter(has_text="English")
    assert english.evaluate(edges) == ["1px", "0px"]


@pytest.mark.parametrize("width", [1280, 1920])
def test_nothing_overflows_and_dark_is_dark(open_page, address, width):
    page = open_page(address + PLUGIN, width, dark=True)
    page.get_by_label("Compare with run").select_option(OTHER)
    page.locator(".divergence").wait_for()
    page.get_by_text("nested", exact=True).click()
    page.locator("canvas").nth(3).wait_for()
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


def test_self_contained_page(open_page, tmp_path):
    rng = np.random.default_rng(0)
    runs = {n: [segment(t, s, rng) for t in probe_texts()] for n, s in (("a", 0.9), ("b", 0.1))}
    (tmp_path / "page.html").write_text(to_html(runs, title="Two models"), encoding="utf-8")
    page = open_page((tmp_path / "page.html").as_uri())
    assert page.title() == "Two models"
    page.get_by_label("Compare with run").select_option("b")
    page.get_by_role("button", name="Show 3 more").click()
    for column, name in enumerate(runs):
        assert cut_text(page, "english", column) == decoded(runs[name][0], 0)
    assert "pwned" not in page.title()
