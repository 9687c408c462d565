"""The ways in: start-up file, launcher, ``install()``; in every order, and never in silence."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import itertools
import json
import re
import subprocess
import sys
import textwrap

import pytest
from conftest import REPOSITORY, openclip_flags, run_python
from forked import run_forked

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

REGISTRY = "from mmts_plugins.hosts import registry"
SEAMS = {
    "OpenCLIP": 7,
    "OpenCLIP (training)": 3,
    "AVION": 11,
    "VAST": 5,
    "VAST (vast_utils)": 5,
    "GRAM": 5,
    "transformers": 3,
    "sentence-transformers": 3,
    "Lightning": 0,
}
BUILT_IN = " ".join(SEAMS)


def flags(model, data, logs, **changes) -> list[str]:
    given = {"train_data": data.csv, "dataset_type": "csv", "loss": "mmts", "mmts_clusters": data.table, "epochs": 1}
    return openclip_flags(model, logs, **{**given, **changes})


def losses(output: str) -> list[str]:
    return re.findall(r"Contrastive_loss: (\S+)", output)


def python(code: str, *arguments: str, **environment: str):
    return run_forked("-c", textwrap.dedent(code), *arguments, **environment)


AS_STARTED = """
import sys
sys.orig_argv = ["python", *sys.argv[1:]]
from mmts_plugins import _startup
_startup._started = False
_startup.start()
del sys.argv[:1]
"""


def started(code: str, *arguments: str, **environment: str):
    """As the start-up file leaves a process with these arguments, and then some code; forked."""
    return python(AS_STARTED + textwrap.dedent(code), *arguments, **environment)


def started_module(*arguments: object, **environment: str):
    code = "import runpy; del sys.argv[:1]; runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)"
    return started(code, *map(str, arguments), **environment)


def last_line(done: subprocess.CompletedProcess) -> str:
    assert "Traceback" not in done.stdout, done.stdout[-3000:]
    last = done.stdout.splitlines()[-1]
    assert len(last) <= 500
    return last


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


@needs_openclip
@pytest.mark.parametrize(
    ("changes", "environment", "message"),
    [
        ({"mmts_alhpa": 1}, {}, "unknown flag --mmts-alhpa; did you mean --mmts-alpha?"),
        ({}, {"MMTS": "0"}, "MMTS=0 switches mmts-plugins off, but the command line asks for it"),
    ],
)
def test_one_clear_error_and_nothing_written(changes, environment, message, small_model, data, tmp_path):
    done = started_module("-m", "open_clip_train.main", *flags(small_model, data, tmp_path, **changes), **environment)
    assert done.returncode != 0
    assert last_line(done).startswith("mmts: error: ")
    assert message in last_line(done)
    assert list(tmp_path.iterdir()) == []


@needs_openclip
def test_help_of_the_host_lists_our_flags():
    done = started_module("-m", "open_clip_train.main", "--help")
    assert done.returncode == 0
    assert "--mmts-clusters FILE" in done.stdout
    assert "--accum-freq" in done.stdout


# -- what a host would swallow -----------------------------------------------------------------------------------------

OPENCLIP = """
import argparse
def parse_args(args):
    parser = argparse.ArgumentParser()
    for flag in ("--lr", "--logs", "--lock-image", "--name", "--loss-dist-impl"):
        parser.add_argument(flag)
    return parser.parse_args(args)
"""
VAST = """
import argparse, sys
def parse_with_config(parser):
    return parser.parse_args(), {word[2:].split("=")[0] for word in sys.argv[1:]}
def get_args():
    parser = argparse.ArgumentParser()
    for flag in ("--local_rank", "--log_steps", "--learning_rate", "--loss_type", "--name"):
        parser.add_argument(flag)
    return parse_with_config(parser)[0]
"""
OUTCOMES = """
import json, sys
from mmts_plugins.errors import ConfigError
module, reader, cases = json.loads(sys.argv[-1])
read = getattr(__import__(module, fromlist=[""]), reader)
for case in cases:
    sys.argv[1:] = case
    try:
        read(*([case] if reader == "parse_args" else []))
    except ConfigError as error:
        print("error", error)
    except SystemExit as exit:
        print("exit", exit.code)
    else:
        print("plain")
