"""Official state dicts: bit-exact both ways, by the official names, and clear refusals."""

import json
from dataclasses import replace

import numpy as np
import pytest
from flax import nnx

from hnet.config import SSMConfig
from hnet.errors import ConfigError
from hnet.interop import convert, from_official, to_official
from hnet.model import HNetLM
from hnet.weights.official import entries, leaves
from hnet.weights.tensors import write_tensors
from tests.networks import NETWORKS, official_network, random_params

TWO_STAGE = official_network((32, "m2 T1"), (96, "t1m2 m1"), (96, "M1"))
TIED = official_network((32, "t1 m1"), (64, "t1"), tie_embeddings=True)


def model_of(config):
    return nnx.merge(*random_params(config))


def params_of(model):
    """Our parameters one by one, as input of `entries`."""
    flat = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
    return ((leaf, np.asarray(flat[leaf.path][...])) for leaf in leaves(model.config))


@pytest.fixture(scope="module")
def official():
    return to_official(model_of(TWO_STAGE))


@pytest.mark.parametrize("config", [TWO_STAGE, TIED, official_network((32, "m1T2"))])
def test_round_trip_is_bit_exact(config):
    model = model_of(config)
    content, params = to_official(model)
    again = from_official(content, params)
    assert again.config.to_json() == content
    ours, back = (dict(nnx.to_flat_state(nnx.state(m, nnx.Param))) for m in (model, again))
    assert ours.keys() == back.keys()
    for path, leaf in ours.items():
        assert back[path][...].dtype == leaf[...].dtype
        assert np.array_equal(back[path][...], leaf[...]), path
    content_again, params_again = to_official(again)
    assert content_again == content
    assert all(np.array_equal(params_again[name], params[name]) for name in params)


def test_names_and_layouts_are_the_official_ones(official):
    """Linear weights are (out, in), the convolution (channels, 1, taps), layers are numbered."""
    _, params = official
    shapes = {name: array.shape for name, array in params.items()}
    outer, inner = "backbone", "backbone.main_network"
    for name, shape in {
        "embeddings.weight": (256, 32),
        "lm_head.weight": (256, 32),
        f"{outer}.encoder.layers.0.norm1.weight": (32,),
        f"{outer}.encoder.layers.0.mixer.in_proj.weight": (2 * 64 + 2 * 7 + 1, 32),
        f"{outer}.encoder.layers.0.mixer.conv1d.weight": (64 + 2 * 7, 1, 4),
        f"{outer}.encoder.layers.0.mixer.conv1d.bias": (64 + 2 * 7,),
        f"{outer}.encoder.layers.0.mixer.A_log": (1,),
        f"{outer}.encoder.layers.0.mixer.norm.weight": (64,),
        f"{outer}.decoder.layers.0.mlp.fc1.weight": (256, 32),
        f"{outer}.decoder.layers.0.mlp.fc2.weight": (32, 128),
        f"{outer}.decoder.rmsnorm.weight": (32,),
        f"{outer}.routing_module.q_proj_layer.weight": (32, 32),
        f"{outer}.residual_proj.bias": (32,),
        f"{inner}.pad_dimension": (64,),
        f"{inner}.encoder.layers.0.mixer.Wqkv.weight": (288, 96),
        f"{inner}.encoder.layers.1.mixer.dt_bias": (3,),
        f"{inner}.main_network.main_network.layers.0.norm2.weight": (96,),
    }.items():
        assert shapes.pop(name) == shape, name
    assert f"{inner}.encoder.layers.2.norm1.weight" in shapes
    assert f"{inner}.encoder.layers.3.norm1.weight" not in shapes
    assert all(name.split(".")[0] == "backbone" for name in shapes)


def test_tied_head_is_stored_twice_and_optional():
    content, params = to_official(model_of(TIED))
    assert np.array_equal(params["lm_head.weight"], params["embeddings.weight"])
    del params["lm_head.weight"]
    assert from_official(content, params).lm_head is None


def test_loaded_model_is_the_model(official):
    """Layer i of a stack gets the weights of layer i, not of another layer."""
    model = from_official(*official)
    run = model.backbone.main_network.encoder.layers[1]  # "t1m2": layers 1 and 2
    for i in range(2):
        layer = f"backbone.main_network.encoder.layers.{i + 1}.mixer"
        assert np.array_equal(run.mixer.in_proj.kernel[i], official[1][f"{layer}.in_proj.weight"].T)
        taps = official[1][f"{layer}.conv1d.weight"]
        assert np.array_equal(run.mixer.conv1d_weight[i], taps[:, 0].T)


def test_weights_that_do_not_fit_are_named(official):
    content, params = official
    changed = dict(params)
    head = changed.pop("lm_head.weight")
    with pytest.raises(ConfigError, match="missing lm_head.weight"):
        from_official(content, changed)
    with pytest.raises(ConfigError, match="left over backbone.extra"):
        from_official(content, {**params, "backbone.extra": head})
    with pytest.raises(ConfigError, match=r"lm_head.weight has shape \(32, 256\), not \(256, 32\)"):
        from_official(content, {**params, "lm_head.weight": head.T})
    with pytest.raises(ConfigError, match=r"missing .* and \d+ more$") as error:
        from_official(content, {})
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


@pytest.mark.parametrize("name", ["pooled_ends", "spacelike_tied", "routed", "three_stage"])
def test_networks_without_an_official_form_are_refused(name):
    config = replace(NETWORKS[name], ssm=SSMConfig(head_dim=2))
    with pytest.raises(ConfigError, match="model.stages.[01].chunking"):
        to_official(nnx.eval_shape(lambda: HNetLM(config, rngs=nnx.Rngs(0))))


def test_mamba_heads_of_another_width_are_refused():
    with pytest.raises(
        ConfigError, match="model.ssm.head_dim=13 has no official form, which is 64"
    ):
        to_official(model_of(NETWORKS["iso"]))


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (replace(official_network((64, "m1")), ssm=SSMConfig(d_conv=1)), "ssm.d_conv=1"),
        (replace(official_network((64, "T1 m1"), (64, "t1")), ssm=SSMConfig(d_conv=7)), "d_conv=7"),
        (official_network((64, "m1 m1"), (1040, "t1")), "stages.1.num_heads=4 .* 260 channels"),
    ],
)
def test_what_the_official_kernels_cannot_run_is_not_exported(config, says, tmp_path):
    model = model_of(config)
    with pytest.raises(ConfigError, match=says):
        to_official(model)
    path = tmp_path / "theirs.npz"  # as written by hand
    write_tensors(path, dict(entries(config, params_of(model))))
    path.with_suffix(".json").write_text(json.dumps(config.to_json()))
    convert(path, tmp_path / "run")  # our own code runs it
    for source in (path, tmp_path / "run"):
        with pytest.raises(ConfigError, match=says):
            convert(source, tmp_path / "out.npz")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run", "theirs.json", "theirs.npz"]
