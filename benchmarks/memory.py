"""Peak memory of an update, by setting, for shapes that need not fit this machine.

    python benchmarks/memory.py            # a table for Qwen2.5-0.5B, 1.5B, 3B, 7B; no GPU needed
    python benchmarks/memory.py --check    # the same count against what was really allocated

Two updates of rltr.py run on fake tensors, which have shapes but no data, and every allocation and
release of a storage is counted: weights, fp32 masters and gradients, Adam's moments,
activations, logits. Not in it: the CUDA context (0.5 GiB) and what the allocator loses to
fragmentation; the table adds a tenth for that, and the bf16 weights of a receiver of the same
size. The KV cache of sampling is gone by then; `max_rows` fits it to the memory that is free."""

import argparse
import contextlib
import gc
import sys
import weakref
from pathlib import Path
from unittest import mock

import torch
import transformers
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).parents[1]))
import rltr

GIB = 2**30
CARDS = (16, 24, 32, 48, 80, 141)  # GB

# Of Qwen2.5, all with its vocabulary.
#               hidden, inner, layers, heads, kv heads, tied
SHAPES = {
    "0.5B": (896, 4864, 24, 14, 2, True),
    "1.5B": (1536, 8960, 28, 12, 2, True),
    "3B": (2048, 11008, 36, 16, 2, True),
    "7B": (3584, 18944, 28, 28, 4, False),
    "check": (256, 1024, 4, 8, 2, True),
    "tiny": (64, 128, 2, 4, 2, True),
}
VOCABULARY, TOKENS = 151_936, 151_665  # rows of the embedding, tokens that the tokenizer knows


def make_model(size: str, device: str = "cpu", dtype=torch.bfloat16):
    """Qwen2.5's shape with random weights."""
    hidden, inner, layers, heads, kv_heads, tied = SHAPES[size]
    config = transformers.Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=tied,
        rope_theta=1e6,
        max_position_embeddings=32768,
        bos_token_id=None,
        eos_token_id=TOKENS - 1,
    )
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return transformers.Qwen2ForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)


def updates(size, rows, length, checkpointing, offload, device="cpu", count=None) -> int:
    """A model, its optimizer, and two steps (in the second one Adam's moments are there from the
    start) of two micro-batches of `rows` rows each, as rltr.update makes them. Returns the bytes of
    masters and moments."""
    model = make_model(size, device)
    if checkpointing:
        model.activation_checkpointing_enable()
    optimizer = rltr.MasterAdamW(model, 1e-6, 0.0, offload)
    if count is not None:  # a GPU's fused AdamW has no temporary tensors: leave out the CPU's
        optimizer.adam.register_step_pre_hook(lambda *_: count.watch(False))
        optimizer.adam.register_step_post_hook(lambda *_: count.watch(True))
    lm = rltr.LM(model, None, (0,), TOKENS, 32768)
    prompt = [1] * (length // 4)
    completion = [1] * (length - len(prompt))
    row = rltr.Rollout(None, prompt, completion, [0.0] * len(completion), True, "", advantage=1.0)
    config = rltr.Config(token_budget=rows * length, device=device)
    for _ in range(2):
        rltr.add_gradient(lm, [row] * (2 * rows), config)
        optimizer.step(max_norm=1.0)
    return sum(3 * master.nbytes for master in optimizer.masters)


class Count(TorchDispatchMode):
    """Bytes of the storages that are alive, and the most that there ever were."""

    def __init__(self):
        super().__init__()
        self.watching = True
        self.alive = {}  # a storage's address -> a reference that tells when it dies
        self.bytes = 0
        self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor.untyped_storage())
        return result

    def add(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key not in self.alive:
            self.alive[key] = weakref.ref(storage, lambda _: self.release(key, size))
            self.bytes += size
            self.watch(self.watching)

    def watch(self, watching: bool):
        self.watching = watching
        if watching:
            self.peak = max(self.peak, self.bytes)

    def release(self, key: int, size: int):
        del self.alive[key]
        self.bytes -= size


@contextlib.contextmanager
def norm_without_value():
    """A fake gradient norm has no value that the optimizer could look at: here it is 1."""
    clip = torch.nn.utils.clip_grad_norm_

    def clip_and_forget(*arguments):
        clip(*arguments)
        return mock.Mock(item=lambda: 1.0)

    with mock.patch("torch.nn.utils.clip_grad_norm_", clip_and_forget):
        yield


def counted(size, rows, length, checkpointing, offload=False) -> int:
    """The most bytes at once, on fake tensors. With offload without those that live on the host.

    All are called CPU tensors, as attention on the CPU, like that on a GPU, is one fused kernel."""
    with FakeTensorMode(), norm_without_value(), Count() as count:
        optimizer_bytes = updates(size, rows, length, checkpointing, offload, count=count)
        return count.peak - (optimizer_bytes if offload else 0)


def allocated(size, rows, length, checkpointing, offload=False, device="cpu") -> int:
    """The most bytes at once that the device's allocator really handed out."""
    setting = (size, rows, length, checkpointing, offload, device)
    if device != "cpu":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        updates(*setting)
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        updates(*setting)
    total = peak = 0
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]":
            total += event.nbytes()
            peak = max(peak, total)
    return peak


def check(size: str, settings, device: str) -> list[str]:
    """A table: what is counted against what is allocated."""
    lines = ["| rows x length | checkpointing | counted, GiB | allocated, GiB |"]
    lines.append("|---|---|---|---|")
    for rows, length, checkpointing in settings:
        fake = counted(size, rows, length, checkpointing) / GIB
        real = allocated(size, rows, length, checkpointing, device=device) / GIB
        lines.append(f"| {rows} x {length} | {checkpointing} | {fake:.3f} | {real:.3f} |")
    return lines


def smallest_card(need: float) -> str:
    for card in CARDS:
        if need * GIB < card * 1e9:
            return f"{card} GB"
    return "none of one"


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="on this machine, a small shape")
    parser.add_argument("--device", default="cpu", help="of --check")
    parser.add_argument("--length", type=int, default=2048, help="longest row, prompt included")
    given = parser.parse_args(argv)
    if given.check:
        settings = [(1, 512, False), (4, 256, False), (4, 256, True)]
        print("\n".join(check("check", settings, given.device)))
        return

    full, one = f"8 x {given.length}", f"1 x {given.length}"
    settings = {  # title: rows, length, checkpointing, offload
        f"none, {full}": (8, given.length, False, False),
        f"none, {one}": (1, given.length, False, False),
        f"checkpointing, {full}": (8, given.length, True, False),
        f"checkpointing, offload, {full}": (8, given.length, True, True),
        f"checkpointing, offload, {one}": (1, given.length, True, True),
    }
    print("| shape | " + " | ".join(settings) + " |\n|---" + "|---" * len(settings) + "|")
    for size in ("0.5B", "1.5B", "3B", "7B"):
        receiver = sum(2 * weight.numel() for weight in make_model(size, "meta").parameters())
        cells = []
        for setting in settings.values():
            need = 1.1 * (counted(size, *setting) + receiver) / GIB + 0.5
            cells.append(f"{need:.1f} GiB: {smallest_card(need)}")
        print(f"| Qwen2.5-{size} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    sys.exit(rltr.run_command("memory", main, sys.argv[1:]))
