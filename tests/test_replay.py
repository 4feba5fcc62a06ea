"""Replay protection: signed times, the age of a delivery, duplicates, what a restart remembers."""

from __future__ import annotations

import base64
import functools
import json
import os
import re
import time
import unittest

import central_webhook_client as product
from tests.support import (
    DUPLICATE,
    OK,
    PATH,
    TOKEN,
    LogTest,
    Receiver,
    ReceiverTest,
    UnreadStdout,
    central_headers,
    config_of,
    hmac_sha256,
    hook,
    ids_of,
    new_body,
    now_stamp,
    raw_request,
    signed,
)

URL = "https://www.example.com/centralwebhook"
MOMENT = 1468354459  # 2016-07-12T20:14:19Z


def new_central_headers(created):
    """Sign as new Central does: not the body, only where it goes and when."""
    parameters = f'("@method" "@target-uri");created={int(created)};alg="hmac-sha256"'
    base = f'"@method": POST\n"@target-uri": {URL}\n"@signature-params": {parameters}'
    signature = base64.b64encode(hmac_sha256(TOKEN, base.encode())).decode()
    return {"Signature-Input": f"sig1={parameters}", "Signature": f"sig1=:{signature}:"}


def one_header(webhook_type, body):
    """Sign as one of the senders with one header does."""
    digest = hmac_sha256(TOKEN, body)
    encoded = base64.b64encode(digest).decode()
    return {
        "ip-fabric": {"X-IPF-Signature": digest.hex()},
        "mist": {"X-Mist-Signature-v2": digest.hex()},
        "bracken": {"Authorization": "HMACSHA256 " + encoded},
        "entrupy": {"Entrupy-Signature": "SHA256:" + encoded},
    }[webhook_type]


def central_time(offset_seconds, zone_hours, zone):
    """Return a time `offset_seconds` from now as a clock in another zone shows it."""
    shown = time.gmtime(time.time() + offset_seconds + zone_hours * 3600)
    return time.strftime("%Y-%m-%dT%H:%M:%S", shown) + zone


class Times(unittest.TestCase):
    def test_every_form_is_understood(self):
        table = {
            "2016-07-12T13:14:19-07:00": MOMENT,
            "2016-07-12T20:14:19Z": MOMENT,
            "2016-07-12T20:14:19+00:00": MOMENT,
            "2016-07-12T20:14:19": MOMENT,
            "2016-07-13T01:44:19+05:30": MOMENT,
            "2016-07-12T23:59:19+03:45": MOMENT,
            "2016-07-12T20:14:19.5Z": MOMENT + 0.5,
            "2016-07-12 20:14:19 +0000 UTC": MOMENT,
            "2016-07-12 20:14:19.5 +0000 UTC": MOMENT + 0.5,
            "2016-07-12 13:14:19 -0700 PDT": MOMENT,
            "Tue, 12 Jul 2016 20:14:19 GMT": MOMENT,
            "2016-07-12T20:14:19.123456Z": MOMENT + 0.123456,
            "2016-07-12T13:14:19.123456789-07:00": MOMENT + 0.123456789,
            "2016-07-12T20:14:19.25": MOMENT + 0.25,
            "2016-02-29T00:00:00Z": 1456704000,
            "1970-01-01T00:00:00Z": 0,
            "1468354459": MOMENT,
            "1468354459123": MOMENT + 0.123,
            "1468354459000000": MOMENT,
            "1468354459000000000": MOMENT,
        }
        for text, expected in table.items():
            with self.subTest(text):
                self.assertAlmostEqual(product.parse_timestamp(text), expected, places=5)

    def test_anything_else_is_not_understood(self):
        words = ["", " ", "yesterday", "now", "nan", "inf", "-inf", "1e9", "0x5784", "1468354459s"]
        numbers = ["+1468354459", "-1468354459", "1_468_354_459", "9" * 400, "9" * 5000]
        digits = ["\uff11\uff14\uff16\uff18\uff13\uff15\uff14\uff14\uff15\uff19"]
        digits += ["\u0661\u0664\u0666\u0668\u0663\u0665\u0664\u0664\u0665\u0669"]
        dates = [
            *("2016-13-12T13:14:19Z", "2016-00-12T13:14:19Z", "2016-07-32T13:14:19Z"),
            *("2015-02-29T13:14:19Z", "0000-01-01T00:00:00Z", "2016-07-12T25:14:19Z"),
            *("2016-07-12T13:60:19Z", "2016-07-12T13:14:61Z", "2016-07-12T13:14:19+25:00"),
            *("2016-07-12T13:14:19+00:60", "2016-07-12T13:14:19+", "2016-07-12T13:14:19+07:"),
            *("2016-07-12T13:14:19 PST", "2016-07-12T13:14:19ZZ", "2016-07-12T13:14:19.Z"),
            *("2016-07-12T13:14:19\n", "2016-07-12T13:14:19Z\0", "x2016-07-12T13:14:19Z"),
            *("12.07.2016 13:14:19", "07/12/2016 13:14:19", "20\uff116-07-12T13:14:19Z"),
            "2016-07-12T13:14:19." + "9" * 5000 + "Z",
        ]
        for text in (*words, *numbers, *digits, *dates):
            with self.subTest(text[:40]):
                self.assertIsNone(product.parse_timestamp(text))

    def test_the_ends_of_the_calendar_raise_nothing(self):
        ends = ("0001-01-01T00:00:00+23:59", "9999-12-31T23:59:59-23:59")
        for text in (*ends, "9999-12-31T23:59:59.999999999Z"):
            with self.subTest(text):
                found = product.parse_timestamp(text)
                self.assertTrue(found is None or abs(found) < 1e12)


