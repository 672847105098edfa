"""Any bundle, and the float32 model, as a model of EleutherAI's lm-evaluation-harness (lm-eval).

    python -m lfm_edge.harness.lm_eval run --model lfm-edge --model_args model=BUNDLE --tasks gsm8k

is lm-eval's own command line with that model known to it; `lfm-edge eval` compares several.
"""

from __future__ import annotations

import hashlib
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from lfm_edge.bundle.bundle import Bundle, is_bundle, open_bundle
from lfm_edge.bundle.options import DEFAULT_CONTEXT
from lfm_edge.checkpoint.checkpoint import Checkpoint, open_checkpoint
from lfm_edge.checkpoint.tokenizer import TextTokenizer
from lfm_edge.errors import LfmEdgeError
from lfm_edge.session.generation import generate, text_pieces
from lfm_edge.session.sampling import Sampling
from lfm_edge.session.scoring import from_here, loglikelihood, visit
from lfm_edge.session.session import Session
from lfm_edge.session.state import StateSpec
from runtimes.reference import ReferenceSession, float_weights

NAME = "lfm-edge"
_MOST_TOKENS = 256  # of an answer, where a task does not say: lm-eval's own
_CHUNK = 128  # tokens of a step of the float32 model, whose logits over the vocabulary are all held at once
_WITHOUT_EFFECT = {"num_beams": 1, "num_return_sequences": 1, "use_cache": True}
_END = "\u2060end of what is given\u2060"  # where the beginning of an answer ends; stripped by no template
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")

Grouped = dict[tuple[int, ...], dict[tuple[int, ...], list[int]]]  # context, continuation: which requests
Request = tuple[tuple[str, str] | None, list[int], list[int]]  # texts for the cache; tokens of context, continuation


@dataclass(frozen=True)
class Subject:
    """What is evaluated."""

    session: Session
    tokenizer: TextTokenizer
    stop: tuple[int, ...]

    @classmethod
    def of_bundle(cls, bundle: Bundle, threads: int | None, soc: str | None) -> Subject:
        """The artifact in its own runtime."""
        return cls(bundle.session(threads, soc), bundle.tokenizer(), bundle.manifest.config.eos_token_ids)

    @classmethod
    def of_checkpoint(cls, checkpoint: Checkpoint, context: int | None, threads: int | None) -> Subject:
        """The network in float32, with room for `context` tokens."""
        if threads is not None:
            torch.set_num_threads(threads)
        config = checkpoint.config
        context = context or min(DEFAULT_CONTEXT, config.max_position_embeddings)
        session = ReferenceSession(config, float_weights(checkpoint), StateSpec.of(config, context),
                                   chunk=min(_CHUNK, context))
        return cls(session, checkpoint.tokenizer(), config.eos_token_ids)


def opened(model: str | Path) -> Bundle | Checkpoint:
    """A bundle directory, or a checkpoint as `export` takes it. Raises LfmEdgeError where it is neither."""
    return open_bundle(model) if is_bundle(Path(model)) else open_checkpoint(model)


def most_context(model: Bundle | Checkpoint) -> int:
    """The longest context that it can be asked with."""
    return model.manifest.state.context if isinstance(model, Bundle) else model.config.max_position_embeddings


