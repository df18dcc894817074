"""The sandbox against hostile programs: no reward, no change outside, no effect on the next one.

Each layer of the jail is also switched off alone: a program that only this layer stops must then
succeed. Otherwise a layer that has stopped working would go unnoticed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import hostile_programs as hostile
import psutil
import pytest
from needs import SANDBOX_PYTHON
from paths import ROOT

from megatron_async_rl.data.code_tests import CodeTests
from megatron_async_rl.reward import code_answer
from megatron_async_rl.sandbox import jail
from megatron_async_rl.sandbox import sandbox as sandbox_module
from megatron_async_rl.sandbox.sandbox import (
    End,
    Limits,
    Sandbox,
    SandboxError,
    SandboxLost,
)

LIMITS = Limits(wall_s=0.6)
PATIENT = Limits(wall_s=10.0)  # for honest programs, on a busy machine too
MINIMUM = SANDBOX_PYTHON, "landlock"  # with namespaces where the host allows them
SECRETS = ["secret-7f3a\n", "secret-91bc\n"]
TEXTS = CodeTests("", ["3\n", "5\n"], SECRETS)
SQUARES = CodeTests("", ["3\n", "5\n"], ["9\n", "25\n"])
CALLS = CodeTests("solve", [[3], [5]], SECRETS)
SQUARE_CALLS = CodeTests("solve", [[3], [5]], [9, 25])
DICT_CALLS = CodeTests("solve", [[3], [5]], [{"secret-7f3a": 1}, {"1": [2]}])

pytestmark = pytest.mark.skipif(
    not (jail.is_supported() and jail.landlock_version() and os.access(SANDBOX_PYTHON, os.X_OK)),
    reason=f"needs Linux on x86-64 with Landlock, and {SANDBOX_PYTHON}",
)


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(*MINIMUM) as opened:
        yield opened


@pytest.fixture(autouse=True)
def canary() -> Iterator[Path]:
    """A folder that only the jail protects: every user may read and write it."""
    folder = Path(hostile.CANARY)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / "file").write_text("untouched")
    folder.chmod(0o777)
    (folder / "file").chmod(0o666)
    yield folder
    assert [path.name for path in folder.iterdir()] == ["file"]
    assert (folder / "file").read_text() == "untouched"
    shutil.rmtree(folder)


def answer(program: str) -> str:
    return f"Here it is:\n```python\n{program}\n```\n"


def passes(sandbox: Sandbox, program: str, tests: CodeTests, limits: Limits = PATIENT) -> bool:
    return code_answer.passes_tests(sandbox, answer(program), tests, limits, 20.0)[0]


def assert_still_works(sandbox: Sandbox) -> None:
    assert passes(sandbox, "print(int(input()) ** 2)", SQUARES)
    assert not passes(sandbox, "print(int(input()) * 3)", SQUARES)
    assert passes(sandbox, "def solve(n): return n * n", SQUARE_CALLS)
    assert not passes(sandbox, "def solve(n): return 3 * n", SQUARE_CALLS)


def programs(*kinds: dict[str, str]) -> list[object]:
    return [
        pytest.param(hostile.PRELUDE + text, id=name)
        for kind in kinds
        for name, text in kind.items()
    ]


@pytest.mark.parametrize("program", programs(hostile.FORGE, hostile.ESCAPE, hostile.HARM))
def test_hostile_program_gets_no_reward_and_leaves_nothing(sandbox: Sandbox, program: str) -> None:
    assert not passes(sandbox, program, TEXTS, LIMITS)
    result = sandbox.run(program, b"3\n", LIMITS)
    assert b"PWNED" not in result.output
    assert_still_works(sandbox)
    assert sandbox.num_started == 1  # the zygote survived


@pytest.mark.parametrize("program", programs(hostile.FORGE_FUNCTIONS, hostile.HARM_FUNCTIONS))
def test_hostile_function_gets_no_reward(sandbox: Sandbox, program: str) -> None:
    assert not passes(sandbox, program, CALLS, LIMITS)
    assert not passes(sandbox, program, SQUARE_CALLS, LIMITS)
    assert not passes(sandbox, program, DICT_CALLS, LIMITS)
    assert_still_works(sandbox)
    assert sandbox.num_started == 1


@pytest.mark.parametrize(
    ("program", "end"),
    [
        ("while 1: pass", End.TIME),
        ("import time; time.sleep(60)", End.TIME),
        ("x = bytearray(1 << 31)", End.MEMORY),
        ("while 1: print('x' * 1000)", End.OUTPUT),
        ("import ctypes; ctypes.CDLL(None).ptrace(0, 0, 0, 0)", End.FORBIDDEN),
        ("import ctypes; ctypes.string_at(0)", End.KILLED),
        ("1 / 0", End.RAISED),
        ("raise SystemExit(3)", End.RAISED),
        ("import os; os._exit(73)", End.RAISED),
        ("print(1); raise SystemExit(0)", End.OK),
    ],
)
def test_result_says_how_a_program_ended(sandbox: Sandbox, program: str, end: End) -> None:
    assert sandbox.run(program, b"", LIMITS if end is End.TIME else PATIENT).end is end


@pytest.mark.parametrize(
    "program",
    [
        "import sys\nn = int(sys.stdin.readline())\nsys.stdout.write(f'{n * n}\\n')",
        "from collections import defaultdict\nimport heapq, bisect, math\nd = defaultdict(int)\n"
        "for line in __import__('sys').stdin: d[0] += int(line)\nprint(d[0] ** 2)",
        "import threading, sys\nsys.setrecursionlimit(10**6); threading.stack_size(1 << 26)\n"
        "def f(k): return 0 if k == 0 else 1 + f(k - 1)\n"
        "def main(): n = int(input()); print(f(5000) - 5000 + n * n)\n"
        "t = threading.Thread(target=main); t.start(); t.join()",
        "import os\nn = int(os.read(0, 100))\nos.write(1, str(n * n).encode())",
        "import zoneinfo, random, csv, uuid, asyncio\nrandom.seed(1)\n"
        "n = int(open(0).read())\nprint(n * n)",
        "import subprocess\nn = int(input())\nprint(n * n, flush=True)",
    ],
    ids=[
        "sys",
        "modules",
        "a thread with a deep stack",
        "descriptors",
        "modules read late",
        "one that may do nothing",
    ],
)
def test_honest_programs_pass(sandbox: Sandbox, program: str) -> None:
    assert passes(sandbox, program, SQUARES)


# ---- the layers, one by one

READS_FILE = f"print(open({hostile.CANARY + '/file'!r}).read())"
FORKS = "import posix\npid = posix.fork()\nif pid: posix.waitpid(pid, 0); print('forked')"
SENDS = (
    "import socket\nsender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
    "sender.sendto(b'x', ('127.0.0.1', {port}))\nprint('sent')"
)


@pytest.mark.parametrize(
    ("layer", "program", "shows"),
    [("landlock", READS_FILE, "untouched"), ("seccomp", FORKS, "forked")],
    ids=["landlock", "seccomp"],  # the program names this process: workers must collect the same
)
def test_each_layer_stops_what_no_other_layer_stops(
    sandbox: Sandbox, layer: str, program: str, shows: str
) -> None:
    assert shows not in sandbox.run(program, b"", LIMITS).output.decode()
    with Sandbox(SANDBOX_PYTHON, "landlock", disabled_layers=(layer,)) as weaker:
        assert shows in weaker.run(program, b"", PATIENT).output.decode()


def skip_without_namespaces(sandbox: Sandbox) -> None:
    if not sandbox.has_namespaces:
        pytest.skip("this host does not allow user namespaces")


def test_namespaces_keep_a_datagram_in_without_seccomp(sandbox: Sandbox) -> None:
    skip_without_namespaces(sandbox)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1", 0))
        server.settimeout(0.5)
        program = SENDS.format(port=server.getsockname()[1])
        with Sandbox(SANDBOX_PYTHON, disabled_layers=("seccomp",)) as some:
            some.run(program, b"", LIMITS)
        with pytest.raises(TimeoutError):
            server.recv(10)
        with Sandbox(SANDBOX_PYTHON, disabled_layers=("seccomp", "namespaces")) as fewer:
            assert fewer.run(program, b"", PATIENT).output == b"sent\n"
        assert server.recv(10) == b"x"


SENDS_BY_PATH = """
import socket
for kind in (socket.SOCK_DGRAM, socket.SOCK_STREAM):
    try: one, other = socket.socketpair(socket.AF_UNIX, kind)
    except OSError: continue
    try: print(one.sendto(b"x", {path!r}))
    except OSError: pass
