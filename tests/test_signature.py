"""Signatures of classic Central: a vector, and negatives that change one thing."""

from __future__ import annotations

import base64
import hashlib
import hmac
import unittest

import central_webhook_client as product
from tests.support import TOKEN, hmac_sha256

BODY = b'{"alert_type":"New AP detected","details":{"serial":"DZ1"}}'
SIGNATURE = "O1BifJezSO7kZzM75C6XoHMaOGEW2nUXjjiTeBfYWv4="  # made with OpenSSL
HEADERS = {
    "x-central-service": "Alerts",
    "x-central-event": "Radio-Channel-Utilization",
    "x-central-delivery-id": "72d3162e-cc78-11e3-81ab-4c9367dc0958",
    "x-central-delivery-timestamp": "2016-07-12T13:14:19-07:00",
    "x-central-customer-id": "0123456789",
    "x-central-signature": SIGNATURE,
}
SIGNED = ("x-central-service", "x-central-delivery-id", "x-central-delivery-timestamp")


def signed_anew(token=TOKEN, body=BODY, **changes):
    """Return the headers of the vector with changes and the signature that fits them."""
    headers = {**HEADERS, **{name.replace("_", "-"): value for name, value in changes.items()}}
    values = "".join(headers[name] for name in SIGNED).encode("latin-1")
    signature = base64.b64encode(hmac_sha256(token, body, values)).decode()
    return {**headers, "x-central-signature": signature}


