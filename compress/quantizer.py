"""What transformers calls when it loads a model whose quant_method is "compress".

`compress.registration` imports this module once transformers has its table of quantizers. `from_pretrained` then builds
the model on the meta device, lets this class replace the linears that the schemes name, reads tensors into them, and
lets it turn them into kernels. `compress.load` goes the same way and gives the tensors itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from compress.errors import ModelError

if TYPE_CHECKING:
    from compress.kernels.choose import Kernels
    from compress.kernels.pack import Layout

METHOD = "compress"
logger = logging.get_logger(__name__)


@register_quantization_config(METHOD)
class CompressConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The ``quantization_config`` of the packed format, and what `compress.load` adds to it.

    transformers passes over one that is given to `from_pretrained` beside that of the model, with a warning.

    Attributes:
        kernels: those to choose from, as `compress.load` takes them.
        device: where linears will multiply; None for where they are loaded.
    """

    def __init__(
        self,
        quant_method: str = METHOD,
        version: Any = None,
        schemes: Any = None,
        kernels: Kernels = "auto",
        device: str | None = None,
        **others: Any,
    ) -> None:
        # Keys of a version to come must not keep us from saying that it is one.
        self.quant_method, self.version, self.schemes = quant_method, version, schemes
        self.kernels, self.device = kernels, device


@register_quantizer(METHOD)
class CompressQuantizer(HfQuantizer):  # type: ignore[misc]
    """Puts a `PackedLinear` in the place of every linear that has a scheme, and settles it once it is read."""

    quantization_config: CompressConfig

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuse devices that no kernel runs on."""
        from compress.runtime import check_device

        for device in (device_map or {}).values() if isinstance(device_map, dict) else ():
            check_device(device if not isinstance(device, int) else f"cuda:{device}", "device_map")

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Refuse dtypes that no kernel takes."""
        from compress.runtime import check_dtype

        return check_dtype(dtype, "from_pretrained")

    def _process_model_before_weight_loading(
        self, model: Any, dtype: torch.dtype | None = None, checkpoint_files: list[str] | None = None, **_: Any
    ) -> None:
        from compress.packed_linear import PackedLinear
        from compress.runtime import check_device, check_kernels, packed_layouts

        given = self.quantization_config
        check_kernels(given.kernels)
        if given.device is not None:
            check_device(given.device, "quantization_config")
        # Without files, tensors are given by compress.load, which has checked them.
        where = Path(checkpoint_files[0]).parent if checkpoint_files else None
        layouts = packed_layouts(given.to_dict(), model.config.model_type, where)
        prefix = f"{model.base_model_prefix}." if model.base_model is model else ""  # AutoModel has no head around it
        for name, layout in ((name.removeprefix(prefix), layout) for name, layout in layouts.items()):
            old = _replaceable(model, name, layout)
            bias = getattr(old, "bias", None) is not None
            model.set_submodule(name, PackedLinear(layout, dtype or torch.get_default_dtype(), bias=bias))

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        from compress.kernels.kernel import Guard, Kernel
        from compress.packed_linear import PackedLinear

        given = self.quantization_config
        device = None if given.device is None else torch.device(given.device)
        chosen = {}
        for name, module in model.named_modules():
            if isinstance(module, PackedLinear):
                choice = module.settle(name, given.kernels, device)
                chosen[name] = {"kernel": choice.kernel.name, "why": choice.why}
        model.compress_kernels = chosen
        # Before the embedding: the body comes before any head, and so does its first child.
        guard = Guard(module for module in model.modules() if isinstance(module, Kernel))
        if guard.fixed:
            guard.put_before(model.base_model)
        return model

    def is_serializable(self) -> bool:
        """Kernels hold shuffled weights; the directory that they came from is the model.

        transformers asks when it is to save, refuses, and leaves it to a warning to say why.
        """
        logger.warning("packed weights are in the order of their kernels: copy the directory they were loaded from")
        return False

    @property
    def is_trainable(self) -> bool:
        """Codes have no gradient."""
        return False


def _replaceable(model: nn.Module, name: str, layout: Layout) -> nn.Module:
    """The linear that a scheme names. Raises ModelError where the model has none of that shape."""
    from transformers.pytorch_utils import Conv1D

    try:
        old = model.get_submodule(name)
    except AttributeError:
        old = None
    if not isinstance(old, (nn.Linear, Conv1D)):
        raise ModelError(
            f"the model has no linear {name}, but its quantization_config has a scheme for it",
            where="config.json",
            fix="weights and config.json are of different models; copy both again",
        )
    shape = tuple(old.weight.shape)
    shape = shape if isinstance(old, nn.Linear) else shape[::-1]
    if shape != (layout.out_features, layout.in_features):
        raise ModelError(
            f"{name} is {list(shape)} by config.json, but its scheme says {[layout.out_features, layout.in_features]}",
            where="config.json",
            fix="weights and config.json are of different models; copy both again",
        )
    return old
