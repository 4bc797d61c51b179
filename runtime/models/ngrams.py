"""Which rows of an embedding of n-grams a token reads (source: transformers' Qwen4ExpTextNGramEmbedding)."""

from collections.abc import Sequence
from itertools import accumulate

from formats.config import NGrams


def ngram_rows(ngrams: NGrams, vocab_size: int, history: Sequence[int]) -> list[list[int]]:
    """Rows [T, rows_per_token] of all tokens of a history but its first size - 1, which are there to be looked back at.

    An n-gram is a token and the n - 1 before it, where those from the last end of a text on are its token, too. Its
    hash is the exclusive or of tokens times multipliers; the remainder by a head's rows is a row of that head.
    """
    multipliers = ngrams.multipliers(vocab_size)
    begins = list(accumulate(ngrams.head_rows, initial=0))
    rows = []
    for position in range(ngrams.size - 1, len(history)):
        mixed, ended = history[position] * multipliers[0], False
        found: list[int] = []
        for back in range(1, ngrams.size):
            token = history[position - back]
            ended = ended or token == ngrams.eos_token_id
            mixed ^= (ngrams.eos_token_id if ended else token) * multipliers[back]
            heads = range((back - 1) * ngrams.heads, back * ngrams.heads)
            found += [begins[head] + mixed % ngrams.head_rows[head] for head in heads]
        rows.append(found)
    return rows
