"""Tell transformers of the quantizer "compress", without importing transformers before somebody needs it.

transformers has a table of quantizers that others may register in, but importing it takes seconds, and most commands
need none of it. So `import compress` only leaves a finder on `sys.meta_path`, the import system's own extension point:
when transformers' table is imported, it registers `compress.quantizer` in it and goes away. It is a finder and a loader
by the import system's protocol, not by base class: `importlib.abc` alone would triple the time of `import compress`.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.abc import Loader
    from importlib.machinery import ModuleSpec
    from types import ModuleType

TABLE = "transformers.quantizers.auto"


def register() -> None:
    """Register the quantizer, at once where the table is there, else when it is imported."""
    if TABLE in sys.modules:
        import_module("compress.quantizer")
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder:
    """Finds the table as others would, and has it loaded by `_Registering`."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != TABLE:
            return None
        from importlib.util import find_spec

        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Registering(spec.loader)  # type: ignore[assignment]
        return spec


class _Registering:
    """Leaves the module to its own loader, then registers."""

    def __init__(self, own: Loader) -> None:
        self.own = own

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.own.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self.own
        self.own.exec_module(module)
        import_module("compress.quantizer")
