"""Readers of the log beside a real receiver: tail, rsyslog to a second rsyslog, logrotate.

Whatever happens to the disk and to the receiver, each accepted delivery reaches a reader exactly
once, and a reader sees nothing but whole lines and half lines that are not JSON.
"""

from __future__ import annotations

import contextlib
import functools
import os
import random
import resource
import shutil
import socket
import subprocess
import tempfile
import unittest
from pathlib import Path

from ..support import (
    Receiver,
    config_of,
    deadline_poll,
    parse_lines,
)
from ..test_life import Senders
from . import parts

IMFILE = """
global(maxMessageSize="8m" workDirectory="{folder}")
module(load="imfile")
input(type="imfile" File="{log}" Tag="centralwebhook" Ruleset="centralwebhook")
ruleset(name="centralwebhook") {{
    action(type="omfwd" Target="127.0.0.1" Port="{port}" Protocol="tcp"
           TCP_Framing="octet-counted" Template="RSYSLOG_SyslogProtocol23Format"
           action.resumeRetryCount="-1" action.resumeInterval="1")
}}
"""
IMTCP = """
global(maxMessageSize="8m" workDirectory="{folder}")
module(load="imtcp")
input(type="imtcp" Address="127.0.0.1" Port="{port}" Ruleset="centralwebhook")
template(name="line" type="string" string="%msg%\\n")
ruleset(name="centralwebhook") {{
    action(type="omfile" File="{folder}/copy" Template="line")
}}
"""


class LimitedFile:
    """A limit of the size of the receiver's files, which acts as a full disk does."""

    def __init__(self, log):
        self.log = log

    def fill(self, process):
        """Leave room for a part of a line, or for a few lines."""
        size = self.log.stat().st_size if self.log.exists() else 0
        self._set(process, size + random.randrange(1, 2000))

    def make_room(self, process):
        self._set(process, resource.getrlimit(resource.RLIMIT_FSIZE)[1])

    def _set(self, process, size):
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, hard))


class SmallDisk:
    """A small file system that another file fills up."""

    def __init__(self, folder):
        self.folder = folder

    def fill(self, process):
        with (self.folder / "ballast").open("wb", buffering=0) as ballast:
            with contextlib.suppress(OSError):
                while True:
                    ballast.write(bytes(65536))
            ballast.truncate(max(0, ballast.tell() - 10_000))  # room for some lines

    def make_room(self, process):
        (self.folder / "ballast").unlink()


class ReaderCase(unittest.TestCase):
    """A folder with a log that outlives its receivers, and programs that end with the test."""

    def setUp(self):
        self.folder = Path(tempfile.mkdtemp(prefix="readers-"))
        self.addCleanup(shutil.rmtree, self.folder, ignore_errors=True)
        self.log = self.folder / "central.jsonl"

    def receiver(self):
        return Receiver(config_of(log_file=str(self.log)))

    def spawn(self, *command, stdout=subprocess.DEVNULL):
        process = subprocess.Popen(
            list(map(str, command)),
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=subprocess.DEVNULL,
        )
        self.addCleanup(process.wait, 15)
        self.addCleanup(process.terminate)
        return process

    def fill_and_kill(self, senders, disk, kills, rotate=None):
        """Have receivers work on a disk that is full now and then, and kill all but the last.

        `rotate` is called while the last one receives, and not before a kill: a restarted receiver
        recognises repetitions by the log, not by a rotated one.
        """
        for life in range(kills + 1):
            with self.receiver() as receiver:
                senders.port = receiver.port
                senders.wait_for_accepted(random.randrange(20, 60))
                for _ in range(3):
                    refused = senders.statuses[503]
                    disk.fill(receiver.process)
                    deadline_poll(
                        lambda count=refused: senders.statuses[503] > count,
                        message="the disk is never full",
                    )
                    disk.make_room(receiver.process)
                    senders.wait_for_accepted(random.randrange(20, 60))
                if life < kills:
                    receiver.process.kill()
                else:
                    self.assertEqual({200, 503}, set(senders.statuses))
                    if rotate:
                        rotate()
                        senders.wait_for_accepted(20)
                    senders.finish()
                    self.assertEqual(0, receiver.stop())

    def assert_all_once(self, accepted, data):
        """Check that the lines in `data` that are JSON are the accepted deliveries, each once."""
        lines = parse_lines(data)
        self.assertEqual(len(lines), len({line["key"] for line in lines}), "a line is repeated")
        self.assertEqual(sorted(accepted), sorted(line["delivery_id"] for line in lines))

    def assert_half_lines(self, data):
        """Check that writes were cut within a line, so that the test has shown what it is for."""
        self.assertLess(len(parse_lines(data)), data.count(b"\n"))


