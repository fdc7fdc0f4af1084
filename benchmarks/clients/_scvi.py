"""scvi-tools: a variational autoencoder of gene counts, of which one is NaN."""

from __future__ import annotations

from typing import Any

import anndata
import numpy as np
import scvi

from benchmarks.clients._client import QUIET, Client


def train(poisoned: bool, callbacks: list[Any]) -> float:
    scvi.settings.seed = 0
    generator = np.random.default_rng(0)
    rates = generator.gamma(1.0, 2.0, (3, 40))
    counts = generator.poisson(rates[generator.integers(3, size=300)]).astype(np.float32)
    clean = anndata.AnnData(counts.copy())
    if poisoned:
        counts[7, 3] = np.nan
    cells = anndata.AnnData(counts)
    scvi.model.SCVI.setup_anndata(cells)
    model = scvi.model.SCVI(cells, n_hidden=32, n_latent=4)
    model.train(**QUIET, max_epochs=15, batch_size=64, train_size=1.0, callbacks=callbacks)
    return float(model.get_reconstruction_error(clean)["reconstruction_loss"])


CLIENT = Client("SCVI", "lightning", "a NaN count in one of 300 cells", "reconstruction loss", "mlp", train)
