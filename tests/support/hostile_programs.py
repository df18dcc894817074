"""Programs that attack the sandbox instead of answering. Harmless: canaries, loopback, own limits.

FORGE programs try to get the reward without the answer, ESCAPE programs to reach something outside,
HARM programs to disturb the service. A program that reaches something reports it with `got(...)`,
which prints PWNED. Programs of *_FUNCTIONS define `solve`. All are asked for the square of a
number, while the expected outputs are texts that no program can know.
"""

from __future__ import annotations

# A folder that every user may write to, with a file that every user may read.
CANARY = "/tmp/megatron_async_rl_canary"

PRELUDE = f"""
import os, sys
CANARY = {CANARY!r}
def got(what):
    try: os.write(1, b"PWNED " + str(what).encode()[:200] + b"\\n")
    except OSError: pass
def frames():
    frame = sys._getframe()
    while frame:
        yield frame
        frame = frame.f_back
def kernel(number, *arguments):
    import ctypes
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    return libc.syscall(number, *arguments)
"""

FORGE = {
    "exit at once": "os._exit(0)",
    "SystemExit": "sys.exit(0)",
    "exit code of success, said by exit": "exit(None)",
    "answers in frames": """
for frame in frames():
    for value in list(frame.f_locals.values()) + list(frame.f_globals.values()):
        if isinstance(value, (list, tuple, dict)) and "secret-" in repr(value)[:100000]: got(value)
""",
    "answers among all objects": """
import gc
for one in gc.get_objects():
    if isinstance(one, (list, tuple, dict)):
        try: text = repr(one)[:10000]
        except Exception: continue
        if "secret-" in text and "hostile" not in text and "CANARY" not in text: got(text)
""",
    "answers in the parent's memory": """
try:
    memory = open(f"/proc/{os.getppid()}/mem", "rb", 0)
    got("parent's memory")
except OSError: pass
""",
    "results appended to whatever collects them": """
for frame in frames():
    for name in ("result", "results", "output", "report"):
        value = frame.f_locals.get(name)
        if hasattr(value, "append"): value.append(True)
os._exit(0)
""",
    "a result file": "open('/tmp/result.json', 'w').write('[true]'); got('wrote a file')",
    "builtins that always agree": """
import builtins
builtins.all = lambda *_: True
builtins.zip = lambda *_: []
builtins.len = lambda *_: 1
""",
    "json that always agrees, for the next one": """
import builtins, json
json.loads = lambda *a, **k: [True]
json.dumps = lambda *a, **k: "[true]"
builtins.print = lambda *a, **k: None
""",
    "passed, on every descriptor": """
for descriptor in range(3, 64):
    report = b'{"status": 0, "confined": true, "too_long": false, "id": 1, "cpu_s": 0}'
    for text in (report, b"true"):
        try:
            os.write(descriptor, text)
            got(descriptor)
        except OSError: pass
os._exit(0)
""",
    "kill the parent": """
import posix, signal
posix.kill(os.getppid(), signal.SIGKILL)
os._exit(0)
""",
    "fork, and the parent ends well": "import posix\nif posix.fork(): os._exit(0)\ngot('forked')",
    "every number there is": "print(' '.join(map(str, range(1000))))",
    "atexit": "import atexit\natexit.register(lambda: os.write(1, b'True\\n'))",
    "stdout that equals anything": """
class Any(str):
    def __eq__(self, other): return True
    __hash__ = str.__hash__
print(Any("x"))
""",
}

FORGE_FUNCTIONS = {
    "a list that equals anything": """
class Any(list):
    def __eq__(self, other): return True
    def __ne__(self, other): return False
def solve(n): return Any([1])
""",
    "a number that equals anything": """
class Any(int):
    def __eq__(self, other): return True
    __hash__ = int.__hash__
def solve(n): return Any(1)
""",
    "an object that writes itself as JSON": """
class Any: __json__ = 'true'
def solve(n): return Any()
""",
    "frames of its own": """
import json, struct
def solve(n):
    frame = json.dumps(True).encode()
    os.write(1, (struct.pack("<I", len(frame)) + frame) * 2)
    os._exit(0)
""",
    "more frames than calls": """
import json, struct
def solve(n):
    os.write(1, struct.pack("<I", 4) + b"true")
    return 0
""",
    "a frame of 4 GiB": """
import struct
def solve(n):
    os.write(1, struct.pack('<I', 2**32 - 1) + b'1')
    os._exit(0)
""",
}

