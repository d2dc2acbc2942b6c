"""The server of the web application (extra `[web]`)."""

from __future__ import annotations

import ipaddress
import socket
import sys
from collections.abc import Callable

from soundnet_port.errors import require
from soundnet_port.network.model import SoundNet


def serve(
    model: SoundNet,
    host: str = "127.0.0.1",
    port: int = 8765,
    *,
    max_megabytes: int = 500,
    max_hours: float = 6.0,
    edge_frames: bool = False,
    on_ready: Callable[[str], None] = print,
) -> None:
    """Serve the page until the process is told to end.

    Args:
        model: any SoundNet.
        host: address or name to listen on. Requests must name it if only this computer can reach it.
        port: 0 takes a free one.
        max_megabytes: see `create_app`.
        max_hours: see `create_app`.
        edge_frames: see `create_app`.
        on_ready: called with the page's address once connections are accepted.

    Raises:
        OSError: the server cannot listen there.
        MissingExtraError: the extra `[web]` is not installed.
    """
    uvicorn = require("uvicorn", "web")
    for package in ("matplotlib", "starlette"):
        require(package, "web")
    from soundnet_port.viewing.web_app import create_app

    family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    local = ipaddress.ip_address(address[0]).is_loopback
    allowed_hosts = frozenset({"127.0.0.1", "localhost", "[::1]", host.lower()}) if local else None
    with socket.socket(family, kind) as listener:
        if sys.platform != "win32":  # there it would let several servers listen
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(100)
        app = create_app(
            model,
            max_megabytes=max_megabytes,
            max_hours=max_hours,
            edge_frames=edge_frames,
            allowed_hosts=allowed_hosts,
        )
        name = f"[{host}]" if ":" in host else host
        on_ready(f"http://{name}:{listener.getsockname()[1]}/")
        config = uvicorn.Config(
            app,
            log_level="error",
            access_log=False,
            ws="none",
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=1,
        )
        uvicorn.Server(config).run(sockets=[listener])
