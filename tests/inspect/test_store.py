import json
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hnet.inspect import index as reader
from hnet.inspect import store
from hnet.inspect.segmentation import Segmentation
from tests.inspect_samples import probe_texts, segment


def texts_at(skill, count=3):
    rng = np.random.default_rng(int(skill * 100))
    return [segment(t, skill, rng) for t in probe_texts()[-count:]]


def read_all(logdir):
    index = reader.SegmentationIndex(logdir / reader.FOLDER)
    index.refresh()
    found = {}
    for step in index.steps:
        views = index.read(step, index.keys(step))
        found[step] = [Segmentation.from_json(v) for v in views.values()]
    return found


def write(logdir, skills, **options):
    log = store.SegmentationLog(logdir, **options)
    for step, skill in skills.items():
        log.write(step, texts_at(skill))
    log.close()


def test_what_is_written_is_read(tmp_path):
    write(tmp_path, {0: 0.0, 50: 0.5})
    assert read_all(tmp_path) == {0: texts_at(0.0), 50: texts_at(0.5)}


def test_a_text_is_stored_once(tmp_path):
    write(tmp_path, {0: 0.0, 1: 0.1})
    write(tmp_path, {2: 0.2})
    assert len((tmp_path / reader.FOLDER / reader.TEXTS).read_bytes().splitlines()) == 3


def test_other_routes_or_gold_of_a_text_replace_the_old_ones(tmp_path):
    """Runs with and without routes use the same key for the same text."""
    (text,) = texts_at(0.5, count=1)
    known = {"routes": ((0, "default"),), "gold": {"words": (1,)}}
    assert store.text_key(replace(text, **known)) == store.text_key(text)
    assert store.text_key(replace(text, name="other")) != store.text_key(text)
    for seg in (text, replace(text, **known)):
        log = store.SegmentationLog(tmp_path)
        log.write(7, [seg])
        log.close()
    assert read_all(tmp_path) == {7: [replace(text, **known)]}
    index = reader.SegmentationIndex(tmp_path / reader.FOLDER)
    index.refresh()
    assert [entry.routes for entry in index.texts.values()] == [("default",)]


def test_a_step_written_again_replaces_the_old_one(tmp_path):
    write(tmp_path, {10: 0.1, 20: 0.2})
    write(tmp_path, {20: 0.9})
    assert read_all(tmp_path) == {10: texts_at(0.1), 20: texts_at(0.9)}


def test_resuming_takes_back_later_steps(tmp_path):
    write(tmp_path, {10: 0.1, 20: 0.2, 30: 0.3})
    write(tmp_path, {25: 0.4}, resume_step=20)
    assert read_all(tmp_path) == {10: texts_at(0.1), 20: texts_at(0.2), 25: texts_at(0.4)}


@pytest.mark.parametrize("name", [reader.INDEX, reader.STEPS, reader.TEXTS])
@pytest.mark.parametrize("cut", [1, 7, 40])
def test_a_killed_writer_loses_its_last_line_at_most(tmp_path, name, cut):
    write(tmp_path, {1: 0.1, 2: 0.2})
    path = tmp_path / reader.FOLDER / name
    os.truncate(path, path.stat().st_size - cut)
    before = read_all(tmp_path)
    assert before.get(1, [])[:2] == texts_at(0.1)[:2]
    write(tmp_path, {3: 0.3})  # the broken line must not swallow the next one
    after = read_all(tmp_path)
    assert after[1][:2] == texts_at(0.1)[:2] and after[3][:2] == texts_at(0.3)[:2]
    assert name == reader.TEXTS or after[3] == texts_at(0.3)
    if cut == 1:  # only the line end was lost, so no data is
        assert after == {1: texts_at(0.1), 2: texts_at(0.2), 3: texts_at(0.3)}


def test_a_line_that_is_being_written_is_read_once_it_is_whole(tmp_path):
    write(tmp_path, {1: 0.1, 2: 0.2})
    path = tmp_path / reader.FOLDER / reader.INDEX
    whole = path.read_bytes()
    index = reader.SegmentationIndex(tmp_path / reader.FOLDER)
    for end in (0, 5, 60, len(whole) - 10, len(whole)):
        path.write_bytes(whole[:end])
        index.refresh()
    assert index.steps == [1, 2] and len(index.texts) == 3
    path.write_bytes(whole[:-10])  # and removed again if the file is
    index.refresh()
    assert index.steps == [1]


def test_an_index_line_follows_what_it_names(tmp_path):
    """A reader finds complete views at any time."""
    log = store.SegmentationLog(tmp_path)
    index = reader.SegmentationIndex(tmp_path / reader.FOLDER)
    for step in range(3):
        log.write(step, texts_at(step / 10))
        index.refresh()
        assert index.steps == list(range(step + 1))
        assert len(index.read(step, index.keys(step))) == 3
    log.close()


