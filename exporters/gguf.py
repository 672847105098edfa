"""GGUF: one file with weights, dimensions, tokenizer and chat template, which llama.cpp loads as it is.

4-bit weights are Q4_0, 8-bit ones Q8_0: blocks of 32 columns, each with a float16 scale, dequantized to `code * scale`.
Our scales have at most the 8 significant bits of bfloat16 and are multiples of float16's smallest number, so both hold
them exactly.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from torch import Tensor

from exporters.gguf_vocabulary import Vocabulary
from lfm_edge.bundle.job import Artifact, ExportJob
from lfm_edge.bundle.parts import TOKENS, Value
from lfm_edge.checkpoint.config import ModelConfig
from lfm_edge.checkpoint.tokenizer import TextTokenizer
from lfm_edge.errors import ExportError
from lfm_edge.model.lowering import Weight
from lfm_edge.model.weights import Weights
from lfm_edge.quantization.tensor import QuantizedTensor

MODEL = "model.gguf"
BLOCK = gguf.GGML_QUANT_SIZES[GGMLQuantizationType.Q4_0][0]  # columns that share a scale: 32, in Q8_0 as well
_ARCHITECTURE = gguf.MODEL_ARCH.LFM2
_FORMATS = {4: GGMLQuantizationType.Q4_0, 8: GGMLQuantizationType.Q8_0}


def export(job: ExportJob, directory: Path, progress: Callable[[str], None]) -> Artifact:
    """Write `model.gguf` into `directory`. Raises ExportError where llama.cpp has no such model or tokenizer.

    4-bit weights come last. llama.cpp packs them anew for the processor, and gives up what it has mapped of the file
    before the first and behind the last tensor that it reads from there.
    """
    check_expressible(job.config)
    vocabulary = Vocabulary.of(TextTokenizer(directory), job.config)
    formats = dict(sorted(((name, tensor_format(name, weight)) for name, weight in job.weights.items()),
                          key=lambda item: item[1] is GGMLQuantizationType.Q4_0))
    progress("write the weights")
    writer = GGUFWriter(directory / MODEL, gguf.MODEL_ARCH_NAMES[_ARCHITECTURE])
    add_origin(writer, job)
    add_dimensions(writer, job.config)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    vocabulary.add_to(writer)
    write_tensors(writer, job.config, job.weights, formats)
    counts = Counter(one.name for one in formats.values())
    tokens, logits = Value("tokens", "int32", (TOKENS,)), Value("logits", "float32", (job.config.vocab_size,))
    return Artifact(MODEL, (tokens,), (logits,), {"tensors": dict(counts), "pre-tokenizer": vocabulary.pre},
                    _USAGE.replace("CONTEXT", str(job.state.context)))


def packed_weights(config: ModelConfig, weights: Weights) -> Iterator[tuple[str, bytes]]:
    """Every quantized weight, by name, as the bytes of its tensor in the file."""
    for name, weight in weights.items():
        if isinstance(weight, QuantizedTensor):
            yield name, packed(name, weight).tobytes()


_RUNS_FROM = {"lfm3": "0.8.0 (build 11960)"}


def check_expressible(config: ModelConfig) -> None:
    """Raises ExportError for a model that llama.cpp's LFM2 is not. Every published LFM2 is."""
    if config.model_type != "lfm2":
        raise ExportError(f"llama.cpp runs {config.model_type} from its version {_RUNS_FROM[config.model_type]} on; "
                          "lfm-edge writes for the one in llama-cpp-python 0.3.36, which has no such model")
    needs = {"an attention layer": bool(config.attention_layers), "a conv layer": bool(config.conv_layers),
             "convolutions without bias": not config.conv_bias, "two conv taps or more": config.conv_taps > 1,
             "heads as wide as hidden_size / num_attention_heads":
                 config.head_dim * config.num_attention_heads == config.hidden_size}
    unmet = [need for need, is_met in needs.items() if not is_met]
    if unmet:
        raise ExportError(f"llama.cpp cannot run this model: its LFM2 needs {' and '.join(unmet)}")


