"""Which templates are known, by their syntax, to write contents out and never look into them."""

from __future__ import annotations

import pytest
from template_texts import ASKS_FOR_TOOLS, DEFAULT_SYSTEM, GENERATION, SKIPS_EMPTY

from phlora.data.template_analysis import writes_contents_only
from phlora.testing.tokenizers import CHATML, PHI3, REASONING, TRIMMED


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (PHI3, True),
        (CHATML, True),
        (DEFAULT_SYSTEM, True),
        (GENERATION, True),
        (TRIMMED, False),
        (REASONING, False),
        (GENERATION.replace("loop.last", "messages[-1]['role'] == 'user'"), True),
        (SKIPS_EMPTY, True),
        (ASKS_FOR_TOOLS, True),
        ("{% for m in messages %}{% if m.content == 'a' %}x{% endif %}{% endfor %}", False),
        ("{% for m in messages %}{% if m.content | trim %}x{% endif %}{% endfor %}", False),
        ("{% for m in messages %}{{ m.content or 'x' }}{% endfor %}", False),
        ("{% for m in messages %}{% if m.content in 'abc' %}x{% endif %}{% endfor %}", False),
        ("{% for m in messages %}{% if 'a' in m.content %}x{% endif %}{% endfor %}", False),
        ("{% for m in messages %}{% if m in messages %}x{% endif %}{% endfor %}", False),
        ("{% for m in messages %}{{ m.items() }}{% endfor %}", False),
        ("{% for m in messages %}{{ m['get']('content') }}{% endfor %}", False),
        ("{% for m in messages %}{{ m.content }}{% endfor %}{{ messages[-1].content }}", False),
        ("{% for m in messages %}{% set c = m.content %}{{ c }}{% endfor %}", False),
        ("{% for m in messages %}{{ m.role + m['content'] }}{{ loop.previtem }}{% endfor %}", False),
        ("{% for m in messages %}{{ m | tojson }}{% endfor %}", False),
        ("{% for m in messages %}{{ m[key] }}{% endfor %}", False),
        ("{% for m in messages if m.content %}{{ m.content }}{% endfor %}", False),
        ("{% set rest = messages[1:] %}{% for m in rest %}{{ m.content }}{% endfor %}", False),
        ("{% for m in messages %}{% filter trim %}{{ m.content }}{% endfilter %}{% endfor %}", False),
        ("{% macro f(x) %}{{ x }}{% endmacro %}{% for m in messages %}{{ f(m.content) }}{% endfor %}", False),
        ("{{ messages[0]['content'] }}{% for m in messages %}{{ m.content }}{% endfor %}", False),
        ("{{ strftime_now('%d %b %Y') }}{% for m in messages %}{{ m.content }}{% endfor %}", False),
        ("{{ messages }}", False),
        ("{% unknown %}", False),
    ],
)
def test_only_templates_that_provably_write_contents_as_they_are_count(template, expected):
    assert writes_contents_only(template) is expected
