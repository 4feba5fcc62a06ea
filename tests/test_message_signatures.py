"""HTTP message signatures of new Central: vectors, and negatives that change one thing."""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
import unittest

import central_webhook_client as product
from tests.support import Receiver, new_body, raw_request

KEY = "5e175c081f53ca19894cbb6d541560f5c5e9a0754ae69639ef4d56b774b4e04e"
URL = "https://www.example.com/centralwebhook"
NOW = 1754963403  # of the vector's date as well
DATE = "Tue, 12 Aug 2025 01:50:03 GMT"
AS_TEXT = "sig1=:59xCXJTPTyTNhdcu7DD/Yrf2JiKMjngC2DAcGsydc20=:"
AS_BYTES = "sig1=:A6SAuZIsu4MydvHzNP80nQkInxarHgkq6j2wB+TYt3g=:"
VENDOR = ('"@method"', '"@target-uri"', '"@authority"', '"@scheme"', '"@path"', '"date"')
VECTOR_INPUT = f'sig1=({" ".join(VENDOR)});created={NOW};keyid="webhook-1";alg="hmac-sha256"'
VALUES = {
    '"@method"': "POST",
    '"@target-uri"': URL,
    '"@authority"': "www.example.com",
    '"@scheme"': "https",
    '"@path"': "/centralwebhook",
    '"@query"': "?",
    '"@request-target"': "/centralwebhook",
    '"date"': DATE,
}
CREATED = f";created={NOW}"
USUAL = ('"@method"', '"@target-uri"', '"date"')
EXPIRED = f";expires={NOW - 1}"
B25_KEY = base64.b64decode(
    "uzvJfB4u3N0Jy4T7NZ75MDVcr8zSTInedJtkgcu46YW4XByzNJjxBdtjUkdJPBtbmHhIDi6pcl8jsasjlTMtDQ=="
)


def sign(base, key=KEY):
    """Return a member of Signature over a base."""
    key = key.encode() if isinstance(key, str) else key
    digest = hmac.new(key, base.encode("latin-1"), hashlib.sha256).digest()
    return f":{base64.b64encode(digest).decode()}:"


def member(components=USUAL, parameters=CREATED, values=(), key=KEY):
    """Return a member of Signature-Input, and that of Signature."""
    canonical = f"({' '.join(components)}){parameters}"
    values = {**VALUES, **dict(values)}
    lines = [f"{name}: {values[name]}" for name in components]
    return canonical, sign("\n".join([*lines, f'"@signature-params": {canonical}']), key)


def message(signed, body=b"{}", method="POST", path="/centralwebhook", query=None, **headers):
    """Return a request with these signatures: {label: (input, signature)}; None drops a header."""
    fields = {
        "host": "www.example.com",
        "date": DATE,
        "signature-input": ", ".join(f"{label}={pair[0]}" for label, pair in signed.items()),
        "signature": ", ".join(f"{label}={pair[1]}" for label, pair in signed.items()),
        **{name.replace("_", "-"): value for name, value in headers.items()},
    }
    fields = {name: value for name, value in fields.items() if value is not None}
    return product.Request(method, path, query, "HTTP/1.1", fields, frozenset(), body)


def vector(signature=AS_TEXT, given=VECTOR_INPUT, **changes):
    """Return the request of the vector, or one with something changed."""
    return message({}, **{"signature": signature, "signature_input": given, **changes})


