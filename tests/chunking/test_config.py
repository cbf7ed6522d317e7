"""Which ways to chunk exist by name, and which are refused."""

from dataclasses import replace

import pytest

from experiments.configs.systems import SYSTEMS
from hnet.chunking.config import ChunkingConfig
from hnet.chunking.pools.latents import Latents
from hnet.chunking.pools.linear import Linear
from hnet.chunking.pools.prefix import Prefix
from hnet.chunking.predictors.mlp import MLP
from hnet.chunking.predictors.words import Words
from hnet.errors import ConfigError
from tests.networks import NETWORKS, network, stage


def two_stages(**chunking):
    return network(
        replace(stage("t1 t1", 26), chunking=ChunkingConfig(**chunking)), stage("t1", 26)
    )


@pytest.mark.parametrize(
    "fields, named",
    [
        (dict(pool="mean"), "pool='mean' with alignment='start'"),
        (dict(alignment="end"), "predictor='cosine' with alignment='end'"),
        (dict(predictor="fixed", target_ratio=2.5), "target_ratio=2.5"),
        (dict(predictor="fixed", losses=("bce",)), "losses='bce'"),
        (dict(predictor="spacelike", hold_rate=True), "hold_rate=True with predictor='spacelike'"),
        (dict(losses=("bce",), hold_rate=True), "hold_rate=True with predictor='cosine'"),
        (dict(predictor=MLP.Config(temperature=0.0)), "predictor.temperature=0.0"),
        (dict(routes=3, route_target_ratios=(2.0, 3.0)), "route_target_ratios=(2.0, 3.0)"),
        (dict(routes=2, route_target_ratios=(2.0, 1.0)), "route_target_ratios=(2.0, 1.0)"),
        (dict(predictor="levels"), "predictor='levels' in stage 0"),
        (dict(predictor=Words.Config(every=(5, 7)), alignment="end"), "predictor.every=(5, 7)"),
        (
            dict(predictor="hat_words", alignment="end"),
            "predictor='hat_words' with alignment='end'",
        ),
        (dict(pool=Linear.Config("chunk")), "pool.over='chunk' with alignment='start'"),
        (dict(pool=Prefix.Config(tokens=2)), "dechunk='ema' reads one vector per chunk"),
        (dict(pool=Prefix.Config(num_heads=3)), "pool.num_heads=3: use a divisor of d_model=26"),
    ],
)
def test_impossible_chunking_is_refused_in_one_line(fields, named):
    with pytest.raises(ConfigError) as error:
        two_stages(**fields)
    message = str(error.value)
    assert message.startswith("model.stages.0.chunking.") and named in message
    assert "\n" not in message


def test_byte_rules_and_labels_are_refused_where_positions_are_chunks():
    outer, middle, core = stage("t1 t1", 26), stage("t1 t1", 26), stage("t1", 26)
    for fields in (dict(predictor="spacelike"), dict(losses=("bce",))):
        cuts = replace(middle, chunking=ChunkingConfig(**fields))
        with pytest.raises(ConfigError, match="stages.1.chunking.*stage 1"):
            network(outer, cuts, core)


def test_levels_need_a_rule_that_gives_as_many():
    inner = ChunkingConfig(predictor="levels", alignment="end")
    for outer, says in (
        (ChunkingConfig(), "predictor='cosine' of stage 0 does not give: use predictor='words'"),
        (ChunkingConfig(predictor=Words.Config(every=(1,)), alignment="end"), "gives 1 levels"),
    ):
        stages = (replace(stage("t1 t1", 26), chunking=c) for c in (outer, inner))
        with pytest.raises(ConfigError, match=f"stages.1.chunking.predictor='levels'.*{says}"):
            network(*stages, stage("t1", 26))


WITH_PASSES = [
    (0, {"vectors": 2}, "vectors=2 outside of the innermost stage: use 1"),
    (1, {"vectors": 4}, "vectors=4 does not divide d_model=39: use a divisor"),
    (1, {"arch_layout": ("t1m1",)}, r"vectors=3 with arch_layout=\('t1m1',\): use t, T"),
    (1, {"passes": 2}, "passes=2 in the innermost stage, which has no chunks: use 1"),
    (0, {"pool": "select"}, "passes=2 with chunking.pool='select', .* use 'latents'"),
    (0, {"arch_layout": ("t1", "t1")}, "passes=2 with decoder 't1', which reads no .*'x1T1'"),
    (0, {"pool": Latents.Config(2)}, r"passes=2: .*2 vectors \(chunking.pool.num_queries\) of 13"),
    (0, {"dechunk": "repeat"}, "the 26 channels of chunking.dechunk='repeat' must be 39"),
    (0, {"pool": Latents.Config(3, 2)}, "pool.num_heads=2 does not divide 13, the width of atten"),
    (0, {"max_chunk_len": 0}, "max_chunk_len=0 with pool='latents'"),
]


@pytest.mark.parametrize("i, fields, says", WITH_PASSES)
def test_passes_need_their_parts(i, fields, says):
    stages = [*NETWORKS["passes"].stages]
    parts = {k: v for k, v in fields.items() if k in ("pool", "dechunk", "max_chunk_len")}
    fields = {k: v for k, v in fields.items() if k not in parts}
    chunking = replace(stages[i].chunking, **parts)
    with pytest.raises(ConfigError, match=f"model.stages.*{says}") as error:
        stages[i] = replace(stages[i], chunking=chunking, **fields)
        network(*stages)
    assert "\n" not in str(error.value)


def test_routes_must_fit_the_named_groups():
    with pytest.raises(ConfigError, match="routes=2.*names 2 groups.*use 3, or 1"):
        replace(two_stages(routes=2), route_groups=(("Latin",), ("Greek",)))


def test_named_systems_are_the_published_rows():
    """Predictor, alignment, pool, dechunk, residual and losses of every system."""
    rows = {}
    for system in SYSTEMS:
        c = system().stages[0].chunking
        rows[system.__name__] = (
            f"{c.predictor.name} {c.alignment} {c.pool.name} {c.dechunk.name} {c.residual} "
            + ("+".join(loss.name for loss in c.losses) or "none")
        )
    dtp = "end mean repeat add"
    assert rows == {
        "hnet": "cosine start select ema linear ratio",
        "hnet_space": "spacelike start select repeat linear none",
        "hnet_pool": "fixed start select repeat linear none",
        "spacebyte": "spacelike start select at_boundaries add none",
        "dtp_gumbel": f"mlp {dtp} binomial",
        "dtp_entropy": f"mlp {dtp} bce",
        "dtp_whitespace": f"whitespace {dtp} none",
        "dtp_fixed": f"fixed {dtp} none",
        "magnet": f"mlp {dtp} binomial",
        "flexitokens": f"mlp {dtp} hinge",
    }
