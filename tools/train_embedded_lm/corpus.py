"""The corpus of the embedded model as tokens: tokenizer, packed streams and windows."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"

# A line break takes the indentation after it, so that the start of a line is one token; a word
# takes the space, dot or underscore before it.
PIECES = r"\n+[ ]*|[ ._]?\p{L}+|[ ]?\p{N}{1,3}|[ ]?[^\s\p{L}\p{N}]+|[^\S\n]+|\s+"


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE: every string round-trips, there is no unknown token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=24,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def load_or_train_tokenizer(path: Path, texts: Sequence[str], vocab_size: int) -> Tokenizer:
    if path.exists():
        return Tokenizer.from_file(str(path))
    tokenizer = train_tokenizer(texts, vocab_size)
    tokenizer.save(str(path))
    return tokenizer


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[np.ndarray]:
    """One array of token ids a document, each starting with END_OF_TEXT."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    return [
        np.array([end, *encoding.ids], dtype=np.int64)
        for encoding in tokenizer.encode_batch(list(texts))
    ]


class PackedStream:
    """Windows of a packed stream of documents, reshuffled every epoch.

    Each epoch puts the documents into a new order and starts the windows at a new offset, so
    that a later epoch shows a token with another past.
    """

    def __init__(self, documents: Sequence[np.ndarray], context: int, seed: int, taken: int = 0):
        """`taken` windows are passed over: where a run that goes on left off."""
        self.documents = documents
        self.context = context
        self.rng = np.random.default_rng(seed)
        self.epoch = 0
        self._windows = self._pack()
        for _ in range(taken):
            next(self._windows)

    @property
    def n_tokens(self) -> int:
        return sum(len(d) for d in self.documents)

    def _pack(self) -> Iterator[np.ndarray]:
        while True:
            order = self.rng.permutation(len(self.documents))
            stream = np.concatenate([self.documents[i] for i in order])
            offset = int(self.rng.integers(self.context))
            count = (len(stream) - offset - 1) // self.context
            for i in self.rng.permutation(count):
                start = offset + int(i) * self.context
                yield stream[start : start + self.context + 1]
            self.epoch += 1

    def take(self, count: int) -> list[np.ndarray]:
        return [next(self._windows) for _ in range(count)]


def batch(windows: Sequence[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets, each [len(windows), context]."""
    tokens = torch.from_numpy(np.stack(windows))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def held_out_windows(
    document: np.ndarray, context: int, stride: int
) -> Iterator[tuple[np.ndarray, int]]:
    """Windows that score every token of a document once: `(tokens, first scored target)`.

    With `stride == context` the windows do not overlap; with a smaller one each scored token
    has at least `context - stride` tokens of its document before it.
    """
    scored = 1  # the leading END_OF_TEXT is given, not scored
    start = 0
    while scored < len(document):
        window = document[start : start + context + 1]
        yield window, scored - start - 1
        scored = start + len(window)
        start += stride
