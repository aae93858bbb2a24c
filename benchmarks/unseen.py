"""How far the methods hold, in simulated worlds in which no setting was chosen.

python benchmarks/unseen.py --out unseen
python benchmarks/unseen.py --out unseen --worlds 21 --parts unknown,unbalanced --run no

Runs the jobs (simulate, ingest, matrix) of every part and world with configs/unseen.yaml, as a person would type them; what is
finished is looked up, so the same command goes on after a stop. Then it writes a row per transfer, method and seed to a CSV file,
in the place of those of the same part, variant and world, and prints, as Markdown, each part's methods: accuracy per image, well
and compound, the share of the gap that is closed, the worst transfer against the unadapted model, and the paired difference from
it with a 95 % interval over wells. Labels of targets are read for scores alone.
"""

import argparse
import shlex
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import pandas as pd

from coda_ray.config import Baselines, Config, build_config
from coda_ray.methods import row_of
from coda_ray.pipeline.data import load_tiles
from coda_ray.pipeline.evaluate import TILE_ID
from coda_ray.pipeline.gather import answers, compared
from coda_ray.pipeline.matrix import plan_all, requests_of
from coda_ray.storage import open_place
from coda_ray.tracking.records import read_records, transfers_frame
from coda_ray.tracking.table import RANKED, markdown_table

CONFIG = "configs/unseen.yaml"
FEW = "supervised,dual-cb,standardise,coda,shot,coda-shot"
CHANGED = "supervised,dual-cb,coda,shot,coda-shot"
AFTER = ("--adapt.standardise", "after")
KNOWN = ("--learn-from", "known-compounds")
KIND = ["part", "variant", "split"]
TRANSFER = ["world", "source", "target", "seed"]
COLUMNS = [*KIND, *TRANSFER, "method", *RANKED, "n_images"]


@dataclass(frozen=True)
class Variant:
    """One job, or one per target.

    Parameters
    ----------
    options
        Of jobs/matrix.py, beside the configuration.
    plates
        Places of the plates that an adaptation knows of, among a target's plates by batch and name; empty: all. Every plate is
        scored all the same.
    """

    options: Sequence[str] = ()
    plates: Sequence[int] = ()


@dataclass(frozen=True)
class Part:
    """Matrix jobs on one kind of world.

    Parameters
    ----------
    variants
        By their names.
    world
        Name of the kind of world, and options of jobs/simulate.py beside the seed.
    simulate
        Those options.
    """

    variants: dict[str, Variant]
    world: str = "world"
    simulate: Sequence[str] = ()


def _of(methods: str, *more: str, plates: Sequence[int] = ()) -> Variant:
    """A job with fewer methods."""
    return Variant(["--matrix.methods", methods, *more], plates)


PARTS = {
    "plate": Part({"as it is": Variant(), "standardise after": _of(CHANGED, *AFTER)}),
    "compounds": Part({"as it is": _of(FEW, "--matrix.splits", "compounds,new-compounds")}),
    "small": Part(
        {
            "two wells a compound": _of(CHANGED, plates=(0, 1)),
            "one batch": _of(CHANGED, "--adapt.dino.pairs", "plate", plates=(1, 2)),
            "one plate": _of("supervised,dual-cb,moments,shot,oda-shot", plates=(0,)),
        }
    ),
    "unknown": Part(
        {
            "as it is": _of(FEW),
            "known compounds": _of(CHANGED, *KNOWN),
            "standardise after": _of(CHANGED, *AFTER),
            "known compounds, standardise after": _of(CHANGED, *KNOWN, *AFTER),
            "margin 0.5": _of("supervised,dual-cb,coda-shot", "--shot.margin", "0.5"),
        },
        "unknown",
        ["--unknown-moas", "10"],
    ),
    "unbalanced": Part(
        {
            "uniform prior": _of(FEW),
            "the source's prior": _of("supervised,dual-cb,shot,coda-shot", "--shot.prior", "source"),
        },
        "unbalanced",
        ["--imbalance", "4", "--imbalance-by-source", "true"],
    ),
}


