"""Labelling: statistics are right, a batch changes nothing, a kill loses one shard, other rows are refused."""

import pytest
import torch

from lab.errors import DataError, RunError
from lab.methods.tah.labels import Labelling, encode_records, label_report, label_rows, length_groups, read_labelled, statistics
from lab.models.backbones import load_backbone
from lab.models.tokenizers import byte_tokenizer


@pytest.fixture(scope="module")
def backbone():
    return load_backbone("toy:qwen3-tiny", vocab_size=300, initializer_range=0.3)


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    random = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 30, (11,), generator=random).tolist()
    tokens = [torch.randint(0, 256, (n,), generator=random).tolist() for n in lengths]
    return [{"data_id": i, "real_token": row, "mask": [0] + [1] * (len(row) - 1)} for i, row in enumerate(tokens)]


def test_statistics_are_those_of_the_full_logits(backbone, rows):
    for row in statistics(backbone, rows, batch_tokens=64):
        ids = torch.tensor(row["real_token"])
        with torch.no_grad():
            logits = backbone(input_ids=ids[None]).logits[0]
        logs = logits.log_softmax(-1)
        assert row["prediction"] == logits.argmax(-1).tolist()
        assert row["mismatch"] == [*(logits.argmax(-1)[:-1] != ids[1:]).long().tolist(), 0]
        own = logs[:-1].gather(1, ids[1:, None])
        torch.testing.assert_close(torch.tensor(row["cross_entropy"]), torch.cat((-own[:, 0], torch.zeros(1))), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(torch.tensor(row["entropy"]), -(logs.exp() * logs).sum(-1), atol=1e-4, rtol=1e-4)
        assert row["rank"] == [*(logs[:-1] > own).sum(1).tolist(), 0]


def test_batches_are_of_like_length_and_complete():
    groups = list(length_groups([3, 9, 1, 9, 4], 12))
    assert sorted(i for group in groups for i in group) == [0, 1, 2, 3, 4]
    assert all(len(group) == 1 or len(group) * max([3, 9, 1, 9, 4][i] for i in group) <= 12 for group in groups)


def test_interrupted_labelling_goes_on_where_it_stopped(backbone, rows, tmp_path):
    how = Labelling(shards=3)
    whole = read_labelled(label_rows(backbone, rows, tmp_path / "whole", how))
    label_rows(backbone, rows, tmp_path / "parts", how, part=(1, 3))
    with pytest.raises(DataError, match="1 of 3 shards"):
        read_labelled(tmp_path / "parts")
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "parts").glob("*.parquet")}
    label_rows(backbone, rows, tmp_path / "parts", how)
    assert read_labelled(tmp_path / "parts") == whole and [row["data_id"] for row in whole] == list(range(11))
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in kept.items())


def test_a_folder_of_other_labels_is_refused(backbone, rows, tmp_path):
    label_rows(backbone, rows, tmp_path, Labelling(shards=2))
    with pytest.raises(RunError, match="another rows"):
        label_rows(backbone, rows[:5], tmp_path, Labelling(shards=2))
    with pytest.raises(DataError, match="run the label step"):
        read_labelled(tmp_path / "nothing")


def test_records_are_counted_and_masked_by_the_template():
    tokenizer = byte_tokenizer(chat=True)
    talk = [{"from": "human", "value": "1+1?"}, {"from": "gpt", "value": "<think>easy</think>2"}]
    records = [
        {"question": "2+2?", "answer": "4"},
        {"question": "no answer"},
        {"conversations": talk},
        {"question": "x" * 99, "answer": "y"},
    ]
    rows = encode_records(tokenizer, records, Labelling(max_input_length=90))
    assert [row["data_id"] for row in rows] == [0, 2]
    for row in rows:
        supervised = tokenizer.decode([t for t, own in zip(row["real_token"], row["mask"], strict=True) if own])
        assert "2+2?" not in supervised and "1+1?" not in supervised and supervised.rstrip().endswith("<|im_end|>")
    cut = encode_records(tokenizer, records, Labelling(max_input_length=20, cutoff=True))
    assert [len(row["real_token"]) for row in cut] == [20, 20, 20]
    with pytest.raises(DataError, match="None of 1 records"):
        encode_records(tokenizer, records[1:2], Labelling())


def test_the_report_counts(backbone, rows):
    report = label_report(statistics(backbone, rows))
    assert report["tokens"] == sum(len(row["real_token"]) for row in rows) and 0.9 < report["mismatch_supervised"] <= 1
