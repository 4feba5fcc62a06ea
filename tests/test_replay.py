"""The times that senders sign."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import threading
import time
import unittest

import central_webhook_client as product
from tests.support import (
    DUPLICATE,
    OK,
    PATH,
    TOKEN,
    Receiver,
    central_headers,
    config_of,
    deadline_poll,
    new_body,
    now_stamp,
    raw_request,
)
from tests.test_log_file import (
    URL,
    LogCase,
    bracken_headers,
    entrupy_headers,
    ip_fabric_headers,
    kept_deliveries,
    new_central_headers,
)


def hook(name, **more):
    """Return a classic webhook with a path of its own."""
    return {"name": name, "path": f"/{name}", "token": TOKEN, **more}


def reload(receiver, config):
    """Have a receiver read another configuration; return the line that says what came of it."""
    lines = len(receiver.stderr_lines)
    receiver.write_config(config)
    receiver.process.send_signal(signal.SIGHUP)
    return receiver.wait_for_log("configuration (not )?reloaded", start=lines)


class TimeStamps(unittest.TestCase):
    def test_every_form_is_understood(self):
        table = {
            "2016-07-12T13:14:19-07:00": 1468354459,
            "2016-07-12T20:14:19Z": 1468354459,
            "2016-07-12T20:14:19+00:00": 1468354459,
            "2016-07-12T20:14:19": 1468354459,
            "2016-07-13T01:44:19+05:30": 1468354459,
            "2016-07-12T23:59:19+03:45": 1468354459,
            "2016-07-12T20:14:19.5Z": 1468354459.5,
            "2016-07-12 20:14:19 +0000 UTC": 1468354459,
            "2016-07-12 20:14:19.5 +0000 UTC": 1468354459.5,
            "Tue, 12 Jul 2016 20:14:19 GMT": 1468354459,
            "1468354459000000": 1468354459,
            "1468354459000000000": 1468354459,
            "2016-07-12T20:14:19.123Z": 1468354459.123,
            "2016-07-12T20:14:19.123456Z": 1468354459.123456,
            "2016-07-12T13:14:19.123456789-07:00": 1468354459.123456789,
            "2016-07-12T20:14:19.25": 1468354459.25,
            "2016-02-29T00:00:00Z": 1456704000,
            "1970-01-01T00:00:00Z": 0,
            "1468354459": 1468354459,
            "1468354459000": 1468354459,
            "1468354459123": 1468354459.123,
        }
        for text, expected in table.items():
            with self.subTest(text):
                found = product.parse_timestamp(text)
                self.assertIsNotNone(found)
                self.assertAlmostEqual(found, expected, places=5)

    def test_what_is_no_time_stamp_is_not_understood(self):
        for text in (
            "",
            " ",
            "yesterday",
            "now",
            "nan",
            "inf",
            "-inf",
            "1e9",
            "0x5784",
            "+1468354459",
            "-1468354459",
            "1_468_354_459",
            "\uff11\uff14\uff16\uff18\uff13\uff15\uff14\uff14\uff15\uff19",
            "\u0661\u0664\u0666\u0668\u0663\u0665\u0664\u0664\u0665\u0669",
            "1468354459s",
            "9" * 400,
            "9" * 5000,
            "2016-13-12T13:14:19Z",
            "2016-00-12T13:14:19Z",
            "2016-07-32T13:14:19Z",
            "2015-02-29T13:14:19Z",
            "0000-01-01T00:00:00Z",
            "2016-07-12T25:14:19Z",
            "2016-07-12T13:60:19Z",
            "2016-07-12T13:14:61Z",
            "2016-07-12T13:14:19+25:00",
            "2016-07-12T13:14:19+00:60",
            "2016-07-12T13:14:19+",
            "2016-07-12T13:14:19+x",
            "2016-07-12T13:14:19 PST",
            "2016-07-12T13:14:19ZZ",
            "2016-07-12T13:14:19.Z",
            "2016-07-12T13:14:19\n",
            "2016-07-12T13:14:19Z\0",
            "x2016-07-12T13:14:19Z",
            "12.07.2016 13:14:19",
            "07/12/2016 13:14:19",
            "20\uff116-07-12T13:14:19Z",
            "2016-07-12T13:14:19." + "9" * 5000 + "Z",
        ):
            with self.subTest(text[:40]):
                self.assertIsNone(product.parse_timestamp(text))

    def test_the_ends_of_the_calendar_raise_nothing(self):
        for text in (
            "0001-01-01T00:00:00+23:59",
            "9999-12-31T23:59:59-23:59",
            "9999-12-31T23:59:59.999999999Z",
        ):
            with self.subTest(text):
                found = product.parse_timestamp(text)
                self.assertTrue(found is None or abs(found) < 1e12)


class Memory(LogCase):
    """Nothing is accepted twice (section 6 of the contract); one receiver for those that need no
    special one.
    """

    @classmethod
    def setUpClass(cls):
        webhooks = [
            {"name": "noc", "path": PATH, "token": TOKEN},
            {
                "name": "new",
                "type": "new-central",
                "path": "/new",
                "token": TOKEN,
                "public_url": URL,
            },
        ]
        cls.running = Receiver(config_of(webhook=webhooks, log_file="alerts.jsonl")).__enter__()
        cls.addClassCleanup(cls.running.__exit__)

    def setUp(self):
        super().setUp()
        self.before = len(self.read_log(self.running.folder / "alerts.jsonl"))

    def new_lines(self):
        """Return the lines that this test has added to the log of the one receiver."""
        return self.read_log(self.running.folder / "alerts.jsonl")[self.before :]

    def test_a_repetition_is_answered_with_duplicate_and_written_nowhere(self):
        receiver, body, last_body = self.running, new_body(), new_body()
        headers, last = central_headers(body), central_headers(last_body)
        self.assertEqual(receiver.post(body, headers).json, OK)
        for _ in range(3):
            answer = receiver.post(body, headers)
            self.assertEqual((answer.status, answer.json), (200, DUPLICATE))
        self.assertEqual(receiver.post(last_body, last).json, OK)
        ids = [one["X-Central-Delivery-ID"] for one in (headers, last)]
        deadline_poll(lambda: any(ids[1] in line for line in receiver.stdout_lines))
        shown = [json.loads(line)["delivery_id"] for line in receiver.stdout_lines]
        self.assertEqual([one for one in shown if one in ids], ids)
        self.assertEqual([line["delivery_id"] for line in self.new_lines()], ids)

    def test_a_classic_delivery_is_known_by_its_signature_and_by_its_id_with_the_body(self):
        body, stamp = new_body(), now_stamp(-60)
        first = central_headers(
            body, delivery_id="72d3162e-cc78-11e3-81ab-4c9367dc0958", timestamp=stamp
        )
        shifted = {
            "a byte moved from the service to the ID": {
                "X-Central-Service": "Alert",
                "X-Central-Delivery-ID": "s" + first["X-Central-Delivery-ID"],
            },
            "a byte moved from the ID to the service": {
                "X-Central-Service": "Alerts7",
                "X-Central-Delivery-ID": first["X-Central-Delivery-ID"][1:],
            },
        }
        other_id = "81d3162e-cc78-11e3-81ab-4c9367dc0958"
        same_id = first["X-Central-Delivery-ID"]
        other_body = new_body()
        cases = [
            ("the same bytes", body, first, DUPLICATE),
            *((name, body, {**first, **change}, DUPLICATE) for name, change in shifted.items()),
            (
                "a byte moved from the service to the body",
                body + b"A",
                {**first, "X-Central-Service": "lerts"},
                DUPLICATE,
            ),
            (
                "signed anew",
                body,
                central_headers(body, delivery_id=same_id, timestamp=now_stamp(-30)),
                DUPLICATE,
            ),
            (
                "another event and customer, which nobody signs",
                body,
                {**first, "X-Central-Event": "x"},
                DUPLICATE,
            ),
            (
                "the ID with another body",
                other_body,
                central_headers(other_body, delivery_id=same_id, timestamp=stamp),
                OK,
            ),
            (
                "the body under another ID",
                body,
                central_headers(body, delivery_id=other_id, timestamp=stamp),
                OK,
            ),
        ]
        self.assertEqual(self.running.post(body, first).json, OK)
        for name, sent, headers, expected in cases:
            with self.subTest(name):
                answer = self.running.post(sent, headers)
                self.assertEqual((answer.status, answer.json), (200, expected))
        self.assertEqual(len(self.new_lines()), 3)

    def test_two_alerts_under_one_new_central_signature_are_both_accepted(self):
        headers = new_central_headers(time.time())
        for body in (new_body(), new_body()):
            self.assertEqual(self.running.post(body, headers, "/new").json, OK)
        self.assertEqual(len(self.new_lines()), 2)

    def test_a_twin_of_a_delivery_in_progress_is_asked_to_come_again(self):
        body = new_body(filler="x" * 300_000)  # more than a pipe takes
        headers = central_headers(body)
        again = central_headers(
            body, delivery_id=headers["X-Central-Delivery-ID"], timestamp=now_stamp(-9)
        )
        read_end, write_end = os.pipe()
        with open(read_end, "rb") as reader, self.receiver(stdout=write_end) as receiver:
            os.close(write_end)
            with receiver.connect() as connection:
                connection.send(raw_request(headers=headers, body=body))
                select.select([reader], [], [], 10)  # it is being written
                for name, twin in (("the same bytes", headers), ("signed anew", again)):
                    with self.subTest(name):
                        answer = receiver.post(body, twin)
                        self.assertEqual(
                            (answer.status, answer.headers.get("retry-after")), (503, "1")
                        )
                shown = []
                reading = threading.Thread(target=lambda: shown.append(reader.read()), daemon=True)
                reading.start()
                self.assertEqual(connection.read().json, OK)
            for twin in (headers, again):
                self.assertEqual(receiver.post(body, twin).json, DUPLICATE)
            receiver.process.kill()
            reading.join(10)
            self.assertEqual(
                [json.loads(line)["alert"] for line in shown[0].splitlines()], [json.loads(body)]
            )
        self.assertEqual(len(self.read_log()), 1)


class Restarts(LogCase):
    """What the memory is rebuilt from."""

    def test_what_a_restart_remembers_of_each_type(self):
        stamp, created = now_stamp(-5), time.time() - 5
        bodies = {
            name: new_body(sender=name)
            for name in ("central", "new-central", "ip-fabric", "bracken", "entrupy")
        }
        signed_anew = central_headers(
            bodies["central"], delivery_id="one-id", timestamp=now_stamp()
        )
        rows = [  # type, headers of the first, headers of the repetition, is it remembered
            (
                "central",
                central_headers(bodies["central"], delivery_id="one-id", timestamp=stamp),
                signed_anew,
                True,
            ),
            ("new-central", new_central_headers(created), new_central_headers(created + 3), True),
            (
                "ip-fabric",
                ip_fabric_headers(bodies["ip-fabric"]),
                ip_fabric_headers(bodies["ip-fabric"]),
                True,
            ),
            (
                "bracken",
                bracken_headers(bodies["bracken"]),
                bracken_headers(bodies["bracken"]),
                False,
            ),
            (
                "entrupy",
                entrupy_headers(bodies["entrupy"]),
                entrupy_headers(bodies["entrupy"]),
                False,
            ),
        ]
        webhooks = [
            {
                "name": f'Büro "{kind}"',
                "type": kind,
                "path": f"/{kind}",
                "token": TOKEN,
                **({"public_url": URL} if kind == "new-central" else {}),
            }
            for kind in bodies
        ]
        for restarted in (False, True):
            with self.receiver(webhooks) as receiver:
                for kind, first, again, is_remembered in rows:
                    with self.subTest(kind, restarted=restarted):
                        if not restarted:
                            self.assertEqual(
                                receiver.post(bodies[kind], first, f"/{kind}").json, OK
                            )
                        for headers in (first, again):
                            answer = receiver.post(bodies[kind], headers, f"/{kind}")
                            self.assertEqual(
                                (answer.status, answer.json),
                                (200, DUPLICATE if is_remembered else OK),
                            )
        kinds = [line["type"] for line in self.read_log()]
        self.assertEqual(
            {kind: kinds.count(kind) for kind in bodies},
            {**dict.fromkeys(bodies, 1), "bracken": 5, "entrupy": 5},
        )

    def test_each_webhook_has_a_memory_of_its_own_also_after_a_restart(self):
        body = new_body()
        headers = central_headers(body)
        webhooks = [
            {"name": name, "path": f"/{name}", "token": TOKEN}
            for name in ("north", "south", "east")
        ]
        with self.receiver(webhooks) as receiver:
            for path in ("/north", "/south"):
                self.assertEqual(receiver.post(body, headers, path).json, OK)
                self.assertEqual(receiver.post(body, headers, path).json, DUPLICATE)
        with self.receiver(webhooks) as receiver:
            for path, expected in (("/north", DUPLICATE), ("/south", DUPLICATE), ("/east", OK)):
                self.assertEqual(receiver.post(body, headers, path).json, expected)
        self.assertEqual([line["webhook"] for line in self.read_log()], ["north", "south", "east"])

    def test_an_alert_that_imitates_a_line_of_the_log_plants_nothing_in_the_memory(self):
        webhook = {"name": "fabric", "type": "ip-fabric", "path": PATH, "token": TOKEN}
        victim, signed, kept = kept_deliveries()[2]
        line = kept.decode().rstrip("\n")
        imitations = [
            line.encode(),
            json.dumps({"text": line}).encode(),
            ("[" + line + "]").encode(),
            json.dumps({"key": json.loads(line)["key"]}).encode(),
            b'{"a": 1}\n' + line.encode() + b"\n",
        ]
        with self.receiver(webhook) as receiver:
            for body in imitations:
                self.assertEqual(receiver.post(body, ip_fabric_headers(body)).json, OK)
        with self.receiver(webhook) as receiver:
            for body in imitations:
                self.assertEqual(receiver.post(body, ip_fabric_headers(body)).json, DUPLICATE)
            self.assertEqual(receiver.post(victim, signed).json, OK)

    def test_lines_that_are_none_of_ours_do_not_keep_the_memory_from_being_rebuilt(self):
        body, headers, line = kept_deliveries()[0]
        foreign = [
            b"",
            b"null",
            b"[]",
            b'{"webhook": "noc"}',
            b'{"webhook": "noc", "key": 7}',
            b"\xff\xfe",
            b"\0" * 100,
        ]
        self.log.write_bytes(b"\n".join(foreign) + b"\n" + line + b"\n".join(foreign) + b"\n")
        with self.receiver() as receiver:
            self.assertEqual(receiver.post(body, headers).json, DUPLICATE)

    def test_a_long_log_is_read_from_its_end(self):
        deliveries = kept_deliveries()[:2]
        (_, _, oldest), (_, _, newest) = deliveries
        key = json.loads(newest)["key"].encode()
        other = newest.replace(key, re.sub(rb"[0-9a-f]{8}", b"(number)", key))
        others = (other.replace(b"(number)", b"%08x" % number) for number in range(99_998))
        with open(self.log, "wb") as file:
            try:
                file.truncate(
                    64 << 30
                )  # a part of 64 GiB that takes no space, and far too long to read
            except OSError as error:
                self.skipTest(f"no sparse files: {error}")
            file.seek(64 << 30)
            file.write(b"\n" + oldest)
            file.writelines(others)
            file.write(newest)
        with self.receiver() as receiver:
            for body, headers, _ in deliveries:  # the first is the hundred thousandth from the end
                self.assertEqual(receiver.post(body, headers).json, DUPLICATE)
            self.assertEqual(receiver.deliver().json, OK)


class MemoryOverReloads(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        """Make a delivery that a former receiver has kept, and the line of its log."""
        cls.body = new_body()
        cls.headers = central_headers(cls.body)
        with Receiver(config_of(webhook=hook("a"), log_file="out.jsonl")) as receiver:
            assert receiver.post(cls.body, cls.headers, "/a").json == OK
            cls.line = (receiver.folder / "out.jsonl").read_bytes()

    def test_a_log_that_a_reload_brings_is_remembered(self):
        with Receiver(config_of(webhook=hook("a"))) as receiver:
            (receiver.folder / "out.jsonl").write_bytes(self.line)
            reload(receiver, config_of(webhook=hook("a"), log_file="out.jsonl"))
            self.assertEqual(receiver.post(self.body, self.headers, "/a").json, DUPLICATE)
            body = new_body()
            self.assertEqual(receiver.post(body, central_headers(body), "/a").json, OK)

    def test_another_webhook_that_fills_the_log_displaces_nothing(self):
        now = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime())
        line = {
            "received_at": now,
            "webhook": "b",
            "type": "bracken",
            "delivery_id": None,
            "sent_at": None,
        }
        others = (json.dumps({**line, "alert": {}, "key": None}) + "\n").encode() * 210_000
        with Receiver(config_of()) as receiver:
            (receiver.folder / "out.jsonl").write_bytes(self.line + others)
            webhooks = [hook("a"), hook("b", type="bracken")]
            said = reload(receiver, config_of(webhook=webhooks, log_file="out.jsonl"))
            self.assertIn("configuration reloaded", said)
            self.assertEqual(receiver.post(self.body, self.headers, "/a").json, DUPLICATE)
