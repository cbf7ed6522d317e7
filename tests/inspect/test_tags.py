import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hnet.inspect.tags import tag_of, without_folders


@pytest.mark.parametrize(
    "field, tag",
    [
        ("train/bpb", "train/bpb"),
        ("loss/ce", "train/loss/ce"),
        ("loss/mtp", "train/loss/mtp"),
        ("grad_norm", "optim/grad_norm"),
        ("update_norm/stage0/encoder", "optim/update_norm/stage0/encoder"),
        ("bytes_per_sec", "throughput/bytes_per_sec"),
        ("bytes_seen/all/*.txt", "throughput/bytes_seen/all/*.txt"),
        ("stage0/bytes_per_chunk", "stage0/bytes_per_chunk"),
        ("stage12/route_Latin/boundary_rate", "stage12/route_Latin/boundary_rate"),
        ("eval/script_Han/bpb", "eval/script_Han/bpb"),
        ("my_loss", "train/my_loss"),
        ("mine/my_loss", "train/mine/my_loss"),
        ("stage0/route_\u202e\x1b[2J\n/boundary_rate",
         "stage0/route_\\u{202e}\\u{001b}[2J\\n/boundary_rate"),
    ],
)  # fmt: skip
def test_every_field_has_a_tag_in_a_group_and_a_description(field, tag):
    found = tag_of(field)
    assert found.name == tag
    assert len(found.description) > 15 and found.description.endswith(".")


def test_names_of_sources_without_their_folders():
    assert without_folders(["/data/a/books.txt"]) == {"/data/a/books.txt": "books.txt"}
    assert without_folders(["/data/a/*.txt", "/data/b/*.txt", "synthetic:latin"]) == {
        "/data/a/*.txt": "a/*.txt",
        "/data/b/*.txt": "b/*.txt",
        "synthetic:latin": "synthetic:latin",
    }
    assert without_folders(["/x/*", "x/*", "*"]) == {"/x/*": "x/*", "x/*": "x/* (2)", "*": "*"}


@given(st.lists(st.text("/ab*", min_size=1), max_size=8))
def test_labels_of_sources_differ_and_are_never_absolute(names):
    labels = without_folders(names)
    assert labels.keys() == set(names) and len(set(labels.values())) == len(set(names))
    assert not any(os.path.isabs(label) for label in labels.values())
