"""From a ``[[pass]]`` table of a plan to the pass: the classes by the names that plans use, and those of one's own."""

from __future__ import annotations

import importlib
import pkgutil
import traceback
from typing import TYPE_CHECKING, Any

from compress import passes as builtin_passes
from compress.errors import SettingError, nearest
from compress.passes.base import Pass

if TYPE_CHECKING:
    from compress.settings import Settings


def pass_classes() -> dict[str, type[Pass]]:
    """The methods that come with compress, by the name a plan uses: the file in passes/."""
    classes: dict[str, type[Pass]] = {}
    for info in pkgutil.iter_modules(builtin_passes.__path__):
        module = importlib.import_module(f"{builtin_passes.__name__}.{info.name}")
        for item in vars(module).values():
            concrete = (
                isinstance(item, type) and issubclass(item, Pass) and not getattr(item, "__abstractmethods__", ())
            )
            if concrete and item.__module__ == module.__name__ and item not in (Pass,):
                classes[info.name] = item
    return {name: cls for name, cls in classes.items() if name != "base"}


def find_pass(use: str) -> type[Pass]:
    """The class that ``use`` names. Raises SettingError for an unknown one."""
    known = pass_classes()
    if use in known:
        return known[use]
    if ":" not in use:
        names = ", ".join(sorted(known))
        raise SettingError(
            f'unknown pass "{use}"{nearest(use, known)}',
            f'the passes are {names}; your own is use = "my_package.my_module:MyPass"',
        )
    module, _, attribute = use.partition(":")
    try:
        found = importlib.import_module(module)
    except Exception as error:  # the module is the user's: it may raise anything
        at = _raised_at(error)
        fix = (
            f"correct {module}" if at or isinstance(error, SyntaxError) else 'write use = "my_package.my_module:MyPass"'
        )
        fix = "install the package, or set PYTHONPATH" if isinstance(error, ModuleNotFoundError) else fix
        reason = f"{type(error).__name__}: {error}{at}"
        raise SettingError(f'cannot import pass "{use}": {reason}', fix) from error
    cls = getattr(found, attribute, None)
    if cls is None:
        own = [name for name, one in vars(found).items() if isinstance(one, type) and issubclass(one, Pass)]
        own = [name for name in own if vars(found)[name].__module__ == module]
        problem = f'cannot import pass "{use}": {module} has no class "{attribute}"{nearest(attribute, own)}'
        raise SettingError(problem, f"its passes are {', '.join(own)}" if own else "derive one from LinearPass there")
    if not (isinstance(cls, type) and issubclass(cls, Pass)) or bool(getattr(cls, "__abstractmethods__", None)):
        raise SettingError(f'"{use}" is not a pass', "derive the class from compress.passes.LinearPass")
    return cls


def _raised_at(error: Exception) -> str:
    """The line of the user's module at which its import failed; a SyntaxError says it itself."""
    frames = [one for one in traceback.extract_tb(error.__traceback__)[1:] if "importlib" not in one.filename]
    return f" ({frames[0].filename}:{frames[0].lineno})" if frames else ""


def pass_from_table(table: Any) -> Pass:
    """A ``[[pass]]`` table as the object that it constructs."""
    if not isinstance(table, dict):
        raise SettingError(f"pass must be a table, not {table!r}", "write [[pass]]")
    settings = dict(table)
    use = settings.pop("use", None)
    if not isinstance(use, str):
        raise SettingError('a pass needs the key "use"', f"use = one of {', '.join(sorted(pass_classes()))}")
    cls = find_pass(use)
    refuse_python_names(cls, settings)
    return cls(**settings)


def refuse_python_names(cls: type[Settings], table: dict[str, Any]) -> None:
    """``except_`` and ``passes`` are how Python spells ``except`` and ``pass``; a plan file has one spelling."""
    for name, field in cls.model_fields.items():
        if field.alias and name != field.alias and name in table:
            names = key_names(cls)
            fix = f"the keys of this table are {', '.join(names)}"
            raise SettingError(f'unknown key "{name}"; did you mean "{field.alias}"?', fix, (name,))


def key_names(cls: type[Settings]) -> list[str]:
    """The keys that a plan may write in a table of this class."""
    names = [field.alias or name for name, field in cls.model_fields.items()]
    return ["use", *names] if issubclass(cls, Pass) else names
