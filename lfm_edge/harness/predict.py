"""Memory by part, predicted from the manifest alone, and what would bring a bundle under a budget."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, fields, replace

from lfm_edge.backends.mapped import WORTH_FORGETTING
from lfm_edge.bundle.manifest import Manifest
from lfm_edge.quantization.recipe import EMBEDDING, UNTIED_HEAD, Scheme, recipe
from lfm_edge.session.layout import INTERNAL
from lfm_edge.session.state import StateSpec
from lfm_edge.targets import RUNTIMES, Footprint, target_named

_FLOAT_BYTES = 4
_CONTEXT_STEP = 64  # a smaller context is suggested in multiples of it
_AROUND_A_ROW = 65_536  # bytes of a mapped file that Linux maps around one that is read, at least (fault_around_bytes)


@dataclass(frozen=True)
class Prediction:
    """Bytes of memory above an empty process of the runtime, with `filled` positions of the context filled.

    weights: as the runtime keeps them; embedding: the table, of which the file's pages come in as tokens ask for them,
        or what one step of prefill brings in where sessions let go of it
    activations: of one full step of prefill, an estimate; runtime: its own code and heap
    """

    filled: int
    weights: int
    embedding: int
    kv_cache: int
    conv_state: int
    activations: int
    runtime: int

    @property
    def parts(self) -> dict[str, int]:
        """Bytes by the name of the part."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "filled"}

    @property
    def total(self) -> int:
        """All parts together."""
        return sum(self.parts.values())

    @property
    def largest(self) -> str:
        """The name of the largest part."""
        return max(self.parts, key=lambda name: self.parts[name])


def predict(manifest: Manifest, artifact_bytes: int, filled: int) -> Prediction:
    """What a session at `filled` positions takes."""
    config, footprint = manifest.config, RUNTIMES[manifest.runtime].footprint
    table = stored_bytes((config.vocab_size, config.hidden_size), manifest.recipe.head, footprint)
    copies = _tied_copies(manifest.recipe.head, footprint) - footprint.tied_in_file if config.tie_embedding else 0
    packed = sum(footprint.packed_bytes * scale_count(entry.shape, scheme)
                 for name, entry in config.weights().items()
                 if name != EMBEDDING and (scheme := manifest.recipe.scheme(name, entry)))
    return Prediction(
        filled=filled, weights=artifact_bytes - table + copies * table + packed,
        embedding=_embedding(table, manifest.options.prefill_chunk, footprint),
        kv_cache=manifest.state.filled_bytes(_cache_rows(manifest, filled)),
        conv_state=manifest.state.nbytes_of(conv=True), activations=_activations(manifest),
        runtime=footprint.runtime_bytes)


def _embedding(table: int, chunk: int, footprint: Footprint) -> int:
    forgotten = footprint.forgets_table and table >= WORTH_FORGETTING
    return min(table, chunk * _AROUND_A_ROW) if forgotten else table


def stored_bytes(shape: tuple[int, ...], scheme: Scheme, footprint: Footprint) -> int:
    """Bytes of a quantized weight in the file. A scale for a whole row is a float32, where a format has such."""
    if footprint.block_columns:
        scale, groups = footprint.scale_bytes, math.prod(shape) // footprint.block_columns
    else:
        scale = _FLOAT_BYTES if scheme.group_size is None else footprint.scale_bytes
        groups = scale_count(shape, scheme)
    return math.prod(shape) * scheme.bits // 8 + scale * groups


def scale_count(shape: tuple[int, ...], scheme: Scheme) -> int:
    """How many scales a weight has."""
    return math.prod(shape) // (scheme.group_size or shape[-1])


def _row_bytes(state: StateSpec) -> float:
    """Bytes that each position of the context takes, once the windows are full."""
    return sum(tensor.nbytes / tensor.rows for tensor in state.tensors if tensor.is_cache and not tensor.window)


def _cache_rows(manifest: Manifest, filled: int) -> int:
    whole = manifest.options.state == INTERNAL or RUNTIMES[manifest.runtime].footprint.whole_cache
    return manifest.state.context if whole else min(filled, manifest.state.context)


def _activations(manifest: Manifest) -> int:
    """What is alive at once in the widest place: both halves of the feed-forward, or conv's three parts, and residuals.

    Counted in float32, as the kernels' own buffers are; with the logits of one token.
    """
    config = manifest.config
    row = 2 * config.intermediate_size + 5 * config.hidden_size
    return _FLOAT_BYTES * (manifest.options.prefill_chunk * row + config.vocab_size)


def remedies(manifest: Manifest, filled: int, excess: int) -> list[str]:
    """Options of `export` that would save `excess` bytes at `filled` positions, the fewest that suffice.

    Each entry is one way; no entry: none would. Only options that the target takes and that the bundle has not yet.
    """
    savings = _savings(manifest, filled)
    rows = _cache_rows(manifest, filled)
    ways: list[tuple[str, ...]] = []
    for chosen in (way for count in range(len(savings) + 1) for way in itertools.combinations(savings, count)):
        left = excess - sum(savings[option] for option in chosen)
        if left > 0:
            state = _with_int8_cache(manifest) if _INT8_CACHE in chosen else manifest.state
            context = _context_that_saves(left, rows, _row_bytes(state))
            ways += [(*chosen, f"--context {context}")] if context else []
        else:
            ways.append(chosen)
    fewest = min(map(len, ways), default=0)
    return [" ".join(way) for way in ways if len(way) == fewest]


_INT8_CACHE, _INT4_HEAD = "--kv-dtype int8", "--head-bits 4"


def _savings(manifest: Manifest, filled: int) -> dict[str, float]:
    """Bytes that each option saves."""
    target, bits = target_named(manifest.target), manifest.recipe
    footprint = RUNTIMES[manifest.runtime].footprint
    found: dict[str, float] = {}
    rows = _cache_rows(manifest, filled)
    saved = manifest.state.filled_bytes(rows) - _with_int8_cache(manifest).filled_bytes(rows)
    if "int8" in target.arithmetic.kv_dtypes and saved > 0:
        found[_INT8_CACHE] = saved
    if bits.head.bits > 4:
        narrow = recipe(bits.body.bits, bits.body.group_size or 32, 4, bits.activations).head
        saved = _tables(manifest, bits.head, footprint) - _tables(manifest, narrow, footprint)
        if saved > 0:
            found[_INT4_HEAD] = saved
    return found


def _tables(manifest: Manifest, scheme: Scheme, footprint: Footprint) -> int:
    """Bytes of embedding and head as `predict` counts them, were they quantized so."""
    config = manifest.config
    table = stored_bytes((config.vocab_size, config.hidden_size), scheme, footprint)
    copies = _tied_copies(scheme, footprint) if config.tie_embedding else len((EMBEDDING, UNTIED_HEAD))
    return (copies - 1) * table + _embedding(table, manifest.options.prefill_chunk, footprint)


def _tied_copies(scheme: Scheme, footprint: Footprint) -> int:
    """How often a table that is embedding and head is in memory."""
    return footprint.tied_in_memory + (footprint.packs_narrow_head and scheme.bits == 4)


def _with_int8_cache(manifest: Manifest) -> StateSpec:
    return replace(manifest.options, kv_dtype="int8").state_spec(manifest.config, manifest.state_layout)


def _context_that_saves(excess: float, rows: int, row_bytes: float) -> int:
    """The largest context, a multiple of 64, whose cache takes `excess` bytes less than `rows` rows; 0 for none."""
    if not row_bytes:
        return 0
    return max(int((rows - excess / row_bytes) // _CONTEXT_STEP * _CONTEXT_STEP), 0)
