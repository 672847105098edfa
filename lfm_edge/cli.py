"""The command line: parses, calls, renders. Everything heavy is imported by the command that needs it."""

from __future__ import annotations

import json
import logging
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table
from typer.core import TyperGroup

from lfm_edge import __version__
from lfm_edge.checkpoint.presets import DEFAULT_MODEL
from lfm_edge.errors import ContextFull, LfmEdgeError
from lfm_edge.files import check_outputs, write_text
from lfm_edge.stdout import checked_stdout

if TYPE_CHECKING:
    from lfm_edge.bundle.bundle import Bundle
    from lfm_edge.session.generation import Chat
    from lfm_edge.session.sampling import Sampling
    from lfm_edge.session.session import Session


class _Commands(TyperGroup):
    """Lets an interrupt (Ctrl-C) be one line."""

    def invoke(self, ctx: typer.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            err.print("interrupted")
            raise typer.Exit(_SIGNALLED + signal.SIGINT) from None


app = typer.Typer(cls=_Commands, no_args_is_help=True, pretty_exceptions_enable=False,
                  rich_markup_mode="rich",
                  help="Export LFM2, LFM2.5 and LFM3 models to verified on-device bundles.\n\n"
                       "[bold]lfm-edge export --target android-q4 --model DIR --output out[/], then "
                       "[bold]verify[/], [bold]bench[/], [bold]generate[/] or [bold]chat[/] with it.")
_SIGNALLED = 128  # the exit code of a command that a signal ended, without the signal's number
out = Console()
err = Console(stderr=True)

Model = Annotated[str, typer.Option(help="A Hugging Face directory, a hub id (owner/name, or owner/name@REVISION), or "
                                         "random:PRESET for random weights at a published size, such as "
                                         "random:lfm2.5-1.2b.")]
BundlePath = Annotated[Path, typer.Argument(help="A bundle directory, as `export` writes it.", show_default=False)]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Also write the result as JSON; - prints JSON instead "
                                                               "of the tables.", show_default=False)]
Baked = Annotated[bool, typer.Option("--baked-prompt/--no-baked-prompt",
                                     help="Start after the system prompt that the bundle ships, where it has one.")]
Temperature = Annotated[float | None, typer.Option(
    min=0.0, help="0 takes the best token; higher is more random. (default: this option and the next four are taken "
                  "from the checkpoint's generation_config.json; without one, the best token)", show_default=False)]
TopK = Annotated[int | None, typer.Option(min=0, help="Draw from the N best tokens only; 0 for all.",
                                          show_default=False)]
TopP = Annotated[float | None, typer.Option(min=0.0, max=1.0, help="Draw from the fewest best tokens that together "
                                                                   "have this probability.", show_default=False)]
MinP = Annotated[float | None, typer.Option(min=0.0, max=1.0, help="Draw from tokens that have at least this share of "
                                                                   "the best one's probability.", show_default=False)]
RepetitionPenalty = Annotated[float | None, typer.Option(min=0.0, help="Above 1: tokens that have occurred become less "
                                                                       "likely.", show_default=False)]
Greedy = Annotated[bool, typer.Option("--greedy", help="Take the best token, whatever the checkpoint says.")]
System = Annotated[str | None, typer.Option(metavar="TEXT", help="A system prompt to begin with.",
                                            show_default=False)]
TemplateOption = Annotated[list[str] | None, typer.Option(
    metavar="KEY=VALUE", help="A switch of the chat template, such as enable_thinking=false; may be given again.",
    show_default=False)]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the random draws: the same seed gives the same answer.")]
Lookahead = Annotated[int, typer.Option(min=0, help="Guess up to N tokens from earlier text of the conversation, and "
                                                     "check them in one step: the same answer, faster where it "
                                                     "repeats. Up to 7 on android targets.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads of the runtime. (default: the runtime's own)",
                                             show_default=False)]


def _target_names() -> list[str]:
    """For the shell's completion."""
    from lfm_edge.targets import TARGETS

    return list(TARGETS)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"lfm-edge {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True,
                                          help="Show the version and leave.")] = False,
) -> None:
    pass


def _counts(text: str) -> tuple[int, ...]:
    """`128,512` as numbers, each once, in order."""
    try:
        counts = tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        raise typer.BadParameter(f"'{text}' is no list of numbers such as 128,512") from None
    if min(counts) < 1:
        raise typer.BadParameter(f"{min(counts)} is not at least 1")
    return counts


