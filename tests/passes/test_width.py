"""Width pruning against least squares by brute force, and against loops over tokens written from the papers."""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from compress.architecture import architecture_for
from compress.calibration.moments import Moments, Statistics
from compress.errors import RunError
from compress.passes.base import BlockState, SettingError
from compress.passes.structured import rounded
from compress.passes.width import WidthPruning, _costs, _damped, obs, refitted
from compress.state import LinearState
from tests.models import tiny_config
from tests.passes import correlated, draw, moments_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    Matrix = NDArray[np.float64]

OUT, UNITS = 7, 6
DAMPING = 0.05
sized = pytest.mark.parametrize("size", [1, 2, 3])


def layer(size: int, seed: int, *, dead: Sequence[int] = (), tokens: int = 40) -> tuple[Tensor, Tensor, Tensor]:
    """W (out, in), X (tokens, in) of small multiples of 1/8, whose Gram matrix float32 holds exactly, and the units."""
    W, X = draw(OUT, UNITS * size, seed=seed), correlated(tokens, UNITS * size, seed=seed + 1)
    X = (X * 8).round() / 8
    X[:, list(dead)] = 0.0
    # Units that are not neighbours, as the fused layouts have them.
    units = torch.randperm(UNITS * size, generator=torch.Generator().manual_seed(seed)).view(UNITS, size)
    return W, X, units.sort(dim=1).values


def least(W: Tensor, X: Tensor, gone: Sequence[int], damping: float = DAMPING) -> tuple[float, Matrix]:
    """The least ``‖(W − V) X‖² + λ‖W − V‖²`` of all V that are 0 in the columns `gone`, and that V.

    Ridge regression as least squares on the tokens and, below them, √λ I.
    """
    w, x = W.double().numpy(), X.double().numpy()
    rows = np.vstack([x, np.sqrt(damping * (x**2).sum(0).mean()) * np.eye(x.shape[1])])
    kept = [column for column in range(x.shape[1]) if column not in set(gone)]
    V = np.zeros_like(w)
    V[:, kept] = np.linalg.lstsq(rows[:, kept], rows @ w.T, rcond=None)[0].T
    return float(((rows @ (w - V).T) ** 2).sum()), V


@sized
@pytest.mark.parametrize("seed", range(4))
def test_the_cost_of_a_unit_is_what_its_removal_adds_to_the_error(size: int, seed: int) -> None:
    W, X, units = layer(size, seed)
    moments = moments_of(X)
    inverse = torch.linalg.inv(_damped(moments, DAMPING))
    wanted = [least(W, X, unit.tolist())[0] for unit in units]
    assert _costs(W.double(), inverse, units).tolist() == pytest.approx(wanted, rel=1e-9)
    kept = obs(W, moments, units, 1, DAMPING)
    assert sorted({*range(UNITS)} - {*kept.tolist()}) == [int(np.argmin(wanted))]


@sized
@pytest.mark.parametrize("scale", [1.0, 2.0**-12])
def test_units_without_any_input_go_first_however_small_the_inputs_are(size: int, scale: float) -> None:
    W, X, units = layer(size, 60)
    X[:, units[[1, 4]].flatten()] = 0.0
    assert obs(W, moments_of(scale * X), units, 2, DAMPING).tolist() == [0, 2, 3, 5]


@sized
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("dead", [(), (0, 3)], ids=["alive", "dead"])
def test_several_removals_are_the_greedy_ones(size: int, seed: int, dead: Sequence[int]) -> None:
    """Each step removes the unit whose absence, with all that is left refitted, costs least."""
    W, X, units = layer(size, seed + 10, dead=dead)
    moments, gone = moments_of(X), []
    for step in range(1, UNITS):
        left = [unit for unit in range(UNITS) if unit not in gone]
        errors = [least(W, X, units[[*gone, unit]].flatten().tolist())[0] for unit in left]
        assert np.diff(sorted(errors)).min() > 1e-6 * max(errors)  # no tie that rounding could decide
        gone.append(left[int(np.argmin(errors))])
        kept = obs(W, moments, units, step, DAMPING)
        assert kept.tolist() == sorted({*range(UNITS)} - {*gone}), step


