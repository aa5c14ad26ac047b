"""Three trainings of tests/chaos.py."""

import pytest

from tests import chaos


@pytest.mark.slow
def test_trainings_that_are_killed_end_as_undisturbed_ones(capsys):
    chaos.main(["--runs", "3", "--seed", "1"])
    said = capsys.readouterr().out
    assert "| runs, all equal to the undisturbed one to the bit | 3 |" in said
    assert "newest checkpoint damaged before a start, noticed and passed over | 1 |" in said
    assert "| largest difference of a parameter or the optimizer's state | 0 |" in said
