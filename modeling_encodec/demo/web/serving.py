"""The web page on a port of this machine, until Ctrl-C; nothing is asked of any other machine.

Uvicorn is run here and not by `Blocks.launch`: the port is taken before the page is built, so that one in use is said
at once and by its name, and no request to itself goes through a proxy of the environment. Requests pass a `Guard`
before Gradio sees them.
"""

import os
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path

from modeling_encodec.demo.web.clips import Limits
from modeling_encodec.models.modeling_encodec import EncodecModel
from modeling_encodec.models.modeling_lm_encodec import EncodecLM
from modeling_encodec.system.stop_signals import stop_signals_raise


FONTS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif")
MONO_FONTS = ("ui-monospace", "Consolas", "Menlo", "monospace")
CONNECTIONS = 256  # at once; a browser has some six
REQUEST_SECONDS = 10  # a connection that asks for nothing for so long is closed, at twice that at the latest


def serve(
    model: EncodecModel,
    lm: EncodecLM | None = None,
    *,
    host: str = "127.0.0.1",
    port: int = 7860,
    limits: Limits | None = None,
    on_start: Callable[[str], None] = lambda address: None,
) -> None:
    """Serve the page until the process is interrupted or told to end. Needs the main thread.

    Args:
        model: the codec.
        lm: its language model, if any.
        host: the address to listen on; by default only this machine can reach it, "0.0.0.0" is every address.
        port: 0 for any that is free.
        limits: of what is taken; `Limits()` by default.
        on_start: is given the page's address when it listens.

    Raises:
        OSError: if the address cannot be listened on; the port may be in use.
        KeyboardInterrupt: when it was interrupted (SIGINT).
        Stopped: for SIGTERM and SIGHUP. A clip in hand is not waited for, but its thread goes on until the process
            ends.
    """
    limits = limits or Limits()
    with (
        stop_signals_raise(),
        _listen(host, port) as listener,
        tempfile.TemporaryDirectory(prefix="modeling-encodec-") as folder,
    ):
        os.environ["GRADIO_TEMP_DIR"] = folder  # which some of Gradio reads when it is imported
        app = _make_app(model, lm, limits)
        shown = f"[{host}]" if ":" in host else host
        on_start(f"http://{shown}:{listener.getsockname()[1]}")
        import uvicorn

        config = uvicorn.Config(
            app,
            http=_connection_class(),
            ws="none",
            log_level="critical",
            limit_concurrency=CONNECTIONS,
            timeout_graceful_shutdown=1,
        )
        uvicorn.Server(config).run(sockets=[listener])


def _make_app(model: EncodecModel, lm: EncodecLM | None, limits: Limits):
    """The page as an ASGI application."""
    import fastapi
    from gradio.utils import get_upload_folder

    from modeling_encodec.demo.web.guard import Guard
    from modeling_encodec.demo.web.page import CSS, build_page, gr

    page = build_page(model, lm, limits)
    # Gradio looks after which files a request may name only in pages that count as launched by itself.
    page.has_launched = True
    app = gr.mount_gradio_app(
        fastapi.FastAPI(openapi_url=None),
        page,
        path="/",
        theme=gr.themes.Soft(font=FONTS, font_mono=MONO_FONTS),
        css=CSS,
        max_file_size=limits.bytes,
        footer_links=[],
        run_history=False,
        show_error=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
    )
    parts = {number: function.inputs for number, function in page.fns.items()}
    return Guard(app, parts, Path(get_upload_folder()), limits)


def _connection_class():
    """Uvicorn's class of a connection, with an end to those that ask for nothing: Uvicorn waits for them for ever."""
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Connection(H11Protocol):
        last = ...

        def connection_made(self, transport):
            super().connection_made(transport)
            self._look_again()

        def _look_again(self):
            asks = self.cycle is not self.last or (self.cycle and not self.cycle.response_complete)
            if self.transport.is_closing() or not asks:
                self.transport.close()
                return
            self.last = self.cycle
            self.loop.call_later(REQUEST_SECONDS, self._look_again)

    return Connection


def _listen(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise OSError(f"cannot listen on {host}, port {port}: {reason}") from None