def add_origin(writer: GGUFWriter, job: ExportJob) -> None:
    """What the model is called, how large it is, and its licence, as llama.cpp's own converter says it."""
    name = Path(job.source).expanduser().resolve().name.replace(":", "-")
    count = job.config.num_parameters
    _, _, basename, finetune, version, size = gguf.Metadata.get_model_id_components(name, count)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(gguf.Metadata.id_to_title(name))
    writer.add_size_label(size or gguf.size_label(count, 0, 0, 0))
    if basename:
        writer.add_basename(basename)
    if finetune:
        writer.add_finetune(finetune)
    if version:
        writer.add_version(version)
    if job.licence != "unknown":
        writer.add_license(job.licence)


def add_dimensions(writer: GGUFWriter, config: ModelConfig) -> None:
    """The model's dimensions in a file's metadata. Layers without keys are llama.cpp's convolutions."""
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv([config.num_key_value_heads if layer in config.attention_layers else 0
                              for layer in range(config.num_layers)])
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_shortconv_l_cache(config.conv_taps)


# The weights


def tensor_format(name: str, weight: Weight) -> GGMLQuantizationType:
    """How a weight is stored. Raises ExportError where its scales cannot be."""
    if not isinstance(weight, QuantizedTensor):
        return GGMLQuantizationType.F32
    if weight.group_size % BLOCK:
        raise ExportError(f"{name}: {weight.group_size} columns share a scale; GGUF takes a multiple of {BLOCK}")
    if not (weight.scales.half().float() == weight.scales).all():
        raise ExportError(f"{name}: scales up to {weight.scales.max():g} do not fit GGUF's float16")
    return _FORMATS[weight.bits]


def packed(name: str, weight: Weight) -> np.ndarray:
    """A weight as it stands in the file: float32, or uint8 [rows, bytes of a row]."""
    kind = tensor_format(name, weight)
    if isinstance(weight, Tensor):
        return weight.reshape(stored_shape(weight)).numpy()
    rows, cols = weight.shape
    blocks = weight.ints.numpy().reshape(rows, cols // BLOCK, BLOCK)
    if kind is GGMLQuantizationType.Q4_0:  # columns 0 to 15 in the low halves of 16 bytes, 16 to 31 in the high ones
        codes = blocks.view(np.uint8) + np.uint8(8)
        blocks = codes[..., :BLOCK // 2] | codes[..., BLOCK // 2:] << np.uint8(4)
    scales = np.repeat(weight.scales.half().numpy(), weight.group_size // BLOCK, axis=1)
    data = np.concatenate([scales[..., None].view(np.uint8), blocks.view(np.uint8)], axis=2).reshape(rows, -1)
    weight.release()
    return data


def stored_shape(weight: Weight) -> tuple[int, ...]:
    """Its shape in the file, where conv taps [hidden, 1, taps] are [hidden, taps]."""
    shape = tuple(weight.shape)
    return (shape[0], shape[2]) if len(shape) == 3 else shape


def tensor_names(config: ModelConfig) -> dict[str, str]:
    """The checkpoint's name of each weight -> llama.cpp's."""
    names = gguf.get_tensor_name_map(_ARCHITECTURE, config.num_layers)
    return {name: names.get_name(name, try_suffixes=(".weight",)) for name in config.weight_shapes()}


def write_tensors(writer: GGUFWriter, config: ModelConfig, weights: Weights,
                  formats: dict[str, GGMLQuantizationType]) -> None:
    """Write the file, one tensor in memory at a time."""
    names = tensor_names(config)
    for name, kind in formats.items():
        shape = stored_shape(weights[name])
        columns, nbytes = gguf.GGML_QUANT_SIZES[kind]
        writer.add_tensor_info(names[name], shape, np.dtype(np.float32), math.prod(shape) // columns * nbytes,
                               raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name in formats:
        writer.write_tensor_data(packed(name, weights[name]))
    writer.close()


_USAGE = """\
## Loading it

- Python: `from lfm_edge import open_bundle; session = open_bundle(".").session()`
- llama.cpp: `llama-cli -m model.gguf`, `llama-server -m model.gguf`, `llama-bench -m model.gguf`
- llama-cpp-python: `llama_cpp.Llama("model.gguf", n_ctx=CONTEXT).create_chat_completion(messages)`
- `model.gguf` is all that llama.cpp and what builds on it read; the other files are for us and for other tools.
"""
