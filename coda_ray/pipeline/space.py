"""The space of a sweep: from its domains to points, and from a point to a configuration."""

import math
from collections.abc import Mapping
from itertools import product
from typing import Any

import numpy as np
from pydantic import ValidationError

from coda_ray.config import Config, ConfigError, Range, Tune
from coda_ray.methods import SECTIONS

# What a space may search, because the adaptation alone reads it: two fields of section tune, and fields of `methods.SECTIONS`.
OWN = ("method", "granularity")
# Name of a trial's values, in its record and in what Tune hands to it.
POINT = "point"
# Combinations of lists that are looked through for the trials that they make.
MOST_LISTED = 500
Point = dict[str, Any]
Domain = list[Any] | Range


def config_at(config: Config, point: Mapping[str, Any]) -> Config:
    """Put a point's values into a configuration.

    Parameters
    ----------
    config
        The sweep's configuration.
    point
        Name to value, as in `tune.space`.

    Raises
    ------
    ConfigError
        When there is no such field, not the adaptation alone reads it, it takes no such value, or it says what is scored.
    """
    values = config.model_dump(mode="json")
    for name, value in point.items():
        *path, field = f"tune.{name}".split(".") if name in OWN else name.split(".")
        if name not in OWN and (not path or path[0] not in SECTIONS):
            raise ConfigError(
                f"tune.space.{name}: searched are method, granularity and fields of {', '.join(SECTIONS)}, which the "
                "adaptation alone reads, such as adapt.lr or adapt.dino.ema_start; compare other settings by jobs/matrix.py"
            )
        if name == "adapt.unit":
            raise ConfigError(
                "tune.space.adapt.unit: trials on different units would be scored on different tiles; set adapt.unit itself"
            )
        section: Any = values
        for step in path:
            section = section.get(step) if isinstance(section, dict) else None
        if not isinstance(section, dict) or field not in section:
            raise ConfigError(f"tune.space.{name}: there is no such field; give one of {', '.join(SECTIONS)}, such as adapt.lr")
        section[field] = value
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in problem["loc"])
        raise ConfigError(f"tune.space: {where or 'configuration'}: {problem['msg']} (of {dict(point)})") from None


def points_of(settings: Tune) -> list[Point]:
    """List the points of a grid, or draw those of a random search; the same every time, and more samples add to fewer."""
    if settings.search == "grid":
        return [dict(zip(settings.space, values, strict=True)) for values in product(*_lists(settings))]
    return [
        {name: _drawn(domain, np.random.default_rng([settings.seed, number, place]))
         for place, (name, domain) in enumerate(settings.space.items())}
        for number in range(settings.samples)
    ]  # fmt: skip


def known_points(settings: Tune) -> list[Point]:
    """List the points that a sweep will try, where they are known before: Optuna's only of lists, and of few combinations."""
    if settings.search != "optuna":
        return points_of(settings)
    lists = _lists(settings)
    if len(lists) < len(settings.space) or math.prod(map(len, lists)) > MOST_LISTED:
        return []
    return points_of(settings.model_copy(update={"search": "grid"}))


def own_points(settings: Tune) -> list[Point]:
    """List every method with every granularity of a space; what it does not search is as section tune says."""
    domains = [settings.space.get(name, [getattr(settings, name)]) for name in OWN]
    return [dict(zip(OWN, values, strict=True)) for values in product(*(d for d in domains if isinstance(d, list)))]


def corners(settings: Tune) -> list[Point]:
    """List points that differ in one value each and together reach every value of lists and both ends of ranges."""
    ends = {name: _reached(domain) for name, domain in settings.space.items()}
    first = {name: values[0] for name, values in ends.items()}
    return [first, *({**first, name: value} for name, values in ends.items() for value in values[1:])]


def lengths(settings: Tune) -> list[Point]:
    """List points that reach every length of an adaptation: each method, with the ends of what its steps are counted by."""
    found = corners(settings)[0]
    counted = [name for name in settings.space if name == "method" or name.endswith((".steps", ".minibatch"))]
    domains = [_reached(settings.space[name]) for name in counted]
    return [{**found, **dict(zip(counted, values, strict=True))} for values in product(*domains)]


def _reached(domain: Domain) -> list[Any]:
    """Take the values of a list, or both ends of a range, as whole numbers where those are wanted."""
    if not isinstance(domain, Range):
        return domain
    return [round(end) if domain.whole else end for end in (domain.low, domain.high)]


def _lists(settings: Tune) -> list[list[Any]]:
    """Domains of a grid, which are lists all."""
    return [domain for domain in settings.space.values() if isinstance(domain, list)]


def _drawn(domain: Domain, rng: np.random.Generator) -> Any:
    """Draw one value."""
    if not isinstance(domain, Range):
        return domain[rng.integers(len(domain))]
    low, high = (math.log(end) if domain.log else end for end in (domain.low, domain.high))
    value = rng.uniform(low, high)
    value = math.exp(value) if domain.log else value
    # Four digits are what a person types again.
    return min(max(round(value), math.ceil(domain.low)), math.floor(domain.high)) if domain.whole else float(f"{value:.4g}")
