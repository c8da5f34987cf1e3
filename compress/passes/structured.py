"""What passes of structured pruning have in common: they leave a smaller model, and end a stage of the plan.

How much is left is known before a weight is read; a ratio that leaves nothing, or that no multiple meets, is refused
then. Every block keeps equally much, so that stock transformers loads the result; with ``heterogeneous = true`` all
blocks together keep so much, and only the run finds out how it is spread over them.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from compress.passes.base import Invariant, Pass, SettingError
from compress.structure import Sizes, Units, alike_or_not, config_values, head_size, width_named

if TYPE_CHECKING:
    from compress.architecture import Architecture


class Structured(Pass):
    """The base of passes that make the model smaller; comes before masks, grids and branches (rule 2)."""

    rule: ClassVar[int] = 2
    preserves: ClassVar[frozenset[Invariant]] = frozenset({Invariant.TIES})

    @abstractmethod
    def left(self, sizes: Sizes, architecture: Architecture, config: Any) -> Sizes:
        """What the configured pass leaves of a model of these sizes. Raises SettingError."""

    def check_lock(self, lock: Any, index: int) -> None:
        """The whole model is pruned by one setting, so there is nothing to match."""
        for key in ("match", "except_", "where"):
            if key in self.model_fields_set:
                name = key.rstrip("_")
                problem = f"{self.use()} prunes the whole model by one setting"
                raise SettingError(problem, f'leave "{name}" out', (name,))


class Narrowing(Structured):
    """Fields of passes that remove heads and channels."""

    heads: float = Field(
        default=0.0, ge=0, lt=1, description="fraction of attention heads to remove, in whole KV groups"
    )
    channels: float = Field(default=0.0, ge=0, lt=1, description="fraction of MLP channels to remove")
    multiple: int = Field(default=64, ge=1, description="channels that are left are a multiple of this, the nearest")
    heterogeneous: bool = Field(
        default=False,
        description="remove these fractions of the whole model, and of each block what matters least: only "
        "compress.load loads the result",
    )

    def readers(self, architecture: Architecture) -> set[str]:
        """Linears that read heads or channels of which some go, by their names in a block."""
        removed = {"heads": self.heads, "channels": self.channels}
        return {name for width in architecture.widths if removed[width.name] for name in width.columns}

    def step(self, name: str) -> int:
        """What the number of heads or channels that a block keeps is a multiple of."""
        return self.multiple if name == "channels" else 1

    def narrowed(self, sizes: Sizes, architecture: Architecture, config: Any) -> Sizes:
        """Heads and channels that are left, rounded to what can be; where blocks will differ, an example.

        Raises:
            SettingError: the fractions leave nothing, or all, or no loader takes the number of heads.
        """
        after = sizes
        if self.channels:
            after = replace(after, channels=self._left("channels", self.channels, sizes))
        if self.heads:
            if width_named(architecture, "heads").unit_size is None:
                problem = (
                    f"{config.model_type} ties the number of heads to the hidden size: no loader takes fewer alone"
                )
                fix = "give hidden instead" if "hidden" in type(self).model_fields else 'use = "width" with hidden'
                raise SettingError(problem, f"{fix}, which takes heads along", ("heads",))
            after = replace(after, heads=self._left("heads", self.heads, sizes))
        return after

    def _left(self, name: str, fraction: float, sizes: Sizes) -> Units:
        size = sizes.at(name, 0)
        if not self.heterogeneous:
            return rounded(name, fraction, size, self.step(name))
        return example(name, fraction, size, sizes.blocks, self.step(name))

    def check_heads(self, sizes: Sizes, after: Sizes, architecture: Architecture, config: Any) -> None:
        """Refuse a number of heads that the model's configuration refuses. Raises SettingError.

        Of heads that differ between blocks it says nothing: then config.json keeps the number of all, beside theirs.
        """
        after = replace(after, **{name: getattr(sizes, name) for name in after.different})
        assert isinstance(sizes.heads, int)
        assert isinstance(after.heads, int)
        if not refuses(architecture, config, sizes, after):
            return
        key = "heads" if after.heads < sizes.heads else "hidden"
        counts = [n for n in range(1, sizes.heads) if not refuses(architecture, config, sizes, replace(after, heads=n))]
        problem = f"{after.heads} of {sizes.heads} heads and a hidden size of {after.hidden} do not go together"
        problem += f": {type(config).__name__} wants the number of query heads to divide the hidden size"
        fits = ", ".join(f"{1 - n / sizes.heads:.4g}" for n in counts)
        fix = f"heads that go with it: {fits}" if counts else "give another hidden, or leave it out"
        raise SettingError(problem, fix, (key,))


def refuses(architecture: Architecture, config: Any, before: Sizes, after: Sizes) -> bool:
    """Whether transformers' configuration of the family refuses these heads and this hidden size."""
    values = config.to_dict() | config_values(architecture, config, before, after)
    try:
        type(config).from_dict(values)
    except Exception:  # each family has its own
        return True
    return False


