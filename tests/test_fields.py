"""Configurations as JSON, as dotted fields and as command-line words; parts by name."""

import json
import sys
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hnet import command_help
from hnet.bounds import Bounds, Count, Positive, Share
from hnet.command_line import parse, split_words
from hnet.dotted import differences, flatten, with_fields
from hnet.errors import ConfigError, shown
from hnet.fields import FieldError, check, from_json, to_json
from hnet.parts import Part, Settings, Table

COOKS = Table("cook", {"baker": f"{__name__}:Baker", "grill": f"{__name__}:Grill"})


class Cook(Part):
    """Base of the parts of these tests."""

    class Config(Settings):
        table = COOKS


class Baker(Cook):
    """Bakes."""

    @dataclass(frozen=True)
    class Config(Cook.Config):
        heat: Positive = 200.0
        """Degrees of the oven."""
        trays: tuple[int, ...] = (1, 2)
        """Trays in use."""


class Grill(Cook):
    """Grills."""


class Stranger(Cook):
    """A part that no table names."""

    @dataclass(frozen=True)
    class Config(Cook.Config):
        sauce: str = "red"


@dataclass(frozen=True)
class Course:
    """One course."""

    cook: Cook.Config = Baker.Config()
    """Who makes it."""
    helpers: tuple[Cook.Config, ...] = ()
    size: Count = 3
    """Plates."""


@dataclass(frozen=True)
class Menu:
    """A menu."""

    courses: tuple[Course, ...] = (Course(), Course(Grill.Config()))
    """From the first to the last."""
    kind: Literal["cold", "warm"] = "warm"
    price: Literal["free"] | tuple[Share, ...] = "free"
    guests: Annotated[int, Bounds(0, 9)] | None = None
    tables: tuple[tuple[str, ...], ...] = ()
    place: str = ""
    open_air: bool = False
    temperature: float = 20.5


MENU = Menu()


def test_json_names_parts_and_reads_back_what_it_wrote():
    content = json.loads(json.dumps(to_json(MENU)))
    first, second = (course["cook"] for course in content["courses"])
    assert first == {"name": "baker", "heat": 200.0, "trays": [1, 2]}
    assert second == {"name": "grill"}
    assert from_json(Menu, content) == MENU
    stranger = replace(MENU, courses=(Course(Stranger.Config("green")),))
    content = json.loads(json.dumps(to_json(stranger)))
    assert content["courses"][0]["cook"]["name"] == f"{__name__}:Stranger"
    assert from_json(Menu, content) == stranger


finite = st.floats(-3e38, 3e38)


@given(
    st.builds(
        Menu,
        st.lists(
            st.builds(
                Course,
                st.builds(Baker.Config, st.floats(1e-9, 1e9), st.tuples(st.integers(-9, 9))),
                st.lists(st.sampled_from([Grill.Config(), Stranger.Config("ü")])).map(tuple),
                st.integers(1, 2**31 - 1),
            )
        ).map(tuple),
        st.sampled_from(["cold", "warm"]),
        st.just("free") | st.lists(st.floats(0, 1)).map(tuple),
        st.none() | st.integers(0, 9),
        st.lists(st.lists(st.text()).map(tuple)).map(tuple),
        st.text(),
        st.booleans(),
        finite,
    )
)
def test_any_configuration_survives_json(menu):
    check(menu)
    assert from_json(Menu, json.loads(json.dumps(to_json(menu)))) == menu


def test_a_bare_name_is_the_part_with_its_defaults():
    content = {"courses": [{"cook": "baker", "helpers": ["grill", {"name": "baker", "heat": 9}]}]}
    menu = from_json(Menu, content)
    assert menu.courses == (Course(Baker.Config(), (Grill.Config(), Baker.Config(9.0))),)


BROKEN = {
    "def f(:": "SyntaxError: .*broken.py, line 1",
    "\nx = undefined": "broken.py, line 2: NameError: name 'undefined' is not defined",
    "raise OSError('no\\nfile')": "broken.py, line 1: OSError: no$",
    "import no_such_package": "No module named 'no_such_package'$",
}


