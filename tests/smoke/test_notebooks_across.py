"""The notebooks across methods, executed: ablate, the tour, and a first look at a checkpoint of every layout."""

import ast
import json
import shutil
from pathlib import Path

import nbformat
import pytest
import torch
from adaptive_fixture import merged_folder  # noqa: F401 - a fixture
from nbformat.sign import NotebookNotary
from safetensors.torch import load_file, save_file

from lab.errors import SettingsError
from lab.models.backbones import load_backbone
from lab.models.layouts import identify, load
from lab.models.tokenizers import byte_tokenizer, word_tokenizer
from lab.running import kernels, notebooks
from lab.running.parameters import TAG

ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "tests" / "fixtures"
NOTEBOOKS = ROOT / "notebooks"


@pytest.fixture(scope="module", autouse=True)
def warm():
    """One warm process for the kernels of all notebooks."""
    with kernels.server():
        yield


def values_of(path, **parameters):
    """The value of every cell's last line, the notebook's code run here with other parameters."""
    names, values = {}, []
    for cell in json.loads(path.read_text())["cells"]:
        if cell["cell_type"] != "code":
            continue
        tree = ast.parse("".join(cell["source"]))
        names["_"], last = None, tree.body[-1]
        if isinstance(last, ast.Expr):
            tree.body[-1] = ast.Assign([ast.Name("_", ast.Store())], last.value)
        exec(compile(ast.fix_missing_locations(tree), str(path), "exec"), names)
        values.append(names["_"])
        if TAG in cell["metadata"].get("tags", []):
            names |= parameters
    return names, values


def executed(path, folder, **parameters):
    """All outputs of a notebook that papermill executed."""
    done = notebooks.execute(path, folder / "done.ipynb", parameters)
    cells = json.loads(done.read_text())["cells"]
    return [output for cell in cells for output in cell.get("outputs", [])]


def html(outputs):
    return "".join("".join(output["data"]["text/html"]) for output in outputs if "text/html" in output.get("data", {}))


def coconut(folder):
    from lab.methods.coconut.checkpoint import export_official
    from lab.methods.coconut.config import CoconutSettings
    from lab.methods.coconut.model import CoconutModel

    tokenizer = byte_tokenizer()
    model = CoconutModel.start(load_backbone("toy:gpt2-micro", vocab_size=len(tokenizer)), tokenizer, CoconutSettings(thoughts=2))
    tokenizer.save_pretrained(folder / "tokenizer")
    return export_official(model, folder / "checkpoint_7"), {"heads": 2, "thoughts": 2, "tokenizer": str(folder / "tokenizer")}, "1+1?"


def codi(folder):
    answers = {"heads": 2, "lora_alpha": 8, "num_latent": 3, "tokenizer": str(FIXTURES / "codi" / "tok_gpt2")}
    return FIXTURES / "codi" / "gpt2_state_dict.safetensors", answers, "2 + 3"


def latenttts_codi(folder):
    shutil.copy(FIXTURES / "latenttts" / "codi_config.json", folder / "config.json")
    save_file(load_file(FIXTURES / "latenttts" / "codi_state.safetensors"), folder / "model.safetensors")
    return folder, {"num_latent": 4}, "3 4 5 61"


def colar(folder):
    from lab.methods.colar import toy
    from lab.methods.colar.checkpoint import export_latenttts
    from lab.methods.colar.config import ColarSettings

    model = toy.untrained("toy:llama", 0, ColarSettings.check(lora_r=0, lp_intermediate_size=32, lp_deterministic=True, latent_loss="mse"))
    return export_latenttts(model, folder), {"sep_id": model.config.sep_id, "eos_id": model.config.eos_id}, "4 5 6"


def lta(folder):
    from lab.methods.lta.checkpoint import export_official

    return prefix(folder, "block", export_official)


def softcot(folder):
    from lab.methods.lta.checkpoint import export_official

    return prefix(folder, "assistant", export_official)


