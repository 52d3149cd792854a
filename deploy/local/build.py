"""The binary of the local control plane: built from Go modules once per machine, then taken from the user's cache.

python -m deploy.local.build          # prints its path
python -m deploy.local.build --vet    # checks the sources instead
"""

import argparse
import sys
from pathlib import Path

from deploy.build import BuildError, GoProgram, Narrator, Progress

__all__ = ["BuildError", "Narrator", "Progress", "ensure_controlplane"]

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


def ensure_controlplane(progress: Progress) -> Path:
    """Return the binary's path, building it first if it is not in the cache.

    If several processes need it, one builds it and the others wait. Raises BuildError.
    """
    return CONTROLPLANE.ensure(progress)


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Build the local control plane unless it is cached, and print its path."
    )
    parser.add_argument("--vet", action="store_true", help="check its sources with `go vet` instead")
    narrator = Narrator(sys.stderr)
    try:
        if parser.parse_args().vet:
            CONTROLPLANE.vet(narrator)
        else:
            print(ensure_controlplane(narrator))
    except BuildError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
