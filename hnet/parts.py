"""Parts: exchangeable components of the network, selected by name in a configuration.

A part is a class in its own file, with its settings as a nested class `Config`. A table has one
line per part, ``name: "module:Class"``, and imports a class on first use. A configuration can also
name a class outside of the table as ``"my_paper.hazard:Hazard"``.
"""

import dataclasses
import difflib
import importlib
import traceback
from typing import Any, ClassVar

from hnet.errors import ConfigError, first_line


def find_object(place: str, what: str) -> Any:
    """The object "package.module:name"; None if its module does not have it.

    Raises a one-line ConfigError that begins with `what` if the module cannot be imported: it may
    be a user's, so any error in it names the file and the line.
    """
    module, _, name = place.partition(":")
    try:
        return getattr(importlib.import_module(module), name, None)
    except ImportError as e:
        why = str(e)
        if e.name and f"{module}.".startswith(f"{e.name}."):
            why += ": start in the folder that has it, or set PYTHONPATH"
    except Exception as e:  # code of the module runs
        last = traceback.extract_tb(e.__traceback__)[-1]
        why = first_line(e)
        if "importlib" not in last.filename:
            why = f"{last.filename}, line {last.lineno}: {why}"
    raise ConfigError(f"{what} {place!r} cannot be imported: {why}")


class Table:
    """The parts of one kind. An unknown name raises ConfigError."""

    def __init__(self, kind: str, names: dict[str, str]):
        """kind: its name in errors ("boundary predictor"). names: name -> "module:Class"."""
        self.kind, self.names = kind, names
        self.a_kind = f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"

    def find(self, name: str) -> Any:
        """The class for a name or a "module:Class". Raises ConfigError if there is none."""
        place = self.names.get(name, name if ":" in name else None)
        if place is None:
            near = difflib.get_close_matches(name, self.names, 1) or self.names
            raise ConfigError(
                f"{self.kind} {name!r} is unknown: use {', '.join(near)}, or package.module:Class"
            )
        module, _, class_name = place.partition(":")
        found: Any = find_object(place, self.kind)
        settings = getattr(found, "Config", None)
        if not (isinstance(settings, type) and issubclass(settings, Settings)):
            raise ConfigError(
                f"{self.kind} {name!r} is no part: {module} needs a class {class_name!r} that "
                "nests its settings as Config"
            )
        if settings.table is not self:
            raise ConfigError(f"{self.kind} {name!r} is {settings.table.a_kind}")
        return found

    def name_of(self, part: type) -> str:
        """Name with which `find` returns this class."""
        place = f"{part.__module__}:{part.__qualname__}"
        return next((name for name, known in self.names.items() if known == place), place)


@dataclasses.dataclass(frozen=True)
class Settings:
    """Base of every part's `Config`, a frozen dataclass.

    part: the class that it configures. table: the table of its kind. traced: names of the fields
    that a compiled program takes as inputs, so that a sweep over them does not recompile.
    """

    part: ClassVar[type]
    table: ClassVar[Table]
    traced: ClassVar[tuple[str, ...]] = ()

    @property
    def name(self) -> str:
        return self.table.name_of(self.part)

    def problem(self) -> str | None:
        """One line, "field=value: remedy", for a setting that cannot work; None if all can."""
        return None

    def problem_in(self, owner: Any) -> str | None:
        """The same for a setting that does not fit the configuration that the part belongs to: the
        `ChunkingConfig` of its stage, or `HNetConfig` for an embedding."""
        return None

    def problem_at_width(self, d_model: int) -> str | None:
        """The same for a setting that does not fit the width of the part's stage."""
        return None

    def problem_at(self, place: Any) -> str | None:
        """The same for a setting that does not fit the widths at the part's `Place`."""
        return None

    def streaming_problem(self) -> str | None:
        """The same for a setting that supports whole rows, but not streaming."""
        return None

    def training_problem(self, data: Any) -> str | None:
        """The same for a setting that needs an input that a training run with these settings of its
        data (`hnet.data.DataConfig`) does not have."""
        return None

    def read_files(self) -> None:
        """Read the files that the part's initial parameters come from, before a new run begins.

        Raises ConfigError. A checkpoint holds these parameters, so later nothing reads the files.
        """

    def numbers(self) -> dict[str, float]:
        """The traced fields and their values."""
        return {name: getattr(self, name) for name in self.traced}

    def with_numbers(self, numbers: dict[str, Any] | None) -> Any:
        """These settings with arrays as the values of the traced fields."""
        return dataclasses.replace(self, **numbers) if numbers else self

    def without_numbers(self) -> Any:
        """These settings with defaults in the traced fields: a compiled program's static part."""
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        return dataclasses.replace(self, **{name: defaults[name] for name in self.traced})


def settings_of(part: Any, table: Table) -> Settings:
    """Settings of a part that is given as its settings, its class or its name."""
    if isinstance(part, Settings):
        return part
    if isinstance(part, str):
        part = table.find(part)
    if isinstance(part, type) and issubclass(part, Part):
        return part.Config()
    raise TypeError(f"{table.kind} {part!r}: give its settings, its class or its name")


class Part:
    """Base of all parts. A subclass without its own `Config` gets one without fields."""

    Config: ClassVar[type[Settings]]

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if "Config" not in cls.__dict__ and hasattr(cls, "Config"):
            doc = f"{cls.__name__} has no settings."
            own = type("Config", (cls.Config,), {"__doc__": doc, "__module__": cls.__module__})
            cls.Config = dataclasses.dataclass(frozen=True)(own)
        if "Config" in cls.__dict__:
            cls.Config.part = cls
