"""A TCP proxy that delays, cuts in the middle of a message, or goes silent without closing anything."""

import socket
import threading
import time
from contextlib import suppress
from typing import Self


class TcpProxy:
    """Listens on a loopback port and forwards to another.

    `delay_s`: before each piece of data. `cut_after_bytes`: bytes towards the server until all connections
    break. `sever_at`: once a client sends this, the proxy closes all connections and stops listening; then
    `severed` is set.
    """

    def __init__(self, target_port: int) -> None:
        self._target_port = target_port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self.delay_s = 0.0
        self.cut_after_bytes: int | None = None
        self.cuts = 0
        self.sever_at: bytes | None = None
        self.severed = threading.Event()
        self._passed = 0
        self._generation = 0
        self._frozen_before = 0
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._lock = threading.Lock()
        self._closing = False

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def _close(self) -> None:
        self._closing = True
        with suppress(OSError):  # already closed
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept(), which keeps the port open
        self._listener.close()
        self._break_all()

    def freeze(self) -> None:
        """Forward nothing more on the present connections, and do not close them."""
        with self._lock:
            self._generation += 1
            self._frozen_before = self._generation

    def _accept(self) -> None:
        while not self._closing:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(("127.0.0.1", self._target_port))
            with self._lock:
                generation = self._generation
                self._pairs.append((client, server))
            for source, sink, counts in ((client, server, True), (server, client, False)):
                threading.Thread(
                    target=self._pump, args=(source, sink, counts, generation), daemon=True
                ).start()

    def _pump(self, source: socket.socket, sink: socket.socket, counts: bool, generation: int) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                if generation < self._frozen_before:
                    continue
                if self.delay_s:
                    time.sleep(self.delay_s)
                if counts and self.sever_at and self.sever_at in data:
                    self._close()
                    self.severed.set()
                    return
                if counts and self._is_cut_by(len(data)):
                    sink.sendall(data[: len(data) // 2])
                    self._break_all()
                    return
                sink.sendall(data)
        for end in (source, sink):
            with suppress(OSError):
                end.close()

    def _is_cut_by(self, count: int) -> bool:
        with self._lock:
            if self.cut_after_bytes is None:
                self._passed = 0
                return False
            self._passed += count
            if self._passed < self.cut_after_bytes:
                return False
            self._passed = 0
            self.cuts += 1
            return True

    def _break_all(self) -> None:
        with self._lock:
            pairs, self._pairs = self._pairs, []
        for pair in pairs:
            for end in pair:
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
                    end.close()
