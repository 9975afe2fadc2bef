"""What workers tell the front end of single requests."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from vllm_specplugin.telemetry.request_table import Board, look_up


def test_a_row_is_read_by_another_process(tmp_path: Path) -> None:
    board = Board(tmp_path, 4)
    board.open("a-1", "typical")
    board.open("b-2", "exact")
    board.add("a-1", 3)
    board.add("a-1", 2)
    code = (
        "from pathlib import Path; from vllm_specplugin.telemetry.request_table import look_up;"
        f"print(look_up(Path({str(tmp_path)!r}), 'a-1'))"
    )
    read = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert read.stdout.strip() == "{'scorer': 'typical', 'emitted_by_relaxation': 5}"


def test_rows_outlive_their_requests_for_a_while(tmp_path: Path) -> None:
    board = Board(tmp_path, 4)
    board.open("old", "typical")
    board.add("old", 1)
    board.release(["old", "unknown"])
    board.add("old", 1)  # not any more
    for number in range(3):
        board.open(f"new-{number}", "exact")
    assert look_up(tmp_path, "old") == {"scorer": "typical", "emitted_by_relaxation": 1}
    board.open("new-3", "exact")
    assert look_up(tmp_path, "old") is None


def test_live_rows_are_never_written_over(tmp_path: Path) -> None:
    board = Board(tmp_path, 3)
    board.open("long", "typical")
    for number in range(10):
        board.open(f"short-{number}", "exact")
        board.release([f"short-{number}"])
    assert look_up(tmp_path, "long") is not None
    board.open("second", "exact")
    board.open("third", "exact")
    board.open("one too many", "exact")
    assert look_up(tmp_path, "one too many") is None
    board.add("one too many", 1)


def test_an_id_that_comes_back_starts_anew(tmp_path: Path) -> None:
    board = Board(tmp_path, 4)
    board.open("0", "typical")
    board.add("0", 7)
    board.release(["0"])
    board.open("0", "exact")
    assert look_up(tmp_path, "0") == {"scorer": "exact", "emitted_by_relaxation": 0}


def test_several_workers_and_unknown_requests(tmp_path: Path) -> None:
    assert look_up(tmp_path, "x") is None
    assert look_up(tmp_path / "missing", "x") is None
    Board(tmp_path, 2).open("x", "fly")
    Board(tmp_path, 2).open("y", "block")
    assert look_up(tmp_path, "x") == {"scorer": "fly", "emitted_by_relaxation": 0}
    assert look_up(tmp_path, "y") == {"scorer": "block", "emitted_by_relaxation": 0}
