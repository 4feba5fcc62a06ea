"""The times that senders sign."""

from __future__ import annotations

import unittest

import central_webhook_client as product


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


if __name__ == "__main__":
    unittest.main()
