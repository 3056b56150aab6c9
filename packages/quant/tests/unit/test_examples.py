from __future__ import annotations

from pathlib import Path

import yaml

from slimtron_common.config import build_config, to_dict
from slimtron_quant.job.config import QuantJobConfig
from slimtron_quant.recipes.files import read_recipe_file
from slimtron_quant.recipes.sources import load_source

FOLDER = Path(__file__).parents[4] / "examples" / "quantize"
EXAMPLE = FOLDER / "fp8.yaml"

# Has no default, or was cut for a laptop.
CHOSEN = {
    ("model",),
    ("export", "path"),
    ("quantization", "calibration_dataset"),
    ("quantization", "calibration_dataset_size"),
    ("quantization", "calibration_batch_size"),
    ("quantization", "calibration_seq_len"),
}


def leaves(tree: object, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], object]:
    if not isinstance(tree, dict) or not tree:
        return {path: tree}
    return {leaf: v for key, sub in tree.items() for leaf, v in leaves(sub, (*path, key)).items()}


def test_the_example_holds_every_setting_at_its_default() -> None:
    written = leaves(yaml.safe_load(EXAMPLE.read_text(encoding="utf-8")))
    required = {"model": "hf:model", "export.path": "out"}
    default = leaves(to_dict(build_config(QuantJobConfig, flags=required)))
    assert written.keys() == default.keys()
    assert {leaf for leaf in written if written[leaf] != default[leaf]} == CHOSEN
    assert leaves(to_dict(build_config(QuantJobConfig, file=EXAMPLE))) == written


def test_the_recipe_files_load() -> None:
    mixed = read_recipe_file(FOLDER / "mixed.yaml")
    assert mixed.overrides == {"*.linear_proj": "fp8", "decoder.layers.29": None}
    assert load_source(str(FOLDER / "nemo.json")).recipe.weight_bits == 8
