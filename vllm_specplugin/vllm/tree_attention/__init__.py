"""Attention for the rows of a branching draft tree.

vLLM's own kernel runs over the whole batch first and is right for every row
that sees a plain causal prefix: committed tokens, roots, chains, and the chain
at the front of each tree. Only the remaining nodes are computed again here,
each seeing the committed prefix, its ancestors and itself.

``plan``
    what is computed, as arrays; shared by all layers of a step.
``reference``
    the readable statement in plain torch, for any device.
``cpu``
    a compiled kernel that reads vLLM's CPU cache in place.
``backend``
    subclasses of vLLM's attention backends that call the above.
"""
