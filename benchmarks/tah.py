"""Think-at-Hard against plain transformers: CPU-time ratios in one process, one thread, float32, alternating, medians.

    python benchmarks/tah.py [--sizes mid,tiny] [--repeat 5] [--only decode]

Floors (1.00 = as fast as): decode, (1 + rate) single-token passes of transformers' own forward with its cache, prompt included;
step 1, plain SFT (transformers forward with labels, backward) of the same tokens; step 2, one no-grad forward; labelling, one
plain forward; pruning, the naive loop that removes each layer and measures again. Memory is the peak of a fresh process above its start.
"""

import argparse
import copy
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from transformers import DynamicCache

from lab.methods.tah.config import MLPSettings, TahConfig
from lab.methods.tah.data import IGNORE
from lab.methods.tah.deciders import Decider, MLPDecider, Seen
from lab.methods.tah.features import collect
from lab.methods.tah.labels import statistics as label_statistics
from lab.methods.tah.model import TahModel
from lab.methods.tah.policy import decode
from lab.models.backbones import load_backbone
from lab.models.pruning import drop_layers, removal_losses

RATE, HARD = 0.07, 0.13
SIZES = {
    "mid": {"layers": 6, "hidden": 384, "intermediate": 1024, "heads": 6, "kv_heads": 2, "vocab_size": 32000, "max_positions": 1024},
    "tiny": {"layers": 2, "hidden": 64, "intermediate": 128, "heads": 4, "kv_heads": 2, "vocab_size": 256, "max_positions": 1024},
}


class Chance(Decider):
    """Continues with a share of tokens, drawn beforehand: the schedule without the cost of a decider."""

    def __init__(self, rate: float, seed: int = 0):
        super().__init__()
        self.rate, self.random = rate, torch.Generator().manual_seed(seed)

    def again(self, seen: Seen, logit: torch.Tensor) -> torch.Tensor:
        return torch.rand(seen.count, generator=self.random) < self.rate


def cpu_time(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def alternate(works: dict[str, Callable[[], object]], repeat: int) -> dict[str, list[float]]:
    """CPU seconds of each piece of work, taken in turn `repeat` times after one warm-up."""
    for work in works.values():
        work()
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeat):
        for name, work in works.items():
            times[name].append(cpu_time(work))
    return times


def median_ratio(times: dict[str, list[float]], ours: str, floor: str, factor: float = 1.0) -> float:
    """The median of ours / (factor · floor) over the rounds."""
    return statistics.median(a / (factor * b) for a, b in zip(times[ours], times[floor], strict=True))


def model_of(size: str) -> TahModel:
    backbone = load_backbone("toy:qwen3", **SIZES[size])
    kwargs = {"adapter_kwargs": {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0}, "input_updater_kwargs": {"topk": 100}}
    model = TahModel(backbone, TahConfig.check(**kwargs))
    for parameter in model.lora.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return model.eval()


class CostlyChance(MLPDecider):
    """The MLP decider at work, its decisions replaced by drawn ones, so that every batch sees the same rate."""

    def __init__(self, settings: MLPSettings, rate: float):
        super().__init__(settings)
        self.rate, self.random = rate, torch.Generator().manual_seed(0)

    def again(self, seen: Seen, logit: torch.Tensor) -> torch.Tensor:
        return torch.rand(seen.count, generator=self.random) < self.rate


