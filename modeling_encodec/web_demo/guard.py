"""Which requests reach Gradio: those that the page makes, within its limits, and none that would fetch anything.

Gradio has routes that fetch an address, run a function beside the queue or keep for a day whatever is uploaded. A page
that strangers can reach must not, so what the page needs is listed here and everything else is refused: other routes,
files outside the page's folder, and addresses wherever a file is meant.
"""

import asyncio
import contextlib
import json
import os
import re
import time
from pathlib import Path

from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from modeling_encodec.web_demo.clips import Limits


READ = re.compile(r"/(config|theme\.css|favicon\.ico|manifest\.json|((assets|static|svelte)/.*))?")
READ_GRADIO = re.compile(r"/gradio_api/(startup-events|app_id|upload_progress|queue/data|heartbeat/\w+)")
FILE = re.compile(r"/gradio_api/file=(?P<path>.+)", re.DOTALL)
UPLOAD = "/gradio_api/upload"
CALLS = ("/gradio_api/queue/join", "/gradio_api/run/predict", "/gradio_api/cancel", "/gradio_api/reset")
CALL_NAMES = ("fn_index", "trigger_id", "session_hash", "event_id")
CALL_BYTES = 1 << 16
FORM_BYTES = 1 << 14  # what a form takes beside the file in it
# A body may take so long, and so long per byte: 0.4 Mbit/s.
BODY_SECONDS, SECONDS_PER_BYTE = 20.0, 1 / 50_000
# All files together, uploaded or made, take about as much as so many of the largest upload. None that is younger than
# this is deleted for another.
STORED_UPLOADS, KEPT_SECONDS = 32, 600


class Guard:
    """An ASGI application around Gradio's."""

    def __init__(self, app: ASGIApp, folder: Path, limits: Limits):
        self.app = app
        self.folder = folder.resolve()
        self.limits = limits
        self.examples = {path for path in self.folder.rglob("*") if path.is_file()}
        self.incoming = 0  # bytes of the uploads under way

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # a WebSocket: closed before it opens is refused
            await receive()
            await send({"type": "websocket.close", "code": 1008})
            return
        try:
            await self._pass_on(scope, receive, send)
        except HTTPException as refusal:
            await PlainTextResponse(refusal.detail, refusal.status_code)(scope, receive, send)

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        method, path = scope["method"], scope["path"]
        if method == "POST" and path == UPLOAD:
            await self._upload(scope, receive, send)
        elif method == "POST" and path in CALLS:
            body = self._checked_call(await _read_body(scope, receive))
            self._make_room(self.limits.bytes)  # what is made of a file takes about as much
            await self.app(*_with_body(scope, receive, body), send)
        elif method not in ("GET", "HEAD") or not self._may_be_read(path):
            raise HTTPException(403, "not a part of this page")
        else:
            await self.app(scope, receive, send)

    def _may_be_read(self, path: str) -> bool:
        named = FILE.fullmatch(path)
        if named:
            self._own_file(named["path"])
        return bool(named or READ.fullmatch(path) or READ_GRADIO.fullmatch(path))

    def _own_file(self, path: object) -> str:
        """The path, if a file of the page's folder is there; links are followed first."""
        try:
            real = Path(path).resolve()
            if Path(path).is_absolute() and real.is_file() and real.is_relative_to(self.folder):
                return str(real)
        except (TypeError, ValueError, OSError, RuntimeError):  # no string, a zero byte, too long, a loop of links
            pass
        raise HTTPException(403, f"{str(path)[:200]!r} is no file of this page")

    def _checked_call(self, body: bytes) -> bytes:
        """The call with nothing in its data but numbers and files of the page."""
        try:
            call = json.loads(body)
            names = {name: call[name] for name in CALL_NAMES if name in call and isinstance(call[name], str | int)}
            data = list(map(self._checked_value, call.get("data", ())))
        except (ValueError, TypeError, AttributeError, RecursionError):
            raise HTTPException(400, "not a call of this page") from None
        return json.dumps(names | {"data": data}).encode()

    def _checked_value(self, value: object) -> object:
        if value is None or isinstance(value, bool | int | float):
            return value
        if isinstance(value, dict) and "path" in value:
            # The address at which the browser has it is dropped with the rest: only the path is needed.
            name = value.get("orig_name")
            path = self._own_file(value["path"])
            os.utime(path)  # in use: not to be deleted now
            file = {"path": path, "meta": {"_type": "gradio.FileData"}}
            return file | ({"orig_name": Path(name).name[:200]} if isinstance(name, str) else {})
        raise HTTPException(400, "not a call of this page")

    async def _upload(self, scope: Scope, receive: Receive, send: Send) -> None:
        size, most = _content_length(scope), self.limits.bytes
        if size > most + FORM_BYTES:
            raise HTTPException(
                413, f"the upload has {size / 2**20:.1f} MB, allowed: up to {self.limits.megabytes:g} MB"
            )
        self._make_room(size)
        self.incoming += size
        try:
            await self.app(scope, _within(receive, _body_seconds(size)), send)
        finally:
            self.incoming -= size

    def _make_room(self, size: int) -> None:
        """Delete the oldest files until so many bytes more may be stored.

        Raises:
            HTTPException: 507, if files too young to be deleted leave no room.
        """
        now, files = time.time(), []
        for path in self.folder.rglob("*"):
            try:
                status = path.stat()
            except OSError:  # deleted by somebody else just now
                continue
            if path.is_file() and path not in self.examples:
                files.append((status.st_mtime, status.st_size, path))
        allowed = STORED_UPLOADS * (self.limits.bytes + FORM_BYTES)
        taken = size + self.incoming + sum(file[1] for file in files)
        for modified, its_size, path in sorted(files):
            if taken <= allowed:
                return
            if now - modified > KEPT_SECONDS:
                path.unlink(missing_ok=True)
                taken -= its_size
                with contextlib.suppress(OSError):  # other files are there
                    path.parent.rmdir()
        if taken > allowed:
            raise HTTPException(507, "the page holds as many files as it may, try again in some minutes")


