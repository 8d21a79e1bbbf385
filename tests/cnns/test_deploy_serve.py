"""The server of a deployed folder: what it answers, and what it survives."""

import io
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection, HTTPResponse

import numpy as np
import pytest
from PIL import Image

import deployed
import serve

pytestmark = pytest.mark.long

TIMEOUT = 2.0  # seconds that the server gives a request
GRACE = 30.0  # more, on a machine with other work
LIMITS = ("--max_bytes=2000000", "--max_pixels=1000000", f"--timeout={TIMEOUT}")


class Running:
    """A server in a process of its own."""

    def __init__(self, folder, *flags: str):
        self.process = subprocess.Popen(
            [sys.executable, str(folder / "serve.py"), "--port=0", *flags],
            cwd=folder.parent,
            env=deployed.environment(),
            stderr=subprocess.PIPE,
            text=True,
        )
        self.lines: list[str] = []
        first = self.process.stderr.readline()
        assert "serving" in first, first + self.process.stderr.read()
        self.port = int(first.rsplit(":", 1)[1])
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()

    def read(self) -> None:
        for line in self.process.stderr:
            self.lines.append(line)

    def memory(self) -> int:
        """Bytes that the process holds."""
        with open(f"/proc/{self.process.pid}/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=TIMEOUT + GRACE)

    def request(
        self, method: str, path: str, body=None, **headers: str
    ) -> tuple[int, dict | bytes]:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=TIMEOUT + GRACE)
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        data = answer.read()
        connection.close()
        is_json = answer.getheader("Content-Type") == "application/json"
        return answer.status, json.loads(data) if is_json else data

    def raw(self, data: bytes, *, cut: bool = False) -> int:
        """The status of the answer to what is sent as it is."""
        with self.connect() as connection:
            try:
                connection.sendall(data)
                if cut:
                    connection.shutdown(socket.SHUT_WR)
            except OSError:  # it has answered already
                pass
            answer = HTTPResponse(connection)
            answer.begin()
            assert "error" in json.loads(answer.read())
            return answer.status

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(TIMEOUT + GRACE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return deployed.make_folder(tmp_path_factory.mktemp("serve") / "served")


@pytest.fixture(scope="module")
def server(folder):
    running = Running(folder, *LIMITS)
    yield running
    assert running.stop() == 0
    running.reader.join(GRACE)
    assert "fault" not in "".join(running.lines)


def encoded(image: Image.Image, kind: str = "PNG", **more) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **more)
    return file.getvalue()


PICTURE = encoded(deployed.solid("green"))


def post(head: str, body: bytes = b"") -> bytes:
    return f"POST /classify HTTP/1.1\r\nHost: x\r\n{head}\r\n".encode() + body


def of_length(body: bytes) -> bytes:
    return post(f"Content-Length: {len(body)}\r\n", body)


def test_a_picture_is_classified_as_predict_does(server, folder, tmp_path):
    path = tmp_path / "x.png"
    path.write_bytes(PICTURE)
    line = deployed.predict(folder, str(path), "--output=json", "--top_k=2").stdout
    status, answer = server.request("POST", "/classify?top_k=2", PICTURE)
    assert (status, answer["classes"]) == (200, json.loads(line)["classes"])
    assert [each["name"] for each in answer["classes"]][0] == "green"
    assert server.request("GET", "/health") == (200, {"status": "ok", "model": "model.onnx"})
    status, page = server.request("GET", "/")
    assert status == 200 and b"<title>" in page


def test_chunks_and_the_first_of_several_frames(server):
    chunks = (PICTURE[i : i + 50] for i in range(0, len(PICTURE), 50))
    status, answer = server.request("POST", "/classify", chunks)
    assert (status, answer["classes"][0]["name"]) == (200, "green")
    frames = [deployed.solid(colour) for colour in ("red", "blue", "blue")]
    moving = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    status, answer = server.request("POST", "/classify", moving)
    assert (status, answer["classes"][0]["name"]) == (200, "red")


def test_a_client_that_asks_first_is_told_to_send_or_refused(server):
    for length, expected in ((len(PICTURE), b"100 Continue"), (10**9, b"413")):
        with server.connect() as connection:
            connection.sendall(post(f"Content-Length: {length}\r\nExpect: 100-continue\r\n"))
            assert expected in connection.recv(1000).splitlines()[0]
            if length == len(PICTURE):
                connection.sendall(PICTURE)
                assert b"200 OK" in connection.recv(1000)


