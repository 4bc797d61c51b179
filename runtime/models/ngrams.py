"""Which rows of an embedding of n-grams a token reads.

Sources: transformers' Qwen4ExpTextNGramEmbedding; of DeepSeek-V4.1 the published inference/engram.py.
"""

from collections.abc import Sequence
from itertools import accumulate

from formats.config import Engrams, NGrams


def ngram_rows(ngrams: NGrams, vocab_size: int, history: Sequence[int]) -> list[list[int]]:
    """Rows [T, rows_per_token] of all tokens of a history but its first size - 1, which are there to be looked back at.

    An n-gram is a token and the n - 1 before it, where those from the last end of a text on are its token, too.
    """
    multipliers, rows = ngrams.multipliers(vocab_size), []
    for position in range(ngrams.size - 1, len(history)):
        tokens, ended = [history[position]], False
        for back in range(1, ngrams.size):
            ended = ended or history[position - back] == ngrams.eos_token_id
            tokens.append(ngrams.eos_token_id if ended else history[position - back])
        rows.append(hashed_rows(tokens, multipliers, ngrams.head_rows))
    return rows


def engram_rows(engrams: Engrams, table: int, history: Sequence[int]) -> list[list[int]]:
    """As `ngram_rows`, of the table of the nth layer that has one, which lies behind those before it.

    The history is of classes of tokens.
    """
    size, first = engrams.max_ngram_size, sum(engrams.table_rows[:table])
    multipliers, head_rows = engrams.multipliers[table], engrams.head_rows[table]
    return [
        hashed_rows(history[end - size : end][::-1], multipliers, head_rows, first)
        for end in range(size, len(history) + 1)
    ]


def hashed_rows(
    tokens: Sequence[int], multipliers: Sequence[int], head_rows: Sequence[int], first: int = 0
) -> list[int]:
    """A row of each head's own, of n-grams of two tokens and more; the tokens begin with the last.

    A hash is the exclusive or of tokens times multipliers; the remainder by a head's rows is a row of that head.
    """
    begins = list(accumulate(head_rows, initial=first))
    heads = len(head_rows) // (len(tokens) - 1)
    mixed, rows = tokens[0] * multipliers[0], []
    for back in range(1, len(tokens)):
        mixed ^= tokens[back] * multipliers[back]
        rows += [begins[head] + mixed % head_rows[head] for head in range((back - 1) * heads, back * heads)]
    return rows
