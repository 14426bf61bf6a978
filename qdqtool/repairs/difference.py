"""How two recipes differ, as TOML that can be pasted into the first."""

from __future__ import annotations

from typing import Any

from qdqtool.recipe import Recipe


def difference(before: Recipe, after: Recipe) -> str:
    """The fields of ``after`` that differ, as TOML; what is only taken out stands in comments. "" where none differs.

    A list, and an override of a tensor or of nodes, is given whole: it takes the place of the old one.
    """
    import tomli_w

    old, new = before.values(), after.values()
    table: dict[str, Any] = {}
    gone: list[str] = []
    for name in dict.fromkeys([*old, *new]):
        was, is_now = old.get(name), new.get(name)
        if was == is_now:
            continue
        if name in ("tensors", "nodes"):
            was, is_now = was or {}, is_now or {}
            table |= {name: {key: one for key, one in is_now.items() if was.get(key) != one}}
            gone += [f"{name}.{key!r}" for key in was if key not in is_now]
            gone += [
                f"{name}.{key!r}.{one}"
                for key in was.keys() & is_now.keys()
                for one in was[key].keys() - is_now[key].keys()
            ]
        elif is_now is None:
            gone.append(f"{name} (its default: {getattr(Recipe(), name)!r})")
        else:
            table[name] = is_now
    lines = [f"# taken out: {one}\n" for one in sorted(gone)]
    return "".join(lines) + tomli_w.dumps({name: value for name, value in table.items() if value != {}})
