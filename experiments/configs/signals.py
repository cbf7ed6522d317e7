"""H-Nets on the raw bytes of other signals: 8-bit sound, and rows of pixels.

    python -m experiments.pretrain audio_small --data.files 'sound/*.bin'
    python -m experiments.pretrain image_rows_small --data.files 'images/*.bin'

About 4 minutes each on two CPU cores. Files that end in .bin are read as they are, one document
each, without BOS and EOS, since all 256 values occur. For example

    ffmpeg -i a.flac -ac 1 -ar 8000 -f u8 sound/a.bin
    magick a.png -resize '64x64!' -depth 8 gray:images/a.bin

No published scale: these H-Nets were not measured on such data. Bits per byte are bits per sample
and bits per pixel.
"""

from dataclasses import replace

from experiments.configs import default
from experiments.configs.systems import one_stage
from hnet.train.config import Config

IMAGE_WIDTH = 64


def audio_small() -> Config:
    """H-Net for 8-bit sound: 8 samples per chunk, 1.1 million bytes."""
    return _raw("audio_small", target_ratio=8.0)


def image_rows_small() -> Config:
    """H-Net for gray images of 64 x 64 pixels, row by row: 4 pixels per chunk.

    A row of the batch is 16 rows of pixels, so that the pixels above are seen.
    """
    base = _raw("image_rows_small", target_ratio=4.0)
    return replace(base, data=replace(base.data, batch_size=4, seq_len=16 * IMAGE_WIDTH))


def _raw(name: str, *, target_ratio: float) -> Config:
    base = default.config()
    return replace(
        base,
        workdir=f"runs/{name}",
        model=one_stage(target_ratio, hold_rate=True),
        data=replace(base.data, bos_eos=False),
        train=replace(base.train, steps=270),
        eval=replace(base.eval, every=135),
    )
