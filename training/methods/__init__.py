"""The methods by name. A new one is a file, a line in METHODS and, with a config, in SECTIONS."""

from collections.abc import Callable, Mapping

from pydantic import BaseModel

from training.config import MidasConfig, OgmGeConfig
from training.methods.base import Method
from training.methods.joint import Joint, JointUni
from training.methods.midas import Midas
from training.methods.ogm_ge import OgmGe
from training.methods.unimodal import Unimodal
from training.model import MultimodalModel

METHODS: dict[str, Callable[..., Method]] = {
    "joint": Joint,
    "joint_uni": JointUni,
    "unimodal": Unimodal,
    "midas": Midas,
    "ogm_ge": OgmGe,
}

SECTIONS: dict[str, type[BaseModel]] = {"midas": MidasConfig, "ogm_ge": OgmGeConfig}


def build_method(name: str, model: MultimodalModel, sections: Mapping[str, BaseModel]) -> Method:
    """The method called `name` around `model`.

    Args:
        name: key of METHODS.
        model: encoders and heads.
        sections: configuration of every method in SECTIONS, by method name; others are not read.

    Raises:
        ValueError: unknown name, or the method cannot work with this number of modalities.
    """
    if name not in METHODS:
        raise ValueError(f"method={name!r} does not exist; use one of: {', '.join(METHODS)}")
    return METHODS[name](model, sections[name]) if name in SECTIONS else METHODS[name](model)
