"""The characters that stand for bytes in byte-level vocabularies (GPT-2's bytes_to_unicode)."""

_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = sorted({*range(256)} - {*_PRINTABLE})
BYTE_OF = {chr(byte): byte for byte in _PRINTABLE} | {chr(256 + i): byte for i, byte in enumerate(_OTHERS)}
_CHARACTER_OF = {byte: character for character, byte in BYTE_OF.items()}


def byte_level(raw: bytes) -> str:
    """Bytes as a byte-level vocabulary spells them."""
    return "".join(_CHARACTER_OF[byte] for byte in raw)