@pytest.mark.parametrize("source", BROKEN)
def test_a_part_in_a_broken_module_is_refused_in_one_line(source, tmp_path, monkeypatch):
    (tmp_path / "broken.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "broken", raising=False)
    with pytest.raises(ConfigError, match=f"cook 'broken:Thing' cannot.*{BROKEN[source]}"):
        COOKS.find("broken:Thing")


@pytest.mark.parametrize("place", [":Thing", ".here:Thing", "..:", "no_such:Thing"])
def test_a_part_without_a_module_is_refused_in_one_line(place):
    with pytest.raises(ConfigError, match="^cook '.*' cannot be imported: [^\n]*$"):
        COOKS.find(place)


REFUSED = [
    ({"kinds": 1}, "unknown field kinds: did you mean kind?"),
    ({"courses": [{"cook": {"name": "baker", "heats": 1}}]}, "did you mean courses.0.cook.heat?"),
    ({"courses": [{"cook": "bakr"}]}, "courses.0.cook: cook 'bakr' is unknown: use baker"),
    ({"courses": [{"cook": {"heat": 3}}]}, "courses.0.cook={'heat': 3}: expected a cook"),
    ({"courses": [{"cook": 3}]}, r"courses.0.cook=3: expected a cook \(baker, grill\)"),
    ({"courses": [{"cook": f"{__name__}:Menu"}]}, "courses.0.cook: .*is no part"),
    ({"courses": [{"cook": "no.such:Thing"}]}, "courses.0.cook: .*cannot be imported"),
    ({"courses": [{"cook": {"name": "baker", "heat": 0}}]}, "cook.heat=0.0: use above 0"),
    ({"courses": [{"helpers": ["grill", "gril"]}]}, "courses.0.helpers.1: .*use grill"),
    ({"courses": [3]}, "courses.0=3: expected an object"),
    ({"courses": {}}, "courses={}: expected"),
    ({"kind": "warmer"}, "kind='warmer': use one of cold, warm: did you mean warm?"),
    ({"kind": 1}, "kind=1: use one of cold, warm"),
    ({"guests": 10}, "guests=10: use at most 9"),
    ({"guests": True}, "guests=True: expected int"),
    ({"guests": "3"}, "guests='3': expected int .0 to 9. or None"),
    ({"price": [0.5, 1.5]}, "price.1=1.5: use at most 1"),
    ({"price": "dear"}, "price='dear': expected free or"),
    ({"open_air": 1}, "open_air=1: expected True|False"),
    ({"place": None}, "place=None: expected text"),
    ({"temperature": float("nan")}, "temperature=nan: use a finite number"),
    ({"temperature": float("-inf")}, "temperature=-inf: use a finite number"),
    ({"temperature": 10**400}, "temperature=1000.*: use at most"),
    ({"courses": [{"size": 2**31}]}, "courses.0.size=2147483648: use at most 2147483647"),
    ({"courses": [{"size": 1.0}]}, "courses.0.size=1.0: expected int"),
    ([], r"configuration=\[\]: expected an object"),
]  # fmt: skip


@pytest.mark.parametrize(("content", "says"), REFUSED)
def test_what_cannot_be_is_refused_in_one_line(content, says):
    with pytest.raises(ConfigError, match=says) as error:
        from_json(Menu, content)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_what_is_made_in_python_is_checked_alike():
    for menu, says in (
        (replace(MENU, temperature=float("inf")), "temperature=inf: use a finite"),
        (replace(MENU, courses=(Course(size=0),)), "courses.0.size=0: use 1 or more"),
        (replace(MENU, courses=(Course(Baker.Config(-1.0)),)), "courses.0.cook.heat=-1.0: use"),
        (replace(MENU, price=(0.5, -0.5)), "price.1=-0.5: use 0 to 1"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=says):
            check(menu)


def test_values_of_any_depth_are_shown_in_a_line():
    deep: list = []
    for _ in range(900):
        deep = [deep]
    assert len(shown(deep)) < 50 and len(shown("x" * 10**6)) < 100
    with pytest.raises(ConfigError, match="kind=") as error:
        from_json(Menu, {"kind": deep})
    assert len(str(error.value)) < 200


# --- dotted fields --------------------------------------------------------------------------------


def test_dotted_fields_replace_parts_and_their_fields_in_any_order():
    first = {"courses.0.cook.heat": 90, "courses.1.cook": "baker", "courses.1.cook.heat": 7.5}
    for values in (first, dict(reversed(first.items()))):
        courses = with_fields(MENU, values).courses
        assert courses[0].cook == Baker.Config(90.0) and courses[1].cook == Baker.Config(7.5)
    changed = with_fields(MENU, {"courses.0.cook.heat": 1, "courses.0.cook.trays": [5]})
    assert with_fields(changed, {"courses.0.cook": "baker"}) == MENU, "defaults of the part"
    assert MENU.courses[0].cook == Baker.Config(), "nothing is changed in place"
    helpers = {"courses.0.helpers": ["grill", "baker"], "courses.0.helpers.1.heat": 3}
    assert with_fields(MENU, helpers).courses[0].helpers == (Grill.Config(), Baker.Config(3.0))


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("courses.2.size", "unknown field courses.2: known are 0, 1"),
        ("courses.-1.size", "unknown field courses.-1"),
        ("courses.0.cook.heats", "did you mean courses.0.cook.heat?"),
        ("courses.1.cook.heat", "unknown field courses.1.cook.heat: courses.1.cook has no fields"),
        ("kind.of", "unknown field kind.of: kind has no fields"),
        ("", "unknown field : known are courses"),
        ("courses..size", "unknown field courses.: known are 0, 1"),
    ],
)
def test_a_path_that_leads_nowhere(path, says):
    with pytest.raises(FieldError) as error:
        with_fields(MENU, {path: 1})
    assert says in str(error.value)


