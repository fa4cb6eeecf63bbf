"""Browser sessions without any state here: the person's own Kubernetes token in a signed, http-only, same-site cookie.

The cookie is signed, not encrypted: whoever can read a browser's cookies holds the token. Make it a short-lived one.
"""

import hmac
import logging
import secrets
from pathlib import Path
from typing import Final

from fastapi import Request, Response
from itsdangerous import BadSignature, Signer, TimestampSigner

log = logging.getLogger(__name__)

SESSION_COOKIE: Final = "tunewright_session"
CSRF_COOKIE: Final = "tunewright_csrf"
MAX_COOKIE: Final = 4000  # browsers drop cookies of more than 4096 bytes with their name and attributes
_MIN_KEY_BYTES: Final = 16


class Sessions:
    """Makes and reads the cookies."""

    def __init__(self, key: bytes, *, seconds: int, secure: bool) -> None:
        self._session = TimestampSigner(key, salt="session")
        self._csrf = Signer(key, salt="csrf")
        self._seconds = seconds
        self._secure = secure

    @classmethod
    def from_file(cls, path: Path | None, *, seconds: int, secure: bool) -> "Sessions":
        """Sessions with the key of a file, which all replicas share; without one, with a key that ends with the process."""
        if path is None:
            log.warning("TUNEWRIGHT_SESSION_KEY_FILE is not set: people must log in again after each restart")
            return cls(secrets.token_bytes(32), seconds=seconds, secure=secure)
        key = path.read_bytes().strip()
        if len(key) < _MIN_KEY_BYTES:
            raise ValueError(f"TUNEWRIGHT_SESSION_KEY_FILE: {path} holds {len(key)} bytes; put at least {_MIN_KEY_BYTES} random ones there")
        return cls(key, seconds=seconds, secure=secure)

    def begin(self, response: Response, token: str) -> bool:
        """Puts the token into a cookie; False where it is too long for one."""
        value = self._session.sign(token).decode()
        if len(value) > MAX_COOKIE:
            return False
        self._set(response, SESSION_COOKIE, value)
        return True

    def end(self, response: Response) -> None:
        """Forgets the session."""
        response.delete_cookie(SESSION_COOKIE, path="/", secure=self._secure, httponly=True, samesite="strict")

    def token(self, request: Request) -> str:
        """The token of the session, or ``""`` where there is none, it is forged or too old."""
        try:
            return self._session.unsign(request.cookies.get(SESSION_COOKIE, ""), max_age=self._seconds).decode()
        except BadSignature:
            return ""

    def csrf(self, request: Request, response_cookies: dict[str, str]) -> str:
        """The value for a form's hidden field. A cookie that is still to be set is put into ``response_cookies``."""
        nonce = request.cookies.get(CSRF_COOKIE, "")
        if not nonce:
            nonce = response_cookies[CSRF_COOKIE] = secrets.token_urlsafe(24)
        return self._csrf.sign(nonce).decode()

    def set_cookies(self, response: Response, cookies: dict[str, str]) -> None:
        """Sets what ``csrf`` asked for."""
        for name, value in cookies.items():
            self._set(response, name, value)

    def from_our_form(self, request: Request, field: str) -> bool:
        """Whether a form came from a page of ours: its field is our signature over the cookie's value."""
        nonce = request.cookies.get(CSRF_COOKIE, "")
        return bool(nonce) and hmac.compare_digest(self._csrf.sign(nonce), field.encode())

    def _set(self, response: Response, name: str, value: str) -> None:
        response.set_cookie(name, value, max_age=self._seconds, path="/", secure=self._secure, httponly=True, samesite="strict")
