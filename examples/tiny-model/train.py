"""Train the tiny LFM2 model of this folder from nothing, on one CPU core, and score what was written.

    python examples/tiny-model/train.py --output first
    python examples/tiny-model/train.py --output second --start first --seed 1 --steps 900 --peak 6e-4 --sums 0.1 \\
        --rounding-from 0
    python examples/tiny-model/train.py --average first second
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from encoding import MARK, UNMARK, Encoder, Sequence, check_encoder
from muon import Muon
from safetensors.torch import load_file, save_file
from score import accuracy, int4_weights, padded, quantized
from tasks import (
    FACTS,
    MOST_PAIRS,
    TASKS,
    Example,
    Message,
    arithmetic,
    assistant,
    chat,
    copy,
    every_sum,
    fact,
    prompts,
    random_pairs,
    random_sum,
    recall,
    user,
)
from torch import nn
from transformers import Lfm2Config, Lfm2ForCausalLM

from lfm_edge.checkpoint.config import ModelConfig
from lfm_edge.checkpoint.layers import ATTENTION, CONV
from lfm_edge.checkpoint.tokenizer import SMALLEST_VOCABULARY, write_chatml_tokenizer

HERE = Path(__file__).resolve().parent
EVALUATION_SEED = 1_000_003
ANSWER_TOKENS = 150  # in a usual batch: only scales the loss
PARTS = 2  # batches of different lengths, and so of different tasks, in each step

CONFIG = ModelConfig(
    vocab_size=SMALLEST_VOCABULARY, hidden_size=128, intermediate_size=256,
    num_attention_heads=4, num_key_value_heads=2, head_dim=32,
    layer_types=(CONV, CONV, ATTENTION, CONV, CONV, ATTENTION, CONV, ATTENTION),
    max_position_embeddings=2048,
)


def sum_drill(rng: random.Random) -> list[Message]:
    """Many sums in one message, results marked: three times as many per token as asking for each."""
    sums = [random_sum(rng) for _ in range(rng.randint(8, 24))]
    return [user("".join(f"{question}={MARK}{result} {UNMARK}" for question, result in sums))]


def recall_drill(rng: random.Random, most_pairs: int) -> list[Message]:
    """Pairs, then the same pairs again in another order, their values marked."""
    pairs = random_pairs(rng, rng.randint(2, most_pairs))
    again = rng.choices(list(pairs), k=rng.randint(4, 24))
    first = " ".join(f"{key}={value}" for key, value in pairs.items())
    return [user(first + " " + " ".join(f"{key}={MARK}{pairs[key]}{UNMARK}" for key in again))]


def copy_drill(rng: random.Random, most_words: int, most_letters: int) -> list[Message]:
    """Random words that come again and again; from the second time on they are marked."""
    text = copy(rng, most_words, most_letters).answer
    return [user(text + MARK + f" {text}" * rng.randint(2, 4) + UNMARK)]


def more_questions(rng: random.Random, example: Example, most: int) -> list[Message]:
    """The conversation of a recall or chat example with up to `most` further keys asked for."""
    text = example.messages[0]["content"]
    pairs = dict(word.split("=") for word in text.split() if "=" in word)
    turns = example.conversation()
    for key in rng.choices(list(pairs), k=rng.randint(0, most)):
        turns += [user(f"{key}?"), assistant(pairs[key])]
    return turns


def conversation(rng: random.Random, progress: float, sums: float) -> list[Message]:
    """One training conversation; `progress` from 0 to 1 moves from drills and two pairs to the tasks themselves.

    sums: the share of conversations about arithmetic
    """
    ramp = min(1.0, progress / 0.5)
    drill = 0.6 - 0.4 * ramp
    pairs, filler = 2 + round((MOST_PAIRS - 2) * ramp ** 2), 0.5 * ramp
    kind = (rng.random() - sums) / (1 - sums)
    if kind < 0:
        if rng.random() < drill:
            return sum_drill(rng)
        return [turn for _ in range(rng.randint(1, 3)) for turn in arithmetic(rng).conversation()]
    if kind < 28 / 70:
        if rng.random() < drill:
            return recall_drill(rng, pairs)
        return more_questions(rng, recall(rng, pairs, filler), 4)
    if kind < 46 / 70:
        return more_questions(rng, chat(rng, min(20, pairs), filler), 3)
    if kind < 62 / 70:
        words, letters = (3, 7) if ramp > 0.4 else (1, 3 + round(10 * ramp))
        if rng.random() < drill:
            return copy_drill(rng, words, letters)
        return [turn for _ in range(rng.randint(1, 2)) for turn in copy(rng, words, letters).conversation()]
    return fact(rng).conversation()


def batches(options: argparse.Namespace) -> Iterator[list[Sequence]]:
    """PARTS batches for each step, each of sequences of similar length."""
    rng, encoder, done = random.Random(options.seed), Encoder(), 0
    count, tokens = PARTS * options.steps, options.batch_tokens // PARTS
    while done < count:
        progress = max(done / count, 0.5 if options.start else 0.0)
        made = (encoder(conversation(rng, progress, options.sums)) for _ in range(256))
        pool = sorted(made, key=lambda s: len(s.ids))
        chunks, chunk = [], []
        for sequence in pool:
            if chunk and (len(chunk) + 1) * len(sequence.ids) > tokens:
                chunks.append(chunk)
                chunk = []
            chunk.append(sequence)
        chunks.append(chunk)
        rng.shuffle(chunks)
        yield from chunks[: count - done]
        done += len(chunks)


def weighted_loss(model: Lfm2ForCausalLM, batch: list[Sequence]) -> torch.Tensor:
    """Cross entropy of the next token, weighted; a short answer counts the same in a long batch as in a short."""
    ids = padded(batch)  # [B, T]
    weights = torch.tensor([s.weights + [0.0] * (ids.shape[1] - len(s.ids)) for s in batch])  # [B, T]
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    weights = weights[:, 1:].flatten()
    return (losses * weights).sum() / ANSWER_TOKENS


def rate(step: int, steps: int) -> float:
    """The learning rate as a share of its peak: 50 steps of warm-up, level up to the middle, a cosine to 1 %."""
    late = max(0.0, 2 * step / steps - 1)
    return min(1.0, (step + 1) / 50) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * late)))


def new_optimizers(model: Lfm2ForCausalLM, options: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """Muon for the linear layers; AdamW, at half the rate and without decay, for everything else."""
    linear = [p for name, p in model.named_parameters() if _is_linear(name, p)]
    others = [p for name, p in model.named_parameters() if not _is_linear(name, p)]
    return [Muon(linear, lr=options.peak, weight_decay=options.weight_decay),
            torch.optim.AdamW(others, lr=options.peak / 2, betas=(0.9, 0.98), weight_decay=0.0, fused=True)]


def _is_linear(name: str, parameter: torch.Tensor) -> bool:
    return parameter.ndim == 2 and "embed" not in name


def train(model: Lfm2ForCausalLM, options: argparse.Namespace) -> float:
    """Train in place; returns the seconds it took. Every other late step sees weights rounded to int4."""
    optimizers = new_optimizers(model, options)
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda step: rate(step, options.steps)) for o in optimizers]
    started, shown = time.time(), []
    data = batches(options)
    for step in range(options.steps):
        rounded = step > options.rounding_from * options.steps and step % 2 == 1
        with quantized(model, int4_weights if rounded else None):
            for _ in range(PARTS):
                loss = weighted_loss(model, next(data)) / PARTS
                loss.backward()
                shown.append(loss.item() * PARTS)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        model.zero_grad()
        if (step + 1) % 100 == 0:
            print(f"step {step + 1} loss {sum(shown) / len(shown):.4f} {time.time() - started:.0f} s", flush=True)
            shown.clear()
        if (step + 1) % options.save_every == 0 and step + 1 < options.steps:
            save(model, options.output)
            print("   ", scores(load(options.output), 100, options.score_seed), flush=True)
    return time.time() - started


def save(model: Lfm2ForCausalLM, directory: Path) -> None:
    """Write the checkpoint beside `directory`, then put it in its place."""
    partial = directory.with_name(directory.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    weights = {name: p.detach().to(torch.bfloat16).contiguous() for name, p in model.named_parameters()}
    save_file(weights, partial / "model.safetensors", metadata={"format": "pt"})
    (partial / "model.safetensors").chmod(0o644)
    config = CONFIG.to_dict() | {"dtype": "bfloat16"}
    (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    write_chatml_tokenizer(partial, CONFIG.vocab_size)
    counts = {task: len(FACTS) if task == "facts" else 60 for task in TASKS}
    rows = [vars(example) for task in TASKS for example in prompts(task, counts[task], EVALUATION_SEED)]
    (partial / "tasks.json").write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    shutil.rmtree(directory, ignore_errors=True)
    partial.rename(directory)


def load(directory: Path) -> Lfm2ForCausalLM:
    """The checkpoint as it was written, its bf16 weights computed with in fp32."""
    model = new_model()
    weights = {name: tensor.float() for name, tensor in load_file(directory / "model.safetensors").items()}
    model.load_state_dict(weights | {"lm_head.weight": weights["model.embed_tokens.weight"]})
    return model.eval()


def average(first: Path, second: Path) -> Lfm2ForCausalLM:
    """The model half-way between two checkpoints, one of which was trained on from the other."""
    model, other = load(first), load(second).state_dict()
    model.load_state_dict({name: (tensor + other[name]) / 2 for name, tensor in model.state_dict().items()})
    return model


def new_model() -> Lfm2ForCausalLM:
    """Random weights with the dimensions of CONFIG, scaled so that a small model starts learning at once."""
    model = Lfm2ForCausalLM._from_config(Lfm2Config(**CONFIG.to_dict()), attn_implementation="sdpa")
    for name, parameter in model.named_parameters():
        if name.endswith("conv.conv.weight"):
            nn.init.normal_(parameter, std=CONFIG.conv_taps ** -0.5)
        elif name.endswith(("q_layernorm.weight", "k_layernorm.weight")):
            nn.init.constant_(parameter, 1.5)  # sharper attention: recall looks for one place in hundreds
        elif parameter.ndim == 2:
            small = name.endswith(("out_proj.weight", "w2.weight", "embed_tokens.weight"))
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5 * (0.4 if small else 1.0))
    return model


def scores(model: Lfm2ForCausalLM, count: int, seed: int, **rounding: object) -> dict[str, float]:
    """The share of exact answers for each task, over `count` prompts."""
    return {task: accuracy(model, prompts(task, count, seed), **rounding) for task in TASKS}


def main() -> None:
    """Parse the options, train, write the checkpoint and print its scores."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=HERE / "checkpoint")
    parser.add_argument("--start", type=Path, help="checkpoint to go on from, without the first half's easy drills")
    parser.add_argument("--sums", type=float, default=0.3, help="share of conversations about arithmetic")
    parser.add_argument("--steps", type=int, default=3600)
    parser.add_argument("--batch-tokens", type=int, default=1536)
    parser.add_argument("--peak", type=float, default=4e-3, help="largest learning rate")
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--rounding-from", type=float, default=0.7,
                        help="share of the steps after which every other step rounds the weights to int4")
    parser.add_argument("--save-every", type=int, default=600)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--average", type=Path, nargs=2, metavar="CHECKPOINT",
                        help="do not train: write the mean of two checkpoints to --output")
    parser.add_argument("--score-only", action="store_true", help="do not train: score the checkpoint in --output")
    parser.add_argument("--score-seed", type=int, default=EVALUATION_SEED)
    parser.add_argument("--score-count", type=int, default=500, help="prompts for each task")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    if options.average:
        save(average(*options.average), options.output)
    elif not options.score_only:
        train_and_save(options)
    report(load(options.output), options)


def train_and_save(options: argparse.Namespace) -> None:
    """Train from nothing or from `--start`; a checkpoint is in `--output` from the beginning on."""
    model = load(options.start).train() if options.start else new_model()
    save(model, options.output)
    check_encoder(options.output)
    seconds = train(model, options)
    save(model, options.output)
    print(f"{CONFIG.num_parameters} parameters, {seconds / 60:.1f} minutes of training")


def report(model: Lfm2ForCausalLM, options: argparse.Namespace) -> None:
    """Print the scores as they are and with rounded weights and activations."""
    count, seed = options.score_count, options.score_seed
    print("fp32", scores(model, count, seed))
    print("fp32, every sum", accuracy(model, every_sum()))
    print("int4 weights", scores(model, count, seed, weights=int4_weights))
    print("int4 weights, int8 activations", scores(model, count, seed, weights=int4_weights, activations=True))


if __name__ == "__main__":
    main()
