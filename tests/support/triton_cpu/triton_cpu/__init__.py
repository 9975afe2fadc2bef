"""Test support: kernels of vLLM and of the plugin in Triton's interpreter.

vLLM uses Triton on CPU once a Triton backend named ``cpu`` is installed. This
one compiles nothing: kernels run in Triton's own interpreter, whose defects
``fixes`` mends. Put the folder above on ``PYTHONPATH`` (the ``dist-info`` beside
this package has the entry points) and set ``TRITON_INTERPRET=1`` before Python
starts.
"""