def mlp_settings(model: TahModel) -> MLPSettings:
    """An MLP decider in the proportions of the recipes."""
    width, depth = model.config.hidden_size, model.config.num_hidden_layers
    layers = sorted({0, depth // 3, 2 * depth // 3, depth - 1})
    shape = {"hidden_states_size": width, "hidden_states_layer_nums": layers, "hidden_dims": [width // 4] * 6}
    return MLPSettings.check(topk=100, max_iter=2, dtype="float32", **shape)


@torch.no_grad()
def plain_decode(model: torch.nn.Module, prompts: torch.Tensor, tokens: int) -> float:
    """Greedy decoding by transformers' forward and cache; CPU seconds of the single-token passes alone."""
    cache = DynamicCache(config=model.config)
    logits = model(prompts, past_key_values=cache, logits_to_keep=1).logits
    start = time.process_time()
    for _ in range(tokens - 1):
        logits = model(logits[:, -1:].argmax(-1), past_key_values=cache, logits_to_keep=1).logits
    return time.process_time() - start


def bench_decode(model: TahModel, size: str, repeat: int, length: int = 64) -> None:
    for rows in (1, 4, 16):
        prompts = torch.randint(0, model.config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(rows))
        listed, rates, steps = prompts.tolist(), {}, []
        chance, mlp = Chance(RATE, rows), CostlyChance(mlp_settings(model), RATE).eval()

        def ours(name: str, decider: Decider, listed=listed, rates=rates) -> None:
            done = decode(model, listed, decider=decider, max_new_tokens=length)
            said = done.iterations[:, length : 2 * length - 1]
            rates[name] = float(said.float().mean()) - 1

        works = {
            "plain": lambda prompts=prompts, steps=steps: steps.append(plain_decode(model.backbone, prompts, length)),
            "chance": partial(ours, "chance", chance),
            "mlp": partial(ours, "mlp", mlp),
        }
        times = alternate(works, repeat)
        for name in ("chance", "mlp"):
            floor = [total + rates[name] * single for total, single in zip(times["plain"], steps[1:], strict=True)]
            ratio = statistics.median(a / b for a, b in zip(times[name], floor, strict=True))
            report(size, f"decode, batch {rows}, {'MLP decider' if name == 'mlp' else 'given decisions'}", ratio, f"rate {rates[name]:.3f}")


def training_batch(model: TahModel, rows: int = 4, length: int = 512) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (rows, length), generator=random)
    hard = torch.rand(rows, length, generator=random) < HARD
    return {"input_ids": ids, "labels": ids.clone(), "iter_count_labels": 1 + hard.long()}


def step1_ours(model: TahModel, batch: dict[str, torch.Tensor]) -> None:
    model.zero_grad(set_to_none=True)
    model.train()(**batch).loss.backward()


def step1_plain(model: TahModel, batch: dict[str, torch.Tensor]) -> None:
    model.zero_grad(set_to_none=True)
    model.train().backbone(input_ids=batch["input_ids"], labels=batch["labels"]).loss.backward()


def bench_step1(model: TahModel, size: str, repeat: int) -> None:
    batch = training_batch(model)
    times = alternate({"plain": lambda: step1_plain(model, batch), "ours": lambda: step1_ours(model, batch)}, repeat)
    own, floor = (peak_memory(size, which) for which in ("ours", "plain"))
    memory = f"memory {own / floor:.2f} ({own:.0f} of {floor:.0f} MiB)" if floor > 1 else "memory below what start-up took"
    report(size, "step 1, 4 × 512 tokens, 13 % hard", median_ratio(times, "ours", "plain"), memory)
    model.zero_grad(set_to_none=True)


def peak_memory(size: str, which: str) -> float:
    """Peak MiB of one training step above what the process held before it, in a process of its own."""
    out = subprocess.run([sys.executable, __file__, "--memory", f"{size},{which}"], capture_output=True, text=True, check=True)
    return float(out.stdout.strip().splitlines()[-1])


def memory_child(size: str, which: str) -> None:
    model = model_of(size)
    batch = training_batch(model)
    small = {name: value[:1, :8] for name, value in batch.items()}
    step = step1_ours if which == "ours" else step1_plain
    step(model, small)
    before = high_water()
    step(model, batch)
    print(high_water() - before)


def high_water() -> float:
    """Peak resident MiB of this process; ru_maxrss would count the parent's memory, which a fork inherits."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def bench_step2(model: TahModel, size: str, repeat: int) -> None:
    batch = training_batch(model)
    examples = [{name: row.tolist() for name, row in zip(batch, rows, strict=True)} for rows in zip(*batch.values(), strict=True)]
    decider = MLPDecider(mlp_settings(model)).train()

    def ours() -> None:
        features = collect(model.eval(), decider, examples)
        keep = features.wanted != IGNORE
        logit = decider.logit(Seen(1, int(keep.sum()), features.top[keep], features.hidden[keep]))
        torch.nn.functional.binary_cross_entropy_with_logits(logit, features.wanted[keep].float()).backward()

    times = alternate({"plain": lambda: plain_forward(model, batch["input_ids"]), "ours": ours}, repeat)
    report(size, "step 2, features and decider step", median_ratio(times, "ours", "plain"))


@torch.no_grad()
def plain_forward(model: TahModel, ids: torch.Tensor) -> None:
    model.eval().backbone(input_ids=ids, use_cache=False)


def bench_label(model: TahModel, size: str, repeat: int) -> None:
    ids = training_batch(model)["input_ids"]
    rows = [{"data_id": i, "real_token": row} for i, row in enumerate(ids.tolist())]
    times = alternate({"plain": lambda: plain_forward(model, ids), "ours": lambda: label_statistics(model.backbone, rows)}, repeat)
    report(size, "labelling, all statistics", median_ratio(times, "ours", "plain"))


def bench_prune(model: TahModel, size: str, repeat: int) -> None:
    ids = training_batch(model, 4, 256)["input_ids"]
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]
    cut = [copy.deepcopy(model.backbone) for _ in range(model.config.num_hidden_layers)]
    for layer, other in enumerate(cut):
        drop_layers(other, [layer])

    @torch.no_grad()
    def naive() -> None:
        for other in (model.backbone, *cut):
            other(input_ids=ids, labels=ids, use_cache=False)

    times = alternate({"plain": naive, "ours": lambda: removal_losses(model.backbone, batches)}, repeat)
    report(size, "pruning, every layer measured", median_ratio(times, "ours", "plain"))


def report(size: str, work: str, ratio: float, note: str = "") -> None:
    print(f"{size:5s}  {work:42s} {ratio:5.2f}   {note}", flush=True)


BENCHES = {"decode": bench_decode, "step1": bench_step1, "step2": bench_step2, "label": bench_label, "prune": bench_prune}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="mid,tiny")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--only", default=",".join(BENCHES), help=f"some of {', '.join(BENCHES)}")
    parser.add_argument("--memory", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.memory:
        return memory_child(*options.memory.split(","))
    print(f"torch {torch.__version__}, one thread, float32, median of {options.repeat} rounds\nsize   work{'':38s} ratio")
    for size in options.sizes.split(","):
        model = model_of(size)
        for name in options.only.split(","):
            BENCHES[name](model, size, options.repeat)


if __name__ == "__main__":
    main()
