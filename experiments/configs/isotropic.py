"""Networks that do not chunk: the baselines of every comparison.

    python -m experiments.pretrain bytes_transformer --data.files 'text/*.txt'

Over bytes, or over the tokens of --data.tokenizer (with --model.vocab_size). They have one stage as
wide as the main network of the `default` job, and its blocks: pre-norm, rotary positions, dense
causal attention with a SwiGLU MLP, or Mamba-2. `experiments.compare` scales their widths to the
cost of the systems that they are compared with.
"""

from dataclasses import replace

from experiments.configs import default
from hnet.config import HNetConfig


def bytes_transformer() -> HNetConfig:
    """A Transformer at every byte: 4 layers of attention and SwiGLU."""
    base = default.config().model
    return replace(base, stages=base.stages[-1:])


def bytes_mamba2() -> HNetConfig:
    """Mamba-2 at every byte: 6 layers without MLPs."""
    base = bytes_transformer()
    return replace(base, stages=(replace(base.stages[0], arch_layout=("m6",)),))
