r"""Pre-trains the tiny model of the quickstart, in a minute or two of CPU time.

    python tools/make_tiny_model.py OUT_DIR [--seed 0]

OUT_DIR becomes a Hugging Face folder with a Qwen3 model: grouped-query attention, QK-norm, RMSNorm,
SwiGLU, RoPE; two KV heads, an even number of layers and an even vocabulary, so TP=2 and PP=2 fit.

The base model is wrong two times in three on purpose. Its text imitates careless authors
(`arithmetic.Habits`): half of them answer without any working, and the others often forget a carry.
Every step of the right procedure is in the data and is learned, but a sample from the model has the
habits of the data. RL need not teach it digits; it has to learn, from the reward alone, to show the
working and to carry.

Training stops by measurement, not by step count, on problems that are never trained:

    accuracy  share of exactly right answers, sampled at temperature 1: RL optimizes it, and it
              changes smoothly, while greedy decoding jumps with each habit. Must be within BAND.
    reach     share of problems with no token less likely than REACH_PROBABILITY in their careful
              solution. Must be at least MIN_REACH: below it the model has not learned to add, and
              RL would have to teach it.
"""

import argparse
import random
import time
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from arithmetic import (
    Habits,
    Problem,
    distinct_problems,
    draw_problems,
    final_answer,
    write_solution,
)
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

END, PAD, UNKNOWN = "<|endoftext|>", "<|pad|>", "<|unk|>"
VOCAB_SIZE = 32  # 18 in use; the rest makes the size divisible by any small TP

BAND = (0.25, 0.38)
MIN_REACH = 0.98
REACH_PROBABILITY = 0.15  # the rarest correct habit, a carry, has probability 0.35 in the text

MAX_STEPS, DECAY_STEPS, BATCH_SIZE, NUM_CHUNKS = 800, 400, 64, 2
MATRIX_LR, OTHER_LR, WARMUP_STEPS = 2e-2, 3e-3, 50  # Muon | AdamW
CHECK_STEPS, NUM_HELD_OUT, MAX_NEW_TOKENS = 10, 512, 32
IGNORED = -100  # label that cross_entropy ignores


def held_out_problems() -> list[Problem]:
    return distinct_problems("eval", NUM_HELD_OUT, seed=0)  # the same for every --seed


