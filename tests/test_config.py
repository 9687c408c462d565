"""``mmts.yaml`` and flags: what may stand in them, and what is said where something else does."""

from __future__ import annotations

import time

import pytest
from resolving import resolve

from mmts_plugins.config import Config
from mmts_plugins.errors import ConfigError
from mmts_plugins.options import split_flags
from mmts_plugins.presets import presets
from mmts_plugins.preview import Preview
from mmts_plugins.record import check_resume, load_file, read_record, record, write_record


def resolved(*argv: str) -> Config:
    flags, rest = split_flags(["--loss", "mmts", *argv])
    assert rest == []
    return resolve(flags)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("alhpa: 1", r"unknown field 'alhpa'; did you mean 'alpha'\?"),
        ("1: 1", "unknown field 1; known: loss, alpha"),
        ("? [a]\n: 1", "cannot read .*unhashable key"),
        ("alpha: high", "field 'alpha' is 'high': it must be a number"),
        ("alpha: true", "field 'alpha' is True: it must be a number"),
        ("alpha: null", "field 'alpha' is None: it must be a number"),
        ("alpha:", "field 'alpha' is None: it must be a number"),
        ("alpha: [0.04]", r"field 'alpha' is \[0.04\]: it must be a number"),
        ("alpha: .nan", "field 'alpha' is nan: it must be a finite number"),
        ("alpha: 1.0e+999", "field 'alpha' is inf: it must be a finite number"),
        ("alpha: -1", "field 'alpha' is -1: it must be 0 or above"),
        ("shift_max: 1.0e+300", "field 'shift_max' is 1e\\+300: it must be at most 10000"),
        ("period: 1.0e-300", "field 'period' is 1e-300: it must be 1e-06 or above"),
        ("alpha: 010", "field 'alpha' is '010': it must be a number"),  # 8 in YAML
        ("period: 1:30", "field 'period' is '1:30': it must be a number"),  # 90 in YAML
        ("period: 1_0", "field 'period' is '1_0': it must be a number"),
        ("alpha: 0x10", "field 'alpha' is '0x10': it must be a number"),
        ("alpha: 2001-99-99", "field 'alpha' is '2001-99-99': it must be a number"),
        ("alpha: !!timestamp 2001-99-99", "cannot read the MM-TS config: month must be in"),
        ("alpha: !!float high", "cannot read the MM-TS config: could not convert"),
        ("diagnostics_every: 1.5", "field 'diagnostics_every' is 1.5: it must be a whole number"),
        ("diagnostics_every: null", "field 'diagnostics_every' is None"),
        ("diagnostics_every: " + "9" * 40, "field 'diagnostics_every' is 9{40}: too large"),
        ("diagnostics_every: " + "9" * 5000, "cannot read .*Exceeds the limit|field 'diagnostics_every' is <a whole"),
        ("no_shifts: 1", "field 'no_shifts' is 1: it must be true or false"),
        ("missing: maybe", "field 'missing' is 'maybe'; choose from error, tail, mean"),
        ("missing: null", "field 'missing' is None: it must be text"),
        ("preset: clip-cc12m", "field 'preset' is 'clip-cc12m'; did you mean clip-cc3m"),
        ("loss: 5", "field 'loss' is 5: it must be text"),
        ("loss: ''", "field 'loss' is empty"),
        ("clusters: ' '", "field 'clusters' is empty"),
        ('clusters: "a\\0b"', "field 'clusters' is 'a.*b': it holds a NUL character"),
        ("clusters: " + "x" * 5000, "field 'clusters' is 5000 characters long"),
        ("total_steps: -1", "field 'total_steps' is -1"),
        ("alpha: 0.04\nalpha: 0.05", "'alpha' stands there twice"),
        ("a: &a 0.04\nalpha: *a", r"cannot read the MM-TS config: it holds an alias \(\*a\)"),
        ("- a list", "not an MM-TS config"),
        ("", "not an MM-TS config"),
        ("a: [", "cannot read"),
        ("[" * 5000, "cannot read the MM-TS config: nested too deeply"),
        ("!!python/object/apply:os.system ['true']", "cannot read"),
        (b"alpha: \xff", "cannot read the MM-TS config: 'utf-8' codec can't decode"),
        (b"alpha: 0\0", "cannot read the MM-TS config: unacceptable character"),
        (b"alpha: 0.04\n" + b"#" * 70_000, "longer than 65536 bytes"),
    ],
)
def test_bad_config_files(text, message, tmp_path):
    file = tmp_path / "bad.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=rf"bad\.yaml: .*{message}") as caught:
        load_file(file)
    assert len(str(caught.value)) <= 480


