from __future__ import annotations

from pathlib import Path

import yaml

from slimtron_common.config import build_config, to_dict
from slimtron_prune.job.config import PruneJobConfig

EXAMPLE = Path(__file__).parents[4] / "examples" / "prune" / "smollm2.yaml"

# Has no default, or was chosen for a laptop.
CHOSEN = {
    ("model",),
    ("export", "path"),
    ("pruning", "target_ffn_hidden_size"),
    ("pruning", "target_num_layers"),
    ("scoring", "source"),
    ("scoring", "num_tokens"),
}


def leaves(tree: object, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], object]:
    if not isinstance(tree, dict) or not tree:
        return {path: tree}
    return {leaf: v for key, sub in tree.items() for leaf, v in leaves(sub, (*path, key)).items()}


def test_the_example_holds_every_setting_at_its_default() -> None:
    written = leaves(yaml.safe_load(EXAMPLE.read_text(encoding="utf-8")))
    required = {
        "model": "hf:model",
        "export.path": "out",
        "scoring.source": "pydoc",
        "pruning.drop_layers": [1],
    }
    default = leaves(to_dict(build_config(PruneJobConfig, flags=required)))
    default |= {("pruning", "drop_layers"): None, ("scoring", "source"): None}
    assert written.keys() == default.keys()
    assert {leaf for leaf in written if written[leaf] != default[leaf]} == CHOSEN
    assert leaves(to_dict(build_config(PruneJobConfig, file=EXAMPLE))) == written
