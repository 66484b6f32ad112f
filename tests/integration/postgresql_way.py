"""A way to a PostgreSQL server that can be cut: a TCP port on loopback before its socket."""

import contextlib
import socket
import threading
from typing import Self

from sqlalchemy import make_url


class Way:
    """Passes bytes on to the server's Unix socket, until it is cut.

    `url` goes this way, `beside` around it.
    """

    def __init__(self, url: str) -> None:
        """`url` names a database by the folder of its server's socket."""
        socket_url = make_url(url).set(drivername="postgresql")
        self._server_socket = f"{socket_url.query['host']}/.s.PGSQL.5432"
        self._ends: list[socket.socket] = []
        self._listener = self._listen(0)
        self._port: int = self._listener.getsockname()[1]
        here = socket_url.set(host="127.0.0.1", port=self._port, query={})
        self.url = here.render_as_string(hide_password=False)
        self.beside = socket_url.render_as_string(hide_password=False)

    def cut(self) -> None:
        """Break every connection, and refuse new ones."""
        # a listener that is only closed goes on taking the one that it waits for
        for end in [self._listener, *self._ends]:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
        self._ends = []

    def mend(self) -> None:
        """Take connections again."""
        self._listener = self._listen(self._port)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.cut()

    def _listen(self, port: int) -> socket.socket:
        listener = socket.create_server(("127.0.0.1", port))
        threading.Thread(target=self._take, args=(listener,), daemon=True).start()
        return listener

    def _take(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:  # cut
                return
            server = socket.socket(socket.AF_UNIX)
            server.connect(self._server_socket)
            self._ends += [client, server]
            for source, target in ((client, server), (server, client)):
                threading.Thread(target=_pass_on, args=(source, target), daemon=True).start()


def _pass_on(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
    for end in (source, target):
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
