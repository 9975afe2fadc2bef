"""The A/B harness: does speculation pay for this model, these prompts, this load?

Reading order: ``variants`` (what is compared), ``prompts``, ``measure`` and
``serve`` (interleaved rounds in separate processes), ``statistics`` and ``texts``
(what may be concluded), ``report`` (what is written), ``compare`` and ``explain``
(what is read back). Nothing here imports vLLM; the processes it starts do.
"""
