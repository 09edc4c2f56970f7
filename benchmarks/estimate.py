"""What `lab estimate` says of a training against what it then takes: seconds of a step and the most memory.

python benchmarks/estimate.py [--steps 5] [--only 512]

Each case has a process of its own, one thread, CPU time, the median step. Memory is what the process holds at most beyond what it held
before the model was made.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from types import SimpleNamespace

import torch
from torch import nn

from lab import estimate
from lab.estimate import Training
from lab.training import probe


def case(arch, hidden, layers, rows, tokens, micro=0, vocab=4096, **more):
    heads = hidden // 64
    shape = {"vocab_size": vocab, "layers": layers, "hidden": hidden, "heads": heads, "max_positions": 2048}
    other = {"intermediate": 3 * hidden, "kv_heads": max(1, heads // 2)}
    shape |= {"intermediate": 4 * hidden, "kv_heads": heads} if arch == "gpt2" else other
    return Training("train", f"toy:{arch}", rows, tokens, 1, micro, shape, **more)


class Prefix(nn.Module):
    """Eight vectors that learn before a frozen backbone."""

    def __init__(self, config, backbone=None):
        super().__init__()
        self.vectors = nn.Parameter(torch.randn(8, config.hidden_size) * 0.02)
        self.held = [backbone]  # no part of the module: it is frozen

    def forward(self, input_ids, labels):
        x = self.held[0].get_input_embeddings()(input_ids)
        x = torch.cat((self.vectors.expand(len(x), -1, -1), x[:, 8:]), 1)
        return self.held[0](inputs_embeds=x, labels=labels)


CASES = [
    case("qwen3", 64, 2, 16, 24, vocab=256),
    *(case("llama", 256, layers, 8, 64) for layers in (4, 24)),
    case("llama", 256, 4, 2, 1024),
    *(case("qwen3", 512, layers, 8, 64) for layers in (4, 12, 24)),
    case("qwen3", 512, 8, 16, 64, 4),
    case("qwen3", 512, 12, 8, 64, lora=(16, ("q", "v"))),
    case("qwen3", 512, 12, 8, 64, lora=(64, ())),
    case("qwen3", 512, 12, 8, 64, frozen=True, parts=Prefix),
    *(case("gpt2", 768, layers, 4, 64) for layers in (4, 12)),
    case("gpt2", 768, 12, 2, 128, vocab=50257),
    case("llama", 768, 24, 4, 64),
]


def learner(t):
    """The model of a case."""
    from lab.models.backbones import load_backbone

    model = load_backbone(t.backbone, **t.shape)
    if t.frozen:
        return t.parts(model.config, model.requires_grad_(False))
    if not t.lora[0]:
        return model
    from peft import LoraConfig, get_peft_model

    targets = [f"{name}_proj" for name in t.lora[1]] or "all-linear"
    return get_peft_model(model, LoraConfig(r=t.lora[0], target_modules=targets))


def loss(model, batch):
    return model(**batch).loss, {}


def collate(rows):
    return {"input_ids": torch.tensor(rows), "labels": torch.tensor(rows)}


def stamps(t, steps):
    """CPU seconds at the end of every step of a training."""
    from lab.train import TrainSettings, fit

    times, data = [], [[(i * j) % 50 for j in range(t.tokens)] for i in range(64)]
    settings = TrainSettings.check(steps=steps, global_batch=t.rows, micro_batch=t.micro, log_every=1, save_every=0, device="cpu")
    fit(learner(t), data, collate, loss, settings, tempfile.mkdtemp(), lambda **row: times.append(time.process_time()))
    return times


def resident(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name))


def child(number, steps):
    torch.set_num_threads(1)
    probe.time, t = SimpleNamespace(perf_counter=time.process_time), CASES[number]
    stamps(replace(t, backbone="toy:qwen3-micro", shape={}, rows=2, tokens=16, micro=0), 2)  # imports
    before = resident("VmRSS")
    times = stamps(t, steps)
    took = {"seconds": statistics.median(b - a for a, b in zip(times[:-1], times[1:], strict=True))}
    print(json.dumps({**took, "held GiB": (resident("VmHWM") - before) / estimate.GIB, **estimate.row(t)}))


def name_of(t):
    rows = f"{t.rows}" if t.micro in (0, t.rows) else f"{t.rows} by {t.micro}"
    how = f", LoRA {t.lora[0]}" if t.lora[0] else ", frozen" if t.frozen else ""
    return f"{t.backbone[4:]} {t.shape['hidden']} x {t.shape['layers']}, {rows} x {t.tokens}, vocabulary {t.shape['vocab_size']}{how}"


def feedback_steps():
    """(name, told, measured) seconds of the forward and backward passes of the steps that benchmarks/feedback.py times."""
    import feedback

    shape = {"rows": feedback.ROWS, "tokens": feedback.QUESTION + feedback.REASONING + feedback.ANSWER, "thoughts": feedback.THOUGHTS}
    plain = Training("train", "toy:gpt2-mid", steps=1, said=0.45, **shape)
    found = []
    feedback.compare = lambda ours, floor, rounds: [found.append(ours)]
    for made in (feedback.coconut_step("mid", 1), feedback.codi_step("mid", 1)):
        list(made)
    for name, t, ours in zip(("COCONUT", "CODI"), (plain, replace(plain, passes=1.5)), found, strict=True):
        yield name, estimate._seconds(t) - probe.update_seconds() * estimate.counts(t)[1], probe.fastest(ours)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--only", type=int, default=0, help="the cases of this width")
    parser.add_argument("--case", type=int, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.case is not None:
        return child(asked.case, asked.steps)
    print("| backbone, width x layers, batch | seconds a step, told / measured | ratio | GiB, told / measured | ratio |")
    print("|---|---|---|---|---|")
    for number, t in enumerate(CASES):
        if asked.only in (0, t.shape["hidden"]):
            command = [sys.executable, __file__, "--case", str(number), "--steps", str(asked.steps)]
            said = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True, check=True).stdout
            r = json.loads(said.splitlines()[-1])
            pairs = ((r["seconds a step"], r["seconds"]), (r["all GiB"], r["held GiB"]))
            print(f"| {name_of(t)} | " + " | ".join(f"{a:.3g} / {b:.3g} | {a / b:.2f}" for a, b in pairs) + " |", flush=True)
    torch.set_num_threads(1)
    probe.time = SimpleNamespace(perf_counter=time.process_time)
    for name, told, measured in () if asked.only else feedback_steps():
        print(f"| {name} passes, gpt2-mid, 16 x 93 | {told:.3g} / {measured:.3g} | {told / measured:.2f} | | |", flush=True)


if __name__ == "__main__":
    main()
