"""The receiver as a container engine would run it, but without an engine.

It is PID 1 of its namespaces, with a read-only root, one writable volume, a numeric user without a
passwd entry, no terminal, no environment and a small stack.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
import unittest
from pathlib import Path

from ..support import (
    PROGRAM,
    Receiver,
    at_once,
    central_headers,
    config_of,
    deadline_poll,
    new_body,
    raw_request,
)
from . import parts

USER = 12345
NEW_TOKEN = "another-secret-token"
PROXY = {"http_proxy": "http://192.0.2.1:3128"}
# Not urllib.request, which would go through the proxy of http_proxy.
HEALTH_CHECK = (
    "import http.client as h; c = h.HTTPConnection('127.0.0.1', {port}, timeout=3); "
    "c.request('GET', '/health'); exit(c.getresponse().status != 200)"
)

# Prepares a container as an engine does, and becomes its PID 1. $1: the volume; $2...: the command.
CONTAINER = r"""#!/bin/sh
set -e
volume=$1
shift
chown -R 12345:12345 .
mount --bind "$volume" "$volume"
while read -r _ point _; do
  case $point in
    "$volume" | /proc | /proc/* | /dev | /dev/* | /sys | /sys/*) ;;
    *) mount -o remount,bind,ro "$point" 2>/dev/null || [ "$point" != / ] ;;
  esac
done </proc/self/mounts
ulimit -s 256
exec setsid env -i PATH="$PATH" \
  setpriv --reuid 12345 --regid 12345 --clear-groups --pdeathsig KILL "$@" </dev/null
"""


def can_unshare():
    """Return True if this machine allows what the tests need: root, and namespaces."""
    command = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child", "mount", "-t", "tmpfs"]
    done = subprocess.run([*command, "tmpfs", "/mnt"], capture_output=True, timeout=30)
    return done.returncode == 0


class ContainerTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        for program in ("unshare", "nsenter", "setpriv", "setsid", "mount"):
            parts.need_program(program)
        # sys.executable may be in a folder that only its owner can enter
        python = parts.need(
            "a Python for all users", lambda: shutil.which("python3", path="/usr/bin")
        )
        if os.geteuid() != 0 or not can_unshare():
            raise unittest.SkipTest("namespaces are not allowed here")
        cls.image = Path(tempfile.mkdtemp(prefix="image-"))
        cls.addClassCleanup(shutil.rmtree, cls.image)
        shutil.copy(PROGRAM, cls.image)
        script = cls.image / "container"
        script.write_text(CONTAINER)
        for path in (cls.image, script):
            path.chmod(0o755)
        cls.volume = cls.image / "volume"
        cls.volume.mkdir()
        cls.log = cls.volume / "central.jsonl"
        cls.command = ["unshare", "--pid", "--fork", "--mount", "--mount-proc", "--kill-child"]
        cls.command += [str(script), str(cls.volume), python, "-S"]

    def container(self, log=None, **options):
        """Make a receiver as PID 1 of namespaces of its own, not yet entered."""
        os.chown(self.volume, USER, USER)
        config = config_of(**({"log_file": str(log)} if log else {}), **options)
        return Receiver(config, python=self.command, program=self.image / PROGRAM.name)

    def first_process(self, receiver):
        """Return the outer PID of the process that is PID 1 inside."""
        parent = receiver.process.pid
        children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
        self.assertEqual(1, len(children))
        return int(children[0])

    def status(self, pid):
        """Return /proc/PID/status as a dict of lists of words."""
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return {name: value.split() for name, _, value in (line.partition(":") for line in lines)}

    def check_health(self, pid, port):
        """Run the health check inside; return its exit code."""
        command = ["nsenter", "--pid", "--mount", "--target", str(pid)]
        command += ["setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups"]
        command += [self.command[-2], "-c", HEALTH_CHECK.format(port=port)]
        done = subprocess.run(command, env=PROXY, stdin=subprocess.DEVNULL, capture_output=True)
        return done.returncode

    def test_it_serves_reloads_and_stops_cleanly_as_first_process(self):
        with self.container(self.log) as receiver:
            pid = self.first_process(receiver)
            status = self.status(pid)
            self.assertEqual("1", status["NSpid"][-1])
            self.assertEqual([str(USER)] * 4, status["Uid"])
            self.assertEqual([], status["Groups"])
            mounts = Path(f"/proc/{pid}/mounts").read_text().splitlines()
            options = {line.split()[1]: line.split()[3].split(",")[0] for line in mounts}
            self.assertEqual(("ro", "rw"), (options["/"], options[str(self.volume)]))

            self.assertEqual(200, receiver.deliver().status)
            self.assertEqual(0, self.check_health(pid, receiver.port))

            webhook = {"name": "noc", "path": "/centralwebhook", "token": NEW_TOKEN}
            receiver.write_config(config_of(log_file=str(self.log), webhook=webhook))
            os.kill(pid, signal.SIGHUP)
            receiver.wait_for_log("configuration reloaded")
            self.assertEqual(401, receiver.deliver().status)

            body = new_body()
            with receiver.connect() as connection:  # one delivery is in progress at the stop
                whole = raw_request(headers=central_headers(body, token=NEW_TOKEN), body=body)
                connection.send(whole[:-1])
                deadline_poll(lambda: b"in_flight 2" in self.metrics(receiver))
                os.kill(pid, signal.SIGTERM)
                deadline_poll(lambda: not self.accepts(receiver))
                self.assertEqual(1, self.check_health(pid, receiver.port))
                connection.send(whole[-1:])
                self.assertEqual(200, connection.read().status)
            self.assertEqual(0, receiver.wait())
            shown = [json.loads(line) for line in receiver.stdout_lines]
        logged = [json.loads(line) for line in self.log.read_text().splitlines()]
        self.assertEqual(2, len(logged))
        for line in logged:
            del line["key"]
        self.assertEqual(shown, logged)

    def metrics(self, receiver):
        return receiver.request(raw_request("GET", "/metrics", length=False)).body

    def accepts(self, receiver):
        with contextlib.suppress(OSError):
            receiver.connect().socket.close()
            return True
        return False

    def test_a_log_outside_the_volume_ends_it_with_1_and_the_reason(self):
        receiver = self.container(self.image / "central.jsonl")
        self.addCleanup(receiver.__exit__)
        self.assertEqual(1, receiver.wait())
        (line,) = receiver.stderr_lines
        self.assertIn(f"{self.image}/central.jsonl: Read-only file system", line)

    def test_brackets_nested_20000_deep_do_not_exceed_the_small_stack(self):
        with self.container(max_body_bytes=100_000) as receiver:
            self.assertEqual(200, receiver.deliver(b"[" * 20_000 + b"]" * 20_000).status)
            self.assertEqual(200, receiver.deliver(b"[" * 20_000).status)
            self.assertEqual(200, receiver.deliver().status)

    def test_several_on_one_machine_do_not_all_use_the_same_processor(self):
        if len(os.sched_getaffinity(0)) < 2:
            self.skipTest("there is only one processor")
        seen = set()
        for _ in range(8):  # by chance, 24 of 24 choose the same of two once in 8 million runs
            with at_once(*(self.container() for _ in range(3))) as receivers:
                for receiver in receivers:
                    found = os.sched_getaffinity(self.first_process(receiver))
                    self.assertEqual(1, len(found))
                    self.assertLessEqual(found, os.sched_getaffinity(0))
                    seen |= found
            if len(seen) > 1:
                return
        self.fail(f"24 receivers are all on {seen}")


if __name__ == "__main__":
    unittest.main()
