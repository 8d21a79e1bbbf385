"""Classify pictures over HTTP with the network of this folder.

python3 serve.py                                        # http://127.0.0.1:8000, a page to try it
curl --data-binary @photo.jpg 'http://127.0.0.1:8000/classify?top_k=3'
curl http://127.0.0.1:8000/health

POST /classify takes the bytes of one picture and gives JSON. What is wrong gets an error status and
one line: 400 not a picture, 408 sent too slowly, 413 too large, 500 a fault here, 503 busy. SIGTERM
and SIGINT let the requests that have begun end, and then stop. It speaks HTTP without encryption
and asks nobody for a password: put it behind a server that does before others can reach it.
"""

import argparse
import io
import json
import queue
import selectors
import signal
import socket
import sys
import threading
import time
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import FrameType
from urllib.parse import parse_qs, urlsplit

import predict

PAGE = Path(__file__).resolve().parent / "page.html"
MAX_HEADER_BYTES = 16 << 10  # of a request without its body
MAX_IDLE = 48  # connections beyond --max_requests, so that /health is answered while those wait
LINGER_SECONDS = 2.0  # how long what a refused client still sends is thrown away
MAX_LINGERING = 512
MAX_TOP_K = 1000
BUSY = "busy; try again later"
REASONS = {status.value: status.phrase for status in HTTPStatus}


class Refused(Exception):
    """A request that gets an error status; the message is the line that goes with it."""

    def __init__(self, status: int, text: str, **headers: str):
        super().__init__(text)
        self.status, self.headers = status, headers


class Sender(io.RawIOBase):
    """What a client sends, up to a moment and a number of bytes."""

    def __init__(self, connection: socket.socket, *, deadline: float):
        self.connection, self.deadline = connection, deadline
        self.allow(MAX_HEADER_BYTES, Refused(431, f"a head of more than {MAX_HEADER_BYTES} bytes"))

    def allow(self, budget: int, beyond: "Refused") -> None:
        """Take so many bytes more, and refuse with `beyond` what goes on."""
        self.budget, self.beyond = budget, beyond

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:  # type: ignore[no-untyped-def]
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        if self.budget <= 0:
            raise self.beyond
        self.connection.settimeout(left)
        count = self.connection.recv_into(memoryview(buffer)[: self.budget])
        self.budget -= count
        return count