def prefix(folder, kind, export):
    from test_lta_prompting import TOKENIZERS

    from lab.methods.lta.config import LtaSettings
    from lab.methods.lta.model import ThoughtModel

    shape = {"vocab_size": 272, "heads": 4, "kv_heads": 2, "layers": 2, "intermediate": 48}
    base, small = (load_backbone("toy:qwen3", hidden=width, **shape) for width in (32, 24))
    for model, name in ((base, "qwen3-base"), (small, "qwen3-small")):
        model.save_pretrained(folder / name)
        TOKENIZERS["qwen3"].save_pretrained(folder / name)
    settings = LtaSettings.check(generator=kind, num_thought_tokens=3, family="qwen3", inner=48)
    export(ThoughtModel.start(base, TOKENIZERS["qwen3"], settings, small if kind == "assistant" else None), folder / "official")
    more = {"assistant": str(folder / "qwen3-small")} if kind == "assistant" else {}
    return folder / "official", {"backbone": str(folder / "qwen3-base"), "family": "qwen3", "num_thought_tokens": 3, **more}, "How many?"


def dtt(folder):
    from lab.methods.dtt.checkpoint import export_adapter
    from lab.methods.dtt.config import BOT, EOT, GatedSettings, LoraSettings
    from lab.methods.dtt.model import SparseGatedModel

    tokenizer = word_tokenizer(["Q", *(f"w{i}" for i in range(20))], special=(BOT, EOT))
    model = SparseGatedModel.start(load_backbone("toy:qwen3", vocab_size=len(tokenizer)), tokenizer, GatedSettings(bias=0.0))
    model.backbone.save_pretrained(folder / "base")
    model.add_lora(LoraSettings(rank=2, dropout=0.0))
    return export_adapter(model, folder / "adapter"), {"backbone": str(folder / "base")}, "w1 w2"


def tah(folder):
    return FIXTURES / "tah" / "checkpoint_official_layout", {}, "5 6 7 8"


def plain(folder):
    model = load("toy:llama-micro")
    model.backbone.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    return folder, {}, "hello"


def own(folder):
    made, answers, question = coconut(folder)
    return load(made, **answers).save(folder / "saved"), {}, question


LAYOUTS = {f.__name__: f for f in (coconut, codi, latenttts_codi, colar, lta, softcot, dtt, tah, plain, own)}


@pytest.mark.parametrize("name", [*LAYOUTS, "adaptive"])
def test_a_first_look_at_every_layout(name, tmp_path, merged_folder):  # noqa: F811
    torch.manual_seed(0)
    checkpoint, answers, question = (merged_folder, {}, "3 + 4") if name == "adaptive" else LAYOUTS[name](tmp_path)
    given = {"checkpoint": str(checkpoint), "answers": json.dumps(answers), "question": question, "max_new_tokens": 4}
    names, (*_, tokens, thoughts) = values_of(NOTEBOOKS / "load_released.ipynb", **given)
    model, look = names["model"], names["look"]
    wanted = {"latenttts_codi": "codi", "plain": "none", "own": "coconut"}.get(name, name)
    assert identify(checkpoint).method == names["found"].method == model.method == wanted
    assert names["found"].name and isinstance(look.text, str) and {"prompt", "answer"} <= set(look.trace.tokens["role"])
    assert tokens.html().count('class="t') >= 2
    assert (thoughts is None) == look.trace.thoughts.empty
    if name in ("coconut", "codi", "latenttts_codi", "adaptive", "colar", "own"):
        assert look.trace.thoughts["top_probs"].map(len).max() == 5 and "<" in thoughts.html()
    if name == "tah":
        assert len(look.trace.passes) and look.trace.passes["depth"].max() >= 1


