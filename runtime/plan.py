"""What a container needs in memory, what this machine grants, and what to give it: `stream-run plan`."""

from dataclasses import asdict
from typing import Any

from formats.budget import MIN_SLOTS, MemoryTerms, human, largest_record_bytes, token_bytes
from formats.config import LongRope, ModelConfig
from formats.layout import Layout


def memory_plan(layout: Layout, terms: MemoryTerms, granted_bytes: int) -> dict[str, Any]:
    """Terms, floor and recommendation as plain numbers.

    More than all experts' slots is of no use, and more than the machine grants would be swapped or killed: the
    recommendation is the lesser of both, and the floor where that is more than is granted.
    """
    every = sum(layer.num_experts for _, layer in layout.moe_layers())
    all_bytes = terms.floor_bytes + (every - MIN_SLOTS) * largest_record_bytes(layout)
    recommended = max(terms.floor_bytes, min(granted_bytes, all_bytes))
    slots = terms.slots(layout, recommended)
    return {
        "terms": asdict(terms),
        "floor_bytes": terms.floor_bytes,
        "all_experts_bytes": all_bytes,
        "granted_bytes": granted_bytes,
        "recommended_ram_bytes": recommended,
        "slots": slots,
        "experts": every,
        "record_bytes": largest_record_bytes(layout),
        "token_bytes": asdict(token_bytes(layout)),
        "fits": granted_bytes >= terms.floor_bytes,
    }


def position_factors(model: ModelConfig, ctx_size: int) -> str | None:
    """Which of LongRoPE's factors a run whose context has room for so many tokens turns by; None without them."""
    scaling = model.rope_scaling
    if not isinstance(scaling, LongRope):
        return None
    original = scaling.original_max_position_embeddings
    length, side = ("long", "beyond") if scaling.is_long(ctx_size) else ("short", "within")
    return f"{length}_factor, as --ctx-size {ctx_size} is {side} original_max_position_embeddings {original}"


def plan_text(plan: dict[str, Any]) -> str:
    """The plan as a table."""
    rows = [(name.removesuffix("_bytes"), human(nbytes)) for name, nbytes in plan["terms"].items()]
    enough = -(-plan["recommended_ram_bytes"] // (1 << 20))
    rows += [
        ("floor", f"{human(plan['floor_bytes'])}, the least --ram"),
        ("all experts", f"{human(plan['all_experts_bytes'])}, more is of no use"),
        ("granted", f"{human(plan['granted_bytes'])}, most of what this machine and its memory groups have free"),
        (
            "recommended",
            f"--ram {enough}MiB" if plan["fits"] else "does not fit here",
        ),
        ("cached", f"{plan['slots']} of {plan['experts']} experts, {100 * plan['slots'] / plan['experts']:.3g} %"),
        ("a token uses", f"{human(plan['token_bytes']['expert_bytes'])} of experts"),
    ]
    if plan.get("position_factors"):
        rows.append(("positions", plan["position_factors"]))
    return "\n".join(f"{name:14} {value}" for name, value in rows)