def png_of(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds a few bytes."""
    held = b""
    head = struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0)
    for kind, data in ((b"IHDR", head), (b"IDAT", zlib.compress(b"\0" * 99)), (b"IEND", b"")):
        held += (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )
    return b"\x89PNG\r\n\x1a\n" + held


NOISE = np.random.default_rng(0).integers(0, 256, 5000, np.uint8).tobytes()
# What is sent, and the status that it gets.
CHUNKED = "Transfer-Encoding: chunked\r\n"
WRONG = {
    "no body": (post(""), 411),
    "an empty body": (of_length(b""), 400),
    "text": (of_length(b"this is not a picture"), 400),
    "noise": (of_length(NOISE), 400),
    "half a picture": (of_length(encoded(Image.effect_noise((64, 64), 99))[:900]), 400),
    "100 MB claimed": (post("Content-Length: 100000000\r\n"), 413),
    "more digits than a number has": (post(f"Content-Length: {'9' * 40}\r\n"), 413),
    "a negative length": (post("Content-Length: -5\r\n"), 400),
    "a length in words": (post("Content-Length: many\r\n"), 400),
    "a length in other digits": (post("Content-Length: ²\r\n"), 400),
    "two lengths": (post("Content-Length: 3\r\nContent-Length: 4\r\n", b"abc"), 400),
    "length and chunks": (post("Content-Length: 3\r\n" + CHUNKED, b"0\r\n\r\n"), 400),
    "an unknown encoding": (post("Transfer-Encoding: gzip\r\n"), 501),
    "a chunk of letters": (post(CHUNKED, b"zz\r\n"), 400),
    "a chunk below 0": (post(CHUNKED, b"-5\r\n"), 400),
    "a chunk of 1 GB": (post(CHUNKED, b"40000000\r\n"), 413),
    "a chunk that goes on": (post(CHUNKED, b"2\r\nabcd\r\n"), 400),
    "a line without end": (post(CHUNKED, b"1" * 5000), 400),
    "chunks of nothing but text": (post(CHUNKED, b"2\r\nab\r\n0\r\n\r\n"), 400),
    "100,000 x 100,000 pixels claimed": (of_length(png_of(100_000, 100_000)), 413),
    "2^31 x 2^31 pixels claimed": (of_length(png_of(2**31 - 1, 2**31 - 1)), 413),
    "as many pixels as allowed claimed": (of_length(png_of(1000, 1000)), 400),
    "no pixels": (of_length(png_of(0, 5)), 400),
    "a very long picture": (of_length(encoded(Image.new("L", (1_000_000, 1)))), 400),
    "an unknown place": (b"POST /other HTTP/1.1\r\nContent-Length: 0\r\n\r\n", 404),
    "a place above": (b"GET /../../etc/passwd HTTP/1.1\r\n\r\n", 404),
    "a picture for the page": (b"POST / HTTP/1.1\r\nContent-Length: 0\r\n\r\n", 405),
    "no picture": (b"GET /classify HTTP/1.1\r\n\r\n", 405),
    "an unknown method": (b"BREW /classify HTTP/1.1\r\n\r\n", 405),
    "top_k in words": (b"POST /classify?top_k=all HTTP/1.1\r\nContent-Length: 0\r\n\r\n", 400),
    "top_k of 0": (b"POST /classify?top_k=0 HTTP/1.1\r\nContent-Length: 0\r\n\r\n", 400),
    "a long query": (b"POST /classify?" + b"a=1&" * 2000 + b" HTTP/1.1\r\n\r\n", 400),
    "not HTTP": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
    "another version": (b"GET / HTTP/7.7\r\n\r\n", 505),
    "one word": (b"HELLO\r\n\r\n", 400),
    "an endless line": (b"GET /" + b"a" * 100_000, 431),
    "too many headers": (b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 200 + b"\r\n", 431),
    "too long a head": (b"GET / HTTP/1.1\r\n" + b"A: " + b"b" * 60_000 + b"\r\n\r\n", 431),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_request_gets_its_status_and_a_line(server, name):
    data, status = WRONG[name]
    start = time.monotonic()
    assert server.raw(data) == status
    assert time.monotonic() - start < TIMEOUT + GRACE


@pytest.mark.parametrize("length", [1, 20, 70])
def test_a_body_that_is_cut_off(server, length):
    data = post(f"Content-Length: {len(PICTURE)}\r\n", PICTURE[:length])
    assert server.raw(data, cut=True) == 400
    assert server.raw(post(CHUNKED, b"50\r\nabc"), cut=True) == 400


def test_a_client_that_is_sent_away_while_it_sends_gets_its_answer(server):
    """100 MB, of which the server reads nothing into memory."""
    before = server.memory()
    with server.connect() as connection:
        connection.sendall(post("Content-Length: 100000000\r\n"))
        try:
            for _ in range(100):
                connection.sendall(bytes(1_000_000))
        except OSError:
            pass
        assert b"413" in connection.recv(100)
    assert server.memory() - before < 20_000_000


@pytest.mark.parametrize("sent", [b"GET / HT", post("Content-Length: 999\r\n"), PICTURE[:0]])
def test_a_slow_sender_is_cut_off_in_time(server, sent):
    """Also one that sends a byte now and then."""
    start = time.monotonic()
    with server.connect() as connection:
        connection.sendall(sent)
        connection.settimeout(0.2)
        answer = b""
        while time.monotonic() - start < TIMEOUT + GRACE and not answer:
            try:
                connection.sendall(b"x")
                answer = connection.recv(1000)
            except TimeoutError:
                continue
    assert b" 408 " in answer.splitlines()[0]
    assert time.monotonic() - start < TIMEOUT + GRACE


def test_200_at_once_get_an_answer_each_and_the_memory_does_not_grow(server):
    def one(i: int) -> int:
        kind = i % 4
        if kind == 0:
            return server.raw(WRONG["noise"][0])
        if kind == 1:
            return server.raw(WRONG["100,000 x 100,000 pixels claimed"][0])
        return server.request("POST", "/classify", PICTURE)[0]

    def wave() -> set[int]:
        with ThreadPoolExecutor(200) as pool:
            return set(pool.map(one, range(200)))

    found = wave()
    before = server.memory()
    for _ in range(3):
        found |= wave()
    assert 200 in found and found <= {200, 400, 413, 503}
    assert server.memory() - before < 30_000_000
    assert server.request("POST", "/classify", PICTURE)[0] == 200


def test_a_browser_that_connects_in_advance_has_its_time_when_it_sends(server):
    with server.connect() as connection:
        time.sleep(0.8 * TIMEOUT)
        connection.sendall(post(f"Content-Length: {len(PICTURE)}\r\n", PICTURE[:10]))
        time.sleep(0.6 * TIMEOUT)
        connection.sendall(PICTURE[10:])
        assert b"200 OK" in connection.recv(1000)


def test_busy_is_503_while_health_answers(folder):
    server = Running(folder, "--max_requests=2", f"--timeout={TIMEOUT}")
    held = [server.connect() for _ in range(2)]
    for connection in held:
        connection.sendall(post("Content-Length: 999\r\n", b"x"))
    time.sleep(0.5)
    assert server.request("POST", "/classify", PICTURE)[0] == 503
    assert server.request("GET", "/health")[0] == 200
    for connection in held:
        connection.close()
    assert server.stop() == 0


def test_a_request_that_has_begun_is_answered_before_the_server_stops(folder):
    server = Running(folder, "--timeout=20")
    with server.connect() as connection:
        connection.sendall(post(f"Content-Length: {len(PICTURE)}\r\n", PICTURE[:10]))
        time.sleep(0.5)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(1.5)
        with pytest.raises(OSError):
            server.connect()
        connection.sendall(PICTURE[10:])
        assert b"200 OK" in connection.recv(1000)
    assert server.process.wait(GRACE) == 0
    server.reader.join(GRACE)
    assert server.lines[-1].endswith("stopped\n")


def test_only_this_machine_is_served_unless_told(server):
    with pytest.raises(OSError):
        address = socket.gethostbyname(socket.gethostname())
        if address.startswith("127."):
            raise OSError
        socket.create_connection((address, server.port), timeout=2)


def test_a_fault_of_the_server_is_answered_too(monkeypatch, capsys):
    class Broken:
        path = "broken.onnx"

        def prepare(self, image):
            raise MemoryError("no room")

    handler = serve.Server(serve.parse_args(["--port=0"]), Broken())
    thread = threading.Thread(target=handler.handle_request)
    thread.start()
    connection = HTTPConnection("127.0.0.1", handler.server_port, timeout=GRACE)
    connection.request("POST", "/classify", PICTURE)
    answer = connection.getresponse()
    assert answer.status == 500 and "could not be classified" in json.load(answer)["error"]
    thread.join()
    handler.server_close()
    assert "fault: MemoryError: no room" in capsys.readouterr().err


def test_a_port_that_is_taken_is_one_line(server, folder):
    done = subprocess.run(
        [sys.executable, str(folder / "serve.py"), f"--port={server.port}"],
        env=deployed.environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert f"port {server.port}: Address already in use" in done.stderr
