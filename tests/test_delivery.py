"""How a delivery is handled: webhooks, age, duplicates, metrics, own code."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import signal
import socket
import tempfile
import threading
import time
import unittest
from pathlib import Path

from tests.support import (
    HEALTH,
    PATH,
    TOKEN,
    TOP,
    Receiver,
    ServedTest,
    central_headers,
    config_of,
    deadline_poll,
    good,
    new_body,
    now_stamp,
    raw_request,
    share_receiver,
)
from tests.test_http import chunked, chunks, series, with_lines

setUpModule = share_receiver


class Webhooks(ServedTest):
    config = config_of(
        webhook=[
            {"name": "one", "path": "/shared", "token": "token-1"},
            {"name": "two", "path": "/shared", "token": ["token-2", "token-2-old"]},
            {"name": "fabric", "path": "/shared", "type": "ip-fabric", "token": "token-3"},
            {"name": "alone", "path": "/alone", "token": "token-4"},
            {"name": "strange", "path": "/a/%2f!$&'()*+,;=:@~", "token": "token-5"},
            {
                "name": "half an hour",
                "path": "/half-an-hour",
                "token": "token-6",
                "replay_window_hours": 0.5,
            },
            {"name": "any path, any age", "token": TOKEN, "replay_window_hours": 0},
        ],
        max_body_bytes=100,
    )

    def named(self, body, headers, path):
        """Deliver; return the webhook that is named on stdout."""
        answer = self.receiver.post(body, headers, path)
        self.assert_reply(answer, 200)
        lines = deadline_poll(
            lambda: [one for one in self.receiver.stdout_lines if body.decode() in one]
        )
        return json.loads(lines[0])["webhook"]

    def test_the_webhook_whose_checks_pass_names_the_delivery(self):
        for token, path, name in (
            ("token-1", "/shared", "one"),
            ("token-2", "/shared", "two"),
            ("token-2-old", "/shared", "two"),
            ("token-4", "/alone", "alone"),
            ("token-5", "/a/%2f!$&'()*+,;=:@~", "strange"),
        ):
            body = new_body()
            with self.subTest(name, token=token):
                self.assertEqual(self.named(body, central_headers(body, token=token), path), name)

    def test_senders_of_different_types_may_share_a_path(self):
        body = new_body()
        digest = hmac.new(b"token-3", body, hashlib.sha256).hexdigest()
        self.assertEqual(self.named(body, {"X-IPF-Signature": digest}, "/shared"), "fabric")

    def test_a_token_is_valid_on_its_own_path_only(self):
        for token, path in (("token-1", "/alone"), ("token-4", "/shared"), ("token-5", "/alone")):
            body = new_body()
            self.assert_reply(
                self.receiver.post(body, central_headers(body, token=token), path), 401
            )

    def test_each_webhook_has_its_own_memory(self):
        body = new_body()
        for token, path in (("token-1", "/shared"), ("token-4", "/alone")):
            answer = self.receiver.post(
                body, central_headers(body, token=token, delivery_id="same"), path
            )
            self.assertEqual(answer.json, {"status": "ok"})

    def test_a_webhook_without_a_path_takes_any_but_our_own(self):
        for path in ("/", "/centralwebhook", "/a/b/c", "/healthz", "/x?y=z"):
            with self.subTest(path):
                self.assert_status(good(path=path), 200)
                self.assert_status(raw_request("GET", path, length=False), 405)
        for path in ("/health", "/metrics"):
            with self.subTest(path):
                self.assert_status(good(path=path), 405)
                self.assertEqual(
                    self.receiver.request(raw_request("GET", path, length=False)).status, 200
                )

    def test_with_a_window_of_0_the_time_is_not_looked_at(self):
        for stamp in (
            now_stamp(-(10**8)),
            now_stamp(10**8),
            "yesterday",
            "0",
            "2016-99-99T00:00:00Z",
        ):
            body = new_body()
            with self.subTest(stamp):
                self.assert_status(
                    raw_request(headers=central_headers(body, timestamp=stamp), body=body), 200
                )

    def test_the_window_can_be_configured(self):
        for minutes, status in ((-29, 200), (-31, 401), (14, 200), (16, 401)):
            body = new_body()
            headers = central_headers(body, "token-6", timestamp=now_stamp(minutes * 60))
            with self.subTest(minutes):
                self.assertEqual(self.receiver.post(body, headers, "/half-an-hour").status, status)

    def test_a_smaller_limit_can_be_configured(self):
        for size, status in ((100, 200), (101, 413)):
            body = b"x" * size
            self.assertEqual(self.receiver.request(good(body)).status, status)
            longer = body + b"y"
            self.assertEqual(self.receiver.request(chunked(chunks(longer, 30), longer)).status, 413)
            body = b"y" * size
            self.assertEqual(self.receiver.request(chunked(chunks(body, 30), body)).status, status)


class RecentAndNew(ServedTest):
    def status(self, body, headers):
        answer = self.receiver.post(body, headers)
        return answer.json["status"] if answer.status == 200 else answer.status

    def test_a_repetition_is_answered_but_not_written_again(self):
        body = new_body()
        headers = central_headers(body)
        self.assertEqual(self.status(body, headers), "ok")
        for _ in range(3):
            self.assertEqual(self.status(body, headers), "duplicate")
        last = new_body()
        self.assertEqual(self.status(last, central_headers(last)), "ok")
        deadline_poll(lambda: any(last.decode() in line for line in self.receiver.stdout_lines))
        self.assertEqual(
            len([line for line in self.receiver.stdout_lines if body.decode() in line]), 1
        )

    def test_a_retry_that_is_signed_anew_is_a_repetition(self):
        body = new_body()
        for offset, expected in ((-60, "ok"), (-30, "duplicate"), (0, "duplicate")):
            headers = central_headers(body, delivery_id="retried", timestamp=now_stamp(offset))
            self.assertEqual(self.status(body, headers), expected)

    def test_another_id_with_the_same_body_is_another_delivery(self):
        body = new_body()
        for delivery_id in ("x-1", "x-2"):
            self.assertEqual(
                self.status(body, central_headers(body, delivery_id=delivery_id)), "ok"
            )

    def test_the_same_id_with_another_body_is_another_delivery(self):
        for _ in range(2):
            body = new_body()
            self.assertEqual(self.status(body, central_headers(body, delivery_id="y")), "ok")

    def test_a_replay_with_bytes_moved_between_headers_is_a_repetition(self):
        body = new_body()
        headers = central_headers(body, service="Alerts", delivery_id="72d3")
        self.assertEqual(self.status(body, headers), "ok")
        for service, delivery_id in (("Alert", "s72d3"), ("Alerts7", "2d3"), ("A", "lerts72d3")):
            moved = {**headers, "X-Central-Service": service, "X-Central-Delivery-ID": delivery_id}
            with self.subTest(service):
                self.assertEqual(self.status(body, moved), "duplicate")
        moved = {**headers, "X-Central-Event": "another", "X-Central-Customer-ID": "another"}
        self.assertEqual(self.status(body, moved), "duplicate")

    def test_what_was_refused_is_not_remembered(self):
        body = new_body()
        headers = central_headers(body)
        self.assertEqual(self.status(body, {**headers, "X-Central-Signature": "x"}), 401)
        stale = central_headers(body, delivery_id="z", timestamp=now_stamp(-50 * 3600))
        self.assertEqual(self.status(body, stale), 401)
        self.assertEqual(self.status(body, headers), "ok")
        self.assertEqual(self.status(body, central_headers(body, delivery_id="z")), "ok")

    def test_the_age_is_limited_in_both_directions(self):
        for hours, expected in ((0, "ok"), (-47.9, "ok"), (-27, "ok"), (-48.1, 401), (-1000, 401)):
            body = new_body()
            with self.subTest(hours=hours):
                headers = central_headers(body, timestamp=now_stamp(hours * 3600))
                self.assertEqual(self.status(body, headers), expected)
        for minutes, expected in ((1, "ok"), (14, "ok"), (16, 401), (10**5, 401)):
            body = new_body()
            with self.subTest(minutes=minutes):
                headers = central_headers(body, timestamp=now_stamp(minutes * 60))
                self.assertEqual(self.status(body, headers), expected)

    def test_odd_time_stamps(self):
        now = time.time()
        utc = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now))
        pacific = time.strftime("%Y-%m-%dT%H:%M:%S-07:00", time.gmtime(now - 7 * 3600))
        india = time.strftime("%Y-%m-%dT%H:%M:%S+05:30", time.gmtime(now + 5.5 * 3600))
        forms = (
            utc,
            utc + "Z",
            utc + ".123Z",
            utc + ".123456+00:00",
            pacific,
            india,
            f"{now:.0f}",
            f"{now * 1000:.0f}",
        )
        for text in forms:
            body = new_body()
            with self.subTest(text):
                self.assertEqual(self.status(body, central_headers(body, timestamp=text)), "ok")
        wrong_hour = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime(now + 7 * 3600))
        for text in (
            "yesterday",
            "0",
            "-1",
            "nan",
            "1e9",
            "9" * 300,
            "2016-99-99T00:00:00Z",
            utc + "+99:00",
            wrong_hour,
        ):
            body = new_body()
            with self.subTest(text[:30]):
                self.assertEqual(self.status(body, central_headers(body, timestamp=text)), 401)

    def test_the_time_stamp_is_in_the_output_as_it_was_sent(self):
        body, stamp = (
            new_body(),
            time.strftime("%Y-%m-%dT%H:%M:%S-07:00", time.gmtime(time.time() - 7 * 3600)),
        )
        self.assertEqual(
            self.status(body, central_headers(body, timestamp=stamp, delivery_id="as-sent")), "ok"
        )
        lines = deadline_poll(
            lambda: [line for line in self.receiver.stdout_lines if body.decode() in line]
        )
        found = json.loads(lines[0])
        self.assertEqual((found["sent_at"], found["delivery_id"]), (stamp, "as-sent"))


class Metrics(ServedTest):
    config = config_of(
        webhook=[
            {"name": "first", "path": "/first", "token": TOKEN},
            {"name": 'a "quote" \\ back', "path": "/second", "token": TOKEN},
        ]
    )

    def found(self, found, *labels):
        """Return the one series with these in its name."""
        names = [name for name in found if all(label in name for label in labels)]
        self.assertEqual(len(names), 1, (labels, names))
        return found[names[0]]

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.at_start = series(cls.receiver)

    def test_all_series_exist_at_0_from_the_start_and_no_sender_adds_one(self):
        for name, value in self.at_start.items():
            self.assertLessEqual(value, 1 if "flight" in name else 0, name)
        start = series(self.receiver)
        self.assertEqual(set(start), set(self.at_start))
        for result in ("accepted", "duplicate", "signature", "stale"):
            self.found(start, 'webhook="first"', f'"{result}"')
            self.found(start, r'webhook="a \"quote\" \\ back"', f'"{result}"')
        body = new_body()
        raw = good(body, path="/first")
        stale = raw_request(
            path="/first", headers=central_headers(body, timestamp=now_stamp(-(10**6))), body=body
        )
        for request in (
            raw,
            raw,
            stale,
            good(path="/second"),
            good(path="/evil-label"),
            good(path="/first", method="EVILMETHOD"),
            raw_request(path="/first", headers={"X-Evil": "evil"}, body=b"forged"),
            with_lines(b"X-Evil : x"),
            good(version="HTTP/2.0"),
            raw_request(path="/first", length=False),
            raw_request(path="/first", headers={"Content-Length": "9" * 12}, length=False),
            raw_request(path="/first", headers={"Transfer-Encoding": "evil"}, length=False),
            b"x" * 9000,
            with_lines(b"X-Evil: " + b"x" * 70000),
        ):
            self.receiver.request(request)
        end = series(self.receiver)
        self.assertEqual(set(start), set(end))
        self.assertFalse([name for name in end if "evil" in name.lower()])
        for result, expected in (("accepted", 1), ("duplicate", 1), ("stale", 1), ("signature", 1)):
            with self.subTest(result):
                labels = 'webhook="first"', f'"{result}"'
                self.assertEqual(self.found(end, *labels) - self.found(start, *labels), expected)
        self.assertEqual(self.found(end, 'webhook="a', '"accepted"'), 1)
        moved = {name for name in end if end[name] > start[name]}
        for status_reason in (
            "not_found",
            "method",
            "malformed",
            "version",
            "length",
            "large",
            "long",
            "coding",
        ):
            with self.subTest(status_reason):
                self.assertTrue([name for name in moved if status_reason in name], moved)

    def test_the_bytes_and_the_time_of_the_last_delivery_are_there(self):
        body = new_body()
        before, start = time.time(), series(self.receiver)
        self.assertEqual(self.receiver.request(good(body, path="/first")).status, 200)
        end = series(self.receiver)
        moved = {name: value - start[name] for name, value in end.items() if value > start[name]}
        self.assertEqual([value for name, value in moved.items() if "bytes" in name], [len(body)])
        times = [name for name in moved if end[name] > 10**9]
        self.assertEqual(len(times), 1, times)
        self.assertIn('webhook="first"', times[0])
        self.assertTrue(before - 1 <= end[times[0]] <= time.time() + 1)

    def test_requests_in_flight_are_a_gauge(self):
        with self.receiver.connect() as connection:
            flight = [name for name in series(self.receiver) if "flight" in name]
            self.assertEqual(len(flight), 1)
            before = series(self.receiver)[flight[0]]
            connection.send(good(path="/first")[:-1])
            deadline_poll(lambda: series(self.receiver)[flight[0]] == before + 1)
        deadline_poll(lambda: series(self.receiver)[flight[0]] == before)

    def test_head_has_no_body(self):
        with self.receiver.connect() as connection:
            connection.send(raw_request("HEAD", "/metrics", length=False) + good(path="/first"))
            self.assertEqual(connection.read(head_only=True).status, 200)
            self.assertEqual(connection.read().status, 200)


class OwnCode(unittest.TestCase):
    """The program, imported by a few lines that change something in it."""

    def start(self, lines, *arguments, **webclient_info):
        """Return a receiver, still to be entered, of a program that runs `lines` before `main`."""
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        program = Path(folder.name, "own.py")
        head = f"import sys\nsys.path.insert(0, {str(TOP)!r})\n"
        head += "import central_webhook_client as client\n"
        program.write_text(f"{head}{lines}\nsys.exit(client.main())\n")
        return Receiver(config_of(**webclient_info), arguments, program=program)

    def test_whatever_own_code_raises_changes_no_answer_and_is_logged(self):
        kinds = ["SystemExit(3)", "KeyboardInterrupt()", "GeneratorExit()", "StopIteration()"]
        kinds.append("type('Timeout', (BaseException,), {})()")
        lines = f"kinds = iter([{', '.join(kinds)}])\n"
        lines += "def own(delivery):\n    raise next(kinds)\nclient.handle_alert = own"
        with self.start(lines) as receiver:
            for kind in kinds:
                with self.subTest(kind):
                    self.assertEqual(200, receiver.deliver().status)
            receiver.wait_for_log("ERROR handle_alert: SystemExit: 3")
            receiver.wait_for_log("ERROR handle_alert: Timeout")
            self.assertEqual(200, receiver.request(HEALTH).status)
            self.assertEqual(0, receiver.stop())
        self.assertFalse([line for line in receiver.stderr_lines if "Traceback" in line])

    def test_a_traceback_holds_nothing_unescaped(self):
        lines = "def own(delivery):\n    raise ValueError(delivery.payload['text'])\n"
        lines += "client.handle_alert = own"
        with self.start(lines, "--verbose") as receiver:
            body = new_body(text="\x1b[2J\u202e\n2026-01-01T00:00:00.000Z forged")
            self.assertEqual(200, receiver.deliver(body).status)
            receiver.wait_for_log("raise ValueError")
        log = "\n".join(receiver.stderr_lines)
        self.assertNotRegex(log, "[\x1b\u202e]|\n2026-01-01")

    def test_own_code_gets_what_was_kept_in_its_order_and_the_end_waits_for_it(self):
        lines = (
            "import time\ndef own(delivery):\n    time.sleep(0.01)\n"
            "    open('seen', 'a').write(delivery.delivery_id + '\\n')\nclient.handle_alert = own"
        )
        with self.start(lines, log_file="deliveries.log") as receiver:
            senders = [threading.Thread(target=receiver.deliver) for _ in range(40)]
            for sender in senders:
                sender.start()
            for sender in senders:
                sender.join(10)
            self.assertEqual(0, receiver.stop())
            with open(receiver.folder / "deliveries.log") as log:
                kept = [json.loads(line)["delivery_id"] for line in log]
            self.assertEqual(kept, (receiver.folder / "seen").read_text().split())
            self.assertEqual(40, len(kept))

    def test_a_coroutine_function_is_refused_at_the_start(self):
        for lines in (
            "async def own(delivery):\n    pass\nclient.handle_alert = own",
            "import functools\nasync def own(delivery, x):\n    pass\n"
            "client.handle_alert = functools.partial(own, x=1)",
            "class Own:\n    async def __call__(self, delivery):\n        pass\n"
            "client.handle_alert = Own()",
            "client.handle_alert = 'post_to_slack'",
        ):
            receiver = self.start(lines)
            self.addCleanup(receiver.__exit__)
            with self.subTest(lines):
                self.assertEqual(1, receiver.wait())
                self.assertEqual(1, len(receiver.stderr_lines), receiver.stderr_lines)
                self.assertIn("error: handle_alert: ", receiver.stderr_lines[0])

    def test_a_thread_that_cannot_be_started_is_started_later(self):
        lines = (
            "import os, threading\noriginal = threading.Thread.start\ndef start(self):\n"
            "    if os.path.exists('full'):\n        raise RuntimeError('no more threads')\n"
            "    original(self)\nthreading.Thread.start = start"
        )
        with self.start(lines, log_file="deliveries.log") as receiver:
            (receiver.folder / "full").touch()
            with receiver.connect(timeout=0.2) as connection, self.assertRaises(socket.timeout):
                connection.send(HEALTH)
                connection.read()
            (receiver.folder / "full").unlink()
            self.assertEqual(200, receiver.deliver().status)

    @unittest.skipUnless(hasattr(os, "fdatasync"), "needs fdatasync")
    def test_a_reload_while_the_disk_hangs_says_so_and_keeps_the_old_configuration(self):
        lines = (
            "import os, time\noriginal = os.fdatasync\ndef sync(log):\n"
            "    while os.path.exists('hang'):\n        time.sleep(0.01)\n    original(log)\n"
            "os.fdatasync = sync"
        )
        with self.start(lines, log_file="deliveries.log", request_timeout_seconds=0.1) as receiver:
            (receiver.folder / "hang").touch()
            answers = []
            sender = threading.Thread(target=lambda: answers.append(receiver.deliver().status))
            sender.start()
            deadline_poll(lambda: receiver.request(HEALTH).status == 503)
            receiver.process.send_signal(signal.SIGHUP)
            receiver.wait_for_log("configuration not reloaded.*the output is stuck")
            self.assertEqual(503, receiver.deliver().status)
            (receiver.folder / "hang").unlink()
            sender.join(10)
            self.assertEqual([200], answers)
            self.assertEqual(200, receiver.deliver().status)


class OldTokens(unittest.TestCase):
    def test_any_of_several_tokens_matches_after_any_other_and_is_named_by_its_place(self):
        tokens = ["first-token", "second-token", "third-token"]
        with Receiver(
            config_of(webhook={"name": "noc", "path": PATH, "token": tokens})
        ) as receiver:
            for position in (2, 2, 0, 1, 2, 1, 0, 0, 1):
                self.assertEqual(200, receiver.deliver(token=tokens[position]).status)
                self.assertEqual(401, receiver.deliver(token="a fourth").status)
            receiver.wait_for_log("token 3 of 3 still matches")
            receiver.wait_for_log("token 2 of 3 still matches")
            named = [line for line in receiver.stderr_lines if "still matches" in line]
            self.assertEqual(2, len(named))  # at most once a minute each, and the first never
            receiver.write_config(
                config_of(receiver.port, {"name": "noc", "path": PATH, "token": tokens[:1]})
            )
            receiver.process.send_signal(signal.SIGHUP)
            receiver.wait_for_log("configuration reloaded")
            self.assertEqual(200, receiver.deliver(token=tokens[0]).status)
            self.assertEqual(401, receiver.deliver(token=tokens[1]).status)
