"""The page of a run: what is on it, what strangers cannot put there, and how it follows a run."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conf import UserError
from tests.trainer import made_run
from tests.trainer.made_run import CONFIG, step_line, validation_line, write_lines, write_run, write_samples
from trainer import report
from trainer.reporting import headline
from trainer.reporting.charts import MAX_BINS
from trainer.reporting.page import render
from trainer.reporting.panels import SECTIONS, matches
from trainer.reporting.run_record import RunRecord

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(1)>\"'"
IN_NO_CHART = {"attempt", "step", "time", "embedding_std_per_slot", "validation/attempt", "validation/step"}
IN_NO_CHART |= {"validation/retrieval_of"}  # a line in the chart of the retrieval


def page_of(folder: Path) -> str:
    run = RunRecord(folder)
    run.read()
    return render(run, None)


def charts_of(page: str) -> dict[str, str]:
    """Title -> the chart's HTML."""
    figures = re.findall(r'<figure class="card chart" data-chart="(.*?)">(.*?)</figure>', page, re.DOTALL)
    return {html.unescape(title): chart for title, chart in figures}


def keys_of(chart: str) -> list[str]:
    return re.findall(r'data-key="(.*?)"', chart)


def recorded_metrics() -> set[str]:
    line = step_line(1, 10) | {f"validation/{name}": value for name, value in validation_line(10).items()}
    plain = {name for name, value in line.items() if not isinstance(value, dict)}
    return plain | {f"{name}/{key}" for name, value in line.items() if isinstance(value, dict) for key in value}


def test_every_metric_has_a_chart() -> None:
    names = [name for section in SECTIONS for panel in section.panels for name in (*panel.metrics, panel.whole)]
    assert {metric for metric in recorded_metrics() if not any(matches(name, metric) for name in names)} == IN_NO_CHART


def test_every_chart_is_on_the_page(tmp_path: Path) -> None:
    charts = charts_of(page_of(write_run(tmp_path, 60)))
    assert list(charts) == [panel.title for section in SECTIONS for panel in section.panels]
    assert keys_of(charts["Text loss"]) == ["laion", "mmc4", "webvid", "all sources"]
    assert keys_of(charts["Gradient norm by module"]) == list(made_run.MODULES)
    assert keys_of(charts["Learning rates"]) == list(made_run.GROUPS)
    assert keys_of(charts["Where a step's time goes"])[0] == "rest"
    assert keys_of(charts["Skipped so far"]) == ["laion: empty caption", "mmc4: picture cannot be decoded"]
    assert "collapse alarm 0.02" in charts["Spread across images"]
    assert "clipped at 5" in charts["Gradient norm before clipping"]
    assert "chance, 1 of 32" in charts["Validation: text-to-image retrieval"]
    assert charts["Mixture"].count('class="at-level"') == 3
    assert not re.search(r"\bnan\b|\binf\b", "".join(charts.values()))


def test_restarts_and_steps_thrown_away_are_marked(tmp_path: Path) -> None:
    for chart in charts_of(page_of(write_run(tmp_path, 60))).values():
        titles = re.findall(r"<title>(.*?)</title>", chart)
        assert titles == ["restart at step 36", "step thrown away at step 41", "rollback at step 55"]


def test_the_parts_of_a_step_fill_it(tmp_path: Path) -> None:
    """Parts that are measured now and then are in every step, a checkpoint only where there was one."""
    (tmp_path / "config.yaml").write_text(CONFIG)
    lines = [{"attempt": 1, "step": n, "seconds/step": 2.0} for n in (1, 2, 3)]
    lines[0] |= {"seconds/forward": 0.5, "seconds/backward": 0.25}
    lines[1] |= {"seconds/checkpoint": 1.0}
    write_lines(tmp_path / "metrics.jsonl", lines)
    chart = charts_of(page_of(tmp_path))["Where a step's time goes"]
    assert re.findall(r'data-key="(.*?)">.*?<b>(.*?)</b>', chart) == [
        ("rest", "1.25"),
        ("checkpoint", "0"),
        ("backward", "0.25"),
        ("forward", "0.5"),
    ]


def test_the_headline_says_where_the_run_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunRecord(write_run(tmp_path, 60))
    run.read()
    now = made_run.START_S + 2000 + 90.0
    monkeypatch.setattr(time, "time", lambda: now + 30)
    assert headline.state(run).name == "running"
    figures = {figure.title: (figure.value, figure.note) for figure in headline.figures(run)}
    assert figures["step"] == ("60", "of 1,000")
    assert figures["time left"] == ("24 min", "1.5 s a step")  # 940 steps
    assert figures["attempts"] == ("2", "the last from step 36")
    assert figures["devices"] == ("8 x cuda", "")
    assert figures["checkpoint"][0] == "36"
    assert figures["MFU"][0] == "41.0 %"
    assert figures["tokens / s"][0] == "2.95k" or figures["tokens / s"][0].startswith("2.")
    monkeypatch.setattr(time, "time", lambda: now + 4 * 3600)
    assert headline.state(run).name == "silent for 4 h 00 min"
    assert "time left" not in {figure.title for figure in headline.figures(run)}
    (tmp_path / "exit.json").write_text('{"code": 75, "reason": "stopped by a signal after step 60"}')
    run.read()
    assert headline.state(run) == headline.State("ended, code 75", "warning", "stopped by a signal after step 60")


