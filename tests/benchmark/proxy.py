"""nginx in front of a server of the benchmark: with our configuration, or with the plainest."""

from __future__ import annotations

import contextlib
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

CONFIGURATION = Path(__file__).resolve().parent.parent.parent / "nginx" / "centralwebhook.conf"
UPSTREAM = "127.0.0.1:8010"  # where our configuration expects the receiver
_TOKEN = re.compile(r"""#[^\n]*|"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'|[{};]|[^\s{};"'#][^\s{};]*""")

MAIN = """
daemon off;
worker_processes 1;
pid {folder}/nginx.pid;
error_log {folder}/nginx-errors.log;
events {{ worker_connections 4096; }}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    {http}
}}
"""
PLAIN = (
    "server {{ listen 127.0.0.1:{port}; location / {{ proxy_pass http://127.0.0.1:{upstream}; }} }}"
)


def parse_directives(tokens):
    """Return the directives of a block as pairs: words, and the directives of its own block or
    None.
    """
    found, words = [], []
    for token in tokens:
        if token == "}":
            return found
        if token in "{;":
            found.append((words, parse_directives(tokens) if token == "{" else None))
            words = []
        else:
            words.append(token)
    return found


def adapt(directives, port, upstream):
    """Take out TLS, the limits of rate and number, and the redirect; put in our ports; return the
    text.
    """
    lines = []
    for words, block in directives:
        inner = {word[0]: word[1:] for word, _ in block or ()}
        if words == ["server"] and any("443" not in word for word in inner["listen"][:1]):
            continue
        if words[0].startswith(("ssl_", "limit_req", "limit_conn")):
            continue
        if words[0] == "listen":
            if words[1].startswith("["):
                continue
            words = ["listen", f"127.0.0.1:{port}"]
        text = " ".join(words).replace(UPSTREAM, f"127.0.0.1:{upstream}")
        lines.append(
            f"{text} {{ {adapt(block, port, upstream)} }}" if block is not None else f"{text};"
        )
    return "\n".join(lines)


class Proxy:
    """A running nginx."""

    @staticmethod
    def forms():
        """Return what can be measured here."""
        if not shutil.which("nginx"):
            print("no nginx here: its figures are left out", file=sys.stderr)
            return []
        return ["ours", "plain"]

    def __init__(self, form, port, upstream, folder):
        self.port = port
        http = PLAIN.format(port=port, upstream=upstream)
        if form == "ours":
            tokens = _TOKEN.findall(CONFIGURATION.read_text())
            directives = parse_directives(token for token in tokens if not token.startswith("#"))
            http = adapt(directives, port, upstream)
            if f"127.0.0.1:{upstream}" not in http or f"listen 127.0.0.1:{port}" not in http:
                raise SystemExit(
                    f"{CONFIGURATION}: no upstream {UPSTREAM}, or no server on port 443"
                )
        self.path = Path(folder) / "nginx.conf"
        self.path.write_text(MAIN.format(folder=folder, http=http))

    def __enter__(self):
        early = self.path.parent / "nginx-start.log"
        self.process = subprocess.Popen(["nginx", "-e", early, "-c", self.path])
        deadline = time.monotonic() + 10
        while True:
            with (
                contextlib.suppress(OSError),
                socket.create_connection(("127.0.0.1", self.port), 5),
            ):
                return self
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.__exit__()
                raise SystemExit("nginx did not start")
            time.sleep(0.01)

    def __exit__(self, *exc):
        self.process.terminate()
        self.process.wait(10)

    def pids(self):
        """Return its processes: the master and the workers."""
        pid = self.process.pid
        return [pid, *map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]