class Age(ReceiverTest):
    config = config_of(
        webhook=[
            hook("noc"),
            hook("half-an-hour", replay_window_hours=0.5),
            hook("any-age", replay_window_hours=0),
        ]
    )

    def assert_statuses(self, path, table):
        for stamp, status in table.items():
            body = new_body()
            with self.subTest(stamp[:40]):
                headers = central_headers(body, timestamp=stamp)
                self.assertEqual(self.receiver.post(body, headers, path).status, status)

    def test_a_delivery_is_at_most_48_hours_old_and_15_minutes_ahead(self):
        hours = {0: 200, -27: 200, -47.9: 200, -48.1: 401, -1000: 401}
        minutes = {1: 200, 14: 200, 16: 401, 10**5: 401}
        table = {now_stamp(number * 3600): status for number, status in hours.items()}
        table.update({now_stamp(number * 60): status for number, status in minutes.items()})
        self.assert_statuses("/noc", table)

    def test_the_window_can_be_configured(self):
        minutes = {-29: 200, -31: 401, 14: 200, 16: 401}
        table = {now_stamp(number * 60): status for number, status in minutes.items()}
        self.assert_statuses("/half-an-hour", table)

    def test_with_a_window_of_0_no_time_is_refused(self):
        stamps = (now_stamp(-(10**8)), now_stamp(10**8), "yesterday", "0", "2016-99-99T00:00:00Z")
        self.assert_statuses("/any-age", dict.fromkeys(stamps, 200))

    def test_the_time_counts_with_its_zone(self):
        utc = now_stamp()[:-1]
        milliseconds = f"{time.time() * 1000:.0f}"
        good = [utc, utc + ".123Z", utc + ".123456+00:00", milliseconds[:-3], milliseconds]
        good += [central_time(0, -7, "-07:00"), central_time(0, 5.5, "+05:30")]
        bad = ["yesterday", "0", "-1", "nan", "1e9", "9" * 300, utc + "+99:00"]
        bad += [central_time(0, 7, "+00:00")]
        self.assert_statuses("/noc", {**dict.fromkeys(good, 200), **dict.fromkeys(bad, 401)})


