"""What every network reaches on a dataset in the same few minutes.

``python benchmarks/train_networks.py DATASET OUTPUT --minutes 5``

Each network is planned, trained on fold 0, and scored on the cases that it has not seen, by the
commands that a user types, at the widths that the planner chooses for the machine and the time.
Nothing else should run beside it. What OUTPUT holds already is not run again.
"""

from __future__ import annotations

from training_runs import run_all

RUNS = {
    "unet": ["network.name=unet"],
    "unet, single output": ["network.name=unet", "network.deep_supervision=false"],
    "unet_original": ["network.name=unet_original"],
    "unet_keras": ["network.name=unet_keras"],
    "unet3d_original": ["network.name=unet3d_original"],
    "unet3d_deep_supervision": ["network.name=unet3d_deep_supervision"],
    "dsn3d": ["network.name=dsn3d"],
    "dsn3d, single output": ["network.name=dsn3d", "network.deep_supervision=false"],
    "unet_summed_logits": ["network.name=unet_summed_logits"],
    "unetplusplus": ["network.name=unetplusplus"],
    "unetplusplus, single output": ["network.name=unetplusplus", "network.deep_supervision=false"],
    "laddernet": ["network.name=laddernet"],
    "resnet_unet": ["network.name=resnet_unet"],
    "hypercolumn_unet": ["network.name=hypercolumn_unet"],
    "unet, residual encoder": ["network.name=unet", "network.options.encoder=residual"],
    "unet3d_deep_supervision, encoder's levels": [
        "network.name=unet3d_deep_supervision",
        "network.options.supervision=encoder",
    ],
    "unetplusplus, Keras form": ["network.name=unetplusplus", "network.options.form=keras"],
}


if __name__ == "__main__":
    run_all(RUNS, "What every network reaches in the same few minutes.")