"""


@pytest.fixture(scope="module")
def swallowers(tmp_path_factory):
    """A folder with the argument parsers of two hosts."""
    folder = tmp_path_factory.mktemp("hosts")
    for package, name, text in (("open_clip_train", "params", OPENCLIP), ("utils", "args", VAST)):
        (folder / package).mkdir()
        (folder / package / "__init__.py").write_text("")
        (folder / package / f"{name}.py").write_text(text)
    return folder


def outcomes(swallowers, start: str, module: str, reader: str, cases: list, **environment: str) -> list[str]:
    done = python(start + OUTCOMES, json.dumps([module, reader, cases]), PYTHONPATH=str(swallowers), **environment)
    assert done.returncode == 0, done.stdout
    found = [line for line in done.stdout.splitlines() if line.split()[0] in ("error", "exit", "plain")]
    assert len(found) == len(cases), done.stdout
    return found


OURS = ["mmts", "mmts-infonce", "mmts-max-margin", "mmtss", "mmt", "MMTS", "mmst", "mts", "mm-ts", "MMTS_InfoNCE"]
NOT_ARMED = "from mmts_plugins import _startup; _startup.guard()"
ARMED = "import mmts_plugins; mmts_plugins.install()"


@pytest.mark.parametrize("start", [NOT_ARMED, ARMED], ids=["notebook", "armed"])
@pytest.mark.parametrize(
    ("module", "reader", "flag"),
    [("open_clip_train.params", "parse_args", "--loss-dist-impl"), ("utils.args", "get_args", "--loss_type")],
    ids=["openclip", "vast"],
)
def test_no_abbreviation_carries_a_loss_of_ours(start, module, reader, flag, swallowers):
    names = [flag[:end] for end in range(len("--lo"), len(flag) + 1)]
    cases = [words for name, loss in itertools.product(names, OURS) for words in ([name, loss], [f"{name}={loss}"])]
    cases += [["--loss", one, "--loss", other] for one, other in (("mmts", "reduce"), ("reduce", "mmts"))]
    cases += [["--loss=mmts", "--loss-=reduce"], ["--name", "a", "--loss", "mmts"], ["--", "--loss", "mmts"]]
    found = outcomes(swallowers, start, module, reader, cases)
    assert [(case, each) for case, each in zip(cases, found) if each == "plain"] == []
    errors = [each for case, each in zip(cases, found) if case[0].startswith("--los")]
    assert {each.split()[0] for each in errors} == {"error"}
    assert all("--los" in each and len(each) <= 500 for each in errors)


@pytest.mark.parametrize("start", [NOT_ARMED, ARMED], ids=["notebook", "armed"])
def test_what_is_the_hosts_stays_the_hosts(start, swallowers):
    cases = [
        ["--loss", "reduce"],
        ["--los", "gather"],
        ["--loss=shift", "--loss", "bidir"],
        ["--loss-dist-impl", "reduce"],
        ["--name", "mmts"],
        ["--logs=mmts", "--lr", "1"],
        [],
    ]
    assert outcomes(swallowers, start, "open_clip_train.params", "parse_args", cases) == ["plain"] * len(cases)
    cases = [["--loss", "nce"], ["--los", "itc"], ["--loss_type=x", "--loss_t", "y"], ["--name", "mmts"], []]
    assert outcomes(swallowers, start, "utils.args", "get_args", cases) == ["plain"] * len(cases)


def test_a_guarded_reader_is_the_hosts_own(swallowers):
    done = python(
        NOT_ARMED
        + """
        import sys, inspect, pickle, open_clip_train.params as params
        sys.argv[1:] = ["--lr", "1"]
        print(params.parse_args(None).lr, params.parse_args(args=("--lr", "2")).lr, params.parse_args([]).lr)
        print(inspect.signature(params.parse_args), pickle.loads(pickle.dumps(params.parse_args)) is params.parse_args)
        """.replace("\n        ", "\n"),
        PYTHONPATH=str(swallowers),
    )
    assert done.stdout.splitlines() == ["1 2 None", "(args) True"]


@pytest.mark.parametrize("package", ["utils", "open_clip_train"])
def test_others_of_those_names_are_left_alone(package, tmp_path):
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").write_text("")
    (tmp_path / package / "args.py").write_text("def get_args(): return 'theirs'")
    (tmp_path / package / "params.py").write_text("parse = 1")
    code = f"import {package}.args as a, {package}.params; print(a.get_args(), hasattr(a.get_args, '__wrapped__'))"
    done = python(f"{NOT_ARMED}\n{code}", "--loss", "mmts", PYTHONPATH=str(tmp_path))
    assert done.stdout.strip() == "theirs False"


@needs_openclip
def test_a_notebook_that_has_not_armed_us_is_refused(small_model, data, tmp_path):
    code = "from open_clip_train.main import main; main(sys.argv[-1].split())"
    asked = " ".join(flags(small_model, data, tmp_path))
    done = started(code, asked)
    assert done.returncode == 1
    assert last_line(done).startswith("mmts: error: --loss mmts: open_clip_train.params would take this")
    assert "mmts_plugins.install()" in last_line(done)
    assert list(tmp_path.iterdir()) == []


# -- the launcher ------------------------------------------------------------------------------------------------------


def launch(*arguments: object, **environment: str):
    return run_forked("-m", "mmts_plugins", "run", *arguments, **environment)


def test_launcher_refuses_an_unknown_host(tmp_path):
    script = tmp_path / "train.py"
    script.write_text("import sys; print(sys.argv[1:], __name__, sys.path[0])")
    done = launch(script, "--loss", "mmts")
    assert done.returncode == 2
    assert "no adapter for" in last_line(done)
    assert launch(script, "--lr", "1").stdout.strip() == f"['--lr', '1'] __main__ {tmp_path}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.py", "--loss", "mmts"], "there is no script '/...none.py'; for a module: mmts run -m MODULE"),
        ([""], "there is no script ''"),
        (["folder"], "'/...folder' is a folder without a __main__.py"),
        (["-m", "nowhere.at.all"], "there is no module 'nowhere.at.all' in this environment"),
        (["-m", ".a"], "there is no module '.a'"),
        (["-m", ""], "there is no module ''"),
        (["-m", "torch.nothing"], "there is no module 'torch.nothing'"),
        (["-m", "json.decoder.x"], "there is no module 'json.decoder.x'"),
        (["-m"], "which module?"),
    ],
)
def test_launcher_of_what_is_not_there(arguments, message, tmp_path):
    (tmp_path / "folder").mkdir()
    if arguments[0] in ("none.py", "folder"):
        arguments = [tmp_path / arguments[0], *arguments[1:]]
    done = launch(*arguments)
    assert done.returncode == 2
    assert last_line(done).startswith("mmts: error: mmts run")
    assert all(part in last_line(done) for part in message.split("..."))  # a long path is told without its middle


def test_errors_of_what_was_launched_are_its_own(tmp_path):
    (tmp_path / "fails.py").write_text("def inner(): return {}['key']\ninner()")
    done = launch(tmp_path / "fails.py")
    assert done.returncode == 1
    assert done.stdout.startswith("Traceback")
    assert done.stdout.splitlines()[-1] == "KeyError: 'key'"
    (tmp_path / "lacks.py").write_text("import nowhere")
    done = launch("-m", "lacks", PYTHONPATH=str(tmp_path))
    assert done.stdout.splitlines()[-1] == "ModuleNotFoundError: No module named 'nowhere'"
    (tmp_path / "ends.py").write_text("raise SystemExit(7)")
    assert launch(tmp_path / "ends.py").returncode == 7


def test_launcher_finds_modules_where_python_would(tmp_path):
    (tmp_path / "here.py").write_text("print('found', __name__)")
    done = python(
        f"import os; os.chdir({str(tmp_path)!r})\nfrom mmts_plugins.cli import main\nmain(['run', '-m', 'here'])"
    )
    assert done.stdout.strip() == "found __main__"


# -- the start-up file -------------------------------------------------------------------------------------------------

LOADED = "import sys; print(sorted({'torch', 'pluggy', 'mmts_plugins.hosts.registry', 'argparse'} & set(sys.modules)))"


@needs_startup_file
def test_unrelated_processes_are_left_alone():
    """Started for real, as :func:`test_start_up_file_and_launcher_train_alike`: only that proves the file itself."""
    done = run_python("-c", f"{LOADED}; print(*sys.meta_path[:1])", "--loss", "mse").stdout.splitlines()
    assert done[0] == "[]"
    assert "mmts_plugins._hooks._Finder" in done[1]


def test_the_switch_arms_without_being_asked():
    done = started(LOADED, MMTS="1").stdout.strip()
    assert "'mmts_plugins.hosts.registry', 'pluggy'" in done


@pytest.mark.parametrize("arguments", [[], ["--loss", "mse"], ["--loss-dist-impl", "reduce"]])
def test_what_does_not_ask_arms_nothing(arguments):
    armed = f"from mmts_plugins import _startup; {REGISTRY}; print(_startup._started, registry._hosts)"
    assert started(armed, *arguments).stdout.strip() == "False []"


def test_arming_imports_nothing_that_a_trainer_has_not():
    """Before a trainer's own start-up code (sitecustomize, say) has had its chance, and in torchrun's agent."""
    heavy = "{'torch', 'numpy', 'pyarrow', 'yaml'}"
    code = f"import sys, mmts_plugins; mmts_plugins.install(); print({heavy} & set(sys.modules))"
    assert run_python("-c", code, PYTHONPATH=str(REPOSITORY)).stdout.strip() == "set()"


def test_start_up_imports_nothing_but_small_modules_of_ours():
    """What that costs: benchmarks/startup.py."""
    code = f"""if True:
        import os, sys
        sys.path.insert(0, {str(REPOSITORY)!r})
        before = set(sys.modules)
        import mmts_plugins._startup; mmts_plugins._startup.start()
        print(*sorted(set(sys.modules) - before))"""
    done = subprocess.run([sys.executable, "-S", "-c", code], stdout=subprocess.PIPE, text=True, check=True)
    assert done.stdout.split() == [
        "__future__",
        "mmts_plugins",
        "mmts_plugins._hooks",
        "mmts_plugins._startup",
        "mmts_plugins.patches",
        "mmts_plugins.patches._before",
    ]


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


@pytest.mark.parametrize(
    "value", [*OURS, "mm", " mmts", "m-m-t-s", "clip+MMTS", "MMTSInfoNCE", "mxmts", "mms", "smmt", "mmtd"]
)
def test_what_means_us(value):
    from mmts_plugins._startup import means_us

    assert means_us(value)


@pytest.mark.parametrize(
    "value", ["", "m", "mse", "ms", "mtl", "reduce", "gather", "shift", "bidir", "itc", "clip", "nce"]
)
def test_what_does_not_mean_us(value):
    from mmts_plugins._startup import means_us

    assert not means_us(value)


def test_a_broken_installation_refuses_instead_of_training_plain_clip(tmp_path):
    host = tmp_path / "open_clip_train"
    host.mkdir()
    (host / "__init__.py").write_text("")
    (host / "params.py").write_text("def parse_args(args): return args")
    done = python(
        """
        import sys
        sys.argv = ["x", "--loss", "mmts"]; sys.orig_argv = sys.argv
        for name in [name for name in sys.modules if name.startswith("mmts_plugins.hosts")]:
            del sys.modules[name]
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
from mmts_plugins.hosts.host import Host, Seam
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
    _hooks._hooks.clear()  # the start-up file's own
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


