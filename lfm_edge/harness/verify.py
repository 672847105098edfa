"""`verify`: parity of the artifact, then quality of its weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lfm_edge.bundle import Bundle, weights_digest
from lfm_edge.checkpoint import Checkpoint, open_checkpoint
from lfm_edge.errors import BundleError
from lfm_edge.harness import parity, quality
from lfm_edge.harness.sample import sample_tokens
from lfm_edge.model.weights import Weights
from lfm_edge.progress import Progress
from lfm_edge.quantization.rounding import quantize_checkpoint
from lfm_edge.session import Session
from lfm_edge.state import StateSpec
from lfm_edge.targets import reference_runtime

GREEDY_TOKENS = 24


@dataclass(frozen=True)
class Verification:
    """What `verify` found.

    greedy_match: tokens of a greedy answer that artifact and quantized reference share, of `greedy_tokens`
    skipped: phases that this bundle does not allow, with the reason
    """

    target: str
    parity: list[parity.Agreement]
    greedy_match: int
    greedy_tokens: int
    quality: quality.Quality
    tasks: list[quality.TaskAccuracy]
    skipped: dict[str, str]

    @property
    def greedy_passed(self) -> bool:
        """Whether the artifact answers token by token as the reference does."""
        return self.greedy_match == self.greedy_tokens

    @property
    def passed(self) -> bool:
        """Whether everything is within the target's thresholds."""
        return (all(row.passed for row in (*self.parity, *self.tasks)) and self.quality.passed and self.greedy_passed)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "target": self.target, "passed": self.passed,
            "parity": [row.to_dict() for row in self.parity],
            "greedy": {"match": self.greedy_match, "tokens": self.greedy_tokens, "passed": self.greedy_passed},
            "quality": self.quality.to_dict(), "tasks": [row.to_dict() for row in self.tasks], "skipped": self.skipped,
        }


def verify(bundle: Bundle, *, model: str | Path | None = None, threads: int | None = None,
           progress: Progress | None = None) -> Verification:
    """Hold a bundle against the quantized reference, and that against the float32 model.

    model: where the checkpoint is now, if not where the manifest says
    Raises LfmEdgeError where the checkpoint is missing, or is not the one that was exported.
    """
    progress = progress or Progress()
    checkpoint = _source(bundle, model)
    manifest, limits = bundle.manifest, bundle.target.thresholds
    tokens = _tokens(bundle)
    tasks = quality.read_tasks(bundle)
    phases, skipped = _phases(bundle)

    progress.stage("run the artifact", len(tasks) or None)
    session = bundle.session(threads)
    ours = parity.run_phases(session, tokens, phases)
    our_greedy = _greedy(session, tokens)
    our_answers = quality.right_answers(session, bundle, tasks, progress.advance)
    del session

    progress.stage("quantize the reference", len(checkpoint.names))
    weights = quantize_checkpoint(checkpoint, manifest.recipe, lambda _: progress.advance())
    _check_same_weights(bundle, weights)
    progress.stage("run the quantized reference")
    torch_runtime = reference_runtime()
    reference = torch_runtime.ReferenceSession(manifest.config, weights, manifest.state,
                                               int8_activations=manifest.recipe.int8_activations)
    del weights
    theirs = parity.run_phases(reference, tokens, phases)
    their_greedy = _greedy(reference, tokens)
    quantized_logits = reference.score(tokens)
    del reference

    progress.stage("run the float32 model", len(tasks) or None)
    exact = torch_runtime.ReferenceSession(manifest.config, torch_runtime.float_weights(checkpoint),
                                           StateSpec.of(manifest.config, manifest.state.context))
    cost = quality.compare(tokens, exact.score(tokens), quantized_logits, limits.quality_kl)
    answers = quality.right_answers(exact, bundle, tasks, progress.advance)
    return Verification(
        manifest.target, [parity.compare(phase, ours[phase], theirs[phase], limits) for phase in phases],
        _common_prefix(our_greedy, their_greedy), len(their_greedy), cost,
        quality.compare_tasks(answers, our_answers, limits.task_drop), skipped)


def _source(bundle: Bundle, model: str | Path | None) -> Checkpoint:
    checkpoint = open_checkpoint(model or bundle.manifest.source)
    if checkpoint.digest() != bundle.manifest.source_sha256:
        raise BundleError(f"{checkpoint.source}: not the checkpoint that {bundle.directory} was exported from "
                          "(SHA-256 differs); give the right one with --model")
    return checkpoint


def _check_same_weights(bundle: Bundle, weights: Weights) -> None:
    if weights_digest(weights) != bundle.manifest.weights_sha256:
        raise BundleError(f"{bundle.directory}: was quantized by another version of lfm-edge "
                          f"({bundle.manifest.versions.get('lfm-edge')}); export it again to verify it")


def _tokens(bundle: Bundle) -> list[int]:
    """A text longer than two chunks, as far as the context allows it."""
    manifest = bundle.manifest
    count = min(2 * manifest.prefill_chunk + 24, manifest.state.context - 1)
    return sample_tokens(bundle.tokenizer(), manifest.config.vocab_size, count)


def _phases(bundle: Bundle) -> tuple[list[str], dict[str, str]]:
    if bundle.manifest.state_mode == "explicit":
        return list(parity.PHASES), {}
    reason = "the state is inside the program (--state internal): it cannot be snapshotted"
    return ([phase for phase in parity.PHASES if phase not in parity.NEEDS_SNAPSHOT],
            dict.fromkeys(parity.NEEDS_SNAPSHOT, reason))


def _greedy(session: Session, tokens: list[int]) -> list[int]:
    prompt = tokens[:max(1, min(len(tokens), session.spec.context) - GREEDY_TOKENS)][:64]
    return parity.greedy_tokens(session, prompt, GREEDY_TOKENS)


def _common_prefix(ours: list[int], theirs: list[int]) -> int:
    length = 0
    for a, b in zip(ours, theirs, strict=False):
        if a != b:
            break
        length += 1
    return length
