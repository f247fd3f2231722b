"""An OpenAI-compatible server as what answers questions.

https, or plain http to this machine only; redirects are not followed and proxies not used, so the key goes nowhere
else.  The key is read from the environment when a request is made and is in no record, message or log.  Each request
has a deadline for all of it; what is busy or fails is asked again a bounded number of times; an answer is read up to
1 MiB and must be the JSON it should be.
"""

from __future__ import annotations

import http.client
import json
import math
import os
import socket
import ssl
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self, TypeVar
from urllib.parse import urlsplit

from align.errors import InputError
from align.verifiers.base import Abstain, clean
from align.verifiers.fence import Question, render
from align.verifiers.spec_models import AskedModel

LARGEST_ANSWER = 2**20  # bytes
TOP_LOGPROBS = 20  # the most that the interface gives
LONGEST_PAUSE_S = 10.0
Found = TypeVar("Found")


class _Again(Exception):
    """The request may be sent again; the message is the reason where it may not, for lack of tries."""

    def __init__(self, reason: str, pause_s: float | None = None) -> None:
        super().__init__(reason)
        self.pause_s = pause_s


def read_key(variable: str | None, where: str) -> str | None:
    """The endpoint's key from the environment; refuses a variable that is not set."""
    if variable is None:
        return None
    key = os.environ.get(variable, "")
    if not key.strip():
        raise InputError(f"{where}.key_variable: the environment variable {variable} is not set; export the key in it")
    if not key.isascii() or not key.isprintable():
        raise InputError(f"{where}.key_variable: {variable} holds characters that no key has")
    return key.strip()


class Endpoint:
    """Asks many questions at a time, each with a deadline."""

    def __init__(
        self, name: str, address: str, model: str, *, key_variable: str | None = None, timeout_s: float = 60.0,
        concurrency: int = 8, retries: int = 2, max_characters: int = 200_000, pause_s: float = 0.5,
    ) -> None:  # fmt: skip
        """`pause_s` is the wait before the second try; it doubles with each."""
        self._where, self._model, self._key_variable = f"verifiers.{name}", model, key_variable
        self._parts = urlsplit(address)
        self._timeout_s, self._retries, self._pause_s = timeout_s, retries, pause_s
        self._max_characters, self._concurrency = max_characters, concurrency
        self._lock, self._served = threading.Lock(), False
        self.account: Counter[str] = Counter()

    @classmethod
    def from_spec(cls, spec: AskedModel) -> Self:
        assert spec.endpoint is not None
        return cls(
            spec.name,
            spec.endpoint,
            spec.model,
            key_variable=spec.key_variable,
            timeout_s=spec.timeout_s,
            concurrency=spec.concurrency,
            retries=spec.retries,
            max_characters=spec.max_characters,
        )

    def choose(self, questions: Sequence[Question], words: Sequence[str]) -> list[list[float] | Abstain]:
        """Probabilities of the words among the likeliest 20 first tokens; a word that is not among them has 0."""
        settings = {"max_tokens": 1, "logprobs": True, "top_logprobs": TOP_LOGPROBS}
        return self._all(questions, settings, lambda choice: word_chances(choice, words))

    def write(self, questions: Sequence[Question], max_tokens: int) -> list[str | Abstain]:
        """The written answers."""
        return self._all(questions, {"max_tokens": max_tokens}, written)

    def close(self) -> None:
        """Nothing is held between questions."""

    def _all(
        self, questions: Sequence[Question], settings: Mapping[str, Any], read: Callable[[Any], Found | Abstain]
    ) -> list[Found | Abstain]:
        with ThreadPoolExecutor(self._concurrency) as threads:
            return list(threads.map(lambda question: self._one(question, settings, read), questions))

    def _one(
        self, question: Question, settings: Mapping[str, Any], read: Callable[[Any], Found | Abstain]
    ) -> Found | Abstain:
        system, user = render(question)
        if len(system) + len(user) > self._max_characters:
            return Abstain(f"the question has {len(system) + len(user)} characters, above {self._max_characters}")
        messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        body = json.dumps({"model": self._model, "messages": messages, "temperature": 0, **settings}).encode()
        for attempt in range(self._retries + 1):
            try:
                self._count(requests=1, retries=int(attempt > 0))
                answer = self._send(body)
                break
            except _Again as again:
                if attempt == self._retries:
                    self._count(failed=1)
                    return Abstain(f"{again}, after {attempt + 1} tries")
                pause_s = self._pause_s * 2**attempt if again.pause_s is None else again.pause_s
                time.sleep(min(pause_s, LONGEST_PAUSE_S))
            except Abstain as abstain:
                self._count(failed=1)
                return abstain
        return self._read(answer, read)

    def _read(self, answer: bytes, read: Callable[[Any], Found | Abstain]) -> Found | Abstain:
        """What the answer says; none with the reason where it is not what the interface promises."""
        try:
            found = json.loads(answer)
            usage = found.get("usage") or {}
            self._count(
                tokens_read=_natural(usage.get("prompt_tokens")),
                tokens_written=_natural(usage.get("completion_tokens")),
            )
            result = read(found["choices"][0])
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
            self._count(unread=1)
            return Abstain(f"the endpoint's answer is not in the expected form: {type(error).__name__}")
        if isinstance(result, Abstain):
            self._count(unread=1)
        return result

    def _count(self, **counts: int) -> None:
        with self._lock:
            self.account.update(counts)

    def _send(self, body: bytes) -> bytes:
        """One request; `_Again` for what may pass, `Abstain` for what will not, `InputError` for wrong settings."""
        key = read_key(self._key_variable, self._where)
        headers = {"Content-Type": "application/json", "Connection": "close"}
        if key is not None:
            headers["Authorization"] = f"Bearer {key}"
        late = f"the endpoint did not answer within {self._timeout_s:g} s"
        connection = self._connect()
        watch = _Watch(connection, self._timeout_s)
        try:
            connection.connect()
            watch.start()
            connection.request("POST", f"{self._parts.path.rstrip('/')}/chat/completions", body, headers)
            with connection.getresponse() as response:
                answer = response.read(LARGEST_ANSWER + 1)
            if watch.over:
                raise _Again(late)
        except TimeoutError:
            raise _Again(late) from None
        except ssl.SSLCertVerificationError as error:
            raise InputError(f"{self._where}.endpoint: its certificate is refused: {error.verify_message}") from None
        except (OSError, http.client.HTTPException) as error:
            told = f"the endpoint cannot be reached: {clean(str(error)) or type(error).__name__}"
            raise _Again(late if watch.over else told) from None
        finally:
            watch.stop()
            connection.close()
        if len(answer) > LARGEST_ANSWER:
            raise Abstain(f"the endpoint's answer is longer than {LARGEST_ANSWER} bytes")
        if response.status == 200:
            self._served = True
            return answer
        told = clean(answer[:400].decode(errors="replace"))
        told = told.replace(key, "…") if key else told
        return self._refused(response, told)

    def _refused(self, response: http.client.HTTPResponse, told: str) -> bytes:
        """Raises what a status means.  One that has served before and says 403 or 404 now minds this text, not us."""
        status = response.status
        if status == 401 or (status in (403, 404) and not self._served):
            key = {401: "key_variable", 403: "key_variable", 404: "model"}[status]
            raise InputError(f"{self._where}.{key}: the endpoint answers with status {status}: {told}")
        if status in (408, 409, 425, 429) or status >= 500:
            raise _Again(f"the endpoint answered with status {status}", _seconds(response.getheader("Retry-After")))
        raise Abstain(f"the endpoint answered with status {status}: {told}")

    def _connect(self) -> http.client.HTTPConnection:
        host, port = self._parts.hostname or "", self._parts.port
        if self._parts.scheme == "https":
            return http.client.HTTPSConnection(
                host, port, timeout=self._timeout_s, context=ssl.create_default_context()
            )
        return http.client.HTTPConnection(host, port, timeout=self._timeout_s)


