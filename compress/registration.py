"""Tell transformers of what compress adds, without importing transformers before somebody needs it.

transformers has tables that others may register in, one of quantizers and one of configurations, but importing them
takes seconds, and most commands need none of it. So `import compress` only leaves a finder on `sys.meta_path`, the
import system's own extension point: when one of these tables is imported, it imports the module of compress that
registers in it (`compress.quantizer`, `compress.heterogeneous`); after the last it goes away. It is a finder and a
loader by the import system's protocol, not by base class: `importlib.abc` alone would triple the time of `import
compress`.
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

TABLES = {
    "transformers.quantizers.auto": "compress.quantizer",
    "transformers.models.auto.configuration_auto": "compress.heterogeneous",
}


def register() -> None:
    """Register in each table, at once where it is there, else when it is imported."""
    for table, ours in TABLES.items():
        if table in sys.modules:
            import_module(ours)
    if any(table not in sys.modules for table in TABLES) and not any(isinstance(one, _Finder) for one in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder:
    """Finds the tables as others would, and has each loaded by `_Registering`."""

    def __init__(self) -> None:
        self.awaited = {table: ours for table, ours in TABLES.items() if table not in sys.modules}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        ours = self.awaited.pop(fullname, None)
        if ours is None:
            return None
        from importlib.util import find_spec

        if not self.awaited:
            sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Registering(spec.loader, ours)  # type: ignore[assignment]
        return spec


class _Registering:
    """Leaves the module to its own loader, then registers."""

    def __init__(self, own: Loader, ours: str) -> None:
        self.own, self.ours = own, ours

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.own.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self.own
        self.own.exec_module(module)
        import_module(self.ours)
