"""How a delivery is handled: its signature, the webhook it is for, and `handle_alert` after it."""

from __future__ import annotations

import json
import tempfile
import time
import unittest
from pathlib import Path

from tests.support import (
    OK,
    TOKEN,
    TOP,
    Receiver,
    ReceiverTest,
    central_headers,
    config_of,
    deadline_poll,
    hmac_sha256,
    hook,
    in_parallel,
    is_refused,
    new_body,
    raw_request,
    signed,
    signed_request,
)


class Unsigned(ReceiverTest):
    """What is not signed for this webhook: 401."""

    def test_one_thing_changed_is_refused(self):
        body, headers = signed()
        pairs = list(headers.items())
        requests = {
            "no header at all": raw_request(body=body),
            "another body": raw_request(headers=headers, body=body + b" "),
            "another token": raw_request(headers=central_headers(body, "another"), body=body),
            "an empty body": raw_request(headers=headers),
        }
        for name in ("Service", "Delivery-ID", "Delivery-Timestamp", "Signature"):
            name = f"X-Central-{name}"
            value = headers[name]
            others = {key: value for key, value in headers.items() if key != name}
            for what, changed in (
                ("missing", others),
                ("empty", {**headers, name: ""}),
                ("changed", {**headers, name: value + "x"}),
                ("repeated", [*pairs, (name, value)]),
                ("repeated, once empty", [*pairs, (name.lower(), "")]),
                ("repeated, first wrong", [(name, "x"), *pairs]),
                ("with underscores", {**others, name.replace("-", "_"): value}),
            ):
                requests[f"{name} {what}"] = raw_request(headers=changed, body=body)
        for name in ("X-Central-Event", "X-Central-Customer-ID"):
            requests[f"{name} repeated"] = raw_request(headers=[*pairs, (name, "x")], body=body)
        for what, raw in requests.items():
            with self.subTest(what):
                self.assertEqual(self.receiver.request(raw).status, 401)
        self.assertEqual(self.receiver.post(body, headers).json, OK)

    def test_no_body_makes_checking_or_its_hints_fail(self):
        deep = b"[" * 100000
        bodies = [b"", deep, deep + b"]" * 100000, b'{"a":' + b"9" * 5000 + b"}", b"\xff\xfe"]
        bodies += [b'{"a":1e400,"b":"\\ud800"}', b"NaN", b'"' + b"\\" * 9999]
        bodies += [b"[1" + b",1" * 200000 + b"]"]
        for body in bodies:
            for headers in (
                central_headers(b"x"),
                {"X-Central-Signature": "\xff"},
                {"Signature-Input": "\xff"},
                {},
            ):
                with self.subTest(body[:9], headers=list(headers)[:1]):
                    self.assertEqual(self.receiver.post(body, headers).status, 401)
        self.assert_not_on_stdout("9" * 20)


