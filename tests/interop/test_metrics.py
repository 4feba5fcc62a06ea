"""/metrics, read by Prometheus' own parser and linter."""

from __future__ import annotations

import re
import subprocess
import unittest

from ..support import Receiver, central_headers, config_of, new_body, raw_request
from . import parts

NAMES = ("noc", 'a "quoted" name', "back\\slash and \\n", 'Zürich 🚨 {x="1"}', "#")


class PromtoolTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.promtool = parts.need_program("promtool")

    def check(self, text):
        return subprocess.run(
            [self.promtool, "check", "metrics"],
            input=text,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=30,
        )

    def test_promtool_accepts_the_metrics_before_and_after_traffic(self):
        webhooks = [
            {"name": name, "path": f"/{number}", "token": f"token-{number}"}
            for number, name in enumerate(NAMES)
        ]
        with Receiver(config_of(webhook=webhooks)) as receiver:

            def metrics():
                return receiver.request(raw_request("GET", "/metrics", length=False)).body

            before = metrics()
            for number in range(len(NAMES)):
                for body, token, status in (
                    (new_body(), f"token-{number}", 200),
                    (b"not JSON", f"token-{number}", 200),
                    (new_body(), "another-token", 401),
                ):
                    headers = central_headers(body, token=token)
                    answer = receiver.post(body, headers, path=f"/{number}")
                    self.assertEqual(status, answer.status)
            self.assertEqual(404, receiver.request(raw_request("POST", "/x")).status)
            after = metrics()
        for text in (before, after):
            done = self.check(text)
            self.assertEqual((0, b""), (done.returncode, done.stdout))
        series = [re.sub(rb" \S+\n", b"\n", text) for text in (before, after)]
        self.assertEqual(*series, "a series came or went")

    def test_promtool_refuses_metrics_without_help(self):
        """So that the test above means something."""
        self.assertEqual(3, self.check(b"# TYPE x_total counter\nx_total 1\n").returncode)


if __name__ == "__main__":
    unittest.main()
