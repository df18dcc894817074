"""Imported by the fork server of the reward children, and by nobody else: makes it end when the reward worker ends.

multiprocessing would tell it by the end of a pipe, but every child holds a copy of that pipe, and a child that is busy
with a hostile answer keeps it. The children in turn end with the fork server (worker.py).
"""

from megatron_async_rl import processes

processes.die_with_parent()
