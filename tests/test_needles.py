"""Words hidden in long texts: a cache of 4 bits finds what a plain one finds, and one of 2 bits does not."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import pytest
import torch
from commands import run
from models import byte_tokenizer, smollm2

from quarot_fx.cache.options import CacheOptions
from quarot_fx.cli.chunks import InChunks
from quarot_fx.cli.needles import WORDS, Needles, parse_lengths
from quarot_fx.errors import OptionError
from quarot_fx.text import read_text

TEXT = "Nothing is to be found here. " * 40


def needles(tokenizer, text, lengths, depths):
    haystack = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    return Needles("a text", "", haystack, tokenizer, lengths, depths)


@pytest.mark.parametrize("length", [200, 1000])
def test_where_needles_are(length):
    tokenizer = byte_tokenizer()
    hidden = list(needles(tokenizer, TEXT, (length,), 4).hidden(length))
    texts = [tokenizer.decode(one.token_ids[0]) for one in hidden]
    assert {one.token_ids.shape for one in hidden} == {(1, length)}
    assert [one.depth for one in hidden] == [0.125, 0.375, 0.625, 0.875]
    assert len(set(texts)) == 4
    for one, text in zip(hidden, texts, strict=True):
        name, word = re.search(r"The secret word of ([\w ]+) is (\w+)\.", text).groups()
        assert word == WORDS[one.word]
        assert text.endswith(f"\n\nThe secret word of {name} is ")
        assert text.count("secret") == 2
        assert tokenizer.decode(one.answers) == "".join(word[0] for word in WORDS)
        around = length - text.count("\n\nThe secret") * 40
        assert abs(text.index("secret") - one.depth * around) < 20


def test_a_word_leads_if_it_is_likelier_than_all_others():
    """What is no word may be likelier."""
    (needle,) = needles(byte_tokenizer(), TEXT, (128,), 1).hidden(128)
    wrong = needle.answers[needle.word - 1]

    def says(**scores):
        def model(input_ids, use_cache, logits_to_keep):
            assert (use_cache, logits_to_keep) == (False, 1)
            logits = torch.zeros(1, 1, 256)
            logits[..., ord("!")] = 9
            logits[..., needle.answers[needle.word]] = scores["right"]
            logits[..., wrong] = scores["wrong"]
            return SimpleNamespace(logits=logits)

        return model

    assert needle.lead(says(right=3, wrong=1)) == (2, ord("!"))
    assert needle.lead(says(right=3, wrong=-1)) == (3, ord("!"))
    assert needle.lead(says(right=3, wrong=10)) == (-7, wrong)


def test_words_that_a_tokenizer_writes_alike():
    tokenizer = byte_tokenizer()
    unknown = lambda text, **options: tokenizer("?" * len(text.split()), **options)  # noqa: E731
    with pytest.raises(OptionError, match="the tokenizer writes two of these words alike"):
        list(Needles("a text", "", torch.zeros(200, dtype=torch.int64), unknown, (128,), 1).hidden(128))


def test_lengths():
    assert parse_lengths("64, 128") == (64, 128)
    for text in ("", "64,", "0", "a"):
        with pytest.raises(OptionError, match="write numbers of tokens"):
            parse_lengths(text)
    for length in (20, 5000):
        with pytest.raises(OptionError, match="tokens around a needle, and the text has"):
            list(needles(byte_tokenizer(), TEXT, (length,), 1).hidden(length))


def test_eval_looks_for_needles(tiny_folder, tmp_path):
    file = tmp_path / "out.json"
    arguments = ("--needles", "96,128", "--depths", 2, "--settings", "float,KV4", "--json", file)
    output = run("eval", tiny_folder, *arguments, "--chunk", 64)
    record = json.loads(file.read_text())
    assert "of 2" in output
    assert record["needles"]["lengths"] == [96, 128]
    for row in record["results"]:
        assert [(one["length"], one["depth"]) for one in row["needles"]] == [
            (96, 0.25), (96, 0.75), (128, 0.25), (128, 0.75),
        ]  # fmt: skip
        assert all(one["word"] in WORDS and one["found"] == (one["lead"] > 0) for one in row["needles"])
        assert "perplexity" not in row
    assert [row["cache"]["k_bits"] for row in record["results"]] == [16, 4]


def leads(length, depths, **options):
    """By how many nats SmolLM2, with a cache, finds each hidden word likelier than all others."""
    model, tokenizer = smollm2()
    reader = InChunks(model, model, CacheOptions(**options), 1024, room=length)
    rows = needles(tokenizer, read_text("pydoc"), (length,), depths).measure(reader, "")["needles"]
    return torch.tensor([one["lead"] for one in rows])


@pytest.mark.slow
@pytest.mark.parametrize("length", [512, 2048])
def test_smollm2_finds_with_4_bits_what_it_finds_with_16(length):
    """All of ten words, by leads of several nats, which 4 bits hardly change. By chance it would find one."""
    plain, few = leads(length, 10, kv_bits=16), leads(length, 10)
    assert plain.min() > 4
    assert few.min() > 4
    assert (few - plain).abs().max() < 2


@pytest.mark.slow
def test_smollm2_loses_words_with_2_bits():
    """What the test above asks is not what any cache gives."""
    assert (leads(512, 10, kv_bits=2) > 0).sum() <= 6


@pytest.mark.slow
def test_smollm2_finds_nothing_that_is_not_there(monkeypatch):
    monkeypatch.setattr("quarot_fx.cli.needles.NEEDLE", "\n\nThe secret word of {name} is hidden.\n\n")
    assert (leads(512, 10, kv_bits=16) > 0).sum() <= 3
