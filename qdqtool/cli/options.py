"""The command line's vocabulary: grouped help with examples, values as typed, and options that become a recipe."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

if TYPE_CHECKING:
    from qdqtool.recipe import Recipe

PROVIDERS: Final = ("auto", "cpu", "cuda", "tensorrt")
ENGINES: Final = ("local", "ray")
Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


class Option(click.Option):
    """An option that belongs to a section of the help page."""

    def __init__(self, *args: Any, section: str = "Options", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.section = section


class Command(click.Command):
    """A command whose help page groups options by section and ends in examples."""

    def __init__(self, *args: Any, examples: Sequence[str] = (), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.examples = examples

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write one table for each section, in the order the options were declared."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and isinstance(parameter, click.Option):
                sections.setdefault(getattr(parameter, "section", "Options"), []).append(record)
        for title, rows in sections.items():
            with formatter.section(title):
                formatter.write_dl(rows, col_max=34)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples, one a line and never wrapped."""
        if self.examples:
            with formatter.section("Examples"):
                formatter.write("".join(f"  {example}\n" for example in self.examples))


class Main(click.Group):
    """Turns the tool's own errors and Ctrl-C into one message and an exit status."""

    command_class = Command

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order of their declaration."""
        return [*self.commands]

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; exit with 1 where a gate failed, 2 for the tool's other errors, 130 on Ctrl-C."""
        from qdqtool.errors import GateError, QdqError

        try:
            return super().invoke(ctx)
        except QdqError as error:
            click.secho("error: ", fg="red", bold=True, nl=False, err=True)
            click.echo(str(error), err=True)
            ctx.exit(1 if isinstance(error, GateError) else 2)
        except KeyboardInterrupt:
            click.echo("\ninterrupted", err=True)
            ctx.exit(130)


class Assignment(click.ParamType[tuple[str, object]]):
    """``FIELD=VALUE`` as a pair; the value is read as TOML where it is a TOML number, boolean, string or array."""

    name = "FIELD=VALUE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, object]:
        """Split and read one assignment."""
        field, equals, text = str(value).partition("=")
        if not equals or not field.strip():
            self.fail(f"{value!r} is not FIELD=VALUE, as in percentile=99.99", param, ctx)
        return field.strip(), parse_value(text.strip())


class NamedOverride(click.ParamType[tuple[str, dict[str, object]]]):
    """``NAME:FIELD=VALUE,FIELD=VALUE`` as a pair of the name and its fields."""

    def __init__(self, what: str) -> None:
        self.name = f"{what}:FIELD=VALUE,..."

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, dict[str, object]]:
        """Split at the last colon (a regular expression may hold others), then at commas outside of brackets."""
        name, colon, text = str(value).rpartition(":")
        if not colon or not name:
            self.fail(f"{value!r} is not NAME:FIELD=VALUE, as in logits:dtype=int16,symmetric=true", param, ctx)
        items = re.split(r",(?![^\[]*\])", text)
        return name, dict(Assignment().convert(item, param, ctx) for item in items)


def parse_value(text: str) -> object:
    """A TOML number, boolean, string or array; any other text as it stands."""
    try:
        found = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    value = found["value"]
    return value if len(found) == 1 and isinstance(value, bool | int | float | str | list) else text


