"""PERP: retrain few parameters after pruning (Zimmer et al. 2023, arXiv 2312.15230).

What may learn: `norms`, `biases`, `embeddings`, `head`, `low_rank` (in the forms of `compress.adapting`) or `weights`
(every weight that a mask leaves); `all` is every parameter, as in the recovery of Minitron (Muralidharan et
al. 2024, arXiv 2407.14679). Masks stay bit for bit; on a grid only a branch beside it may learn.

`mode = "end-to-end"` minimizes the loss of `compress.end_to_end` over the calibration set.

`mode = "reconstruct"` trains block by block in a sweep, with ``‖f(x) − f_dense(x)‖² / ‖f_dense(x)‖²``, x the inputs
that the compressed blocks before it give (section 3.2 of the paper): no more than two blocks are ever in memory. Behind
structured pruning f_dense is the block of the smaller model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from compress.adapting import AdaptedLinear, Form, kind_of
from compress.end_to_end import Loss, train_whole
from compress.passes.base import BlockPass, BlockState, Invariant, ModelPass, Note, SettingError, Statistics
from compress.training import Training, train

if TYPE_CHECKING:
    from torch import nn

    from compress.architecture import Architecture
    from compress.barrier import WholeModel
    from compress.lock import Linear, Lock

Trained = Literal["norms", "biases", "embeddings", "head", "low_rank", "weights", "all"]


class PERP(Training, BlockPass, ModelPass):
    """Retrain few parameters, on the language-model loss or towards the dense model; masks and codes stay."""

    train: tuple[Trained, ...] = Field(
        default=("norms", "biases", "low_rank"), min_length=1, description="what may learn"
    )
    variant: Literal["lora", "lora-prune", "masklora", "scalelora"] = Field(
        default="lora", description="form of low_rank: a branch that stays, or one that is merged under the mask"
    )
    rank: int = Field(default=8, ge=1, description="of low_rank, where there is no branch yet")
    alpha: float | None = Field(default=None, gt=0, description="low_rank counts alpha / rank; default: 2 · rank")
    extend: bool = Field(default=False, description="leave a branch that is there, and learn rank more beside it")
    mode: Literal["end-to-end", "reconstruct"] = Field(
        default="end-to-end", description="whole model, or block by block"
    )
    distill: float = Field(default=0.0, ge=0, le=1, description="share of the loss that compares with the dense model")
    temperature: float = Field(default=1.0, gt=0, description="of that comparison")
    hidden: float = Field(default=0.0, ge=0, description="weight of the comparison of hidden states")

    rule: ClassVar[int] = 4
    statistics: ClassVar[Statistics] = Statistics.NONE

    # What is kept depends on the form: see `preserved`.
    preserves: ClassVar[frozenset[Invariant]] = frozenset(
        {Invariant.MASK, Invariant.PATTERN, Invariant.SHAPES, Invariant.TIES, Invariant.LOW_RANK, Invariant.GRID}
    )

    @model_validator(mode="after")
    def _fits(self) -> PERP:
        if "all" in self.train and len(self.train) > 1:
            raise SettingError("all excludes the others", 'write train = ["all"]', ("train",))
        if "weights" in self.train and "low_rank" in self.train:
            raise SettingError("weights and low_rank exclude each other", 'leave one out of "train"', ("train",))
        if self.mode == "reconstruct" and {"embeddings", "head"} & set(self.train):
            raise SettingError("embeddings and head are in no block", 'use mode = "end-to-end"', ("mode",))
        if self.mode == "reconstruct" and (self.distill or self.hidden):
            problem = "distill and hidden compare whole models; reconstruct compares blocks by itself"
            raise SettingError(problem, "leave them out", ("mode",))
        if self.mode == "reconstruct" and self.gradient_checkpointing:
            problem = "gradient_checkpointing keeps the inputs of the blocks only; reconstruct has one block at a time"
            raise SettingError(problem, "leave it out", ("gradient_checkpointing",))
        return self

    @model_validator(mode="after")
    def _extends_a_branch(self) -> PERP:
        if self.extend and self.form != "lora":
            problem = "only a branch can be extended"
            raise SettingError(problem, 'use train = ["low_rank"] with variant = "lora"', ("extend",))
        return self

    @property
    def trained(self) -> frozenset[str]:
        """What may learn, `all` spelled out."""
        if "all" not in self.train:
            return frozenset(self.train)
        inside = frozenset({"norms", "biases", "weights"})
        return inside if self.mode == "reconstruct" else inside | {"embeddings", "head"}

    @property
    def form(self) -> Form:
        """What becomes of the linears."""
        return "weights" if "weights" in self.trained else self.variant if "low_rank" in self.train else "fixed"

    def barrier(self) -> bool:
        """Only end to end needs the whole model."""
        return self.mode == "end-to-end"

    def learns(self) -> bool:
        """It does."""
        return True

    def learned(self, linear: Linear) -> int:
        """Its weights, or the factors of a branch, whose rank may be of a pass before."""
        if self.form == "weights":
            return super().learned(linear)
        rank = max(self.rank, linear.rank) if self.form != "fixed" else 0
        return rank * (linear.out_features + linear.in_features)

    def provides(self) -> frozenset[Invariant]:
        """A branch, when it adds one."""
        return frozenset({Invariant.LOW_RANK}) if self.form == "lora" else frozenset()

    def breaks(self) -> frozenset[Invariant]:
        """What merging or free weights would break: a grid, and what a branch was fitted to."""
        return frozenset() if self.form in ("lora", "fixed") else frozenset({Invariant.GRID, Invariant.LOW_RANK})

    def added_rank(self) -> int | None:
        """Of a branch that stays."""
        return self.rank if self.form == "lora" else None

    def check_shape(self, out_features: int, in_features: int) -> None:
        """A branch of full rank would be the weight itself."""
        most = min(out_features, in_features)
        if "low_rank" in self.train and self.rank > most:
            problem = f"rank {self.rank} is above {most}, the smaller side of a {out_features} × {in_features} linear"
            raise SettingError(problem, f"rank = {most} or less, or except these linears")

    def settings(self) -> dict[str, Any]:
        """Without low_rank, nothing of it."""
        unused = set() if "low_rank" in self.train else {"variant", "rank", "alpha", "extend"}
        return {key: value for key, value in super().settings().items() if key not in unused}

    def check_lock(self, lock: Lock, index: int) -> None:
        """Some samples and some parameters must be there to train."""
        super().check_lock(lock, index)
        skeleton = lock.skeleton
        if skeleton.tied and skeleton.stored[skeleton.head] == skeleton.stored[skeleton.embedding]:
            self._refuse_parting()
        if self.mode == "reconstruct" and index == lock.stage[0]:
            came = "the smaller model" if lock.before else "the model"
            problem = f"reconstruct trains blocks towards those of {came} as it came, which no pass before has changed"
            fix = 'put what prunes or quantizes before it, or use mode = "end-to-end"'
            raise SettingError(problem, fix + " with distill = 1.0" * bool(lock.before), ("mode",))
        targets = [linear.name for linear in lock.linears if index in dict(linear.passes)]
        if self.trained == {"biases"} and not any(f"{name}.bias" in skeleton.stored for name in targets):
            raise _nothing(self.train)  # every model has all else
        mine, whole = lock.sizes, lock.root.sizes
        if self.hidden and (mine.hidden, mine.blocks) != (whole.hidden, whole.blocks):
            problem = f"the dense model has {whole.blocks} blocks and a hidden width of {whole.hidden}"
            problem += f", the smaller one {mine.blocks} and {mine.hidden}: their hidden states do not compare"
            raise SettingError(problem, "leave hidden out; distill compares what both predict", ("hidden",))

    def _refuse_parting(self) -> None:
        if "head" in self.trained and "embeddings" not in self.trained:
            problem = "the head is tied to the embeddings: training it alone would part them"
            raise SettingError(problem, 'write "embeddings" too, which trains the one tensor', ("train",))

    def _adapted(self, modules: dict[str, AdaptedLinear], others: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
        """The parameters that learn, by name: those of the linears, and of `others` the kinds that `train` names."""
        parameters = {f"{name}.{key}": p for name, module in modules.items() for key, p in module.trained()}
        return parameters | others

    def _alpha(self) -> float:
        return 2.0 * self.rank if self.alpha is None else self.alpha

    # ------------------------------------------------------------- end to end

    def apply_model(self, model: WholeModel) -> dict[str, Note]:
        """Retrain the whole model."""
        modules = model.adapt(self.form, rank=self.rank, alpha=self._alpha(), seed=self.seed, extend=self.extend)
        others = self._others(model, modules)
        if not self._adapted(modules, others):
            raise _nothing(self.train)
        loss = Loss(self.distill, self.temperature, self.hidden)
        trained, numbers = train_whole(model, modules, others, self, loss, model.tokens)
        detail = f"{trained:,} trained, loss {numbers['first']:.4f} to {numbers['best']:.4f}"
        return {name: {"detail": detail} for name in modules}

    def _others(self, model: WholeModel, modules: dict[str, AdaptedLinear]) -> dict[str, nn.Parameter]:
        """Norms, biases, embeddings and head, by full parameter name; tied ones once."""
        skeleton = model.lock.skeleton
        whole = dict(model.module.named_parameters(remove_duplicate=False))
        if whole[skeleton.head] is whole[skeleton.embedding]:
            self._refuse_parting()
        named = {skeleton.embedding: "embeddings", skeleton.head: "head"}
        more = set(skeleton.outside) if "all" in self.train else set()  # positions
        return {
            name: p
            for name, p in model.module.named_parameters()  # a tied one comes once, as the embedding
            if (named.get(name) or kind_of(model.module, name, modules)) in self.trained or name in more
        }

    # ------------------------------------------------------------ reconstruct

    def takes(self, architecture: Architecture, config: Any, targets: list[str], quantized: set[str]) -> list[str]:
        """What the patterns name."""
        return targets

    def apply(self, block: BlockState) -> dict[str, Note]:
        """Retrain one block towards its dense self."""
        forward = block.forward
        assert forward is not None
        modules = {}
        for number, (name, state) in enumerate(block.linears.items()):
            bias = block.parameters.get(f"{name}.bias")
            seed = self.seed + number
            modules[name] = AdaptedLinear(
                state, bias, self.form, rank=self.rank, alpha=self._alpha(), seed=seed, extend=self.extend
            )
        live = forward.install(modules)
        others = {name: p for name, p in live.items() if kind_of(forward.learning, name, modules) in self.trained}
        parameters = self._adapted(modules, others)
        if not parameters:
            return {}
        for p in parameters.values():
            p.requires_grad_(True)
        numbers = train(parameters, forward.loss, forward.samples, self, forward.store, forward.share)
        for p in parameters.values():
            p.requires_grad_(False)
        for module in modules.values():
            module.finish()
        for name, p in others.items():
            block.parameters[name] = p.detach().clone()
        detail = f"loss {numbers['first']:.3g} to {numbers['best']:.3g}"
        return {name: {"detail": detail} for name in modules}


def _nothing(names: tuple[str, ...]) -> SettingError:
    problem = f"the model has nothing of {', '.join(names)} to train"
    return SettingError(problem, 'add "norms" or "low_rank" to "train"', ("train",))
