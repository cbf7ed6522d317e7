"""Tables of the parts of chunking by name. A new part needs one file and one line here."""

from hnet.parts import Table

PREDICTORS = Table(
    "boundary predictor",
    {
        "cosine": "hnet.chunking.predictors.cosine:Cosine",
        "multi_cosine": "hnet.chunking.predictors.multi_cosine:MultiCosine",
        "mlp": "hnet.chunking.predictors.mlp:MLP",
        "policy": "hnet.chunking.predictors.policy:Policy",
        "hazard": "hnet.chunking.predictors.convolved:Hazard",
        "cif": "hnet.chunking.predictors.convolved:CIF",
        "deletion_gate": "hnet.chunking.predictors.deletion_gate:DeletionGate",
        "spacelike": "hnet.chunking.predictors.rules:Spacelike",
        "whitespace": "hnet.chunking.predictors.rules:Whitespace",
        "unicode_whitespace": "hnet.chunking.predictors.words:UnicodeWhitespace",
        "words": "hnet.chunking.predictors.words:Words",
        "hat_words": "hnet.chunking.predictors.hat_words:HatWords",
        "levels": "hnet.chunking.predictors.words:Levels",
        "fixed": "hnet.chunking.predictors.rules:Fixed",
        "entropy": "hnet.second_model.entropy:Entropy",
        "external": "hnet.chunking.predictors.rules:External",
    },
)
POOLS = Table(
    "pool",
    {
        "select": "hnet.chunking.pools.select:Select",
        "cross_attention": "hnet.chunking.pools.cross_attention:CrossAttention",
        "mean": "hnet.chunking.pools.mean:Mean",
        "max": "hnet.chunking.pools.extreme:Max",
        "min": "hnet.chunking.pools.extreme:Min",
        "linear": "hnet.chunking.pools.linear:Linear",
        "concat": "hnet.chunking.pools.concat:Concat",
        "prefix": "hnet.chunking.pools.prefix:Prefix",
        "latents": "hnet.chunking.pools.latents:Latents",
        "attention": "hnet.chunking.pools.attention:Attention",
        "smoothed": "hnet.chunking.pools.smoothed:Smoothed",
        "last_before": "hnet.chunking.pools.before:LastBefore",
        "mean_before": "hnet.chunking.pools.before:MeanBefore",
        "existence": "hnet.chunking.pools.before:Existence",
        "integrate": "hnet.chunking.pools.integrate:Integrate",
    },
)
DECHUNKS = Table(
    "dechunk",
    {
        "cross_attention": "hnet.chunking.dechunks.cross_attention:CrossAttention",
        "prefix": "hnet.chunking.dechunks.prefix:Prefix",
        "ema": "hnet.chunking.dechunks.ema:EMA",
        "repeat": "hnet.chunking.dechunks.repeat:Repeat",
        "at_boundaries": "hnet.chunking.dechunks.repeat:AtBoundaries",
        "indexed": "hnet.chunking.dechunks.indexed:Indexed",
    },
)
LOSSES = Table(
    "loss",
    {
        "ratio": "hnet.chunking.losses.ratio:Ratio",
        "binomial": "hnet.chunking.losses.binomial:Binomial",
        "gate_mean": "hnet.chunking.losses.gate_mean:GateMean",
        "gate_entropy": "hnet.chunking.losses.gate_mean:GateEntropy",
        "hinge": "hnet.chunking.losses.hinge:Hinge",
        "parity": "hnet.chunking.losses.parity:Parity",
        "cab": "hnet.chunking.losses.cab:CAB",
        "hazard": "hnet.chunking.losses.hazard:Hazard",
        "quantity": "hnet.chunking.losses.quantity:Quantity",
        "policy_gradient": "hnet.chunking.losses.policy_gradient:PolicyGradient",
        "bce": "hnet.chunking.losses.bce:BCE",
    },
)
