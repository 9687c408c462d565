"""``mmts.yaml`` and flags: what is accepted becomes the numbers that stand there; what is not, one line."""

from __future__ import annotations

import math
import re
import string

import yaml
from fuzzing import fuzz, survives
from hypothesis import strategies as st
from resolving import ALL_FIELDS, CONFIG_FIELDS, LOSS_NAMES, resolve

from mmts_plugins._startup import asks_for_us, means_us, swallowed
from mmts_plugins.adapters.openclip import ADAPTER
from mmts_plugins.config import Config
from mmts_plugins.options import split_flags
from mmts_plugins.presets import presets
from mmts_plugins.record import RECORDED, check_resume, load_file, read_record, record, write_record

NUMBERS = ("alpha", "shift_min", "shift_max", "num_oscillations", "period")
PLAIN = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?")
RECORD = {
    "loss": "mmts-infonce",
    "alpha": 0.04,
    "shift_min": 0.05,
    "shift_max": 0.1,
    "clusters": "t",
    "preset": "clip-cc3m",
    "num_oscillations": 5.0,
    "period": 20.0,
    "start_phase": 0.0,
    "mean_matched": False,
    "shuffle_shifts": None,
    "no_schedule": False,
    "no_shifts": False,
    "missing": "tail",
    "distribution": None,
    "cluster_of": None,
    "key": None,
    "itm_temperature": None,
    "diagnostics_every": 100,
    "total_steps": 100,
    "table_hash": "0f" * 16,
    "host": "OpenCLIP",
    "host_version": "3.3.0",
    "mmts_plugins": "0.1.0",
}
VALID = yaml.safe_dump(RECORD, sort_keys=False).encode()
NAMES = st.sampled_from([*ALL_FIELDS, *RECORDED, "alhpa", "Alpha", "<<", "", "1", "~"])
TEXTS = st.sampled_from(
    [
        *("0.04", "0.1", "010", "1:30", "0x10", "1_0", "1e-2", "1.0e-2", "-1", "+.5", "5.", ".inf", "-.inf", ".nan"),
        *("null", "~", "", "true", "yes", "off", "2001-99-99", "2001-01-01", "!!float 1", "!!int 0.5", "!!str 1"),
        *("!!python/object:os.system x", "&a 1", "*a", "[1, 2]", "{a: 1}", "'0.04'", '"\\0"', '"\\ud800"', "|", "? a"),
        *("9" * 30, "9" * 5000, "1" + "0" * 400 + ".0", "0." + "1" * 300, "mmts", "mmst", "tail", "clip-cc3m", "!!set"),
        *("- 1", "a: b", "<<", "@x", "%x", "\t", "0.04 # x", "mmts-infonce", "vast-clip", "1.0e+999", "5e-324", "noun"),
    ]
)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
    st.just(10**400),
    st.dates(),
    st.binary(),
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner) | st.dictionaries(SCALARS, inner, max_size=3), max_leaves=6
)


def refused_or_true(path, content: bytes) -> None:
    """The file's numbers are what its text says in decimal, and the configuration's are those."""
    path.write_bytes(content)
    found = survives(lambda: load_file(path))
    if found is None:
        return
    text = content.decode("utf-8-sig")
    lines = [line.partition(":") for line in text.splitlines()]
    for name in NUMBERS:
        value = found.get(name)
        if value is None:
            continue
        assert isinstance(value, float)
        assert math.isfinite(value)
        written = [rest.split(" #")[0].strip() for key, _, rest in lines if key.strip() == name]
        if len(written) == 1 and PLAIN.fullmatch(written[0]):  # block style, as nearly always
            assert value == float(written[0]), (name, written)
    config = survives(lambda: resolve({"mmts_config": str(path)}))
    if config is None:
        return
    base = presets()[config.preset or ADAPTER.default_preset(config.loss)]
    for name in ("alpha", "shift_min", "shift_max"):
        assert getattr(config, name) == found.get(name, getattr(base, name))
    assert_sound(config)


