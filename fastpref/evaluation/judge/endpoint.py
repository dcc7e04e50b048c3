"""Client of an OpenAI-compatible chat endpoint: POST /chat/completions, tried again on failures.

Tried again are HTTP 408, 409, 429 and 5xx, timeouts, broken connections, and bodies that are not an
answer. The wait doubles from try to try, with jitter, and is at least what `Retry-After` asks for.
Other statuses, redirects included, stop the run: the next question would fail as well, and a
redirect would hand the key to another host.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from email.message import Message
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

from fastpref.evaluation.judge.template import Reply
from fastpref.utils.errors import UserError, first_line

LONGEST_WAIT = 60.0  # seconds, unless Retry-After asks for more
LONGEST_RETRY_AFTER = 600.0  # seconds; a run that would wait longer stops
_TRANSIENT = {408, 409, 429}
_PATH = "/chat/completions"


OptionNames = Callable[[str], str]  # what messages call an option, such as `api_key_env`


def on_command_line(option: str) -> str:
    """Name of an option as the command line has it."""
    return f"--{option.replace('_', '-')}"


class Stopped(Exception):
    """The run ended while a question waited for its next try."""


class Failure(Exception):
    """A failure that may pass; `wait` is what the server asks for, in seconds."""

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


class Refusal(Exception):
    """A status that another try would not change, and the server's words."""

    def __init__(self, code: int, detail: str) -> None:
        super().__init__(f"HTTP {code}: {detail}")
        self.code, self.detail = code, detail


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *arguments: Any, **options: Any) -> None:
        return None


@dataclass(frozen=True)
class Endpoint:
    """A chat model behind a URL.

    url: base such as `http://localhost:8000/v1`, or the full address of `/chat/completions`.
    key: sent as bearer token; None sends none.
    body: fields of the request beside `model` and `messages`.
    timeout: of a connection and of a wait for data, seconds.
    retries: further tries after a failure that may pass.
    first_wait: seconds before the second try.
    names: what messages call the options.
    """

    url: str
    model: str
    key: str | None = field(default=None, repr=False)
    body: dict[str, Any] = field(default_factory=dict)
    timeout: float = 120.0
    retries: int = 6
    first_wait: float = 1.0
    names: OptionNames = field(default=on_command_line, repr=False)

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            endpoint = self.names("endpoint")
            raise UserError(
                f"{endpoint}: expected a URL such as http://localhost:8000/v1, got {self.url!r}"
            )

    @property
    def address(self) -> str:
        base = self.url.rstrip("/")
        return base if base.endswith(_PATH) else base + _PATH

    def ask(
        self,
        question: str,
        name: str,
        stop: threading.Event | None = None,
        note: Callable[[str], None] = lambda text: None,
    ) -> Reply:
        """Send a question as one message of the user and return the answer.

        name: of the question, for messages. stop: ends waits. note: takes the reason of each retry.

        Raises UserError if the server refuses the question or fails too often, and Stopped.
        """
        stop, endpoint = stop or threading.Event(), self.names("endpoint")
        for attempt in range(self.retries + 1):
            try:
                return self._post(question, name)
            except Failure as failure:
                reason, wait = str(failure), failure.wait
            if wait > LONGEST_RETRY_AFTER:
                raise UserError(
                    f"{endpoint}: {self.address} asks to wait {wait:,.0f} seconds ({reason}); run "
                    "the same command again later, it continues"
                )
            if attempt == self.retries:
                break
            backoff = min(LONGEST_WAIT, self.first_wait * 2**attempt) * random.uniform(0.5, 1.0)
            note(reason)
            if stop.wait(max(backoff, wait)):
                raise Stopped
        raise UserError(
            f"{endpoint}: {self.address} failed {self.retries + 1} times ({reason}); check that it "
            "works, then run the same command again, it continues"
        )

    def _post(self, question: str, name: str) -> Reply:
        messages = [{"role": "user", "content": question}]
        body = {"model": self.model, "messages": messages, **self.body}
        try:
            return _reply(post(self.address, body, self.key, self.timeout))
        except Failure as failure:
            raise Failure(self._without_key(str(failure)), failure.wait) from None
        except Refusal as refusal:
            code, detail = refusal.code, self._without_key(refusal.detail)
        endpoint, model = self.names("endpoint"), self.names("model")
        api_key_env, fields = self.names("api_key_env"), self.names("body")
        if code in (401, 403):
            raise UserError(
                f"{endpoint}: {self.address} refused the key (HTTP {code}: {detail}); name "
                f"the environment variable that holds it with {api_key_env}"
            )
        raise UserError(
            f"{endpoint}: {self.address} refused the question of {name} (HTTP {code}: "
            f"{detail}); fix {endpoint}, {model} or {fields}, or leave the prompt out"
        )

    def _without_key(self, text: str) -> str:
        return text.replace(self.key, "…") if self.key else text


def post(address: str, body: dict[str, Any], key: str | None, timeout: float) -> bytes:
    """Send JSON to an address of http or https, and return the body of the answer.

    key: sent as bearer token. timeout: of a connection and of a wait for data, seconds.

    Raises Failure where another try may succeed, and Refusal.
    """
    headers = {"Content-Type": "application/json"}
    if key is not None:
        headers["Authorization"] = f"Bearer {key}"
    # The caller has checked the scheme.
    request = urllib.request.Request(  # noqa: S310
        address, json.dumps(body).encode(), headers, method="POST"
    )
    opener = urllib.request.build_opener(_NoRedirects)
    try:
        with opener.open(request, timeout=timeout) as response:
            data: bytes = response.read()
            return data
    except urllib.error.HTTPError as error:
        with error:
            detail = _detail(error)
        if error.code in _TRANSIENT or error.code >= 500:
            raise Failure(f"HTTP {error.code}: {detail}", retry_after(error.headers)) from None
        raise Refusal(error.code, detail) from None
    except (OSError, http.client.HTTPException) as error:  # URLError and TimeoutError included
        raise Failure(_reason(error, timeout)) from None


def retry_after(headers: Message) -> float:
    """Seconds that a response asks to wait, as a number or a date; 0 if it does not."""
    value = headers.get("Retry-After", "").strip()
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return 0.0


def _reply(data: bytes) -> Reply:
    try:
        choice = json.loads(data)["choices"][0]
        content, finish_reason = choice["message"]["content"], choice.get("finish_reason")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        raise Failure("the body is not a chat completion") from None
    # A refusal of the model has no content.
    return Reply(content if isinstance(content, str) else "", finish_reason)


def _detail(error: urllib.error.HTTPError) -> str:
    """Message of an error's body, shortened to one line."""
    try:
        text = error.read(4096).decode(errors="replace")
    except (OSError, http.client.HTTPException):
        text = ""
    with contextlib.suppress(ValueError):
        text = _message(json.loads(text)) or text
    return " ".join(text.split())[:200] or error.reason or "no reason"


def _message(body: Any) -> str | None:
    """Message in the body of an error, as OpenAI, vLLM, SGLang or FastAPI write it."""
    if isinstance(body, dict) and isinstance(body.get("error"), dict):
        body = body["error"]
    if not isinstance(body, dict):
        return None
    values = (body.get(name) for name in ("message", "error_message", "detail"))
    return next((str(value) for value in values if value), None)


def _reason(error: Exception, timeout: float) -> str:
    cause = getattr(error, "reason", None) or error
    if isinstance(cause, TimeoutError):
        return f"no answer in {timeout:g} seconds"
    return first_line(cause) if isinstance(cause, BaseException) else str(cause)
