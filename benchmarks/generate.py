"""Useful tokens per second of rltr.generate against transformers, on the same work in one run.

    python benchmarks/generate.py                        # the built-in task, no download
    python benchmarks/generate.py --model HuggingFaceTB/SmolLM2-135M-Instruct --data gsm8k

The work: groups of G completions a prompt, sampled at temperature 1 from the full softmax, ended by
a full stop (so of ragged lengths) or by the length limit. A useful token is a sampled one up to and
with the stop token; the padding that a batch drags along is not. Engines take turns, seed by seed,
after one untimed round each. (benchmarks/gpu_check.py has the distance to the hardware's limit.)"""

import argparse
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from torch.nn.utils.rnn import pad_sequence

sys.path.insert(0, str(Path(__file__).parents[1]))
import rltr


@dataclass
class Work:
    """One batch for all engines. An engine is a function of it: the lengths of its completions."""

    model: torch.nn.Module
    prompts: list[list[int]]
    group: int  # completions a prompt
    stop_ids: tuple[int, ...]
    limit: int  # new tokens
    seed: int
    sampled: list = field(default_factory=list)  # by rltr, which is the first to work

    @property
    def pad(self) -> int:
        return self.stop_ids[0] if self.stop_ids else 0


def ours(work: Work) -> list[int]:
    work.sampled = rltr.generate(
        work.model,
        work.prompts,
        samples=work.group,
        max_new_tokens=work.limit,
        stop_ids=work.stop_ids,
        seed=work.seed,
    )
    return [len(completion.tokens) for completion in work.sampled]


@torch.no_grad()
def one_forward(work: Work) -> list[int]:
    """No engine but a floor: one forward over all tokens that rltr sampled, were they known."""
    for number, prompt in enumerate(work.prompts):
        group = work.sampled[number * work.group : (number + 1) * work.group]
        rows = [torch.tensor(prompt + completion.tokens) for completion in group]
        work.model(pad_sequence(rows, batch_first=True).to(work.model.device))
    return [len(completion.tokens) for completion in work.sampled]


def generation_config(work: Work, **others) -> transformers.GenerationConfig:
    return transformers.GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=work.limit,
        eos_token_id=list(work.stop_ids) or None,
        pad_token_id=work.pad,
        **others,
    )


def hf_generate(work: Work, cache: str | None = None) -> list[int]:
    """One left-padded batch, as transformers' documentation has it."""
    torch.manual_seed(work.seed)
    width = max(map(len, work.prompts))
    ids, mask = [], []
    for prompt in work.prompts:
        padding = width - len(prompt)
        ids.append([work.pad] * padding + prompt)
        mask.append([0] * padding + [1] * len(prompt))
    ids = torch.tensor(ids, device=work.model.device)
    config = generation_config(work, num_return_sequences=work.group, cache_implementation=cache)
    mask = torch.tensor(mask, device=work.model.device)
    out = work.model.generate(ids, attention_mask=mask, generation_config=config)
    return [useful(row, work.stop_ids) for row in out[:, width:].tolist()]


def useful(tokens: list[int], stop_ids: tuple[int, ...]) -> int:
    """How many tokens up to and with the first stop token."""
    for count, token in enumerate(tokens, 1):
        if token in stop_ids:
            return count
    return len(tokens)


def hf_static(work: Work) -> list[int]:
    """Static cache: transformers compiles the decoding step of its own accord on CUDA."""
    return hf_generate(work, cache="static")


def hf_continuous(work: Work) -> list[int]:
    """transformers' continuous batching over a paged cache."""
    torch.manual_seed(work.seed)
    attention = work.model.config._attn_implementation
    inputs = [prompt for prompt in work.prompts for _ in range(work.group)]
    try:
        out = work.model.generate_batch(
            inputs=inputs, generation_config=generation_config(work), progress_bar=False
        )
    finally:
        work.model.set_attn_implementation(attention)
    if len(out) != len(inputs):
        raise RuntimeError("continuous batching lost requests")
    return [len(result.generated_tokens) for result in out.values()]


