"""The digests of rows."""

from __future__ import annotations

from phlora.data.dataset import load_rows
from phlora.data.rows import fingerprint_of, row_digest


def _texts(*texts):
    return load_rows([{"text": text} for text in texts]).rows


def test_fingerprint_sees_content_order_and_weight():
    def fingerprint(rows):
        return fingerprint_of(map(row_digest, rows))

    one, two = _texts("a", "b"), _texts("b", "a")
    assert fingerprint(one) == fingerprint(_texts("a", "b"))
    assert len({fingerprint(one), fingerprint(two), fingerprint(one[:1])}) == 3