def options(*declared: Decorator) -> Decorator:
    """Several option decorators as one; the help page lists them in this order."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for decorator in reversed(declared):
            command = decorator(command)
        return command

    return decorate


option = partial(click.option, cls=Option)
_choice = partial(option, section="What to quantize and how")
_names = partial(option, section="Nodes and tensors")

PROVIDER: Final = option(
    "--provider", type=click.Choice(PROVIDERS), default="auto", help="Where models run meanwhile. [default: auto]"
)
REPORT: Final = option(
    "--report",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Write the result there as report.json and report.html.",
)
RUN_OPTIONS: Final = options(
    PROVIDER,
    option("--json", "as_json", is_flag=True, help="Print JSON alone on stdout, all else on stderr."),
    option("-q", "--quiet", is_flag=True, help="Print warnings and errors only."),
)

_observing = partial(option, section="How to observe (the result is the same)")
OBSERVE_OPTIONS: Final = options(
    _observing("--memory", metavar="SIZE", help="For observed activations, as in 4GB. [default: half of the memory]"),
    _observing("--engine", type=click.Choice(ENGINES), default="local", help="[default: local]"),
    _observing("--address", metavar="ADDRESS", help="Of a Ray cluster, or auto. [default: start Ray here]"),
    _observing("--cache/--no-cache", default=True, help="Keep statistics between runs. [default: yes]"),
)


def observing(given: dict[str, Any]) -> dict[str, Any]:
    """What :data:`OBSERVE_OPTIONS` gave, as the API takes it."""
    engine = None
    if given["engine"] == "ray":
        from qdqtool.observation.engine_ray import Ray

        engine = Ray(given["address"])
    elif given["address"] is not None:
        raise click.UsageError("--address is of a Ray cluster; give --engine ray too.")
    return {"memory": given["memory"], "engine": engine, "cache": given["cache"]}


def wrote(files: Sequence[Path], *, quiet: bool) -> None:
    """Say on standard error which files a report became."""
    if not quiet:
        click.secho(f"Wrote {', '.join(map(str, files))}", fg="green", bold=True, err=True)


def say(note: str) -> None:
    """A line on standard error, where the result may be on the other stream."""
    click.secho(f"note: {note}", fg="yellow", err=True)


def warn_of_synthetic_data() -> None:
    """Even where nothing else is printed."""
    click.secho("warning: the ranges come from random samples; do not ship this file", fg="yellow", err=True)


RECIPE_OPTIONS: Final = options(
    _choice("--recipe", "recipe_file", metavar="FILE", help="TOML, YAML or JSON; options given here override it."),
    _choice("--target", metavar="NAME", help="What it is for: cpu, cuda, tensorrt or a .toml file. [default: cuda]"),
    _choice("--precision", metavar="NAME", help="As w4a8, w4a16 (weights alone) or fp16. [default: w8a8]"),
    _choice("--storage", metavar="NAME", help="Few bits: packed (small), int8 (kernels), split. [default: packed]"),
    _choice("--first-last-8bit/--no-first-last-8bit", default=None, help="First and last layer. [default: with w4a4]"),
    _choice("--block-size", type=int, metavar="N", help="Weights alone: elements that share a scale. [default: 32]"),
    _choice(
        "--symmetric-weights/--asymmetric-weights",
        "weight_symmetric",
        default=None,
        help="Weights alone: no zero points, or with. [default: with for 2 bits]",
    ),
    _choice("--float16/--no-float16", default=None, help="With weights alone in integers: all else in float16."),
    _choice(
        "--keep-io-types/--no-keep-io-types", default=None, help="Float16 inside, float32 outside. [default: keep]"
    ),
    _choice("--calibrator", metavar="NAME", help="Who chooses the ranges of activations. [default: mse]"),
    _choice("--set", "settings", type=Assignment(), multiple=True, help="An option of the calibrator (repeatable)."),
    _choice("--weight-calibrator", metavar="NAME", help="Scales of weights: minmax or mse. [default: auto]"),
    _choice("--weight-rounding", metavar="NAME", help="nearest, stochastic, gptq or adaround. [default: auto]"),
    _choice("--weight-correction/--no-weight-correction", default=None, help="Weights of few bits keep their norm."),
    _choice("--per-channel/--per-tensor", default=None, help="Weights get a scale a channel (default), or one."),
    _choice("--bits-per-channel", metavar="NAME", help="Unequal: weights, activations or both. [default: off]"),
    _choice("--bit-allocation", metavar="NAME", help="How: mean_width or published. [default: mean_width]"),
    _choice("--activation-per-channel/--activation-per-tensor", default=None, help="Activations: no kernels then."),
    _choice(
        "--equalization/--no-equalization", default=None, help="Balance layers in a row. [default: with --per-tensor]"
    ),
    _choice("--smoothing", metavar="NAME", help="Balance activations: off, free, inputs, all. [default: inputs]"),
    _choice("--bias-correction/--no-bias-correction", default=None, help="Keep every layer's mean. [default: on]"),
    _choice("--bias-correction-method", metavar="NAME", help="empirical, or analytic (no data). [default: auto]"),
    _choice("--reduce-range/--no-reduce-range", default=None, help="7-bit weights, for x86 without VNNI."),
    _choice("--samples", type=click.IntRange(min=1), metavar="N", help="Calibrate on N samples. [default: all]"),
    _choice("--seed", type=int, metavar="N", help="Of everything that is random. [default: 0]"),
    _choice("--min-sqnr", type=float, metavar="DB", help="Gate: below it nothing is written, exit status 1."),
    _choice("--external-data/--no-external-data", default=None, help="Tensors beside the model. [default: over 2 GB]"),
    _choice("--images", type=Assignment(), multiple=True, help="Preprocessing of image files, as in crop=224."),
    _names(
        "--op-types", "op_types_to_quantize", multiple=True, metavar="OP,...", help="Only these operators (repeatable)."
    ),
    _names(
        "--include",
        "nodes_to_quantize",
        multiple=True,
        metavar="REGEX",
        help="Only nodes whose whole name matches (repeatable).",
    ),
    _names(
        "--exclude", "nodes_to_exclude", multiple=True, metavar="REGEX", help="These nodes stay float (repeatable)."
    ),
    _names(
        "--tensor",
        "tensors",
        multiple=True,
        type=NamedOverride("NAME"),
        help="Fields: dtype, symmetric, granularity, range, calibrator.",
    ),
    _names(
        "--node", "nodes", multiple=True, type=NamedOverride("REGEX"), help="The same for the inputs of matching nodes."
    ),
)
"""Every field of the recipe; what is not given is not passed on, so that defaults live in Recipe alone."""


def make_recipe(file: str | None, given: Mapping[str, Any]) -> Recipe:
    """The recipe in ``file``, overridden by the options that were given.

    A calibrator's options in the file are kept while the calibrator stays the same; overrides of tensors and nodes
    and the preprocessing of images are merged field by field, the command line's first.

    Raises:
        RecipeError: an unknown field or value; names the file where it stands there.
    """
    from qdqtool.errors import RecipeError
    from qdqtool.recipe import Recipe

    fields = {name: value for name, value in given.items() if value is not None and value != ()}
    base = {} if file is None else Recipe.read(file)
    try:
        stored = Recipe.of(base)
    except RecipeError as error:
        raise RecipeError(f"{file}: {error}") from error
    settings = dict(fields.pop("settings", ()))
    if settings or "calibrator" in fields:
        name = fields.get("calibrator", stored.calibrator.name)
        kept = stored.calibrator.options if name == stored.calibrator.name else {}
        fields["calibrator"] = {**kept, **settings, "name": name}
    if "op_types_to_quantize" in fields:
        fields["op_types_to_quantize"] = [op.strip() for ops in fields["op_types_to_quantize"] for op in ops.split(",")]
    for name in ("tensors", "nodes"):
        if name in fields:
            fields[name] = _merged(base.get(name) or {}, fields[name])
    if "images" in fields:
        fields["images"] = {**(base.get("images") or {}), **dict(fields["images"])}  # type: ignore[dict-item]  # a table: checked above
    return Recipe.of({**base, **fields})


def _merged(stored: Any, given: Sequence[tuple[str, Mapping[str, object]]]) -> dict[str, dict[str, object]]:
    """Overrides by name, the command line's before the file's: of several that match a node the first one counts."""
    names = dict.fromkeys([*(name for name, _ in given), *stored])
    merged: dict[str, dict[str, object]] = {name: dict(stored.get(name, {})) for name in names}
    for name, fields in given:
        merged[name].update(fields)
    return merged
