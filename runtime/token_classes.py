"""Which tokens are one to an embedding of n-grams: those whose texts differ in case, accents or blanks alone.

Source: build_compressed_token_map of DeepSeek-V4.1's published inference/engram.py.
"""

from collections.abc import Callable, Sequence

from tokenizers import Regex, Tokenizer, normalizers

from formats.config import ModelConfig
from formats.errors import FormatError
from formats.tokenizer import tokenizer_errors

BLANK = "\ue000"  # stands for a token that is nothing but blanks while those around words are cut
REPLACEMENT = "\ufffd"  # in the text of a part of a character


def token_classes(config: ModelConfig, tokenizer: Callable[[], Tokenizer], made_up: bool = False) -> Sequence[int]:
    """The class of every token of a tokenizer, which is not asked for where each token is its own, or all is made up.

    Empty without classes. Raises FormatError where there are other numbers of classes than config.json says:
    hashes follow from it.
    """
    number = config.token_classes
    if number in (0, config.vocab_size):
        return range(number)
    if made_up:  # a rehearsal, which may have the tokenizer of another model
        return [token_id % number for token_id in range(config.vocab_size)]
    classes = _classes(tokenizer())
    found = max(classes, default=-1) + 1
    if found != number:
        raise FormatError(f"tokenizer.json: tokens are of {found} classes, config.json says {number}")
    return classes


def _classes(tokenizer: Tokenizer) -> list[int]:
    """Numbered as they come."""
    alike = normalizers.Sequence(
        [
            normalizers.NFKC(),
            normalizers.NFD(),
            normalizers.StripAccents(),
            normalizers.Lowercase(),
            normalizers.Replace(Regex(r"[ \t\r\n]+"), " "),
            normalizers.Replace(Regex(r"^ $"), BLANK),
            normalizers.Strip(),
            normalizers.Replace(BLANK, " "),
        ]
    )
    numbers: dict[str | None, int] = {}
    classes = []
    with tokenizer_errors():
        for token_id in range(tokenizer.get_vocab_size(with_added_tokens=True)):
            text = tokenizer.decode([token_id], skip_special_tokens=False)
            key = tokenizer.id_to_token(token_id) if REPLACEMENT in text else alike.normalize_str(text) or text
            classes.append(numbers.setdefault(key, len(numbers)))
    return classes
