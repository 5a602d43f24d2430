"""How a configuration declares its settings: one :func:`setting` per field, from which the rest derives.

Adding a flag to ``quaclrs-train`` takes one field of ``TrainConfig`` in config.py and one row of the README's table.
cli/train.py makes the flag, :func:`check_requirements` refuses values, ``Run.identity`` in experiment/run.py compares.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar

from quaclrs.errors import UsageError


@dataclasses.dataclass(frozen=True)
class Requirement:
    """A condition on a setting's value, and its wording in error messages."""

    holds: Callable[[Any], bool]
    text: str


def at_least(minimum: int, reason: str = "") -> Requirement:
    """``value >= minimum``; ``reason`` ends the error message."""
    return Requirement(lambda value: value >= minimum, f"at least {minimum}{reason}")


NOT_NEGATIVE = Requirement(lambda value: value >= 0, "not negative")
POSITIVE = Requirement(lambda value: 0 < value < math.inf, "must be positive and finite")
FINITE_NOT_NEGATIVE = Requirement(lambda value: 0 <= value < math.inf, "must be finite and not negative")


def nearest_choice(value: str, choices: Iterable[str]) -> str | None:
    """The one of ``choices`` that ``value`` is most like, ignoring case; None where nothing is like it."""
    by_folded = {choice.casefold(): choice for choice in choices}
    close = difflib.get_close_matches(value.strip().casefold(), by_folded, n=1)
    return by_folded[close[0]] if close else None


def did_you_mean(value: str, choices: Iterable[str]) -> str:
    """The end of an error message about ``value``, which is none of ``choices``; empty where nothing is like it."""
    nearest = nearest_choice(value, choices)
    return "" if nearest is None else f"; did you mean {nearest}?"


def choose(flag: str, value: str, choices: Iterable[str], *, also: str = "") -> str:
    """The one of ``choices`` that ``value`` names; upper and lower case do not matter.

    Raises :class:`UsageError` for ``--{flag}``, naming all and the nearest; ``also`` follows their list.
    """
    names = list(choices)
    if value in names:
        return value
    nearest = nearest_choice(value, names)
    if nearest is not None and nearest.casefold() == value.strip().casefold():
        return nearest
    listed = f"choose {'one of ' if len(names) > 1 else ''}{', '.join(names)}{also}"
    raise UsageError(f"--{flag} {value}: {listed}{did_you_mean(value, names)}")


def _one_of(choices: tuple[str, ...]) -> Requirement:
    return Requirement(choices.__contains__, f"choose {'one of ' if len(choices) > 1 else ''}{', '.join(choices)}")


def setting(
    default: Any = dataclasses.MISSING,
    *,
    affects_result: bool,
    identity: tuple[str, ...] = (),
    default_factory: Any = dataclasses.MISSING,
    group: str | None = None,
    help: str = "",
    metavar: str | None = None,
    choices: tuple[str, ...] | None = None,
    requires: Requirement | None = None,
) -> Any:
    """A dataclass field with the metadata of one setting.

    ``affects_result``: whether another value can change the trained weights or the metrics. Such a setting belongs to
    the run's identity, which ``--resume`` compares. By default the identity holds the field's own name and value. Where
    the value in effect is known only later, it holds the entries that ``identity`` names instead (see ``Run.identity``
    in experiment/run.py).

    ``group``: the heading of ``--help`` that lists the flag ``--{name}``; None for no flag. The flag's type is the
    field's. ``choices`` and ``requires`` refuse values; None, meaning "not given", is always accepted.
    """
    metadata = {
        "affects_result": affects_result,
        "identity": identity,
        "group": group,
        "help": help,
        "metavar": metavar,
        "choices": choices,
        "requires": _one_of(choices) if choices else requires,
    }
    options = {"default": default} if default_factory is dataclasses.MISSING else {"default_factory": default_factory}
    return dataclasses.field(metadata=metadata, **options)


class Settings:
    """Base of dataclasses in which every field is a :func:`setting`; a class with another field cannot be defined."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        for name in cls.__annotations__:
            if "affects_result" not in getattr(cls.__dict__.get(name), "metadata", ()):
                raise TypeError(f"{cls.__name__}.{name}: declare it as setting(default, affects_result=True or False)")


def check_requirements(settings: Settings) -> None:
    """Raise :class:`UsageError` naming the first flag whose value its ``requires`` or ``choices`` refuse."""
    for one in dataclasses.fields(settings):
        value, requirement = getattr(settings, one.name), one.metadata["requires"]
        if value is not None and requirement is not None and not requirement.holds(value):
            similar = did_you_mean(value, one.metadata["choices"]) if one.metadata["choices"] else ""
            raise UsageError(f"--{one.name} {value}: {requirement.text}{similar}")


def identity_entries(settings: Settings) -> tuple[str, ...]:
    """Names of the entries of a run's identity: those of every field that affects the result."""
    affecting = (one for one in dataclasses.fields(settings) if one.metadata["affects_result"])
    return tuple(dict.fromkeys(entry for one in affecting for entry in one.metadata["identity"] or (one.name,)))


def identity_defaults(settings: Settings) -> dict[str, Any]:
    """Defaults of the settings that stand in a run's identity under their own name, as plain JSON values.

    An identity written before a setting existed lacks its entry: that run behaved as the default does now.
    """
    affecting = (one for one in dataclasses.fields(settings) if one.metadata["affects_result"])
    return {
        one.name: plain_value(one.default)
        for one in affecting
        if not one.metadata["identity"] and one.default is not dataclasses.MISSING
    }


def plain_value(value: Any) -> Any:
    """A setting's ``value`` as JSON stores it: paths as text, tuples as lists."""
    return str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value
