"""LeetCode's linked lists and binary trees, which a row's tests hold as lists.

program.py converts arguments and results by the annotations of the starter code, such as
`def merge(self, lists: List[Optional[ListNode]]) -> Optional[ListNode]`. A tree's list holds its
values level by level, with None for a missing child.

Standard library only, Python 3.9 or newer: it runs in the sandbox.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

MAX_NODES = 1_000_000  # of a returned list or tree, which may be a circle
_NODE = re.compile(r"\b(ListNode|TreeNode)\b")
_LIST = re.compile(r"\b[Ll]ist\[")


class ListNode:
    """As LeetCode defines it."""

    def __init__(self, val: Any = 0, next: Any = None) -> None:
        self.val, self.next = val, next


class TreeNode:
    """As LeetCode defines it."""

    def __init__(self, val: Any = 0, left: Any = None, right: Any = None) -> None:
        self.val, self.left, self.right = val, left, right


class Annotations(NamedTuple):
    parameters: list[str]  # the annotation of each argument as text, "" if it has none
    returns_none: bool  # annotated with None, as functions that change their argument are
    returns_nodes: bool
    classes: dict[str, Any]  # of the program's module


def annotations_of(function: Callable[..., Any]) -> Annotations:
    """Returns the annotations of a function or of a method's function."""
    for _ in range(20):
        function = getattr(function, "__wrapped__", function)
    code = getattr(function, "__code__", None)
    annotations = getattr(function, "__annotations__", None)
    if code is None or type(annotations) is not dict:
        return Annotations([], False, False, {})
    names = [name for name in code.co_varnames[: code.co_argcount] if name not in ("self", "cls")]
    returns = annotations.get("return", "")
    return Annotations(
        [_text(annotations.get(name, "")) for name in names],
        returns is None or returns == "None",
        _NODE.search(_text(returns)) is not None,
        function.__globals__,
    )


def _text(annotation: Any) -> str:
    return annotation if isinstance(annotation, str) else repr(annotation)


def from_lists(arguments: list[Any], annotations: Annotations) -> list[Any]:
    """Returns the arguments, with nodes for the lists that are annotated so."""
    converted = list(arguments)
    for i, text in enumerate(annotations.parameters[: len(arguments)]):
        if (match := _NODE.search(text)) and isinstance(arguments[i], list):
            own = annotations.classes.get(match[1])
            make = _linked if match[1] == "ListNode" else _tree
            node = own or (ListNode if match[1] == "ListNode" else TreeNode)
            many = _LIST.search(text) and all(
                one is None or type(one) is list for one in arguments[i]
            )
            converted[i] = (
                [make(one, node) for one in arguments[i]] if many else make(arguments[i], node)
            )
    return converted


def _linked(values: list[Any] | None, node: Callable[[Any], Any]) -> Any:
    head = None
    for value in reversed(values or []):
        first = node(value)
        first.next, head = head, first
    return head


def _tree(values: list[Any] | None, node: Callable[[Any], Any]) -> Any:
    if not values or values[0] is None:
        return None
    root = node(values[0])
    waiting, rest = deque([root]), iter(values[1:])
    while waiting:
        parent = waiting.popleft()
        for side in ("left", "right"):
            value = next(rest, None)
            child = None if value is None else node(value)
            setattr(parent, side, child)
            if child is not None:
                waiting.append(child)
    return root


def to_list(node: Any) -> list[Any]:
    """Returns the values of a list or tree. Raises ValueError for more than MAX_NODES."""
    values: list[Any] = []
    if type(node).__name__ == "ListNode":
        while node is not None:
            values.append(node.val)
            node = node.next
            _check(values)
        return values
    waiting = deque([node])
    while waiting:
        node = waiting.popleft()
        values.append(None if node is None else node.val)
        if node is not None:
            waiting += (node.left, node.right)
        _check(values)
    while values and values[-1] is None:
        values.pop()
    return values


def _check(values: list[Any]) -> None:
    if len(values) > MAX_NODES:
        raise ValueError(f"more than {MAX_NODES} nodes")
