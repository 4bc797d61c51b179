"""What the container of a model must hold: the tensors and experts that its facts imply, in their shapes."""

from collections.abc import Sequence

from formats.errors import FormatError
from formats.families import FAMILIES
from formats.family import LM_HEAD
from formats.fields import shown
from formats.layout import Layout
from formats.record import Part


def check_layout(layout: Layout, where: str) -> None:
    """Raises FormatError naming file, tensor or layer, found and expected."""
    _check_resident(layout, where)
    model, family = layout.model, FAMILIES[layout.model.model_type]
    inner, outer = model.moe_intermediate_size, model.expert_hidden_size
    has_bias = bool(family.expert_layouts[0][0].bias)
    for i, layer in enumerate(layout.layers):
        if (layer is not None) != model.has_experts(i):
            found, expected = ("no experts", "some") if layer is None else ("experts", "none, as it is dense")
            raise FormatError(f"{where}: layers[{i}] has {found}, expected {expected}")
        if layer is not None:
            _check_parts(layer.record.parts, inner, outer, has_bias, f"{where}: layers[{i}].parts")


def _check_resident(layout: Layout, where: str) -> None:
    model, family, found = layout.model, FAMILIES[layout.model.model_type], layout.tensors
    for i, kind in enumerate(model.layer_types):
        if kind not in family.mixers:
            raise FormatError(f"{where}: model.layer_types[{i}] is {shown(kind)}, which {model.model_type} has not")
    expected = {at + tensor.name: family.stored_shape(tensor, model) for at, tensor in family.resident(model)}
    expected[LM_HEAD.name] = family.stored_shape(LM_HEAD, model)
    for name, shape in expected.items():
        if name not in found:
            raise FormatError(f"{where}: resident.tensors lacks {name}, which {model.model_type} has as {list(shape)}")
        if found[name].shape != shape:
            raise FormatError(
                f"{where}: resident.tensors: {name} is {list(found[name].shape)}, expected {list(shape)} by model"
            )
    for name in found:
        if name not in expected:
            raise FormatError(f"{where}: resident.tensors holds {shown(name)}, which this {model.model_type} has not")


def _check_parts(parts: Sequence[Part], inner: int, outer: int, has_bias: bool, where: str) -> None:
    """gate, if there is one, and up are [inner, outer], down is [outer, inner]."""
    for part in parts:
        shape = (outer, inner) if part.name == "down" else (inner, outer)
        if (part.rows, part.columns) != shape:
            raise FormatError(f"{where}: {part.name} is [{part.rows}, {part.columns}], expected {list(shape)}")
        if (part.linear_bias is not None) != has_bias:
            expected = "a dtype" if has_bias else "null"
            raise FormatError(f"{where}: {part.name} has linear_bias {part.linear_bias}, expected {expected}")