@sized
@pytest.mark.parametrize("removed", [1, 3, 5])
@pytest.mark.parametrize("dead", [(), (0, 3)], ids=["alive", "dead"])
def test_the_refit_is_ridge_regression_towards_the_weights(size: int, removed: int, dead: Sequence[int]) -> None:
    W, X, units = layer(size, 20, dead=dead)
    for damping in (1e-4, DAMPING, 10.0):
        V = refitted(W, moments_of(X), units[removed:].flatten().sort().values, damping)
        wanted = least(W, X, units[:removed].flatten().tolist(), damping)[1]
        np.testing.assert_allclose(V.numpy(), wanted, rtol=0, atol=1e-6 * np.abs(wanted).max())  # V is float32
        assert (V[:, units[:removed].flatten()] == 0).all()
        assert torch.equal(V[:, list(dead)] != 0, torch.isin(torch.tensor(dead), units[removed:]).expand(OUT, -1))


def test_the_refit_with_everything_kept_is_the_identity() -> None:
    W, X, units = layer(2, 30)
    assert torch.equal(refitted(W, moments_of(X), units.flatten().sort().values, DAMPING), W)
    assert obs(W, moments_of(X), units, 0, DAMPING).tolist() == [*range(UNITS)]


@pytest.mark.parametrize("score", ["obs", "wanda"])
def test_damping_climbs_the_ladder_and_then_fails(score: str) -> None:
    """A Gram matrix that its float32 has made indefinite: more damping is used and told of, never nothing instead."""
    block, inputs = block_of("llama", 45)
    X = inputs["mlp.down_proj"]
    X[:, 1:] = X[:, :1] * torch.linspace(0.9, 1.1, 47) + 1e-6 * X[:, 1:]
    moments = moments_of(X)
    lowest = -float(torch.linalg.eigvalsh(moments.gram().double()).min()) / float(moments.squares.mean())
    assert lowest > 0
    W = block.linears["mlp.down_proj"].weight
    for damping, used in ((2 * lowest, 2 * lowest), (lowest / 5, 2 * lowest), (lowest / 50, 2 * lowest)):
        block.linears["mlp.down_proj"].weight, block.moments["mlp.down_proj"] = W, moments
        notes = WidthPruning(score=score, update=True, channels=0.5, multiple=8, damping=damping).apply(block)
        assert notes["mlp.down_proj"]["damping"] == pytest.approx(used)
        assert torch.isfinite(block.linears["mlp.down_proj"].weight).all()
    block.linears["mlp.down_proj"].weight = W
    with pytest.raises(RunError, match=r"\(48 columns, 50 tokens\) is not positive definite, even with damping"):
        WidthPruning(score=score, update=True, channels=0.5, multiple=8, damping=lowest / 200).apply(block)


def test_a_refit_climbs_the_ladder_by_itself() -> None:
    """As far as the columns that stay ask for, with no look at the others before."""
    W, X, units = layer(3, 40, tokens=60)
    X[:, 1:] = X[:, :1] * torch.linspace(0.9, 1.1, X.shape[1] - 1) + 1e-6 * X[:, 1:]
    moments, columns = moments_of(X), units[1:].flatten().sort().values
    kept = moments.gram().double()[columns][:, columns]
    lowest = -float(torch.linalg.eigvalsh(kept).min()) / float(moments.squares.mean())
    assert lowest > 0
    assert torch.equal(refitted(W, moments, columns, lowest / 5), refitted(W, moments, columns, 10 * (lowest / 5)))
    with pytest.raises(RunError, match="is not positive definite, even with damping"):
        refitted(W, moments, columns, lowest / 200)


def test_fewer_tokens_than_columns() -> None:
    """Without damping the Gram matrix would be singular, and all errors zero."""
    W, X, units = layer(3, 40, tokens=5)
    errors = [least(W, X, unit.tolist())[0] for unit in units]
    kept = obs(W, moments_of(X), units, 1, DAMPING)
    assert {*range(UNITS)} - {*kept.tolist()} == {int(np.argmin(errors))}


