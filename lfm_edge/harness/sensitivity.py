"""Which weights bear 4 bits: what each costs and saves alone, and a choice of bits under a size limit.

The measure is the mean KL divergence from the float32 model on a text. Recipes are compared in one walk over the
layers, in which they part only where they differ; so a table over all weights of a model takes about half as many
passes as it has rows, and one layer at a time is in floating point.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lfm_edge.calibration.sample import TEXT, prompt_windows, prompts_in, text_windows
from lfm_edge.calibration.walk import Walk
from lfm_edge.checkpoint.checkpoint import Checkpoint, open_checkpoint
from lfm_edge.checkpoint.config import ModelConfig
from lfm_edge.checkpoint.layers import LINEAR, WeightEntry
from lfm_edge.errors import LfmEdgeError
from lfm_edge.files import read_text
from lfm_edge.harness.host import provenance
from lfm_edge.model.decoder import DecoderLayer
from lfm_edge.model.lowering import Linears, Lowering, Weight
from lfm_edge.model.weights import LayerWeights
from lfm_edge.progress import Progress
from lfm_edge.quantization.recipe import EMBEDDING, GROUP_SIZES, UNTIED_HEAD, MixedBits, Recipe, Scheme, recipe
from lfm_edge.quantization.rounding import quantize

SCHEMA = "lfm-edge/sensitivity/1"
FLOAT = "float32"
_WINDOW = 256


@dataclass(frozen=True)
class Cost:
    """Some weights at 4 bits, all others at 8.

    weights: decided together, as they share an input and backends compute them as one (or are one matrix)
    kl_divergence: what that adds to the mean KL divergence of all at 8 bits, in nats
    bytes_saved: of codes and 2-byte scales
    """

    weights: tuple[str, ...]
    kl_divergence: float
    bytes_saved: int

    @property
    def per_megabyte(self) -> float:
        """Nats for each MB saved."""
        return self.kl_divergence / (self.bytes_saved / 1e6)


@dataclass(frozen=True)
class Whole:
    """A recipe for the whole model: bytes of codes, 2-byte scales and float32 rest, and mean KL divergence in nats."""

    nbytes: int
    kl_divergence: float


@dataclass(frozen=True)
class Sensitivity:
    """What 4 bits cost on a text of so many tokens: in all weights, in none, and in each part alone."""

    model: str
    tokens: int
    group_size: int
    eight_bits: Whole
    four_bits: Whole
    costs: list[Cost]

    def to_dict(self, command: str = "", chosen: Whole | None = None, bits: MixedBits | None = None) -> dict[str, Any]:
        """For JSON, by the schema of docs/internals/quantizer.md.

        command: that made it; chosen, bits: a choice of bits, where one was made, and what it takes and costs
        """
        choice = {} if bits is None or chosen is None else {"chosen": asdict(chosen), **bits.to_dict()}
        return {**provenance(SCHEMA, command), **asdict(self), **choice}


def analyse(model: str | Path, *, text: str | Path | None = None, tokens: int = 512, group_size: int = 32,
            most_bytes: int | None = None, progress: Progress | None = None,
            ) -> tuple[Sensitivity, MixedBits | None, Whole | None]:
    """`measure` a model; under a limit also `choose`, and what the choice takes and costs.

    text: a file; the built-in prompts where none is given; tokens: most of it to use
    """
    progress = progress or Progress()
    if group_size not in GROUP_SIZES:
        raise LfmEdgeError(f"--group-size {group_size}: it must be 32, 64 or 128")
    checkpoint = open_checkpoint(model)
    windows = _windows(checkpoint, None if text is None else read_text(Path(text)), tokens)
    progress.stage("measure each layer at 4 bits", checkpoint.config.num_layers)
    found = measure(checkpoint, windows, group_size, progress.advance)
    if most_bytes is None:
        return found, None, None
    bits = choose(found, most_bytes)
    progress.stage("measure the choice", checkpoint.config.num_layers)
    return found, bits, whole(checkpoint, bits, windows, progress.advance)


def _windows(checkpoint: Checkpoint, text: str | None, most: int) -> Tensor:
    """int64 [B, T]"""
    config = checkpoint.config
    tokenizer = checkpoint.tokenizer()
    length = min(_WINDOW, config.max_position_embeddings)
    return torch.tensor(prompt_windows(tokenizer, config.vocab_size, prompts_in(TEXT), length, most) if text is None
                        else text_windows(tokenizer, config.vocab_size, text, length, most))


def measure(checkpoint: Checkpoint, windows: Tensor, group_size: int = 32,
            progress: Callable[[], None] = lambda: None) -> Sensitivity:
    """Hold every part of a model against the float32 model at 4 bits, and the whole at 4 and at 8.

    windows: int64 [B, T], the text; group_size: of the 4-bit scales; progress: called after each layer
    Raises ExportError where the group size does not divide a weight's columns.
    """
    entries = checkpoint.config.weights()
    four, eight = (recipe(bits, group_size, bits, "float") for bits in (4, 8))
    parts = decided_together(checkpoint.config)
    recipes = {"4": four, "8": eight} | {part: _with_four_bits(eight, part, four.body) for part in parts}
    found = divergences(checkpoint, recipes, windows, progress)
    whole = {key: Whole(recipe_bytes(recipes[key], entries), found[key]) for key in ("4", "8")}
    costs = [Cost(part, found[part] - found["8"], whole["8"].nbytes - recipe_bytes(recipes[part], entries))
             for part in parts]
    return Sensitivity(checkpoint.source, windows.numel(), group_size, whole["8"], whole["4"], costs)


def choose(found: Sensitivity, most_bytes: int) -> MixedBits:
    """Bits for every weight within `most_bytes`, such that the KL divergences they add are the smallest sum.

    From all at 4 bits, the parts that go back to 8 are a knapsack; it is solved exactly, over the sizes that sums of
    parts can have, which are few as layers are alike. That costs add up is an assumption: `whole` measures the choice.
    Raises LfmEdgeError where 4 bits everywhere are still too many.
    """
    room = most_bytes - found.four_bits.nbytes
    if room < 0:
        raise LfmEdgeError(f"--max-size: the weights take {found.four_bits.nbytes / 1e6:,.2f} MB at 4 bits everywhere, "
                           f"more than {most_bytes / 1e6:,.2f} MB")
    best: dict[int, tuple[float, tuple[Cost, ...]]] = {0: (0.0, ())}  # by size: what is gained, and with which parts
    for cost in found.costs:
        for size, (gain, parts) in list(best.items()):
            more = size + cost.bytes_saved
            if more <= room and gain + cost.kl_divergence > best.get(more, (0.0,))[0]:
                best[more] = (gain + cost.kl_divergence, (*parts, cost))
    _, large = max(best.values(), key=lambda entry: entry[0])
    bits = {name: 8 if cost in large else 4 for cost in found.costs for name in cost.weights}
    head = bits.pop(EMBEDDING)
    bits.pop(UNTIED_HEAD, None)
    return MixedBits(found.group_size, head, bits)


def whole(checkpoint: Checkpoint, bits: MixedBits, windows: Tensor,
          progress: Callable[[], None] = lambda: None) -> Whole:
    """What a choice of bits takes and costs."""
    chosen = recipe(4, bits.group_size, bits.head_bits, "float", mixed=bits.linear_bits)
    found = divergences(checkpoint, {"chosen": chosen}, windows, progress)
    return Whole(recipe_bytes(chosen, checkpoint.config.weights()), found["chosen"])


def divergences(checkpoint: Checkpoint, recipes: Mapping[Any, Recipe], windows: Tensor,
                progress: Callable[[], None] = lambda: None) -> dict[Any, float]:
    """Mean KL(float32 || quantized) in nats of each recipe, rounded to nearest, on a text.

    windows: int64 [B, T]; progress: called after each layer
    """
    config = checkpoint.config
    entries = config.weights()
    schemes = {FLOAT: dict.fromkeys(entries)} | {key: made.schemes(entries) for key, made in recipes.items()}
    walk, lowering = Walk(config, windows), Lowering()

    def parted(names: Sequence[str], groups: list[tuple[list, Tensor]]) -> dict[tuple, list[tuple[list, Tensor]]]:
        """Recipes that have been one so far, parted by what they say of `names`: {schemes: [(recipes, x)]}."""
        parts: dict[tuple, dict[int, tuple[list, Tensor]]] = defaultdict(dict)
        for at, (keys, x) in enumerate(groups):
            for key in keys:
                assignment = tuple(schemes[key][name] for name in names)
                parts[assignment].setdefault(at, ([], x))[0].append(key)
        return {assignment: list(part.values()) for assignment, part in parts.items()}

    groups: list[tuple[list, Tensor]] = []
    table = checkpoint.tensor(EMBEDDING)
    for (scheme,), ((keys, _),) in parted([EMBEDDING], [(list(schemes), walk.windows)]).items():
        groups.append((keys, walk.embed({EMBEDDING: _rounded(table, scheme)})))
    for index in range(config.num_layers):
        layer = {name: checkpoint.tensor(name) for name in entries if name.startswith(f"model.layers.{index}.")}
        rounded = cache(lambda name, scheme, layer=layer: _rounded(layer[name], scheme))
        following = []
        for assignment, part in parted(list(layer), groups).items():
            weights = {name: rounded(name, scheme) for name, scheme in zip(layer, assignment, strict=True)}
            step = walk.layer(index, weights, lowering)
            following += [(keys, step(x)[0]) for keys, x in part]
        groups = following
        progress()
    norm = lowering.norm(checkpoint.tensor("model.embedding_norm.weight").float(), config.norm_eps)
    head = EMBEDDING if config.tie_embedding else UNTIED_HEAD
    table = table if config.tie_embedding else checkpoint.tensor(head)
    return _divergences(norm, head, table, parted([head], groups))


def _divergences(norm: nn.Module, head: str, table: Tensor, parts: dict) -> dict[Any, float]:
    """Mean KL divergence of each recipe, of what the last layer gave: {(head's scheme,): [(recipes, x)]}."""
    found: dict[Any, float] = {}
    exact: Tensor | None = None
    for (scheme,), part in sorted(parts.items(), key=lambda entry: entry[0] != (None,)):  # float32 first
        logits = Lowering().linear(_rounded(table, scheme), None)
        for keys, x in part:
            rows = (logits(window).log_softmax(-1) for window in norm(x))  # [T, vocab] each
            if exact is None:
                exact = torch.stack(list(rows))
                continue
            total = sum(float(F.kl_div(ours, theirs, reduction="sum", log_target=True))
                        for ours, theirs in zip(rows, exact, strict=True))
            found |= dict.fromkeys(keys, total / x.shape[:2].numel())
    return found


def _rounded(weight: Tensor, scheme: Scheme | None) -> Weight:
    return weight.float() if scheme is None else quantize(weight, scheme)


def recipe_bytes(made: Recipe, entries: Mapping[str, WeightEntry]) -> int:
    """Bytes of a model's weights: codes, scales of 2 bytes, and what stays in float32.

    What a target adds is not in it: its graph, scales of 4 bytes (ONNX), the embedding apart from the head (XNNPACK).
    """
    total = 0
    for name, scheme in made.schemes(entries).items():
        shape = entries[name].shape
        count = torch.Size(shape).numel()
        if scheme is None:
            total += 4 * count
        else:
            total += count * scheme.bits // 8 + 2 * (count // (scheme.group_size or shape[1]))
    return total


def decided_together(config: ModelConfig) -> list[tuple[str, ...]]:
    """The weights that there is a choice of bits for, in parts: those of one input, and the embedding with the head."""
    entries = config.weights()
    parts: list[tuple[str, ...]] = [tuple(name for name in (EMBEDDING, UNTIED_HEAD) if name in entries)]
    empty = {name: torch.empty(entry.shape, device="meta") for name, entry in entries.items()}
    names = {id(weight): name for name, weight in empty.items()}
    for index, kind in enumerate(config.layer_types):
        lowering = _SharedInputs()
        DecoderLayer(LayerWeights(empty, f"model.layers.{index}", lowering), kind, config)
        parts += [tuple(name for weight in weights if entries[name := names[id(weight)]].role == LINEAR)
                  for weights in lowering.found]
    return parts


class _SharedInputs(Lowering):
    """Notes which linear layers the network gives one input, and computes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[list[Weight]] = []

    def linear(self, weight: Weight, bias: Tensor | None) -> nn.Module:
        return self.linears([weight], [bias])

    def linears(self, weights: list[Weight], biases: list[Tensor | None]) -> nn.Module:
        self.found.append(weights)
        return Linears()


def _with_four_bits(base: Recipe, names: Sequence[str], scheme: Scheme) -> Recipe:
    if EMBEDDING in names:
        return replace(base, head=scheme)
    return replace(base, mixed=dict.fromkeys(names, scheme))
