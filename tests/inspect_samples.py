"""Probe texts in many scripts, and synthetic segmentations that resemble those of a model."""

import numpy as np

from hnet.inspect.gold import annotate
from hnet.inspect.segmentation import Segmentation

HOSTILE = "<img src=x onerror=\"document.title='pwned'\"> & <b>bold</b> </script> [a](javascript:x)"
TEXTS = {
    "english": ("Latin", "The lighthouse keeper counted seven ships before the unbreakable fog "
                "rolled in, and no one on the pier remembered how quietly the evening began."),
    "arabic": ("Arabic", "كتب الولد رسالة طويلة إلى صديقته في المدينة القديمة ثم عاد إلى البيت."),
    "hebrew": ("Hebrew", "בַּבֹּקֶר יָצְאוּ הַיְלָדִים אֶל הַשָּׂדֶה, and 3 English words."),
    "hindi": ("Devanagari", "बच्चे नदी के किनारे खेल रहे थे और सूरज धीरे-धीरे डूब रहा था।"),
    "chinese": ("Han", "我们昨天在河边看见了三只白色的鸟,它们慢慢地飞走了。"),
    "thai": ("Thai", "เมื่อวานนี้เด็กๆไปเล่นน้ำที่แม่น้ำใกล้บ้าน"),
    "turkish": ("Latin", "Evlerimizdekilerden hiçbiri dün akşam gelmedi, çünkü yağmur yağıyordu."),
    "tabs": ("Latin", "def area(width, height=1.5):\n\tif width < 0:\n\t\traise ValueError()\n"
             "\treturn width * height  # square metres\n"),
    "emoji": ("Latin", "A family 👨‍👩‍👧 and a flag 🏳️‍🌈, cafe\u0301 naïve \u202eevil\u202c."),
    "hostile": ("Latin", HOSTILE),
}  # fmt: skip
BROKEN = b"valid caf\xc3\xa9, then \xff\xfe and \xe2\x82 cut short, \x00\x1b[31m end\xc3"


def probe_texts() -> list[Segmentation]:
    """Texts with routes and gold words, without stages."""
    texts = [
        Segmentation(text.encode(), name, routes=((0, route),))
        for name, (route, text) in TEXTS.items()
    ]
    texts.append(Segmentation(BROKEN, "invalid bytes", routes=((0, "Latin"), (19, "Common"))))
    return [annotate(t, "words") if t.name not in ("chinese", "thai") else t for t in texts]


def segment(text: Segmentation, skill: float, rng: np.random.Generator) -> Segmentation:
    """Two stages whose boundaries go from chance (skill 0) to the gold words (skill 1)."""
    length = len(text.data)
    wanted = np.zeros(length)
    wanted[[0, *text.gold.get("words", range(0, length, 6))]] = 1
    noise = rng.beta(1, 3, length)
    p0 = np.clip(skill * (0.1 + 0.85 * wanted) + (1 - skill) * noise * 1.4, 0, 1)
    p0[0] = 1
    p1 = rng.beta(0.9, 1.6, int((p0 > 0.5).sum()))
    p1[0] = 1
    return Segmentation.from_router(
        text.data,
        [(p0 > 0.5, p0), (p1 > 0.5, p1)],
        name=text.name,
        routes=[next(n for s, n in reversed(text.routes) if s <= i) for i in range(length)],
        gold=text.gold,
        nats=np.random.default_rng(length).exponential(2 - skill, length),
    )
