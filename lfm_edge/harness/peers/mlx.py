"""mlx-lm: its own conversion, and its model over its own cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from lfm_edge.bundle.manifest import Manifest
from lfm_edge.errors import LfmEdgeError
from lfm_edge.harness.peers.peer import REPEATED, Arguments, Built, Peer, PeerSession, Traits, group_size
from lfm_edge.session.session import Logits, Session
from lfm_edge.session.state import StateSpec

_EMBEDDING = "model.embed_tokens"
_STEP = 2048  # tokens of a step of prefill, as in its generate_step
_TYPES = ("float16", "bfloat16", "float32")


class MlxLm(Peer):
    """Affine groups, as MLX has no others; weight-only, computed in the type of an MLX bundle or in bfloat16."""

    name = "mlx-lm"
    packages = (("mlx_lm", "mlx-lm"), ("mlx", "mlx"), ("transformers", "transformers"))
    measured_on = ("darwin",)
    takes_threads = False
    filling = REPEATED

    def arguments(self, manifest: Manifest) -> Arguments:
        if not manifest.config.tie_embedding:
            raise LfmEdgeError(f"--against {self.name}: it knows LFM2 with a tied head only")
        dtype = manifest.options.compute_dtype if manifest.target.startswith("mlx") else "bfloat16"
        return {"q_bits": manifest.recipe.body.bits, "q_group_size": group_size(manifest),
                "head_bits": manifest.recipe.head.bits, "dtype": dtype, "context": manifest.state.context}

    def build(self, checkpoint: Path, artifact: Path, arguments: Arguments) -> None:
        from mlx_lm import convert

        groups, head = arguments["q_group_size"], arguments["head_bits"]

        def bits_of(path: str, _: Any) -> bool | dict[str, Any]:
            """What is said of the head differs from what is said of all."""
            return {"group_size": groups, "bits": head} if path == _EMBEDDING and head != arguments["q_bits"] else True

        convert(str(checkpoint), str(artifact), quantize=True, q_bits=arguments["q_bits"], q_group_size=groups,
                dtype=arguments["dtype"], quant_predicate=bits_of, trust_remote_code=False)

    def traits(self, built: Built) -> Traits:
        told = built.arguments
        groups = f"bits in groups of {told['q_group_size']}"
        head = f"{told['head_bits']} {groups}"
        return {"linear layers": f"{told['q_bits']} {groups}", "head": head, "embedding": head,
                "activations": "float", "computes in": told["dtype"], "KV cache": told["dtype"],
                "step of prefill": f"{_STEP} tokens", "rounding": "nearest, zero points"}

    def state(self, built: Built) -> StateSpec:
        dtype = built.arguments["dtype"]
        return StateSpec.of(built.config, built.config.max_position_embeddings, dtype, conv_dtype=dtype)

    def import_runtime(self) -> None:
        import mlx_lm  # noqa: F401

    def open_session(self, built: Built, threads: int | None, chunk: int) -> Session:
        from mlx_lm import load

        model, _ = load(str(built.artifact), tokenizer_config={"trust_remote_code": False})
        return MlxLmSession(model, self.state(built), built.config.vocab_size, chunk)


class MlxLmSession(PeerSession):
    """The state is a list of mlx-lm's own caches, a layer each."""

    def __init__(self, model: Any, spec: StateSpec, vocab_size: int, chunk: int) -> None:
        super().__init__(spec, vocab_size, chunk)
        self.model = model
        self.caches = model.make_cache()

    def _empty(self) -> None:
        self.caches = self.model.make_cache()

    def _room(self) -> int:
        return _STEP

    def stand_at(self, position: int) -> None:
        """Go there; on the way back the rows from there on are cut off."""
        if position < self.position:
            self._repeat_rows(position)
        super().stand_at(position)

    def _repeat_rows(self, position: int) -> None:
        import mlx.core as mx

        if not self.position:
            self._step([0])
        rows = mx.arange(position) % max(self.position, 1)
        for cache in self.caches:
            if hasattr(cache, "offset"):  # of attention; a convolution's has no position
                keys, values = (mx.take(part, rows, axis=2) for part in cache.state[:2])
                cache.state = (keys, values, position)
        self._compute()

    def _step(self, tokens: list[int]) -> Logits:
        import mlx.core as mx

        if len(tokens) > 1:  # as its generate_step does: logits that nobody asks for are not computed
            self.model(mx.array([tokens[:-1]]), cache=self.caches)
            self._compute()
        logits = self.model(mx.array([tokens[-1:]]), cache=self.caches)[0, -1].astype(mx.float32)
        self._compute(logits)
        return np.array(logits)

    def _compute(self, *wanted: Any) -> None:
        import mlx.core as mx

        mx.eval(*wanted, [cache.state for cache in self.caches])
