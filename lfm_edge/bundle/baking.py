"""A baked prompt: the system prompt, prefilled at export, whose state the bundle ships as a saved session."""

from __future__ import annotations

import gc
from dataclasses import dataclass, replace
from pathlib import Path

from lfm_edge.bundle.bundle import Bundle
from lfm_edge.bundle.manifest import BakedPrompt, Manifest
from lfm_edge.checkpoint.tokenizer import TextTokenizer
from lfm_edge.errors import ExportError, LfmEdgeError
from lfm_edge.files import read_text
from lfm_edge.progress import Progress
from lfm_edge.session.saved import Message

BAKED_PROMPT_FILE = "baked_prompt.safetensors"


@dataclass(frozen=True)
class SystemPrompt:
    """messages: the system message alone; tokens: what the chat template makes of it, no turn begun after it"""

    messages: tuple[Message, ...]
    tokens: tuple[int, ...]

    @classmethod
    def of(cls, file: Path, tokenizer: TextTokenizer, context: int) -> SystemPrompt:
        """Read a UTF-8 text file. Line breaks at its end are not part of the message.

        Raises ExportError where it is missing, empty, not text, or too long for the context, or where the chat
        template cannot begin every conversation with it.
        """
        try:
            content = read_text(file)
        except LfmEdgeError as error:
            raise ExportError(f"--bake-prompt {error}") from None
        messages: list[Message] = [{"role": "system", "content": content.rstrip("\n")}]
        try:
            tokens = tokenizer.chat(messages, answer=False)
            asked = tokenizer.chat([*messages, {"role": "user", "content": "."}])
            plain = tokenizer.chat([{"role": "user", "content": "."}])
        except LfmEdgeError as error:
            raise ExportError(f"--bake-prompt {file}: {error}") from None
        if not tokens or asked[:len(tokens)] != tokens or asked == plain:
            raise ExportError(f"--bake-prompt {file}: the chat template does not put a system message of its own "
                              "before what the user says")
        if len(tokens) >= context:
            raise ExportError(f"--bake-prompt {file}: {len(tokens)} tokens leave no room in a context of {context}")
        return cls(tuple(messages), tuple(tokens))


def bake(directory: Path, manifest: Manifest, prompt: SystemPrompt, progress: Progress) -> Manifest:
    """Let the bundle in `directory` prefill the prompt, and put its state there; the manifest that tells of it.

    The bundle is sealed for that: its runtime may keep things under the hash of the artifact. Raises ExportError
    where the runtime cannot run it on this machine.
    """
    manifest.write(directory)
    bundle = Bundle.open(directory, check=False)
    try:
        session = bundle.session()
    except LfmEdgeError as error:
        raise ExportError(f"--bake-prompt: this machine cannot run the bundle ({error})") from None
    for start in range(0, len(prompt.tokens), session.chunk):
        session.prefill(prompt.tokens[start:start + session.chunk])
        progress.advance()
    session.save(directory / BAKED_PROMPT_FILE, prompt.messages)
    del session
    gc.collect()  # nothing of a bundle is open when it is sealed and renamed
    return replace(manifest, baked_prompt=BakedPrompt(BAKED_PROMPT_FILE, len(prompt.tokens)))
