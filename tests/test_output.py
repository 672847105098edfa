"""Where a bundle is written: nothing half-written, nothing of others removed, one export at a time, clean ends."""

import errno
import fcntl
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import termios
import threading
from functools import partial
from pathlib import Path

import pytest

from lfm_edge import locks
from lfm_edge.bundle.bundle import new_bundle, open_bundle
from lfm_edge.errors import ExportError
from lfm_edge.files import replacing, write_text
from tests.helpers import REPO, TINY, contents, fill_bundle, lfm_edge


@pytest.fixture
def output(tmp_path):
    """Where a bundle is to be written; everything beside it counts as left behind."""
    return tmp_path / "exports" / "out"


@pytest.fixture
def bundle(output):
    """A bundle that is there already."""
    write(output)
    return output


def write(output, artifact=b"old program", force=False, meanwhile=lambda: None):
    """Write a bundle. meanwhile: what happens during the export"""
    with new_bundle(output, force) as directory:
        fill_bundle(directory, artifact)
        meanwhile()


def beside(output):
    """What is in the directory that holds the bundle."""
    return sorted(path.name for path in output.parent.iterdir()) if output.parent.exists() else []


def refusal(output, force=False, meanwhile=lambda: None):
    """The one line with which an export ends."""
    with pytest.raises(ExportError) as raised:
        write(output, b"new program", force, meanwhile)
    assert "\n" not in str(raised.value)
    return str(raised.value)


# --- what was not there at the start ------------------------------------------------------------------------------


def thesis(output):
    output.mkdir()
    (output / "thesis.tex").write_text("years of work")


def other_manifest(output):
    output.mkdir()
    (output / "manifest.json").write_text('{"manifest_version": 3, "name": "an extension of a browser"}')


THINGS = {"a folder": thesis, "a file": lambda path: path.write_text("years of work"),
          "a folder with a manifest of something else": other_manifest,
          "a link to nowhere": lambda path: path.symlink_to("nowhere")}


@pytest.mark.parametrize("force", [False, True], ids=["", "force"])
@pytest.mark.parametrize("make", THINGS.values(), ids=THINGS)
def test_what_appears_during_an_export_is_untouched_and_the_export_is_refused(output, make, force):
    said = refusal(output, force, meanwhile=lambda: make(output))

    assert said == (f"{output}: something else appeared there during the export; it is untouched, and nothing was "
                    "written")
    assert beside(output) == ["out"]
    make(output.with_name("expected"))
    assert output.is_symlink() or contents(output.parent / "out") == contents(output.parent / "expected")

    shutil.rmtree(output) if output.is_dir() else output.unlink()
    write(output)  # and later exports are not blocked
    assert open_bundle(output)


def test_a_bundle_that_appears_during_an_export_is_replaced_with_force_only(output, tmp_path):
    write(tmp_path / "another", b"another program")
    appear = partial(shutil.copytree, tmp_path / "another", output)

    assert "something else appeared" in refusal(output, meanwhile=appear)
    assert open_bundle(output).artifact.read_bytes() == b"another program"

    shutil.rmtree(output)
    write(output, b"new program", force=True, meanwhile=appear)
    assert open_bundle(output).artifact.read_bytes() == b"new program"


@pytest.mark.parametrize("make", THINGS.values(), ids=THINGS)
def test_what_took_the_place_of_a_bundle_during_an_export_is_untouched(bundle, make):
    def exchange():
        shutil.rmtree(bundle)
        make(bundle)

    assert "something else appeared" in refusal(bundle, force=True, meanwhile=exchange)
    assert beside(bundle) == ["out"]
    assert bundle.is_symlink() or b"years of work" in contents(bundle.parent).values() or contents(bundle)


@pytest.mark.parametrize("make", [thesis, THINGS["a file"]], ids=["a folder", "a file"])
def test_what_takes_the_place_of_a_bundle_in_the_last_moment_is_put_back(bundle, make, monkeypatch):
    rename = Path.rename

    def exchange_first(self, target):
        if self == bundle:
            shutil.rmtree(bundle)
            make(bundle)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", exchange_first)

    assert "something else appeared" in refusal(bundle, force=True)
    assert beside(bundle) == ["out"]
    assert [*contents(bundle.parent).values()] == [b"years of work"]


