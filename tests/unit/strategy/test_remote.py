"""The client of a remote server, against one on loopback that plays vLLM and every fault of a server in turn."""

from __future__ import annotations

import json
import logging
import pickle
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest

from roll_opd.configs.backends import backend_settings
from roll_opd.configs.backends.remote import RemoteSettings
from roll_opd.configs.model_args import ModelArguments
from roll_opd.configs.strategy_args import StrategyArguments
from roll_opd.configs.worker_config import WorkerConfig
from roll_opd.distributed.strategy import remote
from roll_opd.distributed.strategy.base import ScoreRequest, ScoreStrategy, ScoreWant
from roll_opd.distributed.strategy.remote import RemoteStrategy
from roll_opd.distributed.strategy.tokenizer import Vocabulary
from roll_opd.errors import ConfigError, ModelError, RollOPDError, TeacherError
from roll_opd.trajectory import TrajectoryId

KEY = "sk-very-secret-key"
TOKENS = [f"<{i}>" for i in range(30)]
VOCABULARY = Vocabulary(len(TOKENS), (2,), lambda ids: "".join(TOKENS[i] for i in ids))

Reply = tuple[int, Any]


class FakeServer(ThreadingHTTPServer):
    """Answers as vLLM does. ``faults`` are played first: each takes the handler and may return a reply.

    Attributes:
        seen: (path, headers, body) of every request.
        busy: requests to ``/v1/completions`` at work now, and the most there ever were.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.models: list[dict[str, Any]] = [{"id": "teacher", "max_model_len": 100}]
        self.tokens = list(TOKENS)
        self.routes: dict[str, Callable[[Any], Reply]] = {
            "/v1/models": lambda _: (200, {"data": self.models}),
            "/v1/completions": self.complete,
            "/detokenize": lambda body: (
                200,
                {"prompt": "".join(self.tokens[i] for i in body["tokens"] if i < len(self.tokens))},
            ),
        }
        self.faults: dict[str, list[Callable[[Handler], Reply | None]]] = {}
        self.key: str | None = None
        self.max_logprobs = 20
        self.seen: list[tuple[str, dict[str, str], Any]] = []
        self.lock = threading.Lock()
        self.busy, self.busiest = 0, 0
        self.pause = 0.0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def count(self, path: str) -> int:
        return sum(p == path for p, _, _ in self.seen)

    def complete(self, body: Any) -> Reply:
        with self.lock:
            self.busy += 1
            self.busiest = max(self.busiest, self.busy)
        time.sleep(self.pause)
        with self.lock:
            self.busy -= 1
        k = body["prompt_logprobs"]
        if k > self.max_logprobs:
            return 400, {
                "error": {"message": f"Requested prompt logprobs of {k}, which is greater than max allowed: 20"}
            }
        entries: list[Any] = [None]
        for before, token in zip(body["prompt"], body["prompt"][1:], strict=False):
            row = logprobs_after(before, len(self.tokens))
            best = [token, *np.argsort(-row)[:k].tolist()]
            entries.append({str(i): {"logprob": row[i], "rank": 1, "decoded_token": self.tokens[i]} for i in best})
        return 200, {"choices": [{"index": 0, "text": "", "prompt_logprobs": entries}]}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: FakeServer

    def do_GET(self) -> None:
        self._answer(None)

    def do_POST(self) -> None:
        self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def _answer(self, body: Any) -> None:
        server = self.server
        with server.lock:
            server.seen.append((self.path, dict(self.headers), body))
            faults = server.faults.get(self.path)
            fault = faults.pop(0) if faults else None
        if fault is not None:
            reply = fault(self)
            if reply is None:
                return
        elif server.key and self.path.startswith("/v1") and self.headers["Authorization"] != f"Bearer {server.key}":
            reply = 401, {"error": "Unauthorized"}
        else:
            reply = server.routes.get(self.path, lambda _: (404, {"detail": "Not Found"}))(body)
        self.reply(*reply)

    def reply(self, status: int, body: Any, **headers: str) -> None:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(raw)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, *args: Any) -> None:
        pass


def logprobs_after(before: int, rows: int = len(TOKENS)) -> np.ndarray:
    """The fake teacher: a distribution that depends on the token before."""
    logits = np.random.default_rng(before).normal(size=rows) * 2
    return logits - np.log(np.exp(logits).sum())


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeServer]:
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.01)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    fake = FakeServer()
    thread = threading.Thread(target=fake.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield fake
    fake.shutdown()
    fake.server_close()
    thread.join()


@pytest.fixture
def connect(server: FakeServer) -> Callable[..., RemoteStrategy]:
    """Make a strategy over the server; settings as in the YAML."""

    def make(vocabulary: Vocabulary = VOCABULARY, max_length: int = 50, **settings: Any) -> RemoteStrategy:
        values = {"base_url": server.url, "timeout": 5.0} | settings
        config = WorkerConfig(model_args=ModelArguments("teacher"), strategy_args=StrategyArguments("remote", values))
        return RemoteStrategy("teacher", config, vocabulary, max_length=max_length)

    return make


@pytest.fixture
def strategy(connect: Callable[..., RemoteStrategy]) -> RemoteStrategy:
    return connect()


def requests_of(*sequences: list[int]) -> list[ScoreRequest]:
    return [
        ScoreRequest(TrajectoryId(i, 0), np.array(tokens, np.int32), np.arange(len(tokens)) >= 2)
        for i, tokens in enumerate(sequences)
    ]


def expected(request: ScoreRequest) -> np.ndarray:
    out = np.zeros(len(request.tokens), np.float32)
    for t in np.flatnonzero(request.response_mask):
        out[t] = logprobs_after(request.tokens[t - 1])[request.tokens[t]]
    return out


REQUESTS = requests_of([3, 4, 5, 6, 5], [9, 8, 7], [1, 2, 3, 4, 5, 6, 7], [20, 20, 20, 20])
PATH = "teacher.strategy_args.strategy_config"


# ---- scores ----------------------------------------------------------------------------------------------------------


def test_scores_in_the_order_of_the_requests(strategy):
    results = strategy.score(REQUESTS)
    assert [r.id for r in results] == [r.id for r in REQUESTS]
    for request, result in zip(REQUESTS, results, strict=True):
        assert result.checksum == request.checksum
        np.testing.assert_allclose(result.logprobs, expected(request), rtol=1e-6)
        assert result.entropies is None and result.details is None
    assert isinstance(strategy, ScoreStrategy)


def test_top_k(strategy):
    (result,) = strategy.score(REQUESTS[:1], ScoreWant(top_k=3))
    rows = np.stack([logprobs_after(t) for t in (4, 5, 6)])
    np.testing.assert_array_equal(result.details.ids, np.argsort(-rows)[:, :3])
    np.testing.assert_allclose(result.details.logprobs, -np.sort(-rows)[:, :3], rtol=1e-6)
    np.testing.assert_allclose(np.exp(result.details.tail), 1 - np.exp(-np.sort(-rows)[:, :3]).sum(1), rtol=1e-5)


def test_what_is_asked(strategy, server):
    strategy.score(REQUESTS[:1], ScoreWant(top_k=3))
    path, headers, body = server.seen[-1]
    assert path == "/v1/completions"
    assert "Authorization" not in headers
    assert (body["model"], body["prompt"], body["prompt_logprobs"], body["max_tokens"]) == (
        "teacher",
        [3, 4, 5, 6, 5],
        3,
        1,
    )


def test_requests_side_by_side_up_to_the_limit_however_many_callers(connect, server):
    strategy = connect(max_concurrency=3)
    server.pause = 0.05
    with ThreadPoolExecutor(4) as callers:
        answers = list(callers.map(lambda _: strategy.score(REQUESTS), range(4)))
    assert 1 < server.busiest <= 3
    for results in answers:
        np.testing.assert_allclose(results[2].logprobs, expected(REQUESTS[2]), rtol=1e-6)


def test_nothing_to_score(strategy):
    assert strategy.score([]) == []


@pytest.mark.parametrize("want", [ScoreWant(given=True), ScoreWant(hidden=True)])
def test_what_cannot_be_had_is_refused(strategy, want):
    with pytest.raises(ModelError, match="support"):
        strategy.score(REQUESTS, want)


def test_what_is_not_here_is_refused(strategy):
    for call in (strategy.head, lambda: strategy.save_model("x"), lambda: strategy.load_model("x")):
        with pytest.raises(ModelError, match=r"teacher\.strategy_args\.strategy_name: a remote teacher"):
            call()
    strategy.offload()
    strategy.onload()


# ---- faults that pass ------------------------------------------------------------------------------------------------


def hang_up(handler: Handler) -> None:
    handler.close_connection = True


def cut_off(handler: Handler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [')
    handler.close_connection = True


PASSING = {
    "429": lambda _: (429, {"error": {"message": "slow down"}}),
    "500": lambda _: (500, {"error": {"message": "EngineCore died"}}),
    "503 in words": lambda _: (503, b"<html>upstream is restarting</html>"),
    "connection closed": hang_up,
    "cut off": cut_off,
    "no JSON": lambda _: (200, b"<html>a gateway's page</html>"),
}


@pytest.mark.parametrize("fault", PASSING)
def test_a_fault_that_passes_is_tried_again(strategy, server, fault):
    before = server.count("/v1/completions")
    server.faults["/v1/completions"] = [PASSING[fault]] * 3
    (result,) = strategy.score(REQUESTS[:1])
    np.testing.assert_allclose(result.logprobs, expected(REQUESTS[0]), rtol=1e-6)
    assert server.count("/v1/completions") - before == 4


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("429", "HTTP 429: slow down"),
        ("503 in words", "HTTP 503: <html>upstream is restarting</html>"),
        ("connection closed", "RemoteDisconnected"),
        ("cut off", "IncompleteRead"),
        ("no JSON", "no JSON.*a gateway's page"),
    ],
)
def test_attempts_are_bounded(connect, server, fault, message):
    strategy = connect(max_retries=2)
    before = server.count("/v1/completions")
    server.faults["/v1/completions"] = [PASSING[fault]] * 9
    with pytest.raises(
        ConnectionError, match=rf"{server.url}/v1/completions: .*{message}.*\(attempt 3 of 3\)"
    ) as caught:
        strategy.score(REQUESTS[:1])
    assert not isinstance(caught.value, RollOPDError), "the pool may ask again"
    assert server.count("/v1/completions") - before == 3


def test_pauses_grow(monkeypatch, strategy, server):
    pauses: list[float] = []
    monkeypatch.setattr(threading.Event, "wait", lambda self, timeout=None: pauses.append(timeout) or False)
    monkeypatch.setattr(remote, "FIRST_PAUSE", 1.0)
    monkeypatch.setattr(remote, "LONGEST_PAUSE", 3.0)
    server.faults["/v1/completions"] = [PASSING["500"]] * 3
    strategy._server.call("/v1/completions", {"model": "teacher", "prompt": [1, 2], "prompt_logprobs": 0})
    assert pauses == [1.0, 2.0, 3.0]


def test_silence_ends_at_the_deadline(connect, server):
    strategy = connect(timeout=0.3, max_retries=1)
    release = threading.Event()

    def silent(handler: Handler) -> None:
        release.wait(10)
        handler.close_connection = True

    server.faults["/v1/completions"] = [silent, silent]
    started = time.monotonic()
    with pytest.raises(ConnectionError, match=r"no answer within 0\.3 s \(attempt 2 of 2\)"):
        strategy.score(REQUESTS[:1])
    assert time.monotonic() - started < 3.0
    release.set()


def test_an_answer_in_drops_ends_at_the_deadline(connect, server):
    strategy = connect(timeout=0.5, max_retries=0)
    stop = threading.Event()

    def dripping(handler: Handler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", "100000")
        handler.end_headers()
        for _ in range(100):
            try:
                handler.wfile.write(b" ")
            except OSError:
                break
            if stop.wait(0.05):
                break
        handler.close_connection = True

    server.faults["/v1/completions"] = [dripping]
    started = time.monotonic()
    with pytest.raises(ConnectionError, match=r"no answer within 0\.5 s"):
        strategy.score(REQUESTS[:1])
    assert time.monotonic() - started < 3.0
    stop.set()


def test_after_one_failure_the_others_are_not_asked_for(connect, server):
    strategy = connect(max_concurrency=1, max_retries=0)
    before = server.count("/v1/completions")
    server.faults["/v1/completions"] = [PASSING["500"]]
    with pytest.raises(ConnectionError, match="EngineCore died"):
        strategy.score(REQUESTS * 5)
    strategy._threads.submit(int).result()  # whatever had been started has ended
    assert server.count("/v1/completions") - before == 1
    assert len(strategy.score(REQUESTS)) == len(REQUESTS), "the next call starts anew"


# ---- faults that stay ------------------------------------------------------------------------------------------------


def test_a_refusal_is_final_and_says_what_the_server_says(strategy, server):
    before = server.count("/v1/completions")
    with pytest.raises(TeacherError, match=r"teacher: .*HTTP 400: Requested prompt logprobs of 21.*--max-logprobs 21"):
        strategy.score(REQUESTS[:1], ScoreWant(top_k=21))
    assert server.count("/v1/completions") - before == 1


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"object": "error", "message": "an older server"}, "HTTP 422: an older server"),
        ({"detail": "fastapi"}, "HTTP 422: fastapi"),
        ({"detail": [{"loc": "body"}]}, r'HTTP 422: {"detail": \[{"loc": "body"}\]}'),
        (b"", r"HTTP 422: \(no message\)"),
        (b"x" * 9999, r"HTTP 422: x{500}$"),
    ],
)
def test_messages_in_every_form(strategy, server, body, message):
    server.faults["/v1/completions"] = [lambda _: (422, body)]
    with pytest.raises(TeacherError, match=message):
        strategy.score(REQUESTS[:1])


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([], "no prompt_logprobs"),
        ({"choices": []}, "no prompt_logprobs"),
        ({"choices": [{"text": "x"}]}, "no prompt_logprobs"),
        ({"choices": [{"prompt_logprobs": [None]}]}, "1 prompt log-probabilities for 5 tokens"),
    ],
)
def test_an_unusable_answer_is_no_score(strategy, server, answer, message):
    server.faults["/v1/completions"] = [lambda _: (200, answer)]
    with pytest.raises(ValueError, match=message):
        strategy.score(REQUESTS[:1])


def test_redirects_are_not_followed(connect, server):
    other = FakeServer()
    try:
        server.faults["/v1/models"] = [lambda h: h.reply(307, b"", Location=f"{other.url}/v1/models")]
        with pytest.raises(ConfigError, match=rf"{PATH}\.base_url: .*redirects to '{other.url}"):
            connect()
        assert not other.seen
    finally:
        other.server_close()


# ---- the key ---------------------------------------------------------------------------------------------------------


def test_the_key_goes_along(connect, server, monkeypatch, tmp_path):
    server.key = KEY
    monkeypatch.setenv("TEACHER_KEY", f" {KEY}\n")
    # A .netrc for this host would otherwise take the header's place.
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login a password b\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    strategy = connect(api_key_env="TEACHER_KEY")
    strategy.score(REQUESTS)
    assert {h.get("Authorization") for _, h, _ in server.seen} == {f"Bearer {KEY}"}


@pytest.mark.parametrize("key", ["", "  ", "two words", "line\nbreak", "schlüssel"])
def test_a_key_that_is_none(connect, monkeypatch, key):
    monkeypatch.setenv("TEACHER_KEY", key)
    with pytest.raises(ConfigError, match=rf"{PATH}\.api_key_env: the environment variable TEACHER_KEY") as caught:
        connect(api_key_env="TEACHER_KEY")
    assert not key.strip() or key not in str(caught.value)
    monkeypatch.delenv("TEACHER_KEY")
    with pytest.raises(ConfigError, match="TEACHER_KEY is not set"):
        connect(api_key_env="TEACHER_KEY")


def test_a_key_that_is_wrong_or_missing(connect, server, monkeypatch):
    server.key = "another"
    monkeypatch.setenv("TEACHER_KEY", KEY)
    with pytest.raises(ConfigError, match=rf"{PATH}\.api_key_env: .*TEACHER_KEY \(HTTP 401: Unauthorized\)"):
        connect(api_key_env="TEACHER_KEY")
    with pytest.raises(ConfigError, match=rf"{PATH}\.api_key_env: .*wants a key"):
        connect()
    assert server.count("/v1/models") == 2


def test_the_key_is_never_said(connect, server, monkeypatch, caplog):
    server.key = KEY
    monkeypatch.setenv("TEACHER_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    strategy = connect(api_key_env="TEACHER_KEY", max_retries=0)
    server.faults["/v1/completions"] = [lambda _: (400, {"error": {"message": f"bad request of {KEY}"}})]
    with pytest.raises(TeacherError, match=r"bad request of \*\*\*") as refused:
        strategy.score(REQUESTS[:1])
    server.faults["/v1/completions"] = [lambda _: (500, f"crash in {KEY}".encode())]
    with pytest.raises(ConnectionError, match=r"crash in \*\*\*") as failed:
        strategy.score(REQUESTS[:1])
    said = [
        str(refused.value),
        repr(failed.value),
        repr(strategy),
        repr(strategy._server),
        repr(strategy._server._auth),
    ]
    assert KEY not in caplog.text + "".join(said)
    assert KEY.encode() not in pickle.dumps([refused.value, failed.value])


# ---- checks at the start ---------------------------------------------------------------------------------------------


def test_no_server(connect, server):
    with pytest.raises(ModelError, match=rf"{PATH}\.base_url: no vLLM server .*refused.*attempt 4 of 4"):
        connect(base_url="http://127.0.0.1:9")


def test_no_address(connect):
    with pytest.raises(ConfigError, match=rf"{PATH}\.base_url: is missing"):
        connect(base_url=None)


def test_choosing_the_model(connect, server):
    server.models = [{"id": "a", "max_model_len": 51}, {"id": "b", "max_model_len": 51}]
    with pytest.raises(ConfigError, match=rf"{PATH}\.served_model_name: must name one of the models .*'a', 'b'"):
        connect()
    with pytest.raises(ConfigError, match=rf"{PATH}\.served_model_name: .*no model 'c'; it has: 'a', 'b'"):
        connect(served_model_name="c")
    assert connect(served_model_name="b").model == "b"


def test_a_context_that_is_too_short(connect, server):
    server.models = [{"id": "teacher", "max_model_len": 50}]
    with pytest.raises(ModelError, match=r"takes 50 tokens; .* has 50, .*--max-model-len 51"):
        connect(max_length=50)
    connect(max_length=49)


def test_what_offers_no_models(connect, server):
    server.routes["/v1/models"] = lambda _: (200, {"hello": "world"})
    with pytest.raises(ModelError, match="offers no list of models"):
        connect()


def test_what_gives_no_prompt_logprobs(connect, server):
    server.routes["/v1/completions"] = lambda _: (200, {"choices": [{"text": "hi"}]})
    with pytest.raises(ModelError, match=r"first request .*no prompt_logprobs; is it a vLLM server"):
        connect()


def test_a_server_that_allows_few_logprobs_will_do(connect, server):
    server.max_logprobs = 2
    connect().score(REQUESTS)


def test_padding_that_counts_is_said(connect, server, caplog):
    server.tokens += [""] * 5
    connect()
    assert ["rows of its head that are no tokens" in r.message for r in caplog.records] == [False, True]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({17: "<x>"}, r"first difference is id 17, '<17>' for the student \(of 30 ids\) and '<x>' for the server"),
        ({8: "<9>", 9: "<8>"}, "first difference is id 8, '<8>' for the student .* and '<9>' for the server"),
        ({29: ""}, "first difference is id 29, '<29>' for the student .* and '' for the server"),
    ],
)
def test_another_vocabulary(connect, server, changes, message, monkeypatch):
    monkeypatch.setattr(remote, "BLOCK_IDS", 12)
    for token, text in changes.items():
        server.tokens[token] = text
    with pytest.raises(ModelError, match=message):
        connect()


def test_a_larger_vocabulary(connect, server):
    server.tokens += ["", "<think>"]
    with pytest.raises(ModelError, match=r"first difference is id 31, '' for the student .* and '<think>'"):
        connect()


def test_white_space_is_decoded_differently_by_libraries(connect, server):
    server.tokens = [f"{t} " for t in server.tokens]
    connect()


def test_what_cannot_be_compared_is_said(connect, server, caplog):
    connect()
    assert ["which of them end a response there cannot be seen" in r.message for r in caplog.records] == [True]
    caplog.clear()
    server.routes["/detokenize"] = lambda _: (404, {"detail": "Not Found"})
    connect().score(REQUESTS)
    assert ["cannot be compared" in r.message for r in caplog.records] == [True]


def test_the_end_of_a_response(connect, server, caplog):
    server.routes["/tokenizer_info"] = lambda _: (200, {"eos_token": "<2>", "tokenizer_class": "X"})
    connect()
    assert not caplog.records
    server.routes["/tokenizer_info"] = lambda _: (200, {"eos_token": "<7>", "tokenizer_class": "X"})
    with pytest.raises(ModelError, match="a response ends with '<7>', for the student with '<2>'"):
        connect()


# ---- settings --------------------------------------------------------------------------------------------------------


def settings(**values: Any) -> RemoteSettings:
    return backend_settings(StrategyArguments("remote", values), "teacher.strategy_args")


@pytest.mark.parametrize(
    ("written", "address"),
    [
        ("http://10.0.0.7:8000", "http://10.0.0.7:8000"),
        ("https://host/prefix/v1/", "https://host/prefix"),
        (" http://[::1]:80/ ", "http://[::1]:80"),
    ],
)
def test_addresses(written, address):
    assert settings(base_url=written).base_url == address


@pytest.mark.parametrize(
    "written", ["10.0.0.7:8000", "host", "ftp://host", "http://", "http://h:port", "http://h/?a=b"]
)
def test_what_is_no_address(written):
    with pytest.raises(ConfigError, match=rf"{PATH}\.base_url: .*no address of a server"):
        settings(base_url=written)


def test_secrets_do_not_belong_in_the_yaml():
    for values in ({"base_url": f"http://user:{KEY}@host"}, {"api_key_env": KEY}):
        with pytest.raises(ConfigError, match=PATH) as caught:
            settings(**values)
        assert KEY not in str(caught.value)
