"""What a user chooses of an export: checked against the target at the start, and kept in the manifest."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from lfm_edge.backends.socs import DEFAULT_SOC, socs_named
from lfm_edge.checkpoint.config import ModelConfig
from lfm_edge.errors import ExportError
from lfm_edge.files import one_of, text, whole_number
from lfm_edge.quantization.recipe import GROUP_SIZES, HEAD_BITS, NEAREST, ROUNDINGS, MixedBits
from lfm_edge.session.layout import EXPLICIT, INTERNAL, StateLayout
from lfm_edge.session.state import DTYPES, StateSpec
from lfm_edge.targets import Target

DEFAULT_CONTEXT = 4096
DEFAULT_GROUP_SIZE, DEFAULT_HEAD_BITS = 32, 8
COMPUTE_DTYPES = ("float32", "float16", "bfloat16", "int16")
_FILES = ("calibration", "recipe", "bake_prompt")


@dataclass(frozen=True)
class ExportOptions:
    """The choices of one export. Where one is None, `checked` takes the target's, `for_model` the model's.

    context: positions that the KV cache holds; 4096, or the model's own limit where that is lower
    prefill_chunk: most tokens that one step takes
    group_size: columns that share a 4-bit scale, 32; head_bits: width of embedding and head, 8. A recipe has its own
    compute_dtype: what the program computes in; the target's first one
    kv_dtype: of the KV cache; the compute type where the target's caches have it
    state: `explicit` (the caller owns the state) or `internal` (the program does)
    soc: chips to compile for, such as `sm8650,sm8750`, where the target is compiled for chips
    rounding: `nearest`, or `gptq`
    calibration: a text file with prompts separated by blank lines, for all that is measured on a text
    recipe: a file that says which linear layers have 4 bits and which 8, as `sensitivity` writes it
    bake_prompt: a UTF-8 text file, the system prompt that the bundle prefills now, for sessions to start from
    """

    context: int | None = None
    prefill_chunk: int = 128
    group_size: int | None = None
    head_bits: int | None = None
    compute_dtype: str | None = None
    kv_dtype: str | None = None
    state: str = EXPLICIT
    soc: str | None = None
    rounding: str = NEAREST
    calibration: str | Path | None = None
    recipe: str | Path | None = None
    bake_prompt: str | Path | None = None

    def checked(self, target: Target, bits: MixedBits | None = None) -> ExportOptions:
        """The same, whole but for what depends on the model.

        bits: what `mixed_bits` gave, where the recipe's file has been read
        Raises ExportError, with the option as the command line spells it, for what the target cannot honour.
        """
        self._check_numbers()
        bits = bits or self.mixed_bits(target)
        compute_dtype = _given(self.compute_dtype, target.arithmetic.compute_dtypes[0])
        _check_choice("--compute-dtype", compute_dtype, target, target.arithmetic.compute_dtypes)
        kv_dtypes = target.arithmetic.kv_choices(compute_dtype)
        kv_dtype = _given(self.kv_dtype, kv_dtypes[0])
        _check_choice("--kv-dtype", kv_dtype, target, kv_dtypes)
        _check_choice("--state", self.state, target, target.state_modes)
        _check_choice("--rounding", self.rounding, target, ROUNDINGS)
        if self.bake_prompt is not None and self.state != EXPLICIT:
            raise ExportError(f"--bake-prompt {self.bake_prompt}: with --state {self.state} the program keeps the "
                              "state, and none can be shipped")
        return replace(self, group_size=bits.group_size, head_bits=bits.head_bits, compute_dtype=compute_dtype,
                       kv_dtype=kv_dtype, soc=self._chips(target))

    def mixed_bits(self, target: Target) -> MixedBits:
        """What the recipe's file says, or the options where there is none.

        Raises ExportError where there are both, where the file is none, and for what the target cannot honour.
        """
        if self.recipe is not None:
            if self.group_size is not None or self.head_bits is not None:
                raise ExportError(f"--recipe {self.recipe}: has a group size and the bits of the head; leave out "
                                  "--group-size and --head-bits")
            return MixedBits.read(Path(self.recipe))
        bits = MixedBits(_given(self.group_size, DEFAULT_GROUP_SIZE), _given(self.head_bits, DEFAULT_HEAD_BITS), {})
        _check_choice("--group-size", bits.group_size, target, GROUP_SIZES)
        _check_choice("--head-bits", bits.head_bits, target, HEAD_BITS)
        if target.bits == bits.head_bits == 8 and bits.group_size != DEFAULT_GROUP_SIZE:
            raise ExportError(f"--group-size {bits.group_size}: {target.name} is quantized per channel and has no "
                              "groups")
        return bits

    def for_model(self, config: ModelConfig) -> ExportOptions:
        """The same with the context that the model can have. Raises ExportError where it can have none of that size."""
        limit = config.max_position_embeddings
        context = _given(self.context, min(DEFAULT_CONTEXT, limit))
        if context > limit:
            raise ExportError(f"--context {context} is more than the model's {limit}")
        return replace(self, context=context, prefill_chunk=min(self.prefill_chunk, context))

    def state_spec(self, config: ModelConfig, layout: StateLayout) -> StateSpec:
        """The state of a session. Conv states come and go as real numbers, where the program computes in integers."""
        conv_dtype = "float32" if self.compute_dtype == "int16" else self.compute_dtype
        return StateSpec.of(config, self.context, self.kv_dtype, layout, conv_dtype, self.prefill_chunk)

    def to_dict(self) -> dict[str, Any]:
        """The options as the manifest holds them. Of files it has the names alone: where they lie is the user's."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: Path(value).name if name in _FILES else value for name, value in given.items()
                if value is not None}

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> ExportOptions:
        """Read them from a manifest, whatever today's targets offer. Raises ValueError or LookupError for none."""
        names = {name: text(raw[name]) for name in ("soc", *_FILES) if name in raw}
        return cls(whole_number(raw["context"], at_least=1), whole_number(raw["prefill_chunk"], at_least=1),
                   one_of(GROUP_SIZES, raw["group_size"]), one_of(HEAD_BITS, raw["head_bits"]),
                   one_of(COMPUTE_DTYPES, raw["compute_dtype"]), one_of(DTYPES, raw["kv_dtype"]),
                   one_of((EXPLICIT, INTERNAL), raw["state"]), rounding=one_of(ROUNDINGS, raw["rounding"]), **names)

    def _check_numbers(self) -> None:
        if self.context is not None and self.context < 2:
            raise ExportError(f"--context {self.context}: a context holds at least 2 tokens")
        if self.prefill_chunk < 1:
            raise ExportError(f"--prefill-chunk {self.prefill_chunk}: a step takes at least 1 token")

    def _chips(self, target: Target) -> str | None:
        """The chips by their names, each once."""
        if target.runtime.takes_chip:
            return ",".join(soc.name for soc in socs_named(_given(self.soc, DEFAULT_SOC)))
        if self.soc is not None:
            raise ExportError(f"--soc {self.soc}: {target.name} is not compiled for chips")
        return None


def _given(value: Any, default: Any) -> Any:
    return default if value is None else value


def _check_choice(option: str, value: Any, target: Target, allowed: tuple[Any, ...]) -> None:
    if value not in allowed:
        raise ExportError(f"{option} {value}: {target.name} takes {' or '.join(map(str, allowed))}")
