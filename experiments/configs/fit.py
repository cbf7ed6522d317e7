"""FIT (arXiv 2305.12689) at the size of the default configuration, over bytes.

    python -m experiments.pretrain fit --data.files 'books/*.txt'

A row is divided into groups of 16 bytes. Each has 4 latents, which are the positions of the main
network: they read the bytes of their group, pass layers that see all latents of their own and of
earlier groups, and are read by the bytes of the next group. This takes place twice (`passes`), with
parameters of its own each time; layers over bytes see only their group. These are Mamba-2, the
common layers of bytes, around cross-attention; Transformers as in the paper are
--model.stages.0.arch_layout T1 x1T1.
"""

from dataclasses import replace

from experiments.configs import default
from hnet.chunking.config import ChunkingConfig
from hnet.chunking.dechunks.cross_attention import CrossAttention
from hnet.chunking.pools.latents import Latents
from hnet.config import StageConfig
from hnet.nn.settings import CrossAttentionConfig
from hnet.train.config import Config

GROUP, LATENTS, WIDTH = 16, 4, 192
"""bytes per group, latents per group, and the width of a latent"""


def fit() -> Config:
    """FIT: layers in groups of bytes and layers over latents of the groups take turns.

    Paper: arXiv 2305.12689
    Fidelity: the autoregressive form (FITAR of google-research/pix2seq at commit eabd4e9): latents
    persist, attend to their group, to each other and are read one group late; Mamba-2 over bytes
    (attention by option), rotary positions in place of learned ones and the same learned latents
    for every group; SwiGLU, no biases; the first group reads learned latents instead of zeros, and
    so do all later latents
    Test: tests/chunking/systems/test_fit.py: logits, loss and all gradients of a whole
    network, and the logits that one byte changes
    """
    chunking = ChunkingConfig(
        float(GROUP), "fixed", pool=Latents.Config(LATENTS), residual="add", losses=(),
        dechunk=CrossAttention.Config(LATENTS, projection=False, width=WIDTH),
        encoder_scope="chunk", decoder_scope="chunk", max_chunk_len=GROUP,
    )  # fmt: skip
    local = StageConfig(
        ("m1", "x1m1"), 128, 256, num_heads=4, rotary_emb_dim=16, chunking=chunking, passes=2,
        cross_attention=CrossAttentionConfig(memory_width=WIDTH),
    )  # fmt: skip
    latents = StageConfig(
        ("T2",), LATENTS * WIDTH, 384, num_heads=4, rotary_emb_dim=24, vectors=LATENTS
    )
    base = default.config()
    return replace(
        base,
        model=replace(base.model, stages=(local, latents)),
        optim=replace(base.optim, learning_rate=4e-3, lr_multipliers="none"),  # 5 times apart else
    )
