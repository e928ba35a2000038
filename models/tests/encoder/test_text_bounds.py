"""Bounded tokenizing gives open_clip's tokens, at a cost that no text can raise."""

import random
import string
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from open_clip.tokenizer import SimpleTokenizer

from models.encoder import text_bounds
from models.encoder.text_bounds import BoundedTokenizer

RANDOM = random.Random(5)
LETTERS = "".join(RANDOM.choice(string.ascii_lowercase) for _ in range(12_000))
TEXTS = [
    "",
    " ",
    "a photo of a banana.",
    "A  Photo\n\tof — a ‘naïve’ café &amp; crème brûlée (1,99 €)!!!",
    "<start_of_text> hidden <end_of_text> marks",
    "don't we'll they've 2026 ½ ²",
    "Ein Donaudampfschifffahrtsgesellschaftskapitän " * 30,
    "日本語の長い文章には空白がありません。" * 12,
    "Ã©tÃ© mojibake &lt;b&gt; &amp;amp;",
    "🍌🥝" * 60,
    "one two three " * 500,
    "\ud800 surrogate",
    "word" + " " * 9000 + "far",
    LETTERS[:200],
]


@pytest.fixture(scope="module")
def own() -> SimpleTokenizer:
    return SimpleTokenizer()


@pytest.fixture
def bounded() -> BoundedTokenizer:
    return BoundedTokenizer(SimpleTokenizer())


def test_tokens_equal_those_of_open_clip(own: SimpleTokenizer, bounded: BoundedTokenizer) -> None:
    expected = own([text.encode("utf-8", "replace").decode() for text in TEXTS]).numpy()
    np.testing.assert_array_equal(bounded(TEXTS), expected)
    assert bounded(TEXTS).dtype == np.int64
    assert bounded([]).shape == (0, 77)


def test_of_longer_words_and_texts_the_beginning_counts(own: SimpleTokenizer, bounded: BoundedTokenizer) -> None:
    word, text = "a" * 300, "\x08" * 4100 + "far"  # cleaning removes control characters
    assert len(text) > bounded.max_characters
    np.testing.assert_array_equal(bounded([word]), own([word[: text_bounds.MAX_WORD_BYTES]]).numpy())
    np.testing.assert_array_equal(bounded([text]), own([text[: bounded.max_characters]]).numpy())
    assert (bounded([word]) != own([word]).numpy()).any()
    assert (bounded([text]) != own([text]).numpy()).any()


class Counting:
    """Counts the symbols that a tokenizer is given to merge."""

    def __init__(self, tokenizer: Any) -> None:
        self._bpe, self.symbols = tokenizer.bpe, list[int]()
        tokenizer.bpe = self

    def __call__(self, symbols: str) -> str:
        self.symbols.append(len(symbols))
        return str(self._bpe(symbols))


def hostile() -> Iterator[str]:
    yield LETTERS
    yield " ".join(LETTERS[i : i + 300] for i in range(0, 12_000, 300))
    yield "~" * 90_000
    yield "é" * 90_000
    yield "字" * 50_000
    yield " ".join(RANDOM.choice(string.ascii_letters) for _ in range(40_000))


@pytest.mark.parametrize("text", list(hostile()))
def test_a_hostile_text_costs_a_few_short_words(text: str) -> None:
    tokenizer = SimpleTokenizer()
    bounded, counting = BoundedTokenizer(tokenizer), Counting(tokenizer)
    seen: list[int] = []
    clean = tokenizer.clean_fn

    def watched(given: str) -> str:
        seen.append(len(given))
        return str(clean(given))

    tokenizer.clean_fn = watched
    assert bounded([text]).shape == (1, 77)
    assert max(seen) <= 4096
    assert max(counting.symbols) <= 256
    assert sum(counting.symbols) <= 77 * 32 + 256


def test_the_words_that_are_remembered_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_bounds, "CACHED_WORDS", 100)
    tokenizer = SimpleTokenizer()
    bounded = BoundedTokenizer(tokenizer)
    counting, remembered = Counting(tokenizer), len(tokenizer.cache)
    words = [f"{a}{b}{c}" for a in "bcdfghk" for b in "aeiou" for c in "lmnprst"]
    for _ in range(2):
        bounded([" ".join(words[i : i + 20]) for i in range(0, len(words), 20)])
    assert len(counting.symbols) == 2 * len(words)  # 245 words do not fit into 100
    bounded([words[-1]] * 50)
    assert len(counting.symbols) == 2 * len(words)
    bounded([LETTERS[:100]] * 2)  # a long word is split anew
    assert len(counting.symbols) == 2 * len(words) + 2
    assert len(tokenizer.cache) == remembered


def test_other_tokenizers_are_given_bounded_texts() -> None:
    class Whole:
        """As the Hugging Face tokenizers of open_clip: texts in, a tensor out."""

        given: list[str]

        def __call__(self, texts: list[str]) -> Any:
            import torch

            self.given = texts
            return torch.ones(len(texts), 64, dtype=torch.long)

    whole = Whole()
    bounded = BoundedTokenizer(whole)
    assert bounded.context_length == 64
    assert bounded([LETTERS, "\ud800", "short"]).shape == (3, 64)
    assert [len(text) for text in whole.given] == [4096, 1, 5]