class StructuredFields(unittest.TestCase):
    def parse(self, text):
        return product.StructuredField(text).parse_dictionary()

    def test_members_are_serialized_canonically(self):
        for text, expected in {
            "a": {"a": "?1"},
            "a;b;b=2": {"a": "?1;b=2"},
            "  a=1\t,\tb.-_*1=2  ": {"a": "1", "b.-_*1": "2"},
            "a=-007": {"a": "-7"},
            "a=999999999999999": {"a": "999999999999999"},
            "a=123456789012.125": {"a": "123456789012.125"},
            "a=1.50, b=-0.0, c=00.001": {"a": "1.5", "b": "0.0", "c": "0.001"},
            'a="x\\"\\\\y~ "': {"a": '"x\\"\\\\y~ "'},
            "a=tok/en:1, b=*": {"a": "tok/en:1", "b": "*"},
            "a=:YQ==:, b=::": {"a": ":YQ==:", "b": "::"},
            "a=?0;  c=?1": {"a": "?0;c"},
            'a=( "x";y   1 ) ; b': None,  # white space before a parameter
            'a=( "x";y   1 );b': {"a": '("x";y 1);b'},
            "a=()": {"a": "()"},
        }.items():
            with self.subTest(text):
                if expected is None:
                    self.assertRaises(product.SignatureError, self.parse, text)
                else:
                    found = {name: str(item) for name, item in self.parse(text).items()}
                    self.assertEqual(found, expected)

    def test_strings_are_unescaped(self):
        self.assertEqual(self.parse('a="x\\"\\\\"')["a"].value, 'x"\\')

    def test_malformed_fields_are_refused(self):
        for text in (
            *("", " ", "A", "1", "=1", '"a"', "\ta", "a,", "a, ", ",a", "a,,b", "a b", "a;", "a;B"),
            *(
                "a =1",
                "a= 1",
                "a=",
                "a;b=",
                "a;b =1",
                "a;;b",
                "a;1",
                "a=+1",
                "a=--1",
                "a=-",
                "a=0x1",
            ),
            *("a=1000000000000000", "a=1.", "a=.1", "a=1.2345", "a=1234567890123.1", "a=1.2.3"),
            *('a="', 'a="b', 'a="b"c"', 'a="\\b"', 'a="\n"', 'a="\t"', 'a="\x7f"', 'a="\xe9"'),
            *("a='b'", "a=@b", "a=b{", "a=?2", "a=?", "a=:YQ:", "a=:YQ=:", "a=:Y Q=:", "a=:YQ=="),
            *("a=(", "a=(1", 'a=("b""c")', 'a=("b"\t"c")', "a=(1,2)", "a=((1))", "a=()x", "a=) "),
            *("a=1\n", "a=1\0", "a=\u0661", "a=1, a=2", "a, b, a"),
        ):
            with self.subTest(text):
                self.assertRaises(product.SignatureError, self.parse, text)


