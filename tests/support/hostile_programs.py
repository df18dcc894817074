"""Programs that attack the sandbox instead of answering. Harmless: canaries, loopback, own limits.

FORGE programs try to get the reward without the answer, ESCAPE programs to reach something outside,
HARM programs to disturb the service. A program that reaches something reports it with `got(...)`,
which prints PWNED. Programs of *_FUNCTIONS define `solve`. All are asked for the square of a
number, while the expected outputs are texts that no program can know.
"""

from __future__ import annotations

import os

# A folder that every user may write to, with a file that every user may read; of this process.
CANARY = f"/tmp/megatron_async_rl_canary-{os.getpid()}"

# Programs of ESCAPE that are held by the empty /proc alone. What they open without it is of no use:
# setns kills the program, and no ioctl of a namespace is allowed.
NEEDS_NAMESPACES = {"its own namespaces"}

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
def write_result(data):
    for descriptor in (3, 1):
        try: return os.write(descriptor, data)
        except OSError: pass
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
    "exit before the first line": "import builtins\nbuiltins.exit(0)",
    "the input as the answer": "print(sys.stdin.read())",
    "an empty answer": "sys.stdout.close()",
    "its own source as the answer": "import inspect\nprint(inspect.getsource(kernel))",
    "the answers in a thread's frames": """
import threading, time
def look():
    for frame in sys._current_frames().values():
        while frame:
            if "secret-" in repr(frame.f_locals.get("job", "")): got("job")
            frame = frame.f_back
threading.Thread(target=look).start()
""",
    "the answers in the zygote's modules": """
for name, module in list(sys.modules.items()):
    for key, value in list(vars(module).items()) if module else ():
        if key in ("tests", "outputs", "expected"): got((name, key))
""",
    "the answers in memory": """
import ctypes, re
try: maps = open("/proc/self/maps").read()
except OSError: maps = ""
for start, end in re.findall(r"(\\w+)-(\\w+) rw", maps):
    found = ctypes.string_at(int(start, 16), int(end, 16) - int(start, 16)).find(b"secret-7f")
    if found >= 0: got("answer in memory")
""",
    "an exit function in place of the zygote's": """
os._exit = lambda code: None
import zygote
""",
    "a hook at the end that writes for the next one": """
import atexit, threading
atexit.register(lambda: [os.write(n, b"secret-7f3a\\n") for n in range(2, 9)])
""",
    "a trace function over its callers": """
for frame in frames():
    frame.f_trace = lambda *a: None
    frame.f_trace_opcodes = True
sys.settrace(lambda *a: None)
""",
    "locals of its callers": """
import ctypes
for frame in frames():
    for name in ("code", "result", "status", "source"):
        if name in frame.f_locals:
            frame.f_locals[name] = 0
            ctypes.pythonapi.PyFrame_LocalsToFast(ctypes.py_object(frame), ctypes.c_int(0))
os._exit(0)
""",
    "a whole number in words of another script": "print('\u0663')",
    "letters that only look like the answer's": "os.write(1, '\u0455ecret-7f3a\\n'.encode())",
    "an exit code that is no number": "class Code(int):\n    def __and__(self, other): return 0\n"
    "sys.exit(Code(7))",
    "an exit whose code changes each time it is read": """
class E(SystemExit):
    @property
    def code(self): return next(codes)
codes = iter([1, 0, None, 'x'])
raise E
""",
    "a profile function over its callers": """
def look(frame, event, value):
    for one in frame.f_locals.values():
        text = str(one)[:10000]
        if 'secret-' in text and 'CANARY' not in text: got(text)
sys.setprofile(look)
sys.exit(0)
""",
    "isinstance and type that always agree": """
import builtins
builtins.isinstance = lambda *a: True
builtins.type = lambda *a: int
sys.exit('no')
""",
    "an import hook for what runs after it": """
class Hook:
    def find_spec(self, *a): os.write(1, b'True\\n')
sys.meta_path.insert(0, Hook())
""",
    "frames of an exception that is gone": """
try: 1 / 0
except ZeroDivisionError as e: frame = e.__traceback__.tb_frame
while frame:
    if 'expected' in frame.f_locals: got(frame.f_locals['expected'])
    frame = frame.f_back
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
    "a dict frame without pairs": """