def test_two_hosts_at_one_function(tiny):
    """As those that build on one trainer: each has its own there, and both are gone afterwards, without a word."""
    done = tiny(
        """
        import logging; logging.basicConfig(level=logging.DEBUG, format="LOG %(levelname)s")
        from mmts_plugins.hosts import registry
        def also(original, *args): return "also:" + original(*args)
        other = Host("Other", "other-host", "tiny", "1.0", (Seam("tiny.leaf", "make", ("args",), also),), ())
        registry._hosts[:] = [host, other]
        for each in registry.hosts(): each.install()
        import tiny
        print(tiny.make("a"), host.status(seam), other.status(other.seams[0]))
        registry.uninstall_all()
        print(tiny.leaf.make("b"), tiny.make("c"), hasattr(tiny.leaf.make, "_mmts_seam"))
        """
    )
    lines = [line for line in done.stdout.splitlines() if line != "LOG DEBUG"]
    assert lines == ["also:ours:plain a installed installed", "plain b plain c False"]


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
    (tiny.package / "leaf.py").write_text("import holder\nholder.host.install()\ndef make(args): return args\n")
    holder = "import types; sys.modules['holder'] = types.ModuleType('holder'); sys.modules['holder'].host = host; "
    done = tiny(holder + "import tiny")
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


