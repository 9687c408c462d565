"""What a value from outside may be, and how a message shows it."""

from __future__ import annotations

import math
import time
import zipfile

import pytest

from mmts_plugins.errors import ConfigError, MMTSError, TableError, last_resort, reading, shown
from mmts_plugins.fields import NUMBER, SWITCH, TEXT, TEXTS, WHOLE, Field, check_mapping


@pytest.mark.parametrize(
    ("field", "good", "bad"),
    [
        (Field(NUMBER, least=0), [0, 0.5, 3], [None, math.nan, math.inf, -1, True, "1", 10**400, [1]]),
        (Field(NUMBER, above=0, most=2), [0.1, 2], [0, 2.1]),
        (Field(WHOLE, least=0), [0, 7, 100.0], [1.5, -1, math.nan, 10**30, False]),
        (Field(TEXT, null=True), [None, "a", "b c"], ["", " ", "a\0b", 1, "\ud800", "x" * 5000]),
        (Field(TEXT, choices=("tail", "mean")), ["tail"], ["tial", None]),
        (Field(SWITCH), [True, False], [0, "yes", None]),
        (Field(TEXTS), [["a", ""]], [[], "a", [1], ["a\0"]]),
    ],
)
def test_a_field_takes_what_may_stand_there(field, good, bad):
    for value in good:
        assert field.check("--x", value) == value
    for value in bad:
        with pytest.raises(ConfigError, match="--x") as caught:
            field.check("--x", value)
        assert len(str(caught.value)) < 300


def test_a_mapping_names_what_is_wrong_in_it():
    fields = {"alpha": Field(NUMBER), "missing": Field(TEXT, choices=("tail",))}
    assert check_mapping("f.yaml", {"alpha": 1}, fields) == {"alpha": 1.0}
    for values, message in [
        ({"alhpa": 1}, "f.yaml: unknown field 'alhpa'; did you mean 'alpha'"),
        ({1: 1}, "unknown field 1; known: alpha, missing"),
        ({"alpha": "x"}, "f.yaml: field 'alpha' is 'x': it must be a number"),
        ([], r"f.yaml: \[\] is not a mapping"),
    ]:
        with pytest.raises(TableError, match=message):
            check_mapping("f.yaml", values, fields, error=TableError)
    with pytest.raises(ConfigError, match="field 'missing' is missing"):
        check_mapping("f.yaml", {"alpha": 1}, fields, required=["missing"])


def test_messages_are_one_short_line():
    laughs: object = "lol"
    for _ in range(30):
        laughs = [laughs] * 9  # written out: 9^30 words
    circular: list[object] = []
    circular.append(circular)
    started = time.process_time()
    for value in (laughs, circular, 10**100_000, "x" * 10**7, {"a": {"b": {"c": laughs}}}, "a\nb\x1b[31m"):
        assert len(shown(value)) < 400
        assert shown(value).isprintable()
    assert time.process_time() - started < 1
    message = str(MMTSError("beginning\n" + "\t word" * 10_000 + "\x07 the remedy"))
    assert message.startswith("beginning word")
    assert message.endswith(r"\x07 the remedy")
    assert len(message) == 480
    assert message.isprintable()


@pytest.mark.parametrize(
    "error", [RecursionError("x" * 10**6), MemoryError(), zipfile.BadZipFile("bad"), KeyError("count"), ValueError()]
)
def test_whatever_a_parser_raises_becomes_one_error_that_names_the_file(error):
    with pytest.raises(TableError, match=r"^a.parquet: cannot be read: \S"):
        with reading("a.parquet", "cannot be read", TableError):
            raise error


def test_our_own_errors_and_interrupts_pass():
    for error in (ConfigError("ours"), KeyboardInterrupt("ours")):
        with pytest.raises(type(error), match=str(error)):
            with reading("a", "cannot be read"):
                raise error


def test_the_last_resort_names_the_place():
    try:
        {}["x"]
    except KeyError as error:
        message = last_resort(error)
    assert message.startswith("KeyError in test_fields.py:")
    assert "fault of mmts-plugins" in message
    assert last_resort(FileNotFoundError(2, "No such file", "a.csv")) == "a.csv: No such file"
    assert last_resort(ConfigError("ours")) == "ours"
