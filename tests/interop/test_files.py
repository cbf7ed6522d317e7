"""Import and export of checkpoints: every format, every bit, and malicious files."""

import importlib
import json
import pickle
import tracemalloc
import zipfile
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from hnet import command_line
from hnet.command_line import exit_code
from hnet.config import HNetConfig
from hnet.errors import ConfigError
from hnet.interop import convert, load, to_official, verify
from hnet.interop.__main__ import main
from hnet.weights.official import from_official, official_shapes
from hnet.weights.tensors import TensorFile, write_tensors
from tests.networks import network, official_network, random_params, stage

FILES = [".pt", ".safetensors", ".npz"]
WEIGHT = "backbone.encoder.layers.0.mixer.out_proj.weight"


def official_config(**fields) -> HNetConfig:
    return official_network((32, "m1T1 t2"), (96, "M2"), **fields)


@pytest.fixture(scope="module")
def weights() -> dict[str, np.ndarray]:
    graph, params = random_params(CONFIG)
    return to_official(nnx.merge(graph, params))[1]


CONFIG = official_config()


def needs(suffix):
    """Skip where the library that reads the format is missing."""
    if extra := {".pt": "torch", ".safetensors": "safetensors"}.get(suffix.lower()):
        pytest.importorskip(extra, reason=f"the extra `{extra}` is missing")


def write(folder: Path, weights, suffix=".npz", config=CONFIG, name="model") -> Path:
    path = folder / f"{name}{suffix}"
    write_tensors(path, weights)
    path.with_suffix(".json").write_text(json.dumps(config.to_json()))
    return path


def assert_same(a, b):
    assert set(a) == set(b)
    for name in a:
        assert a[name].dtype == b[name].dtype and a[name].shape == b[name].shape, name
        assert a[name].tobytes() == b[name].tobytes(), name


@pytest.mark.parametrize("suffix", [*FILES, ".NPZ", ".SafeTensors"])
def test_files_keep_every_bit(tmp_path, weights, suffix):
    needs(suffix)
    path = write(tmp_path, weights, suffix)
    assert_same(dict(TensorFile(path)), weights)
    assert_same(to_official(load(path))[1], weights)
    assert {p.name for p in tmp_path.iterdir()} == {f"model{suffix}", "model.json"}
    convert(path, tmp_path / f"copy{suffix}")
    assert_same(dict(TensorFile(tmp_path / f"copy{suffix}")), weights)
    assert list(tmp_path.glob(".*")) == []  # no half-written file is left


@pytest.mark.parametrize("suffix", FILES)
def test_a_round_trip_over_a_work_directory_keeps_every_bit(tmp_path, weights, suffix):
    needs(suffix)
    source, workdir = write(tmp_path, weights), tmp_path / "run"
    convert(source, workdir)
    assert load(workdir).config.to_json() == CONFIG.to_json()
    back = tmp_path / f"back{suffix}"
    convert(workdir, back)
    assert_same(dict(TensorFile(back)), weights)
    assert json.loads(back.with_suffix(".json").read_text()) == CONFIG.to_json()


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_bfloat16_is_kept_and_can_be_chosen(tmp_path, weights, suffix):
    needs(suffix)
    halves = {n: a.astype(ml_dtypes.bfloat16) if a.ndim == 2 else a for n, a in weights.items()}
    path = write(tmp_path, halves, suffix)
    convert(path, tmp_path / f"copy{suffix}")
    assert_same(dict(TensorFile(tmp_path / f"copy{suffix}")), halves)
    widened = to_official(load(path))[1]
    assert_same(widened, {n: a.astype(np.float32) for n, a in halves.items()})
    model = load(path, dtype="bfloat16")
    assert model.config.compute.dtype == "bfloat16"
    assert model.backbone.encoder.layers[0].mixer.in_proj.kernel.dtype == jnp.bfloat16
    assert model.backbone.routing_module.q_proj_layer.kernel.dtype == jnp.float32
    convert(
        write(tmp_path, weights, suffix, name="whole"), tmp_path / f"half{suffix}", dtype="bfloat16"
    )
    narrowed = TensorFile(tmp_path / f"half{suffix}")
    assert narrowed[WEIGHT].dtype == ml_dtypes.bfloat16
    assert narrowed["backbone.residual_proj.weight"].dtype == np.float32
    assert narrowed["backbone.encoder.layers.0.norm1.weight"].dtype == np.float32
    np.testing.assert_array_equal(narrowed[WEIGHT], weights[WEIGHT].astype(ml_dtypes.bfloat16))