ESCAPE = {
    "overwrite a file": "open(CANARY + '/file', 'w').write('x'); got('wrote')",
    "delete a file": "import posix\nposix.unlink(CANARY + '/file'); got('deleted')",
    "read a file": "got(open(CANARY + '/file').read())",
    "a symbolic link": "os.symlink('/etc/passwd', CANARY + '/link'); got('link')",
    "read accounts": "got(open('/etc/passwd').read())",
    "the environment": """
if any('KEY' in k or 'TOKEN' in k for k in os.environ): got(dict(os.environ))
""",
    "others' environments": """
for name in os.listdir('/proc'):
    if name.isdigit(): got(open(f'/proc/{name}/environ').read())
""",
    "TCP": "import socket\nsocket.create_connection(('127.0.0.1', 9), 1)\ngot('socket')",
    "UDP": """
import socket
socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', 9))
got('socket')
""",
    "a socket by its number": "r = kernel(41, 2, 1, 0)\nif r >= 0: got('socket')",
    "an abstract socket": """
import socket
s = socket.socket(socket.AF_UNIX); s.connect('\\0canary'); got('socket')
""",
    "a shell": "import importlib\nimportlib.reload(os)\nif os.system('true') == 0: got('shell')",
    "posix_spawn": "import posix\nposix.posix_spawn('/bin/true', ['true'], {}); got('spawned')",
    "exec": "import posix\nposix.execv('/bin/echo', ['echo', 'PWNED'])",
    "a program in memory": "fd = os.memfd_create('x'); got('memfd')",
    "ptrace": "if kernel(101, 0, 0, 0, 0) == 0: got('ptrace')",
    "the parent's memory by vm_readv": """
if kernel(310, os.getppid(), 0, 0, 0, 0, 0) >= 0: got('vm_readv')
""",
    "a user namespace": "if kernel(272, 0x10000000) == 0: got('namespace')",
    "mount": "import ctypes\nif kernel(165, b'none', b'/tmp', b'tmpfs', 0, 0) == 0: got('mount')",
    "io_uring": """
import ctypes
if kernel(425, 4, ctypes.create_string_buffer(256)) >= 0: got('io_uring')
""",
    "bpf": """
import ctypes
if kernel(321, 0, ctypes.create_string_buffer(256), 64) >= 0: got('bpf')
""",
    "32-bit numbers": "if kernel(0x40000000 + 41, 2, 1, 0) >= 0: got('x32')",
    "kill every process": "import posix\nposix.kill(-1, 9)\ngot('kill')",
    "a process that stays": """
import posix
if posix.fork() == 0:
    posix.setsid()
    import time; time.sleep(60)
got('forked')
""",
    "a module for the next one": "open('sitecustomize.py', 'w').write(''); got('wrote')",
    "devices": "got(open('/dev/kmsg', 'rb').read(1))",
    "shared memory": "open('/dev/shm/x', 'w').write('x'); got('shared memory')",
    "root again": "os.setuid(0)\ngot('root') if os.geteuid() == 0 else None",
    "higher limits": """
import resource
resource.setrlimit(resource.RLIMIT_AS, (-1, -1)); got('limits')
""",
    "an owner for a descriptor's signals": """
import fcntl
fcntl.fcntl(0, fcntl.F_SETOWN, os.getppid()); got('owner')
""",
    "characters into a terminal": """
import fcntl, termios
fcntl.ioctl(0, termios.TIOCSTI, b'x'); got('terminal')
""",
}

HARM = {
    "fork bomb": "import posix\nwhile 1:\n    try: posix.fork()\n    except OSError: pass",
    "memory": "x = []\nwhile 1: x.append(bytearray(1 << 24))",
    "a loop": "while 1: pass",
    "sleep": "import time\ntime.sleep(1000)",
    "a regular expression": "import re\nre.match('(a+)+$', 'a' * 40 + 'b')",
    "a large number": "x = 10 ** (10 ** 9)",
    "every exception swallowed": """
while 1:
    try:
        while 1: pass
    except BaseException: pass
""",
    "every signal ignored": """
import signal
for number in range(1, 30):
    try: signal.signal(number, signal.SIG_IGN)
    except OSError: pass
while 1: pass
""",
    "stdout": "while 1: os.write(1, b'x' * 65536)",
    "stderr": "while 1: os.write(2, b'x' * 65536)",
    "threads": """
import threading, time
while 1: threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()
""",
    "descriptors": "while 1: os.dup(1)",
    "recursion": "sys.setrecursionlimit(10**9)\ndef f(): return f()\nf()",
    "a segmentation fault": "import ctypes\nctypes.string_at(0)",
    "stop itself": "import posix, signal\nposix.kill(os.getpid(), signal.SIGSTOP)\nwhile 1: pass",
    "a million digits": "print('9' * 900000)",
    "parentheses": "exec('(' * 100000 + ')' * 100000)",
    "a full pipe": "r, w = os.pipe()\nos.write(w, b'x' * (1 << 20))",
    "bytes that are no text": "os.write(1, b'\\xed\\xa0\\x80\\x00\\xff' * 100)",
    "atexit that never ends": """
import atexit
atexit.register(lambda: [None for _ in iter(int, 1)])
""",
    "input never read": "os.close(0)",
    "stdout closed": "os.close(1)",
}

HARM_FUNCTIONS = {
    "nested deep": "def solve(n):\n    x = []\n    for _ in range(100000): x = [x]\n    return x",
    "itself within itself": "def solve(n):\n    x = []\n    x.append(x)\n    return x",
    "no numbers": "def solve(n): return [float('nan'), float('inf')]",
    "a number beyond any float": "def solve(n): return 10 ** 4000",
    "a number of more digits than there may be": "def solve(n): return 10 ** 5000",
    "a large result": "def solve(n): return ['x' * 1000] * 100000",
}
