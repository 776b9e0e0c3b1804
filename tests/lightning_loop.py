"""A loss of one's own in a training loop of Lightning: `python tests/lightning_loop.py` trains two minutes on a CPU."""

import pytorch_lightning as lightning
import timm
import torch

import mvmae
from mvmae.data import Loader, MultiViewDataset, StepSampler, normalize, open_images
from mvmae.inputs import inputs_of


class VarianceLoss(torch.nn.Module):
    """In place of NT-Xent: latents of an image's views equal, each dimension spread over the batch (as in VICReg)."""

    def forward(self, z):  # (B, V, D)
        apart = (z - z.mean(dim=1, keepdim=True)).square().mean()
        return apart + torch.relu(1 - z.flatten(0, 1).std(dim=0)).mean()


class Pretraining(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        vit = timm.create_model("mvmae_vit_tiny_patch16", img_size=64)
        self.model = mvmae.MultiViewMAE(vit, decoder_dim=96, decoder_heads=3, loss_weight=1.0, contrastive_loss=VarianceLoss())
        self.inputs = inputs_of(vit)  # its mean and deviation

    def training_step(self, batch):
        output = self.model(normalize(batch.views, self.inputs.mean, self.inputs.std))  # (B, V, C, H, W)
        self.log_dict({"loss_rec": output.loss_rec, "loss_con": output.loss_con}, prog_bar=True)
        return output.loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1.5e-4, betas=(0.9, 0.95), weight_decay=0.05)


images, training = open_images("sample"), Pretraining()
dataset = MultiViewDataset(images, mvmae.MultiViewTransform(64), seed=0)
batches = Loader(dataset, StepSampler(len(images), 64, seed=0, num_steps=100), num_workers=2)
lightning.Trainer(max_epochs=1).fit(training, batches)
mvmae.hub.export(training.model, "runs/lightning/encoder")
