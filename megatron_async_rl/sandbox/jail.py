"""What a program that a model wrote may do: compute, read its input, write its output. Runs in the zygote's interpreter.

Layers, from the outside in. Each stops what it can by itself; tests/test_sandbox.py switches them off one by one.

    user        another than root: uid and gid 65534 where we are root
    namespaces  no network, no other process, no shared memory to be seen (user, net, pid, ipc, uts, mount)
    limits      memory, processor time, open files, size of files
    landlock    files: what lies below `readable` may be read; nothing may be written, made or executed
    seccomp     calls of the kernel: those of ALLOWED; no new process, no socket, no signal to anyone

Standard library alone, and Python 3.9: it is imported by reward.code_python, which knows no package of ours.
"""

import ctypes
import os
import platform
import resource
import signal
from pathlib import Path

NOBODY = 65534
LAYERS = ("namespaces", "landlock", "seccomp")

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long

# ---- numbers of the kernel's (x86-64)

CLONE_THREAD = 0x00010000
_NEW = {
    "mount": 0x00020000,
    "uts": 0x04000000,
    "ipc": 0x08000000,
    "user": 0x10000000,
    "pid": 0x20000000,
    "net": 0x40000000,
}
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP = 1, 4, 38, 22
SYS_LANDLOCK_CREATE, SYS_LANDLOCK_ADD, SYS_LANDLOCK_RESTRICT = 444, 445, 446
AUDIT_ARCH_X86_64 = 0xC000003E

# fmt: off
ALLOWED = {
    "read": 0, "write": 1, "open": 2, "close": 3, "stat": 4, "fstat": 5, "lstat": 6, "poll": 7, "lseek": 8, "mmap": 9,
    "mprotect": 10, "munmap": 11, "brk": 12, "rt_sigaction": 13, "rt_sigprocmask": 14, "rt_sigreturn": 15, "pread64": 17,
    "pwrite64": 18, "readv": 19, "writev": 20, "access": 21, "pipe": 22, "select": 23, "sched_yield": 24, "mremap": 25,
    "madvise": 28, "dup": 32, "dup2": 33, "nanosleep": 35, "getitimer": 36, "alarm": 37, "setitimer": 38, "getpid": 39,
    "exit": 60, "uname": 63, "getcwd": 79, "readlink": 89, "gettimeofday": 96, "getrlimit": 97, "getrusage": 98,
    "sysinfo": 99, "times": 100, "getuid": 102, "getgid": 104, "geteuid": 107, "getegid": 108, "getppid": 110,
    "sigaltstack": 131, "gettid": 186, "time": 201, "futex": 202, "sched_getaffinity": 204, "getdents64": 217,
    "clock_gettime": 228, "clock_getres": 229, "clock_nanosleep": 230, "exit_group": 231, "epoll_wait": 232,
    "epoll_ctl": 233, "openat": 257, "newfstatat": 262, "pselect6": 270, "ppoll": 271, "set_robust_list": 273,
    "epoll_pwait": 281, "eventfd2": 290, "epoll_create1": 291, "dup3": 292, "pipe2": 293, "getrandom": 318, "statx": 332,
    "rseq": 334,
}
# A program that asks for one of these is no honest one that lost its way: it ends at once.
FATAL = {
    "ptrace": 101, "process_vm_readv": 310, "process_vm_writev": 311, "kcmp": 312, "mount": 165, "umount2": 166,
    "pivot_root": 155, "chroot": 161, "unshare": 272, "setns": 308, "bpf": 321, "perf_event_open": 298, "add_key": 248,
    "request_key": 249, "keyctl": 250, "init_module": 175, "finit_module": 313, "delete_module": 176, "kexec_load": 246,
    "io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427, "userfaultfd": 323, "reboot": 169,
    "open_by_handle_at": 304, "pidfd_getfd": 438, "open_tree": 428, "move_mount": 429, "fsopen": 430, "fsmount": 432,
    "iopl": 172, "ioperm": 173, "swapon": 167, "settimeofday": 164, "personality": 135,
}
# fmt: on
CLONE, CLONE3, IOCTL, FCNTL, PRLIMIT = 56, 435, 16, 72, 302
IOCTLS = (
    0x5401,
    0x5413,
    0x5450,
    0x5451,
    0x541B,
)  # is it a terminal, its size, close on exec or not, bytes to read
FCNTLS = (0, 1, 2, 3, 1030)  # duplicate, its flags: no owner, who would be sent signals


def is_supported():
    return platform.system() == "Linux" and platform.machine() == "x86_64"


# ---- once per zygote