@register_model(NAME)
class EdgeLM(TemplateLM):
    """A bundle or a checkpoint behind lm-eval's interface.

    Requests are taken in the order of their tokens, and what prompts have in common (few-shot examples, the question
    before each choice) is prefilled once. One sequence at a time: a bundle has a batch of 1.

    model: a bundle directory, or a checkpoint: a directory, a hub id or random:PRESET, computed in float32
    context: most tokens of a prompt with its answer; of a bundle at most, and by default, its own
    think_end_token: what a thinking model ends its thoughts with; only what follows the last one is the answer
    template_options: switches of the chat template
    batch_size: 1, or auto; max_batch_size, device: what lm-eval gives to every model, a GPU where nothing else is said,
        and nothing here has a choice of

    prompt_tokens, prefilled_tokens: of all prompts so far; those that were not shared
    cut_prompts: how many were too long for the context and lost their beginning
    Raises LfmEdgeError for what cannot be opened or honoured.
    """

    def __init__(self, model: str | Path | Bundle | Checkpoint, *, context: int | None = None,
                 threads: int | None = None, soc: str | None = None, think_end_token: str | None = None,
                 template_options: Mapping[str, Any] | None = None, batch_size: int | str = 1,
                 max_batch_size: int | None = None, device: str | None = None) -> None:
        super().__init__()
        if str(batch_size) not in ("1", "auto"):
            raise LfmEdgeError(f"batch_size={batch_size}: a bundle has a batch of 1")
        if think_end_token == "":
            raise LfmEdgeError("think_end_token is empty; expected a text such as </think>")
        model = opened(model) if isinstance(model, str | Path) else model
        most = most_context(model)
        if context is not None and not 2 <= context <= most:
            raise LfmEdgeError(f"context={context}: this model takes 2 to {most} tokens")
        if isinstance(model, Bundle):
            self.subject = Subject.of_bundle(model, threads, soc)
        elif soc is not None:
            raise LfmEdgeError(f"soc={soc}: a checkpoint is not compiled for chips")
        else:
            self.subject = Subject.of_checkpoint(model, context, threads)
        self.max_length = context or self.session.spec.context
        self.think_end_token = think_end_token
        self.template_options = dict(template_options or {})
        self.tokenizer.check_options(self.template_options)
        self.prompt_tokens = self.prefilled_tokens = self.cut_prompts = 0

    @property
    def tokenizer(self) -> TextTokenizer:  # type: ignore[override]
        return self.subject.tokenizer

    @property
    def session(self) -> Session:
        return self.subject.session

    @property
    def eot_token_id(self) -> int:
        return self.subject.stop[0]

    @property
    def prefix_token_id(self) -> int:
        """What comes before a text that has no context: the first token, where the tokenizer names one."""
        first = self.tokenizer.named("bos_token")
        return self.eot_token_id if first is None else first

    @property
    def tokenizer_name(self) -> str:
        """Tells what makes tokens of a conversation: prompts that lm-eval keeps are kept under it."""
        files = f"{self.tokenizer.backend.to_str()} {self.tokenizer.template}"
        return f"{NAME}-{hashlib.sha256(files.encode()).hexdigest()[:16]}"

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The text of the template. Raises LfmEdgeError where there is none, and for one by name."""
        if isinstance(chat_template, str):
            raise LfmEdgeError(f"chat template {chat_template!r}: only the default one is used; leave the name out")
        if chat_template and self.tokenizer.template is None:
            raise LfmEdgeError("there is no chat template")
        return self.tokenizer.template if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a conversation; without a generation prompt, up to the end of its last message."""
        if add_generation_prompt:
            return self.tokenizer.chat_text(chat_history, options=self.template_options)
        *before, last = chat_history
        marked = [*before, {**last, "content": last["content"] + _END}]
        text, found, _ = self.tokenizer.chat_text(marked, answer=False, options=self.template_options).rpartition(_END)
        if not found:
            raise LfmEdgeError("the chat template does not show the beginning of an answer")
        return text

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids; where nothing is said, with what the tokenizer puts before a text, unless it is there already."""
        first = self.tokenizer.decode([self.prefix_token_id], skip_special=False)
        special = not string.startswith(first) if add_special_tokens is None else add_special_tokens
        return self.tokenizer.encode(string, special=special)

    # --- likelihoods ----------------------------------------------------------------------------------------------

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Of whole texts, in windows as long as the context that each predict what comes after the window before."""
        windows: list[Request] = []
        counts = []
        for (text,) in (request.args for request in requests):
            pairs = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1)
            before = len(windows)
            windows += [(None, *make_disjoint_window(pair)) for pair in pairs]
            counts.append(len(windows) - before)
        scores = iter(self._loglikelihood_tokens(windows))
        totals = [sum(next(scores)[0] for _ in range(count)) for count in counts]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _loglikelihood_tokens(self, requests: Sequence[Request], **_: Any) -> list[tuple[float, bool]]:
        """Continuations of one context are scored from where it ends; one that is there twice, once."""
        wanted: Grouped = defaultdict(lambda: defaultdict(list))
        for index, (_, context, continuation) in enumerate(requests):
            if not 1 <= len(continuation) <= self.max_length:
                raise LfmEdgeError(f"a continuation of {len(continuation)} tokens cannot be scored in a context of "
                                   f"{self.max_length}")
            whole = [*(context or [self.prefix_token_id]), *continuation]
            kept = whole[-(self.max_length + 1):]
            self.cut_prompts += len(kept) < len(whole)
            end = len(kept) - len(continuation)
            self.prompt_tokens += end
            wanted[tuple(kept[:end])][tuple(kept[end:])].append(index)
        scores: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        for context, logits in self._at_the_end_of(list(wanted), "scored"):
            for continuation, indices in from_here(self.session, wanted[context].items()):
                score = loglikelihood(self.session, logits, continuation)
                for index in indices:
                    scores[index] = score
                    if requests[index][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[index][0], score)
        return scores

    # --- answers --------------------------------------------------------------------------------------------------

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Answers, by the sampling that each task asks for; what it does not say is greedy, whatever the checkpoint
        says. An answer also ends with the model's own stop tokens."""
        wanted: dict[tuple[int, ...], list[tuple[int, int, Answer]]] = defaultdict(list)
        for index, (context, given) in enumerate(request.args for request in requests):
            asked = Answer.of(given)
            room = self.max_length - asked.max_tokens
            if room < 1:
                raise LfmEdgeError(f"an answer of up to {asked.max_tokens} tokens leaves no room for a prompt in a "
                                   f"context of {self.max_length}: export with a larger --context")
            tokens = self.tok_encode(context) or [self.prefix_token_id]
            self.cut_prompts += len(tokens) > room
            *beginning, last = tokens[-room:]
            self.prompt_tokens += len(beginning)
            wanted[tuple(beginning)].append((index, last, asked))
        answers = [""] * len(requests)
        for beginning, _ in self._at_the_end_of(list(wanted), "answered"):
            draws: Counter[int] = Counter()  # of one prompt, whose answers are to differ where they are drawn
            for index, last, asked in from_here(self.session, wanted[beginning]):
                answers[index] = self._answer(last, asked, seed=_seed((*beginning, last), draws[last]))
                draws[last] += 1
                self.cache_hook.add_partial("generate_until", requests[index].args, answers[index])
        return answers

    def _answer(self, last: int, asked: Answer, seed: int) -> str:
        """last: the prompt's last token, which the session has not taken yet"""
        tokens = generate(self.session, [last], max_tokens=asked.max_tokens, stop=self.subject.stop,
                          sampling=asked.sampling, seed=seed)
        thinks = self.think_end_token is not None
        said = ""
        with closing(tokens):
            for piece in text_pieces(self.tokenizer.shown if thinks else self.tokenizer.decode, tokens):
                said += piece
                if (not thinks or self.think_end_token in said) and asked.ends(self._without_thoughts(said)):
                    break
        return asked.cut(self._without_thoughts(said))

    def _without_thoughts(self, said: str) -> str:
        return said if self.think_end_token is None else said.rpartition(self.think_end_token)[2].lstrip()

    def _at_the_end_of(self, prompts: list[tuple[int, ...]], done: str) -> Iterator[tuple[tuple[int, ...], Any]]:
        """Each prompt and the logits after it, with the session there."""
        for stop in tqdm(visit(self.session, prompts), total=len(prompts), desc=f"prompts {done}", disable=None):
            self.prefilled_tokens += stop.prefilled
            yield prompts[stop.index], stop.logits


