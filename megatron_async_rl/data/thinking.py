"""Thinking: the text of a response between the tags of reward.thinking_tags.

Some chat templates end in an opening tag. The response then begins within the thinking and has
only the closing tag, if any.
"""

from __future__ import annotations

from collections.abc import Sequence


def opened_by(prompt: str, tags: Sequence[str]) -> str:
    """Returns the opening tag that a prompt ends in, "" if it does not.

    `tags`: opening and closing tags in turn, such as ("<think>", "</think>").
    """
    end = prompt.rstrip()
    return next((tag for tag in tags[::2] if end.endswith(tag)), "")


def after_thinking(response: str, tags: Sequence[str]) -> str:
    """Returns the text after the thinking, "" if the thinking is not closed.

    A closing tag without an opening one ends thinking that the prompt began.
    """
    for opening, closing in zip(tags[::2], tags[1::2], strict=True):
        closed = response.rfind(closing)
        begin = 0 if closed < 0 else closed + len(closing)
        if response.find(opening, begin) >= 0:
            return ""
        response = response[begin:]
    return response