def die_with_parent():
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def drop_privileges():
    """Root becomes nobody. Whoever is no root stays who he is."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    libc.prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)  # else our own /proc/self/uid_map is root's


def enter_namespaces():
    """New ones of every kind; children are in the new pid namespace, the first of them its init. Raises OSError."""
    uid, gid = os.geteuid(), os.getegid()
    _check(libc.unshare(sum(_NEW.values())), "unshare")
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{uid} {uid} 1"),
        ("gid_map", f"{gid} {gid} 1"),
    ):
        Path(f"/proc/self/{name}").write_text(text)


# ---- once per program, in its own process


def confine(limits, readable, without=()):
    """No way back. `limits`: memory_bytes, wall_s, output_bytes. `readable`: folders. `without`: layers left out, for tests."""
    memory, cpu_s = limits["memory_bytes"], int(limits["wall_s"]) + 1
    for kind, value in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, limits["output_bytes"]),
        (resource.RLIMIT_NOFILE, 16),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
        (resource.RLIMIT_STACK, 64 << 20),
    ):
        resource.setrlimit(kind, (value, value))
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s + 1))
    libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
    _check(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    if "landlock" not in without:
        _landlock(readable)
    if "seccomp" not in without:
        _seccomp()


def landlock_version():
    """0: this kernel has none."""
    return max(0, libc.syscall(SYS_LANDLOCK_CREATE, None, ctypes.c_size_t(0), ctypes.c_uint32(1)))


def _landlock(readable):
    version = landlock_version()
    if not version:
        raise OSError("no Landlock")
    all_of_files = {1: 0x1FFF, 2: 0x3FFF, 3: 0x7FFF, 4: 0x7FFF}.get(version, 0xFFFF)
    tcp, signals_and_sockets = (3 if version >= 4 else 0), (3 if version >= 6 else 0)
    attributes = (ctypes.c_uint64 * 3)(all_of_files, tcp, signals_and_sockets)
    size = 8 if version < 4 else 16 if version < 6 else 24
    rules = _check(
        libc.syscall(
            SYS_LANDLOCK_CREATE, ctypes.byref(attributes), ctypes.c_size_t(size), ctypes.c_uint32(0)
        ),
        "landlock",
    )
    for path in readable:
        folder = os.open(path, os.O_PATH)
        rule = _PathBeneath(0b1100, folder)  # read a file, list a folder; execute nothing
        _check(libc.syscall(SYS_LANDLOCK_ADD, rules, 1, ctypes.byref(rule), 0), "landlock rule")
        os.close(folder)
    _check(libc.syscall(SYS_LANDLOCK_RESTRICT, rules, 0), "landlock")
    os.close(rules)


class _PathBeneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = [("access", ctypes.c_uint64), ("folder", ctypes.c_int32)]


# ---- seccomp: a program of classic BPF over (number, architecture, instruction pointer, six arguments)

_LOAD, _EQUAL, _AT_LEAST, _BITS, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL = 0x7FFF0000, 0x80000000
_EPERM, _ENOSYS = 0x50000 | 1, 0x50000 | 38
_NUMBER, _ARCHITECTURE = 0, 4


def _argument(index, high=False):
    return 16 + 8 * index + (4 if high else 0)


def _if_number(number, block):
    """`block` ends with a return; whoever is not meant jumps over it."""
    return [(_EQUAL, 0, len(block), number), *block]


def filter_program():
    program = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_EQUAL, 1, 0, AUDIT_ARCH_X86_64),
        (_RETURN, 0, 0, _KILL),
    ]
    program += [
        (_LOAD, 0, 0, _NUMBER),
        (_AT_LEAST, 0, 1, 0x40000000),
        (_RETURN, 0, 0, _KILL),
    ]  # the x32 numbers
    for number in sorted(ALLOWED.values()):
        program += _if_number(number, [(_RETURN, 0, 0, _ALLOW)])
    for number in sorted(FATAL.values()):
        program += _if_number(number, [(_RETURN, 0, 0, _KILL)])
    threads = [
        (_LOAD, 0, 0, _argument(0)),
        (_BITS, 0, 1, CLONE_THREAD),
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, _EPERM),
    ]
    program += _if_number(CLONE, threads)
    program += _if_number(
        CLONE3, [(_RETURN, 0, 0, _ENOSYS)]
    )  # what it asks for cannot be seen; the C library falls back
    for number, commands in ((IOCTL, IOCTLS), (FCNTL, FCNTLS)):
        block = [(_LOAD, 0, 0, _argument(1))]
        for command in commands:
            block += [(_EQUAL, 0, 1, command), (_RETURN, 0, 0, _ALLOW)]
        program += _if_number(number, [*block, (_RETURN, 0, 0, _EPERM)])
    looks = [
        (_LOAD, 0, 0, _argument(0)),
        (_EQUAL, 0, 5, 0),
    ]  # its own limits, and only to look at them
    looks += [
        (_LOAD, 0, 0, _argument(2)),
        (_EQUAL, 0, 3, 0),
        (_LOAD, 0, 0, _argument(2, high=True)),
        (_EQUAL, 0, 1, 0),
    ]
    program += _if_number(PRLIMIT, [*looks, (_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _EPERM)])
    return [*program, (_RETURN, 0, 0, _EPERM)]


class _Instruction(ctypes.Structure):
    _fields_ = [
        ("code", ctypes.c_uint16),
        ("yes", ctypes.c_uint8),
        ("no", ctypes.c_uint8),
        ("value", ctypes.c_uint32),
    ]


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_uint16), ("first", ctypes.POINTER(_Instruction))]


def _seccomp():
    instructions = filter_program()
    array = (_Instruction * len(instructions))(*[_Instruction(*one) for one in instructions])
    program = _Program(len(instructions), array)
    _check(libc.prctl(PR_SET_SECCOMP, 2, ctypes.byref(program), 0, 0), "seccomp")


def _check(result, what):
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result
