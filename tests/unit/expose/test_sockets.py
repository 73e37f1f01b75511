"""Where sockets lie, which are alive, and which folders are trusted."""

import os
import socket
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from aoti_sched import ConfigError, ExposeError
from aoti_sched.expose import sockets


def close(*listeners):
    for listener, found in listeners:
        sockets.remove(found, Path(found.path).lstat().st_ino)
        listener.close()


def test_a_socket_is_private_and_found(runtime_dir):
    listener, found = sockets.listen("app")
    path = Path(found.path)
    assert path.parent == runtime_dir / "aoti_sched"
    assert stat.S_IMODE(path.lstat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.lstat().st_mode) == 0o700
    assert sockets.find() == [sockets.Found(os.getpid(), "app", str(path))]
    close((listener, found))
    assert sockets.find() == []


def test_schedulers_of_one_process_get_different_names(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/srv/app/__main__.py"])
    both = [sockets.listen(None), sockets.listen(None)]
    assert [found.name for found in sockets.find()] == ["app", "app-2"]
    with pytest.raises(ConfigError, match="another scheduler of this process has that name"):
        sockets.listen("app-2")
    close(*both)


@pytest.mark.parametrize(
    ("program", "name"),
    [
        ("", "python"),
        ("-c", "python"),
        ("/usr/bin/my program.py", "my-program"),
        ("123.py", "python123"),
        ("a" * 80, "a" * 36),
    ],
)
def test_the_program_gives_the_name(monkeypatch, program, name):
    monkeypatch.setattr(sys, "argv", [program])
    listener = sockets.listen(None)
    assert listener[1].name == name
    close(listener)


@pytest.mark.parametrize("name", ["", "123", "a/b", "..", "a" * 41, "a b", 7, b"a"])
def test_a_wrong_name_is_refused(name):
    with pytest.raises(ConfigError, match="is no name for a socket"):
        sockets.listen(name)
    assert sockets.find() == []


def test_the_socket_of_a_dead_process_is_removed():
    code = (
        "import os; from aoti_sched.expose import sockets\n"
        "kept = sockets.listen('dead')\n"
        "print(kept[1].path, flush=True)\n"
        "os._exit(0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[3],
    )
    path = Path(done.stdout.strip())
    assert path.exists()
    assert sockets.find() == []
    assert not path.exists()


def test_a_dead_socket_with_this_process_id_gives_its_name_free(runtime_dir):
    folder = runtime_dir / "aoti_sched"
    folder.mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as dead:
        dead.bind(str(folder / f"{os.getpid()}-app.sock"))
    listener, found = sockets.listen("app")
    assert sockets.find() == [found]
    close((listener, found))


def test_a_busy_socket_is_alive():
    listener, found = sockets.listen("busy")
    waiting = []
    for _ in range(100):
        client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        client.setblocking(False)
        waiting.append(client)
        try:
            client.connect(found.path)
        except BlockingIOError:
            break
    else:
        pytest.fail("the backlog has no end")
    assert sockets.find() == [found]
    for client in waiting:
        client.close()
    close((listener, found))


def test_removing_leaves_another_socket_that_took_the_place():
    listener, found = sockets.listen("app")
    sockets.remove(found, 0)
    assert Path(found.path).exists()
    close((listener, found))


def test_other_files_in_the_folder_are_left_alone(runtime_dir):
    folder = runtime_dir / "aoti_sched"
    folder.mkdir(mode=0o700)
    (folder / "notes.txt").write_text("")
    (folder / "12-plain.sock").write_text("")
    assert sockets.find() == []
    assert len(list(folder.iterdir())) == 2


def test_a_folder_that_others_can_change_is_not_used(runtime_dir, monkeypatch):
    open_to_all = runtime_dir / "open"
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(open_to_all))
    listener, found = sockets.listen("app")
    assert Path(found.path).parent == runtime_dir / "tmp" / f"aoti_sched-{os.geteuid()}"
    assert sockets.find() == [found]
    close((listener, found))


def test_a_socket_in_a_folder_that_others_can_change_is_not_found(runtime_dir):
    listener, found = sockets.listen("app")
    folder = Path(found.path).parent
    for mode in (0o777, 0o1777, 0o770):
        folder.chmod(mode)
        assert sockets.find() == []
    folder.chmod(0o700)
    assert sockets.find() == [found]
    close((listener, found))


def test_without_a_fit_folder_the_error_says_why(runtime_dir, monkeypatch):
    for folder in (runtime_dir, runtime_dir / "tmp"):
        folder.chmod(0o777)
    with pytest.raises(ExposeError, match="may be written by others") as caught:
        sockets.listen("app")
    assert str(caught.value).endswith("Set $XDG_RUNTIME_DIR to a folder of your own.")
    assert sockets.find() == []


def test_a_folder_of_another_user_is_not_used(runtime_dir, monkeypatch):
    folder = runtime_dir / "aoti_sched"
    folder.mkdir()
    if os.geteuid() != 0:
        pytest.skip("only root can give a folder away")
    os.chown(folder, 12345, -1)
    listener, found = sockets.listen("app")
    assert not found.path.startswith(str(folder))
    assert sockets.find() == [found]
    close((listener, found))


def test_without_the_variable_a_folder_of_the_user_is_made(runtime_dir, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", "relative")
    last = sockets.folders()[-1]
    assert last == runtime_dir / "tmp" / f"aoti_sched-{os.geteuid()}"


def test_a_variable_that_no_path_can_be_is_passed_over(runtime_dir, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/" + "x" * 300)
    assert sockets.find() == []
    listener, found = sockets.listen("app")
    assert Path(found.path).parent == runtime_dir / "tmp" / f"aoti_sched-{os.geteuid()}"
    assert sockets.find() == [found]
    close((listener, found))


def test_a_system_without_a_folder_for_temporary_files_needs_none(runtime_dir, monkeypatch):
    def none():
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", none)
    listener, found = sockets.listen("app")
    assert sockets.find() == [found]
    close((listener, found))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime_dir / "nothing"))
    assert sockets.find() == []
    with pytest.raises(ExposeError, match="there is none for temporary files"):
        sockets.listen("app")


def test_a_path_that_is_too_long_says_so(runtime_dir, monkeypatch):
    long = runtime_dir / ("x" * 90)
    long.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(long))
    monkeypatch.setenv("TMPDIR", str(long))
    with pytest.raises(ExposeError, match="is too long for a socket"):
        sockets.listen("app")
