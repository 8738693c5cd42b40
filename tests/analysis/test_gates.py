"""Weights against the equations, and closing a layer against a closed gate."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cache2cache import C2C, C2CError
from cache2cache.analysis import gates, plots, runs
from cache2cache.analysis.runs import Data, Setup
from cache2cache.fuser import C2CFuser
from cache2cache.kv import Prefilled
from cache2cache.pair import FusedCache, where_to_fuse
from training.runs import items_of, pair_of, write_questions, write_rows


def fuser_of(pair: C2C) -> C2CFuser:
    fuser = pair.fusers[0]
    assert isinstance(fuser, C2CFuser)
    return fuser


def fused_of(pair: C2C) -> tuple[list[Any], Prefilled, FusedCache]:
    items = items_of(pair)
    prompts = [i.prompt for i in items]
    clean, cache = runs.read(pair, prompts, None)
    return items, clean, pair.fuse(prompts, clean=clean, sharers=[(cache, runs.lengths_of(prompts))])


# ---- weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"variant": "bottleneck"}, {"normalize": True}, {"variant": "c2c-c"}])
def test_weights_are_what_the_fuser_multiplies_with(settings: dict[str, Any]) -> None:
    """Where every projected number is 1, what is added is the weight itself."""
    pair = pair_of(**settings)
    fuser = fuser_of(pair)
    with torch.no_grad():
        if settings.get("normalize"):
            fuser.sharer_mean.normal_()
            fuser.sharer_std.uniform_(0.5, 2)
            fuser.receiver_mean.normal_()
        fuser.proj_out.weight.zero_()
        assert fuser.proj_out.bias is not None
        fuser.proj_out.bias.fill_(1.0)
    prompts = [i.prompt for i in items_of(pair)]
    clean, cache = runs.read(pair, prompts, None)
    lengths = runs.lengths_of(prompts)
    where, _ = where_to_fuse(prompts, 0, clean.kv.length, cache.length, lengths)
    fused = pair.fuse(prompts, clean=clean, sharers=[(cache, lengths)])
    weights = torch.cat(list(gates.weights_at(fuser, clean.kv, cache, where)), dim=1)
    n = len(fuser.receiver_layers)
    assert weights.shape == (2 * n, where.shape[1], 3) and weights.std() > 0.01
    for k, kind in enumerate(("keys", "values")):
        for i, layer in enumerate(fuser.receiver_layers.tolist()):
            added = getattr(fused.kv, kind)[layer] - getattr(clean.kv, kind)[layer]
            at = added[where[0], :, where[1]]  # (N, H, D)
            torch.testing.assert_close(at, weights[k * n + i, :, :, None].expand_as(at), atol=2e-5, rtol=1e-4)


def tallied(pair: C2C, size: int) -> dict[str, torch.Tensor]:
    fuser, items = fuser_of(pair), items_of(pair)
    state = gates.empty(fuser, len(items), closing=False)
    for begin in range(0, len(items), size):
        prompts = [i.prompt for i in items[begin : begin + size]]
        clean, cache = runs.read(pair, prompts, None)
        lengths = runs.lengths_of(prompts)
        where, _ = where_to_fuse(prompts, 0, clean.kv.length, cache.length, lengths)
        fused = pair.fuse(prompts, clean=clean, sharers=[(cache, lengths)])
        gates.add_weights(state, fuser, clean.kv, cache, where)
        gates.add_sizes(state, fuser, clean.kv, fused.kv, where)
    return state


def test_distributions_do_not_depend_on_the_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = pair_of()
    found = gates.weights_of(fuser_of(pair), tallied(pair, 4))
    monkeypatch.setattr(gates, "CHUNK", 5)
    again = gates.weights_of(fuser_of(pair), tallied(pair, 1))
    for kind in ("keys", "values"):
        one, other = found["weights"][kind], again["weights"][kind]
        assert one["mean"] == pytest.approx(other["mean"], abs=1e-5)
        for mine, theirs in zip(one["quantiles"], other["quantiles"], strict=True):
            assert mine == pytest.approx(theirs, abs=2 / gates.BINS) and mine == sorted(mine)
        assert found[f"{kind}_size"] == pytest.approx(again[f"{kind}_size"], rel=1e-4)
        assert all(sum(row) == pytest.approx(1, abs=1e-4) for row in one["histogram"])
        assert len(one["heads"]["mean"][0]) == 3
        spread = [h for layer in one["heads"]["deviation"] for h in layer]
        assert all(0 < x < 0.5 for x in spread)
    assert found["positions"] == again["positions"] > 70


def test_quantiles_and_shares_of_known_weights() -> None:
    counts = torch.zeros(gates.BINS, dtype=torch.long)
    counts[: gates.BINS] = 3  # evenly from 0 to 1
    assert gates.quantiles(counts) == pytest.approx(gates.QUANTILES)
    assert gates.share_above(counts[None]) == pytest.approx([0.6])
    one = torch.zeros(gates.BINS, dtype=torch.long)
    one[-1] = 9  # a weight of 1 falls into the last bin
    assert all(q > 0.99 for q in gates.quantiles(one)) and gates.share_above(one[None]) == [1.0]


def test_a_closed_module_adds_nothing() -> None:
    pair = pair_of()
    with torch.no_grad():
        fuser_of(pair).gate_logit[1] = -1.0
        fuser_of(pair).gate_logit[5] = -1.0
    found = gates.weights_of(fuser_of(pair), tallied(pair, 4))
    assert [x == 0 for x in found["keys_size"]] == [False, True, False]
    assert [x == 0 for x in found["values_size"]] == [False, False, True]
    about = gates.gates(fuser_of(pair))
    assert about["keys"]["open"] == [True, False, True] and about["keys"]["logit"] == [0.5, -1.0, 0.5]
    assert about["open_share"] == pytest.approx(4 / 6, abs=1e-5)
    assert about["receiver_layers"] == [0, 1, 2] and about["sharer_layers"] == [1, 2, 3]


# ---- closing ---------------------------------------------------------------------------------------------------------


def test_closing_a_closed_layer_changes_nothing() -> None:
    pair = pair_of()
    with torch.no_grad():
        fuser_of(pair).gate_logit[torch.tensor([1, 4])] = -1.0  # keys and values of layer 1
    items, clean, fused = fused_of(pair)
    before = gates.losses(pair, items, fused)
    for what in gates.CLOSED:
        assert gates.losses_without(pair, items, fused, clean.kv, 1, what).equal(before)
        assert not gates.losses_without(pair, items, fused, clean.kv, 2, what).equal(before)
    assert gates.losses(pair, items, fused).equal(before)  # closed only meanwhile


@pytest.mark.parametrize(("what", "modules"), [("both", [2, 5]), ("keys", [2]), ("values", [5])])
def test_closing_is_what_a_closed_gate_gives(what: str, modules: list[int]) -> None:
    pair = pair_of()
    items, clean, fused = fused_of(pair)
    before = gates.losses(pair, items, fused)
    found = gates.losses_without(pair, items, fused, clean.kv, 2, what)
    with torch.no_grad():
        fuser_of(pair).gate_logit[modules] = -1.0
    expected = gates.losses(pair, items, pair.fuse([i.prompt for i in items]))
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)
    assert (found - before).abs().max() > 1e-3


def test_all_layers_closed_is_the_receiver() -> None:
    pair = pair_of()
    items, clean, fused = fused_of(pair)
    for layer in range(3):
        for kind in ("keys", "values"):
            getattr(fused.kv, kind)[layer] = getattr(clean.kv, kind)[layer]
    assert gates.losses(pair, items, fused).equal(gates.losses(pair, items, replace(fused, kv=clean.kv)))


def test_what_can_be_closed() -> None:
    pair = pair_of()
    with torch.no_grad():
        fuser_of(pair).gate_logit[torch.tensor([0, 1, 4])] = -1.0  # keys of 0 and 1, values of 1
    assert gates.closable(fuser_of(pair)) == [("both", 2), ("keys", 2), ("values", 0), ("values", 2)]


def test_the_only_open_kind_of_a_layer_is_both(tmp_path: Path) -> None:
    pair = pair_of()
    fuser = fuser_of(pair)
    with torch.no_grad():
        fuser.gate_logit[torch.tensor([0, 1, 4])] = -1.0
    state = gates.empty(fuser, 3, closing=True)
    state["tokens"][:], state["loss"][:], state["receiver"][:] = 2.0, 4.0, 6.0
    state["closed"][:] = torch.tensor([5.0, 4.5, 4.25, 4.125])
    found = gates.worth(fuser, state)
    assert found["loss"] == 2.0 and found["tokens"] == 6 and found["all_closed"]["change"] == 1.0
    assert [one["change"] for one in found["both"]] == [0.125, 0.0, 0.5]
    assert [one["change"] for one in found["keys"]] == [0.0, 0.0, 0.25]
    assert [one["change"] for one in found["values"]] == [0.125, 0.0, 0.0625]
    assert found["both"][1] == {"change": 0.0, "interval": [0.0, 0.0]}
    assert found["both"][2]["interval"] == pytest.approx([0.5, 0.5])


# ---- runs ------------------------------------------------------------------------------------------------------------


def test_runs_on_questions_rows_and_prompts(tiny_pair_folder: Path, tmp_path: Path) -> None:
    questions = str(write_questions(tmp_path / "questions.jsonl", 9))
    (tmp_path / "prompts.txt").write_text("What is water?\nWhich one?\n")
    sources = {
        "questions": Data(tasks=[questions], prompt="short", limit=5),
        "rows": Data(jsonl=write_rows(tmp_path / "rows.jsonl", 7), limit=4),
        "prompts": Data(text=tmp_path / "prompts.txt"),
    }
    for name, data in sources.items():
        setup = Setup(str(tiny_pair_folder), tmp_path / name, batch_size=3)
        result = gates.run(setup, data, [tmp_path / "questions"] if name == "rows" else [])
        assert json.loads((tmp_path / name / "result.json").read_text()) == result
        assert ("closing" in result) == (name != "prompts")
        assert {"gates.png", "gates.svg", "heads.png", "heads.svg"} <= {p.name for p in setup.output.iterdir()}
        both_drawn = "questions: keys" in (setup.output / "gates.svg").read_text()
        assert both_drawn == (name == "rows")  # the other run is in the same figure
        assert gates.run(setup, data) == result  # everything is there already
    found = json.loads((tmp_path / "questions" / "result.json").read_text())
    assert found["closing"]["responses"] == 5 and 5 <= found["closing"]["tokens"] <= 10


def test_a_stopped_run_goes_on(tiny_pair_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = Data(tasks=[str(write_questions(tmp_path / "questions.jsonl", 9))])
    monkeypatch.setattr(runs, "SAVE_EVERY", 0.0)
    whole = gates.run(Setup(str(tiny_pair_folder), tmp_path / "whole", batch_size=3), data)
    real, calls = gates.add_sizes, []

    def interrupted(*arguments: Any) -> None:
        calls.append(1)
        if len(calls) == 2:  # after the weights of this batch were added
            raise KeyboardInterrupt
        real(*arguments)

    monkeypatch.setattr(gates, "add_sizes", interrupted)
    setup = Setup(str(tiny_pair_folder), tmp_path / "cut", batch_size=3)
    with pytest.raises(KeyboardInterrupt):
        gates.run(setup, data)
    assert gates.run(setup, data) == whole and len(calls) == 4


def test_the_gates_alone_need_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "load_pair", lambda *_: pytest.fail("a model was loaded"))
    result = gates.run(Setup(None, tmp_path / "out"), Data(limit=0))
    assert result["receiver_layers"] == list(range(2, 30)) and result["keys"]["open"] == [True] * 28
    assert (tmp_path / "out" / "gates.png").exists()
    (tmp_path / "out" / "result.json").write_text("{}")
    with pytest.raises(C2CError, match="holds no finished run of c2c analyze gates"):
        gates.run(Setup(None, tmp_path / "more"), Data(limit=0), [tmp_path / "out"])
    assert not (tmp_path / "more").exists()


def test_a_prompt_without_a_response_has_no_loss() -> None:
    pair = pair_of()
    items, _, fused = fused_of(pair)
    with pytest.raises(C2CError, match="item:1 has no response"):
        gates.losses(pair, [items[0], replace(items[1], response=[])], fused)


def test_the_larger_of_two_runs_is_not_cut_off() -> None:
    _, axes = plots.figure(1, 1, (3, 3))
    results = [(str(i), {"receiver_layers": [0, 1], "keys_size": [i, i], "values_size": [i, i]}) for i in (1, 9)]
    for index, (_, result) in enumerate(results):
        gates._draw_size(axes[0, 0], result, "-", results, index)
    low, high = axes[0, 0].get_ylim()
    assert low == 0 and high >= 9
