"""The MONAI configuration that does what `volseg.inference` does: ``configs/inference.json``."""

from __future__ import annotations

from typing import Any

from volseg.data.cases import Classes
from volseg.errors import ConfigError
from volseg.extensions import check_name, is_registered
from volseg.inference.decoding import region_decoding
from volseg.inference.model import BUNDLE_WEIGHTS, ModelFacts
from volseg.networks import list_networks
from volseg.planning.plan import Plan


def make_inference_config(facts: ModelFacts) -> dict[str, Any]:
    """A MONAI inference workflow: image file in, label file on its grid out.

    Raises:
        ConfigError: the plan mixes CT with other channels, or is for pictures (2D), or its network
            is the user's own and cannot be named in a bundle.
    """
    plan, classes = facts.plan, facts.classes
    modules = ["glob", "os", "numpy", "torch"]
    # By one name: MONAI does not find the module of a package by its dotted one.
    modules += [f"{module} as {_OWN_MODULE}" for module in _own_module(plan.network.name)]
    return {
        "imports": [f"$import {module}" for module in modules],
        **_INPUTS,
        "network_def": _network(facts),
        "network": "$@network_def.to(@device)",
        "preprocessing": {"_target_": "Compose", "transforms": _preprocessing(plan)},
        **_DATA,
        "inferer": _inferer(plan),
        "postprocessing": {
            "_target_": "Compose",
            "transforms": _postprocessing(classes),
        },
        **_EVALUATION,
    }


_OWN_MODULE = "own_network"
"""What the module of the user's own network is called in a bundle."""
_INPUTS = {
    "bundle_root": ".",
    "dataset_dir": "$@bundle_root + '/data'",
    "image": None,
    "output_dir": "$@bundle_root + '/eval'",
    "device": "$torch.device('cuda' if torch.cuda.is_available() else 'cpu')",
    "datalist": (
        "$[{'image': @image}] if @image else "
        "[{'image': f} for f in sorted(glob.glob(os.path.join(@dataset_dir, '*.nii*')))]"
    ),
}
_DATA = {
    "dataset": {"_target_": "Dataset", "data": "@datalist", "transform": "@preprocessing"},
    "dataloader": {
        "_target_": "DataLoader",
        "dataset": "@dataset",
        "batch_size": 1,
        "num_workers": 0,
    },
}
_EVALUATION = {
    "handlers": [
        {
            "_target_": "CheckpointLoader",
            "load_path": f"$@bundle_root + '/{BUNDLE_WEIGHTS.as_posix()}'",
            "load_dict": {"model": "@network"},
            "map_location": "@device",
        }
    ],
    "evaluator": {
        "_target_": "SupervisedEvaluator",
        "device": "@device",
        "val_data_loader": "@dataloader",
        "network": "@network",
        "inferer": "@inferer",
        "postprocessing": "@postprocessing",
        "val_handlers": "@handlers",
        # MONAI's engines autocast to CUDA whatever the device.
        "amp": "$torch.cuda.is_available()",
    },
    "run": ["$@evaluator.run()"],
}


def _inferer(plan: Plan) -> dict[str, Any]:
    return {
        "_target_": "volseg.inference.SlidingWindow",
        "roi_size": list(plan.patch),
        # Logits of the whole volume are too much for many a GPU.
        "device": "$torch.device('cpu')",
    }


def _network(facts: ModelFacts) -> dict[str, Any]:
    plan = facts.plan
    name = plan.network.name
    if _own_module(name):
        builder = {
            "_target_": "volseg.networks.build_own_network",
            "make": f"${_OWN_MODULE}.{name.partition(':')[2]}",
        }
    else:
        builder = {"_target_": "volseg.networks.build_network", "name": name}
    return {
        **builder,
        "spatial_dims": plan.spatial_dims,
        "in_channels": len(plan.normalisation),
        "out_channels": facts.classes.num_outputs,
        **plan.network.keywords(),
    }


