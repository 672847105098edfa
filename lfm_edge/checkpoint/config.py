"""The dimensions of a model, read from any published spelling of config.json."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from lfm_edge.checkpoint.config_keys import check_keys, check_kind
from lfm_edge.checkpoint.families import FAMILIES
from lfm_edge.checkpoint.families.family import Family
from lfm_edge.checkpoint.layers import CONV, GATE, HEAD, LINEAR, PLAIN, SLIDING, TABLE, Rotation, WeightEntry
from lfm_edge.errors import ConfigError

# Of the class when bundles first held a digest of its printed form.
_FIRST_FIELDS = frozenset({
    "vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
    "layer_types", "conv_taps", "conv_bias", "norm_eps", "rope_theta", "tie_embedding", "max_position_embeddings",
    "bos_token_id", "eos_token_ids", "pad_token_id", "model_type"})


@dataclass(frozen=True)
class ModelConfig:
    """Dimensions of one dense decoder, validated when made.

    intermediate_size: the real width of the feed-forward layers, after `block_auto_adjust_ff_dim`
    layer_types: the kind of each layer, in order: `conv`, `full_attention` or `sliding_attention`
    conv_taps: taps of the short convolution (`conv_L_cache`); its state holds `conv_taps - 1` columns
    eos_token_ids: every id that ends a generation; none where nothing does
    bos_token_id, pad_token_id: None where there is none
    rope_theta, rope_share: the rotation of full attention; sliding_rope_theta: that of sliding attention
    sliding_window: positions that sliding attention sees, the token's own among them; 0 where no layer has it
    sandwich_norms: whether what an operator or a feed-forward gives is normalized before it is added
    attention_gate: whether each attention head's output is scaled by a sigmoid of the layer's input

    Raises ConfigError where the dimensions contradict each other.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    layer_types: tuple[str, ...]
    conv_taps: int = 3
    conv_bias: bool = False
    norm_eps: float = 1e-5
    rope_theta: float = 1_000_000.0
    tie_embedding: bool = True
    max_position_embeddings: int = 128_000
    bos_token_id: int | None = 1
    eos_token_ids: tuple[int, ...] = (7,)
    pad_token_id: int | None = 0
    model_type: str = "lfm2"
    rope_share: float = 1.0
    sliding_window: int = 0
    sliding_rope_theta: float = 10_000.0
    sandwich_norms: bool = False
    attention_gate: bool = False

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads",
                     "num_key_value_heads", "head_dim", "conv_taps", "max_position_embeddings"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("norm_eps", "rope_theta", "sliding_rope_theta"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be above 0")
        if not self.layer_types:
            raise ConfigError("layer_types is empty; a model needs at least one layer")
        for index, kind in enumerate(self.layer_types):
            if kind not in self.family.layer_types:
                raise ConfigError(f"layer_types[{index}] is {kind!r}; layer types of {self.model_type} are "
                                  f"{', '.join(self.family.layer_types)}")
        if SLIDING in self.layer_types and self.sliding_window < 1:
            raise ConfigError(f"sliding_window is {self.sliding_window}; it must be at least 1")
        if not 0 < self.rope_share <= 1:
            raise ConfigError(f"partial_rotary_factor is {self.rope_share}; it must be above 0, at most 1")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                              f"num_key_value_heads={self.num_key_value_heads}")
        if self.head_dim % 2:
            raise ConfigError(f"head_dim={self.head_dim} is odd; rotary embedding needs an even one")

    @property
    def family(self) -> Family:
        """What its `model_type` decides."""
        return FAMILIES[self.model_type]

    @property
    def identity(self) -> str:
        """The dimensions as text that stays the same when this class gets a field: one at its default is left out."""
        shown = (entry for entry in fields(self)
                 if entry.name in _FIRST_FIELDS or getattr(self, entry.name) != entry.default)
        return f"ModelConfig({', '.join(f'{entry.name}={getattr(self, entry.name)!r}' for entry in shown)})"

    @property
    def num_layers(self) -> int:
        """How many decoder layers there are."""
        return len(self.layer_types)

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """Indices of the layers with attention of any kind, in order."""
        return tuple(i for i, kind in enumerate(self.layer_types) if kind != CONV)

    @property
    def conv_layers(self) -> tuple[int, ...]:
        """Indices of the short-convolution layers, in order."""
        return tuple(i for i, kind in enumerate(self.layer_types) if kind == CONV)

    def window_of(self, layer: int) -> int:
        """How many positions a layer's attention sees; 0 for all."""
        return self.sliding_window if self.layer_types[layer] == SLIDING else 0

    def rotation(self, kind: str) -> Rotation:
        """The rotation of queries and keys in attention layers of one kind."""
        return Rotation(self.sliding_rope_theta) if kind == SLIDING else Rotation(self.rope_theta, self.rope_share)

    def weights(self) -> dict[str, WeightEntry]:
        """Every tensor that a checkpoint of this model holds, by its published name."""
        hidden = self.hidden_size
        entries = {"model.embed_tokens.weight": WeightEntry((self.vocab_size, hidden), TABLE)}
        for index, kind in enumerate(self.layer_types):
            operator = self._conv_weights() if kind == CONV else self._attention_weights()
            entries |= {f"model.layers.{index}.{name}": entry for name, entry in (operator | self._block()).items()}
        entries["model.embedding_norm.weight"] = WeightEntry((hidden,), PLAIN)
        if not self.tie_embedding:
            entries["lm_head.weight"] = WeightEntry((self.vocab_size, hidden), HEAD)
        return entries

    def _conv_weights(self) -> dict[str, WeightEntry]:
        hidden = self.hidden_size
        entries = {"conv.in_proj.weight": WeightEntry((3 * hidden, hidden), LINEAR),
                   "conv.conv.weight": WeightEntry((hidden, 1, self.conv_taps), PLAIN),
                   "conv.out_proj.weight": WeightEntry((hidden, hidden), LINEAR)}
        if self.conv_bias:
            entries |= {f"conv.{name}.bias": WeightEntry((size,), PLAIN)
                        for name, size in (("in_proj", 3 * hidden), ("conv", hidden), ("out_proj", hidden))}
        return entries

    def _attention_weights(self) -> dict[str, WeightEntry]:
        hidden, dim, names = self.hidden_size, self.head_dim, self.family.attention
        query, key = self.num_attention_heads * dim, self.num_key_value_heads * dim
        entries = {"q_proj": WeightEntry((query, hidden), LINEAR), "k_proj": WeightEntry((key, hidden), LINEAR),
                   "v_proj": WeightEntry((key, hidden), LINEAR), names.out: WeightEntry((hidden, query), LINEAR),
                   names.query_norm: WeightEntry((dim,), PLAIN), names.key_norm: WeightEntry((dim,), PLAIN)}
        if self.attention_gate:
            entries[names.gate] = WeightEntry((self.num_attention_heads, hidden), GATE)
        return {f"self_attn.{name}.weight": entry for name, entry in entries.items()}

    def _block(self) -> dict[str, WeightEntry]:
        """What every layer has around its operator."""
        hidden, ffn = self.hidden_size, self.intermediate_size
        norms = ["operator_norm", "ffn_norm"]
        norms += ["post_operator_norm", "post_ffn_norm"] if self.sandwich_norms else []
        return {"feed_forward.w1.weight": WeightEntry((ffn, hidden), LINEAR),
                "feed_forward.w3.weight": WeightEntry((ffn, hidden), LINEAR),
                "feed_forward.w2.weight": WeightEntry((hidden, ffn), LINEAR),
                **{f"{norm}.weight": WeightEntry((hidden,), PLAIN) for norm in norms}}

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of all of them."""
        return {name: entry.shape for name, entry in self.weights().items()}

    @property
    def num_parameters(self) -> int:
        """How many parameters the checkpoint holds; a tied head counts once."""
        return sum(_product(shape) for shape in self.weight_shapes().values())

    @classmethod
    def from_dict(cls, raw: dict[str, Any], source: str = "config.json") -> ModelConfig:
        """Read config.json in any published spelling.

        source: where it was found, for messages
        Raises ConfigError for another model type, an unknown layer type, a missing or contradictory value, and a key
        that is not understood: it may change what the model computes.
        """
        try:
            if not isinstance(raw, dict):
                raise ConfigError("expected an object at the top level")
            family = FAMILIES.get(raw.get("model_type")) if isinstance(raw.get("model_type"), str) else None
            if family is None:
                raise ConfigError(f"model_type is {raw.get('model_type')!r}; known model types are "
                                  f"{', '.join(FAMILIES)}")
            check_kind(raw, family.architecture)
            check_keys(raw, family.keys)
            return cls(**family.read(raw), model_type=family.model_type)
        except ConfigError as error:
            raise ConfigError(f"{source}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """config.json with every spelling that a published client reads, all saying the same."""
        return self.family.write(self)

    def special_ids(self) -> dict[str, Any]:
        """The tokens that begin, end and pad a text, as config.json and generation_config.json spell them."""
        eos = list(self.eos_token_ids)
        return {"bos_token_id": self.bos_token_id, "eos_token_id": eos if len(eos) > 1 else next(iter(eos), None),
                "pad_token_id": self.pad_token_id}


def _product(shape: tuple[int, ...]) -> int:
    size = 1
    for dim in shape:
        size *= dim
    return size