class Duplicates(ReceiverTest):
    config = config_of(webhook=hook("noc"))

    def assert_answer(self, expected, body, headers):
        answer = self.receiver.post(body, headers, "/noc")
        self.assertEqual((answer.status, answer.json), (200, expected))

    def test_a_duplicate_is_answered_with_200_and_not_written(self):
        body, headers = signed()
        self.assert_answer(OK, body, headers)
        for _ in range(3):
            self.assert_answer(DUPLICATE, body, headers)
        last, last_headers = signed()
        self.assert_answer(OK, last, last_headers)
        self.wait_for_line(last)
        self.wait_for_line(body)  # the only one

    def test_a_classic_delivery_is_known_by_its_signature_and_by_its_id_with_the_body(self):
        body, other, stamp = new_body(), new_body(), now_stamp(-60)
        first = central_headers(body, delivery_id="72d3", timestamp=stamp)

        def changed(**changes):
            return {**first, **{f"X-Central-{name}": value for name, value in changes.items()}}

        def moved(service, delivery_id):
            return changed(Service=service, **{"Delivery-ID": delivery_id})

        anew = central_headers(body, delivery_id="72d3", timestamp=now_stamp(-30))
        other_body = central_headers(other, delivery_id="72d3", timestamp=stamp)
        other_id = central_headers(body, delivery_id="81d3", timestamp=stamp)
        self.assert_answer(OK, body, first)
        for what, sent, headers, expected in (
            ("the same bytes", body, first, DUPLICATE),
            ("signed anew", body, anew, DUPLICATE),
            ("moved from service to ID", body, moved("Alert", "s72d3"), DUPLICATE),
            ("moved from ID to service", body, moved("Alerts7", "2d3"), DUPLICATE),
            ("moved from service to body", body + b"A", changed(Service="lerts"), DUPLICATE),
            ("another event", body, changed(Event="x"), DUPLICATE),
            ("another customer", body, {**first, "X-Central-Customer-ID": "x"}, DUPLICATE),
            ("the ID with another body", other, other_body, OK),
            ("the body under another ID", body, other_id, OK),
        ):
            with self.subTest(what):
                self.assert_answer(expected, sent, headers)

    def test_what_was_refused_is_not_remembered(self):
        body = new_body()
        headers = central_headers(body)
        stale = central_headers(body, delivery_id="z", timestamp=now_stamp(-50 * 3600))
        for refused in ({**headers, "X-Central-Signature": "x"}, stale):
            self.assertEqual(self.receiver.post(body, refused, "/noc").status, 401)
        self.assert_answer(OK, body, headers)
        self.assert_answer(OK, body, central_headers(body, delivery_id="z"))


class Twins(LogTest):
    def test_a_twin_of_a_delivery_that_is_being_stored_is_asked_to_come_again(self):
        body, headers = signed(filler="x" * UnreadStdout.HUGE)
        delivery_id = headers["X-Central-Delivery-ID"]
        anew = central_headers(body, delivery_id=delivery_id, timestamp=now_stamp(-9))
        with UnreadStdout(self.config()) as (stdout, receiver), receiver.connect() as connection:
            connection.send(raw_request(headers=headers, body=body))
            stdout.wait_until_written()
            for twin in (headers, anew):
                answer = receiver.post(body, twin)
                self.assertEqual((answer.status, answer.headers.get("retry-after")), (503, "1"))
            stdout.read_on()
            self.assertEqual(connection.read().json, OK)
            for twin in (headers, anew):
                self.assertEqual(receiver.post(body, twin).json, DUPLICATE)
            self.assertEqual(ids_of(stdout.end()), [delivery_id])
        self.assertEqual(ids_of(self.read_log()), [delivery_id])


@functools.lru_cache(maxsize=None)
def stored_deliveries():
    """Have a receiver store two deliveries of "noc" and one of "fabric".

    Returns body, headers and log line of each.
    """
    webhooks = [
        {"name": "noc", "path": PATH, "token": TOKEN},
        hook("fabric", type="ip-fabric"),
    ]
    deliveries = [(*signed(), PATH), (*signed(), PATH)]
    body = new_body()
    deliveries.append((body, one_header("ip-fabric", body), "/fabric"))
    with Receiver(config_of(webhook=webhooks, log_file="alerts.jsonl")) as receiver:
        for delivery in deliveries:
            assert receiver.post(*delivery).json == OK
        lines = (receiver.folder / "alerts.jsonl").read_bytes().splitlines(keepends=True)
    return [(body, headers, line) for (body, headers, _), line in zip(deliveries, lines)]


