"""What a model is trained on: bytes of a folder of text, or the generated task "facts in a stream".

A source makes the example with a given number, always the same one. So a run that goes on after a
kill reads what it would have read, and ranks share the work by the numbers they take.
"""

from __future__ import annotations

import hashlib
import os
from bisect import bisect
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from .._command import InputError

NO_TARGET = -100  # what torch's cross entropy leaves out
SEPARATOR = 1  # begins a document, as in models/code-11m


@dataclass
class Examples:
    """Packed sequences with a target for every position that has one."""

    tokens: Tensor  # int64 [T] or [T,2]
    targets: Tensor  # int64 [T]; NO_TARGET
    cu_seqlens: Tensor  # int32 [B+1]
    max_seqlen: int
    kinds: Tensor | None = None  # int64 [T], what a position of "facts" is: see Facts
    distances: Tensor | None = None  # int64 [T], from a query back to its fact, else 0

    def target_count(self) -> Tensor:
        """int64 scalar, on the device of the targets."""
        return (self.targets != NO_TARGET).sum()

    def to(self, device: torch.device) -> Examples:
        """A copy to a GPU is enqueued, as by `moved`."""
        given = (getattr(self, field.name) for field in fields(self))
        values: list[Any] = [moved(x, device) if isinstance(x, Tensor) else x for x in given]
        return Examples(*values)


def moved(x: Tensor, device: torch.device) -> Tensor:
    """On the device; a copy to a GPU is enqueued, from pinned memory, and not waited for."""
    if x.device == device:
        return x
    return (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)


class Source(Protocol):
    vocab_size: int

    def examples(self, number: int, batch: int, context: int) -> Examples:
        """`batch` windows of `context` tokens: a pure function of the arguments and the seed."""


