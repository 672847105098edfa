"""What `eval` found, in lines: each metric with all models below one another."""

from __future__ import annotations

from collections.abc import Iterator

from lfm_edge.harness.evaluation import Change, Evaluated, Evaluation, Score


def evaluation_lines(result: Evaluation) -> Iterator[str]:
    """PASSED or FAILED where there was something to pass, the metrics, and how much of the prompts was computed."""
    limit = result.settings.max_drop
    if limit is not None:
        failed = [change for change in result.changes if not change.passed]
        yield (f"{'PASSED' if result.passed else 'FAILED'}  {len(result.changes) - len(failed)} of "
               f"{len(result.changes)} metrics are at most {limit:g} worse than with {result.models[0].model}")
        for change in failed:
            yield f"  FAILED   {change.model}: {change.task}, {change.metric}: {change.change:+.3f}"
    changes = {(change.model, change.task, change.metric): change for change in result.changes}
    width = max(len(_name(model)) for model in result.models)
    for base in result.models[0].scores:
        yield (f"{base.task}, {base.metric}{'' if base.higher_is_better else ' (less is better)'}, "
               f"{base.documents:,} documents")
        for model in result.models:
            score = next((one for one in model.scores if (one.task, one.metric) == (base.task, base.metric)), None)
            if score is not None:
                line = f"  {_name(model):<{width}}  {_with_error(f'{score.value:.3f}', score)}"
                yield line + _change(changes.get((model.model, base.task, base.metric)))
    saved = [f"{model.model} {1 - model.prefilled_tokens / max(model.prompt_tokens, 1):.0%}" for model in result.models]
    yield f"prompt tokens saved by computing shared beginnings once: {', '.join(saved)}"


def _name(model: Evaluated) -> str:
    name = model.model if model.computed in model.model else f"{model.model} ({model.computed})"
    return name if model.templated else f"{name}, no chat template"


def _with_error(shown: str, of: Score | Change) -> str:
    return shown if of.stderr is None else f"{shown} ±{of.stderr:.3f}"


def _change(change: Change | None) -> str:
    if change is None:
        return ""
    shown = f"   {_with_error(f'{change.change:+.3f}', change)}"
    return shown if change.better is None else f"{shown}   {change.better} better, {change.worse} worse"