def _names(text: str) -> tuple[str, ...]:
    return tuple(filter(None, (name.strip() for name in text.split(","))))


def _fills(text: str) -> tuple[int, ...] | str:
    return text if text == "all" else _counts(text)


@app.command()
def targets() -> None:
    """List the targets, and whether their backend is installed."""
    from lfm_edge.targets import TARGETS

    table = Table(*(Column(name, no_wrap=True) for name in ("target", "runs on", "by", "bits")), box=None)
    to_install: dict[str, list[str]] = {}
    for target in TARGETS.values():
        table.add_row(target.name, ", ".join(target.runtime.platforms), target.runtime.title, str(target.bits))
        if target.to_install:
            to_install.setdefault(target.to_install, []).append(target.name)
    out.print(table)
    for extra, names in to_install.items():
        out.print(escape(f"for {', '.join(names)}: pip install '{extra}'"), highlight=False, soft_wrap=True)


@app.command()
def export(
    target: Annotated[str, typer.Option(help="What to export for; `lfm-edge targets` lists them.", show_default=False,
                                        autocompletion=_target_names)],
    model: Model = DEFAULT_MODEL,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Bundle directory to write. (default: "
                                                                       "MODEL-TARGET)", show_default=False)] = None,
    context: Annotated[int | None, typer.Option(help="Positions that the KV cache holds. (default: 4096, or the "
                                                     "model's limit if lower)", show_default=False)] = None,
    prefill_chunk: Annotated[int, typer.Option(help="Most tokens that one step takes.")] = 128,
    group_size: Annotated[int | None, typer.Option(help="Columns that share a 4-bit scale: 32, 64 or 128. (default: "
                                                        "32)", show_default=False)] = None,
    head_bits: Annotated[int | None, typer.Option(
        help="Bits of embedding and head: 8, or 4, which saves about 67 MB per copy at 1.2B and costs some quality. "
             "(default: 8)", show_default=False)] = None,
    compute_dtype: Annotated[str | None, typer.Option(
        help="What the program computes in: float16, bfloat16 or float32, as far as the target has a choice. "
             "(default: the target's own)", show_default=False)] = None,
    kv_dtype: Annotated[str | None, typer.Option(
        help="Type of the KV cache: int8, or the compute type; for llama.cpp float16 or float32. (default: the compute "
             "type; float16 for llama.cpp)",
        show_default=False)] = None,
    state: Annotated[str, typer.Option(help="explicit: the app owns the state, and can snapshot it. internal: the "
                                            "program does, as the stock LLM runners and Core ML's MLState want it.")
                     ] = "explicit",
    soc: Annotated[str | None, typer.Option(
        help="Chips to compile for, for NPU targets: sm8350, sm8550, sm8650, sm8750, sm8850, several with commas "
             "between. (default: sm8750)", show_default=False)] = None,
    rounding: Annotated[str, typer.Option(
        help="nearest: each weight to the nearest code. gptq: so that the layers answer a text as before; takes "
             "minutes, and loses less quality.")] = "nearest",
    calibration: Annotated[Path | None, typer.Option(
        help="UTF-8 text with prompts like your app's, separated by blank lines. It is used for activations of NPU "
             "targets, the int8 KV cache of onnx targets, and --rounding gptq. (default: the checkpoint's own prompts, "
             "or built-in ones; for gptq a built-in text)", show_default=False)] = None,
    recipe: Annotated[Path | None, typer.Option(help="Which linear layers have 4 bits and which 8: a file that "
                                                     "`sensitivity --output` wrote.", show_default=False)] = None,
    bake_prompt: Annotated[Path | None, typer.Option(
        metavar="FILE", help="Text file with a system prompt: it is prefilled now, and `chat`, `generate` and apps "
                             "start after it without waiting for it.", show_default=False)] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing bundle, once the new one is whole.")
                     ] = False,
) -> None:
    """Quantize a checkpoint and export it to a bundle."""
    _let_threads_sleep()
    from lfm_edge.bundle.export import export as run

    output = output or Path(f"{_name_of(model)}-{target}")
    with _interruption_told(output), _progress() as progress:
        bundle = run(model, target=target, output=output, force=force, progress=progress, context=context,
                     prefill_chunk=prefill_chunk, group_size=group_size, head_bits=head_bits,
                     compute_dtype=compute_dtype, kv_dtype=kv_dtype, state=state, soc=soc, rounding=rounding,
                     calibration=calibration, recipe=recipe, bake_prompt=bake_prompt)
    from lfm_edge.harness.tables import bundle_lines

    _say_written(output)
    place = _for_a_shell(output)
    for line in (*bundle_lines(bundle), f"next: lfm-edge verify {place}", f"      lfm-edge inspect {place}"):
        out.print(escape(line), soft_wrap=True, highlight=False)


