"""Writes the generated files below deploy/gitops; with --vet, checks the Go code with `go vet` instead."""

import sys

from deploy.build import Narrator
from tests.gitops import GITOPS, KIND, generated
from tests.gitops.judge import KSTATUS

if sys.argv[1:] == ["--vet"]:
    KSTATUS.vet(Narrator(sys.stderr))
else:
    for old in (GITOPS / "argocd" / KIND / "testdata").glob("*.yaml"):
        old.unlink()
    for name, text in generated().items():
        path = GITOPS / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
