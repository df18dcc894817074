"""Programs of reward.function = code run as an interpreter would run them, and get their reward.

Each program here is right for its row; a wrong neighbor of some kinds follows at the end.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
from needs import SANDBOX_PYTHON

from megatron_async_rl.data.code_tests import read_tests
from megatron_async_rl.reward.code_answer import passes_tests
from megatron_async_rl.sandbox import jail
from megatron_async_rl.sandbox.sandbox import Limits, Sandbox

pytestmark = pytest.mark.skipif(
    not (jail.is_supported() and jail.landlock_version() and os.access(SANDBOX_PYTHON, os.X_OK)),
    reason=f"needs Linux on x86-64 with Landlock, and {SANDBOX_PYTHON}",
)
PATIENT = Limits(wall_s=10.0)  # on a busy machine too


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(SANDBOX_PYTHON, isolation="landlock") as opened:
        yield opened


def passes(sandbox: Sandbox, program: str, row: dict[str, Any]) -> tuple[bool, str]:
    response = f"```python\n{program}\n```"
    return passes_tests(sandbox, response, read_tests(row), PATIENT, 20.0)


FAST_OUTPUT = """
import io, os, sys
class Out(io.IOBase):
    def __init__(self, file):
        self.fd, self.parts, self.writes = file.fileno(), [], "w" in file.mode
        self.size = os.fstat(self.fd).st_size
    def write(self, text): self.parts.append(text)
    def flush(self):
        if self.writes: os.write(self.fd, "".join(self.parts).encode()); self.parts = []
