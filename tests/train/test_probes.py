import json

import pytest

from hnet.data import open_part
from hnet.errors import ConfigError
from hnet.train.config import EvalConfig
from hnet.train.probes import probe_texts

BUILT_IN = ["code", "scripts", "repeated byte", "random bytes", "dna"]


def test_held_out_and_annotated_texts_come_first_and_are_cut_at_characters(tmp_path):
    for n in range(5):
        (tmp_path / f"{n}.txt").write_text(f"text {n}: ééé\n")
    words = {"id": "s1", "text": "aé bé cé", "spans": [[0, 3], [4, 7], [8, 11]]}
    (tmp_path / "ud.jsonl").write_text(json.dumps(words))
    heldout = open_part((f"{tmp_path}/*.txt",))
    config = EvalConfig(probe_bytes=9, probe_texts=2, probe_files=(f"{tmp_path}/ud.jsonl",))
    found = probe_texts(heldout, config)
    assert [seg.name for seg in found] == ["0.txt", "2.txt", "s1", *BUILT_IN]
    assert [seg.data.decode() for seg in found[:3]] == ["text 0: ", "text 2: ", "aé bé c"]
    assert found[2].gold["words"] == (4, 8) and found[2].gold["word_ends"] == (3, 7)
    assert all({"words", "characters"} <= seg.gold.keys() for seg in found)
    assert len(probe_texts(heldout, EvalConfig(probe_texts=9))) == 5 + len(BUILT_IN)


def test_a_missing_annotated_file_is_named(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    part = open_part((f"{tmp_path}/a.txt",))
    with pytest.raises(ConfigError, match="none.jsonl"):
        probe_texts(part, EvalConfig(probe_files=(f"{tmp_path}/none.jsonl",)))


@pytest.mark.parametrize("field", ["probe_bytes", "probe_texts"])
def test_no_texts_are_refused(field):
    with pytest.raises(ConfigError, match=f"eval.{field}=0"):
        EvalConfig(**{field: 0})
