"""RLTR on more than one GPU: TRL's trainer, with the transfer reward beside the answer reward.

    pip install trl
    python tools/with_trl.py                                               # built-in tiny models
    accelerate launch --multi_gpu --num_processes 2 tools/with_trl.py      # also without a GPU
    accelerate launch --num_processes 4 tools/with_trl.py --model Qwen2.5-1.5B \\
        --receiver Qwen2.5-1.5B-Instruct --data math --max-new-tokens 1024 --steps 500

TRL samples, learns and distributes (its GRPOConfig has the switches for vLLM and DeepSpeed). For a
training script of your own `TransferReward` is all that is needed; it does not import TRL. Each
process has a receiver of its own, which continues the completions that this process scores.
"""

import argparse
import dataclasses
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import rltr


class TransferReward:
    """The transfer reward (steps 3 to 5 of RLTR) as a reward function of TRL's trainers.

    reward_funcs=[.., TransferReward("Qwen2.5-1.5B-Instruct", tokenizer)], with a column `answer` in
    the data. tokenizer: the generator's, whose tokens are cut; without it the receiver's are.
    settings: fields of rltr.Config, such as cuts, max_new_tokens, seed, device.

    Prompts may be texts: the receiver is asked each of them in its own chat template and within the
    setting `prompt`. Or lists of messages: then it is asked what the last message of the user says,
    as it stands there; what other messages say it does not learn."""

    __name__ = "transfer_reward"  # TRL names its log columns after this

    def __init__(self, receiver: rltr.LM | str, tokenizer=None, *, stop_ids=(), **settings):
        self.config = rltr.Config(**settings)
        rltr.check_settings(self.config)
        self.receiver = receiver
        if isinstance(receiver, str):
            self.receiver = rltr.load_lm(receiver, self.config.device)
        self.knows_ids = tokenizer is not None
        tokenizer = tokenizer or self.receiver.tokenizer
        stop_ids = tuple(stop_ids) or rltr.find_stop_ids(None, tokenizer)
        self.generator = rltr.LM(None, tokenizer, stop_ids, len(tokenizer), 2**30)  # to read with
        # Calls are numbered through over all processes: 0, 2, 4 .. and 1, 3, 5 .. where there are
        # two. The number is the key of a call's random numbers, so no two calls share them.
        self.call = int(os.environ.get("RANK", 0))
        self.processes = int(os.environ.get("WORLD_SIZE", 1))
        self.rollouts = []  # of the last call, to look at

    def __call__(self, prompts, completions, answer, completion_ids=None, **others) -> list[float]:
        """prompts and completions: texts or lists of messages -> rewards in [0, 1]."""
        config = self.config
        if not isinstance(prompts[0], str):
            prompts = [last_question(messages) for messages in prompts]
            config = dataclasses.replace(config, prompt="{question}")
        self.rollouts = []
        for i, completion in enumerate(completions):
            text = completion if isinstance(completion, str) else completion[-1]["content"]
            tokens = rltr.encode_text(self.generator.tokenizer, text)
            if self.knows_ids and completion_ids is not None:
                tokens = list(completion_ids[i])
            problem = rltr.Problem(prompts[i], answer[i])
            self.rollouts.append(rltr.Rollout(problem, [], tokens, [], True, text))

        cut_key = (rltr.CUT, self.call)
        continuation_key = (rltr.CONTINUATION, self.call)
        self.call += self.processes
        rltr.cut_rollouts(self.rollouts, self.generator, config, cut_key)
        rltr.continue_cuts(self.rollouts, self.generator, self.receiver, config, continuation_key)
        rltr.score_transfer(self.rollouts)
        return [rollout.rewards["transfer"] for rollout in self.rollouts]


def last_question(messages: list[dict]) -> str:
    questions = [message["content"] for message in messages if message["role"] == "user"]
    rltr.require(questions, "a prompt without a message of the user")
    return questions[-1]


class ShownTransferReward(TransferReward):
    """Prints where each process cuts: no two calls share their random numbers."""

    def __call__(self, *arguments, **columns) -> list[float]:
        rank = self.call % self.processes
        rewards = super().__call__(*arguments, **columns)
        taus = " ".join(f"{rollout.cuts[0].tau:.3f}" for rollout in self.rollouts[:6])
        print(f"process {rank}: {len(rewards)} rollouts, taus {taus} ..", flush=True)
        return rewards


def answer_reward(completions, answer, **others) -> list[float]:
    """R_ans. Completions are lists of messages, `answer` is a column of the data."""
    texts = [messages[-1]["content"] for messages in completions]
    return [float(rltr.is_correct(text, gold)) for text, gold in zip(texts, answer, strict=True)]


# ============================================================================== a training script

FLAGS = "model receiver data prompt steps prompts group max_new_tokens transfer_weight "
FLAGS += "receiver_margin lr warmup seed out"


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Flags as in rltr.py. Without --model the built-in task, in 60 small steps."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    fields = [f for f in dataclasses.fields(rltr.Config) if f.name in FLAGS.split()]
    rltr.add_flags(parser, fields)
    parser.add_argument("--show-taus", action="store_true", help="print where each process cuts")
    parser.set_defaults(prompts=16, out="runs/with-trl")
    if not parser.parse_args(argv).model:
        parser.set_defaults(**rltr.TINY | {"steps": 60})
    return parser.parse_args(argv)


def main(argv: list[str] | None = None):
    given = parse_arguments(argv)
    import datasets
    import trl

    on_gpu = torch.cuda.is_available()
    generator = rltr.load_lm(given.model, "cpu")  # TRL moves it
    kind = ShownTransferReward if given.show_taus else TransferReward
    transfer_reward = kind(
        given.receiver,
        generator.tokenizer,
        stop_ids=generator.stop_ids,
        max_new_tokens=given.max_new_tokens,
        receiver_margin=given.receiver_margin,
        seed=given.seed,
        device=f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if on_gpu else "cpu",  # of this process
    )
    rows = []
    for problem in rltr.load_problems(given.data):
        content = given.prompt.replace("{question}", problem.question)
        rows.append({"prompt": [{"role": "user", "content": content}], "answer": problem.answer})
    config = trl.GRPOConfig(
        output_dir=given.out,
        max_steps=given.steps,
        per_device_train_batch_size=given.prompts * given.group,  # of each process
        num_generations=given.group,
        max_completion_length=given.max_new_tokens,
        reward_weights=[1.0, given.transfer_weight],
        learning_rate=given.lr,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=given.warmup,
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
    sys.exit(rltr.run_command("with_trl", main, sys.argv[1:]))
