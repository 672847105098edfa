"""ExecuTorch's own export of LFM2, `executorch.extension.llm.export.export_llm`, by the recipe of its example."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from lfm_edge.bundle.manifest import Manifest
from lfm_edge.checkpoint.config import ModelConfig
from lfm_edge.errors import LfmEdgeError
from lfm_edge.files import read_json_object
from lfm_edge.harness.peers.peer import (
    POSITION_ONLY,
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
from lfm_edge.targets import target_named

_PROGRAM, _WEIGHTS, _PARAMS = "model.pte", "weights.pth", "params.json"
_TAPS = 3  # of its convolutions, whatever the model has
_MODEL_CLASS = "lfm2_1_2b"  # the dimensions are given beside it, so this says only that it is an LFM2


class ExportLlm(Peer):
    """8-bit dynamic activations, 4-bit weights. It has no 8-bit recipe, and no other bits for the head."""

    name = "export_llm"
    packages = (("executorch", "executorch"), ("torchao", "torchao"), ("hydra", "hydra-core"))
    extra = "executorch"
    filling = POSITION_ONLY

    def arguments(self, manifest: Manifest) -> Arguments:
        config = manifest.config
        if manifest.recipe.body.bits != 4:
            raise LfmEdgeError(f"--against {self.name}: it has no 8-bit recipe to hold beside {manifest.target}")
        refuse_biases(self.name, config)
        if config.conv_taps != _TAPS or not config.tie_embedding:
            raise LfmEdgeError(f"--against {self.name}: it knows LFM2 with {_TAPS} conv taps and a tied head only")
        context, groups = manifest.state.context, group_size(manifest)
        return {"base.model_class": _MODEL_CLASS, "model.use_kv_cache": "true",
                "model.use_sdpa_with_kv_cache": "true", "model.dtype_override": "fp32",
                "quantization.qmode": "8da4w", "quantization.group_size": str(groups),
                "quantization.embedding_quantize": f"'4,{groups}'", "backend.xnnpack.enabled": "true",
                "backend.xnnpack.extended_ops": "true", "export.max_seq_length": str(context),
                "export.max_context_length": str(context)}

    def build(self, checkpoint: Path, artifact: Path, arguments: Arguments) -> None:
        from executorch.examples.models.lfm2.convert_weights import convert_weights

        os.environ["HYDRA_FULL_ERROR"] = "1"  # or the last line of an error is a hint about this variable
        config = ModelConfig.from_dict(read_json_object(checkpoint / "config.json", LfmEdgeError))
        convert_weights(str(checkpoint), _WEIGHTS)
        Path(_PARAMS).write_text(json.dumps(_params(config)))
        begin = {} if config.bos_token_id is None else {"get_bos_id": config.bos_token_id}
        metadata = json.dumps({**begin, "get_eos_ids": list(config.eos_token_ids)})
        told = {**arguments, "base.checkpoint": _WEIGHTS, "base.params": _PARAMS, "base.metadata": f"'{metadata}'",
                "export.output_name": _PROGRAM, "hydra.run.dir": ".", "hydra.output_subdir": "null"}
        run_module("executorch.extension.llm.export.export_llm", *(f"{name}={value}" for name, value in told.items()))
        artifact.mkdir()
        Path(_PROGRAM).rename(artifact / _PROGRAM)

    def traits(self, built: Built) -> Traits:
        groups = built.arguments["quantization.group_size"]
        scheme = f"4 bits in groups of {groups}"
        return {"linear layers": scheme, "head": scheme, "embedding": scheme, "activations": "int8 rows",
                "computes in": "float32", "KV cache": "float32", "step of prefill": WHOLE_PROMPT,
                "rounding": "HQQ (its default)"}

    def import_runtime(self) -> None:
        _runtime()

    def open_session(self, built: Built, threads: int | None, chunk: int) -> Session:
        session = ExportLlmSession(self.state(built), built.config.vocab_size, chunk)
        session.forward = _runtime().load_forward(built.artifact / _PROGRAM, threads)
        return session


class ExportLlmSession(PeerSession):
    """The state is in the program. Its conv state is never cleared: only the first conversation of a session is right.

    That is how its own runner has it, and costs nothing in time.
    """

    forward: Any

    def _room(self) -> int:
        return self.spec.context - 1  # one less than max_seq_length, or its input is refused

    def _step(self, tokens: list[int]) -> Logits:
        logits, = self.forward.call([torch.tensor([tokens]), torch.tensor([self.position])], clone_outputs=False)
        return logits.flatten().clone().numpy()


def _params(config: ModelConfig) -> dict[str, Any]:
    """The model's dimensions in the words of its `ModelArgs`."""
    return {"dim": config.hidden_size, "hidden_dim": config.intermediate_size, "n_heads": config.num_attention_heads,
            "n_kv_heads": config.num_key_value_heads, "head_dim": config.head_dim, "n_layers": config.num_layers,
            "vocab_size": config.vocab_size, "layer_types": list(config.layer_types), "norm_eps": config.norm_eps,
            "rope_theta": config.rope_theta, "use_scaled_rope": False, "use_hf_rope": True, "use_qk_norm": True,
            "qk_norm_before_rope": True}


def _runtime() -> Any:
    """Our own binding of ExecuTorch: the same for its programs as for ours."""
    return target_named("android-q4").runtime.module()
