"""What strangers can do to the web page: nothing is fetched for them, and size, time and work are bounded."""

import asyncio
import contextlib
import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import soundfile
from conftest import noise

from modeling_encodec.bitstream.compression import compress
from modeling_encodec.demo.web.clips import Limits


pytest.importorskip("gradio")

from fastapi.testclient import TestClient  # noqa: E402

from modeling_encodec.demo.web import guard, serving  # noqa: E402
from modeling_encodec.demo.web.guard import Guard  # noqa: E402


SMALL = Limits(seconds=3, megabytes=1)
CONNECTED: list = []
_hearing = False


def _hear(event, arguments):
    if _hearing and event in ("socket.connect", "socket.getaddrinfo", "socket.sendto"):
        CONNECTED.append((event, arguments[1:] if event == "socket.connect" else arguments))


sys.addaudithook(_hear)


@pytest.fixture
def heard():
    """What this process connects to, or asks the address of, during a test."""
    global _hearing
    CONNECTED.clear()
    _hearing = True
    yield CONNECTED
    _hearing = False


@contextlib.contextmanager
def made(model, folder: Path):
    """The page as an application, with its files in a folder of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(folder / "cache"))
        yield serving._make_app(model, None, SMALL)


@pytest.fixture(scope="module")
def shared_app(small_models, tmp_path_factory):
    with made(small_models["24khz"], tmp_path_factory.mktemp("page")) as app:
        yield app


@pytest.fixture(scope="module")
def shared_page(shared_app):
    """One for all tests that leave it as it was; the next fixtures are for the others."""
    with TestClient(shared_app, raise_server_exceptions=False) as client:
        yield client


@pytest.fixture
def app(small_models, tmp_path):
    with made(small_models["24khz"], tmp_path) as app:
        yield app


@pytest.fixture
def page(app):
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


def upload(page, name: str, data: bytes) -> str:
    answer = page.post("/gradio_api/upload", files={"files": (name, data)})
    assert answer.status_code == 200, answer.text
    return answer.json()[0]


def wav(seconds: float) -> bytes:
    path = Path(f"{os.environ['GRADIO_TEMP_DIR']}.wav")
    soundfile.write(path, noise(1, 1, int(24000 * seconds))[0].T.numpy(), 24000)
    return path.read_bytes()


def file(path: str, **more) -> dict:
    return {"path": path, "meta": {"_type": "gradio.FileData"}} | more


def button(page, name: str) -> int:
    """The number of the function that a click on a button calls."""
    config = page.get("/config").json()
    part = next(part["id"] for part in config["components"] if part["props"].get("elem_id") == name)
    return next(d["id"] for d in config["dependencies"] if [part, "click"] in [list(t) for t in d["targets"]])


def join(page, name: str, data: list, session: str = "x", **more):
    call = {"data": data, "fn_index": button(page, name), "session_hash": session} | more
    return page.post("/gradio_api/queue/join", json=call)


def result(page, session: str = "x") -> dict:
    with page.stream("GET", f"/gradio_api/queue/data?session_hash={session}") as stream:
        for line in stream.iter_lines():
            if "process_completed" in line:
                return json.loads(line.removeprefix("data:"))
    raise AssertionError("the stream ended without a result")


def test_the_page_codes_and_decodes_through_the_guard(page, heard):
    path = upload(page, "a clip.wav", wav(0.5))
    given = file(path, url=f"http://testserver/gradio_api/file={path}", orig_name="a clip.wav", size=9, mime_type="a")
    assert join(page, "encode", [given, 3.6, False]).status_code == 200
    said = result(page)
    assert said["success"], said
    (shown,) = (part["value"] for part in said["output"]["data"] if "ecdc" in str(part))
    data = page.get(f"/gradio_api/file={shown['path']}").content
    assert data == page.get(f"/gradio_api/file={path}").content or data.startswith(b"ECDC")
    assert join(page, "decode", [file(upload(page, "a.ecdc", data))], "y").status_code == 200
    assert result(page, "y")["success"] and not heard


# ---- nothing is fetched ---------------------------------------------------------------------------------------------


@pytest.fixture
def stranger(monkeypatch):
    """A server on this machine that stands for one elsewhere: Gradio takes its name for a public one."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200)
            self.send_header("Content-Length", "6")
            self.end_headers()
            self.wfile.write(b"SECRET" if self.command == "GET" else b"")

        do_HEAD = do_POST = do_GET

        def log_message(self, *arguments):
            pass

    async def anything(host, *arguments, **named):
        return "127.0.0.1"

    import safehttpx

    monkeypatch.setattr(safehttpx, "async_validate_url", anything)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://public.example:{server.server_port}/x.wav", asked
    server.shutdown()
    server.server_close()


