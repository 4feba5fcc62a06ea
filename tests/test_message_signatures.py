"""HTTP message signatures of new Central: vectors, and negatives that change one thing."""

from __future__ import annotations

import base64
import hashlib
import hmac
import unittest

import central_webhook_client as product
from tests.support import Receiver, new_body, raw_request

KEY = "5e175c081f53ca19894cbb6d541560f5c5e9a0754ae69639ef4d56b774b4e04e"
URL = "https://www.example.com/centralwebhook"
NOW = 1754963403  # of the vector's date as well
DATE = "Tue, 12 Aug 2025 01:50:03 GMT"
AS_TEXT = "sig1=:59xCXJTPTyTNhdcu7DD/Yrf2JiKMjngC2DAcGsydc20=:"
AS_BYTES = "sig1=:A6SAuZIsu4MydvHzNP80nQkInxarHgkq6j2wB+TYt3g=:"
VECTOR_INPUT = (
    'sig1=("@method" "@target-uri" "@authority" "@scheme" "@path" "date")'
    ';created=1754963403;keyid="webhook-1";alg="hmac-sha256"'
)
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
B25_KEY = base64.b64decode(
    "uzvJfB4u3N0Jy4T7NZ75MDVcr8zSTInedJtkgcu46YW4XByzNJjxBdtjUkdJPBtbmHhIDi6pcl8jsasjlTMtDQ=="
)


def member(components=USUAL, parameters=CREATED, values=(), key=KEY, written=None):
    """Return a member of Signature-Input as `written`, and that of Signature, over the canonical spelling."""
    canonical = f"({' '.join(components)}){parameters}"
    values = {**VALUES, **dict(values)}
    lines = [f"{name}: {values[name]}" for name in components] + [
        f'"@signature-params": {canonical}'
    ]
    key = key.encode() if isinstance(key, str) else key
    digest = hmac.new(key, "\n".join(lines).encode("latin-1"), hashlib.sha256).digest()
    return canonical if written is None else written, f":{base64.b64encode(digest).decode()}:"


def message(signed, body=b"{}", method="POST", path="/centralwebhook", query=None, **headers):
    """Return a request with these signatures: {label: (input, signature)}."""
    fields = {
        "host": "www.example.com",
        "date": DATE,
        "signature-input": ", ".join(f"{label}={pair[0]}" for label, pair in signed.items()),
        "signature": ", ".join(f"{label}={pair[1]}" for label, pair in signed.items()),
        **{name.replace("_", "-"): value for name, value in headers.items()},
    }
    fields = {name: value for name, value in fields.items() if value is not None}
    return product.Request(
        method=method,
        path=path,
        query=query,
        version="HTTP/1.1",
        headers=fields,
        repeated=frozenset(),
        body=body,
    )


