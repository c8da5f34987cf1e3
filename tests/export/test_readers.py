"""What other packages read from quantized outputs: the same weights bit for bit, and the same model.

The readers are compressed-tensors, GPTQModel, and transformers on top of either; none shares code with our writer.
The reference is the dense model of transformers that holds the weights as our own reader decodes them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, GPTQConfig

import compress
from compress.architecture import architecture_for
from compress.export.reader import open_model
from compress.passes import GPTQ, RTN, Magnitude, SparseGPT, Where
from compress.plan import Export
from compress.state import Pattern, pruned_count
from tests.conftest import REFERENCE, ROOT, tiny_directory

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torch import Tensor
    from transformers import PreTrainedModel

    from compress.passes.base import Pass

BOTH = ("gptq", "compressed-tensors")
SMALL = {"group_size": 32, "scale_dtype": "float16"}  # the tiny models are 32 and 64 wide, and most are float32


@dataclass(frozen=True)
class Case:
    """What to do to which model, the formats that can hold it, and the dtype in which readers load it."""

    passes: list[Pass]
    family: str | None = None  # a tiny model; None is the embedded one
    formats: tuple[str, ...] = BOTH
    model: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float16


def tiny(family: str, *passes: Pass, mlp: int = 64, **settings: Any) -> Case:
    """A case on a tiny model whose MLP groups of 32 columns divide."""
    return Case(list(passes), family, model={"intermediate_size": mlp}, **settings)


def coarse(**settings: Any) -> RTN:
    """The quickest quantization: for a format, one set of codes is as good as another."""
    return RTN(clip="minmax", **settings)


CASES = {
    "4 bits": Case([GPTQ(bits=4)]),
    "4 bits asymmetric": Case([GPTQ(bits=4, symmetric=False)]),
    "3 bits": Case([GPTQ(bits=3)]),
    "8 bits by row": Case([coarse(bits=8, group_size=-1)]),
    "2 bits": Case([coarse(bits=2, group_size=32)]),
    "2:4 and 4 bits": Case([SparseGPT(pattern="2:4"), GPTQ(bits=4)]),
    "all but one kind": Case([coarse(bits=4, except_="*.down_proj")]),
    "all but one block": Case([coarse(bits=4, except_="model.layers.0.*")]),
    "bfloat16": tiny("llama", coarse(bits=4, group_size=32), dtype=torch.bfloat16),
    "phi3": tiny("phi3", coarse(bits=4, **SMALL)),
    "qwen2": tiny("qwen2", Magnitude(sparsity=0.3), coarse(bits=8, **SMALL)),
    "qwen2 asymmetric": tiny("qwen2", Magnitude(sparsity=0.3), coarse(bits=4, symmetric=False, **SMALL)),
    "opt with projections": Case([coarse(bits=4, **SMALL)], "opt", model={"ffn_dim": 64, "word_embed_proj_dim": 16}),
    "gpt2": Case([coarse(bits=4, **SMALL)], "gpt2", formats=("gptq",)),
}
EVERY = [(name, form) for name, case in CASES.items() for form in case.formats]
MIXED = tiny("llama", coarse(bits=4, **SMALL, where=(Where(match="*.down_proj", bits=8),)))


class Emitted:
    """The output of one plan, as the safetensors package and our own reader see it."""

    def __init__(self, folder: Path, case: Case, form: str) -> None:
        self.case, self.form, self.directory = case, form, folder / "out"
        if case.family is None:
            source, text = REFERENCE, ROOT / "examples" / "prose.txt"
        else:
            dtype = torch.bfloat16 if case.dtype == torch.bfloat16 else torch.float32
            source = tiny_directory(folder / "model", case.family, dtype=dtype, **case.model)
            text = folder / "text.txt"
        plan = compress.Plan(
            model=compress.Model(path=str(source)),
            calibration=compress.Calibration(source=str(text), samples=4, length=64),
            run=compress.Run(output=str(self.directory)),
            passes=case.passes,
            exports=[Export(format=form)],
        )
        compress.run(plan)
        self.quantization = json.loads((self.directory / "config.json").read_text())["quantization_config"]
        lock = json.loads((self.directory / "lock.json").read_text())
        self.linears: dict[str, dict[str, Any]] = {linear["name"]: linear for linear in lock["linears"]}
        self.held = {name for name, linear in self.linears.items() if linear.get("grid")}
        self.config, self.ours = open_model(self.directory)
        self.transposed = architecture_for(self.config.model_type).transposed

    @property
    def symmetric(self) -> bool:
        return all(self.linears[name]["grid"]["symmetric"] for name in self.held)

    def decoded(self, linear: str) -> Tensor:
        """The weight (out, in) of a linear as our reader decodes it."""
        weight = self.ours.read(self.linears[linear]["tensor"])
        return weight.T if linear.endswith(tuple(f".{name}" for name in self.transposed)) else weight

    def stored(self, linear: str) -> dict[str, Tensor]:
        """What the safetensors package finds of a linear in the model's files, by suffix."""
        return read_files(self.directory, "model*.safetensors", linear)

    def dense(self, dtype: torch.dtype) -> PreTrainedModel:
        """A plain model that holds the weights as our reader decodes them."""
        model = AutoModelForCausalLM.from_config(self.config, dtype=dtype)
        state = {name: self.ours.read(name).to(dtype) for name in self.ours.tensors}
        missing, unknown = model.load_state_dict(state, strict=False)
        assert not unknown
        assert set(missing) <= {"lm_head.weight"}  # tied
        model.tie_weights()
        return model.eval()


