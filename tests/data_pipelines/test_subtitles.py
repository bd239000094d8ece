"""Subtitles: three forms, rolling captions."""

from __future__ import annotations

import json

import pytest

from data_pipelines.subtitles import Line, parse_subtitles

# The rows of one space are as in real ones.
ROLLING = """WEBVTT
Kind: captions
Language: en

00:00:00.000 --> 00:00:01.190 align:start position:0%
 
so<00:00:00.400><c> here</c><00:00:00.800><c> we</c><00:00:01.000><c> are</c>

00:00:01.190 --> 00:00:01.200 align:start position:0%
so here we are
 

00:00:01.200 --> 00:00:02.990 align:start position:0%
so here we are
no<00:00:01.500><c> no</c>

00:00:02.990 --> 00:00:03.000 align:start position:0%
no no
 

00:00:03.000 --> 00:00:04.000 align:start position:0%
no no
no<00:00:03.500><c> no</c>

00:00:04.000 --> 00:00:04.010 align:start position:0%
no no
 

01:00:00.000 --> 01:00:01.500 align:start position:0%
 
the<01:00:00.500><c> end</c>
"""
SPOKEN = [
    Line(0.0, 1.2, "so here we are"),
    Line(1.2, 1.8, "no no"),
    Line(3.0, 1.01, "no no"),  # really said twice
    Line(3600.0, 1.5, "the end"),
]


def texts(content: str, form: str) -> list[str]:
    return [line.text for line in parse_subtitles(content, form)]


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_rolling_captions_give_each_row_once(newline: str) -> None:
    assert parse_subtitles(ROLLING.replace("\n", newline), "vtt") == SPOKEN


def test_rolling_captions_without_word_tags() -> None:
    """As converters to srt leave them: only the cues of 10 ms tell."""
    rows = [line for line in ROLLING.splitlines() if not line.startswith(("WEBVTT", "Kind", "Language"))]
    plain = "\n".join(rows).replace("<c>", "").replace("</c>", "").replace(".", ",")
    for time in ("00:00:00,400", "00:00:00,800", "00:00:01,000", "00:00:01,500", "00:00:03,500", "01:00:00,500"):
        plain = plain.replace(f"<{time}>", "")
    assert "<" not in plain
    assert parse_subtitles(plain, "srt") == SPOKEN


def test_word_tags_alone_tell_rolling_captions() -> None:
    cues = "00:01.000 --> 00:02.000\nso<00:01.500><c> here</c>\n\n00:02.000 --> 00:03.000\nso here\nwe<c> are</c>\n"
    assert texts("WEBVTT\n\n" + cues, "vtt") == ["so here", "we are"]


def test_what_people_wrote_is_taken_as_it_is() -> None:
    """Repeats are kept; rows of a cue are joined; comments, styles, names, tags and short times are no text."""
    vtt = (
        "WEBVTT - a title\n\nNOTE\nnot said --> here\n\nSTYLE\n::cue { color: red }\n\nintro\n"
        "00:01.000 --> 00:02.500\n<v Ann>Yes.\n<i>Yes</i>, I said.\n\n00:03.000 --> 00:04.000 line:0\nYes.\n\n"
        "00:04.000 --> 00:05.000\nYes.\n\n00:06.000 --> 00:07.000\n\n"
    )
    lines = [Line(1.0, 1.5, "Yes. Yes, I said."), Line(3.0, 1.0, "Yes."), Line(4.0, 1.0, "Yes.")]
    assert parse_subtitles(vtt, "vtt") == lines


def test_srt() -> None:
    srt = "1\r\n00:00:01,500 --> 00:00:02,000\r\nhello\r\n\r\n2\r\n00:00:00,250 --> 00:00:01,000\r\nbefore it\r\n"
    assert parse_subtitles(srt, "srt") == [Line(0.25, 0.75, "before it"), Line(1.5, 0.5, "hello")]


def test_json3() -> None:
    events = [
        {"tStartMs": 0, "dDurationMs": 9000, "id": 1, "wpWinPosId": 1},
        {
            "tStartMs": 80,
            "dDurationMs": 4000,
            "wWinId": 1,
            "segs": [{"utf8": "so"}, {"utf8": " here", "tOffsetMs": 240}],
        },
        {"tStartMs": 2000, "dDurationMs": 10, "wWinId": 1, "aAppend": 1, "segs": [{"utf8": "\n"}]},
        {"tStartMs": 2010, "dDurationMs": 1500, "wWinId": 1, "segs": [{"utf8": "we"}, {"utf8": "\nare"}]},
    ]
    assert parse_subtitles(json.dumps({"events": events}), "json3") == [
        Line(0.08, 4.0, "so here"),
        Line(2.01, 1.5, "we are"),
    ]


@pytest.mark.parametrize("content", ["", "WEBVTT", "<html>not found</html>", "00:00:99.000 --> x\ntext", "-->\n" * 99])
def test_what_is_no_subtitle_gives_nothing(content: str) -> None:
    assert texts(content, "vtt") == []


@pytest.mark.parametrize("event", [{"segs": 3}, {"segs": [1]}, [], {"segs": [{"utf8": "x"}], "tStartMs": 1e999}])
def test_broken_json3_is_an_error(event: object) -> None:
    with pytest.raises((AttributeError, TypeError, ValueError)):
        parse_subtitles(json.dumps({"events": [event]}), "json3")


def test_hostile_sizes_take_linear_time() -> None:
    assert texts("<" * 200_000 + "\n" + "00:" * 100_000, "vtt") == []
    assert texts("00:01.000 --> 00:02.000\n" * 2_000 + "x", "vtt") == ["x"]
