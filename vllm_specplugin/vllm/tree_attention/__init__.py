"""Attention for the rows of a branching draft tree.

On a CPU vLLM's own kernel runs over the whole batch first and is right for every
row that sees a plain causal prefix: committed tokens, roots, chains, and the chain
at the front of each tree. The remaining nodes are computed again, each seeing the
committed prefix, its ancestors and itself. On a GPU one kernel does all rows of a
step with trees; beside chunks of prompts it does the nodes.

``plan``
    what is computed, as arrays; shared by all layers of a step.
``reference``
    the readable statement in plain torch, for rows planned on the host.
``cpu``
    a compiled kernel that reads vLLM's CPU cache in place.
``kernels``, ``triton``
    kernels for GPUs, and their launch.
``device_reference``
    what those compute, in plain torch.
``device``
    an attention layer's call of them.
``backend``
    subclasses of vLLM's attention backends that call the above.
"""
