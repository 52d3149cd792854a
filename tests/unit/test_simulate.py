"""The computed figures: the page has them as they are computed, and they follow from the settings of today."""

from __future__ import annotations

import pytest
import yaml
from click.testing import CliRunner

from smschannel import rotation
from smschannel.leader import DURATION
from smschannel.settings import Settings
from tests.bench import aims, simulate
from tests.bench.simulate import Installation, most_channels
from tests.documents import PAGES, ROOT, table

SMALL, LARGE = Installation(100_000, 1, 100), Installation(1_000_000, 10, 1000)


def test_page_has_the_computed_figures() -> None:
    rows = table(
        "what", "100,000 channels, 1 shard, 100 accounts", "1,000,000 channels, 10 shards, 1,000 accounts", "limit"
    )
    assert rows == simulate.rows(SMALL, LARGE)


def test_page_says_where_the_limits_are() -> None:
    """Rounded down to tens of thousands."""
    page = PAGES["docs/scale.md"]
    assert f"holds {most_channels(1) // 10_000 * 10},000" in page
    assert f"full at {most_channels(10) // 10_000 * 10},000 channels" in page
    assert most_channels(10, but=("etcd, Ready channels",)) > 1_000_000, "with the largest quota a million fit"


def test_unit_costs_are_those_of_their_sources() -> None:
    fields = Settings.model_fields
    assert fields["drift_interval_seconds"].default == simulate.DRIFT_INTERVAL
    assert fields["resync_interval_seconds"].default == simulate.RESYNC_INTERVAL
    assert fields["twilio_concurrency"].default == simulate.TWILIO_CONCURRENCY
    assert fields["key_renewal_days"].default == simulate.RENEWAL_DAYS
    assert simulate.LEASE == DURATION
    assert aims.WRITES.value == simulate.WRITES_OF_CREATION
    per_check = rotation._RESEALS_PER_CHECK
    assert per_check / (rotation.CHECK_SECONDS + per_check * rotation._RESEAL_PAUSE) == simulate.RESEALS_PER_SECOND
    values = (ROOT / "deploy/helm/values.yaml").read_text()
    assert f"{simulate.MEMORY_WITHOUT_CHANNELS / simulate.MIB:.0f} MiB" in values
    limit = yaml.safe_load(values)["operator"]["resources"]["limits"]["memory"]
    assert limit == f"{simulate.MEMORY_LIMIT / simulate.MIB:.0f}Mi"
    costs = dict(table("What", "For each channel"))
    assert costs["the operator's memory, after a start"] == f"{simulate.MEMORY_PER_CHANNEL / simulate.KIB:g} KiB"
    etcd = f"an object of {simulate.CHANNEL_BYTES / 1e3:g} KB and a record of {simulate.RECORD_BYTES / 1e3:g} KB"
    assert costs["etcd"] == etcd


def needs(installation: Installation) -> dict[str, float]:
    return {each.what: each.value for each in installation.needs()}


def test_shards_divide_what_an_operator_needs_and_not_what_the_cluster_needs() -> None:
    one, ten = needs(LARGE._replace(shards=1)), needs(LARGE)
    assert one["start of a shard's leader, its CPU"] == pytest.approx(10 * ten["start of a shard's leader, its CPU"])
    assert one["etcd, Ready channels"] == ten["etcd, Ready channels"]
    assert one["resync, all lists"] == pytest.approx(ten["resync, all lists"]), "each lists its own records only"


def test_more_channels_need_more_of_everything() -> None:
    fewer, more = needs(SMALL), needs(SMALL._replace(channels=200_000))
    rates = {"created per second, at most", "watch traffic of that"}
    assert all(more[what] > fewer[what] for what in fewer.keys() - rates)


def test_shard_without_an_account_is_refused() -> None:
    result = CliRunner().invoke(simulate.main, ["--accounts", "9"])
    assert (result.exit_code, "write at least --accounts 10" in result.output) == (2, True)
