"""The published H-Nets (arXiv 2507.07955) with their published training recipe.

    python -m experiments.pretrain 1stage_L --data.files 'fineweb-edu/*.array_record'
    python -m tpu.plan 2stage_XL --topology v5p:4x4x4 --mesh.fsdp 16

256 rows of 8192 bytes per update, AdamW with the published schedule and multipliers, 100 billion
GPT-2 tokens (460 GB) of FineWeb-Edu. The paper does not give betas, weight decay and clipping.

The text: FineWeb-Edu has a sample of 100 billion tokens as Parquet files on the Hugging Face Hub.
`2stage_XL_chinese` was trained on FineWeb-Edu-Chinese-V2.1, `2stage_XL_code` on the GitHub part of
The Pile.

    hf download HuggingFaceFW/fineweb-edu --repo-type dataset --include 'sample/100BT/*' \\
      --local-dir text
    python -m hnet.data prepare --files 'text/sample/100BT/*.parquet' --out fineweb-edu

These runs need accelerators. `MESHES` has further words of the command line for two machines:
a TPU v5p-128 (64 chips) and one host of 8 H100; `tpu.published` prints what each of them needs,
`tpu.plan --search` finds settings for others.
"""

from dataclasses import replace

from experiments.configs import default
from hnet.config import PUBLISHED, ComputeConfig
from hnet.train.config import CheckpointConfig, Config, EvalConfig, OptimConfig

ROWS, SEQ_LEN = 256, 8192
MESHES = {
    "v5p:4x4x4": "--mesh.fsdp 16 --model.compute.remat dots",
    "h100:8": "--mesh.fsdp 8 --model.compute.remat dots --model.compute.ssd_backend triton "
    "--train.accumulate 8",
}
"""settings of these runs by the name of the machine in `tpu.plan`"""
STEPS = round(100e9 * 4.6 / (ROWS * SEQ_LEN))


def config_1stage_L() -> Config:
    """H-Net with 1 stage, L: 680M parameters.

    Paper: arXiv 2507.07955
    Fidelity: network, schedule and multipliers as published; betas, weight decay and clipping are
    not published
    Test: tests/weights/test_official.py, tests/interop/test_parity.py
    """
    return _published("1stage_L", 6.25e-4)


def config_1stage_XL() -> Config:
    """H-Net with 1 stage, XL: 1.3B parameters.

    Paper: arXiv 2507.07955
    Fidelity: network, schedule and multipliers as published; betas, weight decay and clipping are
    not published
    Test: tests/weights/test_official.py, tests/interop/test_parity.py
    """
    return _published("1stage_XL", 5e-4)


def config_2stage_L() -> Config:
    """H-Net with 2 stages, L: 870M parameters.

    Paper: arXiv 2507.07955
    Fidelity: network, schedule and multipliers as published; betas, weight decay and clipping are
    not published
    Test: tests/weights/test_official.py, tests/interop/test_parity.py
    """
    return _published("2stage_L", 6.25e-4)


def config_2stage_XL() -> Config:
    """H-Net with 2 stages, XL: 1.6B parameters.

    Paper: arXiv 2507.07955
    Fidelity: network, schedule and multipliers as published; betas, weight decay and clipping are
    not published
    Test: tests/weights/test_official.py, tests/interop/test_parity.py
    """
    return _published("2stage_XL", 5e-4)


def config_2stage_XL_chinese() -> Config:
    """H-Net with 2 stages, XL, as trained on Chinese.

    Paper: arXiv 2507.07955
    Fidelity: network, schedule and multipliers as published; betas, weight decay and clipping are
    not published
    Test: tests/weights/test_official.py, tests/interop/test_parity.py
    """
    return _published("2stage_XL_chinese", 5e-4)


def config_2stage_XL_code() -> Config:
    """H-Net with 2 stages, XL, as trained on code.

    Paper: arXiv 2507.07955
    Fidelity: network, schedule and multipliers as published; betas, weight decay and clipping are
    not published
    Test: tests/weights/test_official.py, tests/interop/test_parity.py
    """
    return _published("2stage_XL_code", 5e-4)


def _published(name: str, learning_rate: float) -> Config:
    base = default.config()
    return replace(
        base,
        model=replace(PUBLISHED[name], compute=ComputeConfig(dtype="bfloat16", remat="layer")),
        data=replace(base.data, batch_size=ROWS, seq_len=SEQ_LEN),
        optim=OptimConfig(learning_rate=learning_rate),
        train=replace(base.train, steps=STEPS),
        eval=EvalConfig(every=1000),
        checkpoint=CheckpointConfig(every=1000),
    )