def test_what_others_put_around_a_seam_is_told_before_a_run(tiny):
    wrapping = """
    import functools, logging, sys
    logging.basicConfig(stream=sys.stdout, format="%(message)s")
    host.install()
    import tiny.leaf
    ours = tiny.leaf.make
    @functools.wraps(ours)
    def theirs(args): return "theirs:" + ours(args)
    class Proxy:  # as wrapt's: attributes are those of what it wraps
        def __init__(self, wrapped): self.__wrapped__ = wrapped
        def __getattr__(self, name): return getattr(self.__wrapped__, name)
    def bare(args): return ours(args)
    """
    done = tiny(wrapping + "host.tell_wrappers(); print('silent')")
    assert done.stdout.strip() == "silent"
    done = tiny(wrapping + "tiny.leaf.make = theirs; host.tell_wrappers(); print(host.status(seam))")
    assert done.stdout.startswith("MM-TS: tiny.leaf.make was wrapped by another tool after us: __main__, -c:")
    assert done.stdout.splitlines()[1] == "installed"
    done = tiny(wrapping + "tiny.leaf.make = Proxy(ours); host.tell_wrappers(); print(host.status(seam))")
    assert done.stdout.splitlines()[0].startswith("MM-TS: tiny.leaf.make was wrapped by another tool after us: ")
    assert done.stdout.splitlines()[1] == "installed"
    for silent in ("bare", "functools.partial(ours)", "(lambda held: lambda args: held(args))(ours)",
                   "(lambda args, held=ours: held(args))"):  # fmt: skip
        done = tiny(wrapping + f"tiny.leaf.make = {silent}; host.tell_wrappers(); print(tiny.leaf.make('a'))")
        assert done.stdout.startswith("MM-TS: tiny.leaf.make was wrapped by another tool after us: ")
        assert done.stdout.splitlines()[1] == "ours:plain a"
    other = "tiny.leaf.make = lambda args: str(sys.version); host.tell_wrappers(); print('trained')"
    done = tiny(wrapping + other)
    assert "SeamError: Tiny not installed: another tool (__main__, -c:" in done.stdout
    assert "put its own in the place of tiny.leaf.make after mmts-plugins was armed" in done.stdout
    assert "trained" not in done.stdout


