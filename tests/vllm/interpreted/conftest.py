"""These tests run Triton's kernels in its interpreter, which has to be chosen
before Triton is imported: ``tests/vllm/test_interpreted.py`` runs them in a
process of their own."""

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*"]