def read_files(directory: Path, files: str, prefix: str) -> dict[str, Tensor]:
    """Tensors of the files whose names begin with the prefix and a dot, by what follows."""
    found = {}
    for path in directory.glob(files):
        with safe_open(path, framework="pt") as file:
            names = [name for name in file.keys() if name.startswith(f"{prefix}.")]  # noqa: SIM118
            found |= {name.removeprefix(f"{prefix}."): file.get_tensor(name) for name in names}
    return found


@pytest.fixture(scope="module", autouse=True)
def _packages() -> Iterator[None]:
    """Imported here and not at the top: GPTQModel alone takes seconds, in every process that collects this file.

    GPTQModel compiles its decoding with a C++ compiler on the first forward; eager mode computes the same, sooner.
    """
    for package in ("compressed_tensors", "gptqmodel", "optimum"):
        pytest.importorskip(package, reason="install the extra: pip install '.[readers]'")
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture(scope="module", params=EVERY, ids=[f"{form}, {name}" for name, form in EVERY])
def emitted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Emitted:
    name, form = request.param
    return Emitted(tmp_path_factory.mktemp("emitted"), CASES[name], form)


def in_transformers(emitted: Emitted, **options: Any) -> PreTrainedModel:
    if emitted.form == "compressed-tensors" and not emitted.symmetric:
        options = {"quantization_config": CompressedTensorsConfig(dequantize=True)} | options
    return AutoModelForCausalLM.from_pretrained(emitted.directory, dtype=emitted.case.dtype, **options).eval()


def in_gptqmodel(emitted: Emitted) -> PreTrainedModel:
    from gptqmodel import BACKEND, GPTQModel

    directory, dtype = str(emitted.directory), emitted.case.dtype
    return GPTQModel.load(directory, device="cpu", dtype=dtype, backend=BACKEND.GPTQ_TORCH).model


def decoded_by_gptqmodel(emitted: Emitted) -> dict[str, Tensor]:
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    if emitted.case.family == "phi3":  # GPTQModel's loader refuses it (below); its layers do not
        model = in_transformers(emitted, quantization_config=GPTQConfig(bits=4, backend="gptq_torch"))
    else:
        model = in_gptqmodel(emitted)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, TorchLinear)}
    return {name: layer.dequantize_weight().T for name, layer in layers.items()}  # it decodes (in, out)


def decoded_by_compressed_tensors(emitted: Emitted) -> dict[str, Tensor]:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.utils import is_match

    config = QuantizationConfig.model_validate(emitted.quantization)
    compressor = BaseCompressor.get_value_from_registry(config.format)
    found: dict[str, Tensor] = {}
    for name in emitted.linears:
        for scheme in config.config_groups.values():
            if is_match(name, nn.Linear(1, 1), scheme.targets, config.ignore):
                assert name not in found, "two schemes match it"
                found[name] = compressor.decompress(emitted.stored(name), scheme)["weight"]
    return found


def test_packages_decode_the_same_weights(emitted: Emitted) -> None:
    """Exactly: a code less its zero-point is an integer, whose product with a 16-bit scale is rounded once."""
    packages = {"gptq": decoded_by_gptqmodel, "compressed-tensors": decoded_by_compressed_tensors}
    found = packages[emitted.form](emitted)
    assert set(found) == emitted.held
    for name, weight in found.items():
        assert weight.dtype == emitted.case.dtype
        assert torch.equal(weight, emitted.decoded(name).to(emitted.case.dtype)), name


