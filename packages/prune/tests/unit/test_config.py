from __future__ import annotations

from typing import Any

import pytest

from slimtron_common.errors import ConfigError
from slimtron_prune import PruningConfig


def test_names_and_order_are_nemos() -> None:
    config = PruningConfig(1024, 512, 6, 2, None, None, 26)
    assert config.targets == {
        "target_ffn_hidden_size": 1024,
        "target_hidden_size": 512,
        "target_num_attention_heads": 6,
        "target_num_query_groups": 2,
        "target_num_layers": 26,
    }
    assert not config.is_empty
    assert PruningConfig().is_empty
    assert not PruningConfig(drop_layers=[1]).is_empty


@pytest.mark.parametrize(
    ("settings", "where", "message"),
    [
        ({"drop_layers": []}, "drop_layers", "names no layer"),
        ({"drop_layers": [3, 1, 3]}, "drop_layers", "twice"),
        ({"drop_layers": [0, 1]}, "drop_layers", "count from 1"),
        ({"drop_layers": [1], "target_num_layers": 2}, "drop_layers", "excludes"),
        ({"target_hidden_size": 0}, "target_hidden_size", "no size"),
        ({"target_hidden_size": True}, "target_hidden_size", "no size"),
        ({"target_num_attention_heads": 6}, "target_num_attention_heads", "query_groups"),
        ({"target_num_query_groups": 2}, "target_num_query_groups", "attention_heads"),
    ],
)
def test_refusals(settings: dict[str, Any], where: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        PruningConfig(**settings)
    assert caught.value.where == where
    assert caught.value.exit_code == 2
