"""Layout strings, refused configurations, the official JSON, learning-rate multipliers."""

import json
from dataclasses import replace

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hnet.config import (
    PUBLISHED,
    ChunkingConfig,
    ComputeConfig,
    HNetConfig,
    SSMConfig,
    StageConfig,
    lr_multipliers,
)
from hnet.errors import ConfigError
from hnet.layout import layout_height, parse_layout
from hnet.model import abstract

OUTER = StageConfig(("m2", "T1"), 64, 100, 4, 16, 31)
INNER = StageConfig(("T2m1",), 128, 256, 8, 16)
GOOD = HNetConfig((OUTER, INNER))


# --- layouts ------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.sampled_from("mMtTxXq"), st.integers(1, 30)), min_size=1, max_size=6))
def test_layout_means_its_layers_in_order(runs):
    layout = "".join(f"{kind}{count}" for kind, count in runs)
    layers = "".join(kind * count for kind, count in runs)
    parsed = parse_layout(layout)
    assert "".join(kind * count for kind, count in parsed) == layers
    assert all(a[0] != b[0] for a, b in zip(parsed, parsed[1:]))
    assert layout_height(layout) == sum(2 if kind.isupper() else 1 for kind in layers)


@pytest.mark.parametrize("layout", ["m", "4", "m0", "m04", "é2", "m4 ", "m4,T1", "m-1", "m4T"])
def test_impossible_layout(layout):
    with pytest.raises(
        ConfigError, match=f"layout {layout!r} is not .* use letters of mixers, each followed"
    ):
        parse_layout(layout)


# --- refused settings: the error names field, value, remedy -------------------------------------


def outer(**fields):
    return lambda: HNetConfig((replace(OUTER, **fields), INNER))


def inner(**fields):
    return lambda: HNetConfig((OUTER, replace(INNER, **fields)))


def model(**fields):
    return lambda: replace(GOOD, **fields)


REFUSED = [
    (model(stages=()), "model.stages is empty: give at least one"),
    (model(vocab_size=255), "model.vocab_size=255 .*: use 256 or more"),
    (model(ssm=SSMConfig(d_state=0)), "model.ssm.d_state=0: use 1"),
    (model(ssm=SSMConfig(d_conv=-1)), "model.ssm.d_conv=-1: use 1"),
    (model(ssm=SSMConfig(expand=0)), "model.ssm.expand=0: use 1"),
    (model(ssm=SSMConfig(head_dim=0)), "model.ssm.head_dim=0: use 1"),
    (model(ssm=SSMConfig(head_dim=48)), "stages.0.d_model=64 times .*head_dim=48: choose"),
    (model(compute=ComputeConfig(ssd_block_len=0)), "compute.ssd_block_len=0: use 1"),
    (model(compute=ComputeConfig(attention_block_len=0)), "compute.attention_block_len=0: use 1"),
    (
        outer(arch_layout=("m2",)),
        r"stages.0.arch_layout=\('m2',\) has 1 parts: give an encoder and",
    ),
    (inner(arch_layout=("m1", "m1")), "stages.1.arch_layout=.* has 2 parts: the innermost .* one"),
    (inner(arch_layout=("",)), "stages.1.arch_layout=.*: the innermost stage needs layers"),
    (outer(arch_layout=("m2", "q")), "stages.0.arch_layout: layout 'q' .*: use letters of mixers"),
    (
        outer(arch_layout=("m2", "q1")),
        "stages.0.arch_layout=.* letter 'q' is unknown: use g, l, m, t, x",
    ),
    (inner(d_model=0), "stages.1.d_model=0: use 1"),
    (
        outer(d_model=256),
        r"stages.1.d_model=128, but .*gives 256 .*: use 256 or more",
    ),
    (outer(num_heads=5), "stages.0.d_model=64 is not divided by num_heads=5: choose"),
    (outer(num_heads=0), "num_heads=0: choose"),
    (outer(rotary_emb_dim=15), "stages.0.rotary_emb_dim=15: use an even .* 16"),
    (outer(rotary_emb_dim=18), "rotary_emb_dim=18: use an even number from 0 to the head width 16"),
    (outer(rotary_emb_dim=-2), "rotary_emb_dim=-2: use"),
    (outer(window_size=-2), "stages.0.window_size=-2: use -1 or more"),
    (inner(d_intermediate=0), "stages.1.d_intermediate=0, but .*: give their width"),
    (outer(chunking=ChunkingConfig(1.0)), r"stages.0.chunking.target_ratio=1.0: use more than 1"),
    (lambda: HNetConfig.named("3stage_L"), "'3stage_L' is unknown: use one of 1stage_L, 1stage_XL"),
]