def read_folder(folder: str | os.PathLike) -> list[bytes]:
    """The files of a folder and those below it that are not empty, in the order of their names."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: " + ("is a file, expected a directory" if folder.exists()
                                          else "no such directory"))
    texts = [p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()]
    if not any(texts):
        raise InputError(f"{folder}: holds no text: expected files that are not empty")
    return [text for text in texts if text]


class Text:
    """Bytes of documents.

    A window holds documents in random order, the first one from a random place on, each with its
    own attention: nothing looks over the edge of a document.
    """

    vocab_size = 256

    def __init__(self, texts: list[bytes], seed: int = 0) -> None:
        begin = bytes([SEPARATOR])
        digest = hashlib.sha256()
        for text in texts:
            digest.update(len(text).to_bytes(8, "little") + text)
        self.sha256 = digest.hexdigest()  # of what is trained on, wherever it lies
        self._documents = [np.frombuffer(begin + text, np.uint8) for text in texts]
        sizes = np.array([len(d) for d in self._documents], np.float64)
        self._seed, self._chances = seed, sizes / sizes.sum()

    def examples(self, number: int, batch: int, context: int) -> Examples:
        rng = np.random.default_rng((self._seed, number))
        pieces, targets = [], []
        for _ in range(batch):
            left = context
            while left:
                whole = self._documents[rng.choice(len(self._documents), p=self._chances)]
                first = int(rng.integers(len(whole))) if left == context else 0
                piece = whole[first:first + left]
                following = whole[first + 1:first + left + 1].astype(np.int64)
                pieces.append(piece)
                targets.append(np.pad(following, (0, len(piece) - len(following)),
                                      constant_values=NO_TARGET))
                left -= len(piece)
        return packed(np.concatenate(pieces), np.concatenate(targets), [len(p) for p in pieces])


def packed(tokens: np.ndarray, targets: np.ndarray, lengths: list[int],
           **more: np.ndarray) -> Examples:
    ends = np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
    return Examples(torch.from_numpy(tokens.astype(np.int64)), torch.from_numpy(targets),
                    torch.from_numpy(ends), max(lengths),
                    **{name: torch.from_numpy(x) for name, x in more.items()})


class Facts:
    """Facts in a stream: positions that tell, ask, look back a little, or babble.

    ======  ==============  ==================================================================
    pair    (key, value)    a fact; keys are unique in a sequence; no target
    query   (key, ASK)      target: the value that the key was told with, at any distance
    local   (LOCAL, ASK)    target: the value two positions back, where there always is a fact
    filler  (state, BABBLE) target: the next state of a Markov chain that runs over the fillers
    ======  ==============  ==================================================================

    A position is two token ids whose embeddings add. Perplexity hardly feels which blocks are read;
    the answers do, by their distance.
    """

    PAIR, QUERY, LOCAL, FILLER = range(4)

    def __init__(self, seed: int = 0, keys: int = 64, values: int = 16, states: int = 8,
                 shares: tuple[float, ...] = (0.4, 0.3, 0.1, 0.2), short: int = 0) -> None:
        """shares: of pairs, queries, local items and fillers, about: what finds no fact to ask for
        is a pair, and pairs beyond the keys are queries. short: every other window of a batch holds
        sequences of so many tokens, a divisor of the context, instead of one: finding a fact is
        learned there long before it would be among thousands of tokens."""
        self._seed, self._keys, self._values, self._shares = seed, keys, values, shares
        self._short = short
        self._first_state = keys + values
        self._look = keys + values + states  # then ASK, BABBLE
        self.vocab_size = self._look + 3
        chain = np.random.default_rng((seed, 0)).dirichlet([0.3] * states, states)
        self._chain = [[*row[:-1].tolist(), np.inf] for row in chain.cumsum(1)]

    def examples(self, number: int, batch: int, context: int) -> Examples:
        rng = np.random.default_rng((self._seed, 1, number))
        lengths = []
        for window in range(batch):
            short = self._short if window % 2 else 0
            lengths += [short] * (context // short) if short else [context]
        rows = [self._sequence(rng, length) for length in lengths]
        first, second, targets, kinds, distances = np.concatenate(rows, 1)
        return packed(np.stack((first, second), 1), targets, lengths,
                      kinds=kinds, distances=distances)

    def _sequence(self, rng: np.random.Generator, length: int) -> np.ndarray:
        """int64 [5,length]: first id, second id, target, kind and distance of every position."""
        look, ask, babble = range(self._look, self._look + 3)
        keys = rng.permutation(self._keys)
        values = self._keys + rng.integers(self._values, size=length)
        kinds = self._possible(rng.choice(4, length, p=self._shares))
        luck = rng.random(length)
        pair, query, local, filler = (np.flatnonzero(kinds == kind) for kind in range(4))
        first, second = np.full(length, look), np.full(length, ask)
        targets, distances = np.full(length, NO_TARGET), np.zeros(length, np.int64)

        first[pair], second[pair] = keys[:len(pair)], values[pair]
        told = np.searchsorted(pair, query)  # facts before each query
        asked = pair[(luck[query] * told).astype(np.int64)]
        first[query], targets[query], distances[query] = first[asked], values[asked], query - asked
        targets[local] = values[local - 2]
        states = self._first_state + self._walk(int(luck[0] * len(self._chain)), luck[filler])
        first[filler], second[filler], targets[filler] = states[:-1], babble, states[1:]
        return np.stack((first, second, targets, kinds, distances))

    def _possible(self, drawn: np.ndarray) -> np.ndarray:
        """What positions are, given what they were to be: the rules of `__init__`."""
        kinds = drawn.copy()
        # Nothing can be asked for before the first fact.
        kinds[np.flatnonzero(drawn != self.FILLER)[:1]] = self.PAIR
        # Of local items two apart from each other every other one becomes the fact of the next.
        for chain in (kinds[::2], kinds[1::2]):
            place, local = np.arange(len(chain)), chain == self.LOCAL
            other = np.maximum.accumulate(np.where(local, -1, place))  # the last that is not local
            after_fact = (other >= 0) & (chain[other] == self.PAIR)
            chain[local & ((place - other) % 2 == (1 - after_fact))] = self.PAIR
        pairs = np.flatnonzero(kinds == self.PAIR)
        if len(pairs) > self._keys:  # from there on no fact can be told
            end = pairs[self._keys - 1] + 1
            kinds[end:][kinds[end:] == self.PAIR] = self.QUERY
            kinds[end + 2:][drawn[end + 2:] == self.LOCAL] = self.QUERY
        return kinds

    def _walk(self, state: int, luck: np.ndarray) -> np.ndarray:
        """int64 [n+1]: the states of the Markov chain, from `state` on."""
        states = [state]
        for x in luck.tolist():
            state = bisect(self._chain[state], x)
            states.append(state)
        return np.array(states)
