"""The unit file of README.md, checked by systemd itself, and sockets that systemd passes."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

from ..support import TOP, Receiver, config_of
from . import parts

README = TOP / "README.md"
MAX_EXPOSURE = 2.0  # on systemd's scale from 0 (confined) to 10


def ini_blocks():
    """Return the ini blocks of README.md without their indentation."""
    return [
        block.strip() + "\n"
        for block in re.findall(
            r"^ *```ini\n(.*?)^ *```", README.read_text(), re.DOTALL | re.MULTILINE
        )
    ]


class UnitFileTest(unittest.TestCase):
    """Each test works on the units of README.md in a folder of its own."""

    @classmethod
    def setUpClass(cls):
        cls.program = parts.need_program("systemd-analyze")
        if not README.exists():
            raise unittest.SkipTest("there is no README.md")

    def setUp(self):
        folder = tempfile.TemporaryDirectory(prefix="units-")
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        blocks = ini_blocks()
        services = [block for block in blocks if "central_webhook_client.py" in block]
        self.assertEqual(1, len(services), "README.md has no unit of the receiver, or several")
        # verify wants a program that exists; which one is the machine's business
        service = re.sub(
            r"^(ExecStart=[-@:+!]*)(\S+)", rf"\1{sys.executable}", services[0], flags=re.MULTILINE
        )
        self.service = self.write("centralwebhook.service", service)
        self.sockets = [
            self.write("centralwebhook.socket", block) for block in blocks if "[Socket]" in block
        ]

    def write(self, name, text):
        path = self.folder / name
        path.write_text(text)
        return path

    def analyze(self, *arguments):
        return subprocess.run(
            [self.program, "--no-pager", *map(str, arguments)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
        )

    def test_systemd_accepts_the_units_without_a_remark(self):
        for unit in [*self.sockets, self.service]:
            with self.subTest(unit.name):
                done = self.analyze("verify", "--man=no", unit)
                self.assertEqual(0, done.returncode, done.stdout)
                self.assertEqual(
                    [], [line for line in done.stdout.splitlines() if str(self.folder) in line]
                )

    def test_systemd_rates_the_service_as_confined(self):
        done = self.analyze("security", "--offline=true", self.service)
        exposure = re.search(r"Overall exposure level for \S+: ([0-9.]+)", done.stdout)
        self.assertTrue(exposure, done.stdout)
        self.assertLess(float(exposure[1]), MAX_EXPOSURE, done.stdout)

    def test_the_service_says_when_it_is_ready_and_reloads_with_sighup(self):
        text = self.service.read_text()
        self.assertRegex(text, r"(?m)^Type=notify(?:-reload)?$")
        self.assertRegex(text, r"(?m)^(?:Type=notify-reload|ExecReload=.*HUP.*)$")


class SocketActivationTest(unittest.TestCase):
    """systemd-socket-activate listens, and starts the receiver at the first connection."""

    @classmethod
    def setUpClass(cls):
        cls.program = parts.need_program("systemd-socket-activate")

    def activated(self, *ports):
        python = [self.program]
        for port in ports:
            python += ["-l", f"127.0.0.1:{port}"]
        receiver = Receiver(config_of(), python=[*python, sys.executable, "-S"])
        self.addCleanup(receiver.__exit__)
        for port in ports:
            receiver.wait_for_log(f"Listening on 127.0.0.1:{port}")
        receiver.port = ports[0]
        return receiver

    def test_the_delivery_that_starts_it_is_accepted_and_the_socket_is_used(self):
        (port,) = parts.free_ports(1)
        receiver = self.activated(port)
        self.assertEqual(200, receiver.deliver().status)
        receiver.wait_for_log(f"listens on 127.0.0.1 port {port} ")
        self.assertEqual(200, receiver.deliver().status)
        self.assertEqual(0, receiver.stop())

    def test_with_two_sockets_it_ends_with_1_and_says_how_to_have_one(self):
        receiver = self.activated(*parts.free_ports(2))
        receiver.connect().socket.close()
        self.assertEqual(1, receiver.wait())
        self.assertRegex(receiver.stderr_lines[-1], "LISTEN_FDS.*ListenStream")
        self.assertNotIn("Traceback", "\n".join(receiver.stderr_lines))


if __name__ == "__main__":
    unittest.main()