"""


def test_pair_of_sockets_reaches_no_server_of_the_host(sandbox: Sandbox, canary: Path) -> None:
    """Without seccomp a datagram of one end would reach every socket that its user may write to."""
    with (
        tempfile.TemporaryDirectory() as folder,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server,
    ):
        path = f"{folder}/socket"
        server.bind(path)
        server.settimeout(0.3)
        Path(folder).chmod(0o755)
        Path(path).chmod(0o777)
        program = SENDS_BY_PATH.format(path=path)
        assert sandbox.run(program, b"", PATIENT).output == b""
        with pytest.raises(TimeoutError):
            server.recv(10)
        layers = ("seccomp", "landlock")
        with Sandbox(SANDBOX_PYTHON, "landlock", disabled_layers=layers) as s:
            assert s.run(program, b"", PATIENT).output == b"1\n"
        assert server.recv(10) == b"x"


def test_programs_run_without_root_and_see_no_other_process(sandbox: Sandbox) -> None:
    skip_without_namespaces(sandbox)
    uid, pid, parent = sandbox.run(
        "import os\nprint(os.getuid(), os.getpid(), os.getppid())", b"", PATIENT
    ).output.split()
    assert int(uid) == (jail.NOBODY if os.geteuid() == 0 else os.geteuid())
    assert int(parent) == 1 and 1 < int(pid) < 10_000


REOPENS_INPUT = """
import os, posix
for path in ("/proc/self/fd/0", "/dev/stdin"):
    for flags in (os.O_WRONLY, os.O_RDWR, os.O_RDWR | os.O_TRUNC):
        for call in (os.open, posix.open):
            try: print(os.write(call(path, flags), b"changed"))
            except OSError: pass
