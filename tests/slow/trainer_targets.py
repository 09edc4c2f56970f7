"""Every trainer of `lab` on a tiny model, as a function of a folder and changes to its settings; run in one process and in several."""

from pathlib import Path

import torch

from lab import files
from lab.data.examples import Example
from lab.launch import on_main, world_size
from lab.models.backbones import load_backbone
from lab.models.tokenizers import byte_tokenizer, word_tokenizer
from lab.rl import RLSettings
from lab.train import TrainSettings

TERMS = [(i, i + 1) for i in range(8)]
SUMS = [Example(str(a), f"{a}+{b}+{a}?", (f"<<{a}+{b}={a + b}>>", f"<<{a + b}+{a}={a + b + a}>>"), str(a + b + a)) for a, b in TERMS]
# eps: with its default, Adam makes whole steps of what is nothing but rounding, as the gradient of a key's bias is
COMMON = {"eps": 1e-5, "lr": 1e-3, "save_every": 0, "log_every": 1, "schedule": "constant", "device": "cpu"}
SMALL = {**COMMON, "steps": 3, "global_batch": 8, "micro_batch": 2}
RL = {**COMMON, "steps": 2, "prompts": 4, "samples": 4, "micro_batch": 4}


def sft(**changes):
    return TrainSettings.check(**{**SMALL, **changes})


def rl(**changes):
    return RLSettings.check(**{**RL, **changes})


def coconut(folder, **changes):
    from lab.methods.coconut.config import CoconutSettings, Schedule
    from lab.methods.coconut.data import prepare
    from lab.methods.coconut.model import CoconutModel
    from lab.methods.coconut.train import train

    tokenizer = byte_tokenizer()
    settings = CoconutSettings(c_thought=1, epochs_per_stage=1, max_latent_stage=2, pad_latent_to_max=False)
    model = CoconutModel.start(load_backbone("toy:gpt2-micro", vocab_size=len(tokenizer)), tokenizer, settings)
    kept = prepare(SUMS, tokenizer).rows
    logger = lambda **row: files.append_line(folder / "metrics.jsonl", row)  # noqa: E731
    train(model, kept, kept[:2], Schedule(epochs=3), sft(**changes), folder, logger)
    return model


def codi(folder, **changes):
    from lab.methods.codi.config import CodiSettings
    from lab.methods.codi.data import prepare
    from lab.methods.codi.model import CodiModel
    from lab.methods.codi.train import train

    tokenizer = byte_tokenizer()
    model = CodiModel.start(load_backbone("toy:gpt2-micro", vocab_size=320), tokenizer, CodiSettings(prj_dim=48, lora_r=4, num_latent=3))
    rows = prepare(SUMS, tokenizer, model.config).rows
    train(model, rows, sft(**changes), folder, held_out=rows[:3])
    return model


def adaptive_model():
    from lab.methods.adaptive import stages

    return stages.start_model("toy", {"recurrent_filter_mode": "MLP"}, {}, 0)


def adaptive(folder, **changes):
    from lab.methods.adaptive import stages, toy
    from lab.methods.adaptive.config import Distil

    model = adaptive_model()
    distil = Distil(factor=1, most=6, weight_codi=5.0, weight_mean=1.0, distance="smooth_l1", scale="layerwise_std", jitter=2)
    stages.train_sft(model, toy.examples(16, 1), distil, sft(**changes), folder)
    return model


def varied(completion_ids, **_):
    """A reward that differs between the samples of a question, whatever they say."""
    return [float(sum(ids) % 7) for ids in completion_ids]


def adaptive_rl(folder, **changes):
    from lab.methods.adaptive import toy
    from lab.methods.adaptive.data import Writer
    from lab.methods.adaptive.reinforce import AdaptiveThinking
    from lab.rl import reinforce

    model = adaptive_model()
    thinking = AdaptiveThinking(model, most=4)
    thinking.hold_reference()
    writer = Writer(model.tokenizer, model.config)
    prompts = [writer.prompt(example.question) for example in toy.examples(8, 1)]
    reinforce(model, thinking, prompts, {}, {varied: 1.0}, rl(longest=10, beta=1e-2, **changes), folder)
    return model


