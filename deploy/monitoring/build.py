"""promtool, which tests the alert rules: built once per machine from the Go module of Prometheus.

python -m deploy.monitoring.build    # prints its path
"""

import sys
from pathlib import Path

from deploy.build import GoProgram, command_line

PROMTOOL = GoProgram(
    name="promtool",
    title="promtool",
    module=Path(__file__).parent / "promtool",
    package="github.com/prometheus/prometheus/cmd/promtool",
    versioned="github.com/prometheus/prometheus",
    stamps={"github.com/prometheus/common/version.Version": "{VERSION}"},
    tags=("remove_all_sd",),  # the clients of all clouds, of which the rules need none
    announcement="""\
Building promtool: about 4 minutes on 2 cores, once on this machine. The result is kept in
{cache}.""",
)


if __name__ == "__main__":
    sys.exit(command_line(PROMTOOL))
