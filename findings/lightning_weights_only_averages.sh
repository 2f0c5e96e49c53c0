#!/usr/bin/env bash
# lightning 2.6.6, with torch 2.13.0 on Python 3.11, no GPU needed.
#
# Lightning's EMAWeightAveraging puts the averages into checkpoints. Not so with ModelCheckpoint(save_weights_only=True),
# whose file is the one to deploy: it holds the weights, without a word, as callbacks are told of whole checkpoints only.
# Of the same training, the two files of the last epoch differ.
#
# Seen:
#   whole checkpoint holds the averages: True
#   weights-only checkpoint holds the averages: False
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m pip install -q --target "$place/packages" torch==2.13.0 numpy lightning==2.6.6
cat >"$place/found.py" <<'PYTHON'
import logging
import warnings

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint

warnings.filterwarnings("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Module(LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Linear(4, 4)

    def training_step(self, x, batch_idx):
        return (self.net(x) - 1).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


data = torch.utils.data.DataLoader(torch.ones(32, 4), batch_size=4)
quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
for kind, only in (("whole", False), ("weights-only", True)):
    save = ModelCheckpoint(kind, filename="last", save_weights_only=only)
    module = Module()
    averaging = EMAWeightAveraging(decay=0.9)
    Trainer(max_epochs=2, callbacks=[averaging, save], **quiet).fit(module, data)
    averages = module.state_dict()  # which Lightning leaves there when training ends
    saved = torch.load(f"{kind}/last.ckpt", weights_only=True)["state_dict"]
    same = all(torch.equal(saved[name], averages[name]) for name in averages)
    print(f"{kind} checkpoint holds the averages: {same}")
PYTHON
(cd "$place" && PYTHONPATH="$place/packages" python3 found.py) >"$place/seen" 2>"$place/errors" || { cat "$place/errors"; exit 1; }
cat "$place/seen"
sed -n 's/^#   //p' "$0" | diff - "$place/seen"
