"""RLTR on more than one GPU: TRL's GRPOTrainer with rltr.TransferReward beside the answer reward.

    pip install trl
    python benchmarks/with_trl.py                                          # built-in tiny models
    accelerate launch --multi_gpu --num_processes 2 benchmarks/with_trl.py     # also without a GPU
    accelerate launch --num_processes 4 benchmarks/with_trl.py --model Qwen2.5-1.5B \\
        --receiver Qwen2.5-1.5B-Instruct --data math --max-new-tokens 1024 --steps 500

TRL samples, learns and distributes (GRPOConfig has the switches for vLLM and DeepSpeed). Each
process has a receiver of its own, which continues the completions that this process scores."""

import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
import common

import rltr


def answer_reward(completions, answer, **_) -> list[float]:
    """R_ans. Completions are lists of messages, `answer` is a column of the data."""
    texts = [messages[-1]["content"] for messages in completions]
    return [float(rltr.is_correct(text, gold)) for text, gold in zip(texts, answer, strict=True)]


def show_taus(rank: int):
    """From now on each process prints where it cuts: no two calls share their random numbers."""
    cut_rollouts = rltr.cut_rollouts

    def cut_and_show(rollouts, generator, taus):
        shown = " ".join(f"{tau:.3f}" for tau in taus.flatten()[:6])
        print(f"process {rank}: {len(rollouts)} rollouts, taus {shown} ..", flush=True)
        cut_rollouts(rollouts, generator, taus)

    rltr.cut_rollouts = cut_and_show


def main(argv: list[str] | None = None):
    parser = common.parser(__doc__)
    parser.add_argument("--model", default="{tiny}/generator", help="generator: folder or hub name")
    parser.add_argument("--receiver", default="{tiny}/receiver", help="frozen receiver")
    parser.add_argument("--data", default="{tiny}/train.jsonl", help="as in rltr.py")
    parser.add_argument("--steps", type=common.whole(1), default=60)
    parser.add_argument("--prompts", type=common.whole(1), default=16, help="a process and step")
    parser.add_argument("--group", type=common.whole(2), default=8, help="completions a prompt")
    parser.add_argument("--max-new-tokens", type=common.whole(1), default=32)
    parser.add_argument("--transfer-weight", type=common.number(0, 1e6), default=2.0)
    parser.add_argument("--lr", type=common.number(0, 1), help="default: 2e-6; tiny models: 5e-4")
    parser.add_argument("--seed", type=common.whole(0), default=0)
    parser.add_argument("--out", default="runs/with-trl", help="folder of the trained model")
    parser.add_argument("--show-taus", action="store_true", help="where each process cuts")
    given = parser.parse_args(argv)
    import datasets
    import trl

    if given.show_taus:
        show_taus(int(os.environ.get("RANK", 0)))
    is_tiny = given.model.startswith("{tiny}")
    if given.lr is None:
        given.lr = 5e-4 if is_tiny else 2e-6
    on_gpu = torch.cuda.is_available()
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if on_gpu else "cpu"  # of this process
    names = [given.model, given.receiver, given.data]
    if any("{tiny}" in name for name in names):
        tiny = str(rltr.make_tiny(given.seed))  # made by one process, the others wait
        names = [name.replace("{tiny}", tiny) for name in names]
    model, receiver, data = names

    generator = rltr.load_lm(model, "cpu")  # TRL moves it
    transfer_reward = rltr.TransferReward(
        receiver,
        generator.tokenizer,
        stop_ids=generator.stop_ids,
        max_new_tokens=given.max_new_tokens,
        receiver_margin=4 if is_tiny else 64,
        seed=given.seed,
        device=device,
    )
    rows = []
    for problem in rltr.load_problems(data):
        question = problem.question
        if not is_tiny:
            question = rltr.PROMPT.replace("{question}", question)
        rows.append({"prompt": [{"role": "user", "content": question}], "answer": problem.answer})
    config = trl.GRPOConfig(
        output_dir=given.out,
        max_steps=given.steps,
        per_device_train_batch_size=given.prompts * given.group,
        num_generations=given.group,
        max_completion_length=given.max_new_tokens,
        reward_weights=[1.0, given.transfer_weight],
        learning_rate=given.lr,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=10,
        adam_beta2=0.99,
        epsilon_high=0.28,
        use_cpu=not on_gpu,
        bf16=on_gpu,
        gradient_checkpointing=on_gpu,
        seed=given.seed,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        ddp_find_unused_parameters=False,
    )
    trainer = trl.GRPOTrainer(
        generator.model,
        reward_funcs=[answer_reward, transfer_reward],
        args=config,
        processing_class=generator.tokenizer,
        train_dataset=datasets.Dataset.from_list(rows),
    )
    trainer.train()
    trainer.save_model(given.out)


if __name__ == "__main__":
    sys.exit(common.command_line("with_trl", main))
