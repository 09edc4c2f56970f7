"""Whole updates against naive ones written down from the papers: LTA's recipe over five AdamW steps, GRPO of adaptive thoughts over two."""

import copy

import pytest
import torch
from adaptive_fixture import lora_model
from test_lta_model import EXAMPLES, base, model
from test_lta_prompting import TOKENIZERS
from test_rl import LABELS, prompts_of
from torch import nn
from torch.nn import functional as F

from lab.methods.adaptive.model import read_ids, scores
from lab.methods.adaptive.reinforce import AdaptiveThinking
from lab.methods.lta.objective import counter, loss
from lab.methods.lta.policy import to_batch
from lab.methods.lta.prompting import build
from lab.rl import RLSettings, reinforce
from lab.train import TrainSettings, fit


def projected(own, states):
    return F.linear(states, own["projection.weight"], own["projection.bias"])


def block_of(own, x, heads):
    """The published block as torch spells it: attention of one head, two post-norms, ReLU."""
    weights = {k.removeprefix("block.self_attn."): v for k, v in own.items() if "self_attn" in k}
    attended = torch.func.functional_call(heads, weights, (x, x, x))[0]
    h = F.rms_norm(x + attended, x.shape[-1:], own["block.norm1.weight"], 1e-6)
    inner = F.linear(F.relu(F.linear(h, own["block.linear1.weight"], own["block.linear1.bias"])), own["block.linear2.weight"])
    return projected(own, F.rms_norm(h + inner + own["block.linear2.bias"], x.shape[-1:], own["block.norm2.weight"], 1e-6))


def lta_loss(own, rows, large, small):
    """0.33 · (SFT + focus + alignment), row by row (`lta.md` 2.7 to 2.9)."""
    table, heads = large.get_input_embeddings(), nn.MultiheadAttention(32, 1, batch_first=True)
    sft, count, extra = 0.0, 0, 0.0
    for row in rows:
        ids = torch.tensor([row.assistant])
        z = block_of(own, table(ids), heads) if small is None else projected(own, small(ids, output_hidden_states=True).hidden_states[-1])
        z, slots = z[0], list(row.slots)
        x = torch.cat((table(torch.tensor(row.row.prompt)), z[slots], table(torch.tensor(row.row.after))))
        labels = torch.tensor([*row.row.labels[: len(row.row.prompt)], *[-100] * len(slots), *row.row.labels[len(row.row.prompt) :]])
        sft += F.cross_entropy(large(inputs_embeds=x[None]).logits[0, :-1], labels[1:], ignore_index=-100, reduction="sum")
        count += int((labels[1:] != -100).sum())
        anchor, steps = z[row.question], z[list(row.step_ends)]
        best = F.cosine_similarity(steps, table(torch.tensor(row.answer)).mean(0, keepdim=True)).argmax()
        extra += F.cross_entropy(F.cosine_similarity(steps, anchor[None])[None] / 0.1, best[None]) / len(rows)
        p, q = anchor.softmax(-1), z[slots].softmax(-1)
        extra += (p * (p / q).log()).sum(-1).mean() / len(rows)
    return 0.33 * (sft / count + extra)


