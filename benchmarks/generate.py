"""Useful tokens per second of rltr.generate against transformers, on the same work in one run.

    python benchmarks/generate.py --model HuggingFaceTB/SmolLM2-135M-Instruct --data gsm8k

The work: groups of G completions a prompt, sampled at temperature 1 from the full softmax, ended by
a full stop (so of ragged lengths) or by the length limit. A useful token is a sampled one up to and
with the stop token; the padding that a batch drags along is not. Engines take turns, seed by seed,
after one untimed round each. (benchmarks/gpu_check.py has the distance to the hardware's limit.)"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent.parent))
import rltr

sampled = []  # what rltr sampled last


def ours(model, prompts, group, stop_ids, limit, seed):
    sampled[:] = rltr.generate(
        model, prompts, samples=group, max_new_tokens=limit, stop_ids=stop_ids, seed=seed
    )
    return [len(c.tokens) for c in sampled]


@torch.no_grad()
def one_forward(model, prompts, group, stop_ids, limit, seed):
    """No engine but a floor: one forward over all tokens that rltr sampled, were they known."""
    for i in range(0, len(sampled), group):
        rows = [torch.tensor(prompts[i // group] + c.tokens) for c in sampled[i : i + group]]
        model(torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(model.device))
    return [len(c.tokens) for c in sampled]


def settings(group, stop_ids, limit, pad):
    return transformers.GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=limit,
        num_return_sequences=group,
        eos_token_id=list(stop_ids) or None,
        pad_token_id=pad,
    )


def useful(tokens, stop_ids):
    return next((i for i, t in enumerate(tokens, 1) if t in stop_ids), len(tokens))


def hf_generate(model, prompts, group, stop_ids, limit, seed, cache=None):
    """One left-padded batch, as transformers' documentation has it."""
    torch.manual_seed(seed)
    width, pad = max(map(len, prompts)), stop_ids[0] if stop_ids else 0
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts]).to(ids)
    config = settings(group, stop_ids, limit, pad)
    config.cache_implementation = cache
    out = model.generate(ids, attention_mask=mask, generation_config=config)[:, width:]
    return [useful(row, stop_ids) for row in out.tolist()]


def hf_static(*arguments):
    """Static cache: transformers compiles the decoding step of its own accord on CUDA."""
    return hf_generate(*arguments, cache="static")


def hf_continuous(model, prompts, group, stop_ids, limit, seed):
    """transformers' continuous batching over a paged cache."""
    torch.manual_seed(seed)
    config = settings(group, stop_ids, limit, stop_ids[0] if stop_ids else 0)
    config.num_return_sequences = 1
    attention = model.config._attn_implementation
    try:
        out = model.generate_batch(
            inputs=[p for p in prompts for _ in range(group)],
            generation_config=config,
            progress_bar=False,
        )
    finally:
        model.set_attn_implementation(attention)
    assert len(out) == len(prompts) * group, "continuous batching lost requests"
    return [len(r.generated_tokens) for r in out.values()]


def measure(engines, model, batches, group, stop_ids, limit):
    """seconds, tokens and the lengths of each engine for each batch; engines take turns."""
    results = {name: [] for name in engines}
    cpu = model.device.type == "cpu"
    for turn, prompts in enumerate([batches[0], *batches]):  # the first round warms up
        for name, engine in list(engines.items()):
            start = time.perf_counter()
            try:
                short = min(limit, 4) if cpu and turn == 0 else limit
                lengths = engine(model, prompts, group, stop_ids, short, turn)
            except Exception as error:  # a peer that cannot run here is not compared
                print(f"{name}: cannot run here: {type(error).__name__}: {error}"[:300])
                del engines[name], results[name]
                continue
            if not cpu:
                torch.cuda.synchronize()
            results[name].append((time.perf_counter() - start, lengths))
    return {name: rounds[1:] for name, rounds in results.items()}


def table(results):
    lines = [
        "| engine | useful tokens/s, each seed | mean | rltr is faster by | lengths |",
        "|---|---|---|---|---|",
    ]
    speeds = {name: [sum(n) / s for s, n in rounds] for name, rounds in results.items()}
    for name, rounds in results.items():
        lengths = [n for _, all_n in rounds for n in all_n]
        ratios = [a / b for a, b in zip(speeds["rltr"], speeds[name])]
        lines.append(
            f"| {name} | {' '.join(f'{s:.0f}' for s in speeds[name])} "
            f"| {statistics.mean(speeds[name]):.0f} | {statistics.mean(ratios):.2f} "
            f"({min(ratios):.2f}-{max(ratios):.2f}) | {min(lengths)}-{max(lengths)}, "
            f"mean {statistics.mean(lengths):.0f} |"
        )
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--data", default="gsm8k")
    parser.add_argument("--prompt", default=rltr.PROMPT, help="'{question}' for the tiny models")
    parser.add_argument("--prompts", type=int, default=8, help="problems a batch")
    parser.add_argument("--group", type=int, default=8, help="samples a problem")
    parser.add_argument("--limit", type=int, default=128, help="new tokens at most")
    parser.add_argument("--seeds", type=int, default=3, help="batches, each with its own seed")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    lm = rltr.load_lm(given.model, given.device)
    problems = rltr.load_problems(given.data, limit=given.prompts * given.seeds)
    encoded = [lm.encode_prompt(p.question, given.prompt) for p in problems]
    batches = [encoded[i : i + given.prompts] for i in range(0, len(encoded), given.prompts)]
    stops = [i for i in range(lm.vocab_size) if lm.tokenizer.decode([i]).strip() == "."]
    engines = {"rltr": ours, "transformers generate, dynamic cache": hf_generate}
    if given.device != "cpu":
        engines["transformers generate, static cache, compiled"] = hf_static
    engines["transformers generate_batch (continuous batching)"] = hf_continuous
    engines["one plain forward, the texts known"] = one_forward
    results = measure(engines, lm.model, batches, given.group, (*lm.stop_ids, *stops), given.limit)
    print(
        f"{given.model}, {given.device}, {lm.model.dtype}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, {torch.get_num_threads()} threads: {given.prompts} prompts x "
        f"{given.group}\n\n{table(results)}"
    )


if __name__ == "__main__":
    main()
