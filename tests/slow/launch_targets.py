"""Functions that the launch tests run in other processes."""

import os
import shutil
import signal
import threading
import time
from pathlib import Path

import torch
from torch import nn

from lab import files
from lab.errors import DataError
from lab.launch import on_main, rank, world_size
from lab.train import TrainSettings, fit
from lab.training import optim, sharding


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.drop, self.head, self.unused = nn.Embedding(11, 16), nn.Dropout(0.2), nn.Linear(16, 11), nn.Linear(3, 3)

    def forward(self, ids):
        return self.head(self.drop(self.embed(ids)))


def collate(rows):
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    return {"ids": ids, "labels": torch.tensor([row + [-100] * (width - len(row)) for row in rows])}


def loss(model, batch):
    logits = model(batch["ids"])[:, :-1]
    ce = nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())
    norm = logits.square().mean(dim=(1, 2)).mean()
    return ce + 0.1 * norm, {"ce": ce, "norm": norm, "test/world": world_size()}


def train(folder, logger=None, loss=loss, dropout=0.2, **changes):
    """Losses of every step, and a checksum of the weights."""
    data = [[(i * k) % 11 for k in range(1, 3 + i % 5)] for i in range(40)]
    model = Tiny()
    model.drop.p = dropout
    chosen = {"steps": 12, "global_batch": 8, "micro_batch": 2, "lr": 1e-2, "log_every": 1, "save_every": 4, "weight_decay": 0.1}
    settings = TrainSettings.check(**{**chosen, **changes})
    fit(model, data, collate, loss, settings, folder, logger, lengths=[len(row) for row in data])
    rows = on_main(lambda: files.read_lines(Path(folder) / "metrics.jsonl"))
    kept = [row for row in rows if "loss" in row]
    return {
        "losses": [row["loss"] for row in kept],
        "norms": [row["norm"] for row in kept],
        "gradients": [row["grad_norm"] for row in kept],
        "weights": [float(p.detach().double().square().sum()) for p in model.parameters()],
        "plain": all(type(p) is nn.Parameter and type(p.data) is torch.Tensor for p in model.parameters()),
        "world": world_size(),
    }


def greedy(model, batch):
    """A loss for which the second of two processes has room for one row at a time, from the fifth step on."""
    seen.append(batch)
    if rank() == 1 and len(batch["ids"]) > 1 and len(seen) > 8:
        raise torch.OutOfMemoryError("injected")
    parts = loss(model, batch)[1]
    return parts["ce"], {"norm": 0.0}


def hungry(model, batch):
    """A loss for which the system ends the second of two processes in its place."""
    try:
        return greedy(model, batch)
    except torch.OutOfMemoryError:
        os.kill(os.getpid(), signal.SIGKILL)


seen = []


def poisoned(model, batch):
    """A loss that one example makes infinite."""
    total, parts = loss(model, batch)
    sick = (batch["ids"][:, :5] == torch.tensor([3, 6, 9, 1, 4])[: batch["ids"].shape[1]]).all(1) & (batch["labels"] != -100).sum(1).eq(5)
    return (total * torch.inf, parts) if sick.any() else (total, parts)


def skipping(folder, shardings):
    """Trainings with steps that must be left out, each with its number of them."""
    found = {}
    for how in shardings:
        found[how] = train(f"{folder}/{how}", loss=poisoned, sharding=how)
        rows = on_main(lambda how=how: files.read_lines(Path(folder) / how / "divergence.jsonl"))
        found[how]["skipped"] = [row["step"] for row in rows if row["kind"] == "skipped"]
    return found


def train_and_resume(folder, **changes):
    """A training, and what it comes to when its last steps are done again from the checkpoint before."""
    done = train(folder, **changes)
    on_main(lambda: shutil.rmtree(Path(folder) / "checkpoint-12"))
    return done, train(folder, **changes)


def in_pieces():
    """What ZeRO-1 and ZeRO-2 keep in this process, and what becomes of gradients that are clipped, dropped or not finite."""
    return [_in_pieces(how) for how in ("zero1", "zero2")]