def test_a_tied_head_is_stored_twice_and_compared(tmp_path):
    config = official_config(tie_embeddings=True)
    weights = to_official(nnx.merge(*random_params(config)))[1]
    assert set(weights) == set(official_shapes(config))
    assert_same(to_official(load(write(tmp_path, weights, config=config)))[1], weights)
    other = weights | {"lm_head.weight": weights["lm_head.weight"] + 1}
    with pytest.raises(ConfigError, match="lm_head.weight differs"):
        from_official(config.to_json(), other)


def test_the_configuration_is_found_or_asked_for(tmp_path, weights):
    path = write(tmp_path, weights)
    path.with_suffix(".json").rename(tmp_path / "model_config.json")
    load(path)
    (tmp_path / "model_config.json").rename(tmp_path / "other.json")
    load(path, config=tmp_path / "other.json")
    with pytest.raises(ConfigError, match="model.json or model_config.json"):
        load(path)


def test_a_model_of_tokens_is_not_written_as_one_of_bytes(tmp_path, weights):
    run = tmp_path / "run"
    convert(write(tmp_path, weights), run)
    content = json.loads((run / "config.json").read_text())
    content["data"]["tokenizer"] = "words.json"
    (run / "config.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="model of the tokens of 'words.json'"):
        convert(run, tmp_path / "back.npz")
    assert not (tmp_path / "back.npz").exists()


def test_nothing_is_overwritten(tmp_path, weights):
    path = write(tmp_path, weights)
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="exists"):
        convert(path, path)
    (tmp_path / "mine").mkdir()
    with pytest.raises(ConfigError, match="mine' exists"):
        convert(path, tmp_path / "mine")
    with pytest.raises(ConfigError, match="exists"):
        write_tensors(path, weights)
    (tmp_path / "b.json").write_text("mine")
    with pytest.raises(ConfigError, match="b.json' exists"):
        convert(path, tmp_path / "b.npz")
    assert (tmp_path / "b.json").read_text() == "mine" and path.read_bytes() == before
    assert not (tmp_path / "b.npz").exists()


def test_models_without_an_official_form_stay_in_their_work_directory():
    config = network(stage("t1 t1", 26, predictor="spacelike"), stage("t1", 26))
    with pytest.raises(
        ConfigError, match="stages.0.chunking.predictor='spacelike' has no official"
    ):
        to_official(nnx.merge(*random_params(config)))


# --- damaged or malicious files ---------------------------------------------------------------


