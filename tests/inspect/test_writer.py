import logging
import re
import resource
import warnings
from dataclasses import replace

import fsspec
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hnet.errors import ConfigError
from hnet.inspect.index import FOLDER, INDEX, SegmentationIndex
from hnet.inspect.mirror import Mirror
from hnet.inspect.p_map import labelled_p_map, p_map
from hnet.inspect.segmentation import Segmentation, StageBoundaries
from hnet.inspect.tags import tag_of
from hnet.inspect.writer import DASHBOARDS, RunWriter
from tests.inspect_samples import probe_texts, segment

with warnings.catch_warnings(action="ignore"):  # TensorBoard's own sanitizer warns when imported
    from tensorboard.plugin_util import markdown_to_safe_html


def events(logdir):
    found = EventAccumulator(str(logdir), size_guidance={"tensors": 0, "scalars": 0})
    return found.Reload()


def test_scalars_by_tag(tmp_path):
    with RunWriter(tmp_path) as writer:
        writer.scalars(3, {"train/bpb": 2.5, "stage0/route_Latin/bytes_per_chunk": np.float32(4)})
        writer.scalars(5, {"train/bpb": 2.0})
    found = events(tmp_path)
    assert [(e.step, e.value) for e in found.Scalars("train/bpb")] == [(3, 2.5), (5, 2.0)]
    assert found.Scalars("stage0/route_Latin/bytes_per_chunk")[0].value == 4


def write_run(logdir, steps):
    """A run's log folder with segmentations at `steps`, more skilled each time."""
    rng = np.random.default_rng(0)
    with RunWriter(logdir) as writer:
        for step in steps:
            skill = step / max(max(steps), 1)
            writer.scalars(step, {"train/bpb": 4 - 2 * skill, "loss/ce": 2.7 - skill})
            writer.write_segmentations(step, [segment(t, skill, rng) for t in probe_texts()])


def test_everything_a_probe_step_writes(tmp_path):
    write_run(tmp_path, [0, 10])
    found = events(tmp_path)
    scalars = found.Tags()["scalars"]
    assert {"probe/stage0/f1_words", "probe/stage1/bytes_per_chunk"} <= set(scalars)
    assert "probe/stage0/route_Han/bytes_per_chunk" in scalars
    assert {"probe/stage0/boundary_prob", "probe/stage1/chunk_bytes"} <= set(
        found.Tags()["histograms"]
    )
    assert found.Tags()["images"] == ["probe/stage0/p_map", "probe/stage1/p_map"]
    text = found.Tensors("probe/text_00")[1].tensor_proto.string_val[0].decode()
    assert text.startswith("**english**") and "|lighthouse" in text
    assert (tmp_path / FOLDER / INDEX).exists()
    buckets = found.Histograms("probe/stage0/boundary_prob")[0].histogram_value
    assert sum(buckets.bucket) == sum(len(t.data) for t in probe_texts())
    assert 0 <= buckets.min and buckets.max <= 1


def test_dashboards_name_tags_that_exist(tmp_path):
    import re

    write_run(tmp_path, [0])
    assert "custom_scalars__config__" in events(tmp_path).Tags()["tensors"]
    tags = events(tmp_path).Tags()["scalars"] + [
        "train/bpb", "eval/bpb", "train/loss/ce", "eval/script_Han/bpb", "eval/source_a/bpb",
        "stage1/bytes_per_chunk", "stage0/boundary_rate",
        "stage0/overflow_frac", "stage0/slot_utilization", "stage0/route_Han/bytes_per_chunk",
        *(tag_of(f"{name}_norm/lm_head").name for name in ("grad", "update")),
    ]  # fmt: skip
    for charts in DASHBOARDS.values():
        for title, patterns in charts.items():
            assert any(re.match(p, tag) for p in patterns for tag in tags), title


def test_hyperparameters_stay_in_the_run(tmp_path):
    with RunWriter(tmp_path) as writer:
        writer.hparams({"optim.learning_rate": 0.01, "router": "cosine", "tie": True})
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == [FOLDER]
    content = events(tmp_path).SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    assert b"optim.learning_rate" in content and b"cosine" in content
    assert "_hparams_/session_end_info" in events(tmp_path).summary_metadata
    # without an experiment summary, TensorBoard shows the union over all runs
    assert "_hparams_/experiment" not in events(tmp_path).summary_metadata


