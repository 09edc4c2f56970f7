"""Small tokenizers of our own (words, bytes, BPE trained on given texts), checks on any tokenizer, and new tokens for a model.

All are `PreTrainedTokenizerFast`: they save, reload, pad and render chat templates as any other. An empty string means "none".
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lab.errors import CheckpointError, SettingsError
from lab.hub import local_only

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

TURN, END, THINK, UNTHINK = "<|im_start|>", "<|im_end|>", "<think>", "</think>"
CHAT_TOKENS = (TURN, END, THINK, UNTHINK)

# A turn is `<|im_start|>role\ntext<|im_end|>\n`. Reasoning comes from `reasoning_content`, or from what stands before `</think>`
# in the text, and is rendered as `<think>\n…\n</think>\n\n`. `enable_thinking=False` renders an empty block instead.
CHAT_TEMPLATE = """
{%- macro thought(reasoning) -%}{{ '<think>\\n' + reasoning + '\\n</think>\\n\\n' }}{%- endmacro -%}
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' -}}
{%- if message.role == 'assistant' -%}
{%- set text = message.content or '' -%}
{%- set reasoning = message.reasoning_content or '' -%}
{%- if not reasoning and '</think>' in text -%}
{%- set reasoning = (text.split('</think>') | first).split('<think>') | last | trim -%}
{%- set text = text.split('</think>')[1:] | join('</think>') | trim -%}
{%- endif -%}
{%- generation -%}
{%- if reasoning -%}{{- thought(reasoning) -}}
{%- elif enable_thinking is defined and not enable_thinking -%}{{- thought('') -}}
{%- endif -%}
{{- text + '<|im_end|>' -}}
{%- endgeneration -%}
{%- else -%}
{{- message.content + '<|im_end|>' -}}
{%- endif -%}
{{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- if enable_thinking is defined and not enable_thinking -%}{{- thought('') -}}{%- endif -%}
{%- endif -%}
""".strip()


def word_tokenizer(
    vocabulary: Sequence[str],
    *,
    pad: str = "<pad>",
    eos: str | None = None,
    bos: str = "",
    unk: str = "",
    special: Sequence[str] = (),
    chat: bool = False,
    pieces: str = "",
) -> "PreTrainedTokenizerFast":
    """A tokenizer whose token i is `vocabulary[i]`; text is split at white space. Special tokens not in it follow after it.

    Args:
        pieces: a regular expression of what is one token, instead of all between white space.
        eos: None = `<eos>`, or `<|im_end|>` where `chat`.
        unk: what an unknown word becomes; without one an unknown word is an error when text is encoded.
        chat: adds the chat tokens and template.

    Raises:
        SettingsError: a word twice, or with white space inside.
    """
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    bad = [word for word in vocabulary if not word or word.split() != [word]]
    if bad or len(set(vocabulary)) != len(vocabulary):
        twice = sorted({word for word in vocabulary if vocabulary.count(word) > 1})
        raise SettingsError(f"A vocabulary holds each word once, without white space; look at {(bad or twice)[:5]}.")
    names = _special_names(pad, eos, bos, unk, special, chat)
    words = list(dict.fromkeys([*vocabulary, *names["all"]]))
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, **({"unk_token": unk} if unk else {})))
    whole = pre_tokenizers.WhitespaceSplit()
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(pieces), "removed", invert=True) if pieces else whole
    return _wrap(inner, names, chat)


def byte_tokenizer(
    *, pad: str = "<pad>", eos: str | None = None, bos: str = "", special: Sequence[str] = (), chat: bool = False
) -> "PreTrainedTokenizerFast":
    """A tokenizer whose token i is byte i (i < 256), special tokens after them; any text round-trips."""
    return _byte_level([], pad, eos, bos, special, chat, size=256)


def bpe_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    *,
    pad: str = "<pad>",
    eos: str | None = None,
    bos: str = "",
    special: Sequence[str] = (),
    chat: bool = False,
) -> "PreTrainedTokenizerFast":
    """A byte-level BPE tokenizer of at most `vocab_size` tokens (special ones included) trained on `texts`; any text round-trips."""
    count = len(_special_names(pad, eos, bos, "", special, chat)["all"])
    if vocab_size < 256 + count:
        raise SettingsError(f"A byte-level BPE needs 256 bytes and {count} special tokens: vocab_size = {vocab_size} is too small.")
    return _byte_level(texts, pad, eos, bos, special, chat, size=vocab_size - count)


def load_tokenizer(name: str, *, pad: bool = False, eos: bool = False, chat: bool = False) -> "PreTrainedTokenizerBase":
    """The tokenizer of a folder or hub id, or `toy:bytes`, with what is asked for checked.

    Raises:
        CheckpointError: no tokenizer there. SettingsError: it has no padding or end token or no chat template, and that was asked for.
    """
    if name == "toy:bytes":
        return byte_tokenizer(chat=True)
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False, local_files_only=local_only(name))
    except Exception as error:  # OSError, ValueError, KeyError, json and tokenizers errors share no base
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise CheckpointError(f"Cannot load a tokenizer from {name!r}: {reason}.") from error
    require(tokenizer, name, pad=pad, eos=eos, chat=chat)
    return tokenizer


def require(tokenizer: "PreTrainedTokenizerBase", name: str = "", *, pad: bool = False, eos: bool = False, chat: bool = False) -> None:
    """Raise SettingsError naming the first thing asked for that `tokenizer` lacks, and what to do."""
    name = repr(name or tokenizer.name_or_path or type(tokenizer).__name__)
    if eos and tokenizer.eos_token_id is None:
        raise SettingsError(f"The tokenizer of {name} has no end token; set tokenizer.eos_token to the token that ends an answer.")
    if pad and tokenizer.pad_token_id is None:
        raise SettingsError(f"The tokenizer of {name} has no padding token; set tokenizer.pad_token, for example to its end token.")
    if chat and not tokenizer.chat_template:
        raise SettingsError(f"The tokenizer of {name} has no chat template; use an instruction-tuned one, or set tokenizer.chat_template.")


def stop_ids(tokenizer: "PreTrainedTokenizerBase", model: "PreTrainedModel | None" = None) -> list[int]:
    """Every id that ends an answer: the tokenizer's end token, those of the generation config, and `<|im_end|>` where it exists.

    Base tokenizers of the Qwen family end with `<|endoftext|>` while chat text ends with `<|im_end|>` (tah.md 7.2, item 8).
    """
    found = [tokenizer.eos_token_id]
    generation = getattr(model, "generation_config", None)
    listed = generation.eos_token_id if generation is not None else None
    found += listed if isinstance(listed, list) else [listed]
    found.append(tokenizer.get_vocab().get(END))
    return sorted({i for i in found if i is not None})


def add_tokens(
    tokenizer: "PreTrainedTokenizerBase",
    model: "PreTrainedModel",
    tokens: Sequence[str],
    *,
    like: str | None = None,
    special: bool = True,
) -> list[int]:
    """The ids of `tokens`, after adding those that are new to `tokenizer` and giving them rows in `model`.

    A new row of the embedding, and of an untied head, is a copy of the row of `like`, or the mean of all rows in use. Embeddings that
    already have spare rows are not shrunk. Tokens that exist keep their rows.
    """
    if like is not None and tokenizer.get_vocab().get(like) is None:
        raise SettingsError(f"Cannot start new tokens from {like!r}: it is not one token of this tokenizer.")
    used = len(tokenizer)
    tokenizer.add_tokens(list(tokens), special_tokens=special)
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    row = None if like is None else tokenizer.get_vocab()[like]
    for weight in _vocabulary_weights(model):
        _start_rows(weight, used, len(tokenizer), row)
    return tokenizer.convert_tokens_to_ids(list(tokens))


@torch.no_grad()
def _start_rows(weight: Tensor, used: int, total: int, like: int | None) -> None:
    weight[used:total] = weight[:used].mean(0) if like is None else weight[like]


def _vocabulary_weights(model: "PreTrainedModel") -> list[Tensor]:
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    return [table] if head is None or head.weight is table else [table, head.weight]


def _special_names(pad: str, eos: str | None, bos: str, unk: str, special: Sequence[str], chat: bool) -> dict:
    if eos is None:
        eos = END if chat else "<eos>"
    chosen = {"pad_token": pad, "eos_token": eos, "bos_token": bos, "unk_token": unk}
    others = [*(CHAT_TOKENS if chat else ()), *special]
    everything = list(dict.fromkeys(filter(None, [*chosen.values(), *others])))
    return {"all": everything, "named": {role: token for role, token in chosen.items() if token}}


def _byte_level(
    texts: Iterable[str], pad: str, eos: str | None, bos: str, special: Sequence[str], chat: bool, size: int
) -> "PreTrainedTokenizerFast":
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    alphabet = _byte_letters()
    inner = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    if size > 256:
        inner.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False))
    return _wrap(inner, _special_names(pad, eos, bos, "", special, chat), chat)


def _byte_letters() -> list[str]:
    """The 256 printable letters that stand for bytes 0 to 255 in byte-level tokenizers: itself where printable, else 256 + a counter."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(256 + hidden.index(byte)) for byte in range(256)]


def _wrap(inner: object, names: dict, chat: bool) -> "PreTrainedTokenizerFast":
    from transformers import PreTrainedTokenizerFast

    plain = [token for token in names["all"] if token in (THINK, UNTHINK)]  # kept when special tokens are skipped in decoding
    special = [token for token in names["all"] if token not in plain]
    inner.add_special_tokens(special)
    inner.add_tokens(plain)
    others = [token for token in special if token not in names["named"].values()]
    options = {"chat_template": CHAT_TEMPLATE} if chat else {}
    return PreTrainedTokenizerFast(tokenizer_object=inner, extra_special_tokens=others, padding_side="left", **names["named"], **options)
