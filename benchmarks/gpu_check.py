"""One call on a machine with an NVIDIA GPU: is the CUDA path right, and how far from the limit?

    python benchmarks/gpu_check.py --out gpu_check.md          # about 5 minutes, no downloads

1. Correctness: greedy tokens against transformers' generate, graphs and kernel against the plain
   step, log-probabilities of the sampler against the trainer's in bf16.
2. Useful tokens/s at 64 to 512 rows of Qwen2.5-1.5B's shape (random weights), and the percentage of
   the bound: for each kernel of a decoding step the larger of bytes / measured copy bandwidth and
   FLOP / measured matmul rate; sampling is counted as one pass over the logits.
3. Against transformers' generate (dynamic; static cache and compile) and continuous batching.
4. One whole RLTR step, 32 prompts x 8, 512 new tokens, a receiver of the same size.
Every part is tried on its own: one that fails is reported, the others run."""

import argparse
import dataclasses
import datetime
import sys
import time
import traceback
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
import generate as peers

import rltr

SIZES = {
    "0.5B": (896, 4864, 24, 14, 2),
    "1.5B": (1536, 8960, 28, 12, 2),
    "3B": (2048, 11008, 36, 16, 2),
    "tiny": (64, 128, 2, 4, 2),
}
VOCAB, ROWS = 151_665, 151_936  # Qwen2.5: tokens it knows, rows of its embedding


def random_qwen(size: str, device: str, dtype=torch.bfloat16):
    """Qwen2.5's shape with random weights."""
    hidden, inner, layers, heads, kv_heads = SIZES[size]
    config = transformers.Qwen2Config(
        vocab_size=ROWS,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=True,
        rope_theta=1e6,
        max_position_embeddings=32768,
        bos_token_id=None,
        eos_token_id=VOCAB - 1,
    )
    torch.manual_seed(0)
    with torch.device(device):
        torch.set_default_dtype(dtype)
        model = transformers.Qwen2ForCausalLM(config).eval()
        torch.set_default_dtype(torch.float32)
    return model


def tokenizer():
    """As many tokens as Qwen2.5's, each a made-up word."""
    words = [f"w{i}" for i in range(VOCAB - 1)] + ["<eos>"]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "w0"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<eos>",
        unk_token="w0",
        chat_template="{% for m in messages %}{{ m.content }} {% endfor %}",
    )


def wait(device):
    if device != "cpu":
        torch.cuda.synchronize()


def timed(function, device, repeat=1):
    """Seconds of the fastest of `repeat` calls, after one more."""
    best = float("inf")
    for _ in range(repeat + 1):
        wait(device)
        start = time.perf_counter()
        function()
        wait(device)
        best = min(best, time.perf_counter() - start)
    return best


def ceilings(device):
    """(bytes/s of a large copy, FLOP/s of a large matmul in the dtype in use), measured."""
    size, dtype = (2**30, torch.bfloat16) if device != "cpu" else (2**25, torch.float32)
    a, b = torch.empty(size, dtype=torch.uint8, device=device).random_(), None
    b = torch.empty_like(a)
    copy = 2 * size / timed(lambda: b.copy_(a), device, 10)
    n = 8192 if device != "cpu" else 1024
    x, y = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return copy, 2 * n**3 / timed(lambda: x @ y, device, 10)


def bound(model, rows: int, context: float, copy: float, rate: float) -> float:
    """Least seconds of a decoding step of `rows` rows that attend to `context` tokens each."""
    config, size = model.config, model.dtype.itemsize
    total = 0.0
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            k, n = module.in_features, module.out_features
            total += max(size * (k * n + rows * (k + n)) / copy, 2 * rows * k * n / rate)
    head_dim, layers = config.hidden_size // config.num_attention_heads, config.num_hidden_layers
    attention = max(
        size * rows * context * 2 * config.num_key_value_heads * head_dim / copy,
        4 * rows * context * config.num_attention_heads * head_dim / rate,
    )
    other = size * rows * (2 * 4 * config.hidden_size + 3 * config.intermediate_size) / copy
    return total + layers * (attention + other) + size * rows * config.vocab_size / copy