class NewCentral(unittest.TestCase):
    def verify(self, request, tokens=(KEY,), url=URL, now=NOW):
        url = product.parse_public_url(url)
        return product.verify_message_signature(request, list(tokens), url, now)

    def assert_refused(self, request, reason="", **arguments):
        with self.assertRaisesRegex(product.SignatureError, reason):
            self.verify(request, **arguments)

    def assert_accepted(self, request, **arguments):
        self.assertEqual(self.verify(request, **arguments)[0], 0)

    # Vectors

    def test_the_vectors_verify_with_the_key_as_text_and_decoded(self):
        for signature in (AS_TEXT, AS_BYTES):
            with self.subTest(signature):
                self.assertEqual(self.verify(vector(signature)), (0, NOW))

    def test_the_signer_of_these_tests_makes_the_vectors(self):
        parameters = CREATED + ';keyid="webhook-1";alg="hmac-sha256"'
        for key, expected in ((KEY, AS_TEXT), (bytes.fromhex(KEY), AS_BYTES)):
            given, signature = member(VENDOR, parameters, key=key)
            self.assertEqual(("sig1=" + given, "sig1=" + signature), (VECTOR_INPUT, expected))

    def test_one_thing_of_the_vector_changed_is_refused(self):
        other = "Tue, 12 Aug 2025 01:50:04 GMT"
        swapped = VECTOR_INPUT.replace('"@method" "@target-uri"', '"@target-uri" "@method"')
        for what, change in {
            "method": {"method": "PUT"},
            "method in lower case": {"method": "post"},
            "query": {"query": "x=1"},
            "an empty query": {"query": ""},
            "date": {"date": other},
            "no date": {"date": None},
            "created": {"given": VECTOR_INPUT.replace("1754963403", "1754963404")},
            "keyid": {"given": VECTOR_INPUT.replace("webhook-1", "webhook-2")},
            "no keyid": {"given": VECTOR_INPUT.replace(';keyid="webhook-1"', "")},
            "order": {"given": swapped},
            "a component less": {"given": VECTOR_INPUT.replace(' "@scheme"', "")},
            "label": {"given": VECTOR_INPUT.replace("sig1", "sig2")},
            "no signature": {"signature": None},
            "empty signature": {"signature": ""},
            "no signature-input": {"given": None},
            "empty signature-input": {"given": ""},
            "one letter of the signature": {"signature": AS_TEXT.replace("59x", "58x")},
            "case of the signature": {"signature": AS_TEXT.replace("59x", "59X")},
            "no padding": {"signature": AS_TEXT.replace("=:", ":")},
            "no colons": {"signature": AS_TEXT.replace(":", "")},
            "a string": {"signature": f'sig1="{AS_TEXT[6:-1]}"'},
            "an inner list": {"signature": f"sig1=({AS_TEXT[5:]})"},
            "unused bits": {"signature": AS_TEXT.replace("c20=", "c21=")},
            "hexadecimal": {"signature": f"sig1={base64.b64decode(AS_TEXT[6:-1]).hex()}"},
        }.items():
            with self.subTest(what):
                self.assert_refused(vector(**change))

    def test_another_key_is_refused(self):
        for token in (KEY.upper(), KEY[:-1], KEY + "00", KEY[::-1], "x"):
            with self.subTest(token):
                self.assert_refused(vector(), "does not match", tokens=[token])
        self.assert_accepted(vector(AS_BYTES), tokens=[KEY.upper()])

    def test_the_position_of_the_token_that_matched_is_returned(self):
        for signature in (AS_TEXT, AS_BYTES):
            tokens = ["a", "00" * 32, KEY, "b"]
            self.assertEqual(self.verify(vector(signature), tokens=tokens)[0], 2)

    def test_a_key_that_is_not_hexadecimal_is_used_as_text(self):
        for key in ("zSMrzuYrblgBfByy2JrM", "abc", "5e1", "0x5e", "\xfc\u20ac"):
            with self.subTest(ascii(key)):
                self.assert_accepted(message({"sig1": member(key=key)}), tokens=[key])

    def test_the_vector_of_the_rfc_is_refused_only_for_what_it_does_not_cover(self):
        """RFC 9421 B.2.5 covers neither method nor path; with these it is accepted."""
        values = {'"@authority"': "example.com", '"content-type"': "application/json"}
        values.update({'"date"': "Tue, 20 Apr 2021 02:07:55 GMT", '"@path"': "/foo"})
        components = ('"date"', '"@authority"', '"content-type"')
        parameters = ';created=1618884473;keyid="test-shared-secret"'
        fields = {"date": values['"date"'], "content_type": "application/json"}
        arguments = {"tokens": [B25_KEY.hex()], "url": "https://example.com/foo", "now": 1618884475}
        pair = member(components, parameters, values, B25_KEY)
        self.assertEqual(pair[1], ":pxcQw6G3AjtMBQjwo8XzkZf/bws5LelbaMk5rGIGtE8=:")
        self.assert_refused(message({"sig-b25": pair}, **fields), "not cover", **arguments)
        pair = member((*components, '"@method"', '"@path"'), parameters, values, B25_KEY)
        self.assert_accepted(message({"sig-b25": pair}, **fields), **arguments)

    # What must be covered

    def test_method_target_and_time_must_be_covered(self):
        method, target, authority, _, path, date = VENDOR
        for components, parameters, passes in (
            ((method, target, date), "", True),
            ((method, target), CREATED, True),
            ((method, authority, path, date), "", True),
            ((date, path, authority, target, method), CREATED, True),
            ((target, date), CREATED, False),
            ((method, date), CREATED, False),
            ((method, authority, date), CREATED, False),
            ((method, path, date), CREATED, False),
            ((method, '"@request-target"', date), CREATED, False),
            ((method, '"@scheme"', path, date), CREATED, False),
            ((method, target), "", False),
            ((method, target), f";expires={NOW + 60}", False),
            ((), CREATED, False),
        ):
            request = message({"sig1": member(components, parameters)})
            with self.subTest(components, parameters=parameters):
                if passes:
                    self.assertEqual(self.verify(request), (0, NOW))
                else:
                    self.assert_refused(request, "cover")

    def test_the_signed_time_is_created_before_date(self):
        request = message({"sig1": member(USUAL, f";created={NOW - 100}")})
        self.assertEqual(self.verify(request), (0, NOW - 100))

    def test_a_component_that_is_missing_or_not_supported_is_refused_by_name(self):
        for name in (
            *('"x-missing"', '"Date"', '"@status"', '"@unknown"', '"@"', '"@query-param"'),
            *('"@query-param";name="a"', '"date";sf', '"date";x=1', '"@scheme";x', '"@path";a="1"'),
        ):
            values = {name: VALUES.get(name.partition(";")[0], "1")}
            components = ('"@method"', '"@target-uri"', name)
            request = message({"sig1": member(components, values=values)})
            with self.subTest(name):
                self.assert_refused(request, f"component {re.escape(name)} is missing or not supp")

    def test_a_component_that_is_covered_twice_is_refused(self):
        for name in USUAL:
            with self.subTest(name):
                self.assert_refused(message({"sig1": member((*USUAL, name))}), "twice")

    def test_header_fields_are_covered_by_their_value(self):
        pair = member((*USUAL, '"x-fields"'), values={'"x-fields"': "one, two"})
        self.assert_accepted(message({"sig1": pair}, x_fields="one, two"))
        for value in ("one,two", "one", None):
            self.assert_refused(message({"sig1": pair}, x_fields=value))

    def test_the_number_of_components_is_bounded(self):
        names = [f'"x-{number}"' for number in range(product.MAX_COMPONENTS - 2)]
        for components, passes in ((names, True), ([*names, '"x"'], False)):
            pair = member((*USUAL[:2], *components), values=dict.fromkeys(components, "1"))
            headers = {name.strip('"').replace("-", "_"): "1" for name in components}
            request = message({"sig1": pair}, **headers)
            with self.subTest(passes):
                (self.assert_accepted if passes else self.assert_refused)(request)

    # Parameters

    def test_the_algorithm_must_be_hmac_sha256_if_it_is_given(self):
        self.assert_accepted(message({"s": member(parameters=CREATED + ';alg="hmac-sha256"')}))
        for name in ("", "hmac-sha512", "HMAC-SHA256", "rsa-pss-sha512", "ed25519", "none"):
            with self.subTest(name):
                request = message({"sig1": member(parameters=f'{CREATED};alg="{name}"')})
                self.assert_refused(request, f"algorithm is '{name}', expected 'hmac-sha256'")

    def test_expires_is_enforced(self):
        for seconds in (3600, 1, 0):
            parameters = f"{CREATED};expires={NOW + seconds}"
            self.assert_accepted(message({"sig1": member(parameters=parameters)}))
        for seconds in (-1, -3600, -NOW):
            parameters = f"{CREATED};expires={NOW + seconds}"
            self.assert_refused(message({"sig1": member(parameters=parameters)}), "expired")

    def test_parameters_are_accepted_in_any_order_and_unknown_ones_too(self):
        for parameters in (
            CREATED + ';nonce="n";tag="t";keyid="k"',
            ';tag="t"' + CREATED,
            CREATED + ';keyid="a\\"b\\\\c"',
            CREATED + ';nonce=""',
            f';keyid="k";expires={NOW + 5};alg="hmac-sha256"' + CREATED,
            *(CREATED + unknown for unknown in (";unknown=1", ';vendor="x"', ";flag", ";v=1.5")),
        ):
            request = message({"sig1": member(parameters=parameters)})
            with self.subTest(parameters):
                self.assert_accepted(request)
                request.headers["signature-input"] += ";more"
                self.assert_refused(request, "does not match")

    def test_parameters_of_the_wrong_type_are_refused(self):
        wrong = (";created=1.5", ";created=?1", ";created", f';created="{NOW}"')
        for parameters in (
            *wrong,
            *(CREATED + more for more in (';expires="9999999999"', ";keyid=5", ";nonce=:YWJj:")),
        ):
            with self.subTest(parameters):
                request = message({"sig1": member(parameters=parameters)})
                self.assert_refused(request, "wrong type")

    # Labels

    def test_a_good_label_beside_bad_ones_passes(self):
        good, bad, uncovered = member(), member(key="another"), member(('"@method"',))
        for signed in (
            {"a": bad, "b": good},
            {"a": good, "b": bad},
            {"a": uncovered, "b": bad, "c": ("5", bad[1]), "d": good},
        ):
            with self.subTest(list(signed)):
                self.assert_accepted(message(signed))
        self.assert_refused(message({"a": bad, "b": uncovered}))

    def test_more_than_four_labels_are_refused(self):
        good, bad = member(), member(key="another")
        for position in (0, 4):
            signed = {label: bad for label in "abcde"}
            signed["abcde"[position]] = good
            with self.subTest(position):
                self.assert_refused(message(signed), "more than 4")

    def test_a_repeated_label_is_refused(self):
        given, signature = member()
        for inputs, signatures in (
            (f"a={given}, a={given}", f"a={signature}"),
            (f"a={given}", f"a={signature}, a={signature}"),
            (f"a={given}", f"a=:AAAA:, a={signature}"),
        ):
            with self.subTest(inputs[:9], signatures=signatures[:9]):
                request = message({}, signature_input=inputs, signature=signatures)
                self.assert_refused(request, "repeated")

    def test_a_label_of_only_one_field_is_passed_over(self):
        (given, signature), (other, other_signature) = member(), member(key="another")
        inputs, signatures = f"a={other}, b={given}", f"b={signature}, c={other_signature}"
        self.assert_accepted(message({}, signature_input=inputs, signature=signatures))
        request = message({}, signature_input=f"a={given}", signature=f"b={signature}")
        self.assert_refused(request, "no label")

    # Spelling

    def test_the_list_is_serialized_again_before_it_is_verified(self):
        canonical, signature = member()
        for written in (
            f'( "@method"   "@target-uri" "date" ){CREATED}',
            f'("@method" "@target-uri" "date");  created={NOW}',
            f'("@method" "@target-uri" "date");created=000{NOW}',
            f'("@method" "@target-uri" "date"){CREATED}  ',
        ):
            with self.subTest(written):
                self.assertNotEqual(written, canonical)
                self.assert_accepted(message({"sig1": (written, signature)}))

    def test_a_malformed_list_is_refused_however_it_is_signed(self):
        lines = [f"{name}: {VALUES[name]}" for name in USUAL]
        for written in (
            f'("@method""@target-uri" "date"){CREATED}',
            f'("@method", "@target-uri", "date"){CREATED}',
            f"({' '.join(USUAL)}) {CREATED}",
            f"({' '.join(USUAL)}){CREATED};",
            f'({" ".join(USUAL)}){CREATED};keyid="a\nb"',
            f"(@method @target-uri date){CREATED}",
            '"@method"',
            "5",
        ):
            for text in (written, f"({' '.join(USUAL)}){CREATED}"):
                signature = sign("\n".join([*lines, f'"@signature-params": {text}']))
                with self.subTest(written):
                    self.assert_refused(message({"sig1": (written, signature)}))

    def test_a_line_of_the_base_cannot_be_injected_through_a_string(self):
        """RFC 9421 section 7.5.3: what is signed is another request than what is shown."""
        name = '"x"\n"@target-uri": https://elsewhere.example/\n"y"'
        pair = member(('"@method"', '"date"', name), values={name: "z"})
        self.assert_refused(message({"sig1": pair}, x="z", y="z"), "malformed")

    def test_arbitrary_headers_raise_only_a_signature_error(self):
        url = product.parse_public_url(URL)
        for value in ("\0", "\xff" * 300, "(" * 5000, '"' * 5000, "=" * 99, "a" * 60000, "a=?2"):
            for name in ("signature_input", "signature"):
                request = message({"sig1": member()}, **{name: value})
                with self.subTest(value[:9], name=name):
                    self.assert_refused(request)
                    self.assertEqual(
                        product.diagnose_message_signature(request, [KEY], url, NOW), ""
                    )
        for created in ("999999999999999", "-999999999999999"):
            request = message({"sig1": member(parameters=f";created={created}")})
            self.assertEqual(self.verify(request), (0, int(created)))

    # Where the values come from

    def test_the_query_is_the_received_one(self):
        for query, value in ((None, "?"), ("", "?"), ("a=b", "?a=b"), ("a=%2F&b=+", "?a=%2F&b=+")):
            suffix = "" if query is None else "?" + query
            values = {
                '"@query"': value,
                '"@target-uri"': URL + suffix,
                '"@request-target"': "/centralwebhook" + suffix,
            }
            for name in values:
                components = ('"@method"', '"@authority"', '"@path"', name)
                with self.subTest(query, component=name):
                    request = message({"sig1": member(components, values=values)}, query=query)
                    self.assert_accepted(request)
                    request.query = "other=1"
                    self.assert_refused(request)

    def test_neither_host_nor_path_nor_forwarded_headers_of_the_request_are_used(self):
        elsewhere = {"host": "evil.example", "path": "/other", "x_forwarded_host": "evil.example"}
        elsewhere.update(x_forwarded_proto="http", forwarded="host=evil.example;proto=http")
        components = (*VENDOR, '"@request-target"')
        self.assert_accepted(message({"sig1": member(components)}, **elsewhere))
        self.assert_accepted(message({"sig1": member(components)}, host=None))
        for name, value in {
            '"@target-uri"': "https://evil.example/centralwebhook",
            '"@authority"': "evil.example",
            '"@scheme"': "http",
            '"@path"': "/other",
            '"@request-target"': "/other",
        }.items():
            with self.subTest(name):
                pair = member(components, values={name: value})
                self.assert_refused(message({"sig1": pair}, **elsewhere))

    def test_each_spelling_of_the_public_url_is_accepted_and_no_other(self):
        for url, targets, schemes, authorities, paths in (
            (URL, [URL], ["https"], ["www.example.com"], ["/centralwebhook"]),
            (
                "HTTPS://Webhook.Example.com:443/new?x",
                [
                    "HTTPS://Webhook.Example.com:443/new",
                    "https://webhook.example.com:443/new",
                    "https://webhook.example.com/new",
                ],
                ["HTTPS", "https"],
                ["Webhook.Example.com:443", "webhook.example.com:443", "webhook.example.com"],
                ["/new"],
            ),
            (
                "http://www.example.com:443",
                ["http://www.example.com:443", "http://www.example.com:443/"],
                ["http"],
                ["www.example.com:443"],
                ["", "/"],
            ),
            (
                "https://[2001:DB8::1]:8443/A%2fb",
                ["https://[2001:DB8::1]:8443/A%2fb", "https://[2001:db8::1]:8443/A%2fb"],
                ["https"],
                ["[2001:DB8::1]:8443", "[2001:db8::1]:8443"],
                ["/A%2fb"],
            ),
        ):
            good = [targets[-1], schemes[-1], authorities[-1], paths[-1]]
            for index, spellings in enumerate((targets, schemes, authorities, paths)):
                others = [good[index] + "x", good[index].upper() + "X", "x" + good[index]]
                for value in (*spellings, *others, "//"):
                    parts = [*good[:index], value, *good[index + 1 :]]
                    values = dict(
                        zip(('"@target-uri"', '"@scheme"', '"@authority"', '"@path"'), parts)
                    )
                    request = message({"s": member(VENDOR, values=values)})
                    with self.subTest(url, value=value):
                        if value in spellings:
                            self.assert_accepted(request, url=url)
                        else:
                            self.assert_refused(request, "does not match", url=url)

    def test_text_that_is_not_a_public_url_is_refused(self):
        for url in (
            *("", "www.example.com/a", "/a", "ftp://www.example.com/a", "https://", "https:///a"),
            *("https://www.example.com:99999/a", "https://www.example.com:x/a", "https://[::1/a"),
            *("https://user@www.example.com/a", "https://user:password@www.example.com/a"),
            *("https://www.example.com/a#b", "https://www.example.com/a b"),
            *("https://www.example.com/\xe9", "https://www.example.com/a\n"),
        ):
            with self.subTest(url), self.assertRaises(ValueError):
                product.parse_public_url(url)

    # The digest of the body

    def test_a_covered_content_digest_is_checked(self):
        body = b'{"id":"1"}'

        def digest(name, data):
            return f":{base64.b64encode(hashlib.new(name, data).digest()).decode()}:"

        good256, good512 = f"sha-256={digest('sha256', body)}", f"sha-512={digest('sha512', body)}"
        bad256 = f"sha-256={digest('sha256', body + b'x')}"
        for value, passes in (
            (good256, True),
            (good512, True),
            (f"{good256}, {good512}", True),
            (f"md5=:AAAA:, {good256}", True),
            (bad256, False),
            (f"{good512}, {bad256}", False),
            ("md5=" + digest("md5", body), False),
            (good256.replace("=:", "="), False),
            (good256.upper(), False),
            ("sha-256", False),
            ("", False),
        ):
            pair = member((*USUAL, '"content-digest"'), values={'"content-digest"': value})
            request = message({"sig1": pair}, body=body, content_digest=value)
            with self.subTest(value):
                if passes:
                    self.assert_accepted(request)
                    request.body = body + b"x"
                self.assert_refused(request)
                url = product.parse_public_url(URL)
                hint = product.diagnose_message_signature(request, [KEY], url, NOW)
                self.assertEqual(hint, "", "the signature itself is right")
        self.assert_accepted(message({"sig1": member()}, body=body, content_digest=bad256))


