"""Confines the calling process before it runs an untrusted program.

The program may compute, read its input and write its output. Layers, from the outside in;
tests/process/test_sandbox.py switches each one off to show that it works on its own:

    user        uid and gid 65534 when started as root, else the current user; no capabilities
    namespaces  no network, no other process, no shared memory (user, net, pid, ipc, uts, mount);
                an empty /proc
    limits      memory, CPU time, threads, open files, file size
    landlock    files below `readable` can be read; nothing can be written, created or executed
    seccomp     only the system calls in ALLOWED; no new process, no socket but a pair that is
                connected to itself, no signal to others

zygote.py imports it in the programs' interpreter: standard library only, Python 3.9 or newer.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import signal
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

NOBODY = 65534
MAX_THREADS = 128  # of one program

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long

# ---- Linux constants (x86-64)

# The flags of a new thread, as glibc and musl pass them. No other flags are allowed: next to
# CLONE_THREAD the kernel also takes those of namespaces.
THREAD_FLAGS = (0x003D0F00, 0x007D0F00)
NEW_NAMESPACES = (
    0x00020000  # mount
    | 0x04000000  # uts
    | 0x08000000  # ipc
    | 0x10000000  # user
    | 0x20000000  # pid
    | 0x40000000  # net
)
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP = 1, 4, 38, 22
PR_CAPBSET_DROP, CAPABILITY_VERSION_3, NUM_CAPABILITIES = 24, 0x20080522, 64
MOUNT_READ_ONLY_EMPTY = 1 | 2 | 4 | 8  # read-only, no setuid, no devices, no execution
SYS_LANDLOCK_CREATE, SYS_LANDLOCK_ADD, SYS_LANDLOCK_RESTRICT = 444, 445, 446
AUDIT_ARCH_X86_64 = 0xC000003E

# fmt: off
ALLOWED = {
    "read": 0, "write": 1, "open": 2, "close": 3, "stat": 4, "fstat": 5, "lstat": 6, "poll": 7,
    "lseek": 8, "mmap": 9, "mprotect": 10, "munmap": 11, "brk": 12, "rt_sigaction": 13,
    "rt_sigprocmask": 14, "rt_sigreturn": 15, "pread64": 17, "pwrite64": 18, "readv": 19,
    "writev": 20, "access": 21, "pipe": 22, "select": 23, "sched_yield": 24, "mremap": 25,
    "madvise": 28, "dup": 32, "dup2": 33, "nanosleep": 35, "getitimer": 36, "alarm": 37,
    "setitimer": 38, "getpid": 39, "exit": 60, "uname": 63, "getcwd": 79, "readlink": 89,
    "gettimeofday": 96, "getrlimit": 97, "getrusage": 98, "sysinfo": 99, "times": 100,
    "getuid": 102, "getgid": 104, "geteuid": 107, "getegid": 108, "getppid": 110,
    "sigaltstack": 131, "gettid": 186, "time": 201, "futex": 202, "sched_getaffinity": 204,
    "getdents64": 217, "clock_gettime": 228, "clock_getres": 229, "clock_nanosleep": 230,
    "exit_group": 231, "epoll_wait": 232, "epoll_ctl": 233, "openat": 257, "newfstatat": 262,
    "pselect6": 270, "ppoll": 271, "set_robust_list": 273, "epoll_pwait": 281, "eventfd2": 290,
    "epoll_create1": 291, "dup3": 292, "pipe2": 293, "getrandom": 318, "statx": 332, "rseq": 334,
}
# System calls that no correct program makes, not even by mistake: they kill the program.
FATAL = {
    "ptrace": 101, "process_vm_readv": 310, "process_vm_writev": 311, "kcmp": 312, "mount": 165,
    "umount2": 166, "pivot_root": 155, "chroot": 161, "unshare": 272, "setns": 308, "bpf": 321,
    "perf_event_open": 298, "add_key": 248, "request_key": 249, "keyctl": 250, "init_module": 175,
    "finit_module": 313, "delete_module": 176, "kexec_load": 246, "io_uring_setup": 425,
    "io_uring_enter": 426, "io_uring_register": 427, "userfaultfd": 323, "reboot": 169,
    "open_by_handle_at": 304, "pidfd_getfd": 438, "open_tree": 428, "move_mount": 429,
    "fsopen": 430, "fsmount": 432, "iopl": 172, "ioperm": 173, "swapon": 167, "settimeofday": 164,
    "personality": 135,
}
# fmt: on
CLONE, CLONE3, IOCTL, FCNTL, PRLIMIT = 56, 435, 16, 72, 302
IOCTLS = (0x5401, 0x5413, 0x5450, 0x5451, 0x541B, 0x5421)
# TCGETS, TIOCGWINSZ, FIONCLEX, FIOCLEX, FIONREAD, FIONBIO
FCNTLS = (0, 1, 2, 3, 1030)  # duplicate, descriptor and status flags; not F_SETOWN (signals)

# A connected pair of stream sockets, for asyncio's wake-ups: a pipe in both directions. Its ends
# have no name, can get none (no bind, no connect) and pass no descriptors (no sendmsg).
SOCKETPAIR, SENDTO, RECVFROM = 53, 44, 45
AF_UNIX = 1
STREAMS = (0x1, 0x801, 0x80001, 0x80801)  # with SOCK_NONBLOCK and SOCK_CLOEXEC


def is_supported() -> bool:
    return platform.system() == "Linux" and platform.machine() == "x86_64"


# ---- once per zygote


def die_with_parent() -> None:
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def drop_privileges() -> None:
    """Switches to uid and gid 65534 if root; otherwise keeps the current user."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    # otherwise /proc/self/uid_map belongs to root and enter_namespaces cannot write it
    libc.prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)


