"""Methods of training compared: each trained from the stores for as many CPU minutes, then asked questions.

    c2c precompute recipes/compare.yaml --data-dir data   # once
    python benchmarks/methods.py --data-dir data                              # all methods, seed 42
    python benchmarks/methods.py --data-dir data --only recipe ridge-start --seeds 42 43 44

A method is some settings over recipes/compare.yaml. How many steps the budget allows follows from what `c2c train
--dry-run` measures, with one thread, or is given with `--steps`, as for a GPU; `--jobs` methods are trained at a time,
each on a core of its own. Then `c2c
evaluate` asks each one by option likelihood. Everything stays in the output folder, and a run that was stopped goes on.

Printed, and written to `methods.md`, per method the mean over its seeds: steps, the minutes that they took, loss and
exact answers on the hold-out, accuracy with the sharer's caches and with those of another question, and the share of
the gap between receiver and sharer that is recovered.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from cache2cache import C2CError
from cache2cache.files import replace_text
from cache2cache.training.recipe import read_recipe

RECIPE = Path(__file__).parents[1] / "recipes" / "compare.yaml"


@dataclass(frozen=True)
class Method:
    """Settings over the recipe; in them {steps} stands for the number of steps.

    `fitted`: in closed form, without steps.
    """

    settings: Sequence[str] = ()
    fitted: bool = False


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
    "c2c-c": Method(["fuser.variant=c2c-c"]),
    "bottleneck": Method(["fuser.variant=bottleneck"]),
    "ridge": Method(["fuser.variant=ridge", "fuser.normalize=false", "fuser.zero_init=false"], fitted=True),
    "identical": Method(["method=identical", "store={receiver_store}"]),
    "single": Method(["method=single"]),
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

    def work(self) -> dict[str, Any]:
        """Train and ask, as far as that isn't done; what came out."""
        trained, alone = self.folder / ("adapter" if self.name == "single" else "fuser"), self.name == "single"
        if not trained.exists():
            self.train(self.folder, self.settings(self.steps()))
        asked = self.folder / "evaluation"
        if not (asked / "summary.json").exists():
            who = [self.options.fuser, "--single", trained] if alone else [trained]
            methods = ["receiver"] if alone else ["c2c", "other"]
            ask(self.options, asked, who, methods, stored=self.name not in ("single", "identical"))
        made = json.loads((trained / ("training.json" if alone else "config.json")).read_text())
        return {**made.get("training", made), **accuracy(asked, "single" if alone else "c2c")}

    def settings(self, steps: int) -> list[str]:
        """Over the recipe."""
        known = {"steps": str(steps), "receiver_store": str(read_recipe(self.options.recipe).receiver_store)}
        given = [setting.format(**known) for setting in self.method.settings]
        ends = [] if self.method.fitted else [f"max_steps={steps}", f"epochs={steps}"]
        return [*given, *ends, *self.options.set, f"seed={self.seed}"]

    def steps(self) -> int:
        """As many as were asked for, or as the budget allows; that is measured once for all seeds."""
        if self.method.fitted:
            return 1
        if self.options.steps:
            return int(self.options.steps)
        path = Path(self.options.output) / f"{self.name}.json"
        if not path.exists():
            said = self.train(self.folder, self.settings(1), "--dry-run")
            found = re.search(r"about ([\d.]+) s each", said)
            assert found is not None, said
            steps = round(60 * self.options.budget / max(float(found[1]), 0.01))
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


def ask(options: argparse.Namespace, into: Path, who: Sequence[Any], methods: Sequence[str], stored: bool) -> None:
    """Put the questions to what was trained."""
    words = ["evaluate", *filter(None, who), "--data-dir", options.data_dir, "--output", into]
    words += [word for task in options.tasks for word in ("--task", task)]
    words += [word for method in methods for word in ("--method", method)]
    if options.limit:
        words += ["--limit", options.limit]
    if stored and options.store:
        words += ["--store", options.store]
    command(*words)


def accuracy(folder: Path, method: str) -> dict[str, float]:
    """Percent right of a method and of the control, the mean over the sets."""
    tasks = json.loads((folder / "summary.json").read_text())["likelihood"]["tasks"].values()
    return {
        name: mean(rows[key]["accuracy"] for rows in tasks)
        for name, key in (("right", method), ("other", "other"))
        if all(key in rows for rows in tasks)
    }


def table(runs: Sequence[tuple[Run, dict[str, Any]]], receiver: float, sharer: float) -> str:
    """Markdown: a row per method, means over its seeds and, of several, the least and the highest accuracy."""
    head = ["method", "seeds", "steps", "minutes", "hold-out loss", "exact", "right", "of the gap", "other's caches"]
    lines = [head, ["---"] * len(head)]
    for name in dict.fromkeys(run.name for run, _ in runs):
        found = [result for run, result in runs if run.name == name]
        right = [one["right"] for one in found]

        def average(key: str, digits: int, scale: float = 1.0, found: list[dict[str, Any]] = found) -> str:
            known = [scale * one[key] for one in found if one.get(key) is not None]
            return f"{mean(known):.{digits}f}" if known else ""

        gap = f"{100 * (mean(right) - receiver) / (sharer - receiver):.0f}%" if sharer > receiver else ""
        spread = f" ({min(right):.1f} to {max(right):.1f})" if len(right) > 1 else ""
        lines.append(
            [
                name, str(len(found)), average("steps", 0), average("seconds", 1, 1 / 60), average("holdout_loss", 3),
                average("holdout_exact", 1, 100), average("right", 1) + spread,
                gap, average("other", 1),
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
    options = parser.parse_args()
    try:
        base = options.output / "alone"
        if not (base / "summary.json").exists():
            ask(options, base, [options.fuser], ["receiver", "sharer"], stored=True)
        receiver, sharer = accuracy(base, "receiver")["right"], accuracy(base, "sharer")["right"]
        runs = [Run(name, seed, options) for seed in options.seeds for name in options.only]
        with ThreadPoolExecutor(options.jobs) as pool:
            jobs = [(run, pool.submit(run.work)) for run in runs]
            for run, job in jobs:
                print(f"{run.name}, seed {run.seed}: {job.result()['right']:.1f}% right", file=sys.stderr, flush=True)
    except C2CError as error:
        sys.exit(f"methods.py: {error}")
    made = f"Receiver {receiver:.1f}%, sharer {sharer:.1f}% of {', '.join(options.tasks)}.\n\n"
    made += table([(run, job.result()) for run, job in jobs], receiver, sharer)
    replace_text(options.output / "methods.md", made)
    print(made)


if __name__ == "__main__":
    main()
