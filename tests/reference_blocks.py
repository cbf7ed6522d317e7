"""Networks of other codes in our blocks: their parameters in ours, and what our stacks lack.

Stacks that ours do not have are functions of parameters by their names in torch, in a `Written`.

Blocks of LLaMA (BLT, AU-Net) are our layers T: queries and keys rotate neighbouring channels there,
so their channels are reordered, and an MLP is padded with zeros to a multiple of 128. Blocks of FIT
are layers T with biases in norms and linear layers, and GELU.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hnet.nn.attention import attention_reference
from hnet.nn.layers import RMSNorm, SwiGLU, rotary


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


class Written(nnx.Module):
    """A stack that is a function run(parameters, x, context)."""

    def __init__(self, run: Callable, params: dict[str, np.ndarray]):
        self.run, self.w = run, nnx.Dict({k: nnx.Param(jnp.asarray(a)) for k, a in params.items()})

    def __call__(self, x_BLD, context):
        return self.run({k: a[...] for k, a in self.w.items()}, x_BLD, context)


def layer_norm(w: dict, name: str, x_BLD: jax.Array) -> jax.Array:
    x_BLD = x_BLD - jnp.mean(x_BLD, axis=-1, keepdims=True)
    x_BLD = x_BLD * jax.lax.rsqrt(jnp.mean(jnp.square(x_BLD), axis=-1, keepdims=True) + 1e-5)
    return x_BLD * w[f"{name}.weight"][None, None] + w[f"{name}.bias"][None, None]


def affine(w: dict, name: str, x_BLD: jax.Array) -> jax.Array:
    return x_BLD @ w[f"{name}.weight"].T + w[f"{name}.bias"][None, None]


def attend(q, k, v, segment_ids_BL, heads: int, **options) -> jax.Array:
    """Attention of one document each, of arrays (B, L, D)."""
    parts = (a.reshape(*a.shape[:2], heads, -1) for a in (q, k, v))
    return attention_reference(*parts, segment_ids_BL, **options).reshape(q.shape)


def spacebyte(w: dict, name: str, x_BLD: jax.Array, segment_ids_BL, window: int) -> jax.Array:
    """One block with layer norms without biases, of queries and keys too (kjslag/spacebyte)."""
    norm = lambda name, x: layer_norm(
        {"n.weight": w[f"{name}.scale"], "n.bias": jnp.zeros(x.shape[-1])}, "n", x
    )
    B, D, at, ff = len(x_BLD), x_BLD.shape[-1], f"{name}.attention", f"{name}.feedforward"
    qkv = norm(f"{at}.layer_norm", x_BLD) @ w[f"{at}.QKV_linear.weight"].T
    q, k, v = jnp.split(qkv, 3, axis=-1)
    width = w[f"{at}.Q_layer_norm.scale"].shape[0]
    by_head = lambda x, name: norm(f"{at}.{name}_layer_norm", x.reshape(B, -1, width)).reshape(
        x.shape
    )
    y = attend(by_head(q, "Q"), by_head(k, "K"), v, segment_ids_BL, D // width, window=window)
    x_BLD = x_BLD + y @ w[f"{at}.linear.weight"].T
    h = jax.nn.relu(norm(f"{ff}.layer_norm", x_BLD) @ w[f"{ff}.linear_1.weight"].T)
    return x_BLD + h @ w[f"{ff}.linear_2.weight"].T


def gpt(w: dict, name: str, x_BLD: jax.Array, segment_ids_BL: jax.Array, heads: int) -> jax.Array:
    """One block with layer norms in front and biases (avi-jit/eTok)."""
    h = layer_norm(w, f"{name}.ln1", x_BLD)
    q, k, v = (affine(w, f"{name}.attn.{part}", h) for part in ("query", "key", "value"))
    x_BLD = x_BLD + affine(w, f"{name}.attn.proj", attend(q, k, v, segment_ids_BL, heads))
    h = affine(w, f"{name}.mlp.0", layer_norm(w, f"{name}.ln2", x_BLD))
    return x_BLD + affine(w, f"{name}.mlp.2", jax.nn.gelu(h, approximate=False))


def post_norm(w: dict, name: str, x_BLD: jax.Array, segment_ids_BL, heads: int) -> jax.Array:
    """torch's TransformerEncoderLayer, which looks in both directions."""
    qkv = x_BLD @ w[f"{name}.self_attn.in_proj_weight"].T
    qkv = jnp.split(qkv + w[f"{name}.self_attn.in_proj_bias"][None, None], 3, axis=-1)
    y = attend(*qkv, segment_ids_BL, heads, causal=False)
    x_BLD = layer_norm(w, f"{name}.norm1", x_BLD + affine(w, f"{name}.self_attn.out_proj", y))
    h = jax.nn.relu(affine(w, f"{name}.linear1", x_BLD))
    return layer_norm(w, f"{name}.norm2", x_BLD + affine(w, f"{name}.linear2", h))