def enter_namespaces() -> None:
    """Enters new namespaces of every kind; the next child is init of the pid namespace.

    An empty file system hides /proc: its links to a process's own namespaces and descriptors are
    open to every process, also behind Landlock. Raises OSError where the host does not allow it.
    """
    uid, gid = os.geteuid(), os.getegid()
    _check(libc.unshare(NEW_NAMESPACES), "unshare")
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1")
    Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1")
    mounted = libc.mount(b"none", b"/proc", b"tmpfs", MOUNT_READ_ONLY_EMPTY, b"size=4k")
    _check(mounted, "a mount over /proc")


def drop_capabilities() -> None:
    """Drops all capabilities, also those that a new user namespace gives."""
    for number in range(NUM_CAPABILITIES):  # fails without CAP_SETPCAP: there is nothing to bound
        libc.prctl(PR_CAPBSET_DROP, number, 0, 0, 0)
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0)
    _check(libc.capset(header, (ctypes.c_uint32 * 6)()), "capset")


def unreadable_folder(readable: Iterable[str]) -> str:
    """Returns an error that names the first folder that this user cannot read, "" if none."""
    for path in map(Path, readable):
        for folder in (*reversed(path.parents), path):
            if not os.access(folder, os.X_OK if folder != path else os.R_OK | os.X_OK):
                return (
                    f"programs run as user {os.geteuid()}, which cannot read {folder} (of {path}, "
                    "where the interpreter has its libraries)"
                )
    return ""


def num_threads(pid: int) -> int:
    """Returns the number of threads of a process, 0 if it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return 0
    return int(fields[17])


# ---- once per program, in its own process


def confine(
    limits: dict[str, Any],
    readable: Iterable[str],
    disabled_layers: Iterable[str] = (),
    max_threads: int | None = None,
) -> None:
    """Applies limits, Landlock and seccomp to this process, irrevocably. Raises OSError.

    `limits`: memory_bytes, wall_s, output_bytes. `readable`: folders. `disabled_layers`: for tests.
    `max_threads` needs a user namespace, or the user's other processes would count too.
    """
    if max_threads is not None:
        num_others = 2  # the zygote and its init
        resource.setrlimit(resource.RLIMIT_NPROC, (max_threads + num_others,) * 2)
    for kind, value in (
        (resource.RLIMIT_AS, limits["memory_bytes"]),
        (resource.RLIMIT_FSIZE, limits["output_bytes"]),
        (resource.RLIMIT_NOFILE, 16),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
        (resource.RLIMIT_STACK, 64 << 20),
    ):
        resource.setrlimit(kind, (value, value))
    cpu_s = int(limits["wall_s"]) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s + 1))
    libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
    _check(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    if "landlock" not in disabled_layers:
        _apply_landlock(readable)
    if "seccomp" not in disabled_layers:
        _apply_seccomp()


def landlock_version() -> int:
    """Returns the kernel's Landlock ABI version, 0 if it has none."""
    return max(0, libc.syscall(SYS_LANDLOCK_CREATE, None, ctypes.c_size_t(0), ctypes.c_uint32(1)))


def _apply_landlock(readable: Iterable[str]) -> None:
    version = landlock_version()
    if not version:
        raise OSError("no Landlock")
    file_access = {1: 0x1FFF, 2: 0x3FFF, 3: 0x7FFF, 4: 0x7FFF}.get(version, 0xFFFF)  # all rights
    tcp, signals_and_sockets = (3 if version >= 4 else 0), (3 if version >= 6 else 0)
    attributes = (ctypes.c_uint64 * 3)(file_access, tcp, signals_and_sockets)
    size = ctypes.c_size_t(8 if version < 4 else 16 if version < 6 else 24)
    created = libc.syscall(SYS_LANDLOCK_CREATE, ctypes.byref(attributes), size, ctypes.c_uint32(0))
    ruleset = _check(created, "landlock")
    for path in readable:
        folder = os.open(path, os.O_PATH)
        rule = _PathBeneath(0b1100, folder)  # read files and list folders, execute nothing
        added = libc.syscall(SYS_LANDLOCK_ADD, ruleset, 1, ctypes.byref(rule), 0)
        _check(added, "landlock rule")
        os.close(folder)
    _check(libc.syscall(SYS_LANDLOCK_RESTRICT, ruleset, 0), "landlock")
    os.close(ruleset)