@dataclass(frozen=True)
class Answer:
    """How a task wants to be answered. until: texts that end an answer and are not part of it"""

    max_tokens: int
    until: tuple[str, ...]
    sampling: Sampling

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Answer:
        """given: the task's `generation_kwargs`. Raises LfmEdgeError for one that cannot be honoured."""
        options = dict(normalize_gen_kwargs(dict(given), _MOST_TOKENS))
        max_tokens, until = options.pop("max_gen_toks"), options.pop("until")
        filters = {name: options.pop(name) for name in _SAMPLING if name in options}
        if not options.pop("do_sample"):
            filters = {name: value for name, value in filters.items() if name == "repetition_penalty"}
        elif not filters.setdefault("temperature", 1.0):
            raise LfmEdgeError("a task asks for do_sample with a temperature of 0; one of them cannot be")
        for name, value in options.items():
            if _WITHOUT_EFFECT.get(name) != value:
                raise LfmEdgeError(f"a task asks for {name}={value!r}, which sessions do not have")
        return cls(max_tokens, tuple(filter(None, until)), Sampling().changed(**filters))

    def ends(self, text: str) -> bool:
        """Whether the answer ends in this text, or before its end."""
        return any(stop in text for stop in self.until)

    def cut(self, text: str) -> str:
        """The answer without what ends it."""
        for stop in self.until:
            text = text.partition(stop)[0]
        return text


def _seed(prompt: Sequence[int], draw: int) -> int:
    """Of an answer: another for each prompt and draw, the same on every run, whatever else is asked."""
    return int.from_bytes(hashlib.sha256(f"{draw} {list(prompt)}".encode()).digest()[:8], "big")


def main() -> None:
    """lm-eval's own command line."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except LfmEdgeError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
