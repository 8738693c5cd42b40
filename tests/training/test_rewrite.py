"""Rewritten responses: a tiny model and a made-up server as teachers, errors, kills, and what is left in the file."""

from __future__ import annotations

import gzip
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from cache2cache import C2CError, load_lm
from cache2cache.alignment.chat import render
from cache2cache.cli import main
from cache2cache.decode import generate
from cache2cache.kv import prefill_prompts
from cache2cache.training import rewrite as module
from cache2cache.training.data import Example, Messages, examples, read_chat, split
from cache2cache.training.rewrite import Answers, Response, Server, local, rewrite, served
from serving.wire import listening
from training.runs import config_of, lm_of, write_models, write_recipe, write_rows


def c2c(*arguments: object) -> int:
    with pytest.raises(SystemExit) as leaving:
        main([str(argument) for argument in arguments])
    return int(leaving.value.code or 0)


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def asked(count: int) -> list[Example]:
    return [Example(f"x:{n}", ({"role": "user", "content": f"What is {n}?"},), "", "old") for n in range(count)]


def teacher(*bad: int, seen: list[str] | None = None) -> Any:
    """Answers in capitals, backwards; fails at the numbers in `bad`."""

    def answers(chats: Sequence[Messages]) -> Answers:
        for index in reversed(range(len(chats))):
            text = chats[index][-1]["content"]
            if seen is not None:
                seen.append(text)
            failed = any(f" {n}?" in text for n in bad)
            yield index, C2CError("no") if failed else Response(text.upper(), ends="7" not in text)

    return answers


# ---- the file -------------------------------------------------------------------------------------------------------


def test_rows_are_written_one_by_one_and_never_asked_for_twice(tmp_path: Path) -> None:
    output = tmp_path / "new" / "out.jsonl"
    seen: list[str] = []
    marks: list[tuple[int, int]] = []
    done = rewrite(asked(9), output, "T", teacher(2, 5, seen=seen), lambda *mark: marks.append(mark))
    assert (done.written, done.there, len(seen)) == (7, 0, 9) and done.failed == ["x:5: no", "x:2: no"]
    assert marks[0] == (0, 0) and marks[-1] == (7, 2) and len(marks) == 10
    rows = rows_of(output)
    assert rows[0] == {
        "id": "x:8",
        "messages": [{"role": "user", "content": "What is 8?"}, {"role": "assistant", "content": "WHAT IS 8?"}],
        "ends": True,
        "teacher": "T",
        "generation": {},
    }
    assert [row["ends"] for row in rows] == [True, False, True, True, True, True, True]
    seen.clear()
    done = rewrite(asked(12), output, "T", teacher(5, seen=seen))  # three more rows, and one failure less
    assert (done.written, done.there, done.failed) == (4, 7, ["x:5: no"])
    assert sorted(seen) == sorted(f"What is {n}?" for n in (2, 5, 9, 10, 11))
    assert sorted(row["id"] for row in rows_of(output)) == sorted(f"x:{n}" for n in range(12) if n != 5)


@pytest.mark.parametrize("cut", [1, 5, 30, -1])
def test_a_cut_last_line_is_written_again(tmp_path: Path, cut: int) -> None:
    output = tmp_path / "out.jsonl"
    rewrite(asked(4), output, "T", teacher())
    whole = output.read_bytes()
    lines = whole.splitlines(keepends=True)
    output.write_bytes(b"".join(lines[:-1]) + lines[-1][:cut])
    assert rewrite(asked(4), output, "T", teacher()).written == 1
    assert output.read_bytes() == whole


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"prompt": "Q", "completion": "A"}\n', "line 1 of .*out.jsonl was not written by c2c rewrite"),
        (b"My notes, without a line break", "line 1 of .*out.jsonl was not written by c2c rewrite"),
        (b"[1]\n", "was not written by c2c rewrite"),
        (b'{"id": "x:0", "messages": [], "ends": true, "teacher": "other"}\n', "was written by other, not by T"),
        (b'{"id": "x:0", "messages": ["q", "a"], "ends": true, "teacher": "T"}\n', "line 1 answers another prompt"),
    ],
)
def test_other_files_stay_as_they_are(tmp_path: Path, content: bytes, words: str) -> None:
    output = tmp_path / "out.jsonl"
    output.write_bytes(content)
    with pytest.raises(C2CError, match=words):
        rewrite(asked(2), output, "T", teacher())
    assert output.read_bytes() == content