def test_resuming_hides_what_came_after(tmp_path):
    with RunWriter(tmp_path) as writer:
        for step in (1, 2, 3):
            writer.scalars(step, {"train/bpb": step})
    with RunWriter(tmp_path, resume_step=1) as writer:
        writer.scalars(2, {"train/bpb": 20})
    assert [(e.step, e.value) for e in events(tmp_path).Scalars("train/bpb")] == [(1, 1), (2, 20)]


def test_a_start_from_nothing_and_a_rollback_hide_what_came_before(tmp_path):
    segs = probe_texts()[:1]
    with RunWriter(tmp_path) as writer:
        for step in (0, 1, 2):
            writer.scalars(step, {"train/bpb": step})
            writer.write_segmentations(step, segs, summaries=False)
    with RunWriter(tmp_path, resume_step=-1) as writer:
        for step in (0, 1, 2, 3):
            writer.scalars(step, {"train/bpb": 10 + step})
            writer.write_segmentations(step, segs, summaries=False)
        writer.go_back(1)
        writer.scalars(2, {"train/bpb": 22})
    found = [(e.step, e.value) for e in events(tmp_path).Scalars("train/bpb")]
    assert found == [(0, 10), (1, 11), (2, 22)]
    index = SegmentationIndex(tmp_path / FOLDER)
    index.refresh()
    assert index.steps == [0, 1]