def main(argv: list[str] | None = None) -> int:
    """Run, write the rows, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="folder of the worlds and their results, some GB")
    parser.add_argument("--worlds", default="21,22,23", help="their seeds (default: %(default)s)")
    parser.add_argument("--parts", default=",".join(PARTS), help="some of the parts (default: %(default)s)")
    parser.add_argument("--seeds", default="0,1,2", help="seeds of training (default: %(default)s)")
    parser.add_argument("--sources", default="", help="labs that models are trained on, such as sim_a (default: all three)")
    parser.add_argument(
        "--run", choices=("yes", "no"), default="yes", help="no: only tell what is finished (default: %(default)s)"
    )
    parser.add_argument("--csv", default="docs/tables/unseen.csv", help="file of the rows (default: %(default)s)")
    chosen = parser.parse_args(argv)
    jobs = list(_jobs(chosen))
    if chosen.run == "yes":
        for job in jobs:
            job.run()
    told = [found for job in jobs if (found := job.read())]
    if not told:
        print(f"{chosen.out}: nothing is finished; give --run yes", file=sys.stderr)
        return 1
    rows = pd.concat([rows for rows, _ in told], ignore_index=True)
    _keep(Path(chosen.csv), rows)
    for kind, part in rows.groupby(KIND, sort=False):
        right = [answered for own, answered in told if (own[KIND] == list(kind)).all(axis=1).any()]
        print(f"\n{', '.join(kind)}\n")
        print(table(part, [one[str(kind[-1])] for one in right if str(kind[-1]) in one]), end="")
    return 0


@dataclass(frozen=True)
class Job:
    """One variant of a part in one world."""

    folder: Path
    seed: int
    part: str
    variant: str
    seeds: str
    sources: str

    @property
    def _part(self) -> Part:
        return PARTS[self.part]

    @property
    def _world(self) -> Path:
        return self.folder / f"{self._part.world}-{self.seed}"

    def run(self) -> None:
        """Run its jobs; a bucket and its tiles are made where they lack."""
        if not (self._world / "bucket/simulation.json").exists():
            seed = ["--preset", "demo", "--seed", str(self.seed)]
            _job("simulate", [*seed, *self._part.simulate, "--out", str(self._world / "bucket")])
        _job("ingest", ["--config", CONFIG, *self._places()])
        for options in self._options():
            _job("matrix", ["--config", CONFIG, *options])

    def read(self) -> tuple[pd.DataFrame, dict[str, pd.DataFrame]] | None:
        """Read what it scored.

        Returns
        -------
        rows, right
            `COLUMNS`, one row per transfer, method and seed; and by split whether each image was named rightly, as `answers`
            gives it, with labs called `21/sim_b`. None while nothing is finished.
        """
        if not (self._world / "results").exists():
            return None
        rows, right = list[pd.DataFrame](), defaultdict[str, list[pd.DataFrame]](list)
        for options in self._options():
            config = build_config(Config, CONFIG, options)
            planned = {transfer.key: transfer for transfer in plan_all(config, requests_of(config))}
            scored = transfers_frame([r for r in read_records(open_place(config.results), "transfers") if r["key"] in planned])
            rows.append(scored)
            across = scored[scored["source"] != scored["target"]]
            for (split, _, _), keys in across.groupby(["split", "source", "target"])["key"]:
                answered = answers(config, [planned[key] for key in keys])
                # Labs and plates of two worlds have the same names.
                right[str(split)].append(answered.rename(index=lambda lab: f"{self.seed}/{lab}", level=TILE_ID[0]))
        if not right:
            return None
        named = pd.concat(rows).drop_duplicates("key").assign(part=self.part, variant=self.variant, world=self.seed)
        return named[COLUMNS], {split: pd.concat(parts) for split, parts in right.items()}

    def _places(self) -> list[str]:
        """Options that say where everything lies."""
        below = {"bucket": "bucket", "metadata": "bucket/metadata", "tiles": "tiles", "results": "results"}
        return [word for name, path in below.items() for word in (f"--{name}.address", str(self._world / path))]

    def _options(self) -> list[list[str]]:
        """Options of its jobs: one, or one per target where an adaptation knows of some plates only."""
        variant = self._part.variants[self.variant]
        options = [*self._places(), "--matrix.seeds", self.seeds, *variant.options]
        options += ["--matrix.sources", self.sources] if self.sources else []
        if not variant.plates:
            return [options]
        config = build_config(Config, CONFIG, options)
        every = {target: load_tiles(config, target).units("plate") for target in config.matrix.targets}
        chosen = {target: ",".join(plates[place] for place in variant.plates) for target, plates in every.items()}
        return [[*options, "--matrix.targets", target, "--adapt.plates", plates] for target, plates in chosen.items()]


def _jobs(chosen: argparse.Namespace) -> Iterator[Job]:
    """List the jobs, world by world."""
    for part, seed in product(chosen.parts.split(","), map(int, chosen.worlds.split(","))):
        for variant in PARTS[part].variants:
            yield Job(Path(chosen.out), seed, part, variant, chosen.seeds, chosen.sources)


def _keep(file: Path, rows: pd.DataFrame) -> None:
    """Write rows to a file in the place of those of the same jobs; the others that it has stay."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.exists():
        before = pd.read_csv(file)
        job = ["part", "variant", "world"]
        stays = before.merge(rows[job].drop_duplicates(), on=job, how="left", indicator=True)["_merge"] == "left_only"
        rows = pd.concat([before[stays.to_numpy()], rows])
    rows.sort_values(["part", "variant", "world"], kind="stable").to_csv(file, index=False, float_format="%.4f")