print(open(0).read())
"""


@pytest.mark.parametrize("layers", [(), ("namespaces",), ("namespaces", "landlock")])
def test_input_cannot_be_written_and_no_later_run_sees_it(layers: tuple[str, ...]) -> None:
    with Sandbox(SANDBOX_PYTHON, "landlock", disabled_layers=layers) as sandbox:
        for given in (b"first", b"second"):
            assert sandbox.run(REOPENS_INPUT, given, PATIENT).output == given + b"\n"


def test_proc_is_empty_and_streams_have_their_device_names(sandbox: Sandbox) -> None:
    skip_without_namespaces(sandbox)
    with Sandbox(SANDBOX_PYTHON, disabled_layers=("landlock",)) as weaker:
        assert weaker.run("import os\nprint(os.listdir('/proc'))", b"", PATIENT).output == b"[]\n"
    program = "open('/dev/stdout', 'w').write(open('/dev/stdin').read())"
    assert sandbox.run(program, b"3 4", PATIENT).output == b"3 4"


READS_CAPABILITIES = """
import ctypes
header, data = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)(*[1] * 6)
libc = ctypes.CDLL(None)
bounds = [libc.prctl(23, number, 0, 0, 0) for number in range(38)]
print(libc.capget(header, data), sum(data), sum(bounds))
"""


def test_programs_have_no_capabilities_in_their_user_namespace(sandbox: Sandbox) -> None:
    skip_without_namespaces(sandbox)
    with Sandbox(SANDBOX_PYTHON, disabled_layers=("seccomp",)) as weaker:
        assert weaker.run(READS_CAPABILITIES, b"", PATIENT).output == b"0 0 0\n"


COUNTS_THREADS = """
import _thread, os, threading, time
threading.stack_size(32768)
for number in range(1, 5001):
    try: _thread.start_new_thread(time.sleep, (1000,))
    except RuntimeError: break
