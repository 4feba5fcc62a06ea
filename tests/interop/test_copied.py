"""The verification that README.md offers to copy, in Flask and in FastAPI, over real HTTP."""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import shutil
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

from ..support import (
    PATH,
    PROGRAM,
    TOKEN,
    Connection,
    central_headers,
    deadline_poll,
    new_body,
    raw_request,
)
from ..test_readme import block, blocks, section
from . import parts
from .test_nginx import Nginx

TEXT = section("Copy the verification")


class FrameworkTest(unittest.TestCase):
    """Each test starts one application of README.md on a server of its framework."""

    def setUp(self):
        self.folder = Path(tempfile.mkdtemp(prefix="copied-"))
        self.addCleanup(shutil.rmtree, self.folder, ignore_errors=True)

    def start(self, framework, *command):
        """Write the application and start its server; return the port."""
        parts.need_module(framework)
        shutil.copy(PROGRAM, self.folder)
        copying = block("sh", "{ echo", TEXT)
        subprocess.run(["sh", "-e", "-c", copying], cwd=self.folder, check=True, timeout=10)
        (code,) = [code for code in blocks("python", TEXT) if f"from {framework} import" in code]
        (self.folder / "application.py").write_text(code)
        (port,) = parts.free_ports(1)
        self.log = (self.folder / "log").open("wb+")
        self.addCleanup(self.log.close)
        process = subprocess.Popen(
            [sys.executable, "-m", *command, "--host", "127.0.0.1", "--port", str(port)],
            cwd=self.folder,
            env={**os.environ, "CENTRAL_TOKEN": TOKEN, "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=subprocess.STDOUT,
        )
        self.addCleanup(process.wait, 15)
        self.addCleanup(process.kill)
        deadline_poll(lambda: Nginx.accepts(port) or process.poll() is not None, 30)
        self.assertIsNone(process.poll(), self.read_log())
        return port

    def read_log(self):
        return (self.folder / "log").read_text()

    def post(self, port, body, headers):
        """POST and return the status."""
        with Connection(port) as connection:
            connection.send(raw_request("POST", PATH, headers, body))
            return connection.read().status

    def check(self, port):
        body = new_body(description="é")
        headers = central_headers(body)
        self.assertEqual(200, self.post(port, body, headers), self.read_log())
        with self.subTest("a changed body"):
            changed = body.replace(b"Major", b"Minor")
            self.assertEqual(401, self.post(port, changed, headers))
        for name in headers:
            if name.startswith("X-Central-") and "Event" not in name and "Customer" not in name:
                pairs = list(headers.items())
                with self.subTest("without", header=name):
                    missing = [pair for pair in pairs if pair[0] != name]
                    self.assertEqual(401, self.post(port, body, missing))
                with self.subTest("repeated", header=name):
                    self.assertEqual(401, self.post(port, body, [*pairs, (name, headers[name])]))
        with self.subTest("a header that is not ASCII"):
            signed = body + "Alertsé".encode("latin-1")
            delivery_id, moment = (
                headers["X-Central-Delivery-ID"],
                headers["X-Central-Delivery-Timestamp"],
            )
            signed += (delivery_id + moment).encode()
            digest = hmac.new(TOKEN.encode(), signed, hashlib.sha256).digest()
            headers["X-Central-Service"] = "Alertsé"
            headers["X-Central-Signature"] = base64.b64encode(digest).decode()
            self.assertEqual(200, self.post(port, body, headers), self.read_log())
        self.assertEqual(2, self.read_log().count("AP disconnected"))
        self.assertNotIn("Traceback", self.read_log())

    def test_flask(self):
        port = self.start("flask", "flask", "--app", "application", "run")
        self.check(port)
        body = new_body(text="x" * (1 << 20))  # above MAX_CONTENT_LENGTH
        self.assertEqual(413, self.post(port, body, central_headers(body)))

    def test_fastapi(self):
        parts.need_module("uvicorn")
        self.check(self.start("fastapi", "uvicorn", "application:app"))


if __name__ == "__main__":
    unittest.main()
