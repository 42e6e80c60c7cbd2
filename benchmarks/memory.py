"""Peak memory of an update, by setting, for shapes that need not fit this machine.

    python benchmarks/memory.py            # a table for Qwen2.5-0.5B, 1.5B, 3B, 7B; no GPU needed
    python benchmarks/memory.py --check    # the same count against what the CPU really allocated

The update of rltr.py runs on fake tensors, which have shapes but no data, and every allocation and
release of a storage is counted: weights, fp32 masters and gradients, Adam's moments,
activations, logits. Not in it: the CUDA context (0.5 GiB) and what the allocator loses to
fragmentation; the table adds a tenth for that, and the bf16 weights of a receiver of the same
size. The KV cache of sampling is gone by then; `max_rows` fits it to the memory that is free."""

import argparse
import sys
import weakref
from pathlib import Path

import torch
import transformers
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).parent.parent))
import rltr

GIB = 2**30
#               hidden, inner, layers, heads, kv heads, tied
SHAPES = {
    "0.5B": (896, 4864, 24, 14, 2, True),
    "1.5B": (1536, 8960, 28, 12, 2, True),
    "3B": (2048, 11008, 36, 16, 2, True),
    "7B": (3584, 18944, 28, 28, 4, False),
    "check": (256, 1024, 4, 8, 2, True),
}


def make(size: str):
    hidden, inner, layers, heads, kv_heads, tied = SHAPES[size]
    config = transformers.Qwen2Config(
        vocab_size=151_936,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=tied,
        max_position_embeddings=32768,
        dtype=torch.bfloat16,
    )
    torch.set_default_dtype(torch.bfloat16)
    model = transformers.Qwen2ForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    return model


def one_update(model, optimizer, rows: int, length: int):
    """The allocations of rltr.update: two micro-batches, the gradient clipped, a step."""
    lm = rltr.LM(model, None, (0,), 151_665, 32768)
    prompt, n = [1] * (length // 4), length - length // 4
    row = rltr.Rollout(None, prompt, [1] * n, [0.0] * n, True, "")
    for _ in range(2):
        logp, _ = rltr.completion_logprobs(lm, [row] * rows)
        old, advantage = torch.zeros_like(logp), torch.ones_like(logp)
        (-rltr.policy_objective(logp, old, advantage, 0.2, 0.28).mean()).backward()
        del logp, old, advantage
    torch.nn.utils.clip_grad_norm_(optimizer.masters, 1.0)
    optimizer.adam.step()
    optimizer.adam.zero_grad()


class Count(TorchDispatchMode):
    """Bytes of the storages that are alive on a device, and the most there ever were."""

    def __init__(self, device: str):
        super().__init__()
        self.device, self.alive, self.now, self.peak = device, {}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == self.device:
                self.add(tensor.untyped_storage())
        return result

    def add(self, storage):
        key = storage._cdata
        if key not in self.alive:
            self.alive[key] = weakref.ref(storage, lambda _: self.release(key, storage_bytes))
            storage_bytes = storage.nbytes()
            self.now += storage_bytes
            self.peak = max(self.peak, self.now)

    def release(self, key, count):
        del self.alive[key]
        self.now -= count


def counted(size, rows, length, checkpointing, offload=False) -> int:
    """The most bytes at once, on fake tensors; with offload without those of the host, for which
    the device "meta" stands here."""
    with FakeTensorMode(), Count("cpu") as count:
        model = make(size)
        model.train(checkpointing)
        if checkpointing:
            model.gradient_checkpointing_enable()
        one_update(
            model, rltr.MasterAdamW(model, 1e-6, device="meta" if offload else None), rows, length
        )
        return count.peak


def allocated(size: str, rows: int, length: int, checkpointing: bool) -> int:
    """What the CPU's allocator handed out at most, by the profiler's record of each call."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        model = make(size)
        model.train(checkpointing)
        if checkpointing:
            model.gradient_checkpointing_enable()
        one_update(model, rltr.MasterAdamW(model, 1e-6), rows, length)
    total = peak = 0
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]":
            total += event.nbytes()
            peak = max(peak, total)
    return peak


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--length", type=int, default=2048, help="longest row, prompt included")
    given = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    if given.check:
        print(
            "| rows x length | checkpointing | counted, GiB | allocated, GiB |\n|---|---|---|---|"
        )
        for rows, length, checkpointing in ((1, 512, False), (4, 256, False), (4, 256, True)):
            work = "check", rows, length, checkpointing
            print(
                f"| {rows} x {length} | {checkpointing} | {counted(*work) / GIB:.3f} "
                f"| {allocated(*work) / GIB:.3f} |"
            )
        return
    cards, one, full = (16, 24, 32, 48, 80, 141), (1, given.length), (8, given.length)
    settings = {
        f"none, {full[0]} x {full[1]}": (*full, False),
        f"none, 1 x {one[1]}": (*one, False),
        f"checkpointing, {full[0]} x {full[1]}": (*full, True),
        f"checkpointing, offload, {full[0]} x {full[1]}": (*full, True, True),
        f"checkpointing, offload, 1 x {one[1]}": (*one, True, True),
    }
    print("| shape | " + " | ".join(settings) + " |\n|---" + "|---" * len(settings) + "|")
    for size in ("0.5B", "1.5B", "3B", "7B"):
        with torch.device("meta"):
            receiver = 2 * sum(p.numel() for p in make(size).parameters())
        cells = []
        for setting in settings.values():
            need = 1.1 * (counted(size, *setting) + receiver) / GIB + 0.5
            card = next((f"{c} GB" for c in cards if need * GIB / 1e9 < c), "none of one")
            cells.append(f"{need:.1f} GiB: {card}")
        print(f"| Qwen2.5-{size} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
