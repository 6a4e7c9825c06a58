"""A webhook: one POST, repeated until it is acknowledged.

    POST URL                               answers
      Content-Type: application/json       200, 204   done
      X-Ferry-Delivery: ID                 202 {"more_time_s": N}   at it; asked again later
      X-Ferry-Timestamp: seconds           4xx        refused; not repeated (but 408, 425, 429 are)
      X-Ferry-Signature: sha256=HEX        else, or none: repeated, with growing gaps
      {"point": "before-switchover", ...}

The signature is HMAC-SHA256 of TIMESTAMP + "." + body under the hook's secret. The delivery's id
stays the same over repetitions, so that a receiver can tell one from a new call. A refusal's JSON
may have a "reason".
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import secrets
import ssl
import time
from typing import Final

import aiohttp
import msgspec

from migrator.errors import words
from node_agent.hooks.model import HookCall, WebhookHook
from node_agent.hooks.port import HookDriver, HookError

_ATTEMPT_S: Final = 10.0
_GAP_FIRST_S: Final = 0.2
_GAP_LONGEST_S: Final = 5.0
_ASK_AGAIN_S: Final = 0.5
_BODY_BYTES_MAX: Final = 64 * 1024
_REPEATED: Final = frozenset({408, 425, 429})


class _Answer(msgspec.Struct, frozen=True):
    """What an acknowledgement may say; anything else in it is ignored."""

    more_time_s: float = 0.0
    reason: str = ""


def signature(secret: str, timestamp: str, body: bytes) -> str:
    """What X-Ferry-Signature holds; a receiver computes the same."""
    digest = hmac.new(secret.encode(), timestamp.encode() + b"." + body, hashlib.sha256)
    return f"sha256={digest.hexdigest()}"


class WebhookDriver(HookDriver[WebhookHook]):
    """See the module."""

    async def run(self, settings: WebhookHook, call: HookCall, *, deadline_s: float) -> str:
        body = msgspec.json.encode(call)
        delivery = secrets.token_hex(8)
        loop = asyncio.get_running_loop()
        ends_s = loop.time() + deadline_s
        latest_s = ends_s + settings.more_time_s_max
        gap_s, attempts, last = _GAP_FIRST_S, 0, "no attempt was made"
        async with aiohttp.ClientSession() as session:
            while (left_s := ends_s - loop.time()) > 0:
                attempts += 1
                try:
                    status, content = await post(
                        session, settings.url, settings.secret, body, delivery, left_s
                    )
                except (aiohttp.ClientError, TimeoutError, OSError) as error:
                    last = why(error)
                else:
                    answer = _answer(content)
                    if status == 202 and answer.more_time_s > 0:
                        ends_s = min(max(ends_s, loop.time() + answer.more_time_s), latest_s)
                        last = f"it asked for {answer.more_time_s:g} s more"
                        await asyncio.sleep(min(_ASK_AGAIN_S, max(ends_s - loop.time(), 0)))
                        continue
                    if 200 <= status < 300:
                        again = f" after {attempts} attempts" if attempts > 1 else ""
                        return f"acknowledged{again}"
                    last = f"status {status}" + (f": {answer.reason}" if answer.reason else "")
                    if 400 <= status < 500 and status not in _REPEATED:
                        raise HookError(f"{settings.url} refused: {answer.reason or last}")
                await asyncio.sleep(min(gap_s, max(ends_s - loop.time(), 0)))
                gap_s = min(2 * gap_s, _GAP_LONGEST_S)
        raise HookError(f"{settings.url} was not done in time, {attempts} attempts; last: {last}")


def why(error: Exception) -> str:
    """Why nothing was answered, without what aiohttp adds for its own developers."""
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, aiohttp.ClientConnectorError) and not isinstance(error, ssl.SSLError):
        return f"{error.host} port {error.port} can't be reached: {words(error.os_error)}"
    return words(error)


async def post(
    session: aiohttp.ClientSession,
    url: str,
    secret: str,
    body: bytes,
    delivery: str,
    left_s: float,
) -> tuple[int, bytes]:
    """One signed delivery; the status, and the answer's first part. As aiohttp raises."""
    timestamp = str(int(time.time()))
    headers = {
        "Content-Type": "application/json",
        "X-Ferry-Delivery": delivery,
        "X-Ferry-Timestamp": timestamp,
    }
    if secret:
        headers["X-Ferry-Signature"] = signature(secret, timestamp, body)
    async with session.post(
        url,
        data=body,
        headers=headers,
        allow_redirects=False,
        timeout=aiohttp.ClientTimeout(total=min(_ATTEMPT_S, left_s)),
    ) as response:
        content = b""
        while chunk := await response.content.read(_BODY_BYTES_MAX - len(content)):
            content += chunk  # It comes in as many pieces as its sender, or the network, makes.
        return response.status, content


def _answer(content: bytes) -> _Answer:
    try:
        return msgspec.json.decode(content, type=_Answer)
    except msgspec.DecodeError:
        return _Answer()
