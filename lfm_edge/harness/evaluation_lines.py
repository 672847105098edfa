"""What `eval` found, in lines: each metric with all models below one another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

from lfm_edge.harness.evaluation import Change, Evaluated, Evaluation


def evaluation_lines(result: Evaluation) -> Iterator[str]:
    """PASSED or FAILED where there was something to pass, the metrics, and what was saved by what prompts share."""
    names = _short([model.model for model in result.models])
    limit = result.settings.max_drop
    if limit is not None:
        found = [passed for _, _, passed, _ in evaluation_checks(result)]
        yield (f"{'PASSED' if result.passed else 'FAILED'}  {sum(found)} of {len(found)} metrics are at most {limit:g} "
               f"worse than with {names[result.models[0].model]}")
        for change in result.changes:
            if not change.within(limit):
                yield f"  FAILED   {names[change.model]}: {change.task}, {change.metric}: {change.change:+.3f}"
    shown = {model.model: _titled(names[model.model], model) for model in result.models}
    width = max(map(len, shown.values()))
    for (task, metric), rows in groupby(result.rows(), lambda row: (row[1].task, row[1].metric)):
        for number, (model, score, change) in enumerate(rows):
            if not number:
                yield (f"{task}, {metric}{'' if score.higher_is_better else ' (less is better)'}, "
                       f"{score.documents:,} documents")
            yield f"  {shown[model.model]:<{width}}  {with_error(f'{score.value:.3f}', score.stderr)}{_change(change)}"
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


def evaluation_checks(result: Evaluation) -> Iterator[tuple[str, str, bool, str]]:
    """Of each metric that may lose only so much: the model, its name, whether it passed, and how."""
    limit = result.settings.max_drop
    if limit is None:
        return
    for change in result.changes:
        yield (change.model, f"{change.task}: {change.metric}", change.within(limit),
               f"{with_error(f'{change.change:+.3f}', change.stderr)}, may lose {limit:g}")
    for model in result.models:
        yield from ((model.model, name, False, "no number, so not compared") for name in model.left_out)


def with_error(shown: str, stderr: float | None) -> str:
    """A figure and its standard error, where there is one."""
    return shown if stderr is None else f"{shown} ±{stderr:.3f}"


def _short(models: Sequence[str]) -> dict[str, str]:
    """The last parts of paths, where these tell them apart."""
    last = {model: Path(model).name or model for model in models}
    return last if len(set(last.values())) == len(last) else {model: model for model in models}


def _titled(name: str, model: Evaluated) -> str:
    titled = name if model.computed in name else f"{name} ({model.computed})"
    return titled if model.templated else f"{titled}, no chat template"


def _change(change: Change | None) -> str:
    if change is None:
        return ""
    shown = f"   {with_error(f'{change.change:+.3f}', change.stderr)}"
    return shown if change.better is None else f"{shown}   {change.better} better, {change.worse} worse"