def every_route(app: Guard) -> list[tuple[str, str]]:
    """Method and path of all that Gradio answers, and the fields of its paths as they are written there."""
    found, waiting = [], list(app.app.routes)
    while waiting:
        route = waiting.pop()
        waiting += getattr(getattr(route, "app", None), "routes", [])  # a mounted application
        waiting += getattr(getattr(route, "original_router", None), "routes", [])  # under /gradio_api
        path = getattr(route, "path", None) or ""
        for method in getattr(route, "methods", None) or ():
            found += [(method, path), (method, f"/gradio_api{path}")]
    return sorted(set(found))


def filled(path: str, value: str) -> str:
    while "{" in path:
        before, _, rest = path.partition("{")
        path = before + value + rest.partition("}")[2]
    return path


def test_no_route_fetches_anything(app, page, stranger, heard):
    address, asked = stranger
    path = upload(page, "a.wav", wav(0.1))
    nested = {"file": file(address), "list": [file(address, url=address)]}
    bodies = [
        {"data": [thing, 3.6, False], "fn_index": number, "session_hash": "x", "url": address, "path": address}
        for number in range(4)
        for thing in (file(address), file(path, url=address), address, [file(address)], nested)
    ]
    headers = {"X-Gradio-Server": address, "X-Forwarded-Host": address, "Referer": address}
    routes = every_route(app)
    assert len(routes) > 100 and ("GET", "/gradio_api/file={path_or_url:path}") in routes
    for method, route in routes:
        for value in (address, address.replace("//", "/"), f"/{address}", f"gradio_api/file={address}"):
            for query in ("", f"?url={address}&path={address}&session_hash=none&src={address}"):
                if "queue/data" in route or "heartbeat" in route or "upload_progress" in route:
                    continue  # streams that do not end
                page.request(method, filled(route, value) + query, headers=headers)
        if method in ("POST", "PUT", "PATCH", "DELETE"):
            for body in bodies[:: 1 if route.endswith(("queue/join", "run/{api_name}")) else 7]:
                page.request(method, filled(route, "encode"), json=body, headers=headers)
    time.sleep(0.5)
    assert not asked and not heard


def test_the_audit_hears_what_gradio_would_fetch(app, stranger, heard):
    """That the test above can fail."""
    address, asked = stranger
    with TestClient(app.app, raise_server_exceptions=False) as unguarded:
        unguarded.get(f"/gradio_api/file={address}")
    assert asked and heard


@pytest.mark.parametrize(
    "path",
    [
        "http://a.example/x",
        "HTTPS://a.example/x",
        "file:///etc/passwd",
        "data:audio/wav;base64,AAAA",
        "/etc/passwd",
        "a.wav",
    ]
    + ["../x", "", "\0", "x" * 5000, "/proc/self/environ", 3, None, ["/etc/passwd"], {"path": "/etc/passwd"}],
)
def test_only_uploaded_files_can_be_named(path, shared_page):
    assert join(shared_page, "decode", [file(path)]).status_code == 403
    if isinstance(path, str) and "\0" not in path:
        assert shared_page.get(f"/gradio_api/file={path}").status_code in (403, 404)