def agree(emitted: Emitted, theirs: PreTrainedModel) -> None:
    """Logits of the same weights differ by rounding only, and greedy generation follows them.

    The tolerance is twice what rounding does to this model: the difference of the dense model in the reader's dtype
    and in float32. GPTQModel's kernel for 4 bits on CPUs computes in bfloat16 whatever the dtype of the model.
    """
    from gptqmodel.nn_modules.qlinear.torch_aten_kernel import TorchAtenLinear

    aten = any(isinstance(layer, TorchAtenLinear) for layer in theirs.modules())
    dtype = torch.bfloat16 if aten else emitted.case.dtype
    dense = emitted.dense(torch.float32)
    tokens = torch.randint(3, emitted.config.vocab_size, (2, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exact = dense(tokens).logits
        tolerance = 2 * float((emitted.dense(dtype)(tokens).logits.float() - exact).abs().max())
        difference = float((theirs(tokens).logits.float() - exact).abs().max())
        written = theirs.generate(tokens[:1, :8], max_new_tokens=8, do_sample=False, eos_token_id=None)
        logits = dense(written).logits[0]
    assert difference <= tolerance
    assert written.shape == (1, 16)
    for before, token in enumerate(written[0, 8:], start=7):  # each is the best token, or as good as the best
        assert float(logits[before, token]) >= float(logits[before].max()) - 2 * tolerance


def test_readers_compute_the_same(emitted: Emitted) -> None:
    """transformers, and where it refuses GPTQModel's own loader."""
    if emitted.case.family == "gpt2":
        with pytest.raises(AttributeError, match=r"weight|normal_"):  # its _init_weights wants c_proj.weight
            in_transformers(emitted)
        agree(emitted, in_gptqmodel(emitted))
    else:
        agree(emitted, in_transformers(emitted))


def test_masks_say_what_is_pruned(emitted: Emitted) -> None:
    """As docs/deploy.md says: uint8 (out, ceil(in / 8)), a bit per weight, lowest first, 1 where it is kept."""
    path = emitted.directory / "masks.safetensors"
    prune = emitted.case.passes[0]
    assert path.exists() == isinstance(prune, (SparseGPT, Magnitude))
    if not path.exists():
        return
    with safe_open(path, framework="np") as file:
        masks = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert set(masks) == {f"{name}.mask" for name in emitted.linears}
    for name in emitted.linears:
        weight = emitted.decoded(name)
        kept = np.unpackbits(masks[f"{name}.mask"], axis=1, bitorder="little")[:, : weight.shape[1]].astype(bool)
        assert not weight[~torch.from_numpy(kept)].any()
        if isinstance(prune, SparseGPT):
            assert prune.pattern == Pattern(2, 4)
            assert (kept.reshape(-1, 4).sum(1) == 2).all()
        else:
            assert (~kept).sum() == pruned_count(0.3, kept.size)


def test_different_grids_in_gptq(tmp_path: Path) -> None:
    mixed = Emitted(tmp_path, MIXED, "gptq")
    test_packages_decode_the_same_weights(mixed)
    agree(mixed, in_gptqmodel(mixed))
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):  # it builds all layers alike
        in_transformers(mixed)


def test_different_grids_in_compressed_tensors(tmp_path: Path) -> None:
    """And a trap that docs/deploy.md names: with dequantize=True no error, and the first scheme for all layers."""
    mixed = Emitted(tmp_path, MIXED, "compressed-tensors")
    test_packages_decode_the_same_weights(mixed)
    agree(mixed, in_transformers(mixed))
    wrong = in_transformers(mixed, quantization_config=CompressedTensorsConfig(dequantize=True))
    layers = {name: layer for name, layer in wrong.named_modules() if name in mixed.held}
    same = {name for name, layer in layers.items() if torch.equal(layer.weight, mixed.decoded(name).half())}
    assert same == {name for name in mixed.held if not name.endswith(".down_proj")}


def test_transformers_takes_asymmetric_grids_only_decoded(tmp_path: Path) -> None:
    case = tiny("llama", coarse(bits=4, symmetric=False, **SMALL))
    emitted = Emitted(tmp_path, case, "compressed-tensors")
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):  # it expects zero-points that are not packed
        AutoModelForCausalLM.from_pretrained(emitted.directory)


def test_the_kernel_for_4_bits_has_groups_of_32_and_more(tmp_path: Path) -> None:
    case = tiny("llama", coarse(bits=4, group_size=16, scale_dtype="float16"))
    emitted = Emitted(tmp_path, case, "gptq")
    tokens = torch.arange(8)[None]
    message = "expect qGroupSize to be 32, 64, 128 or 256, got 16"
    with torch.no_grad(), pytest.raises(RuntimeError, match=message):
        in_transformers(emitted)(tokens)
    agree(emitted, in_transformers(emitted, quantization_config=GPTQConfig(bits=4, backend="gptq_torch")))