def colar_model():
    from lab.methods.colar import toy
    from lab.methods.colar.config import ColarSettings

    settings = ColarSettings.check(lora_r=0, max_compression_factor=3, lp_intermediate_size=32, latent_loss="nll")
    return toy.untrained("toy:llama", 0, settings), toy.examples("train", 16, 0)


def colar(folder, **changes):
    from lab.methods.colar.train import prepare, train

    model, examples = colar_model()
    train(model, prepare(examples, model).rows, sft(**changes), folder)
    return model


def colar_rl(folder, **changes):
    from lab.methods.colar.reinforce import train_rl

    model, examples = colar_model()
    train_rl(model, examples, rl(longest=20, loss_type="grpo", **changes), folder, most=6, rewards={varied: 1.0})
    return model


def latenttts(folder, **changes):
    from lab.methods.latenttts.config import RewardTraining
    from lab.methods.latenttts.model import RewardModel
    from lab.methods.latenttts.objective import train
    from lab.methods.latenttts.toy import untrained
    from lab.sampling.records import Asked

    model = RewardModel.start(untrained(0), seed=1)
    random, width = torch.Generator().manual_seed(0), model.backbone.config.hidden_size
    asked = []
    for number in range(8):
        labels = torch.rand(4, 3, generator=random)
        thoughts = torch.randn(4, 3, width, generator=random)
        asked.append(Asked(number, [1, 2, 3 + number % 5], thoughts, torch.full((4,), 3), labels[:, -1] > 0.5, labels))
    train(model, asked, asked[:4], sft(**changes), RewardTraining(evals_per_epoch=1), folder)
    return model


def lta(folder, arm="lta", **changes):
    from functools import partial

    import numpy as np

    from lab.methods.lta import toy
    from lab.methods.lta.data import batch_of
    from lab.methods.lta.objective import counter, loss
    from lab.train import fit

    base = load_backbone("toy:qwen3", vocab_size=len(toy.WORLD.vocabulary), layers=2, hidden=32, heads=4, kv_heads=2)
    model = toy.start(arm, base, 0, 2)
    rows = toy.questions(toy.WORLD.task(16, np.random.default_rng(1)), 2, solution=model.config.gold_steps != "off")
    collate = partial(batch_of, pad=toy.BOS, placeholder=toy.FIRST_FILLER)
    fit(model, rows, collate, loss, sft(**changes), folder, count=counter(model))
    return model


def softcot(folder, **changes):
    return lta(folder, "softcot", **changes)


def tah_rows():
    from lab.methods.tah.data import build_example

    random = torch.Generator().manual_seed(0)
    rows = [torch.randint(0, 40, (n,), generator=random).tolist() for n in (9, 12, 7, 12, 10, 5, 8, 11)]
    return [build_example(row, [0, 0] + [1] * (len(row) - 2), [i % 3 == 0 for i in range(len(row))]) for row in rows]


def tah_model():
    from lab.methods.tah.config import TahConfig
    from lab.methods.tah.training import build_arm

    config = TahConfig.check(input_updater_kwargs={"topk": 5}, adapter_kwargs={"r": 4, "lora_alpha": 8, "lora_dropout": 0.0})
    torch.manual_seed(0)
    return build_arm("tah", load_backbone("toy:qwen3-tiny", vocab_size=40, initializer_range=0.2), config)


def tah(folder, **changes):
    from lab.methods.tah.training import train_model

    model = tah_model()
    train_model(model, tah_rows(), sft(**changes), folder)
    return model


def tah_decider(folder, cached=True, **changes):
    from lab.methods.tah.training import train_step2, with_mlp

    mlp = {
        "topk": 6,
        "hidden_states_layer_nums": [0, 2],
        "hidden_dims": [8, 8],
        "expansion_factor": 2,
        "dropout_rate": 0.1,
        "dtype": "float32",
    }
    model = with_mlp(tah_model(), pos_weight=5.4, **mlp)
    train_step2(model, tah_rows(), sft(**changes), folder, cached=cached)
    return model


