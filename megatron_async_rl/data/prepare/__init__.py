"""Turns published datasets into rows of this package: the command `prepare` (cli/prepare.py).

pipeline.py reads, drops, writes and reports; kinds.py names the formats; math_kinds.py,
code_kinds.py and livecodebench.py convert their rows; similarity.py finds duplicates and rows that
an evaluation set contains.
"""