class Webhooks(ReceiverTest):
    """Several webhooks: their paths, tokens and limits."""

    config = config_of(
        webhook=[
            hook("one", path="/shared", token="token-1"),
            hook("two", path="/shared", token=["token-2", "token-2-old"]),
            hook("fabric", path="/shared", type="ip-fabric", token="token-3"),
            hook("alone", token="token-4"),
            hook("strange", path="/a/%2f!$&'()*+,;=:@~", token="token-5"),
            {"name": "any path", "token": TOKEN},
        ],
        max_body_bytes=100,
    )

    def test_the_webhook_whose_checks_pass_names_the_delivery(self):
        body = new_body()
        digest = hmac_sha256("token-3", body).hex()
        self.assertEqual(
            self.receiver.post(body, {"X-IPF-Signature": digest}, "/shared").status, 200
        )
        self.assertEqual(self.wait_for_line(body)["webhook"], "fabric")
        for token, path, name in (
            ("token-1", "/shared", "one"),
            ("token-2", "/shared", "two"),
            ("token-2-old", "/shared", "two"),
            ("token-4", "/alone", "alone"),
            ("token-5", "/a/%2f!$&'()*+,;=:@~", "strange"),
        ):
            body = new_body()
            with self.subTest(name, token=token):
                answer = self.receiver.post(body, central_headers(body, token), path)
                self.assertEqual(answer.status, 200)
                self.assertEqual(self.wait_for_line(body)["webhook"], name)

    def test_a_token_is_valid_on_its_own_path_only(self):
        for token, path in (("token-1", "/alone"), ("token-4", "/shared"), ("token-5", "/alone")):
            body = new_body()
            headers = central_headers(body, token)
            self.assertEqual(self.receiver.post(body, headers, path).status, 401)

    def test_a_webhook_without_a_path_takes_any_but_those_of_the_receiver(self):
        for path in ("/", "/centralwebhook", "/a/b/c", "/healthz", "/x?y=z", "/health", "/metrics"):
            is_own = path in ("/health", "/metrics")
            get = raw_request("GET", path, length=False)
            with self.subTest(path):
                request = signed_request(path=path)
                self.assertEqual(self.receiver.request(request).status, 405 if is_own else 200)
                self.assertEqual(self.receiver.request(get).status, 200 if is_own else 405)

    def test_a_smaller_limit_can_be_configured(self):
        for size, status in ((100, 200), (101, 413)):
            self.assertEqual(self.receiver.deliver(b"x" * size).status, status)


class NotJson(ReceiverTest):
    """A signed body that is not JSON is stored all the same."""

    config = config_of(webhook=[hook("noc"), hook("fabric", type="ip-fabric")])

    def not_json(self):
        """Return the counters of these bodies, by webhook."""
        metrics = self.receiver.metrics()
        return {name: value for name, value in metrics.items() if "not_json" in name}

    def test_it_is_a_warning_that_says_what_it_seems_to_be_and_is_counted(self):
        before = self.not_json()
        for body, guess in ((b"\x1f\x8b\x08\0", "gzip"), (b"a=b&c=d", "form"), (b"<a/>", "XML")):
            start = len(self.receiver.stderr_lines)
            answer = self.receiver.post(body, central_headers(body), "/noc")
            self.assertEqual(answer.json, OK)
            self.receiver.wait_for_log(f"WARNING 'noc': .*not JSON: {guess}|{guess}", start=start)
        body = b"<snapshot/>"  # IP Fabric sends XML on purpose
        headers = {"X-IPF-Signature": hmac_sha256(TOKEN, body).hex()}
        self.assertEqual(self.receiver.post(body, headers, "/fabric").json, OK)
        moved = {name: value - before[name] for name, value in self.not_json().items()}
        self.assertEqual(sorted(moved.values()), [0, 3])
        self.assertNotIn("fabric", self.receiver.stderr_lines[-1])


