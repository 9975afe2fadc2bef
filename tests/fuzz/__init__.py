"""``python -m tests.fuzz``: random workloads against hostile proposers, on real vLLM.

The oracle is equality with the same requests undrafted, token for token.
:mod:`.workload` says what a case is, :mod:`.generate` makes cases from a seed,
:mod:`.adversary` drafts, :mod:`.compare` judges, :mod:`.shrink` makes a failing case
small, :mod:`.campaign` runs many. The engine's end is
:mod:`.engine_process`.
"""
