"""Imported only by the fork server of the scoring processes: kills it when the reward worker ends.

multiprocessing would end it when a pipe closes, but each scoring process holds a copy of that pipe,
and one that is busy with a hostile answer keeps it open. The scoring processes die with the fork
server (scoring_process.py).
"""

from megatron_async_rl import processes

processes.die_with_parent()
