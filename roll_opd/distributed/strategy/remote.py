"""``remote``: scores from a vLLM server that somebody else runs.

::

    score(requests) ─► a thread per request, max_concurrency at once ─► POST /v1/completions, prompt_logprobs=k ─► vLLM
                                                                          │ connection, timeout, 408, 429, 5xx,
                                     ◄── pause, again, max_retries times ─┘ an answer that is no JSON
                       ◄── ConnectionError: the pool may ask once more, and counts it
                       ◄── RollOPDError: no other attempt will do better (key, model, too long, ...)

Where the server is wrong for the run, the constructor says so: another vocabulary, too short a context, no such model,
no prompt log-probabilities.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import Any, NoReturn

import numpy as np
import requests
import urllib3
from requests.adapters import HTTPAdapter
from requests.auth import AuthBase

from roll_opd.configs.backends import backend_settings
from roll_opd.configs.backends.remote import RemoteSettings
from roll_opd.configs.worker_config import WorkerConfig
from roll_opd.distributed.strategy.base import SAMPLED_ONLY, HeadWeights, ScoreRequest, ScoreResult, ScoreWant
from roll_opd.distributed.strategy.prompt_logprobs import check_want, padding_mass, score_result
from roll_opd.distributed.strategy.tokenizer import Vocabulary
from roll_opd.errors import ConfigError, ModelError, TeacherError
from roll_opd.trajectory import IntArray, TrajectoryId

logger = logging.getLogger(__name__)

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0
"""Seconds before a second attempt, doubled before each further one, and their limit."""
READ_BYTES = 1 << 20
"""Bytes of an answer between two looks at the clock."""
MESSAGE_CHARS = 500
"""Characters of a server's message that are repeated to the user."""
BLOCK_IDS = 4096
"""Ids of the vocabulary that are compared by one request."""
BEYOND_IDS = 64
"""Ids behind the vocabulary among which a token is looked for that the student lacks."""
PROBE_TOKENS, PROBE_TOP_K = 32, 20
"""Length of the sequence that is scored at the start, and how many of the best are looked at: vLLM's own limit."""
PADDING_MASS = 1e-4
"""Probability of padding from which it is worth a word."""


class _RefusedError(TeacherError):
    """The server answered, and will answer the same again."""


class _PassingError(Exception):
    """A failure that may pass."""


class _Bearer(AuthBase):
    """The Authorization header. Given as ``auth``, it also keeps ``.netrc`` from putting another one in its place."""

    def __init__(self, key: str | None) -> None:
        self._key = key

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self._key is not None:
            request.headers["Authorization"] = f"Bearer {self._key}"
        return request

    def hidden(self, text: str) -> str:
        """Return ``text`` without the key, should a server repeat it."""
        return text.replace(self._key, "***") if self._key else text