class NewCentral(unittest.TestCase):
    def verify(self, request, tokens=(KEY,), url=URL, now=NOW):
        return product.verify_message_signature(
            request, list(tokens), product.parse_public_url(url), now
        )

    def assert_refused(self, request, **arguments):
        with self.assertRaises(product.SignatureError):
            self.verify(request, **arguments)

    def vector(self, signature=AS_TEXT, given=VECTOR_INPUT, **changes):
        return message({}, **{"signature": signature, "signature_input": given, **changes})

    # The vectors

    def test_the_vectors_verify_with_the_key_as_text_and_decoded(self):
        for signature in (AS_TEXT, AS_BYTES):
            with self.subTest(signature):
                self.assertEqual(self.verify(self.vector(signature)), (0, NOW))

    def test_the_signer_of_these_tests_makes_the_vectors(self):
        components = (
            '"@method"',
            '"@target-uri"',
            '"@authority"',
            '"@scheme"',
            '"@path"',
            '"date"',
        )
        parameters = CREATED + ';keyid="webhook-1";alg="hmac-sha256"'
        for key, expected in ((KEY, AS_TEXT), (bytes.fromhex(KEY), AS_BYTES)):
            given, signature = member(components, parameters, key=key)
            self.assertEqual(("sig1=" + given, "sig1=" + signature), (VECTOR_INPUT, expected))

    def test_one_thing_of_the_vector_changed_is_refused(self):
        other = "Tue, 12 Aug 2025 01:50:04 GMT"
        cases = {
            "method": {"method": "PUT"},
            "method in lower case": {"method": "post"},
            "query": {"query": "x=1"},
            "an empty query": {"query": ""},
            "date": {"date": other},
            "no date": {"date": None},
            "created": {"given": VECTOR_INPUT.replace("1754963403", "1754963404")},
            "keyid": {"given": VECTOR_INPUT.replace("webhook-1", "webhook-2")},
            "no keyid": {"given": VECTOR_INPUT.replace(';keyid="webhook-1"', "")},
            "order": {
                "given": VECTOR_INPUT.replace('"@method" "@target-uri"', '"@target-uri" "@method"')
            },
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
            "a string": {"signature": 'sig1="59xCXJTPTyTNhdcu7DD/Yrf2JiKMjngC2DAcGsydc20="'},
            "unused bits": {"signature": AS_TEXT.replace("c20=", "c21=")},
            "hexadecimal": {"signature": f"sig1={base64.b64decode(AS_TEXT[6:-1]).hex()}"},
        }
        for what, change in cases.items():
            with self.subTest(what):
                self.assert_refused(self.vector(**change))

    def test_another_key_is_refused(self):
        for token in (KEY.upper(), KEY[:-1], KEY + "00", KEY[::-1], "x"):
            with self.subTest(token):
                self.assert_refused(self.vector(), tokens=[token])
        self.assertEqual(self.verify(self.vector(AS_BYTES), tokens=[KEY.upper()])[0], 0)

    def test_the_position_of_the_token_that_matched_is_returned(self):
        for signature in (AS_TEXT, AS_BYTES):
            self.assertEqual(
                self.verify(self.vector(signature), tokens=["a", "00" * 32, KEY, "b"])[0], 2
            )

    def test_a_key_that_is_not_hexadecimal_is_used_as_text(self):
        for key in ("zSMrzuYrblgBfByy2JrM", "abc", "5e1", "0x5e", "\xfc\u20ac"):
            with self.subTest(ascii(key)):
                self.assertEqual(
                    self.verify(message({"sig1": member(key=key)}), tokens=[key])[0], 0
                )

    def test_the_vector_of_the_rfc_is_refused_only_for_what_it_leaves_out(self):
        """RFC 9421 B.2.5 covers no method, and no path; with these it is accepted, with the same key."""
        values = {'"@authority"': "example.com", '"content-type"': "application/json"}
        values['"date"'] = "Tue, 20 Apr 2021 02:07:55 GMT"
        components = ('"date"', '"@authority"', '"content-type"')
        parameters = ';created=1618884473;keyid="test-shared-secret"'
        fields = {
            "date": values['"date"'],
            "content_type": "application/json",
            "host": "example.com",
        }
        pair = member(components, parameters, values, B25_KEY)
        self.assertEqual(pair[1], ":pxcQw6G3AjtMBQjwo8XzkZf/bws5LelbaMk5rGIGtE8=:")
        url, token, now = "https://example.com/foo", B25_KEY.hex(), 1618884475
        self.assert_refused(
            message({"sig-b25": pair}, path="/foo", **fields), tokens=[token], url=url, now=now
        )
        components += ('"@method"', '"@path"')
        pair = member(components, parameters, {**values, '"@path"': "/foo"}, B25_KEY)
        request = message({"sig-b25": pair}, path="/foo", **fields)
        self.assertEqual(self.verify(request, tokens=[token], url=url, now=now), (0, 1618884473))

    # What must be covered

    def test_what_must_be_covered(self):
        method, target, authority, path, date = (
            '"@method"',
            '"@target-uri"',
            '"@authority"',
            '"@path"',
            '"date"',
        )
        good = [
            ((method, target, date), ""),
            ((method, target), CREATED),
            ((method, authority, path, date), ""),
            ((method, authority, path), CREATED),
            ((date, path, authority, target, method), CREATED),
        ]
        bad = [
            ((target, date), CREATED),
            ((method, date), CREATED),
            ((method, authority, date), CREATED),
            ((method, path, date), CREATED),
            ((method, '"@request-target"', date), CREATED),
            ((method, '"@scheme"', path, date), CREATED),
            ((method, target), ""),
            ((method, target), f";expires={NOW + 60}"),
            ((method, target), ';keyid="x"'),
            ((), CREATED),
        ]
        for components, parameters in good:
            with self.subTest(components, parameters=parameters):
                position, sent = self.verify(message({"sig1": member(components, parameters)}))
                self.assertEqual((position, sent), (0, NOW))
        for components, parameters in bad:
            with self.subTest(components, parameters=parameters):
                self.assert_refused(message({"sig1": member(components, parameters)}))

    def test_the_signed_time_is_created_before_date(self):
        request = message({"sig1": member(USUAL, f";created={NOW - 100}")})
        self.assertEqual(self.verify(request), (0, NOW - 100))

    def test_a_component_that_is_not_there_is_refused(self):
        for name in (
            '"x-missing"',
            '"@status"',
            '"@unknown"',
            '"@"',
            '"@query-param"',
            '"@query-param";name="x"',
        ):
            for value in ("", "200"):
                with self.subTest(name, value=value):
                    pair = member((*USUAL, name), values={name: value})
                    self.assert_refused(message({"sig1": pair}))

    def test_a_component_that_is_covered_twice_is_refused(self):
        for name in USUAL:
            with self.subTest(name):
                self.assert_refused(message({"sig1": member((*USUAL, name))}))

    def test_header_fields_are_covered_by_their_value(self):
        pair = member((*USUAL, '"x-fields"'), values={'"x-fields"': "one, two"})
        self.assertEqual(self.verify(message({"sig1": pair}, x_fields="one, two"))[0], 0)
        self.assert_refused(message({"sig1": pair}, x_fields="one,two"))
        self.assert_refused(message({"sig1": pair}, x_fields="one"))
        self.assert_refused(message({"sig1": pair}))

    def test_a_field_name_that_is_not_lower_case_is_refused(self):
        pair = member(('"@method"', '"@target-uri"', '"Date"'), values={'"Date"': DATE})
        self.assert_refused(message({"sig1": pair}))

    # Parameters

    def test_the_algorithm_must_be_hmac_sha256_where_it_is_given(self):
        self.assertEqual(
            self.verify(message({"sig1": member(parameters=CREATED + ';alg="hmac-sha256"')}))[0], 0
        )
        for name in (
            "",
            "hmac-sha512",
            "HMAC-SHA256",
            "rsa-pss-sha512",
            "ecdsa-p256-sha256",
            "ed25519",
            "none",
        ):
            with self.subTest(name):
                self.assert_refused(message({"sig1": member(parameters=f'{CREATED};alg="{name}"')}))

    def test_expires_is_enforced(self):
        for seconds, passes in (
            (3600, True),
            (10, True),
            (-10, False),
            (-3600, False),
            (-NOW, False),
        ):
            request = message({"sig1": member(parameters=f"{CREATED};expires={NOW + seconds}")})
            with self.subTest(seconds):
                if passes:
                    self.assertEqual(self.verify(request)[0], 0)
                else:
                    self.assert_refused(request)

    def test_known_parameters_are_accepted_in_any_order(self):
        for parameters in (
            CREATED + ';nonce="n";tag="t";keyid="k"',
            ';tag="t"' + CREATED,
            CREATED + ';keyid="a\\"b\\\\c"',
            CREATED + ';nonce=""',
            f';keyid="k";expires={NOW + 5};alg="hmac-sha256"' + CREATED,
        ):
            with self.subTest(parameters):
                self.assertEqual(
                    self.verify(message({"sig1": member(parameters=parameters)}))[0], 0
                )

    def test_unknown_parameters_of_the_signature_are_part_of_the_base(self):
        for parameter in (";unknown=1", ';vendor="x"', ";flag"):
            with self.subTest(parameter):
                self.assertEqual(
                    self.verify(message({"sig1": member(parameters=CREATED + parameter)}))[0], 0
                )

    def test_parameters_of_the_wrong_type_are_refused(self):
        for parameters in (
            ';created="1754963403"',
            ";created=1754963403.5",
            ";created=?1",
            ";created",
            CREATED + ';expires="9999999999"',
            CREATED + ";keyid=5",
            CREATED + ";nonce=:YWJj:",
        ):
            with self.subTest(parameters):
                self.assert_refused(message({"sig1": member(parameters=parameters)}))

    def test_a_parameter_of_a_component_that_is_unknown_is_refused(self):
        for name in ('"date";unknown', '"date";x=1', '"@method";x', '"@path";name="x"'):
            value = VALUES[name.partition(";")[0]]
            with self.subTest(name):
                self.assert_refused(message({"sig1": member((*USUAL, name), values={name: value})}))

    # Labels

    def test_a_good_label_beside_bad_ones_passes(self):
        good, bad = member(), member(key="another")
        policy = member(('"@method"',))
        for signed in (
            {"a": bad, "b": good},
            {"a": good, "b": bad},
            {"a": policy, "b": bad, "c": bad, "d": good},
        ):
            with self.subTest(list(signed)):
                self.assertEqual(self.verify(message(signed))[0], 0)
        self.assert_refused(message({"a": bad, "b": policy}))

    def test_more_than_four_labels_are_refused(self):
        good, bad = member(), member(key="another")
        for labels in ("abcde", "abcdefghij"):
            for position in (0, len(labels) - 1):
                signed = {label: good if n == position else bad for n, label in enumerate(labels)}
                with self.subTest(labels, position=position):
                    self.assert_refused(message(signed))

    def test_a_label_that_occurs_twice_is_refused(self):
        given, signature = member()
        for fields in (
            {"signature_input": f"a={given}, a={given}", "signature": f"a={signature}"},
            {"signature_input": f"a={given}", "signature": f"a={signature}, a={signature}"},
            {"signature_input": f"a={given}", "signature": f"a=:AAAA:, a={signature}"},
        ):
            with self.subTest(list(fields)):
                self.assert_refused(message({}, **fields))

    def test_a_label_of_only_one_field_is_passed_over(self):
        (given, signature), (other, other_signature) = member(), member(key="another")
        inputs, signatures = f"a={other}, b={given}", f"b={signature}, c={other_signature}"
        self.assertEqual(
            self.verify(message({}, signature_input=inputs, signature=signatures))[0], 0
        )
        self.assert_refused(message({}, signature_input=f"a={given}", signature=f"b={signature}"))

    # Spelling

    def test_the_list_is_serialised_again_before_it_is_verified(self):
        canonical = member()
        for written in (
            f'( "@method"   "@target-uri" "date" ){CREATED}',
            f'("@method" "@target-uri" "date");  created={NOW}',
            f'("@method" "@target-uri" "date");created=000{NOW}',
            f'   ("@method" "@target-uri" "date"){CREATED}'.strip() + "  ",
        ):
            with self.subTest(written):
                self.assertNotEqual(written, canonical[0])
                self.assertEqual(self.verify(message({"sig1": (written, canonical[1])}))[0], 0)
        fields = {
            "signature_input": f"a=(){CREATED} \t,\t b={canonical[0]}",
            "signature": f"a=:AAAA:,b={canonical[1]}",
        }
        self.assertEqual(self.verify(message({}, **fields))[0], 0)

    def test_what_is_not_strictly_a_structured_field_is_refused_however_it_is_signed(self):
        tail = '"@method" "@target-uri" "date"'
        for text in (
            f'("@method""@target-uri" "date"){CREATED}',
            f'("@method"\t"@target-uri" "date"){CREATED}',
            f'("@method", "@target-uri", "date"){CREATED}',
            f"({tail} {CREATED}",
            f"({tail}{CREATED}",
            f"{tail}{CREATED}",
            f"(@method @target-uri date){CREATED}",
            f"('@method' '@target-uri' 'date'){CREATED}",
            f"({tail}) {CREATED}",
            f"({tail});Created={NOW}",
            f"({tail});created ={NOW}",
            f"({tail});created= {NOW}",
            f"({tail});created=+{NOW}",
            f"({tail});created=0x1",
            f"({tail});created=1234567890123456",
            f"({tail});created=",
            f"({tail});;created={NOW}",
            f"({tail}){CREATED};",
            f"({tail}){CREATED},",
            f"({tail}){CREATED}, ",
            f"({tail}){CREATED} x",
            f'({tail}){CREATED};keyid="\xe9"',
            f'({tail}){CREATED};keyid="a\tb"',
            f'({tail}){CREATED};keyid="a\nb"',
            f'({tail}){CREATED};keyid="a\\b"',
            f'({tail}){CREATED};keyid="a',
            f'({tail}){CREATED};keyid="a"b"',
            f"({tail}){CREATED};keyid='a'",
            f"({tail}){CREATED};1=2",
            "",
            "()",
            "(",
            '"@method"',
            "?1",
            "5",
        ):
            lines = [f"{name}: {VALUES[name]}" for name in USUAL] + [f'"@signature-params": {text}']
            digest = hmac.new(
                KEY.encode(), "\n".join(lines).encode("latin-1"), hashlib.sha256
            ).digest()
            with self.subTest(text):
                self.assert_refused(
                    message({"sig1": (text, f":{base64.b64encode(digest).decode()}:")})
                )
                self.assert_refused(message({"sig1": (text, member()[1])}))

    def test_a_malformed_label_or_separator_is_refused(self):
        given, signature = member()
        for inputs, signatures in (
            (f"Sig1={given}", f"Sig1={signature}"),
            (f"1={given}", f"1={signature}"),
            (f"sig 1={given}", f"sig 1={signature}"),
            (f"={given}", f"={signature}"),
            (f"{given}", f"{signature}"),
            (f"sig1 ={given}", f"sig1={signature}"),
            (f"sig1= {given}", f"sig1={signature}"),
            (f"sig1={given};", f"sig1={signature}"),
            (f",sig1={given}", f"sig1={signature}"),
            (f"sig1={given}", f"sig1={signature},"),
            (f"sig1={given}", f"sig1={signature} b={signature}"),
            (f"sig1={given}", f"sig1={signature[:-1]}"),
            (f"sig1={given}", f"sig1=({signature})"),
            (f"sig1={given}", f"sig1:{signature}"),
        ):
            with self.subTest(inputs[:20], signature=signatures[:20]):
                self.assert_refused(message({}, signature_input=inputs, signature=signatures))

    def test_a_line_of_the_base_cannot_be_injected_through_a_string(self):
        """RFC 9421 section 7.5.3: what is signed is another request than what is shown."""
        name = '"x"\n"@target-uri": https://elsewhere.example/\n"y"'
        components = ('"@method"', '"date"', name)
        values = {name: "z"}
        self.assert_refused(message({"sig1": member(components, values=values)}, x="z", y="z"))

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
                    self.assertEqual(self.verify(request)[0], 0)
                    request.query = "other=1"
                    self.assert_refused(request)

    def test_the_path_has_no_query(self):
        components = ('"@method"', '"@authority"', '"@path"')
        self.assertEqual(self.verify(message({"s": member(components)}, query="a=b"))[0], 0)
        values = {'"@path"': "/centralwebhook?a=b"}
        self.assert_refused(message({"s": member(components, values=values)}, query="a=b"))

    def test_parameters_of_the_query_are_covered_as_the_rfc_encodes_them(self):
        """The examples of RFC 9421 section 2.2.8."""
        first = "param=value&foo=bar&baz=batman&qux="
        second = "var=this%20is%20a%20big%0Amultiline%20value&bar=with+plus+whitespace"
        second += "&fa%C3%A7ade%22%3A%20=something"
        cases = [
            (first, "baz", "batman"),
            (first, "qux", ""),
            (first, "param", "value"),
            (second, "var", "this%20is%20a%20big%0Amultiline%20value"),
            (second, "bar", "with%20plus%20whitespace"),
            (second, "fa%C3%A7ade%22%3A%20", "something"),
        ]
        for query, name, value in cases:
            component = f'"@query-param";name="{name}"'
            pair = member(
                (*USUAL, component), values={component: value, '"@target-uri"': f"{URL}?{query}"}
            )
            with self.subTest(name):
                self.assertEqual(self.verify(message({"sig1": pair}, query=query))[0], 0)

    def test_a_parameter_of_the_query_that_is_missing_or_there_twice_is_refused(self):
        for query in ("b=1", "", None, "a=1&a=1", "a=1&a=2", "a=1&%61=1"):
            component = '"@query-param";name="a"'
            target = URL if query is None else f"{URL}?{query}"
            for value in ("1", "", "2"):
                pair = member(
                    (*USUAL, component), values={component: value, '"@target-uri"': target}
                )
                with self.subTest(query, value=value):
                    self.assert_refused(message({"sig1": pair}, query=query))

    def test_host_and_forwarded_headers_are_not_looked_at(self):
        components = (
            '"@method"',
            '"@target-uri"',
            '"@authority"',
            '"@scheme"',
            '"@path"',
            '"@request-target"',
        )
        pair = member(components)
        for headers in (
            {"host": "evil.example"},
            {"host": None},
            {
                "host": "evil.example",
                "x_forwarded_host": "evil.example",
                "x_forwarded_proto": "http",
            },
            {
                "x_forwarded_port": "8443",
                "x_forwarded_prefix": "/x",
                "forwarded": "host=evil.example;proto=http",
            },
        ):
            with self.subTest(headers):
                self.assertEqual(self.verify(message({"sig1": pair}, **headers))[0], 0)
        self.assertEqual(self.verify(message({"sig1": pair}, path="/rewritten/by/the/proxy"))[0], 0)

    def test_a_signature_for_another_place_is_refused_whatever_the_host_header_says(self):
        others = {
            '"@target-uri"': "https://evil.example/centralwebhook",
            '"@authority"': "evil.example",
            '"@scheme"': "http",
            '"@path"': "/other",
            '"@request-target"': "/other",
        }
        components = (
            '"@method"',
            '"@target-uri"',
            '"@authority"',
            '"@scheme"',
            '"@path"',
            '"@request-target"',
        )
        headers = {
            "host": "evil.example",
            "x_forwarded_host": "evil.example",
            "x_forwarded_proto": "http",
        }
        for name, value in others.items():
            with self.subTest(name):
                pair = member(components, values={name: value})
                self.assert_refused(message({"sig1": pair}, path="/other", **headers))

    def test_the_public_url_gives_scheme_authority_and_path(self):
        cases = [
            # public_url, authority, scheme, path
            ("https://www.example.com/a/b", "www.example.com", "https", "/a/b"),
            ("https://WWW.Example.COM/A%2fb", "www.example.com", "https", "/A%2fb"),
            ("https://www.example.com:443/a", "www.example.com", "https", "/a"),
            ("https://www.example.com:8443/a", "www.example.com:8443", "https", "/a"),
            ("http://www.example.com:80/a", "www.example.com", "http", "/a"),
            ("http://www.example.com:443/a", "www.example.com:443", "http", "/a"),
            ("https://www.example.com", "www.example.com", "https", "/"),
            ("https://www.example.com/", "www.example.com", "https", "/"),
            ("https://[2001:DB8::1]:8443/a", "[2001:db8::1]:8443", "https", "/a"),
            ("https://192.0.2.1/a", "192.0.2.1", "https", "/a"),
        ]
        components = ('"@method"', '"@authority"', '"@scheme"', '"@path"')
        for url, authority, scheme, path in cases:
            values = {'"@authority"': authority, '"@scheme"': scheme, '"@path"': path}
            with self.subTest(url):
                self.assertEqual(
                    self.verify(message({"s": member(components, values=values)}), url=url)[0], 0
                )

    def test_a_public_url_with_an_empty_path_is_tried_in_both_forms(self):
        for url in ("https://www.example.com", "https://www.example.com:8443"):
            for query in (None, "a=b"):
                for slash in ("", "/"):
                    suffix = "" if query is None else "?" + query
                    pair = member(values={'"@target-uri"': url + slash + suffix})
                    with self.subTest(url, query=query, slash=slash):
                        self.assertEqual(
                            self.verify(message({"s": pair}, path="/", query=query), url=url)[0], 0
                        )
            pair = member(values={'"@target-uri"': url + "//"})
            self.assert_refused(message({"s": pair}, path="/"), url=url)
        self.assert_refused(message({"s": member(values={'"@target-uri"': URL + "/"})}))

    def test_what_is_no_public_url_is_refused(self):
        for url in (
            "",
            "www.example.com/a",
            "/a",
            "ftp://www.example.com/a",
            "https://",
            "https:///a",
            "https://www.example.com:99999/a",
            "https://www.example.com:x/a",
            "https://user@www.example.com/a",
            "https://user:password@www.example.com/a",
            "https://www.example.com/a#b",
            "https://www.example.com/a b",
            "https://www.example.com/\xe9",
            "https://[::1/a",
            "https://www.example.com/a\n",
        ):
            with self.subTest(url), self.assertRaises(ValueError):
                product.parse_public_url(url)

    # The digest of the body

    def test_the_content_digest_is_checked_where_it_is_covered(self):
        body = b'{"id":"1"}'

        def digest(name, data):
            return f":{base64.b64encode(hashlib.new(name, data).digest()).decode()}:"

        good256, good512 = f"sha-256={digest('sha256', body)}", f"sha-512={digest('sha512', body)}"
        bad256 = f"sha-256={digest('sha256', body + b'x')}"
        cases = [
            (good256, True),
            (good512, True),
            (f"{good256}, {good512}", True),
            (f"md5=:AAAA:, {good256}", True),
            (bad256, False),
            (f"sha-512={digest('sha256', body)}", False),
            ("md5=" + digest("md5", body), False),
            (good256.replace("=:", "="), False),
            (good256.upper(), False),
            ("sha-256", False),
            ("", False),
            ("=", False),
        ]
        for value, passes in cases:
            pair = member((*USUAL, '"content-digest"'), values={'"content-digest"': value})
            request = message({"sig1": pair}, body=body, content_digest=value)
            with self.subTest(value):
                if passes:
                    self.assertEqual(self.verify(request)[0], 0)
                    request.body = body + b"x"
                    self.assert_refused(request)
                else:
                    self.assert_refused(request)
        self.assert_refused(
            message({"sig1": member((*USUAL, '"content-digest"'), values={'"content-digest"': ""})})
        )
        self.assertEqual(
            self.verify(message({"sig1": member()}, body=body, content_digest=bad256))[0], 0
        )

    def test_strange_headers_raise_nothing_but_a_signature_error(self):
        for value in (
            "\0",
            "\xe9",
            "\xff" * 300,
            "(" * 5000,
            '"' * 5000,
            ";" * 5000,
            "=" * 99,
            "a" * 60000,
            "a=?2",
        ):
            for fields in (
                {"signature_input": value},
                {"signature": value},
                {"signature": "sig1=" + value},
            ):
                with self.subTest(value[:9], fields=list(fields)):
                    self.assert_refused(message({"sig1": member()}, **fields))
        nested = f'("@method" "@target-uri" ("date")){CREATED}'
        self.assert_refused(message({"sig1": (nested, member()[1])}))
        for created in ("999999999999999", "-999999999999999"):
            request = message({"sig1": member(parameters=f";created={created}")})
            self.assertEqual(self.verify(request), (0, int(created)))


class NewCentralEndToEnd(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        web = {"host": "127.0.0.1", "port": 0}
        webhook = {"type": "new-central", "token": KEY, "public_url": URL, "replay_window_hours": 0}
        cls.receiver = Receiver(
            {"webclient_info": web, "central_info": {"webhook": webhook}}
        ).__enter__()
        cls.addClassCleanup(cls.receiver.__exit__)

    def post(self, pairs, query="", method="POST"):
        return self.receiver.request(
            raw_request(method, "/centralwebhook" + query, pairs, new_body())
        ).status

    def test_the_vectors_are_accepted(self):
        for signature in (AS_TEXT, AS_BYTES):
            with self.subTest(signature):
                pairs = [
                    ("Date", DATE),
                    ("Signature-Input", VECTOR_INPUT),
                    ("Signature", signature),
                ]
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