def test_answers_of_other_options_are_not_mixed(tmp_path: Path) -> None:
    output, how = tmp_path / "out.jsonl", {"max_new_tokens": 4, "temperature": 0.0}
    rewrite(asked(2), output, "T", teacher(), options=how)
    before = output.read_bytes()
    assert rows_of(output)[0]["generation"] == how
    with pytest.raises(C2CError, match=r'was written with .*"max_new_tokens": 4.*, not with .*"max_new_tokens": 8'):
        rewrite(asked(3), output, "T", teacher(), options={**how, "max_new_tokens": 8})
    assert output.read_bytes() == before
    assert rewrite(asked(3), output, "T", teacher(), options=how).written == 1
    rows = [{name: value for name, value in row.items() if name != "generation"} for row in rows_of(output)]
    output.write_text("".join(json.dumps(row) + "\n" for row in rows))  # as of an earlier version
    assert rewrite(asked(4), output, "T", teacher(), options=how).there == 3


def test_two_runs_at_once(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"

    def answers(chats: Sequence[Messages]) -> Answers:
        with pytest.raises(C2CError, match="another run is writing"):
            rewrite(asked(2), output, "T", teacher())
        yield 0, Response("a", True)

    assert rewrite(asked(1), output, "T", answers).written == 1


def test_a_teacher_that_only_fails_is_left(tmp_path: Path) -> None:
    seen: list[str] = []
    with pytest.raises(C2CError, match=r"20 rows failed one after the other, the last one x:10: no; 0 of 30"):
        rewrite(asked(30), tmp_path / "out.jsonl", "T", teacher(*range(30), seen=seen))
    assert len(seen) == module.STOP_AFTER
    spread = [n for n in range(30) if n % 6]  # five of six fail, but never twenty in a row
    assert rewrite(asked(30), tmp_path / "out.jsonl", "T", teacher(*spread)).written == 5


def test_prompts_too_long_for_the_teacher_do_not_end_a_run(tmp_path: Path) -> None:
    lm = lm_of("llama", max_position_embeddings=220)
    found = asked(40)
    found[:30] = [replace(e, messages=({"role": "user", "content": "word " * 300},)) for e in found[:30]]
    done = rewrite(found, tmp_path / "out.jsonl", "T", local(lm, max_new_tokens=4, batch_size=4))
    assert len(done.failed) >= 30 and done.written == 40 - len(done.failed) > 0


def test_a_local_teacher_does_not_think(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = lm_of("llama")
    tokenizer = lm.need_tokenizer()
    switch = "{% if enable_thinking is defined and not enable_thinking %}<no thinking>{% endif %}"
    monkeypatch.setattr(tokenizer, "chat_template", str(tokenizer.chat_template) + switch)
    seen: list[str] = []
    prefill = module.prefill_prompts
    monkeypatch.setattr(
        module, "prefill_prompts", lambda lm, rows: seen.extend(map(tokenizer.decode, rows)) or prefill(lm, rows)
    )
    list(local(lm, max_new_tokens=2, batch_size=2)([({"role": "user", "content": "Iron?"},)]))
    assert len(seen) == 1 and seen[0].endswith("<no thinking>")


# ---- a model here ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_local_answers_are_those_of_each_prompt_alone(family: str) -> None:
    lm = lm_of(family, max_position_embeddings=220)
    tokenizer = lm.need_tokenizer()
    chats: list[Messages] = [({"role": "user", "content": f"Plants {'and iron ' * (n % 4)}{n}"},) for n in range(7)]
    chats[3] = ({"role": "user", "content": "word " * 300},)
    chats[5] = ({"role": "system", "content": "S"}, *chats[5])
    # The end comes where it comes: the model's likeliest second token to the first prompt ends an answer.
    ids = render(tokenizer, list(chats[0])).ids
    first = generate(lm, prefill_prompts(lm, [ids]), max_new_tokens=12, do_sample=False)[0, len(ids) :].tolist()
    lm.model.generation_config.eos_token_id = [first[6], 1]
    found = dict(local(lm, max_new_tokens=12, batch_size=3)(chats))
    assert sorted(found) == list(range(7))
    for index, answer in found.items():
        if index == 3:
            assert isinstance(answer, C2CError) and "don't fit the context" in str(answer)
            continue
        ids = render(tokenizer, list(chats[index])).ids
        new = generate(lm, prefill_prompts(lm, [ids]), max_new_tokens=12, do_sample=False)[0, len(ids) :].tolist()
        ends = new[-1] in (first[6], 1)
        text = tokenizer.decode(new[:-1] if ends else new, skip_special_tokens=True).strip()
        assert answer == Response(text, ends) if text else isinstance(answer, C2CError)
    assert isinstance(found[0], Response) and found[0].ends
    assert any(isinstance(answer, Response) and not answer.ends for answer in found.values())
    warm = dict(local(lm, max_new_tokens=12, batch_size=3, temperature=5.0)(chats))
    assert warm[0] != found[0]


# ---- a served model -------------------------------------------------------------------------------------------------


@contextmanager
def openai(
    plan: dict[str, list[Any]] | None = None, models: Any = ("m",)
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A server that answers the last message in capitals, and what it was asked.

    `plan` names, by the last message, what is sent instead, one after the other: (status, body) or None to hang up.
    """
    seen: list[dict[str, Any]] = []
    plan = plan or {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._send(200, {"data": [{"id": name} for name in models]} if models is not None else "nothing")

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append({"path": self.path, "key": self.headers["Authorization"], **body})
            text = body["messages"][-1]["content"]
            if todo := plan.get(text):
                answer = todo.pop(0)
                if answer is not None:
                    self._send(*answer)
                return
            self._send(200, completion(text.upper()))

        def _send(self, status: int, body: Any, **headers: str) -> None:
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(content)

        def _answered(self, *_: Any) -> None:
            pass

        log_message = _answered  # type: ignore[assignment]

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/v1", seen
        server.shutdown()


def completion(text: str | None, finish: str | None = "stop") -> dict[str, Any]:
    return {"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": finish}]}


def test_a_served_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("C2C_TEACHER_KEY", "secret")
    plan = {
        "What is 1?": [(503, {"error": {"message": "busy"}}), None, (200, b"{half")],  # then it goes well
        "What is 2?": [(400, {"error": {"message": "too long\nfor me"}})],
        "What is 3?": [(200, completion("cut", "length"))],
        "What is 4?": [(200, completion(None))],
        "What is 5?": [(200, completion("x", "content_filter"))],
        "What is 6?": [(200, {"choices": []})],
        "What is 7?": [(500, b"<html>")] * 4,
        "What is 8?": [(200, ["no", "object"])],
    }
    with openai(plan) as (url, seen):
        server = Server(url, attempts=4, pause=0.001)
        assert server.model() == "m"
        done = rewrite(
            asked(10), tmp_path / "out.jsonl", "m", served(server, "m", max_new_tokens=33, parallel=3, temperature=0.5)
        )
    answers = {row["id"]: (row["messages"][-1]["content"], row["ends"]) for row in rows_of(tmp_path / "out.jsonl")}
    assert answers == {
        "x:0": ("WHAT IS 0?", True),
        "x:1": ("WHAT IS 1?", True),
        "x:3": ("cut", False),
        "x:9": ("WHAT IS 9?", True),
    }
    assert sorted(done.failed) == [
        "x:2: refused (400): too long for me",
        "x:4: the answer is empty",
        "x:5: the answer ended with 'content_filter'",
        "x:6: the answer is no chat completion",
        f"x:7: no answer from {url} in 4 attempts, the last one it said 500: <html>",
        "x:8: the answer is no chat completion",
    ]
    assert {(s["path"], s["key"], s["model"], s["max_tokens"], s["temperature"]) for s in seen} == {
        ("/v1/chat/completions", "Bearer secret", "m", 33, 0.5)
    }
    tries = [s["messages"][-1]["content"] for s in seen]
    assert [tries.count(f"What is {n}?") for n in range(10)] == [1, 4, 1, 1, 1, 1, 1, 4, 1, 1]
    assert "secret" not in (tmp_path / "out.jsonl").read_text()


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (401, r"refused \(401\): no; set C2C_TEACHER_KEY to its key"),
        (404, r"refused \(404\): no; check address and model"),
        (302, r"refused \(302\): no"),  # the prompts go where they were sent, and nowhere else
    ],
)
def test_what_no_row_can_mend_ends_the_run(tmp_path: Path, status: int, words: str) -> None:
    plan = {"What is 3?": [(status, {"error": {"message": "no"}})]}
    output = tmp_path / "out.jsonl"
    with openai(plan) as (url, _):
        answers = served(Server(url, pause=0.001), "m", max_new_tokens=3, parallel=1)
        with pytest.raises(C2CError, match=words):
            rewrite(asked(30), output, "m", answers)
        kept = len(rows_of(output))
        assert kept == 3
        done = rewrite(asked(30), output, "m", answers)
        assert (done.written, done.there) == (30 - kept, kept)
    assert len({row["id"] for row in rows_of(output)}) == len(rows_of(output)) == 30


def test_a_server_that_trickles_or_says_nothing() -> None:
    def trickle(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
        for _ in range(150):
            connection.sendall(b" ")
            time.sleep(0.02)

    for answer, limits in ((trickle, {"deadline": 0.1}), (lambda _: time.sleep(3), {"timeout": 0.1})):
        with listening(answer) as url:
            began = time.monotonic()
            with pytest.raises(C2CError, match=r"no answer from .* in 2 attempts"):
                Server(url, attempts=2, pause=0.001, **limits).model()
            assert time.monotonic() - began < 2


def test_addresses_and_models() -> None:
    for url, words in (
        ("http://user:pw@host/v1", "holds no user or password"),
        ("http:///v1", "is no address of a teacher"),
        ("http://host:port/v1", "is no address of a teacher"),
        ("ftp://host/v1", "is no address of a teacher"),
        ("http://host/v1?key=1", "is no address of a teacher"),
    ):
        with pytest.raises(C2CError, match=words):
            Server(url)
    for models, words in ((("a", "b"), "serves a, b; choose one"), ((), "serves no models"), (None, "doesn't list")):
        with openai(models=models) as (url, _), pytest.raises(C2CError, match=words):
            Server(url).model()
    with pytest.raises(C2CError, match=r"no answer from http://127.0.0.1:9/v1 in 2 attempts.*Connection"):
        Server("http://127.0.0.1:9/v1", attempts=2, pause=0.001).model()


# ---- the command ----------------------------------------------------------------------------------------------------


def test_the_command_and_training_on_what_it_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With a model here: killed in the middle, run again, and as if nothing had happened."""
    write_models(tmp_path)
    chats = [
        [{"from": "human" if i % 2 == 0 else "gpt", "value": f"{n} {i}"} for i in range(2 + 2 * (n % 3))]
        for n in range(25)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"conversations": chat}) + "\n" for chat in chats))
    recipe = write_recipe(tmp_path, data=[{"jsonl": str(tmp_path / "rows.jsonl"), "supervise": "all"}])
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"conversations": chat}) + "\n" for chat in chats))
    command = ["rewrite", recipe, tmp_path / "out.jsonl", "--teacher", tmp_path / "llama", "--max-new-tokens", 6]
    command += ["--batch-size", 1]
    code = "import sys; from cache2cache.cli import main; main(sys.argv[1:])"
    process = subprocess.Popen([sys.executable, "-c", code, *map(str, command)], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    try:
        while not (tmp_path / "out.jsonl").exists() or (tmp_path / "out.jsonl").read_bytes().count(b"\n") < 3:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.002)
    finally:
        process.kill()
        process.wait()
    there = (tmp_path / "out.jsonl").read_bytes().count(b"\n")
    total = sum(1 + n % 3 for n in range(25))
    assert 3 <= there < total
    with (tmp_path / "out.jsonl").open("ab") as file:
        file.write(b'{"id": "cut sh')
    assert c2c(*command) == 0
    said = capsys.readouterr()
    assert said.out == f"{tmp_path / 'out.jsonl'}\n"
    again = [*command[:2], tmp_path / "whole.jsonl", *command[3:]]
    assert c2c(*again) == 0
    rows = rows_of(tmp_path / "out.jsonl")
    assert rows == rows_of(tmp_path / "whole.jsonl")
    assert len({row["id"] for row in rows}) == len(rows) and f"{len(rows) - there} rows written" in said.err
    before = (tmp_path / "out.jsonl").read_bytes()
    assert c2c(*command) == 0 and (tmp_path / "out.jsonl").read_bytes() == before
    # A row's prompt is that of the example, its own last turn the teacher's answer; each turn is learned once, and all
    # of a chat on the side of the split that the chat itself is on.
    data = [[{"jsonl": str(tmp_path / name), "supervise": "all"}] for name in ("out.jsonl", "rows.jsonl")]
    found, asked = (examples(config_of(tmp_path, data=source)) for source in data)
    made, wanted = ({e.id: e for e in each} for each in (found, asked))
    assert len(found) == len(rows) and made.keys() == wanted.keys()
    for row in rows:
        ((messages, response),) = read_chat(row, "row")[-1:]
        example = made[row["id"]]
        assert (example.messages, example.response, example.ends) == (messages, response, row["ends"])
        assert (list(messages), example.turn) == (list(wanted[row["id"]].messages), wanted[row["id"]].turn)
    assert not all(row["ends"] for row in rows)
    held = [{e.id for e in split(each, 6)[1]} for each in (found, asked)]
    assert held[0] == held[1] and any(len([e for e in found if e.row == made[name].row]) > 1 for name in held[0])


