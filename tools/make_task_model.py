r"""Pre-trains a tiny model with a chat template for one of three configurations in configs/.

    python tools/make_task_model.py TASK OUT_DIR [--seed 0]

OUT_DIR becomes a Hugging Face folder, in a minute or two of CPU time, with the rows train.jsonl
beside it (reasoning_gym has its own). As with make_tiny_model.py, the text that the model imitates
is careless on purpose, and RL has to learn from the reward which habit is right:

    multi_turn_math  "13+9=": two answers in five are right, the others are random; after "Wrong."
                     three in five are right.
    python_tool      "47*85=": one author in three calls Python and copies its output into the box,
                     the others write random digits.
    reasoning_gym    "Calculate 3 + 9.": two answers in five are right, the others are random.

Training stops when, for REACH_SHARE of held-out problems, no token of the careful solution is less
likely than REACH_PROBABILITY.
"""

import argparse
import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from make_tiny_model import IGNORED, make_model, make_optimizers, token_logprobs
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

START, END, PAD, UNKNOWN = "<|im_start|>", "<|im_end|>", "<|pad|>", "<|unk|>"
CALL, CALL_END = (
    '<tool_call>\n{"name": "python", "arguments": {"code": "print(',
    ')"}}\n</tool_call>',
)
WORDS = [
    *(
        START,
        END,
        "Calculate ",
        "system\n",
        "user\n",
        "assistant\n",
        "\\boxed{",
        "<answer>",
        "</answer>",
    ),
    *("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"),
    *('{"name": "python", "arguments": {"code": "', '"}}', "print("),
]
CHAT_TEMPLATE = (
    "{%- if tools %}{{ '<|im_start|>system\nTools: ' + tools | map(attribute='function.name') "
    "| join(', ') + '<|im_end|>\n' }}{%- endif %}"
    "{%- for message in messages %}{%- if message.role == 'tool' %}"
    "{{ '<|im_start|>user\n<tool_response>\n' + message.content "
    "+ '\n</tool_response><|im_end|>\n' }}"
    "{%- else %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{%- endif %}"
)
VOCAB_SIZE = 128
MAX_STEPS, BATCH_SIZE, CHECK_STEPS = 1500, 64, 25
REACH_SHARE, REACH_PROBABILITY, NUM_HELD_OUT = 0.9, 0.15, 200

Pieces = list[tuple[str, bool]]  # text after the prompt, and whether the model wrote it


@dataclass(frozen=True)
class Problem:
    prompt: str
    answer: str


@dataclass(frozen=True)
class Task:
    has_tool: bool
    draw: Callable[[random.Random], Problem]
    careful: Callable[[Problem], Pieces]
    guess: Callable[[Problem, random.Random], Pieces]
    careful_share: float


def draw_product(rng: random.Random) -> Problem:
    a, b = rng.randint(11, 99), rng.randint(11, 99)
    return Problem(f"{a}*{b}=", str(a * b))


def call_python(problem: Problem) -> Pieces:
    call = CALL + problem.prompt.removesuffix("=") + CALL_END + END
    output = (
        f"\n{START}user\n<tool_response>\n{problem.answer}\n</tool_response>{END}\n"
        f"{START}assistant\n"
    )
    return [(call, True), (output, False), (f"\\boxed{{{problem.answer}}}{END}", True)]


def guess_product(problem: Problem, rng: random.Random) -> Pieces:
    return [(f"\\boxed{{{rng.randint(121, 9801)}}}{END}", True)]


def draw_sum(rng: random.Random) -> Problem:
    """As reasoning-gym's basic_arithmetic with the settings of configs/reasoning_gym_tasks.yaml."""
    terms = [rng.randint(0, 10) for _ in range(rng.randint(2, 3))]
    return Problem(f"Calculate {' + '.join(map(str, terms))}.", str(sum(terms)))


def draw_pair(rng: random.Random) -> Problem:
    a, b = rng.randint(0, 20), rng.randint(0, 20)
    return Problem(f"{a}+{b}=", str(a + b))


def box_sum(problem: Problem) -> Pieces:
    return [(f"\\boxed{{{problem.answer}}}{END}", True)]


def try_twice(problem: Problem, rng: random.Random) -> Pieces:
    wrong, other = rng.randint(0, 40), rng.randint(0, 40)
    feedback = f"\n{START}user\nWrong.{END}\n{START}assistant\n"
    second = problem.answer if rng.random() < 0.6 else other
    return [
        (f"\\boxed{{{wrong}}}{END}", True),
        (feedback, False),
        (f"\\boxed{{{second}}}{END}", True),
    ]


def answer_sum(problem: Problem) -> Pieces:
    return [(f"<answer>{problem.answer}</answer>{END}", True)]