class Diagnosis(unittest.TestCase):
    """Hints for a signature that does not match; its signatures were made with OpenSSL."""

    BASE64_TOKEN = "MDEyMzQ1Njc4OWFiY2RlZg=="

    def diagnose(self, signature, tokens=(KEY, BASE64_TOKEN), parameters=CREATED, **changes):
        given = f"sig1=({' '.join(VENDOR)}){parameters}"
        request = vector(f"sig1=:{signature}:", given, **changes)
        url = product.parse_public_url(URL)
        with self.assertRaises(product.SignatureError):
            product.verify_message_signature(request, tokens, url, NOW)
        hint = product.diagnose_message_signature(request, tokens, url, NOW)
        for secret in (*tokens, signature):
            self.assertNotIn(secret, hint)
        return hint

    def test_each_known_deviation_is_named(self):
        for signature, hint in {
            "i4AWf1rC+/qFLumh4gsnwjrN5CDU6kQIEVhC0a928/8=": "the method in lower case",
            "/uy7fnQz1OuvNIQ826gAdYyH9MnaZhVitjGJ7Utj93o=": '"signature-params" without @',
            "K2B9yrSq07f8VthmnqmrLYHXuaOHuf/JC+U8Cim7448=": (
                'the method in lower case and "signature-params" without @'
            ),
            "Qfwzy/jN0eHkns4/bCvFDlbVa3+MyhKRzGxKQE6ysf8=": 'no line "@signature-params"',
            "dik8LY2kcFzDsJxBXqJxDkIrvZrXqQXcvNERKZrrJ7M=": "http instead of https",
            "aMlc4EtPhGaGwXCGLsFeCMGPgxdcH9il/8mHOKLSZYg=": "the received Host as authority",
            "JmlFZuboaz37qNF5CJzymIkZaaHcI7o8QoLEYnOGUho=": "the received Host without its port",
            "hgJr+X+lHnkC0NJrUdseK43NU/xuj6rEg1HCAe2bQ5k=": "the token decoded from base64",
        }.items():
            with self.subTest(hint):
                shown = self.diagnose(signature, host="10.0.0.5:8443")
                self.assertEqual(shown, f"would match with {hint}")

    def test_each_label_and_each_token_is_tried(self):
        deviating, uncovered = member(values={'"@method"': "post"}), member(('"@method"',))
        request = message({"a": uncovered, "b": ("5", ":AAAA:"), "c": deviating})
        url = product.parse_public_url(URL)
        for tokens, hint in (
            (["x", KEY], "would match with the method in lower case"),
            (["x"], ""),
        ):
            found = product.diagnose_message_signature(request, tokens, url, NOW)
            self.assertEqual(found, hint)

    def test_a_host_that_is_not_that_of_public_url_is_shown_shortened_and_escaped(self):
        for host, shown in {
            "10.0.0.5:8443": "'10.0.0.5:8443'",
            "a\x1b[2J": r"'a\u001b[2J'",
            "x" * 9000: "'" + "x" * 80 + "'",
        }.items():
            with self.subTest(host[:20]):
                expected = f"Host is {shown}, but public_url says 'www.example.com'"
                self.assertEqual(self.diagnose("AAAA", host=host), expected)

    def test_there_is_no_hint_if_nothing_deviates_but_the_key(self):
        for host in ("www.example.com", "WWW.example.com:8010", None):
            with self.subTest(host):
                self.assertEqual(self.diagnose("AAAA", host=host), "")

    def test_a_deviating_signature_that_is_refused_for_another_reason_gets_no_hint(self):
        signature = "i4AWf1rC+/qFLumh4gsnwjrN5CDU6kQIEVhC0a928/8="
        self.assertEqual(self.diagnose(signature, parameters=CREATED + EXPIRED), "")


