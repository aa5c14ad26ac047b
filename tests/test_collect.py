"""Collecting from a server on this machine, which misbehaves: every job ends once, whatever happens to both."""

import contextlib
import datetime
import email.utils
import gzip
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import loopback
import micro
import pytest
from loopback import Loopback, Sent

from miracle_jax import asking, collect, endpoint, responses, storage
from miracle_jax.attributes import Schema
from miracle_jax.errors import UserError
from miracle_jax.instructions import Instructions

pytest.importorskip("openai", reason="bash launch/setup.sh corpus")

KEY = "sk-test-0123456789abcdef"
SMALL = ["--splits", "2", "1", "1", "--backoff", "0", "--timeout", "5"]
"""26 jobs: 2 + 1 topics for six aspects, one for eight personalities."""
JOBS = 26


@pytest.fixture(autouse=True)
def without_key(monkeypatch):
    monkeypatch.delenv(endpoint.KEY_VARIABLE, raising=False)


def flags(url: str, out: Path, *more: str) -> list[str]:
    return ["--endpoint", url, "--model", "parrot", "--out", str(out), *SMALL, *map(str, more)]


def records(out: Path) -> list[dict]:
    """Every line, as it is; not what a kill may have left behind the last."""
    whole, _, _ = (out / "transcripts.jsonl").read_text().rpartition("\n")
    return [json.loads(line) for line in whole.splitlines()]


def settings(out: Path) -> dict:
    return json.loads((out / "collection.json").read_text())


@pytest.fixture
def run(tmp_path, capsys):
    """Runs the command in this process: (status, stdout, stderr)."""

    def run(url, *more, out=tmp_path / "out"):
        status = 0
        try:
            collect.main(flags(url, out, *more))
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    return run


def started(url: str, out: Path, *more: str, **how) -> subprocess.Popen:
    command = [sys.executable, "-m", "miracle_jax.collect", *flags(url, out, *more)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=micro.ROOT, **pipes, **how)


def wait_for(journal: Path, lines: int) -> None:
    until = time.monotonic() + 60
    while not journal.exists() or journal.read_bytes().count(b"\n") < lines:
        assert time.monotonic() < until
        time.sleep(0.02)


def prompts(splits: tuple[int, int, int]) -> dict[str, str]:
    """Of every job, by its id."""
    topics = collect.split_topics(collect.read_topics(collect.BUNDLED), splits, 0)
    jobs, number = collect.jobs(Instructions.load(), topics, 1)
    found = {job.id: job.messages[0]["content"] for job in jobs}
    assert len(found) == number and len(set(found.values())) == number
    return found


def test_every_job_ends_once_though_all_goes_wrong_and_the_run_is_killed_three_times(tmp_path):
    splits = (140, 15, 15)
    of_job, out, journal = prompts(splits), tmp_path, tmp_path / "transcripts.jsonl"
    assert len(of_job) == 1050
    patience = ["--splits", *map(str, splits), "--timeout", "0.5", "--backoff", "0.02"]
    with Loopback(loopback.mixed(0.05)) as server:
        for kill_at in (150, 400, 700, None):
            finished = {record["id"] for record in records(out)} if journal.exists() else set()
            before = len(server.asked)
            with started(server.url, out, *patience) as process:
                if kill_at:
                    wait_for(journal, kill_at)
                    process.kill()
                said, errors = process.communicate(timeout=120)
            asked = {asked.prompt for asked in server.asked[before:]}
            assert not asked & {of_job[job] for job in finished}
            if kill_at == 400:
                with journal.open("ab") as file:
                    file.write(b'{"id": "torn", "sta')
    assert process.returncode == 0, errors
    assert "Traceback" not in errors
    assert len(server.asked) >= 2000 and max(Counter(asked.nth for asked in server.asked)) >= 3
    ended = records(out)
    assert Counter(record["id"] for record in ended) == Counter(list(of_job))
    failed = [record for record in ended if record["status"] == "failed"]
    assert all(bool(record["reason"]) == (record["status"] == "failed") for record in ended)
    assert len(failed) < 0.03 * len(ended)
    assert f"{1050 - len(failed):,} of 1,050 done, {len(failed):,} failed" in said
    assert all(collect.transcripts.parse(record["text"]) for record in ended if record["status"] == "done")


