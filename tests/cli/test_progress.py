"""Progress reports: a bar on a terminal, lines in a log."""

import io
import pickle
import sys

from soundnet_port.cli.reporting import ProgressReporter, format_duration
from soundnet_port.progress import Progress


def test_a_log_gets_an_early_line_and_then_one_every_30_seconds(clock, capsys):
    with ProgressReporter() as progress:
        for second in range(100):
            clock.now = 1000 + second
            progress(Progress(100 + 10 * second, 2100, "file", f"{second} h of sound"))
    assert capsys.readouterr().err.splitlines() == [
        "soundnet-port: 150 of 2,100 files, 5 h of sound, about 3 min left",
        "soundnet-port: 450 of 2,100 files, 35 h of sound, about 3 min left",
        "soundnet-port: 750 of 2,100 files, 65 h of sound, about 2 min left",
        "soundnet-port: 1,050 of 2,100 files, 95 h of sound, about 2 min left",
    ]


def test_short_work_leaves_no_lines_in_a_log_but_messages(clock, capsys):
    with ProgressReporter() as progress:
        progress(Progress(0, 3, "step"))
        progress(Progress(1, 3, "step", "loss 0.3", "a.wav: silence"))
        assert capsys.readouterr().err == "soundnet-port: a.wav: silence\n"
        clock.now += 60
        progress(Progress(3, 3, "step", "loss 0.2"))
    assert capsys.readouterr().err == ""


def test_without_any_progress_there_is_no_estimate(clock, capsys):
    with ProgressReporter() as progress:
        progress(Progress(0, 1, "epoch"))
        clock.now += 31
        progress(Progress(0, 1, "epoch"))
    assert capsys.readouterr().err == "soundnet-port: 0 of 1 epoch\n"


def test_a_terminal_gets_a_bar_for_each_unit_and_whole_lines_of_messages(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    with ProgressReporter() as progress:
        progress(Progress(2, 4, "file", "0.5 h"))
        progress(Progress(3, 4, "file", "0.6 h", message="a.wav: silence"))
        progress(Progress(4, 4, "file"))
        progress(Progress(1, 2, "excerpt"))
    shown = terminal.getvalue()
    assert "2/4" in shown
    assert "0.6 h" in shown
    assert "file" in shown
    assert "1/2" in shown
    assert "excerpt" in shown
    # the bar is cleared before the message, which has a line of its own
    assert "\rsoundnet-port: a.wav: silence\n" in shown


def test_a_reporter_can_be_sent_to_another_process():
    with pickle.loads(pickle.dumps(ProgressReporter())) as progress:
        progress(Progress(0, 1, "step"))


def test_durations_have_about_two_digits():
    assert [format_duration(seconds) for seconds in (0.2, 89, 91, 600, 5399, 5400, 90_000)] == [
        "0 s",
        "89 s",
        "2 min",
        "10 min",
        "90 min",
        "1.5 h",
        "25.0 h",
    ]
