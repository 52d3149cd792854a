"""A whole environment in a directory: engine, cluster, twin and product. `make kind-up` and the tests use it."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deploy.build import Progress, fingerprint
from deploy.kind import install, product, tools
from deploy.kind.access import Access
from deploy.kind.cluster import KindCluster
from deploy.kind.engine import Engine, EngineError, PrivateEngine, host_engine

WORKERS = 1  # beside the control plane, which takes pods too: a drained worker's pods have somewhere to go


class Environment:
    """`up` makes everything that is missing; `down` removes everything that `up` made, however far it came."""

    def __init__(self, home: Path, say: Progress) -> None:
        self.home = home.absolute()
        self.bin = self.home / "bin"
        self.kubeconfig = self.home / "kubeconfig"
        self._private = PrivateEngine(self.home / "engine", say)
        self._name = f"sms-{fingerprint(str(self.home))[:6]}"
        self._say = say
        self.engine: Engine
        self.cluster: KindCluster
        self._clusters: list[KindCluster] = []

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the directory for this process. Raises EngineError if another process works in it."""
        self.home.mkdir(parents=True, exist_ok=True)
        with (self.home.parent / f"{self.home.name}.lock").open("w") as held:
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise EngineError(f"Another process is working in {self.home}; wait until it has ended.") from None
            yield

    def is_up(self) -> bool:
        return (self.home / "up").exists() and self.running_engine() is not None

    def running_engine(self) -> Engine | None:
        """Return the engine that `start` chose, if it still runs."""
        if not self.home.exists():
            return None
        return self._private.running() if (self.home / "engine").exists() else host_engine()

    def start(self) -> Access:
        """Start the engine and a cluster without the product. Raises BuildError or EngineError."""
        self.engine = host_engine() or self._start_private()
        self.cluster = KindCluster(self.engine, self._name, self.home, self._say)
        self._clusters.append(self.cluster)
        self.cluster.create(WORKERS)
        return Access(self.kubeconfig, self.bin, self._say)

    def up(self, tag: str = "local") -> Access:
        """Start a cluster with the twin and the product in it. Raises BuildError or EngineError."""
        access = self.start()
        self.load_images(tag)
        self.install(access, tag)
        return access

    def install(self, access: Access, tag: str) -> None:
        """Install the twin and the chart. The certificates that their clients trust are written beside the cluster."""
        self._say("Installing the Twilio twin and the chart.")
        twin_certificate = install.install_twin(access)
        (self.home / "twin-ca.crt").write_text(twin_certificate)
        (self.home / "shim-ca.crt").write_text(install.prepare_namespace(access, twin_certificate))
        install.install_product(access, tag)

    def load_images(self, tag: str) -> None:
        """Build the images of the product and the twin, and load them into the nodes."""
        image = f"{install.IMAGE}:{tag}"
        product.build_product(self.engine, image, self._say)
        product.build_twin(self.engine, install.TWIN_IMAGE, image)
        for each in (image, install.TWIN_IMAGE):
            self.cluster.load(each)

    def down(self) -> None:
        """Remove everything. Twice does no harm."""
        if not (self.home / "engine").exists() and (engine := host_engine()):
            self._say("Deleting the cluster.")
            engine.run(tools.KIND.ensure(self._say), "delete", "cluster", "--name", self._name)
        self._private.stop()
        while self._clusters:
            self._clusters.pop().wait_until_gone()
        shutil.rmtree(self.home, ignore_errors=True)

    def _start_private(self) -> Engine:
        if os.geteuid() != 0:
            raise EngineError(
                "There is no Docker that works, and a container engine of our own needs root. Start Docker (`docker"
                " version` must show a server), or run this as root on Debian."
            )
        self._say("There is no Docker that works: starting a private container engine, which leaves nothing behind.")
        return self._private.start()
