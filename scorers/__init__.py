"""Scorers: the rules that decide which drafted tokens are kept.

One rule per file, each with its formula and source, and with the word
"lossless" or "lossy" in its first docstring line. A scorer sees processed
logits, the trees, and keyed noise; it never sees vLLM.
"""

if __name__ != "vllm_specplugin.scorers":  # two copies would split the registry
    raise ImportError(
        f"imported as {__name__!r}: expected 'vllm_specplugin.scorers'. "
        "To fix it: install the package and import it by that name."
    )
