"""Errors as OpenAI's API tells them."""

from __future__ import annotations

from typing import Any

from stackctl.core.errors import NotFound, StackctlError

_STATUS = {"queue_full": 429, "not_found": 404, "usage": 400, "incompatible": 400, "verification_failed": 400}
_HEADERS = {
    401: {"WWW-Authenticate": "Bearer"}, 408: {"Connection": "close"}, 413: {"Connection": "close"},
    429: {"Retry-After": "1"},
}  # fmt: skip
_TYPES = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error"}


class ApiError(Exception):
    """``status`` is HTTP's, ``param`` the field of the body that is wrong."""

    def __init__(self, status: int, message: str, *, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param

    @property
    def headers(self) -> dict[str, str] | None:
        """What the answer says besides."""
        return _HEADERS.get(self.status)

    def json(self) -> dict[str, Any]:
        """The body of the answer."""
        kind = _TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def api_error(error: Exception) -> ApiError:
    """Any error as one of the API's; what is not expected is told by its type alone."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, StackctlError):
        told = error.message + (f" ({error.hint})" if error.hint else "")
        status = _STATUS.get(error.code, 500)
        code = "model_not_found" if isinstance(error, NotFound) else error.code
        return ApiError(status, told, code=code, param=getattr(error, "param", None))
    return ApiError(500, f"the server failed: {type(error).__name__}", code="internal_error")
