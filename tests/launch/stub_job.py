"""Stands in for the trainer under the launcher: writes its pid file, then does what its first argument says.

obey: run until a stop signal, then rank 0 writes exit.json and every rank exits with that code;
ignore: run for ever whatever comes; finish: write exit.json with code 0 and end; crash: rank 1 exits 9, others obey;
tell: rank 1 writes exit.json and is gone, others ignore; vanish: so, but it writes nothing.
Except in a crash every rank has a child that ignores signals too, as loader workers do.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from trainer import run_folder

OBEYED_CODE = 75
CHILD = "import signal, time; [signal.signal(s, signal.SIG_IGN) for s in (2, 10, 15)]; time.sleep(600)"


def main() -> None:
    run_dir = Path(sys.argv[1].removeprefix("run_dir="))
    behaviour = sys.argv[2]
    rank = int(os.environ["RANK"])
    stop: list[int] = []
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(signum, lambda number, frame: stop.append(number))
    if behaviour == "crash" and rank == 1:
        while not (run_dir / "pids" / "rank-00000.pid").exists():
            time.sleep(0.05)
        sys.exit(9)
    if behaviour != "crash":  # DeepSpeed would wait 30 s for it
        child = subprocess.Popen([sys.executable, "-S", "-c", CHILD])
        (run_dir / f"child-{rank}").write_text(str(child.pid))
    run_folder.write_pid(run_dir, rank)
    if behaviour in ("tell", "vanish") and rank == 1:
        while not (run_dir / "pids" / "rank-00000.pid").exists():
            time.sleep(0.05)
        if behaviour == "tell":
            run_folder.write_exit(run_dir, OBEYED_CODE, "stopped by its time limit")
        os.kill(os.getpid(), signal.SIGKILL)
    while behaviour != "finish" and not (behaviour in ("obey", "crash") and stop):
        time.sleep(0.05)
    code = OBEYED_CODE if stop else 0
    if rank == 0:
        run_folder.write_exit(run_dir, code, f"stopped by {stop}" if stop else "finished")
    sys.exit(code)


if __name__ == "__main__":
    main()