def correctness(device):
    """Small random models of several architectures: ours against transformers, in fp32."""
    lines = [
        "| model | greedy as transformers | kernel and graphs as the plain step | gap |",
        "|---|---|---|---|",
    ]
    sizes = dict(
        vocab_size=997,
        hidden_size=192,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        initializer_range=0.2,
        max_position_embeddings=1024,
        bos_token_id=None,
        eos_token_id=None,
    )
    kinds = {
        "qwen2": {},
        "llama": {},
        "mistral": {"sliding_window": 9},
        "qwen3": {"head_dim": 48},
        "gemma2": {"head_dim": 80, "sliding_window": 9, "attn_logit_softcapping": 5.0},
        "gemma3_text": {"head_dim": 64, "sliding_window": 9},
        "olmo2": {},
        "gpt2": {},
    }
    for kind, changes in kinds.items():
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(kind, **sizes | changes)
        model = transformers.AutoModelForCausalLM.from_config(config).to(device).eval()
        prompts = [torch.randint(1, 997, (n,)).tolist() for n in (5, 1, 170, 40)]
        ours = rltr.generate(model, prompts, max_new_tokens=40, temperature=0)
        same = 0
        for prompt, c in zip(prompts, ours):
            ids = torch.tensor([prompt], device=device)
            out = model.generate(ids, attention_mask=ids**0, max_new_tokens=40, do_sample=False)
            same += out[0, len(prompt) :].tolist() == c.tokens
        work = dict(samples=20, max_new_tokens=60, seed=1, stop_ids=range(1, 20), max_rows=50)
        fused, triton = rltr.generate(model, prompts, **work), rltr.triton
        rltr.triton = None
        plain = rltr.generate(model, prompts, **work)
        rltr.triton = triton
        equal = [(a, b) for a, b in zip(fused, plain) if a.tokens == b.tokens]
        gap = max(abs(x - y) for a, b in equal for x, y in zip(a.logprobs, b.logprobs))
        lines.append(
            f"| {kind} | {same} of {len(prompts)} | {len(equal)} of {len(fused)} | {gap:.1e} |"
        )
    return lines


def gap_to_trainer(lm, device):
    """bf16 log-probabilities: the sampler's against the trainer's."""
    prompts = [torch.randint(1, VOCAB, (n,)).tolist() for n in (20, 90, 200, 50)]
    done = rltr.generate(lm.model, prompts, max_new_tokens=64, seed=0, vocab_size=VOCAB)
    rows = [rltr.Rollout(None, p, c.tokens, c.logprobs, False, "") for p, c in zip(prompts, done)]
    with torch.no_grad():
        trained = rltr.completion_logprobs(lm, rows)[0].cpu()
    gaps = (trained - torch.tensor([x for c in done for x in c.logprobs])).abs()
    return [
        f"log-prob gap sampler - trainer, {lm.model.dtype}: mean {gaps.mean():.4f}, "
        f"max {gaps.max():.4f}"
    ]