def test_aliases_that_grow_are_refused_soon(tmp_path):
    lists = ["a: &a0 [lol,lol,lol,lol,lol,lol,lol,lol,lol]"]
    lists += [f"b{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9)]
    merges = ["a: &a0 {x: 1}"] + [f"b{i}: &a{i} {{<<: [{','.join([f'*a{i - 1}'] * 9)}]}}" for i in range(1, 9)]
    for lines in (lists, merges):
        (tmp_path / "laughs.yaml").write_text("\n".join(lines))
        started = time.process_time()
        with pytest.raises(ConfigError, match=r"laughs\.yaml: .*it holds an alias"):
            load_file(tmp_path / "laughs.yaml")
        assert time.process_time() - started < 1


def test_no_such_config_file(tmp_path):
    for path, message in (
        (tmp_path / "none.yaml", "No such file or directory"),
        (tmp_path, "Is a directory"),
        (tmp_path / ("n" * 300), "File name too long"),
        ("a\0b", "embedded null byte"),
    ):
        with pytest.raises(ConfigError, match=f"cannot read the MM-TS config: {message}"):
            load_file(path)


RECORD = """\
# written by mmts-plugins; compared on resume
loss: mmts-infonce
alpha: 0.04
shift_min: 0.05
shift_max: 0.1
clusters: t
preset: clip-cc3m
num_oscillations: 5.0
period: 20.0
no_schedule: false
no_shifts: false
missing: tail
distribution: null
cluster_of: null
key: null
itm_temperature: null
diagnostics_every: 100
total_steps: 100
table_hash: 123e4567
host: OpenCLIP
host_version: 3.3.0
mmts_plugins: 0.1.0
"""


SPHERE = ("product_sphere", "class_tokens", "distance", "logit_scale", "fixed_logit_scale", "max_logit_scale")


def test_a_record_of_the_first_release_is_read_and_resumed(tmp_path):
    path = tmp_path / "mmts.yaml"
    path.write_text(RECORD)
    config = resolved("--mmts-config", str(path))
    assert config == resolved("--mmts-clusters", "t")
    values = record(config, 100, "123e4567", "OpenCLIP", "3.3.0")
    check_resume(path, values, allow_change=False)
    write_record(path, {**values, "mmts_plugins": "0.1.0"})
    of_now = RECORD.replace("period: 20.0\n", "period: 20.0\nstart_phase: 0.0\n").replace(
        "no_shifts: false\n", "no_shifts: false\nmean_matched: false\nshuffle_shifts: null\n").replace(
        "distribution: null\n", "".join(f"{name}: null\n" for name in SPHERE) + "distribution: null\n").replace(
        "itm_temperature: null\n", "itm_temperature: null\ncolumn: null\ntokenizer: null\ngather: null\n")  # fmt: skip
    assert path.read_text() == of_now
    for name, was, value in (("start_phase", 0.0, 0.5), ("mean_matched", False, True), ("shuffle_shifts", None, 1)):
        path.write_text(RECORD)
        with pytest.raises(ConfigError, match=f"the resumed run differs: {name} was {was} and is {value}"):
            check_resume(path, {**values, name: value}, allow_change=False)
    odd = {**values, "clusters": "caf\udce9/\u00fc.parquet", "table_hash": "1234567", "host_version": "2001-01-01"}
    write_record(path, odd)
    assert {name: read_record(path)[name] for name in odd} == odd


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--mmts-alpha=--"], "--mmts-alpha: invalid float value: '--'"),
        (["--mmts-alpha", "--"], "--mmts-alpha expects a value"),
        (["--mmts-alpha"], "--mmts-alpha expects a value"),
        (["--mmts-alpha="], "--mmts-alpha: invalid float value: ''"),
        (["--mmts-clusters", "--lr"], "--mmts-clusters expects a value"),
        (["--mmts-clusters", "-x"], "--mmts-clusters expects a value"),
        (["--mmts-clusters="], "--mmts-clusters is empty"),
        (["--mmts-clusters", "a\0b"], r"--mmts-clusters is 'a\\x00b': it holds a NUL character"),
        (["--mmts-config="], "--mmts-config is empty"),
        (["--mmts-alpha", "1e999"], "--mmts-alpha is inf: it must be a finite number"),
        (["--mmts-alpha", "-.5"], "--mmts-alpha is -0.5: it must be 0 or above"),
        (["--mmts-diagnostics-every", "1.5"], "--mmts-diagnostics-every: invalid int value: '1.5'"),
        (["--mmts-diagnostics-every", "9" * 30], "--mmts-diagnostics-every is 9{30}: too large"),
        (["--mmts-diagnostics-every", "9" * 5000], "--mmts-diagnostics-every(: invalid int value| is <a whole number)"),
        (["--mmts-missing", "tial"], "--mmts-missing is 'tial'; did you mean tail"),
        (["--mmts-no-shifts=yes"], "--mmts-no-shifts=yes: this flag takes no value"),
        (["--mmts", "1"], "unknown flag --mmts; "),
        (["--loss", "mmts", "--loss", "reduce"], "--loss is given several times, as 'mmts' and 'reduce'; give it once"),
        (["--loss=reduce", "--loss=MMTS"], "--loss is given several times, as 'reduce' and 'MMTS'; give it once"),
        (["--loss", "mmts", "--loss", "reduce", "--", "x"], "--loss is given several times"),
    ],
)
def test_bad_flags(argv, message):
    with pytest.raises(ConfigError, match=message) as caught:
        split_flags(argv)
    assert len(str(caught.value)) <= 480


