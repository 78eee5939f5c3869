from common.errors import LONGEST_LINE, LONGEST_WORD, for_terminal


def test_plain_messages_stay():
    message = "a.png: damaged; do this:\n  python a.py --x 'é'\n"
    assert for_terminal(message) == message


def test_control_characters_are_escaped():
    assert for_terminal("a\x1b[31m\r\x00\udcff\tb") == "a\\x1b[31m\\r\\x00\\udcff\\tb"


def test_long_words_and_lines_are_cut():
    assert for_terminal("label " + "a" * 60_000 + " of b") == f"label {'a' * 200}... (60,000 characters) of b"
    assert for_terminal("a" * LONGEST_WORD) == "a" * LONGEST_WORD
    assert len(for_terminal("a " * 100_000)) < LONGEST_LINE
