"""RL on the official completions: unused ids may be said, START begins another thought, nothing but the length ends a row."""

import torch
from adaptive_fixture import lora_model, tensors
from test_rl import LABELS, batch_of, keys, prompts_of

from lab.data.examples import Example
from lab.methods.adaptive.reinforce import AdaptiveThinking
from lab.methods.adaptive.stages import reinforce_length
from lab.rl import RLSettings
from lab.training.acts import Completions, gap


def test_log_probabilities_are_the_official_ones():
    given, model = tensors("merged_and_grpo"), lora_model().merge()
    ids, mask, said = given["grpo/input_ids"], given["grpo/attention_mask"], given["grpo/completion_ids"]
    wide = said.shape[1]
    assert (said == model.config.start).any(), "thoughts begin again"
    batch = Completions(ids[:, :-wide], mask[:, :-wide], said, mask[:, -wide:])
    thinking = AdaptiveThinking(model, 4, compat=True)
    for temperature in (1.0, 0.5):
        logps, entropies = thinking.log_probs(batch, temperature)
        torch.testing.assert_close(logps.detach(), given[f"grpo/logps_temp{temperature}"], atol=1e-4, rtol=0)
        assert entropies.isfinite().all()


def test_a_rollout_is_repeated_by_the_update_with_thoughts_that_begin_again():
    model, samples, longest = lora_model(), 24, 14
    s, prompts, thinking = model.config, prompts_of(model), AdaptiveThinking(model, 4, compat=True)
    with torch.no_grad():
        model.thinker.vector("start", "out").copy_(3 * model.thinker.vector("continue", "out"))  # START is said often
    acts = thinking.act(prompts, samples, keys(5, samples), temperature=1.0, longest=longest)
    again = [row for row in acts.ids if s.start in row]
    assert len(again) > 5 and any(set(row) & set(s.unused) for row in acts.ids) and max(map(len, acts.ids)) == longest
    assert all(row.index(s.start) > row.index(s.stop) for row in again), "the prompt's thought ends first"
    assert any(row.count(s.stop) > 1 and s.go_on in row[row.index(s.start) :] for row in again), "a second thought is made and ended"
    batch = batch_of(model, prompts, acts, samples)
    logps, _ = thinking.log_probs(batch, 1.0)
    told = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in acts.logprobs], batch_first=True)
    assert gap(logps, told, batch.mask.bool()) <= 1e-4
    counted = [sum(i in (s.start, s.go_on, s.stop) for i in row) + 1 for row in acts.ids]
    assert [n + 2 for n in acts.extras["thoughts"]] == counted
    logps.sum().backward()
    assert model.parts.recurrent_filter.input_layer.weight.grad.abs().sum() > 0


def test_training_takes_them_and_asks_as_the_official_code(tmp_path):
    model, rows = lora_model(), []
    data = [Example(str(i), f"{i} + 1 ?", ("x",), label) for i, label in enumerate(LABELS)]
    how = RLSettings(steps=2, prompts=2, samples=4, longest=8, lr=1e-3, beta=1e-2, save_every=0, log_every=1, device="cpu")
    reinforce_length(model, data, how, tmp_path, logger=lambda **row: rows.append(row), compat=True)
    assert [row["step"] for row in rows] == [1, 2] and all(row["logp_gap"] <= 1e-4 for row in rows)