def _job(name: str, options: Sequence[str]) -> None:
    """Run a job as a person would; raises `CalledProcessError` when it fails."""
    command = [sys.executable, f"jobs/{name}.py", *options]
    print("$", shlex.join(["python", *command[1:]]), flush=True)
    subprocess.run(command, check=True)


def table(rows: pd.DataFrame, right: Sequence[pd.DataFrame]) -> str:
    """Lay out one part: methods by accuracy per image.

    Parameters
    ----------
    rows
        `COLUMNS`, of one part, variant and split.
    right
        Of each world, whether images were named rightly.

    Returns
    -------
    str
        Markdown. Means over the transfers that the method has, ± the standard deviation over seeds of that mean; the closed
        share of the gap, by the supervised model's means over the same transfers; the worst difference of one transfer from
        the model that the method starts from, each seed by itself; the mean difference with its interval, wells drawn anew.
    """
    away, home = rows[rows["source"] != rows["target"]], rows[rows["source"] == rows["target"]]
    supervised = away[away["method"] == "supervised"].set_index(TRANSFER)["accuracy"]
    at_home = home[home["method"] == "supervised"].set_index(["world", "source", "seed"])["accuracy"]
    header = ["method", "per image", "per well", "per compound", "gap closed", "transfers"]
    header += ["from", "worst transfer", "difference (95 %)"]
    lines = []
    for method, own in sorted(away.groupby("method"), key=lambda item: -item[1]["accuracy"].mean()):
        start = row_of(method).model or Baselines().model
        scores = [_spread(own.groupby("seed")[metric].mean()) for metric in RANKED]
        least, most = (_over(own, told) for told in (supervised, at_home))
        closed = f"{100 * (own['accuracy'].mean() - least) / (most - least):.0f} %" if most > least else "–"
        lines.append([method, *scores, closed, str(len(own)), *_against(away, right, method, start)])
    pairs, worlds, seeds = (len(away[names].drop_duplicates()) for names in (TRANSFER[:3], ["world"], ["seed"]))
    first = f"in-domain supervised {_spread(at_home.groupby('seed').mean())}"
    return f"{first}; {pairs} transfers, {worlds} world(s), {seeds} seed(s)\n\n{markdown_table(header, lines)}"


def _over(own: pd.DataFrame, supervised: pd.Series) -> float:
    """Mean of the supervised model's scores over the transfers of a method; NaN while one of them lacks."""
    return float(supervised.reindex(pd.MultiIndex.from_frame(own[supervised.index.names])).mean(skipna=False))


def _against(away: pd.DataFrame, right: Sequence[pd.DataFrame], method: str, start: str) -> list[str]:
    """Name the model that a method starts from, the worst transfer, and the paired difference with its interval."""
    both = [one[[method, start]].dropna() for one in right if {method, start} <= set(one.columns.get_level_values(0))]
    if method == start or not both:
        return ["", "", ""]
    pivot = away.pivot_table(index=TRANSFER, columns="method", values="accuracy")
    seeds = sorted(set.intersection(*[set(part[name].columns) for part in both for name in (method, start)]))
    difference, low, high = (100 * value for value in compared(both, method, start, seeds)[:3])
    worst = 100 * (pivot[method] - pivot[start]).min()
    return [start, f"{worst:+.1f}", f"{difference:+.1f} ({low:+.1f} to {high:+.1f})"]


def _spread(values: pd.Series) -> str:
    """Write shares as a percentage, ± their standard deviation where there are several."""
    spread = f" ± {100 * values.std():.1f}" if len(values) > 1 else ""
    return f"{100 * values.mean():.1f}{spread}"


if __name__ == "__main__":
    sys.exit(main())
