"""Damaged files and options cause a one-line error or a warning, never a traceback or a silently different result."""

import pytest

from tests.fuzz import fuzz


@pytest.mark.slow
def test_damage_causes_error_or_warning(tmp_path):
    lines = []
    counts = fuzz(tmp_path, lines.append)
    bad = {key: count for key, count in counts.items() if key[1] in ("unclear", "traceback", "silent")}
    assert sum(counts.values()) > 300
    assert not bad, "\n".join(lines)
