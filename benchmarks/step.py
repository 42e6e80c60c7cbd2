"""Seconds per RL step: rltr.py against TRL's GRPOTrainer, with the answer reward alone (RLVR).

    pip install trl
    python benchmarks/step.py                            # on the CPU, both in one run

Two kinds of work, 32 prompts x 8 samples each, temperature 1, no KL, one optimizer step a batch,
fp32, the same start and problems. TRL samples with transformers' generate (its default), and once
more with transformers' continuous batching.
  ragged:  lengths as different as those of reasoning. A random model of 3 M weights, prompts of 23
           to 115 tokens, completions of 1 to 128; an even number of tokens is rewarded, as
           random weights know no answers.
  uniform: the built-in task, where all completions have 24 tokens and nothing can be gained by
           leaving out padding; the reward is the answer checker.
The first step of each is left out."""

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "tiny"))
import make

import rltr

LR = 1e-5
WORK = ("uniform", "ragged")


def make_ragged(folder: Path):
    """The random model and its problems: one to five questions of the built-in task in one."""
    torch.manual_seed(0)
    source = random.Random(0)
    tokenizer = make.tiny_tokenizer()
    config = transformers.Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    transformers.Qwen2ForCausalLM(config).save_pretrained(folder / "generator")
    tokenizer.save_pretrained(folder / "generator")
    lines = []
    for _ in range(1000):
        questions = [make.tiny_problem(source)[0] for _ in range(source.randint(1, 5))]
        lines.append(json.dumps({"question": "".join(questions), "answer": "1"}) + "\n")
    (folder / "train.jsonl").write_text("".join(lines))


def even(tokens: list[int]) -> float:
    return float(len(tokens) % 2 == 0)


def score_lengths(rollouts: list[rltr.Rollout]):
    """The reward of the ragged work, in place of rltr.score_answers."""
    for rollout in rollouts:
        rollout.rewards["answer"] = even(rollout.tokens)


def our_steps(folder: Path, steps: int, longest: int, transfer: bool, out: Path) -> list[dict]:
    """The metrics of each step of rltr.py but the first."""
    config = rltr.Config(
        model=str(folder / "generator"),
        receiver=str(folder / "receiver"),
        data=str(folder / "train.jsonl"),
        prompt="{question}",
        max_new_tokens=longest,
        receiver_margin=4,
        transfer_weight=float(transfer),
        format_weight=0.0,
        lr=LR,
        steps=steps,
        save_every=0,
        show_every=0,
        device="cpu",
        out=str(out),
    )
    rltr.train(config)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return rows[1:]


def phases(row: dict) -> dict[str, float]:
    """Seconds of each phase of a step."""
    return {name[8:]: value for name, value in row.items() if name.startswith("seconds_")}


class StepTimes(transformers.TrainerCallback):
    """Seconds of each step of a trainer."""

    def __init__(self):
        self.seconds = []

    def on_step_begin(self, *_, **__):
        self.start = time.perf_counter()

    def on_step_end(self, *_, **__):
        self.seconds.append(time.perf_counter() - self.start)


def trl_steps(folder: Path, steps: int, longest: int, ragged: bool, continuous: bool, out: Path):
    """Seconds of each step of TRL's trainer but the first, and the mean length of completions."""
    import datasets
    from trl import GRPOConfig, GRPOTrainer

    times, lengths = StepTimes(), []

    def reward(completions, answer, completion_ids, **_):
        lengths.extend(len(ids) for ids in completion_ids)
        if ragged:
            return [even(ids) for ids in completion_ids]
        pairs = zip(completions, answer, strict=True)
        return [float(rltr.is_correct(text, gold)) for text, gold in pairs]

    rows = []
    for problem in rltr.load_problems(str(folder / "train.jsonl"), limit=32 * (steps + 1)):
        rows.append({"prompt": problem.question, "answer": problem.answer})
    config = GRPOConfig(
        output_dir=str(out),
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=256,
        num_generations=8,
        max_completion_length=longest,
        temperature=1.0,
        beta=0.0,
        learning_rate=LR,
        max_steps=steps,
        save_strategy="no",
        logging_steps=steps,
        report_to="none",
        gradient_checkpointing=False,
        disable_tqdm=True,
        use_transformers_continuous_batching=continuous,
        top_k=0,
        top_p=1.0,
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "generator")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "generator")
    trainer = GRPOTrainer(
        model,
        reward_funcs=reward,
        args=config,
        processing_class=tokenizer,
        train_dataset=datasets.Dataset.from_list(rows),
        callbacks=[times],
    )
    trainer.train()
    return times.seconds[1:], statistics.mean(lengths)


def table_row(label: str, seconds: list[float], shares: str = "") -> str:
    middle = statistics.median(seconds)
    return f"| {label} | {middle:.2f} ({min(seconds):.2f} .. {max(seconds):.2f}) | {shares} |"


def our_row(label: str, rows: list[dict]) -> str:
    totals = {}
    for row in rows:
        for phase, seconds in phases(row).items():
            totals[phase] = totals.get(phase, 0.0) + seconds
    whole = sum(totals.values())
    shares = [f"{phase} {seconds / whole:.0%}" for phase, seconds in totals.items()]
    return table_row(label, [sum(phases(row).values()) for row in rows], ", ".join(shares))


def compare(name: str, folder: Path, steps: int, longest: int, out: Path) -> str:
    """A table of both, and the ratio; we go first and last."""
    ragged = name == "ragged"
    first = our_steps(folder, steps, longest, False, out / "rlvr")
    theirs, their_length = trl_steps(folder, steps, longest, ragged, False, out / "trl")
    batched, _ = trl_steps(folder, min(steps, 3), longest, ragged, True, out / "batched")
    again = our_steps(folder, steps, longest, False, out / "again")
    length = statistics.mean(row["length"] for row in first)
    lines = [
        f"**{name}**: {len(theirs)} steps; mean length {length:.1f} (rltr.py), "
        f"{their_length:.1f} (TRL)",
        "",
        "| | seconds a step: median (lowest .. highest) | phases |",
        "|---|---|---|",
        our_row("rltr.py, RLVR", first),
        table_row("TRL GRPOTrainer", theirs),
        table_row("TRL GRPOTrainer, continuous batching", batched),
        our_row("rltr.py, RLVR again", again),
    ]
    if not ragged:
        rltr_rows = our_steps(folder, steps, longest, True, out / "rltr")
        lines.append(our_row("rltr.py, RLTR with one cut", rltr_rows))
    ours = statistics.median(sum(phases(row).values()) for row in first + again)
    ratio = statistics.median(theirs) / ours
    return "\n".join([*lines, "", f"{ratio:.1f} times TRL's steps per second (RLVR, medians)", ""])


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=11, help="the first is left out")
    parser.add_argument("--work", nargs="+", choices=WORK, default=WORK)
    given = parser.parse_args(argv)
    os.environ["HF_HUB_OFFLINE"] = "1"
    import trl

    print(
        f"\ntorch {torch.__version__}, transformers {transformers.__version__}, TRL "
        f"{trl.__version__}, CPU, {torch.get_num_threads()} threads\n"
    )
    score_answers = rltr.score_answers
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if "uniform" in given.work:
            table = compare("uniform", rltr.TINY_FOLDER, given.steps, 32, folder / "uniform")
            print(table, flush=True)
        if "ragged" in given.work:
            make_ragged(folder)
            rltr.score_answers = score_lengths
            print(compare("ragged", folder, given.steps, 128, folder / "ragged"))
            rltr.score_answers = score_answers


if __name__ == "__main__":
    sys.exit(rltr.run_command("step", main, sys.argv[1:]))
