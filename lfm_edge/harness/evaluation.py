"""Models side by side on the tasks of lm-evaluation-harness: what quantization costs in the eyes of somebody else."""

from __future__ import annotations

import logging
import math
import random
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lfm_edge.bundle.bundle import Bundle
from lfm_edge.checkpoint.checkpoint import Checkpoint
from lfm_edge.errors import LfmEdgeError, one_line
from lfm_edge.harness.host import provenance
from lfm_edge.progress import Progress
from lfm_edge.session.generation import check_system

SCHEMA = "lfm-edge/eval/1"
FLOAT = "float32"
_RESAMPLES = 1000  # of lm-eval's bootstrap, for metrics that are no means
_SEED = 1234  # lm-eval's own, for the choice of few-shot examples


@dataclass(frozen=True)
class Settings:
    """What every model is asked, and how.

    tasks: by lm-eval's names; folder: where tasks of your own are, as YAML files
    limit: only so many documents of each task; few_shot: examples in each prompt, None as each task has it
    raw: prompts as the task writes them, without the chat template; system: a system prompt; options: switches of the
        chat template; think_end_token: what a thinking model's thoughts end with
    context: most tokens of a prompt with its answer, the same for all models
    max_drop: the most that a metric may lose to the first model, None for any
    """

    tasks: tuple[str, ...]
    folder: str | None = None
    limit: int | None = None
    few_shot: int | None = None
    raw: bool = False
    system: str | None = None
    options: dict[str, Any] | None = None
    think_end_token: str | None = None
    context: int | None = None
    threads: int | None = None
    max_drop: float | None = None


@dataclass(frozen=True)
class Score:
    """One metric of one task. each: of every document, where the metric is their mean; not in the JSON"""

    task: str
    metric: str
    value: float
    stderr: float | None
    documents: int
    higher_is_better: bool
    each: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Evaluated:
    """What one model scored.

    model: as it was given; computed: what ran, a target's name or float32
    templated: whether prompts went through the chat template
    left_out: metrics that are no number, or not one that can be compared
    cut_prompts: how many prompts were too long for the context, and lost their beginning
    prompt_tokens, prefilled_tokens: of all prompts, and those of them that no earlier prompt had begun with
    """

    model: str
    computed: str
    templated: bool
    scores: tuple[Score, ...]
    left_out: tuple[str, ...]
    cut_prompts: int
    prompt_tokens: int
    prefilled_tokens: int
    seconds: float


@dataclass(frozen=True)
class Change:
    """A metric against that of the first model.

    change: value less the first one's; stderr: of that, from the documents' own differences, None where unknown
    better, worse: documents that score better and worse than with the first model, None where unknown
    """

    model: str
    task: str
    metric: str
    change: float
    stderr: float | None
    better: int | None
    worse: int | None
    higher_is_better: bool

    @classmethod
    def of(cls, model: str, base: Score, score: Score) -> Change:
        """Documents are paired: both models saw the same ones, so the difference is far surer than the two values."""
        change = score.value - base.value
        if base.each is None or score.each is None:
            return cls(model, score.task, score.metric, change, None, None, None, score.higher_is_better)
        each = np.subtract(score.each, base.each)
        stderr = float(each.std(ddof=1) / math.sqrt(len(each))) if len(each) > 1 else None
        gains = each if score.higher_is_better else -each
        return cls(model, score.task, score.metric, change, stderr, int((gains > 0).sum()), int((gains < 0).sum()),
                   score.higher_is_better)

    def within(self, max_drop: float | None) -> bool:
        """Whether it lost no more than it may; None: whatever it lost."""
        return max_drop is None or (self.change if self.higher_is_better else -self.change) >= -max_drop - 1e-9