def test_flatten_is_undone_by_setting_the_fields():
    changes = {"kind": "cold", "courses": {"1": {"cook": {"name": "baker", "heat": 5}}}}
    assert flatten(changes) == {"kind": "cold", "courses.1.cook": {"name": "baker", "heat": 5}}
    inside = {"courses": {"0": {"cook": {"heat": 5}}}, "courses.1.size": 8}
    assert flatten(inside) == {"courses.0.cook.heat": 5, "courses.1.size": 8}


def test_differences_name_the_innermost_fields():
    other = with_fields(MENU, {"courses.1.size": 8, "courses.0.cook.heat": 4})
    found = list(differences(to_json(MENU), to_json(other)))
    assert found == [("courses.0.cook.heat", 200.0, 4.0), ("courses.1.size", 3, 8)]
    other = with_fields(MENU, {"courses.0.cook": "grill"})
    ((path, before, now),) = differences(to_json(MENU), to_json(other))
    assert path == "courses.0.cook" and (before["name"], now["name"]) == ("baker", "grill")
    fewer = to_json(replace(MENU, courses=MENU.courses[:1]))
    assert [path for path, *_ in differences(to_json(MENU), fewer)] == ["courses"]


# --- words ----------------------------------------------------------------------------------------


def test_words_of_all_types():
    words = (
        "--kind cold --price 0.5 1 --guests 4 --tables Ann+Bob Cy --open_air True "
        "--temperature -3e1 --courses.1.cook baker --courses.1.cook.trays 4 5 "
        "--courses.0.helpers grill baker --courses.0.helpers.1.heat=12"
    ).split()
    assert parse(Menu, argv=[*words, "--place", "a b"]) == Menu(
        (
            Course(Baker.Config(), (Grill.Config(), Baker.Config(12.0))),
            Course(Baker.Config(trays=(4, 5))),
        ),
        "cold", (0.5, 1.0), 4, (("Ann", "Bob"), ("Cy",)), "a b", True, -30.0,
    )  # fmt: skip
    assert parse(Menu, argv=["--guests", "3", "--guests", "None"]) == MENU, "the last one counts"
    assert parse(Menu, MENU, ["--price", "free", "--open-air=False", "--place="]) == MENU
    assert parse(Menu, argv=["--courses.0.cook.trays"]).courses[0].cook.trays == ()
    json_words = ["--courses.1.cook", '{"name": "baker", "heat": 3}', "--tables", '[["a+b"]]']
    found = parse(Menu, argv=json_words)
    assert found.courses[1].cook == Baker.Config(3.0) and found.tables == (("a+b",),)
    assert (
        parse(Menu, argv=["--courses.0.cook", f"{__name__}:Stranger"]).courses[0].cook
        == Stranger.Config()
    )


