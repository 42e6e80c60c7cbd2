"""Seconds per RL step: rltr.py against TRL's GRPOTrainer, with the answer reward alone (RLVR).

    pip install trl
    python benchmarks/step.py                    # the tiny task's generator, on the CPU, in one run

The same start, problems, 32 prompts x 8 samples, at most 32 new tokens, temperature 1, no KL, one
optimizer step a batch, in fp32. TRL samples through transformers' generate (its default). Steps of
the two are timed by what each logs; the first of each is left out. TRL's reward is our checker."""

import argparse
import collections
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent.parent))
import rltr

def ours(folder, steps, transfer, out):
    """Seconds of each step, and the share of each phase."""
    flags = ["--model", f"{folder}/generator", "--receiver", f"{folder}/receiver", "--data",
             f"{folder}/train.jsonl", "--prompt", "{question}", "--max-new-tokens", "32",
             "--receiver-margin", "4", "--lr", "5e-4", "--steps", str(steps), "--save-every", "0",
             "--show-every", "0", "--device", "cpu", "--out", str(out)]
    code = rltr.main([*flags, "--transfer-weight", "1" if transfer else "0"])
    assert code == 0
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()][1:]
    phases = collections.Counter()
    for row in rows:
        phases.update({key[8:]: value for key, value in row.items() if key.startswith("seconds_")})
    seconds = [sum(v for k, v in row.items() if k.startswith("seconds_")) for row in rows]
    return seconds, {name: value / phases.total() for name, value in phases.items()}

def trl_steps(folder, steps, out):
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
        return [float(rltr.is_correct(c, a)) for c, a in zip(completions, answer)]

    rows = [{"prompt": p.question, "answer": p.answer}
            for p in rltr.load_problems(f"{folder}/train.jsonl", limit=32 * (steps + 1))]
    config = GRPOConfig(
        output_dir=str(out), use_cpu=True, bf16=False, per_device_train_batch_size=256,
        num_generations=8, max_completion_length=32, temperature=1.0, beta=0.0, learning_rate=5e-4,
        max_steps=steps, save_strategy="no", logging_steps=steps, report_to="none",
        gradient_checkpointing=False, disable_tqdm=True, top_k=0, top_p=1.0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(f"{folder}/generator")
    model = transformers.AutoModelForCausalLM.from_pretrained(f"{folder}/generator")
    GRPOTrainer(model, reward_funcs=right, args=config, processing_class=tokenizer,
                train_dataset=datasets.Dataset.from_list(rows), callbacks=[Watch()]).train()
    return times[1:], statistics.mean(lengths)

def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=11)
    given = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    import trl
    folder = rltr.make_tiny(0)
    with tempfile.TemporaryDirectory() as out:
        rlvr, phases = ours(folder, given.steps, False, Path(out, "rlvr"))
        theirs, length = trl_steps(folder, given.steps, Path(out, "trl"))
        again, _ = ours(folder, given.steps, False, Path(out, "rlvr2"))
        rltr_steps, rltr_phases = ours(folder, given.steps, True, Path(out, "rltr"))
        lengths = [json.loads(line)["length"] for line in Path(out, "rlvr/metrics.jsonl").open()]
    ratio = statistics.median(theirs) / statistics.median(rlvr + again)
    def share(phases):
        return ", ".join(f"{name} {value:.0%}" for name, value in phases.items() if value > 0.005)
    print(f"\ntorch {torch.__version__}, transformers {transformers.__version__}, TRL {trl.__version__}"
          f", CPU, {torch.get_num_threads()} threads; {len(theirs)} steps of 32 x 8; mean length "
          f"{statistics.mean(lengths):.1f} (rltr), {length:.1f} (TRL)\n\n"
          "| | seconds a step, median (lowest .. highest) | share of the phases |\n|---|---|---|")
    for name, seconds, note in (("rltr.py, RLVR", rlvr, share(phases)), ("TRL GRPOTrainer", theirs, ""),
                                ("rltr.py, RLVR again", again, ""),
                                ("rltr.py, RLTR with one cut", rltr_steps, share(rltr_phases))):
        print(f"| {name} | {statistics.median(seconds):.2f} ({min(seconds):.2f} .. {max(seconds):.2f}) "
              f"| {note} |")
    print(f"\nrltr.py makes {ratio:.1f} times TRL's steps per second (RLVR, medians)")

if __name__ == "__main__":
    main()