@app.command()
def inspect(bundle: BundlePath) -> None:
    """Show what a bundle is: model, weights, state layout, lowering, files."""
    _show_bundle(_open(bundle))


@app.command()
def verify(
    bundle: BundlePath,
    json_file: JsonFile = None,
    model: Annotated[str | None, typer.Option(help="Where the checkpoint is, if this machine did not export the "
                                                   "bundle.", show_default=False)] = None,
    threads: Threads = None,
    soc: Annotated[str | None, typer.Option(help="Which of the chips that an NPU bundle was compiled for. (default: "
                                                 "the one of this device, or the first)", show_default=False)] = None,
    tokens: Annotated[int | None, typer.Option(
        min=2, help="Tokens of text to run: fewer where a simulator would take hours. (default: two prefill chunks "
                    "and 24)", show_default=False)] = None,
    text: Annotated[Path | None, typer.Option(help="UTF-8 text to measure quality on (perplexity, KL divergence); its "
                                                   "first 4,096 tokens are used. (default: the checkpoint's tasks, "
                                                   "or a built-in text)", show_default=False)] = None,
    details: Annotated[bool, typer.Option("--details", help="Show every phase, weight check and task as well.")
                       ] = False,
) -> None:
    """Check that a bundle computes what your quantized weights should, and how far those are from your model.

    Leads with PASSED or FAILED; exits with 1 where anything is outside the target's limits.
    """
    _let_threads_sleep()
    opened = _open(bundle)
    check_outputs({"--json": json_file}, [*opened.files, *filter(None, [text])])
    from lfm_edge.harness.tables import verification_tables
    from lfm_edge.harness.verdict import verdict_lines
    from lfm_edge.harness.verify import verify as run

    with _progress() as progress:
        result = run(opened, model=model, threads=threads, soc=soc, tokens=tokens, text=text, progress=progress)
    _render(verification_tables(result) if details else [], result.to_dict(_command()), json_file,
            verdict_lines(result))
    if opened.edited:
        err.print(f"{bundle}: edited since the export, and read by no runtime: {', '.join(opened.edited)}",
                  highlight=False, markup=False, soft_wrap=True)
    if not result.passed:
        raise typer.Exit(1)


@app.command()
def sensitivity(
    model: Model = DEFAULT_MODEL,
    text: Annotated[Path | None, typer.Option(help="UTF-8 text to measure on, like what your users will write. "
                                                   "(default: built-in prompts)", show_default=False)] = None,
    tokens: Annotated[int, typer.Option(min=2, help="Most tokens of it to use; the time grows with them.")] = 512,
    group_size: Annotated[int, typer.Option(help="Columns that share a 4-bit scale: 32, 64 or 128.")] = 32,
    max_size: Annotated[str | None, typer.Option(help="Choose bits for each layer so that the weights take at most "
                                                      "this, such as 700MB.", show_default=False)] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Where the choice goes, for `export --recipe`.",
                                                show_default=False)] = None,
    json_file: JsonFile = None,
) -> None:
    """Show what 4 bits cost in each layer, as KL divergence from the float32 model, and choose a mix under a limit."""
    from lfm_edge.harness.memory import parse_bytes

    limit = None if max_size is None else parse_bytes(max_size)
    if output is not None and limit is None:
        raise LfmEdgeError(f"--output {output}: there is a choice to write with --max-size only")
    check_outputs({"--json": json_file, "--output": output}, [*filter(None, [text])])
    _let_threads_sleep()
    from lfm_edge.harness.sensitivity import analyse
    from lfm_edge.harness.tables import sensitivity_table

    with _progress() as progress:
        found, bits, chosen = analyse(model, text=text, tokens=tokens, group_size=group_size, most_bytes=limit,
                                      progress=progress)
    if output is not None and bits is not None:
        _write_json(output, bits.to_dict())
    _render([sensitivity_table(found, chosen, bits)], found.to_dict(_command(), chosen, bits), json_file)


