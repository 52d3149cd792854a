"""The binary of the local control plane: built from Go modules once per machine, then taken from the user's cache.

python -m deploy.local.build          # prints its path
python -m deploy.local.build --vet    # checks the sources instead
"""

import sys
from pathlib import Path

from deploy.build import GoProgram, command_line

# kubectl refuses a server without a version.
KUBERNETES_STAMPS = {
    "k8s.io/component-base/version.gitVersion": "v{VERSION}",
    "k8s.io/component-base/version.gitMajor": "{MAJOR}",
    "k8s.io/component-base/version.gitMinor": "{MINOR}",
}
CONTROLPLANE = GoProgram(
    name="controlplane",
    title="the local control plane",
    module=Path(__file__).parent / "controlplane",
    versioned="k8s.io/kubernetes",
    stamps=KUBERNETES_STAMPS,
    announcement="""\
Building the local control plane: a real kube-apiserver and etcd in one program, compiled from some 2,000 Go packages.
This takes about 5 minutes on 2 cores and happens once on this machine: the result is kept in
{cache}.""",
)


if __name__ == "__main__":
    sys.exit(command_line(CONTROLPLANE))
