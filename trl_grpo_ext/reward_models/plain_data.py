"""Objects from plain data, such as YAML: a class by its name or its import path, and the arguments for it."""

import types
from collections.abc import Mapping, Sequence
from dataclasses import fields
from inspect import Parameter, signature
from numbers import Integral, Real
from typing import Any, Union, get_args, get_origin, get_type_hints

from ..tables import import_by_path


# What plain data may hold, in the words of an error
_WORDS = {str: "a text", int: "a whole number", float: "a number", bool: "true or false", type(None): "nothing"}


class CheckedFields:
    """
    Base class of dataclasses whose fields are checked against their annotations, see [`check_fields`].

    A dataclass calls `__post_init__` when an object is made. Python checks no annotation, so a number where a text
    belongs, as YAML makes one of `good: 1`, would fail much later.
    """

    def __post_init__(self) -> None:
        check_fields(self)


def check_fields(instance: Any) -> None:
    """
    Raise `TypeError` if an argument of a dataclass has another type than its annotation says.

    Known are texts, numbers, `None`, classes, unions and lists of these. Any other annotation allows everything. So do
    those of a class one of whose annotations names something that is not there when the program runs.

    Args:
        instance (`Any`):
            An object of a dataclass.
    """
    try:
        hints = get_type_hints(type(instance))
    except NameError:
        return
    for field in [field for field in fields(instance) if field.init]:
        value = instance.__dict__[field.name]
        hint = hints[field.name]
        if not _fits(value, hint):
            raise TypeError(f"{field.name} is {value!r}; expected {_words(hint)}.")


def _fits(value: Any, hint: Any) -> bool:
    origin = get_origin(hint)
    parts = get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, part) for part in parts)
    if origin in (tuple, list, Sequence):
        is_list = isinstance(value, (list, tuple))
        return is_list and (not parts or all(_fits(element, parts[0]) for element in value))
    if hint in (int, float):
        return isinstance(value, Integral if hint is int else Real) and not isinstance(value, bool)
    if not isinstance(hint, type):
        return True
    try:
        return isinstance(value, hint)
    except TypeError:
        # `Any` and protocols are classes of which nothing can be asked
        return True


def _words(hint: Any) -> str:
    origin = get_origin(hint)
    parts = get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(map(_words, parts))
    if origin in (tuple, list, Sequence):
        return f"a list, each of whose entries is {_words(parts[0])}" if parts else "a list"
    return _WORDS.get(hint) or f"an object of the class {hint.__name__}"


def find_type(name: Any, base: type, known: Sequence[type], where: str) -> type:
    """
    The class that a `type` in plain data names.

    Args:
        name (`str`):
            The name of one of `known`, or an import path, `package.module:Class`. The module is imported, so an import
            path is as powerful as code.
        base (`type`):
            What the class must be a subclass of.
        known (`Sequence[type]`):
            The classes that need no import path.
        where (`str`):
            The field, for errors.

    Raises:
        ValueError: an unknown name, a module or a class that cannot be imported, or one that is no subclass of `base`.
    """
    if not isinstance(name, str) or ":" not in name:
        found = [cls for cls in known if cls.__name__ == name]
        if not found:
            names = ", ".join(cls.__name__ for cls in known)
            raise ValueError(
                f"{where}: unknown type {name!r}; known: {names}, or the import path of a class of your own, such as "
                "my_package.my_module:MyClass."
            )
        return found[0]
    found_type = import_by_path(f"{where}: type {name!r}", name)
    if not isinstance(found_type, type) or not issubclass(found_type, base):
        raise ValueError(f"{where}: type {name!r} is no subclass of {base.__module__}:{base.__name__}.")
    return found_type


def build(cls: type, arguments: Mapping[str, Any], where: str) -> Any:
    """
    An object from the arguments of its class, lists as tuples.

    Args:
        cls (`type`):
            The class.
        arguments (`Mapping[str, Any]`):
            Its arguments by name.
        where (`str`):
            The field, for errors.

    Raises:
        ValueError: an unknown or a missing argument, or what the class itself refuses; the message names the field and
            the class.
    """
    parameters = signature(cls).parameters
    takes_all = any(parameter.kind is Parameter.VAR_KEYWORD for parameter in parameters.values())
    for name in arguments:
        if name not in parameters and not takes_all:
            raise ValueError(
                f"{where}: unknown field '{name}' of {cls.__name__}; known: {', '.join(parameters) or 'none'}."
            )
    for name, parameter in parameters.items():
        required = parameter.default is Parameter.empty and parameter.kind is not Parameter.VAR_KEYWORD
        if required and parameter.kind is not Parameter.VAR_POSITIONAL and name not in arguments:
            raise ValueError(f"{where}: field '{name}' of {cls.__name__} is missing.")
    try:
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in arguments.items()})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {cls.__module__}:{cls.__name__}: {error}") from error


def build_typed(values: Any, base: type, known: Sequence[type], where: str) -> Any:
    """[`build`] of the class that the entry `type` of `values` names, see [`find_type`]."""
    if not isinstance(values, Mapping):
        raise ValueError(f"{where}: expected a mapping with a `type`, got {values!r}.")
    arguments = dict(values)
    cls = find_type(arguments.pop("type", None), base, known, where)
    return build(cls, arguments, where)