@dataclass(frozen=True)
class Evaluation:
    """Models on the same tasks; the first is what the others are compared with."""

    settings: Settings
    models: tuple[Evaluated, ...]
    changes: tuple[Change, ...]

    @classmethod
    def of(cls, settings: Settings, models: Sequence[Evaluated]) -> Evaluation:
        """Compare them."""
        base, *others = models
        of_base = {(score.task, score.metric): score for score in base.scores}
        return cls(settings, tuple(models), tuple(
            Change.of(other.model, of_base[score.task, score.metric], score)
            for other in others for score in other.scores if (score.task, score.metric) in of_base))

    @property
    def passed(self) -> bool:
        """Whether no metric lost more than it may. What could not be compared has not passed."""
        return self.settings.max_drop is None or (
            all(change.within(self.settings.max_drop) for change in self.changes)
            and not any(model.left_out for model in self.models))

    def rows(self) -> list[tuple[Evaluated, Score, Change | None]]:
        """Each metric of each model, metric by metric in the first model's order, with how it changed."""
        order = {(score.task, score.metric): place for place, score in enumerate(self.models[0].scores)}
        changes = {(change.model, change.task, change.metric): change for change in self.changes}
        every = [(model, score, changes.get((model.model, score.task, score.metric)))
                 for model in self.models for score in model.scores]
        return sorted(every, key=lambda row: order.get((row[1].task, row[1].metric), len(order)))

    def to_dict(self, command: str = "") -> dict[str, Any]:
        """For JSON, by the schema of docs/guides/evaluation.md. command: that made it"""
        models = [{**asdict(model), "scores": [{key: value for key, value in asdict(score).items() if key != "each"}
                                               for score in model.scores]} for model in self.models]
        return {**provenance(SCHEMA, command), "passed": self.passed, "settings": asdict(self.settings),
                "models": models, "changes": [{**asdict(change), "passed": change.within(self.settings.max_drop)}
                                              for change in self.changes]}


def evaluate(models: Sequence[str | Path], settings: Settings, *, progress: Progress | None = None) -> Evaluation:
    """Put the same tasks to each model: a bundle directory, or a checkpoint, which is computed in float32.

    Raises LfmEdgeError where lm-eval is not installed, a task is unknown or its documents cannot be had, and where a
    model cannot be opened or cannot do what a task asks.
    """
    lm_eval = _installed()
    progress = progress or Progress()
    if not settings.tasks:
        raise LfmEdgeError("no task was given")
    names = [str(model) for model in models]
    if len(set(names)) < len(names):
        raise LfmEdgeError(f"{Counter(names).most_common(1)[0][0]}: is given twice")
    if settings.max_drop is not None and len(names) < 2:
        raise LfmEdgeError("--max-drop: there is nothing to compare with; give the original model first")
    opened = {name: lm_eval.opened(name) for name in names}
    templated = {name: _check(name, model, lm_eval, settings) for name, model in opened.items()}
    contexts = [model.manifest.state.context for model in opened.values() if isinstance(model, Bundle)]
    context = settings.context or min(contexts, default=None)
    _silence()
    progress.stage("load the tasks")
    loaded = _load_tasks(settings)

    def of_one(name: str, model: Bundle | Checkpoint) -> Evaluated:
        """One model is in memory at a time."""
        progress.stage(f"evaluate {name}")
        start = time.monotonic()
        subject = lm_eval.EdgeLM(model, context=context, threads=settings.threads,
                                 think_end_token=settings.think_end_token, template_options=settings.options)
        scores, left_out = _scores(_run(name, subject, loaded, settings, templated[name]), settings.tasks)
        computed = model.manifest.target if isinstance(model, Bundle) else FLOAT
        return Evaluated(name, computed, templated[name], scores, left_out, subject.cut_prompts,
                         subject.prompt_tokens, subject.prefilled_tokens, time.monotonic() - start)

    return Evaluation.of(settings, [of_one(name, model) for name, model in opened.items()])


def _check(name: str, model: Bundle | Checkpoint, lm_eval: Any, settings: Settings) -> bool:
    """Raise LfmEdgeError for what a model cannot do, before any is asked; whether it is through its chat template."""
    most = lm_eval.most_context(model)
    if settings.context is not None and settings.context > most:
        raise LfmEdgeError(f"--context {settings.context}: {name} takes at most {most} tokens")
    if isinstance(model, Bundle):
        model.runtime.module()
    tokenizer = model.tokenizer()
    tokenizer.check_options(settings.options or {})
    templated = not settings.raw and tokenizer.template is not None
    if settings.system is not None:
        if not templated:
            raise LfmEdgeError(f"--system: {name} is asked without a chat template, which has no place for it")
        check_system([{"role": "system", "content": settings.system}], tokenizer)
    return templated


def _installed() -> Any:
    try:
        from lfm_edge.harness import lm_eval
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("lfm_edge"):
            raise
        raise LfmEdgeError("eval: needs lm-evaluation-harness: pip install 'lfm-edge[eval]'") from None
    return lm_eval