class NewCentralEndToEnd(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        web = {"host": "127.0.0.1", "port": 0}
        webhook = {"type": "new-central", "token": KEY, "public_url": URL, "replay_window_hours": 0}
        config = {"webclient_info": web, "central_info": {"webhook": webhook}}
        cls.receiver = Receiver(config).__enter__()
        cls.addClassCleanup(cls.receiver.__exit__)

    def post(self, pairs, query="", host="www.example.com"):
        request = raw_request("POST", "/centralwebhook" + query, pairs, new_body(), host=host)
        return self.receiver.request(request).status

    def test_the_vectors_are_accepted(self):
        for signature in (AS_TEXT, AS_BYTES):
            pairs = [("Date", DATE), ("Signature-Input", VECTOR_INPUT), ("Signature", signature)]
            with self.subTest(signature):
                self.assertEqual(self.post(pairs), 200)
                self.assertEqual(self.post(pairs, query="?x=1"), 401)
                self.assertEqual(self.post(pairs[1:]), 401)

    def test_several_lines_are_joined(self):
        good, bad = member(), member(key="another")
        for first, second in ((good, bad), (bad, good)):
            pairs = [
                ("Signature-Input", "a=" + first[0]),
                ("Signature", "a=" + first[1]),
                ("Date", DATE),
                ("Signature", "b=" + second[1]),
                ("Signature-Input", "b=" + second[0]),
            ]
            self.assertEqual(self.post(pairs), 200)

    def test_covered_fields_of_several_lines_are_joined(self):
        given, signature = member((*USUAL, '"x-fields"'), values={'"x-fields"': "one, two,  three"})
        pairs = [("Date", DATE), ("Signature-Input", "a=" + given), ("Signature", "a=" + signature)]
        lines = [("X-Fields", " one \t"), ("X-Fields", "two,  three")]
        self.assertEqual(self.post(pairs + lines), 200)
        self.assertEqual(self.post(pairs + lines[::-1]), 401)
        self.assertEqual(self.post(pairs + lines[:1]), 401)

    def test_the_log_has_the_hint_and_the_answer_has_not(self):
        given, signature = member(values={'"@method"': "post"})
        pairs = [("Date", DATE), ("Signature-Input", "a=" + given), ("Signature", "a=" + signature)]
        start = len(self.receiver.stderr_lines)
        self.assertEqual(self.post(pairs), 401)
        line = self.receiver.wait_for_log("would match with the method in lower case", start=start)
        self.assertNotIn(signature, line)
        pairs[2] = ("Signature", "a=:AAAA:")
        self.assertEqual(self.post(pairs, host="10.0.0.5"), 401)
        self.receiver.wait_for_log("Host is '10.0.0.5', but public_url says 'www.example.com'")