def guess_sum(problem: Problem, rng: random.Random) -> Pieces:
    return [(f"<answer>{rng.randint(0, 30)}</answer>{END}", True)]


TASKS = {
    "multi_turn_math": Task(False, draw_pair, box_sum, try_twice, 0.4),
    "python_tool": Task(True, draw_product, call_python, guess_product, 0.33),
    "reasoning_gym": Task(False, draw_sum, answer_sum, guess_sum, 0.4),
}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Returns a tokenizer with one token per character, except WORDS, and without BOS."""
    characters = [chr(code) for code in range(32, 127)] + ["\n"]
    words = [END, PAD, UNKNOWN, *(word for word in WORDS if word != END), *characters]
    words += [f"<|reserved_{n}|>" for n in range(VOCAB_SIZE - len(words))]
    tokenizer = Tokenizer(
        models.WordLevel({word: n for n, word in enumerate(words)}, unk_token=UNKNOWN)
    )
    longest_first = sorted(WORDS, key=len, reverse=True)
    pattern = "|".join(["".join(f"\\u{ord(c):04x}" for c in word) for word in longest_first])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(f"{pattern}|[\\s\\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        unk_token=UNKNOWN,
        additional_special_tokens=[START],
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def encode(
    tokenizer: PreTrainedTokenizerFast, task: Task, texts: list[tuple[Problem, Pieces]]
) -> tuple[Tensor, Tensor]:
    """Returns token ids [batch, length] and labels [batch, length]: only the model's own tokens."""
    tools = [{"type": "function", "function": {"name": "python"}}] if task.has_tool else None
    rows = []
    for problem, pieces in texts:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": problem.prompt}],
            tools=tools,
            add_generation_prompt=True,
            tokenize=False,
        )
        ids, labels = [], []
        for text, is_trained in [(prompt, False), *pieces]:
            piece = tokenizer(text, add_special_tokens=False)["input_ids"]
            ids += piece
            labels += piece if is_trained else [IGNORED] * len(piece)
        rows.append((ids, labels))
    width = max(len(ids) for ids, _ in rows)
    pad = tokenizer.pad_token_id
    return (
        torch.tensor([ids + [pad] * (width - len(ids)) for ids, _ in rows]),
        torch.tensor([labels + [IGNORED] * (width - len(labels)) for _, labels in rows]),
    )


@torch.no_grad()
def measure_reach(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, task: Task, held_out: list[Problem]
) -> float:
    texts = [(problem, task.careful(problem)) for problem in held_out]
    logprobs, counts = token_logprobs(model, *encode(tokenizer, task, texts))
    least = logprobs.masked_fill(~counts, 0.0).amin(dim=1).exp()
    return (least >= REACH_PROBABILITY).float().mean().item()


def pretrain(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, task: Task, seed: int
) -> None:
    rng, other = random.Random(seed), random.Random(seed + 1)
    held_out = [task.draw(other) for _ in range(NUM_HELD_OUT)]
    optimizers, started = make_optimizers(model), time.monotonic()
    for step in range(1, MAX_STEPS + 1):
        texts = []
        for problem in (task.draw(rng) for _ in range(BATCH_SIZE)):
            is_careful = rng.random() < task.careful_share
            texts.append(
                (problem, task.careful(problem) if is_careful else task.guess(problem, rng))
            )
        logprobs, counts = token_logprobs(model, *encode(tokenizer, task, texts))
        (-logprobs[counts].mean()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in optimizers:
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        if step % CHECK_STEPS == 0:
            reach = measure_reach(model, tokenizer, task, held_out)
            print(
                f"step {step:4d}  {time.monotonic() - started:5.1f} s  held-out reach {reach:.3f}"
            )
            if reach >= REACH_SHARE:
                return
    raise SystemExit(f"No reach of {REACH_SHARE} in {MAX_STEPS} steps: try another --seed.")


def write_rows(path: Path, task: Task, count: int, seed: int) -> None:
    rng = random.Random(seed)
    rows = {problem.prompt: problem for problem in (task.draw(rng) for _ in range(count))}
    with path.open("w") as lines:
        for problem in rows.values():
            lines.write(json.dumps({"prompt": problem.prompt, "answer": problem.answer}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    task, tokenizer = TASKS[args.task], make_tokenizer()
    model = make_model(tokenizer, VOCAB_SIZE)
    pretrain(model, tokenizer, task, args.seed)
    model.save_pretrained(args.out_dir)
    tokenizer.save_pretrained(args.out_dir)
    if args.task != "reasoning_gym":
        write_rows(args.out_dir / "train.jsonl", task, 2000, 100)


if __name__ == "__main__":
    main()