def test_refresh_reads_what_is_new_and_nothing_twice(tmp_path, monkeypatch):
    write(tmp_path, {1: 0.1})
    index = reader.SegmentationIndex(tmp_path / reader.FOLDER)
    index.refresh()
    opened = []
    monkeypatch.setattr(reader, "open", lambda *a: opened.append(a) or open(*a), raising=False)
    index.refresh()
    assert not opened
    monkeypatch.setattr(index, "_take", lambda line: opened.append(json.loads(line or "{}")))
    write(tmp_path, {2: 0.2})
    opened.clear()
    index.refresh()
    assert [e["step"] for e in opened[1:] if "step" in e] == [2]


def test_a_replaced_run_is_read_anew(tmp_path):
    write(tmp_path, {1: 0.1, 2: 0.2})
    index = reader.SegmentationIndex(tmp_path / reader.FOLDER)
    index.refresh()
    for skills in ({7: 0.7}, {3: 0.1, 4: 0.2, 5: 0.3}):  # a shorter and a longer one
        shutil.rmtree(tmp_path / reader.FOLDER)
        write(tmp_path, skills)
        index.refresh()
        assert index.steps == list(skills)


def test_damage_and_absence_are_left_out(tmp_path):
    index = reader.SegmentationIndex(tmp_path / "none")
    index.refresh()
    assert index.steps == [] and index.read(1, ["x"]) == {}
    write(tmp_path, {1: 0.1})
    index = reader.SegmentationIndex(tmp_path / reader.FOLDER)
    index.refresh()
    path = tmp_path / reader.FOLDER / reader.STEPS
    keys = index.keys(1)
    path.write_bytes(b"x" + path.read_bytes()[1:])
    assert list(index.read(1, [*keys, "other"])) == keys[1:]
    path.unlink()
    assert index.read(1, keys) == {}


NO_LINES = [
    b"{",
    b"\xff\xfe",
    b"[1]",
    b'"text"',
    b"3",
    b"{}",
    b'{"nothing": 1}',
    b'{"text": "k"}',
    b'{"text": 3, "digest": "", "at": [0, 1], "name": "n", "bytes": 1, "routes": [], "gold": []}',
    b'{"text": "k", "digest": "", "at": [0, 1], "name": 3, "bytes": 1, "routes": [], "gold": []}',
    b'{"text": "k", "digest": "", "at": 0, "name": "n", "bytes": 1, "routes": [], "gold": []}',
    b'{"text": "k", "digest": "", "at": [0, 1], "name": "n", "bytes": 1, "routes": 1, "gold": []}',
    b'{"text": "k", "digest": "", "at": [0, 1], "name": "n", "bytes": 1, "routes": [], "gold": [1]}'
    b"",
    b'{"step": 3}',
    b'{"step": 3, "rows": []}',
    b'{"step": 3, "rows": {"k": 1}}',
    b'{"step": 3, "rows": {"k": [1, -5]}}',
    b'{"step": 3, "rows": {"k": [1e300, 5]}}',
    b'{"step": 3, "rows": {"k": [NaN, Infinity]}}',
    b'{"step": 3, "rows": {"k": [' + b"9" * 30 + b", 1]}}",
    b'{"step": Infinity, "rows": {}}',
    b'{"step": NaN, "rows": {}}',
    b'{"step": true, "rows": {}}',
    b'{"step": -1, "rows": {}}',
    b'{"step": "7", "rows": {}}',
    b'{"step": ' + b"9" * 5000 + b', "rows": {}}',
    b'{"resume": Infinity}',
    b'{"resume": -Infinity}',
    b'{"resume": "1"}',
    b"[" * 100_000,
    b'{"a":' * 100_000,
]


@pytest.mark.parametrize("line", NO_LINES)
def test_a_damaged_line_of_the_index_is_left_out_and_counted(tmp_path, line):
    write(tmp_path, {1: 0.1})
    with open(tmp_path / reader.FOLDER / reader.INDEX, "ab") as f:
        f.write(line + b"\n" + b'{"step": 2, "rows": {}}\n')
    index = reader.SegmentationIndex(tmp_path / reader.FOLDER)
    index.refresh()
    assert index.steps == [1, 2] and len(index.texts) == 3 and index.damaged == 1
    assert len(index.read(1, index.keys(1))) == 3
    log = store.SegmentationLog(tmp_path, resume_step=1)
    assert log.notes == [f"{log.folder / reader.INDEX}: 1 damaged line is left out"]
    log.write(5, texts_at(0.5))
    log.close()
    assert read_all(tmp_path) == {1: texts_at(0.1), 5: texts_at(0.5)}


