"""Words hidden in long texts: a cache of 4 bits finds what a plain one finds, and one of 2 bits does not."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from models import byte_tokenizer, save_tiny_model, smollm2
from test_cli import run

from quarot_fx.cache.options import CacheOptions
from quarot_fx.cli.chunks import InChunks
from quarot_fx.cli.needles import Needles, parse_lengths
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
        answer = tokenizer.decode(one.token_ids[0, -one.answer :])
        assert text.count(f"{answer}.") == 1
        assert text.endswith(f" is{answer}")
        around = length - text.count("\n\nThe secret") * 40
        assert abs(text.index("secret") - one.depth * around) < 20
        assert answer[1:].isalpha()


def test_a_needle_is_found_if_all_of_the_answer_is_the_likeliest():
    (needle,) = needles(byte_tokenizer(), TEXT, (128,), 1).hidden(128)

    def knows(wrong):
        def model(input_ids, use_cache, logits_to_keep):
            said = input_ids[:, 1:].clone()
            said[:, list(wrong)] += 1
            one_hot = torch.nn.functional.one_hot(torch.cat((said, said[:, -1:]), dim=1) % 256, 256).float()
            return SimpleNamespace(logits=one_hot[:, -logits_to_keep:])

        return model

    assert needle.is_found_by(knows(()))
    assert needle.is_found_by(knows(range(100)))
    assert not any(needle.is_found_by(knows((-place,))) for place in range(1, needle.answer + 1))


def test_lengths():
    assert parse_lengths("64, 128") == (64, 128)
    for text in ("", "64,", "0", "a"):
        with pytest.raises(OptionError, match="write numbers of tokens"):
            parse_lengths(text)
    for length in (20, 5000):
        with pytest.raises(OptionError, match="tokens around a needle, and the text has"):
            list(needles(byte_tokenizer(), TEXT, (length,), 1).hidden(length))


def test_eval_looks_for_needles(tmp_path):
    folder, file = save_tiny_model(tmp_path / "tiny"), tmp_path / "out.json"
    arguments = ("--needles", "96,128", "--depths", 2, "--settings", "float,KV4", "--json", file)
    output = run("eval", folder, *arguments, "--chunk", 64)
    record = json.loads(file.read_text())
    assert "0 of 2" in output  # the model is random
    assert record["needles"]["lengths"] == [96, 128]
    for row in record["results"]:
        assert [(one["length"], one["depth"]) for one in row["needles"]] == [
            (96, 0.25), (96, 0.75), (128, 0.25), (128, 0.75),
        ]  # fmt: skip
        assert "perplexity" not in row
    assert [row["cache"]["k_bits"] for row in record["results"]] == [16, 4]


def found(length, depths, **options):
    """Which needles SmolLM2 finds with a cache."""
    model, tokenizer = smollm2()
    reader = InChunks(model, model, CacheOptions(**options), 1024, room=length)
    rows = needles(tokenizer, read_text("pydoc"), (length,), depths).measure(reader, "")["needles"]
    return [one["found"] for one in rows]


@pytest.mark.slow
def test_smollm2_finds_with_4_bits_what_it_finds_with_16():
    plain = found(512, 5, kv_bits=16)
    assert sum(plain) >= 3
    assert found(512, 5) == plain


@pytest.mark.slow
def test_smollm2_finds_nothing_with_2_bits():
    assert sum(found(512, 5, kv_bits=16)) == 5
    assert sum(found(512, 5, kv_bits=2)) == 0
