"""The rules for a class that is registered, checked when it is looked up and built.

A member that the engine does not know is silently ignored, so a misspelt one would be
lost. Members are therefore read by plain attribute access from the base class of the
role, and names that were meant for the engine but are unknown to it are refused.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from types import new_class
from typing import TypeVar

from vllm_specplugin.api import AlgorithmBase, Needs, ProposerBase
from vllm_specplugin.errors import ConfigError, complain

__all__ = ["check_instance", "complete"]

A = TypeVar("A", bound=AlgorithmBase)

_RENAMED = {
    "needs_top": "needs = Needs(top_tokens=...)",
    "needs_hidden": "needs = Needs(hidden=True)",
    "needs_lm_head": "needs = Needs(lm_head=True)",
    "native": "needs = Needs(vllm_drafter=True)",
    "couples": "needs = Needs(coupled_drafter=True)",
    "knows_scopes": "separates_scopes = True",
}
"""What earlier versions called it, and what to write instead."""


@cache
def complete(factory: object, base: type[A]) -> type[A]:
    """The class as the engine uses it.

    Args:
        factory: a class that inherits ``base``, or has its abstract methods.
        base: :class:`ProposerBase`, :class:`ScorerBase` or :class:`PolicyBase`.

    Returns:
        ``factory`` itself if it inherits ``base``; otherwise a subclass of both, so that
        optional members that ``factory`` lacks have their defaults.

    Raises:
        ConfigError: it is no class, a method is missing, or a member looks like one for
            the engine and is not.
    """
    if not isinstance(factory, type):
        raise ConfigError(
            complain(
                f"{factory!r} is a {type(factory).__name__}", "a class", "name the class itself"
            )
        )
    name = f"{factory.__module__}:{factory.__qualname__}"
    if issubclass(factory, base):
        whole: type[A] = factory
    else:
        try:
            members = {"__module__": factory.__module__, "__qualname__": factory.__qualname__}
            whole = new_class(
                factory.__name__, (factory, base), exec_body=lambda own: own.update(members)
            )
        except TypeError as error:
            raise ConfigError(
                complain(
                    f"{name} ({error})",
                    f"a class that can inherit vllm_specplugin.{base.__name__}",
                    "inherit it yourself",
                )
            ) from error
    if missing := sorted(whole.__abstractmethods__):
        raise ConfigError(
            complain(
                f"{name} without {', '.join(f'{m}()' for m in missing)}",
                f"the methods of vllm_specplugin.{base.__name__}",
                "inherit it and write them",
            )
        )
    _check_names(name, dir(whole))
    return whole


def check_instance(made: A) -> A:
    """The instance, after its members were checked.

    Raises:
        ConfigError: ``needs`` is no :class:`Needs`, rows are asked for and not observed,
            or a member looks like one for the engine and is not.
    """
    name = f"{type(made).__module__}:{type(made).__qualname__}"
    _check_names(name, dir(made))
    if isinstance(made, ProposerBase):
        if not isinstance(made.needs, Needs):
            raise ConfigError(
                complain(
                    f"{name}.needs = {made.needs!r}",
                    "an instance of vllm_specplugin.Needs",
                    "write needs = Needs(hidden=True)",
                )
            )
        if made.needs.top_tokens and type(made).observe_rows is ProposerBase.observe_rows:
            raise ConfigError(
                complain(
                    f"{name} with Needs(top_tokens={made.needs.top_tokens})",
                    "a method observe_rows() to show them to",
                    "write it, or leave top_tokens out",
                )
            )
    return made


def _check_names(owner: str, members: Iterable[str]) -> None:
    for member in members:
        if member in _RENAMED:
            raise ConfigError(
                complain(
                    f"{owner}.{member}",
                    "the name that this version reads",
                    f"write {_RENAMED[member]}",
                )
            )
        if member == "need" or (member.startswith(("needs", "need_")) and member != "needs"):
            raise ConfigError(
                complain(
                    f"{owner}.{member}, which the engine does not know",
                    "its needs in one attribute, 'needs'",
                    f"write needs = Needs(...) with {', '.join(Needs.__dataclass_fields__)}, "
                    "or begin the name with an underscore if it is your own",
                )
            )
