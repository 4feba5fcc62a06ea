"""Signatures of classic Central: vectors, negatives that change one thing, and the part to copy."""

from __future__ import annotations

import base64
import hashlib
import hmac
import unittest

import central_webhook_client as product
from tests.support import TOKEN

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
SIGNED_HEADERS = ("x-central-service", "x-central-delivery-id", "x-central-delivery-timestamp")


def classic_signature(body, headers, token=TOKEN):
    """Sign as classic Central does."""
    signed = body + "".join(headers[name] for name in SIGNED_HEADERS).encode("latin-1")
    return base64.b64encode(hmac.new(token.encode(), signed, hashlib.sha256).digest()).decode()


class ClassicCentral(unittest.TestCase):
    def assert_refused(self, body=BODY, token=TOKEN, **headers):
        changed = {**HEADERS, **{name.replace("_", "-"): value for name, value in headers.items()}}
        with self.assertRaises(product.SignatureError):
            product.verify_signature(body, changed, token)

    def test_the_vector_verifies(self):
        self.assertIsNone(product.verify_signature(BODY, HEADERS, TOKEN))

    def test_the_signer_of_these_tests_makes_the_vector(self):
        self.assertEqual(classic_signature(BODY, HEADERS), SIGNATURE)

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
            "a key twice": BODY[:-1] + b',"alert_type":"New AP detected"}',
        }
        for what, body in changed.items():
            with self.subTest(what):
                self.assert_refused(body)

    def test_a_changed_signed_header_is_refused(self):
        for name in SIGNED_HEADERS:
            value = HEADERS[name]
            for changed in (
                value + "x",
                "x" + value,
                value[:-1],
                value.swapcase(),
                value + " ",
                value[::-1],
            ):
                with self.subTest(name, value=changed):
                    self.assert_refused(**{name: changed})

    def test_a_missing_or_empty_header_is_refused_and_named(self):
        for name in (*SIGNED_HEADERS, "x-central-signature"):
            without = {key: value for key, value in HEADERS.items() if key != name}
            for headers in (without, {**HEADERS, name: ""}):
                with self.subTest(name, present=name in headers):
                    with self.assertRaisesRegex(product.SignatureError, name):
                        product.verify_signature(BODY, headers, TOKEN)

    def test_a_signature_over_an_empty_value_is_refused_all_the_same(self):
        for name in SIGNED_HEADERS:
            headers = {**HEADERS, name: ""}
            headers["x-central-signature"] = classic_signature(BODY, headers)
            with self.subTest(name), self.assertRaises(product.SignatureError):
                product.verify_signature(BODY, headers, TOKEN)

    def test_another_spelling_of_the_signature_is_refused(self):
        digest = base64.b64decode(SIGNATURE)
        spellings = {
            "upper case": SIGNATURE.upper(),
            "lower case": SIGNATURE.lower(),
            "case of one letter": SIGNATURE.replace("O", "o", 1),
            "padding missing": SIGNATURE.rstrip("="),
            "padding doubled": SIGNATURE + "=",
            "other unused bits, so that it decodes to the same bytes": SIGNATURE.replace(
                "Wv4=", "Wv5="
            ),
            "white space before": " " + SIGNATURE,
            "white space behind": SIGNATURE + " ",
            "a line feed behind": SIGNATURE + "\n",
            "white space within": SIGNATURE[:20] + " " + SIGNATURE[20:],
            "hexadecimal": digest.hex(),
            "raw bytes": digest.decode("latin-1"),
            "in quotes": f'"{SIGNATURE}"',
            "with a prefix": "SHA256:" + SIGNATURE,
            "twice": f"{SIGNATURE}, {SIGNATURE}",
            "half": SIGNATURE[:22],
            "one character": "O",
            "of SHA-1": base64.b64encode(
                hmac.new(TOKEN.encode(), BODY, hashlib.sha1).digest()
            ).decode(),
        }
        for what, signature in spellings.items():
            with self.subTest(what):
                self.assertNotEqual(signature, SIGNATURE)
                self.assert_refused(x_central_signature=signature)

    def test_another_token_is_refused(self):
        for token in (
            TOKEN + "x",
            TOKEN[:-1],
            TOKEN.upper(),
            TOKEN + "\n",
            " " + TOKEN,
            "x",
            TOKEN.encode().hex(),
        ):
            with self.subTest(token):
                self.assert_refused(token=token)

    def test_anything_but_one_token_is_an_error_of_the_caller(self):
        for token in (None, b"x", TOKEN.encode(), [TOKEN], (TOKEN,), {TOKEN: 1}, 5, iter([TOKEN])):
            with self.subTest(type(token)), self.assertRaises(TypeError):
                product.verify_signature(BODY, HEADERS, token)

    def test_one_character_of_a_token_is_not_a_token(self):
        forged = {**HEADERS, "x-central-signature": classic_signature(BODY, HEADERS, "x")}
        with self.assertRaises(product.SignatureError):
            product.verify_signature(BODY, forged, "tx")

    def test_header_names_are_found_in_any_case(self):
        for spell in (str.lower, str.upper, str.title):
            headers = {spell(name): value for name, value in HEADERS.items()}
            with self.subTest(list(headers)[0]):
                self.assertIsNone(product.verify_signature(BODY, headers, TOKEN))

    def test_a_header_in_two_spellings_is_repeated(self):
        for name in (*SIGNED_HEADERS, "x-central-signature"):
            with self.subTest(name), self.assertRaisesRegex(product.SignatureError, "repeated"):
                headers = {**HEADERS, name.upper(): HEADERS[name]}
                product.verify_signature(BODY, headers, TOKEN)

    def test_what_is_not_signed_may_change(self):
        for name in ("x-central-event", "x-central-customer-id"):
            with self.subTest(name):
                self.assertIsNone(
                    product.verify_signature(BODY, {**HEADERS, name: "another"}, TOKEN)
                )

    def test_bytes_moved_between_neighbouring_headers_keep_the_signature_valid(self):
        """A property of the scheme, known and documented: nothing separates the signed values."""
        headers = {**HEADERS, "x-central-service": "Alert"}
        headers["x-central-delivery-id"] = "s" + HEADERS["x-central-delivery-id"]
        self.assertIsNone(product.verify_signature(BODY, headers, TOKEN))

    def test_an_empty_token_is_an_error_of_the_caller(self):
        forged = {**HEADERS, "x-central-signature": classic_signature(BODY, HEADERS, "")}
        for headers in (HEADERS, forged):
            with self.assertRaises(ValueError):
                product.verify_signature(BODY, headers, "")

    def test_strange_characters_raise_nothing_but_a_signature_error(self):
        strange = (
            "\xe9",
            "\xff" * 44,
            "\u20ac",
            "\ud800",
            "\U0001f600",
            "\0",
            "a\nb",
            "\x7f",
            SIGNATURE + "\xe9",
        )
        for name in (*SIGNED_HEADERS, "x-central-signature"):
            for value in strange:
                with self.subTest(name, value=ascii(value)):
                    self.assert_refused(**{name: value})

    def test_header_values_are_signed_as_the_bytes_that_were_received(self):
        for raw in (b"Alerts\xe9", "Alerts \u20ac".encode(), b"\x80\xff"):
            headers = {**HEADERS, "x-central-service": raw.decode("latin-1")}
            signed = BODY + raw + "".join(HEADERS[name] for name in SIGNED_HEADERS[1:]).encode()
            digest = hmac.new(TOKEN.encode(), signed, hashlib.sha256).digest()
            headers["x-central-signature"] = base64.b64encode(digest).decode()
            with self.subTest(raw):
                self.assertIsNone(product.verify_signature(BODY, headers, TOKEN))

    def test_the_key_is_the_token_in_utf8(self):
        for token in ("gr\xfc\xdfe", "\u9375", "\U0001f511"):
            headers = {**HEADERS, "x-central-signature": classic_signature(BODY, HEADERS, token)}
            with self.subTest(ascii(token)):
                self.assertIsNone(product.verify_signature(BODY, headers, token))

    def test_no_message_holds_a_secret(self):
        for headers in (
            HEADERS,
            {**HEADERS, "x-central-service": ""},
            {**HEADERS, "x-central-service": "\u20ac"},
        ):
            with self.assertRaises(product.SignatureError) as raised:
                product.verify_signature(BODY + b"x", headers, TOKEN)
            expected = classic_signature(BODY + b"x", HEADERS)
            for secret in (TOKEN, SIGNATURE, expected, "DZ1"):
                self.assertNotIn(secret, str(raised.exception))
