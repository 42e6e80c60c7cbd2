"""Seconds per RL step: rltr.py against TRL's GRPOTrainer, with the answer reward alone (RLVR).

    pip install trl
    python benchmarks/step.py                            # on the CPU, both in one run

Two kinds of work, 32 prompts x 8 samples each, temperature 1, no KL, one optimizer step a batch,
fp32, the same start and problems. TRL samples with transformers' generate (its default).
  ragged:  lengths as different as those of reasoning. A random model of 3 M weights, prompts of 23
           to 115 tokens, completions of 1 to 128; an even number of tokens is rewarded, as
           random weights know no answers.
  uniform: the built-in task, where all completions have 24 tokens and nothing can be gained by
           leaving out padding; the reward is the answer checker.
The first step of each is left out."""

import argparse
import collections
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

sys.path.insert(0, str(Path(__file__).parent.parent))
import rltr


def make_ragged(folder):
    torch.manual_seed(0)
    source, tokenizer = random.Random(0), rltr.tiny_tokenizer()
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
    rows = (
        "".join(rltr.tiny_problem(source)[0] for _ in range(source.randint(1, 5)))
        for _ in range(1000)
    )
    (folder / "train.jsonl").write_text(
        "".join(json.dumps({"question": question, "answer": "1"}) + "\n" for question in rows)
    )


def even(tokens):
    return float(len(tokens) % 2 == 0)


def score_lengths(rollouts):
    for r in rollouts:
        r.r_answer = even(r.tokens)


def ours(folder, steps, longest, transfer, out):
    """Seconds of each step, and the share of each phase."""
    flags = [
        "--model",
        f"{folder}/generator",
        "--receiver",
        f"{folder}/receiver",
        "--data",
        f"{folder}/train.jsonl",
        "--prompt",
        "{question}",
        "--max-new-tokens",
        str(longest),
        "--receiver-margin",
        "4",
        "--lr",
        "1e-5",
        "--format-weight",
        "0",
        "--steps",
        str(steps),
        "--save-every",
        "0",
        "--show-every",
        "0",
        "--device",
        "cpu",
        "--out",
        str(out),
    ]
    code = rltr.main([*flags, "--transfer-weight", "1" if transfer else "0"])
    assert code == 0
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()][1:]
    phases = collections.Counter()
    for row in rows:
        phases.update({key[8:]: value for key, value in row.items() if key.startswith("seconds_")})
    seconds = [sum(v for k, v in row.items() if k.startswith("seconds_")) for row in rows]
    return seconds, {name: value / phases.total() for name, value in phases.items()}


def trl_steps(folder, steps, longest, out):
    """Seconds of each step of TRL's trainer."""
    import datasets
    from trl import GRPOConfig, GRPOTrainer

    times, lengths = [], []

    class Watch(transformers.TrainerCallback):
        def on_step_begin(self, *arguments, **settings):
            self.start = time.perf_counter()

        def on_step_end(self, *arguments, **settings):
            times.append(time.perf_counter() - self.start)

    def right(completions, answer, completion_ids, **settings):
        lengths.extend(map(len, completion_ids))
        if longest > 32:
            return [even(ids) for ids in completion_ids]
        return [float(rltr.is_correct(c, a)) for c, a in zip(completions, answer)]

    rows = [
        {"prompt": p.question, "answer": p.answer}
        for p in rltr.load_problems(f"{folder}/train.jsonl", limit=32 * (steps + 1))
    ]
    config = GRPOConfig(
        output_dir=str(out),
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=256,
        num_generations=8,
        max_completion_length=longest,
        temperature=1.0,
        beta=0.0,
        learning_rate=1e-5,
        max_steps=steps,
        save_strategy="no",
        logging_steps=steps,
        report_to="none",
        gradient_checkpointing=False,
        disable_tqdm=True,
        top_k=0,
        top_p=1.0,
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(f"{folder}/generator")
    model = transformers.AutoModelForCausalLM.from_pretrained(f"{folder}/generator")
    GRPOTrainer(
        model,
        reward_funcs=right,
        args=config,
        processing_class=tokenizer,
        train_dataset=datasets.Dataset.from_list(rows),
        callbacks=[Watch()],
    ).train()
    return times[1:], statistics.mean(lengths)


def compare(name, folder, steps, longest, out):
    """A table of both, and the ratio; we go first and last."""
    rlvr, phases = ours(folder, steps, longest, False, out / "rlvr")
    theirs, length = trl_steps(folder, steps, longest, out / "trl")
    again, _ = ours(folder, steps, longest, False, out / "again")
    rows = [
        ("rltr.py, RLVR", rlvr, phases),
        ("TRL GRPOTrainer", theirs, {}),
        ("rltr.py, RLVR again", again, {}),
    ]
    if longest == 32:
        rows.append(("rltr.py, RLTR with one cut", *ours(folder, steps, 32, True, out / "rltr")))
    lengths = [json.loads(line)["length"] for line in (out / "rlvr/metrics.jsonl").open()]
    lines = [
        f"**{name}**: {len(theirs)} steps; mean length {statistics.mean(lengths):.1f} (rltr.py), "
        f"{length:.1f} (TRL)",
        "",
        "| | seconds a step: median (lowest .. highest) | phases |",
        "|---|---|---|",
    ]
    for label, seconds, phases in rows:
        shares = ", ".join(f"{k} {v:.0%}" for k, v in phases.items() if v > 0.01)
        lines.append(
            f"| {label} | {statistics.median(seconds):.2f} ({min(seconds):.2f} .. "
            f"{max(seconds):.2f}) | {shares} |"
        )
    ratio = statistics.median(theirs) / statistics.median(rlvr + again)
    return "\n".join([*lines, "", f"{ratio:.1f} times TRL's steps per second (RLVR, medians)", ""])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=11)
    steps = parser.parse_args().steps
    os.environ["HF_HUB_OFFLINE"] = "1"
    import trl

    tables, score_answers = [], rltr.score_answers
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        tables.append(compare("uniform", rltr.make_tiny(0), steps, 32, folder / "uniform"))
        make_ragged(folder)
        rltr.score_answers = score_lengths
        tables.append(compare("ragged", folder, steps, 128, folder / "ragged"))
        rltr.score_answers = score_answers
    print(
        f"\ntorch {torch.__version__}, transformers {transformers.__version__}, TRL {trl.__version__}"
        f", CPU, {torch.get_num_threads()} threads\n\n" + "\n".join(tables)
    )


if __name__ == "__main__":
    main()