class Restarts(LogTest):
    """What is remembered of the log."""

    def test_each_type_is_remembered_by_what_identifies_it_also_after_a_restart(self):
        created, stamp = time.time() - 5, now_stamp(-5)
        kinds = ("central", "new-central", "ip-fabric", "mist", "bracken", "entrupy")
        bodies = {kind: new_body(sender=kind) for kind in kinds}
        webhooks = [{**hook(kind, type=kind), "name": f'Büro "{kind}"'} for kind in kinds]
        webhooks[1]["public_url"] = URL
        anew = {kind: one_header(kind, bodies[kind]) for kind in kinds[2:]}
        anew["central"] = central_headers(bodies["central"], delivery_id="one-id")
        anew["new-central"] = new_central_headers(created + 3)
        first = {**anew, "new-central": new_central_headers(created)}
        first["central"] = central_headers(bodies["central"], delivery_id="one-id", timestamp=stamp)
        for is_restarted in (False, True):
            with self.started(webhooks) as receiver:
                for kind in kinds:
                    path, body = f"/{kind}", bodies[kind]
                    repeated = OK if kind in ("bracken", "entrupy") else DUPLICATE
                    with self.subTest(kind, is_restarted=is_restarted):
                        if not is_restarted:
                            self.assertEqual(receiver.post(body, first[kind], path).json, OK)
                        for headers in (first[kind], anew[kind]):
                            self.assertEqual(receiver.post(body, headers, path).json, repeated)
                other = new_body()
                self.assertEqual(receiver.post(other, anew["new-central"], "/new-central").json, OK)

    def test_each_webhook_remembers_its_own_deliveries(self):
        body, headers = signed()
        webhooks = [hook("north"), hook("south"), hook("east")]
        with self.started(webhooks) as receiver:
            for path in ("/north", "/south"):
                self.assertEqual(receiver.post(body, headers, path).json, OK)
                self.assertEqual(receiver.post(body, headers, path).json, DUPLICATE)
        with self.started(webhooks) as receiver:
            for path, expected in (("/north", DUPLICATE), ("/south", DUPLICATE), ("/east", OK)):
                self.assertEqual(receiver.post(body, headers, path).json, expected)

    def test_an_alert_that_imitates_a_line_of_the_log_plants_nothing(self):
        webhook = hook("fabric", type="ip-fabric")
        victim, headers, stored = stored_deliveries()[2]
        line = stored.decode().rstrip("\n")
        imitations = [
            line.encode(),
            json.dumps({"text": line}).encode(),
            f"[{line}]".encode(),
            json.dumps({"key": json.loads(line)["key"]}).encode(),
            b'{"a": 1}\n' + stored,
        ]
        for expected in (OK, DUPLICATE):
            with self.started(webhook) as receiver:
                for body in imitations:
                    answer = receiver.post(body, one_header("ip-fabric", body), "/fabric")
                    self.assertEqual(answer.json, expected)
                if expected == DUPLICATE:
                    self.assertEqual(receiver.post(victim, headers, "/fabric").json, OK)

    def test_foreign_lines_are_passed_over(self):
        body, headers, line = stored_deliveries()[0]
        foreign = [b"", b"null", b"[]", b'{"webhook": "noc"}', b'{"webhook": "noc", "key": 7}']
        foreign = b"\n".join([*foreign, b"\xff\xfe", b"\0" * 100, b""])
        self.log.write_bytes(foreign + line + foreign)
        with self.started() as receiver:
            self.assertEqual(receiver.post(body, headers).json, DUPLICATE)

    def test_a_whole_line_without_its_line_feed_is_remembered_and_half_a_line_is_not(self):
        (_, _, first), (body, headers, last), _ = stored_deliveries()
        for cut, expected in ((1, DUPLICATE), (2, OK)):
            self.log.write_bytes(first + last[:-cut])
            with self.subTest(cut=cut), self.started() as receiver:
                self.assertEqual(receiver.post(body, headers).json, expected)
                self.assertEqual(receiver.post(body, headers).json, DUPLICATE)
                self.assertEqual(receiver.deliver().json, OK)
            self.assertEqual(len(self.read_log()), 3)

    def test_a_log_that_gives_nothing_to_remember_is_a_warning_and_stays(self):
        data = b'{"from": "another program"}\nnot JSON at all\n\n'
        self.log.write_bytes(data)
        with self.started() as receiver:
            receiver.wait_for_log("WARNING nothing remembered from ")
            self.assertEqual(receiver.deliver().status, 200)
        self.assertTrue(self.log.read_bytes().startswith(data + b"{"))

    def test_a_log_that_a_reload_brings_is_remembered(self):
        body, headers, line = stored_deliveries()[0]
        with Receiver() as receiver:
            self.log.write_bytes(line)
            receiver.reload(self.config())
            self.assertEqual(receiver.post(body, headers).json, DUPLICATE)
            self.assertEqual(receiver.deliver().json, OK)

    def test_a_window_that_a_reload_widens_is_remembered_whole(self):
        body, headers, line = stored_deliveries()[0]
        hours_ago = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(time.time() - 5 * 3600))
        self.log.write_bytes(re.sub(rb'(?<="received_at": ")[^"]*', hours_ago.encode(), line))
        webhook = {"name": "noc", "path": PATH, "token": TOKEN}
        with self.started({**webhook, "replay_window_hours": 1}) as receiver:
            receiver.reload(self.config(webhook))
            self.assertEqual(receiver.post(body, headers).json, DUPLICATE)

    def test_a_log_that_a_reload_may_not_use_is_not_remembered(self):
        body, headers = signed()
        own = self.config(log_file=str(self.folder / "own.jsonl"))
        with self.started() as other, Receiver(own) as receiver:
            self.assertEqual(other.post(body, headers).json, OK)
            receiver.reload(self.config(), "not reloaded.*another receiver")
            self.assertEqual(receiver.post(body, headers).json, OK)

    def test_a_webhook_that_was_away_remembers_what_the_log_holds(self):
        both = self.config([hook("a"), hook("b")])
        body, headers = signed()
        with Receiver(both) as receiver:
            self.assertEqual(receiver.post(body, headers, "/a").json, OK)
            receiver.reload(self.config(hook("b")))
            self.assertEqual(receiver.post(body, headers, "/a").status, 404)
            receiver.reload(both)
            self.assertEqual(receiver.post(body, headers, "/a").json, DUPLICATE)
            self.assertEqual(receiver.post(body, headers, "/b").json, OK)
        self.assertEqual(len(self.read_log()), 2)

    def test_a_webhook_that_fills_the_log_displaces_nothing_of_another(self):
        body, headers, line = stored_deliveries()[0]
        start = {"received_at": now_stamp()[:-1] + ".000Z", "webhook": "users", "type": "bracken"}
        rest = {"delivery_id": None, "sent_at": None, "alert": {}, "key": None}
        others = (json.dumps({**start, **rest}) + "\n").encode() * 110_000
        self.log.write_bytes(line + others)
        webhooks = [{"name": "noc", "path": PATH, "token": TOKEN}, hook("users", type="bracken")]
        with self.started(webhooks) as receiver:
            self.assertEqual(receiver.post(body, headers).json, DUPLICATE)

    def test_a_log_that_shrinks_while_it_is_read_does_no_harm(self):
        self.log.write_bytes(b"line\n" * 1_000_000)
        lines = product.lines_from_end(self.log)
        self.assertEqual([next(lines), next(lines)], [b"", b"line"])
        os.truncate(self.log, 0)
        self.assertLess(len(list(lines)), 500_000)

    def test_the_last_100_000_are_remembered_from_the_end_of_a_long_log(self):
        deliveries = stored_deliveries()[:2]
        (_, _, oldest), (_, _, newest) = deliveries
        key = json.loads(newest)["key"].encode()
        other = newest.replace(key, re.sub(rb"[0-9a-f]{8}", b"(number)", key))
        with open(self.log, "wb") as file:
            try:
                file.truncate(64 << 30)  # takes no space, and far too long to read
            except OSError as error:
                self.skipTest(f"no sparse files: {error}")
            file.seek(64 << 30)
            file.write(b"\n" + oldest)
            file.writelines(other.replace(b"(number)", b"%08x" % n) for n in range(99_998))
            file.write(newest)
        with self.started() as receiver:
            for body, headers, _ in deliveries:
                self.assertEqual(receiver.post(body, headers).json, DUPLICATE)
            self.assertEqual(receiver.deliver().json, OK)
