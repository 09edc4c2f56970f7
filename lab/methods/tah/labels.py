"""Which tokens a reference model gets wrong: one pass gives argmax, cross-entropy, entropy and rank, kept in resumable shards.

A row of the labelled data holds `data_id`, `real_token`, `mask` (1 = supervised), `prediction`, `mismatch`, `cross_entropy`,
`entropy`, `rank`, and whatever else it came with; every label strategy is derived from them without another pass (spec 6.1).
"""

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from lab.config import Settings
from lab.errors import DataError, RunError, SettingsError
from lab.files import digest, write_json
from lab.methods.tah.data import Row, encode, shard_range
from lab.models.decoder import decoder_for
from lab.models.vocab import token_statistics
from lab.progress import Progress

log = logging.getLogger(__name__)

MANIFEST = "labels.json"
COLUMNS = ("prediction", "mismatch", "cross_entropy", "entropy", "rank")


class Labelling(Settings):
    """How to label: over-long records are dropped, or cut where `cutoff`; a shard is the unit that a kill can lose."""

    max_input_length: int = Field(10000, ge=2)
    cutoff: bool = False
    batch_tokens: int = Field(8192, ge=1)
    shards: int = Field(8, ge=1)


def encode_records(tokenizer, records: Sequence[Row], settings: Labelling) -> list[Row]:
    """Rows of token ids and masks; records without a question or an answer, or too long, are dropped and counted in the log.

    Raises DataError where none is left.
    """
    rows, lost, long = [], 0, 0
    for number, record in enumerate(records):
        pair = encode(tokenizer, record)
        if pair is None:
            lost += 1
        elif len(pair[0]) > settings.max_input_length and not settings.cutoff:
            long += 1
        else:
            ids, mask = (column[: settings.max_input_length] for column in pair)
            rows.append({"data_id": number, "real_token": ids, "mask": mask})
    log.info(
        "%d records to label; dropped: %d without question or answer, %d longer than %d.", len(rows), lost, long, settings.max_input_length
    )
    if not rows:
        raise DataError(f"None of {len(records)} records can be labelled: {lost} lack a question or an answer, {long} are too long.")
    return rows


def label_rows(model, rows: Sequence[Row], folder: Path | str, settings: Labelling, part: tuple[int, int] = (0, 1)) -> Path:
    """Label `rows` with `model` into parquet shards under `folder`; shards that are there already are kept.

    Args:
        model: a causal language model, or what `lab.load` gives; its tokenizer must be the one the rows were made with.
        part: (index, of) of the processes that share the work, each doing every `of`-th shard.

    Raises RunError where the folder holds labels of other rows, or by another model.
    """
    backbone = getattr(model, "backbone", model).eval()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    identity = {
        "rows": digest([row["real_token"] for row in rows]),
        "model": backbone.name_or_path or digest_of(backbone),
        "shards": settings.shards,
    }
    _claim(folder, identity)
    shards = min(settings.shards, len(rows))
    with Progress("labelling", len(rows)) as progress:
        for index in range(shards):
            start, stop = shard_range(len(rows), shards, index)
            path = folder / f"shard-{index:05d}-of-{shards:05d}.parquet"
            if not path.exists() and index % part[1] == part[0]:
                _write(path, statistics(backbone, rows[start:stop], settings.batch_tokens, progress.advance))
    return folder


def digest_of(backbone) -> str:
    """A fingerprint of a model without a name: of its embeddings and its last norm or layer."""
    parameters = list(backbone.parameters())
    return digest([float(p.detach().double().sum()) for p in (parameters[0], *parameters[-8:])])


def _claim(folder: Path, identity: dict[str, Any]) -> None:
    path = folder / MANIFEST
    if path.exists() and (other := [k for k, v in identity.items() if json.loads(path.read_text()).get(k) != v]):
        raise RunError(
            f"{str(folder)!r} holds labels of another {' and '.join(other)}; choose another folder, or delete it to label again."
        )
    write_json(path, identity)


