"""The recipe on which the official H-Net code was measured at 3.2M parameters.

    python -m experiments.pretrain reference --data.files 'books/*.txt' --data.eval_files book.txt

750 updates of 8 x 512 bytes of English prose, AdamW at 1e-3, 10% warm-up and cosine decay, target
4 bytes per chunk, no BOS or EOS. About 12 minutes on two CPU cores. The official model with plain
kernels reaches 2.23 bits per byte on a book it was not trained on.
"""

from dataclasses import replace

from experiments.configs import default
from hnet.train.config import Config, OptimConfig


def config() -> Config:
    base = default.config()
    return replace(
        base,
        workdir="runs/reference",
        data=replace(base.data, bos_eos=False),
        train=replace(base.train, steps=750),
        optim=OptimConfig(learning_rate=1e-3, schedule="cosine", lr_multipliers="none"),
        eval=replace(base.eval, every=250),
        checkpoint=replace(base.checkpoint, every=250),
    )
