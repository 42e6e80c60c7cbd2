"""One call on a machine with an NVIDIA GPU: is the CUDA path right, and how far from the limit?

    python benchmarks/gpu_check.py --out gpu_check.md      # at most 8 minutes, no downloads
    python benchmarks/gpu_check.py --device cpu --size tiny --new 8 --rows 4 --prompts 2 --steps 2

1. Correctness, for ten architectures: greedy tokens against transformers' generate, steps as
   CUDA graphs against plain steps; log-probabilities of the sampler against the trainer's in bf16.
2. Attention: that of a decoding step, written out, against torch's with a boolean mask; and which
   kernel torch chose for prompts.
3. Useful tokens/s at 64 to 512 rows of Qwen2.5-1.5B's shape (random weights), and the percentage of
   the bound: for each kernel of a decoding step the larger of bytes / measured copy bandwidth and
   FLOP / measured matmul rate; sampling is counted as one pass over the logits.
4. One whole RLTR step, 32 prompts x 8, 512 new tokens, a receiver of the same size.
5. Memory of an update against what memory.py counts.
6. The built-in task, learnt on the GPU.
7. Where the time of decoding goes, and tokens/s against transformers.
Every part is tried on its own: one that fails is reported, the others run."""

import argparse
import dataclasses
import datetime
import gc
import json
import sys
import tempfile
import time
import traceback
from pathlib import Path
from unittest import mock

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn.functional import scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))
import generate as peers
import memory

import rltr

PROMPT = 200  # tokens of a prompt
VOCABULARY = memory.TOKENS


@dataclasses.dataclass
class Bench:
    """What all parts work with."""

    device: str
    size: str  # of memory.SHAPES
    new: int  # tokens of a completion
    rows: list[int]
    prompts: int  # of the RLTR step
    steps: int  # of the learning run
    lm: rltr.LM
    receiver: rltr.LM
    copy_rate: float  # bytes/s, read and written
    matmul_rate: float  # FLOP/s

    @property
    def dtype(self) -> torch.dtype:
        return self.lm.model.dtype


def make_tokenizer():
    """As many tokens as Qwen2.5's, each a made-up word."""
    words = [f"w{number}" for number in range(VOCABULARY - 1)] + ["<eos>"]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "w0"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<eos>",
        unk_token="w0",
        chat_template="{% for message in messages %}{{ message.content }} {% endfor %}",
    )


def random_prompts(lengths) -> list[list[int]]:
    return [torch.randint(1, VOCABULARY, (length,)).tolist() for length in lengths]


def timed(function, device: str, repeat: int = 1) -> float:
    """Seconds of the fastest of `repeat` calls, after one more."""
    best = float("inf")
    for _ in range(repeat + 1):
        synchronize(device)
        start = time.perf_counter()
        function()
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best


def synchronize(device: str):
    if device != "cpu":
        torch.cuda.synchronize()


def measure_rates(device: str) -> tuple[float, float]:
    """Bytes/s of a large copy and FLOP/s of a large matmul, in the dtype that training uses."""
    on_cpu = device == "cpu"
    size = 2**25 if on_cpu else 2**30
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy_rate = 2 * size / timed(lambda: target.copy_(source), device, 10)
    width = 1024 if on_cpu else 8192
    dtype = torch.float32 if on_cpu else torch.bfloat16
    x = torch.randn(width, width, device=device, dtype=dtype)
    return copy_rate, 2 * width**3 / timed(lambda: x @ x, device, 10)


# ==================================================================================== correctness

