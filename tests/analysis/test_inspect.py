"""The page of one prompt: its numbers, that nothing in it is markup, its size, and a browser that uses it."""

from __future__ import annotations

import base64
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from cache2cache import C2C
from cache2cache.alignment.chat import render
from cache2cache.analysis import inspect
from cache2cache.analysis.inspect import look, page
from training.runs import pair_of

TEXT = "What is <b>the</b> capital?</script><script>alert('x')</script> & \"quotes\" <!-- 水 \u2028\nPlants need light."
CHAT = [{"role": "user", "content": TEXT}]


def opened() -> C2C:
    """A pair with some closed gates and weights that differ."""
    pair = pair_of()
    with torch.no_grad():
        pair.fusers[0].gate_logit[torch.tensor([1, 5])] = -0.25
    return pair


def inside(text: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    assert found
    return json.loads(found[1])  # type: ignore[no-any-return]


# ---- numbers ---------------------------------------------------------------------------------------------------------


def test_next_tokens_are_those_of_the_models() -> None:
    pair = opened()
    found = look(pair, CHAT, prefix="The answer is")
    for who, lm in (("receiver", pair.receiver), ("sharer", pair.sharers[0])):
        ids = render(lm.need_tokenizer(), CHAT, prefix="The answer is").ids
        p = lm.model(torch.tensor([ids])).logits[0, -1].softmax(-1)
        tokens = found["next"][who]["tokens"]
        assert [t[1] for t in tokens] == pytest.approx(p.topk(10).values.tolist(), abs=2e-5)
        entropy = -sum(x * math.log2(x) for x in p.tolist() if x > 0)
        assert found["next"][who]["entropy"] == pytest.approx(entropy, abs=1e-3)
        assert (
            "".join(found[who]["tokens"]).replace("\ufffd", "").startswith(render(lm.need_tokenizer(), CHAT).text[:8])
        )
        assert len(found[who]["tokens"]) == len(ids)
    top = found["next"]["c2c"]["tokens"]
    tokenizer = pair.receiver.need_tokenizer()
    scores = pair.score([CHAT], [[[i] for i in range(tokenizer.vocab_size)]], prefix="The answer is")[0]
    assert top[0][1] == pytest.approx(max(math.exp(s.logprob) for s in scores), abs=2e-5)
    assert found["next"]["c2c"] != found["next"]["receiver"]


def test_map_weights_and_change() -> None:
    pair = opened()
    found = look(pair, CHAT)
    prompt = pair.encode(CHAT)
    assert found["map"][:-1] == list(prompt.maps[0][:-1]) and found["map"][-1] == -1
    assert found["fused"] == [t for t, s in enumerate(prompt.maps[0][:-1]) if s >= 0]
    weights = torch.tensor(found["weights"])
    assert weights.shape == (6, len(found["fused"]), 3) and 0 < weights.min() < weights.max() < 1
    change = torch.tensor(found["change"])
    assert change.shape == (6, len(found["fused"]))
    assert (change.amax(1) > 0).tolist() == [True, False, True, True, True, False]  # a closed module changes nothing
    fused, clean = pair.prefill([CHAT]), pair.prefill([CHAT], sharer_mask=0)
    t = found["fused"][3]
    new, old = fused.kv.values[0, 0, :, t], clean.kv.values[0, 0, :, t]
    assert change[3, 3].item() == pytest.approx(((new - old).norm() / old.norm()).item(), abs=1e-4)


def test_variants_without_weights_or_gates() -> None:
    for settings in ({"weighting": False}, {"gating": False}, {"variant": "ridge", "gate_init": 0.0}):
        found = look(pair_of(**settings), CHAT)
        assert (found["weights"] is None) == (settings.get("weighting") is False or "variant" in settings)
        assert inside(page({"about": {}, **found}))["heads"] == (0 if found["weights"] is None else 3)
    short = look(opened(), [{"role": "user", "content": "x"}])
    assert page({"about": {}, **short})


def test_models_from_folders_are_named_without_them() -> None:
    pair = opened()
    pair.receiver.name = "/home/somebody/models/mine"
    assert look(pair, CHAT)["receiver"]["name"] == "mine"


# ---- the page --------------------------------------------------------------------------------------------------------


def test_nothing_of_the_prompt_is_markup() -> None:
    data = {"about": {"fuser": "</script><i>", "command": TEXT}, **look(opened(), CHAT, prefix="<u>")}
    data["receiver"]["name"] = "<img src=x onerror=alert(1)>"
    data["next"]["c2c"]["tokens"][0][0] = "</script>"
    text = page(data)
    template = inspect.TEMPLATE.read_text(encoding="utf-8")
    for markup in ("<script", "</script", "<b>", "<!--", "<u>", "<img", "<i>"):
        assert text.count(markup) == template.count(markup), markup
    found = inside(text)
    assert found["prompt"] == CHAT and found["prefix"] == "<u>" and found["about"]["command"] == TEXT
    assert found["receiver"]["tokens"] == data["receiver"]["tokens"]
    assert "&lt;img src=x" in text.partition("</title>")[0]
    assert not re.search(r"(src|href)\s*=|url\(|@import|fetch\(|https?://(?!www\.w3\.org/2000/svg)", template)


def test_packed_numbers() -> None:
    data = {"about": {}, **look(opened(), CHAT)}
    found = inside(page(data))
    weights = torch.frombuffer(bytearray(base64.b64decode(found["weights"])), dtype=torch.uint8).float() / 255
    torch.testing.assert_close(weights, torch.tensor(data["weights"]).flatten(), atol=0.0021, rtol=0)
    change = torch.frombuffer(bytearray(base64.b64decode(found["change"])), dtype=torch.uint8).float() / 255
    expected = torch.tensor(data["change"]).flatten()
    torch.testing.assert_close(change * found["change_unit"], expected, atol=expected.max().item() / 500, rtol=0)


def large(tokens: int) -> dict[str, Any]:
    """What `look` gives for a pair as large as Qwen3-0.6B and a prompt of `tokens` tokens."""
    n, heads, fused = 28, 8, tokens - 1
    data = {"about": {}, **look(opened(), CHAT)}
    for who in ("receiver", "sharer"):
        data[who]["tokens"] = ["<|im_start|>"] * tokens
    kind = {"open": [True] * n, "logit": [0.12345] * n}
    layers = {"receiver_layers": list(range(n)), "sharer_layers": list(range(n)), "keys": kind, "values": kind}
    data["layers"] = {**layers, "depth": {"receiver": n, "sharer": n}, "open_share": 1.0}
    data |= {"content": [True] * tokens, "map": [*range(fused), -1], "fused": list(range(fused))}
    torch.manual_seed(0)
    return data | {"weights": torch.rand(2 * n, fused, heads).tolist(), "change": torch.rand(2 * n, fused).tolist()}


def test_size(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(page(large(200)).encode()) < 300_000
    assert inside(page(large(200)))["heads"] == 8
    monkeypatch.setattr(inspect, "PAGE_WEIGHTS", 10_000)  # a longer prompt's page has means over heads
    assert inside(page(large(40)))["heads"] == 1


# ---- a browser -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "inspect.html"
    path.write_text(
        page({"about": {"fuser": "tiny"}, **look(opened(), CHAT, prefix="The answer is")}), encoding="utf-8"
    )
    return path


@pytest.mark.parametrize(("width", "scheme"), [(1200, "light"), (1200, "dark"), (390, "light"), (390, "dark")])
def test_in_a_browser(browser: Any, file: Path, tmp_path: Path, width: int, scheme: str) -> None:
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True)
    tab = context.new_page()
    problems: list[str] = []
    asked: list[str] = []
    tab.on("pageerror", lambda error: problems.append(str(error)))
    tab.on("console", lambda message: problems.append(message.text) if message.type in ("error", "warning") else None)
    tab.on("dialog", lambda dialog: problems.append("a dialog: the prompt was run as a script") or dialog.dismiss())
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(file.as_uri())
    assert asked == [file.as_uri()]  # nothing else is loaded
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth"), "wider than the window"
    background = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background)[:3])) > 380) == (scheme == "light")
    # The text stands there as it was typed.
    shown = tab.inner_text("#receiver-tokens").replace("\n", "").replace("⏎", "\n")
    assert "</script><script>alert('x')</script>" in shown and '& "quotes" <!--' in shown
    assert tab.locator("#next .bar").count() == 30
    hint = tab.inner_text("#readout")
    assert "Point at a token" in hint

    # Pointing at a token shows its partner; pointing elsewhere lets go.
    chip = tab.locator("#receiver-tokens span").nth(12)
    chip.hover()
    partner = tab.evaluate("D.map[12]")
    assert tab.evaluate("[...document.querySelectorAll('#sharer-tokens .on')].map((x) => Number(x.dataset.i))") == [
        partner
    ]
    said = tab.inner_text("#readout")
    assert "receiver token 12" in said and f"sharer token {partner}" in said and "means over open layers" in said
    tab.locator("h1").hover()
    assert tab.inner_text("#readout") == hint and tab.locator(".chips .on").count() == 0

    # A click holds it; a layer is then pointed at and the two meet.
    chip.click()
    tab.locator("h1").hover()
    assert "receiver token 12" in tab.inner_text("#readout")
    tab.locator(".row[data-layer='1']").hover()
    said = " ".join(tab.inner_text("#readout").split())
    assert "receiver token 12" in said and "layer 1 ← sharer layer 2" in said
    assert "keys: gate closed, nothing is added" in said and re.search(
        r"values: weight 0\.\d\d \(mean of heads\)", said
    )
    tab.screenshot(path=tmp_path / "held.png")
    assert (tmp_path / "held.png").stat().st_size > 10_000
    chip.click()
    tab.locator("h1").hover()
    assert tab.inner_text("#readout") == hint

    # A sharer token that several receiver tokens read, or one; and a cell of the heat map, whose number is the data's.
    s = tab.evaluate("[...readers.keys()][5]")
    tab.locator("#sharer-tokens span").nth(s).click()
    readers = tab.evaluate(f"readers.get({s})")
    assert (
        tab.evaluate("[...document.querySelectorAll('#receiver-tokens .on')].map((x) => Number(x.dataset.i))")
        == readers
    )
    tab.locator("#sharer-tokens span").nth(s).click()
    tab.select_option("#kind", "1")
    tab.select_option("#head", "2")
    assert "values, head 2, mean over the open layers" in tab.inner_text("#shade")
    tab.locator("#cells").click(position={"x": 2, "y": 2})  # the first fused token in the top layer, layer 2: closed
    assert "values: gate closed" in tab.inner_text("#readout")
    size = tab.evaluate("ch")
    tab.locator("#cells").click(position={"x": 2, "y": 2 * size + 2})
    expected = tab.evaluate("(W[((3 + 0) * N + 0) * H + 2] / 255).toFixed(2)")
    assert f"values: weight {expected} (head 2)" in " ".join(tab.inner_text("#readout").split())
    tab.locator("#map").press("ArrowUp")
    tab.locator("#map").press("ArrowRight")
    assert tab.evaluate("[held.layer, slot.get(held.token)]") == [1, 1]
    tab.select_option("#what", "change")
    assert tab.locator("#head-label").is_hidden()
    assert problems == []
    context.close()
