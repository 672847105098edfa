"""What `eval` found, in lines: each metric with all models below one another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from lfm_edge.harness.evaluation import Change, Evaluated, Evaluation, Score


def evaluation_lines(result: Evaluation) -> Iterator[str]:
    """PASSED or FAILED where there was something to pass, the metrics, and what was saved by what prompts share."""
    names = _short([model.model for model in result.models])
    base, limit = result.models[0], result.settings.max_drop
    if limit is not None:
        failed = [change for change in result.changes if not change.within(limit)]
        yield (f"{'PASSED' if result.passed else 'FAILED'}  {len(result.changes) - len(failed)} of "
               f"{len(result.changes)} metrics are at most {limit:g} worse than with {names[base.model]}")
        for change in failed:
            yield f"  FAILED   {names[change.model]}: {change.task}, {change.metric}: {change.change:+.3f}"
    changes = {(change.model, change.task, change.metric): change for change in result.changes}
    shown = [_titled(names[model.model], model) for model in result.models]
    for score in base.scores:
        yield (f"{score.task}, {score.metric}{'' if score.higher_is_better else ' (less is better)'}, "
               f"{score.documents:,} documents")
        for name, model in zip(shown, result.models, strict=True):
            its = next((one for one in model.scores if (one.task, one.metric) == (score.task, score.metric)), None)
            if its is not None:
                line = f"  {name:<{max(map(len, shown))}}  {_with_error(f'{its.value:.3f}', its)}"
                yield line + _change(changes.get((model.model, score.task, score.metric)))
    for model in result.models:
        if model.left_out:
            yield f"{names[model.model]}: no number, so not compared: {'; '.join(model.left_out)}"
        if model.cut_prompts:
            yield (f"{names[model.model]}: {model.cut_prompts:,} prompts were longer than the context and lost their "
                   "beginning")
    shares = {names[model.model]: 1 - model.prefilled_tokens / max(model.prompt_tokens, 1) for model in result.models}
    if max(shares.values()) >= 0.01:
        saved = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
        yield f"prompt tokens saved by computing shared beginnings once: {saved}"


def change_line(change: Change, limit: float) -> str:
    """One metric held against what it may lose."""
    return f"{_with_error(f'{change.change:+.3f}', change)}, may lose {limit:g}"


def _short(models: Sequence[str]) -> dict[str, str]:
    """The last parts of paths, where these tell them apart."""
    last = {model: Path(model).name or model for model in models}
    return last if len(set(last.values())) == len(last) else {model: model for model in models}


def _titled(name: str, model: Evaluated) -> str:
    titled = name if model.computed in name else f"{name} ({model.computed})"
    return titled if model.templated else f"{titled}, no chat template"


def _with_error(shown: str, of: Score | Change) -> str:
    return shown if of.stderr is None else f"{shown} ±{of.stderr:.3f}"


def _change(change: Change | None) -> str:
    if change is None:
        return ""
    shown = f"   {_with_error(f'{change.change:+.3f}', change)}"
    return shown if change.better is None else f"{shown}   {change.better} better, {change.worse} worse"