@pytest.mark.parametrize(("units", "remove"), [(300, 257), (600, 513), (600, 599)])
def test_of_many_units_several_go_at_once(units: int, remove: int) -> None:
    """The count is exact although the last round removes fewer; the choice beats that of scores without updates."""
    W, X = draw(4, units, seed=50), correlated(2 * units, units, seed=51)
    moments, index = moments_of(X), torch.arange(units).view(-1, 1)
    kept = obs(W, moments, index, remove, DAMPING)
    assert len(set(kept.tolist())) == len(kept) == units - remove
    assert torch.equal(kept, kept.sort().values)
    scores = (W.square().sum(0) * X.square().sum(0)).argsort(descending=True)

    def error(columns: Tensor) -> float:
        return moments.error(W - refitted(W, moments, columns, DAMPING))

    assert error(kept) < error(scores[: units - remove].sort().values)  # that of Wanda, refitted as well


# ---------------------------------------------------------------- scores, in a block


CONFIG = {"llama": tiny_config("llama", tied=True, gqa=True), "opt": tiny_config("opt", tied=True, gqa=False)}
READERS = {"llama": ("mlp.down_proj", "self_attn.o_proj"), "opt": ("fc2", "self_attn.out_proj")}


def block_of(family: str, seed: int, *, shift: float = 1.0) -> tuple[BlockState, dict[str, Tensor]]:
    """A block of random weights, and the inputs of each linear; activations have means, as those of ReLU do."""
    architecture, config = architecture_for(family), CONFIG[family]
    wide = config.ffn_dim if family == "opt" else config.intermediate_size
    keys = 32 if family == "opt" else 16
    ups, downs = ("fc1", "mlp.gate_proj", "mlp.up_proj"), ("fc2", "mlp.down_proj")
    linears, inputs, parameters = {}, {}, {}
    for number, name in enumerate(architecture.linears):
        out = wide if name in ups else keys if name.endswith(("k_proj", "v_proj")) else 32
        width = wide if name in downs else 32
        weight = draw(out, width, seed=seed + number)
        linears[name] = LinearState(name, weight, weight, torch.float32)
        offset = shift * draw(width, seed=seed + 100 + number)
        inputs[name] = correlated(50, width, seed=seed + 200 + number) + offset
        parameters[f"{name}.bias"] = draw(out, seed=seed + 300 + number)
    if family == "llama":
        parameters = {f"{n}.weight": draw(32, seed=seed) for n in ("input_layernorm", "post_attention_layernorm")}
    moments = {name: moments_of(x) for name, x in inputs.items()}
    return BlockState(architecture, config, linears, moments, parameters, {}), inputs


def rows_of(family: str, width: str, unit: int) -> dict[str, list[int]]:
    """Rows that belong to a unit: of llama's two KV heads of 8, each with two query heads; of opt's four heads of 8."""
    if width == "channels":
        return {name: [unit] for name in (("fc1",) if family == "opt" else ("mlp.gate_proj", "mlp.up_proj"))}
    head = [*range(8 * unit, 8 * unit + 8)]
    q = head if family == "opt" else [*range(16 * unit, 16 * unit + 16)]
    return {"self_attn.q_proj": q, "self_attn.k_proj": head, "self_attn.v_proj": head}


def slow_scores(block: BlockState, inputs: dict[str, Tensor], score: str, family: str, width: str) -> list[float]:
    """The score of every unit, token by token."""
    reader = READERS[family][width == "heads"]
    W, X = block.linears[reader].weight.double(), inputs[reader].double()
    count = {"channels": W.shape[1], "heads": 4 if family == "opt" else 2}[width]
    size, scores = W.shape[1] // count, []
    mean = torch.stack(list(X)).sum(0) / len(X)
    for unit in range(count):
        total = 0.0
        for column in range(size * unit, size * unit + size):
            squares = sum(float(w) ** 2 for w in W[:, column])
            if score == "wanda":
                total += squares * sum(float(x[column]) ** 2 for x in X)
            elif score == "flap":
                total += squares * sum(float(x[column] - mean[column]) ** 2 for x in X)
            else:
                total += squares
        if score == "magnitude":
            for name, rows in rows_of(family, width, unit).items():
                total += sum(float(w) ** 2 for row in rows for w in block.linears[name].weight[row])
        scores.append(total)
    return scores


