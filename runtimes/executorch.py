"""Sessions over a `.pte`, by the runtime that the executorch wheel ships."""

from __future__ import annotations

import hashlib
from pathlib import Path

import executorch.extension.llm.custom_ops.custom_ops
import executorch.kernels.quantized  # noqa: F401 - registers the quantized embeddings
import numpy as np
import torch
from executorch.exir._serialize._program import deserialize_pte_binary
from executorch.extension.pybindings import portable_lib
from numpy.typing import NDArray

from lfm_edge.backends.mapped import MappedPages, loading
from lfm_edge.bundle.bundle import Bundle
from lfm_edge.errors import BundleError
from lfm_edge.progress import native_messages_hidden
from lfm_edge.session.layout import INTERNAL
from lfm_edge.session.session import Logits, Session


def open_session(bundle: Bundle, threads: int | None = None) -> Session:
    """A session over the bundle's program. threads: of the runtime's pool, which the process shares"""
    with loading(bundle.artifact) as others:
        forward = load_forward(bundle.artifact, threads)
        table = MappedPages.of(bundle.artifact, but=others).if_worth_forgetting
    table.unlock()  # ExecuTorch's loader locks constants where the process may lock memory
    table.forget()
    manifest = bundle.manifest
    held = () if manifest.options.state == INTERNAL else manifest.state.tensors
    session = ExecutorchSession(manifest.state, manifest.config.vocab_size, manifest.options.prefill_chunk, held)
    session.forward, session.scored, session.table = forward, manifest.decoder.scored, table
    return session


def load_forward(path: Path, threads: int | None = None) -> portable_lib.ExecuTorchMethod:
    """The program's `forward`, weights packed. Raises BundleError where ExecuTorch cannot load it."""
    try:
        with native_messages_hidden():
            if threads is not None:
                portable_lib._unsafe_reset_threadpool(threads)
            portable_lib._threadpool_get_thread_count()  # starts the pool, which prints about the processor
            program = portable_lib._load_program(
                str(path), program_verification=portable_lib.Verification.InternalConsistency)
            return program.load_method("forward")
    except RuntimeError as error:
        raise BundleError(f"{path}: ExecuTorch cannot load it ({error})") from None


def stored_constants(bundle: Bundle) -> set[bytes]:
    """SHA-256 of every constant in the bundle's program, of the delegates and of the operators outside them."""
    try:
        program = deserialize_pte_binary(bundle.artifact.read_bytes())
    except Exception as error:  # flatbuffers and struct raise what they like on damaged files
        raise BundleError(f"{bundle.artifact}: not a readable ExecuTorch program ({error})") from None
    named = program.named_data.buffers if program.named_data else []
    constants = [buffer.storage for buffer in program.program.constant_buffer]
    return {hashlib.sha256(data).digest() for data in (*named, *constants)}


class ExecutorchSession(Session):
    """The state is ours, and the program changes it where it lies; or it is the program's own.

    table: what stays mapped of the program, its embedding, let go of after each step where it is large; a lookup maps
        what lies around its row as well
    """

    forward: portable_lib.ExecuTorchMethod
    table: MappedPages

    def _step(self, tokens: list[int]) -> Logits:
        return self._scored_step(tokens, 1)[0]

    def _scored_step(self, tokens: list[int], count: int) -> NDArray[np.float32]:
        inputs = [torch.tensor([tokens]), torch.tensor([self.position]), *self.state]
        logits, = self.forward.call(inputs, clone_outputs=False)
        self.table.forget()
        return logits[0, -count:].clone().numpy()