def test_ways_out_of_the_folder_are_followed_first(shared_page, tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    uploaded = Path(upload(shared_page, "a.ecdc", b"text"))
    (uploaded.parent / "link").symlink_to(secret)
    (uploaded.parent / "loop").symlink_to("loop")
    for name in ("link", "loop", "../../../secret.txt"):
        assert join(shared_page, "decode", [file(str(uploaded.parent / name))]).status_code == 403
        assert shared_page.get(f"/gradio_api/file={uploaded.parent}/%2e%2e/%2e%2e/{name}").status_code == 403
        assert shared_page.get(f"/gradio_api/file={uploaded.parent}/{name}").status_code == 403


@pytest.mark.parametrize(
    "body", ["", "null", "3", "[]", '{"data": 3}', '{"data": {"a": 1}}', '{"data": ["text"]}', "[" * 30000]
)
def test_a_call_that_is_none_is_refused(body, shared_page):
    answer = shared_page.post("/gradio_api/queue/join", content=body, headers={"Content-Type": "application/json"})
    assert 400 <= answer.status_code < 500


@pytest.mark.parametrize(
    "change",
    [{"session_hash": name} for name in ("\ud800", "x" * 100, 3, ["x"], "a b", "", "../x")]
    + [{"fn_index": number} for number in (-1, 99, 10**30, True, "2", 2.0, None, [])]
    + [{"trigger_id": "x"}, {"event_id": {"a": 1}}]
    + [{"data": [None, rate, False]} for rate in (99, True, float("nan"), 10**400, None, "3.6", [3.6])]
    + [{"data": data} for data in ([], [None], [None, 3.6], [None, 3.6, 1], [0, 3.6, False], [None] * 10000, "abc")],
)
def test_a_call_with_what_no_part_of_the_page_gives_is_refused(change, shared_page):
    call = {"data": [None, 3.6, False], "fn_index": button(shared_page, "encode"), "session_hash": "x"} | change
    for path in ("queue/join", "run/predict"):
        head = {"Content-Type": "application/json"}
        answer = shared_page.post(f"/gradio_api/{path}", content=json.dumps(call), headers=head)
        assert 400 <= answer.status_code < 500, answer.text


@pytest.mark.parametrize(
    "query", ["session_hash=%ff", f"session_hash={'x' * 70}", "upload_id=a%20b", "a=" + "b" * 300]
)
def test_names_of_a_query_are_short(query, shared_page):
    for path in ("queue/data", "upload_progress"):
        assert shared_page.get(f"/gradio_api/{path}?{query}").status_code == 400


# ---- limits ---------------------------------------------------------------------------------------------------------


def stored(app: Guard) -> int:
    return sum(path.stat().st_size for path in app.folder.rglob("*") if path.is_file())


def test_an_upload_is_bounded_as_a_whole(app, page):
    half = bytes(2**19)
    many = [("files", (f"{number}.wav", bytes([number]) + half)) for number in range(40)]
    before = stored(app)
    assert page.post("/gradio_api/upload", files=many).status_code == 413
    assert stored(app) == before
    empty = [("files", (f"{number}.wav", b"")) for number in range(900)]
    for several in (empty, empty[:2]):  # as many files as one may have parts
        assert page.post("/gradio_api/upload", files=several).status_code == 413
    assert page.post("/gradio_api/upload", files=many[:1]).status_code == 200
    boundary = {"Content-Type": "multipart/form-data; boundary=x"}
    chunks = (b"x" * 1000 for _ in range(10000))  # whose number is not said
    assert page.post("/gradio_api/upload", content=chunks, headers=boundary).status_code == 411
    assert page.post("/gradio_api/queue/join", content=b" " * 70000).status_code == 413
    assert stored(app) == before + len(half) + 1


def test_old_files_make_room_and_young_ones_do_not(app, page, monkeypatch):
    monkeypatch.setattr(guard, "STORED_UPLOADS", 3)
    for number in range(3):
        path = Path(upload(page, f"{number}.wav", bytes([number]) * 10**6))
    answer = page.post("/gradio_api/upload", files={"files": ("x.wav", bytes(10**6))})
    assert answer.status_code == 507 and "try again" in answer.text
    assert join(page, "decode", [file(str(path))]).status_code == 507  # its results would be files too
    os.utime(path, (1, 1))
    for example in app.examples:
        os.utime(example, (0, 0))
    upload(page, "x.wav", b"x" * 10**6)
    assert not path.exists() and all(example.exists() for example in app.examples)
    assert stored(app) - sum(map(os.path.getsize, app.examples)) <= 3 * (2**20 + guard.FORM_BYTES)


def request(app, method: str, path: str, headers: dict, parts: list, pause: float) -> list:
    """The messages that the application sends for a request whose body comes in parts with pauses, and never ends."""
    said = []

    async def receive():
        if parts:
            return {"type": "http.request", "body": parts.pop(0), "more_body": True}
        await asyncio.sleep(pause)
        return {"type": "http.request", "body": b"x", "more_body": True}

    async def send(message):
        said.append(message)

    scope = {"type": "http", "method": method, "path": path, "raw_path": path.encode(), "query_string": b""}
    scope |= {"headers": [(name.encode(), value.encode()) for name, value in headers.items()], "http_version": "1.1"}
    scope |= {"scheme": "http", "server": ("testserver", 80), "client": ("127.0.0.1", 1), "root_path": "", "state": {}}
    asyncio.run(asyncio.wait_for(app(scope, receive, send), 20))
    return said


def test_a_body_that_does_not_end_is_given_up(app, monkeypatch):
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.3)
    said = request(app, "POST", "/gradio_api/queue/join", {"content-length": "1000"}, [b"{"], 0.05)
    assert said[0]["status"] == 408
    head = {"content-length": "9000", "content-type": "multipart/form-data; boundary=b"}
    start = b'--b\r\nContent-Disposition: form-data; name="files"; filename="a.wav"\r\n\r\n'
    began = time.monotonic()
    try:
        request(app, "POST", "/gradio_api/upload", head, [start], 0.05)
    except Exception as error:  # Gradio lets the end of the connection through
        assert type(error).__name__ == "ClientDisconnect"
    assert time.monotonic() - began < 5 and app.incoming == 0


