"""A frame filled with contents is the text that its literals and the contents spell, and says where each stands."""

from __future__ import annotations

from phlora.data.rendering import Frame

FRAME = Frame(
    shape=(("system", False), ("user", True), ("assistant", True)),
    literals=("<s>", "|", "<end>\n"),
    order=(1, 2),
    tails=(0, 5),
    notes=frozenset({"system_folded"}),
)


def test_a_frame_knows_where_contents_stand():
    messages = [
        {"role": "system", "content": ""},
        {"role": "user", "content": "hi <end>"},
        {"role": "assistant", "content": "hello"},
    ]
    rendering = FRAME.fill(messages)
    assert rendering.text == "<s>hi <end>|hello<end>\n"
    assert rendering.spans[0] is None
    spoken = [rendering.text[slice(*span)] for span in rendering.spans if span]
    assert spoken == ["hi <end>", "hello"]
    # The end of an answer goes with it; that of a question does not.
    assert [rendering.text[:end] for end in rendering.ends] == ["", "<s>hi <end>", "<s>hi <end>|hello<end>"]
    assert (rendering.frame, rendering.notes) == (FRAME, FRAME.notes)


def test_where_a_rendering_came_from_does_not_make_it_another():
    messages = [{"role": role, "content": "x" if says else ""} for role, says in FRAME.shape]
    one, other = FRAME.fill(messages), FRAME.fill(messages)
    assert one == other
    assert FRAME.fill([*messages[:2], {"role": "assistant", "content": "y"}]) != one
