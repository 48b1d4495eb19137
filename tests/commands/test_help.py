"""The list of commands as a new user reads it."""

from tests.commands.test_cli import call


def test_no_command_of_the_list_is_cut_off(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert call("--help") == 0
    listed = capsys.readouterr().out.split("Commands:")[1].split("\n\n")[0].strip()
    assert len(listed.splitlines()) >= 20
    assert not [line for line in listed.splitlines() if line.endswith("...")]