def test_a_bundle_whose_place_was_taken_while_it_was_aside_is_kept_and_the_line_says_where(bundle, monkeypatch):
    before = contents(bundle)
    rename = Path.rename

    def take_the_place_after(self, target):
        rename(self, target)
        if self == bundle:
            thesis(bundle)

    monkeypatch.setattr(Path, "rename", take_the_place_after)

    said = refusal(bundle, force=True)
    kept = re.search(r"what was there before is now (\S+) \(", said)[1]
    assert contents(Path(kept)) == before
    assert contents(bundle) == {"thesis.tex": b"years of work"}


def test_an_empty_directory_is_written_into_place_without_force(output):
    output.mkdir(parents=True)
    write(output)

    assert open_bundle(output)


# --- two exports to one output ------------------------------------------------------------------------------------


def test_a_second_export_in_another_thread_is_refused_before_it_begins(output):
    said = []

    def second():
        said.append(refusal(output))

    def meanwhile():
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()

    write(output, meanwhile=meanwhile)

    assert said == [f"{output}: another export is writing it; wait for its end, or give another --output"]
    assert open_bundle(output).artifact.read_bytes() == b"old program"
    assert beside(output) == ["out"]


def test_a_second_export_in_another_process_is_refused_before_it_begins(output):
    export = ["export", "--target", "android-q4", "--model", TINY, "--context", "64", "--output", output]
    ended = []

    write(output, meanwhile=lambda: ended.append(lfm_edge(*export)))

    assert ended[0].returncode == 2
    assert ended[0].stderr == f"error: {output}: another export is writing it; wait for its end, or give another " \
                              "--output\n"
    assert open_bundle(output).artifact.read_bytes() == b"old program"


@pytest.mark.parametrize("without", ["no fcntl, as on Windows", "no locks in the file system"])
def test_where_there_are_no_locks_the_first_to_be_whole_stays_and_the_other_is_told(output, monkeypatch, without):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    if without.startswith("no fcntl"):
        monkeypatch.setattr(locks, "fcntl", None)
    else:
        monkeypatch.setattr(fcntl, "flock", no_locks)

    assert "something else appeared" in refusal(output, meanwhile=lambda: write(output, b"of the winner"))
    assert open_bundle(output).artifact.read_bytes() == b"of the winner"
    assert beside(output) == ["out"]


def test_exports_to_other_outputs_go_on_side_by_side(output):
    other = output.with_name("outer")

    write(output, meanwhile=lambda: write(other))

    assert open_bundle(output) and open_bundle(other)
    assert beside(output) == ["out", "outer"]


def test_two_threads_write_one_file_and_the_last_one_stays_whole(tmp_path):
    path = tmp_path / "file"
    with replacing(path) as first:
        first.write(b"first")
        write_text(path, "second")

    assert path.read_bytes() == b"first"
    assert [*tmp_path.iterdir()] == [path]


# --- killed outright ----------------------------------------------------------------------------------------------

EXPORT_UNTIL_KILLED = """
import sys
from pathlib import Path
from lfm_edge.bundle.bundle import new_bundle
with new_bundle(Path(sys.argv[1]), force=True) as directory:
    (directory / "model.pte").write_bytes(b"half")
    print("writing", flush=True)
    sys.stdin.read()
"""

# Stops in the moment of the swap: the old bundle is moved aside, the new one is not yet there.
SWAP_UNTIL_KILLED = """
import sys
from pathlib import Path
from lfm_edge.bundle.bundle import new_bundle
rename = Path.rename
def stop(self, target):
    if self.name == "new" and not target.exists():
        print("swapping", flush=True)
        sys.stdin.read()
    return rename(self, target)
Path.rename = stop
with new_bundle(Path(sys.argv[1]), force=True) as directory:
    (directory / "manifest.json").write_text("{}")
"""