class _Watch:
    """Cuts a connection at its deadline: a server that sends a byte now and then would outlive any other limit."""

    def __init__(self, connection: http.client.HTTPConnection, timeout_s: float) -> None:
        self._connection, self.over = connection, False
        self._timer = threading.Timer(timeout_s, self._cut)
        self._timer.daemon = True

    def start(self) -> None:
        self._socket = self._connection.sock
        self._timer.start()

    def stop(self) -> None:
        self._timer.cancel()

    def _cut(self) -> None:
        self.over = True
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # closed in the meantime


def word_chances(choice: Any, words: Sequence[str]) -> list[float] | Abstain:
    """Probability of each word among the first token's alternatives, whatever its case and the blanks around it."""
    if not choice.get("logprobs") or not choice["logprobs"].get("content"):
        return Abstain("the endpoint gives no log-probabilities; use `mode: rubric`, or another server")
    chances = dict.fromkeys((word.casefold() for word in words), 0.0)
    for entry in choice["logprobs"]["content"][0]["top_logprobs"][: 2 * TOP_LOGPROBS]:
        token, logprob = entry["token"].strip().casefold(), float(entry["logprob"])
        if not math.isnan(logprob) and token in chances:
            chances[token] += math.exp(min(logprob, 0.0))
    return [chances[word.casefold()] for word in words]


def written(choice: Any) -> str | Abstain:
    """The text of an answer that ended by itself."""
    if choice.get("finish_reason") == "length":
        return Abstain("the judge's answer was cut off; raise answer_tokens")
    text = choice["message"]["content"]
    if not isinstance(text, str):
        return Abstain("the judge gave no text")
    return text


def _natural(value: object) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**40 else 0


def _seconds(header: str | None) -> float | None:
    """`Retry-After` where it is a number of seconds."""
    return float(header) if header is not None and header.isdigit() and len(header) < 6 else None