def transformer_xl(w: dict, name: str, x_BLD: jax.Array, segment_ids_BL: jax.Array) -> jax.Array:
    """One block with relative positions and norms after its parts (PiotrNawrot/dynamic-pooling)."""
    (B, L, D), (H, K), at = x_BLD.shape, w["r_w_bias"].shape, f"{name}.dec_attn"
    frequency_C = 10000 ** (-np.arange(0, D, 2) / D)
    angle_LC = np.arange(L)[:, None] * frequency_C[None]
    r_1LD = np.float32(np.concatenate([np.sin(angle_LC), np.cos(angle_LC)], axis=-1))[None]
    r_LHK = affine(w, f"{at}.r_net", r_1LD).reshape(L, H, K)
    qkv = jnp.split(affine(w, f"{at}.qkv_net", x_BLD), 3, axis=-1)
    q, k, v = (a.reshape(B, L, H, K) for a in qkv)
    of_keys = jnp.einsum("blhk,bmhk->bhlm", q + w["r_w_bias"][None, None], k)
    of_distances = jnp.einsum("blhk,dhk->bhld", q + w["r_r_bias"][None, None], r_LHK)
    distance_LM = np.arange(L)[:, None] - np.arange(L)[None]
    scores = of_keys + of_distances[:, :, np.arange(L)[:, None], np.maximum(distance_LM, 0)]
    same_BLM = segment_ids_BL[:, :, None] == segment_ids_BL[:, None, :]
    seen_B1LM = (same_BLM & (distance_LM >= 0)[None])[:, None]
    scores = jnp.where(seen_B1LM, scores * np.float32(K**-0.5), jnp.finfo(jnp.float32).min)
    y = jnp.einsum("bhlm,bmhk->blhk", jax.nn.softmax(scores, axis=-1), v).reshape(B, L, D)
    x_BLD = layer_norm(w, f"{at}.layer_norm", x_BLD + affine(w, f"{at}.o_net", y))
    h = jax.nn.gelu(affine(w, f"{name}.pos_ff.CoreNet.0", x_BLD), approximate=False)
    y = affine(w, f"{name}.pos_ff.CoreNet.3", h)
    return layer_norm(w, f"{name}.pos_ff.layer_norm", x_BLD + y)