def test_the_record_of_a_job(run, tmp_path):
    def fault(asked):
        return ("500", "wrong transcript", "")[asked.nth] if "optimistic" in asked.prompt else ""

    with Loopback(fault) as server:
        status, said, _ = run(server.url, "--splits", "1", "0", "0", "--price-in", "1", "--price-out", "2")
    assert status == 0
    found = {record["id"]: record for record in records(tmp_path / "out")}
    [topic] = settings(tmp_path / "out")["topics"]["train"]
    record = found["train/attitude=optimistic/0000/0"]
    three = [asked for asked in server.asked if "optimistic" in asked.prompt]
    seeds = [asked.body.pop("seed") for asked in three]
    assert seeds[0] == seeds[1] != seeds[2]
    assert three[0].body == {
        "model": "parrot", "messages": [{"role": "user", "content": three[0].prompt}],
        "temperature": 1.0, "top_p": 1.0, "max_tokens": 1000,
    }  # fmt: skip
    tokens = record.pop("completion_tokens")
    assert tokens > 50 and record == {
        "id": "train/attitude=optimistic/0000/0", "split": "train", "tag": {"attitude": "optimistic"}, "topic": topic,
        "status": "done", "reason": "", "text": record["text"], "finish": "stop", "attempts": 2, "requests": 3,
        "prompt_tokens": 2 * len(three[0].prompt.split()),
    }  # fmt: skip
    asked = sum(record["prompt_tokens"] for record in records(tmp_path / "out"))
    answered = sum(record["completion_tokens"] for record in records(tmp_path / "out"))
    cost = f"${(asked + 2 * answered) / 1e6:.2f}"
    assert f"6 of 6 done, 0 failed, {asked:,} + {answered:,} tokens, {cost}\n8 requests, 2 of them beyond" in said
    assert (tmp_path / "out" / "schema.toml").read_text() == Instructions.load().text


