"""Methods of training compared: each trained from the stores for as many CPU minutes, then asked questions.

    c2c precompute recipes/compare.yaml --data-dir data   # once
    python benchmarks/methods.py --data-dir data                              # all methods, seed 42
    python benchmarks/methods.py --data-dir data --only recipe ridge-start --seeds 42 43 44

A method is some settings over recipes/compare.yaml. How many steps the budget allows follows from what `c2c train
--dry-run` measures, with one thread, or is given with `--steps`, as for a GPU; `--jobs` methods are trained at a time,
each on a core of its own. Then `c2c
evaluate` asks each one by option likelihood. Everything stays in the output folder, and a run that was stopped goes on.
What a run came to, a small file each, goes to `--results`: whoever has these need not train again for the table, and
`--known` makes it of those that are there.

Printed, and written to `methods.md` there, per method the mean over its seeds: steps, the minutes that they took, loss
and exact answers on the hold-out, accuracy with the sharer's caches and with those of another question, the share of
the gap between receiver and sharer that is recovered, and the differences to the first method and to the sharer, in
points, with their 95% intervals over questions drawn anew.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import mean
from threading import Semaphore
from typing import Any

import numpy as np

from cache2cache import C2CError
from cache2cache.evaluation.answers import LIKELIHOOD, SAMPLES, read_answers
from cache2cache.evaluation.statistics import bootstrap
from cache2cache.files import replace_text
from cache2cache.training.recipe import read_recipe

RECIPE = Path(__file__).parents[1] / "recipes" / "compare.yaml"


@dataclass(frozen=True)
class Method:
    """Settings over the recipe; in them {steps} stands for the number of steps.

    `fitted`: in closed form, without steps. `times`: as many steps for each of `--steps`, of batches as much smaller.
    """

    settings: Sequence[str] = ()
    fitted: bool = False
    times: int = 1


GATES = ("fuser.gating=true", "fuser.anneal_steps={steps}")
METHODS = {
    "recipe": Method(),
    "ridge-start": Method(["fuser.projection_init=ridge", "fuser.blend=0.5"]),
    "as-published": Method(
        [
            *GATES,
            "fuser.gate_noise=gumbel",
            "fuser.normalize=false",
            "fuser.zero_init=false",
            "fuser.layer_map=last_aligned",
            "loss=token",
            "learning_rate=1e-4",
        ]
    ),
    "gates": Method(GATES),
    "gates-gumbel": Method([*GATES, "fuser.gate_noise=gumbel"]),
    "gates-no-noise": Method([*GATES, "fuser.gate_noise=none"]),
    "no-weights": Method(["fuser.weighting=false"]),
    "project": Method(["fuser.residual=false", "fuser.weighting=false", "fuser.zero_init=false"]),
    "raw-inputs": Method(["fuser.normalize=false"]),
    "random-init": Method(["fuser.zero_init=false"]),
    "unrotated": Method(["fuser.key_space=unrotated"]),
    "last-aligned": Method(["fuser.layer_map=last_aligned"]),
    "nearest-layers": Method(["fuser.layer_map=k_nearest"]),
    "loss-by-token": Method(["loss=token"]),
    "rate-2e-3": Method(["learning_rate=2e-3"]),
    "batch-8": Method(["batch_size=8", "evaluate_every=182"], times=2),
    "c2c-c": Method(["fuser.variant=c2c-c"]),
    "bottleneck": Method(["fuser.variant=bottleneck"]),
    "ridge": Method(["fuser.variant=ridge", "fuser.normalize=false", "fuser.zero_init=false"], fitted=True),
    "identical": Method(["method=identical", "store={receiver_store}"]),
    "single": Method(["method=single", "learning_rate=3e-4"]),
}


@dataclass(frozen=True)
class Run:
    """A method trained with one seed, in a folder of its own."""

    name: str
    seed: int
    options: argparse.Namespace

    @property
    def method(self) -> Method:
        return METHODS[self.name]

    @property
    def folder(self) -> Path:
        return Path(self.options.output) / f"{self.name}-{self.seed}"

    @property
    def trained(self) -> Path:
        return self.folder / ("adapter" if self.name == "single" else "fuser")

    @property
    def said(self) -> Path:
        return Path(self.options.results) / f"{self.name}-{self.seed}.json"

    def work(self, base: Future[dict[str, Any]], slots: Semaphore) -> dict[str, Any]:
        """Train and ask, as far as that isn't done; what came out. `base`: asking the models alone, which fills the
        store of the questions. `slots`: as many as may compute at a time; none is held while that is waited for."""
        if self.said.exists():
            return self.read(base)
        with slots:
            if not self.trained.exists():
                self.train(self.folder, self.settings(self.steps()))
            if base.done():
                self.ask()
        base.result()
        if not self.said.exists():
            with slots:
                self.ask()
        return self.read(base)

    def read(self, base: Future[dict[str, Any]]) -> dict[str, Any]:
        """What came out, if it is of these settings and questions."""
        found: dict[str, Any] = json.loads(self.said.read_text())
        steps = found["steps"] if self.options.steps is None and "steps" in found else self.steps()
        if found["settings"] != self.settings(steps) or found["answers"].keys() != base.result()["answers"].keys():
            raise C2CError(f"{self.said} is of other settings or questions; choose another --results")
        return found

    def ask(self) -> None:
        """Ask what was trained, and note what came out."""
        asked, alone = self.folder / "evaluation", self.name == "single"
        who = [self.options.fuser, "--single", self.trained] if alone else [self.trained]
        stored = self.name not in ("single", "identical")
        ask(self.options, asked, who, ["receiver"] if alone else ["c2c", "other"], stored, unused=alone or stored)
        made = json.loads((self.trained / ("training.json" if alone else "config.json")).read_text())
        about = made.get("training", made)
        kept = {key: about[key] for key in ("steps", "seconds", "holdout_loss", "holdout_exact") if key in about}
        write(self.said, {"settings": self.settings(about.get("steps")), **kept, **answers(asked)})

    def settings(self, steps: int | None) -> list[str]:
        """Over the recipe; what is fitted takes no steps. Every seed has the recipe's rows, those of its stores."""
        recipe = read_recipe(self.options.recipe)
        known = {"steps": str(steps), "receiver_store": str(recipe.receiver_store)}
        given = [setting.format(**known) for setting in self.method.settings]
        ends = [] if self.method.fitted else [f"max_steps={steps}", f"epochs={steps}"]
        rows = [] if self.seed == recipe.seed else [f"data_seed={recipe.seed}"]
        return [*given, *ends, *self.options.set, *rows, f"seed={self.seed}"]

    def steps(self) -> int:
        """As many as were asked for, or as the budget allows; that is measured once for all seeds."""
        if self.method.fitted:
            return 1
        if self.options.steps:
            return int(self.options.steps) * self.method.times
        path = Path(self.options.output) / f"{self.name}.json"
        if not path.exists():
            said = self.train(self.folder, self.settings(1), "--dry-run")
            found = re.search(r"about ([\d.]+) s each", said)
            assert found is not None, said
            steps = round(60 * self.options.budget / max(float(found[1]), 0.01))
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_text(path, json.dumps({"steps": max(1, steps)}) + "\n")
        return int(json.loads(path.read_text())["steps"])

    def train(self, into: Path, settings: Sequence[str], *more: str) -> str:
        over = [word for setting in settings for word in ("--set", setting)]
        return command(
            "train", self.options.recipe, "--data-dir", self.options.data_dir, "--output", into, *over, *more
        )


