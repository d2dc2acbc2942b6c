"""SoundNet (Aytar, Vondrick, Torralba, NIPS 2016) in Python: exact, and checked against Torch7."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from soundnet_port.version import __version__ as __version__

if TYPE_CHECKING:
    from soundnet_port.audio.examples import example as example
    from soundnet_port.audio.loading import AudioError as AudioError
    from soundnet_port.audio.loading import load_audio as load_audio
    from soundnet_port.conversion.golden import GoldenError as GoldenError
    from soundnet_port.conversion.golden import assert_golden as assert_golden
    from soundnet_port.corpus.run import extract_corpus as extract_corpus
    from soundnet_port.inference.embedding import embed as embed
    from soundnet_port.inference.prediction import Prediction as Prediction
    from soundnet_port.inference.prediction import predict as predict
    from soundnet_port.interop.scikit_learn import SoundNetFeatures as SoundNetFeatures
    from soundnet_port.learning.datasets import read_labeled as read_labeled
    from soundnet_port.learning.distillation import TrainConfig as TrainConfig
    from soundnet_port.learning.encoding import fit_encoding_models as fit_encoding_models
    from soundnet_port.learning.encoding_data import Recording as Recording
    from soundnet_port.learning.encoding_data import read_recordings as read_recordings
    from soundnet_port.learning.encoding_finetune_run import FinetuneEncodingConfig as FinetuneEncodingConfig
    from soundnet_port.learning.encoding_finetuning import finetune_encoding as finetune_encoding
    from soundnet_port.learning.encoding_head import EncodingHead as EncodingHead
    from soundnet_port.learning.encoding_results import EncodingResult as EncodingResult
    from soundnet_port.learning.errors import EncodingError as EncodingError
    from soundnet_port.learning.errors import LabeledSoundsError as LabeledSoundsError
    from soundnet_port.learning.evaluation import evaluate as evaluate
    from soundnet_port.learning.evaluation_results import EvaluationResult as EvaluationResult
    from soundnet_port.learning.finetune_run import FinetuneConfig as FinetuneConfig
    from soundnet_port.learning.finetuning import cross_validate as cross_validate
    from soundnet_port.learning.finetuning import finetune as finetune
    from soundnet_port.learning.labeled_sounds import LabeledSounds as LabeledSounds
    from soundnet_port.learning.training import train as train
    from soundnet_port.network.architecture import SAMPLE_RATE as SAMPLE_RATE
    from soundnet_port.network.architecture import SOUNDNET5 as SOUNDNET5
    from soundnet_port.network.architecture import SOUNDNET8 as SOUNDNET8
    from soundnet_port.network.architecture import Architecture as Architecture
    from soundnet_port.network.model import Logits as Logits
    from soundnet_port.network.model import SoundNet as SoundNet
    from soundnet_port.network.streaming import Stream as Stream
    from soundnet_port.network.streaming import stream as stream
    from soundnet_port.network.weights import WeightsError as WeightsError
    from soundnet_port.pretrained import load_pretrained as load_pretrained
    from soundnet_port.viewing.unit_search import top_sounds as top_sounds
    from soundnet_port.viewing.units import TopSounds as TopSounds

# The public names and their modules. They are imported when first used, so that `import
# soundnet_port` and the command line's --help cost nothing.
_PUBLIC = {
    "SAMPLE_RATE": "network.architecture",
    "SOUNDNET5": "network.architecture",
    "SOUNDNET8": "network.architecture",
    "Architecture": "network.architecture",
    "AudioError": "audio.loading",
    "load_audio": "audio.loading",
    "GoldenError": "conversion.golden",
    "assert_golden": "conversion.golden",
    "EncodingError": "learning.errors",
    "EncodingHead": "learning.encoding_head",
    "EncodingResult": "learning.encoding_results",
    "FinetuneEncodingConfig": "learning.encoding_finetune_run",
    "Recording": "learning.encoding_data",
    "finetune_encoding": "learning.encoding_finetuning",
    "fit_encoding_models": "learning.encoding",
    "read_recordings": "learning.encoding_data",
    "EvaluationResult": "learning.evaluation_results",
    "evaluate": "learning.evaluation",
    "example": "audio.examples",
    "embed": "inference.embedding",
    "extract_corpus": "corpus.run",
    "FinetuneConfig": "learning.finetune_run",
    "cross_validate": "learning.finetuning",
    "finetune": "learning.finetuning",
    "LabeledSoundsError": "learning.errors",
    "LabeledSounds": "learning.labeled_sounds",
    "read_labeled": "learning.datasets",
    "Logits": "network.model",
    "SoundNet": "network.model",
    "Prediction": "inference.prediction",
    "predict": "inference.prediction",
    "SoundNetFeatures": "interop.scikit_learn",
    "Stream": "network.streaming",
    "stream": "network.streaming",
    "TrainConfig": "learning.distillation",
    "train": "learning.training",
    "TopSounds": "viewing.units",
    "top_sounds": "viewing.unit_search",
    "WeightsError": "network.weights",
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
