"""Peer: what one writes first with http.server: threads, HTTP/1.0, the email package's header
parser.
"""

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from job import Job

job = Job()


class Handler(BaseHTTPRequestHandler):
    """Answers POST."""

    def do_POST(self):
        """Take a delivery."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        status, answer = job.take(body, self.headers)
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        """Stay silent."""


if __name__ == "__main__":
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
