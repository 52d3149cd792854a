"""The programs of `make kind-up` and `make kind-test`, built from Go modules whose versions and hashes are in `go/`.

python -m deploy.kind.tools helm kind    # prints their paths, one a line; builds what is not cached
python -m deploy.kind.tools --vet        # checks our own Go sources instead
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

from deploy.build import BuildError, GoProgram, Narrator, Progress
from deploy.local.build import KUBERNETES_STAMPS

GO = Path(__file__).parent / "go"
ANNOUNCEMENT = "Building {title}: about {minutes} on 2 cores, once on this machine. The result is kept in\n{{cache}}."


def _tool(name: str, module: str, package: str, version_variable: str, minutes: str) -> GoProgram:
    """Describe a program that is built from its own module as it was released."""
    return GoProgram(
        name=name,
        title=name,
        module=GO / name,
        package=package,
        versioned=module,
        stamps={version_variable: "v{VERSION}"} if version_variable else {},
        announcement=ANNOUNCEMENT.format(title=name, minutes=minutes),
    )


def _kubernetes(name: str, package: str, title: str, minutes: str) -> GoProgram:
    """Describe a program of the module that has what a node of the cluster runs."""
    return GoProgram(
        name=name,
        title=title,
        module=GO / "kubernetes",
        package=package,
        versioned="k8s.io/kubernetes",
        stamps=KUBERNETES_STAMPS,
        announcement=ANNOUNCEMENT.format(title=title, minutes=minutes),
    )


HELM = _tool("helm", "helm.sh/helm/v4", "helm.sh/helm/v4/cmd/helm", "helm.sh/helm/v4/internal/version.version", "3 min")
KIND = _tool("kind", "sigs.k8s.io/kind", "sigs.k8s.io/kind", "", "30 s")
KUBECONFORM = _tool(
    "kubeconform",
    "github.com/yannh/kubeconform",
    "github.com/yannh/kubeconform/cmd/kubeconform",
    "main.version",
    "30 s",
)
KUBE_SCORE = _tool(
    "kube-score", "github.com/zegl/kube-score", "github.com/zegl/kube-score/cmd/kube-score", "main.version", "40 s"
)
KUBERNETES = _kubernetes("kubernetes", ".", "Kubernetes and etcd", "6 min (3 after the local control plane's build)")
COREDNS = _kubernetes("coredns", "./coredns", "CoreDNS", "1 min")
PAUSE = _kubernetes("pause", "./pause", "the pause container", "5 s")

TOOLS = {each.name: each for each in (HELM, KIND, KUBECONFORM, KUBE_SCORE, KUBERNETES, COREDNS, PAUSE)}


def kubectl(directory: Path, progress: Progress) -> Path:
    """Make `kubectl` in a directory and return its path. Raises BuildError."""
    link = directory / "kubectl"
    link.unlink(missing_ok=True)
    link.symlink_to(KUBERNETES.ensure(progress))
    return link


def ensure_all(names: Iterable[str], progress: Progress) -> dict[str, Path]:
    """Return the paths of the named tools, building those that are not cached. Raises BuildError."""
    return {name: TOOLS[name].ensure(progress) for name in names}


def main() -> int:
    parser = argparse.ArgumentParser(description="Build the named tools unless they are cached, and print their paths.")
    parser.add_argument("--vet", action="store_true", help="check our Go sources with `go vet` instead")
    parser.add_argument("tools", nargs="*", choices=[*TOOLS, []], metavar="TOOL", help=", ".join(TOOLS))
    options = parser.parse_args()
    narrator = Narrator(sys.stderr)
    try:
        if options.vet:
            KUBERNETES.vet(narrator)
        for path in ensure_all(options.tools, narrator).values():
            print(path)
    except BuildError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
