"""A tokenizer of Hugging Face, trained on the spot."""

from pathlib import Path
from typing import Any

SENTENCES = ("a photo of a cat", "two dogs on a beach", "a ripe banana", "the lemon is yellow and sour")


def train_tokenizer(folder: Path, *, extra: int = 0) -> int:
    """Train a small tokenizer, save it in the folder, and return its number of tokens.

    extra: tokens that are added to those learned.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer: Any = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<pad>", "</s>", "<unk>", *(f"<extra{number}>" for number in range(extra))]
    trainer = trainers.UnigramTrainer(vocab_size=100, special_tokens=special, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(SENTENCES * 20, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    kind: Any = PreTrainedTokenizerFast  # its constructor has no types
    fast = kind(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(folder)
    return len(fast)
