"""Programs that a model might write, the hostile ones too. What needs namespaces is skipped where there are none."""

import functools
import os
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from roll_opd.environments import sandbox
from roll_opd.environments.sandbox import PythonResult, run_python
from roll_opd.errors import LaunchError


@pytest.fixture(scope="module", autouse=True)
def isolation():
    try:
        return sandbox.require_isolation()
    except LaunchError:
        return None


@pytest.fixture
def isolated(isolation):
    if isolation is None:
        pytest.skip("this machine lets us make no namespaces, and has no working bubblewrap")


@pytest.fixture(params=["auto", "none"])
def run(request, isolation):
    if request.param == "auto" and isolation is None:
        pytest.skip("this machine lets us make no namespaces, and has no working bubblewrap")
    return functools.partial(run_python, timeout_s=10.0, isolation=request.param)


def all_end(processes):
    """Whether they end within 5 s. A zombie has: whoever inherits orphans may be slow to reap them."""
    deadline = time.monotonic() + 5
    while any(map(runs, processes)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not any(map(runs, processes))


def runs(process):
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_what_a_program_prints(run):
    assert run("import math\nprint(math.comb(10, 3))\nprint('∑é')") == PythonResult("120\n∑é\n", None)
    assert run("") == PythonResult("", None)


def test_errors_are_the_programs_own_words(run):
    result = run("print('before')\n1 / 0")
    assert result.stdout == "before\n"
    assert result.error.splitlines()[-1] == "ZeroDivisionError: division by zero"
    assert "SyntaxError" in run("print(").error
    assert "SyntaxError" in run("x = '\ud800\0'").error  # a lone surrogate has no bytes; a null is no source
    assert "EOFError" in run("input()").error
    assert run("import sys; sys.exit(3)") == PythonResult("", "the program ended with exit code 3")
    assert run("import os; os.abort()") == PythonResult("", "the program was ended by SIGABRT")


def test_only_the_standard_library_and_no_environment(run, monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    assert run("import os; print(sorted(os.environ))").stdout in ("['LC_CTYPE']\n", "[]\n")
    assert "ModuleNotFoundError" in run("import pytest").error
    assert run("import os; print(os.listdir('.'))").stdout == "[]\n"


def test_an_endless_loop_ends_at_the_deadline(run):
    started = time.monotonic()
    result = run("print('started')\nwhile True: pass", timeout_s=1.0)
    assert result == PythonResult("started\n", "the program was stopped after 1 seconds", timed_out=True)
    assert time.monotonic() - started < 30


def test_a_flood_is_cut(run):
    result = run("while True: print('x' * 999)", max_output=1500)
    assert result.stdout == "x" * 999 + "\n" + "x" * 500
    assert result.error == "the program was stopped: it wrote more than 1500 bytes"
    assert not result.timed_out
    assert run("print('abc')", max_output=1).stdout == "a"
    assert len(run("import sys\nwhile True: sys.stderr.write('y' * 999)", max_output=1500).error) < 1500


def test_memory_is_limited(run):
    assert run("x = bytearray(4 << 30)", memory_mb=256).error.endswith("MemoryError")


def test_what_a_program_leaves_behind_does_not_hold_us_up(run):
    isolated = run.keywords["isolation"] == "auto"
    if not isolated and os.geteuid() != 0:
        pytest.skip("a user's other processes count against the limit, and it may not fork at all")
    started = time.monotonic()
    result = run("import os, time\nchild = os.fork()\nif not child:\n    time.sleep(60)\nprint(child)")
    assert result.error is None
    assert time.monotonic() - started < 30
    if not isolated and psutil.pid_exists(child := int(result.stdout)):
        assert all_end([psutil.Process(child)])


def test_a_fork_bomb_stays_small_and_ends(isolated):
    code = """
import os, time
made = 0
try:
    while made < 200:
        if os.fork() == 0:
            time.sleep(60)
        made += 1
except OSError:
    pass
print(made < 20)
time.sleep(60)
"""
    seen = {}
    over = threading.Event()

    def watch():
        while not over.wait(0.05):
            seen.update({child.pid: child for child in psutil.Process().children(recursive=True)})

    before = set(psutil.Process().children(recursive=True))
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        result = run_python(code, 1.0)
    finally:
        over.set()
        watcher.join()
    assert (result.stdout, result.timed_out) == ("True\n", True)
    ours = set(seen.values()) - before
    assert len(ours) >= 4  # the sandbox's own and the program's
    assert all_end(ours)


def test_no_network(isolated):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0)
        result = run_python(
            f"import socket; socket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 3)", 5.0
        )
        assert result.error is not None
        assert result.error.splitlines()[-1].startswith(("OSError", "ConnectionRefusedError"))
        with pytest.raises(BlockingIOError):
            server.accept()


def test_no_files_of_ours(isolated, tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("hunter2")
    tmp_path.chmod(0o777)
    secret.chmod(0o666)
    result = run_python(f"print(open({str(secret)!r}).read())", 5.0)
    assert (result.stdout, result.error.splitlines()[-1].partition(":")[0]) == ("", "FileNotFoundError")
    assert run_python(f"open({str(tmp_path / 'new')!r}, 'w')", 5.0).error is not None
    assert run_python(f"import os; os.makedirs({str(tmp_path)!r}); open({str(secret)!r}, 'w')", 5.0)
    assert [path.name for path in tmp_path.iterdir()] == ["secret.txt"]
    assert secret.read_text() == "hunter2"
    # Nor of the system's: what is there is the interpreter and its libraries, and may not be written.
    assert set(run_python("import os; print(*os.listdir('/dev'))", 5.0).stdout.split()) == {"null"}
    assert (
        not run_python("import os; print(*(os.listdir('/etc') + os.listdir('/tmp')))", 5.0)
        .stdout.strip()
        .replace("ld.so.cache", "")
    )
    written = run_python("import os; open(os.path.dirname(os.__file__) + '/new_module.py', 'w')", 5.0)
    assert "Read-only file system" in written.error


def test_a_disk_flood_is_limited(isolated):
    code = "for i in range(100): open(f'/tmp/{i}', 'wb').write(bytes(1 << 20))"
    assert "No space left" in run_python(code, 5.0).error


def test_no_process_of_ours_can_be_signalled(isolated):
    for target in (os.getpid(), -1):
        assert run_python(f"import os; os.kill({target}, 9)", 5.0).error.endswith("No such process")
    # Its parent is the first process of its own namespace, which it cannot kill.
    result = run_python("import os, time; print(os.getppid())\nos.kill(os.getppid(), 9)\ntime.sleep(0.1)", 5.0)
    assert result.stdout == "1\n"


def test_no_way_to_more_rights(isolated):
    code = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
NEWUSER, GET_NO_NEW_PRIVS = 0x10000000, 39
print(libc.unshare(NEWUSER), libc.prctl(GET_NO_NEW_PRIVS, 0, 0, 0, 0), libc.chroot(b'/tmp'), libc.getuid() != 0)
"""
    assert run_python(code, 5.0).stdout == "-1 1 -1 True\n"


def test_programs_side_by_side(run):
    with ThreadPoolExecutor(4) as threads:
        results = list(threads.map(lambda i: run(f"print({i} * {i})"), range(8)))
    assert results == [PythonResult(f"{i * i}\n", None) for i in range(8)]


def test_no_isolation_is_an_error_that_names_the_fix(monkeypatch):
    def denied(method, *arguments):
        if method == "none":
            return PythonResult("ran", None)
        raise LaunchError(f"{method}: Operation not permitted")

    monkeypatch.setattr(sandbox, "_run", denied)
    sandbox.require_isolation.cache_clear()
    try:
        with pytest.raises(LaunchError, match=r"namespaces: Operation not permitted.*apt-get install bubblewrap"):
            run_python("print(1)", 5.0)
        assert run_python("print(1)", 5.0, isolation="none") == PythonResult("ran", None)
    finally:
        sandbox.require_isolation.cache_clear()


def test_a_sandbox_that_cannot_be_made_is_not_the_programs_fault(isolated, monkeypatch):
    make = sandbox._command

    def broken(*arguments):
        return [part.replace('"/dev/null"', '"/dev/no-such"').replace("/etc/", "/no/") for part in make(*arguments)]

    monkeypatch.setattr(sandbox, "_command", broken)
    with pytest.raises(LaunchError, match="No such file"):
        run_python("print(1)", 5.0)
