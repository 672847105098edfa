"""The table of targets: which exporter and runtime, what arithmetic, how close is close enough."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import logging
import os
import platform
import sys
from dataclasses import dataclass
from types import ModuleType

from lfm_edge.errors import ExportError
from lfm_edge.session.layout import EXPLICIT, INTERNAL, RING, SHIFT, SLIDE, StateLayout


@dataclass(frozen=True)
class Thresholds:
    """What `verify` demands; each value has its reason where it is set.

    logit_error: largest |artifact - quantized reference| of a phase, in units of the logits' standard deviation
    typical_error: the median of that error over all positions of all phases
    kl_divergence: largest KL(reference || artifact) of one position, in nats
    noise_factor: where the model's own noise floor (the reference against itself with some float32
        roundings of noise) is higher than these three, this multiple of the floor takes their place
    task_drop: how much task accuracy quantization may lose, where the checkpoint ships tasks
    """

    logit_error: float
    typical_error: float
    kl_divergence: float
    noise_factor: float
    task_drop: float


@dataclass(frozen=True)
class Footprint:
    """What a runtime holds in memory, as far as the size of the artifact does not tell.

    runtime_bytes: its own code and heap, seen with a model that takes next to nothing, on x86-64
    scale_bytes: of a group of quantized columns, in the file, with all that goes with the scale
    block_columns: columns that share a scale in the file, in formats where that is one number for all weights
    packed_bytes: what packing adds to each group
    tied_in_file, tied_in_memory: how often a table that is embedding and head is there
    packs_narrow_head: whether a table of 4 bits is there once more, packed for the head
    whole_cache: whether a session takes the memory of the whole context at once, not as it is filled
    forgets_table: whether a session lets go of the embedding's pages after each step, where they are many
    """

    runtime_bytes: int = 0
    scale_bytes: int = 2
    block_columns: int = 0
    packed_bytes: int = 0
    tied_in_file: int = 1
    tied_in_memory: int = 1
    packs_narrow_head: bool = False
    whole_cache: bool = False
    forgets_table: bool = False


@dataclass(frozen=True)
class Runtime:
    """What runs an artifact. A manifest names it, so that a bundle stays with the one that it was made for.

    name: its module, `runtimes.NAME`, with `open_session(bundle, threads)`
    requires: packages that must be importable for it; extra: what `pip install` brings them with
    title, platforms: what people call it, and where it runs
    opens: how the names of its artifacts end; empty where they are directories
    footprint: what it holds in memory
    measured_on: the systems on which its speed and memory mean something, as `sys.platform`, or that and the machine
    takes_threads: whether it can be told how many threads to use
    takes_chip: whether `open_session` is told which chip besides, as its artifacts are compiled for some
    """

    name: str
    requires: tuple[str, ...]
    extra: str
    title: str
    platforms: tuple[str, ...]
    opens: str
    footprint: Footprint = Footprint()
    measured_on: tuple[str, ...] = ("linux", "darwin")
    takes_threads: bool = True
    takes_chip: bool = False

    @property
    def is_measured_here(self) -> bool:
        """Whether this machine can tell its speed and memory."""
        return bool({sys.platform, f"{sys.platform}-{platform.machine()}"} & set(self.measured_on))

    def module(self) -> ModuleType:
        """The module. Raises ExportError, with what to install, where a package is missing."""
        return _imported(f"runtimes.{self.name}", self.requires, self.extra, "running this bundle")


@dataclass(frozen=True)
class Arithmetic:
    """What the programs of a target compute in.

    activations: how they round the inputs of linear layers, one of `quantization.activations.ACTIVATIONS`
    compute_dtypes: of all that is not quantized, the default first
    kv_dtypes: of caches, the default first; a floating-point one must be the one that the program computes in, unless
        the runtime converts
    converts_kv: whether it does
    two_level: whether 4-bit scales are multiples of one for each row (see `quantization.recipe.Scheme`)
    fixed_ranges: whether activations have constant scales, which are measured on prompts
    """

    activations: str
    compute_dtypes: tuple[str, ...]
    kv_dtypes: tuple[str, ...]
    converts_kv: bool = False
    two_level: bool = False
    fixed_ranges: bool = False

    def kv_choices(self, compute_dtype: str) -> tuple[str, ...]:
        """Types that a cache may have beside it, the default first."""
        choices = [dtype for dtype in self.kv_dtypes if self.converts_kv or dtype in ("int8", compute_dtype)]
        return tuple(sorted(choices, key=lambda dtype: not self.converts_kv and dtype != compute_dtype))


@dataclass(frozen=True)
class Target:
    """One row of the table: what it takes to make bundles of a kind.

    exporter_name: its module, `exporters.NAME`; the extra has that name, unless the runtime's holds more
    requires: packages that the exporter needs
    runtime: what its bundles run in
    bits: of the linear layers' weights
    """

    name: str
    exporter_name: str
    requires: tuple[str, ...]
    runtime: Runtime
    arithmetic: Arithmetic
    bits: int
    state_layout: StateLayout
    state_modes: tuple[str, ...]
    artifact: str
    thresholds: Thresholds

    @property
    def runs_on(self) -> str:
        """Where its bundles run, and by what."""
        return f"{', '.join(self.runtime.platforms)} ({self.runtime.title})"

    @property
    def to_install(self) -> str | None:
        """What `pip install` needs to be told before it can be exported to and run; None where all is there."""
        return f"lfm-edge[{self.runtime.extra}]" if _missing((*self.requires, *self.runtime.requires)) else None

    def exporter(self) -> ModuleType:
        """The module with `export(job, directory, progress)`. Raises ExportError where the backend is missing."""
        return _imported(f"exporters.{self.exporter_name}", self.requires, self.exporter_name, self.name)

    def check_installed(self) -> None:
        """Raises ExportError, with what to install, where a package that `export` needs is missing."""
        _check_importable(self.requires, self.exporter_name, self.name)


def _imported(module: str, requires: tuple[str, ...], extra: str, purpose: str) -> ModuleType:
    _check_importable(requires, extra, purpose)
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)  # backends warn about optional parts of theirs while they are imported
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # ONNX Runtime reports home unless told before its import
    try:
        return importlib.import_module(module)
    finally:
        logging.disable(previous)


def _check_importable(packages: tuple[str, ...], extra: str, purpose: str) -> None:
    missing = _missing(packages)
    if missing:
        raise ExportError(f"{purpose} needs the package {missing[0]}: pip install 'lfm-edge[{extra}]'")


def _missing(packages: tuple[str, ...]) -> list[str]:
    return [package for package in packages if importlib.util.find_spec(package) is None]


RUNTIMES: dict[str, Runtime] = {runtime.name: runtime for runtime in (
    Runtime("executorch", ("executorch",), "executorch", "ExecuTorch", ("Android", "iOS", "Linux"), ".pte",
            Footprint(8_000_000, tied_in_file=2, tied_in_memory=2, forgets_table=True)),
    # MLAS on x86-64 adds a float32 sum to the float32 scale of each group (docs/internals/onnx.md).
    Runtime("onnxruntime", ("onnxruntime",), "onnx", "ONNX Runtime", ("Android", "iOS", "desktop", "web"), ".onnx",
            Footprint(17_000_000, scale_bytes=4, packed_bytes=4, tied_in_memory=2, forgets_table=True)),
    Runtime("coreml", ("coremltools",), "coreml", "Core ML", ("iOS", "macOS"), ".mlpackage", measured_on=("darwin",),
            takes_threads=False),
    Runtime("mlx", ("mlx",), "mlx", "MLX", ("iOS", "macOS"), ".safetensors", Footprint(scale_bytes=4, whole_cache=True),
            measured_on=("darwin",), takes_threads=False),
    Runtime("qnn", ("onnxruntime_qnn",), "qnn", "Snapdragon NPU", ("Android",), "",
            measured_on=("linux-aarch64",), takes_threads=False, takes_chip=True),
    Runtime("llamacpp", ("llama_cpp",), "llamacpp", "llama.cpp", ("Android", "iOS", "desktop"), ".gguf",
            Footprint(8_000_000, block_columns=32, packs_narrow_head=True, whole_cache=True)),
)}


# XNNPACK rounds activations exactly as the reference does, so what is left is the order of float32 sums: 1e-6 of
# the logits' spread where it tips no activation over a rounding boundary, and 1e-3 is far above that. Where it
# does, the next layer tips more, and the error is that of the model's own 8-bit noise: the floor, which is a
# maximum over few positions, and which draws of the same noise were seen to miss by up to twice. Three times
# it leaves room for that (docs/internals/noise-floor.md). The median stays at 1e-6 where only some positions tip, and a
# wrong position or mask moves all of them. Weights are compared bit for bit besides.
_XNNPACK_PARITY = {"logit_error": 1e-3, "typical_error": 1e-4, "kl_divergence": 1e-6, "noise_factor": 3.0}

_EXECUTORCH = {
    "exporter_name": "executorch", "requires": ("executorch",), "runtime": RUNTIMES["executorch"],
    "arithmetic": Arithmetic("int8 rows", ("float32",), ("float32", "int8")),
    "state_layout": StateLayout(window=RING), "state_modes": (EXPLICIT, INTERNAL), "artifact": "model.pte",
}

# The reference rounds activations block by block, as MLAS does on x86-64, and what is said above holds here too:
# 4e-6 of the spread where nothing tips. On Arm MLAS may choose kernels that round whole rows instead; the noise
# is then of the size of the floor, and the floor decides.
_ONNX_PARITY = _XNNPACK_PARITY

_ONNX = {
    "exporter_name": "onnx", "requires": ("onnxruntime", "onnxscript"), "runtime": RUNTIMES["onnxruntime"],
    "arithmetic": Arithmetic("int8 blocks", ("float32",), ("float32", "int8")),
    "state_layout": StateLayout(kv_heads_first=True, window=SLIDE), "state_modes": (EXPLICIT,),
}

# Activations are not rounded to 8 bits here, so nothing tips: in float32 the error is that of sums in another order,
# 5e-6 of the spread, and in 16 bits it is of the size of the floor.
_FLOAT_PARITY = {"logit_error": 1e-4, "typical_error": 1e-5, "kl_divergence": 1e-8, "noise_factor": 3.0}

_APPLE_LAYOUT = StateLayout(kv_heads_first=True, conv_channels_last=True, window=SHIFT)

_MLX = {
    "exporter_name": "mlx", "requires": ("mlx",), "runtime": RUNTIMES["mlx"],
    "arithmetic": Arithmetic("float", ("bfloat16", "float32"), ("bfloat16", "float32")),
    "state_layout": _APPLE_LAYOUT, "state_modes": (EXPLICIT,), "artifact": "model.safetensors",
}

_COREML = {
    "exporter_name": "coreml", "requires": ("coremltools",), "runtime": RUNTIMES["coreml"],
    "arithmetic": Arithmetic("float", ("float16", "float32"), ("float16", "float32")),
    "state_layout": _APPLE_LAYOUT, "state_modes": (EXPLICIT, INTERNAL), "artifact": "model.mlpackage",
}

# The NPU computes in integers of 16 bits whose scales were fixed beforehand; docs/internals/npu.md has what that costs.
_NPU_PARITY = {"logit_error": 0.09, "typical_error": 0.03, "kl_divergence": 1e-3, "noise_factor": 3.0}

_NPU = {
    "exporter_name": "qnn", "requires": ("onnxruntime_qnn",), "runtime": RUNTIMES["qnn"],
    "arithmetic": Arithmetic("float", ("int16",), ("int8",), two_level=True, fixed_ranges=True),
    "state_layout": StateLayout(kv_heads_first=True, keys_transposed=True, conv_channels_last=True, window=RING),
    "state_modes": (EXPLICIT,), "artifact": "npu",
}

# The reference rounds activations as ggml's kernels do, and what is said above holds here too where attention is in
# float32: 6e-7 of the spread where nothing tips. Fused attention, the default, computes in float16; its roundings tip
# activations everywhere, and the floor, disturbed as much, decides (docs/internals/gguf.md).
_GGUF_PARITY = _XNNPACK_PARITY

_GGUF = {
    "exporter_name": "gguf", "requires": ("gguf",), "runtime": RUNTIMES["llamacpp"],
    "arithmetic": Arithmetic("q8_0", ("float32",), ("float16", "float32"), converts_kv=True),
    "state_layout": StateLayout(), "state_modes": (EXPLICIT,), "artifact": "model.gguf",
}

# What quantization may cost, mean KL(float32 || quantized reference) in nats, by the fewest bits that any weight has.
# Measured: 4 bits cost the trained toy 0.003 on its tasks and 0.07 on text that it does not know, 8 bits 0.0001. Of
# trained models of 1 to 8 billion parameters some 0.02 to 0.1 are published for 4 bits and 0.001 to 0.01 for 8; the
# limits leave room above that. One layer that is wrong may cost less: each weight is held against the checkpoint
# besides (harness/rounding.py). Logits of random weights are far more sensitive: at 1.2B 4 bits cost 0.35.
QUALITY_KL = {4: 0.25, 8: 0.05}
RANDOM_QUALITY_KL = {4: 0.5, 8: 0.1}

_TASK_DROP_4, _TASK_DROP_8 = 0.05, 0.02  # one prompt of 60 more or less is 0.017

TARGETS: dict[str, Target] = {target.name: target for target in (
    Target("android-q4", bits=4,
           thresholds=Thresholds(**_XNNPACK_PARITY, task_drop=_TASK_DROP_4), **_EXECUTORCH),
    Target("android-q8", bits=8,
           thresholds=Thresholds(**_XNNPACK_PARITY, task_drop=_TASK_DROP_8), **_EXECUTORCH),
    Target("onnx-q4", bits=4,
           artifact="onnx/model_q4.onnx",
           thresholds=Thresholds(**_ONNX_PARITY, task_drop=_TASK_DROP_4), **_ONNX),
    Target("onnx-q8", bits=8,
           artifact="onnx/model_quantized.onnx",
           thresholds=Thresholds(**_ONNX_PARITY, task_drop=_TASK_DROP_8), **_ONNX),
    Target("coreml-q4", bits=4,
           thresholds=Thresholds(**_FLOAT_PARITY, task_drop=_TASK_DROP_4), **_COREML),
    Target("coreml-q8", bits=8,
           thresholds=Thresholds(**_FLOAT_PARITY, task_drop=_TASK_DROP_8), **_COREML),
    Target("mlx-q4", bits=4,
           thresholds=Thresholds(**_FLOAT_PARITY, task_drop=_TASK_DROP_4), **_MLX),
    Target("mlx-q8", bits=8,
           thresholds=Thresholds(**_FLOAT_PARITY, task_drop=_TASK_DROP_8), **_MLX),
    Target("npu-q4", bits=4,
           thresholds=Thresholds(**_NPU_PARITY, task_drop=_TASK_DROP_4), **_NPU),
    Target("npu-q8", bits=8,
           thresholds=Thresholds(**_NPU_PARITY, task_drop=_TASK_DROP_8), **_NPU),
    Target("gguf-q4", bits=4,
           thresholds=Thresholds(**_GGUF_PARITY, task_drop=_TASK_DROP_4), **_GGUF),
)}


def target_named(name: str) -> Target:
    """The target `name`. Raises ExportError, with those that may be meant, where there is none."""
    if name in TARGETS:
        return TARGETS[name]
    there = [target.name for target in TARGETS.values()
             if name.lower() in map(str.lower, target.runtime.platforms)]
    if there:
        raise ExportError(f"unknown target '{name}'; for it there are {', '.join(there)}")
    near = difflib.get_close_matches(name, TARGETS, 1)
    raise ExportError(f"unknown target '{name}'; " + (f"did you mean {near[0]}? " if near else "")
                      + f"known targets are {', '.join(TARGETS)}")
