"""Runs an untrusted program in its confined process, as an interpreter would run it.

zygote.py calls `run_script` (reads stdin, prints) or `run_calls` (one function, many argument
lists) after jail.confine. Both return the exit code; results and prints are only ever data.

The process ends with os._exit, so `run_script` itself does the final steps of an interpreter, in
the same order: waits for threads, runs atexit callbacks, frees the module, flushes stdout.

Standard library only, Python 3.9 or newer.
"""

from __future__ import annotations

import atexit
import builtins
import contextlib
import functools
import gc
import importlib
import io
import json
import linecache
import os
import resource
import struct
import sys
import threading
import types
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from multiprocessing.context import BaseContext
from typing import Any

import nodes

OUT_OF_MEMORY, RAISED, FLUSH_FAILED = 71, 72, 120  # exit codes, next to the program's own
MAX_DEPTH = 64  # nesting of a returned value
VIEWS: tuple[type, ...] = (type({}.keys()), type({}.values()), type({}.items()))
MAX_DECIMAL_BITS = 8192  # longer integers travel as hexadecimal text, which takes linear time
FILE = "/program.py"
STREAM_FILES = {  # /proc is hidden, so these names do not work by themselves
    f"{folder}{name}": number
    for number, stream in enumerate(("stdin", "stdout", "stderr"))
    for folder, name in (("/dev/", stream), ("/dev/fd/", number), ("/proc/self/fd/", number))
}
STREAM_FILES[os.devnull] = 2  # stderr is the null device, which Landlock would refuse to open
# Names that LeetCode's starter code uses without an import. The order decides between equal names:
# collections.Counter, not typing's. `operator` stays a module: its `add` must not stand in for a
# function that the program forgot to define.
STARTER_STARS = (
    "typing string re datetime collections heapq bisect copy math random statistics itertools "
    "functools io json sortedcontainers"
).split()
STARTER_MODULES = (
    "array bisect collections copy datetime functools heapq io itertools json math operator os "
    "random re statistics string sys time typing"
).split()

# A program starts no processes, and a lock between processes would need a file; a ThreadPool makes
# one.
BaseContext.Lock = lambda self: threading.Lock()  # type: ignore[assignment, method-assign, return-value]

# A program may raise its stack limit before a deep recursion. It has the largest stack already.
_plain_setrlimit = resource.setrlimit
resource.setrlimit = lambda kind, limits: (
    None if kind == resource.RLIMIT_STACK else _plain_setrlimit(kind, limits)
)


def starter_names() -> dict[str, Any]:
    """Returns the names that a function row's program finds without an import."""
    names: dict[str, Any] = {"ListNode": nodes.ListNode, "TreeNode": nodes.TreeNode}
    for name in (*STARTER_STARS, *STARTER_MODULES):
        with contextlib.suppress(ImportError):
            module = importlib.import_module(name)
            if name in STARTER_STARS:
                public = getattr(module, "__all__", None) or dir(module)
                names.update({one: getattr(module, one) for one in public if one[0] != "_"})
    names.update({name: sys.modules[name] for name in STARTER_MODULES})
    return {name: value for name, value in names.items() if not hasattr(builtins, name)}


def run_script(source: bytes) -> int:
    """Runs a program that reads stdin and prints, as `python program.py`."""
    _open_streams()
    code = _execute(source, "__main__")
    for step in (threading._shutdown, atexit._run_exitfuncs):  # type: ignore[attr-defined]
        with contextlib.suppress(BaseException):  # does not change an interpreter's exit code
            step()
    code = _flush_stdout() or code
    # the program's other files, such as an open(1, "w"); the collector may close them too early
    files = [one for one in gc.get_objects() if type(one) in (io.TextIOWrapper, io.BufferedWriter)]
    for file in sorted(files, key=lambda one: type(one) is io.BufferedWriter):
        with contextlib.suppress(Exception):
            file.flush()
    sys.modules.pop("__main__", None)  # frees the program's objects
    gc.collect()
    sys.stdout = sys.__stdout__
    _flush_stdout()  # may be detached
    return code


def run_calls(source: bytes, name: str, calls: list[list[Any]], starter: dict[str, Any]) -> int:
    """Calls the program's function `name`, or that method of a new Solution, per argument list.

    Writes each returned value to descriptor 3 as a frame: four bytes of length (little-endian),
    then JSON. The output of the program is discarded.
    """
    _open_streams()
    results = io.BufferedWriter(io.FileIO(3, "w"))
    vars(builtins).update(starter)  # below the module's own names, which `name` is looked up in
    module = types.ModuleType("program")
    code = _execute(source, "program", module)

    def call_all() -> None:
        function = _find_function(vars(module), name)
        for arguments in calls:
            frame = json.dumps(_call(function, arguments)).encode()
            results.write(struct.pack("<I", len(frame)) + frame)
        results.flush()

    return code or _exit_code(call_all)


def _find_function(names: dict[str, Any], name: str) -> Callable[..., Any]:
    solution = names.get("Solution")
    if isinstance(solution, type) and (hasattr(solution, name) or name not in names):
        described = getattr(solution, name)  # each call has a new object

        @functools.wraps(described)
        def function(*arguments: Any) -> Any:
            return getattr(solution(), name)(*arguments)

        return function
    return names[name]


