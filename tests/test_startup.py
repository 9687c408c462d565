"""The ways in: start-up file, launcher, ``install()``; in every order, and never in silence."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import sys
import textwrap

import pytest
from conftest import openclip_flags, run_python

try:
    INSTALLED = any(file.name == "mmts_plugins.pth" for file in importlib.metadata.files("mmts-plugins") or ())
except importlib.metadata.PackageNotFoundError:
    INSTALLED = False
needs_startup_file = pytest.mark.skipif(
    not INSTALLED, reason="mmts-plugins is not pip-installed here: no start-up file"
)
needs_openclip = pytest.mark.skipif(
    importlib.util.find_spec("open_clip_train") is None, reason="needs the extra: pip install 'mmts-plugins[openclip]'"
)


def flags(model, data, logs, **changes) -> list[str]:
    given = {"train_data": data.csv, "dataset_type": "csv", "loss": "mmts", "mmts_clusters": data.table, "epochs": 1}
    return openclip_flags(model, logs, **{**given, **changes})


def losses(output: str) -> list[str]:
    return re.findall(r"Contrastive_loss: (\S+)", output)


def python(code: str, *arguments: str, **environment: str):
    return run_python("-c", textwrap.dedent(code), *arguments, **environment)


# -- the real trainer, started for real --------------------------------------------------------------------------------


@needs_startup_file
@needs_openclip
def test_start_up_file_and_launcher_train_alike(small_model, data, tmp_path):
    by_itself = run_python("-m", "open_clip_train.main", *flags(small_model, data, tmp_path, name="a"))
    assert by_itself.returncode == 0, by_itself.stdout[-2000:]
    assert by_itself.stdout.count("MM-TS step ") == 6
    launched = run_python(
        "-m", "mmts_plugins", "run", "-m", "open_clip_train.main", *flags(small_model, data, tmp_path, name="b")
    )
    assert launched.returncode == 0, launched.stdout[-2000:]
    assert launched.stdout.count("MM-TS step ") == 6
    assert losses(launched.stdout) == losses(by_itself.stdout)
    plain = run_python(
        "-m", "open_clip_train.main", *flags(small_model, data, tmp_path, name="c", loss=None, mmts_clusters=None)
    )
    assert plain.returncode == 0
    assert "MM-TS" not in plain.stdout
    assert losses(plain.stdout) != losses(by_itself.stdout)


@needs_startup_file
@needs_openclip
@pytest.mark.parametrize(
    ("changes", "environment", "message"),
    [
        ({"loss": "mmst"}, {}, "unknown --loss 'mmst'"),
        ({"mmts_alhpa": 1}, {}, "unknown flag --mmts-alhpa; did you mean --mmts-alpha?"),
        ({"mmts_clusters": None}, {}, "--mmts-clusters FILE"),
        ({"mmts_clusters": "no.parquet"}, {}, "no.parquet: no such cluster table"),
        ({}, {"MMTS": "0"}, "MMTS=0 switches mmts-plugins off, but the command line asks for it"),
    ],
)
def test_one_clear_error_and_nothing_written(changes, environment, message, small_model, data, tmp_path):
    done = run_python("-m", "open_clip_train.main", *flags(small_model, data, tmp_path, **changes), **environment)
    assert done.returncode != 0
    last = done.stdout.splitlines()[-1]
    assert last.startswith("mmts: error: ")
    assert message in last
    assert "Traceback" not in done.stdout
    assert list(tmp_path.iterdir()) == []


@needs_startup_file
@needs_openclip
def test_help_of_the_host_lists_our_flags():
    done = run_python("-m", "open_clip_train.main", "--help")
    assert done.returncode == 0
    assert "--mmts-clusters FILE" in done.stdout
    assert "--accum-freq" in done.stdout


def test_launcher_refuses_an_unknown_host(tmp_path):
    done = run_python("-m", "mmts_plugins", "run", tmp_path / "train.py", "--loss", "mmts")
    assert done.returncode == 2
    assert "no adapter for" in done.stdout
    (tmp_path / "train.py").write_text("import sys; print(sys.argv[1:], __name__)")
    done = run_python("-m", "mmts_plugins", "run", tmp_path / "train.py", "--lr", "1")
    assert done.stdout.strip() == "['--lr', '1'] __main__"


# -- the start-up file -------------------------------------------------------------------------------------------------

LOADED = "import sys; print(sorted({'torch', 'pluggy', 'mmts_plugins.registry', 'argparse'} & set(sys.modules)))"


@needs_startup_file
def test_unrelated_processes_are_left_alone():
    assert python(LOADED).stdout.strip() == "[]"
    assert python(LOADED, "--loss", "mse").stdout.strip() == "[]"
    assert python(LOADED, "--loss-dist-impl", "reduce").stdout.strip() == "[]"
    armed = "['argparse', 'mmts_plugins.registry', 'pluggy']"
    assert python(LOADED, MMTS="1").stdout.strip().replace("'argparse', ", "") == armed.replace("'argparse', ", "")


@pytest.mark.parametrize(
    ("arguments", "asks"),
    [
        (["python", "-m", "open_clip_train.main", "--loss", "mmst"], True),
        (["python", "-m", "open_clip_train.main", "--los=mmts"], True),
        (["python", "-m", "open_clip_train.main", "--loss-dist-impl", "reduce"], False),
        (["python", "train.py", "--loss", "mmts"], True),
        (["python", "train.py", "--loss=mmts-max-margin"], True),
        (["python", "train.py", "--loss", "mse"], False),
        (["python", "train.py", "--mmts-alpha=1"], True),
        (["python", "train.py", "--loss_type", "mmts"], False),
        (["python", "train.py", "--loss"], False),
    ],
)
def test_what_asks_for_us(arguments, asks):
    from mmts_plugins._startup import asks_for_us

    assert asks_for_us(arguments) is asks


def test_a_broken_installation_refuses_instead_of_training_plain_clip(tmp_path):
    host = tmp_path / "open_clip_train"
    host.mkdir()
    (host / "__init__.py").write_text("")
    (host / "params.py").write_text("def parse_args(args): return args")
    done = python(
        """
        import sys
        sys.argv = ["x", "--loss", "mmts"]; sys.orig_argv = sys.argv
        sys.modules["pluggy"] = None  # as if the dependency were missing
        import mmts_plugins._startup as s
        s._started = False
        s.start()
        import open_clip_train.params
        print("trained")
        """,
        PYTHONPATH=str(tmp_path),
    )
    assert done.returncode != 0
    assert "mmts-plugins could not start" in done.stdout
    assert "trained" not in done.stdout


# -- hooks and seams, on a small host ----------------------------------------------------------------------------------

HOST = """
import sys
sys.path.insert(0, {folder!r})
from mmts_plugins.patches._target import Host, Seam
from mmts_plugins import _hooks
def wrapper(original, *args): return "ours:" + original(*args)
host = Host("Tiny", "tiny-host", "tiny", "1.0", (Seam("tiny.leaf", "make", ("args",), wrapper),), ("tiny.main",))
seam = host.seams[0]
"""


@pytest.fixture
def tiny(tmp_path):
    package = tmp_path / "tiny"
    package.mkdir()
    (package / "__init__.py").write_text("from .leaf import make\n")
    (package / "leaf.py").write_text("def make(args): return 'plain ' + args\n")

    def run(code: str):
        return python(HOST.format(folder=str(tmp_path)) + textwrap.dedent(code))

    run.package = package
    return run


def test_install_before_import_reaches_the_re_export(tiny):
    done = tiny(
        "host.install(); host.install(); import tiny; print(tiny.make('a'), tiny.leaf.make('b'), host.status(seam))"
    )
    assert done.stdout.strip() == "ours:plain a ours:plain b installed"


def test_install_after_import_names_who_holds_the_original(tiny):
    done = tiny("import tiny; host.install()")
    assert "Tiny: tiny imported tiny.leaf.make before mmts_plugins was installed" in done.stdout
    done = tiny("import tiny\ntry: host.install()\nexcept Exception: print(tiny.make('a'), tiny.leaf.make('a'))")
    assert done.stdout.strip() == "plain a plain a"


def test_uninstall_puts_the_original_back(tiny):
    code = """
    host.install()
    import tiny
    held = tiny.make
    host.uninstall()
    print(tiny.leaf.make('a'), held('b'), host.status(seam), len(_hooks._hooks), _hooks._finder in sys.meta_path)
    del sys.modules['tiny'], sys.modules['tiny.leaf']
    host.install()
    import tiny
    print(tiny.make('c'))
    """
    assert tiny(code).stdout.splitlines() == ["plain a plain b not armed 0 False", "ours:plain c"]


def test_uninstall_under_another_tools_wrapper_switches_off_in_place(tiny):
    code = """
    import functools
    host.install()
    import tiny.leaf
    ours = tiny.leaf.make
    @functools.wraps(ours)
    def theirs(args): return "theirs:" + ours(args)
    tiny.leaf.make = theirs
    host.uninstall()
    print(tiny.leaf.make('a'))
    """
    assert tiny(code).stdout.splitlines()[-1] == "theirs:plain a"


def test_reload_is_patched_again(tiny):
    done = tiny(
        "import importlib\nhost.install()\nimport tiny\nimportlib.reload(tiny.leaf)\nprint(tiny.leaf.make('a'))"
    )
    assert done.stdout.strip() == "ours:plain a"


def test_half_imported_is_refused(tiny):
    (tiny.package / "leaf.py").write_text("import __main__\n__main__.host.install()\ndef make(args): return args\n")
    done = tiny("import tiny")
    assert "tiny.leaf is half imported; install mmts_plugins before importing it" in done.stdout
    assert done.returncode != 0


def test_changed_seam_stops_with_host_version_and_seam(tiny):
    (tiny.package / "leaf.py").write_text("def make(config): return config\n")
    done = tiny("host.install(); import tiny; print('trained')")
    assert "Tiny not installed: tiny.leaf.make has changed: no parameter 'args' in (config)" in done.stdout
    assert "trained" not in done.stdout
    (tiny.package / "leaf.py").write_text("")
    (tiny.package / "__init__.py").write_text("import tiny.leaf\n")
    done = tiny("host.install(); import tiny; print('trained')")
    assert "tiny.leaf.make is gone" in done.stdout
    assert "trained" not in done.stdout


def test_every_built_in_host_is_registered_by_entry_point():
    from mmts_plugins import registry

    names = {host.name for host in registry.hosts()}
    assert "OpenCLIP" in names
    for host in registry.hosts():
        assert host.seams
        assert host.start_modules
    if INSTALLED:
        points = importlib.metadata.entry_points()
        group = points.select(group=registry.GROUP) if hasattr(points, "select") else points[registry.GROUP]
        assert {point.name for point in group} >= {"openclip"}
    assert sys.version_info >= (3, 9)


@needs_openclip
def test_doctor_sees_every_seam(data, tmp_path):
    done = run_python("-m", "mmts_plugins", "doctor", "--clusters", data.table)
    assert "open_clip_train.train.train_one_epoch: installed" in done.stdout
    assert "6 captions, 48 samples" in done.stdout
    assert done.returncode == (0 if INSTALLED else 1)
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(b"PAR1")
    done = run_python("-m", "mmts_plugins", "doctor", "--clusters", broken)
    assert done.returncode == 1
    assert "broken.parquet: not a readable Parquet file" in done.stdout