def measure(engines: dict, model, batches: list, group: int, stop_ids: tuple, limit: int) -> dict:
    """(seconds, lengths) of each engine for each batch of prompts; the engines take turns."""
    results = {name: [] for name in engines}
    on_cpu = model.device.type == "cpu"
    for turn, prompts in enumerate([batches[0], *batches]):  # the first round warms up
        shortest = min(limit, 4) if on_cpu and turn == 0 else limit
        work = Work(model, prompts, group, stop_ids, shortest, seed=turn)
        for name in list(results):
            start = time.perf_counter()
            try:
                lengths = engines[name](work)
            except Exception as error:  # a peer that cannot run here is not compared
                print(f"{name}: cannot run here: {type(error).__name__}: {error}"[:300])
                del results[name]
                continue
            if not on_cpu:
                torch.cuda.synchronize()
            results[name].append((time.perf_counter() - start, lengths))
    return {name: rounds[1:] for name, rounds in results.items()}


def table(results: dict) -> str:
    lines = ["| engine | useful tokens/s, each seed | mean | rltr is faster by | lengths |"]
    lines.append("|---|---|---|---|---|")
    speeds = {name: [sum(n) / s for s, n in rounds] for name, rounds in results.items()}
    for name, rounds in results.items():
        lengths = [length for _, of_batch in rounds for length in of_batch]
        ratios = [a / b for a, b in zip(speeds["rltr"], speeds[name], strict=True)]
        lines.append(
            f"| {name} | {' '.join(f'{speed:.0f}' for speed in speeds[name])} "
            f"| {statistics.mean(speeds[name]):.0f} | {statistics.mean(ratios):.2f} "
            f"({min(ratios):.2f}-{max(ratios):.2f}) | {min(lengths)}-{max(lengths)}, "
            f"mean {statistics.mean(lengths):.0f} |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="folder or hub name; without it the built-in task")
    parser.add_argument("--data", default="gsm8k", help="as in rltr.py")
    parser.add_argument("--prompt", default=rltr.PROMPT, help="with {question} in it")
    parser.add_argument("--prompts", type=int, default=8, help="problems a batch")
    parser.add_argument("--group", type=int, default=8, help="samples a problem")
    parser.add_argument("--limit", type=int, default=128, help="new tokens at most")
    parser.add_argument("--seeds", type=int, default=3, help="batches, a seed each")
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default_device)
    if not parser.parse_args(argv).model:
        parser.set_defaults(**rltr.TINY, limit=32)
    given = parser.parse_args(argv)

    lm = rltr.load_lm(given.model, given.device)
    problems = rltr.load_problems(given.data, limit=given.prompts * given.seeds)
    needed = f"{given.data}: has {len(problems)} problems, not {given.prompts * given.seeds}"
    rltr.require(len(problems) == given.prompts * given.seeds, needed)
    tasks = rltr.encode_problems(lm, problems, given.prompt, given.limit)
    prompts = [prompt for _, prompt in tasks]
    batches = [prompts[i : i + given.prompts] for i in range(0, len(prompts), given.prompts)]
    full_stops = [i for i in range(lm.vocab_size) if lm.tokenizer.decode([i]).strip() == "."]
    engines = {"rltr": ours, "transformers generate, dynamic cache": hf_generate}
    if lm.model.device.type == "cuda":
        engines["transformers generate, static cache, compiled"] = hf_static
    engines["transformers generate_batch (continuous batching)"] = hf_continuous
    engines["one plain forward, the texts known"] = one_forward
    stop_ids = (*lm.stop_ids, *full_stops)
    results = measure(engines, lm.model, batches, given.group, stop_ids, given.limit)
    print(
        f"{given.model}, {given.device}, {lm.model.dtype}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, {torch.get_num_threads()} threads: {given.prompts} prompts x "
        f"{given.group}\n\n{table(results)}"
    )


if __name__ == "__main__":
    sys.exit(rltr.run_command("generate", main, sys.argv[1:]))
