"""The wandb workspace, with the real classes where they are installed."""

from __future__ import annotations

import re
import sys
from types import SimpleNamespace

import pytest

from conf import UserError
from tests.trainer.test_report import IN_NO_CHART, recorded_metrics
from trainer import dashboard
from trainer.reporting.panels import SECTIONS


def test_a_dry_run_prints_every_chart(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)  # not even needed
    monkeypatch.setattr(sys, "argv", ["dashboard", "--entity", "me", "--project", "emu", "--dry-run"])
    dashboard.main()
    said = capsys.readouterr().out
    for section in SECTIONS:
        assert f"\n{section.title}\n" in said
        for panel in section.panels:
            assert f"  {panel.title}: {', '.join(panel.metrics)}\n" in said
    assert said.splitlines()[-1].startswith(f"workspace: Emu pretraining, {len(SECTIONS)} sections, ")


def test_the_panels_of_the_workspace_have_every_metric() -> None:
    """Their regular expressions and names cover what a run records, each name in full."""
    pytest.importorskip("wandb_workspaces", reason="wandb-workspaces is not installed: pip install wandb-workspaces")
    workspace = dashboard.make_workspace("me", "emu", "Emu")
    assert [section.name for section in workspace.sections] == [section.title for section in SECTIONS]
    panels = {panel.title: panel for section in workspace.sections for panel in section.panels}
    shown = {
        metric
        for metric in recorded_metrics()
        for panel in panels.values()
        if metric in panel.y or (panel.metric_regex and re.search(panel.metric_regex, metric))
    }
    assert recorded_metrics() - shown == IN_NO_CHART
    assert re.search(panels["Text loss"].metric_regex, "validation/loss/text/laion") is None
    assert panels["Text loss"].log_y and panels["Where a step's time goes"].plot_type == "stacked-area"
    assert workspace._to_model().spec.model_dump_json()  # what is sent


def test_without_the_package_one_sentence_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    with pytest.raises(UserError, match="run pip install wandb-workspaces"):
        dashboard.make_workspace("me", "emu", "Emu")


def test_what_wandb_refuses_is_one_sentence() -> None:
    def save() -> None:
        raise ConnectionError("no route to wandb\nand more")

    with pytest.raises(UserError, match=r"did not take the workspace \(no route to wandb\): run wandb login"):
        dashboard.save(SimpleNamespace(save=save))
    assert dashboard.save(SimpleNamespace(save=lambda: None, url="https://wandb")) == "https://wandb"
