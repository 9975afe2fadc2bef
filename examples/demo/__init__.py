"""The demo: embedded models, unseen prompts, a fair measurement.

    python -m examples.demo

``models`` finds the small trained models, ``inflate`` turns one into a larger
model that computes the same function, ``workloads`` makes prompts, and ``run``
measures (by :mod:`.rounds`, or :mod:`.several_engines` with ``--all``). Tests and
benchmarks use the first three, too.
"""
