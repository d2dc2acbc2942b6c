"""Encoding models of a synthetic brain: what is recovered, how long it takes, and peak memory.

    python benchmarks/encoding.py ESC-10 OUT [WEIGHTS] [--once | --finetune]

Ten runs of 600 volumes (TR 1.5 s) play shuffled clips; the tenth repeats the ninth's sound. Of 1,000 outputs,
140 each mix a layer's channels at random and respond three volumes (4.5 s) later, or as Glover's hemodynamic
response; a half has as much noise as signal, the other nine times as much; the last 20 are noise alone.
OUT gets the sounds, the arrays, the table and the results.

With --finetune: brains with half signal that follow pool5 of the network itself, and of one whose conv4 and
conv5 differ by as much as their weights vary; nine runs, the ninth held out, the eighth for validation.
"""

import resource
import sys
import time
from copy import deepcopy
from pathlib import Path

import numpy as np
import soundfile
import torch

import soundnet_port as sp
from soundnet_port.learning.encoding_features import (
    AlignedFeatures,
    ResponseModel,
    default_layers,
    hemodynamic_response,
    standardize,
)
from soundnet_port.learning.encoding_results import format_encoding, write_encoding

TR, VOLUMES, RUNS = 1.5, 600, 10
PER_LAYER, OUTPUTS = 140, 1000
SHARES = (0.5, 0.1)  # of signal in the variance
LAG = 3  # volumes
Output = tuple[str, str, float]  # layer, response, share of signal
RESPONSES = {
    "lag": ResponseModel((LAG,)),
    "glover": ResponseModel(
        tuple(range(len(hemodynamic_response("glover", TR)))),
        tuple(hemodynamic_response("glover", TR).tolist()),
    ),
}


def write_sounds(esc10: str, folder: Path, generator: np.random.Generator) -> list[Path]:
    """Concatenate clips in random order; return the file of each run."""
    clips = sorted(Path(esc10).rglob("*.ogg"))
    files = []
    for run in range(RUNS - 1):
        files.append(folder / f"run{run + 1}.flac")
        chosen = generator.choice(len(clips), round(VOLUMES * TR / 5), replace=False)
        waveform = np.concatenate([sp.load_audio(clips[index]).numpy() for index in chosen]) / 256
        soundfile.write(files[-1], waveform[: round(VOLUMES * TR * sp.SAMPLE_RATE)], sp.SAMPLE_RATE)
    return [*files, files[-1]]


def make_outputs(layers: list[str]) -> list[Output]:
    """Return (layer, response, share of signal) of each output."""
    kinds = [(response, share) for response in RESPONSES for share in SHARES]
    made = [(layer, *kinds[number % len(kinds)]) for layer in layers for number in range(PER_LAYER)]
    return made + [("none", "none", 0.0)] * (OUTPUTS - len(made))


def write_targets(
    model: sp.SoundNet,
    layers: list[str],
    files: list[Path],
    outputs: list[Output],
    folder: Path,
    generator: np.random.Generator,
) -> Path:
    """Write an array per run, and the table."""
    features = AlignedFeatures(model, layers, TR)
    weights = {
        layer: generator.normal(size=(model.architecture.layer(layer).channels, OUTPUTS)) for layer in layers
    }
    lines = ["file\ttargets\trun\n"]
    for run, file in enumerate(files, 1):
        rows, _ = features.extract(file)
        targets = generator.normal(size=(VOLUMES, OUTPUTS))
        for layer in layers:
            for name, response in RESPONSES.items():
                own = [i for i, output in enumerate(outputs) if output[:2] == (layer, name)]
                share = np.array([outputs[i][2] for i in own])
                signal = response.predictors(standardize(rows[layer]))[:VOLUMES] @ weights[layer][:, own]
                noise = targets[:, own] * np.sqrt(1 - share)
                targets[:, own] = noise + np.sqrt(share) * signal / signal.std(0)
        np.save(folder / f"run{run}.npy", targets.astype(np.float32))
        lines.append(f"{file.name}\trun{run}.npy\t{run}\n")
    table = folder / "runs.tsv"
    table.write_text("".join(lines))
    return table


def print_recovery(result: sp.EncodingResult, outputs: list[Output], layers: list[str]) -> None:
    """Print how well each layer's outputs are told from the others', and predicted."""
    for share in SHARES:
        print(f"\nshare of signal {share:.0%}: a perfect model has r = {share**0.5:.3f}")
        print("| made from | best layer is it | or next to it | r, lag | r, glover | ceiling |")
        print("|---|---:|---:|---:|---:|---:|")
        for number, layer in enumerate(layers):
            members = [i for i, own in enumerate(outputs) if own[0] == layer and own[2] == share]
            best = result.best_layer[members]
            r = {
                kind: result.correlation[number, [i for i in members if outputs[i][1] == kind]].mean()
                for kind in RESPONSES
            }
            print(
                f"| {layer} | {np.mean(best == number):.0%} | {np.mean(abs(best - number) <= 1):.0%} | "
                f"{r['lag']:.3f} | {r['glover']:.3f} | {np.mean(result.noise_ceiling[members]):.3f} |"
            )
    noise = result.correlation[:, -(OUTPUTS - PER_LAYER * len(layers)) :]
    print(f"\nnoise alone: r of all layers {noise.mean():.4f}, standard deviation {noise.std():.4f}")


