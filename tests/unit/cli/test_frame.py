"""What all commands have in common: where output goes, exit codes, options, completion."""

import os
import pty
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import aoti_sched
from aoti_sched.cli import app
from aoti_sched.cli.failures import exit_code
from aoti_sched.errors import AotiSchedError, ConfigError
from tests.unit.cli.support import json_of, refused, run

ESCAPE = "\x1b"


def test_the_version_is_data():
    done = run("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{aoti_sched.__version__}\n", "")


@pytest.mark.parametrize("arguments", [("--help",), ()])
def test_help_lists_every_command_on_stdout(arguments):
    done = run(*arguments)
    assert (done.returncode, done.stderr) == (0, "")
    for name in app.COMMANDS:
        assert re.search(rf"\b{name}\b", done.stdout)


def test_every_command_can_be_imported_and_has_help():
    made = app.make_app()
    for name, what in app.COMMANDS.items():
        for inner in (None,) if isinstance(what, str) else what:
            command = made[name] if inner is None else made[name][inner]
            function = command.default_command
            assert callable(function)
            line = what if inner is None else what[inner]
            assert function.__doc__.splitlines()[0] == line


def test_importing_every_command_brings_no_heavy_module():
    code = (
        "import sys; from aoti_sched.cli.app import make_app\n"
        "make_app().generate_completion(prog_name='x', shell='bash')\n"
        "heavy = {'torch', 'numpy', 'matplotlib'} & {*sys.modules}\n"
        "assert 'aoti_sched.cli.cache' in sys.modules\n"
        "sys.exit(f'imported: {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_trivial_command_imports_neither_the_scheduler_nor_asyncio():
    code = (
        "import sys\n"
        "from aoti_sched.cli.app import run\n"
        "assert run(['--version']) == 0\n"
        "names = {'asyncio', 'torch', 'anyio', 'aoti_sched.scheduler'} & {*sys.modules}\n"
        "sys.exit(f'imported: {names}' if names else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("arguments", "heavy"),
    [
        (["--help"], {"asyncio", "msgspec", "aoti_sched.config"}),
        (["cache", "ls"], {"asyncio", "aoti_sched.package.package", "aoti_sched.model"}),
    ],
)
def test_a_light_command_imports_what_it_needs_alone(tmp_path, arguments, heavy):
    code = (
        "import sys\n"
        "from aoti_sched.cli.app import run\n"
        f"assert run({arguments}) == 0\n"
        f"names = {heavy} & {{*sys.modules}}\n"
        "sys.exit(f'imported: {names}' if names else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "AOTI_SCHED_CACHE": str(tmp_path)},
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("cachee",), 'Unknown command "cachee". Did you mean "cache"?'),
        (("cache", "ls", "--jsn"), "Unknown option: --jsn. Did you mean --json?"),
        (("completion",), "requires an argument"),
        (("completion", "tcsh"), 'Choose from: "bash", "zsh", "fish".'),
        (("--config", "/nonexistent.toml", "cache", "ls"), "can't be read"),
    ],
)
def test_wrong_usage_is_one_line_on_stderr(arguments, says):
    assert says in refused(*arguments)


def test_a_traceback_comes_with_debug_only():
    done = run("--debug", "cache", "prune")
    assert done.returncode == 2
    assert done.stderr.startswith("Traceback")
    assert done.stderr.splitlines()[-1].startswith("aoti-sched: cache prune: nothing says")
    assert run("cache", "prune", env={"AOTI_SCHED_DEBUG": "1"}).stderr.startswith("Traceback")


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (ConfigError("lanes: too many."), 2, "aoti-sched: lanes: too many.\n"),
        (AotiSchedError("a run failed."), 1, "aoti-sched: a run failed.\n"),
        (PermissionError(13, "Permission denied", "a.npy"), 1, "a.npy: Permission denied."),
        (KeyError("x"), 1, "KeyError: 'x'. This is unexpected. Run the command again with --debug"),
        (KeyboardInterrupt(), 130, "aoti-sched: interrupted.\n"),
    ],
)
def test_each_kind_of_error_has_an_exit_code_and_a_sentence(capsys, error, code, says):
    def fail():
        raise error

    assert exit_code(fail, debug=lambda: False) == code
    text = capsys.readouterr().err
    assert says in text
    assert text.count("\n") == 1