def assert_sound(config: Config) -> None:
    assert config.loss in ("mmts-infonce", "mmts-max-margin")
    assert config.shift_min <= config.shift_max
    assert (config.num_oscillations is None) != (config.period is None)
    assert config.lowest > 0 or (config.loss == "mmts-max-margin" and config.lowest >= 0)
    for steps in (1, 10**9):
        period = config.period_steps(steps)
        assert math.isfinite(period)
        assert period > 0
        assert math.isfinite(steps / period)


@fuzz(st.lists(st.tuples(st.integers(0, len(VALID) - 1), st.binary(max_size=4), st.integers(0, 6)), max_size=3))
def test_damaged_bytes(tmp_path_factory, damage):
    content = VALID
    for place, put, taken in damage:
        content = content[:place] + put + content[place + taken :]
    refused_or_true(folder(tmp_path_factory) / "bytes.yaml", content)


@fuzz(st.lists(st.tuples(NAMES, TEXTS), max_size=5), st.booleans())
def test_lines_of_yaml(tmp_path_factory, lines, begin_valid):
    content = (VALID.decode() if begin_valid else "loss: mmts\nclusters: t\n") + "\n".join(
        f"{name}: {text}" for name, text in lines
    )
    refused_or_true(folder(tmp_path_factory) / "lines.yaml", content.encode("utf-8", "surrogatepass"))


@fuzz(st.dictionaries(NAMES, TEXTS, min_size=1, max_size=4))
def test_a_valid_file_with_values_exchanged(tmp_path_factory, changes):
    lines = [line.partition(":") for line in VALID.decode().splitlines()]
    text = "\n".join(f"{name}:{f' {changes[name]}' if name in changes else rest}" for name, _, rest in lines)
    refused_or_true(folder(tmp_path_factory) / "values.yaml", text.encode("utf-8", "surrogatepass"))


@fuzz(st.dictionaries(st.sampled_from([*ALL_FIELDS, *RECORDED]) | SCALARS, VALUES, max_size=4), st.booleans())
def test_structures(tmp_path_factory, values, begin_valid):
    content = yaml.safe_dump({**(RECORD if begin_valid else {}), **values}, sort_keys=False)
    refused_or_true(folder(tmp_path_factory) / "structures.yaml", content.encode())


@fuzz(st.dictionaries(st.sampled_from(list(CONFIG_FIELDS)), VALUES, max_size=4))
def test_configs_made_in_python(values):
    good = {name: RECORD[name] for name in CONFIG_FIELDS} | {"period": None}
    config = survives(lambda: Config(**{**good, **values}))
    if config is not None:
        assert_sound(config)
        assert all(getattr(config, name) == value for name, value in values.items())


@fuzz(
    st.floats(0, 0.05),
    st.floats(0.05, 1e4),
    st.floats(1e-6, 1e12),
    st.text("abcdef0123456789.e-:_", min_size=1, max_size=32).filter(str.strip),
    st.text(st.characters(blacklist_characters="\0", blacklist_categories=("Cs",)), min_size=1, max_size=50).filter(
        str.strip
    ),
)
def test_a_record_is_read_as_it_was_written(tmp_path_factory, alpha, shift, period, table_hash, clusters):
    """To the bit, whatever digits a hash and what letters a path has."""
    path = folder(tmp_path_factory) / "record.yaml"
    config = survives(
        lambda: Config("mmts-infonce", alpha, shift, shift, clusters=clusters, period=period, num_oscillations=None)
    )
    if config is None:
        return
    values = record(config, 100, table_hash, "OpenCLIP", table_hash)
    write_record(path, values)
    assert read_record(path) == values
    check_resume(path, values, allow_change=False)
    again = resolve({"mmts_config": str(path)})
    assert {**again.values, "preset": None} == {**dict.fromkeys(again.own), **config.values, "preset": None}


