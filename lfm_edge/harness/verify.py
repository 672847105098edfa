"""`verify`: parity of the artifact, then quality of its weights."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lfm_edge.bundle.bundle import Bundle, weights_digest
from lfm_edge.calibration.gptq import read_windows
from lfm_edge.calibration.kv_scales import read_kv_scales
from lfm_edge.calibration.quantize import quantize_checkpoint
from lfm_edge.calibration.sample import sample_tokens, text_windows
from lfm_edge.checkpoint.checkpoint import Checkpoint, RandomCheckpoint
from lfm_edge.errors import BundleError
from lfm_edge.files import read_text
from lfm_edge.harness import parity, quality
from lfm_edge.harness.baked import baked_agreement
from lfm_edge.harness.host import provenance
from lfm_edge.harness.rounding import RoundingCheck, check_rounding
from lfm_edge.model.weights import Weights
from lfm_edge.progress import Progress
from lfm_edge.quantization.recipe import GPTQ, Recipe
from lfm_edge.session.layout import EXPLICIT
from lfm_edge.session.state import StateSpec
from lfm_edge.targets import QUALITY_KL, RANDOM_QUALITY_KL, Thresholds
from runtimes import reference as torch_runtime

SCHEMA = "lfm-edge/verify/2"
GREEDY_TOKENS = 24
# Draws of the noise: as many for every artifact, whatever it does. In float32 some more, four times as large: there an
# activation tips four times as often, and no further than one code, so that few draws find rare tips.
NOISE_DRAWS, COARSE_DRAWS, COARSE = 16, 4, 4.0
TEXT_WINDOW, TEXT_TOKENS = 512, 4096  # of a user's text; one model's logits of all of it are held at once


@dataclass(frozen=True)
class WeightCheck:
    """Whether the artifact holds the quantizer's integers and scales, bit for bit.

    blobs: packed codes and scales that were looked up; missing: those that the artifact does not have
    """

    blobs: int
    missing: list[str]

    @property
    def passed(self) -> bool:
        """Whether all are there."""
        return not self.missing


@dataclass(frozen=True)
class Verification:
    """What `verify` found.

    context: positions that its state holds; artifact_bytes, state_bytes: of its files, and of the state
    source: the checkpoint that it was made from
    remark: who computes, where that is not what computes on the device
    thresholds: the target's
    rounding: the weights against the checkpoint's
    floor: the quantized reference against itself with some roundings of noise, phase by phase
    limits: what parity must keep to, phase by phase, from the target's thresholds and the floor
    typical_error, typical_floor: the median error over all positions, of the artifact and of the noise
    skipped: phases that this bundle does not allow, with the reason
    baked: a session that starts from the baked prompt against one that prefilled it, both of the artifact
    """

    bundle: str
    target: str
    context: int
    artifact_bytes: int
    state_bytes: int
    source: str
    remark: str
    thresholds: Thresholds
    weights: WeightCheck
    rounding: RoundingCheck
    parity: list[parity.Agreement]
    floor: list[parity.Agreement]
    limits: parity.Limits
    typical_error: float
    typical_floor: float
    greedy: parity.GreedyAgreement
    quality: quality.Quality
    tasks: list[quality.TaskAccuracy]
    skipped: dict[str, str]
    baked: parity.Agreement | None = None

    @property
    def typical_passed(self) -> bool:
        """Whether the median error is within its limit. (NaN is not.)"""
        return self.typical_error <= self.limits.typical_error

    @property
    def baked_passed(self) -> bool:
        """Whether the baked prompt, if there is one, is what prefilling it gives."""
        return self.baked is None or self.baked.within(self.limits)

    @property
    def passed(self) -> bool:
        """Whether everything is within its limits."""
        return (self.weights.passed and self.rounding.passed and all(row.within(self.limits) for row in self.parity)
                and self.typical_passed and self.greedy.passed and self.baked_passed and self.quality.passed
                and all(task.passed for task in self.tasks))

    def to_dict(self, command: str = "") -> dict[str, Any]:
        """For JSON, by the schema of docs/reference/verify.md. command: that made it"""
        return {
            **provenance(SCHEMA, command), "passed": self.passed, "bundle": self.bundle, "target": self.target,
            "context": self.context, "artifact_bytes": self.artifact_bytes, "state_bytes": self.state_bytes,
            "source": self.source, "remark": self.remark, "thresholds": asdict(self.thresholds),
            "weights": {**asdict(self.weights), "passed": self.weights.passed},
            "rounding": {**asdict(self.rounding), "passed": self.rounding.passed}, "limits": asdict(self.limits),
            "parity": [{**asdict(row), "passed": row.within(self.limits)} for row in self.parity],
            "typical_error": self.typical_error, "typical_floor": self.typical_floor,
            "noise_floor": [asdict(row) for row in self.floor],
            "greedy": {**asdict(self.greedy), "passed": self.greedy.passed}, "quality": asdict(self.quality),
            "tasks": [asdict(task) for task in self.tasks], "skipped": self.skipped,
            "baked_prompt": self.baked and {**asdict(self.baked), "passed": self.baked_passed},
        }


def verify(bundle: Bundle, *, model: str | Path | None = None, threads: int | None = None, soc: str | None = None,
           tokens: int | None = None, text: str | Path | None = None, progress: Progress | None = None) -> Verification:
    """Hold a bundle against the quantized reference, and that against the float32 model.

    model: where the checkpoint is, if not where this machine exported it from
    soc: which of the chips that the bundle was compiled for
    tokens: how many to check parity on; two prefill chunks and 24 where none is given, or what the context holds
    text: a file to measure quality on; the text that parity is checked on where none is given
    Raises LfmEdgeError where the checkpoint is missing, or is not the one that was exported.
    """
    progress = progress or Progress()
    checkpoint = bundle.source(model)
    manifest, thresholds = bundle.manifest, bundle.target.thresholds
    tasks = quality.read_tasks(bundle)
    sequence = text_for(bundle, tasks, tokens)
    windows = [sequence] if text is None else _windows(bundle, Path(text))
    phases, skipped = _phases(bundle)

    progress.stage("run the artifact", len(tasks) or None)
    session = bundle.session(threads, soc)
    ours = parity.run_phases(session, sequence, phases)
    places = parity.places(session, sequence, phases)
    prompt = sequence[:max(1, len(sequence) - GREEDY_TOKENS)][:64]
    answer = parity.greedy_tokens(session, prompt, min(GREEDY_TOKENS, manifest.state.context - len(prompt)))
    our_answers = quality.right_answers(session, bundle, tasks, progress.advance)
    baked = baked_agreement(session, bundle, sequence) if bundle.baked_prompt else None
    arithmetic, remark = session.arithmetic, session.remark
    del session

    progress.stage("quantize the reference", len(checkpoint.names))
    weights = quantized_weights(bundle, checkpoint, progress)
    progress.stage("hold the weights against the checkpoint", len(checkpoint.names))
    rounding = check_rounding(checkpoint, weights, manifest.recipe.rounding, progress.advance)
    progress.stage("look the weights up in the artifact")
    found = _check_weights(bundle, weights)
    progress.stage("run the quantized reference")
    reference = quantized_reference(bundle, weights)
    del weights
    logits = reference.score(sequence)
    quantized_logits = [logits] if text is None else [reference.score(window) for window in windows]
    followed = parity.follow(reference, prompt, answer)
    agreements, typical = parity.compare_all(ours, _at(places, logits))
    progress.stage("measure its noise floor", len(_noise_sizes(arithmetic)))
    floor, typical_floor = _noise_floor(reference, arithmetic, sequence, logits, places, progress)
    limits = parity.Limits.of(thresholds, floor, typical_floor)
    del reference, logits

    progress.stage("run the float32 model", len(tasks) or None)
    exact = torch_runtime.ReferenceSession(manifest.config, torch_runtime.float_weights(checkpoint),
                                           StateSpec.of(manifest.config, manifest.state.context))
    cost = quality.compare(windows, map(exact.score, windows), quantized_logits,
                           _quality_limit(checkpoint, manifest.recipe))
    answers = quality.right_answers(exact, bundle, tasks, progress.advance)
    return Verification(
        str(bundle.directory), manifest.target, manifest.state.context, bundle.artifact_bytes, manifest.state.nbytes,
        manifest.source, remark, thresholds, found, rounding,
        agreements, floor, limits, typical, typical_floor, parity.judge_greedy(answer, followed, limits), cost,
        quality.compare_tasks(answers, our_answers, thresholds.task_drop), skipped, baked)


def _quality_limit(checkpoint: Checkpoint, recipe: Recipe) -> float:
    """What quantization may cost this model, in nats."""
    limits = RANDOM_QUALITY_KL if isinstance(checkpoint, RandomCheckpoint) else QUALITY_KL
    return limits[min(scheme.bits for scheme in (recipe.body, recipe.head, *recipe.mixed.values()))]


def _at(places: dict[str, list[int]], logits: Any) -> dict[str, Any]:
    """The logits that each phase tells, of those of every token of the text."""
    return {phase: logits[rows] for phase, rows in places.items()}


def _noise_sizes(arithmetic: str) -> list[float]:
    """How large each draw of the noise is, in roundings of the arithmetic."""
    return [1.0] * NOISE_DRAWS + [COARSE] * (COARSE_DRAWS if arithmetic == "float32" else 0)


def _noise_floor(reference: Any, arithmetic: str, sequence: Sequence[int], logits: Any, places: dict[str, list[int]],
                 progress: Progress) -> tuple[list[parity.Agreement], float]:
    """The reference against itself with some roundings of noise: the worst of all draws, of each phase and the median.

    logits: its own without noise, of every token of the text, float32 [tokens, vocab]
    A draw is one reading of the text: no phase calls for another, as each compares logits at places of this text. The
    coarse ones do not count for the median, which is to stay small where only some positions tip.
    """
    draws, typicals = [], []
    for seed, size in enumerate(_noise_sizes(arithmetic)):
        reference.jitter(seed, arithmetic, size)
        rows, typical = parity.compare_all(_at(places, reference.score(sequence)), _at(places, logits))
        draws.append(rows)
        typicals += [typical] if size == 1.0 else []
        progress.advance()
    return [parity.worst(of_phase) for of_phase in zip(*draws, strict=True)], max(typicals)


def quantized_weights(bundle: Bundle, checkpoint: Checkpoint, progress: Progress | None = None) -> dict[str, Any]:
    """The bundle's weights, quantized again from its checkpoint, and the constant scales of its caches.

    Raises BundleError where they are not those that were exported.
    """
    progress, manifest = progress or Progress(), bundle.manifest
    calibration = read_windows(bundle.directory, manifest.config) if manifest.recipe.rounding == GPTQ else None
    weights = quantize_checkpoint(checkpoint, manifest.recipe, lambda _: progress.advance(), calibration)
    _check_same_weights(bundle, weights)
    return weights | (read_kv_scales(bundle.directory) if manifest.state.needs_kv_scales else {})


def quantized_reference(bundle: Bundle, weights: Weights) -> Any:
    """A session of the reference over these weights, in the bundle's state and with its target's roundings."""
    manifest = bundle.manifest
    return torch_runtime.ReferenceSession(manifest.config, weights, manifest.state.for_reference(manifest.config),
                                          activations=manifest.recipe.activations)


def _check_same_weights(bundle: Bundle, weights: Weights) -> None:
    if weights_digest(weights) != bundle.manifest.weights_sha256:
        raise BundleError(f"{bundle.directory}: was quantized by another version of lfm-edge "
                          f"({bundle.manifest.versions.get('lfm-edge')}); export it again to verify it")


def _check_weights(bundle: Bundle, weights: Weights) -> WeightCheck:
    stored = bundle.runtime.module().stored_constants(bundle)
    expected = [(name, hashlib.sha256(data).digest())
                for name, data in bundle.target.exporter().packed_weights(bundle.manifest.config, weights)]
    return WeightCheck(len(expected), [name for name, digest in expected if digest not in stored])


def text_for(bundle: Bundle, tasks: list[dict[str, Any]], length: int | None = None) -> list[int]:
    """A text longer than two chunks, as far as the context allows it: the bundle's own tasks, or the built-in one.

    A model far from what it was trained on is far more sensitive to rounding than in its use.
    """
    manifest, tokenizer = bundle.manifest, bundle.tokenizer()
    count = min(length or 2 * manifest.options.prefill_chunk + 24, manifest.state.context)
    tokens: list[int] = []
    for task in tasks:
        if len(tokens) >= count:
            break
        answer = tokenizer.encode(task["answer"], special=False)
        tokens += [*tokenizer.chat(task["messages"]), *answer, *manifest.config.eos_token_ids[:1]]
    return tokens[:count] if len(tokens) >= count else sample_tokens(tokenizer, manifest.config.vocab_size, count)


def _windows(bundle: Bundle, path: Path) -> list[list[int]]:
    """The beginning of a text of the user's, in windows that each start anew."""
    manifest = bundle.manifest
    return text_windows(bundle.tokenizer(), manifest.config.vocab_size, read_text(path),
                        min(TEXT_WINDOW, manifest.state.context), TEXT_TOKENS)


def _phases(bundle: Bundle) -> tuple[list[str], dict[str, str]]:
    """Those of what the bundle can do, and what it was told not to be able to do, with the reason."""
    scored = bundle.manifest.decoder.scored
    phases = [phase for phase in parity.PHASES if scored > 1 or phase not in parity.NEEDS_SCORES]
    if bundle.manifest.options.state == EXPLICIT:
        return phases, {}
    reason = "the state is inside the program (--state internal): it cannot be snapshotted"
    return ([phase for phase in phases if phase not in parity.NEEDS_SNAPSHOT],
            dict.fromkeys(parity.NEEDS_SNAPSHOT, reason))
