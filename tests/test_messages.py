"""Messages of a run reach the console and log.txt, and only those that belong there."""

import io
import logging
import re
import sys

import pytest

from training.messages import ROW, log_file, logger, show_rows, start_messages

LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  (.*)")


def lines(text: str) -> list[str]:
    """Return the messages of lines that each have a date and a time."""
    return [LINE.fullmatch(line)[1] for line in text.splitlines()]


@pytest.fixture(autouse=True)
def no_handlers_afterwards():
    yield
    start_messages(main=False)


def test_messages_go_to_console_and_file_and_are_appended(tmp_path, capsys):
    for name in ("first", "second"):
        start_messages(main=True)
        logger.info("%s: before the file is there", name)
        with log_file(tmp_path / "log.txt"):
            logger.log(ROW, "step 10")
            logger.warning("disk is full")
    logger.info("after the end")
    out, err = capsys.readouterr()
    before = ["first: before the file is there", "step 10", "second: before the file is there", "step 10"]
    assert lines(out) == [*before, "after the end"] and lines(err) == ["warning: disk is full"] * 2
    assert lines((tmp_path / "log.txt").read_text()) == [
        before[0], "step 10", "warning: disk is full", before[2], "step 10", "warning: disk is full",
    ]  # fmt: skip


def test_rows_are_not_on_the_console_if_a_bar_shows_them(tmp_path, capsys):
    start_messages(main=True)
    with log_file(tmp_path / "log.txt"):
        show_rows(False)
        logger.log(ROW, "step 10")
        logger.info("checkpoint")
        show_rows(True)
        logger.log(ROW, "step 20")
    assert lines(capsys.readouterr().out) == ["checkpoint", "step 20"]
    assert lines((tmp_path / "log.txt").read_text()) == ["step 10", "checkpoint", "step 20"]


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("--flag 1: bad\nmore"), "error: --flag 1: bad"),
        (RuntimeError("CUDA error: launch failure\nCompile with"), "error: RuntimeError: CUDA error: launch failure"),
        (KeyboardInterrupt(), "error: KeyboardInterrupt: KeyboardInterrupt"),
    ],
)
def test_an_exception_is_one_line_of_the_file_and_not_of_the_console(tmp_path, capsys, error, line):
    start_messages(main=True)
    with pytest.raises(type(error)), log_file(tmp_path / "log.txt"):
        raise error
    assert lines((tmp_path / "log.txt").read_text()) == [line] and capsys.readouterr() == ("", "")


def test_processes_other_than_the_main_one_write_exceptions_only(tmp_path, capsys):
    start_messages(main=False)
    with pytest.raises(ValueError, match="broken"), log_file(tmp_path / "log.txt", process=3):
        logger.info("step")
        logger.warning("full")
        assert not (tmp_path / "log.txt").exists()
        raise ValueError("img.png: broken")
    assert lines((tmp_path / "log.txt").read_text()) == ["error: process 3: img.png: broken"]
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("path", ["missing/log.txt", "/dev/full"])
def test_neither_a_file_that_cannot_be_written_nor_a_closed_console_ends_a_run(tmp_path, monkeypatch, capfd, path):
    start_messages(main=True)
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stdout", closed)
    with log_file(tmp_path / path):
        logger.info("step")
    assert capfd.readouterr().err == ""


def test_names_that_the_console_cannot_encode_are_escaped(tmp_path, monkeypatch):
    start_messages(main=True)
    console = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", console)
    with log_file(tmp_path / "log.txt"):
        logger.info("ä\udcff")
    assert console.buffer.getvalue().endswith(b"  \\xe4\\udcff\n")  # written at once
    assert (tmp_path / "log.txt").read_bytes().endswith("  ä\\udcff\n".encode())


def test_other_loggers_are_left_alone(tmp_path, capsys):
    start_messages(main=True)
    logging.getLogger("reg").warning("of another program")
    assert logger.propagate is False and capsys.readouterr().out == ""
