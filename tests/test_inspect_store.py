import json
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
from inspect_samples import probe_texts, segment

from hnet.inspect import store
from hnet.inspect.segmentation import Segmentation


def texts_at(skill, count=3):
    rng = np.random.default_rng(int(skill * 100))
    return [segment(t, skill, rng) for t in probe_texts()[-count:]]


def read_all(logdir):
    index = store.SegmentationIndex(logdir / store.FOLDER)
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
    assert len((tmp_path / store.FOLDER / store.TEXTS).read_bytes().splitlines()) == 3


def test_other_routes_or_gold_of_a_text_replace_the_old_ones(tmp_path):
    """Runs with and without routes know the same text by the same key."""
    (text,) = texts_at(0.5, count=1)
    known = {"routes": ((0, "default"),), "gold": {"words": (1,)}}
    assert store.text_key(replace(text, **known)) == store.text_key(text)
    assert store.text_key(replace(text, name="other")) != store.text_key(text)
    for seg in (text, replace(text, **known)):
        log = store.SegmentationLog(tmp_path)
        log.write(7, [seg])
        log.close()
    assert read_all(tmp_path) == {7: [replace(text, **known)]}
    index = store.SegmentationIndex(tmp_path / store.FOLDER)
    index.refresh()
    assert [entry["routes"] for entry in index.texts.values()] == [["default"]]


def test_a_step_written_again_replaces_the_old_one(tmp_path):
    write(tmp_path, {10: 0.1, 20: 0.2})
    write(tmp_path, {20: 0.9})
    assert read_all(tmp_path) == {10: texts_at(0.1), 20: texts_at(0.9)}


def test_resuming_takes_back_later_steps(tmp_path):
    write(tmp_path, {10: 0.1, 20: 0.2, 30: 0.3})
    write(tmp_path, {25: 0.4}, resume_step=20)
    assert read_all(tmp_path) == {10: texts_at(0.1), 20: texts_at(0.2), 25: texts_at(0.4)}


@pytest.mark.parametrize("name", [store.INDEX, store.STEPS, store.TEXTS])
@pytest.mark.parametrize("cut", [1, 7, 40])
def test_a_killed_writer_loses_its_last_line_at_most(tmp_path, name, cut):
    write(tmp_path, {1: 0.1, 2: 0.2})
    path = tmp_path / store.FOLDER / name
    os.truncate(path, path.stat().st_size - cut)
    before = read_all(tmp_path)
    assert before.get(1, [])[:2] == texts_at(0.1)[:2]
    write(tmp_path, {3: 0.3})  # the broken line must not swallow the next one
    after = read_all(tmp_path)
    assert after[1][:2] == texts_at(0.1)[:2] and after[3][:2] == texts_at(0.3)[:2]
    assert name == store.TEXTS or after[3] == texts_at(0.3)
    if cut == 1:  # nothing but the line end was lost, so nothing is
        assert after == {1: texts_at(0.1), 2: texts_at(0.2), 3: texts_at(0.3)}


def test_a_line_that_is_being_written_is_read_once_it_is_whole(tmp_path):
    write(tmp_path, {1: 0.1, 2: 0.2})
    path = tmp_path / store.FOLDER / store.INDEX
    whole = path.read_bytes()
    index = store.SegmentationIndex(tmp_path / store.FOLDER)
    for end in (0, 5, 60, len(whole) - 10, len(whole)):
        path.write_bytes(whole[:end])
        index.refresh()
    assert index.steps == [1, 2] and len(index.texts) == 3
    path.write_bytes(whole[:-10])  # and taken back, if the file is
    index.refresh()
    assert index.steps == [1]


def test_an_index_line_follows_what_it_names(tmp_path):
    """A reader that comes at any moment finds whole views."""
    log = store.SegmentationLog(tmp_path)
    index = store.SegmentationIndex(tmp_path / store.FOLDER)
    for step in range(3):
        log.write(step, texts_at(step / 10))
        index.refresh()
        assert index.steps == list(range(step + 1))
        assert len(index.read(step, index.keys(step))) == 3
    log.close()


def test_refresh_reads_what_is_new_and_nothing_twice(tmp_path, monkeypatch):
    write(tmp_path, {1: 0.1})
    index = store.SegmentationIndex(tmp_path / store.FOLDER)
    index.refresh()
    opened = []
    monkeypatch.setattr(store, "open", lambda *a: opened.append(a) or open(*a), raising=False)
    index.refresh()
    assert not opened
    monkeypatch.setattr(index, "_take", lambda line: opened.append(json.loads(line or "{}")))
    write(tmp_path, {2: 0.2})
    opened.clear()
    index.refresh()
    assert [e["step"] for e in opened[1:] if "step" in e] == [2]


def test_a_replaced_run_is_read_anew(tmp_path):
    write(tmp_path, {1: 0.1, 2: 0.2})
    index = store.SegmentationIndex(tmp_path / store.FOLDER)
    index.refresh()
    for skills in ({7: 0.7}, {3: 0.1, 4: 0.2, 5: 0.3}):  # a shorter and a longer one
        shutil.rmtree(tmp_path / store.FOLDER)
        write(tmp_path, skills)
        index.refresh()
        assert index.steps == list(skills)


def test_damage_and_absence_are_left_out(tmp_path):
    index = store.SegmentationIndex(tmp_path / "none")
    index.refresh()
    assert index.steps == [] and index.read(1, ["x"]) == {}
    write(tmp_path, {1: 0.1})
    index = store.SegmentationIndex(tmp_path / store.FOLDER)
    index.refresh()
    path = tmp_path / store.FOLDER / store.STEPS
    keys = index.keys(1)
    path.write_bytes(b"x" + path.read_bytes()[1:])
    assert list(index.read(1, [*keys, "other"])) == keys[1:]
    path.unlink()
    assert index.read(1, keys) == {}
