"""The dimensions of an LFM2 / LFM2.5 model, read from any published spelling of config.json."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lfm_edge.config_keys import check_keys, check_kind, check_rope_keys
from lfm_edge.errors import ConfigError

CONV = "conv"
ATTENTION = "full_attention"
LAYER_TYPES = (CONV, ATTENTION)
MODEL_TYPES = ("lfm2",)

_UNSET = object()


@dataclass(frozen=True)
class ModelConfig:
    """Dimensions of one dense LFM2 decoder, validated when made.

    intermediate_size: the real width of the feed-forward layers, after `block_auto_adjust_ff_dim`
    layer_types: one of `conv` or `full_attention` for each layer, in order
    conv_taps: taps of the short convolution (`conv_L_cache`); its state holds `conv_taps - 1` columns
    eos_token_ids: every id that ends a generation; none where nothing does
    bos_token_id, pad_token_id: None where there is none

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

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads",
                     "num_key_value_heads", "head_dim", "conv_taps", "max_position_embeddings"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("norm_eps", "rope_theta"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be above 0")
        if not self.layer_types:
            raise ConfigError("layer_types is empty; a model needs at least one layer")
        for index, kind in enumerate(self.layer_types):
            if kind not in LAYER_TYPES:
                raise ConfigError(f"layer_types[{index}] is {kind!r}; "
                                  f"known layer types are {', '.join(LAYER_TYPES)}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                              f"num_key_value_heads={self.num_key_value_heads}")
        if self.head_dim % 2:
            raise ConfigError(f"head_dim={self.head_dim} is odd; rotary embedding needs an even one")

    @property
    def num_layers(self) -> int:
        """How many decoder layers there are."""
        return len(self.layer_types)

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """Indices of the attention layers, in order."""
        return tuple(i for i, kind in enumerate(self.layer_types) if kind == ATTENTION)

    @property
    def conv_layers(self) -> tuple[int, ...]:
        """Indices of the short-convolution layers, in order."""
        return tuple(i for i, kind in enumerate(self.layer_types) if kind == CONV)

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor that a checkpoint of this model holds, by its published name, with its shape."""
        hidden, ffn, dim = self.hidden_size, self.intermediate_size, self.head_dim
        query, key = self.num_attention_heads * dim, self.num_key_value_heads * dim
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, hidden)}
        for index, kind in enumerate(self.layer_types):
            layer = f"model.layers.{index}"
            if kind == CONV:
                shapes |= {f"{layer}.conv.in_proj.weight": (3 * hidden, hidden),
                           f"{layer}.conv.conv.weight": (hidden, 1, self.conv_taps),
                           f"{layer}.conv.out_proj.weight": (hidden, hidden)}
                if self.conv_bias:
                    shapes |= {f"{layer}.conv.in_proj.bias": (3 * hidden,),
                               f"{layer}.conv.conv.bias": (hidden,),
                               f"{layer}.conv.out_proj.bias": (hidden,)}
            else:
                shapes |= {f"{layer}.self_attn.q_proj.weight": (query, hidden),
                           f"{layer}.self_attn.k_proj.weight": (key, hidden),
                           f"{layer}.self_attn.v_proj.weight": (key, hidden),
                           f"{layer}.self_attn.out_proj.weight": (hidden, query),
                           f"{layer}.self_attn.q_layernorm.weight": (dim,),
                           f"{layer}.self_attn.k_layernorm.weight": (dim,)}
            shapes |= {f"{layer}.feed_forward.w1.weight": (ffn, hidden),
                       f"{layer}.feed_forward.w3.weight": (ffn, hidden),
                       f"{layer}.feed_forward.w2.weight": (hidden, ffn),
                       f"{layer}.operator_norm.weight": (hidden,),
                       f"{layer}.ffn_norm.weight": (hidden,)}
        shapes["model.embedding_norm.weight"] = (hidden,)
        if not self.tie_embedding:
            shapes["lm_head.weight"] = (self.vocab_size, hidden)
        return shapes

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
            return cls._from_dict(raw)
        except ConfigError as error:
            raise ConfigError(f"{source}: {error}") from None

    @classmethod
    def _from_dict(cls, raw: dict[str, Any]) -> ModelConfig:
        if not isinstance(raw, dict):
            raise ConfigError("expected an object at the top level")
        model_type = raw.get("model_type")
        if model_type not in MODEL_TYPES:
            raise ConfigError(f"model_type is {model_type!r}; known model types are {', '.join(MODEL_TYPES)}")
        check_kind(raw)
        check_keys(raw)
        hidden = _integer(raw, "hidden_size", "block_dim", "conv_dim")
        heads = _integer(raw, "num_attention_heads", "num_heads")
        if heads < 1:
            raise ConfigError(f"num_attention_heads is {heads}; it must be at least 1")
        if raw.get("head_dim") is None and hidden % heads:
            raise ConfigError(f"hidden_size={hidden} is not a multiple of num_attention_heads={heads}")
        return cls(
            vocab_size=_integer(raw, "vocab_size"),
            hidden_size=hidden,
            intermediate_size=_ffn_width(raw),
            num_attention_heads=heads,
            num_key_value_heads=_integer(raw, "num_key_value_heads", default=heads),
            head_dim=_integer(raw, "head_dim", default=hidden // heads),
            layer_types=_layer_types(raw),
            conv_taps=_integer(raw, "conv_L_cache", default=3),
            conv_bias=_boolean(raw, "conv_bias", default=False),
            norm_eps=_number(raw, "norm_eps", "block_norm_eps", default=1e-5),
            rope_theta=_rope_theta(raw),
            tie_embedding=_boolean(raw, "tie_embedding", "tie_word_embeddings", default=True),
            max_position_embeddings=_integer(raw, "max_position_embeddings", default=128_000),
            bos_token_id=_token_id(raw, "bos_token_id", default=1),
            eos_token_ids=token_ids(raw.get("eos_token_id", 7)),
            pad_token_id=_token_id(raw, "pad_token_id", default=0),
            model_type=model_type,
        )

    def to_dict(self) -> dict[str, Any]:
        """config.json with every spelling that a published client reads, all saying the same."""
        return {
            "architectures": ["Lfm2ForCausalLM"],
            "model_type": self.model_type,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "block_dim": self.hidden_size,
            "conv_dim": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "block_ff_dim": self.intermediate_size,
            "block_auto_adjust_ff_dim": False,
            "block_multiple_of": 256,
            "block_ffn_dim_multiplier": 1.0,
            "num_hidden_layers": self.num_layers,
            "layer_types": list(self.layer_types),
            "full_attn_idxs": list(self.attention_layers),
            "num_attention_heads": self.num_attention_heads,
            "num_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "conv_L_cache": self.conv_taps,
            "conv_bias": self.conv_bias,
            "norm_eps": self.norm_eps,
            "block_norm_eps": self.norm_eps,
            "rope_theta": self.rope_theta,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
            "tie_embedding": self.tie_embedding,
            "tie_word_embeddings": self.tie_embedding,
            "max_position_embeddings": self.max_position_embeddings,
            **self.special_ids(),
            "use_cache": True,
        }

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


def _first(raw: dict[str, Any], *names: str, default: Any = _UNSET) -> Any:
    """The value of the first of `names` that is there and not null. Raises ConfigError without a default."""
    for name in names:
        if raw.get(name) is not None:
            return raw[name]
    if default is _UNSET:
        raise ConfigError(f"{' or '.join(names)} is missing")
    return default


def _integer(raw: dict[str, Any], *names: str, default: Any = _UNSET) -> int:
    value = _first(raw, *names, default=default)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{names[0]} is {value!r}; expected an integer")
    return value


def _number(raw: dict[str, Any], *names: str, default: float) -> float:
    value = _first(raw, *names, default=default)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ConfigError(f"{names[0]} is {value!r}; expected a number")
    return float(value)


def _boolean(raw: dict[str, Any], *names: str, default: bool) -> bool:
    value = _first(raw, *names, default=default)
    if not isinstance(value, bool):
        raise ConfigError(f"{names[0]} is {value!r}; expected true or false")
    return value


def _token_id(raw: dict[str, Any], name: str, default: int) -> int | None:
    """A token that need not be there: null says that there is none."""
    return None if name in raw and raw[name] is None else _integer(raw, name, default=default)


def token_ids(value: Any) -> tuple[int, ...]:
    """An `eos_token_id`: one, several, or null for none, each once. Raises ConfigError for anything else."""
    if value is None:
        return ()
    ids = value if isinstance(value, list) else [value]
    if not ids or any(isinstance(i, bool) or not isinstance(i, int) for i in ids):
        raise ConfigError(f"eos_token_id is {value!r}; expected an integer, a list of integers, or null")
    return tuple(dict.fromkeys(ids))


def _ffn_width(raw: dict[str, Any]) -> int:
    """The feed-forward width. The older spelling gives 1.5 times it, to be cut to 2/3 and rounded up."""
    # transformers lets block_ff_dim win where both are there; so do we, to load the same model.
    width = _integer(raw, "block_ff_dim", "intermediate_size")
    if not _boolean(raw, "block_auto_adjust_ff_dim", default=True):
        return width
    width = int(2 * width / 3)
    if raw.get("block_ffn_dim_multiplier", 1.0) is None:
        return width
    multiplier = _number(raw, "block_ffn_dim_multiplier", default=1.0)
    multiple = _integer(raw, "block_multiple_of", default=256)
    if multiple < 1:
        raise ConfigError(f"block_multiple_of is {multiple}; it must be at least 1")
    return -(-int(multiplier * width) // multiple) * multiple


def _layer_types(raw: dict[str, Any]) -> tuple[str, ...]:
    count = raw.get("num_hidden_layers")
    if raw.get("layer_types") is not None:
        types = raw["layer_types"]
        if not isinstance(types, list):
            raise ConfigError("layer_types must be a list")
        if count is not None and count != len(types):
            raise ConfigError(f"layer_types has {len(types)} entries, num_hidden_layers says {count}")
        return tuple(str(kind) for kind in types)
    layers = _integer(raw, "num_hidden_layers")
    indices = _first(raw, "full_attn_idxs", default=list(range(layers)))
    if not isinstance(indices, list) or any(not isinstance(i, int) or not 0 <= i < layers for i in indices):
        raise ConfigError(f"full_attn_idxs is {indices!r}; expected layer indices below {layers}")
    return tuple(ATTENTION if index in indices else CONV for index in range(layers))


def _rope_theta(raw: dict[str, Any]) -> float:
    merged = dict(raw)
    for name in ("rope_parameters", "rope_scaling"):
        parameters = raw.get(name) or {}
        if not isinstance(parameters, dict):
            raise ConfigError(f"{name} is {parameters!r}; expected an object")
        kind = _first(parameters, "rope_type", "type", default="default")
        if kind != "default":
            raise ConfigError(f"{name}: rope_type is {kind!r}; only 'default' rotary embedding is known")
        check_rope_keys(parameters, name)
        if parameters.get("rope_theta") is not None:
            merged["rope_theta"] = parameters["rope_theta"]
    return _number(merged, "rope_theta", "theta", default=1_000_000.0)