def _content_length(scope: Scope) -> int:
    try:
        return max(0, int(dict(scope["headers"])[b"content-length"]))
    except (KeyError, ValueError):
        raise HTTPException(411, "the request does not say its length") from None


def _body_seconds(size: int) -> float:
    return BODY_SECONDS + SECONDS_PER_BYTE * size


async def _read_body(scope: Scope, receive: Receive) -> bytes:
    """The body of a call, which is small."""
    size = _content_length(scope)
    if size > CALL_BYTES:
        raise HTTPException(413, f"the call has {size} bytes, allowed: up to {CALL_BYTES}")
    body, more, receive = b"", True, _within(receive, _body_seconds(size))
    while more:
        message = await receive()
        if message["type"] != "http.request":
            raise HTTPException(408, "the request did not end in time")
        body, more = body + message.get("body", b""), message.get("more_body", False)
    return body


def _with_body(scope: Scope, receive: Receive, body: bytes) -> tuple[Scope, Receive]:
    """The request with another body."""
    kept = [(name, value) for name, value in scope["headers"] if name != b"content-length"]
    scope = {**scope, "headers": [*kept, (b"content-length", str(len(body)).encode())]}
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return messages.pop() if messages else await receive()

    return scope, replayed


def _within(receive: Receive, seconds: float) -> Receive:
    """`receive`, after which the client counts as gone if its body is not there in so many seconds."""
    end, complete = time.monotonic() + seconds, False

    async def timed() -> Message:
        nonlocal complete
        if complete:
            return await receive()
        try:
            message = await asyncio.wait_for(receive(), max(0.0, end - time.monotonic()))
        except TimeoutError:
            return {"type": "http.disconnect"}
        complete = not message.get("more_body", False)
        return message

    return timed
