"""Finds the embedded models.

They live in the repository, not in the wheel: 19 MB of weights that only tests
and the demo read.
"""

from __future__ import annotations

from pathlib import Path

from vllm_specplugin.errors import ConfigError, complain
from vllm_specplugin.utils.env import models_dir

__all__ = ["model_path"]


def model_path(name: str) -> Path:
    """The folder of the embedded model ``name``: ``"target"`` or ``"draft"``.

    Looks in ``$SPECPLUGIN_MODELS`` if it is set, else in ``examples/models`` of
    the repository this package is installed from.

    Raises:
        ConfigError: there is no such model in that place.
    """
    folder = models_dir() or Path(__file__).parents[2] / "examples" / "models"
    if not (folder / name / "config.json").is_file():
        raise ConfigError(
            complain(
                f"no model {name!r} in {folder}",
                f"a folder {name!r} with config.json and model.safetensors",
                "set SPECPLUGIN_MODELS to the folder examples/models of a clone of the repository",
            )
        )
    return folder / name