@app.command()
def bench(
    bundles: Annotated[list[Path], typer.Argument(help="Bundle directories; several are measured in turn, and "
                                                       "compared with the first.", show_default=False)],
    prompt_tokens: Annotated[Any, typer.Option(parser=_counts, metavar="N,...", help="Tokens to prefill; several "
                                                                                     "lengths with commas.")] = "512",
    generate_tokens: Annotated[int, typer.Option(min=1, help="Tokens to decode after them.")] = 64,
    fill: Annotated[Any, typer.Option(
        parser=_fills, metavar="N,...|all", show_default=False,
        help="Also measure memory and decode with so many positions of the context filled, written without computing "
             "them. all: 1024,4096,16384,32768 and the whole context, as far as it goes.")] = None,
    threads: Annotated[Any, typer.Option(parser=_counts, metavar="N,...", show_default=False, help="Threads of the "
                                         "runtime; several numbers with commas are swept. (default: all cores)")
                       ] = None,
    repeat: Annotated[int, typer.Option(min=1, help="Rounds, each in a fresh process.")] = 3,
    sustained: Annotated[float, typer.Option(min=0.0, metavar="SECONDS", help="Also decode for so long without a "
                                             "pause, to see it slow down; 0: do not.")] = 0.0,
    budget: Annotated[str | None, typer.Option(
        metavar="SIZE", show_default=False,
        help="Most memory above an empty process, with the whole context filled. If given, a bundle that cannot be "
             "measured here fails. (default: 1GB)")] = None,
    memory_limit: Annotated[str | None, typer.Option(
        metavar="SIZE", show_default=False,
        help="Let the operating system end a round that takes more memory than this above an empty process, such as "
             "900MB.")] = None,
    project: Annotated[bool, typer.Option("--project", help="Show what phones might decode, projected from their "
                                                            "published memory bandwidth. (In the JSON always.)")
                       ] = False,
    against: Annotated[Any, typer.Option(
        parser=_names, metavar="PEER,...", show_default=False,
        help="Also measure other exporters, in the same rounds: llama.cpp, export_llm (ExecuTorch's own), "
             "onnxruntime-genai, mlx-lm. Each builds from the bundle's checkpoint, with options as near to the "
             "bundle's as it has; what it built stays in the cache. The table says what is not equal. PEER=BUNDLE "
             "builds for that bundle alone, and holds all of them against it.")] = None,
    model: Annotated[str | None, typer.Option(help="Where the checkpoint is that peers are built from, if this "
                                                   "machine did not export the bundle.", show_default=False)] = None,
    json_file: JsonFile = None,
) -> None:
    """Measure load time, time to first token, tokens per second and memory.

    Exits with 1 if a bundle exceeds the budget or the memory limit, or if one of them is given and the bundle cannot be
    measured here. Peers built by --against never fail the run. Core ML and MLX are measured on a Mac only, the NPU on a
    Snapdragon device.
    """
    if model is not None and not against:
        raise LfmEdgeError(f"--model {model}: bench reads a checkpoint for peers only; give --against as well")
    from lfm_edge.harness.memory import parse_bytes

    budget_bytes = None if budget is None else parse_bytes(budget)
    limit_bytes = None if memory_limit is None else parse_bytes(memory_limit)
    opened = [_open(path) for path in bundles]
    check_outputs({"--json": json_file}, [file for one in opened for file in one.files])
    from lfm_edge.harness.bench import Settings
    from lfm_edge.harness.bench import bench as run
    from lfm_edge.harness.bench_tables import bench_tables, budget_lines, leading_lines

    settings = Settings(prompt_tokens, generate_tokens, None if fill == "all" else fill or (), threads or (), repeat,
                        sustained, budget_bytes, limit_bytes, against or (), model)
    with _progress() as progress:
        result = run(opened, settings, progress=progress.stage)
    _render(bench_tables(result, projections=project), result.to_dict(_command()), json_file, leading_lines(result))
    for line in budget_lines(result):
        err.print(line, soft_wrap=True, highlight=False, markup=False)
    if not result.passed:
        raise typer.Exit(1)