@pytest.mark.parametrize("score", ["wanda", "flap", "magnitude"])
@pytest.mark.parametrize(("family", "width"), list(product(CONFIG, ["channels", "heads"])))
def test_scores_are_those_of_loops_over_tokens(score: str, family: str, width: str) -> None:
    for seed in (1000, 2000):
        block, inputs = block_of(family, seed)
        scores = slow_scores(block, inputs, score, family, width)
        pruning: dict[str, Any] = {"channels": {"channels": 0.5}, "heads": {"heads": 0.5}}[width]
        if (family, width) == ("opt", "heads"):
            pruning = {"hidden": 0.5}  # which takes heads along
        before = {name: state.weight for name, state in block.linears.items()}
        WidthPruning(score=score, multiple=8, **pruning).apply(block)
        ranked = sorted(range(len(scores)), key=scores.__getitem__)
        kept = sorted(ranked[len(ranked) // 2 :])
        assert block.found[f"{width}:kept"].tolist() == kept
        reader = READERS[family][width == "heads"]
        size = before[reader].shape[1] // len(scores)
        stays = torch.tensor([column // size in kept for column in range(before[reader].shape[1])])
        for name, state in block.linears.items():  # nothing else has changed, and what is kept has not
            assert torch.equal(state.weight, before[name] * stays if name == reader else before[name])


@pytest.mark.parametrize("update", [False, True])
def test_flap_leaves_the_mean_of_the_output(update: bool) -> None:
    """What the block's reader gives on average, over tokens, is what it gave, to the rounding of float32."""
    block, inputs = block_of("opt", 3000, shift=5.0)
    W, X, bias = block.linears["fc2"].weight, inputs["fc2"].double(), block.parameters["fc2.bias"]
    others = {name: value for name, value in block.parameters.items() if name != "fc2.bias"}
    WidthPruning(score="flap", channels=0.5, multiple=8, update=update).apply(block)
    V, new = block.linears["fc2"].weight, block.parameters["fc2.bias"]

    def mean(weight: Tensor, added: Tensor) -> Tensor:
        return torch.stack([weight.double() @ x + added.double() for x in X]).sum(0) / len(X)

    torch.testing.assert_close(mean(V, new), mean(W, bias), rtol=0, atol=1e-4)
    assert (mean(V, bias) - mean(W, bias)).abs().max() > 100e-4  # a refit takes most of the mean along by itself
    assert all(block.parameters[name] is value for name, value in others.items())


@pytest.mark.parametrize("score", ["obs", "wanda", "magnitude", "random"])
def test_only_flap_touches_biases(score: str) -> None:
    block, _ = block_of("opt", 3500)
    before = dict(block.parameters)
    WidthPruning(score=score, channels=0.5, multiple=8).apply(block)
    assert all(block.parameters[name] is value for name, value in before.items())


def test_flap_has_no_bias_to_give_where_there_is_none() -> None:
    block, _ = block_of("llama", 4000)
    notes = WidthPruning(score="flap", channels=0.5, multiple=8).apply(block)
    assert notes == {"mlp.down_proj": {"detail": "24 of 48 channels, no bias to take their mean"}}
    assert not any(name.endswith("bias") for name in block.parameters)


@pytest.mark.parametrize("score", ["wanda", "flap", "magnitude", "random"])
def test_update_refits_whatever_the_score(score: str) -> None:
    block, inputs = block_of("llama", 5000)
    W = block.linears["mlp.down_proj"].weight
    WidthPruning(score=score, channels=0.5, multiple=8, update=True, damping=0.1).apply(block)
    kept = block.found["channels:kept"].tolist()
    wanted = least(W, inputs["mlp.down_proj"], sorted({*range(48)} - {*kept}), 0.1)[1]
    found = block.linears["mlp.down_proj"].weight.numpy()
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())  # H is float32


def test_random_is_what_its_seed_says() -> None:
    def chosen(seed: int, name: str = "mlp.down_proj") -> list[int]:
        block, _ = block_of("llama", 6000)
        block.linears["mlp.down_proj"].name = name
        WidthPruning(score="random", channels=0.5, multiple=8, seed=seed).apply(block)
        return block.found["channels:kept"].tolist()

    assert chosen(0) == chosen(0)
    assert len({tuple(chosen(seed)) for seed in range(5)}) == 5
    assert chosen(0, "model.layers.0.mlp.down_proj") != chosen(0, "model.layers.1.mlp.down_proj")


@pytest.mark.parametrize("score", ["obs", "wanda", "flap", "magnitude"])
@pytest.mark.parametrize("width", ["channels", "heads"])
def test_scores_follow_units_that_change_places(score: str, width: str) -> None:
    """The same units are chosen wherever they stand."""
    first, _ = block_of("opt", 7000)
    second, inputs = block_of("opt", 7000)
    reader, size = ("fc2", 1) if width == "channels" else ("self_attn.out_proj", 8)
    units = first.linears[reader].in_features // size
    order = torch.randperm(units, generator=torch.Generator().manual_seed(1))
    columns = torch.arange(units * size).view(units, size)[order].flatten()
    second.linears[reader].weight = second.linears[reader].weight[:, columns].contiguous()
    second.moments[reader] = moments_of(inputs[reader][:, columns])
    for name in rows_of("opt", width, 0):
        second.linears[name].weight = second.linears[name].weight[columns].contiguous()
    pruning: dict[str, Any] = {"channels": 0.5} if width == "channels" else {"hidden": 0.5}
    for block in (first, second):
        WidthPruning(score=score, multiple=8, **pruning).apply(block)
    found = order[second.found[f"{width}:kept"]].sort().values
    assert torch.equal(found, first.found[f"{width}:kept"])


@pytest.mark.parametrize("score", ["obs", "wanda", "flap", "magnitude"])
def test_hidden_channels_are_scored_by_all_that_reads_them(score: str) -> None:
    """``Σ ‖W_j‖² ‖X_j‖²`` over q, k, v, gate and up; their share of what the block reads, so that all blocks count."""
    block, inputs = block_of("llama", 8000)
    readers = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"]
    total = []
    for channel in range(32):
        given = 0.0
        for name in readers:
            weights = sum(float(w) ** 2 for w in block.linears[name].weight[:, channel])
            given += weights * (1.0 if score == "magnitude" else sum(float(x[channel]) ** 2 for x in inputs[name]))
        total.append(given)
    WidthPruning(score=score, hidden=0.5, multiple=8).apply(block)
    wanted = [one / sum(total) for one in total]
    assert block.found["hidden:score"].tolist() == pytest.approx(wanted, rel=1e-5)


# ---------------------------------------------------------------- what is asked of the inputs


@pytest.mark.parametrize(
    ("family", "settings", "wanted"),
    [
        ("llama", {"channels": 0.5}, {"mlp.down_proj": 2}),
        ("llama", {"channels": 0.5, "heads": 0.5}, {"mlp.down_proj": 2, "self_attn.o_proj": 2}),
        ("llama", {"hidden": 0.5}, {"self_attn.q_proj": 1, "mlp.up_proj": 1}),
        ("llama", {"hidden": 0.5, "channels": 0.5}, {"self_attn.q_proj": 1, "mlp.down_proj": 2}),
        ("llama", {"channels": 0.5, "score": "wanda"}, {"mlp.down_proj": 1}),
        ("llama", {"channels": 0.5, "score": "wanda", "update": True}, {"mlp.down_proj": 2}),
        ("llama", {"channels": 0.5, "score": "magnitude"}, {"mlp.down_proj": 0, "mlp.up_proj": 0}),
        ("llama", {"channels": 0.5, "score": "random"}, {"mlp.down_proj": 0}),
        ("llama", {"channels": 0.5, "hidden": 0.5, "score": "magnitude"}, {"mlp.down_proj": 1, "mlp.up_proj": 1}),
        ("opt", {"hidden": 0.5}, {"fc1": 1, "self_attn.out_proj": 2}),
        ("opt", {"hidden": 0.5, "score": "flap"}, {"fc1": 1, "self_attn.out_proj": 2}),
    ],
)
def test_statistics_are_those_that_are_used(family: str, settings: dict[str, Any], wanted: dict[str, int]) -> None:
    """No more (a Gram matrix costs memory), and no less: the pass runs with just these."""
    one, (block, inputs) = WidthPruning(multiple=8, **settings), block_of(family, 9000)
    taken = one.takes(block.architecture, block.config, [], set())
    needed = {name: one.needed_of(name, block.architecture, block.config) for name in taken}
    assert {name: int(needed[name]) for name in wanted} == wanted
    assert max(needed.values()) <= one.needed()
    block.linears = {name: state for name, state in block.linears.items() if name in taken}
    block.moments = {
        name: moments_of(inputs[name], needed[name])
        if needed[name]
        else Moments(inputs[name].shape[1], Statistics.NONE)
        for name in taken
    }
    one.apply(block)


# ---------------------------------------------------------------- how many


@pytest.mark.parametrize(
    ("fraction", "size", "multiple", "left"),
    [
        (0.5, 48, 8, 24),
        (0.5, 48, 1, 24),
        (0.25, 14336, 64, 10752),
        (0.2, 172, 4, 136),  # 137.6: 136 is nearer than 140
        (0.25, 40, 4, 32),  # 30: the larger of two as near
        (0.9, 48, 8, 8),  # 4.8: 8 is nearer than 0
        (0.1, 40, 16, 32),  # the size itself need not be a multiple
        (0.5, 3, 1, 2),
        (0.3, 2880, 64, 2048),  # 2016: as near to 1984, though 2880 * (1 - 0.3) / 64 is a little less than 31.5
        (0.9, 15, 1, 2),
    ],
)
def test_rounding(fraction: float, size: int, multiple: int, left: int) -> None:
    assert rounded("channels", fraction, size, multiple) == left


@pytest.mark.parametrize(
    ("fraction", "size", "multiple", "problem"),
    [
        (0.99, 48, 8, "leaves 0 in multiples of 8"),
        (0.01, 48, 8, "removes none of 48 in multiples of 8"),
        (0.5, 48, 64, "leaves 0 in multiples of 64"),
        (0.1, 48, 64, "removes none of 48 in multiples of 64"),
        (0.99, 4, 1, "heads = 0.99 of 4 leaves 0$"),
        (0.01, 4, 1, "removes none of 4$"),
        (0.999999, 60000, 1, "leaves 0$"),
        (0.000001, 60000, 1, "removes none of 60000$"),
        (0.5, 1, 1, "removes none of 1$"),
    ],
)
def test_what_no_multiple_meets_is_refused_with_what_does(
    fraction: float, size: int, multiple: int, problem: str
) -> None:
    with pytest.raises(SettingError, match=problem) as failure:
        rounded("heads", fraction, size, multiple)
    words = failure.value.fix.split()
    if words[1] == "=":
        assert rounded("heads", float(words[2]), size, multiple) == int(words[4].rstrip(","))
    elif multiple > 1:
        assert "choose a smaller multiple" in failure.value.fix
        assert 0 < rounded("heads", fraction, size, 2) < size
    else:
        assert failure.value.fix == "leave heads out"


@pytest.mark.parametrize("score", ["obs", "wanda"])
def test_what_is_left_is_what_the_checkpoint_can_hold(score: str) -> None:
    """The rest of the block is calibrated behind it."""
    block, _ = block_of("llama", 3)
    for state in block.linears.values():
        state.dtype = torch.float16
    WidthPruning(channels=0.5, multiple=1, score=score).apply(block)
    weight = block.linears["mlp.down_proj"].weight
    assert torch.equal(weight, weight.half().float())