def command(*words: Any) -> str:
    """What `c2c …` prints, with one thread."""
    line = [sys.executable, "-m", "cache2cache", *map(str, words)]
    done = subprocess.run(line, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise C2CError(f"c2c {' '.join(line[3:])} ended with {done.returncode}:\n{done.stderr.strip()}")
    return done.stdout


def ask(
    options: argparse.Namespace, into: Path, who: Sequence[Any], methods: Sequence[str], stored: bool, unused: bool
) -> None:
    """Put the questions to what was trained. `stored`: the sharer's caches may come from a store, and `unused`: it then
    computes nothing, so that its smallest load will do."""
    if (into / "summary.json").exists():
        return
    words = ["evaluate", *filter(None, who), "--data-dir", options.data_dir, "--output", into]
    words += [word for task in options.tasks for word in ("--task", task)]
    words += [word for method in methods for word in ("--method", method)]
    if options.limit:
        words += ["--limit", options.limit]
    if stored and options.store:
        words += ["--store", options.store]
    if unused and (options.store or not stored):
        words += ["--sharer-dtype", "bfloat16"]
    command(*words)


def ask_alone(options: argparse.Namespace, slots: Semaphore, filling: bool) -> dict[str, Any]:
    """What receiver and sharer answer. `filling`: others will be asked, for whom this fills the store here, whatever is
    known already."""
    said = Path(options.results) / "alone.json"
    if not said.exists() or (filling and options.store):
        into = options.output / "alone"
        with slots:
            ask(options, into, [options.fuser], ["receiver", "sharer"], stored=True, unused=False)
        if not said.exists():
            write(said, answers(into))
    found: dict[str, Any] = json.loads(said.read_text())
    return found


def answers(folder: Path) -> dict[str, Any]:
    """Per set and method the ids of the questions that were answered rightly and wrongly."""
    made: dict[str, Any] = {}
    for row in read_answers(folder / SAMPLES):
        if row.answers == LIKELIHOOD:
            kinds = made.setdefault(row.task, {}).setdefault(row.method, {"right": [], "wrong": []})
            kinds["right" if row.correct else "wrong"].append(row.id)
    return {"answers": made}


def write(path: Path, found: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, json.dumps(found) + "\n")


def rights(found: dict[str, Any], method: str) -> list[dict[str, bool]]:
    """Per set, whether each question was answered rightly, in one order for all runs."""
    sets = [found["answers"][task][method] for task in sorted(found["answers"])]
    return [dict(sorted({i: kind == "right" for kind in kinds for i in kinds[kind]}.items())) for kinds in sets]


def accuracy(found: dict[str, Any], method: str) -> float:
    """Percent right, the mean over the sets."""
    return mean(100 * mean(rows.values()) for rows in rights(found, method))


def difference(ours: Sequence[list[dict[str, bool]]], theirs: Sequence[list[dict[str, bool]]]) -> str:
    """Between the `rights` of runs, in points, the mean over the seeds, the questions being the same, with its 95%
    interval."""
    if len({tuple(tuple(rows) for rows in run) for run in (*ours, *theirs)}) > 1:
        raise C2CError("these runs were not asked the same questions; choose another --results")

    def scores(runs: Sequence[list[dict[str, bool]]]) -> list[np.ndarray]:
        return [
            np.mean([list(rows.values()) for rows in runs_of_set], axis=0) for runs_of_set in zip(*runs, strict=True)
        ]

    points = [100 * (a - b) for a, b in zip(scores(ours), scores(theirs), strict=True)]
    ends = np.cumsum([0, *map(len, points)])

    def of(times: np.ndarray) -> np.ndarray:
        parts = [times[:, low:high] for low, high in pairwise(ends)]
        return np.mean([part @ each / part.sum(1) for part, each in zip(parts, points, strict=True)], axis=0)

    low, high = bootstrap([len(each) for each in points], of)
    return f"{mean(each.mean() for each in points):+.1f} [{low:+.1f}, {high:+.1f}]"


def asked_as(found: dict[str, Any]) -> str:
    """The method of `c2c evaluate` that a trained one was asked by."""
    return "single" if all("single" in methods for methods in found["answers"].values()) else "c2c"


def table(runs: Sequence[tuple[str, dict[str, Any]]], alone: dict[str, Any]) -> str:
    """Markdown: a row per method, means over its seeds and, of several, the least and the highest accuracy."""
    names = list(dict.fromkeys(name for name, _ in runs))
    head = ["method", "seeds", "steps", "minutes", "hold-out loss", "exact", "right", "of the gap", "other's caches"]
    head += [f"right, less {names[0]}", "less the sharer"]
    lines = [head, ["---"] * len(head)]
    receiver, sharer = (accuracy(alone, who) for who in ("receiver", "sharer"))
    first = [rights(result, asked_as(result)) for name, result in runs if name == names[0]]
    for name in names:
        found = [result for other, result in runs if other == name]
        right = [accuracy(one, asked_as(one)) for one in found]
        mine = [rights(one, asked_as(one)) for one in found]

        def average(key: str, digits: int, scale: float = 1.0, found: list[dict[str, Any]] = found) -> str:
            known = [scale * one[key] for one in found if one.get(key) is not None]
            return f"{mean(known):.{digits}f}" if known else ""

        gap = f"{100 * (mean(right) - receiver) / (sharer - receiver):.0f}%" if sharer > receiver else ""
        spread = f" ({min(right):.1f} to {max(right):.1f})" if len(right) > 1 else ""
        other = "" if name == "single" else f"{mean(accuracy(one, 'other') for one in found):.1f}"
        lines.append(
            [
                name, str(len(found)), average("steps", 0), average("seconds", 1, 1 / 60), average("holdout_loss", 3),
                average("holdout_exact", 1, 100), f"{mean(right):.1f}{spread}", gap, other,
                difference(mine, first) if name != names[0] else "", difference(mine, [rights(alone, "sharer")]),
            ]
        )  # fmt: skip
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True, help="local mirror of the data sets")
    parser.add_argument("--recipe", type=Path, default=RECIPE)
    parser.add_argument("--only", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--seeds", nargs="+", type=int, default=[42])
    parser.add_argument("--budget", type=float, default=30, help="CPU minutes of training")
    parser.add_argument("--steps", type=int, help="so many for each method, instead of a budget")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time, one core each")
    parser.add_argument("--tasks", nargs="+", default=["openbookqa", "arc-challenge"], help="what is asked")
    parser.add_argument("--limit", type=int, help="questions of each set; all without it")
    parser.add_argument("--store", type=Path, help="of the questions' sharer prefills; missing ones are added")
    parser.add_argument("--fuser", help="of the pair, for the receiver and the sharer alone; the packaged one without")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="over the recipe, for all methods")
    parser.add_argument("--output", type=Path, default=Path("runs/methods"))
    parser.add_argument("--known", action="store_true", help="train nothing: what --results holds, of whichever seeds")
    parser.add_argument("--results", type=Path, help="what runs came to; the output folder without it")
    options = parser.parse_args()
    options.results = options.results or options.output
    runs = [Run(name, seed, options) for seed in options.seeds for name in options.only]
    if options.known:
        there = {name: options.results.glob(f"{name}-[0-9]*.json") for name in options.only}
        runs = [Run(name, int(p.stem.rpartition("-")[2]), options) for name in there for p in sorted(there[name])]
    if not runs:
        sys.exit(f"methods.py: {options.results} holds no results of {', '.join(options.only)}")
    try:
        slots = Semaphore(options.jobs)
        with ThreadPoolExecutor(1 + len(runs)) as pool:
            base = pool.submit(ask_alone, options, slots, not all(run.said.exists() for run in runs))
            jobs = [(run, pool.submit(run.work, base, slots)) for run in runs]
            for run, job in jobs:
                found = job.result()
                right = accuracy(found, asked_as(found))
                print(f"{run.name}, seed {run.seed}: {right:.1f}% right", file=sys.stderr, flush=True)
        alone = base.result()
        receiver, sharer = (accuracy(alone, who) for who in ("receiver", "sharer"))
        made = f"Receiver {receiver:.1f}%, sharer {sharer:.1f}% of {', '.join(options.tasks)}.\n\n"
        made += table([(run.name, job.result()) for run, job in jobs], alone)
    except C2CError as error:
        sys.exit(f"methods.py: {error}")
    replace_text(options.results / "methods.md", made)
    print(made)


if __name__ == "__main__":
    main()