def test_trouble_is_told_until_it_is_over(tmp_path: Path) -> None:
    folder = write_run(tmp_path, 20)

    def warnings(*events: dict[str, object]) -> str:
        write_lines(folder / "events.jsonl", [{"attempt": 2, "step": 20, **event} for event in events])
        run = RunRecord(folder)
        run.read()
        return " ".join(headline.warnings(run))

    assert warnings() == "Steps thrown away: 1, rollbacks: 1."
    told = warnings(
        {"event": "collapse", "embedding_spread": 0.01}, {"event": "checkpoint_failed", "reason": "the disk is full"}
    )
    assert "alike since step 20" in told and "the disk is full" in told
    told = warnings({"event": "recovery", "embedding_spread": 0.1}, {"event": "checkpoint", "path": "checkpoints/x"})
    assert told == "Steps thrown away: 1, rollbacks: 1."
    write_lines(folder / "metrics.jsonl", [step_line(2, 20 + n, **{"seconds/data_wait": 0.7}) for n in range(50)])
    assert re.search(r"\d\d % of a step is waiting for data", warnings())


def test_events_are_the_newest_first_and_counted(tmp_path: Path) -> None:
    folder = write_run(tmp_path, 20)
    write_lines(
        folder / "events.jsonl", [{"attempt": 2, "step": n, "event": "profile", "path": "p"} for n in range(300)]
    )
    page = page_of(folder)
    assert "305 in all, the newest 200 are shown" in page
    assert page.index("<td>299</td>") < page.index("<td>100</td>") and "<td>99</td>" not in page


def test_what_a_run_does_not_have_is_left_out(tmp_path: Path) -> None:
    """An empty run, and a step without any of the newer metrics."""
    (tmp_path / "config.yaml").write_text("total_steps: 10\n")
    page = page_of(tmp_path)
    assert charts_of(page) == {} and page.count("Nothing recorded.") == len(SECTIONS)
    assert "starting" in page and "What it says of pictures" not in page
    write_lines(tmp_path / "metrics.jsonl", [{"attempt": 1, "step": 1, "loss/text": 2.0}])
    assert list(charts_of(page_of(tmp_path))) == ["Text loss"]


def test_half_a_line_at_the_end(tmp_path: Path) -> None:
    folder = write_run(tmp_path, 30)
    for name in ("metrics", "events", "validation"):
        with (folder / f"{name}.jsonl").open("a") as file:
            file.write('{"attempt": 2, "step": 31, "event": "profile", "loss/te')
    assert '<b>30</b><span class="note">of 1,000</span>' in page_of(folder)


