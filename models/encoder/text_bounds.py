"""Tokenizing at a bounded cost: what the tokens of a text cannot show is cut before any work.

open_clip's own tokenizer cleans and splits a whole text before it cuts the tokens, takes n² steps
to split a word of n letters, and remembers every word for ever.

The tokens equal open_clip's, with two exceptions:

- a run of letters of more than MAX_WORD_BYTES bytes gets the tokens of its first MAX_WORD_BYTES
  alone, which differ where they do not fill the context length;
- a text of more than `BoundedTokenizer.max_characters` characters gets the tokens of its beginning,
  which differ where that does not fill the context length: long words, and what cleaning removes.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

__all__ = ["BoundedTokenizer"]

# The longest token of CLIP's vocabulary has 32 characters.
CHARACTERS_PER_TOKEN = 48
MIN_CHARACTERS = 4096
# Words of a language are shorter. A longer run of letters gets the tokens of its beginning, which
# are more than a text of 77 tokens holds unless the run is one letter over and over.
MAX_WORD_BYTES = 256
CACHED_WORDS = 2**15  # of at most CACHED_CHARACTERS: 32 MB at the worst
CACHED_CHARACTERS = 32


class BoundedTokenizer:
    """A tokenizer of open_clip whose work on one text is bounded.

    The tokens are those of open_clip but for very long words and texts (see the module).

    tokenizer: any of open_clip's.  context_length: L.  Texts are cut at `max_characters`, white
    space counted once. Used from several threads at once.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.context_length = int(tokenizer([""]).shape[1])
        self.max_characters = max(MIN_CHARACTERS, CHARACTERS_PER_TOKEN * self.context_length)
        self._tokenizer = tokenizer
        words = hasattr(tokenizer, "bpe") and tokenizer.reduction_fn is None  # CLIP's own, SimpleTokenizer
        self._split: Callable[[str], Sequence[int]] | None = _word_splitter(tokenizer) if words else None

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """(B, L) int64, cut at the context length.

        A lone surrogate becomes a "?", because tokenizers fail on it.
        """
        bounded = [self._bound(text.encode("utf-8", "replace").decode()) for text in texts]
        if self._split is None:
            tokens: np.ndarray = self._tokenizer(bounded).numpy()
            return tokens
        tokens = np.zeros((len(texts), self.context_length), np.int64)
        for row, text in zip(tokens, bounded, strict=True):
            found = self._encode(text)
            row[: len(found)] = found
        return tokens

    def _bound(self, text: str) -> str:
        if len(text) <= self.max_characters:
            return text
        return " ".join(text[: 16 * self.max_characters].split())[: self.max_characters]

    def _encode(self, text: str) -> list[int]:
        """As SimpleTokenizer: the start, the tokens of each word, the end; at most L."""
        own = self._tokenizer
        tokens = [own.sot_token_id]
        for word in own.pat.finditer(own.clean_fn(text)):
            tokens.extend(self._split(word.group()[:MAX_WORD_BYTES]))  # type: ignore[misc]  # not None here
            if len(tokens) >= self.context_length:
                break
        return [*tokens[: self.context_length - 1], own.eot_token_id]


def _word_splitter(tokenizer: Any) -> Callable[[str], Sequence[int]]:
    """The tokens of one word, by a cache of bounded size in place of the tokenizer's own."""

    class NoCache(dict[str, str]):
        def __setitem__(self, word: str, pieces: str) -> None:
            """Keep the special tokens alone."""

    tokenizer.cache = NoCache(tokenizer.cache)

    def split(word: str) -> Sequence[int]:
        symbols = "".join(tokenizer.byte_encoder[byte] for byte in word.encode("utf-8")[:MAX_WORD_BYTES])
        return tuple(tokenizer.encoder[piece] for piece in tokenizer.bpe(symbols).split(" "))

    remembered = lru_cache(CACHED_WORDS)(split)
    return lambda word: remembered(word) if len(word) <= CACHED_CHARACTERS else split(word)
