"""The bars of progress."""

import pytest

from rbfast.utils.progress import counting


@pytest.mark.parametrize("title", ["{x}.jsonl", "[/x].jsonl", "[red]x.jsonl"])
def test_the_name_of_a_file_is_shown_as_it_is(capsys: pytest.CaptureFixture[str], title: str) -> None:
    with counting(title) as progress:
        progress(1, 2)
    assert title in capsys.readouterr().err
