"""The embedded models: small, trained, and stored in the repository."""

from __future__ import annotations

from pathlib import Path

from vllm_specplugin.errors import ConfigError, complain

__all__ = ["MODELS", "model_path"]

MODELS = Path(__file__).parents[1] / "models"


def model_path(name: str) -> Path:
    """The folder of an embedded model: ``"target"``, ``"draft"``, ``"medusa"``, ``"eagle"``.

    Raises:
        ConfigError: there is no such model.
    """
    folder = MODELS / name
    if not (folder / "config.json").is_file():
        raise ConfigError(
            complain(
                f"no model {name!r} in {MODELS}", "a folder with config.json", "check the name"
            )
        )
    return folder