def test_what_others_put_around_a_seam_before_us_is_told(tiny):
    code = """
    import functools, logging, sys, tiny.leaf
    logging.basicConfig(stream=sys.stdout, format="%(message)s")
    del sys.modules["tiny"]
    host.name, original = "Tiny", tiny.leaf.make
    def decorate(original):
        @functools.wraps(original)
        def theirs(args): return "theirs:" + original(args)
        return theirs
    tiny.leaf.make = decorate(original)
    host.install()
    host.tell_wrappers()
    print(tiny.leaf.make('a'))
    """
    done = tiny(code)
    assert done.stdout.splitlines()[0].startswith("MM-TS: tiny.leaf.make is wrapped by another tool: __main__, -c:")
    assert done.stdout.splitlines()[1] == "ours:theirs:plain a"
    (tiny.package / "leaf.py").write_text("make = 5\n")
    done = tiny("host.install(); import tiny; print('trained')")
    assert "SeamError: Tiny not installed: tiny.leaf.make has changed: it is 5, no function" in done.stdout


@needs_openclip
def test_openclip_tells_before_it_builds_a_model(monkeypatch):
    import open_clip_train.train
    from open_clip_train.params import parse_args

    from mmts_plugins.errors import SeamError

    asked = ["--loss", "mmts", "--mmts-no-shifts", "--model", "RN50"]
    assert parse_args(asked).loss == "mmts-infonce"
    monkeypatch.setattr(open_clip_train.train, "train_one_epoch", lambda *args, **kwargs: None)
    with pytest.raises(SeamError, match=r"put its own in the place of open_clip_train\.train\.train_one_epoch"):
        parse_args(asked)
    parse_args([])  # without us it is none of our business


@pytest.mark.skipif(sys.version_info < (3, 10), reason="Python 3.9 does not hook modules in a zip: no exec_module")
def test_a_loader_that_takes_no_attributes_or_is_shared_is_hooked(tmp_path):
    import zipfile

    with zipfile.ZipFile(tmp_path / "host.zip", "w") as archive:
        archive.writestr("zipped/__init__.py", "")
        archive.writestr("zipped/leaf.py", "name = 'leaf'")
        archive.writestr("zipped/other.py", "name = 'other'")
    done = python(
        f"""
        import importlib.abc, importlib.util, sys
        from mmts_plugins import _hooks
        sys.path.insert(0, {str(tmp_path / "host.zip")!r})
        seen = []
        for name in ("zipped.leaf", "closed"):
            _hooks.after_import(name, lambda module: seen.append(module.__name__))
        import zipped.leaf, zipped.other
        del sys.modules["zipped.other"]
        import zipped.other
        importlib.reload(zipped.leaf)
        zipped.leaf.__spec__.loader.exec_module(zipped.leaf)
        class Closed:
            __slots__ = ()
            def create_module(self, spec): return None
            def exec_module(self, module): module.value = 1
        class Finder:
            def find_spec(self, name, path=None, target=None):
                if name == "closed": return importlib.util.spec_from_loader(name, Closed())
        sys.meta_path.append(Finder())
        import closed, zipped.other as other
        print(seen, closed.value, other.name)
        """
    )
    assert done.stdout.strip() == "['zipped.leaf', 'zipped.leaf', 'zipped.leaf', 'closed'] 1 other", done.stdout


