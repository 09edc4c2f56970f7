"""Stochastic thoughts, LatentRM, beams and labels against the numbers of the official code (and its brute-force beam oracle)."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

from lab.errors import CheckpointError, SettingsError
from lab.latent.draws import Keyed, Recorded, Stream
from lab.latent.loop import Budget, Prompt, rollout
from lab.latent.policy import Counted
from lab.latent.sampling import Sampling
from lab.methods.codi.model import Projection
from lab.methods.codi.policy import Projected
from lab.methods.latenttts.config import RewardSettings
from lab.methods.latenttts.model import RewardModel, RewardParts
from lab.models.decoder import decoder_for
from lab.models.hf_decoder import HFDecoder
from lab.models.layouts import load
from lab.sampling.annotate import annotate
from lab.sampling.beam import Beam, beam_search
from lab.sampling.records import Asked
from lab.sampling.reward import LatentRM, step_loss
from lab.sampling.stochastic import Dropout, DropoutRegime, Noise, Noisy, dropout

FOLDER = Path(__file__).parents[1] / "fixtures" / "latenttts"
EOS, START, END, LATENT = 60, 61, 62, 63


def gpt2(name):
    config = {k: v for k, v in json.loads((FOLDER / f"{name}_config.json").read_text()).items() if k != "transformers_version"}
    model = GPT2LMHeadModel(GPT2Config(**config)).eval()
    state = load_file(FOLDER / f"{name}_state.safetensors")
    state = {key: value for key, value in state.items() if not key.startswith(("classifier", "projector"))}
    result = model.load_state_dict(state | {"lm_head.weight": state["transformer.wte.weight"]})
    assert not result.missing_keys and not result.unexpected_keys
    return model


@pytest.fixture(scope="module")
def generator():
    return decoder_for(gpt2("coconut"))


@pytest.fixture(scope="module")
def reward():
    model = LatentRM(gpt2("rm")).eval()
    state = load_file(FOLDER / "rm_state.safetensors")
    model.classifier.load_state_dict({key.split(".")[1]: value for key, value in state.items() if key.startswith("classifier")})
    return model


def prompts(data, ids="input_ids", mask="attention_mask"):
    return [row[keep.bool()].tolist() for row, keep in zip(data[ids], data[mask], strict=True)]


def policy(decoder):
    return Counted(decoder, (EOS,), count=6, closing=(END,))


def same_thoughts(made, wanted):
    """Equal but for rounding, of which every thought makes twice what it was given."""
    assert made.shape == wanted.shape
    for step in range(made.shape[-2]):
        torch.testing.assert_close(made[..., step, :], wanted[..., step, :], atol=5e-5 * 2**step, rtol=0)


def check_rows(result, sequences, thoughts, columns):
    same_thoughts(result.thoughts, thoughts)
    for mine, row in zip(result.answers(), sequences[:, columns + 7 :].tolist(), strict=True):
        assert mine == row[: row.index(EOS)] if EOS in row else mine == row


def test_deterministic_generation(generator):
    data = load_file(FOLDER / "coconut_generation.safetensors")
    result = rollout(generator, policy(generator), Prompt.of_ids(generator, prompts(data)), budget=Budget(thoughts=6, answer=13))
    check_rows(result, data["det.sequences"], data["det.latent_thoughts"], 10)


@pytest.mark.parametrize("share", [True, False])
def test_noise_with_the_recorded_draws(generator, share):
    data = load_file(FOLDER / "coconut_generation.safetensors")
    draws = Recorded({Stream.THOUGHT: data["noise.std_normal_draws"].transpose(0, 1)})
    noisy = Noisy(policy(generator), Noise(sigma=0.5))
    result = rollout(generator, noisy, Prompt.of_ids(generator, prompts(data)), 4, draws, budget=Budget(thoughts=6, answer=13), share=share)
    check_rows(result, data["noise.sequences"], data["noise.latent_thoughts"], 10)


class Replay:
    """The official dropout masks of forward 0 (the prompt) and 1–5 (thoughts)."""

    shares_prompt = False

    def __init__(self, data):
        self.data = data

    def masks(self, forward):
        def apply(x, site, layer):
            name = {"attention": f"h.{layer}.attn.resid_dropout", "mlp": f"h.{layer}.mlp.dropout"}.get(site)
            return x if name is None else x * self.data[f"dropout.mask|{forward}|transformer.{name}"] / 0.7

        return apply

    def prefill(self, draws):
        return self.masks(0)

    def at(self, rows):
        forward = int(rows.thoughts[0])
        live = DropoutRegime(Dropout(p=0.3), count=6).at(rows)
        return None if live is None else self.masks(forward)


def test_dropout_with_the_recorded_masks(generator):
    data = load_file(FOLDER / "coconut_generation.safetensors")
    result = rollout(
        generator, policy(generator), Prompt.of_ids(generator, prompts(data)), 4, dropout=Replay(data), budget=Budget(thoughts=6, answer=13)
    )
    check_rows(result, data["dropout.sequences"], data["dropout.latent_thoughts"], 10)


@pytest.mark.parametrize("regime", ["thoughts", "vote", "annotation", "annotation-rollouts"])
def test_keyed_dropout_does_not_depend_on_the_batch(generator, regime):
    data = load_file(FOLDER / "coconut_generation.safetensors")
    ids, settings = prompts(data), dropout(regime, 0.3, generator)
    row, budget = torch.arange(12), Budget(thoughts=6, answer=6)
    whole = rollout(
        generator,
        policy(generator),
        Prompt.of_ids(generator, ids),
        4,
        Keyed.of(3, row // 4, row % 4),
        budget=budget,
        dropout=DropoutRegime(settings, 6),
    )
    alone_draws = Keyed.of(3, torch.tensor([1, 1]), torch.tensor([0, 1]))
    alone = rollout(
        generator, policy(generator), Prompt.of_ids(generator, ids[1:2]), 2, alone_draws, budget=budget, dropout=DropoutRegime(settings, 6)
    )
    same_thoughts(alone.thoughts, whole.thoughts[4:6])
    assert alone.answers() == whole.answers()[4:6]
    assert (whole.thoughts[4] - whole.thoughts[5]).abs().max() > 1e-3


def reward_inputs():
    data = load_file(FOLDER / "rm_io.safetensors")
    ids = [row[: row.index(START) + 1] for row in data["right_input_ids"].tolist()]
    return data, ids[::4]


def test_reward_scores_are_those_of_right_padded_rows(reward):
    data, ids = reward_inputs()
    prompt = Prompt.of_ids(decoder_for(reward.model), ids)
    logits = reward.rate(prompt, data["latent_embeds"])
    want = data["logits_right"][..., 0][data["right_input_ids"] == LATENT].view(8, 6)
    torch.testing.assert_close(logits, want, atol=5e-5, rtol=0)
    torch.testing.assert_close(logits.sum(-1), data["scores_right"], atol=2e-4, rtol=0)
    torch.testing.assert_close(reward(prompt, data["latent_embeds"]), logits, atol=5e-5, rtol=0)


def test_reward_scores_of_left_padded_rows_are_the_released_ones(reward):
    data, ids = reward_inputs()
    ends = [[token for token in row[row.index(LATENT) + 6 :] if token != EOS] for row in data["right_input_ids"].tolist()]
    found = reward.rate_padded(Prompt.of_ids(decoder_for(reward.model), ids), data["latent_embeds"], torch.tensor(list(map(len, ends))))
    want = data["logits_left_no_position_ids"][..., 0][data["left_input_ids"] == LATENT].view(8, 6)
    torch.testing.assert_close(found, want, atol=5e-5, rtol=0)

    model = RewardModel(reward.model, None, RewardSettings(), RewardParts(reward.model.config, RewardSettings()))
    model.parts.classifier.load_state_dict(reward.classifier.state_dict())
    groups = [slice(0, 4), slice(4, 8)]
    asked = [
        Asked(i, ids[i], data["latent_embeds"][rows], torch.full((4,), 6), torch.zeros(4), ids=[end[1:] for end in ends[rows]])
        for i, rows in enumerate(groups)
    ]
    official, ours = model.score(asked, official_padding=True), model.score(asked)
    torch.testing.assert_close(torch.cat(official).sum(-1), data["scores_left_no_position_ids"], atol=2e-4, rtol=0)
    torch.testing.assert_close(torch.cat(ours).sum(-1), data["scores_right"], atol=2e-4, rtol=0)
    fewer = replace(asked[1], thoughts=asked[1].thoughts[:2], counts=asked[1].counts[:2], ids=asked[1].ids[:2])
    with pytest.raises(SettingsError, match="equally many samples"):
        model.score([asked[0], fewer], official_padding=True)


def test_reward_losses_and_gradient_norms(reward):
    data, ids = reward_inputs()
    logits = reward(Prompt.of_ids(decoder_for(reward.model), ids), data["latent_embeds"]).view(2, 4, 6)
    loss = step_loss(logits, data["estimations"], official_length=data["right_input_ids"].shape[1])
    torch.testing.assert_close(loss, data["ce_loss"][0], atol=0, rtol=1e-5)
    torch.testing.assert_close(step_loss(logits, data["estimations"], "bce"), data["bce_loss"][0], atol=0, rtol=1e-5)
    reward.zero_grad()
    loss.backward()
    norms = json.loads((FOLDER / "rm_meta.json").read_text())["rm_grad_norms_ce"]
    own = {f"transformer.{name}": p for name, p in reward.model.transformer.named_parameters()} | {
        f"classifier.{name}": p for name, p in reward.classifier.named_parameters()
    }
    for name, want in norms.items():
        assert float(own[name].grad.norm()) == pytest.approx(want, rel=1e-3, abs=1e-6), name


def test_a_reward_model_of_another_width_is_refused(reward):
    data, ids = reward_inputs()
    with pytest.raises(CheckpointError, match="another backbone"):
        reward.rate(Prompt.of_ids(decoder_for(reward.model), ids), torch.zeros(8, 6, 16))


def test_beam_search_against_the_oracle(generator, reward):
    data, meta = load_file(FOLDER / "beam_oracle.safetensors"), json.loads((FOLDER / "beam_oracle.json").read_text())
    ids = prompts(load_file(FOLDER / "coconut_generation.safetensors"))
    draws = Recorded({Stream.THOUGHT: data["eps"].permute(1, 2, 3, 0, 4).reshape(18, 6, 32)})
    settings, noisy = Beam(beams=3, candidates=2, thoughts=6), Noisy(policy(generator), Noise(sigma=0.5))
    result = beam_search(generator, noisy, reward, Prompt.of_ids(generator, ids), draws, settings, Budget(thoughts=6, answer=20))
    torch.testing.assert_close(result.candidate_scores, data["candidate_cumulative_scores"], atol=2e-4, rtol=0)
    torch.testing.assert_close(result.kept, data["selected_beam_and_candidate"])
    torch.testing.assert_close(result.thoughts[:, 0], data["best_latent_thoughts"], atol=1e-4, rtol=0)
    for mine, prompt_ids, row in zip(result.rollout.answers(), ids, meta["sequences_unpadded"], strict=True):
        answer = row[len(prompt_ids) + 7 :]
        assert mine == [token for token in answer if token != EOS]


def test_one_beam_with_one_candidate_is_one_sample(generator, reward):
    ids = prompts(load_file(FOLDER / "coconut_generation.safetensors"))
    draws, noisy, budget = (
        Keyed.of(0, torch.arange(3), torch.zeros(3, dtype=torch.long)),
        Noisy(policy(generator), Noise(sigma=0.5)),
        Budget(answer=8),
    )
    beam = beam_search(generator, noisy, reward, Prompt.of_ids(generator, ids), draws, Beam(beams=1, candidates=1, thoughts=6), budget)
    single = rollout(generator, noisy, Prompt.of_ids(generator, ids), 1, draws, budget=budget)
    torch.testing.assert_close(beam.thoughts[:, 0], single.thoughts, atol=1e-5, rtol=1e-5)
    assert beam.rollout.answers() == single.answers()


@pytest.mark.parametrize("regime", ["thoughts", "vote"])
def test_beams_under_dropout_do_not_depend_on_the_other_questions(generator, reward, regime):
    ids = prompts(load_file(FOLDER / "coconut_generation.safetensors"))
    settings, masks = Beam(beams=2, candidates=3, thoughts=6), DropoutRegime(dropout(regime, 0.3), 6)

    def run(questions):
        number = torch.tensor(questions).repeat_interleave(6)
        draws = Keyed.of(1, number, torch.arange(6).repeat(len(questions)))
        prompt = Prompt.of_ids(generator, [ids[question] for question in questions])
        return beam_search(generator, policy(generator), reward, prompt, draws, settings, Budget(answer=6), dropout=masks)

    whole, alone = run([0, 1, 2]), run([1])
    torch.testing.assert_close(alone.thoughts[0], whole.thoughts[1], atol=1e-4, rtol=0)
    assert (whole.scores[:, :-1] >= whole.scores[:, 1:]).all()


def test_labels_are_shares_of_right_rollouts(generator):
    data, meta = load_file(FOLDER / "annotation.safetensors"), json.loads((FOLDER / "annotation.json").read_text())
    ids = prompts(data, "question_input_ids", "question_attention_mask")
    prompt, thoughts = Prompt.of_ids(generator, ids), data["thoughts_with_prompt"][:, -6:]

    def right(question, answer):
        return bool(answer) and answer[-1] == meta["answers"][question]

    options = {"rollouts": 2, "seed": 0, "budget": Budget(thoughts=6, answer=16)}
    torch.testing.assert_close(annotate(generator, policy(generator), prompt, thoughts, right, **options), data["estimations"])
    silent = DropoutRegime(dropout("thoughts", 1e-9), 6)
    torch.testing.assert_close(
        annotate(generator, policy(generator), prompt, thoughts, right, dropout=silent, **options), data["estimations"]
    )


def test_impossible_samplers_are_refused(generator):
    for bad in (lambda: Noise.check(sigma=0.0), lambda: Noise.check(sigma=-1.0), lambda: Dropout.check(p=1.0)):
        with pytest.raises(SettingsError):
            bad()
    with pytest.raises(SettingsError, match="annotation"):
        dropout("annotaton", 0.1, generator)


def oracle(model, prompt, think, most, ends=None, least=0):
    """One row by whole uncached forwards: (thoughts, answer); `ends` closes `least` and more thoughts where it is the likeliest token."""
    x, thoughts, said = model.get_input_embeddings()(torch.tensor([prompt])), [], []
    table = model.get_input_embeddings().weight
    for step in range(most + 1):
        out = model(inputs_embeds=x, output_hidden_states=True)
        if step == most or (step >= least and int(out.logits[0, -1].argmax()) == ends):
            break
        thoughts.append(think(out.hidden_states[-1][0, -1], step))
        x = torch.cat((x, thoughts[-1][None, None]), 1)
    x = torch.cat((x, table[END if ends is None else ends][None, None]), 1)
    while len(said) < 12 and (not said or said[-1] != EOS):
        said.append(int(model(inputs_embeds=x).logits[0, -1].argmax()))
        x = torch.cat((x, table[said[-1]][None, None]), 1)
    return thoughts, [token for token in said if token != EOS]


@pytest.mark.parametrize("sigma", [0.0, 0.5])
@torch.no_grad()
def test_codi_generation_is_that_of_whole_forwards_with_its_projection(sigma):
    model, state = gpt2("codi"), load_file(FOLDER / "codi_state.safetensors")
    projection = Projection(32, state["projector.1.weight"].shape[0]).eval()
    names = {"projector.4": "ln", "projector.1": "1", "projector.3": "3"}
    own = {f"{names[key.rpartition('.')[0]]}.{key.rpartition('.')[2]}": value for key, value in state.items() if "projector" in key}
    projection.load_state_dict(own)
    asked = prompts(load_file(FOLDER / "coconut_generation.safetensors"))
    eps = torch.randn(len(asked), 6, 32, generator=torch.Generator().manual_seed(0))
    thinking = Projected(decoder_for(model), (EOS,), count=6, closing=(END,), feedback=lambda h, step: projection(h))
    thinking = Noisy(thinking, Noise(sigma=sigma)) if sigma else thinking
    draws = Recorded({Stream.THOUGHT: eps}) if sigma else None
    done = rollout(thinking.decoder, thinking, Prompt.of_ids(thinking.decoder, asked), 1, draws, budget=Budget(thoughts=6, answer=12))
    for row, prompt in enumerate(asked):
        thoughts, said = oracle(model, prompt, lambda h, step, row=row: projection(h) + sigma * eps[row, step], 6)
        same_thoughts(done.thoughts[row], torch.stack(thoughts))
        assert done.answers()[row] == said


@pytest.fixture
def released_colar(tmp_path):
    shutil.copy(FOLDER / "colar_config.json", tmp_path / "config.json")
    shutil.copy(FOLDER / "colar_state.safetensors", tmp_path / "model.safetensors")
    return load(tmp_path, sep_id=40, eos_id=EOS)


@pytest.mark.parametrize("most", [10, 3, 1])
@torch.no_grad()
def test_colar_may_think_on_at_its_budget_as_released(released_colar, most):
    model, random = released_colar.double(), torch.Generator().manual_seed(3)  # thoughts of this model are chaotic: words need float64
    asked = [torch.randint(0, 40, (length,), generator=random).tolist() for length in (3, 7, 4, 8, 5, 6, 3, 4)]
    how = {"latent_temperature": 0.0, "end_temperature": 0.0, "sampling": Sampling(), "thoughts": most, "max_new_tokens": 30}
    found = model.generate(asked, min_thoughts=0, force_end=False, **how)
    table, head, seen = model.backbone.get_input_embeddings().weight, model.parts.head, set()
    for row, prompt in zip(found.rows, asked, strict=True):
        x, line = table[torch.tensor([[*prompt, 40]])], []
        while len(line) < 30 and EOS not in line:
            out = model.backbone(inputs_embeds=x, output_hidden_states=True)
            token = int(out.logits[0, -1].argmax())
            thinks = token != 40 and 40 not in line and line[-most:] != [LATENT] * most
            line.append(LATENT if thinks else token)
            fed = head(out.hidden_states[-1][0, -1])[0] * model.config.embeds_std if thinks else table[token]
            x = torch.cat((x, fed[None, None]), 1)
        words, ended = [token for token in line if token not in (LATENT, EOS)], EOS in line
        assert row.ids[: len(words)] == words and (not ended or (row.ids == words and row.thoughts == line.count(LATENT)))
        seen.add((ended, LATENT in line[most:], 40 in line))
    assert any(again for _, again, _ in seen) and (True, True, True) in seen


@pytest.mark.parametrize("regime", ["thoughts", "annotation-rollouts", "colar"])
def test_dropout_reaches_the_same_places_in_transformers_forward(generator, released_colar, regime):
    for decoder, how in ((generator, (EOS,)), (released_colar.decoder, (EOS,))):
        asked = prompts(load_file(FOLDER / "coconut_generation.safetensors"))
        found = []
        for own in (decoder, HFDecoder(decoder.model)):
            masks = DropoutRegime(dropout(regime, 0.3, own), 3)
            thinking = Counted(own, how, count=3, closing=(END,))
            found.append(rollout(own, thinking, Prompt.of_ids(own, asked), 2, dropout=masks, budget=Budget(thoughts=3, answer=5)))
        same_thoughts(found[0].thoughts, found[1].thoughts)
        assert found[0].answers() == found[1].answers()


@torch.no_grad()
def test_thoughts_by_transformers_forward_agree_to_the_last_bit(released_colar, tmp_path):
    model = load(released_colar.source, sep_id=40, eos_id=EOS, forward="transformers")
    asked = torch.randint(0, 40, (4, 6), generator=torch.Generator().manual_seed(3))
    how = {"latent_temperature": 0.0, "end_temperature": 0.0, "sampling": Sampling(), "thoughts": 10, "max_new_tokens": 2}
    made = model.generate(asked[:, :-1].tolist(), min_thoughts=10, vectors=True, **how).vectors
    x, cache = model.backbone.get_input_embeddings()(torch.cat((asked[:, :-1], torch.full((4, 1), 40)), 1)), None
    for step in range(10):
        out = model.backbone(inputs_embeds=x, past_key_values=cache, use_cache=True, output_hidden_states=True)
        x, cache = (model.parts.head(out.hidden_states[-1][:, -1])[0] * model.config.embeds_std)[:, None], out.past_key_values
        assert torch.equal(torch.stack([row[step] for row in made]), x[:, 0])
    with pytest.raises(SettingsError, match="forward"):
        load(released_colar.source, sep_id=40, forward="tranformers")
    reward = {name: FOLDER / f"rm_{name}" for name in ("config.json", "state.safetensors")}
    shutil.copy(reward["config.json"], tmp_path / "config.json")
    shutil.copy(reward["state.safetensors"], tmp_path / "model.safetensors")
    assert isinstance(load(tmp_path, forward="transformers").scorer.decoder, HFDecoder)
    with pytest.raises(SettingsError, match="own step"):
        load(FOLDER.parent / "tah" / "checkpoint_official_layout", forward="transformers")


@pytest.mark.parametrize("least", [0, 1])
@torch.no_grad()
def test_colar_generation_is_that_of_whole_forwards_with_its_head(least, released_colar):
    model = released_colar
    asked = prompts(load_file(FOLDER / "coconut_generation.safetensors"))
    how = {"latent_temperature": 0.0, "end_temperature": 0.0, "sampling": Sampling(), "thoughts": 5, "max_new_tokens": 12}
    found = model.generate(asked, min_thoughts=least, vectors=True, **how)
    head, std = model.parts.head, model.config.embeds_std
    for row, made, prompt in zip(found.rows, found.vectors, asked, strict=True):
        thoughts, said = oracle(model.backbone, [*prompt, 40], lambda h, step: head(h)[0] * std, 5, 40, least)
        assert (row.thoughts, row.ids) == (len(thoughts), said) and row.thoughts >= least
        same_thoughts(made, torch.stack(thoughts) if thoughts else made[:0])
