"""What `lab.train.fit` costs beyond a bare loop over the same steps: CPU time, one thread, alternating in one process, median.

python benchmarks/training.py [--rounds 5] [--steps 150]
"""

import argparse
import statistics
import tempfile
import time

import torch

from lab.models.backbones import load_backbone
from lab.train import TrainSettings, fit

SIZES = {"toy:qwen3-tiny": (16, 24), "toy:qwen3-small": (8, 32)}  # rows and tokens of a batch


def data_of(tokens, count=512):
    return list(torch.randint(0, 256, (count, tokens), generator=torch.Generator().manual_seed(0)))


def collate(rows):
    ids = torch.stack(rows)
    return {"input_ids": ids, "labels": ids}


def loss(model, batch):
    value = model(**batch).loss
    return value, {"ce": value}


def with_lab(name, rows, tokens, steps):
    settings = TrainSettings.check(steps=steps, global_batch=rows)
    fit(load_backbone(name), data_of(tokens), collate, loss, settings, tempfile.mkdtemp(prefix="benchmark-"))


def bare(name, rows, tokens, steps):
    """The same work: clip, fused AdamW, a falling rate, one number a step to the host."""
    model, data = load_backbone(name).train(), data_of(tokens)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    order = torch.Generator().manual_seed(0)
    for _ in range(steps):
        chosen = torch.randint(0, len(data), (rows,), generator=order).tolist()
        value, _ = loss(model, collate([data[i] for i in chosen]))
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        value.item()


def cpu_seconds(work, *arguments):
    began = time.process_time()
    work(*arguments)
    return time.process_time() - began


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=150)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'model':18} {'bare ms/step':>13} {'lab ms/step':>12} {'ratio':>7}   checkpoints included, first imports not")
    for name, (rows, tokens) in SIZES.items():
        with_lab(name, rows, tokens, 2)
        pairs = [[cpu_seconds(work, name, rows, tokens, asked.steps) for work in (bare, with_lab)] for _ in range(asked.rounds)]
        ratio = statistics.median(ours / floor for floor, ours in pairs)
        floor, ours = (statistics.median(column) / asked.steps * 1e3 for column in zip(*pairs, strict=True))
        print(f"{name:18} {floor:13.2f} {ours:12.2f} {ratio:7.3f}")


if __name__ == "__main__":
    main()