class Server:
    """HTTP with deadlines and retries. May be called from several threads.

    Args:
        settings: of the backend, with a ``base_url``.
        path: of the settings in the YAML, for messages.

    Raises:
        ConfigError: ``api_key_env`` names a variable that holds no key.
    """

    def __init__(self, settings: RemoteSettings, path: str) -> None:
        assert settings.base_url is not None
        self.url = settings.base_url
        self._settings = settings
        self._path = path
        self._auth = _Bearer(_key(settings, path))
        self._session = requests.Session()
        adapter = HTTPAdapter(pool_maxsize=settings.max_concurrency)
        self._session.mount("http://", adapter)
        self._session.mount("https://", adapter)

    def call(
        self, where: str, body: Any = None, *, retries: int | None = None, stop: threading.Event | None = None
    ) -> Any:
        """GET ``where``, or POST ``body`` to it; return the JSON that comes back.

        Args:
            where: path below the server's address.
            body: JSON, or None.
            retries: further attempts; None: as configured.
            stop: set by a caller who has no use for the answer any more; there are no further attempts then.

        Raises:
            ConnectionError: all attempts failed for reasons that may pass.
            ConfigError: the server does not accept the key, or sends us elsewhere.
            TeacherError: it refuses the request.
        """
        attempts = 1 + (self._settings.max_retries if retries is None else retries)
        stop = stop or threading.Event()
        for attempt in range(1, attempts + 1):
            try:
                return self._once(where, body)
            except _PassingError as error:
                failed = f"{self.url}{where}: {error} (attempt {attempt} of {attempts})"
                logger.info("%s", failed)
                if attempt == attempts or stop.wait(min(FIRST_PAUSE * 2 ** (attempt - 1), LONGEST_PAUSE)):
                    raise ConnectionError(failed) from error
        raise AssertionError("unreachable")

    def _once(self, where: str, body: Any) -> Any:
        try:
            status, headers, raw = self._exchange(where, body)
        except (requests.Timeout, urllib3.exceptions.TimeoutError) as error:
            raise _PassingError(f"no answer within {self._settings.timeout:g} s") from error
        except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
            raise _PassingError(_root_cause(error)) from error
        if 300 <= status < 400:
            # Not followed: the key would go along, and a POST would become a GET.
            target = headers.get("Location", "nowhere")
            raise ConfigError(
                f"{self._path}.base_url", f"{self.url} redirects to {target!r}; name that address instead"
            )
        if status in (408, 429) or (status >= 500 and status != 501):
            raise _PassingError(f"HTTP {status}: {self._message(raw)}")
        if status in (401, 403):
            self._refuse_key(status, self._message(raw))
        if status >= 400:
            raise _RefusedError(f"{self.url}{where} refuses: HTTP {status}: {self._message(raw)}")
        try:
            return json.loads(raw)
        except ValueError as error:
            raise _PassingError(f"an answer that is no JSON ({error}): {self._message(raw)}") from error

    def _exchange(self, where: str, body: Any) -> tuple[int, Any, bytes]:
        timeout = self._settings.timeout
        deadline = time.monotonic() + timeout
        with self._session.request(
            "GET" if body is None else "POST",
            self.url + where,
            json=body,
            auth=self._auth,
            timeout=timeout,
            allow_redirects=False,
            stream=True,
        ) as response:
            # The library's timeout is for each wait; an answer that comes drop by drop must end as well.
            raw = bytearray()
            while part := response.raw.read1(READ_BYTES, decode_content=True):
                raw += part
                if time.monotonic() > deadline:
                    raise requests.Timeout
            return response.status_code, response.headers, bytes(raw)

    def _message(self, raw: bytes) -> str:
        """What the server says about an error, in whatever form it does."""
        text = raw.decode("utf-8", errors="replace")
        try:
            found = json.loads(text)
        except ValueError:
            found = None
        for key in ("error", "message", "detail"):
            if isinstance(found, dict) and found.get(key):
                found = found[key]
        said = found if isinstance(found, str) else text
        return self._auth.hidden(" ".join(said.split()))[:MESSAGE_CHARS] or "(no message)"

    def _refuse_key(self, status: int, message: str) -> NoReturn:
        name = self._settings.api_key_env
        if name is None:
            problem = f"{self.url} wants a key (HTTP {status}: {message}); name the environment variable that holds it"
        else:
            problem = (
                f"{self.url} does not accept the key in the environment variable {name} (HTTP {status}: {message})"
            )
        raise ConfigError(f"{self._path}.api_key_env", problem)


def _key(settings: RemoteSettings, path: str) -> str | None:
    if settings.api_key_env is None:
        return None
    key = os.environ.get(settings.api_key_env, "").strip()
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        problem = "is not set" if not key else "holds characters that no header can"
        fix = "export it where the run is started"
        raise ConfigError(f"{path}.api_key_env", f"the environment variable {settings.api_key_env} {problem}; {fix}")
    return key