def test_a_reward_model_scores_the_thoughts_of_its_generator(tmp_path):
    from lab.methods.latenttts.checkpoint import export_release
    from lab.methods.latenttts.model import RewardModel

    torch.manual_seed(0)
    checkpoint, answers, question = own(tmp_path)
    reward = export_release(RewardModel.start(load(checkpoint)), tmp_path / "reward")
    given = {"checkpoint": str(reward), "question": question, "max_new_tokens": 4}
    with pytest.raises(SettingsError, match="Name the model that thinks"):
        values_of(NOTEBOOKS / "load_released.ipynb", **given)
    names, (*_, thoughts) = values_of(NOTEBOOKS / "load_released.ipynb", generator=str(checkpoint), **given)
    assert names["found"].method == "latenttts" and names["look"].trace.thoughts["score"].notna().sum() == 2
    assert "score" in thoughts.html()


def test_questions_to_a_model_without_a_tokenizer_are_ids():
    with pytest.raises(SettingsError, match="such as 3 4 5"):
        values_of(NOTEBOOKS / "load_released.ipynb", checkpoint=str(tah(None)[0]), question="three")


def test_load_released_headless(tmp_path):
    checkpoint, answers, question = coconut(tmp_path)
    given = {"checkpoint": str(checkpoint), "answers": json.dumps(answers), "question": question, "max_new_tokens": 4}
    outputs = executed(NOTEBOOKS / "load_released.ipynb", tmp_path / "out", **given)
    assert any("method: coconut" in "".join(output.get("text", "")) for output in outputs)
    assert html(outputs).count("lab-view") >= 2


def test_ablate_headless(tmp_path):
    rows = [{"question": f"What is {i} + {i}?", "answer": f"so #### {2 * i}"} for i in range(5)]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    checkpoint, *_ = own(tmp_path)
    given = {
        "model": str(checkpoint),
        "benchmark": "gsm8k",
        "data": str(tmp_path / "test.jsonl"),
        "each": 1,
        "out": str(tmp_path / "saved"),
    }
    outputs = executed(NOTEBOOKS / "ablate.ipynb", tmp_path / "out", options='{"max_new_tokens": 4}', **given)
    assert {"ablation-coconut.csv", "ablation-coconut.svg"} <= {path.name for path in (tmp_path / "saved").iterdir()}
    table = (tmp_path / "saved" / "ablation-coconut.csv").read_text()
    assert "zeroed,vector" in table and "clean into corrupted" in table and "without thought 1" in table
    assert any("image/png" in output.get("data", {}) for output in outputs) and "another question's" in html(outputs)


def test_the_tour_headless_with_nothing_trained(tmp_path):
    outputs = executed(NOTEBOOKS / "tour.ipynb", tmp_path / "out", effort=0.01, run=str(tmp_path / "toys"))
    said = "".join("".join(output.get("text", "")) for output in outputs)
    assert said.count("trained for the tour in") == 3 and "in the prompt: 4 7 1 9 2 →" in said
    assert html(outputs).count("lab-view") >= 4
    facts = [json.loads(path.read_text()) for path in (tmp_path / "toys").glob("*/tour.json")]
    assert len(facts) == 3 and all(fact["asked"] == {"effort": 0.01, "seed": 0} for fact in facts)


@pytest.mark.parametrize("data", ["data", "file/data"])
def test_an_executed_notebook_is_trusted_and_holds_no_dead_widget(data, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path / data))
    both = {"text/html": "<b>twin</b>", notebooks.WIDGET: {"model_id": "1"}}
    cell = nbformat.v4.new_code_cell("view", outputs=[nbformat.v4.new_output("display_data", both)])
    book = nbformat.v4.new_notebook(cells=[cell], metadata={"widgets": {"state": {}}})
    nbformat.write(book, tmp_path / "done.ipynb")
    notebooks.seal(tmp_path / "done.ipynb")
    sealed = nbformat.read(tmp_path / "done.ipynb", 4)
    assert sealed.cells[0].outputs[0].data == {"text/html": "<b>twin</b>"} and "widgets" not in sealed.metadata
    if data == "data":
        assert NotebookNotary().check_signature(sealed) and not NotebookNotary().check_signature(book)
    else:
        assert "is not signed" in caplog.text, "a data folder that cannot be written is no reason for a run to fail"