class ClassicCentral(unittest.TestCase):
    def assert_accepted(self, headers, token=TOKEN):
        self.assertIsNone(product.verify_signature(BODY, headers, token))

    def assert_refused(self, body=BODY, headers=HEADERS, token=TOKEN, message=""):
        with self.assertRaisesRegex(product.SignatureError, message):
            product.verify_signature(body, headers, token)

    def test_the_vector_is_accepted(self):
        self.assert_accepted(HEADERS)

    def test_the_signer_of_these_tests_makes_the_vector(self):
        self.assertEqual(signed_anew(), HEADERS)

    def test_a_changed_body_is_refused(self):
        changed = {
            "empty": b"",
            "one byte changed": BODY.replace(b"DZ1", b"DZ2"),
            "one bit changed": bytes([BODY[0] ^ 1]) + BODY[1:],
            "a space more": BODY.replace(b":", b": ", 1),
            "a line feed at the end": BODY + b"\n",
            "a NUL at the end": BODY + b"\0",
            "a byte order mark": b"\xef\xbb\xbf" + BODY,
            "the last byte missing": BODY[:-1],
            "another order of keys": b'{"details":{"serial":"DZ1"},"alert_type":"New AP detected"}',
            "a key repeated": BODY[:-1] + b',"alert_type":"New AP detected"}',
        }
        for what, body in changed.items():
            with self.subTest(what):
                self.assert_refused(body)

    def test_a_changed_signed_header_is_refused(self):
        for name in SIGNED:
            value = HEADERS[name]
            spellings = (value[:-1], value.swapcase(), value + " ", value[::-1])
            for changed in (value + "x", "x" + value, *spellings):
                with self.subTest(name, value=changed):
                    self.assert_refused(headers={**HEADERS, name: changed})

    def test_an_unsigned_header_may_change(self):
        for name in ("x-central-event", "x-central-customer-id"):
            with self.subTest(name):
                self.assert_accepted({**HEADERS, name: "another"})

    def test_a_missing_empty_or_repeated_header_is_refused_and_named(self):
        for name in (*SIGNED, "x-central-signature"):
            without = {key: value for key, value in HEADERS.items() if key != name}
            for headers, message in (
                (without, name),
                ({**HEADERS, name: ""}, name),
                ({**HEADERS, name.upper(): HEADERS[name]}, "repeated"),
            ):
                with self.subTest(name, message=message, present=name in headers):
                    self.assert_refused(headers=headers, message=message)

    def test_an_empty_value_is_refused_even_if_it_is_signed(self):
        for name in SIGNED:
            with self.subTest(name):
                self.assert_refused(headers=signed_anew(**{name: ""}))

    def test_another_spelling_of_the_signature_is_refused(self):
        digest = base64.b64decode(SIGNATURE)
        of_sha1 = hmac.new(TOKEN.encode(), BODY, hashlib.sha1).digest()
        spellings = {
            "upper case": SIGNATURE.upper(),
            "lower case": SIGNATURE.lower(),
            "case of one letter": SIGNATURE.replace("O", "o", 1),
            "padding missing": SIGNATURE.rstrip("="),
            "padding doubled": SIGNATURE + "=",
            "other unused bits, which decode to the same": SIGNATURE.replace("Wv4=", "Wv5="),
            "white space before": " " + SIGNATURE,
            "white space after": SIGNATURE + " ",
            "a line feed after": SIGNATURE + "\n",
            "white space within": SIGNATURE[:20] + " " + SIGNATURE[20:],
            "hexadecimal": digest.hex(),
            "raw bytes": digest.decode("latin-1"),
            "in quotes": f'"{SIGNATURE}"',
            "with a prefix": "SHA256:" + SIGNATURE,
            "twice": f"{SIGNATURE}, {SIGNATURE}",
            "half": SIGNATURE[:22],
            "one character": "O",
            "of SHA-1": base64.b64encode(of_sha1).decode(),
        }
        for what, signature in spellings.items():
            with self.subTest(what):
                self.assertNotEqual(signature, SIGNATURE)
                self.assert_refused(headers={**HEADERS, "x-central-signature": signature})

    def test_another_token_is_refused(self):
        spellings = (TOKEN.upper(), TOKEN + "\n", " " + TOKEN, TOKEN.encode().hex())
        for token in (TOKEN + "x", TOKEN[:-1], "x", *spellings):
            with self.subTest(token):
                self.assert_refused(token=token)

    def test_one_character_of_a_token_is_not_a_token(self):
        self.assert_refused(headers=signed_anew("x"), token="tx")

    def test_anything_but_one_token_is_an_error_of_the_caller(self):
        for token in (None, b"x", TOKEN.encode(), [TOKEN], (TOKEN,), {TOKEN: 1}, 5, iter([TOKEN])):
            with self.subTest(type(token)), self.assertRaises(TypeError):
                product.verify_signature(BODY, HEADERS, token)

    def test_an_empty_token_is_an_error_of_the_caller(self):
        for headers in (HEADERS, signed_anew("")):
            with self.assertRaises(ValueError):
                product.verify_signature(BODY, headers, "")

    def test_header_names_are_found_in_any_case(self):
        for spell in (str.lower, str.upper, str.title):
            with self.subTest(spell.__name__):
                self.assert_accepted({spell(name): value for name, value in HEADERS.items()})

    def test_bytes_moved_between_neighbouring_headers_keep_the_signature_valid(self):
        """A property of the scheme, known and documented: nothing separates the signed values."""
        moved = {"x-central-service": "Alert"}
        moved["x-central-delivery-id"] = "s" + HEADERS["x-central-delivery-id"]
        self.assert_accepted({**HEADERS, **moved})

    def test_strange_characters_raise_nothing_but_a_signature_error(self):
        strange = ("\xe9", "\xff" * 44, "\u20ac", "\ud800", "\U0001f600", "\0", "a\nb", "\x7f")
        for name in (*SIGNED, "x-central-signature"):
            for value in (*strange, SIGNATURE + "\xe9"):
                with self.subTest(name, value=ascii(value)):
                    self.assert_refused(headers={**HEADERS, name: value})

    def test_header_values_are_signed_as_the_bytes_that_were_received(self):
        for raw in (b"Alerts\xe9", "Alerts \u20ac".encode(), b"\x80\xff"):
            with self.subTest(raw):
                self.assert_accepted(signed_anew(x_central_service=raw.decode("latin-1")))

    def test_the_key_is_the_token_in_utf8(self):
        for token in ("gr\xfc\xdfe", "\u9375", "\U0001f511"):
            with self.subTest(ascii(token)):
                self.assert_accepted(signed_anew(token), token)

    def test_no_message_holds_a_secret(self):
        for service in ("Alerts", "", "\u20ac"):
            headers = {**HEADERS, "x-central-service": service}
            with self.assertRaises(product.SignatureError) as raised:
                product.verify_signature(BODY + b"x", headers, TOKEN)
            expected = signed_anew(body=BODY + b"x")["x-central-signature"]
            for secret in (TOKEN, SIGNATURE, "DZ1", expected):
                self.assertNotIn(secret, str(raised.exception))
