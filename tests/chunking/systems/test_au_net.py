"""AU-Net of 3 stages."""

from flax import nnx

from hnet.chunking.config import ChunkingConfig
from hnet.chunking.predictors.words import Words
from hnet.config import AttentionConfig, HNetConfig, StageConfig
from hnet.model import HNetLM
from tests.chunking.systems.whole_network import Case, agrees
from tests.golden_data import load, part
from tests.reference_blocks import Same, llama


def au_net(found: dict) -> Case:
    """Bytes, words and pairs of words: the boundaries of both stages follow from the bytes."""
    make = lambda predictor: ChunkingConfig(
        5.0, predictor, "end", "first", "linear", "indexed", "add", losses=()
    )
    rotated = {"attention": AttentionConfig(rotary_base=5e5)}
    stages = (
        StageConfig(("T1", "T1"), 16, 48, 2, 8, 7, make(Words.Config((1, 2))), **rotated),
        StageConfig(("T1", "T1"), 24, 64, 3, 8, chunking=make("levels"), **rotated),
        StageConfig(("T1",), 32, 88, 2, 16, **rotated),
    )
    model = HNetLM(HNetConfig(stages, vocab_size=258), rngs=nnx.Rngs(0))
    outer, inner = model.backbone, model.backbone.main_network
    outer.encoder.rmsnorm = inner.encoder.rmsnorm = inner.decoder.rmsnorm = Same()
    inner.main_network.main_network.rmsnorm = Same()

    def params(w):
        found = {
            "embeddings/embedding": w["tok_embeddings.weight"],
            "backbone/decoder/rmsnorm/scale": w["vocab_norm.weight"],
            "lm_head/kernel": w["vocab.weight"].T,
            "backbone/main_network/main_network/main_network/layers/0": llama(
                w, "trunk.layers", 1, width=16
            ),
        }
        for stage, at in enumerate(("backbone/", "backbone/main_network/")):
            for stack in ("encoder", "decoder"):
                found[f"{at}{stack}/layers/0"] = llama(w, f"{stack}s.{stage}.layers", 1)
            get = lambda name, stage=stage: w[f"transitions.{stage}.{name}.weight"]
            found[f"{at}chunk_layer/norm/scale"] = get("down_norm")
            found[f"{at}chunk_layer/proj/kernel"] = get("trans_down").T
            found[f"{at}dechunk_layer"] = {
                "norm": {"scale": get("up_norm")}, "proj": {"kernel": get("trans_up").T},
                "maps": get("indexed_linear").swapaxes(1, 2),
            }  # fmt: skip
        return found

    options = {"capacities": (40, 26)}
    return Case(model, params, found["in/targets_BL"], options, lambda logits: logits[:, ::4])


def test_it_is_that_of_its_own_code():
    found = load("family/aunet_network")
    weights = part(found, "param")
    assert agrees(au_net(found), found, weights) == set(weights)