def _root_cause(error: BaseException) -> str:
    """The operating system's words instead of three layers of wrapping."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return f"{type(error).__name__}: {error}"


class RemoteStrategy:
    """A :class:`~roll_opd.distributed.strategy.base.ScoreStrategy` without a model of its own.

    Args:
        role: the role's path in the YAML, for messages.
        config: the role's worker config; ``model_args`` are not used.
        vocabulary: of the student.
        max_length: tokens of the longest sequence to be scored.

    Attributes:
        model: name of the model at the server.

    Raises:
        ConfigError: a setting is missing, or the server contradicts it.
        ModelError: no server answers, or its model cannot be this run's teacher.
    """

    def __init__(self, role: str, config: WorkerConfig, vocabulary: Vocabulary, *, max_length: int) -> None:
        assert config.strategy_args is not None
        self.role = role
        self.path = f"{role}.strategy_args.strategy_config"
        self._settings: RemoteSettings = backend_settings(config.strategy_args, f"{role}.strategy_args")
        self._vocab_size = vocabulary.size
        if self._settings.base_url is None:
            raise ConfigError(f"{self.path}.base_url", "is missing: the address of a running vLLM server")
        self._server = Server(self._settings, self.path)
        self._threads = ThreadPoolExecutor(self._settings.max_concurrency, thread_name_prefix="remote")
        try:
            self.model = self._served_model(max_length)
            self._compare(vocabulary)
            self._probe(max_length)
        except ConnectionError as error:
            raise ModelError(f"{self.path}.base_url: no vLLM server can be used there: {error}") from error

    # ---- scoring -------------------------------------------------------------------------------------------------

    def score(self, requests: Sequence[ScoreRequest], want: ScoreWant = SAMPLED_ONLY) -> list[ScoreResult]:
        """See :class:`~roll_opd.distributed.strategy.base.ScoreStrategy`. May be called from several threads.

        Raises:
            ConnectionError: the server cannot be reached, or fails; it may recover.
            ValueError: its answer is unusable.
            TeacherError: it refuses a request.
        """
        check_want(self.role, want)
        stop = threading.Event()

        def work(request: ScoreRequest) -> ScoreResult | None:
            if stop.is_set():
                return None
            try:
                return self._score(request, want, stop)
            except BaseException:
                # One score that is missing makes the others useless: they are not asked for any more.
                stop.set()
                raise

        futures = [self._threads.submit(work, request) for request in requests]
        wait(futures, return_when=FIRST_EXCEPTION)
        for future in futures:
            if future.done():
                future.result()
        return [result for future in futures if (result := future.result()) is not None]

    def _score(self, request: ScoreRequest, want: ScoreWant, stop: threading.Event) -> ScoreResult:
        return score_result(request, self._ask(request.tokens, want.top_k, stop), want, self._vocab_size)

    def _ask(self, tokens: IntArray, top_k: int, stop: threading.Event | None = None) -> list[Any]:
        """Return the server's prompt log-probabilities of ``tokens``, one entry for each."""
        body = {
            "model": self.model,
            "prompt": tokens.tolist(),
            "prompt_logprobs": top_k,
            "max_tokens": 1,
            "temperature": 0.0,
        }
        try:
            answer = self._server.call("/v1/completions", body, stop=stop)
        except _RefusedError as error:
            hint = f"; a top {top_k} needs vLLM's --max-logprobs {top_k}" if top_k else ""
            raise TeacherError(f"{self.role}: {error}{hint}") from error
        choices = answer.get("choices") if isinstance(answer, dict) else None
        first = choices[0] if isinstance(choices, list) and choices else None
        entries = first.get("prompt_logprobs") if isinstance(first, dict) else None
        if not isinstance(entries, list):
            raise ValueError(f"{self._server.url} gives no prompt_logprobs; is it a vLLM server?")
        return entries

    # ---- checks at the start -------------------------------------------------------------------------------------

    def _served_model(self, max_length: int) -> str:
        """Choose among the models that the server offers."""
        try:
            answer = self._server.call("/v1/models")
            cards = {str(card["id"]): card for card in answer["data"]}
        except (_RefusedError, KeyError, TypeError) as error:
            raise ModelError(f"{self.path}.base_url: {self._server.url} offers no list of models: {error}") from error
        name, names = self._settings.served_model_name, ", ".join(map(repr, cards)) or "none"
        if name is None and len(cards) != 1:
            problem = f"must name one of the models at {self._server.url}, which are: {names}"
            raise ConfigError(f"{self.path}.served_model_name", problem)
        name = name or next(iter(cards))
        if name not in cards:
            problem = f"{self._server.url} has no model {name!r}; it has: {names}"
            raise ConfigError(f"{self.path}.served_model_name", problem)
        limit = cards[name].get("max_model_len")
        if limit is None:
            logger.warning("%s: %s does not say how long a sequence may be", self.role, self._server.url)
        elif limit < max_length + 1:
            raise ModelError(
                f"{self.path}.base_url: {name!r} at {self._server.url} takes {limit} tokens; the longest sequence of "
                f"the run has {max_length}, and vLLM wants room for one more. Start it with --max-model-len "
                f"{max_length + 1}, or shorten response_length, sequence_length or teacher_args.context_length"
            )
        return name

    def _compare(self, vocabulary: Vocabulary) -> None:
        """Compare what the server makes of every id with what the student's tokenizer does.

        Only ids travel, so what matters is what an id stands for, not how text is cut.
        """
        blocks = [range(i, min(i + BLOCK_IDS, vocabulary.size)) for i in range(0, vocabulary.size, BLOCK_IDS)]
        try:
            texts = list(self._threads.map(self._detokenize, blocks))
        except (_RefusedError, ConfigError) as error:  # policy: a gateway may serve /v1 alone
            logger.warning("%s: the tokenizers of teacher and student cannot be compared: %s", self.role, error)
            return
        for block, text in zip(blocks, texts, strict=True):
            if _without_spaces(text) != _without_spaces(vocabulary.decode(list(block))):
                self._refuse_vocabulary(vocabulary, block)
        beyond = range(vocabulary.size, vocabulary.size + BEYOND_IDS)
        try:
            more = self._detokenize(beyond, retries=0)
        except (
            _RefusedError,
            ConfigError,
            ConnectionError,
        ):  # policy: a server that chokes on such ids has no tokens there
            more = ""
        if more:
            self._refuse_vocabulary(vocabulary, beyond)
        self._compare_end(vocabulary)

    def _compare_end(self, vocabulary: Vocabulary) -> None:
        """Compare the end-of-sequence token, where the server tells it (vLLM's --enable-tokenizer-info-endpoint)."""
        try:
            answer = self._server.call("/tokenizer_info", retries=0)
            end = answer.get("eos_token") if isinstance(answer, dict) else None
        except (_RefusedError, ConfigError, ConnectionError):  # policy: most servers do not have it
            end = None
        if end is None:
            logger.warning(
                "%s: %r at %s has the student's %s tokens; which of them end a response there cannot be seen",
                *(self.role, self.model, self._server.url, vocabulary.size),
            )
            return
        ours = [vocabulary.decode([i]) for i in vocabulary.stop_ids if i < vocabulary.size]
        if end not in ours:
            raise ModelError(
                f"{self.path}: for {self.model!r} at {self._server.url} a response ends with {end!r}, for the student "
                f"with {' or '.join(map(repr, ours)) or 'nothing'}; use the same (instruct or base) kind of checkpoint"
            )

    def _detokenize(self, ids: Sequence[int], retries: int | None = None) -> str:
        answer = self._server.call("/detokenize", {"model": self.model, "tokens": list(ids)}, retries=retries)
        text = answer.get("prompt") if isinstance(answer, dict) else None
        if not isinstance(text, str):
            raise _RefusedError(f"{self._server.url}/detokenize gives no text")
        return text

    def _refuse_vocabulary(self, vocabulary: Vocabulary, ids: range) -> NoReturn:
        """Find the first of ``ids`` that stands for different text, by halving, and name it."""

        def ours(part: range) -> str:
            return vocabulary.decode([i for i in part if i < vocabulary.size])

        while len(ids) > 1:
            half = ids[: len(ids) // 2]
            same = _without_spaces(self._detokenize(half)) == _without_spaces(ours(half))
            ids = ids[len(half) :] if same else half
        raise ModelError(
            f"{self.path}: {self.model!r} at {self._server.url} and the student have different vocabularies: the first "
            f"difference is id {ids[0]}, {ours(ids)!r} for the student (of {vocabulary.size} ids) and "
            f"{self._detokenize(ids)!r} for the server. A teacher must share the student's tokenizer"
        )

    def _probe(self, max_length: int) -> None:
        """Score a few tokens, so that a server that cannot is found before the run, and look for padding."""
        count = min(PROBE_TOKENS, self._vocab_size, max_length)
        tokens = np.linspace(0, self._vocab_size - 1, count).astype(np.int32)
        request = ScoreRequest(TrajectoryId(0, 0, stream="probe"), tokens, np.arange(count) > 0)
        try:
            score_result(request, self._ask(tokens, 0), SAMPLED_ONLY, self._vocab_size)
        except (TeacherError, ValueError) as error:
            raise ModelError(f"{self.path}: a first request was not answered as it should be: {error}") from error
        try:
            mass = padding_mass(self._ask(tokens, PROBE_TOP_K), self._vocab_size)
        except TeacherError:  # policy: a server that allows fewer is asked for fewer in the run as well
            return
        if mass > PADDING_MASS:
            logger.warning(
                "%s: up to %.2g of the probability that %r at %s gives is on rows of its head that are no tokens; vLLM "
                "counts them, so its log-probabilities are too low by about as much. hf_infer and vllm leave them out",
                *(self.role, mass, self.model, self._server.url),
            )

    # ---- what a server elsewhere has no part in ------------------------------------------------------------------

    def offload(self, keep_weights: bool = False) -> None:
        """Nothing of it is here."""

    def onload(self, weights_only: bool = False) -> None:
        """Nothing of it is here."""

    def save_model(self, folder: str) -> None:
        """Refused: the weights are elsewhere, and do not move with the run."""
        self._refuse("cannot follow the student's weights or be part of a checkpoint")

    def load_model(self, folder: str) -> None:
        """Refused, as :meth:`save_model`."""
        self._refuse("cannot follow the student's weights or be part of a checkpoint")

    def head(self) -> HeadWeights:
        """Refused: hidden states are not served."""
        self._refuse("gives no whole distributions; set opd_args.support to sampled or teacher_topk")

    def _refuse(self, problem: str) -> NoReturn:
        raise ModelError(f"{self.role}.strategy_args.strategy_name: a remote teacher {problem}")


def _without_spaces(text: str) -> str:
    """Drop white space: libraries differ in how they tidy up decoded text."""
    return "".join(text.split())