class _PathBeneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = [("access", ctypes.c_uint64), ("folder", ctypes.c_int32)]


# ---- seccomp: a classic BPF program over struct seccomp_data
# (system call number, architecture, instruction pointer, six arguments)

_LOAD, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06
_ALLOW, _KILL = (_RETURN, 0, 0, 0x7FFF0000), (_RETURN, 0, 0, 0x80000000)
_EPERM, _ENOSYS = (_RETURN, 0, 0, 0x50000 | 1), (_RETURN, 0, 0, 0x50000 | 38)
_NUMBER, _ARCHITECTURE = 0, 4  # offsets in seccomp_data
_Step = tuple[int, int, int, int]  # opcode, jump if true, jump if false, value


def _load_argument(index: int, high: bool = False) -> _Step:
    """Loads the lower or higher 32 bits of a system call's argument."""
    return (_LOAD, 0, 0, 16 + 8 * index + (4 if high else 0))


def _if_number(number: int, block: list[_Step]) -> list[_Step]:
    """Runs `block`, which ends with a return, for this system call; others jump over it."""
    return [(_EQUAL, 0, len(block), number), *block]


def filter_program() -> list[_Step]:
    """Returns the instructions of the filter."""
    program = [(_LOAD, 0, 0, _ARCHITECTURE), (_EQUAL, 1, 0, AUDIT_ARCH_X86_64), _KILL]
    program += [(_LOAD, 0, 0, _NUMBER), (_AT_LEAST, 0, 1, 0x40000000), _KILL]  # x32 numbers
    for number in sorted(ALLOWED.values()):
        program += _if_number(number, [_ALLOW])
    for number in sorted(FATAL.values()):
        program += _if_number(number, [_KILL])
    threads_only = [_load_argument(0, high=True), (_EQUAL, 1, 0, 0), _EPERM, _load_argument(0)]
    for flags in THREAD_FLAGS:
        threads_only += [(_EQUAL, 0, 1, flags), _ALLOW]
    program += _if_number(CLONE, [*threads_only, _EPERM])
    # the filter cannot read clone3's flags, which are in memory; the C library falls back to clone
    program += _if_number(CLONE3, [_ENOSYS])
    for number, commands in ((IOCTL, IOCTLS), (FCNTL, FCNTLS)):
        block = [_load_argument(1)]
        for command in commands:
            block += [(_EQUAL, 0, 1, command), _ALLOW]
        program += _if_number(number, [*block, _EPERM])
    pairs = [_load_argument(0), (_EQUAL, 1, 0, AF_UNIX), _EPERM]
    pairs += [_load_argument(2), (_EQUAL, 1, 0, 0), _EPERM, _load_argument(1)]
    for kind in STREAMS:
        pairs += [(_EQUAL, 0, 1, kind), _ALLOW]
    program += _if_number(SOCKETPAIR, [*pairs, _EPERM])
    # no flags, such as out-of-band data, and no address
    plain = [_load_argument(3), (_EQUAL, 0, 5, 0), _load_argument(4), (_EQUAL, 0, 3, 0)]
    plain += [_load_argument(4, high=True), (_EQUAL, 0, 1, 0), _ALLOW, _EPERM]
    for number in (SENDTO, RECVFROM):
        program += _if_number(number, plain)
    # prlimit only on itself (pid 0) and only to read (no new limits, a null pointer)
    read_own_limits = [_load_argument(0), (_EQUAL, 0, 5, 0)]
    read_own_limits += [_load_argument(2), (_EQUAL, 0, 3, 0)]
    read_own_limits += [_load_argument(2, high=True), (_EQUAL, 0, 1, 0), _ALLOW, _EPERM]
    program += _if_number(PRLIMIT, read_own_limits)
    return [*program, _EPERM]


class _Program(ctypes.Structure):
    _fields_ = [("num_instructions", ctypes.c_uint16), ("first", ctypes.c_void_p)]


def _apply_seccomp() -> None:
    instructions = filter_program()
    packed = b"".join(struct.pack("=HBBI", *step) for step in instructions)
    buffer = ctypes.create_string_buffer(packed, len(packed))
    program = _Program(len(instructions), ctypes.addressof(buffer))
    _check(libc.prctl(PR_SET_SECCOMP, 2, ctypes.byref(program), 0, 0), "seccomp")


def _check(result: int, action: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{action}: {os.strerror(number)}")
    return result
