"""The senders with one header, end to end: vectors, and negatives that change one thing."""

from __future__ import annotations

import base64
import hashlib
import hmac
import unittest

from tests.support import Receiver, raw_request

IP_FABRIC_BODY = (
    b'{"type":"snapshot","action":"discover","status":"completed","requester":"cron",'
    b'"timestamp":1618884473000,"test":true}'
)
OTHER_SENDERS = {  # type: (header, value, secret, body), all from OpenSSL
    "mist": (
        "X-Mist-Signature-v2",
        "114da1df5614af609913b6149f1b3c917ea715642cdf01badbef70d0b36601db",
        "mist-secret",
        b'{"topic":"alarms","events":[{"type":"device_down","timestamp":1700000000}]}',
    ),
    "ip-fabric": (
        "X-IPF-Signature",
        "5c0104579a7ac4d8bd29cafd5af40b39e105e83f5b8bfdb3aca8d930975cf436",
        "0123456789",
        IP_FABRIC_BODY,
    ),
    "bracken": (
        "Authorization",
        "HMACSHA256 fmyf9i/bmiQdhNXGjN5vhbhzQuI3N2vGr7ZgTPUc1jE=",
        "12345",
        b'{"username":"Test-User"}',
    ),
    "entrupy": (
        "Entrupy-Signature",
        "SHA256:POVH2Ld0WOWNwYvLCXzh8NZUFS3ak9xL1tjLD03/liY=",
        "your-secret-key-here",
        b'{"event":"session.completed"}',
    ),
}


class OtherSendersEndToEnd(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        webhooks = [
            {"name": kind, "type": kind, "path": "/" + kind, "token": secret}
            for kind, (_, _, secret, _) in OTHER_SENDERS.items()
        ]
        config = {
            "webclient_info": {"host": "127.0.0.1", "port": 0},
            "central_info": {"webhook": webhooks},
        }
        cls.receiver = Receiver(config).__enter__()
        cls.addClassCleanup(cls.receiver.__exit__)

    def status(self, kind, headers, body):
        return self.receiver.request(raw_request("POST", "/" + kind, headers, body)).status

    def test_the_vectors_are_accepted(self):
        for kind, (header, value, _, body) in OTHER_SENDERS.items():
            for name in (header, header.lower(), header.upper()):
                with self.subTest(kind, header=name):
                    self.assertEqual(self.status(kind, {name: value}, body), 200)

    def test_one_thing_changed_is_refused(self):
        for kind, (header, value, _, body) in OTHER_SENDERS.items():
            prefix, _, encoded = value.rpartition(":" if ":" in value else " ")
            mark = value[len(prefix) : len(value) - len(encoded)]
            cases = {
                "no header": ([], body),
                "an empty header": ([(header, "")], body),
                "the header twice": ([(header, value), (header, value)], body),
                "the header twice, the first one good": ([(header, value), (header, "x")], body),
                "another body": ([(header, value)], body + b" "),
                "no body": ([(header, value)], b""),
                "the other case": ([(header, value.swapcase())], body),
                "upper case": ([(header, prefix + mark + encoded.upper())], body),
                "the last character missing": ([(header, value[:-1])], body),
                "a character more": ([(header, value + "=")], body),
                "a wrong prefix": ([(header, "MD5" + mark + encoded)], body),
                "a prefix too many": ([(header, "SHA256:" + value)], body),
                "the name of another header": ([("X-Signature", value)], body),
                "the header of classic Central": ([("X-Central-Signature", value)], body),
                "bytes that are no ASCII": ([(header, value + "\xe9")], body),
            }
            if prefix:
                cases["no prefix"] = ([(header, encoded)], body)
                cases["the prefix in the other case"] = (
                    [(header, prefix.swapcase() + mark + encoded)],
                    body,
                )
                cases["two separators"] = ([(header, prefix + mark + mark + encoded)], body)
                cases["another separator"] = ([(header, prefix + "=" + encoded)], body)
            for what, (headers, changed) in cases.items():
                with self.subTest(kind, change=what):
                    self.assertEqual(self.status(kind, headers, changed), 401)

    def test_the_signature_of_one_sender_does_not_pass_for_another(self):
        body, secret = b'{"event":"x"}', OTHER_SENDERS["entrupy"][2]
        digest = hmac.new(secret.encode(), body, hashlib.sha256).digest()
        for value in (
            digest.hex(),
            "SHA256:" + digest.hex(),
            "HMACSHA256 " + base64.b64encode(digest).decode(),
        ):
            with self.subTest(value):
                self.assertEqual(self.status("entrupy", {"Entrupy-Signature": value}, body), 401)
        good = "SHA256:" + base64.b64encode(digest).decode()
        self.assertEqual(self.status("entrupy", {"Entrupy-Signature": good}, body), 200)

    def test_a_body_that_is_not_json_is_kept(self):
        body = b"<alert>\xff</alert>"
        digest = hmac.new(b"0123456789", body, hashlib.sha256).hexdigest()
        self.assertEqual(self.status("ip-fabric", {"X-IPF-Signature": digest}, body), 200)
