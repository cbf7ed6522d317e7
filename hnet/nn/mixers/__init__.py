"""The table of mixers: the class of each letter of a layout string.

A lower-case letter is the mixer only, upper case the mixer followed by a SwiGLU MLP.
`HNetConfig.mixers` adds letters for your own classes; `hnet.nn.mixers.base.Mixer` is their
interface.
"""

from hnet.errors import ConfigError
from hnet.nn.mixers.base import Mixer
from hnet.parts import find_object

MIXERS: dict[str, str] = {
    "g": "hnet.nn.mixers.gated_deltanet:GatedDeltaNet",
    "l": "hnet.nn.mixers.mlstm:MLSTM",
    "m": "hnet.nn.mixers.mamba2:Mamba2",
    "t": "hnet.nn.mixers.attention:Attention",
    "x": "hnet.nn.mixers.cross_attention:CrossAttention",
}

Further = tuple[tuple[str, str], ...]
"""pairs of a letter and "package.module:Class" """


def find(letter: str, further: Further = ()) -> type[Mixer]:
    """The mixer class of a letter, in either case. Raises ConfigError if there is none."""
    table = MIXERS | dict(further)
    if letter.lower() not in table:
        raise ConfigError(
            f"letter {letter!r} is unknown: use {', '.join(table)} (upper case: with an MLP), "
            "or name the class of a letter in model.mixers"
        )
    place = table[letter.lower()]
    found = find_object(place, "mixer")
    if not (isinstance(found, type) and issubclass(found, Mixer)):
        raise ConfigError(f"mixer {place!r} is no subclass of hnet.nn.mixers.base.Mixer")
    return found


def reads_memory(layout: str, further: Further = ()) -> str | None:
    """First letter of a layout whose mixer reads `Context.memory`; None if there is none."""
    letters = filter(str.isalpha, layout)
    return next((letter for letter in letters if find(letter, further).reads_memory), None)


def ignores_key_bias(layout: str, further: Further = ()) -> str | None:
    """First letter of a layout whose mixer sees earlier positions of a stack, but takes no bias on
    their keys; None if there is none."""
    letters = filter(str.isalpha, layout)
    return next((letter for letter in letters if not find(letter, further).takes_key_bias), None)


def check_further(further: Further) -> None:
    """Raise ConfigError unless these pairs can be added to the table."""
    letters = [letter for letter, _ in further]
    for letter, place in further:
        if not (len(letter) == 1 and letter.isascii() and letter.islower()):
            raise ConfigError(f"model.mixers has {letter!r}: use one lower-case letter from a to z")
        if letter in MIXERS or letters.count(letter) > 1:
            taken = ", ".join(MIXERS)
            raise ConfigError(f"model.mixers: letter {letter!r} is taken: use another than {taken}")
        if not all(place.partition(":")):
            raise ConfigError(f"model.mixers has {place!r}: use package.module:Class")