import json, struct
def solve(n):
    for frame in ({"dict": 1}, {"dict": [1]}):
        text = json.dumps(frame).encode()
        write_result(struct.pack("<I", len(text)) + text)
    os._exit(0)
""",
    "a dict frame with lists as keys": """
import json, struct
def solve(n):
    text = json.dumps({"dict": [[[1], 2], [{}, 3]]}).encode()
    write_result((struct.pack("<I", len(text)) + text) * 2)
    os._exit(0)
""",
    "an integer frame that is no integer": """
import json, struct
def solve(n):
    for value in ([], "x" * 10000):
        text = json.dumps({"int": value}).encode()
        write_result(struct.pack("<I", len(text)) + text)
    os._exit(0)
""",
    "a frame of another encoding": """
import struct
def solve(n):
    for text in ("9".encode("utf-32"), b"\\xff\\xfe9"):
        write_result(struct.pack("<I", len(text)) + text)
    os._exit(0)
""",
    "a frame of brackets": """
import struct
def solve(n):
    text = b"[" * 200000 + b"]" * 200000
    write_result((struct.pack("<I", len(text)) + text) * 2)
    os._exit(0)
""",
    "a frame of a million digits": """
import struct
def solve(n):
    text = b"9" * 400000
    write_result((struct.pack("<I", len(text)) + text) * 2)
    os._exit(0)
""",
    "half a frame": "def solve(n):\n    write_result(b'\\x04\\x00')\n    os._exit(0)",
    "frames from a second thread": """
import struct, threading
def write():
    while 1: write_result(struct.pack("<I", 4) + b"true")
threading.Thread(target=write, daemon=True).start()
def solve(n): return 0
""",
    "frames before the function is asked for": """
import struct
write_result((struct.pack("<I", 4) + b"true") * 2)
""",
    "a function from the starter names": "solve = None\ndel solve",
    "a Solution that fails on its second construction": """
class Solution:
    made = []
    def __init__(self):
        self.made.append(1)
        if len(self.made) > 1: sys.exit(0)
    def solve(self, n): return n * n
""",
    "a subclass with the right value and its own equality": """
class Any(int):
    def __eq__(self, other): return True
    __hash__ = int.__hash__
def solve(n): return Any(n * n)
""",
    "a namedtuple with its own equality": """
from typing import NamedTuple
class Any(NamedTuple):
    x: int
    def __eq__(self, other): return True
def solve(n): return Any(n)
""",
    "a dict subclass that changes when it is read": """
from collections import OrderedDict
class Any(OrderedDict):
    def items(self): return iter([])
def solve(n): return Any(a=1)
""",
    "a float one unit away": "def solve(n): return (n * n) * (1 + 2e-16) + 1e-9",
    "a result that never ends": """
def solve(n):
    class Endless(list): pass
    x = [1]
    for _ in range(60): x = [x, x]
    return x
""",
    "frames that are null or anything": """
import json, struct
def solve(n):
    for value in ({'none_or': {'none_or': 9}}, {'none_or': True}):
        text = json.dumps(value).encode()
        write_result(struct.pack('<I', len(text)) + text)
    os._exit(0)
""",
    "a node's value with its own equality": """
class V(int):
    def __eq__(self, other): return True
    __hash__ = int.__hash__
def solve(n): return ListNode(V(n * n))
""",
    "an argument in place of a result": "def solve(n) -> None: pass",
    "a frame of infinities": """
import struct
def solve(n):
    for text in (b'1e999', b'-Infinity'): write_result(struct.pack('<I', len(text)) + text)
    os._exit(0)
""",
    "a dict frame with a key of many digits": """
import struct
def solve(n):
    text = b'{"dict": [[' + b'9' * 100000 + b', 1]]}'
    write_result((struct.pack('<I', len(text)) + text) * 2)
    os._exit(0)
""",
    "json.dumps replaced": """
