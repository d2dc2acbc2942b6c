"""SoundNet (Aytar, Vondrick, Torralba, NIPS 2016) in Python: exact, and proven against Torch7."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from soundnet_port.architecture import SAMPLE_RATE as SAMPLE_RATE
    from soundnet_port.architecture import SOUNDNET5 as SOUNDNET5
    from soundnet_port.architecture import SOUNDNET8 as SOUNDNET8
    from soundnet_port.architecture import Architecture as Architecture
    from soundnet_port.audio import AudioError as AudioError
    from soundnet_port.audio import load_audio as load_audio
    from soundnet_port.corpus import extract_corpus as extract_corpus
    from soundnet_port.evaluation import Evaluation as Evaluation
    from soundnet_port.evaluation import evaluate as evaluate
    from soundnet_port.examples import example as example
    from soundnet_port.features import embed as embed
    from soundnet_port.finetuning import Tuning as Tuning
    from soundnet_port.finetuning import cross_validate as cross_validate
    from soundnet_port.finetuning import finetune as finetune
    from soundnet_port.golden import GoldenError as GoldenError
    from soundnet_port.golden import assert_golden as assert_golden
    from soundnet_port.labelled import LabelledError as LabelledError
    from soundnet_port.labelled import LabelledSounds as LabelledSounds
    from soundnet_port.labelled import read_labelled as read_labelled
    from soundnet_port.model import Logits as Logits
    from soundnet_port.model import SoundNet as SoundNet
    from soundnet_port.prediction import Prediction as Prediction
    from soundnet_port.prediction import predict as predict
    from soundnet_port.pretrained import load_pretrained as load_pretrained
    from soundnet_port.scikit_learn import SoundNetFeatures as SoundNetFeatures
    from soundnet_port.streaming import Stream as Stream
    from soundnet_port.streaming import stream as stream
    from soundnet_port.training import Recipe as Recipe
    from soundnet_port.training import train as train
    from soundnet_port.units import TopSounds as TopSounds
    from soundnet_port.units import top_sounds as top_sounds
    from soundnet_port.weights import WeightsError as WeightsError

# The public names and their modules. They are imported when first used, so that `import
# soundnet_port` and the command line's --help cost nothing.
_PUBLIC = {
    "SAMPLE_RATE": "architecture",
    "SOUNDNET5": "architecture",
    "SOUNDNET8": "architecture",
    "Architecture": "architecture",
    "AudioError": "audio",
    "load_audio": "audio",
    "GoldenError": "golden",
    "assert_golden": "golden",
    "Evaluation": "evaluation",
    "evaluate": "evaluation",
    "example": "examples",
    "embed": "features",
    "extract_corpus": "corpus",
    "Tuning": "finetuning",
    "cross_validate": "finetuning",
    "finetune": "finetuning",
    "LabelledError": "labelled",
    "LabelledSounds": "labelled",
    "read_labelled": "labelled",
    "Logits": "model",
    "SoundNet": "model",
    "Prediction": "prediction",
    "predict": "prediction",
    "SoundNetFeatures": "scikit_learn",
    "Stream": "streaming",
    "stream": "streaming",
    "Recipe": "training",
    "train": "training",
    "TopSounds": "units",
    "top_sounds": "units",
    "WeightsError": "weights",
    "load_pretrained": "pretrained",
}
__all__ = sorted(_PUBLIC)


class _Checkout:
    """Finds soundnet_port.conversion beside this folder; installed, setup.cfg has put it inside."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name != "soundnet_port.conversion":
            return None
        folder = Path(__file__).parent.parent / "conversion"
        return importlib.util.spec_from_file_location(
            name, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )


if (Path(__file__).parent.parent / "conversion" / "t7.py").is_file():
    sys.meta_path.append(_Checkout())


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"soundnet_port.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module 'soundnet_port' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