def test_words_that_are_not_ours_stay_where_they_are():
    for argv in (["--loss", "reduce", "--loss", "gather"], ["--loss", "mmts", "--loss=mmts"]):
        assert split_flags(argv) == ({"loss": argv[-1].split("=")[-1]}, [])
    assert split_flags(["--mmts-alpha", "-1e-3"[1:], "--", "--loss", "mmts"]) == (
        {"mmts_alpha": 0.001},
        ["--", "--loss", "mmts"],
    )
    assert split_flags(["--mmts-clusters=-x", "--mmts-clusters", "-"])[0] == {"mmts_clusters": "-"}


def test_a_config_made_in_python_is_checked_too():
    good = {"loss": "mmts-infonce", "alpha": 0.04, "shift_min": 0.05, "shift_max": 0.1, "clusters": "t"}
    assert Config(**good).lowest == pytest.approx(0.03)
    for change, message in (
        ({"alpha": None}, "--mmts-alpha is None: it must be a number"),
        ({"alpha": "0.04"}, "--mmts-alpha is '0.04': it must be a number"),
        ({"diagnostics_every": 1.5}, "--mmts-diagnostics-every is 1.5: it must be a whole number"),
        ({"loss": "mmts"}, "--loss is 'mmts', which each host reads as"),
        ({"loss": "mmst"}, "--loss is 'mmst'; did you mean mmts"),
        ({"num_oscillations": None}, "either --mmts-num-oscillations or --mmts-period"),
    ):
        with pytest.raises(ConfigError, match=message):
            Config(**{**good, **change})


def test_the_presets():
    """The numbers of the paper's supplementary, Sec. 7, written down once more."""
    assert {name: preset[1:] for name, preset in presets().items()} == {
        "clip-cc3m": (0.04, 0.05, 0.10),
        "avion-max-margin": (0.20, 0.17, 0.30),
        "avion-clip": (0.08, 0.05, 0.20),
        "vast-max-margin": (0.20, 0.10, 0.30),
        "vast-clip": (0.06, 0.06, 0.09),
        "unimodal-ts": (0.90, 0.55, 0.55),  # of Kukleva et al. (2023): from 1.0 to 0.1
    }


def test_the_extremes_of_a_plan():
    preview = Preview.of_preset("clip-cc3m", 100, num_oscillations=2.0)
    assert preview.extremes == {"start": 0, "trough": 25, "peak": 50, "end": 99}
    with pytest.raises(ConfigError, match="unknown preset 'clip'; choose from clip-cc3m"):
        Preview.of_preset("clip", 100)