def test_rows_from_a_server_by_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    packed = tmp_path / "rows.jsonl.gz"
    packed.write_bytes(gzip.compress(write_rows(tmp_path / "rows.jsonl", 5).read_bytes()))
    bad = {f"What is {n} of {'water and ' * (n % 3)}iron?": [(400, b"no")] * 9 for n in range(5)}
    with openai() as (url, seen):
        more = ("--extra-body", '{"top_k": 2}')
        assert c2c("rewrite", packed, tmp_path / "out.jsonl", "--teacher", url, *more) == 0
        assert sum(request.get("top_k") == 2 for request in seen) == 5
        assert "5 rows written, 0 were there, 0 failed" in capsys.readouterr().err
        (row, *_more) = rows_of(tmp_path / "out.jsonl")
        assert row["teacher"] == "m" and row["generation"] == {"max_new_tokens": 512, "temperature": 0.0, "top_k": 2}
        assert row["messages"][-1]["content"] == row["messages"][0]["content"].upper()
    with openai(bad) as (url, _):
        assert c2c("rewrite", packed, tmp_path / "new.jsonl", "--teacher", url, "--model", "x") == 1
        assert "error: no row could be rewritten; the first: " in capsys.readouterr().err


def test_what_cannot_be_rewritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", 5)
    recipe = write_recipe(tmp_path, data=[{"task": "arc-easy"}])
    before = rows.read_bytes()
    for command, words in (
        ((recipe, tmp_path / "out.jsonl", "--teacher", "x"), "has no instruction rows (rows or jsonl) to rewrite"),
        ((rows, rows, "--teacher", "x"), "is what would be rewritten"),
        ((rows, tmp_path / "out.jsonl.gz", "--teacher", "x"), "that isn't packed; name it .jsonl"),
        ((rows, tmp_path / "out.jsonl", "--teacher", "x", "--set", "seed=1"), "--set goes over a recipe"),
        ((rows, tmp_path / "out.jsonl", "--teacher", "x", "--model", "y"), "--model is for a served teacher"),
        ((rows, tmp_path / "out.jsonl", "--teacher", "x", "--extra-body", "{"), "expected a JSON object in braces"),
        ((rows, tmp_path / "out.jsonl", "--teacher", "x", "--extra-body", "[1]"), "expected a JSON object in braces"),
        ((rows, tmp_path / "out.jsonl", "--teacher", "x", "--extra-body", '{"top_k": 2}'), "is for a served teacher"),
    ):
        assert c2c("rewrite", *command) == 1
        assert words in capsys.readouterr().err
    assert rows.read_bytes() == before and not (tmp_path / "out.jsonl").exists()


def test_the_teacher_is_a_model_as_any(tmp_path: Path) -> None:
    write_models(tmp_path)
    lm = load_lm(tmp_path / "llama")
    assert rewrite(asked(2), tmp_path / "out.jsonl", lm.name, local(lm, max_new_tokens=3, batch_size=2)).written
    assert {row["teacher"] for row in rows_of(tmp_path / "out.jsonl")} == {lm.name}
