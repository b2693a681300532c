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
import urllib.parse
from pathlib import Path

from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from modeling_encodec.demo.web.clips import Limits


READ = re.compile(r"/(config|theme\.css|favicon\.ico|manifest\.json|((assets|static|svelte)/.*))?")
READ_GRADIO = ("/gradio_api/upload_progress", "/gradio_api/queue/data")
FILE = re.compile(r"/gradio_api/file=(?P<path>.+)", re.DOTALL)
UPLOAD = "/gradio_api/upload"
CALLS = ("/gradio_api/queue/join", "/gradio_api/run/predict", "/gradio_api/cancel", "/gradio_api/reset")
# Gradio keeps for long what a browser calls itself, and prints it.
NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
QUERY_BYTES = 200
DROPPED_HEADERS = (b"x-gradio-server",)  # where Gradio would send the browser
CALL_BYTES = 1 << 16
FORM_BYTES = 1 << 14  # what a form takes beside the file in it
# A body may take so long, and so long per byte: 0.4 Mbit/s.
BODY_SECONDS, SECONDS_PER_BYTE = 20.0, 1 / 50_000
# All files together, uploaded or made, take about as much as so many of the largest upload. None that is younger than
# this is deleted for another.
STORED_UPLOADS, KEPT_SECONDS = 32, 600


class Guard:
    """An ASGI application around Gradio's.

    Args:
        app: Gradio's, with the page.
        parts: the inputs of each of the page's functions, by the function's number.
        folder: where uploads and results are.
        limits: of an upload.
    """

    def __init__(self, app: ASGIApp, parts: dict[int, list], folder: Path, limits: Limits):
        self.app = app
        self.parts = parts
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
        if len(scope["query_string"]) > QUERY_BYTES or not all(map(_is_name, _names_in(scope["query_string"]))):
            raise HTTPException(400, "not a query of this page")
        kept = [header for header in scope["headers"] if header[0] not in DROPPED_HEADERS]
        scope = {**scope, "headers": kept}
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
        return bool(named or READ.fullmatch(path) or path in READ_GRADIO)

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
        """The call with nothing in it but the inputs that its function takes, of their kinds."""
        try:
            call = json.loads(body)
            names = {name: call[name] for name in ("session_hash", "event_id") if call.get(name) is not None}
            numbers = {name: call[name] for name in ("fn_index", "trigger_id") if call.get(name) is not None}
            if not all(map(_is_name, names.values())) or not all(type(number) is int for number in numbers.values()):
                raise ValueError
            data = call.get("data") or []
            parts = self.parts[numbers["fn_index"]] if "data" in call else []
            checked = [self._checked_value(value, part) for value, part in zip(data, parts, strict=True)]
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise HTTPException(400, "not a call of this page") from None
        return json.dumps(names | numbers | {"data": checked}).encode()

    def _checked_value(self, value: object, part: object) -> object:
        """What a user put into a part of the page.

        Raises:
            ValueError: if it cannot come from there.
            HTTPException: 403, for a file that is none of the page's.
        """
        kind = type(part).__name__
        if kind in ("Audio", "File"):
            return None if value is None else self._checked_file(value)
        if kind == "Checkbox" and isinstance(value, bool):
            return value
        if kind == "Radio" and type(value) in (int, float) and value in [choice for _, choice in part.choices]:
            return value
        if kind == "Dataset" and type(value) is int and 0 <= value < len(part.samples):
            return value
        raise ValueError

    def _checked_file(self, value: dict) -> dict:
        """Its path and name alone: the address at which the browser has it is dropped with the rest."""
        path, name = self._own_file(value["path"]), value.get("orig_name")
        os.utime(path)  # in use: not to be deleted now
        file = {"path": path, "meta": {"_type": "gradio.FileData"}}
        return file | ({"orig_name": Path(name).name[:200]} if isinstance(name, str) and name.isprintable() else {})

    async def _upload(self, scope: Scope, receive: Receive, send: Send) -> None:
        size, most = _content_length(scope), self.limits.bytes
        if size > most + FORM_BYTES:
            raise HTTPException(
                413, f"the upload has {size / 2**20:.1f} MB, allowed: up to {self.limits.megabytes:g} MB"
            )
        self._make_room(size)
        self.incoming += size
        try:
            await self.app(scope, _one_file(scope, _within(receive, _body_seconds(size))), send)
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


def _is_name(name: object) -> bool:
    return isinstance(name, str) and NAME.fullmatch(name) is not None


def _names_in(query: bytes) -> list[str]:
    """What the values of a query are, of the names that Gradio keeps."""
    fields = urllib.parse.parse_qs(query.decode("latin-1"), keep_blank_values=True)
    return [value for name in ("session_hash", "upload_id") for value in fields.get(name, ())]


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


def _one_file(scope: Scope, receive: Receive) -> Receive:
    """`receive` of a form, refused when a second part begins: a thousand empty files are a thousand files too."""
    kind = dict(scope["headers"]).get(b"content-type", b"")
    found = re.search(rb'boundary="?([^";,]{1,200})', kind)
    boundary = b"--" + (found[1].strip() if found else b"")
    seen, last = 0, b""

    async def counted() -> Message:
        nonlocal seen, last
        message = await receive()
        body = last + message.get("body", b"")
        seen += body.count(boundary)
        last = body[-len(boundary) + 1 :].rpartition(boundary)[2]
        if seen > 2:  # of the file, and of the form's end
            raise HTTPException(413, "an upload has several parts, allowed: one file")
        return message

    return counted