FLAGS = st.sampled_from(
    [
        *("--loss", "--loss=", "--loss=mmts", "--loss=reduce", "--los", "--loss-", "--loss-d=mmts", "--loss-dist-impl"),
        *("--mmts-alpha", "--mmts-alpha=", "--mmts-alpha=--", "--mmts-alpha=0.02", "--mmts-shift-min", "--mmts-period"),
        *("--mmts-num-oscillations", "--mmts-no-shifts", "--mmts-no-schedule", "--mmts-no-shifts=1", "--mmts-preset"),
        *(
            "--mmts-missing",
            "--mmts-diagnostics-every",
            "--mmts-clusters",
            "--mmts-clusters=t",
            "--mmts-config=/dev/null",
        ),
        *(
            "--mmts-key",
            "--mmts-distribution",
            "--mmts",
            "--mmts-",
            "--mmts-alhpa",
            "--mmts-alpha-=1",
            "--lr",
            "--",
            "-",
        ),
    ]
)
WORDS = st.one_of(
    st.sampled_from(
        [
            *(
                "mmts",
                "mmts-infonce",
                "mmts-max-margin",
                "MMTS",
                "mmtss",
                "reduce",
                "gather",
                "0.04",
                "-1",
                "-.5",
                "nan",
            ),
            *("inf", "1e-3", "1e999", "1_0", "0x1", "9" * 5000, "", " ", "tail", "mean", "clip-cc3m", "t", "a\0b", "é"),
            *("\udce9", "\ud800", "x" * 5000, "١٢", "--mmts-alpha", "a=b", "clip", "5", "30", "noun"),
        ]
    ),
    st.text(string.printable, max_size=8),
)


@fuzz(st.lists(st.one_of(FLAGS, WORDS), max_size=8))
def test_flags(argv):
    split = survives(lambda: split_flags(argv))
    if split is None:
        return
    flags, rest = split
    words = iter(rest)  # what is left is the host's, in its order
    left = next(words, None)
    for word in argv:
        if word == left:
            left = next(words, None)
    assert left is None
    asked = rest[: rest.index("--")] if "--" in rest else rest
    assert not [word for word in asked if word.startswith("--mmts")]
    for name in ("alpha", "shift_min", "shift_max", "period", "num_oscillations"):
        if f"mmts_{name}" in flags:
            flag = f"--mmts-{name.replace('_', '-')}"
            given = [
                value if equals else after
                for (head, equals, value), after in zip((w.partition("=") for w in argv), [*argv[1:], ""])
                if head == flag
            ]
            assert any(flags[f"mmts_{name}"] == float(text) for text in given if _is_float(text))
    if flags.get("loss") in LOSS_NAMES:
        assert asks_for_us(["open_clip_train", *argv])
    config = survives(lambda: resolve(flags)) if flags else None
    if config is not None:
        assert_sound(config)
        for name in NUMBERS:
            if f"mmts_{name}" in flags:
                assert getattr(config, name) == flags[f"mmts_{name}"]


def _is_float(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


@fuzz(
    st.sampled_from([*LOSS_NAMES, "MMTS", "mmtss", "mmt", "mts", "mmst", "mm-ts"]),
    st.integers(len("--los"), len("--loss-dist-impl")),
    st.booleans(),
    st.lists(st.sampled_from(["--lr", "1", "--name", "mmts", "reduce"]), max_size=3),
)
def test_no_abbreviation_is_swallowed(loss, end, equals, around):
    name = "--loss-dist-impl"[:end]
    argv = [*around, *([f"{name}={loss}"] if equals else [name, loss])]
    assert survives(lambda: swallowed(argv)) is not None
    assert survives(lambda: swallowed(around)) is None


@fuzz(st.one_of(st.text(max_size=12), st.sampled_from(["bidir", "shift", "reduce", "gather", "nce", "itc", "mse"])))
def test_whatever_is_called_a_loss_can_be_asked_about(value):
    survives(lambda: asks_for_us(["--loss", value]))
    if value in ("bidir", "shift", "reduce", "gather", "nce", "itc", "mse"):
        assert not means_us(value)


_folders: list = []


def folder(factory):
    """One for all cases: making one costs more than a case."""
    if not _folders:
        _folders.append(factory.mktemp("fuzz"))
    return _folders[0]
