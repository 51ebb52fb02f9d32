"""Objects from plain data, such as YAML: a class by its name or its import path, and the arguments for it."""

import pkgutil
from collections.abc import Mapping, Sequence
from inspect import Parameter, signature
from typing import Any


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
    try:
        found_type = pkgutil.resolve_name(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{where}: type {name!r} cannot be imported ({type(error).__name__}: {error}). Its module must be "
            "installed, in the working directory or on PYTHONPATH."
        ) from error
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