@pytest.fixture
def full_disk():
    """Limits files to this many bytes from now on."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("what", ["scalars", "texts", "both"])
def test_a_full_disk_ends_the_log_and_not_the_run(tmp_path, full_disk, what):
    said, segs = [], probe_texts()
    segs = [segment(t, 0.5, np.random.default_rng(0)) for t in segs]
    writer = RunWriter(tmp_path, say=said.append)
    writer.scalars(0, {"train/bpb": 1.0})
    full_disk(8192)
    for step in range(1, 300):
        if what != "texts":
            writer.scalars(step, {"train/bpb": 2.0})
        if what != "scalars" and step < 10:
            assert writer.write_segmentations(step, segs)["probe/stage0/bytes_per_chunk"] > 1
    writer.close()
    (line,) = said
    assert line.startswith(f"the log in {tmp_path} cannot be written") and "goes on" in line
    assert events(tmp_path).Scalars("train/bpb")[0].value == 1.0


def test_a_folder_that_cannot_be_written_is_refused(tmp_path, full_disk):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="log folder .*file/tensorboard' cannot be written"):
        RunWriter(tmp_path / "file" / "tensorboard")
    full_disk(0)
    with pytest.raises(ConfigError, match="cannot be written: File too large"):
        RunWriter(tmp_path / "tensorboard")


def test_damage_is_told(tmp_path):
    (tmp_path / FOLDER / INDEX).mkdir(parents=True)
    with RunWriter(tmp_path) as writer:
        assert "it is now index.jsonl.aside-1" in writer.notes[0]
        writer.write_segmentations(0, probe_texts())


def test_histogram_counts_finite_values(tmp_path):
    with RunWriter(tmp_path) as writer:
        writer.histogram(0, "p", np.array([[0.1, np.nan], [0.9, np.inf]]), np.linspace(0, 1, 11))
        writer.histogram(0, "none", np.array([np.nan]))
    found = events(tmp_path)
    assert found.Tags()["histograms"] == ["train/p"]
    assert found.Histograms("train/p")[0].histogram_value.num == 2


def test_p_map_shows_each_probability_at_its_bytes():
    outer = StageBoundaries((0, 2), (1.0, 0.0, 1.0))
    inner = StageBoundaries((0,), (1.0, 0.0))
    texts = [Segmentation(b"abc", stages=(outer, inner)), Segmentation(b"abcdefg")]
    texts[1] = Segmentation(b"ab", stages=(StageBoundaries((0,), (0.5, 0.5)),) * 2 and (
        StageBoundaries((0,), (0.5, 0.5)), StageBoundaries((0,), (0.5,))
    ))  # fmt: skip
    blue, white, grey, half = [0, 114, 178], [255] * 3, [200] * 3, [128, 184, 216]
    image = p_map(texts, 0)
    assert image.shape == (24, 12, 3)
    assert [image[0, x].tolist() for x in (0, 4, 8)] == [blue, white, blue]
    assert [image[12, x].tolist() for x in (0, 4, 8)] == [half, half, grey]
    assert [p_map(texts, 1)[0, x].tolist() for x in (0, 4, 8)] == [blue, blue, white]


def test_rows_of_the_image_are_labelled():
    """Every row has a label on its left, and a long or non-Latin name keeps both ends."""
    rng = np.random.default_rng(0)
    texts = [segment(t, 0.5, rng) for t in probe_texts()[:3]]
    names = [
        "books of a very long title, volume 1",
        "books of a very long title, volume 2",
        "漢\x1b",
    ]
    texts = {n: replace(seg, name=name) for n, (seg, name) in enumerate(zip(texts, names))}
    image, plain = labelled_p_map(texts, 0), p_map(list(texts.values()), 0)
    top, left = (a - b for a, b in zip(image.shape[:2], plain.shape[:2]))
    assert (image[top:, left:] == plain).all() and left > 50
    rows = image[top:, :left].reshape(3, -1, left, 3)
    assert all((row < 128).any() for row in rows)
    assert not (rows[0] == rows[1]).all()
    scale = image[:top, left:]
    assert (scale[:, : scale.shape[1] // 2] < 128).any()


def test_descriptions_stand_in_every_file_once(tmp_path):
    for _ in range(2):
        with RunWriter(tmp_path) as writer:
            for step in range(3):
                writer.scalars(step, {"eval/bpb": 2.0})
    for file in tmp_path.glob("events*"):
        assert file.read_bytes().count(tag_of("eval/bpb").description.encode()) == 1


def test_the_configuration_is_a_text_of_one_block(tmp_path):
    with RunWriter(tmp_path) as writer:
        writer.configuration(0, {"a": {"b": "</code>\n# x\x1b\u202e", "é": [1, 2]}})
    (text,) = events(tmp_path).Tensors("configuration")
    shown = text.tensor_proto.string_val[0].decode()
    page = markdown_to_safe_html(shown)
    assert set(re.findall(r"<(\w+)", page)) == {"pre", "code"} and '"é"' in page
    assert "\x1b" not in shown and "\u202e" not in shown


def test_texts_of_different_depth(tmp_path):
    rng = np.random.default_rng(0)
    deep, flat = (segment(t, 0.5, rng) for t in probe_texts()[:2])
    flat = Segmentation(flat.data, flat.name, flat.stages[:1])
    with RunWriter(tmp_path) as writer:
        writer.write_segmentations(0, [flat, deep, Segmentation(b"", "empty")])
        writer.write_segmentations(1, [])
    assert "probe/stage1/p_map" in events(tmp_path).Tags()["images"]


def test_mirror_has_everything_after_close(tmp_path):
    fs = fsspec.filesystem("memory")
    with RunWriter(tmp_path, mirror="memory://bucket/run", mirror_secs=3600) as writer:
        writer.scalars(0, {"train/bpb": 1.0})
        writer.write_segmentations(0, probe_texts(), summaries=False)
    local = {p.relative_to(tmp_path).as_posix(): p.read_bytes()
             for p in tmp_path.rglob("*") if p.is_file()}  # fmt: skip
    remote = {p.removeprefix("/bucket/run/"): fs.cat(p) for p in fs.find("/bucket/run")}
    assert remote == local and len(local) == 4


def test_mirror_survives_a_network_that_is_down(tmp_path, caplog, monkeypatch):
    mirror = Mirror(tmp_path, "memory://down", period=3600)
    (tmp_path / "a").write_text("1")
    with monkeypatch.context() as m, caplog.at_level(logging.WARNING):
        m.setattr(mirror.fs, "put_file", lambda *a: (_ for _ in ()).throw(OSError("no route")))
        mirror.copy()
        assert "no route" in caplog.text
    mirror.close()
    assert mirror.fs.cat("/down/a") == b"1"


def test_a_mirror_that_cannot_be_opened_is_refused_at_once(tmp_path):
    with pytest.raises(ConfigError, match="nonsense://x"):
        RunWriter(tmp_path, mirror="nonsense://x")
