"""Reading seams out of a wheel."""

from __future__ import annotations

import zipfile

from .read_wheel import differences

SOURCE = """
from vllm.base import imported
try:
    import fast
except ImportError:
    def guarded(x, *, key): ...
class Kept:
    @classmethod
    def made(cls, args): ...
class Data:
    first: int
    second: int = 0
VALUE: int = 3
"""


def test_what_changed_is_named(tmp_path):
    wheel = tmp_path / "vllm-9.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("vllm/part/__init__.py", SOURCE)
        archive.writestr("vllm/base.py", "def imported(a, b, c=0): ...")
    same = {
        "vllm.part:imported": ("a", "b"),
        "vllm.part:guarded": ("x", "key"),
        "vllm.part:Kept.made": ("args",),
        "vllm.part:Data": ("first", "second"),
        "vllm.part:VALUE": None,
        "other.package:name": None,
    }
    assert differences(wheel, same) == []
    other = {
        "vllm.part:gone": None,
        "vllm.nowhere:gone": None,
        "vllm.part:imported": ("b", "a"),
        "vllm.part:Data": ("third",),
        "vllm.part:VALUE": ("x",),
    }
    found = differences(wheel, other)
    assert len(found) == len(other)
    assert "gone" in found[0]
    assert "takes ('a', 'b', 'c'), expected ('b', 'a')" in found[2]
    assert "has lost third" in found[3]
    assert "is not a function" in found[4]