@torch.no_grad()
def statistics(backbone, rows: Sequence[Row], batch_tokens: int = 8192, done: Callable[[int], None] | None = None) -> list[Row]:
    """`rows` with the columns of this module, from one length-sorted pass and a head computed in chunks; order kept.

    The last position of a row predicts nothing: there mismatch, cross-entropy and rank are 0.
    """
    decoder, head = decoder_for(backbone), backbone.get_output_embeddings().weight
    labelled: list[Row | None] = [None] * len(rows)
    for group in length_groups([len(row["real_token"]) for row in rows], batch_tokens):
        ids, lengths = padded([rows[i]["real_token"] for i in group], head.device)
        pos = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=ids.device.type == "cuda"):
            h = decoder(decoder.embed(ids), pos, decoder.grow()).last
            where = pos < lengths[:, None]
            targets = torch.where(pos + 1 < lengths[:, None], ids.roll(-1, 1), -1)[where]
            found = token_statistics(h[where], head, targets.clamp(min=0))
        last = targets < 0
        columns = (found.best, (found.best != targets).long(), found.cross_entropy, found.entropy, found.rank)
        keep = {"prediction", "entropy"}
        columns = [column if name in keep else column.masked_fill(last, 0) for name, column in zip(COLUMNS, columns, strict=True)]
        split = [column.cpu().split(lengths.tolist()) for column in columns]
        for place, i in enumerate(group):
            labelled[i] = {**rows[i], **{name: parts[place].tolist() for name, parts in zip(COLUMNS, split, strict=True)}}
        if done is not None:
            done(len(group))
    return labelled


def length_groups(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Indices in batches of like length, longest first, each at most `batch_tokens` columns with its padding (at least one row)."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    while order:
        size = max(1, batch_tokens // max(lengths[order[0]], 1))
        yield order[:size]
        order = order[size:]


def padded(rows: Sequence[Sequence[int]], device, fill: int = 0) -> tuple[Tensor, Tensor]:
    """Rows as (B, T) padded on the right with `fill`, and their lengths (B,)."""
    parts = [torch.as_tensor(row) for row in rows]
    lengths = torch.tensor([len(part) for part in parts], device=device)
    return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=fill).to(device), lengths


def _write(path: Path, rows: list[Row]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    draft = path.with_suffix(".part")
    pq.write_table(pa.Table.from_pylist(rows), draft)
    draft.rename(path)


def read_labelled(folder: Path | str) -> list[Row]:
    """The labelled rows of a folder of ours, ordered by data_id, or of one that the official script saved.

    Raises DataError where shards are missing or there is nothing that looks like labels.
    """
    folder = Path(folder)
    if (folder / "dataset_info.json").is_file() or (folder / "state.json").is_file():
        from datasets import load_from_disk

        return load_from_disk(str(folder)).to_list()
    import pyarrow.parquet as pq

    shards = sorted(folder.glob("shard-*-of-*.parquet"))
    if not shards:
        raise DataError(f"{str(folder)!r} holds no labelled data (shard-….parquet, or a saved dataset); run the label step first.")
    wanted = int(shards[0].stem.rsplit("-", 1)[1])
    if len(shards) != wanted:
        raise DataError(
            f"{str(folder)!r} holds {len(shards)} of {wanted} shards: labelling was interrupted. Run it again, it goes on there."
        )
    return sorted((row for shard in shards for row in pq.read_table(shard).to_pylist()), key=lambda row: row["data_id"])


def label_report(rows: Sequence[Row], top: int = 10) -> dict[str, Any]:
    """Counts, mismatch ratios overall and where supervised, lengths, and the most frequent tokens that were mispredicted."""
    tokens = sum(len(row["mask"]) for row in rows)
    supervised = sum(sum(row["mask"]) for row in rows)
    wrong = sum(sum(row["mismatch"]) for row in rows)
    hard = sum(m and x for row in rows for m, x in zip(row["mask"], row["mismatch"], strict=True))
    missed = Counter(t for row in rows for t, x in zip(row["real_token"][1:], row["mismatch"], strict=False) if x)
    lengths = sorted(len(row["mask"]) for row in rows)
    return {
        "records": len(rows),
        "tokens": tokens,
        "supervised": supervised,
        "mismatch": wrong / max(tokens, 1),
        "mismatch_supervised": hard / max(supervised, 1),
        "median_length": lengths[len(lengths) // 2] if lengths else 0,
        "longest": lengths[-1] if lengths else 0,
        "missed_most": missed.most_common(top),
    }


def same_vocabulary(first, second) -> None:
    """Raise SettingsError unless two tokenizers give every token the same id: labels are per token of the model being trained."""
    if first is not None and second is not None and first.get_vocab() != second.get_vocab():
        raise SettingsError("The reference model reads another tokenizer than the model to train; choose one of the same family.")