import json
json.dumps = lambda *a, **k: "true"
def solve(n): return 0
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
    "a pair of datagram sockets": """
import socket
pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM); got("datagrams")
pair[0].sendto(b"x", CANARY + "/socket")
""",
    "a pair of packet sockets": """
import socket
socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET); got("packets")
""",
    "pairs of other families": """
import ctypes
for family in range(46):
    for kind in (1, 2, 3, 5):
        for protocol in (0, 1, 6, 17):
            if (family, kind, protocol) == (1, 1, 0): continue
            if kernel(53, family, kind, protocol, ctypes.create_string_buffer(8)) >= 0:
                got((family, kind, protocol))
""",
    "a pair with unknown flags": """
import ctypes
for bit in range(4, 31):
    if bit in (11, 19): continue
    if kernel(53, 1, 1 | 1 << bit, 0, ctypes.create_string_buffer(8)) >= 0: got(bit)
""",
    "an address for one of a pair": """
import socket
one, other = socket.socketpair()
for address in ("\\0canary", CANARY + "/socket", CANARY + "/new"):
    for call in (one.connect, one.bind, lambda to: one.sendto(b"x", to),
                 lambda to: one.sendmsg([b"x"], [], 0, to)):
        try: call(address)
        except OSError: continue
        got(address)
""",
    "an address by system calls": """
import ctypes, socket
one, other = socket.socketpair()
name = b"\\1\\0" + (CANARY + "/socket").encode() + b"\\0"
for number, arguments in ((42, (name, len(name))), (49, (name, len(name))),
                          (44, (b"x", 1, 0, name, len(name)))):
    if kernel(number, one.fileno(), *arguments) >= 0: got(number)
""",
    "a pair that listens": """
import socket
one, other = socket.socketpair()
for call in (one.listen, one.accept):
    try: call()
    except OSError: continue
    got("listens")
""",
    "descriptors through a pair": """
import array, socket
one, other = socket.socketpair()
try:
    one.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0, 1]))])
    got("sent")
except OSError: pass
try:
    one.send(b"x"); other.recvmsg(1, 64); got("received")
except OSError: pass
""",
    "out-of-band data and other flags of a pair": """
import socket
one, other = socket.socketpair()
for bit in range(31):
    for call in (lambda: one.send(b"x", 1 << bit), lambda: other.recv(1, 1 << bit)):
        other.setblocking(False)
        try: call()
        except BlockingIOError: got("waits")
        except OSError: continue
        got(bit)
""",
    "who is at the other end of a pair": """
import socket, struct
one, other = socket.socketpair()
for option in (16, 17, 59, 77):
    try: got(one.getsockopt(socket.SOL_SOCKET, option, 64))
    except OSError: pass
try: one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20); got("an option")
except OSError: pass
""",
    "interfaces and signals by a pair": """
import fcntl, socket
one, other = socket.socketpair()
for request in (0x8901, 0x8902, 0x8903, 0x8904, 0x8910, 0x8912, 0x8927, 0x5452, 0x89E2, 0x89E0):
    try: fcntl.ioctl(one, request, bytearray(128)); got(hex(request))
    except OSError: pass
for command in (4, 8, 10, 15, 1024, 1026, 1033):
    try: fcntl.fcntl(one, command, 1); got(command)
    except OSError: pass
""",
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
    "write to its input": """
for path in ("/proc/self/fd/0", "/dev/stdin", "/dev/fd/0", "/proc/thread-self/fd/0"):
    for flags in (os.O_WRONLY, os.O_RDWR, os.O_WRONLY | os.O_TRUNC, os.O_WRONLY | os.O_APPEND):
        try:
            if os.write(os.open(path, flags), b"changed"): got("input")
        except OSError: pass
""",
    "map its input for writing": """
import mmap
m = mmap.mmap(0, 1, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
m[0] = 120
got("input")
""",
    "its own namespaces": """
for name in ("user", "mnt", "net", "pid", "ipc", "uts", "cgroup", "time"):
    for folder in ("self", "thread-self", f"self/task/{os.getpid()}", str(os.getpid())):
        try: os.open(f"/proc/{folder}/ns/{name}", os.O_RDONLY); got(name)
        except OSError: pass
""",
    "namespaces of init": "os.open('/proc/1/ns/user', os.O_RDONLY); got('init')",
    "namespaces by clone as a thread": """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
entry = ctypes.cast(libc.sleep, ctypes.c_void_p)
words = ctypes.create_string_buffer(64)
for flag in (0x4000000, 0x8000000, 0x40000000, 0x2000000, 0x20000, 0x20000000, 0x10000000, 0x80):
    stack, tls = ctypes.create_string_buffer(16384), ctypes.create_string_buffer(4096)
    top = ctypes.c_void_p((ctypes.addressof(stack) + 16000) & ~15)
    for flags in (0x3d0f00, 0x3d0d00):
        if libc.clone(entry, top, flags | flag, ctypes.c_void_p(1000), words,
                      ctypes.c_void_p(ctypes.addressof(tls) + 2048), words) > 0: got(hex(flag))
""",
    "clone with flags in the upper half": """
for high in (1 << 32, 1 << 33):
    if kernel(56, __import__("ctypes").c_ulong(high | 0x3d0f00), 0, 0, 0, 0) > 0: got("clone")
""",
    "a process that shares memory": "if kernel(56, 0x100 | 17, 0, 0, 0, 0) > 0: got('clone')",
    "vfork": "if kernel(58) > 0: got('vfork')",
    "clone3": """
import ctypes
if kernel(435, ctypes.create_string_buffer(88), 88) > 0: got('clone3')
""",
    "a raised capability": """
import ctypes
header = (ctypes.c_uint32 * 2)(0x20080522, 0)
data = (ctypes.c_uint32 * 6)(*[0xffffffff] * 6)
if kernel(126, header, data) == 0: got("capset")
""",
    "a change of root": "os.chroot('/tmp'); got('chroot')",
    "a host name": "import socket\nsocket.sethostname('pwned'); got('hostname')",
    "a module path in /tmp": """
sys.path.insert(0, CANARY)
open(CANARY + '/evil.py', 'w').write('x = 1'); got('module')
""",
    "bytecode beside the library": """
import py_compile, json
py_compile.compile(json.__file__, cfile=CANARY + '/json.pyc'); got('bytecode')
""",
    "a hard link": "os.link('/usr/lib/os-release', CANARY + '/hard'); got('link')",
    "a rename": "os.rename(CANARY + '/file', CANARY + '/moved'); got('rename')",
    "other permissions": "os.chmod(CANARY + '/file', 0o777); got('chmod')",
    "a truncated file": "os.truncate(CANARY + '/file', 0); got('truncate')",
    "a folder": "os.mkdir(CANARY + '/folder'); got('mkdir')",
    "a named pipe": "os.mkfifo(CANARY + '/pipe'); got('mkfifo')",
    "a new time of a file": "os.utime(CANARY + '/file', (1, 1)); got('utime')",
    "attributes of a file": "os.setxattr(CANARY + '/file', 'user.x', b'1'); got('xattr')",
    "a file without a name": """
os.open('/tmp', os.O_TMPFILE | os.O_RDWR, 0o600); got('tmpfile')
""",
    "the kernel's log": "if kernel(103, 3, bytes(100), 100) > 0: got('syslog')",
    "keys": "if kernel(250, 0, -3, 0) > 0: got('keyctl')",
    "System V shared memory": "if kernel(29, 1234, 4096, 0o1666) >= 0: got('shmget')",
    "a message queue": "if kernel(68, 1234, 0o1666) >= 0: got('msgget')",
    "pairs of sockets without end, and full": """
import socket
kept = []
while True:
    try:
        pair = socket.socketpair()
        kept.append(pair)
        for one in pair: one.setblocking(False)
        while True: pair[0].send(b"x" * 65536)
    except OSError as e:
        if e.errno == 24: break
print("0" * 100)
""",
    "other processors": "os.sched_setaffinity(0, {0}); got('affinity')",
    "a higher priority": "os.setpriority(os.PRIO_PROCESS, 0, -5); got('priority')",
    "a pidfd of the parent": "os.pidfd_open(os.getppid()); got('pidfd')",
    "the parent's limits": """
import resource
resource.prlimit(os.getppid(), resource.RLIMIT_CPU); got('prlimit')
""",
    "a signal to its parent by tgkill": "if kernel(234, 1, 1, 9) == 0: got('tgkill')",
    "the sandbox's source": """
for base, _, names in os.walk("/"):
    if "jail.py" in names: got(open(base + "/jail.py").read()); break
    if base.count("/") > 3: break
""",
    "a library of its own": """
import ctypes
ctypes.CDLL(CANARY + '/file'); got('library')
""",
    "32-bit system calls in machine code": """
import ctypes, mmap
code = mmap.mmap(-1, 4096, prot=7)
code.write(b'\\xb8\\x14\\0\\0\\0\\xcd\\x80\\xc3')  # mov eax, 20 (getpid); int 0x80; ret
address = ctypes.addressof(ctypes.c_char.from_buffer(code))
if ctypes.CFUNCTYPE(ctypes.c_int)(address)() > 0: got('32 bits')
""",
    "listings of folders": """
for path in ('/', '/home', '/root', '/tmp', '/etc', '/var'):
    try: got(os.listdir(path))
    except OSError: pass
""",
    "a lock on a library's file": """
import fcntl
fcntl.flock(open(os.__file__), fcntl.LOCK_EX); got('locked')
""",
    "watches on folders": "if kernel(294, 0) >= 0 or kernel(300, 0, 0) >= 0: got('watch')",
    "memory that nobody else may read": "if kernel(447, 0) >= 0: got('memfd_secret')",
    "signals by other calls": """
if kernel(424, 0, 9, 0, 0) >= 0 or kernel(129, 1, 9, 0) >= 0 or kernel(297, 1, 1, 9, 0) >= 0:
    got('signal')
""",
    "a filter of its own": """
if kernel(317, 1, 0, 0) >= 0 or kernel(157, 22, 2, 0) >= 0: got('filter')
""",
    "pages moved between descriptors": """
r, w = os.pipe()
if kernel(275, 0, None, w, None, 9, 0) >= 0 or kernel(40, w, 0, None, 9) >= 0: got('splice')
if kernel(326, 0, None, w, None, 9, 0) >= 0 or kernel(278, w, None, 0, 0) >= 0: got('copy')
""",
    "pages locked into memory": """
if kernel(151, 3) >= 0 or kernel(149, 0, 4096) == 0: got('locked')
""",
    "queues, semaphores and timers": """
if kernel(240, b'q', 0o102, 0o666, None) >= 0 or kernel(64, 1, 1, 0o1666) >= 0: got('ipc')
if kernel(283, 0, 0) >= 0 or kernel(289, -1, bytes(8), 8, 0) >= 0: got('descriptor')
if kernel(222, 0, None, bytes(8)) == 0: got('timer')
""",
    "a program run from a descriptor": """
kernel(322, os.open(os.__file__, os.O_RDONLY), b'', None, None, 0x1000)
kernel(59, b'/bin/echo', None, None)
if kernel(322, -100, b'/bin/echo', None, None, 0) == 0: got('executed')
""",
    "the null device as a way out": """
fd = os.open(os.devnull, os.O_RDWR)
for path in ('/dev/zero', '/dev/mem', '/dev/full', '/dev/tty'):
    try: os.open(path, os.O_RDWR); got(path)
    except OSError: pass
os.open('../null/../kmsg', os.O_RDONLY, dir_fd=fd); got('kmsg')
""",
    "a folder opened as a path": """
import posix
fd = posix.open('/', 0o10000000)
posix.open('etc/passwd', 0, dir_fd=fd); got('passwd')
""",
    "the descriptors that the zygote had": """
for fd in range(4, 4096):
    try: os.fstat(fd); got(fd)
    except OSError: pass
""",
    "a subprocess with streams": """
import subprocess
got(subprocess.run(['/bin/echo', 'x'], capture_output=True).stdout)
""",
    "a pool of processes": """
import multiprocessing
with multiprocessing.Pool(2) as pool: got(pool.map(abs, [1]))
""",
    "a terminal": "import pty\npty.openpty(); got('terminal')",
    "the clock": "import time\ntime.clock_settime(time.CLOCK_REALTIME, 0); got('clock')",
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
    "threads with small stacks": """
import _thread, threading, time
threading.stack_size(32768)
num = 0
try:
    while 1: _thread.start_new_thread(time.sleep, (1000,)); num += 1
except RuntimeError: pass
if num > 200: got(f"{num} threads")
""",
    "threads by clone": """
import ctypes
libc = ctypes.CDLL(None)
entry = ctypes.cast(libc.sleep, ctypes.c_void_p)
words = [ctypes.create_string_buffer(64) for _ in range(2)]
made = 0
for _ in range(4000):
    stack = ctypes.create_string_buffer(16384)
    words.append(stack)
    top = ctypes.c_void_p((ctypes.addressof(stack) + 16000) & ~15)
    tls = ctypes.create_string_buffer(4096)
    words.append(tls)
    made += libc.clone(entry, top, 0x3d0f00, ctypes.c_void_p(1000), words[0],
                       ctypes.c_void_p(ctypes.addressof(tls) + 2048), words[1]) > 0
if made > 200: got(f"{made} threads")
""",
    "a thread that never ends": """
import threading, time
threading.Thread(target=lambda: [time.sleep(1) for _ in iter(int, 1)]).start()
""",
    "a thread that waits for itself at the end": """
import threading
lock = threading.Lock(); lock.acquire()
threading.Thread(target=lock.acquire).start()
""",
    "exits within exits": """
import atexit
def again(): atexit.register(again); sys.exit(0)
again()
""",
    "a finalizer that never ends": """
class Object:
    def __del__(self):
        while 1: pass
keep = Object()
""",
    "a finalizer that revives its object": """
class Object:
    def __del__(self): sys.kept = [Object() for _ in range(10)]
keep = Object()
""",
    "stdout without a flush": "class Out: pass\nsys.stdout = Out()",
    "stdout whose flush never ends": """
class Out:
    closed = False
    def flush(self):
        while 1: pass
sys.stdout = Out()
""",
    "no stdout": "del sys.stdout, sys.__stdout__",
    "no modules": "sys.modules.clear()",
    "no builtins": "import builtins\nvars(builtins).clear()",
    "a broken threading module": "import threading\nthreading._shutdown = None",
    "a full input": "print(len(sys.stdin.read() * 10**9))",
    "alarms without end": """
import signal
signal.signal(signal.SIGALRM, lambda *a: None)
signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
while 1: pass
""",
    "an alarm at the end": "import signal\nsignal.alarm(1)\nsignal.pause()",
    "a stack of C calls": """
import functools
f = len
for _ in range(200000): f = functools.partial(f)
f([])
""",
    "deep lists at the end": "x = []\nfor _ in range(10**6): x = [x]",
    "a mapping larger than memory": """
import mmap
for _ in range(100): mmap.mmap(-1, 1 << 30)
""",
    "modules whose pop never ends": """
class M(dict):
    def pop(self, *a):
        while 1: pass
sys.modules = M(sys.modules)
""",
    "an exit code that is never computed": """
class E(SystemExit):
    @property
    def code(self):
        while 1: pass
raise E
""",
    "a callback that registers itself": """
import atexit
def again(): atexit.register(again)
again()
""",
    "stdout that would block": """
import array, fcntl
fcntl.ioctl(1, 0x5421, array.array('i', [1]))
for _ in range(1000):
    try: os.write(1, b'x' * 65536)
    except BlockingIOError: break
print('x' * 200000)
""",
    "streams swapped": "os.dup2(0, 1)\nprint('x' * 100000)",
    "an abort": "os.abort()",
    "a busy pipe to itself": """
r, w = os.pipe()
while 1: os.write(w, b'x'); os.read(r, 1)
""",
}

HARM_FUNCTIONS = {
    "a circle of nodes": """
def solve(n):
    node = ListNode(n)
    node.next = node
    return node
""",
    "a function that wraps itself": "def solve(n): return -1\nsolve.__wrapped__ = solve",
    "nested deep": "def solve(n):\n    x = []\n    for _ in range(100000): x = [x]\n    return x",
    "itself within itself": "def solve(n):\n    x = []\n    x.append(x)\n    return x",
    "no numbers": "def solve(n): return [float('nan'), float('inf')]",
    "a number beyond any float": "def solve(n): return 10 ** 4000",
    "a number of more digits than there may be": "def solve(n): return 10 ** 5000",
    "a large result": "def solve(n): return ['x' * 1000] * 100000",
    "a result of many references": """
def solve(n):
    x = [1] * 10
    for _ in range(8): x = [x] * 10
    return x
""",
    "a key for every number": "def solve(n): return dict.fromkeys(range(10**7))",
    "an exit within the call": "def solve(n): sys.exit(0)",
    "a generator": "def solve(n):\n    while 1: yield n",
    "a result with surrogates": "def solve(n): return '\\ud800' * 1000",
    "stdout closed in the call": "def solve(n):\n    for k in range(16): os.close(k)",
}
