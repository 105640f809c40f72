"""Words of captions and their numbers: vocabularies, padding, word dropout, published vectors.

    vocabulary = Vocabulary.of(captions, tokenize)            # or Vocabulary.load(path, tokenize)
    tokens, lengths = vocabulary(["a dog runs", "a cat"])        # (2, 5) int64, (2,)
"""

from __future__ import annotations

import codecs
import io
import json
import pickle
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data_tools.files import existing, reading, write_whole

SPECIAL = ("<pad>", "<start>", "<end>", "<unk>")
PAD, START, END, UNKNOWN = range(4)


class Vocabulary:
    """Words to ids; <pad> 0, <start> 1, <end> 2, <unk> 3, then words as they first appear.

    `vocabulary(captions)` gives tokens (N, T) int64, padded on the right, and lengths (N,) with
    both markers.
    """

    def __init__(self, word2idx: dict[str, int], tokenize: Callable[[str], list[str]]):
        if [word2idx.get(word) for word in SPECIAL] != list(range(4)):
            raise ValueError(f"a vocabulary must map {', '.join(SPECIAL)} to 0, 1, 2, 3")
        if sorted(word2idx.values()) != list(range(len(word2idx))):
            raise ValueError(f"the ids of a vocabulary must be 0 .. {len(word2idx) - 1}, each once")
        self.word2idx, self.tokenize = word2idx, tokenize

    @classmethod
    def of(cls, captions: Iterable[str], tokenize: Callable[[str], list[str]],
           threshold: int = 4) -> Vocabulary:
        """The words that occur at least `threshold` times (published: 4)."""
        if threshold < 1:
            raise ValueError(f"threshold must be at least 1, got {threshold}")
        counts = Counter(word for caption in captions for word in tokenize(caption))
        words = [w for w, count in counts.items() if count >= threshold and w not in SPECIAL]
        return cls({word: index for index, word in enumerate((*SPECIAL, *words))}, tokenize)

    @classmethod
    def load(cls, path: str | Path, tokenize: Callable[[str], list[str]]) -> Vocabulary:
        """From JSON {word: id}, or from a pickled dict of these (nothing else is unpickled)."""
        path = existing(Path(path), "vocabulary")
        with reading(path, "a vocabulary"):
            read = json.loads if path.suffix == ".json" else _plain_pickle
            word2idx = read(path.read_bytes().removeprefix(codecs.BOM_UTF8))
            if not all(isinstance(k, str) and type(v) is int for k, v in word2idx.items()):
                raise ValueError("words must be strings, ids integers")
            return cls(word2idx, tokenize)

    def save(self, path: str | Path) -> None:
        write_whole(path, json.dumps(self.word2idx, ensure_ascii=False).encode())

    def __len__(self) -> int:
        return len(self.word2idx)

    def ids(self, caption: str) -> list[int]:
        """Ids of a caption's words, without the markers."""
        return [self.word2idx.get(word, UNKNOWN) for word in self.tokenize(caption)]

    def __call__(self, captions: Iterable[str]) -> tuple[Tensor, Tensor]:
        if isinstance(captions, str):
            raise TypeError("captions must be several strings, not one")
        return pad([self.ids(caption) for caption in captions])


class _PlainUnpickler(pickle.Unpickler):
    """Dicts, strings and numbers need no class; whatever asks for one is refused."""

    def find_class(self, module: str, name: str):
        raise ValueError(f"holds a {module}.{name}; only a dict of words and ids is read: convert "
                         "the file to JSON {word: id} where it was made")


def _plain_pickle(content: bytes):
    return _PlainUnpickler(io.BytesIO(content)).load()


def pad(ids: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Word ids of captions -> <start> words <end> padded on the right (N, T), and lengths (N,)."""
    lengths = torch.tensor([len(words) + 2 for words in ids], dtype=torch.int64)
    tokens = torch.full((len(ids), max(lengths.tolist(), default=2)), PAD)
    for row, words in zip(tokens, ids):
        row[:len(words) + 2] = torch.tensor([START, *words, END])
    return tokens, lengths


def drop_words(words: Sequence[int], probability: float, generator: torch.Generator) -> list[int]:
    """The published caption drop: words become <unk> with probability p, then int(len * p) go."""
    if not 0 <= probability <= 1:
        raise ValueError(f"probability must be in [0, 1], got {probability}")
    draws = torch.rand(len(words), generator=generator)
    words = [word if draw > probability else UNKNOWN for word, draw in zip(words, draws.tolist())]
    gone = torch.randperm(len(words), generator=generator)[:int(len(words) * probability)]
    return np.delete(words, gone.numpy()).tolist()


def read_glove(path: str | Path, words: Iterable[str], dim: int = 300,
               progress: Callable[[int], None] | None = None
               ) -> tuple[dict[str, np.ndarray], list[str]]:
    """Vectors from a GloVe or fastText file: {word: float32 (dim,)}, and the words without one.

    The file is streamed; `progress` gets the number of lines read now and then. A word that is
    missing is looked up without - . ' and, if it has a slash, as the part before it.
    """
    if isinstance(words, str) or dim < 1:
        raise ValueError(f"words must be several strings, dim at least 1; got {words!r}, {dim}")
    path, words = existing(Path(path), "file of word vectors"), list(dict.fromkeys(words))
    plain = {word: word.translate({ord(c): None for c in "-.'"}).split("/")[0] for word in words}
    wanted, found, number = {*words, *plain.values()}, {}, -1
    with open(path, encoding="utf-8-sig", errors="replace", newline="\n") as file:
        for number, line in enumerate(file):
            word, *values = line.rstrip("\r\n ").rsplit(" ", dim)  # some words contain spaces
            header = number == 0 and len(line.split()) == 2  # fastText: count, dimension
            if header and line.split()[1] == str(dim):
                continue
            try:
                if len(values) != dim or (number == 0 and " " in word):
                    raise ValueError(f"{len(line.split())} columns")
                if word in wanted and word not in found:
                    found[word] = np.array(values, dtype=np.float32)
                    if not np.isfinite(found[word]).all():
                        raise ValueError(" ".join(values))
            except ValueError as error:
                raise ValueError(f"{path}:{number + 1}: not a word and {dim} numbers; is dim "
                                 f"right? ({error})") from error
            if progress is not None and number % 100_000 == 99_999:
                progress(number + 1)
    if number < 0:
        raise ValueError(f"{path}: empty file")
    vectors = {word: found[word if word in found else plain[word]] for word in words
               if word in found or plain[word] in found}
    return vectors, [word for word in words if word not in vectors]


@torch.no_grad()
def set_word_vectors(embedding: torch.nn.Embedding, vocabulary: Vocabulary,
                     vectors: dict[str, np.ndarray]) -> None:
    """Overwrite the rows of the words that have a vector; the others keep their initial values."""
    rows, dim = embedding.weight.shape
    shapes = {np.shape(vector) for vector in vectors.values()}
    if rows != len(vocabulary) or shapes - {(dim,)}:
        raise ValueError(f"{len(vocabulary)} words with vectors of shapes {sorted(shapes)} do not "
                         f"fit an embedding of {rows} x {dim}")
    for word, vector in vectors.items():
        embedding.weight[vocabulary.word2idx[word]] = torch.from_numpy(vector).to(embedding.weight)
