"""The senders with one signature header, and API keys: vectors, negatives that change one thing."""

from __future__ import annotations

import base64

from tests.support import (
    ReceiverTest,
    central_headers,
    config_of,
    hmac_sha256,
    hook,
    new_body,
)

VECTORS = {  # type: (header, value, token, body), all from OpenSSL
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
        b'{"type":"snapshot","action":"discover","status":"completed","requester":"cron",'
        b'"timestamp":1618884473000,"test":true}',
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


class HeaderSignatures(ReceiverTest):
    config = config_of(
        webhook=[hook(kind, type=kind, token=token) for kind, (_, _, token, _) in VECTORS.items()]
    )

    def assert_status(self, status, kind, headers, body):
        self.assertEqual(self.receiver.post(body, headers, "/" + kind).status, status)

    def test_the_vectors_are_accepted_under_header_names_of_any_case(self):
        for kind, (header, value, _, body) in VECTORS.items():
            for name in (header, header.lower(), header.upper()):
                with self.subTest(kind, header=name):
                    self.assert_status(200, kind, {name: value}, body)

    def test_one_thing_changed_is_refused(self):
        for kind, (header, value, _, body) in VECTORS.items():
            mark = next((mark for mark in ": " if mark in value), "")
            prefix, _, encoded = value.rpartition(mark) if mark else ("", "", value)
            values = {
                "empty": "",
                "the other case": value.swapcase(),
                "upper case": prefix + mark + encoded.upper(),
                "the last character missing": value[:-1],
                "a character more": value + "=",
                "a wrong prefix": "MD5" + mark + encoded,
                "a prefix too many": "SHA256:" + value,
                "bytes above ASCII": value + "\xe9",
            }
            if prefix:
                values["no prefix"] = encoded
                values["the prefix in the other case"] = prefix.swapcase() + mark + encoded
                values["two separators"] = prefix + mark + mark + encoded
                values["another separator"] = prefix + "=" + encoded
            cases = {
                **{what: ([(header, changed)], body) for what, changed in values.items()},
                "no header": ([], body),
                "the header repeated": ([(header, value)] * 2, body),
                "the header repeated, the first good": ([(header, value), (header, "x")], body),
                "another body": ([(header, value)], body + b" "),
                "no body": ([(header, value)], b""),
                "the name of another header": ([("X-Signature", value)], body),
                "the header of classic Central": ([("X-Central-Signature", value)], body),
            }
            for what, (headers, changed) in cases.items():
                with self.subTest(kind, change=what):
                    self.assert_status(401, kind, headers, changed)

    def test_the_signature_of_one_sender_does_not_pass_for_that_of_another(self):
        body = b'{"event":"x"}'
        digest = hmac_sha256(VECTORS["entrupy"][2], body)
        encoded = base64.b64encode(digest).decode()
        for value, status in (
            (digest.hex(), 401),
            ("SHA256:" + digest.hex(), 401),
            ("HMACSHA256 " + encoded, 401),
            ("SHA256:" + encoded, 200),
        ):
            with self.subTest(value):
                self.assert_status(status, "entrupy", {"Entrupy-Signature": value}, body)

    def test_a_body_that_is_not_json_is_accepted(self):
        body = b"<alert>\xff</alert>"
        digest = hmac_sha256(VECTORS["ip-fabric"][2], body).hex()
        self.assert_status(200, "ip-fabric", {"X-IPF-Signature": digest}, body)


class ApiKeys(ReceiverTest):
    config = config_of(
        webhook=[
            hook("field", api_key={"field": "apiKey", "value": "K-very-secret"}),
            hook("header", api_key={"header": "X-Key", "value": ["K1", "K2"]}),
        ]
    )

    def test_a_header_is_accepted_bare_or_after_a_scheme_word(self):
        for value, status in {
            "K1": 200,
            "K2": 200,
            "Bearer K1": 200,
            "ApiKey K2": 200,
            "": 401,
            "K3": 401,
            "k1": 401,
            "Bearer Bearer K1": 401,
            "Bearer": 401,
        }.items():
            body = new_body()
            headers = {**central_headers(body), "X-Key": value}
            with self.subTest(value):
                self.assertEqual(self.receiver.post(body, headers, "/header").status, status)
        body = new_body()
        self.assertEqual(self.receiver.post(body, central_headers(body), "/header").status, 401)

    def test_a_field_must_be_a_top_level_string_that_occurs_once(self):
        for text in (
            "{}",
            '{"apiKey":""}',
            '{"apiKey":"another"}',
            '{"apiKey":null}',
            '{"apiKey":["K-very-secret"]}',
            '{"x":{"apiKey":"K-very-secret"}}',
            '{"apiKey":"K-very-secret","apiKey":"K-very-secret"}',
            '{"apiKey":"K-very-secret","apiKey":"another"}',
            '{"apikey":"K-very-secret"}',
            '["apiKey","K-very-secret"]',
            '"apiKey"',
            "apiKey=K-very-secret",
            "",
        ):
            with self.subTest(text):
                body = text.encode()
                answer = self.receiver.post(body, central_headers(body), "/field")
                self.assertEqual(answer.status, 401)

    def test_the_key_of_an_accepted_body_is_masked_on_stdout(self):
        for text, expected in (
            ('{"apiKey":"K-very-secret","a":1.0}', {"apiKey": "***", "a": 1.0}),
            ('{"a": 2, "apiKey" : "K-very-secret" }', {"a": 2, "apiKey": "***"}),
            ('{"\\u0061piKey":"K-very-secret","a":3}', {"apiKey": "***", "a": 3}),
            ('{"apiKey":"K\\u002dvery-secret","a":1e999}', {"apiKey": "***", "a": "1e999"}),
            (
                '{"x":{"apiKey":"inner"},"apiKey":"K-very-secret"}',
                {"x": {"apiKey": "inner"}, "apiKey": "***"},
            ),
        ):
            with self.subTest(text):
                body = text.encode()
                headers = central_headers(body)
                self.assertEqual(self.receiver.post(body, headers, "/field").status, 200)
                line = self.wait_for_line(headers["X-Central-Delivery-ID"])
                self.assertEqual(line["alert"], expected)
        self.assertNotIn("very-secret", "".join(self.receiver.stdout_lines))


class Tokens(ReceiverTest):
    config = config_of(webhook=hook("noc", token=["first-token", "second-token", "third-token"]))

    def test_each_token_matches_after_any_other_and_only_older_ones_are_logged(self):
        tokens = self.config["central_info"]["webhook"]["token"]
        for index in (2, 2, 0, 1, 2, 1, 0, 0, 1):
            for token, status in ((tokens[index], 200), ("a fourth", 401)):
                body = new_body()
                answer = self.receiver.post(body, central_headers(body, token), "/noc")
                self.assertEqual(answer.status, status)
        self.receiver.wait_for_log("token 3 of 3 still matches")
        self.receiver.wait_for_log("token 2 of 3 still matches")
        logged = [line for line in self.receiver.stderr_lines if "still matches" in line]
        self.assertEqual(len(logged), 2)  # each at most once a minute, and never the first