def test_a_suggestion_stays_in_its_section():
    menu = to_json(Menu())
    assert command_help.same_name(Menu, menu, "courses.1.size") == "courses.1.size"
    assert command_help.same_name(Menu, menu, "size") == "courses.0.size or courses.1.size"
    assert command_help.same_name(Menu, menu, "courses.") is None


def test_words_are_split_at_options():
    words = ["--a.b", "x", "-1", "--c-d=--e=1", "--f"]
    assert split_words(words) == {"a.b": ["x", "-1"], "c_d": ["--e=1"], "f": []}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--kinds cold", "unknown field kinds: did you mean kind?"),
        ("--heat 3", "unknown field heat: did you mean courses.0.cook.heat?"),
        ("--size 3", "unknown field size: did you mean courses.0.size or courses.1.size?"),
        ("--oa True", "unknown field oa: did you mean open_air?"),
        ("--h 3", "unknown field h: known are courses,"),
        ("--guests", "guests takes one value (int (0 to 9) or None), none was given"),
        ("--guests 1 2", "guests takes one value (int (0 to 9) or None), 2 were given: '1 2'"),
        ("--place a b", "place takes one value (text), 2 were given: 'a b'"),
        ("--guests 1e3", "guests='1e3': expected int (0 to 9) or None"),
        ("--open_air yes", "open_air='yes': expected True|False"),
        ("--temperature nan", "temperature=nan: use a finite number"),
        ("--temperature 1e999", "temperature=inf: use a finite number"),
        ("--temperature", "temperature takes one value (float), none was given"),
        (f"--guests {'9' * 5000}", "expected int (0 to 9) or None"),
        ("--courses 3", "courses.0='3': expected an object"),
        ("--courses.0 3", "courses.0='3': expected an object"),
        ("--courses.0.cook {", "courses.0.cook='{' is not JSON"),
        (f"--courses.0.cook {100_000 * '['}", "is not JSON"),
        ("--courses.0.helpers grill gril", "courses.0.helpers.1: cook 'gril' is unknown"),
        ("kind cold", "unexpected 'kind': settings are --field VALUE"),
        ("--kind=cold warm", "unexpected 'warm'"),
        ("-kind cold", "unexpected '-kind'"),
        ("--", "unexpected '--'"),
    ],
)
def test_bad_words_are_refused_in_one_line(words, says):
    with pytest.raises(ConfigError) as error:
        parse(Menu, argv=words.split())
    message = str(error.value)
    assert says in message
    assert "\n" not in message and len(message) < 400


def test_help_lists_fields_with_type_value_and_docstring(capsys):
    with pytest.raises(SystemExit) as ended:
        parse(Course, argv=["--help"])
    assert ended.value.code == 0
    shown_help = capsys.readouterr().out
    assert __doc__ in shown_help
    assert "  --cook cook = baker(heat=200.0, trays=1 2)\n        Who makes it." in shown_help
    assert "  --size int (1 or more) = 3\n        Plates." in shown_help
    with pytest.raises(SystemExit):
        parse(Course, argv=["--help", "cook"])
    assert "grill  Grills." in capsys.readouterr().out
    content = to_json(MENU)
    inside = command_help.of_topic(Menu, content, "courses.0.cook")
    assert "Who makes it." in inside and "baker  Bakes." in inside and "grill  Grills." in inside
    assert "--courses.0.cook.heat float (above 0) = 200.0\n        Degrees of the oven." in inside
    assert "Degrees" in command_help.of_topic(Menu, content, "courses.0.cook.heat")
    assert "--courses.1.size" in command_help.of_topic(Menu, content, "courses")
    with pytest.raises(FieldError, match="unknown field course: did you mean courses"):
        command_help.of_topic(Menu, content, "course")