@app.command(name="eval")
def evaluate(
    models: Annotated[list[str], typer.Argument(
        help="Bundle directories, and checkpoints (a directory, a hub id or random:PRESET), which are computed in "
             "float32; all are compared with the first.", show_default=False)],
    tasks: Annotated[Any, typer.Option(parser=_names, metavar="TASK,...", show_default=False,
                                       help="Tasks of lm-evaluation-harness, such as ifeval, gsm8k or mmlu_pro; "
                                            "`lm-eval ls tasks` lists them.")],
    task_folder: Annotated[Path | None, typer.Option(metavar="DIR", help="Where tasks of your own are, as YAML files.",
                                                     show_default=False)] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many documents of each task.",
                                              show_default=False)] = None,
    few_shot: Annotated[int | None, typer.Option(min=0, help="Examples in each prompt; tasks that want none have none. "
                                                        "(default: as each task has it)",
                                                 show_default=False)] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Ask without the chat template.")] = False,
    system: System = None,
    template_option: TemplateOption = None,
    think_end_token: Annotated[str | None, typer.Option(
        metavar="TEXT", help="What a thinking model's thoughts end with, such as </think>; the answer is what follows.",
        show_default=False)] = None,
    context: Annotated[int | None, typer.Option(
        min=2, help="Most tokens of a prompt with its answer; longer prompts lose their beginning. (default: the "
                    "smallest context of the bundles)", show_default=False)] = None,
    max_drop: Annotated[float | None, typer.Option(
        min=0.0, help="Exit with 1 if a metric is worse than the first model's by more than this, such as 0.02.",
        show_default=False)] = None,
    threads: Threads = None,
    json_file: JsonFile = None,
) -> None:
    """Put the tasks of lm-evaluation-harness to bundles and to the original model, and compare the scores.

    The artifact itself answers, in its own runtime. Prompts that begin alike are prefilled once.
    """
    read = [file for name in models for file in Path(name).glob("**/*")]
    read += task_folder.glob("**/*.y*ml") if task_folder else []
    check_outputs({"--json": json_file}, read)
    _check_raw(raw, system, template_option)
    _let_threads_sleep()
    if not err.is_terminal:
        os.environ.setdefault("TQDM_DISABLE", "1")  # lm-eval's bars
    from lfm_edge.harness.evaluation import Settings
    from lfm_edge.harness.evaluation import evaluate as run
    from lfm_edge.harness.evaluation_lines import evaluation_lines
    from lfm_edge.progress import LineProgress

    settings = Settings(tasks, None if task_folder is None else str(task_folder), limit, few_shot, raw, system,
                        _template_options(template_option), think_end_token, context, threads, max_drop)
    result = run(models, settings, progress=LineProgress(err))
    _render([], result.to_dict(_command()), json_file, list(evaluation_lines(result)))
    if not result.passed:
        raise typer.Exit(1)


@app.command()
def report(
    results: Annotated[list[Path], typer.Argument(help="What bench, verify, eval and sensitivity wrote with --json; of "
                                                       "a directory, every *.json in it.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="The page: one HTML file that needs nothing else.")
                      ] = Path("report.html"),
    junit: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write the checks as JUnit XML.",
                                               show_default=False)] = None,
    markdown: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write a summary as Markdown.",
                                                  show_default=False)] = None,
) -> None:
    """Put results together: a page with charts, JUnit XML and a summary for CI.

    Exits with 1 where a check in the results failed, once everything is written.
    """
    from lfm_edge.report import write_report

    failed = write_report(results, output, junit, markdown)
    for path in filter(None, (output, junit, markdown)):
        _say_written(path)
    for check in failed:
        err.print(f"{check.subject}: {check.name}: {check.line}", soft_wrap=True, highlight=False, markup=False)
    if failed:
        raise typer.Exit(1)


