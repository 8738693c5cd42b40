"""`c2c train` killed at any moment, over and over: what that costs, and that it ends as if nothing had been."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from training.runs import recipe_of, write_models, write_recipe

KILLS, STEPS, SAVE_EVERY = 10, 240, 9

# Starts `c2c train` over and over in a process that forks, so that torch is imported once, and kills it: at a moment
# while it starts, or some steps later. Prints how the processes ended, which steps each of them began, and how far log
# and checkpoint were behind each kill.
SERVER = """
import json, os, random, signal, sys, time
from pathlib import Path
import torch
from cache2cache.cli import main
from cache2cache.training.loop import Trainer

torch.set_num_threads(1)
recipe, output, kills = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])

def start(*arguments):
    file = os.open(f"{output}.steps", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    if pid := os.fork():
        return pid
    def step(self, *batch, original=Trainer._train_step):
        os.write(file, f"{self.step + 1}\\n".encode())
        return original(self, *batch)
    Trainer._train_step = step
    os.dup2(os.open(f"{output}.said", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
    os.dup2(1, 2)
    try:
        main(list(arguments))
    except SystemExit as leaving:
        os._exit(leaving.code or 0)

def steps():
    return [int(line) for line in Path(f"{output}.steps").read_text().split()]

def ended(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

began = time.monotonic()
whole = ended(start("train", recipe, "--output", f"{output}-whole"))
seconds = time.monotonic() - began
draw = random.Random(0)
lives = []
for number in range(kills):
    pid = start("train", recipe, "--output", str(output))
    if number % 3 == 0:  # while it starts, mostly
        until = time.monotonic() + draw.uniform(0, seconds / 4)
        while time.monotonic() < until and len(steps()) < 12:  # a machine that has got quicker would come to the end
            time.sleep(0.002)
    else:
        wanted = draw.randrange(1, 13)
        while len(steps()) < wanted:
            if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                break
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.03))
    os.kill(pid, signal.SIGKILL)
    code, path = ended(pid), output / "checkpoint.pt"
    saved = torch.load(path, weights_only=True)["step"] if path.exists() else 0
    lives.append({"code": code, "steps": steps(), "saved": saved})
code = ended(start("train", recipe, "--output", str(output)))
lives.append({"code": code, "steps": steps(), "saved": None})
print(json.dumps([whole, lives]))
"""


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def assert_same(one: Any, other: Any) -> None:
    """Two states are equal to the bit, whatever they consist of."""
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for mine, theirs in zip(one, other, strict=True):
            assert_same(mine, theirs)
    else:
        assert one == other


@pytest.mark.skipif(sys.platform == "win32", reason="processes are forked")
def test_kills_at_any_moment_cost_the_steps_since_the_checkpoint_and_nothing_else(tmp_path: Path) -> None:
    models = recipe_of(write_models(tmp_path))
    recipe = write_recipe(
        tmp_path,
        receiver=models["receiver"],
        sharer=models["sharer"],
        epochs=STEPS // 4,
        save_every=SAVE_EVERY,
        evaluate_every=50,
        keep="best",
    )
    output = tmp_path / "killed"
    (output / "fuser").mkdir(parents=True)
    for name in (".log.jsonl.17", "fuser/.fuser.safetensors.17", ".checkpoint.pt.17"):  # from kills at rare moments
        (output / name).write_bytes(b"half")
    command = [sys.executable, "-c", SERVER, str(recipe), str(output), str(KILLS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stderr
    whole, lives = json.loads(done.stdout)
    said = (tmp_path / "killed.said").read_text()
    assert [whole, *(life["code"] for life in lives)] == [0, *[-9] * KILLS, 0], said

    reached = saved = 0
    for life in lives:
        if life["steps"]:
            assert life["steps"] == list(range(saved + 1, life["steps"][-1] + 1))  # from the checkpoint on
            reached = max(reached, life["steps"][-1])
        if life["saved"] is not None:
            saved = life["saved"]
            # The step in progress was not done; all others but those since the checkpoint are kept.
            assert 0 <= reached - 1 - saved <= SAVE_EVERY or reached == saved
    assert reached == STEPS and any(life["saved"] for life in lives)

    one, other = tmp_path / "killed-whole", output
    assert files(one) == files(other)  # nothing half-written is left
    for name in ("fuser.safetensors", "training_ids.txt"):
        assert (one / "fuser" / name).read_bytes() == (other / "fuser" / name).read_bytes()
    logs = [[json.loads(line) for line in (o / "log.jsonl").read_text().splitlines()] for o in (one, other)]
    states = [torch.load(o / "checkpoint.pt", weights_only=True) for o in (one, other)]
    about = [json.loads((o / "fuser" / "config.json").read_text()) for o in (one, other)]
    for row in (*logs[0], *logs[1], *states, *(a["training"] for a in about)):
        assert row.pop("seconds") >= 0
    assert_same(logs[0], logs[1])
    assert_same(states[0], states[1])
    assert about[0] == about[1]