def test_the_line_of_a_killed_writer_is_no_damage(tmp_path):
    write(tmp_path, {1: 0.1, 2: 0.2})
    path = tmp_path / reader.FOLDER / reader.INDEX
    os.truncate(path, path.stat().st_size - 9)
    write(tmp_path, {3: 0.3})
    index = reader.SegmentationIndex(tmp_path / reader.FOLDER)
    index.refresh()
    assert index.damaged == 0 and index.steps == [1, 3]
    log = store.SegmentationLog(tmp_path)
    log.close()
    assert not log.notes


@pytest.mark.parametrize(
    "change",
    [
        {"stages": None},
        {"stages": [1]},
        {"stages": [{}]},
        {"stages": [{"starts": [0], "probs": [float("nan")]}]},
        {"stages": [{"starts": [float("inf")], "probs": [1.0]}]},
        {"stages": [{"starts": [3, 1], "probs": []}]},
        {"step": 8},
        {"key": "other"},
    ],
)
def test_damaged_stages_of_a_step_are_left_out(tmp_path, change):
    write(tmp_path, {1: 0.1})
    index = reader.SegmentationIndex(tmp_path / reader.FOLDER)
    index.refresh()
    path, (first, *_) = tmp_path / reader.FOLDER / reader.STEPS, index.keys(1)
    offset, length = index._rows[1][first]
    line = json.dumps(json.loads(path.read_bytes()[offset : offset + length]) | change)
    content = path.read_bytes()
    path.write_bytes(content + line.encode() + b"\n")
    index._rows[1][first] = (len(content), len(line))
    assert list(index.read(1, index.keys(1))) == index.keys(1)[1:]


def test_places_beyond_the_file_are_left_out(tmp_path):
    write(tmp_path, {1: 0.1})
    index = reader.SegmentationIndex(tmp_path / reader.FOLDER)
    index.refresh()
    first, *others = index.keys(1)
    for place in ((1 << 52, 5), (0, 1 << 52), (1 << 52, 1 << 52)):
        index._rows[1][first] = place
        assert list(index.read(1, [first, *others])) == others


FILES = [reader.INDEX, reader.STEPS, reader.TEXTS]


@pytest.mark.parametrize(
    "name, kind",
    [("", "file"), *((name, kind) for name in FILES for kind in ("folder", "pipe", "link"))],
)
def test_what_is_no_file_is_set_aside(tmp_path, name, kind):
    path = tmp_path / reader.FOLDER / name
    write(tmp_path, {1: 0.1})
    kept = shutil.move(path, tmp_path / "kept")
    match kind:
        case "folder":
            path.mkdir()
            (path / "x").write_text("kept")
        case "pipe":
            os.mkfifo(path)
        case "link":
            path.symlink_to(path)
        case "file":
            path.write_text("kept")
    index = reader.SegmentationIndex(tmp_path / reader.FOLDER)
    index.refresh()
    assert index.read(1, index.keys(1)) == {}
    log = store.SegmentationLog(tmp_path, resume_step=0)
    assert log.notes == [f"{path} is not what it must be: it is now {path.name}.aside-1"]
    log.write(2, texts_at(0.2))
    log.close()
    assert read_all(tmp_path)[2] == texts_at(0.2)
    assert os.path.lexists(path.with_name(f"{path.name}.aside-1")) and os.path.exists(kept)


def test_a_text_that_was_lost_is_written_again(tmp_path):
    write(tmp_path, {1: 0.1})
    (tmp_path / reader.FOLDER / reader.TEXTS).unlink()
    write(tmp_path, {2: 0.2})
    assert read_all(tmp_path)[2] == texts_at(0.2)


def test_going_back_while_a_run_goes_on(tmp_path):
    log = store.SegmentationLog(tmp_path)
    for step in (0, 10, 20):
        log.write(step, texts_at(0.1))
    log.go_back(10)
    assert list(read_all(tmp_path)) == [0, 10]
    log.write(15, texts_at(0.2))
    log.go_back(-1)
    assert list(read_all(tmp_path)) == []
    log.close()


@settings(max_examples=150)
@given(data=st.data())
def test_whatever_is_damaged_the_rest_is_read(tmp_path_factory, data):
    """Some bytes of a file change; everything read is complete, and a writer can continue."""
    folder = tmp_path_factory.mktemp("damaged")
    write(folder, {1: 0.1, 2: 0.2})
    name = data.draw(st.sampled_from([reader.INDEX, reader.STEPS, reader.TEXTS]))
    path = folder / reader.FOLDER / name
    content = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    content[at : at + data.draw(st.integers(0, 40))] = data.draw(st.binary(max_size=40))
    path.write_bytes(content)
    read_all(folder)
    write(folder, {3: 0.3})
    assert read_all(folder)[3] == texts_at(0.3)
