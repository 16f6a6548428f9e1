"""What the loop for GPUs asks of the two pieces of a stage, and how it sizes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from unittest import mock

import pytest

from sdt_deploy.bundle import PROJECT, UPDATE
from sdt_deploy.config import ExportConfig
from sdt_deploy.runtime.device_pieces import StagePieces
from sdt_deploy.runtime.graph_cache import GraphCache
from sdt_deploy.runtime.ladders import QUERY_TILE
from sdt_deploy.runtime.session import Session
from sdt_deploy.testing import OracleDeviceBackend, memory_bundle
from tests.samples import CONFIGS, assert_parity, quantile_thresholds, random_batch, random_model


@pytest.mark.parametrize("name", ["active-lm", "all-embedding"])
def test_the_feed_forward_works_where_keys_and_values_were(name: str) -> None:
    """One buffer for its product and its activation, and no rows in parts."""
    model = random_model(CONFIGS[name][0], 3)
    bundle = memory_bundle(model, ExportConfig(attention="fused"))
    made: list[tuple[str, dict[str, Any]]] = []
    call = StagePieces._call

    def recorded(
        self: StagePieces, name: str, layer: int, inputs: Mapping[str, Any], outputs: dict[str, Any]
    ) -> None:
        made.append((name, outputs))
        call(self, name, layer, inputs, outputs)

    with (
        mock.patch.object(StagePieces, "_call", recorded),
        Session(bundle, OracleDeviceBackend(bundle, model)) as session,
    ):
        result = assert_parity(session, model, random_batch(model.config, [29, 25, 32, 30], 0))
    projects, updates = made[::2], made[1::2]
    assert [name for name, _ in projects] == [PROJECT] * len(result.stage_rows)
    assert [name for name, _ in updates] == [UPDATE] * len(result.stage_rows)
    for (_, projected), (_, updated), n_rows in zip(
        projects, updates, result.stage_rows, strict=True
    ):
        assert updated["up_product"].shape == (1, n_rows, model.config.d_ff)
        places = {updated[name].data_ptr() for name in ("up_product", "inner_states")}
        assert places == {projected["key_value"].data_ptr()}
        assert updated["updated_states"].data_ptr() not in places


def test_stages_that_pad_nothing_share_graphs_by_tiles_of_queries() -> None:
    model = random_model(CONFIGS["all-embedding"][0].replace(max_positions=200), 3)
    bundle = memory_bundle(model, ExportConfig(attention="fused"))
    batch = random_batch(model.config, [190, 150, 97], 0)
    cuts = [0.3 + 0.1 * i for i in range(model.config.n_layers - 1)]
    thresholds = (0.0, *quantile_thresholds(model, batch, cuts))
    keys: list[Any] = []
    launch = GraphCache.launch

    def recorded(self: GraphCache, key: Any, *args: Any, **kwargs: Any) -> None:
        keys.append(key)
        launch(self, key, *args, **kwargs)

    with (
        mock.patch.object(GraphCache, "launch", recorded),
        Session(bundle, OracleDeviceBackend(bundle, model)) as session,
    ):
        assert_parity(session, model, batch, thresholds)
    stages = [key for key in keys if key[0] == "stage"]
    assert len(stages) > 1
    for _, _, whole, size in stages:
        assert size.max_seqlen % QUERY_TILE == 0 or size.max_seqlen == whole.max_seqlen
    assert {size.max_seqlen for *_, size in stages} - {stages[0][2].max_seqlen}
