"""Going on from a fuser of an earlier run (`start_from`): what it keeps, what the recipe says, what is refused."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cache2cache import C2C, C2CError, FuserConfig
from cache2cache.evaluation.loading import load_pair
from cache2cache.fuser import C2CFuser
from cache2cache.fuser.c2c import STATISTICS
from cache2cache.training import loop
from cache2cache.training.items import Prepared, prepare
from cache2cache.training.loop import Trainer
from cache2cache.training.objective import response_loss
from cache2cache.training.single import Alone
from cache2cache.training.start import is_begun, pair_to_train, start_run
from cache2cache.training.store import Store
from training.runs import CHATS, config_of, lm_of, pair_of, write_rows
from training.several import Cut

SMALL = {"hidden_dim": 8, "intermediate_dim": 6}


def started(folder: Path, sharers: Sequence[str] = ("qwen3",), **changes: Any) -> Trainer:
    """A run of the tiny pair, `start_from` among the changes."""
    config = config_of(folder, **changes)
    torch.manual_seed(config.seed)
    pair = pair_to_train(lm_of("llama"), [lm_of(name, 7) for name in sharers], config)
    return Trainer(pair, config, None, prepare(pair, config))


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose fuser is gone on from: as the packaged one begun from ridge, with statistics."""
    folder = tmp_path_factory.mktemp("earlier")
    write_rows(folder / "rows.jsonl")
    settings = {**SMALL, "normalize": True, "projection_init": "ridge", "dropout": 0.3, "anneal_steps": 7}
    started(folder, fuser=settings, weights_on_disk="float32").run()
    return folder / "run" / "fuser"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_rows(tmp_path / "rows.jsonl", 22)
    return tmp_path


@pytest.mark.parametrize("name", ["fuser", "adapter", "checkpoint.pt", "log.jsonl"])
def test_results_without_their_recipe_are_not_written_over(folder: Path, name: str) -> None:
    there = folder / "run" / name / ("config.json" if "." not in name else "")
    there.parent.mkdir(parents=True)
    there.write_text("{}")
    trainer = started(folder)
    with pytest.raises(C2CError, match=rf"holds {name}, but no recipe.json that says what of; choose another output"):
        trainer.run()
    assert [p.name for p in (folder / "run").iterdir() if p.name != ".lock"] == [name]


def test_a_users_hidden_files_stay(folder: Path) -> None:
    """What a run that was killed has left of its own files goes."""
    trainer = started(folder)
    (folder / "run").mkdir()
    own = [folder / "run" / name for name in (".checkpoint.pt.123", ".recipe.json.7")]
    others = [folder / "run" / name for name in (".notes.2024", ".npmrc.1")]
    for path in (*own, *others):
        path.write_text("x")
    trainer.run()
    assert [path.exists() for path in (*own, *others)] == [False, False, True, True]


