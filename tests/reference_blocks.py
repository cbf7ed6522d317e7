"""Networks of other codes in our blocks: their parameters in ours, and what our stacks lack.

Blocks of LLaMA (BLT, AU-Net) are our layers T: queries and keys rotate neighbouring channels there,
so their channels are reordered, and an MLP is padded with zeros to a multiple of 128.
"""

import jax
import jax.numpy as jnp
from flax import nnx


class Same(nnx.Module):
    """No norm."""

    def __call__(self, x_BLD):
        return x_BLD


class Apart(nnx.Module):
    """A stack whose self-attention has documents of its own; segment_ids_BL=None: those given."""

    def __init__(self, stack: nnx.Module, segment_ids_BL: jax.Array | None = None):
        self.stack, self.segment_ids_BL = stack, nnx.data(segment_ids_BL)

    def __call__(self, x_BLD, context):
        if self.segment_ids_BL is not None:
            context = context._replace(segment_ids_BL=self.segment_ids_BL)
        return self.stack(x_BLD, context)


class Doubled(nnx.Module):
    """A layer whose input is added twice."""

    def __init__(self, layer: nnx.Module):
        self.layer = layer

    def __call__(self, x_BLD, context):
        return x_BLD + self.layer(x_BLD, context)


def halves(weight_OI: jax.Array, width: int) -> jax.Array:
    """A projection to queries or keys with the first channels of all rotated pairs first.

    width: number of channels per head.
    """
    O, I = weight_OI.shape
    return weight_OI.reshape(-1, width // 2, 2, I).swapaxes(1, 2).reshape(O, I)


def llama(w: dict, prefix: str, count: int, *, first: int = 0, width: int = 8) -> dict:
    """Parameters of one run of layers T from those of `count` blocks, the first of which is
    `prefix.FIRST`. width: number of channels per head."""
    layers = []
    for i in range(first, first + count):
        get = lambda name, i=i: w[f"{prefix}.{i}.{name}.weight"]
        q, k = (halves(get(f"attention.w{name}"), width) for name in "qk")
        y, gate, out = (get(f"feed_forward.w{n}").T for n in (3, 1, 2))
        more = -len(out) % 128
        wide = lambda a, more=more: jnp.pad(a, ((0, 0), (0, more)))
        layers.append({
            "norm1": {"scale": get("attention_norm")},
            "norm2": {"scale": get("ffn_norm")},
            "mixer": {
                "Wqkv": {"kernel": jnp.concatenate([q, k, get("attention.wv")]).T},
                "out_proj": {"kernel": get("attention.wo").T},
            },
            "mlp": {
                "fc1": {"kernel": jnp.concatenate([wide(y), wide(gate)], axis=1)},
                "fc2": {"kernel": wide(out.T).T},
            },
        })  # fmt: skip
    return jax.tree.map(lambda *a: jnp.stack(a), *layers)


def crossed(w: dict, prefix: str) -> dict:
    """Parameters of one run of a layer x from those of BLT's CrossAttention."""
    get = lambda name: w[f"{prefix}.{name}.weight"]
    layer = {
        "norm1": {"scale": get("cross_attn_norm_q")},
        "mixer": {
            "memory_norm": {"scale": get("cross_attn_norm_kv")},
            "Wq": {"kernel": get("wq").T},
            "Wkv": {"kernel": jnp.concatenate([get("wk").T, get("wv").T], axis=1)},
            "out_proj": {"kernel": get("wo").T},
        },
    }
    return jax.tree.map(lambda a: a[None], layer)
