"""Tables of the parts of chunking by name. A new part needs one file and one line here."""

from hnet.parts import Table

PREDICTORS = Table(
    "boundary predictor",
    {
        "cosine": "hnet.chunking.predictors.cosine:Cosine",
        "mlp": "hnet.chunking.predictors.mlp:MLP",
        "spacelike": "hnet.chunking.predictors.rules:Spacelike",
        "whitespace": "hnet.chunking.predictors.rules:Whitespace",
        "unicode_whitespace": "hnet.chunking.predictors.words:UnicodeWhitespace",
        "words": "hnet.chunking.predictors.words:Words",
        "hat_words": "hnet.chunking.predictors.hat_words:HatWords",
        "levels": "hnet.chunking.predictors.words:Levels",
        "fixed": "hnet.chunking.predictors.rules:Fixed",
        "entropy": "hnet.chunking.predictors.entropy:Entropy",
        "external": "hnet.chunking.predictors.rules:External",
    },
)
POOLS = Table(
    "pool",
    {
        "select": "hnet.chunking.pools.select:Select",
        "mean": "hnet.chunking.pools.mean:Mean",
        "linear": "hnet.chunking.pools.linear:Linear",
        "concat": "hnet.chunking.pools.concat:Concat",
        "prefix": "hnet.chunking.pools.prefix:Prefix",
    },
)
DECHUNKS = Table(
    "dechunk",
    {
        "cross_attention": "hnet.chunking.dechunks.cross_attention:CrossAttention",
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
        "hinge": "hnet.chunking.losses.hinge:Hinge",
        "bce": "hnet.chunking.losses.bce:BCE",
    },
)
