"""Well-known models by name: their geometry as facts of config.json, so that no network is needed to plan them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from repack.rehearse import Geometry, geometry

_TABLE = Path(__file__).with_name("known_models.json")
# `org/name` on the hub -> the keys of its config.json that decide the geometry and the mathematics.
KNOWN_MODELS: Mapping[str, Mapping[str, Any]] = json.loads(_TABLE.read_text(encoding="utf-8"))


def known_geometry(name: str) -> Geometry:
    """The geometry of a model of the table, in bf16."""
    return geometry({"config.json": json.dumps(KNOWN_MODELS[name]).encode()}, name)
