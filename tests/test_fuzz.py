"""Damaged files and options: one line or a warning, never a traceback, never another result in silence."""

import pytest

from tests.fuzz import fuzz


@pytest.mark.slow
def test_damage_is_refused_or_warned_of(tmp_path):
    lines = []
    counts = fuzz(tmp_path, lines.append)
    bad = {key: number for key, number in counts.items() if key[1] in ("unclear", "traceback", "silent")}
    assert sum(counts.values()) > 300
    assert not bad, "\n".join(lines)