def kill_while(script, output, word):
    """Run a script until it says `word`, then kill it outright. Returns the work directory that it leaves."""
    with subprocess.Popen([sys.executable, "-c", script, str(output)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          text=True, cwd=REPO) as process:
        assert process.stdout.readline() == f"{word}\n"
        process.kill()
    assert process.returncode == -signal.SIGKILL
    [left] = output.parent.glob(".out.partial-*")
    return left


def test_a_killed_export_leaves_no_bundle_and_the_next_one_cleans_up(output):
    left = kill_while(EXPORT_UNTIL_KILLED, output, "writing")
    assert beside(output) == [".out.lock", left.name]

    write(output)

    assert beside(output) == ["out"]
    assert open_bundle(output)


def test_a_killed_export_leaves_the_old_bundle_as_it_was(bundle):
    before = contents(bundle)
    kill_while(EXPORT_UNTIL_KILLED, bundle, "writing")
    assert contents(bundle) == before

    write(bundle, b"new program", force=True)

    assert beside(bundle) == ["out"]
    assert open_bundle(bundle).artifact.read_bytes() == b"new program"


def test_an_export_killed_in_the_swap_gets_its_old_bundle_back(bundle):
    before = contents(bundle)
    kill_while(SWAP_UNTIL_KILLED, bundle, "swapping")
    assert not bundle.exists()

    assert "exists already" in refusal(bundle)

    assert contents(bundle) == before
    assert beside(bundle) == ["out"]


def test_what_was_moved_aside_is_kept_where_its_place_is_taken(bundle):
    before = contents(bundle)
    left = kill_while(SWAP_UNTIL_KILLED, bundle, "swapping")
    thesis(bundle)

    assert "exists already" in refusal(bundle)

    assert contents(left / "old") == before
    assert contents(bundle) == {"thesis.tex": b"years of work"}


def test_an_export_that_still_runs_is_not_abandoned(output):
    """Not even where the file that says that the output is being written is gone."""
    def second():
        output.with_name(".out.lock").unlink()
        write(output, b"of the second")

    assert "something else appeared" in refusal(output, meanwhile=second)
    assert open_bundle(output).artifact.read_bytes() == b"of the second"
    assert beside(output) == ["out"]


def test_what_another_machine_left_on_a_share_stays(output):
    """Its lock may be held there, unknown to us."""
    left = kill_while(EXPORT_UNTIL_KILLED, output, "writing")
    (left / "lock").write_text("b9a5b1f4-0000-4000-8000-000000000000")

    write(output)

    assert beside(output) == [left.name, "out"]
    assert (left / "new/model.pte").read_bytes() == b"half"


def test_what_a_crash_of_this_machine_left_is_removed_after_it_has_started_again(output):
    left = kill_while(EXPORT_UNTIL_KILLED, output, "writing")
    boot, machine = (left / "lock").read_text().split(" ")
    (left / "lock").write_text(f"{'0' * len(boot)} {machine}")

    write(output)

    assert beside(output) == ["out"]


def test_folders_that_only_look_like_ours_are_left_alone(output):
    others = [".out.partial-123", ".out.partial-x", ".out.backup-abcdefgh", ".outer.partial-abcdefgh",
              ".out.partial-abcd.fgh"]
    for name in others:
        (output.parent / name).mkdir(parents=True)
        (output.parent / name / "thesis.tex").write_text("years of work")

    write(output)

    assert beside(output) == sorted([*others, "out"])


def test_an_interrupt_during_the_clean_up_leaves_what_the_next_export_removes(output, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt), new_bundle(output, force=False) as directory:
        fill_bundle(directory)
        raise KeyboardInterrupt
    monkeypatch.undo()
    assert len(beside(output)) == 1

    write(output)

    assert beside(output) == ["out"]


# --- places -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["x" * 200, "x" * 240, "x" * 255, "ä" * 127])
def test_a_name_as_long_as_the_system_takes_is_no_obstacle(tmp_path, name):
    write(tmp_path / name)
    write(tmp_path / name, force=True)

    assert open_bundle(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_name_that_is_too_long_is_refused_before_the_work(tmp_path):
    with pytest.raises(ExportError, match=r"cannot be written \(File name too long\)"), \
            new_bundle(tmp_path / ("x" * 256), force=False):
        pytest.fail("the export began")


@pytest.mark.parametrize("force", [False, True], ids=["", "force"])
@pytest.mark.parametrize("place, reason", {
    ".": "the current directory is it", "..": "the current directory is in it", "../here/": "the current directory is",
    "/": "is a mount point", "/proc": "is a mount point"}.items())
def test_a_place_that_cannot_be_replaced_is_refused_before_the_work(tmp_path, monkeypatch, place, reason, force):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    with pytest.raises(ExportError, match=reason), new_bundle(Path(place), force):
        pytest.fail("the export began")

    assert [path.name for path in tmp_path.rglob("*")] == ["here"]


def test_a_link_that_leads_to_itself_is_one_line(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")

    assert "loop" in refusal(tmp_path / "loop")


def test_a_slash_at_the_end_changes_nothing(tmp_path):
    write(Path(f"{tmp_path}/out/"))

    assert open_bundle(tmp_path / "out")


def mount(*arguments):
    """Mount a file system, or skip where that is not allowed."""
    tried = subprocess.run(["mount", *map(str, arguments)], capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"mounting a file system: {tried.stderr.strip() or 'not allowed here'}")


@pytest.mark.parametrize("options", [["-t", "tmpfs", "tmpfs"], ["--bind", "/usr"]], ids=["a disk", "of the same disk"])
def test_an_empty_mount_point_is_refused_before_the_work(tmp_path, options):
    point = tmp_path / "with space"
    point.mkdir()
    mount(*options, point)
    try:
        with pytest.raises(ExportError, match="is a mount point, which cannot be replaced; give a directory in it"), \
                new_bundle(point, force=True):
            pytest.fail("the export began")
        if options[0] == "-t":
            write(point / "bundle")
            assert open_bundle(point / "bundle")
    finally:
        subprocess.run(["umount", point], check=True)


# --- ended by a signal --------------------------------------------------------------------------------------------

EXPORT = [sys.executable, "-m", "lfm_edge.cli", "export", "--target", "android-q4", "--model", str(TINY), "--context",
          "64", "--output"]


@pytest.mark.parametrize("stop, line", [(signal.SIGTERM, None), (signal.SIGHUP, None),
                                        (signal.SIGINT, "interrupted; nothing written")])
def test_a_stopped_export_leaves_nothing(output, stop, line):
    output.parent.mkdir()
    # A shell's background job ignores interrupts and hands that on; whoever presses Ctrl-C does not.
    listen = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen([*EXPORT, str(output)], stderr=subprocess.PIPE, text=True, cwd=REPO,
                          preexec_fn=listen) as process:
        assert any("trace" in line for line in process.stderr)
        assert len(beside(output)) == 2
        process.send_signal(stop)
        _, said = process.communicate(timeout=120)

    assert process.returncode == 128 + stop
    assert beside(output) == []
    assert "Traceback" not in said
    assert line is None or said.splitlines()[-1] == line


def test_a_hangup_that_is_ignored_stays_ignored(output):
    """As under nohup."""
    script = "import signal\nfrom lfm_edge import cli\ncli.app = lambda: signal.raise_signal(signal.SIGHUP)\ncli.main()"
    ended = subprocess.run([sys.executable, "-c", script], cwd=REPO, check=False,
                           preexec_fn=partial(signal.signal, signal.SIGHUP, signal.SIG_IGN))

    assert ended.returncode == 0


class Terminal:
    """An export with a terminal of its own."""

    def __init__(self, output):
        self.process, self.end = pty.fork()
        if self.process == 0:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # it is ignored where the tests run in the background
            os.chdir(REPO)
            os.execv(sys.executable, [*EXPORT, str(output)])
        self.said = ""

    def read(self, until=None):
        """Read until a word comes, or to the end."""
        while until is None or until not in self.said:
            try:
                piece = os.read(self.end, 4096)
            except OSError:  # nobody has it open any more
                break
            if not piece:
                break
            self.said += piece.decode(errors="replace")
        return self.said

    def wait(self):
        return os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])


def test_ctrl_c_on_a_terminal_leaves_the_bar_where_it_was_and_says_what_was_written(output):
    output.parent.mkdir()
    terminal = Terminal(output)
    terminal.read("lower to XNNPACK")
    os.write(terminal.end, termios.tcgetattr(terminal.end)[6][termios.VINTR])
    said = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.read())

    assert terminal.wait() == 130
    assert said.splitlines()[-1] == "interrupted; nothing written"
    assert "1/1" not in said[said.rindex("lower to XNNPACK"):]
    assert "Traceback" not in said
    assert beside(output) == []


def test_a_terminal_that_is_closed_leaves_nothing(output):
    output.parent.mkdir()
    terminal = Terminal(output)
    terminal.read("lower to XNNPACK")
    os.close(terminal.end)

    assert terminal.wait() == 128 + signal.SIGHUP
    assert beside(output) == []


def test_other_commands_say_no_more_than_that_they_were_interrupted(monkeypatch, capfd):
    from lfm_edge import cli

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_open", interrupt)
    monkeypatch.setattr(sys, "argv", ["lfm-edge", "inspect", "somewhere"])
    with pytest.raises(SystemExit) as end:
        cli.main()

    assert end.value.code == 130
    assert capfd.readouterr().err == "interrupted\n"


def test_a_full_disk_is_one_line_however_a_library_says_it(output):
    with pytest.raises(ExportError, match="no space left on the disk; nothing was written"), \
            new_bundle(output, force=False):
        raise RuntimeError(f"[save] {os.strerror(errno.ENOSPC)}")  # as native libraries say it
