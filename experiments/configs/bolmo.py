"""Bolmo's chunking at the size of the default job.

python -m experiments.pretrain bolmo --data.files english.txt
"""

from dataclasses import replace

from experiments.configs import default
from experiments.configs.systems import one_stage
from hnet.chunking.losses.bce import BCE
from hnet.train.config import Config


def bolmo() -> Config:
    """Bolmo: a router with one byte of lookahead learns the cuts of a subword tokenizer.

    The router compares the states of a byte and the next one, so an end at t is known at t + 1.
    Bolmo makes it known at t by symbols that are a byte and a boundary; here chunk t is read from
    t + 1 on, so text is scored and generated without such symbols.

    Paper: arXiv 2512.15586
    Fidelity: router as in allenai/bolmo-core (p has no floor), read one byte late; the labels are
    cuts of a unigram model of the text, or of any tokenizer.json (data.labels); layers of the
    default job in place of mLSTM, which is layer l (--model.stages.0.arch_layout l2 l2), and the
    inner network is trained from scratch; no boundaries at the k highest p, which need the whole
    row
    Test: tests/chunking/systems/test_bolmo.py: boundaries, log p and gradients with lookahead 0
    and 1; tests/nn/test_mlstm.py: mLSTM
    """
    base = default.config()
    loss = BCE.Config(labels="given", late=True)
    model = one_stage(6.0, pool="last_before", dechunk="repeat", losses=(loss,))
    return replace(base, model=model, data=replace(base.data, labels="unigram:10000"))