def test_goes_on_where_the_other_run_ended(earlier: Path, folder: Path) -> None:
    """The same weights and statistics, so the same loss; then it learns, and says what it went on from."""
    rows = write_rows(folder / "more.jsonl", 30)  # names and so ids of their own
    trainer = started(
        folder, start_from=str(earlier), fuser={"dropout": 0.0, "anneal_steps": 50}, data=[{"jsonl": str(rows)}]
    )
    fuser = trainer.objective.pair.fusers[0]
    config = fuser.config
    assert (config.hidden_dim, config.dropout, config.anneal_steps, config.normalize) == (8, 0.0, 50, True)
    assert fuser.mlp1.dropout == 0.0  # and not only in the configuration
    before = load_file(earlier / "fuser.safetensors")
    assert all(torch.equal(before[name], tensor) for name, tensor in fuser.state_dict().items())
    models = {"receiver": trainer.objective.pair.receiver, "sharers": trainer.objective.pair.sharers}
    again = C2C.from_pretrained(earlier, **models)
    fuser.eval()
    first, same = (response_loss(pair, trainer.data.holdout, None)[0] for pair in (trainer.objective.pair, again))
    assert first.item() == same.item()

    read: list[tuple[int, int]] = []
    records: list[dict[str, Any]] = []
    result = trainer.run(records.append, lambda done, of: read.append((done, of)))
    assert not read  # its statistics are there
    # What there was before the first step is looked at too.
    assert records[0].keys() == {"step", "holdout_loss", "holdout_exact", "best_step", "seconds"}
    expected = response_loss(again, trainer.data.holdout, None, "example")[0].item()
    assert records[0]["step"] == 0 and records[0]["holdout_loss"] == pytest.approx(expected, rel=1e-5)
    log = [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text().splitlines()]
    assert log == records and [row["step"] for row in log] == list(range(len(log)))
    after = load_file(result / "fuser.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in STATISTICS)
    assert not torch.equal(before["mlp1.w1.weight"], after["mlp1.w1.weight"].float())
    record = json.loads((result / "config.json").read_text())["training"]
    assert record["recipe"]["start_from"] == str(earlier)
    assert record["started_from"] == json.loads((earlier / "config.json").read_text())["training"]
    ids = [set((place / "training_ids.txt").read_text().split()) for place in (earlier, result)]
    assert ids[1] == ids[0] | {item.id for item in trainer.data.train} and ids[0] < ids[1]


def copy_of(earlier: Path, folder: Path) -> Path:
    """One that may be lost."""
    return Path(shutil.copytree(earlier, folder / "there"))


@pytest.mark.parametrize("step", [1, 4])  # before the first checkpoint and behind it
def test_interrupted_it_ends_with_the_same_bytes(earlier: Path, folder: Path, step: int) -> None:
    """Whatever became of what it goes on from: the run has kept that."""

    def cut(record: dict[str, Any]) -> None:
        if record["step"] == step:
            raise Cut

    there = copy_of(earlier, folder)
    settings = {"start_from": str(there), "seed": 3, "fuser": {"dropout": 0.2}}
    expected = started(folder, output=str(folder / "whole"), **settings).run()
    with pytest.raises(Cut):
        started(folder, **settings).run(cut)
    shutil.rmtree(there)
    got = started(folder, **settings).run()
    for name in ("fuser.safetensors", "config.json", "training_ids.txt"):
        texts = [re.sub(rb'"seconds": [\d.]+', b"", (place / name).read_bytes()) for place in (got, expected)]
        assert texts[0] == texts[1], name
    steps = [json.loads(line)["step"] for line in (folder / "run" / "log.jsonl").read_text().splitlines()]
    assert steps == list(range(len(steps)))
    with pytest.raises(C2CError, match="no fuser at "):
        started(folder, **settings, output=str(folder / "new"))
    with pytest.raises(C2CError, match=r"holds a run of another recipe \(other fuser\)"):
        is_begun(config_of(folder, **settings | {"fuser": {}}))  # what isn't set is the other fuser's own


def test_a_run_that_makes_it_worse_leaves_what_there_was(
    earlier: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([6.0, 7.0, 8.0, 9.0])  # at steps 0, 5, 10, 12
    monkeypatch.setattr(loop, "evaluate", lambda *_: torch.tensor([next(losses), 0.0], dtype=torch.float64))
    settings = {"start_from": str(earlier), "keep": "best", "weights_on_disk": "float32"}
    result = started(folder, **settings).run()
    before, after = (load_file(place / "fuser.safetensors") for place in (earlier, result))
    assert json.loads((result / "config.json").read_text())["training"]["best_step"] == 0
    assert all(torch.equal(before[name], after[name]) for name in before if name != "temperature")


def test_several_processes_go_on_alike(earlier: Path, folder: Path) -> None:
    """Each has loaded the fuser, and one has kept it for the run."""
    trainers = [started(folder, start_from=str(earlier), max_steps=1) for _ in range(2)]
    trainers[0].run()
    again = started(folder, start_from=str(earlier), max_steps=1)
    assert sorted(p.name for p in (folder / "run" / "start" / "0").iterdir()) == [
        "config.json", "fuser.safetensors", "training_ids.txt",
    ]  # fmt: skip
    states = [t.objective.pair.fusers[0].state_dict() for t in (trainers[1], again)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_pair_with_a_new_fuser_is_refused(earlier: Path, folder: Path) -> None:
    config = config_of(folder, start_from=str(earlier), fuser={})
    with pytest.raises(C2CError, match="the pair's fuser is a new one; make the pair with"):
        Trainer(pair_of(), config, None, Prepared([], [], 0))


def test_a_loaded_pair_goes_on_without_the_key(earlier: Path, folder: Path) -> None:
    """In Python: it isn't calibrated or begun from ridge again."""
    pair = C2C.from_pretrained(earlier, receiver=lm_of("llama"), sharers=[lm_of("qwen3", 7)])
    before = {name: tensor.clone() for name, tensor in pair.fusers[0].state_dict().items()}
    config = config_of(folder)
    trainer = Trainer(pair, config, None, prepare(pair, config))
    trainer._start()
    assert all(torch.equal(before[name], tensor) for name, tensor in pair.fusers[0].state_dict().items())


def test_one_of_several_in_a_folder(earlier: Path, folder: Path) -> None:
    shutil.copytree(earlier, folder / "both" / "1")
    with pytest.raises(C2CError, match=r"holds no fuser itself, but .*both/1 does; name that"):
        started(folder, start_from=str(folder / "both"), fuser={})
    source = {"source": str(folder / "both"), "subfolder": "1"}
    assert started(folder, start_from=source, fuser={}).objective.pair.fusers[0].loaded


def test_a_hold_out_that_was_trained_on_is_named(earlier: Path, folder: Path) -> None:
    """With the same rows and one as large none of it was; of one twice as large the rest was."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        started(folder, start_from=str(earlier), max_steps=1).run()
    with pytest.warns(match="6 of the hold-out's 12 examples are among those that what start_from names was trained"):
        started(folder, start_from=str(earlier), max_steps=1, holdout=12, output=str(folder / "other")).run()


def test_a_second_sharer_beside_a_trained_one(earlier: Path, folder: Path) -> None:
    """Before training the pair answers as with the first fuser alone, where the second one begins at zero."""
    sharers = [{"source": "first"}, {"source": "second"}]
    new = {"hidden_dim": 12, "intermediate_dim": 4, "gating": False, "zero_init": True, "normalize": True}
    settings: dict[str, Any] = {"fuser": new}
    trainer = started(
        folder, ("qwen3", "gemma3"), sharer=sharers, start_from=[str(earlier), None], **settings, epochs=1
    )
    pair = trainer.objective.pair
    assert [fuser.config.hidden_dim for fuser in pair.fusers if isinstance(fuser, C2CFuser)] == [8, 12]
    alone = C2C.from_pretrained(earlier, receiver=pair.receiver, sharers=pair.sharers[:1])
    pair.fusers.eval()
    torch.testing.assert_close(pair.prefill(CHATS[1]).kv.keys, alone.prefill(CHATS[1]).kv.keys, rtol=0, atol=1e-6)
    read: list[tuple[int, int]] = []
    fusers = trainer.run(on_calibration=lambda done, of: read.append((done, of)))
    assert read[-1] == (8, 8)  # for the new one
    mine, new_one = (load_file(fusers / str(j) / "fuser.safetensors") for j in (0, 1))
    assert torch.equal(mine["sharer_mean"], load_file(earlier / "fuser.safetensors")["sharer_mean"])
    assert new_one["sharer_mean"].abs().max() > 0
    records = [json.loads((fusers / str(j) / "config.json").read_text())["training"] for j in (0, 1)]
    assert "started_from" in records[0] and "started_from" not in records[1]
    ids = [(fusers / str(j) / "training_ids.txt").read_text() for j in (0, 1)]
    assert ids[0] == ids[1] and set((earlier / "training_ids.txt").read_text().split()) <= set(ids[0].split())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"start_from": "nowhere"}, "no fuser at 'nowhere'; expected a folder"),
        ({"fuser": {"hidden_dim": 9}}, r"fuser.hidden_dim 8, the recipe asks for 9; leave fuser.hidden_dim out"),
        ({"fuser": {"variant": "bottleneck"}}, "fuser.variant 'c2c', the recipe asks for 'bottleneck'"),
        ({"fuser": {"layer_map": [[0, 0]]}}, r"fuser.layer_map .*, the recipe asks for \[\(0, 0\)\]"),
        ({"fuser": {"gating": False}}, "fuser.gating True, the recipe asks for False"),
    ],
)
def test_what_is_not_there_or_another_fuser_is_refused(
    earlier: Path, folder: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(C2CError, match=said):
        started(folder, **{"start_from": str(earlier), "fuser": {}} | changes)


def test_what_says_where_weights_begin_may_stay_in_the_recipe(earlier: Path, folder: Path) -> None:
    settings = {**SMALL, "layer_map": "terminal", "zero_init": True, "projection_init": "random", "gate_init": -1.0}
    config = started(folder, start_from=str(earlier), fuser=settings).objective.pair.fusers[0].config
    assert (config.gate_init, config.zero_init, config.projection_init) == (0.0, False, "ridge")


def test_a_fitted_fuser_is_refused(folder: Path) -> None:
    pair_of(variant="ridge").save_pretrained(folder / "fuser")
    with pytest.raises(C2CError, match=r"start_from .* is of the variant ridge, which is fitted and not trained"):
        started(folder, start_from=str(folder / "fuser"), fuser={})


@pytest.mark.filterwarnings("ignore:.*include_response")
def test_one_from_another_token_map_goes_on_with_that_of_training(folder: Path) -> None:
    pair_of(token_map="first", fuse_response=True).save_pretrained(folder / "fuser")
    with pytest.warns() as said:
        config = started(folder, start_from=str(folder / "fuser"), fuser={}).objective.pair.fusers[0].config
    assert (config.token_map, config.fuse_response) == ("span", False)
    assert [str(w.message).partition(" has ")[2] for w in said if "has" in str(w.message)] == [
        "token_map 'first'; what is trained has 'span'",
        "fuse_response True; what is trained has False",
    ]


def test_temperatures_that_would_rise_are_refused(folder: Path) -> None:
    pair_of(final_temperature=0.1).save_pretrained(folder / "fuser")
    with pytest.raises(C2CError, match=r"the recipe's fuser don't go together: .*annealed downwards"):
        started(folder, start_from=str(folder / "fuser"), fuser={"initial_temperature": 0.05})


def test_one_that_replaces_the_cache_has_no_second_beside_it(folder: Path) -> None:
    pair_of(gating=False, residual=False).save_pretrained(folder / "fuser")
    sharers = [{"source": "first"}, {"source": "second"}]
    with pytest.raises(C2CError, match="several sharers' changes are summed"):
        started(folder, ("qwen3", "qwen2"), sharer=sharers, start_from=[str(folder / "fuser"), None], fuser=SMALL)


def test_a_new_one_from_ridge_beside_a_trained_one_is_refused(earlier: Path, folder: Path) -> None:
    sharers = [{"source": "first"}, {"source": "second"}]
    settings = {**SMALL, "projection_init": "ridge"}
    with pytest.raises(C2CError, match="begins a new fuser with the whole change"):
        started(folder, ("qwen3", "qwen2"), sharer=sharers, start_from=[str(earlier), None], fuser=settings)


def test_a_fitted_fuser_beside_a_trained_one_is_refused(earlier: Path, folder: Path) -> None:
    sharers = [{"source": "first"}, {"source": "second"}]
    with pytest.raises(C2CError, match=r"fuser\.variant ridge is fitted and not trained; leave start_from out"):
        started(folder, ("qwen3", "qwen2"), sharer=sharers, start_from=[str(earlier), None], fuser={"variant": "ridge"})


def test_models_of_other_shapes_are_refused_and_others_of_one_shape_named(earlier: Path, folder: Path) -> None:
    with pytest.raises(C2CError, match=r"the fuser is for sharer .*train a fuser for this pair"):
        started(folder, ("qwen2",), start_from=str(earlier), fuser={})
    config = config_of(folder, start_from=str(earlier), fuser={})
    with pytest.warns(match="the fuser was trained for receiver"):
        pair = pair_to_train(lm_of("llama", 5), [lm_of("qwen3", 7)], config)
    mine = pair.fusers[0].config.receiver
    assert mine is not None and mine.fingerprint == pair.receiver.fingerprint  # from now on it is for this one


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"start_from": ["a", "b"]}, "start_from names 2 fusers for 1 sharers; give each sharer one, or null"),
        ({"start_from": "a", "sharer": [{"source": "x"}, {"source": "y"}]}, "start_from names 1 fusers for 2 sharers"),
        ({"start_from": "a", "method": "single"}, "start_from is a fuser, and method: single trains none"),
    ],
)
def test_bad_recipes(folder: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        config_of(folder, **changes)


def test_without_it_new_fusers_are_those_of_from_models(folder: Path) -> None:
    config = config_of(folder)
    pairs = []
    for make in (lambda r, s: pair_to_train(r, s, config), lambda r, s: C2C.from_models(r, s, config.fuser)):
        torch.manual_seed(0)
        pairs.append(make(lm_of("llama"), [lm_of("qwen3", 7)]))
    states = [pair.fusers[0].state_dict() for pair in pairs]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert pairs[0].fusers[0].config == pairs[1].fusers[0].config


# ---- the run's folder ------------------------------------------------------------------------------------------------


def test_a_recipe_is_the_same_by_what_it_means(folder: Path) -> None:
    """Keys that an earlier version hadn't, and defaults that are written down, make no other recipe."""
    config = config_of(folder, fuser={"variant": "bottleneck"})
    assert start_run(config) is False and is_begun(config)
    path = folder / "run" / "recipe.json"
    known = json.loads(path.read_text())
    assert known["fuser"] == {"variant": "bottleneck"}  # and not sizes that this variant hasn't
    del known["start_from"], known["data_seed"]
    path.write_text(json.dumps(known))
    assert is_begun(config) and is_begun(config_of(folder, fuser={"variant": "bottleneck", "hidden_dim": 128}))
    assert is_begun(config_of(folder, fuser={"variant": "bottleneck"}, accumulate=2, save_every=7))
    with pytest.raises(C2CError, match=r"holds a run of another recipe \(other epochs, fuser\); choose another output"):
        is_begun(config_of(folder, fuser={"variant": "bottleneck", "hidden_dim": 1024}, epochs=2))
    path.write_text(json.dumps({**known, "key_of_the_future": 1}))
    with pytest.raises(C2CError, match=r"another recipe .*key_of_the_future"):
        is_begun(config)


def test_an_ended_run_writes_its_weights_as_another_type(folder: Path) -> None:
    trainer = started(folder)
    small = load_file(trainer.run() / "fuser.safetensors")
    again = started(folder, weights_on_disk="float32")
    whole = load_file(again.run() / "fuser.safetensors")
    assert again.step == trainer.step and small["mlp1.w1.weight"].dtype == torch.bfloat16
    assert torch.equal(whole["mlp1.w1.weight"], trainer.objective.pair.fusers[0].state_dict()["mlp1.w1.weight"])


def test_prefills_from_elsewhere_behind_an_interruption_are_warned_of(folder: Path) -> None:
    def cut(record: dict[str, Any]) -> None:
        if record["step"] == 4:
            raise Cut

    trainer = started(folder)
    with pytest.raises(Cut):
        trainer.run(cut)
    pair, data = trainer.objective.pair, trainer.data
    store = Store(folder / "store", pair.sharers[0], "int8")
    store.fill(pair.sharers[0], [list(item.prompt.sharers[0]) for item in [*data.train, *data.holdout]])
    with pytest.warns(match=r"from computed, computed .* goes on from computed, float32 kept as int8"):
        Trainer(pair, trainer.config, store, data).run()


def test_what_no_training_takes_is_said_before_prompts_are_read(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl")
    with pytest.raises(C2CError, match="distill compares next-token distributions"):
        pair_to_train(lm_of("llama"), [lm_of("qwen3")], config_of(tmp_path, distill=0.5))
    with pytest.raises(C2CError, match="variant ridge chooses its penalty on the hold-out"):
        pair_to_train(lm_of("llama"), [lm_of("qwen3")], config_of(tmp_path, fuser={"variant": "ridge"}, holdout=0))
    with pytest.raises(ValueError, match="set calibration_prompts to 2 or more"):
        config_of(tmp_path, fuser={"projection_init": "ridge"}, calibration_prompts=1)


def test_the_date_of_a_template_is_not_today_s(tiny_pair_folder: Path, tmp_path: Path) -> None:
    """A store filled yesterday would lack every prompt, and an evaluation would ask others."""
    models = [lm_of("llama"), lm_of("qwen3", 7)]
    for lm in models:
        tokenizer = lm.need_tokenizer()
        tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}: " + str(tokenizer.chat_template)
    pair = pair_to_train(models[0], models[1:], config_of(tmp_path))
    chat = [{"role": "user", "content": "Hi"}]
    read = {pair.rendered(lm, chat).text.partition(":")[0] for lm in models}
    alone = Alone(models[0])
    assert read == {"26 Jul 2024"} and alone.encode(chat).receiver == pair.encode(chat).receiver
    assert not C2C.from_models(*models, FuserConfig(**SMALL)).rendered(models[0], chat).text.startswith("26 Jul 2024")
    root = tiny_pair_folder.parent
    given = (str(root / "llama"), "auto"), ([str(root / "qwen3")], "auto")
    measured, _ = load_pair([str(tiny_pair_folder)], [None], *given)
    assert measured.rendered(models[0], chat).text.startswith("26 Jul 2024")
