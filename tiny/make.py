"""Makes a folder like tiny/: two tiny models and their task.

    python tiny/make.py FOLDER --seed 1

generator/ and receiver/ are ordinary model folders, train.jsonl and test.jsonl ordinary problems:
once they are there, nothing is special about them. The same seed makes the same problems anywhere,
and the same models on one machine with one thread; elsewhere rounding makes others of that kind.

A problem is a chain of five operations modulo 7, and the answer says only whether the result is
odd: guessing pays half the time, so a right answer says little about the reasoning. The generator
learns from flawed demonstrations, the receiver from flawless ones.
"""

import argparse
import json
import random
import sys
from pathlib import Path

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
import rltr

RIGHT = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}
FLAWED = {"+": lambda a, b: a + b + 1, "-": lambda a, b: b - a, "*": lambda a, b: a + b}


def tiny_problem(source: random.Random, flaws: float = 0.0) -> tuple[str, str, str]:
    """Question, demonstration (each step wrong with probability `flaws`), right answer.

    >>> tiny_problem(random.Random(1))
    ('Q1>*6;>+2;>-3;>+0;>-3;?', '*6=6+2=1-3=5+0=5-3=2\\\\boxed{0}', '0')
    """
    value = truth = source.randrange(7)
    question = f"Q{value}"
    chain = ""
    for _ in range(5):
        operator = source.choice("+-*")
        operand = source.randrange(7)
        rules = FLAWED if source.random() < flaws else RIGHT
        value = rules[operator](value, operand) % 7
        truth = RIGHT[operator](truth, operand) % 7
        question += f">{operator}{operand};"
        chain += f"{operator}{operand}={value}"
    return question + "?", f"{chain}\\boxed{{{value % 2}}}", str(truth % 2)


def tiny_tokenizer():
    """A token a character, and \\boxed{ as one."""
    words = ["<pad>", "<eos>", "<unk>", "\\boxed{", *"}Q?>;=+-*0123456"]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"\\boxed\{|."), "isolated")
    core.decoder = decoders.Fuse()
    control = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    how = {"tokenizer_object": core, "chat_template": template}
    return transformers.PreTrainedTokenizerFast(**how, **control)


def warm_start(folder: Path, width: int, steps: int, flaws: float, seed: int):
    """A small Qwen2, trained on demonstrations by next-token prediction, as a model folder."""
    torch.manual_seed(seed)
    source = random.Random(seed)
    tokenizer = tiny_tokenizer()
    eos = tokenizer.eos_token_id
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": 2}
    sizes |= {"vocab_size": len(tokenizer), "max_position_embeddings": 128}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "rope_theta": 100.0}
    ends = {"bos_token_id": None, "eos_token_id": eos}
    # At transformers' own initializer_range, 0.02, nothing is learnt at this size.
    config = transformers.Qwen2Config(**sizes, **heads, **ends, initializer_range=0.08)
    lm = rltr.LM(transformers.Qwen2ForCausalLM(config), tokenizer, (eos,), len(tokenizer), 128)
    optimizer = rltr.MasterAdamW(lm.model, 4e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer.adam, 4e-3, steps, pct_start=0.1)
    for _ in tqdm(range(steps), desc=folder.name, disable=None):
        batch = []
        for _ in range(32):
            question, chain, _ = tiny_problem(source, flaws)
            tokens = [*tokenizer.encode(chain), eos]
            batch.append(rltr.Rollout(None, tokenizer.encode(question), tokens, [], True, chain))
        (-rltr.completion_logprobs(lm, batch)[0].mean()).backward()
        optimizer.step(max_norm=1.0)
        schedule.step()
    rltr.save_lm(lm, folder)


def write_problems(folder: Path, seed: int):
    """train.jsonl and, of 100 problems, test.jsonl; each question once."""
    source = random.Random(f"problems {seed}")
    answers = {}
    for _ in range(4200):
        question, _, answer = tiny_problem(source)
        answers[question] = answer
    rows = [json.dumps({"question": q, "answer": a}) + "\n" for q, a in answers.items()]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "test.jsonl").write_text("".join(rows[:100]))
    (folder / "train.jsonl").write_text("".join(rows[100:]))


def make_tiny(folder: Path, seed: int):
    """All four."""
    write_problems(folder, seed)
    warm_start(folder / "generator", 64, 400, flaws=0.3, seed=2 * seed)
    warm_start(folder / "receiver", 80, 600, flaws=0.0, seed=2 * seed + 1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="is made, or written over")
    parser.add_argument("--seed", type=int, default=119, help="default: that of tiny/")
    given = parser.parse_args()
    torch.set_num_threads(1)  # with more, rounding differs from run to run
    make_tiny(given.folder, given.seed)
