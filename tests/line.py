"""A line between a site and its coordinator that a test can cut or slow down: a TCP proxy on loopback that looks at nothing."""

import contextlib
import socket
import threading
import time


class Line:
    """Passes connections on to `port`. `cut`: all are ended and none is taken; `delay_s`: before each piece that is passed on."""

    def __init__(self, port: int) -> None:
        self.to, self.delay_s, self.cut = port, 0.0, False
        self.door = socket.create_server(("127.0.0.1", 0))
        self.port = int(self.door.getsockname()[1])
        self.open: set[socket.socket] = set()
        threading.Thread(target=self._take, daemon=True).start()

    def break_off(self) -> None:
        """Cut the line, in the middle of whatever is on it."""
        self.cut = True
        for each in list(self.open):
            self._end(each)

    def mend(self) -> None:
        self.cut, self.delay_s = False, 0.0

    def close(self) -> None:
        self.break_off()
        self.door.close()

    def _take(self) -> None:
        while True:
            try:
                one, _ = self.door.accept()
            except OSError:
                return
            if self.cut:
                one.close()
                continue
            try:
                other = socket.create_connection(("127.0.0.1", self.to), timeout=10)
            except OSError:  # the coordinator is down
                one.close()
                continue
            other.settimeout(None)
            self.open |= {one, other}
            for pair in ((one, other), (other, one)):
                threading.Thread(target=self._pass, args=pair, daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while piece := source.recv(65536):
                if self.delay_s:
                    time.sleep(self.delay_s)
                target.sendall(piece)
        self._end(source)
        self._end(target)

    def _end(self, each: socket.socket) -> None:
        self.open.discard(each)
        with contextlib.suppress(OSError):
            each.shutdown(socket.SHUT_RDWR)
        each.close()
