"""The report's charts as a wandb workspace: ``python -m trainer.dashboard --entity E --project P``."""

from __future__ import annotations

import argparse
from typing import Any

from conf import UserError, run_cli
from trainer.reporting.panels import MANY, SECTIONS, Panel, as_regex


def make_workspace(entity: str, project: str, name: str) -> Any:
    """A `Workspace` of wandb-workspaces, not yet saved. UserError without that package, or for a name it refuses."""
    try:
        import wandb_workspaces.reports.v2 as reports
        import wandb_workspaces.workspaces as workspaces
    except ImportError as error:
        raise UserError("wandb-workspaces is not installed: run pip install wandb-workspaces") from error
    sections = [
        workspaces.Section(
            name=section.title,
            panels=[reports.LinePlot(**line_plot(panel)) for panel in section.panels],
            is_open=True,
        )
        for section in SECTIONS
    ]
    try:
        return workspaces.Workspace(entity=entity, project=project, name=name, sections=sections)
    except ValueError as error:
        raise UserError(f"--name {name} cannot be a workspace's name: give one of plain letters") from error


def line_plot(panel: Panel) -> dict[str, Any]:
    """Arguments of wandb-workspaces' `LinePlot`. It has neither the limits nor the rest of a whole."""
    settings: dict[str, Any] = {
        "title": panel.title,
        "x": "Step",
        "title_y": panel.unit or None,
        "log_y": panel.log or None,
        "range_y": panel.y_range,
        "plot_type": "stacked-area" if panel.whole else "line",
    }
    if any(name.endswith(MANY) for name in panel.metrics):
        return {**settings, "metric_regex": f"^({'|'.join(map(as_regex, panel.metrics))})$"}
    return {**settings, "y": list(panel.metrics)}


def describe() -> str:
    """The sections, and under each its panels with their metrics."""
    lines = []
    for section in SECTIONS:
        lines += ["", section.title]
        lines += [f"  {panel.title}: {', '.join(panel.metrics)}" for panel in section.panels]
    return "\n".join(lines)


def save(workspace: Any) -> str:
    """Send it to wandb, and return its address. UserError for whatever wandb answers instead."""
    try:
        workspace.save()
        return str(workspace.url)
    except Exception as error:  # of wandb, requests or graphql
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(
            f"wandb did not take the workspace ({reason}): run wandb login, and check --entity and --project"
        ) from error


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m trainer.dashboard", description=__doc__.split(":")[0])
    parser.add_argument("--entity", required=True, help="wandb user or team")
    parser.add_argument("--project", required=True, help="as in monitor.wandb_project")
    parser.add_argument("--name", default="Emu pretraining", help="of the workspace (%(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="print the sections and charts, and send nothing")
    arguments = parser.parse_args()
    num_panels = sum(len(section.panels) for section in SECTIONS)
    made = f"{arguments.name}, {len(SECTIONS)} sections, {num_panels} charts"
    if arguments.dry_run:
        print(describe())
        print(f"\nworkspace: {made}; not sent; next: the same command without --dry-run")
        return
    address = save(make_workspace(arguments.entity, arguments.project, arguments.name))
    print(f"workspace: {made}; next: open {address}")


if __name__ == "__main__":
    run_cli(main)