def rounded(key: str, fraction: float, size: int, multiple: int, unit: int = 1) -> int:
    """What is left of `size` units: the multiple nearest to ``size · (1 − fraction)``, the larger of two as near.

    `unit`: what every multiple is a multiple of.

    Raises:
        SettingError: that would be nothing, or all.
    """
    wanted = size * _kept(fraction)
    left = multiple * _nearest(wanted / multiple)
    if 0 < left < size:
        return left
    fits = range(multiple, size, multiple)
    of = f" in multiples of {multiple}" if multiple > 1 else ""
    problem = (
        f"{key} = {fraction:g} of {size} leaves {left}{of}"
        if left <= 0
        else f"{key} = {fraction:g} removes none of {size}{of}"
    )
    if not fits:
        smaller = f"choose a smaller multiple: none of {multiple} is below {size}"
        fix = smaller if multiple > unit else f"leave {key} out"
    else:
        nearest = min(fits, key=lambda n: abs(n - wanted))
        fix = f"{key} = {1 - nearest / size:.6g} leaves {nearest}" + (
            ", or choose a smaller multiple" if multiple > unit else ""
        )
    raise SettingError(problem, fix, (key,))


def _kept(fraction: float) -> Fraction:
    """1 − fraction, exact for the decimal that was written (1 − 0.3 is 7/10, not a little less)."""
    return 1 - Fraction(str(fraction))


def _nearest(number: Fraction) -> int:
    """The nearest whole number, the larger of two as near."""
    return math.floor(number + Fraction(1, 2))


def example(name: str, fraction: float, size: int, blocks: int, multiple: int) -> Units:
    """What blocks of `size` units may keep so that all together keep ``1 − fraction`` of them, and each a multiple.

    How the run will spread them nobody knows; the total is what it will be. One block has as few as there may be, one a
    multiple more, and one as many as there then may be: so estimates and checks see a small one and a large one.

    Raises:
        SettingError: a block would have nothing, or all blocks all.
    """
    least, most = blocks, blocks * (size // multiple)
    total = _nearest(blocks * size * _kept(fraction) / multiple)
    if not least <= total <= most or total * multiple == blocks * size:
        of = f" in multiples of {multiple}" if multiple > 1 else ""
        problem = f"{name} = {fraction:g} of {blocks} blocks of {size} leaves {max(total, 0) * multiple}{of}"
        if not most:
            raise SettingError(problem, f"choose a smaller multiple: none of {multiple} is below {size}", (name,))
        nearest = min(max(total, least), most if most * multiple < blocks * size else most - 1)
        if nearest < least:
            raise SettingError(problem, f"choose a smaller multiple, or leave {name} out", (name,))
        fix = f"{name} = {1 - nearest * multiple / (blocks * size):.6g} leaves {nearest * multiple}"
        raise SettingError(problem, f"{fix}; every block keeps at least {multiple}", (name,))
    most //= blocks
    spread: dict[int, int] = {}
    for block in dict.fromkeys((0, min(1, blocks - 1), blocks - 1, *range(blocks))):
        left, others = total - sum(spread.values()), blocks - len(spread) - 1
        wish = {0: 1, 1: spread.get(0, 0) + 1, blocks - 1: most}.get(block, -(-left // (others + 1)))
        spread[block] = max(1, left - others * most, min(wish, most, left - others))
    return alike_or_not([spread[block] * multiple for block in range(blocks)])


def coupled_heads(architecture: Architecture, config: Any) -> int | None:
    """The size of a head, where the hidden size is heads times it, so that both go together; None elsewhere."""
    return head_size(architecture, config) if width_named(architecture, "heads").unit_size is None else None
