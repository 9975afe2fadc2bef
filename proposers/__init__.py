"""Proposers: what drafts. One algorithm per file.

Each is built as ``Class(config, engine)``, drafts one tree per request, and is
deterministic in what it is shown. None of them sees vLLM or a scorer.
"""

if __name__ != "vllm_specplugin.proposers":  # two copies would split the registry
    raise ImportError(
        f"imported as {__name__!r}: expected 'vllm_specplugin.proposers'. "
        "To fix it: install the package and import it by that name."
    )