def _call(function: Callable[..., Any], arguments: list[Any]) -> Any:
    """Calls a function that LeetCode's annotations may describe. Returns its result as JSON data.

    Arguments and results that are annotated as linked lists or trees are lists in the row. Of a
    function that is annotated with `-> None` the result is its first argument, which it changed.
    """
    annotations = nodes.annotations_of(function)
    arguments = nodes.from_lists(arguments, annotations)
    result = function(*arguments)
    if result is None and annotations.returns_none and arguments:
        return {"none_or": to_plain(arguments[0])}
    if result is None and annotations.returns_nodes:
        return {"none_or": []}
    return to_plain(result)


def _execute(source: bytes, name: str, module: types.ModuleType | None = None) -> int:
    """Runs the source as a module that only sys.modules refers to. Returns the exit code."""
    module = module or types.ModuleType(name)
    module.__dict__.update(__builtins__=builtins, __file__=FILE, __annotations__={})
    sys.modules[name] = module
    sys.argv = [FILE[1:]]
    # the source for tracebacks and inspect, in linecache's form for text that is loaded late
    linecache.cache[FILE] = (functools.partial(source.decode, "utf-8", "replace"),)
    return _exit_code(
        lambda: exec(compile(source, FILE, "exec", dont_inherit=True), module.__dict__)  # noqa: S102
    )


def _exit_code(action: Callable[[], object]) -> int:
    """Returns the exit code of an interpreter for the exception of `action`, 0 without one."""
    try:
        action()
    except SystemExit as e:
        return int.__and__(e.code, 255) if isinstance(e.code, int) else int(e.code is not None)
    except MemoryError:
        return OUT_OF_MEMORY
    except BaseException:
        return RAISED
    return 0


def _open_streams() -> None:
    """Opens sys.stdin, stdout and stderr as CPython does: no stream owns its descriptor."""
    for number, (name, mode, errors) in enumerate(
        (
            ("stdin", "r", "surrogateescape"),
            ("stdout", "w", "surrogateescape"),
            ("stderr", "w", "backslashreplace"),
        )
    ):
        buffer = open(number, mode + "b", closefd=False)  # noqa: SIM115
        buffer.raw.name = f"<{name}>"  # type: ignore[attr-defined]
        # CPython keeps "\r\n" in stdin; data sets of Windows judges contain it
        newline = None if mode == "r" else "\n"
        stream = io.TextIOWrapper(buffer, "utf-8", errors, newline, line_buffering=number == 2)
        stream.mode = mode  # type: ignore[misc]
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    builtins.open = io.open = _open
    os.open = _open_descriptor


_plain_open, _plain_os_open = open, os.open


def _open(file: Any, *arguments: Any, **options: Any) -> Any:
    if isinstance(file, (str, os.PathLike)) and str(file) in STREAM_FILES:
        file = os.dup(STREAM_FILES[str(file)])
    return _plain_open(file, *arguments, **options)


def _open_descriptor(path: Any, *arguments: Any, **options: Any) -> int:
    if isinstance(path, (str, os.PathLike)) and str(path) in STREAM_FILES:
        return os.dup(STREAM_FILES[str(path)])
    return _plain_os_open(path, *arguments, **options)


functools.update_wrapper(_open, open)
functools.update_wrapper(_open_descriptor, os.open)


def _flush_stdout() -> int:
    """Flushes sys.stdout unless it is closed. Returns an exit code."""
    stream = sys.stdout
    try:
        if stream is None or getattr(stream, "closed", False):
            return 0
        stream.flush()
    except BaseException:
        return FLUSH_FAILED
    return 0


def to_plain(value: Any, depth: int = 0) -> Any:
    """Converts a returned value to JSON data.

    Accepts exact types and the library's own subclasses only: no object with methods of the
    program's own leaves this process.
    """
    kind = type(value)
    if depth > MAX_DEPTH:
        raise ValueError("nested too deep")
    if kind is int and value.bit_length() > MAX_DECIMAL_BITS:
        return {"int": hex(value)}
    if kind in (int, float, str, bool, type(None)):
        return value
    if kind in (list, tuple, deque, range, *VIEWS) or _is_namedtuple(kind):
        items = tuple.__iter__(value) if isinstance(value, tuple) else iter(value)
        return [to_plain(one, depth + 1) for one in items]
    if kind in (dict, defaultdict, Counter, OrderedDict):
        if any(type(key) not in (str, int, float, bool) for key in value):
            raise TypeError("a dict with keys that are no text and no number")
        pairs = dict.items(value)
        return {"dict": [[to_plain(key), to_plain(one, depth + 1)] for key, one in pairs]}
    if kind in (set, frozenset):
        return {"set": sorted((to_plain(one, depth + 1) for one in value), key=repr)}
    if kind.__name__ in ("ListNode", "TreeNode"):
        return [to_plain(one, depth + 1) for one in nodes.to_list(value)]
    raise TypeError(f"a result of type {kind.__name__}")


def _is_namedtuple(kind: type) -> bool:
    own = vars(kind)
    return kind.__bases__ == (tuple,) and "_fields" in own and not {"__eq__", "__iter__"} & set(own)
