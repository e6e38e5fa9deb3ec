"""What a user can put right ends as one sentence on stderr and status 2."""

from __future__ import annotations

import pytest

from recipes_peft.errors import UserError, explained, run


def test_a_user_error_is_one_line_and_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> int:
        raise UserError("the file\n  is empty; give another")

    assert run(main) == 2
    assert capsys.readouterr().err == "error: the file is empty; give another\n"


def test_other_errors_and_statuses_pass() -> None:
    def broken() -> int:
        raise KeyError("a bug")

    assert run(lambda: 1) == 1
    with pytest.raises(KeyError):
        run(broken)


def test_explained_keeps_the_first_line_and_the_cause() -> None:
    with (
        pytest.raises(UserError, match="cannot load: no such thing; give one") as caught,
        explained(OSError, before="cannot load: ", after="; give one"),
    ):
        raise FileNotFoundError("no such thing.\nAnd advice of the library")
    assert "advice" not in str(caught.value)
    assert isinstance(caught.value.__cause__, FileNotFoundError)
    with pytest.raises(KeyError), explained(OSError):
        raise KeyError("not of these kinds")
