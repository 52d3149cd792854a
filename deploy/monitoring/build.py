"""promtool, which tests the alert rules, and the server: built once per machine from the Go module of Prometheus.

python -m deploy.monitoring.build    # prints promtool's path
"""

import sys
from pathlib import Path

from deploy.build import GoProgram, command_line


def _program(name: str, minutes: int) -> GoProgram:
    return GoProgram(
        name=name,
        title=name,
        module=Path(__file__).parent / "prometheus",
        package=f"github.com/prometheus/prometheus/cmd/{name}",
        versioned="github.com/prometheus/prometheus",
        stamps={"github.com/prometheus/common/version.Version": "{VERSION}"},
        tags=("remove_all_sd",),  # the clients of all clouds, which neither needs here
        announcement=f"""\
Building {name}: about {minutes} minutes on 2 cores, once on this machine. The result is kept in
{{cache}}.""",
    )


PROMTOOL = _program("promtool", 4)
PROMETHEUS = _program("prometheus", 5)


if __name__ == "__main__":
    sys.exit(command_line(PROMTOOL))
