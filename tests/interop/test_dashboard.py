"""The dashboard of README.md: the log in SQLite, and datasette in a browser without a screen."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import sqlite3
import sys
import unittest
from pathlib import Path

from ..support import PATH, central_headers, deadline_poll, new_body
from ..test_readme import block
from . import parts
from .recipes import RECIPES, RecipeTest, recipe

DASHBOARD = recipe("import sqlite3\n")


class SqliteTest(RecipeTest):
    def rows(self, query):
        with sqlite3.connect(self.folder / "alerts.db") as database:
            return database.execute(query).fetchall()

    def start(self):
        return self.forward("--all", text=DASHBOARD, name="dashboard.py")

    def wait_for_rows(self, count):
        deadline_poll((self.folder / "alerts.db").exists)
        query = "SELECT count(*) FROM alert"
        tables = "SELECT * FROM sqlite_master"
        deadline_poll(lambda: self.rows(tables) and self.rows(query)[0][0] >= count, 60)
        self.assertEqual([(count,)], self.rows(query))

    def test_2000_alerts_over_four_rotations_are_there_once(self):
        receiver = self.receiver()
        process = None
        connection = http.client.HTTPConnection("127.0.0.1", receiver.port, timeout=10)
        for number in range(2000):
            if number in (400, 800, 1200, 1600):
                self.log.rename(self.folder / f"central.jsonl.{number}")
            if number == 100 or number == 1700:
                process = self.start()
            if number == 700:  # two rotations follow while it is stopped
                self.end(process, signal.SIGKILL)
            body = new_body(number=number, state="Open", device_id=f"CN{number % 7}")
            connection.request("POST", PATH, body, central_headers(body))
            answer = connection.getresponse()
            self.assertEqual(200, answer.status, answer.read())
            answer.read()
        connection.close()
        self.wait_for_rows(2000)
        numbers = [
            json.loads(line)["alert"]["number"] for (line,) in self.rows("SELECT record FROM alert")
        ]
        self.assertEqual(list(range(2000)), sorted(numbers))
        self.assertEqual(7, len(self.rows("SELECT DISTINCT device FROM alert")))
        self.end(process)
        (self.folder / "central.dashboard.py.position").unlink()  # all of them once more
        self.append({**json.loads(self.log_lines()[-1]), "key": "the end"})
        self.start()
        self.wait_for_rows(2001)

    def test_any_alert_becomes_a_row(self):
        record = {"received_at": "2026-11-21T20:35:12.123Z", "webhook": "w", "key": None}
        alerts = [
            None,
            [],
            "x",
            {"alert_type": "\ud83d"},
            {"severity": 10**30},
            {"device_id": ["d"]},
        ]
        self.append(*({**record, "alert": alert} for alert in alerts))
        self.append({**record, "alert": None})  # the same line again: bracken, or a kill
        self.append({**record, "alert": {}})
        self.start()
        self.wait_for_rows(len(alerts) + 1)
        self.assertEqual("", self.read("output"))


class DatasetteTest(RecipeTest):
    def test_facets_and_the_chart_are_in_the_browser(self):
        chromium = parts.need_program("chromium")
        for module in ("datasette", "datasette_dashboards"):
            parts.need_module(module)
        for number in range(60):
            alert = {"severity": ("Critical", "Minor")[number % 2], "state": "Open"}
            alert["device_id"] = f"CN{number % 3}"
            record = {"received_at": f"2026-11-{10 + number % 9}T10:00:00.000Z", "webhook": "noc"}
            self.append({**record, "alert": alert, "key": f"k{number}"})
        self.forward("--all", text=DASHBOARD, name="dashboard.py")
        position = self.folder / "central.dashboard.py.position"
        deadline_poll(lambda: position.exists() and self.position() == self.log.stat().st_size)
        (self.folder / "metadata.yaml").write_text(block("yaml", "databases:", RECIPES))
        (port,) = parts.free_ports(1)
        command = block("sh", "pip install 'datasette", RECIPES).splitlines()[-1]
        self.assertTrue(command.startswith("datasette "), command)
        command = command.replace("datasette ", f"'{Path(sys.executable).parent}/datasette' ", 1)
        self.assertIn("--port 8001", command)
        self.spawn(f"exec {command.replace('8001', str(port))}", "datasette.log")
        deadline_poll(lambda: self.answers(port), 30, self.read("datasette.log"))
        pages = {}
        for name in ("alerts/alert", "-/dashboards/alerts"):
            self.assertIn(f"`http://127.0.0.1:8001/{name}`", RECIPES)
            options = "--headless --no-sandbox --disable-gpu --virtual-time-budget=15000"
            options += " --window-size=1200,1000 --user-data-dir=browser --screenshot=page.png"
            url = f"http://127.0.0.1:{port}/{name}"
            pages[name] = self.run_shell(f"'{chromium}' {options} --dump-dom '{url}' 2>/dev/null")
            self.assertGreater((self.folder / "page.png").stat().st_size, 10_000)
        for facet in ("severity", "state", "webhook", "device"):
            self.assertIn(f'id="facet-{facet}"', pages["alerts/alert"])
        self.assertIn("60 rows", pages["alerts/alert"])
        self.assertIn("Alerts per day", pages["-/dashboards/alerts"])
        self.assertRegex(pages["-/dashboards/alerts"], r'<(canvas|svg)[^>]*class="marks"')

    def position(self):
        return json.loads(self.read("central.dashboard.py.position"))[1]

    @staticmethod
    def answers(port):
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=1):
                return True
        except OSError:
            return False


if __name__ == "__main__":
    unittest.main()
