"""Encodings of published checkpoints: one file per kind (base.py is the Protocol)."""

from formats.encodings.sources.base import STORAGE, Flaw, Plane, SourceEncoding, find_flaw, stored
from formats.encodings.sources.expert_ids import ExpertIdsSource
from formats.encodings.sources.fp4 import MXFP4Source, NVFP4Source
from formats.encodings.sources.fp8 import FP8Source, MXFP8Source
from formats.encodings.sources.ggml import GGMLSource
from formats.encodings.sources.gptq import AWQSource, GPTQSource
from formats.encodings.sources.mlx import MLXAffineSource
from formats.encodings.sources.packed import Int8Source, PackedSource
from formats.encodings.sources.plain import PlainSource

__all__ = [
    "STORAGE",
    "AWQSource",
    "ExpertIdsSource",
    "FP8Source",
    "Flaw",
    "GGMLSource",
    "GPTQSource",
    "Int8Source",
    "MLXAffineSource",
    "MXFP4Source",
    "MXFP8Source",
    "NVFP4Source",
    "PackedSource",
    "PlainSource",
    "Plane",
    "SourceEncoding",
    "find_flaw",
    "stored",
]
