"""The two tokenizers: a CLIP BPE in which every word of the captions is one token, and a T5 Unigram likewise."""

import json
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer, T5TokenizerFast

from .captions import vocabulary

CLIP_LENGTH = 77
PUNCTUATION = (",", ";", ".")
CLIP_START, CLIP_END = "<|startoftext|>", "<|endoftext|>"
T5_PAD, T5_END, T5_UNKNOWN = "<pad>", "</s>", "<unk>"


def build_clip_tokenizer() -> CLIPTokenizer:
    """Merge until every caption word is one token; the start and end tokens have the two highest ids."""
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    letters = [chr(code) for code in range(33, 127)]
    trainer = trainers.BpeTrainer(
        vocab_size=10_000, end_of_word_suffix="</w>", initial_alphabet=letters, show_progress=False
    )
    # Every printable character also has to exist as the last of a word, so that unknown words are spelt out.
    learner.train_from_iterator([*vocabulary(), *letters], trainer)
    learnt = json.loads(learner.to_str())["model"]
    vocab = dict(learnt["vocab"])
    vocab[CLIP_START], vocab[CLIP_END] = len(vocab), len(vocab) + 1
    merges = [tuple(pair) for pair in learnt["merges"]]
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=CLIP_LENGTH)


def build_t5_tokenizer() -> T5TokenizerFast:
    """A case-sensitive word list; words it does not know become the unknown token."""
    words = vocabulary()
    pieces = [*PUNCTUATION, *(f"▁{word}" for word in words), *(f"▁{word.capitalize()}" for word in words), "▁"]
    specials = [(T5_PAD, 0.0), (T5_END, 0.0), (T5_UNKNOWN, 0.0)]
    return T5TokenizerFast(vocab=specials + [(piece, -1.0) for piece in pieces], extra_ids=0, model_max_length=512)


def save_clip_tokenizer(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Save `tokenizer.json` and also `vocab.json` and `merges.txt`, which transformers 4 reads."""
    tokenizer.save_pretrained(folder)
    learnt = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in learnt["merges"]]
    (folder / "vocab.json").write_text(json.dumps(learnt["vocab"]))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