@pytest.mark.parametrize("build, message", REFUSED, ids=lambda v: v if isinstance(v, str) else "")
def test_refused_with_field_value_and_remedy(build, message):
    with pytest.raises(ConfigError, match=message) as error:
        build()
    assert "\n" not in str(error.value)


def test_what_a_stage_does_not_use_is_not_checked():
    replace(GOOD, stages=(StageConfig(("m1",), 64, num_heads=7, rotary_emb_dim=999),))
    HNetConfig((StageConfig(("t1",), 66, num_heads=3, rotary_emb_dim=22),))  # no Mamba: any width
    inner(chunking=ChunkingConfig(0.0))()


def test_fields_with_other_places_in_earlier_versions_are_named():
    with pytest.raises(TypeError, match="positional"):
        HNetConfig((INNER,), 256, SSMConfig())  # would be a true tie_embeddings
    with pytest.raises(TypeError, match="positional"):
        StageConfig(("T1",), 64, 256, 4, 8, -1, ChunkingConfig(), 2)


def test_mlp_width_is_rounded_up_to_128():
    assert [replace(OUTER, d_intermediate=n).d_mlp for n in (0, 1, 128, 129)] == [0, 128, 128, 256]


# --- the official JSON --------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_survive_the_official_json(name, tmp_path):
    config = HNetConfig.named(name)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config.to_json()))
    assert HNetConfig.from_json(path) == config == HNetConfig.from_json(config.to_json())


def test_official_json_of_a_published_configuration():
    """Expected values written by hand from goombalab/hnet, configs/hnet_2stage_XL.json."""
    official = {
        "arch_layout": ["m4", ["T1m4", ["T27"], "m4T1"], "m4"],
        "d_model": [1024, 1536, 2048],
        "d_intermediate": [0, 4096, 5504],
        "vocab_size": 256,
        "ssm_cfg": {"chunk_size": 256, "d_conv": 4, "d_state": 128, "expand": 2},
        "attn_cfg": {
            "num_heads": [16, 16, 16],
            "rotary_emb_dim": [32, 48, 64],
            "window_size": [1023, 1023, -1],
        },
        "tie_embeddings": False,
    }
    assert HNetConfig.named("2stage_XL").to_json() == official
    assert HNetConfig.from_json(official).arch_layout == official["arch_layout"]


def changed(**fields):
    return {**GOOD.to_json(), **fields}


def without(name):
    return {key: value for key, value in GOOD.to_json().items() if key != name}


GOOD_ATTENTION = GOOD.to_json()["attn_cfg"]
REFUSED_JSON = [
    (changed(dropout=0.1), r"configuration has unknown content \['dropout'\]: the format has"),
    (changed(ssm_cfg={"d_state": 64, "ngroups": 8}), r"ssm_cfg has unknown content \['ngroups'\]"),
    (changed(ssm_cfg=None), "ssm_cfg has unknown content None: the format has"),
    (changed(ssm_cfg={"d_state": "64"}), "ssm_cfg={'d_state': '64'}.*: give whole numbers"),
    (changed(vocab_size="256"), "vocab_size='256'.*: give whole numbers"),
    (changed(tie_embeddings="no"), "tie_embeddings='no': give .* true or false"),
    (without("attn_cfg"), "attn_cfg has unknown content None: the format has"),
    (changed(attn_cfg=[4, 8]), r"attn_cfg has unknown content \[4, 8\]: the format has"),
    (changed(attn_cfg={**GOOD_ATTENTION, "dropout": [0, 0]}), "attn_cfg has unknown .*'dropout'"),
    (changed(attn_cfg={"num_heads": [4, 8]}), "rotary_emb_dim=None: give a list of 2 whole"),
    (without("d_model"), "d_model=None: give a list of 2 whole numbers, one for each stage"),
    (changed(d_model=64), "d_model=64: give a list of 2"),
    (changed(d_model=[64]), r"d_model=\[64\]: give a list of 2"),
    (changed(d_model=[64, 128, 256]), r"d_model=\[64, 128, 256\]: give a list of 2"),
    (changed(d_model=[64, 128.0]), r"d_model=\[64, 128.0\]: give a list of 2 whole"),
    (changed(d_intermediate=["0", 1]), "d_intermediate=.*: give a list of 2 whole"),
    (without("arch_layout"), r"arch_layout None is not \[encoder, \[inner\]"),
    (changed(arch_layout=["m2", "T2", "m2"]), r"arch_layout .* is not \[encoder, \[inner\]"),
    (changed(arch_layout=["m2", ["T2"]]), r"is not \[encoder"),
    (changed(arch_layout=[["m2"], ["T2"], "m2"]), r"is not \[encoder"),
    (changed(arch_layout="m2"), r"is not \[encoder"),
    (changed(arch_layout=["m2", ["T0"], "m2"]), "stages.1.arch_layout: layout 'T0'"),
]