class HandleAlert(unittest.TestCase):
    """`handle_alert`, set by a program that imports this one."""

    def start(self, lines, *arguments, **webclient_info):
        """Return a receiver, still to be entered, of a program that runs `lines` before `main`."""
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        program = Path(folder.name, "own.py")
        head = f"import sys\nsys.path.insert(0, {str(TOP)!r})\nimport central_webhook_client as c\n"
        program.write_text(f"{head}{lines}\nsys.exit(c.main())\n")
        return Receiver(config_of(**webclient_info), arguments, program=program)

    def test_alerts_are_handled_in_the_order_of_the_log_and_before_the_end(self):
        lines = (
            "import time\n"
            "def own(delivery):\n"
            "    time.sleep(0.005)\n"
            "    open('seen', 'a').write(delivery.delivery_id + '\\n')\n"
            "c.handle_alert = own"
        )
        with self.start(lines, log_file="alerts.jsonl") as receiver:
            answers = in_parallel(lambda _: receiver.deliver().status, range(40))
            self.assertEqual(answers, [200] * 40)
            self.assertEqual(receiver.stop(), 0)
            log = (receiver.folder / "alerts.jsonl").read_text().splitlines()
            seen = (receiver.folder / "seen").read_text().split()
        self.assertEqual([json.loads(line)["delivery_id"] for line in log], seen)
        self.assertEqual(len(seen), 40)

    def test_a_slow_function_delays_neither_answers_nor_a_second_signal(self):
        lines = "import time\nc.handle_alert = lambda delivery: time.sleep(60)"
        with self.start(lines) as receiver:
            started = time.monotonic()
            for _ in range(3):
                self.assertEqual(receiver.deliver().status, 200)
            self.assertLess(time.monotonic() - started, 10)
            receiver.process.terminate()
            deadline_poll(lambda: is_refused(receiver.port))
            self.assertEqual(receiver.stop(seconds=5), 0)

    def test_alerts_beyond_the_queue_or_the_drain_time_are_logged(self):
        lines = (
            "import time\n"
            "c.MAX_WAITING_ALERTS, c.DRAIN_SECONDS = 3, 0.1\n"
            "c.handle_alert = lambda delivery: time.sleep(60)"
        )
        with self.start(lines) as receiver:
            for _ in range(6):  # one is being handled, three wait
                self.assertEqual(receiver.deliver().status, 200)
            receiver.wait_for_log(" ERROR handle_alert: .*passed over")
            self.assertEqual(receiver.stop(), 0)
        log = "\n".join(receiver.stderr_lines)
        self.assertRegex(log, " ERROR handle_alert: [34] alerts were not handled")

    def test_an_exception_of_any_kind_changes_no_answer_and_is_logged(self):
        kinds = ["SystemExit(3)", "KeyboardInterrupt()", "GeneratorExit()", "StopIteration()"]
        kinds.append("type('Timeout', (BaseException,), {})()")
        lines = f"kinds = iter([{', '.join(kinds)}])\ndef own(delivery):\n    raise next(kinds)\n"
        with self.start(lines + "c.handle_alert = own") as receiver:
            for kind in kinds:
                with self.subTest(kind):
                    self.assertEqual(receiver.deliver().status, 200)
            receiver.wait_for_log("ERROR handle_alert: SystemExit: 3")
            receiver.wait_for_log("ERROR handle_alert: Timeout")
            self.assertEqual(receiver.health(), 200)
            self.assertEqual(receiver.stop(), 0)
        self.assertNotIn("Traceback", "".join(receiver.stderr_lines))

    def test_a_traceback_is_shown_with_verbose_and_escaped(self):
        lines = (
            "def own(delivery):\n"
            "    raise ValueError(delivery.payload['text'])\n"
            "c.handle_alert = own"
        )
        with self.start(lines, "--verbose") as receiver:
            body = new_body(text="\x1b[2J\u202e\n2026-01-01T00:00:00.000Z forged")
            self.assertEqual(receiver.deliver(body).status, 200)
            receiver.wait_for_log("raise ValueError")
        self.assertNotRegex("\n".join(receiver.stderr_lines), "[\x1b\u202e]|\n2026-01-01")

    def test_a_coroutine_function_or_a_string_is_refused_at_the_start(self):
        started = []
        for lines in (
            "async def own(delivery):\n    pass\nc.handle_alert = own",
            "import functools\nasync def own(delivery, x):\n    pass\n"
            "c.handle_alert = functools.partial(own, x=1)",
            "async def own(delivery):\n    yield\nc.handle_alert = own",
            "def own(delivery):\n    yield\nc.handle_alert = own",
            "class Own:\n    async def __call__(self, delivery):\n        pass\n"
            "c.handle_alert = Own()",
            "c.handle_alert = 'post_to_slack'",
        ):
            started.append((lines, self.start(lines)))
            self.addCleanup(started[-1][1].__exit__)
        for lines, receiver in started:
            with self.subTest(lines):
                self.assertEqual(receiver.wait(), 1)
                (line,) = receiver.stderr_lines
                self.assertIn("error: handle_alert: ", line)