def test_the_queue_is_bounded(page, monkeypatch):
    from modeling_encodec.demo.web import page as page_module

    release, done = threading.Event(), []

    def slowly(*arguments, **named):
        release.wait(60)
        done.append(arguments)
        raise ValueError("coded")

    monkeypatch.setattr(page_module, "code_clip", slowly)
    path = upload(page, "a.wav", wav(0.1))
    answers = [join(page, "encode", [file(path), 3.6, False], f"s{number}").status_code for number in range(40)]
    assert answers.count(503) >= 40 - page_module.MAX_WAITING - 2 and set(answers) == {200, 503}
    assert page.get("/config").status_code == 200  # the page itself answers meanwhile
    release.set()
    assert "coded" in str(result(page, "s0"))
    deadline = time.monotonic() + 30
    while len(done) < answers.count(200) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(done) == answers.count(200)
    assert join(page, "encode", [file(path), 3.6, False], "later").status_code == 200


def test_many_users_leave_nothing_behind_but_files(page):
    data = wav(0.1)

    def use(number: int) -> tuple[int, int]:
        path = upload(page, f"{number}.wav", data)
        assert join(page, "encode", [file(path), 3.6, False], f"s{number}").status_code == 200
        assert result(page, f"s{number}")["success"]
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("needs /proc")
    before = [use(number) for number in range(3)][-1]
    after = [use(number) for number in range(3, 15)][-1]
    assert after[0] <= before[0] + 2 and after[1] <= before[1] + 2


