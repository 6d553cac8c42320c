"""What is read out of requests and written into them: prompts, prefill copies, headers, error bodies."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from typing import Any, Final

from aiohttp import web
from multidict import CIMultiDict

from connectors.registration import PeerAddress

CHARS_PER_TOKEN: Final = 4
REQUEST_ID: Final = "X-Request-Id"
CHAT_PATH: Final = "/v1/chat/completions"
# Of no use for a prefill, or wrong with one token.
NOT_FOR_PREFILL: Final = (
    "min_tokens", "stream_options", "echo", "best_of", "logprobs", "top_logprobs", "prompt_logprobs",
    "logprob_token_ids", "return_tokens_as_token_ids",
)  # fmt: skip
HOP_BY_HOP: Final = frozenset(
    ("connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection", "te", "trailer",
     "transfer-encoding", "upgrade")
)  # fmt: skip
ASK_FOR_HAND_OVER: Final = {"do_remote_decode": True}  # what vLLM's connectors look for in a prefill
# The body is written anew and unpacked, and its answer is to come unpacked too.
NOT_OF_REQUEST: Final = frozenset(("host", "content-length", "content-encoding", "accept-encoding", "expect"))
MAX_EVENT_NBYTES: Final = 1 << 20
_BLANK_LINES: Final = (b"\n\n", b"\r\n\r\n", b"\r\r")
ERROR_TYPES: Final = {400: "invalid_request_error", 404: "not_found_error", 408: "timeout_error",
                      413: "invalid_request_error", 429: "rate_limit_error"}  # fmt: skip


def parse_body(data: bytes) -> dict[str, Any]:
    """Raises:
    ValueError: it is not a JSON object; the message says why.
    """
    try:
        body = json.loads(data)
    except (ValueError, RecursionError) as e:
        raise ValueError(f"the body is not JSON: {e}") from e
    if not isinstance(body, dict):
        raise ValueError("the body is not a JSON object")
    return body


def prompt_chars(body: Mapping[str, Any]) -> int | None:
    """Estimated length of the prompt in characters; None where there are several prompts.

    Several prompts would need a prefill each: the answer to a batch has `kv_transfer_params` of one only.
    """
    prompt = body.get("prompt")
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
        if len(prompt) > 1:
            return None
        prompt = prompt[0]
    if isinstance(prompt, str):
        return len(prompt)
    if isinstance(prompt, list):
        return CHARS_PER_TOKEN * len(prompt)
    messages = body.get("messages")
    return sum(map(_message_chars, messages)) if isinstance(messages, list) else 0


def prefill_copy(path: str, body: Mapping[str, Any], push_to: PeerAddress | None = None) -> bytes:
    """The request that only computes the prompt: one token, in one piece.

    Args:
        push_to: who will decode, where KV can be pushed to it.
    """
    copy = {key: value for key, value in body.items() if key not in NOT_FOR_PREFILL}
    to = {} if push_to is None else {"kvstore_push_to": {"address": push_to.address, "key": push_to.key}}
    copy |= {"max_tokens": 1, "stream": False, "n": 1, "kv_transfer_params": {**ASK_FOR_HAND_OVER, **to}}
    if path == CHAT_PATH:
        copy["max_completion_tokens"] = 1
    return json.dumps(copy).encode()


def request_headers(headers: Mapping[str, str]) -> CIMultiDict[str]:
    """What a server gets of a client's headers, and an id where the client gave none."""
    kept = _end_to_end(headers, NOT_OF_REQUEST)
    kept.setdefault(REQUEST_ID, uuid.uuid4().hex)
    kept["Accept-Encoding"] = "identity"
    return kept


def answer_headers(headers: Mapping[str, str]) -> CIMultiDict[str]:
    """What a client gets of a server's headers."""
    return _end_to_end(headers, frozenset())


def error_body(status: int, message: str) -> dict[str, Any]:
    """An error as OpenAI's clients read it."""
    return {"error": {"message": message, "type": ERROR_TYPES.get(status, "server_error"), "code": status}}


def error_answer(status: int, message: str) -> web.Response:
    return web.json_response(error_body(status, message), status=status)


def error_event(status: int, message: str) -> bytes:
    """An error within a stream; ends first what may have been cut off."""
    return b"\n\ndata: " + json.dumps(error_body(status, message)).encode() + b"\n\n"


def whole_events(data: bytes) -> tuple[bytes, bytes]:
    """What of a stream's bytes can be passed on, and the beginning of an event that is not whole yet.

    An event of more than `MAX_EVENT_NBYTES` is passed on as it comes.
    """
    end = max(data.rfind(blank) + len(blank) if blank in data else 0 for blank in _BLANK_LINES)
    if len(data) - end > MAX_EVENT_NBYTES:
        return data, b""
    return data[:end], data[end:]


def _end_to_end(headers: Mapping[str, str], without: frozenset[str]) -> CIMultiDict[str]:
    named = CIMultiDict(headers).getall("Connection", [])
    gone = HOP_BY_HOP | without | {name.strip().lower() for value in named for name in value.split(",")}
    return CIMultiDict((name, value) for name, value in headers.items() if name.lower() not in gone)


def _message_chars(message: object) -> int:
    content = message.get("content") if isinstance(message, dict) else None
    if isinstance(content, str):
        return len(content)
    parts = content if isinstance(content, list) else []
    texts = [part.get("text") for part in parts if isinstance(part, dict)]
    return sum(len(text) for text in texts if isinstance(text, str))
