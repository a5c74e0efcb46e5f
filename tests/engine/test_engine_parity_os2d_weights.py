"""Checkpoints of OS2D's release: every tensor finds its place in the detector; what does not fit is refused."""

from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model
from torchvision.models import resnet50

from fsdet.checkpoint.checkpointer import FewShotCheckpointer
from fsdet.checkpoint.rename import TABLES, convert_file, rename
from fsdet.engine.parity_os2d_detector import backbone_state, fill, transform_state
from fsdet.engine.run import load_for_run
from fsdet.engine.setup import load_config

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "os2d"
PARAMETERS = {"v1": (4, 10_166_276), "v2": (6, 10_169_478)}  # of the transform at a place; of the whole network
SCENES, CLASSES = "net_feature_maps.", "net_label_features.net_class_features."
REGRESSOR = "os2d_head_creator.aligner.parameter_regressor."
NARROW = [
    "MODEL.RESNETS.STEM_OUT_CHANNELS", "8", "MODEL.RESNETS.WIDTH_PER_GROUP", "8", "MODEL.RESNETS.RES2_OUT_CHANNELS",
    "32",
]  # fmt: skip
CSV = """imageid,classid,gtbboxid,difficult,lx,ty,rx,by,split
1,7,1,0,0.1,0.1,0.5,0.5,train
2,7,2,0,0.1,0.1,0.5,0.5,val-old-cl
2,9,3,0,0.5,0.5,0.9,0.9,val-new-cl
"""


@pytest.fixture
def config(tmp_path):
    """The configuration of a direct run on GroZi, whose table here has three objects."""
    (tmp_path / "grozi" / "classes").mkdir(parents=True)
    (tmp_path / "grozi" / "classes" / "grozi.csv").write_text(CSV)

    def load(version, device, *opts):
        words = ["FEWSHOT.ROOT", str(tmp_path), "MODEL.DEVICE", device, "OUTPUT_DIR", str(tmp_path / "run"), *opts]
        return load_config(str(CONFIGS / f"grozi_{version}_direct.yaml"), words, model="r50_c4_torchvision")

    return load


def narrow(config, *opts):
    """Configuration and detector with an eighth of the channels."""
    cfg = config("v2", "cpu", *NARROW, *opts)
    torch.manual_seed(0)
    return cfg, build_model(cfg)


def released(model):
    """State dict of a detector under the released names."""
    backbone = model.backbone.state_dict()
    regressor = {REGRESSOR + name: value for name, value in model.head.transform_net.state_dict().items()}
    return {**{prefix + name: value for prefix in (SCENES, CLASSES) for name, value in backbone.items()}, **regressor}


def released_shapes(outputs):
    """Shapes by the released names: torchvision's backbone twice, and the transform for `outputs` parameters."""
    with torch.device("meta"):
        backbone = resnet50().state_dict()
    shapes = {
        prefix + name: tuple(value.shape)
        for prefix in (SCENES, CLASSES)
        for name, value in backbone.items()
        if not name.startswith(("layer4.", "fc."))
    }
    for name, shape in (("conv.0", (128, 225, 7, 7)), ("conv.3", (64, 128, 5, 5)), ("linear", (outputs, 64, 5, 5))):
        shapes |= {f"{REGRESSOR}{name}.weight": shape, f"{REGRESSOR}{name}.bias": shape[:1]}
    for name, width in (("conv.1", 128), ("conv.4", 64)):
        vectors = ("weight", "bias", "running_mean", "running_var")
        shapes |= {f"{REGRESSOR}{name}.{vector}": (width,) for vector in vectors}
        shapes[f"{REGRESSOR}{name}.num_batches_tracked"] = ()
    return shapes


@pytest.mark.parametrize("version", PARAMETERS)
def test_released_names_and_shapes_fit(config, version):
    """The whole R-50, without a number being computed."""
    with torch.device("meta"):
        model = build_model(config(version, "meta"))
    outputs, total = PARAMETERS[version]
    tensors = {name: torch.zeros(()).expand(shape) for name, shape in released_shapes(outputs).items()}
    renamed, report = rename(tensors, TABLES["os2d"], model.state_dict())
    assert report.is_full, report.describe()
    assert report.dropped == tuple(name for name in tensors if name.startswith(CLASSES))
    model.load_state_dict(renamed, assign=True)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert (len(parameters), sum(p.numel() for p in parameters)) == (139, total)


