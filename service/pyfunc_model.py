"""The code of a registered model, as MLflow wants it: a script that is copied into the model, and
run when it is loaded ("models from code"), so that no object has to be pickled.

All it does is to call this package, which must be installed where the model is loaded.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel  # pyright: ignore[reportPrivateImportUsage]

from service.served import CONFLICT, Served, prediction_columns, read_files

PRESENT = "present"


class Midas(PythonModel):
    """Predicts a dict of arrays, modality -> (B, *shape), as prepared shards deliver them.

    If modalities are optional, `present`, (B, M) bool, says which the rows have. Returns a
    DataFrame: predicted class, its probability, those of all classes, what each modality alone says
    and whether modalities contradict each other.

    MLflow would take a type hint of the input for a schema, and it knows none for a dict of arrays.
    """

    _skip_type_hint_validation = True

    def load_context(self, context: Any) -> None:
        """Load the weights, onto a GPU if there is one."""
        folder = Path(context.artifacts["model"])
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = Served(read_files(folder), str(folder), device)

    def predict(self, context, model_input, params=None):
        """See the class."""
        rows = {name: np.asarray(model_input[name]) for name in self.model.modalities}
        count = len(rows[self.model.modalities[0]])
        everything = np.ones((count, len(rows)), dtype=bool)
        present = np.asarray(model_input[PRESENT]) if PRESENT in model_input else everything
        answers = self.model(rows, present)
        frame = pa.table(prediction_columns(self.model.manifest, answers, CONFLICT)).to_pandas()
        frame["probabilities"] = [row.tolist() for row in frame["probabilities"]]
        return frame


set_model(Midas())