async def slow_app(scope, receive, send):
    """Answers after a second."""
    await asyncio.sleep(1)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"4")]})
    await send({"type": "http.response.body", "body": b"done"})


def test_connections_that_ask_for_nothing_are_closed(monkeypatch):
    import uvicorn

    monkeypatch.setattr(serving, "REQUEST_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        config = uvicorn.Config(slow_app, http=serving._connection_class(), lifespan="off", log_level="critical")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            for start in (b"", b"GET / HT", b"GET /config HTTP/1.1\r\nHost: a\r\n\r\nGET /"):
                with socket.create_connection(listener.getsockname(), timeout=10) as slow:
                    slow.sendall(start)
                    while slow.recv(1 << 16):
                        pass
            with socket.create_connection(listener.getsockname(), timeout=10) as asking:  # is answered, however late
                asking.sendall(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
                assert b"".join(iter(lambda: asking.recv(1 << 16), b"")).endswith(b"done")
        finally:
            server.should_exit = server.force_exit = True
            thread.join(20)


@pytest.mark.slow
def test_a_crowd_is_served_or_told_to_come_again(small_models, tmp_path, monkeypatch):
    """150 users at once on a real server: bounded memory, files and answers; afterwards the page is as before."""
    import httpx
    import psutil
    import uvicorn

    monkeypatch.setattr(guard, "STORED_UPLOADS", 30)
    process, answers = psutil.Process(), []
    with made(small_models["24khz"], tmp_path) as app, socket.create_server(("127.0.0.1", 0), backlog=512) as listener:
        config = uvicorn.Config(app, http=serving._connection_class(), ws="none", log_level="critical")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        data = wav(2.9)

        def use(number: int) -> None:
            with httpx.Client(base_url=address, timeout=120, trust_env=False) as page:
                files = {"files": ("a.wav", data[:-2] + number.to_bytes(2, "little"))}  # each another
                answer = page.post("/gradio_api/upload", files=files)
                if answer.status_code == 200:
                    answer = join(page, "encode", [file(answer.json()[0]), 3.6, False], f"s{number}")
                if answer.status_code == 200:
                    answers.append(result(page, f"s{number}")["success"])
                else:
                    answers.append(answer.status_code)

        try:
            use(0)
            before = process.memory_info().rss
            users = [threading.Thread(target=use, args=(number,)) for number in range(150)]
            for user in users:
                user.start()
            for user in users:
                user.join(300)
            assert process.memory_info().rss - before < 300 * 2**20
            assert len(answers) == 151 and set(answers) <= {True, 503, 507} and answers.count(True) > 10, answers
            assert stored(app) < (30 + 32) * 2**20  # those in the queue were let in before
        finally:
            server.should_exit = server.force_exit = True
            thread.join(30)


# ---- the end --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "code", "words"),
    [(signal.SIGTERM, 143, "stopped by SIGTERM"), (signal.SIGINT, 130, "interrupted"), (signal.SIGHUP, 129, "SIGHUP")],
)
def test_it_ends_at_once_whatever_it_computes(number, code, words, tmp_path, bundled_model):
    import httpx

    env = os.environ | {"TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "modeling_encodec", "demo", "--serve", "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env) as process:
        (address,) = (word for word in process.stderr.readline().split() if word.startswith("http://"))
        with httpx.Client(base_url=address, timeout=30, trust_env=False) as page:
            data = compress(bundled_model, noise(1, 1, 24000 * 59)[0], 12.0)
            assert join(page, "decode", [file(upload(page, "a.ecdc", data))]).status_code == 200
            with page.stream("GET", "/gradio_api/queue/data?session_hash=x") as stream:
                next(line for line in stream.iter_lines() if "process_starts" in line)
        process.send_signal(number)
        began = time.monotonic()
        rest = process.stderr.read()
        assert process.wait(30) == code and time.monotonic() - began < 5
    assert rest.endswith(f"{words}\n") and rest.count("\n") == 1 and not list(tmp_path.glob("modeling-encodec*"))
