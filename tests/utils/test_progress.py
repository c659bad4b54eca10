"""Progress bars."""

import pytest

from rbfast.utils.progress import counting


@pytest.mark.parametrize("title", ["{x}.jsonl", "[/x].jsonl", "[red]x.jsonl"])
def test_title_of_a_bar_is_shown_literally(capsys: pytest.CaptureFixture[str], title: str) -> None:
    with counting(title) as progress:
        progress(1, 2)
    assert title in capsys.readouterr().err