def _in_pieces(how):
    module = sharding.shard(nn.Sequential(*(nn.Linear(8, 8) for _ in range(40))), torch.device("cpu"), how)
    parameters = list(module.parameters())
    optimizer = sharding.split(module, optim.adamw([{"params": parameters}], [0.9, 0.999], 1e-8), 1e-3)
    seen = {"parameters": sum(p.numel() for p in parameters)}
    for last in (False, True):
        with sharding.accumulating(module, last):
            (module(torch.ones(2, 8)).square().sum() * world_size()).backward()  # sums over processes are means
        own = [gradient for group in optimizer.all_grad_tensors.values() for gradient in group or []]
        kept = sum(gradient.numel() for gradient in own + [p.grad for p in parameters] if gradient is not None)
        seen.setdefault("gradients", kept)  # between micro-batches
    whole = torch.autograd.grad(2 * world_size() * module(torch.ones(2, 8)).square().sum(), parameters)
    seen["norms"] = float(optimizer.norm()), float(torch.stack([g.norm() for g in whole]).norm())
    optimizer.step()
    (moments,) = optimizer.state.values()
    square = moments["exp_avg"].square().sum()
    torch.distributed.all_reduce(square)
    seen |= {"moments": moments["exp_avg"].numel() + moments["exp_avg_sq"].numel(), "clipped": float(square.sqrt()) / 0.1}
    before = [p.clone() for p in parameters]
    with sharding.accumulating(module, last=True):
        (module(torch.ones(2, 8)).square().sum() * torch.inf).backward()
    seen["not finite"] = float(optimizer.norm())
    optimizer.drop()
    optimizer.step()
    return {**seen, "unchanged": all(torch.equal(p, old) for p, old in zip(parameters, before, strict=True))}


def die_at(path, lines):
    """Kills this process once `path` has so many lines; who watches from outside can be late on a busy machine."""

    def watch():
        while not Path(path).exists() or Path(path).read_bytes().count(b"\n") < lines:
            time.sleep(0.002)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def complain():
    if rank() == 1:
        raise DataError("The record on line 7 has no answer.")
    time.sleep(600)


def die(number):
    """Ends the second process by a signal while the first waits."""
    if rank() == 1:
        os.kill(os.getpid(), number)
    time.sleep(600)


def wait(folder):
    """Notes its process id, then waits for ever."""
    files.write_text(Path(folder) / f"rank-{rank()}", str(os.getpid()))
    time.sleep(600)


def asked(folder, processes=1, dies_after=None):
    """An evaluation of 120 sampled answers of a tiny model; the process with the last questions may die after some of them."""
    from lab.backends import HF
    from lab.data.examples import Example
    from lab.evaluate import Decoding, evaluate
    from lab.models.backbones import load_backbone
    from lab.models.tokenizers import byte_tokenizer

    class Dying(HF):
        def generate(self, requests, decoding):
            for number, answered in enumerate(super().generate(requests, decoding)):
                if number == dies_after and requests[-1].number == 59:
                    os._exit(7)
                yield answered

    tokenizer = byte_tokenizer(chat=True)
    model = load_backbone("toy:qwen3-micro", vocab_size=len(tokenizer), initializer_range=0.3, seed=1)
    examples = [Example(id=str(i), question=f"{i} + 1 = ?" * (1 + i % 4), answer=str(i + 1)) for i in range(60)]
    decoding = Decoding(temperature=0.9, max_new_tokens=8, batch=4)
    return evaluate(Dying(model, tokenizer), examples, "number", folder, decoding, repeat=2, processes=processes)


def gated(folder, processes=1):
    """The artefacts of an evaluation of a tiny gated model with drawn gates and tokens."""
    import torch

    from lab.evaluate import Decoding
    from lab.methods.dtt.evaluate import evaluate_gated
    from lab.methods.dtt.stages import examples, fresh
    from lab.methods.dtt.tables import gates_of

    torch.manual_seed(0)
    how = {"decoding": Decoding(temperature=1.0, max_new_tokens=8, batch=4), "drawn": True, "states": 12, "processes": processes}
    numbers = evaluate_gated(fresh("toy:gpt2", "permutations", {}, 0), examples("permutations", "test", 20), "permutations", folder, **how)
    kept = [torch.load(folder / f"{name}.pt", weights_only=True) for name in ("gate_values", "hidden_states")]
    return repr(numbers), gates_of(folder), (folder / "evaluation_results.csv").read_text(), *kept


def ask(folder):
    """120 sampled answers of a tiny model, four at a time, unhurried enough to be killed in between."""
    from lab.backends import HF
    from lab.data.examples import Example
    from lab.evaluate import Decoding, evaluate
    from lab.models.backbones import load_backbone
    from lab.models.tokenizers import byte_tokenizer

    class Slow(HF):
        def _batch(self, asked, decoding):
            time.sleep(0.02)
            yield from super()._batch(asked, decoding)

    tokenizer = byte_tokenizer(chat=True)
    model = load_backbone("toy:qwen3-micro", vocab_size=len(tokenizer), initializer_range=0.3, seed=1)
    examples = [Example(id=str(i), question=f"{i} + 1 = ?" * (1 + i % 4), answer=str(i + 1)) for i in range(60)]
    decoding = Decoding(temperature=0.9, max_new_tokens=8, batch=4)
    evaluate(Slow(model, tokenizer), examples, "number", folder, decoding, repeat=2)
