"""Kernels timed and checked at the shapes of a configuration, and the file that `auto` reads."""

import json

import jax
import jax.numpy as jnp
import pytest

from experiments.benchmarks import kernels
from experiments.benchmarks.kernels import Shape, candidates, choose, inputs, main, shapes
from hnet.config import ComputeConfig
from hnet.errors import ConfigError
from hnet.nn.kernels.table import KERNELS, Kernel, described, resolved
from hnet.nn.kernels.tuned import Choice, Row
from hnet.train.named import run_config
from tpu.aot import capacities

pytestmark = pytest.mark.usefixtures("quick_compilation")
SSD = Shape("ssd_backend", (("B", 1), ("L", 11), ("H", 2), ("P", 4), ("N", 3)))


def test_shapes_are_those_of_one_device_at_expected_slots():
    words = ["2stage_L", "--data.seq_len", "8192", "--data.batch_size", "64"]
    found = shapes(run_config([*words, "--train.rows_sharing_slots", "1"]), num_devices=8)
    one, two = capacities(run_config(words), 1.0)
    assert {str(shape): layers for shape, layers in found.items()} == {
        "B=8 L=8192 H=32 P=64 N=128": 8,
        f"B=8 L={one} H=32 P=64 N=128": 8,
        f"B=8 L={one} H=16 K=64 window=1023": 2,
        f"B=8 L={two} H=16 K=96 window=-1": 26,
    }
    shared = shapes(run_config([*words, "--train.rows_sharing_slots", "4"]), num_devices=8)
    assert f"B=2 L={4 * two} H=16 K=96 window=-1" in map(str, shared)


def test_candidates_are_what_the_devices_can_run():
    long = Shape("attention_backend", (("L", 300),))
    assert candidates(long, "cpu", "bfloat16") == [("xla", n) for n in (64, 128, 256, 512)]
    assert ("cudnn", 512) in candidates(long, "gpu", "bfloat16")
    assert "cudnn" not in {name for name, _ in candidates(long, "gpu", "float32")}
    assert ("splash", None) in candidates(long, "tpu", "float32")


def row(backend, both_ms, *, block_len=64, shape="a", layers=1, problem=""):
    return Row("ssd_backend", backend, block_len, shape, layers, 1.0, both_ms, 0.0, problem)


def test_the_fastest_over_all_layers_without_a_problem_is_chosen():
    rows = [
        row("xla", 5.0), row("xla", 1.0, shape="b", layers=9),
        row("fast", 1.0), row("fast", 2.0, shape="b", layers=9),
        row("wrong", 0.1), row("wrong", 0.1, shape="b", layers=9, problem="wrong by 0.5"),
        row("half", 0.1),
    ]  # fmt: skip
    assert choose("ssd_backend", rows) == Choice("xla", 64)
    assert choose("ssd_backend", rows[1:3]) is None
    assert choose("attention_backend", rows) is None


def test_a_kernel_that_is_wrong_or_fails_is_never_chosen(monkeypatch):
    def wrong(x, *_, block_len):
        return x

    def failing(*_, block_len):
        raise RuntimeError("no such\nregister")

    added = {
        "wrong": Kernel(wrong, "cpu", block_len=64),
        "failing": Kernel(failing, "cpu", block_len=64),
    }
    monkeypatch.setitem(KERNELS, "ssd_backend", added)
    rows = kernels.measure(SSD, 3, jax.devices()[0], "float32", rounds=1)
    problems = {row.backend: row.problem for row in rows}
    assert problems["xla"] == "" and problems["wrong"].startswith("wrong by")
    assert problems["failing"] == "RuntimeError: no such register"
    assert choose("ssd_backend", rows).backend == "xla"
    times = {row.backend: row.both_ms for row in rows}
    assert times["failing"] is None and times["xla"] > 0


def test_inputs_have_documents_and_the_dtype_of_a_layer():
    (x, dt, A, B, C), segments = inputs(SSD, "bfloat16")
    assert x.shape == (1, 11, 2, 4) and x.dtype == B.dtype == C.dtype == jnp.bfloat16
    assert dt.dtype == A.dtype == jnp.float32 and set(segments[0].tolist()) == {1, 2, 3}


@pytest.fixture(scope="module")
def measured(tmp_path_factory, quick_compilation):
    """Content of a file that was measured for a small network."""
    path = tmp_path_factory.mktemp("kernels") / "tuned.json"
    words = ["tiny", "--data.batch_size", "1", "--data.seq_len", "32"]
    main(["--rounds", "1", "--out", str(path), *words])
    return path.read_text()


@pytest.fixture
def tuned(measured, tmp_path):
    path = tmp_path / "tuned.json"
    path.write_text(measured)
    return path


def test_auto_reads_what_was_measured(tuned, capsys):
    content = json.loads(tuned.read_text())
    content["ssd_backend"] = {"backend": "xla", "block_len": 48}
    tuned.write_text(json.dumps(content))
    kind = jax.devices()[0].device_kind
    compute = resolved(ComputeConfig(tuned=str(tuned)), "cpu", kind)
    assert (compute.ssd_backend, compute.ssd_block_len) == ("xla", 48)
    assert compute.attention_block_len == content["attention_backend"]["block_len"]
    assert str(tuned) in described(compute, "cpu")
    # what the configuration names comes first
    named = resolved(ComputeConfig(tuned=str(tuned), ssd_block_len=16), "cpu", kind)
    assert named.ssd_block_len == 16
    with pytest.raises(ConfigError, match="exists"):
        main(["--out", str(tuned), "tiny"])


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"device_kind": "NVIDIA H100"},
            "was measured with device_kind 'NVIDIA H100', and this run has",
        ),
        ({"dtype": "bfloat16"}, "was measured with dtype 'bfloat16'"),
        (
            {"ssd_backend": {"backend": "magic"}},
            "names ssd_backend='magic': use one of xla, pallas",
        ),
        ({"rows": 3}, "tuned.rows=3"),
        (None, "is not JSON"),
    ],
)
def test_files_that_do_not_hold_here_get_one_line(tuned, change, message):
    content = json.loads(tuned.read_text()) | (change or {})
    tuned.write_text(json.dumps(content) if change else "{")
    with pytest.raises(ConfigError, match=message) as e:
        resolved(ComputeConfig(tuned=str(tuned)), "cpu", jax.devices()[0].device_kind)
    assert "\n" not in str(e.value)
