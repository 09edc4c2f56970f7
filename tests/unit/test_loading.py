"""Weights are read whole or not at all: files of every kind, aliases, and one clear sentence for each way to be wrong."""

import json
import pickle

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lab.errors import CheckpointError
from lab.models.loading import check_state, load_exact, missing_unexpected, part, read_json, read_state, read_torch, rename, tensor_shapes


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.head, self.norm = nn.Embedding(4, 2), nn.Linear(2, 4, bias=False), nn.LayerNorm(2)
        self.head.weight = self.table.weight


class Code:
    def __reduce__(self):
        return (print, ("code was executed",))


STATE = {"a": torch.arange(6.0).view(2, 3), "b.c": torch.ones(2, dtype=torch.bfloat16)}


def write(folder, kind):
    if kind == "safetensors":
        save_file(STATE, folder / "w.safetensors")
        return folder / "w.safetensors"
    if kind in ("bin", "wrapped", "old zip"):
        content = {"state_dict": STATE} if kind == "wrapped" else STATE
        torch.save(content, folder / "checkpoint_28", _use_new_zipfile_serialization=kind != "old zip")
        return folder / "checkpoint_28"
    suffix = "safetensors" if kind == "shards" else "bin"
    stem = "model" if kind == "shards" else "pytorch_model"
    for number, (key, value) in enumerate(STATE.items()):
        path = folder / f"{stem}-{number}.{suffix}"
        save_file({key: value}, path) if kind == "shards" else torch.save({key: value}, path)
    index = {"weight_map": {key: f"{stem}-{number}.{suffix}" for number, key in enumerate(STATE)}}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("kind", ["safetensors", "bin", "wrapped", "old zip", "shards", "bin shards"])
def test_every_kind_of_file_gives_the_same_tensors(tmp_path, kind):
    path = write(tmp_path, kind)
    state = read_state(path)
    assert state.keys() == STATE.keys()
    assert all(torch.equal(state[key], STATE[key]) and state[key].dtype == STATE[key].dtype for key in STATE)
    assert tensor_shapes(path) == {"a": (2, 3), "b.c": (2,)}


@pytest.mark.parametrize("kind", ["safetensors", "bin", "shards"])
def test_a_prefix_before_every_name_is_left_out(tmp_path, monkeypatch, kind):
    for prefix in ("module.", "module._orig_mod."):
        with monkeypatch.context() as patched:
            patched.setitem(globals(), "STATE", {f"{prefix}{key}": value for key, value in STATE.items()})
            path = write(tmp_path, kind)
        assert read_state(path).keys() == STATE.keys() == tensor_shapes(path).keys()
    save_file({"module.a": STATE["a"], "b": STATE["a"].clone()}, tmp_path / "two.safetensors")
    assert read_state(tmp_path / "two.safetensors").keys() == {"module.a", "b"}


def test_rubbish_is_one_sentence(tmp_path):
    for content in (b"", b"hello", pickle.dumps({"x": 1}, 2)):
        (tmp_path / "x.bin").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"^Cannot read .*x.bin"):
            read_state(tmp_path / "x.bin")


def test_a_bare_tensor_gets_the_name_asked_for(tmp_path):
    torch.save(torch.eye(2), tmp_path / "projection.bin")
    assert torch.equal(read_state(tmp_path / "projection.bin", bare="projection.weight")["projection.weight"], torch.eye(2))


@pytest.mark.parametrize("kind", ["safetensors", "bin", "old zip", "shards"])
def test_a_truncated_file_is_one_sentence(tmp_path, kind):
    path = write(tmp_path, kind)
    victim = path / "model-0.safetensors" if path.is_dir() else path
    victim.write_bytes(victim.read_bytes()[:-20])
    with pytest.raises(CheckpointError, match="may be truncated") as caught:
        read_state(path)
    assert str(victim) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("protocol", "word"), [(None, "would run code .*print"), (2, "would run code .*print"), (4, "no plain torch file")]
)
def test_a_file_that_needs_code_is_refused_and_runs_none(tmp_path, capsys, protocol, word):
    if protocol is None:
        torch.save({"a": torch.ones(1), "x": Code()}, tmp_path / "evil.bin")
    else:
        (tmp_path / "evil.bin").write_bytes(pickle.dumps(Code(), protocol))
    with pytest.raises(CheckpointError, match=word):
        read_torch(tmp_path / "evil.bin")
    assert "executed" not in capsys.readouterr().out


