"""Quality: what quantization costs, the quantized reference against the float32 model.

Where the checkpoint ships `tasks.json` (prompts with one right answer), the artifact itself is asked too.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lfm_edge.bundle.bundle import Bundle
from lfm_edge.calibration import sample
from lfm_edge.checkpoint.checkpoint import TASKS_FILE
from lfm_edge.harness.parity import kl_divergence
from lfm_edge.session.generation import generate
from lfm_edge.session.scoring import log_softmax
from lfm_edge.session.session import Session


@dataclass(frozen=True)
class Quality:
    """What quantization costs on a text.

    float_perplexity, perplexity: of the float32 model and of the quantized reference
    kl_divergence: mean KL(float32 || quantized) in nats; limit: the most that it may be
    top1_agreement: share of positions whose best token is the same
    """

    positions: int
    float_perplexity: float
    perplexity: float
    kl_divergence: float
    top1_agreement: float
    limit: float
    passed: bool


@dataclass(frozen=True)
class TaskAccuracy:
    """Share of a task's prompts answered exactly, by the float32 model and by the artifact."""

    task: str
    prompts: int
    float_accuracy: float
    accuracy: float
    passed: bool


def compare(windows: Sequence[Sequence[int]], exact: Iterable[np.ndarray], quantized: Iterable[np.ndarray],
            limit: float) -> Quality:
    """Hold the quantized reference against the float32 model on texts.

    exact, quantized: float32 [len(window), vocab] of each window; limit: largest mean KL divergence in nats
    """
    rows = [_compare(*texts) for texts in zip(windows, exact, quantized, strict=True)]
    float_loss, loss, divergences, same = (np.concatenate(part) for part in zip(*rows, strict=True))
    divergence = float(divergences.mean())
    return Quality(len(divergences), float(np.exp(float_loss.mean())), float(np.exp(loss.mean())), divergence,
                   float(same.mean()), limit, divergence <= limit)


def _compare(tokens: Sequence[int], exact: np.ndarray, quantized: np.ndarray) -> tuple[np.ndarray, ...]:
    """Of each position of one text: the losses of both on the next token, KL divergence, whether the best agree."""
    following = np.array(tokens[1:])
    rows = np.arange(len(following))
    float_loss, loss = (-log_softmax(logits[:-1])[rows, following] for logits in (exact, quantized))
    return float_loss, loss, kl_divergence(exact, quantized), exact.argmax(-1) == quantized.argmax(-1)


def read_tasks(bundle: Bundle) -> list[dict[str, Any]]:
    """The prompts that the checkpoint ships, without those that do not fit the bundle's context with their answers."""
    tasks = sample.read_tasks(bundle.directory) if TASKS_FILE in bundle.manifest.files else []
    tokenizer, context = bundle.tokenizer(), bundle.manifest.state.context

    def length(task: dict[str, Any]) -> int:
        return len(tokenizer.chat(task["messages"])) + len(tokenizer.encode(task["answer"], special=False)) + 1

    return [task for task in tasks if length(task) <= context]


def right_answers(session: Session, bundle: Bundle, tasks: Sequence[dict[str, Any]],
                  done: Callable[[], None] = lambda: None) -> dict[str, list[bool]]:
    """Which prompts a session answers exactly under greedy decoding, task by task."""
    tokenizer = bundle.tokenizer()
    right: dict[str, list[bool]] = defaultdict(list)
    for task in tasks:
        session.reset()
        room = len(tokenizer.encode(task["answer"], special=False)) + 1
        answer = generate(session, tokenizer.chat(task["messages"]), max_tokens=room,
                          stop=bundle.manifest.config.eos_token_ids)
        right[task["task"]].append(tokenizer.decode(list(answer)) == task["answer"])
        done()
    return dict(right)


def compare_tasks(exact: dict[str, list[bool]], artifact: dict[str, list[bool]], drop: float) -> list[TaskAccuracy]:
    """Accuracy of both, task by task; passed where the artifact loses at most `drop`."""
    rows = []
    for task, answers in exact.items():
        float_accuracy, accuracy = float(np.mean(answers)), float(np.mean(artifact[task]))
        passed = float_accuracy - accuracy <= drop + 1e-9  # of floating point, 1 - 19 / 20 is more than 0.05
        rows.append(TaskAccuracy(task, len(answers), float_accuracy, accuracy, passed))
    return rows
