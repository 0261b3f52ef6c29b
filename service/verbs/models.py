"""Verbs about trained models."""

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from service.console import Console


def register(args: argparse.Namespace, rest: list[str], console: "Console") -> dict[str, Any]:
    """Make a run's best checkpoint a version of a model."""
    from service import models

    result = models.register(args.run, args.storage, args.name)
    console.plan(result)
    return result


def promote(args: argparse.Namespace, rest: list[str], console: "Console") -> dict[str, Any]:
    """Move the alias champion, if the gate lets it."""
    from service import gate, models

    floor, floors = _floors(args.floor or [])
    rules = gate.Rules(args.margin, floor, floors, args.floor_metric, args.new_data)
    result = models.promote(args.name, args.version, args.storage, rules)
    console.plan(result)
    if not result["promote/promoted"]:
        console.error_panel(
            f"version {args.version} of {args.name} is not promoted: {result['promote/reason']}"
        )
    return result


def _floors(words: list[str]) -> tuple[float | None, dict[str, float]]:
    """`0.2`, for all modalities, and `audio=0.3`."""
    from service.config import ConfigError

    general, single = None, {}
    for word in words:
        name, _, value = word.rpartition("=")
        try:
            number = float(value)
        except ValueError:
            raise ConfigError(
                f"--floor {word} must be a number, or NAME=NUMBER, as in --floor 0.2 audio=0.3"
            ) from None
        if name:
            single[name] = number
        else:
            general = number
    return general, single


def predict(args: argparse.Namespace, rest: list[str], console: "Console") -> dict[str, Any]:
    """Run a model over raw files or shards."""
    from service.config import ScalingConfig
    from service.prediction import predict

    with console.counter("predicting") as progress:
        result = predict(
            args.model,
            args.input,
            args.output,
            storage=args.storage,
            split=args.split,
            scaling=ScalingConfig(num_workers=args.workers, device=args.device),
            conflict=args.conflict,
            progress=progress,
            debug=args.debug,
        )
    console.plan(result)
    return result


def export(args: argparse.Namespace, rest: list[str], console: "Console") -> dict[str, Any]:
    """Write a model as a graph."""
    from service.export import export

    result = export(args.model, args.output, args.storage)
    console.plan(result)
    return result