@app.command()
def generate(
    bundle: BundlePath,
    prompt: Annotated[str, typer.Option(help="What to say to the model; with --raw, the text to continue.",
                                        show_default=False)],
    raw: Annotated[bool, typer.Option("--raw", help="Continue the prompt as it is, without the chat template: tokens "
                                                    "such as <|im_start|> may stand in it.")] = False,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to generate.")] = 512,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = None,
    greedy: Greedy = False,
    seed: Seed = 0,
    lookahead: Lookahead = 0,
    system: System = None,
    template_option: TemplateOption = None,
    baked_prompt: Baked = True,
    threads: Threads = None,
) -> None:
    """Answer one prompt; the text goes to standard output as it comes.

    The prompt goes through the bundle's chat template, where it has one. Without one, or with --raw, it is continued.
    """
    opened = _open(bundle)
    sampling = _sampling(opened, greedy, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
                         repetition_penalty=repetition_penalty)
    from lfm_edge.session.generation import Chat, text_pieces
    from lfm_edge.session.generation import generate as run

    tokenizer, stop = opened.tokenizer(), opened.manifest.config.eos_token_ids
    _check_raw(raw, system, template_option)
    baked = opened.baked_prompt if baked_prompt else None
    if raw or tokenizer.template is None:
        session = _session(opened, threads)
        if baked:
            session.load(baked)
        tokens = run(session, tokenizer.encode(prompt, special=session.position == 0), max_tokens=max_tokens,
                     sampling=sampling, seed=seed, stop=stop, lookahead=lookahead)
        pieces = text_pieces(tokenizer.shown, tokens)
    else:
        conversation = Chat(_session(opened, threads), tokenizer, stop, baked, system=system,
                            options=_template_options(template_option))
        session = conversation.session
        pieces = conversation.answer(prompt, max_tokens=max_tokens, sampling=sampling, seed=seed, lookahead=lookahead)
    _say_timed(pieces, session)


@app.command()
def chat(
    bundle: BundlePath,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 512,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = None,
    greedy: Greedy = False,
    seed: Seed = 0,
    lookahead: Lookahead = 0,
    system: System = None,
    template_option: TemplateOption = None,
    baked_prompt: Baked = True,
    tools: Annotated[Path | None, typer.Option(
        metavar="FILE", help="JSON schemas of functions that the model may call, a list or one: the chat template "
                             "shows them to the model. Answer a call with /tool RESULT.", show_default=False)] = None,
    session: Annotated[Path | None, typer.Option(
        metavar="FILE", help="Go on with the conversation in this file, where it exists, and save it there on leaving.",
        show_default=False)] = None,
    threads: Threads = None,
) -> None:
    """Talk with a bundle through its chat template.

    /help lists the commands; an empty line, /quit or the end of input leaves. Ctrl-C ends an answer, and the
    conversation is as it was before the question; at the prompt it leaves.
    """
    opened = _open(bundle)
    check_outputs({"--session": session}, opened.files)
    sampling = _sampling(opened, greedy, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
                         repetition_penalty=repetition_penalty)
    from lfm_edge.session.generation import Chat, read_tools

    functions = None if tools is None else read_tools(tools)
    if session is not None and session.exists() and system is not None:
        raise LfmEdgeError(f"--system: the conversation in {session} has begun already; leave it out")
    conversation = Chat(_session(opened, threads), opened.tokenizer(), opened.manifest.config.eos_token_ids,
                        opened.baked_prompt if baked_prompt else None, system=system, tools=functions,
                        options=_template_options(template_option))
    with conversation.kept_in(session) as goes_on:
        if goes_on:
            err.print(f"{session}: goes on after {len(conversation.messages)} messages, "
                      f"{conversation.session.position} tokens", highlight=False, markup=False, soft_wrap=True)
        for line in _lines("> "):
            word, _, rest = line.partition(" ")
            if word == "/quit":
                break
            if word == "/reset":
                conversation.reset()
            elif word == "/help":
                err.print(_CHAT_HELP, highlight=False, markup=False)
            elif word.startswith("/") and word != "/tool":
                err.print(f"{word}: no such command; /help lists them", highlight=False, markup=False)
            else:
                role, said = ("tool", rest.strip()) if word == "/tool" else ("user", line)
                _answer(conversation, said, role, max_tokens=max_tokens, sampling=sampling, seed=seed,
                        lookahead=lookahead)


_CHAT_HELP = """\
/reset         begin a new conversation
/tool RESULT   say what a function gave that the model called
/quit          leave, as an empty line does
/help          this"""


def _answer(conversation: Chat, said: str, role: str, **options: Any) -> None:
    """One turn. What goes wrong is told, and the conversation goes on."""
    try:
        with closing(conversation.answer(said, role=role, **options)) as answer:
            _say_timed(answer, conversation.session)
        return
    except ContextFull as error:
        _complain(f"{error}; /reset begins anew")
    except LfmEdgeError as error:
        _complain(error)
    except KeyboardInterrupt:
        if not sys.stdin.isatty():
            raise
    _say("\n")


