"""The authors' released training step as a contender of train_speed.py.

    python tests/bench/released.py --source DIR FOLDER

DIR is a checkout of their repository (Seong-HyeonHwang/MIDAS_NeurIPS2025); nothing of it is kept
here. Their model for CREMA-D on random clips in memory: float32, one thread, batches of 16; forward
and backward pass of the main phase and an SGD step. What their script adds to that (loading data,
logging) is left out, in their favour.
"""

import argparse
import ast
import importlib.util
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # runs from a checkout, installed or not

import torch  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn import functional  # noqa: E402

from service.contest import TheEnd, Turns  # noqa: E402

BATCH_ROWS = 16
NUM_CLASSES = 6
FRAMES, SPECTROGRAM = (3, 3, 224, 224), (1, 1024, 128)
# Their steps are several times as long as ours; turns need not be.
FEWER_STEPS = 4


def load_model(source: Path) -> nn.Module:
    """Their network, without the modules that only their trainer needs."""
    path = source / "models" / "kinetics_resnet.py"
    spec = importlib.util.spec_from_file_location("released_resnet", path)
    assert spec is not None
    assert spec.loader is not None
    resnet = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(resnet)
    tree = ast.parse((source / "models" / "model_midas_cremad.py").read_text())
    wanted = [node for node in tree.body if getattr(node, "name", "") == "AudioAndVisionModel"]
    names: dict[str, Any] = {"torch": torch, "nn": nn, "F": functional}
    exec(compile(ast.Module(wanted, []), "model_midas_cremad.py", "exec"), names)
    return names["AudioAndVisionModel"](
        num_classes=NUM_CLASSES,
        loss_fn=nn.CrossEntropyLoss(),
        audio_module=resnet.resnet18(modality="audio"),
        video_module=resnet.resnet18(modality="visual"),
        audio_feature_dim=512,
        video_feature_dim=512,
        fusion_output_size=256,
        dropout_p=0.2,
        use_augmentation=True,
        train_dataset=None,
        warmup_epochs=0,
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = load_model(args.source)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4)
    video, audio = torch.randn(BATCH_ROWS, *FRAMES), torch.randn(BATCH_ROWS, *SPECTROGRAM)
    label = torch.arange(BATCH_ROWS) % NUM_CLASSES

    def step() -> None:
        optimizer.zero_grad()
        loss = model(audio, video, label, use_augmentation=True, current_epoch=1)[1]
        loss.backward()
        optimizer.step()

    step()
    turns, numbers = Turns(args.folder, "released"), {}
    try:
        while True:
            steps = max(1, turns.next(numbers) // FEWER_STEPS)
            began = time.perf_counter()
            for _ in range(steps):
                step()
            numbers = {
                "seconds": time.perf_counter() - began,
                "steps": steps,
                "rows": steps * BATCH_ROWS,
            }
    except TheEnd:
        pass


if __name__ == "__main__":
    main()