def _silence() -> None:
    """lm-eval tells what it does line by line; what matters of it is raised or shown."""
    for name in ("lm_eval", "datasets", "evaluate", "httpx", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _load_tasks(settings: Settings) -> Any:
    """Tasks with their documents, as lm-eval has them."""
    from lm_eval.tasks import TaskManager

    if settings.folder is not None and not Path(settings.folder).is_dir():
        raise LfmEdgeError(f"{settings.folder}: no such folder of tasks")
    own = TaskManager(include_path=settings.folder, include_defaults=False) if settings.folder else None
    manager = own if own and own.all_tasks and set(settings.tasks) <= set(own.all_tasks) else TaskManager(
        include_path=settings.folder)  # which reads some ten thousand files
    for name in settings.tasks:
        if name not in manager.all_tasks:
            raise LfmEdgeError(f"{name}: no such task; `lm-eval ls tasks` lists them"
                               + (f", and those of {settings.folder} are known as well" if settings.folder else ""))
    _sow()  # documents may be drawn while they are loaded
    try:
        loaded = manager.load(list(settings.tasks))
    except Exception as error:  # documents come through a library that raises anything
        raise LfmEdgeError(f"{', '.join(settings.tasks)}: the documents cannot be loaded "
                           f"({_reason(error)})") from error
    for task in loaded["tasks"].values():
        few_shot = task.get_config("num_fewshot")
        if settings.few_shot is not None and few_shot != 0:  # lm-eval's rule: a task that wants none has none
            few_shot = settings.few_shot
        task.set_config(key="num_fewshot", value=few_shot or 0)
    return loaded


def _run(name: str, subject: Any, loaded: Any, settings: Settings, templated: bool) -> dict[str, Any]:
    """lm-eval's results of one model. The examples in the prompts are drawn anew, so that all models see the same."""
    from lm_eval.evaluator import evaluate as run

    _sow()
    for task in loaded["tasks"].values():
        task.set_fewshot_seed(seed=_SEED)
    try:
        return run(lm=subject, task_dict=loaded, limit=settings.limit, bootstrap_iters=_RESAMPLES, log_samples=True,
                   system_instruction=settings.system, apply_chat_template=templated, fewshot_as_multiturn=templated)
    except LfmEdgeError:
        raise
    except Exception as error:  # a task is foreign code; it can raise anything
        raise LfmEdgeError(f"{name}: lm-eval could not run {', '.join(settings.tasks)} ({_reason(error)})") from error


def _sow() -> None:
    """What lm-eval's own entry point does before a run."""
    random.seed(0)
    np.random.seed(_SEED)
    torch.manual_seed(_SEED)


def _reason(error: Exception) -> str:
    """The first line of what a library said."""
    return one_line(next(iter(str(error).strip().splitlines()), "")) or type(error).__name__


def _scores(found: dict[str, Any], wanted: Sequence[str]) -> tuple[tuple[Score, ...], tuple[str, ...]]:
    """The metrics of the tasks that were asked for, and the names of those left out.

    Of a group they are those of the whole, where it has some, and not of its parts.
    """
    scores, left_out = [], []
    parts = _parts_of(found.get("group_subtasks", {}), wanted, found["results"])
    for task, metrics in found["results"].items():
        for key, value in metrics.items() if task not in parts else ():
            name, comma, filtered = key.partition(",")
            if not comma or name.endswith("_stderr"):
                continue
            number, stderr = _number(value), _number(metrics.get(f"{name}_stderr,{filtered}"))
            title = name if filtered == "none" else f"{name}, {filtered}"
            if number is None or name == "bypass":
                left_out.append(f"{task}, {title}")
                continue
            each = _each(found["samples"].get(task, ()), name, filtered, number)
            better = found["higher_is_better"].get(task, {}).get(name)
            scores.append(Score(task, title, number, stderr, int(metrics.get("sample_len", 0)) or len(each or ()),
                                better is not False, each))
    return tuple(scores), tuple(left_out)


def _number(value: Any) -> float | None:
    """A finite number, of Python's or numpy's; None for anything else."""
    return float(value) if isinstance(value, int | float | np.number) and math.isfinite(value) else None


def _parts_of(groups: Mapping[str, Sequence[str]], wanted: Sequence[str], results: Mapping[str, Any]) -> set[str]:
    """All that is in a group which was asked for and has metrics of its own."""
    parts: set[str] = set()
    waiting = [group for group in wanted if group in groups and any("," in key for key in results.get(group, ()))]
    while waiting:
        for part in groups.get(waiting.pop(), ()):
            if part not in parts:
                parts.add(part)
                waiting.append(part)
    return parts


def _each(samples: Sequence[Mapping[str, Any]], metric: str, filtered: str, mean: float) -> tuple[float, ...] | None:
    """The metric of every document in order, where it is a number whose mean is the task's."""
    rows = sorted((sample for sample in samples if sample["filter"] == filtered), key=lambda sample: sample["doc_id"])
    values = [sample.get(metric) for sample in rows]
    each = tuple(number for number in map(_number, values) if number is not None)
    if not values or len(each) < len(values):
        return None
    return each if math.isclose(math.fsum(each) / len(each), mean, abs_tol=1e-9) else None