GEMMA = {"head_dim": 64, "sliding_window": 9, "query_pre_attn_scalar": 64}
KINDS = {  # name: model type, changes of its config
    "qwen2, MHA": ("qwen2", {"num_key_value_heads": 6}),
    "qwen2, tied, sliding": (
        "qwen2",
        {
            "tie_word_embeddings": True,
            "use_sliding_window": True,
            "sliding_window": 9,
            "max_window_layers": 1,
        },
    ),
    "qwen3": ("qwen3", {"head_dim": 48}),
    "llama": ("llama", {}),
    "olmo2": ("olmo2", {}),
    "mistral, sliding": ("mistral", {"sliding_window": 9}),
    "gemma3": ("gemma3_text", GEMMA),
    "gemma2, soft caps": ("gemma2", {**GEMMA, "attn_implementation": "eager"}),  # sdpa drops them
    "phi3": ("phi3", {}),
    "gpt2": ("gpt2", {}),
}
SMALL = {
    "vocab_size": 997,
    "hidden_size": 192,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "max_position_embeddings": 1024,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}


def correctness(bench: Bench) -> list[str]:
    """Small random models of several architectures, in fp32."""
    lines = ["| model | greedy as transformers | graph steps as plain steps | gap | graphs |"]
    lines.append("|---|---|---|---|---|")
    for name, (kind, changes) in KINDS.items():
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(kind, **SMALL | changes)
        model = transformers.AutoModelForCausalLM.from_config(config).to(bench.device).eval()
        prompts = [torch.randint(1, 997, (length,)).tolist() for length in (5, 1, 170, 40)]
        greedy = count_greedy(model, prompts)
        same, gap, graphs = compare_steps(model, prompts)
        lines.append(f"| {name} | {greedy} | {same} | {gap:.1e} | {graphs} |")
    return lines


def count_greedy(model, prompts: list[list[int]]) -> str:
    """How many greedy completions are those of transformers, all rows at once and two at a time.

    Where the two best logits are within 1e-4, rounding decides: from there on anything is right."""
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt], device=model.device)
        mask = torch.ones_like(ids)
        whole = model.generate(ids, attention_mask=mask, max_new_tokens=40, do_sample=False)
        expected.append(whole[0, len(prompt) :].tolist())
    same = 0
    for max_rows in (None, 2):
        ours = rltr.generate(
            model, prompts, max_new_tokens=40, temperature=0, max_rows=max_rows, seed=0
        )
        for prompt, theirs, completion in zip(prompts, expected, ours, strict=True):
            same += completion.tokens == theirs or is_draw(model, prompt, theirs, completion.tokens)
    return f"{same} of {2 * len(prompts)}"


@torch.no_grad()
def is_draw(model, prompt: list[int], theirs: list[int], ours: list[int]) -> bool:
    """Whether the two best logits are as good as equal where the completions first differ."""
    pairs = zip(theirs, ours, strict=True)
    first = [a == b for a, b in pairs].index(False)
    ids = torch.tensor([prompt + theirs[:first]], device=model.device)
    best = model(input_ids=ids, use_cache=False).logits[0, -1].topk(2).values
    return (best[0] - best[1]).item() < 1e-4


def compare_steps(model, prompts: list[list[int]]) -> tuple[str, float, int]:
    """How many completions agree, the largest gap of their log-probs, and the graphs captured."""
    samplers = []

    class SeenSampler(rltr.Sampler):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            samplers.append(self)

    work = {"samples": 20, "max_new_tokens": 60, "seed": 1, "max_rows": 50}
    work["stop_ids"] = range(1, 20)
    with mock.patch.object(rltr, "Sampler", SeenSampler):
        graphed = rltr.generate(model, prompts, **work)
    with mock.patch.object(rltr, "GRAPH_DEVICES", set()):
        plain = rltr.generate(model, prompts, **work)
    same, gap = 0, 0.0
    for a, b in zip(graphed, plain, strict=True):
        if a.tokens == b.tokens:
            same += 1
            gap = max(gap, (torch.tensor(a.logprobs) - torch.tensor(b.logprobs)).abs().max().item())
    return f"{same} of {len(plain)}", gap, sum(len(sampler.graphs) for sampler in samplers)


