"""The comparisons notice a twin that is wrong in one place."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from vllm_specplugin.vllm import cpu_kernels
from vllm_specplugin.vllm.cpu_kernels.pins import PACKAGE
from vllm_specplugin.vllm.cpu_kernels.table import kernels, make_twin

from . import test_drafting, test_logprobs, test_sampling, test_step, test_verification

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

Run = Callable[[], None]
BUGS: list[tuple[str, str, str, Run]] = [
    (
        "step_numba.prepare_pos_seq_lens",
        "seq_lens[num_reqs:max",
        "seq_lens[num_reqs + 1:max",
        lambda: test_step.test_positions_and_lengths(0),
    ),
    (
        "step_numba.combine_sampled_and_draft_tokens",
        "seq_len - num_logits >= known",
        "seq_len >= known",
        lambda: [test_step.test_sampled_and_drafted_tokens(n, 1) for n in range(6)],
    ),
    (
        "sampling_numba.min_p",
        "top + np.float32(math.log(share))",
        "top - share",
        lambda: test_sampling.test_min_p(0),
    ),
    (
        "sampling_numba.gumbel_sample",
        "position += DRAFT_SALT",
        "position += 1",
        lambda: test_sampling.test_gumbel(0, 1024, False),
    ),
    (
        "sampling_numba.gumbel_sample",
        "if total > best:",
        "if total >= best:",
        test_sampling.test_the_first_of_equal_logits_wins,
    ),
    (
        "logprobs_numba.ranks",
        "line[i] >= own",
        "line[i] > own",
        lambda: test_logprobs.test_scores_and_ranks(1500, 0),
    ),
    (
        "verification_numba.rejection",
        "log_p > log(u) + log_q",
        "log_p > u + log_q",
        lambda: [test_verification.test_verification(n, True, False, 40) for n in range(4)],
    ),
    (
        "verification_numba.resample",
        "elif i == rejected:",
        "elif i == rejected + 1:",
        lambda: [test_verification.test_verification(n, False, False, 40) for n in range(4)],
    ),
    (
        "drafting_numba.ngram_scan",
        "score = n * (L + 1) + position + 1",
        "score = max(score, position + 1)",
        lambda: test_drafting.test_ngrams(0, 1, 3),
    ),
]


@pytest.mark.parametrize(
    ("twin", "right", "wrong", "run"), BUGS, ids=[f"{b[0]}: {b[2]}" for b in BUGS]
)
def test_a_planted_bug_is_noticed(
    twin: str,
    right: str,
    wrong: str,
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file, name = twin.split(".")
    assert cpu_kernels.__file__
    text = Path(cpu_kernels.__file__).with_name(f"{file}.py").read_text()
    assert right in text
    (tmp_path / "wrong.py").write_text(text.replace(right, wrong))
    found = importlib.util.spec_from_file_location(
        f"{cpu_kernels.__name__}.wrong", tmp_path / "wrong.py"
    )
    assert found and found.loader
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    for place, kernel, spec in kernels():
        if spec.function.__name__ == name and spec.function.__module__.endswith(file):
            compared = getattr(importlib.import_module(f"{PACKAGE}.{place}"), kernel)
            bad = replace(spec, function=getattr(module, name))
            monkeypatch.setattr(compared, "twin", make_twin(compared.kernel, kernel, bad))
    with pytest.raises(AssertionError):
        run()
