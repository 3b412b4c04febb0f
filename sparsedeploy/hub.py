"""What a hub (huggingface.co, or the one that HF_ENDPOINT names) means by an error, as one line with what to do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparsedeploy.errors import UserError

_ALWAYS = {429: ("asks to wait", "Run the same command again in some minutes.")}


def hub_refusal(error: Exception, hub: str, known: Mapping[int, tuple[str, str]]) -> UserError | None:
    """Why a hub refuses or cannot be reached; None for an error that is not of a hub.

    Args:
        hub: its address.
        known: for a status of HTTP what it means here and what to do.
    """
    response = _response(error)
    if response is None:
        if type(error).__name__ == "OfflineModeIsEnabled":
            return UserError(f"{hub} cannot be reached (HF_HUB_OFFLINE is set)", "Unset it.")
        if unreachable(error):
            return UserError(f"{hub} cannot be reached ({_reason(error)})", "Check the network, or HF_ENDPOINT.")
        return None
    status = int(response.status_code)
    said = _said(response)
    otherwise = ("answers with an error", "Run the same command again later.")
    what, fix = {**_ALWAYS, **known}.get(status, otherwise)
    return UserError(f"{hub} {what} ({status}{f': {said}' if said else ''})", fix)


def unreachable(error: BaseException | None) -> bool:
    """Whether an error, however deep it is hidden, is one of the network: no answer came."""
    if _response(error) is not None:
        return False
    while error is not None:
        of_network = type(error).__module__.split(".")[0] in ("httpx", "httpcore", "requests")
        if of_network or isinstance(error, ConnectionError):
            return True
        error = error.__cause__ or error.__context__
    return False


def _response(error: BaseException | None) -> Any:
    """The answer of the hub, however deep an error hides it."""
    while error is not None:
        if getattr(error, "response", None) is not None:
            return error.response  # type: ignore[attr-defined]
        error = error.__cause__ or error.__context__
    return None


def _reason(error: BaseException) -> str:
    while (error.__cause__ or error.__context__) is not None:
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    return getattr(error, "strerror", None) or " ".join(str(error).split())[:120] or type(error).__name__


def _said(response: Any) -> str:
    """The hub's own words."""
    text = response.headers.get("X-Error-Message") or ""
    if not text:
        try:
            text = response.json().get("error", "")
        except Exception:
            return ""
    return " ".join(str(text).split())[:160]
