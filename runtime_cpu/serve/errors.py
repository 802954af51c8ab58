"""Errors in OpenAI's form: ``{"error": {"message", "type", "param", "code"}}`` with the field named.

raise ApiError(400, "temperature is 3.0; allowed is 0 to 2", param="temperature")
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse


class ApiError(Exception):
    """A request cannot be served; the message is meant for its sender.

    Attributes:
        status: HTTP status.
        param: the field that is wrong, as in ``messages[0].content``.
        code: a word for programs, such as ``context_length_exceeded``.
        headers: further HTTP headers of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    @property
    def kind(self) -> str:
        """OpenAI's ``type``."""
        if self.status in (401, 403):
            return "authentication_error"
        if self.status in (429, 503):
            return "rate_limit_error"
        return "invalid_request_error" if self.status < 500 else "server_error"

    def body(self) -> dict[str, Any]:
        """The JSON body."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The whole answer."""
        return JSONResponse(self.body(), self.status, self.headers)
