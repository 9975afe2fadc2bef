"""Everything that touches vLLM: the only package here that imports it.

Official seams used, and for what:

========================================  ==================================
entry point ``vllm.general_plugins``      being loaded in every process
``additional_config``                     our configuration, in every process
``speculative_config``                    switching speculation on
                                          (``custom_class``, on the second
                                          runner ``ngram_gpu``), or having
                                          vLLM load a drafter
``num_speculative_tokens_per_batch_size`` no padding to a fixed draft length,
                                          piecewise CUDA graphs
``worker_cls``                            our worker, which adopts the runner
``register_backend``                      tree attention
``SamplingParams.extra_args``             per-request options
``vllm.endpoint_plugins``                 ``GET /specplugin/status``
``--middleware``                          telling API keys apart, where there
                                          are several
Prometheus's files between processes      workers' counters in ``/metrics``
========================================  ==================================

Patches, each with the reason and when to remove it:

``EngineArgs.add_cli_args`` and ``EngineArgs.from_cli_args`` (``plugin.py``)
    wrapped to add and to read the ``--spec-*`` flags. General plugins have no
    API for flags. Remove when vLLM gives them one.
``EngineArgs.create_engine_config`` (``plugin.py``) and
``InputProcessor._validate_params`` (``frontend/admission.py``)
    wrapped, the second by the first and only where the plugin is switched on, to
    refuse wrong ``spec_*`` options of a request with a 400. Remove when vLLM lets
    plugins validate ``extra_args``. The first also gives the configuration back the
    schedule of draft lengths that vLLM 0.33 drops (``compat/versions.py``).
``InputProcessor.process_inputs`` (``frontend/admission.py``)
    wrapped in the same place, to tell workers with whom a request shares what is
    learnt. Remove when ``NewRequestData`` has the ``cache_salt``.
``OutputProcessor.process_outputs`` (``frontend/response_stats.py``)
    wrapped in the same place, to add the rule and the tokens accepted by leniency
    to the per-request statistics that vLLM puts into a response. Remove when
    ``EngineCoreOutput`` has room for a plugin's statistics.
``runner.__class__`` (``worker.py``)
    set to a subclass of the runner's class after ``init_device()``: the CPU
    worker has no hook to choose its runner. Remove when ``CPUWorker`` calls
    ``_make_model_runner()`` as the GPU worker does.
``runner.speculator``, ``.sampler``, ``.rejection_sampler`` and ``.model_state``
    (``runner/tree_runner.py``)
    replaced, on vLLM's second runner, by objects that are also ours: it builds them
    from closed lists. Remove when it takes them from a registry.
``VllmConfig.use_v2_model_runner`` and ``._validate_v2_model_runner`` (``cpu_kernels/prepare.py``)
    wrapped, on a CPU without Triton only, so that engines of the plugin get the second
    runner: its Triton kernels are replaced there, in the worker, by compiled ones. Remove
    when vLLM runs its second runner on such a CPU.
``triton_utils.dispatcher.vars`` (``compat/kernel_scan_fix.py``)
    added: vLLM's scan for kernels in a CPU worker fails at objects of llvmlite. Remove
    when the scan passes over objects whose ``vars()`` are no dict.
``VLLM_USE_V2_MODEL_RUNNER`` (``frontend/runner_choice.py``)
    set to 0 where the proposer runs a draft model level by level. Remove when that
    is written for the second runner.
"""
