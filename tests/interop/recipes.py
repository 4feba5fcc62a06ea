"""What the tests of the recipes share: the text of README.md, processes, HTTP endpoints."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import unittest
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

from ..support import PROGRAM, Receiver, config_of
from ..test_readme import block, section
from . import parts

RECIPES = section("Send alerts on")
FORWARD = block("python", '"""Send each line', RECIPES)


def recipe(start):
    """Return forward.py with the block that begins so in place of `send`, as README.md says."""
    before, after = FORWARD.index("def send("), FORWARD.index("def deliver(")
    body = block("python", start, RECIPES)
    if "post(" in body:  # the chat
        body = FORWARD[before:after].replace("def send(", "def post(") + body
    return f"{FORWARD[:before]}{body}\n\n{FORWARD[after:]}"


class Endpoint:
    """An HTTP endpoint on loopback that handles one request after the other.

    `answer(request)` returns a status, or a status, a dict of headers and a JSON body. A request
    has method, path, headers and payload. A request that was cut off is not handled.
    """

    def __init__(self, answer=lambda request: 200, port=0):
        endpoint = self
        self.requests = []

        class Handler(BaseHTTPRequestHandler):
            def handle_request(self):
                length = int(self.headers.get("Content-Length", 0))
                body = self.rfile.read(length)
                if len(body) < length:
                    return
                self.payload = json.loads(body) if body else None
                endpoint.requests.append(self)
                answer = endpoint.answer(self)
                status, headers, found = answer if isinstance(answer, tuple) else (answer, {}, None)
                with contextlib.suppress(OSError):
                    self.send_response(status)
                    for name, value in headers.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(b"" if found is None else json.dumps(found).encode())

            do_GET = do_POST = do_PATCH = handle_request

            def log_message(self, *args):
                pass

        class Server(HTTPServer):
            request_queue_size = 128

            def handle_error(self, *args):  # a client that was killed
                pass

        self.answer = answer
        self.server = Server(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def payloads(self):
        return [request.payload for request in list(self.requests)]

    def close(self):
        self.server.shutdown()
        self.server.server_close()


class RecipeTest(unittest.TestCase):
    """A folder of its own, programs in it, and their end."""

    def setUp(self):
        parts.need("a shell", lambda: shutil.which("sh"))
        self.folder = Path(tempfile.mkdtemp(prefix="recipes-"))
        self.addCleanup(shutil.rmtree, self.folder, ignore_errors=True)
        self.log = self.folder / "central.jsonl"

    def spawn(self, command, stdout=None, environment=None):
        """Start a command, or a line for the shell, in a process group that ends with the test."""
        command = ["sh", "-c", command] if isinstance(command, str) else command
        with (self.folder / (stdout or "output")).open("ab") as output:
            process = subprocess.Popen(
                command,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(environment or {})},
                start_new_session=True,
            )
        self.addCleanup(self.end, process)
        return process

    @staticmethod
    def end(process, number=signal.SIGTERM):
        """End a process group of ours."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(15)

    def run_shell(self, command, environment=None):
        """Run a line for the shell to its end."""
        done = subprocess.run(
            ["sh", "-c", command],
            cwd=self.folder,
            env={**os.environ, **(environment or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
        )
        self.assertEqual(0, done.returncode, done.stdout)
        return done.stdout

    def receiver(self):
        """Start a receiver that writes central.jsonl in the folder."""
        return self.enter(Receiver(config_of(log_file=str(self.log))))

    def enter(self, context):
        """Enter a context until the end of the test."""
        value = context.__enter__()
        self.addCleanup(context.__exit__, None, None, None)
        return value

    def endpoint(self, answer=lambda request: 200):
        endpoint = Endpoint(answer)
        self.addCleanup(endpoint.close)
        return endpoint

    def forward(self, *options, text=FORWARD, name="forward.py", python="-S", **environment):
        """Start forward.py, or a copy of it with another `send`."""
        (self.folder / name).write_text(text, encoding="utf-8")
        shutil.copy(PROGRAM, self.folder)
        command = [sys.executable, *([python] if python else []), name, *options, "central.jsonl"]
        return self.spawn(command, environment=environment)

    def append(self, *records):
        """Append records, or text that is not one, to the log."""
        with self.log.open("a") as log:
            for record in records:
                log.write(record if isinstance(record, str) else json.dumps(record) + "\n")

    def log_lines(self):
        return self.log.read_text().splitlines()

    def read(self, name):
        path = self.folder / name
        return path.read_text() if path.exists() else ""