def speed(lm, device, new, counts):
    """Tokens/s at several numbers of rows, and the percentage of the bound."""
    copy, rate = ceilings(device)
    lines = [
        f"measured: copy {copy / 1e9:.0f} GB/s (read + write), matmul {rate / 1e12:.1f} TFLOP/s",
        "",
        "| rows | seconds | useful tokens/s | ms/step | bound ms/step | % of the bound |",
        "|---|---|---|---|---|---|",
    ]
    for rows in counts:
        prompts = [torch.randint(1, VOCAB, (200,)).tolist() for _ in range(max(1, rows // 8))]
        work = dict(samples=min(rows, 8), max_new_tokens=new, vocab_size=VOCAB, max_rows=rows)
        seconds = timed(lambda: rltr.generate(lm.model, prompts, seed=1, **work), device)
        least = sum(bound(lm.model, rows, 200 + t, copy, rate) for t in range(new))
        lines.append(
            f"| {rows} | {seconds:.2f} | {rows * new / seconds:,.0f} "
            f"| {1e3 * seconds / new:.2f} | {1e3 * least / new:.2f} "
            f"| {100 * least / seconds:.0f} |"
        )
    return lines


def kernels(lm, device, rows=256, new=16):
    """Where the time of decoding goes: the kernels that take most."""
    from torch.profiler import ProfilerActivity, profile

    prompts = [torch.randint(1, VOCAB, (400,)).tolist() for _ in range(rows // 8)]
    work = dict(samples=8, max_new_tokens=new, vocab_size=VOCAB, max_rows=rows, seed=0)
    rltr.generate(lm.model, prompts, **work)
    activity = ProfilerActivity.CUDA if device != "cpu" else ProfilerActivity.CPU
    with profile(activities=[activity]) as record:
        rltr.generate(lm.model, prompts, **work)
    key = "self_device_time_total" if device != "cpu" else "self_cpu_time_total"
    events = sorted(record.key_averages(), key=lambda e: -getattr(e, key))[:20]
    return [
        "| kernel | calls | ms in all |",
        "|---|---|---|",
        *(f"| `{e.key[:90]}` | {e.count} | {getattr(e, key) / 1e3:.1f} |" for e in events),
    ]


def against_transformers(lm, device, new):
    """The same ragged work, rows ended by one token in a hundred of the vocabulary."""
    stops = tuple(range(0, VOCAB, 100))
    batches = [[torch.randint(1, VOCAB, (n,)).tolist() for n in range(60, 188, 4)]] * 2
    engines = {
        "rltr": peers.ours,
        "transformers generate, dynamic cache": peers.hf_generate,
        "transformers generate, static cache, compiled": peers.hf_static,
        "transformers generate_batch (continuous batching)": peers.hf_continuous,
    }
    if device == "cpu":
        del engines["transformers generate, static cache, compiled"]
    return peers.table(peers.measure(engines, lm.model, batches, 8, stops, new)).split("\n")


def whole_step(lm, receiver, device, new, prompts):
    """One RLTR step after another like it; right answers are drawn by lot (weights are random)."""
    config = rltr.Config(
        prompts=prompts,
        max_new_tokens=new,
        device=device,
        cuts=1,
        gradient_checkpointing=True,
        token_budget=32768,
    )
    lm.model.gradient_checkpointing_enable()
    transfer = rltr.TransferReward(receiver, lm.tokenizer, max_new_tokens=new, device=device)
    optimizer = rltr.MasterAdamW(lm.model, config.lr)
    tasks = [
        (rltr.Problem(" ".join(f"w{i * j % VOCAB}" for j in range(100)), "1"), None)
        for i in range(1, prompts + 1)
    ]
    tasks = [(p, lm.encode_prompt(p.question, "{question}")) for p, _ in tasks]
    for step in range(2):
        if device != "cpu":
            torch.cuda.reset_peak_memory_stats()
        clock = rltr.Clock()
        rollouts = rltr.sample_rollouts(lm, tasks, config, step)
        clock.lap("sample", sum(len(r.tokens) for r in rollouts))
        transfer.score(rollouts, step)
        clock.lap("transfer", sum(c.continuation_length for r in rollouts for c in r.cuts))
        for i, r in enumerate(rollouts):
            r.advantage = 1.0 - 2.0 * (i % 2)
        learned = rltr.update(lm, optimizer, rollouts, config)
        clock.lap("update", sum(len(r.tokens) for r in rollouts))
    m, tokens = clock.metrics, sum(len(r.prompt) + len(r.tokens) for r in rollouts)
    weights = sum(p.numel() for p in lm.model.parameters())
    rate = 6 * weights * tokens / m["seconds_update"]
    lines = ["| phase | seconds | tokens/s |", "|---|---|---|"]
    lines += [
        f"| {phase} | {m[f'seconds_{phase}']:.2f} | {m[f'tokens_per_s_{phase}']:,} |"
        for phase in ("sample", "transfer", "update")
    ]
    return lines + [
        "",
        f"in all {sum(m[k] for k in m if k.startswith('seconds')):.1f} s; peak memory "
        f"{m['peak_memory_gib']:.1f} GiB; the update does {rate / 1e12:.1f} TFLOP/s (6 FLOP "
        f"a weight and token, recomputation not counted); log-prob gap mean "
        f"{learned['logprob_gap_mean']:.4f}, max {learned['logprob_gap_max']:.4f}",
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", default="gpu_check.md")
    parser.add_argument("--size", default="1.5B", choices=SIZES)
    parser.add_argument("--new", type=int, default=512, help="new tokens")
    parser.add_argument("--prompts", type=int, default=32, help="prompts of the RLTR step")
    parser.add_argument("--rows", type=int, nargs="+", default=[64, 128, 256, 512])
    parser.add_argument("--device", default="cuda")
    given = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    device, began = given.device, time.perf_counter()
    name = torch.cuda.get_device_name() if device != "cpu" else "CPU"
    text = [
        f"# {name}, Qwen2.5-{given.size} shape",
        "",
        f"{datetime.date.today()}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, triton {getattr(rltr.triton, '__version__', 'none')}",
    ]
    model = random_qwen(given.size, device, torch.bfloat16 if device != "cpu" else torch.float32)
    lm = rltr.LM(model, tokenizer(), (VOCAB - 1,), VOCAB, 32768)
    receiver = dataclasses.replace(lm, model=random_qwen(given.size, device, model.dtype))
    parts = {
        "Correctness, fp32": lambda: correctness(device),
        "Correctness, trainer": lambda: gap_to_trainer(lm, device),
        "Sampling": lambda: speed(lm, device, given.new, given.rows),
        f"Kernels of 16 steps of {max(given.rows) // 2} rows": lambda: kernels(
            lm, device, max(given.rows) // 2
        ),
        "Against transformers": lambda: against_transformers(lm, device, given.new // 2),
        f"One step, {given.prompts} x 8, {given.new} new tokens": lambda: whole_step(
            lm, receiver, device, given.new, given.prompts
        ),
    }
    for title, part in parts.items():
        try:
            lines = part()
        except Exception:
            lines = ["FAILED", "```", traceback.format_exc()[-3000:], "```"]
        text += ["", f"## {title}", "", *lines, "", f"(at {time.perf_counter() - began:.0f} s)"]
        Path(given.out).write_text("\n".join(text) + "\n")  # what there is, if we are killed
        print("\n".join(text[-len(lines) - 5 :]), flush=True)


if __name__ == "__main__":
    main()
