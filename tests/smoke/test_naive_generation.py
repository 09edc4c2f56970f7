"""Generation and losses against naive loops written down from the papers: transformers' own forward, no cache, one row at a time.

Shapes are unlike those of the official fixtures: odd widths, grouped heads, biases, untied heads, ragged prompts.
"""

import pytest
import torch
from test_lta_model import EXAMPLES
from test_lta_prompting import TOKENIZERS
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen2Config

from lab.latent.draws import Keyed, Stream
from lab.latent.sampling import Sampling
from lab.methods.codi.config import CodiSettings
from lab.methods.codi.model import CodiModel
from lab.methods.codi.policy import generate as codi_answers
from lab.methods.colar.config import ColarSettings
from lab.methods.colar.model import ColarModel
from lab.methods.colar.policy import generate as colar_answers
from lab.methods.lta.config import LtaSettings
from lab.methods.lta.objective import loss
from lab.methods.lta.policy import to_batch
from lab.methods.lta.prompting import build
from lab.methods.softcot.model import SoftcotModel

LLAMA = {"num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10, "initializer_range": 0.2}
QWEN = {"num_hidden_layers": 2, "num_attention_heads": 5, "num_key_value_heads": 1, "initializer_range": 0.2}
GPT2 = {"n_embd": 36, "n_head": 3, "n_layer": 2, "n_positions": 60, "initializer_range": 0.25, "bos_token_id": 0, "eos_token_id": 0}
SHAPES = {
    "gpt2": lambda v: GPT2Config(vocab_size=v, **GPT2),
    "llama": lambda v: LlamaConfig(vocab_size=v, hidden_size=42, intermediate_size=70, attention_bias=True, mlp_bias=True, **LLAMA),
    "qwen2": lambda v: Qwen2Config(vocab_size=v, hidden_size=30, intermediate_size=44, tie_word_embeddings=True, **QWEN),
}
ROWS = [torch.randint(10, 50, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (3, 11, 1, 7)]


def backbone(kind, vocabulary=64, seed=3):
    torch.manual_seed(seed)
    made = AutoModelForCausalLM.from_config(SHAPES[kind](vocabulary), attn_implementation="eager").eval()
    return stirred(made)


def stirred(module, scale=0.2):
    """The module with nothing left at zero or one."""
    with torch.no_grad():
        for p in module.parameters():
            p.add_(scale * torch.randn_like(p) if p.ndim == 1 else 0.0)
    return module


def norm(x, weight, bias):
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt() * weight + bias


def last_state(model, x):
    return model(inputs_embeds=x, output_hidden_states=True).hidden_states[-1][:, -1:]


def greedy(model, x, stop, longest, banned=()):
    """Tokens after embeddings `x` (1, t, D), everything read again for each."""
    said = []
    while len(said) < longest:
        logits = model(inputs_embeds=x).logits[0, -1]
        logits[list(banned)] = -torch.inf
        if (token := int(logits.argmax())) == stop:
            break
        said.append(token)
        x = torch.cat((x, model.get_input_embeddings()(torch.tensor([[token]]))), 1)
    return said


# ---- CODI (`distill.md` 2A.5) ----


def projection(m, h):
    w = dict(m.parts.prj.named_parameters())
    inner = F.linear(F.gelu(F.linear(h, w["1.weight"], w["1.bias"])), w["3.weight"], w["3.bias"])
    return norm(inner, w["ln.weight"], w["ln.bias"])


def codi_alone(m, ids):
    s, look, x = m.config, m.backbone.get_input_embeddings(), None
    x = look(torch.tensor([[*ids, s.bot_id]]))
    for _ in range(s.num_latent):
        x = torch.cat((x, projection(m, last_state(m.backbone, x))), 1)
    x = torch.cat((x, look(torch.tensor([[s.eot_id]]))), 1)
    return greedy(m.backbone, x, s.eos_id, 8, (s.pad_id, s.bot_id, s.eot_id))


def codi_padded(m, rows):
    """As released: pads hidden while the question is read and seen afterwards, positions that count them, only the last id banned."""
    s, look, wide = m.config, m.backbone.get_input_embeddings(), max(map(len, rows)) + 1
    ids = torch.tensor([[s.pad_id] * (wide - len(row) - 1) + [*row, s.bot_id] for row in rows])
    place = torch.arange(wide).expand_as(ids)
    out = m.backbone(input_ids=ids, attention_mask=(ids != s.pad_id).long(), position_ids=place, output_hidden_states=True, use_cache=True)
    kv, said = out.past_key_values, []
    for step in range(s.num_latent + 8):
        thinks = step < s.num_latent
        token = torch.full((len(rows),), s.eot_id) if step == s.num_latent else None if thinks else said[-1]
        x = projection(m, out.hidden_states[-1][:, -1:]) if thinks else look(token[:, None])
        place = torch.full((len(rows), 1), wide + step)
        out = m.backbone(inputs_embeds=x, past_key_values=kv, position_ids=place, output_hidden_states=True, use_cache=True)
        said += [] if thinks else [out.logits[:, -1, :-1].argmax(-1)]
    every = torch.stack(said, 1).tolist()
    return [row[: row.index(s.eos_id)] if s.eos_id in row else row for row in every]


@pytest.mark.parametrize("kind", list(SHAPES))
def test_codi_answers(kind):
    s = CodiSettings.check(lora_r=0, prj_dim=23, num_latent=3, pad_id=61, bot_id=62, eot_id=63, eos_id=5)
    m = CodiModel.build(backbone(kind), None, s.model_dump(mode="json")).eval()
    stirred(m.parts, 0.3)
    asked = [[*row, s.bot_id] for row in ROWS]
    with torch.no_grad():
        assert [row.ids for row in codi_answers(m, asked, max_new_tokens=8, batch=3).rows] == [codi_alone(m, row) for row in ROWS]
        m.settings = s.but(compat="codi").model_dump(mode="json")
        assert [row.ids for row in codi_answers(m, asked, max_new_tokens=8).rows] == codi_padded(m, ROWS)


# ---- CoLaR (`colar.md` 2.4) ----


def gaussian(m, h):
    w = dict(m.parts.head.named_parameters())
    inner = F.linear(F.gelu(F.linear(h, w["fc.0.weight"], w["fc.0.bias"])), w["fc.2.weight"], w["fc.2.bias"])
    inner = norm(inner, w["fc.3.weight"], w["fc.3.bias"])
    return F.linear(inner, w["mean.weight"], w["mean.bias"]), F.linear(inner, w["log_std.weight"], w["log_std.bias"]).exp()


def colar_alone(m, ids, draws, temperature, ending):
    s, look, made = m.config, m.backbone.get_input_embeddings(), 0
    x = look(torch.tensor([[*ids, s.sep_id]]))
    while made < 6:
        at, out = torch.tensor([made]), m.backbone(inputs_embeds=x, output_hidden_states=True)
        ends = float(draws.uniform(at, Stream.STOP)) < float(torch.softmax(out.logits[0, -1] / ending, -1)[s.sep_id])
        if made and ends:
            break
        mean, std = gaussian(m, out.hidden_states[-1][0, -1])
        z = mean + temperature * std * draws.normal(at, Stream.THOUGHT, (len(mean),))[0]
        x, made = torch.cat((x, (z * s.embeds_std)[None, None]), 1), made + 1
    return made, greedy(m.backbone, torch.cat((x, look(torch.tensor([[s.sep_id]]))), 1), s.eos_id, 6)


@pytest.mark.parametrize(("kind", "temperature"), [("llama", 0.0), ("llama", 1.0), ("qwen2", 0.7), ("gpt2", 1.0)])
def test_colar_thoughts_and_answers(kind, temperature):
    s = ColarSettings.check(lora_r=0, sep_id=9, pad_id=2, eos_id=5, embeds_std=0.13, lp_intermediate_size=17)
    m = ColarModel.build(backbone(kind), None, s.model_dump(mode="json")).eval()
    with torch.no_grad():
        m.parts.head.mean.weight.mul_(3)
        m.backbone.get_output_embeddings().weight[9].mul_(5)  # so that some rows end before the budget
        how = {"latent_temperature": temperature, "end_temperature": 1.3, "sampling": Sampling(), "seed": 4}
        found = colar_answers(m, ROWS, 2, thoughts=6, max_new_tokens=6, batch=3, **how).rows
        draws = [Keyed.of(4, torch.tensor([i // 2]), torch.tensor([i % 2])) for i in range(8)]
        assert [(row.thoughts, row.ids) for row in found] == [colar_alone(m, ROWS[i // 2], draws[i], temperature, 1.3) for i in range(8)]
    assert temperature == 0.0 or len({row.thoughts for row in found}) > 1


# ---- SoftCoT++ (`softcot.md` 3) ----


def sets_of(m, row, starts):
    """What the assistant makes of a prompt whose thoughts' places hold each initial vector, projected: [(n, D)]."""
    table, made = m.assistant.get_input_embeddings(), []
    for start in starts:
        x = table(torch.tensor([row.assistant])).detach().clone()
        x[0, list(row.slots)] = table.weight[start].detach()
        h = m.assistant(inputs_embeds=x, output_hidden_states=True).hidden_states[-1][0, list(row.slots)].detach()
        made.append(m.parts.generator.projection(h))
    return made


def embedded(m, row, thoughts):
    look = m.backbone.get_input_embeddings()
    return torch.cat((look(torch.tensor(row.row.prompt)), thoughts, look(torch.tensor(row.row.after))))[None]


@pytest.mark.parametrize(("large", "small"), [("llama", "qwen2"), ("qwen2", "llama")])
def test_softcot_with_several_sets(large, small):
    starts, n, tokenizer = [40, 77, 12], 4, TOKENIZERS["qwen3"]
    weights = {"kl_loss_weight": 0.0, "contrastive_loss_weight": 0.0, "sft_loss_weight": 1.0, "gold_steps": "off"}
    s = LtaSettings.check(generator="assistant", num_thought_tokens=n, num_scaling_times=3, nce=True, distinct_slots=False, **weights)
    m = SoftcotModel.start(backbone(large, 272, 1), tokenizer, s, assistant=backbone(small, 272, 2))
    m.use_assistant(m.assistant, start_ids=starts)
    how = {"tokenizer": tokenizer, "family": "qwen3", "task": "gsm8k", "distinct": False, "solution": False}
    rows = [build(example, n, split="train", **how) for example in EXAMPLES]
    torch.manual_seed(7)
    value, _ = loss(m.train(), to_batch(m, rows))
    (ours,) = torch.autograd.grad(value, [m.parts.generator.projection.weight])
    made, total, count = [sets_of(m, row, starts) for row in rows], 0.0, 0
    for row, sets in zip(rows, made, strict=True):
        ids, cut = list(row.row.labels), len(row.row.prompt)
        labels = torch.tensor([*ids[:cut], *[-100] * n, *ids[cut:]])[1:]
        count += int((labels != -100).sum())
        total += sum(F.cross_entropy(m.backbone(inputs_embeds=embedded(m, row, z)).logits[0, :-1], labels, reduction="sum") for z in sets)
    flat = torch.stack([torch.stack([z.flatten() for z in sets]) for sets in made])
    torch.manual_seed(7)
    dropped, contrast = F.dropout(flat, 0.5), 0.0
    for row in range(len(rows)):
        like = torch.stack([F.cosine_similarity(flat[row, k][None], dropped[row]) for k in range(3)])
        contrast += F.cross_entropy(20 * like, torch.arange(3)) / 3 / len(rows)
    (theirs,) = torch.autograd.grad(total / count + contrast, [m.parts.generator.projection.weight])
    torch.testing.assert_close(value, total / count + contrast, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(ours, theirs, atol=1e-5 * float(theirs.abs().max()), rtol=1e-3)
    found = m.eval().generate(EXAMPLES, samples=3, sampling=Sampling(), max_new_tokens=6, batch=2).rows
    with torch.no_grad():
        asked = [build(example, n, split="test", **how) for example in EXAMPLES]
        stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
        want = [greedy(m.backbone, embedded(m, row, z), stop, 6) for row in asked for z in sets_of(m, row, starts)]
    assert [row.ids for row in found] == want