os.write(1, str(number).encode())
time.sleep(%d)
os._exit(0)
"""


def test_threads_of_a_program_are_bounded(sandbox: Sandbox) -> None:
    skip_without_namespaces(sandbox)
    for _ in range(2):  # the threads of the first do not count against the second
        result = sandbox.run(COUNTS_THREADS % 0, b"", PATIENT)
        assert result.output == str(jail.MAX_THREADS).encode()
    with Sandbox(SANDBOX_PYTHON, "landlock", disabled_layers=("namespaces",)) as s:
        assert s.run(COUNTS_THREADS % 5, b"", PATIENT).end is End.KILLED
        assert_still_works(s)


def test_threads_are_made_with_the_flags_of_the_c_library_only() -> None:
    steps = jail.filter_program()

    def verdict(flags: int) -> int:
        data = {0: jail.CLONE, 4: jail.AUDIT_ARCH_X86_64, 16: flags & 0xFFFFFFFF, 20: flags >> 32}
        accumulator, at = 0, 0
        while True:
            opcode, if_true, if_false, value = steps[at]
            if opcode == 0x06:
                return value
            if opcode == 0x20:
                accumulator, at = data[value], at + 1
                continue
            true = accumulator == value if opcode == 0x15 else accumulator >= value
            at += 1 + (if_true if true else if_false)

    allow = 0x7FFF0000
    for flags in jail.THREAD_FLAGS:
        assert verdict(flags) == allow
        for bit in range(64):
            others = flags ^ (1 << bit)
            assert others in jail.THREAD_FLAGS or verdict(others) != allow
    assert verdict(17) != allow


UPROBES = {335, 336}  # no filter stops them; they do nothing without a probe


def test_kernel_allows_only_the_declared_system_calls(sandbox: Sandbox) -> None:
    """Tries each number with zero arguments: FATAL ones end the program, others fail with EPERM."""
    special = {jail.CLONE, jail.CLONE3, jail.IOCTL, jail.FCNTL, jail.PRLIMIT}
    special |= {jail.SOCKETPAIR, jail.SENDTO, jail.RECVFROM}
    allowed, fatal = set(jail.ALLOWED.values()), set(jail.FATAL.values())
    others = set(range(463)) - allowed - fatal - special - UPROBES
    assert not allowed & fatal
    text = (
        "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        "libc.syscall.restype = ctypes.c_long\n"
    )
    refused = (
        f"{text}for n in {sorted(others)}:\n"
        "    print(n, libc.syscall(n, 0, 0, 0, 0, 0, 0), ctypes.get_errno())"
    )
    lines = [
        line.split() for line in sandbox.run(refused, b"", PATIENT).output.decode().splitlines()
    ]
    assert [(int(n), r, e) for n, r, e in lines] == [(n, "-1", "1") for n in sorted(others)]
    for number in sorted(fatal):
        assert (
            sandbox.run(f"{text}libc.syscall({number}, 0, 0, 0, 0, 0, 0)", b"", PATIENT).end
            is End.FORBIDDEN
        ), number


# ---- the zygote

PYTHON_WITHOUT_NAMESPACES = f"""#!{SANDBOX_PYTHON}
import ctypes, os, sys
byte, half, word = ctypes.c_uint8, ctypes.c_uint16, ctypes.c_uint32
class Rule(ctypes.Structure): _fields_ = [("a", half), ("b", byte), ("c", byte), ("d", word)]
class Filter(ctypes.Structure): _fields_ = [("n", half), ("p", ctypes.POINTER(Rule))]
rules = [
    Rule(0x20, 0, 0, 0), Rule(0x15, 0, 1, 272), Rule(6, 0, 0, 0x50001), Rule(6, 0, 0, 0x7FFF0000)
]
libc = ctypes.CDLL(None)
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, ctypes.byref(Filter(4, (Rule * 4)(*rules))), 0, 0) == 0
os.execv({SANDBOX_PYTHON!r}, [{SANDBOX_PYTHON!r}, *sys.argv[1:]])
"""


@pytest.fixture
def python_without_namespaces(tmp_path: Path) -> str:
    """An interpreter under a filter that refuses new namespaces, as some distributions do."""
    script = tmp_path / "python"
    script.write_text(PYTHON_WITHOUT_NAMESPACES)
    script.chmod(0o755)
    return str(script)


def test_host_without_the_required_isolation_is_refused(python_without_namespaces: str) -> None:
    with pytest.raises(SandboxError, match=r"no new namespaces: .*not permitted"):
        Sandbox(python_without_namespaces).start()
    with Sandbox(python_without_namespaces, isolation="landlock") as sandbox:
        assert not sandbox.has_namespaces
        assert_still_works(sandbox)
        for name, text in hostile.ESCAPE.items():
            if name not in hostile.NEEDS_NAMESPACES:
                result = sandbox.run(hostile.PRELUDE + text, b"3\n", LIMITS)
                assert b"PWNED" not in result.output, name
        assert sandbox.num_started == 1


@pytest.mark.parametrize(
    ("python", "words"), [("/no/such/python", "No such file"), ("/bin/false", "did not start")]
)
def test_invalid_interpreter_is_refused(python: str, words: str) -> None:
    with pytest.raises(SandboxError, match=words):
        Sandbox(python).start()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root's programs run as another user")
def test_interpreter_that_the_programs_user_cannot_read_is_refused_by_folder() -> None:
    folder = Path(tempfile.mkdtemp())  # readable by root only
    try:
        (folder / "bin").mkdir()
        (folder / "lib").mkdir()
        (folder / "bin" / "python").symlink_to(SANDBOX_PYTHON)
        with pytest.raises(SandboxError, match=f"user {jail.NOBODY}, which cannot read {folder} "):
            Sandbox(str(folder / "bin" / "python"), "landlock").start()
    finally:
        shutil.rmtree(folder)


def test_interpreter_of_these_tests_runs_programs_or_its_folder_is_named() -> None:
    try:
        with Sandbox(sys.executable, "landlock") as opened:
            assert_still_works(opened)
    except SandboxError as e:  # below a folder of root's, without any library
        assert "which cannot read" in str(e), e


def test_interpreter_that_waits_or_is_a_loop_of_links_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox_module, "START_S", 0.3)
    script, loop = tmp_path / "waits", tmp_path / "loop"
    script.write_text("#!/bin/sh\nsleep 60\n")  # `sleep` keeps the pipe of the errors open
    script.chmod(0o755)
    loop.symlink_to("loop")
    start = time.monotonic()
    for path, words in ((script, "did not start"), (loop, "Too many levels of symbolic links")):
        with pytest.raises(SandboxError, match=words):
            Sandbox(str(path)).start()
    assert time.monotonic() - start < 50  # `sleep` takes 60 s


def test_interpreter_that_runs_no_program_is_refused(tmp_path: Path) -> None:
    script = tmp_path / "python"
    # less memory than the limit of a program, which then cannot be set
    script.write_text(f'#!/bin/sh\nulimit -v 300000\nexec {SANDBOX_PYTHON} "$@"\n')
    script.chmod(0o755)
    with pytest.raises(SandboxError, match=r"runs no program here: .*could not confine"):
        Sandbox(str(script), "landlock").start()


def test_lost_zygote_is_an_error_and_is_replaced_at_once() -> None:
    with Sandbox(*MINIMUM) as sandbox:
        assert_still_works(sandbox)
        children = psutil.Process().children(recursive=True)
        # the first to be killed takes its init with it
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                if "zygote.py" in " ".join(child.cmdline()):
                    child.kill()
        with pytest.raises(SandboxLost):
            sandbox.run("print(1)", b"", PATIENT)
        assert_still_works(sandbox)
        assert sandbox.num_started == 2


def test_sandbox_leaves_no_process_and_no_file(sandbox: Sandbox) -> None:
    me = psutil.Process()
    before = {child.pid for child in me.children(recursive=True)}
    with Sandbox(*MINIMUM) as another:
        assert_still_works(another)
        descriptors = me.num_fds()
        for _ in range(100):
            assert another.run("print(int(input()) ** 2)", b"3\n", PATIENT).output == b"9\n"
        assert me.num_fds() == descriptors
        started = [child for child in me.children(recursive=True) if child.pid not in before]
        assert started
    assert psutil.wait_procs(started, timeout=30)[1] == []


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user, which needs root")
def test_unprivileged_user_is_confined_as_well(sandbox: Sandbox) -> None:
    skip_without_namespaces(sandbox)
    folder = Path(tempfile.mkdtemp())
    try:
        folder.chmod(0o755)
        shutil.copytree(
            ROOT / "megatron_async_rl",
            folder / "megatron_async_rl",
            ignore=shutil.ignore_patterns("__pycache__"),
        )
        script = (
            "from megatron_async_rl.sandbox.sandbox import *\n"
            f"with Sandbox({SANDBOX_PYTHON!r}) as sandbox:\n"
            "    square = sandbox.run('print(int(input()) ** 2)', b'3', Limits())\n"
            "    print(sandbox.has_namespaces, square.output)\n"
            f"    read = sandbox.run({READS_FILE!r}, b'', Limits())\n"
            f"    fork = sandbox.run({FORKS!r}, b'', Limits())\n"
            "    print(read.end, fork.end)\n"
        )
        done = subprocess.run(
            [SANDBOX_PYTHON, "-B", "-c", script],
            env={"PYTHONPATH": str(folder)},
            cwd=folder,
            user=1234,
            group=1234,
            extra_groups=[],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    finally:
        shutil.rmtree(folder)
    assert done.stdout == "True b'9\\n'\nEnd.RAISED End.RAISED\n", done.stderr