def test_aspects_are_balanced_and_topics_disjoint_wherever_it_stops():
    every = collect.read_topics(collect.BUNDLED)
    topics = collect.split_topics(every, (0, 30, 30), 0)
    assert sorted(sum(topics.values(), [])) == sorted(every) and len(every) >= 300
    assert collect.split_topics(every, (0, 30, 30), 1)["test"] != topics["test"]
    assert [len(some) for some in collect.split_topics(every, (5, 0, 2), 0).values()] == [5, 0, 2]
    jobs, number = collect.jobs(Instructions.load(), topics, 2)
    jobs = list(jobs)
    assert len(jobs) == number == (len(every) - 60 + 30) * 6 + (len(every) - 30) * 6 + 30 * 8
    aspects, splits = Counter(), Counter()
    for i, job in enumerate(jobs[: number // 2]):
        [*tag] = job.fields["tag"].items()
        splits[job.fields["split"]] += 1
        assert job.fields["topic"] in topics[job.fields["split"]]
        if job.fields["split"] == "train":
            aspects[tag[0]] += 1
            assert max(aspects.values()) - min(aspects.values()) <= 1 or i < 20
    assert all(count > 100 for count in splits.values()) and len(aspects) == 6
    tests = {str(job.fields["tag"]) for job in jobs if job.fields["split"] == "test"}
    assert len(tests) == len(Schema.load().personalities()) == 8


def test_the_key_is_nowhere(run, tmp_path, monkeypatch):
    """Also where the server repeats it, redirects to another, and the library tells all that it does."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    echo = json.dumps({"error": {"message": f"no: {KEY}{'.' * 180}{KEY}", "code": KEY}})
    content = loopback._completion(f"I heard {KEY}.", "x")
    kinds = [Sent(echo, 400), Sent(echo, 500), Sent(content), Sent(KEY, 500), ""]
    jobs, said = {}, ""
    with Loopback(lambda asked: kinds[jobs.setdefault(asked.prompt, len(jobs)) % len(kinds)]) as server:
        loud = os.environ | {"OPENAI_LOG": "debug"}
        with started(server.url, tmp_path / "out", "--in-flight", "1", env=loud) as process:
            cmdline = Path(f"/proc/{process.pid}/cmdline")
            said += cmdline.read_text() if cmdline.exists() else ""
            said += "".join(process.communicate(timeout=60))
        assert process.returncode == 0 and "HTTP Response" in said
        assert {asked.key for asked in server.asked} == {f"Bearer {KEY}"}
        failed = [record for record in records(tmp_path / "out") if record["status"] == "failed"]
        assert any(record["reason"].startswith("status 400: no: [key]....") for record in failed)
        assert "I heard [key]." in {record["text"] for record in failed}
        for status in (401, 403, 404, 402):
            server.fault = lambda asked, status=status: Sent(echo, status)
            code, *texts = run(server.url, out=tmp_path / str(status))
            assert code == 2 and ("refuses the key" in texts[1]) == (status in (401, 403)), texts
            said += "".join(texts)
        with Loopback() as other:
            to = {"Location": other.url + "/chat/completions"}
            server.fault = lambda asked: Sent(b"", 307, to)
            code, *texts = run(server.url, out=tmp_path / "redirect")
            assert code == 2 and "redirects to" in texts[1] and not other.asked
            said += "".join(texts)
    files = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 8
    assert KEY[:12] not in said and not any(KEY[:12].encode() in file for file in files)
    with pytest.raises(UserError) as refused:
        monkeypatch.setenv("OTHER", KEY + " é")
        endpoint.Settings(endpoint="http://127.0.0.1/v1", model="x", key_variable="OTHER").check()
    assert KEY not in str(refused.value) and KEY not in repr(endpoint.Settings(model="x"))


def test_a_key_in_another_variable_and_none_at_all(run, monkeypatch):
    monkeypatch.setenv("MY_KEY", KEY)
    with Loopback() as server:
        assert run(server.url, "--key-variable", "MY_KEY", "--limit", "1")[0] == 0
        assert run(server.url, "--limit", "1")[0] == 0
        assert [asked.key for asked in server.asked] == [f"Bearer {KEY}", "Bearer none"]
        assert "NO_KEY: there is no such" in run(server.url, "--key-variable", "NO_KEY")[2]


def test_a_collection_goes_on_with_the_same_settings_only(run, tmp_path):
    schema, topics = tmp_path / "s.toml", tmp_path / "t.txt"
    schema.write_text(Instructions.load().text + "\n")
    topics.write_text("".join(f"I like it {i} times.\n" for i in range(30)))
    with Loopback() as server:
        status, _, error = run(server.url, "--temperature", "0.3", "--model", "owl")  # nothing answered: it may change
        (tmp_path / "out" / "transcripts.jsonl").write_bytes(b"")
        assert run(server.url, "--limit", "5", "--licence", "CC0", "--extra", '{"min_p": 0.1, "top_p": null}')[0] == 0
        same = ["--extra", '{"top_p": null, "min_p": 0.1}']
        begun = settings(tmp_path / "out")
        wrong = {
            "temperature: 1.0 there, 0.5 here": ["--temperature", "0.5"],
            "min_p: 0.1 there, None here": ["--extra", "{}"],
            "model: 'parrot' there, 'owl' here": ["--model", "owl"],
            "seed: 0 there, 1 here\ntopics: not the same as there": ["--seed", "1"],
            "topics: not the same as there": ["--topics", topics],
            "\ntopics: not the same as there": ["--splits", "3", "1", "1"],
            "schema: not the same as there": ["--schema", schema],
        }
        for sentence, change in wrong.items():
            status, _, error = run(server.url, *same, *change)
            assert status == 2 and "cannot be gone on with; give another --out" in error and sentence in error
        assert settings(tmp_path / "out") == begun and len(server.asked) == JOBS + 5
        more = ["--in-flight", "3", "--timeout", "9", "--price-in", "1", "--attempts", "9", "--per-topic", "2"]
        assert run(server.url, *same, *more)[0] == 0
        assert "per_topic: 2 there, 1 here; it can only grow" in run(server.url, *same)[2]
    assert settings(tmp_path / "out") == begun | {"per_topic": 2}
    assert len(records(tmp_path / "out")) == JOBS + 18 == len(server.asked) - JOBS
    assert "min_p" in server.asked[-1].body and "top_p" not in server.asked[-1].body


def test_what_is_damaged_is_named_and_what_is_torn_is_cut_off(run, tmp_path):
    journal = tmp_path / "out" / "transcripts.jsonl"
    with Loopback() as server:
        assert run(server.url, "--limit", "3")[0] == 0
        whole = journal.read_bytes()
        journal.write_bytes(whole + b'{"id": ')
        assert run(server.url, "--limit", "1")[0] == 0
        assert journal.read_bytes().startswith(whole + b'{"id": "') and len(records(tmp_path / "out")) == 4
        lines = journal.read_bytes().splitlines(keepends=True)
        journal.write_bytes(b"".join([lines[0], lines[1][:40] + b"\n", *lines[2:]]))
        status, _, error = run(server.url)
        assert status == 2 and "transcripts.jsonl:2 is no record" in error and error.count("\n") == 1
        journal.write_bytes(whole)
        (tmp_path / "out" / "collection.json").unlink()
        assert "collection.json does not exist" in run(server.url)[2]
    assert len(server.asked) == 4


def test_a_budget_ends_the_run_and_is_not_spent_twice(run, tmp_path):
    price = ["--in-flight", "1", "--price-out", "1e6", "--budget", "300"]  # a dollar a token
    with Loopback() as server:
        status, said, _ = run(server.url, *price)
        number = len(server.asked)
        assert status == 0 and 2 <= number <= 8 and f"is spent; {JOBS - number} jobs have not been asked" in said
        assert run(server.url, *price)[0] == 0 and len(server.asked) == number
        mute = json.loads(loopback._completion(server.answer(server.asked[0]), "x")) | {"usage": None}
        server.fault = lambda asked: Sent(json.dumps(mute))
        assert "does not say what its answers cost" in run(server.url, *price, out=tmp_path / "mute")[2]
        assert "--budget needs the prices" in run(server.url, "--budget", "1")[2]


def test_flags_that_the_endpoint_refused_can_be_mended(run):
    wrong = Sent('{"error": {"message": "max_tokens is not supported, use max_completion_tokens"}}', 400)
    with Loopback(lambda asked: wrong if "max_tokens" in asked.body else "") as server:
        status, _, error = run(server.url)
        assert status == 2 and "max_completion_tokens" in error and "--again failed" in error
        extra = ["--extra", '{"max_tokens": null, "max_completion_tokens": 500}']
        status, said, error = run(server.url, *extra, "--again", "failed")
        assert status == 0 and f"{JOBS} of {JOBS} done" in said, error


def test_what_the_endpoint_puts_off_costs_no_try(run, tmp_path):
    late = Sent('{"error": {"message": "slow down"}}', 429, {"Retry-After": "0.01"})
    with Loopback(lambda asked: late if asked.nth < 6 else "") as server:
        status, said, _ = run(server.url, "--tries", "2", "--limit", "4")
        assert status == 0 and f"4 of {JOBS} done, 0 failed" in said and len(server.asked) == 4 * 7
        server.fault = lambda asked: late  # for ever
        run(server.url, "--tries", "2", "--limit", "1", out=tmp_path / "ever")
        assert len(server.asked) == 28 + endpoint.MOST_PUT_OFF + 2


def test_what_a_model_thinks_aloud_is_not_what_it_says(run, tmp_path):
    def thinking(asked):
        text = "<think>\nA: is a draft\nB: a draft too\n</think>\n\n" + server.answer(asked)
        return Sent(loopback._completion(text if asked.number else "<think> A: no end B: at all", asked.prompt))

    with Loopback(thinking) as server:
        assert run(server.url, "--limit", "3", "--in-flight", "1")[0] == 0
        assert [record["attempts"] for record in records(tmp_path / "out")] == [2, 1, 1]
        assert not any("draft" in record["text"] or "think" in record["text"] for record in records(tmp_path / "out"))


def test_an_answer_that_is_cut_off_before_it_begins_names_the_flag(run, tmp_path):
    empty = json.dumps({"choices": [{"message": {"content": ""}, "finish_reason": "length"}]})
    with Loopback(lambda asked: Sent(empty)) as server:
        run(server.url, "--limit", "1")
    assert "--max-tokens" in records(tmp_path / "out")[0]["reason"]


@pytest.mark.parametrize(
    ("variables", "url", "named"),
    [({"ALL_PROXY": "socks5://127.0.0.1:1"}, "http://127.0.0.1:9/v1", "ALL_PROXY"),
     ({"ALL_PROXY": "foo://x"}, "http://127.0.0.1:9/v1", "ALL_PROXY"),
     ({}, "http://-\u00e9-.example/v1", "cannot be asked")],
)  # fmt: skip
def test_an_environment_in_which_nothing_can_be_asked_is_one_sentence(run, monkeypatch, variables, url, named):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    status, _, error = run(url)
    assert status == 2 and named in error and error.startswith("error: ") and "Traceback" not in error


def test_a_key_goes_to_no_other_machine_in_clear_text(monkeypatch):
    monkeypatch.setenv(endpoint.KEY_VARIABLE, KEY)
    monkeypatch.setenv("OTHER_KEY", KEY)
    for url, variable, key in (
        ("http://192.0.2.1:8000/v1", "", ""), ("http://192.0.2.1:8000/v1", "OTHER_KEY", KEY),
        ("https://api.example/v1", "", KEY), ("http://127.0.0.1:8000/v1", "", KEY), ("http://localhost/v1", "", KEY),
    ):  # fmt: skip
        assert endpoint.Settings(endpoint=url, model="x", key_variable=variable).key() == key, url


def test_a_key_in_place_of_its_variable_is_not_repeated(run):
    status, said, error = run("http://127.0.0.1:9/v1", "--key-variable", "sk-proj-abcdef")
    assert status == 2 and "abcdef" not in said + error and "name of an environment variable" in error


def test_jobs_that_failed_are_asked_again_only_when_told(run, tmp_path):
    with Loopback(lambda asked: "refusal") as server:
        status, said, _ = run(server.url)
        assert status == 2 and f"0 of {JOBS} done, {JOBS} failed" in said and f"failed: {JOBS} a refusal" in said
        server.fault = lambda asked: ""
        status, _, error = run(server.url)
        assert status == 2 and "every job has failed" in error and len(server.asked) == 3 * JOBS
        status, said, _ = run(server.url, "--again", "failed")
        assert f"{JOBS} of {JOBS} done, 0 failed" in said and f"{4 * JOBS} requests, {3 * JOBS} of them beyond" in said
        assert run(server.url, "--again", "failed")[0] == 0 and len(server.asked) == 4 * JOBS
    seeds = [asked.body["seed"] for asked in server.asked if asked.prompt == server.asked[0].prompt]
    assert len(set(seeds)) == 4
    assert all(asked.body["seed"] < 2**31 for asked in server.asked)


HOSTILE = {
    "not JSON": (Sent("<html>"), "the answer is no JSON object at column 1"),
    "another type": (Sent("[]"), "the answer is no JSON object: it is a list"),
    "deep": (Sent("[" * 100_000), "the answer is no JSON object"),
    "a strange encoding": (Sent(b"\xff\xfe", headers={"Content-Type": "application/json; charset=hex"}), "not UTF-8"),
    "a strange status": (Sent("{}", 999), "status 999"),
    "an error of a strange kind": (Sent('{"error": [[]], "code": {"a": []}, "message": 7}', 500), "status 500"),
    "an error": (Sent('{"error": {"message": "too\\nmuch"}}', 502), "status 502: too"),
    "an error in a success": (Sent('{"error": {"message": "over"}}'), "the answer has no choices: over"),
    "no choices": ("no choices", "the answer has no choices"),
    "choices of a strange kind": (Sent('{"choices": [7]}'), "the answer has no choices"),
    "a number": (Sent('{"choices": [{"message": {"content": 7}}]}'), "the answer's content is a number"),
    "nothing": (Sent('{"choices": [{"message": {"content": null}}], "usage": 3}'), "the answer is empty"),
    "blanks": (Sent('{"choices": [{"message": {"content": " "}, "finish_reason": []}]}'), "the answer is empty"),
    "a refusal": (Sent('{"choices": [{"message": {"refusal": "no"}}]}'), "refused: no"),
    "a filter": (Sent('{"choices": [{"message": {}, "finish_reason": "content_filter"}]}'), "refused: content_filter"),
    "half a pair": (Sent('{"choices": [{"message": {"content": "A: \\ud800"}}]}'), "half of a surrogate pair"),
    "too long": (Sent(json.dumps({"choices": [{"message": {"content": "A: x" * 50_000}}]})), "more than 100,000"),
    "huge": (Sent(b" " * 5_000_000), "the answer has more than 4,194,304 bytes"),
    "a huge error": (Sent(b" " * 5_000_000, 500), "the answer has more than 4,194,304 bytes"),
    "a bomb": (Sent(gzip.compress(b" " * 10**8), headers={"Content-Encoding": "gzip"}), "the answer is compressed"),
    "dropped": ("dropped", "the connection failed: RemoteProtocolError"),
    "truncated": ("truncated", "the answer is no JSON object"),
    "drip": ("drip", "no answer within 3 s"),
    "hang": ("hang", "no answer within 3 s"),
    "numbers": (Sent('{"choices": [{"message": {"content": "no"}}], "usage": {"prompt_tokens": -1}}'), "fewer than"),
    "not found, later": (Sent("{}", 422), "status 422"),
}  # fmt: skip


def test_whatever_is_answered_is_a_reason(run, tmp_path):
    """Each in its turn to all requests of a job; no more than IN_A_ROW without an answer."""
    kinds, jobs = list(HOSTILE.values()), {}

    def fault(asked):
        number = jobs.setdefault(asked.prompt, len(jobs))
        return kinds[number][0] if number < len(kinds) else ""

    with Loopback(fault) as server:
        status, _, error = run(server.url, "--timeout", "3", "--tries", "2", "--attempts", "2", "--in-flight", "32")
        assert status == 2 and "every job has failed" in error and len(HOSTILE) == JOBS, error
        reasons = {prompts((2, 1, 1))[record["id"]]: record for record in records(tmp_path / "out")}
    for (prompt, number), (name, (_, reason)) in zip(jobs.items(), HOSTILE.items(), strict=True):
        record = reasons[prompt]
        assert reason in record["reason"] and record["status"] == "failed", (number, name, record)
        assert record["requests"] == (1 if name == "not found, later" else 2), name
        assert len(record["text"]) <= 100_000 and not record["prompt_tokens"]


@pytest.mark.parametrize(
    ("sent", "sentence", "asked"),
    [
        (Sent("{}", 401), "refuses requests without a key (status 401); export a valid one as OPENAI_API_KEY", 1),
        (Sent('{"error": "no such"}', 404), "model parrot, or no chat completions (status 404: no such); it has "
         "parrot, owl", 1),
        (Sent('{"error": {"code": "insufficient_quota", "message": "pay"}}', 429), "wants to be paid first", 1),
        (Sent("{}", 429, {"Retry-After": "90000"}), "asked again in 1,500 minutes only (status 429)", 1),
        (Sent("{}", 503, {"Retry-After": "Wed, 01 Jan 2200 00:00:00 GMT"}), "minutes only (status 503)", 1),
        (Sent('{"message": "bad flag"}', 400), "did not answer the last 20 jobs, the last of them for this reason: "
         "status 400: bad flag", 20),
    ],
)  # fmt: skip
def test_what_no_patience_mends_ends_the_run(run, sent, sentence, asked):
    with Loopback(lambda _: sent) as server:
        status, said, error = run(server.url, "--in-flight", "1")
    assert status == 2 and not said and sentence in error and error.count("\n") == 1
    assert len(server.asked) == asked


def test_an_endpoint_that_is_not_there_is_said_soon(run, tmp_path):
    began = time.monotonic()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    status, _, error = run(f"http://127.0.0.1:{port}/v1", "--backoff", "1")
    assert status == 2 and "cannot be reached" in error and "is it running" in error and error.count("\n") == 1
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (["--endpoint", "localhost:8000"], "--endpoint localhost:8000 is no URL"),
        (["--endpoint", "http://[::1"], "is no URL"),
        (["--endpoint", "http://user:geheim@host/v1"], "--endpoint has a user, a password or a query"),
        (["--endpoint", "http://host/v1?key=geheim"], "--endpoint has a user, a password or a query"),
        (["--endpoint", "http://host/v1/chat/completions"], "goes too far"),
        (["--model", " "], "--model is missing"),
        (["--temperature", "nan"], "--temperature nan: expected a number from 0 on"),
        (["--in-flight", "0"], "--in-flight 0: expected a number from 1 on"),
        (["--timeout", "0"], "--timeout 0 lets nothing be answered"),
        (["--extra", "[1]"], "--extra [1] is no JSON object: it is a list"),
        (["--extra", '{"stream": true, "n": 2}'], "--extra cannot set 'n'\n--extra cannot set 'stream'"),
        (["--extra", '{"a": NaN}'], "cannot be sent"),
        (["--extra", '{"a": "\\ud800"}'], "cannot be sent"),
        (["--out", ""], "name the local folder of the collection: --out DIR"),
        (["--out", "gs://bucket/x"], "name the local folder"),
        (["--per-topic", "0"], "--per-topic 0: expected a number from 1 on"),
        (["--splits", "0", "200", "200"], "too few for 200 in validation, 200 in the test and some in training"),
        (["--splits", "1", "-1", "1"], "expected three numbers of topics"),
        (["--topics", "/no/such"], "file /no/such does not exist"),
    ],
)
def test_flags_that_make_no_sense(run, wrong, sentence):
    status, _, error = run("http://127.0.0.1:9/v1", *wrong)
    assert status == 2 and sentence in error and "geheim" not in error and "Traceback" not in error


def test_topics_are_one_a_line(tmp_path):
    path = tmp_path / "t.txt"
    path.write_bytes(b"\xef\xbb\xbf# mine\n\nI bake.\r\n  I sing.  \n")
    assert collect.read_topics(path) == ["I bake.", "I sing."]
    path.write_bytes(b"I bake.\ni BAKE.\nI\x07\n" + b"x" * 201 + b"\n\xff\n")
    with pytest.raises(UserError) as wrong:
        collect.read_topics(path)
    assert [line.partition("t.txt:")[2][:1] for line in str(wrong.value).splitlines()[1:]] == list("2345")
    path.write_bytes(b"# nothing\n")
    with pytest.raises(UserError, match="has 0 topics"):
        collect.read_topics(path)


def test_nobody_asks_before_the_endpoint_wants_it(run):
    def fault(asked):
        return Sent("{}", 429, {"Retry-After": "0.6"}) if asked.number == 0 else "hang" if asked.number < 3 else ""

    with Loopback(fault) as server:
        assert run(server.url, "--in-flight", "3", "--timeout", "0.2", "--limit", "6")[0] == 0
    times = [asked.at - server.asked[0].at for asked in server.asked]
    assert times[2] < 0.2 and times[3] >= 0.6 and len(times) == 9


def test_requests_a_minute(run):
    with Loopback() as server:
        assert run(server.url, "--requests-per-minute", "1200", "--limit", "8")[0] == 0
    times = [asked.at for asked in server.asked]
    assert times[-1] - times[0] >= 0.3  # 7 x 50 ms


def test_what_headers_say_of_waiting():
    now = datetime.datetime.now(datetime.UTC)
    soon = email.utils.format_datetime(now + datetime.timedelta(seconds=30), usegmt=True)
    wanted = {"7": 7, "0.5": 0.5, "-3": 0, "nan": 0, "inf": 0, "": 0, "soon": 0, "1e300": 1e300,
              "Wed, 01 Jan 2020 00:00:00 GMT": 0, "Wed, 99 Jan 99999 00:00:00": 0}  # fmt: skip
    assert {value: responses.retry_after({"retry-after": value}) for value in wanted} == wanted
    assert 28 < responses.retry_after({"retry-after": soon}) <= 30
    assert responses.retry_after({"retry-after": "9", "retry-after-ms": "1500"}) == 1.5
    assert responses.retry_after({}) == 0


def test_few_jobs_are_taken_at_a_time(tmp_path):
    taken, ahead = itertools.count(), []

    def jobs():
        for number in range(200):
            ahead.append(next(taken) - (tmp_path / "j.jsonl").read_bytes().count(b"\n"))
            yield endpoint.Job(str(number), [{"role": "user", "content": "Say it."}], fields={"more": number})

    with Loopback() as server:
        asks = endpoint.Endpoint(endpoint.Settings(endpoint=server.url, model="parrot", in_flight=4))
        totals = asking.run(asks, jobs(), 200, tmp_path / "j.jsonl")
    assert max(ahead) <= 4 and len(totals.done) == 200
    lines = map(json.loads, (tmp_path / "j.jsonl").read_text().splitlines())
    assert {record["id"] == str(record["more"]) for record in lines} == {True}


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_run_that_is_told_to_end_goes_on_later(run, tmp_path, number, status):
    with Loopback(lambda asked: "hang" if asked.number > 9 else "") as server:
        with started(server.url, tmp_path / "out") as process:
            wait_for(tmp_path / "out" / "transcripts.jsonl", 10)
            process.send_signal(number)
            _, error = process.communicate(timeout=30)
        assert process.returncode == status and "Traceback" not in error
        server.fault = lambda asked: ""
        assert run(server.url)[0] == 0
    assert Counter(record["id"] for record in records(tmp_path / "out")) == Counter(list(prompts((2, 1, 1))))


def test_the_folder_belongs_to_one_run_and_progress_is_told_without_a_terminal(run, tmp_path, monkeypatch):
    monkeypatch.setattr(asking, "EVERY", 0.0)
    with Loopback() as server:
        with storage.locked(tmp_path / "out"):
            status, _, error = run(server.url)
            assert status == 2 and "give another --out" in error and not server.asked
        _, _, error = run(server.url, "--limit", "2")
    assert error.splitlines()[1].startswith(f"2 of {JOBS}, 0 failed, ") and error.endswith(" min to go\n")


def test_without_the_packages_it_says_how_to_get_them(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with contextlib.suppress(ImportError):
        status, _, error = run("http://127.0.0.1:9/v1")
    assert status == 2 and "the package openai: bash launch/setup.sh corpus" in error