class Attack:
    """Code that runs on unsafe unpickling."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (Path.touch, (self.marker,))


def refused(path, match=None, **kwargs):
    """load() and the command line both give a one-line error."""
    with pytest.raises(ConfigError, match=match) as e:
        load(path, **kwargs)
    assert "\n" not in str(e.value)
    for words in (["convert", str(path), str(path) + ".npz"], ["verify", str(path), str(path)]):
        assert exit_code(lambda: main(words))[0] == 2  # noqa: B023


def hostile_pickle(folder, kind, marker):
    if kind == "npz":
        path = folder / "model.npz"
        with open(path, "wb") as f:
            np.savez(f, evil=np.array([Attack(marker)], object))
        return path
    torch = pytest.importorskip("torch", reason="the extra `torch` is missing")
    path = folder / "model.pt"
    if kind == "zip":
        torch.save({"weight": torch.zeros(2), "evil": Attack(marker)}, path)
    elif kind == "legacy":
        torch.save({"evil": Attack(marker)}, path, _use_new_zipfile_serialization=False)
    else:
        path.write_bytes(pickle.dumps(Attack(marker)))
    return path


@pytest.mark.parametrize("kind", ["zip", "legacy", "bare", "npz"])
def test_pickled_code_is_never_run(tmp_path, kind, capsys):
    marker = tmp_path / "was here"
    path = hostile_pickle(tmp_path, kind, marker)
    path.with_suffix(".json").write_text(json.dumps(CONFIG.to_json()))
    refused(path)
    assert not marker.exists()
    assert capsys.readouterr().err.count("\n") == 2  # one line per command
    if kind in ("zip", "bare"):  # the attack works with unsafe loading
        import torch

        torch.load(path, weights_only=False) if kind == "zip" else pickle.loads(path.read_bytes())
        assert marker.exists()


@pytest.mark.parametrize("suffix", FILES)
@pytest.mark.parametrize("share", [0.0, 0.3, 0.999])
def test_truncated_files_are_refused(tmp_path, weights, suffix, share):
    needs(suffix)
    path = write(tmp_path, weights, suffix)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    refused(path, "cannot be read safely")


@pytest.mark.few(
    "suffix, value",
    [*[(suffix, np.nan) for suffix in FILES], (".npz", -np.inf)],
    [(suffix, value) for suffix in FILES for value in (np.nan, -np.inf)],
)
def test_values_that_are_no_numbers_are_refused(tmp_path, weights, suffix, value):
    needs(suffix)
    bad = weights[WEIGHT].copy()
    bad[3, 2] = value
    refused(write(tmp_path, weights | {WEIGHT: bad}, suffix), f"{WEIGHT} has NaN or infinite")


def test_other_shapes_and_names_are_listed_by_parameter(tmp_path, weights, capsys):
    changed = {n: a for n, a in weights.items() if n != "lm_head.weight"}
    changed |= {WEIGHT: weights[WEIGHT][:, :-1], "surplus.weight": np.zeros((2, 2), np.float32)}
    path = write(tmp_path, changed)
    rows, columns = weights[WEIGHT].shape
    refused(path, "missing lm_head.weight; left over surplus.weight; .* has shape")
    lines = capsys.readouterr().err.splitlines()
    assert lines[:3] == [
        "  missing lm_head.weight",
        "  left over surplus.weight",
        f"  {WEIGHT} has shape ({rows}, {columns - 1}), not ({rows}, {columns})",
    ]
    assert lines[3].startswith("error: 3 parameters")


@pytest.mark.parametrize("content", [{}, {"weight": "text"}, {"model": {"a": 1}}, [1, 2]], ids=repr)
def test_what_is_no_state_dict_is_refused(tmp_path, content):
    torch = pytest.importorskip("torch", reason="the extra `torch` is missing")
    path = tmp_path / "model.pt"
    torch.save(content, path)
    path.with_suffix(".json").write_text(json.dumps(CONFIG.to_json()))
    refused(path, "no dictionary of tensors|give a plain state dict")


def test_other_kinds_of_numbers_and_files_are_refused(tmp_path, weights):
    whole = weights | {WEIGHT: weights[WEIGHT].astype(np.int32)}
    refused(write(tmp_path, whole), f"{WEIGHT} is int32, not floating point")
    with pytest.raises(ConfigError, match="does not exist"):
        load(tmp_path / "nothing.pt")
    with pytest.raises(ConfigError, match="no known format"):
        load(write(tmp_path, weights, name="again").rename(tmp_path / "model.ckpt"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="has no config.json"):
        load(tmp_path / "empty")
    stray = tmp_path / "stray.npz"
    with zipfile.ZipFile(stray, "w") as archive:
        archive.writestr("note.txt", "hello")
    stray.with_suffix(".json").write_text(json.dumps(CONFIG.to_json()))
    refused(stray, "cannot be read safely")


def test_headers_that_promise_too_much_are_refused(tmp_path, weights):
    path = write(tmp_path, weights, ".safetensors")
    content = path.read_bytes()
    path.write_bytes((2**62).to_bytes(8, "little") + content[8:])
    refused(path, "cannot be read safely")
    path = write(tmp_path, weights)
    members = dict(np.load(path))
    with zipfile.ZipFile(path, "w") as archive:  # the header claims a terabyte that is not there
        for name in members:
            with archive.open(f"{name}.npy", "w") as file:
                shape = (1 << 20, 1 << 18) if name == WEIGHT else members[name].shape
                header = {"descr": "<f4", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
    refused(path, f"{WEIGHT} has shape")


def test_a_header_is_not_read_beyond_what_an_array_needs(tmp_path, weights):
    path = write(tmp_path, weights)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        start = b"\x93NUMPY\x02\x00" + (1 << 27).to_bytes(4, "little")
        archive.writestr(f"{WEIGHT}.npy", start + b" " * (1 << 27))
    tracemalloc.start()
    with pytest.raises(ConfigError, match="cannot be read safely"):
        load(path)
    assert tracemalloc.get_traced_memory()[1] < 1 << 22
    tracemalloc.stop()


@pytest.mark.parametrize("dtype", ["<U4", "<c8", "V8", "<i4"])
def test_arrays_of_other_kinds_are_refused_before_they_are_read(tmp_path, weights, dtype):
    changed = weights | {WEIGHT: np.zeros(weights[WEIGHT].shape, dtype)}
    path = tmp_path / "model.npz"
    np.savez(path, **changed)
    with pytest.raises(ConfigError, match=f"{WEIGHT} is .*, not floating point"):
        TensorFile(path)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"d_model": [2147483584] * 2}, "parameters"),
        ({"arch_layout": ["T9999" * 50, ["T1"], "T9999" * 50]}, "layers"),
        ({"arch_layout": ["T1t1" * 300, ["T1"], "T1"]}, "runs of equal layers"),
        ({"ssm_cfg": {"d_conv": 2**31 - 1, "d_state": 2**31 - 1}}, "parameters"),
        ({"vocab_size": 2**31 - 1, "d_model": [4096, 4096]}, "parameters"),
    ],
)
def test_networks_that_are_too_large_are_refused_before_any_work(content, says):
    config = official_network((64, "m1 m1"), (64, "T1")).to_json() | content
    with pytest.raises(ConfigError, match=f"model.stages describe .* {says} .*use at most") as e:
        HNetConfig.from_json(config)
    assert len(str(e.value)) < 300


def test_stages_are_counted_before_any_work():
    nested = ["T1"]
    for _ in range(400):
        nested = ["T1", nested, "T1"]
    lists = {name: [64] * 401 for name in ("d_model", "d_intermediate")}
    heads = {"num_heads": [2] * 401, "rotary_emb_dim": [4] * 401, "window_size": [5] * 401}
    with pytest.raises(ConfigError, match="401 stages"):
        HNetConfig.from_json({"arch_layout": nested, **lists, "attn_cfg": heads})


def test_many_problems_are_counted_instead_of_listed(tmp_path, weights, capsys):
    extra = {f"surplus.{i}.weight": np.zeros(1, np.float32) for i in range(60)}
    refused(write(tmp_path, weights | extra))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 * (40 + 2) and "  and 20 more" in lines
    assert lines[-1].startswith("error: 60 parameters")


@pytest.mark.parametrize(
    "content",
    ["", "[1, 2]", "{", '{"arch_layout": ["T1"]}', "[" * 100_000, b"\xff\xfe",
     {"d_model": [1 << 40] * 2}, {"arch_layout": ["T999999999999"]}, {"arch_layout": [["m1"]]},
     {"vocab_size": True}],
    ids=range(10),
)  # fmt: skip
def test_other_configurations_are_refused(tmp_path, weights, content):
    path = write(tmp_path, weights)
    if isinstance(content, dict):
        content = json.dumps({**CONFIG.to_json(), **content})
    data = content if isinstance(content, bytes) else content.encode()
    path.with_suffix(".json").write_bytes(data)
    refused(path)


@pytest.mark.parametrize("command", ["evaluate --files x.txt", "generate --prompt x"])
def test_every_command_refuses_in_one_line(tmp_path, weights, command, monkeypatch, capsys):
    bad = write(tmp_path, weights | {WEIGHT: weights[WEIGHT] * np.nan})
    name, *options = command.split()
    module = importlib.import_module(f"experiments.{name}")
    for checkpoint in (bad, tmp_path, tmp_path / "missing.npz"):
        monkeypatch.setattr("sys.argv", [name, "--checkpoint", str(checkpoint), *options])
        with pytest.raises(SystemExit) as e:
            command_line.run(module.main)
        assert e.value.code == 2
        captured = capsys.readouterr()
        assert captured.err.startswith("error: ") and captured.err.count("\n") == 1


def test_verify_tells_same_from_different(tmp_path, weights, capsys, monkeypatch):
    a = write(tmp_path, weights)
    moved = weights | {WEIGHT: weights[WEIGHT] * np.float32(1.01)}
    b = write(tmp_path, moved, name="moved")
    assert main(["verify", str(a), str(a)]) == 0
    assert capsys.readouterr().out.startswith("same: largest difference of a logit 0.00e+00")
    found = verify(a, b)
    assert found.max_difference > 1e-3 and found.positions == 1024
    monkeypatch.setattr("hnet.interop.__main__.verify", lambda *paths, config: found)
    assert main(["verify", str(a), str(b)]) == 1
    assert capsys.readouterr().out.startswith("DIFFERENT")


def test_both_sources_are_checked_before_one_is_loaded(tmp_path, weights, monkeypatch):
    module = importlib.import_module("hnet.interop.convert")
    monkeypatch.setattr(module, "_answer", lambda *_: pytest.fail("worked already"))
    (tmp_path / "text.txt").write_text("text")
    with pytest.raises(ConfigError, match="text.txt' is of no known format"):
        verify(write(tmp_path, weights), tmp_path / "text.txt")
