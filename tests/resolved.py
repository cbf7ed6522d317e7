"""Values of all named configurations that differ from the default's, by dotted path.

After an intended change: `python -m tests.resolved > tests/golden/configurations.json`.
"""

import json
from typing import Any

from hnet.fields import to_json
from hnet.train.named import base_config, named_configs


def resolved() -> dict[str, dict[str, Any]]:
    """For each name, what its configuration sets differently from `default`; null: not there."""
    default = flat(to_json(base_config("default")))
    found = {}
    for name in sorted(named_configs()):
        own = flat(to_json(base_config(name)))
        paths = sorted(p for p in {*own, *default} if own.get(p) != default.get(p))
        found[name] = {path: own.get(path) for path in paths}
    return {"default": default} | {name: f for name, f in found.items() if name != "default"}


def flat(content: Any, path: str = "") -> dict[str, Any]:
    """Leaves of JSON content by dotted path; an empty object or list is a leaf."""
    if not isinstance(content, dict | list) or not content:
        return {path: content}
    items = content.items() if isinstance(content, dict) else enumerate(content)
    return {
        p: value
        for key, item in items
        for p, value in flat(item, f"{path}.{key}".strip(".")).items()
    }


if __name__ == "__main__":
    print(json.dumps(resolved(), indent=1, ensure_ascii=False))