def test_content_that_is_no_state_dict_is_refused(tmp_path):
    torch.save({"a": torch.ones(1), "step": 3}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="does not hold a state dict"):
        read_state(tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="No weights in"):
        read_state(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("weight_map", "word"),
    [
        ({"a": "../w.safetensors"}, "outside its folder"),
        ({"a": "w.safetensors", "z": "w.safetensors"}, "1 missing .z."),
        ({"a": "gone.safetensors"}, "no file"),
        (None, "not an index"),
    ],
)
def test_a_wrong_index_is_refused(tmp_path, weight_map, word):
    save_file({"a": STATE["a"]}, tmp_path / "w.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=word):
        read_state(tmp_path)


def test_malformed_json_names_file_and_line(tmp_path):
    (tmp_path / "config.json").write_text('{"a": 1,\n oops}')
    with pytest.raises(CheckpointError, match=r"config.json.*line 2"):
        read_json(tmp_path / "config.json")


def test_rename_strips_prefixes_drops_and_merges_equal_aliases_only():
    rules = {r"base_causallm\.": "", r"embedding\.": "wte.", r".*\.attn\.bias$": None}
    state = {
        "base_causallm.wte.weight": torch.ones(2),
        "embedding.weight": torch.ones(2),
        "h.0.attn.bias": torch.zeros(1),
        "x": torch.ones(1),
    }
    assert rename(state, rules).keys() == {"wte.weight", "x"}
    state["embedding.weight"] = torch.zeros(2)
    with pytest.raises(CheckpointError, match="two different tensors for 'wte.weight'"):
        rename(state, rules)


def test_rename_keeps_groups_and_part_selects():
    state = rename({"m.layers.3.q.base_layer.weight": torch.ones(1)}, {r"m\.(.*)\.base_layer": r"\1"})
    assert list(state) == ["layers.3.q.weight"]
    assert list(part({"lora.a": torch.ones(1), "b": torch.ones(1)}, "lora.")) == ["a"]


def test_a_tied_weight_may_stand_under_any_of_its_names():
    value, norm = torch.arange(8.0).view(4, 2), {"norm.weight": torch.ones(2), "norm.bias": torch.zeros(2)}
    for names in (["table.weight"], ["head.weight"], ["table.weight", "head.weight"]):
        module = Tied()
        load_exact(module, {name: value for name in names} | norm)
        assert torch.equal(module.table.weight, value) and module.head.weight is module.table.weight
    with pytest.raises(CheckpointError, match="ties together"):
        load_exact(Tied(), {"table.weight": value, "head.weight": value + 1} | norm)


def test_differences_are_named_and_nothing_is_changed():
    module = nn.Linear(2, 3)
    before = module.weight.detach().clone()
    with pytest.raises(CheckpointError, match=r"'decider'.*1 missing .bias.*1 unexpected .scale.*weight: found .3, 3., wanted .3, 2."):
        load_exact(module, {"weight": torch.zeros(3, 3), "scale": torch.ones(1)}, what="decider")
    assert torch.equal(module.weight, before)


def test_only_what_is_named_may_be_missing_or_left_over():
    module = nn.Linear(2, 3)
    bias = module.bias.detach().clone()
    state = {"weight": torch.ones(3, 2, dtype=torch.float64), "old.step": torch.ones(1)}
    assert load_exact(module, state, allow_missing=["bias"], allow_unexpected=["old.*"]) == ["bias"]
    assert torch.equal(module.weight, torch.ones(3, 2)) and module.weight.dtype == torch.float32
    assert torch.equal(module.bias, bias)


def test_at_most_five_names_are_listed():
    with pytest.raises(CheckpointError, match=r"9 missing \(k0, k1, k2, k3, k4, …\)"):
        check_state({f"k{i}": (1,) for i in range(9)}, {}, what="it")
    assert missing_unexpected({"a": [2]}, {"a": torch.ones(3)}).misshaped == [("a", (3,), (2,))]