def gap_to_trainer(bench: Bench) -> list[str]:
    """The log-probabilities of the sampler against the trainer's."""
    prompts = random_prompts((20, 90, 200, 50))
    completions = rltr.generate(
        bench.lm.model, prompts, max_new_tokens=64, seed=0, vocab_size=VOCABULARY
    )
    rollouts, sampled = [], []
    for prompt, c in zip(prompts, completions, strict=True):
        rollouts.append(rltr.Rollout(None, prompt, c.tokens, c.logprobs, c.finished, ""))
        sampled += c.logprobs
    with torch.no_grad():
        trained, _ = rltr.completion_logprobs(bench.lm, rollouts)
    gaps = (trained.cpu() - torch.tensor(sampled)).abs()
    return [f"{bench.dtype}: mean {gaps.mean():.4f}, max {gaps.max():.4f}"]


# ====================================================================================== attention


def decode_attention(bench: Bench) -> list[str]:
    """One layer of a decoding step: rltr.attention against torch's, called ten times in a row."""
    hidden, _, _, heads, kv_heads, _ = memory.SHAPES[bench.size]
    head_dim = hidden // heads
    lines = ["| rows | length | written out, us | torch, boolean mask, us | bound, us | gap |"]
    lines.append("|---|---|---|---|---|---|")
    for rows in bench.rows:
        for length in (PROMPT + bench.new // 2, PROMPT + bench.new):
            how = {"device": bench.device, "dtype": bench.dtype}
            query = torch.randn(rows, heads, 1, head_dim, **how)
            cache = torch.randn(2, rows + 1, kv_heads, length + 64, head_dim, **how)
            key, value = cache[:, :rows, :, :length]  # a part of the cache, as in Sampler
            positions = torch.randint(PROMPT, length, (rows, 1), device=bench.device)
            scale = head_dim**-0.5

            def written_out(query=query, key=key, value=value, positions=positions, scale=scale):
                return rltr.attention(query, key, value, positions, scale, None, None)

            def torchs(query=query, key=key, value=value, positions=positions, scale=scale):
                slots = torch.arange(key.shape[2], device=key.device)
                mask = (slots <= positions)[:, None, None]  # [rows, 1, 1, length]
                return scaled_dot_product_attention(
                    query, key, value, attn_mask=mask, scale=scale, enable_gqa=True
                )

            ours, theirs = (time_ten(function, bench.device) for function in (written_out, torchs))
            least = key.nbytes * 2 / bench.copy_rate
            gap = (written_out() - torchs()).abs().max().item()
            lines.append(
                f"| {rows} | {length} | {1e6 * ours:.0f} | {1e6 * theirs:.0f} "
                f"| {1e6 * least:.0f} | {gap:.0e} |"
            )
    return lines


def time_ten(function, device: str) -> float:
    """Seconds of a call, as one of ten; on a GPU within a graph, as in decoding."""

    def ten():
        for _ in range(10):
            function()

    if device == "cpu":
        return timed(ten, device, 5) / 10
    ten()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ten()
    return timed(graph.replay, device, 10) / 10


def prefill_attention(bench: Bench) -> list[str]:
    """What torch runs for whole prompts."""
    hidden, _, _, heads, kv_heads, _ = memory.SHAPES[bench.size]
    how = {"device": bench.device, "dtype": bench.dtype}
    query = torch.randn(8, heads, PROMPT, hidden // heads, **how)
    key = torch.randn(8, kv_heads, PROMPT, hidden // heads, **how)

    def attend():
        scaled_dot_product_attention(query, key, key, is_causal=True, enable_gqa=True)

    seconds = timed(attend, bench.device, 5)
    activities = [ProfilerActivity.CPU]
    if bench.device != "cpu":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as record:
        attend()
        synchronize(bench.device)
    names = [event.key for event in record.key_averages()]
    names = [name for name in names if "attention" in name or "fmha" in name or "flash" in name]
    lines = [f"8 prompts of {PROMPT} tokens, one layer, {1e6 * seconds:.0f} us:", ""]
    return lines + [f"- `{name[:110]}`" for name in names]


# ======================================================================================= sampling


def bound(bench: Bench, rows: int, context: float) -> float:
    """Least seconds of a decoding step of `rows` rows that attend to `context` tokens each."""
    model = bench.lm.model
    config, size = model.config, bench.dtype.itemsize

    def least(bytes_moved: float, flop: float) -> float:
        return max(bytes_moved / bench.copy_rate, flop / bench.matmul_rate)

    total = 0.0
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            k, n = module.in_features, module.out_features
            total += least(size * (k * n + rows * (k + n)), 2 * rows * k * n)
    head_dim = config.hidden_size // config.num_attention_heads
    cache_bytes = size * rows * context * 2 * config.num_key_value_heads * head_dim
    attention = least(cache_bytes, 4 * rows * context * config.hidden_size)
    others = size * rows * (8 * config.hidden_size + 3 * config.intermediate_size)
    total += config.num_hidden_layers * (attention + others / bench.copy_rate)
    return total + size * rows * config.vocab_size / bench.copy_rate


def sampling(bench: Bench) -> list[str]:
    """Tokens/s at several numbers of rows, and the percentage of the bound."""
    lines = ["| rows | seconds | useful tokens/s | ms/step | bound ms/step | % of the bound |"]
    lines.append("|---|---|---|---|---|---|")
    for rows in bench.rows:
        prompts = random_prompts([PROMPT] * max(1, rows // 8))
        work = {"samples": min(rows, 8), "max_new_tokens": bench.new, "max_rows": rows}

        def sample(prompts=prompts, work=work):
            rltr.generate(bench.lm.model, prompts, seed=1, vocab_size=VOCABULARY, **work)

        seconds = timed(sample, bench.device)
        least = sum(bound(bench, rows, PROMPT + step) for step in range(bench.new))
        lines.append(
            f"| {rows} | {seconds:.2f} | {rows * bench.new / seconds:,.0f} "
            f"| {1e3 * seconds / bench.new:.2f} | {1e3 * least / bench.new:.2f} "
            f"| {100 * least / seconds:.0f} |"
        )
    return lines


def kernels(bench: Bench) -> list[str]:
    """Where the time of decoding goes: the kernels that take most."""
    rows = max(bench.rows) // 2
    prompts = random_prompts([400] * max(1, rows // 8))

    def sample():
        rltr.generate(
            bench.lm.model,
            prompts,
            samples=8,
            max_new_tokens=min(16, bench.new),
            vocab_size=VOCABULARY,
            max_rows=rows,
            seed=0,
        )

    sample()
    on_cpu = bench.device == "cpu"
    with profile(activities=[ProfilerActivity.CPU if on_cpu else ProfilerActivity.CUDA]) as record:
        sample()
    time_of = "self_cpu_time_total" if on_cpu else "self_device_time_total"
    events = sorted(record.key_averages(), key=lambda e: getattr(e, time_of), reverse=True)
    lines = [f"16 steps of {rows} rows:", "", "| kernel | calls | ms in all |", "|---|---|---|"]
    for event in events[:20]:
        lines.append(
            f"| `{event.key[:90]}` | {event.count} | {getattr(event, time_of) / 1e3:.1f} |"
        )
    return lines


def against_transformers(bench: Bench) -> list[str]:
    """The same ragged work, rows ended by one token in a hundred of the vocabulary."""
    batches = [random_prompts(range(60, 188, 4)[: bench.prompts])] * 2
    engines = {
        "rltr": peers.ours,
        "transformers generate, dynamic cache": peers.hf_generate,
        "transformers generate_batch (continuous batching)": peers.hf_continuous,
    }
    if bench.device != "cpu":
        engines["transformers generate, static cache, compiled"] = peers.hf_static
    stop_ids = tuple(range(0, VOCABULARY, 100))
    limit = max(1, bench.new // 2)
    results = peers.measure(engines, bench.lm.model, batches, 8, stop_ids, limit)
    return peers.table(results).split("\n")


# ================================================================================= a step, memory


def whole_step(bench: Bench) -> list[str]:
    """One RLTR step after another like it. As the weights are random, so are the advantages."""
    lm = bench.lm
    config = rltr.Config(prompts=bench.prompts, max_new_tokens=bench.new, device=bench.device)
    optimizer = rltr.MasterAdamW(lm.model, config.lr)
    problems = []
    for number in range(1, bench.prompts + 1):
        words = [f"w{1 + number * place}" for place in range(PROMPT)]  # w0 is left out of texts
        problems.append(rltr.Problem(" ".join(words), "1"))
    tasks = rltr.encode_problems(lm, problems, "{question}", bench.new)
    for step in range(2):  # the second one counts
        seconds, rollouts, learned = timed_step(bench, optimizer, tasks, config, step)
    tokens = sum(len(rollout.tokens) for rollout in rollouts)
    continued = sum(cut.continuation_length for rollout in rollouts for cut in rollout.cuts)
    done = {"sample": tokens, "transfer": continued, "update": tokens}
    lines = ["| phase | seconds | tokens/s |", "|---|---|---|"]
    for phase, its_seconds in seconds.items():
        lines.append(f"| {phase} | {its_seconds:.2f} | {done[phase] / its_seconds:,.0f} |")
    peak = torch.cuda.max_memory_allocated() / 2**30 if bench.device != "cpu" else 0
    rate = update_flop(lm.model, rollouts) / seconds["update"]
    return [
        *lines,
        "",
        f"In all {sum(seconds.values()):.1f} s; token budget {config.token_budget}; peak memory "
        f"{peak:.1f} GiB. The update does "
        f"{rate / 1e12:.2f} TFLOP/s, {rate / bench.matmul_rate:.0%} of the matmul rate (6 FLOP a "
        "weight and token; attention and what is computed twice not counted). Log-prob gap mean "
        f"{learned['logprob_gap_mean']:.4f}, max {learned['logprob_gap_max']:.4f}.",
    ]


def timed_step(bench: Bench, optimizer, tasks: list, config: rltr.Config, step: int) -> tuple:
    """Seconds of each phase, the rollouts, and the metrics of the update."""
    lm = bench.lm
    synchronize(bench.device)
    times = [time.perf_counter()]
    rollouts = rltr.sample_rollouts(lm, tasks, config, (rltr.ROLLOUT, step))
    synchronize(bench.device)
    times.append(time.perf_counter())
    rltr.score_answers(rollouts)
    rltr.cut_rollouts(rollouts, lm, config, (rltr.CUT, step))
    rltr.continue_cuts(rollouts, lm, bench.receiver, config, (rltr.CONTINUATION, step))
    rltr.score_transfer(rollouts)
    synchronize(bench.device)
    times.append(time.perf_counter())
    for number, rollout in enumerate(rollouts):
        rollout.advantage = 1.0 if number % 2 else -1.0
    learned = rltr.update(lm, optimizer, rollouts, config)
    synchronize(bench.device)
    times.append(time.perf_counter())
    phases = ("sample", "transfer", "update")
    return {phases[i]: times[i + 1] - times[i] for i in range(3)}, rollouts, learned


def update_flop(model, rollouts: list[rltr.Rollout]) -> float:
    """6 for each weight of a matrix and token; the head works on completion tokens only."""
    head = model.get_output_embeddings().weight.numel()
    matrices = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    body = sum(module.weight.numel() for module in matrices) - head
    completion_tokens = sum(len(rollout.tokens) for rollout in rollouts)
    all_tokens = completion_tokens + sum(len(rollout.prompt) for rollout in rollouts)
    return 6.0 * (body * all_tokens + head * completion_tokens)


def memory_of_update(bench: Bench) -> list[str]:
    length = 4 * bench.new
    settings = [(1, length, False), (8, length, True)]
    return memory.check(bench.size, settings, bench.device)


def learning(bench: Bench) -> list[str]:
    """rltr.py on the built-in task, with its two tiny models on this device."""
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary) / "run"
        settings = rltr.TINY | {"device": bench.device, "steps": bench.steps, "out": str(out)}
        start = time.perf_counter()
        rltr.train(rltr.Config(**settings | {"eval_data": "", "show_every": 0, "save_every": 0}))
        seconds = time.perf_counter() - start
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    lines = [f"{len(rows)} steps in {seconds:.0f} s.", ""]
    lines += ["| metric | first ten steps | last ten steps |", "|---|---|---|"]
    for name in ("reward", "accuracy", "transfer", "entropy", "logprob_gap_max"):
        first = rltr.mean(row[name] for row in rows[:10])
        last = rltr.mean(row[name] for row in rows[-10:])
        lines.append(f"| {name} | {first:.3f} | {last:.3f} |")
    return lines


PARTS = {
    "Correctness, fp32": correctness,
    "Log-probs, sampler against trainer": gap_to_trainer,
    "Attention of a decoding step": decode_attention,
    "Attention of prompts": prefill_attention,
    "Sampling": sampling,
    "One step": whole_step,
    "Memory of an update": memory_of_update,
    "The built-in task": learning,
    "Kernels": kernels,
    "Against transformers": against_transformers,
}


def make_bench(given) -> Bench:
    dtype = torch.float32 if given.device == "cpu" else torch.bfloat16
    torch.manual_seed(0)
    model = memory.make_model(given.size, given.device, dtype)
    lm = rltr.LM(model, make_tokenizer(), (VOCABULARY - 1,), VOCABULARY, 32768)
    receiver = dataclasses.replace(lm, model=memory.make_model(given.size, given.device, dtype))
    copy_rate, matmul_rate = measure_rates(given.device)
    settings = {}
    for name in ("device", "size", "new", "rows", "prompts", "steps"):
        settings[name] = getattr(given, name)
    rates = {"copy_rate": copy_rate, "matmul_rate": matmul_rate}
    return Bench(**settings, **rates, lm=lm, receiver=receiver)


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("gpu_check.md"))
    parser.add_argument("--size", default="1.5B", choices=[*memory.SHAPES])
    parser.add_argument("--new", type=int, default=512, help="new tokens")
    parser.add_argument("--rows", type=int, nargs="+", default=[64, 128, 256, 512])
    parser.add_argument("--prompts", type=int, default=32, help="of the RLTR step")
    parser.add_argument("--steps", type=int, default=60, help="of the built-in task")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--only", nargs="+", choices=[*PARTS], default=[*PARTS])
    parser.add_argument("--device", default="cuda")
    given = parser.parse_args(argv)
    began = time.perf_counter()
    name = "CPU" if given.device == "cpu" else torch.cuda.get_device_name()
    text = [
        f"# {name}, Qwen2.5-{given.size} shape",
        "",
        f"{datetime.date.today()}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}; {given.new} new tokens, {given.prompts} x 8 in the step",
    ]
    given.out.write_text("\n".join(text))  # can it be written?
    bench = make_bench(given)
    text += [
        "",
        f"Measured: copy {bench.copy_rate / 1e9:.0f} GB/s (read + write), matmul "
        f"{bench.matmul_rate / 1e12:.2f} TFLOP/s",
    ]
    print("\n".join(text), flush=True)
    for title in given.only:
        start = time.perf_counter()
        if start - began > 60 * given.minutes:
            lines = [f"left out: {given.minutes:g} minutes are over"]
        else:
            lines = attempt(PARTS[title], bench)
        part = ["", f"## {title}", "", *lines, "", f"({time.perf_counter() - start:.0f} s)"]
        text += part
        print("\n".join(part), flush=True)
        given.out.write_text("\n".join(text) + "\n")  # what there is, if we are killed


def attempt(part, bench: Bench) -> list[str]:
    try:
        return part(bench)
    except Exception:
        return ["FAILED", "```", traceback.format_exc()[-3000:], "```"]
    finally:  # a failed part leaves nothing behind
        bench.lm.model.zero_grad()
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(rltr.run_command("gpu_check", main, sys.argv[1:]))