def _own_module(name: str) -> list[str]:
    """The module of ``module:function`` that the user has spoken for; none for an installed name.

    A name that was never imported must not become code in a bundle.
    """
    check_name("networks", "network", name, list_networks())
    if name in list_networks() or not is_registered("networks", name):
        return []
    module, colon, _ = name.partition(":")
    if not colon:
        raise ConfigError(
            f"network '{name}' is known to this process alone, which a bundle cannot say; expected "
            "module:function, or an entry point of an installed package."
        )
    return [module]


def _preprocessing(plan: Plan) -> list[dict[str, Any]]:
    if plan.spatial_dims != 3:
        raise ConfigError("the plan is for 2D images; bundles are exported for volumes only.")
    return [
        {"_target_": "LoadImaged", "keys": "image", "image_only": True},
        {"_target_": "EnsureChannelFirstd", "keys": "image"},
        {"_target_": "EnsureTyped", "keys": "image", "dtype": "$torch.float32"},
        {"_target_": "Orientationd", "keys": "image", "axcodes": "RAS"},
        {
            "_target_": "CropForegroundd",
            "keys": "image",
            "source_key": "image",
            "select_fn": "$lambda x: x != 0",
            "allow_smaller": True,
        },
        {
            "_target_": "volseg.bundle.ResampleToSpacingd",
            "keys": "image",
            "spacing_mm": [
                None if axis == plan.network.slice_axis else value
                for axis, value in enumerate(plan.spacing_mm)
            ],
        },
        *_normalisation(plan),
    ]


def _normalisation(plan: Plan) -> list[dict[str, Any]]:
    channels = plan.normalisation
    if all(channel.scheme == "zscore" for channel in channels):
        return [
            {
                "_target_": "NormalizeIntensityd",
                "keys": "image",
                "channel_wise": True,
                "nonzero": any(channel.nonzero_only for channel in channels),
            }
        ]
    if any(channel.scheme == "zscore" for channel in channels):
        raise ConfigError(
            "the plan normalises some channels as CT and others by z-score, which MONAI's "
            "transforms cannot say; such a run cannot be exported. Predict with volseg."
        )
    low, high = (
        f"torch.tensor({[getattr(channel, name) for channel in channels]}).view(-1, 1, 1, 1)"
        for name in ("clip_low", "clip_high")
    )
    return [
        {
            "_target_": "Lambdad",
            "keys": "image",
            "func": f"$lambda x: torch.clamp(x, {low}, {high})",
            "track_meta": True,
        },
        {
            "_target_": "NormalizeIntensityd",
            "keys": "image",
            "channel_wise": True,
            "subtrahend": [channel.mean for channel in channels],
            "divisor": [channel.std for channel in channels],
        },
    ]


def _postprocessing(classes: Classes) -> list[dict[str, Any]]:
    values, dtype = classes.values, str(classes.dtype)
    decode = {
        "_target_": "MapLabelValued",
        "keys": "pred",
        "orig_labels": list(range(len(values))),
        "target_labels": list(values),
        "dtype": f"$numpy.{dtype}",
    }
    return [
        {
            "_target_": "Invertd",
            "keys": "pred",
            "transform": "@preprocessing",
            "orig_keys": "image",
            "nearest_interp": False,
            "to_tensor": True,
        },
        *_region_decoding(classes),
        {"_target_": "AsDiscreted", "keys": "pred", "argmax": True},
        *([decode] if list(values) != list(range(len(values))) else []),
        {
            "_target_": "SaveImaged",
            "keys": "pred",
            "output_dir": "@output_dir",
            "output_postfix": "",
            "output_dtype": f"$numpy.{dtype}",
            "separate_folder": False,
            "resample": False,
        },
    ]


def _region_decoding(classes: Classes) -> list[dict[str, Any]]:
    """From logits of regions to scores of classes, as `volseg.inference` does."""
    if not classes.regions:
        return []
    weights, offsets = region_decoding(classes)
    func = (
        f"$lambda x: torch.tensordot(torch.tensor({weights}, dtype=x.dtype, device=x.device), x, 1)"
        f" + torch.tensor({offsets}, dtype=x.dtype, device=x.device).view(-1, 1, 1, 1)"
    )
    return [{"_target_": "Lambdad", "keys": "pred", "func": func, "track_meta": True}]
