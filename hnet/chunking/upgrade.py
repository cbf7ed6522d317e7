"""Conversion of a model's configuration of earlier versions to the current fields."""

from typing import Any

_RENAMED = {"given": "external", "scatter": "at_boundaries"}


def up_to_date(model: Any) -> None:
    """Convert the JSON content of a model to the current fields, in place."""
    if not isinstance(model, dict):
        return
    compute = model.get("compute")
    shards = compute.get("batch_shards") if isinstance(compute, dict) else None
    if isinstance(shards, int | float) and shards in range(1, 2**20):
        compute.pop("batch_shards")  # it repeated the mesh
    stages = model.get("stages")
    for stage in stages if isinstance(stages, list) else ():
        chunking = stage.get("chunking") if isinstance(stage, dict) else None
        if isinstance(chunking, dict) and "router" in chunking:
            stage["chunking"] = in_parts(chunking)


def in_parts(old: dict[str, Any]) -> dict[str, Any]:
    """JSON content of a `ChunkingConfig` from that of a version with a field `router`.

    Fields that a part does not have (the temperature of a rule) had no effect and are dropped.
    """
    kept = ("target_ratio", "alignment", "residual", "hold_rate", "routes", "routed_parameters",
            "route_target_ratios")  # fmt: skip
    new = {name: old[name] for name in kept if name in old}

    def part(field: str, default: str) -> dict[str, Any]:
        name = old.get(field, default)
        return {"name": _RENAMED.get(name, name)}

    new["predictor"] = part("router", "cosine")
    if new["predictor"]["name"] == "mlp":
        new["predictor"] |= {
            "width": old.get("mlp_width", 0),
            "temperature": old.get("temperature", 0.5),
            "straight_through": old.get("sample", "relaxed") == "relaxed",
            "reference_noise_at_evaluation": old.get("reference_noise_at_evaluation", False),
        }
    new["pool"], new["dechunk"] = part("pool", "select"), part("dechunk", "ema")
    loss = part("aux_loss", "ratio")
    loss |= {
        "weight": old.get("aux_loss_weight", 0.03),
        "average": old.get("aux_average", "positions"),
    }
    match loss["name"]:
        case "none":
            new["losses"] = []
            return new
        case "hinge":
            loss["band"] = old.get("hinge_band", 0.2)
        case "bce":
            loss["labels"] = old.get("labels", "entropy")
            loss["reference_double_sigmoid"] = old.get("reference_double_sigmoid", False)
        case "ratio" | "binomial":
            pass
        case _:
            pass  # unknown name: reading the result raises an error that names it
    new["losses"] = [loss]
    return new