class TailTest(ReaderCase):
    """`tail -n 0 -F`, as it is. It may lose lines over rotations, so there are none here."""

    def check(self, disk):
        tail = parts.need_program("tail")
        output = self.folder / "output"
        self.log.touch()
        with output.open("wb") as file:
            process = self.spawn(tail, "-n", "0", "-F", self.log, stdout=file)
        deadline_poll(lambda: self.follows(process), message="tail does not open the log")
        with Senders(0, 4) as senders:
            self.fill_and_kill(senders, disk, kills=2)
        data = self.log.read_bytes()
        deadline_poll(lambda: output.stat().st_size >= len(data), message="tail does not catch up")
        self.assertEqual(data, output.read_bytes())
        self.assert_half_lines(data)
        self.assert_all_once(senders.accepted, data)

    def follows(self, process):
        """Return True if tail has read the log to its end, and now waits for more."""
        folder = Path(f"/proc/{process.pid}")
        links = []
        with contextlib.suppress(OSError):
            links = [os.readlink(link) for link in (folder / "fd").iterdir()]
        state = (folder / "stat").read_text().rpartition(") ")[2][:1]
        return str(self.log) in links and state == "S"

    def test_it_gets_each_delivery_once_over_full_disks_and_kills(self):
        self.check(LimitedFile(self.log))

    def test_it_gets_each_delivery_once_over_a_small_file_system_and_kills(self):
        disk = self.folder / "disk"
        disk.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)]
        if os.geteuid() != 0 or subprocess.run(mount, stderr=subprocess.DEVNULL).returncode:
            self.skipTest("no tmpfs can be mounted")
        self.addCleanup(subprocess.run, ["umount", "-l", str(disk)], check=False)
        self.log = disk / "central.jsonl"
        self.check(SmallDisk(disk))


class RotationCase(ReaderCase):
    """logrotate, which does not signal the receiver."""

    def setUp(self):
        super().setUp()
        self.logrotate = parts.need_program("logrotate")
        self.folder.chmod(0o755)  # logrotate refuses others, and those that a group may write to
        for mode in ("create", "nocreate"):
            conf = self.folder / mode
            conf.write_text(f"{self.log} {{\nrotate 99\n{mode}\n}}\n")
            conf.chmod(0o644)

    def rotate(self, mode):
        inode = self.log.stat().st_ino
        command = [self.logrotate, "--force", "--state", f"{self.folder}/state"]
        done = subprocess.run(
            [*command, f"{self.folder}/{mode}"], capture_output=True, text=True, timeout=30
        )
        self.assertEqual(0, done.returncode, done.stderr)
        self.assertEqual(inode, Path(f"{self.log}.1").stat().st_ino)

    def logged_bytes(self):
        """Return the content of the rotated files and of the log, in order."""
        rotated = self.folder.glob("central.jsonl.*")
        files = sorted(rotated, key=lambda path: -int(path.suffix[1:]))
        return b"".join(path.read_bytes() for path in [*files, self.log] if path.exists())


class LogrotateTest(RotationCase):
    def test_each_delivery_is_in_one_of_the_files_whether_logrotate_creates_a_new_one_or_not(self):
        with self.receiver() as receiver, Senders(receiver.port, 6) as senders:
            for mode in ("create", "nocreate") * 4:
                senders.wait_for_accepted(random.randrange(20, 60))
                self.rotate(mode)
            senders.wait_for_accepted(20)
            senders.finish()
            self.assertEqual({200: len(senders.accepted)}, dict(senders.statuses))
            # logrotate moves away, as a backup, what the receiver made before it created its file.
            self.assertGreaterEqual("\n".join(receiver.stderr_lines).count("opened again"), 8)
        files = list(self.folder.glob("central.jsonl?*"))
        self.assertGreaterEqual(len(files), 8)
        data = b"".join(path.read_bytes() for path in [*files, self.log] if path.exists())
        self.assert_all_once(senders.accepted, data)


class RsyslogTest(RotationCase):
    """imfile on the receiver's host, and a second rsyslog as another host."""

    def start_rsyslog(self, name, text, **replacements):
        folder = self.folder / name
        folder.mkdir()
        conf = folder / "conf"
        conf.write_text(text.format(folder=folder, log=self.log, **replacements))
        self.spawn(self.rsyslogd, "-n", "-f", conf, "-i", folder / "pid")
        return folder

    def test_the_second_host_gets_each_delivery_once_over_full_disks_kills_and_rotations(self):
        self.rsyslogd = parts.need_program("rsyslogd")
        (port,) = parts.free_ports(1)
        self.copy = self.start_rsyslog("second", IMTCP, port=port) / "copy"
        deadline_poll(lambda: self.answers(port), 20, "rsyslog does not listen")
        self.start_rsyslog("first", IMFILE, port=port)
        accepted = []
        for _ in range(3):
            with Senders(0, 4) as senders:
                rotate = functools.partial(self.rotate, "nocreate")
                self.fill_and_kill(senders, LimitedFile(self.log), kills=1, rotate=rotate)
            accepted += senders.accepted
            self.wait_for_copy()
        self.assert_half_lines(self.copied_bytes())
        self.assert_all_once(accepted, self.copied_bytes())

    def wait_for_copy(self):
        """Wait until the copy has all lines of the log, in order."""
        lines = parse_lines(self.logged_bytes())
        deadline_poll(
            lambda: len(parse_lines(self.copied_bytes())) >= len(lines),
            20,
            "lines are missing in the copy",
        )
        self.assertEqual(lines, parse_lines(self.copied_bytes()))

    def copied_bytes(self):
        return self.copy.read_bytes() if self.copy.exists() else b""

    @staticmethod
    def answers(port):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return True
        return False


if __name__ == "__main__":
    unittest.main()