def megabyte(w: dict, name: str, x_BLD: jax.Array, heads: int) -> jax.Array:
    """Transformer of lucidrains' MEGABYTE: layers read half of their channels of the position
    before (token shift)."""
    (B, L, D), index_BL = x_BLD.shape, jnp.broadcast_to(jnp.arange(x_BLD.shape[1]), x_BLD.shape[:2])

    def rms(at, x):
        norm = jnp.sqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True))
        return x / norm * w[f"{at}.g"][None, None]

    def shifted(x):
        return jnp.concatenate(
            [x[..., : D // 2], jnp.pad(x[:, :-1, D // 2 :], ((0, 0), (1, 0), (0, 0)))], axis=-1
        )

    for at in layers_of(w, f"{name}.layers"):
        h = rms(f"{at}.0.norm", shifted(x_BLD))
        q = h @ w[f"{at}.0.to_q.weight"].T
        k, v = jnp.split(h @ w[f"{at}.0.to_kv.weight"].T, 2, axis=-1)
        q = q.reshape(B, L, heads, -1)
        k, v = (a.reshape(q.shape) for a in (k, v))
        q, k = (rotary(a, index_BL, q.shape[-1]) for a in (q, k))
        out = attention_reference(q, k, v, jnp.ones((B, L), jnp.int32))
        x_BLD = x_BLD + out.reshape(B, L, -1) @ w[f"{at}.0.to_out.weight"].T
        h = affine(w, f"{at}.1.1", rms(f"{at}.1.0", shifted(x_BLD)))
        x_BLD = x_BLD + affine(w, f"{at}.1.4", jax.nn.gelu(h, approximate=False))
    return rms(f"{name}.norm", x_BLD)


def layers_of(w: dict, prefix: str) -> list[str]:
    """Names of the layers `prefix.0`, `prefix.1`, ... of these parameters."""
    found = {int(k.removeprefix(f"{prefix}.").split(".")[0]) for k in w if k.startswith(prefix)}
    return [f"{prefix}.{i}" for i in sorted(found)]


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


def placed(tree: dict, values: dict) -> dict:
    """The tree with values at their paths ("a/b/0/c")."""
    tree = jax.tree.map(lambda a: a, tree)
    for path, value in values.items():
        *at, last = (int(key) if key.isdigit() else key for key in path.split("/"))
        node = tree
        for key in at:
            node = node[key]
        assert jax.tree.structure(node[last]) == jax.tree.structure(value), path
        assert jax.tree.map(jnp.shape, node[last]) == jax.tree.map(jnp.shape, value), path
        node[last] = value
    return tree


# --- blocks with biases -------------------------------------------------------------------------


class LayerNorm(nnx.Module):
    """Layer norm with a bias. stacked: sizes of leading axes, those of a run of layers."""

    def __init__(self, width: int, stacked: tuple[int, ...] = ()):
        self.scale = parameter_of(jnp.ones((*stacked, width)))
        self.bias = parameter_of(jnp.zeros((*stacked, width)))

    def __call__(self, x_BLD):
        x_BLD = x_BLD - jnp.mean(x_BLD, axis=-1, keepdims=True)
        variance_BL1 = jnp.mean(jnp.square(x_BLD), axis=-1, keepdims=True)
        scaled_BLD = x_BLD * jax.lax.rsqrt(variance_BL1 + 1e-6) * self.scale[...][None, None]
        return scaled_BLD + self.bias[...][None, None]


class GELU(nnx.Module):
    """fc2(gelu(fc1(x))) for the linear layers of a SwiGLU, the first with half as many outputs."""

    def __init__(self, mlp: nnx.Module, width: int):
        self.fc1, self.fc2 = mlp.fc1, mlp.fc2
        for layer, shape in ((self.fc1, (-1, width)), (self.fc2, (width, -1))):
            kernel = layer.kernel[...]
            size = [n if m < 0 else m for n, m in zip(kernel.shape[-2:], shape)]
            layer.kernel = parameter_of(jnp.zeros((*kernel.shape[:-2], *size)))

    def __call__(self, x_BLD):
        return self.fc2(jax.nn.gelu(self.fc1(x_BLD), approximate=False))


class AfterFirst(nnx.Module):
    """A stack that does not see the first position of a row, whose output is 0."""

    def __init__(self, stack: nnx.Module):
        self.stack = stack

    def __call__(self, x_BLD, context):
        ids_BL = context.segment_ids_BL[:, 1:]
        later_BLD = self.stack(x_BLD[:, 1:], context._replace(segment_ids_BL=ids_BL))
        return jnp.pad(later_BLD, ((0, 0), (1, 0), (0, 0)))


def parameter_of(value: jax.Array) -> nnx.Param:
    return nnx.Param(value.astype(jnp.float32))


def with_biases(module: nnx.Module, mlp_width: int = 0) -> None:
    """Put biases into all linear layers and norms of the module, and GELU into MLPs."""
    for _, node in list(nnx.iter_modules(module)):
        for name, child in list(vars(node).items()):
            if isinstance(child, RMSNorm):
                scale = child.scale[...]
                setattr(node, name, LayerNorm(scale.shape[-1], scale.shape[:-1]))
            elif isinstance(child, SwiGLU):
                setattr(node, name, GELU(child, mlp_width))
    for _, node in list(nnx.iter_modules(module)):
        if isinstance(node, nnx.Linear) and node.bias is None:
            *stacked, _, d_out = node.kernel[...].shape
            node.bias, node.use_bias = parameter_of(jnp.zeros((*stacked, d_out))), True