def _say_timed(pieces: Iterable[str], session: Session) -> None:
    """Say a text as it comes; on a terminal, how fast that was."""
    first = None
    for piece in pieces:
        if first is None:
            first, before = time.monotonic(), session.position
        _say(piece)
    _say("\n")
    if first is not None and err.is_terminal and session.position > before:
        seconds, tokens = time.monotonic() - first, session.position - before
        err.print(f"[{tokens} tokens, {tokens / max(seconds, 1e-9):,.1f} a second]", style="dim", markup=False,
                  highlight=False)


def _session(bundle: Bundle, threads: int | None) -> Session:
    """The bundle's session; on a terminal, a word while it loads."""
    with err.status("loading ...") if err.is_terminal else nullcontext():
        return bundle.session(threads)


def _sampling(bundle: Bundle, greedy: bool, **given: float | None) -> Sampling:
    """How tokens are chosen: what was given, or else what the model's makers say."""
    from lfm_edge.session.sampling import Sampling

    if greedy:
        others = [name for name, value in given.items() if value is not None]
        if others:
            raise LfmEdgeError(f"--greedy: takes the best token; leave out --{others[0].replace('_', '-')}")
        return Sampling()
    return bundle.sampling.changed(**given)


def _check_raw(raw: bool, system: str | None, template_option: list[str] | None) -> None:
    if raw and (system is not None or template_option):
        raise LfmEdgeError("--raw: without the chat template there is no --system and no --template-option")


def _template_options(given: list[str] | None) -> dict[str, Any]:
    """`KEY=VALUE` by key; a value that is JSON (true, 3, null) is that, another one is text."""
    options = {}
    for entry in given or []:
        key, equals, value = entry.partition("=")
        if not key.isidentifier() or not equals:
            raise LfmEdgeError(f"--template-option {entry}: expected KEY=VALUE, such as enable_thinking=false")
        try:
            options[key] = json.loads(value)
        except ValueError:
            options[key] = value
    return options


@app.command()
def cache(
    clear: Annotated[bool, typer.Option("--clear", help="Remove what is shown. What is needed again is made again.")
                     ] = False,
    older_than: Annotated[float, typer.Option(metavar="DAYS", min=0.0, help="Only what has not been used for so long.")
                          ] = 0.0,
    json_file: JsonFile = None,
) -> None:
    """Show what lfm-edge keeps in the user's cache: packed ONNX weights, and what bench --against has built."""
    from lfm_edge import cached
    from lfm_edge.files import cache_directory

    found = cached.entries(older_than)
    removed = cached.remove(found) if clear else []
    shown = removed if clear else found
    result = {"directory": str(cache_directory()), "entries": [entry.to_dict() for entry in shown],
              "bytes": sum(entry.nbytes for entry in shown), "removed": clear}
    size = f"{'removed' if clear else 'in all'}: {result['bytes'] / 1e6:,.1f} MB"
    table = Table("what", "of", "size", "last used", "state", "path", title_justify="left", caption_justify="left",
                  title=escape(str(cache_directory())), caption=size)
    for entry in shown:
        table.add_row(entry.what, escape(entry.of), f"{entry.nbytes / 1e6:,.1f} MB", entry.to_dict()["last_used"][:10],
                      entry.state, escape(str(entry.path.relative_to(cache_directory()))))
    _render([table], result, json_file)
    for entry in found if clear else ():
        if entry not in removed:
            err.print(f"{entry.path}: stays ({entry.state})", soft_wrap=True, highlight=False, markup=False)


def main() -> None:
    """Entry point: errors of ours become one line and exit code 2; a kill cleans up as an interrupt does."""
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: PTH123, SIM115 - for as long as the process lives
    elif isinstance(sys.stderr, TextIOWrapper):
        sys.stderr.reconfigure(errors="backslashreplace")  # a path may hold what the terminal's encoding has not
    for name in ("SIGTERM", "SIGHUP"):  # Windows has no SIGHUP: a terminal was closed
        number = getattr(signal, name, None)
        if number and signal.getsignal(number) != signal.SIG_IGN:  # nohup
            signal.signal(number, lambda number, _: sys.exit(_SIGNALLED + number))
    try:
        with checked_stdout(_complain), _notes_shown():
            app()
    except LfmEdgeError as error:
        _complain(error)
        sys.exit(2)


