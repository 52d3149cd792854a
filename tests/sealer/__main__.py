"""Checks the sealer in Go with `go vet`."""

import sys

from deploy.build import Narrator
from tests.sealer import SEALER

SEALER.vet(Narrator(sys.stderr))