def test_options_come_from_the_environment(tmp_path):
    done = run("cache", "ls", env={"AOTI_SCHED_CACHE_LS_CACHE_DIR": str(tmp_path / "other")})
    assert done.stdout.startswith(str(tmp_path / "other"))
    done = run("cache", "ls", env={"AOTI_SCHED_CACHE": str(tmp_path / "third")})
    assert done.stdout.startswith(str(tmp_path / "third"))


def test_options_come_from_a_file_and_later_sources_lose(tmp_path):
    file = tmp_path / "options.toml"
    file.write_text('[cache.ls]\ncache-dir = "/in/the/file"\n')
    for env in ({}, {"AOTI_SCHED_CACHE_LS_CACHE_DIR": "/in/the/environment"}):
        place = next(iter(env.values()), "/in/the/file")
        assert json_of("--config", file, "cache", "ls", env=env)["path"] == place
        arguments = ("--config", file, "cache", "ls", "--cache-dir", "/given")
        assert json_of(*arguments, env=env)["path"] == "/given"
    assert json_of("cache", "ls", env={"AOTI_SCHED_CONFIG": str(file)})["path"] == "/in/the/file"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[cachee]\n", "cachee: no command. The commands are"),
        ("cache = 3\n", "cache: expected a table"),
        ("[cache.all]\n", "cache.all: no command. The commands are ls, prune."),
        ("[cache.ls]\nsize = 3\n", "Unknown option"),
        ("[cache", "no TOML"),
    ],
)
def test_a_wrong_file_of_options_is_refused(tmp_path, text, says):
    file = tmp_path / "options.toml"
    file.write_text(text)
    line = refused("--config", file, "cache", "ls")
    assert says in line
    assert str(file) in line


def in_a_terminal(*arguments, **env):
    """Run a command whose stdout is a terminal, and return what the terminal got."""
    master, slave = pty.openpty()
    kept = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR")}
    process = subprocess.Popen(
        [sys.executable, "-m", "aoti_sched", *arguments],
        stdout=slave,
        stderr=subprocess.PIPE,
        env={**kept, "TERM": "xterm-256color", **env},
    )
    os.close(slave)
    got = b""
    while True:
        try:
            chunk = os.read(master, 4096)
        except OSError:  # how Linux says that the other end is closed
            break
        if not chunk:
            break
        got += chunk
    os.close(master)
    assert process.wait() == 0
    process.stderr.close()
    return got.decode()


def test_colour_is_for_terminals_alone():
    assert ESCAPE in in_a_terminal("--help")
    assert ESCAPE not in run("--help", env={"TERM": "xterm-256color"}).stdout


@pytest.mark.parametrize("off", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_colour_can_be_turned_off(off):
    # NO_COLOR turns off colour, not bold text.
    colours = re.findall(r"\x1b\[(?:3|4|9|10)\d[;m]", in_a_terminal("--help", **off))
    assert colours == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_knows_commands_and_options(shell, tmp_path):
    done = run("completion", shell)
    assert (done.returncode, done.stderr) == (0, "")
    for word in ("cache", "prune", "age"):
        assert re.search(rf"\b{word}\b", done.stdout)
    if (program := shutil.which(shell)) is not None:
        script = tmp_path / "script"
        script.write_text(done.stdout)
        subprocess.run([program, "-n", str(script)], check=True)


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_bash_completes_a_command():
    script = run("completion", "bash").stdout
    ask = 'COMP_WORDS=(aoti-sched cache p); COMP_CWORD=2; _aoti_sched; echo "${COMPREPLY[@]}"'
    done = subprocess.run(
        ["bash", "-c", f"{script}\n{ask}"], capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["prune"]


def test_a_reader_that_goes_away_is_no_fault():
    process = subprocess.Popen(
        [sys.executable, "-m", "aoti_sched", "completion", "bash"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() == 1


def test_ctrl_c_ends_a_command_with_130():
    code = (
        "import os, signal, sys\n"
        "from aoti_sched.cli.failures import exit_code\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's job ignores it
        "def work():\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    signal.pause()\n"
        "sys.exit(exit_code(work, debug=lambda: False))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "aoti-sched: interrupted.\n")


def test_without_the_extra_one_sentence_says_what_to_install(tmp_path):
    (tmp_path / "cyclopts.py").write_text("raise ModuleNotFoundError('No module', name='cyclopts')")
    done = run(
        "cache", "ls", env={"PYTHONPATH": f"{tmp_path}:{Path(aoti_sched.__file__).parents[1]}"}
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.endswith("pip install 'aoti_sched[cli]'\n")
    assert done.stderr.count("\n") == 1