def test_two_copies_of_us_do_not_ask_each_other_for_ever(tiny):
    code = """
    seen = []
    _hooks.after_import("tiny.leaf", lambda module: seen.append("first"))
    for name in [name for name in sys.modules if name.startswith("mmts_plugins")]:
        del sys.modules[name]
    from mmts_plugins import _hooks as again
    again.after_import("tiny.leaf", lambda module: seen.append("second"))
    import tiny
    print(again is _hooks, sorted(seen))
    """
    assert tiny(code).stdout.strip() == "False ['first', 'second']"


# -- adapters of others ------------------------------------------------------------------------------------------------

ADAPTER = """
from mmts_plugins.hosts.host import Host, Seam
from mmts_plugins.hosts.registry import hookimpl
def wrapper(original, *args): return "ours:" + original(*args)
@hookimpl
def mmts_host():
    return Host("Tiny", "tiny-host", "tiny", "1.0", (Seam("tiny.leaf", "make", ("args",), wrapper),), ("tiny.main",))
"""
FAULTS = {
    "lacks": ("import nowhere", "ModuleNotFoundError: No module named 'nowhere'"),
    "syntax": ("def", "SyntaxError: invalid syntax"),
    "exits": ("raise SystemExit(3)", "SystemExit: 3"),
    "fails": (ADAPTER.replace("return Host", "return 1/0, Host"), "ZeroDivisionError: division by zero"),
    "empty": ("", "TypeError: it has no function mmts_host()"),
    "nothing": (ADAPTER.replace("return Host", "Host"), "TypeError: it has no function mmts_host()"),
    "kind": (ADAPTER.replace("return Host", "return str or Host"), "mmts_host() returned a type, not a Host"),
    "several": (ADAPTER.replace("return Host", "return [1] or Host"), "mmts_host() returned a int, not a Host"),
    "hook": (ADAPTER.replace("mmts_host()", "mmts_host(nothing)"), "PluginValidationError"),
    "seams": (ADAPTER.replace('(Seam("tiny', '["a"] or (Seam("tiny'), "its Host is not filled in: seams"),
    "modules": (ADAPTER.replace('("tiny.main",)', '"tiny.main"'), "its Host is not filled in: start_modules"),
}