@pytest.mark.parametrize("kind", ["block", "assistant"])
def test_lta_follows_its_recipe_step_by_step(kind, tmp_path):
    m, told = model(kind, gold_steps="visible", focus_positions="turn_end"), []
    own = {name: p.detach().clone().requires_grad_() for name, p in m.parts.generator.named_parameters()}
    rows = [build(e, 3, tokenizer=TOKENIZERS["qwen3"], family="qwen3", task="gsm8k", split="train") for e in EXAMPLES]
    how = TrainSettings(steps=5, global_batch=2, lr=1e-3, warmup_ratio=0.2, save_every=0, log_every=1, device="cpu", order="as_given")
    fit(m, rows, lambda some: to_batch(m, some), loss, how, tmp_path, lambda **row: told.append(row), count=counter(m))
    optimiser = torch.optim.AdamW(own.values(), lr=1e-3, weight_decay=0.0)
    for step, rate in enumerate((0.0, 1.0, 0.75, 0.5, 0.25)):
        optimiser.param_groups[0]["lr"] = 1e-3 * rate
        optimiser.zero_grad()
        value = lta_loss(own, rows, base(), base(5, 24) if kind == "assistant" else None)
        value.backward()
        norm = nn.utils.clip_grad_norm_(own.values(), 1.0)
        optimiser.step()
        assert told[step]["loss"] == pytest.approx(float(value.detach()), rel=1e-5)
        assert told[step]["grad_norm"] == pytest.approx(float(norm), rel=1e-4)
    for name, p in m.parts.generator.named_parameters():
        keys = slice(32, 64) if name.endswith("in_proj_bias") else slice(0, 0)  # keys' biases have no gradient but rounding
        ours, theirs = (x.detach().index_fill(0, torch.arange(len(x))[keys], 0.0) for x in (p, own[name]))
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def log_probs(m, prompt, ids):
    """Of each id of a completion, from one uncached reading of the whole row; what is never said is left out."""
    s, row = m.config, torch.tensor([[*prompt, *ids]])
    logits = scores(m.thinker, row, read_ids(m.thinker, row).last)[0]
    words = logits.index_fill(-1, torch.tensor([*s.unused, s.start]), -torch.inf)
    decides = (row[0] == s.start) | (row[0] == s.go_on)
    logs = torch.where(decides[:, None], logits, words).log_softmax(-1)[len(prompt) - 1 : -1]
    return logs.gather(1, torch.tensor(ids)[:, None])[:, 0]


def test_grpo_updates_are_those_of_the_formula(tmp_path):
    """−min(ρA, clip(ρ)A) + β(e^δ − δ − 1), A = (r − mean)/(std + 1e-4), summed over the batch's tokens (`distill.md` 2B.7)."""
    m = lora_model()
    naive, reference, told, acted, paid = copy.deepcopy(m), copy.deepcopy(m), [], [], []
    thinking = AdaptiveThinking(m, most=4)
    act = thinking.act
    thinking.act = lambda prompts, *a, **o: acted.append((prompts, act(prompts, *a, **o))) or acted[-1][1]
    thinking.hold_reference()

    def reward(completion_ids, **_):
        paid.append([sum(row) % 11 / 5 for row in completion_ids])
        return paid[-1]

    how = RLSettings(
        steps=2, prompts=2, samples=4, longest=10, lr=1e-3, schedule="constant", beta=0.1, save_every=0, log_every=1, device="cpu"
    )
    reinforce(m, thinking, prompts_of(m), {"label": LABELS}, {reward: 1.0}, how, tmp_path, lambda **row: told.append(row))
    learning = [p for p in naive.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(learning, lr=1e-3, weight_decay=0.0)
    for row, (prompts, acts), rewards in zip(told, acted, paid, strict=True):
        r = torch.tensor(rewards).view(-1, 4)
        advantage = ((r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True) + 1e-4)).flatten()
        total, tokens = 0.0, 0
        for i, (ids, own) in enumerate(zip(acts.ids, acts.own, strict=True)):
            new = log_probs(naive, prompts[i // 4], ids)
            with torch.no_grad():
                delta = log_probs(reference, prompts[i // 4], ids)
            delta, ratio = delta - new, (new - new.detach()).exp()
            each = -torch.minimum(ratio * advantage[i], ratio.clamp(0.8, 1.2) * advantage[i]) + 0.1 * (delta.exp() - delta - 1)
            total, tokens = total + (each * torch.tensor(own)).sum(), tokens + sum(own)
        optimiser.zero_grad()
        (total / tokens).backward()
        norm = nn.utils.clip_grad_norm_(learning, 1.0)
        optimiser.step()
        assert row["loss"] == pytest.approx(float(total.detach() / tokens), abs=1e-6)
        assert row["grad_norm"] == pytest.approx(float(norm), rel=1e-5)