@pytest.mark.parametrize("content, message", REFUSED_JSON)
def test_refused_official_json(content, message):
    with pytest.raises(ConfigError, match=message) as error:
        HNetConfig.from_json(content)
    assert "\n" not in str(error.value)


def test_refused_configuration_files(tmp_path):
    for name, content, message in [
        ("missing.json", None, "missing.json': No such file"),
        ("broken.json", "{", "broken.json' is not JSON"),
        ("binary.json", "\x00\xff", "binary.json' is not JSON"),
        ("list.json", "[1]", "list.json' holds no JSON object"),
    ]:
        if content is not None:
            (tmp_path / name).write_bytes(content.encode("latin-1"))
        with pytest.raises(ConfigError, match=message):
            HNetConfig.from_json(tmp_path / name)
    with pytest.raises(ConfigError, match="Is a directory"):
        HNetConfig.from_json(tmp_path)


# --- published numbers --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, multipliers",
    [
        ("1stage_L", (2.63, 0.88)),
        ("1stage_XL", (3.03, 0.88)),
        ("2stage_L", (2.63, 1.52, 0.71)),
        ("2stage_XL", (3.03, 1.43, 0.72)),
    ],
)
def test_learning_rate_multipliers_of_the_paper(name, multipliers):
    """arXiv 2507.07955, appendix C, eq. 11, evaluated by hand."""
    assert lr_multipliers(HNetConfig.named(name)) == pytest.approx(multipliers, abs=0.006)


def counted_by_hand(config):
    """Number of weights of matrices and convolutions; norms, biases, padding are below 0.1 %."""

    def layers(stage, layout):
        D, ff, N = stage.d_model, stage.d_mlp, config.ssm.d_state
        mlp = 3 * D * ff
        mixer = {"t": 4 * D**2, "m": D * (4 * D + 2 * N + 2 * D // 64) + 2 * D**2}
        mixer["m"] += 5 * (2 * D + 2 * N)  # four taps and a bias
        return sum(n * (mixer[k.lower()] + k.isupper() * mlp) for k, n in parse_layout(layout))

    around = 3 * sum(stage.d_model**2 for stage in config.stages[:-1])  # predictors, residuals
    stacks = sum(layers(stage, part) for stage in config.stages for part in stage.arch_layout)
    return stacks + around + 2 * 256 * config.stages[0].d_model


@pytest.mark.parametrize(
    "name, millions",
    [
        ("1stage_L", 679),
        ("1stage_XL", 1270),
        ("2stage_L", 872),
        ("2stage_XL", 1600),
        ("2stage_XL_chinese", 1750),
        ("2stage_XL_code", 1650),
    ],
)
def test_parameter_counts_of_the_published_networks(name, millions):
    """The paper says 680M, 1.3B, 870M, 1.6B; chinese has three layers more, code has one more."""
    config = HNetConfig.named(name)
    count = sum(leaf.size for leaf in jax.tree.leaves(abstract(config)[1]))
    assert count == pytest.approx(counted_by_hand(config), rel=1e-3)
    assert count / 1e6 == pytest.approx(millions, rel=0.005)