def make_tokenizer() -> PreTrainedTokenizerFast:
    r"""Returns a tokenizer with one token per character, except `\boxed{`, and without BOS."""
    words = [END, PAD, UNKNOWN, *"0123456789", "+", "=", ";", "\\boxed{", "}"]
    words += [f"<|reserved_{n}|>" for n in range(VOCAB_SIZE - len(words))]
    tokenizer = Tokenizer(
        models.WordLevel({word: n for n, word in enumerate(words)}, unk_token=UNKNOWN)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\\boxed\{|."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()  # join without spaces
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
        chat_template="{% for message in messages %}{{ message['content'] }}{% endfor %}",
    )


def make_model(
    tokenizer: PreTrainedTokenizerFast, vocab_size: int = VOCAB_SIZE
) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,  # GPU attention kernels need it, though hidden_size / heads is 32
        max_position_embeddings=256,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        # about 1 / sqrt(hidden_size): the usual 0.02 learns more slowly here
        initializer_range=0.08,
        dtype="float32",
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model


def encode(
    tokenizer: PreTrainedTokenizerFast, problems: list[Problem], habits: Habits, rng: random.Random
) -> tuple[Tensor, Tensor]:
    """Returns token ids [batch, length] and labels [batch, length].

    The loss is on the solutions only, because the digits of the problem are noise.
    """
    texts = [p.prompt + write_solution(p, habits, rng) + END for p in problems]
    ids = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")["input_ids"]
    labels = ids.masked_fill(ids == tokenizer.pad_token_id, IGNORED)
    labels[:, : len(problems[0].prompt)] = IGNORED
    return ids, labels


def token_logprobs(model: Qwen3ForCausalLM, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the logprob of every token after the first, and the loss mask: [batch, length - 1].

    Needs no attention mask: padding is on the right, which causal attention does not see.
    """
    logits = model(input_ids=ids[:, :-1]).logits
    logprobs = -F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    return logprobs, labels[:, 1:] != IGNORED


@torch.no_grad()
def sample(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    problems: list[Problem],
    greedy: bool,
) -> list[str]:
    prompts = tokenizer([p.prompt for p in problems], return_tensors="pt")["input_ids"]
    out = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=MAX_NEW_TOKENS,
        do_sample=not greedy,
    )
    return tokenizer.batch_decode(out[:, prompts.shape[1] :], skip_special_tokens=True)


def measure_accuracy(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    problems: list[Problem],
    greedy: bool = False,
) -> float:
    texts = sample(model, tokenizer, problems, greedy)
    return sum(final_answer(t) == p.answer for t, p in zip(texts, problems, strict=True)) / len(
        problems
    )


@torch.no_grad()
def measure_reach(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, problems: list[Problem]
) -> float:
    careful = Habits(shows_working=1.0, carries=1.0)
    logprobs, counts = token_logprobs(
        model, *encode(tokenizer, problems, careful, random.Random(0))
    )
    least = logprobs.masked_fill(~counts, 0.0).amin(dim=1).exp()
    return (least >= REACH_PROBABILITY).float().mean().item()


def make_optimizers(model: Qwen3ForCausalLM) -> list[tuple[Optimizer, LRScheduler]]:
    """Returns Muon for the matrices (half the steps of AdamW alone) and AdamW for the rest."""

    def factor(step: int) -> float:
        return min((step + 1) / WARMUP_STEPS, max(0.1, 1 - step / DECAY_STEPS))

    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "layers" in n]
    others = [p for n, p in model.named_parameters() if not (p.ndim == 2 and "layers" in n)]
    muon = torch.optim.Muon(matrices, lr=MATRIX_LR, weight_decay=0.0)
    adamw = torch.optim.AdamW(others, lr=OTHER_LR, betas=(0.9, 0.95), weight_decay=0.0)
    return [(optimizer, LambdaLR(optimizer, factor)) for optimizer in (muon, adamw)]


def train_step(
    model: Qwen3ForCausalLM,
    optimizers: list[tuple[Optimizer, LRScheduler]],
    batch: tuple[Tensor, Tensor],
) -> float:
    """Makes one optimizer step; returns the mean loss per token.

    Short and long rows are separate chunks: padding every guess to the length of a solution with
    working would double the time.
    """
    ids, labels = batch
    lengths = (labels != IGNORED).cumsum(dim=1).argmax(dim=1) + 1  # position after the last token
    num_tokens, total = (labels != IGNORED).sum(), 0.0
    for rows in lengths.argsort().chunk(NUM_CHUNKS):
        width = lengths[rows].max()
        logprobs, counts = token_logprobs(model, ids[rows, :width], labels[rows, :width])
        loss = -logprobs[counts].sum() / num_tokens
        loss.backward()
        total += loss.item()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer, schedule in optimizers:
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return total


def pretrain(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int) -> float:
    held_out = held_out_problems()
    problems, rng, habits = draw_problems("train", seed), random.Random(seed), Habits()
    optimizers = make_optimizers(model)
    started = time.monotonic()
    for step in range(1, MAX_STEPS + 1):
        loss = train_step(
            model, optimizers, encode(tokenizer, list(islice(problems, BATCH_SIZE)), habits, rng)
        )
        if step % CHECK_STEPS == 0:
            reach = measure_reach(model, tokenizer, held_out[:256])
            clock = f"step {step:4d}  {time.monotonic() - started:5.1f} s"
            print(f"{clock}  loss {loss:.3f}  held-out reach {reach:.3f}", end="", flush=True)
            if reach >= MIN_REACH:  # sampling is slow: only when it can end training
                accuracy = measure_accuracy(model, tokenizer, held_out)
                print(f"  accuracy {accuracy:.3f}", end="")
                if BAND[0] <= accuracy <= BAND[1]:
                    print()
                    return accuracy
            print(flush=True)
    raise SystemExit(
        f"No accuracy within {BAND} at a reach of {MIN_REACH} in {MAX_STEPS} steps: try another "
        "--seed, or raise MAX_STEPS in tools/make_tiny_model.py if the figures were still rising."
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, "
        f"{torch.get_num_threads()} threads"
    )
    accuracy = pretrain(model, tokenizer, args.seed)
    model.save_pretrained(args.out_dir)
    tokenizer.save_pretrained(args.out_dir)
    greedy = measure_accuracy(model, tokenizer, held_out_problems(), greedy=True)
    print(
        f"{args.out_dir}: of {NUM_HELD_OUT} held-out problems {accuracy:.1%} right "
        f"(sampled at temperature 1; greedy {greedy:.1%})"
    )


if __name__ == "__main__":
    main()