def _let_threads_sleep() -> None:
    """Before torch is loaded: let its OpenMP threads sleep while they wait, where the user has not said otherwise.

    Beside another busy process (CI, a laptop in use) spinning made quantization over 100 times slower on 2 cores;
    sleeping costs little on an idle machine. Not for commands that answer or measure: the policy is one for all of a
    process and its children, and llama.cpp decodes a third slower under it.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


@contextmanager
def _notes_shown() -> Iterator[None]:
    """What the package notes for people, such as what it has put in the cache, one line each on standard error."""
    handler = logging.Handler(logging.INFO)
    handler.emit = lambda record: err.print(record.getMessage(), soft_wrap=True, highlight=False, markup=False)
    notes = {logging.getLogger(name): logging.getLogger(name).level for name in ("lfm_edge", "runtimes")}
    for logger in notes:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        for logger, level in notes.items():
            logger.removeHandler(handler)
            logger.setLevel(level)


def _complain(error: LfmEdgeError | str) -> None:
    err.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)


@contextmanager
def _interruption_told(output: Path) -> Iterator[None]:
    """Say of an interrupted export whether it was written."""
    before = _inode(output)
    try:
        yield
    except KeyboardInterrupt:
        same = _inode(output) == before
        err.print("interrupted; " + ("nothing written" if same else f"{output} is written"), markup=False,
                  highlight=False, soft_wrap=True)
        raise typer.Exit(_SIGNALLED + signal.SIGINT) from None


def _inode(path: Path) -> tuple[int, int] | None:
    """Tells a directory from the one that took its place."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _name_of(model: str) -> str:
    """What a bundle is called by default."""
    path = Path(model).expanduser()
    return path.resolve().name if path.is_dir() else model.removeprefix("random:").rsplit("/", 1)[-1]


def _say_written(path: Path) -> None:
    out.print(f"written to [bold]{escape(str(path))}[/]", soft_wrap=True, highlight=False)


def _for_a_shell(path: Path) -> str:
    """A path as an argument in a shell."""
    name = str(path)
    return shlex.quote(f"./{name}" if name.startswith("-") else name)


def _open(path: Path) -> Bundle:
    from lfm_edge.bundle.bundle import open_bundle

    return open_bundle(path)


def _show_bundle(bundle: Bundle) -> None:
    from lfm_edge.harness.tables import bundle_table

    out.print(bundle_table(bundle))


def _command() -> str:
    """The command line that is running, for a shell."""
    return shlex.join(["lfm-edge", *sys.argv[1:]])


def _render(tables: list[Table], result: dict[str, Any], json_file: Path | None, lines: Sequence[str] = ()) -> None:
    """Lines that lead, and tables, for people; JSON for machines."""
    if json_file == Path("-"):
        print(json.dumps(result, indent=2))
        return
    for line in lines:
        word = line.split(maxsplit=1)[0]
        style = {"PASSED": "green", "FAILED": "red"}.get(word, "")
        out.print(escape(line).replace(word, f"[bold {style}]{word}[/]", 1) if style else escape(line),
                  soft_wrap=True, highlight=False)
    for table in tables:
        out.print(table)
    if json_file is not None:
        _write_json(json_file, result)


def _write_json(path: Path, result: dict[str, Any]) -> None:
    write_text(path, json.dumps(result, indent=2) + "\n")


def _say(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _lines(prompt: str) -> Iterator[str]:
    """Lines of standard input until an empty one; the prompt is shown to people only."""
    if isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # a line that is no text costs that line, not the conversation
    while True:
        if sys.stdin.isatty():
            _say(prompt)
        try:
            line = sys.stdin.readline().strip()
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
            line = ""
        if not line:
            return
        yield line


@contextmanager
def _progress() -> Iterator[Any]:
    """Progress on standard error: bars on a terminal, plain lines otherwise."""
    from lfm_edge.progress import BarProgress, LineProgress

    if not err.is_terminal:
        yield LineProgress(err)
        return
    with BarProgress(err) as progress:
        yield progress


if __name__ == "__main__":
    main()