def tah_decider_in_the_model(folder, **changes):
    return tah_decider(folder, cached=False, **changes)


def dtt_model():
    from lab.methods.dtt.config import BOT, EOT, GatedSettings
    from lab.methods.dtt.model import SparseGatedModel

    tokenizer = word_tokenizer([f"w{i}" for i in range(12)], special=(BOT, EOT))
    backbone = load_backbone("toy:gpt2-micro", vocab_size=len(tokenizer), initializer_range=0.3, max_positions=32)
    torch.manual_seed(0)
    return SparseGatedModel.start(backbone, tokenizer, GatedSettings(bias=0.0))


def dtt_warm_up(folder, gated=False, **changes):
    from functools import partial

    from lab.methods.dtt.data import collate, prepare
    from lab.methods.dtt.objective import gated_warm_up, targets, warm_up
    from lab.train import fit

    model = dtt_model()
    examples = [Example(str(i), f"w{i} w{i + 1}", (f"w{i + 2}", f"w{i + 3}"), f"w{i + 3}") for i in range(8)]
    rows = prepare(examples, model.tokenizer, model.config).rows
    loss = gated_warm_up() if gated else warm_up
    fit(model, rows, partial(collate, s=model.config), loss, sft(**changes), folder, count=targets)
    return model


def dtt_gated_warm_up(folder, **changes):
    return dtt_warm_up(folder, gated=True, **changes)


def dtt_rl(folder, **changes):
    from lab.methods.dtt.reinforce import GatedThinking, GateLearning
    from lab.methods.dtt.reward import RewardSettings, rewards_of
    from lab.methods.dtt.trainer import CustomGRPOTrainer
    from lab.rl import reinforce

    model = dtt_model()
    rewards = rewards_of(model.tokenizer, model.config, RewardSettings(gate_penalty_coeff=0.3))
    prompts, answers = [[1, 2, 3], [4, 5], [6, 7, 8, 9], [10, 11]], ["w1", "w2", "w3", "w4"]
    thinking = GatedThinking(model, GateLearning(weight=0.3))
    settings = rl(longest=8, **changes)
    reinforce(model, thinking, prompts, {"answer": answers}, rewards, settings, folder, trainer_class=CustomGRPOTrainer)
    return model


TRAINERS = {
    function.__name__: function
    for function in (
        *(coconut, codi, adaptive, adaptive_rl, colar, colar_rl, latenttts, lta, softcot),
        *(tah, tah_decider, tah_decider_in_the_model, dtt_warm_up, dtt_gated_warm_up, dtt_rl),
    )
}


def measured(name, folder, **changes):
    """Losses (rewards, where there are any) and gradient norms of every step, and a checksum of the weights."""
    folder = Path(folder)
    torch.manual_seed(0)
    model = TRAINERS[name](folder, **changes)
    if world_size() > 1 and getattr(model, "tokenizer", None) is not None:
        on_main(lambda: str(model.save(folder / "saved")))
    rows = on_main(lambda: [row for path in sorted(folder.rglob("metrics.jsonl")) for row in files.read_lines(path)])
    rows = [row for row in rows if "grad_norm" in row]
    return {
        "losses": [row.get("loss", 0.0) for row in rows],
        "rewards": [row.get("reward", 0.0) for row in rows],
        "gradients": [row["grad_norm"] for row in rows],
        "weights": [float(p.detach().double().square().sum()) for p in model.parameters()],
        "world": world_size(),
        "saved": str(folder / "saved"),
    }


def every(folder, shardings):
    """{(sharding, trainer): what it measured, or the error it ended with}, so that all share one start of the processes."""
    found = {}
    for sharding in shardings:
        for name in TRAINERS:
            found[sharding, name] = measured(name, Path(folder) / sharding / name, sharding=sharding)
    return found
