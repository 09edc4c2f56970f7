"""Toy tokenizers: ids as promised, text round-trips, chat template with thinking and assistant mask, what is missing is said."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lab.errors import CheckpointError, SettingsError
from lab.models.tokenizers import bpe_tokenizer, byte_tokenizer, load_tokenizer, require, stop_ids, word_tokenizer

TALK = [{"role": "user", "content": "2+3?"}, {"role": "assistant", "content": "<think>two\nthree</think>five"}]
TEXTS = ["the cat sat on the mat", "the dog sat on the log"] * 5


@pytest.fixture(scope="module")
def bytes_():
    return byte_tokenizer(chat=True)


def test_words_keep_their_position_and_special_tokens_follow():
    tokenizer = word_tokenizer(["<bos>", "a", "b", "a→b"], bos="<bos>")
    assert tokenizer("a→b a b").input_ids == [3, 1, 2]
    assert (tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 4, 5)
    assert tokenizer.decode([1, 2, 3]) == "a b a→b"


def test_unknown_word_is_an_error_unless_unk_is_given():
    with pytest.raises(Exception, match="UNK"):
        word_tokenizer(["a"])("z")
    tokenizer = word_tokenizer(["a"], unk="<unk>")
    assert tokenizer("z a").input_ids == [tokenizer.unk_token_id, 0]


@pytest.mark.parametrize("words", [["a", "a"], ["a b"], [""]])
def test_a_bad_vocabulary_is_refused(words):
    with pytest.raises(SettingsError, match="vocabulary"):
        word_tokenizer(words)


@settings(max_examples=30, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_bytes_are_bytes_and_round_trip(text):
    tokenizer = byte_tokenizer()
    ids = tokenizer(text).input_ids
    assert ids == list(text.encode()) and tokenizer.decode(ids) == text


def test_bpe_learns_merges_within_its_size_and_round_trips():
    tokenizer = bpe_tokenizer(TEXTS, 280, chat=True)
    assert len(tokenizer) <= 280
    assert len(tokenizer("the cat").input_ids) < len("the cat")
    odd = "  Zürich\n\t− 1/2 你好 "
    assert tokenizer.decode(tokenizer(odd).input_ids) == odd
    with pytest.raises(SettingsError, match="too small"):
        bpe_tokenizer(TEXTS, 200)


@pytest.mark.parametrize("kind", ["words", "bytes", "bpe"])
def test_saved_and_reloaded_it_is_the_same(tmp_path, kind, bytes_):
    if kind == "words":
        tokenizer = word_tokenizer(["the", "cat"], unk="<unk>")
    else:
        tokenizer = bytes_ if kind == "bytes" else bpe_tokenizer(TEXTS, 270, chat=True)
    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(str(tmp_path))
    assert again("the cat").input_ids == tokenizer("the cat").input_ids
    for name in ("pad_token_id", "eos_token_id", "bos_token_id", "unk_token_id", "padding_side", "chat_template", "all_special_tokens"):
        assert getattr(again, name) == getattr(tokenizer, name), name
    assert again.get_vocab() == tokenizer.get_vocab()


def test_chat_template_separates_thought_from_answer(bytes_):
    text = bytes_.apply_chat_template(TALK, tokenize=False)
    assert text == "<|im_start|>user\n2+3?<|im_end|>\n<|im_start|>assistant\n<think>\ntwo\nthree\n</think>\n\nfive<|im_end|>\n"
    keyed = [TALK[0], {"role": "assistant", "content": "five", "reasoning_content": "two\nthree"}]
    assert bytes_.apply_chat_template(keyed, tokenize=False) == text


@pytest.mark.parametrize(("thinking", "end"), [(None, ""), (True, ""), (False, "<think>\n\n</think>\n\n")])
def test_generation_prompt_switches_thinking_off_with_an_empty_block(bytes_, thinking, end):
    options = {} if thinking is None else {"enable_thinking": thinking}
    text = bytes_.apply_chat_template(TALK[:1], tokenize=False, add_generation_prompt=True, **options)
    assert text == "<|im_start|>user\n2+3?<|im_end|>\n<|im_start|>assistant\n" + end


@pytest.mark.parametrize("content", ["five", "<think>why</think>five", ""])
def test_assistant_mask_covers_exactly_what_the_model_writes(bytes_, content):
    talk = [TALK[0], {"role": "assistant", "content": content}, TALK[0], {"role": "assistant", "content": "six"}]
    out = bytes_.apply_chat_template(talk, return_dict=True, return_assistant_tokens_mask=True)
    written = bytes_.decode([i for i, mask in zip(out["input_ids"], out["assistant_masks"], strict=True) if mask])
    first = "<think>\nwhy\n</think>\n\nfive" if "why" in content else content
    assert written == first + "<|im_end|>six<|im_end|>"


def test_think_tags_survive_when_special_tokens_are_skipped(bytes_):
    ids = bytes_("<think>x</think>y<|im_end|>").input_ids
    assert bytes_.decode(ids, skip_special_tokens=True) == "<think>x</think>y"


def test_what_a_tokenizer_lacks_is_named(bytes_):
    bare = byte_tokenizer(pad="", eos="")
    for need, word in [("pad", "padding token"), ("eos", "end token"), ("chat", "chat template")]:
        with pytest.raises(SettingsError, match=word):
            require(bare, "mine", **{need: True})
        require(bytes_, **{need: True})


def test_no_tokenizer_there_is_one_sentence(tmp_path):
    with pytest.raises(CheckpointError, match="Cannot load a tokenizer"):
        load_tokenizer(str(tmp_path))


def test_stop_ids_join_tokenizer_and_chat_end():
    tokenizer = byte_tokenizer(eos="<|endoftext|>", special=["<|im_end|>"])
    assert stop_ids(tokenizer) == sorted([tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")])