@pytest.fixture
def adapters(tmp_path):
    """Installs adapters: a module and its entry point each."""
    package = tmp_path / "tiny"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "leaf.py").write_text("def make(args): return 'plain ' + args\n")
    (package / "main.py").write_text("import sys, tiny.leaf; print(tiny.leaf.make('trained'), sys.argv[1:])")

    def install(**modules: str) -> str:
        for name, text in modules.items():
            (tmp_path / f"adapter_{name}.py").write_text(text)
            metadata = tmp_path / f"adapter_{name}-1.0.dist-info"
            metadata.mkdir()
            (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: adapter-{name}\nVersion: 1.0\n")
            (metadata / "entry_points.txt").write_text(f"[mmts_plugins.hosts]\n{name} = adapter_{name}\n")
        return str(tmp_path)

    return install


def test_an_adapter_of_somebody_else_is_used(adapters):
    path = adapters(good=ADAPTER)
    done = launch("-m", "tiny.main", "--loss", "mmts", PYTHONPATH=path)
    assert done.stdout.strip() == "ours:plain trained ['--loss', 'mmts']"
    done = python(f"{REGISTRY}; print([h.name for h in registry.hosts()], registry.broken())",
                  PYTHONPATH=path)  # fmt: skip
    assert done.stdout.strip() == f"{[*SEAMS, 'Tiny']} []"


def test_a_broken_adapter_stops_nobody_else(adapters):
    path = adapters(**{name: text for name, (text, _) in FAULTS.items()}, good=ADAPTER)
    code = "from mmts_plugins.hosts import registry; print(*(h.name for h in registry.hosts())); "
    done = python(code + "print(*registry.broken(), sep='\\n')", PYTHONPATH=path)
    names, *lines = done.stdout.splitlines()
    assert names == f"{BUILT_IN} Tiny"
    assert len(lines) == len(FAULTS)
    for name, (_, reason) in FAULTS.items():
        (line,) = (line for line in lines if f"the adapter '{name}' (adapter_{name} of adapter-{name})" in line)
        assert reason in line
    armed = "import mmts_plugins; mmts_plugins.install(); import tiny.leaf; print(tiny.leaf.make('a'))"
    assert python(armed, PYTHONPATH=path).stdout.strip() == "ours:plain a"
    assert started("print('on')", PYTHONPATH=path, MMTS="1").stdout.strip() == "on"
    done = started("print('on')", "-m", "open_clip_train.main", "--loss", "mmts", PYTHONPATH=path)
    assert done.stdout.strip() == "on"


def test_a_broken_adapter_is_told_where_its_host_may_be_meant(adapters):
    path = adapters(tiny=FAULTS["lacks"][0])
    done = launch("-m", "tiny.main", "--loss", "mmts", PYTHONPATH=path)
    assert done.returncode == 2
    assert "no adapter for 'tiny.main'" in last_line(done)
    assert "the adapter 'tiny' (adapter_tiny of adapter-tiny) cannot be used: ModuleNotFound" in last_line(done)
    done = started_module("-m", "tiny.main", "--loss", "mmts", PYTHONPATH=path)
    assert done.returncode == 2
    assert last_line(done).startswith("mmts: error: the adapter 'tiny'")
    done = started("print('on')", "train.py", "--loss", "mmts", PYTHONPATH=path)
    assert done.stdout.splitlines()[0].startswith("mmts: warning: the adapter 'tiny'")
    assert done.stdout.splitlines()[1:] == ["on"]


def test_an_adapter_that_fails_while_it_is_armed_is_left_out(adapters):
    odd = "class Odd(Host):\n    def install(self, module=None): 1 / 0\n"
    path = adapters(late=ADAPTER.replace("def wrapper", odd + "def wrapper").replace("return Host", "return Odd"))
    code = f"import mmts_plugins; mmts_plugins.install(); {REGISTRY}; print(*registry.broken())"
    done = python(code + "; print(*(h.name for h in registry.hosts()))", PYTHONPATH=path)
    assert "the adapter 'Tiny' (tiny-host) cannot be used: ZeroDivisionError" in done.stdout
    assert done.stdout.splitlines()[-1] == BUILT_IN


def test_damaged_metadata_of_others_is_passed_over(adapters, tmp_path):
    path = adapters(good=ADAPTER)
    for name, text in (
        ("broken", b"[mmts_plugins.hosts\nx"),
        ("empty", b"[mmts_plugins.hosts]\nx = \n"),
        ("u", b"\xff"),
    ):
        (tmp_path / f"{name}-1.0.dist-info").mkdir()
        (tmp_path / f"{name}-1.0.dist-info" / "entry_points.txt").write_bytes(text)
    done = python(
        "from mmts_plugins.hosts import registry; print(*(h.name for h in registry.hosts()))", PYTHONPATH=path
    )
    assert done.stdout.strip() == f"{BUILT_IN} Tiny"


def test_every_built_in_host_is_registered_by_entry_point():
    from mmts_plugins.hosts import registry

    hosts = {host.name: host for host in registry.hosts()}
    assert {name: len(host.seams) for name, host in hosts.items()} == SEAMS
    assert hosts["OpenCLIP"].start_modules == ("open_clip_train.main",)
    assert set(hosts["AVION"].start_modules) == {
        *("main_lavila_finetune_mir.py", "main_lavila_pretrain.py"),
        *("run_with_submit_lavila_finetune_mir.py", "run_with_submit_lavila_pretrain.py"),
    }
    assert all(hosts[name].start_modules == ("run.py",) for name in ("VAST", "VAST (vast_utils)", "GRAM"))
    text = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    registered = dict(re.findall(r'^([\w-]+) = "mmts_plugins\.patches\.(\w+)"$', text, flags=re.MULTILINE))
    names = ("openclip", "avion", "vast", "transformers", "sentence-transformers", "lightning")
    assert registered == {name: name.replace("-", "_") for name in names}
    if INSTALLED:
        points = importlib.metadata.entry_points()
        group = points.select(group=registry.GROUP) if hasattr(points, "select") else points[registry.GROUP]
        assert {point.name for point in group} >= {"openclip", "avion", "vast"}


# -- whose fault it is -------------------------------------------------------------------------------------------------


def test_faults_of_ours_are_one_line_and_the_hosts_tracebacks_stay(tiny):
    code = """
    from mmts_plugins import schedule
    from mmts_plugins.hosts import registry
    registry._hosts = [host]
    registry.quiet_excepthook()
    registry.quiet_excepthook()
    host.install()
    import tiny.leaf
    """
    done = tiny(code + "schedule.CosineSchedule('a', 1)")
    assert last_line(done).startswith("mmts: error: TypeError in schedule.py:")
    assert done.stdout.count("mmts: error") == 1
    assert done.returncode == 1
    done = tiny(code + "schedule.CosineSchedule(0.1, 1).offset(lambda: 1)")
    assert last_line(done).startswith("mmts: error: TypeError in schedule.py:")
    done = tiny(code + "import os; os.environ['MMTS_DEBUG'] = '1'; schedule.CosineSchedule('a', 1)")
    assert done.stdout.startswith("Traceback")
    assert done.stdout.splitlines()[-1].startswith("mmts: error: TypeError in schedule.py:")
    done = tiny(code + "tiny.leaf.make(1)")  # in the host's own, which our wrapper called
    assert done.stdout.startswith("Traceback")
    assert "mmts: error" not in done.stdout
    code += """scope = {"__name__": "torch.nn"}
    exec("def lacks(value): raise MemoryError('big')", scope)
    schedule.math.isfinite = scope["lacks"]
    """
    done = tiny(code + "schedule.CosineSchedule(1, 1)")  # a fault of nobody
    assert done.stdout.splitlines()[-1] == "MemoryError: big"
    assert "mmts: error" not in tiny(code + "raise KeyError('theirs')").stdout


# -- mmts doctor -------------------------------------------------------------------------------------------------------


@needs_openclip
def test_doctor_sees_every_seam(data, tmp_path):
    done = run_forked("-m", "mmts_plugins", "doctor", "--clusters", data.table)
    assert "open_clip_train.train.train_one_epoch: installed" in done.stdout
    assert "6 captions, 48 samples" in done.stdout
    assert done.returncode == (0 if INSTALLED else 1)
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(b"PAR1")
    done = run_forked("-m", "mmts_plugins", "doctor", "--table", broken)
    assert done.returncode == 1
    assert "broken.parquet: not a readable Parquet file" in done.stdout


DOCTOR = f"from mmts_plugins import cli; {REGISTRY}; code = cli.main(['doctor']); print('code', code)"


def test_doctor_names_what_others_have_broken(adapters):
    path = adapters(lacks=FAULTS["lacks"][0], good=ADAPTER)
    quick = f"{REGISTRY}; registry.hosts(); del registry._hosts[:len(registry._built_in)]; "
    done = python(quick + DOCTOR, PYTHONPATH=path)
    lines = done.stdout.splitlines()
    assert "  PROBLEM  the adapter 'lacks' (adapter_lacks of adapter-lacks) cannot be used: ModuleNotFoundError: " \
        "No module named 'nowhere'" in lines  # fmt: skip
    assert "host Tiny (tiny-host not installed; known: 1.0)" in lines
    assert lines[-2:] == [f"{2 if INSTALLED else 3} problem(s) found", "code 1"]  # the other: there is no host
    assert "Traceback" not in done.stdout


def test_doctor_survives_hosts_that_cannot_be_asked(adapters):
    path = adapters(good=ADAPTER)
    odd = """
    from mmts_plugins import cli
    from mmts_plugins.hosts import registry
    *_, host = registry.hosts()
    registry._hosts[:] = [host]
    host.version = lambda: {version}
    cli.main(["doctor"])
    """
    done = python(odd.format(version="1 / 0"), PYTHONPATH=path)
    assert "  PROBLEM  Tiny: ZeroDivisionError: division by zero" in done.stdout.splitlines()
    leaf = adapters() + "/tiny/leaf.py"
    for text, message in (
        ("raise RuntimeError('two\\nlines')", "tiny.leaf.make: cannot be imported: two lines"),
        ("raise SystemExit(4)", "tiny.leaf.make: cannot be imported: 4"),
        ("", "Tiny 1.0: tiny.leaf.make is gone"),
    ):
        with open(leaf, "w") as file:
            file.write(text)
        done = python(odd.format(version="'1.0'"), PYTHONPATH=path)
        assert f"  PROBLEM  {message}" in done.stdout, done.stdout
        assert "Traceback" not in done.stdout


def test_doctor_in_a_checkout_that_is_not_installed(tmp_path):
    """Nor torch's metadata, as in some conda environments."""
    done = python(
        """
        from importlib import metadata
        def nothing(name): raise metadata.PackageNotFoundError(name)
        metadata.files = metadata.version = nothing
        from mmts_plugins import cli
        from mmts_plugins.hosts import registry
        registry._hosts[:] = [host for host in registry.hosts() if host.name == 'AVION']
        print("code", cli.main(["doctor"]))
        """
    )
    assert "Traceback" not in done.stdout, done.stdout
    assert "no start-up file installed: use `mmts run -m ...`" in done.stdout
    assert re.search(r"  ok       torch \d", done.stdout)
    assert done.stdout.splitlines()[-1] == "code 1"