class Lingerer(threading.Thread):
    """Closes connections once the client has read its answer.

    A connection that is closed while the client still sends is reset, and the answer may be lost.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.new: queue.SimpleQueue[socket.socket] = queue.SimpleQueue()
        self.held: dict[socket.socket, float] = {}
        self.selector = selectors.DefaultSelector()

    def take(self, connection: socket.socket) -> None:
        """Everything has been sent to this one."""
        try:
            connection.setblocking(False)
            connection.shutdown(socket.SHUT_WR)
        except OSError:  # gone already
            connection.close()
        else:
            self.new.put(connection)

    def run(self) -> None:
        while True:
            while not self.held or not self.new.empty():
                self.hold(self.new.get())
            for key, _ in self.selector.select(0.05):
                self.throw_away(key.fileobj)  # type: ignore[arg-type]
            now = time.monotonic()
            for connection in [one for one, until in self.held.items() if until < now]:
                self.drop(connection)

    def wait(self) -> None:
        """Until all have read their answers, or had the time to."""
        until = time.monotonic() + LINGER_SECONDS
        while (self.held or not self.new.empty()) and time.monotonic() < until:
            time.sleep(0.02)

    def hold(self, connection: socket.socket) -> None:
        if len(self.held) >= MAX_LINGERING:
            connection.close()
            return
        self.held[connection] = time.monotonic() + LINGER_SECONDS
        self.selector.register(connection, selectors.EVENT_READ)

    def throw_away(self, connection: socket.socket) -> None:
        try:
            ended = not connection.recv(1 << 16)
        except BlockingIOError:
            ended = False
        except OSError:
            ended = True
        if ended:
            self.drop(connection)

    def drop(self, connection: socket.socket) -> None:
        self.selector.unregister(connection)
        del self.held[connection]
        connection.close()


class Server(ThreadingHTTPServer):
    """A thread for each connection, and no more connections than are allowed."""

    request_queue_size = 1024  # a connection that does not fit waits for seconds
    daemon_threads = False  # server_close waits for requests that have begun
    allow_reuse_address = True

    def __init__(self, args: argparse.Namespace, network: predict.Network):
        self.args, self.network = args, network
        self.page = PAGE.read_bytes()
        self.connections = threading.BoundedSemaphore(args.max_requests + MAX_IDLE)
        self.pictures = threading.BoundedSemaphore(args.max_requests)
        # Decoded pictures take far more memory than those that are being sent.
        self.working = threading.BoundedSemaphore(args.workers)
        self.lingerer = Lingerer()
        self.lingerer.start()
        if ":" in args.host:
            self.address_family = socket.AF_INET6
        super().__init__((args.host, args.port), Handler)

    def server_bind(self) -> None:  # without the look-up of a name, which may take long
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]

    def process_request(self, request, client_address) -> None:  # type: ignore[no-untyped-def]
        if not self.connections.acquire(blocking=False):
            try:
                request.setblocking(False)
                request.send(response(503, {"error": BUSY}, **{"Retry-After": "1"}))
            except OSError:
                pass
            self.lingerer.take(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:  # no thread could be started
            self.connections.release()
            raise

    def process_request_thread(self, request, client_address) -> None:  # type: ignore[no-untyped-def]
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.connections.release()

    def shutdown_request(self, request) -> None:  # type: ignore[no-untyped-def]
        self.lingerer.take(request)

    def handle_error(self, request, client_address) -> None:  # type: ignore[no-untyped-def]
        """A client that went away needs no line; anything else is a fault of this program."""
        error = sys.exc_info()[1]
        if error is not None and not isinstance(error, OSError):
            log_fault(error)


def response(status: int, body: object, **headers: str) -> bytes:
    """A whole HTTP answer."""
    page = isinstance(body, bytes)
    content = body if isinstance(body, bytes) else json.dumps(body).encode() + b"\n"
    lines = {
        "Content-Type": "text/html; charset=utf-8" if page else "application/json",
        "Content-Length": str(len(content)),
        "Connection": "close",
        "X-Content-Type-Options": "nosniff",
        "Content-Security-Policy": "default-src 'self'; img-src blob:; style-src 'unsafe-inline'; "
        "script-src 'unsafe-inline'; frame-ancestors 'none'",
        **headers,
    }
    head = f"HTTP/1.1 {status} {REASONS[status]}\r\n"
    head += "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return head.encode("latin-1") + b"\r\n" + content


def log(text: str) -> None:
    line = text.encode("ascii", "backslashreplace").decode()
    line = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in line)
    print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}", file=sys.stderr, flush=True)


def log_fault(error: BaseException) -> None:
    log(f"fault: {type(error).__name__}: {predict.one_line(error)}")


class Handler(BaseHTTPRequestHandler):
    """One request of a connection, which is then closed."""

    server: Server
    rfile: io.BufferedReader
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        self.start = time.monotonic()
        self.connection = self.request
        self.sender = Sender(self.connection, deadline=self.start + self.server.args.timeout)
        self.rfile = io.BufferedReader(self.sender, 1 << 16)

    def finish(self) -> None:
        """Nothing is buffered."""

    def handle(self) -> None:
        self.close_connection, self.requestline, self.head_only = True, "-", False
        try:
            answer = self.answer()
        except Refused as error:
            answer = error.status, {"error": str(error)}, error.headers
        except TimeoutError:
            seconds = f"{self.server.args.timeout:g} s"
            answer = 408, {"error": f"the request was not complete after {seconds}"}, {}
        except OSError:  # the client went away
            raise
        except Exception as error:  # of ONNX Runtime, or for want of memory
            log_fault(error)
            answer = 500, {"error": "the picture could not be classified"}, {}
        status, body, headers = answer
        self.send(response(status, body, **headers))
        milliseconds = 1000 * (time.monotonic() - self.start)
        problem = f" {body['error']}" if isinstance(body, dict) and "error" in body else ""
        log(f"{self.requestline[:200]!r} {status} {milliseconds:.0f} ms{problem}")

    def send(self, data: bytes) -> None:
        """Raises OSError where the client does not take it in time."""
        self.connection.settimeout(self.server.args.timeout)
        self.connection.sendall(data)

    def answer(self) -> tuple[int, object, dict[str, str]]:
        """Status, body and more headers. Raises Refused, or TimeoutError."""
        if not self.rfile.peek(1):
            raise ConnectionAbortedError  # it sent nothing
        # Browsers connect before they have anything to send: the time counts from there on.
        self.start = time.monotonic()
        self.sender.deadline = self.start + self.server.args.timeout
        self.raw_requestline = self.rfile.readline(MAX_HEADER_BYTES)
        if not self.parse_request():
            raise Refused(400, "not an HTTP request")
        path = urlsplit(self.path)
        allowed = {"/": "GET", "/health": "GET", "/classify": "POST"}.get(path.path)
        if allowed is None:
            raise Refused(404, "POST a picture to /classify; / is a page, /health a check")
        if self.command != allowed:
            raise Refused(405, f"{path.path} takes {allowed} only", Allow=allowed)
        if path.path == "/":
            return 200, self.server.page, {}
        network = self.server.network
        if path.path == "/health":
            return 200, {"status": "ok", "model": Path(network.path).name}, {}
        top_k = read_top_k(path.query)
        with Slot(self.server.pictures, 0, BUSY):
            data = self.read_body()
            with Slot(self.server.working, self.server.args.timeout, BUSY):
                try:
                    picture = predict.read_picture(data, self.server.args.max_pixels)
                    image = network.prepare(picture)
                except predict.TooLarge as error:
                    raise Refused(413, str(error)) from None
                except predict.BadPicture as error:
                    raise Refused(400, f"{error}; send the bytes of one picture") from None
                del data, picture
                answers = network.probabilities([image])[0]
        return 200, {"classes": network.best(answers, top_k)}, {}

    def send_error(self, code, message=None, explain=None) -> None:  # type: ignore[no-untyped-def]
        """What `parse_request` calls where a request is not HTTP."""
        raise Refused(int(code), message or REASONS[int(code)])

    def handle_expect_100(self) -> bool:
        """The client waits to be told that it may send: `read_body` does, or refuses."""
        return True

    def read_body(self) -> bytes:
        """The picture. Raises Refused before it is read where it is too large."""
        length, encoding = (
            self.headers.get_all("Content-Length"),
            self.headers.get_all("Transfer-Encoding"),
        )
        if length and encoding:
            raise Refused(400, "both Content-Length and Transfer-Encoding")
        if encoding and (len(encoding) > 1 or encoding[0].strip().lower() != "chunked"):
            raise Refused(501, "of Transfer-Encoding only chunked is known")
        if not (length or encoding):
            raise Refused(411, "send the bytes of a picture as the body")
        most = self.server.args.max_bytes
        if length:
            if len(set(length)) > 1 or not (length[0].isascii() and length[0].isdigit()):
                raise Refused(400, "Content-Length is not a number")
            if len(length[0]) > 18 or int(length[0]) > most:
                raise Refused(413, f"more than {most} bytes")
        if self.headers.get("Expect", "").lower() == "100-continue":
            self.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        # Small chunks have as much around them as they hold.
        self.sender.allow(2 * most + MAX_HEADER_BYTES, Refused(413, f"more than {most} bytes"))
        return self.read_exactly(int(length[0])) if length else self.read_chunks(most)

    def read_exactly(self, count: int) -> bytes:
        data = self.rfile.read(count)
        if len(data) < count:
            raise Refused(400, f"the body ends after {len(data)} of {count} bytes")
        return data

    def read_chunks(self, most: int) -> bytes:
        """A body of chunks, without the lines behind the last."""
        data = bytearray()
        while True:
            line = self.rfile.readline(1 << 10)
            digits = line.split(b";")[0].strip()
            try:
                if not line.endswith(b"\n") or not digits.isalnum() or len(digits) > 16:
                    raise ValueError
                size = int(digits, 16)
            except ValueError:
                raise Refused(400, "a broken chunk in the body") from None
            if size == 0:
                return bytes(data)
            if len(data) + size > most:
                raise Refused(413, f"more than {most} bytes")
            data += self.read_exactly(size)
            if self.rfile.readline(3) not in (b"\r\n", b"\n"):
                raise Refused(400, "a broken chunk in the body")


class Slot:
    """One of a limited number of places, for a block. Raises Refused where none gets free."""

    def __init__(self, places: threading.BoundedSemaphore, seconds: float, text: str):
        self.places, self.seconds, self.text = places, seconds, text

    def __enter__(self) -> None:
        wait = {"timeout": self.seconds} if self.seconds else {"blocking": False}
        if not self.places.acquire(**wait):
            raise Refused(503, self.text, **{"Retry-After": "1"})

    def __exit__(self, *_: object) -> None:
        self.places.release()


def read_top_k(query: str) -> int:
    values = parse_qs(query, max_num_fields=10).get("top_k", ["5"]) if len(query) < 1000 else [""]
    if not (values[-1].isascii() and values[-1].isdigit() and 1 <= int(values[-1]) <= MAX_TOP_K):
        raise Refused(400, f"top_k must be 1 to {MAX_TOP_K}")
    return int(values[-1])


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Classify pictures over HTTP.", allow_abbrev=False)
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0: all addresses (%(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="0: a free one (%(default)s)")
    parser.add_argument("--model", help="ONNX file; unless given, the one that about.json names")
    limit = parser.add_argument_group("limits")
    limit.add_argument("--max_bytes", type=int, default=20_000_000, help="of a body (%(default)s)")
    limit.add_argument(
        "--max_pixels", type=int, default=50_000_000, help="of a picture (%(default)s)"
    )
    limit.add_argument(
        "--timeout",
        type=float,
        default=10,
        help="seconds for a request to arrive, for a place among the workers, and for the answer "
        "to be taken (%(default)s)",
    )
    limit.add_argument(
        "--max_requests",
        type=int,
        default=16,
        help="pictures at once; more get 503 (%(default)s)",
    )
    limit.add_argument(
        "--workers", type=int, default=2, help="pictures that are decoded at once (%(default)s)"
    )
    args = parser.parse_args(argv)
    for name in ("max_bytes", "max_pixels", "timeout", "max_requests", "workers"):
        if not getattr(args, name) > 0:
            parser.error(f"--{name} must be more than 0")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    network = predict.Network(args.model)
    try:
        server = Server(args, network)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        print(f"serve.py: error: {args.host} port {args.port}: {reason}", file=sys.stderr)
        return 2
    stop = threading.Event()

    def on_signal(number: int, frame: FrameType | None) -> None:
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)
    loop = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1})
    loop.start()
    host = f"[{args.host}]" if ":" in args.host else args.host
    log(f"serving {Path(network.path).name} on http://{host}:{server.server_port}")
    while not stop.wait(1):
        pass
    log("stopping: no new requests; those that have begun end")
    server.shutdown()
    server.server_close()
    server.lingerer.wait()
    log("stopped")
    return 0


if __name__ == "__main__":
    sys.exit(main())
