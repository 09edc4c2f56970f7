"""Gated models against the published code's numbers: gates, gated forward and gradients, a rollout, rewards, HRPO's gate and update."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2Config, Qwen2Config

import lab
from lab.latent.draws import Recorded, Stream
from lab.latent.loop import Budget, Prompt, rollout
from lab.methods.dtt.config import GatedSettings, LoraSettings
from lab.methods.dtt.gate import Lambda, gumbel_sigmoid, noise_of, open_probability, residual
from lab.methods.dtt.model import SparseGatedModel
from lab.methods.dtt.policy import GatedPolicy
from lab.methods.dtt.reward import RewardSettings, hrpo_reward, total
from lab.models.backbones import new_backbone
from lab.models.loading import load_exact

FOLDER = Path(__file__).parents[1] / "fixtures" / "dtt"
CASES, META = load_file(FOLDER / "dtt_cases.safetensors"), json.loads((FOLDER / "dtt_cases.json").read_text())
HRPO, HRPO_META = load_file(FOLDER / "hrpo_cases.safetensors"), json.loads((FOLDER / "hrpo_cases.json").read_text())


def config(kind, name):
    given = json.loads((FOLDER / name).read_text())
    return kind(**{key: value for key, value in given.items() if key in kind().to_dict() and key not in ("dtype", "torch_dtype")})


def close(found, wanted, atol, rtol=0.0):
    torch.testing.assert_close(found, wanted, atol=atol, rtol=rtol)


@pytest.fixture
def dtt(tmp_path):
    """The published checkpoint, through the door."""
    shutil.copy(FOLDER / "dtt_state_dict.safetensors", tmp_path / "model.safetensors")
    return lab.load(tmp_path, config=config(GPT2Config, "dtt_config.json"), eos_id=93, hard=False)


def live_lora():
    """The same model with its adapters not folded in."""
    state, base = load_file(FOLDER / "dtt_state_dict.safetensors"), new_backbone(config(GPT2Config, "dtt_config.json"))
    settings = GatedSettings(noise="gumbel", bot_id=94, eot_id=95, eos_id=93)
    model = SparseGatedModel.build(base, None, settings.model_dump())
    model.add_lora(LoraSettings(rank=4, token_rows=False))
    body = {key.removeprefix("model."): value for key, value in state.items() if key.startswith("model.")}
    load_exact(model.backbone, body, what="fixture")
    load_exact(model.gate, {key: value for key, value in state.items() if not key.startswith("model.")}, what="fixture")
    return model.eval()


@pytest.mark.parametrize("tau", [1.0, 0.5, 0.1])
@pytest.mark.parametrize("hard", [0, 1])
def test_gumbel_sigmoid_and_its_gradient(tau, hard):
    logits, u = CASES["gs.logits"].clone().requires_grad_(), CASES["gs.u"]
    y = gumbel_sigmoid(logits, noise_of(u, "gumbel"), tau, bool(hard))
    y.sum().backward()
    usual = u > 0
    for found, name in ((y.detach(), "y"), (logits.grad, "dlogits")):
        wanted = CASES[f"gs.tau{tau}.hard{hard}.{name}"]
        close(found[usual], wanted[usual], 1e-6)
        close(found, wanted, 1e-5)


def test_open_probabilities_of_both_noises():
    logit, u = (
        torch.tensor(META["p_open"]["logit"], dtype=torch.float32),
        torch.rand(100_000, 1, generator=torch.Generator().manual_seed(0)),
    )
    for kind, name in (("gumbel", "1-exp(-exp(l))"), ("logistic", "sigmoid(l)")):
        close(open_probability(logit, kind), torch.tensor(META["p_open"][name]), 1e-4)
        rate = gumbel_sigmoid(logit, noise_of(u, kind), 0.5, True).mean(0)
        close(rate, torch.tensor(META["p_open"][name]), 0.01)


@pytest.mark.parametrize("hard", [0, 1])
def test_one_gated_pass_and_its_gradients(hard):
    model, ids = live_lora(), CASES["tf.input_ids"]
    model.gate.hard = bool(hard)
    ones = torch.ones_like(ids)
    h = model(ids, ones, prev_hidden=CASES["tf.prev_hidden"], gate_noise=CASES["tf.u"][..., 0], gate_mask=ones.bool())
    logits = model.decoder.logits(h)
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    loss.backward()
    close(h, CASES[f"tf.hard{hard}.last_hidden"], 1e-4)
    close(logits, CASES[f"tf.hard{hard}.logits"], 1e-4)
    close(model.gate.seen.gate, CASES[f"tf.hard{hard}.gates"][..., 0], 1e-6)
    found = {"d_gate_w": model.gate.gate_linear.weight, "d_gate_b": model.gate.gate_linear.bias, "d_proj": model.gate.projection.weight}
    found["d_loraA0"] = next(p for name, p in model.named_parameters() if "h.0.attn.c_attn.lora_A" in name)
    for name, parameter in found.items():
        close(parameter.grad, CASES[f"tf.hard{hard}.{name}"], 1e-4, 1e-3)


def test_a_rollout_with_recorded_noise(dtt):
    draws = Recorded({Stream.GATE: CASES["roll_soft.u_steps"]})
    prompt = Prompt.of_ids(dtt.decoder, CASES["roll_soft.input_ids"].tolist())
    done = rollout(dtt.decoder, GatedPolicy(dtt), prompt, 1, draws, budget=Budget(answer=10), keep=("gate",))
    assert torch.equal(done.tokens, CASES["roll_soft.generated"][:, 6:])
    close(done.notes["gate"], CASES["roll_soft.gates"], 1e-4)


def test_rewards():
    case = META["reward"]
    how = RewardSettings(lambda_penalty=case["lambda_penalty"], gate_penalty_coeff=case["gate_penalty_coeff"])

    def decode(ids):
        return "".join(chr(i + 32) for i in ids if i not in (93, 94, 95))

    for place, (ids, gates, wanted) in enumerate(zip(case["sequences"], case["gates"], case["rewards"], strict=True)):
        gold = case["ground_truths"][place // case["num_generations"]]
        found = total(ids[case["prompt_len"] :], gates, gold, decode, case["bot"], case["eot"], how)
        assert found == pytest.approx(wanted, abs=1e-6)


# ---- HRPO ----


def hrpo():
    state, base = load_file(FOLDER / "hrpo_state_dict.safetensors"), new_backbone(config(Qwen2Config, "hrpo_config.json"))
    model = SparseGatedModel.build(base, None, GatedSettings(gate="hrpo", r_min=0.95).model_dump())
    own = {key.removeprefix("model."): value for key, value in state.items() if "thinking_residual" in key}
    load_exact(model.gate, own, what="fixture")
    body = {key: value for key, value in state.items() if "thinking_residual" not in key}
    load_exact(base, body | {"lm_head.weight": body["model.embed_tokens.weight"]}, what="fixture")
    return model


def test_hrpo_gate_and_its_gradients():
    gate, e, s = hrpo().gate, HRPO["gate.embeds"].clone().requires_grad_(), HRPO["gate.residual"].clone().requires_grad_()
    out, a = gate.shares(e, s)
    out.backward(HRPO["gate.upstream"])
    close(out, HRPO["gate.out"], 1e-5)
    close(a, HRPO["gate.a"], 1e-5)
    found = {
        "d_embeds": e.grad,
        "d_residual": s.grad,
        "d_gate_r_w": gate.thinking_residual_gate_r.weight.grad,
        "d_gate_i_w": gate.thinking_residual_gate_i.weight.grad,
        "d_Lambda": gate.thinking_residual_Lambda.Lambda.grad,
    }
    for name, gradient in found.items():
        close(gradient, HRPO[f"gate.{name}"], 1e-5, 1e-3)


def test_hrpo_lambda_and_residual():
    made = Lambda(500, 0.95, 0.999)
    at_one = made(torch.ones(500))
    assert at_one.min() > 0.9499 and at_one.max() < 0.9991 and at_one.std() > 0.01
    made.Lambda.data = HRPO["lambda.Lambda"]
    close(made(torch.ones(32)), HRPO["lambda.a_at_r1"], 1e-5)
    table = load_file(FOLDER / "hrpo_state_dict.safetensors")["model.embed_tokens.weight"]
    for name, temperature in (("t05", 0.5), ("t1", 1.0)):
        close(residual(HRPO[f"soft.{name}.logits"], table, temperature, 96), HRPO[f"soft.{name}.state"], 1e-5)


def test_hrpo_update():
    from lab.methods.dtt.objective import hrpo_loss

    model, ids, wide = hrpo(), HRPO["upd.input_ids"], HRPO_META["upd"]["prompt_len"]
    ones = torch.ones_like(ids)
    gated = {"prev_hidden": HRPO["upd.thinking_embeds"], "gate_mask": HRPO["upd.thinking_mask"]}
    new = model.decoder.logits(model(ids, ones, **gated))[:, wide - 1 : -1]
    with torch.no_grad():
        ref = model.decoder.logits(model(ids, ones))[:, wide - 1 : -1]
    close(new, HRPO["upd.new_logits"], 1e-4)
    close(ref, HRPO["upd.ref_logits"], 1e-4)
    logps = [torch.log_softmax(x, -1).gather(-1, ids[:, wide:, None])[..., 0] for x in (new, ref)]
    loss, kl = hrpo_loss(*logps, HRPO["upd.advantages"], HRPO["upd.completion_mask"], HRPO_META["upd"]["beta"])
    loss.backward()
    close(loss.detach()[None], HRPO["upd.loss"], 1e-6)
    close(kl.detach()[None], HRPO["upd.mean_kl"], 1e-6)
    found = {
        "d_gate_r_w": model.gate.thinking_residual_gate_r.weight,
        "d_gate_i_b": model.gate.thinking_residual_gate_i.bias,
        "d_Lambda": model.gate.thinking_residual_Lambda.Lambda,
        "d_q0": model.stem.layers[0].self_attn.q_proj.weight,
    }
    for name, parameter in found.items():
        close(parameter.grad, HRPO[f"upd.{name}"], 1e-5, 1e-3)


def test_hrpo_reward_is_the_official_one():
    case = HRPO_META["reward_gsm8k"]
    assert set(case["rewards"]) == {0.0, 1.0}
    assert hrpo_reward("so 5\n#### 5", "5") == 1.0
    assert hrpo_reward("#### 5 #### 5", "5") == 0.0
    assert hrpo_reward("5", "5") == 0.0


# ---- files ----


def test_the_early_layout_loads_as_the_wrapped_one_does(dtt, tmp_path):
    folder = tmp_path / "early"
    folder.mkdir()
    body = {f"model.{key}": value for key, value in dtt.backbone.state_dict().items()}
    torch.save({**body, **dtt.gate.state_dict()}, folder / "pytorch_model.bin")
    early = lab.load(folder, config=config(GPT2Config, "dtt_config.json"), eos_id=93)
    ids = CASES["tf.input_ids"]
    with torch.no_grad():
        close(early(ids, torch.ones_like(ids)), dtt(ids, torch.ones_like(ids)), 1e-6)
    assert (early.config.bot_id, early.config.eot_id, early.config.noise, early.config.hard) == (94, 95, "gumbel", True)


def test_our_own_folder_round_trips(dtt, tmp_path):
    again = lab.load(dtt.save(tmp_path / "own"))
    assert again.config == dtt.config
    for name, value in dtt.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