def print_delays(model: sp.SoundNet, table: Path, outputs: list[Output]) -> None:
    """Fit single delays and response functions to outputs of one layer."""
    layer = "conv4"
    number = [i for i, own in enumerate(outputs) if own[0] == layer and own[2] == SHARES[0]]
    recordings = [
        sp.Recording(own.sound, own.targets[:, number], own.run) for own in sp.read_recordings(table)
    ]
    print(f"\nmean r of {layer}'s outputs, by model of the response")
    print(f"| model | made with lag {LAG} | glover |\n|---|---:|---:|")
    models = [{"delays": [delay]} for delay in range(7)] + [{"hrf": "glover"}, {"hrf": "spm"}, {}]
    kinds = np.array([outputs[i][1] for i in number])
    for settings in models:
        result = sp.fit_encoding_models(model, recordings, tr=TR, layers=[layer], **settings)
        r = result.correlation[0]
        name = settings.get("hrf") or f"delays {', '.join(map(str, result.settings['delays']))}"
        print(f"| {name} | {r[kinds == 'lag'].mean():.3f} | {r[kinds == 'glover'].mean():.3f} |", flush=True)


def print_finetuning(model: sp.SoundNet, files: list[Path], folder: Path) -> None:
    """Fine-tune to brains of the network and of a changed one, and print the held-out run's correlations."""
    changed, noise = deepcopy(model), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name in ("conv4", "conv5"):
            weight = changed.get_submodule(name).weight
            weight += weight.std() * torch.randn(weight.shape, generator=noise)
    print("| brain | encode | its own network | ridge, at the start | fine-tuned | epoch | time |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for name, network in (("same", model), ("changed", changed)):
        generator = np.random.default_rng(0)
        features, recordings = AlignedFeatures(network, ["pool5"], TR), []
        mixing = generator.normal(size=(network.architecture.layer("pool5").channels, OUTPUTS))
        for number, file in enumerate(files, 1):
            rows = standardize(features.extract(file)[0]["pool5"])
            signal = RESPONSES["lag"].predictors(rows)[:VOLUMES] @ mixing
            targets = signal / signal.std(0) + generator.normal(size=signal.shape)
            recordings.append(sp.Recording(file, targets.astype(np.float32), str(number)))
        bounds = [
            np.median(
                sp.fit_encoding_models(own, recordings, tr=TR, layers=["pool5"]).fold_correlation[0, -1]
            )
            for own in (model, network)
        ]
        result = sp.finetune_encoding(
            recordings,
            folder / f"finetuned-{name}",
            tr=TR,
            weights=model,
            test=recordings[-1].run,
            progress=lambda step: step.unit == "epoch" and print(f"  {step.done} {step.note}", flush=True),
        )
        medians = [np.median(scores.correlation) for scores in (result.ridge, result.finetuned)]
        print(
            f"| {name} | {bounds[0]:.3f} | {bounds[1]:.3f} | {medians[0]:.3f} | {medians[1]:.3f} | "
            f"{result.epoch} | {result.seconds:.0f} s |",
            flush=True,
        )


def main(esc10: str, out: str, weights: str = "soundnet8") -> None:
    """Write the recordings, fit, and print."""
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    model = sp.load_pretrained(weights)
    layers = default_layers(model.architecture)
    outputs = make_outputs(layers)
    files = write_sounds(esc10, folder, generator)
    if "--finetune" in sys.argv:
        print_finetuning(model, files[: RUNS - 1], folder)
        return
    start = time.monotonic()
    table = write_targets(model, layers, files, outputs, folder, generator)
    print(f"targets written in {time.monotonic() - start:.0f} s", flush=True)
    before = resource.getrusage(resource.RUSAGE_SELF)
    for cache in (folder / "cache", folder / "cache"):
        start, processor = time.monotonic(), time.process_time()
        result = sp.fit_encoding_models(
            model, table, tr=TR, cache=cache, progress=lambda step: step.done % 13 or print(step, flush=True)
        )
        print(
            f"features {result.seconds['features']:.1f} s, ridge {result.seconds['ridge']:.1f} s, elapsed "
            f"{time.monotonic() - start:.0f} s, processor {time.process_time() - processor:.0f} s",
            flush=True,
        )
        if "--once" in sys.argv:
            break
    after = resource.getrusage(resource.RUSAGE_SELF)
    print(f"peak memory {after.ru_maxrss / 1024:.0f} MB, before the fit {before.ru_maxrss / 1024:.0f} MB\n")
    print(format_encoding(result))
    write_encoding(result, folder / "results")
    print_recovery(result, outputs, layers)
    print_delays(model, table, outputs)


if __name__ == "__main__":
    main(*[argument for argument in sys.argv[1:] if not argument.startswith("--")])