def test_released_file_is_converted_and_loaded(config, tmp_path):
    """With the optimizer's state beside the weights, and from several processes."""
    _, model = narrow(config)
    state = {f"module.{name}": value for name, value in released(model).items()}
    torch.save({"net": state, "optimizer": {"state": {}, "param_groups": []}}, tmp_path / "os2d.pth")
    convert_file(tmp_path / "os2d.pth", tmp_path / "ours.pth", TABLES["os2d"], model_state=model.state_dict())
    cfg, other = narrow(config, "MODEL.WEIGHTS", str(tmp_path / "ours.pth"))
    for parameter in other.parameters():
        torch.nn.init.zeros_(parameter)
    checkpointer = FewShotCheckpointer(other, cfg.OUTPUT_DIR)
    assert load_for_run(cfg, checkpointer, resume=False, training=False) == 0
    assert checkpointer.report.is_full
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("is_foreign", [True, False])
def test_file_that_matches_nothing_is_refused(config, tmp_path, is_foreign):
    """Neither another network's tensors nor the released names, not converted, are taken for weights."""
    _, model = narrow(config)
    state = {"encoder.weight": torch.ones(2)} if is_foreign else released(model)
    torch.save({"net": state}, tmp_path / "other.pth")
    cfg, model = narrow(config, "MODEL.WEIGHTS", str(tmp_path / "other.pth"))
    with pytest.raises(ValueError, match=r"other\.pth: none of its tensors has a name of this model"):
        load_for_run(cfg, FewShotCheckpointer(model, cfg.OUTPUT_DIR), resume=False, training=False)


def test_conversion_of_a_file_that_does_not_fit_is_refused(config, tmp_path):
    _, model = narrow(config)
    state = released(model)
    for change, message in (
        (lambda s: {"encoder.weight": torch.ones(2)}, "no row of the table takes encoder.weight"),
        (
            lambda s: {n: v for n, v in s.items() if not n.endswith("linear.bias")},
            "not in the file: head.transform_net.lin",
        ),
        (
            lambda s: {**s, REGRESSOR + "linear.weight": torch.ones(4, 64, 5, 5)},
            "other shape: head.transform_net.linear",
        ),
        (lambda s: {**s, f"{SCENES}fc.weight": torch.ones(2)}, "not in the model: backbone.fc.weight"),
        (lambda s: {**s, f"{CLASSES}conv1.weight": 1 + s[f"{CLASSES}conv1.weight"]}, "different values"),
    ):
        torch.save({"net": change(state)}, tmp_path / "odd.pth")
        with pytest.raises(ValueError, match=message):
            convert_file(tmp_path / "odd.pth", tmp_path / "x.pth", TABLES["os2d"], model_state=model.state_dict())
        assert not (tmp_path / "x.pth").exists()


def test_golden_weights_that_do_not_fit_are_refused(config):
    _, model = narrow(config)
    backbone = {n: v for n, v in model.backbone.state_dict().items() if "num_batches" not in n}
    regressor = {n: v for n, v in model.head.transform_net.state_dict().items() if "num_batches" not in n}
    outputs = {f"linear_affine.{part}": regressor[f"linear.{part}"] for part in ("weight", "bias")}
    state = backbone_state(backbone) | transform_state(regressor, outputs, "linear_affine")
    names = fill(model, state)
    assert names[f"{REGRESSOR}linear.bias"] == "head.transform_net.linear.bias"
    assert names[f"{SCENES}conv1.weight"] == "backbone.conv1.weight"
    del state[f"{REGRESSOR}conv.3.bias"]
    with pytest.raises(ValueError, match=r"not in the file: head\.transform_net\.conv\.3\.bias"):
        fill(model, state)
