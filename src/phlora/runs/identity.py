"""What has to be the same for a run to be continued, and in plain words what is not."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

from phlora.models.fingerprint import same_fingerprints, split_fingerprint

_TRAINING = "training_config."


def changes(before: Mapping[str, Any], now: Mapping[str, Any], *, ignored: Collection[str] = ()) -> list[str]:
    """One sentence for each difference between two runs' facts that makes them different runs.

    Args:
        before: run.json of the run that is to be continued, also of an older version.
        now: the facts of the run that was asked for.
        ignored: fields of `training_config` that decide nothing; an older version has recorded some.
    """
    then, wanted = (_identity(facts, ignored) for facts in (before, now))
    differing = [name for name in sorted({*then, *wanted}) if then.get(name) != wanted.get(name)]
    if same_fingerprints(str(then.get("base model")), str(wanted.get("base model"))):
        differing = [name for name in differing if name != "base model"]
    told = {
        "data": _data,
        "peft_config": _peft,
        "base model": _base,
        "tokenizer and chat template": _template,
    }
    found: list[str] = []
    for name in differing:
        describe = told.get(name)
        found += (
            describe(before, now) if describe else [f"{name}: {_value(then, name)} -> {_value(wanted, name)}"]
        )
    return found


def _identity(facts: Mapping[str, Any], ignored: Collection[str]) -> dict[str, Any]:
    # As JSON, in which the one that is read back is.
    identity: dict[str, Any] = json.loads(json.dumps(facts.get("identity", {})))
    return {
        {"train_on": "data.train_on", "too_long": "data.too_long"}.get(name, name): value
        for name, value in identity.items()
        if name.removeprefix(_TRAINING) not in ignored or not name.startswith(_TRAINING)
    }


def _value(identity: Mapping[str, Any], name: str) -> str:
    if name not in identity:
        return "the default"
    value = identity[name]
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _data(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Which files changed, where the run recorded their contents; else how the rows are counted."""
    old, new = (facts.get("data", {}).get("contents") for facts in (before, now))
    if old and new:
        texts = []
        for file in sorted({*old, *new}):
            a, b = old.get(file), new.get(file)
            if a is None or b is None:
                texts.append(f"data: {file} is {'new' if a is None else 'no longer given'}")
            elif a != b:
                counts = (
                    f"{a['rows']:,} rows -> {b['rows']:,} rows" if a["rows"] != b["rows"] else "other rows"
                )
                texts.append(f"data: {file} has changed ({counts})")
        if texts:
            return texts
    counted = [
        "{train_rows:,} rows to train, {held_out_rows:,} held out".format_map(
            {"train_rows": 0, "held_out_rows": 0, **facts.get("data", {})}
        )
        for facts in (before, now)
    ]
    same = counted[0] == counted[1]
    return [f"data: {counted[0]}" + (", but other ones or in another order" if same else f" -> {counted[1]}")]


def _peft(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Which values of the adapter's configuration differ."""
    old, new = (
        facts.get("lora") or facts.get("config", {}).get("peft_config", {}) for facts in (before, now)
    )
    old, new = (json.loads(json.dumps(values, default=str)) for values in (old, new))
    names = sorted(name for name in {*old, *new} if old.get(name) != new.get(name))
    if "lora" not in before:
        # Of an older version only what was set is known.
        set_now = now.get("config", {}).get("peft_config", {})
        new = json.loads(json.dumps(set_now, default=str))
        names = sorted(name for name in {*old, *new} if old.get(name) != new.get(name))
    if not names:
        # The digest of an older version followed the order of a set, which differs from process to process.
        versions = _versions(before, now)
        return (
            [f"peft_config: the defaults of PEFT or Phlora are others in this version{versions}"]
            if versions
            else []
        )
    return [f"peft_config.{name}: {_value(old, name)} -> {_value(new, name)}" for name in names]


def _base(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    old, new = (facts.get("config", {}).get("model", {}).get("name") for facts in (before, now))
    if old != new:
        return [f"model.name: {old} -> {new}"]
    old, new = (facts.get("config", {}).get("model", {}).get("quantization") for facts in (before, now))
    if old != new:
        return [f"model.quantization: {old or 'none'} -> {new or 'none'}"]
    weights, others = (
        split_fingerprint(str(facts.get("identity", {}).get("base model"))) for facts in (before, now)
    )
    if weights[0] == others[0]:
        old, new = (facts.get("model", {}).get("storage") for facts in (before, now))
        return [f"model.storage_dtype: {old or 'unknown'} -> {new}"]
    return [f"model: the weights of {now.get('config', {}).get('model', {}).get('name')} are others now"]


def _template(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return ["model: its tokenizer or its chat template is another one now" + _versions(before, now)]


def _versions(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    old, new = (facts.get("environment", {}).get("packages", {}) for facts in (before, now))
    changed = [f"{name} {old[name]} -> {new[name]}" for name in old if name in new and old[name] != new[name]]
    return f" ({', '.join(changed)})" if changed else ""