sys.stdout = Out(sys.stdout)
print(input()[::-1])
"""
SCRIPTS = {  # all reverse their input
    "a larger stack": "import resource, sys\n"
    "resource.setrlimit(resource.RLIMIT_STACK, (resource.RLIM_INFINITY,) * 2)\n"
    "sys.setrecursionlimit(10**6)\ndef f(n): return n and 1 + f(n - 1)\n"
    "print(input()[::-1] if f(20000) == 20000 else '')",
    "sys.exit at the end": "import sys\nprint(input()[::-1])\nsys.exit()",
    "exit with 0": "print(input()[::-1])\nexit(0)",
    "quit": "print(input()[::-1])\nquit()",
    "exit with False": "import sys\nprint(input()[::-1])\nsys.exit(False)",
    "raise SystemExit in a function": "def f():\n    print(input()[::-1])\n"
    "    raise SystemExit\nf()",
    "exit of main's None": "import sys\ndef main(): print(input()[::-1])\nsys.exit(main())",
    "exit in an except": "import sys\nwhile 1:\n    try: print(input()[::-1])\n"
    "    except EOFError: sys.exit(0)",
    "a thread that is not joined": "import threading, time\n"
    "threading.Thread(target=lambda: (time.sleep(0.2), print(input()[::-1]))).start()",
    "threads of threads": "import threading, time\n"
    "def two(): time.sleep(0.1); print(input()[::-1])\n"
    "def one(): time.sleep(0.1); threading.Thread(target=two).start()\n"
    "threading.Thread(target=one).start()",
    "a timer": "import threading\nthreading.Timer(0.1, lambda: print(input()[::-1])).start()",
    "a pool of threads": "from concurrent.futures import ThreadPoolExecutor\n"
    "ThreadPoolExecutor(2).submit(lambda: print(input()[::-1]))",
    "an exit in a thread": "import sys, threading\n"
    "threading.Thread(target=lambda: (print(input()[::-1]), sys.exit(3))).start()",
    "atexit with arguments": "import atexit\natexit.register(print, input()[::-1])",
    "atexit in reverse order": "import atexit\ns = input()\n"
    "for c in s: atexit.register(print, c, end='')",
    "atexit after sys.exit": "import atexit, sys\natexit.register(print, input()[::-1])\n"
    "sys.exit()",
    "a finalizer": "class A:\n    def __del__(self): print(input()[::-1])\na = A()",
    "streams' names": "import sys\nassert sys.stdout.name == '<stdout>' and sys.stdin.mode == 'r'\n"
    "assert sys.stderr.mode == 'w' and sys.stdin is sys.__stdin__\nprint(input()[::-1])",
    "a fast output": FAST_OUTPUT,
    "stdout put back": "import io, sys\nold, sys.stdout = sys.stdout, io.StringIO()\n"
    "print(input())\n"
    "text, sys.stdout = sys.stdout.getvalue(), old\nprint(text.strip()[::-1])",
    "redirect_stdout": "import contextlib, io\nout = io.StringIO()\n"
    "with contextlib.redirect_stdout(out): print(input()[::-1])\nprint(out.getvalue(), end='')",
    "a wrapped buffer": "import io, sys\n"
    "sys.stdout = io.TextIOWrapper(sys.stdout.buffer, 'utf-8')\n"
    "print(input()[::-1])",
    "stdin from its own bytes": "import io, sys\n"
    "sys.stdin = io.TextIOWrapper(io.BytesIO(sys.stdin.buffer.read()))\nprint(input()[::-1])",
    "stdin closed": "import sys\ns = sys.stdin.readline().strip()\nsys.stdin.close()\n"
    "print(s[::-1])",
    "stdout closed": "import sys\nprint(input()[::-1])\nsys.stdout.flush()\nsys.stdout.close()",
    "a file over a descriptor": "out = open(1, 'w')\ndef f(): out.write(input()[::-1])\nf()",
    "buffers": "import sys\nsys.stdout.buffer.write(sys.stdin.buffer.read().strip()[::-1])",
    "devices": "s = open('/dev/stdin').read().strip()\nopen('/dev/stdout', 'w').write(s[::-1])",
    "a mapped input": "import mmap\nm = mmap.mmap(0, 0, access=mmap.ACCESS_READ)\n"
    "print(m[:].decode().strip()[::-1])",
    "arguments": "import sys\nassert len(sys.argv) == 1\nprint(input()[::-1])",
    "a file or stdin": "import sys\nf = open(sys.argv[1]) if sys.argv[1:] else sys.stdin\n"
    "print(f.readline().strip()[::-1])",
    "fileinput": "import fileinput\nprint(next(fileinput.input()).strip()[::-1])",
    "argparse": "import argparse\np = argparse.ArgumentParser()\n"
    "p.add_argument('file', nargs='?', type=argparse.FileType('r'), default='-')\n"
    "print(p.parse_args().file.read().strip()[::-1])",
    "main guard": "def main(): print(input()[::-1])\nif __name__ == '__main__': main()",
    "its own module": "import __main__, sys\ndef f(): return input()[::-1]\n"
    "assert sys.modules['__main__'] is __main__\nprint(__main__.f())",
    "pickled classes": "import pickle\nclass P:\n    def __init__(self, s): self.s = s\n"
    "print(pickle.loads(pickle.dumps(P(input()))).s[::-1])",
    "future annotations": "from __future__ import annotations\nfrom dataclasses import dataclass\n"
    "from typing import get_type_hints\n@dataclass\nclass P:\n    s: str\n    next: int = 0\n"
    "assert get_type_hints(P)['s'] is str\nprint(P(input()).s[::-1])",
    "its own source": "import inspect\ndef f(): return 1\n"
    "assert 'return 1' in inspect.getsource(f)\n"
    "print(input()[::-1])",
    "asyncio": "import asyncio\nasync def main():\n    await asyncio.sleep(0.01)\n"
    "    print(input()[::-1])\nasyncio.run(main())",
    "asyncio tasks and a queue": "import asyncio\nasync def put(q):\n    for c in input():\n"
    "        await q.put(c)\n    await q.put(None)\nasync def main():\n"
    "    q, s = asyncio.Queue(1), ''\n    task = asyncio.create_task(put(q))\n"
    "    while (c := await q.get()) is not None: s = c + s\n"
    "    await asyncio.gather(task)\n    print(s)\nasyncio.run(main())",
    "asyncio with a thread": "import asyncio\nasync def main():\n"
    "    s = await asyncio.get_running_loop().run_in_executor(None, input)\n"
    "    print(s[::-1])\nasyncio.run(main())",
    "asyncio's older calls": "import asyncio\nasync def f(): print(input()[::-1])\n"
    "loop = asyncio.new_event_loop()\nloop.run_until_complete(asyncio.wait_for(f(), 5))\n"
    "loop.close()",
    "a pool of multiprocessing's threads": "from multiprocessing.pool import ThreadPool\n"
    "with ThreadPool(2) as pool: print(''.join(pool.map(str, input()))[::-1])",
    "multiprocessing refused": "import multiprocessing as mp\ns = input()\n"
    "try:\n    with mp.Pool(2) as pool: pool.map(str, s)\n"
    "except OSError: print(s[::-1])",
    "a process refused": "import os, subprocess\n"
    "for call in (os.fork, lambda: subprocess.run(['ls']), lambda: os.popen('ls')):\n"
    "    try: call()\n    except OSError: pass\n    else: 1 / 0\n"
    "print(input()[::-1])",
    "a file that is not there": "import sys\ntry: sys.stdin = open('input.txt')\n"
    "except OSError: pass\ntry: sys.stdout = open('output.txt', 'w')\n"
    "except OSError: pass\nprint(input()[::-1])",
    "detached streams": "import io, sys\nsys.stdin = io.TextIOWrapper(sys.stdin.detach())\n"
    "sys.stdout = io.TextIOWrapper(sys.stdout.detach(), 'utf-8')\nprint(input()[::-1])",
    "a path of a stream": "from pathlib import Path\n"
    "print(Path('/dev/stdin').read_text().strip()[::-1])",
    "a finalizer with weakref": "import weakref\nclass A: pass\na = A()\n"
    "weakref.finalize(a, print, input()[::-1])",
    "a command loop": "import cmd\nclass C(cmd.Cmd):\n    prompt, use_rawinput = '', False\n"
    "    def default(self, line):\n        if line == 'EOF': return True\n"
    "        print(line[::-1])\nC().cmdloop()",
    "unittest's main": "import unittest\nclass T(unittest.TestCase):\n    def test(self):\n"
    "        self.assertEqual(1, 1)\nprint(input()[::-1])\nunittest.main()",
    "doctest": "import doctest\ndef f(s):\n    '''\n    >>> f('ab')\n    'ba'\n    '''\n"
    "    return s[::-1]\nassert doctest.testmod().attempted == 1\nprint(f(input()))",
    "end of input": "lines = []\nwhile 1:\n    try: lines.append(input())\n"
    "    except EOFError: break\nprint(lines[0][::-1])",
    "deep recursion in a thread": "import sys, threading\nsys.setrecursionlimit(1 << 25)\n"
    "threading.stack_size(1 << 28)\ndef f(n): return n and 1 + f(n - 1)\n"
    "def main(): assert f(60000) == 60000; print(input()[::-1])\n"
    "threading.Thread(target=main).start()",
    "recursion without end": "def f(n): return f(n + 1)\ntry: f(0)\n"
    "except RecursionError: print(input()[::-1])",
    "lines that end in CRLF": "def f():\r\n    print(input()[::-1])\r\nf()\r\n",
    "a database in memory": "import sqlite3\nc = sqlite3.connect(':memory:')\n"
    "c.execute('create table t (x)')\nc.execute('insert into t values (?)', [input()])\n"
    "print(c.execute('select x from t').fetchone()[0][::-1])",
    "a memory stream put in place of stdout": "import io, os, sys\nout = io.BytesIO()\n"
    "sys.stdout = io.TextIOWrapper(out, write_through=True)\nprint(input()[::-1])\n"
    "os.write(1, out.getvalue())",
    "the null device": "import os, sys\nold, sys.stdout = sys.stdout, open(os.devnull, 'w')\n"
    "print('no')\nsys.stdout, sys.stderr = old, open('/dev/null', 'w')\n"
    "print('no', file=sys.stderr)\nassert open(os.devnull).read() == ''\nprint(input()[::-1])",
    "a stream's device by its number": "import os\nfd = os.open('/dev/stdin', os.O_RDONLY)\n"
    "print(os.read(fd, 100).decode().strip()[::-1])",
    "annotations of the module": "x: int = 3\nassert __annotations__ == {'x': int}\n"
    "print(input()[::-1])",
    "a byte order mark": "\ufeffprint(input()[::-1])",
}


@pytest.mark.parametrize("program", SCRIPTS.values(), ids=SCRIPTS)
def test_script_runs_as_in_an_interpreter(sandbox: Sandbox, program: str) -> None:
    row = {"tests": [{"input": f"{text}\n", "output": text[::-1]} for text in ("abc", "xyzzy")]}
    assert passes(sandbox, program, row) == (True, "")


def test_integers_have_any_length(sandbox: Sandbox) -> None:
    row = {"tests": [{"input": "9" * 9000, "output": "1" + "0" * 9000}]}
    assert passes(sandbox, "print(int(input()) + 1)", row) == (True, "")
    row = {"function": "up", "tests": [{"input": [6000], "output": 10**6000}]}
    assert passes(sandbox, "def up(n): return 10**n", row) == (True, "")
    assert not passes(sandbox, "def up(n): return 10**n + 1", row)[0]


def test_output_may_be_as_large_as_the_expected_one(sandbox: Sandbox) -> None:
    lines = "\n".join("x" * 99 for _ in range(40_000))
    row = {"tests": [{"input": "40000", "output": lines}]}
    assert passes(sandbox, "for _ in range(int(input())): print('x' * 99)", row) == (True, "")
    row = {"function": "up", "tests": [{"input": [300_000], "output": list(range(300_000))}]}
    assert passes(sandbox, "def up(n): return list(range(n))", row) == (True, "")


def call(output: Any, *arguments: Any) -> dict[str, Any]:
    return {"function": "f", "tests": [{"input": list(arguments), "output": output}]}


FUNCTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "typing names": (
        "class Solution:\n    def f(self, a: List[int], b: Optional[Dict[str, Any]] = None)"
        " -> Set[int]:\n        return sorted(set(a))",
        call([1, 2], [2, 1, 2]),
    ),
    "starter imports": (
        "class Solution:\n    @lru_cache(None)\n    def f(self, n):\n"
        "        q = deque([n]); h = []; heappush(h, q.pop()); d = collections.defaultdict(int)\n"
        "        return [gcd(12, h[0]), math.comb(4, 2), bisect_left([1, 2], 2), inf > n,"
        " list(accumulate([1, 2])), Counter('aa')['a'], pow(2, 5, 7), d[0]]",
        call([4, 6, 1, True, [1, 3], 2, 4, 0], 8),
    ),
    "a Solution beside a function": (
        "class Solution:\n    def g(self): return 0\ndef f(x): return x * 3",
        call(9, 3),
    ),
    "a method before a function": (
        "class Solution:\n    def f(self, x): return x * 3\ndef f(x): return 0",
        call(9, 3),
    ),
    "a static method": (
        "class Solution:\n    @staticmethod\n    def f(x): return x * 3",
        call(9, 3),
    ),
    "future annotations": (
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass(order=True)\nclass P:\n    x: int\n    y: P | None = None\n"
        "def f(n): return max(P(n), P(1)).x",
        call(5, 5),
    ),
    "named module": (
        "import sys\nassert __name__ != '__main__'\ndef f(x): return sys.modules[__name__].g(x)\n"
        "def g(x): return x",
        call(5, 5),
    ),
    "Counter": ("from collections import Counter\nf = Counter", call({"a": 2, "b": 1}, "aab")),
    "nested defaultdict": (
        "from collections import defaultdict\ndef f(n):\n    d = defaultdict(lambda: "
        "defaultdict(int))\n    d['x']['y'] += n\n    return d",
        call({"x": {"y": 4}}, 4),
    ),
    "OrderedDict": (
        "from collections import OrderedDict\ndef f(s): return OrderedDict.fromkeys(s, 0)",
        call({"b": 0, "a": 0}, "ab"),
    ),
    "deque": ("from collections import deque\ndef f(x): return [deque(x)]", call([[1, 2]], [1, 2])),
    "typing.NamedTuple": (
        "from typing import NamedTuple\nclass P(NamedTuple):\n    x: int\n    y: int = 7\n"
        "def f(x): return [P(x)]",
        call([[1, 7]], 1),
    ),
    "prints and buffers": (
        "import os, sys\nsys.stdout.buffer.write(b'x')\ndef f(x):\n    print(x, flush=True)\n"
        "    os.write(1, b'debug'); sys.stdout.reconfigure(line_buffering=True)\n    return x",
        call(5, 5),
    ),
    "LeetCode's nodes": (
        "class Solution:\n    def f(self, n: int, head: Optional[ListNode] = None,\n"
        "          root: TreeNode = None) -> int:\n"
        "        return ListNode(n, TreeNode(2)).next.val + n",
        call(5, 3),
    ),
    "asyncio in a function": (
        "import asyncio\nasync def g(n): return n\ndef f(n): return asyncio.run(g(n))",
        call(5, 5),
    ),
    "threads in a function": (
        "from concurrent.futures import ThreadPoolExecutor\ndef f(a):\n"
        "    with ThreadPoolExecutor(2) as pool: return list(pool.map(str, a))",
        call(["1", "2"], [1, 2]),
    ),
    "a subclass of a base": (
        "class Base:\n    def f(self, x): return x * 3\nclass Solution(Base): pass",
        call(9, 3),
    ),
    "tests of its own below": (
        "class Solution:\n    def f(self, x): return x * 3\n"
        "if __name__ == '__main__':\n    print(Solution().f(int(input())))",
        call(9, 3),
    ),
    "a function by name": ("from functools import partial\nf = partial(max, 3)", call(9, 9)),
    "nested named tuples": (
        "from collections import namedtuple, defaultdict\nP = namedtuple('P', 'x y')\n"
        "def f(n):\n    d = defaultdict(list)\n    d[n].append(P(n, 1))\n    return d",
        call({"2": [[2, 1]]}, 2),
    ),
    "a list changed in place": (
        "class Solution:\n    def f(self, a: List[int], k: int) -> None:\n"
        "        a[:] = a[k:] + a[:k]",
        call([2, 3, 1], [1, 2, 3], 1),
    ),
    "nothing returned, nothing expected": (
        "class Solution:\n    def f(self, a: List[int]) -> None: a.sort()",
        call(None, [2, 1]),
    ),
    "linked lists": (
        "class Solution:\n    def f(self, a: Optional[ListNode], b: Optional[ListNode])"
        " -> Optional[ListNode]:\n        head = end = ListNode()\n        while a and b:\n"
        "            if a.val > b.val: a, b = b, a\n            end.next, a = a, a.next\n"
        "            end = end.next\n        end.next = a or b\n        return head.next",
        call([1, 2, 3, 4], [1, 3], [2, 4]),
    ),
    "an empty linked list": (
        "class Solution:\n    def f(self, head: Optional[ListNode]) -> Optional[ListNode]:\n"
        "        return head and head.next",
        call([], []),
    ),
    "lists of linked lists": (
        "class Solution:\n    def f(self, lists: List[Optional[ListNode]]) -> List[int]:\n"
        "        return [one.val if one else 0 for one in lists]",
        call([1, 0, 4], [[1, 2], [], [4]]),
    ),
    "a linked list of its own class": (
        "class ListNode:\n    def __init__(self, x): self.val, self.next = x, None\n"
        "class Solution:\n    def f(self, head: ListNode) -> None:\n"
        "        while head: head.val, head = -head.val, head.next",
        call([-1, -2], [1, 2]),
    ),
    "a tree": (
        "class Solution:\n    def f(self, root: Optional[TreeNode]) -> Optional[TreeNode]:\n"
        "        if root: root.left, root.right = self.f(root.right), self.f(root.left)\n"
        "        return root",
        call([1, 3, 2, None, None, None, 4], [1, 2, 3, 4]),
    ),
    "a tree's levels": (
        "class Solution:\n    def f(self, root: 'TreeNode') -> int:\n"
        "        return 1 + max(self.f(root.left), self.f(root.right)) if root else 0",
        call(3, [3, 9, 20, None, None, 15, 7]),
    ),
    "values of a dict": (
        "class Solution:\n    def f(self, words: List[str]) -> List[List[str]]:\n"
        "        d = defaultdict(list)\n        for w in words: d[len(w)].append(w)\n"
        "        return d.values()",
        call([["ab", "cd"], ["e"]], ["ab", "e", "cd"]),
    ),
    "a range": ("def f(n): return range(n)", call([0, 1, 2], 3)),
    "five decimal places": ("def f(n): return [n / 3, 2 / n]", call([0.33333, 2.0], 1)),
    "stdin is empty": ("import sys\nlines = sys.stdin.read()\ndef f(x): return lines", call("", 1)),
}


@pytest.mark.parametrize(("program", "row"), FUNCTIONS.values(), ids=FUNCTIONS)
def test_function_row_gives_what_starter_code_expects(
    sandbox: Sandbox, program: str, row: dict[str, Any]
) -> None:
    assert passes(sandbox, program, row) == (True, "")


def test_each_test_has_a_new_solution(sandbox: Sandbox) -> None:
    tests = [{"input": [text], "output": len(text)} for text in ("ab", "cde", "")]
    program = (
        "class Solution:\n    def __init__(self): self.seen = set()\n"
        "    def f(self, s):\n        self.seen |= set(s)\n        return len(self.seen)"
    )
    assert passes(sandbox, program, {"function": "f", "tests": tests}) == (True, "")


@pytest.mark.parametrize(
    ("program", "row"),
    [
        ("import sys\nprint(7)\nsys.exit(1)", {"tests": [{"input": "", "output": "7"}]}),
        ("import sys\nprint(7)\nsys.exit('done')", {"tests": [{"input": "", "output": "7"}]}),
        ("import sys\nprint(7)\nsys.exit(True)", {"tests": [{"input": "", "output": "7"}]}),
        ("print(7)\n1 / 0", {"tests": [{"input": "", "output": "7"}]}),
        ("x: List[int] = []\nprint(7)", {"tests": [{"input": "", "output": "7"}]}),
        ("import os\nprint(7)\nos._exit(0)", {"tests": [{"input": "", "output": "7"}]}),
        ("def g(x): return x", call(3, 3)),
        ("def f(x): return {x}", call([3], 3)),
        ("class L(list): pass\ndef f(x): return L([x])", call([3], 3)),
        ("class Solution:\n    def accumulate(self, x): return x", call(3, 3)),
        ("import sys\ndef f(x): return x\nsys.exit(1)", call(3, 3)),
        (
            "import asyncio\nasync def m(): print(7); 1 / 0\nasyncio.run(m())",
            {"tests": [{"input": "", "output": "7"}]},
        ),
        (
            "import unittest\nclass T(unittest.TestCase):\n    def test(self): self.fail()\n"
            "print(7)\nunittest.main()",
            {"tests": [{"input": "", "output": "7"}]},
        ),
        ("async def f(x): return x", call(3, 3)),
        ("def f(x): x.sort()", call([1, 2], [2, 1])),
        ("def f(x: list) -> list: x.sort()", call([1, 2], [2, 1])),
        ("def f(x: list) -> None: x = sorted(x)", call([1, 2], [2, 1])),
        ("def f(x: ListNode) -> ListNode: return None", call([1], [2, 1])),
        ("def f(x: ListNode) -> ListNode: return x", call([1, 2], [2, 1])),
        ("def f(x): return x / 3", call(0.33334, 1)),
        ("def f(x): return ListNode(x)", call(3, 3)),
        (
            "import multiprocessing as mp\nwith mp.Pool(2) as pool: print(pool.map(str, [7])[0])",
            {"tests": [{"input": "", "output": "7"}]},
        ),
    ],
)
def test_wrong_neighbors_get_nothing(sandbox: Sandbox, program: str, row: dict[str, Any]) -> None:
    assert not passes(sandbox, program, row)[0]


def test_starter_names_do_not_stand_in_for_the_function(sandbox: Sandbox) -> None:
    row = {"function": "gcd", "tests": [{"input": [4, 6], "output": 2}]}
    assert not passes(sandbox, "def other(a, b): return 2", row)[0]