def test_of_a_step_done_twice_the_later_attempt_is_shown(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(CONFIG)
    for attempt, loss in ((1, 9.0), (2, 3.0)):
        write_lines(tmp_path / "metrics.jsonl", [{"attempt": attempt, "step": n, "loss/text": loss} for n in (1, 2)])
    assert "all sources <b>3</b>" in charts_of(page_of(tmp_path))["Text loss"]


def test_captions_are_beside_their_truth(tmp_path: Path) -> None:
    folder = write_run(tmp_path, 20)
    write_samples(folder / "samples" / "step-00000030", "a blue square")
    (folder / "samples" / "step-00000030" / "1.png").write_bytes(b"no picture")
    (folder / "samples" / "step-00000040").mkdir()
    (folder / "samples" / "step-00000040" / "samples.json").write_text('[{"image": "0.pn')
    page = page_of(folder)
    assert "after step 30" in page and page.count("a blue square") == 3 and "a red circle" not in page
    assert "truth: a green picture" in page and page.count("data:image/jpeg;base64,") == 2


def test_pictures_outside_the_folder_are_not_shown(tmp_path: Path) -> None:
    folder = write_run(tmp_path, 20)
    path = folder / "samples" / "step-00000020" / "samples.json"
    shutil.copyfile(path.parent / "0.png", folder / "private.png")
    path.write_text(json.dumps([{"image": "../../private.png", "generated": "x"}]))
    assert "data:image/jpeg" not in page_of(folder)


def write_hostile(folder: Path) -> None:
    """Strangers' words wherever a run may have them."""
    write_run(folder, 20)
    shutil.rmtree(folder / "samples")
    write_samples(folder / "samples" / "step-00000020", HOSTILE)
    skips = {"skips": {f"{HOSTILE}: {HOSTILE}": 3}, "mixture": {HOSTILE: 0.5}}
    write_lines(folder / "metrics.jsonl", [step_line(2, 21, **skips)])
    write_lines(folder / "events.jsonl", [{"attempt": 2, "step": 20, "event": HOSTILE, "reason": HOSTILE}])
    (folder / "exit.json").write_text(json.dumps({"code": 2, "reason": HOSTILE}))
    (folder / "config.yaml").write_text(CONFIG + f"# {HOSTILE}\n")


def test_nothing_from_strangers_is_html(tmp_path: Path) -> None:
    write_hostile(tmp_path)
    page = page_of(tmp_path)
    assert page.count("&lt;script&gt;alert(1)") > 8
    assert page.count("<script>") == page.count("</script>") == 1 and "onerror=alert(1)>" not in page
    assert not re.search(r"""(?:src|href)=["'](?!data:)""", page)  # nothing from elsewhere
    assert not re.search(r"@import|url\(|https?://", page)


def test_a_long_run_makes_a_small_page(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(CONFIG)
    lines = [{"attempt": 1, "step": n, "grad_norm": 900.0 if n == 7777 else 1.0} for n in range(1, 20_001)]
    write_lines(tmp_path / "metrics.jsonl", lines)
    page = page_of(tmp_path)
    assert len(page) < 60_000
    chart = charts_of(page)["Gradient norm before clipping"]
    [line] = re.findall(r'<polyline.*?points="(.*?)"', chart)
    assert len(line.split()) <= MAX_BINS
    assert ">1k</text>" in chart  # the axis reaches up to the spike


def run_report(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: object) -> str:
    monkeypatch.setattr(sys, "argv", ["report", *map(str, arguments)])
    report.main()
    return capsys.readouterr().out


def test_one_line_says_what_was_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_run(tmp_path / "run", 20)
    said = run_report(capsys, monkeypatch, folder)
    assert said == f"report: {folder}/report.html (0.1 MB), step 20; next: open it in a browser\n"
    run_report(capsys, monkeypatch, folder, "--out", tmp_path / "page.html")
    assert "location.reload" not in (tmp_path / "page.html").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page.html", "run"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["{}/nowhere"], "is not a run folder, it has no config.yaml: give the run_dir of a run"),
        (["{}/run", "--out", "{}/missing/page.html"], "there is no folder"),
        (["{}/run", "--watch", "0"], "--watch 0 is too short"),
        (["{}/list"], "holds a list"),
        (["{}/broken"], "cannot be read as a configuration"),
    ],
)
def test_wrong_input_is_one_sentence(
    arguments: list[str], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in (("run", CONFIG), ("list", "- 1"), ("broken", "a: [")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(text)
    monkeypatch.setattr(sys, "argv", ["report", *(argument.format(tmp_path) for argument in arguments)])
    with pytest.raises(UserError, match=re.escape(sentence)):
        report.main()


def test_watching_ends_with_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps come while it sleeps, then the end: each page is whole, the last one does not load itself again. An end
    after which the run is started again is none."""
    folder, pages, slept = write_run(tmp_path, 20), [], []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        pages.append((folder / "report.html").read_text())
        step = 20 + len(slept)
        if step == 21:
            (folder / "exit.json").write_text('{"code": 75, "reason": "stopped by its time limit"}')
        write_lines(folder / "metrics.jsonl", [step_line(2, step)])
        if step == 22:
            (folder / "exit.json").write_text('{"code": 0, "reason": "trained to the end"}')

    monkeypatch.setattr(time, "sleep", sleep)
    said = run_report(capsys, monkeypatch, folder, "--watch", "2.5")
    assert slept == [2.5, 2.5] and said.splitlines()[-1].endswith("step 22; next: open it in a browser")
    pages.append((folder / "report.html").read_text())
    assert ["location.reload(), 2500" in page for page in pages] == [True, True, False]
    for page, step in zip(pages, (20, 21, 22), strict=True):
        assert f'<b>{step}</b><span class="note">of 1,000</span>' in page and page.endswith("</html>")
    assert "ended, code 0" in pages[-1] and "trained to the end" in pages[-1]
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []


BROWSERS = ("chromium", "chromium-browser", "google-chrome")
POINT = """
<script>
const shown = document.querySelector('[data-chart="Text loss"] svg'), box = shown.getBoundingClientRect();
shown.dispatchEvent(new PointerEvent("pointermove", {clientX: box.left + box.width / 2, clientY: box.top + 50}));
</script>
"""


def test_a_browser_shows_the_page(tmp_path: Path) -> None:
    """No error on the console, hostile words or not; the values at the pointer are those of the chart's middle."""
    browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if browser is None:
        pytest.skip(f"no browser to try the page in: install one of {', '.join(BROWSERS)}")
    write_hostile(tmp_path)
    path = tmp_path / "page.html"
    path.write_text(page_of(tmp_path).replace("</body>", POINT + "</body>"), encoding="utf-8")
    done = subprocess.run(
        [
            *(browser, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"),
            *(f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", path.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    charts = charts_of(done.stdout)
    assert len(charts) == sum(len(section.panels) for section in SECTIONS)
    assert all("<svg" in chart and ("<polyline" in chart or "<polygon" in chart) for chart in charts.values())
    assert "CONSOLE" not in done.stderr, done.stderr
    at = re.search(r'<span class="at".*?>at step (\d+)</span>', charts["Text loss"])
    assert at is not None and 9 <= int(at[1]) <= 13
    total = re.search(r"all sources <b>(.*?)</b>", charts["Text loss"])
    assert total is not None and abs(float(total[1]) - 10) < 1
