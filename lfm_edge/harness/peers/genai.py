"""onnxruntime-genai: its own model builder, and its Generator."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from lfm_edge.bundle.manifest import Manifest
from lfm_edge.checkpoint.config import ModelConfig
from lfm_edge.errors import LfmEdgeError
from lfm_edge.harness.peers.peer import (
    COMPUTED,
    WHOLE_PROMPT,
    Arguments,
    Built,
    Peer,
    PeerSession,
    Traits,
    group_size,
    refuse_biases,
    run_module,
)
from lfm_edge.session.session import Logits, Session
from lfm_edge.session.state import StateSpec


class OnnxRuntimeGenai(Peer):
    """int4 or int8 blocks, int8 activations. What its builder can do for speed and size is asked of it.

    That is: no logits but the last token's, one table for a tied embedding and head.
    """

    name = "onnxruntime-genai"
    packages = (("onnxruntime_genai", "onnxruntime-genai"), ("onnxruntime", "onnxruntime"), ("onnx_ir", "onnx-ir"),
                ("transformers", "transformers"))
    filling = COMPUTED

    def arguments(self, manifest: Manifest) -> Arguments:
        refuse_biases(self.name, manifest.config)
        if not manifest.config.attention_layers or manifest.config.conv_taps < 2:
            raise LfmEdgeError(f"--against {self.name}: it runs no LFM2 without attention layers or with one conv tap")
        bits, head, tied = manifest.recipe.body.bits, manifest.recipe.head.bits, manifest.config.tie_embedding
        options = {"accuracy_level": "4", "block_size": str(group_size(manifest)), "is_symmetric": "true",
                   "algo_config": "rtn", "prune_lm_head": "true", "hf_token": "false"}
        if head != bits:
            options["matmul_mixed_precision"] = f"last_matmul:int{head}"
        if bits == 4:
            options |= {"op_types_to_quantize": "MatMul/Gather"} | ({"shared_embeddings": "true"} if tied else {})
        return {"precision": f"int{bits}", "context": manifest.state.context, "extra_options": options}

    def build(self, checkpoint: Path, artifact: Path, arguments: Arguments) -> None:
        options = [f"{name}={value}" for name, value in arguments["extra_options"].items()]
        run_module("onnxruntime_genai.models.builder", "-i", str(checkpoint), "-o", str(artifact), "-e", "cpu",
                   "-p", arguments["precision"], "-c", "cache", "--extra_options", *options)

    def traits(self, built: Built) -> Traits:
        options, bits = built.arguments["extra_options"], built.arguments["precision"].removeprefix("int")
        blocks = f"bits in groups of {options['block_size']}"
        head = options.get("matmul_mixed_precision", bits).removeprefix("last_matmul:int")
        table = f"{head if 'shared_embeddings' in options else 4} {blocks}" if bits == "4" else "float32"
        return {"linear layers": f"{bits} {blocks}", "head": f"{head} {blocks}", "embedding": table,
                "activations": "int8 blocks", "computes in": "float32", "KV cache": "float32",
                "step of prefill": WHOLE_PROMPT, "rounding": "nearest"}

    def import_runtime(self) -> None:
        _library()

    def open_session(self, built: Built, threads: int | None, chunk: int) -> Session:
        config = _library().Config(str(built.artifact))
        if threads is not None:
            config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
        return GenaiSession(_library().Model(config), self.state(built), built.config, chunk)


class GenaiSession(PeerSession):
    """The state is in a Generator, which goes forward only: every other way begins anew and computes."""

    def __init__(self, model: Any, spec: StateSpec, config: ModelConfig, chunk: int) -> None:
        super().__init__(spec, config.vocab_size, chunk)
        self.model = model
        self._begin()

    def _begin(self) -> None:
        self.generator = None  # frees the old state before there is a new one
        parameters = _library().GeneratorParams(self.model)
        parameters.set_search_options(max_length=self.spec.context, do_sample=False)
        self.generator = _library().Generator(self.model, parameters)

    def _empty(self) -> None:
        self._begin()

    def stand_at(self, position: int) -> None:
        """Go there by computing what was taken so far, from its beginning, again and again."""
        known = self.tokens or [0]
        if position < self.position:
            self.reset()
        while self.position < position:
            start, count = self.position, min(self.chunk, position - self.position)
            self.prefill([known[index % len(known)] for index in range(start, start + count)])

    def _step(self, tokens: list[int]) -> Logits:
        self.generator.append_tokens(np.array(tokens, np.int32))
        return self.generator.get_logits()[0, -1].copy()


def _library() -> Any:
    """onnxruntime-genai, imported where it is first needed."""
    import onnxruntime_genai

    return onnxruntime_genai
