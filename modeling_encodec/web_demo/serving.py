"""The web page on a port of this machine, until Ctrl-C; nothing is asked of any other machine.

Uvicorn is run here and not by `Blocks.launch`: the port is taken before the page is built, so that one in use is said
at once and by its name, and no request to itself goes through a proxy of the environment.
"""

import os
import signal
import socket
import tempfile
from collections.abc import Callable

from modeling_encodec.modeling_encodec import EncodecModel
from modeling_encodec.modeling_lm_encodec import EncodecLM
from modeling_encodec.web_demo.clips import Limits


FONTS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif")
MONO_FONTS = ("ui-monospace", "Consolas", "Menlo", "monospace")


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
        KeyboardInterrupt: when it was interrupted (SIGINT, SIGTERM).
    """
    limits = limits or Limits()
    with _listen(host, port) as listener, tempfile.TemporaryDirectory(prefix="modeling-encodec-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # which some of Gradio reads when it is imported
        app = _make_app(model, lm, limits)
        shown = f"[{host}]" if ":" in host else host
        # Uvicorn raises the signal again at its end, and the folder would outlive a SIGTERM.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        on_start(f"http://{shown}:{listener.getsockname()[1]}")
        import uvicorn

        uvicorn.Server(uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=1)).run(sockets=[listener])


def _make_app(model: EncodecModel, lm: EncodecLM | None, limits: Limits):
    """The page as an ASGI application."""
    import fastapi

    from modeling_encodec.web_demo.page import CSS, build_page, gr

    page = build_page(model, lm, limits)
    # Gradio looks after which files a request may name only in pages that count as launched by itself.
    page.has_launched = True
    app = fastapi.FastAPI(openapi_url=None)

    @app.get("/gradio_api/file=http{rest:path}")
    def refuse(rest: str) -> None:
        """Gradio would fetch it from elsewhere."""
        raise fastapi.HTTPException(403)

    return gr.mount_gradio_app(
        app,
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


def _listen(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise OSError(f"cannot listen on {host}, port {port}: {reason}") from None
