"""Distillation: runs, also interrupted and in several processes."""

import multiprocessing
import os
import signal
import socket

import numpy as np
import pytest
import soundfile
import torch
from support.cli_processes import run_at_once
from support.distillation import HEADS, LABELS, NARROW, WIDTHS, read_log, write_manifest

import soundnet_port as sp
from soundnet_port.cli.main import main
from soundnet_port.learning import training_loop
from soundnet_port.learning.augmentation import Augmentation
from soundnet_port.learning.distillation import (
    TrainConfig,
    create_adam,
    distillation_loss,
    set_torch7_eps,
)
from soundnet_port.learning.distillation_data import open_distillation_data
from soundnet_port.learning.distillation_examples import (
    DistillationExamples,
    ResumableBatchSampler,
)
from soundnet_port.learning.errors import TrainingError
from soundnet_port.learning.randomness import INITIALIZATION, derive_rng, initialize
from soundnet_port.learning.run_files import load_checkpoint
from soundnet_port.learning.training import train
from soundnet_port.network.architecture import SOUNDNET8
from soundnet_port.network.model import SoundNet
from soundnet_port.network.weights import read_metadata, read_weights

pytestmark = pytest.mark.usefixtures("one_thread")


def run(data, folder, progress=None, **changes):
    """Run with validation, augmentation, a checkpoint every 3 steps and decoding in another process."""
    config = TrainConfig(
        iterations=changes.pop("iterations", 7),
        batch=2,
        seed=3,
        augmentation=Augmentation(gain=6, shift=0.5, mix=0.5),
    )
    options = {"workers": 1, "save_every": 3, "validate_every": 5, "validation": data} | changes
    return train(data, folder, weights=NARROW, config=config, device="cpu", progress=progress, **options)


def run_until_killed(data, folder):
    def kill(progress):
        if progress.done == 5:  # after a checkpoint and a validation
            os.kill(os.getpid(), signal.SIGKILL)

    run(data, folder, kill)


def test_a_killed_and_resumed_run_equals_an_uninterrupted_one(clips, tmp_path, monkeypatch):
    # its decoding process holds the lock until it notices
    monkeypatch.setattr("torch.utils.data._utils.worker.MP_STATUS_CHECK_INTERVAL", 0.1)
    uninterrupted = run(clips, tmp_path / "uninterrupted")
    # CUDA cannot be used in a forked process, which starts at once
    start = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "fork")
    process = start.Process(target=run_until_killed, args=(clips, tmp_path / "broken"))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    before = read_log(tmp_path / "broken")
    assert load_checkpoint(tmp_path / "broken" / "checkpoint.pt")["step"] == 3 < len(before) == 5
    resumed = run(clips, tmp_path / "broken")
    assert read_log(tmp_path / "broken")[:5] == before
    for name in ("log.csv", "weights.safetensors"):
        assert (tmp_path / "broken" / name).read_bytes() == (
            tmp_path / "uninterrupted" / name
        ).read_bytes(), name
    assert (resumed.step, resumed.best, resumed.validation) == (
        uninterrupted.step,
        uninterrupted.best,
        uninterrupted.validation,
    )


def test_an_interrupted_run_resumes_to_more_iterations(clips, tmp_path, monkeypatch):
    monkeypatch.setattr(training_loop, "_LOG_EVERY", 3)

    def interrupt(progress):
        if progress.done == 3:
            os.kill(os.getpid(), signal.SIGINT)

    options = {"validation": None, "workers": 0, "save_every": 1000}
    stopped = run(clips, tmp_path / "run", interrupt, **options)
    assert stopped.interrupted
    assert load_checkpoint(tmp_path / "run" / "checkpoint.pt")["step"] == stopped.step < 7
    longer = run(clips, tmp_path / "run", iterations=8, **options)
    run(clips, tmp_path / "uninterrupted", iterations=8, **options)
    assert (longer.step, longer.interrupted) == (8, False)
    assert (tmp_path / "run" / "log.csv").read_bytes() == (
        tmp_path / "uninterrupted" / "log.csv"
    ).read_bytes()
    (tmp_path / "run" / "checkpoint.pt").write_bytes(b"PK nothing")
    with pytest.raises(TrainingError, match=r"checkpoint\.pt: damaged"):
        run(clips, tmp_path / "run", **options)


def test_a_small_network_memorizes_a_few_clips(tmp_path):
    data = write_manifest(tmp_path, steps=(1, 1), short=0.0)
    architecture = SOUNDNET8.resized((2, 4, 8, 8, 8, 8, 32), SOUNDNET8.head_sizes)
    result = train(
        data,
        tmp_path / "run",
        weights=architecture,
        config=TrainConfig(iterations=25, batch=2, lr=0.03),
        device="cpu",
    )
    first, last = (read_log(tmp_path / "run")[i] for i in (0, -1))
    assert float(last["objects"]) < 0.05 < 0.4 < float(first["objects"])
    assert float(last["scenes"]) < 0.05
    assert result.loss == float(last["loss"])


def test_slow_steps_are_logged_before_ten_of_them(clips, tmp_path, monkeypatch):
    monkeypatch.setattr(training_loop, "_LOG_SECONDS", 0)
    reports = []
    options = {"iterations": 3, "workers": 0, "validation": None}
    run(clips, tmp_path / "slow", progress=reports.append, **options)
    assert [report.done for report in reports] == [0, 1, 2, 3]
    assert reports[0].message == f"{tmp_path / 'slow'}: soundnet8 on 5 sounds, 3 steps of 2 on cpu"
    assert all(report.loss is not None for report in reports[1:])
    monkeypatch.setattr(training_loop, "_LOG_SECONDS", 1e9)
    run(clips, tmp_path / "fast", **options)
    assert (tmp_path / "slow" / "log.csv").read_bytes() == (tmp_path / "fast" / "log.csv").read_bytes()


def test_quiet_files_are_not_taken_for_waveforms_at_another_scale(tmp_path):
    """Warnings are errors here; a tensor as quiet would cause one."""
    data = write_manifest(tmp_path, steps=(1, 1))
    for path in tmp_path.glob("*.wav"):
        samples, rate = soundfile.read(path)
        soundfile.write(path, samples / 256, rate, subtype="FLOAT")
    train(data, tmp_path / "run", weights=NARROW, config=TrainConfig(iterations=2, batch=2), device="cpu")


def test_validation_figures_are_those_of_the_written_weights(clips, tmp_path):
    """Compute them from the weights in evaluation mode, in numpy."""
    result = run(clips, tmp_path, iterations=3, validate_every=2, workers=0)
    architecture, state, _ = read_weights(result.weights)
    model = SoundNet(architecture)
    model.load_state_dict(state, strict=False)
    model.use_engine = False
    data = open_distillation_data(clips)
    examples = DistillationExamples(data, None)
    divergence = {head: [] for head in LABELS}
    top1 = []
    for i in range(5):
        example = examples[0, i]
        with torch.no_grad():
            logits = model.eval()(example["waveform"])
        for head in LABELS:
            p = torch.softmax(getattr(logits, head)[0].double(), 0).numpy().T
            t = example["targets"][head].double().numpy()
            divergence[head].append((t * np.log(np.where(t > 0, t / p, 1))).sum(1).mean())
            if head == "objects":
                top1.append((p.argmax(1) == t.argmax(1)).mean())
    for head in LABELS:
        assert result.validation[head] == pytest.approx(np.mean(divergence[head]), rel=1e-4)
    assert result.validation["objects top 1"] == pytest.approx(np.mean(top1))


@pytest.fixture(scope="module")
def two_processes(clips, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    config = TrainConfig(iterations=3, batch=4, seed=2)
    train(clips, folder, weights=NARROW, config=config, device="cpu", devices=2, save_every=2)
    return folder


def test_torchruns_processes_do_the_same_and_one_reports(clips, two_processes, tmp_path):
    """It starts the command in every process, and numbers them in the environment."""
    command = f"train {clips} -o {tmp_path / 'run'} --iterations 3 --batch 4 --seed 2 --save-every 2"
    settings = f"--widths {','.join(map(str, WIDTHS))} --device cpu --devices 2"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    environments = [
        rendezvous
        | {"RANK": str(rank), "LOCAL_RANK": str(rank), "TORCHELASTIC_RUN_ID": "a", "GROUP_RANK": "0"}
        for rank in range(2)
    ]
    outputs = [tmp_path / "first", tmp_path / "second"]
    codes = run_at_once([[*command.split(), *settings.split()]] * 2, outputs, environments)
    texts = [path.read_text() for path in outputs]
    assert codes == [0, 0], texts
    assert (tmp_path / "run" / "log.csv").read_bytes() == (two_processes / "log.csv").read_bytes()
    assert ["weights.safetensors: step 3 of 3" in text for text in texts] == [True, False]


def test_two_processes_equal_one_that_averages_the_gradients_of_two_halves(clips, two_processes):
    """With batch-norm statistics of each half; the running ones are those of the first process."""
    config = TrainConfig(iterations=3, batch=4, seed=2)
    data = open_distillation_data(clips)
    examples = DistillationExamples(data, config)
    model = SoundNet(NARROW.resized(WIDTHS, HEADS))
    model.fast_gradients = True  # as the processes compute
    initialize(model, derive_rng(2, INITIALIZATION))
    model.train()
    optimizer = create_adam(model, config)
    losses = []
    for step, batch in enumerate(ResumableBatchSampler(5, config), 1):
        optimizer.zero_grad()
        running, loss = None, 0.0
        for half in (batch[:2], batch[2:]):
            batch_examples = [examples[key] for key in half]
            targets = {
                head: torch.stack([example["targets"][head] for example in batch_examples]) for head in LABELS
            }
            buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
            waveforms = torch.stack([example["waveform"] for example in batch_examples])
            half_loss, _ = distillation_loss(model(waveforms), targets, config)
            (half_loss / 2).backward()
            loss += half_loss.item() / 2
            if running is None:
                running = {name: buffer.clone() for name, buffer in model.named_buffers()}
                model.load_state_dict(buffers, strict=False)
        model.load_state_dict(running, strict=False)
        set_torch7_eps(optimizer, config, step)
        optimizer.step()
        losses.append(loss)
    # float32 sums in another order; Adam's first steps divide gradients by their own size
    assert [float(row["loss"]) for row in read_log(two_processes)] == pytest.approx(losses, rel=1e-4)
    _, state, _ = read_weights(two_processes / "weights.safetensors")
    for name, tensor in state.items():
        largest = float(model.state_dict()[name].abs().max())
        if not (name.startswith("conv") and name.endswith("bias")):  # gradients of rounding alone
            assert float((tensor - model.state_dict()[name]).abs().max()) <= 1e-3 * largest, name


def test_invalid_options_are_refused_in_a_line(clips, tmp_path, capsys):
    begin = ["train", str(clips), "-o", str(tmp_path / "run"), "--device", "cpu"]
    for extra, message in (
        ("--batch 0", "batch must be at least 1"),
        ("--lr nan", "lr must be"),
        ("--widths 3,4", "soundnet8 has 7 blocks"),
        ("--widths a", "--widths"),
        ("--teacher things=2", "no teacher things"),
        ("--precision 7", "unknown precision"),
        ("--gain -3", "gain must be"),
        ("--weights nowhere", "no weights named"),
        ("--weights x --architecture soundnet5", "leave out --architecture"),
        ("--devices 2 --batch 3", "cannot be shared by 2 devices"),
        ("--validation nowhere.tsv", "nowhere.tsv: no such file"),
    ):
        assert main([*begin, *extra.split()]) == 2, extra
        assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_training_starts_from_weights_and_heads_of_other_sizes_start_anew(clips, tmp_path):
    first = run(clips, tmp_path / "first", iterations=2, workers=0)
    others = write_manifest(tmp_path / "others", steps=(1, 1), heads={"objects": 5, "scenes": 4})
    started = tmp_path / "second"
    train(
        others,
        started,
        weights=first.weights,
        config=TrainConfig(iterations=1, batch=2, lr=1e-9),
        device="cpu",
    )
    _, before, _ = read_weights(first.weights)
    architecture, after, _ = read_weights(started / "weights.safetensors")
    assert architecture.head_sizes == {"objects": 5, "scenes": 4}
    assert architecture.widths == WIDTHS
    for name in ("conv1.weight", "bn7.weight", "objects.weight"):
        assert torch.allclose(before[name], after[name], atol=1e-6), name


def test_a_network_its_weights_file_and_its_architecture_are_all_initial_weights(clips, tmp_path):
    result = run(clips, tmp_path / "first", iterations=1, workers=0, validation=None)
    model = sp.load_pretrained(result.weights)
    config = TrainConfig(iterations=1, batch=2)
    one, two, other = (
        train(clips, tmp_path / name, weights=weights, config=config, device="cpu").weights
        for name, weights in (("file", result.weights), ("model", model), ("random", model.architecture))
    )
    assert one.read_bytes() == two.read_bytes()
    assert read_metadata(one)["training"]["start"] == read_metadata(result.weights)["sha256"]
    assert read_metadata(other)["training"]["start"] is None
    with pytest.raises(TrainingError, match="no heads objects and scenes"):
        train(clips, tmp_path / "classes", weights=NARROW.with_classes(3, "conv7"), device="cpu")


def test_training_leaves_the_callers_process_as_it_is(clips, tmp_path, monkeypatch):
    monkeypatch.setattr(training_loop, "keep_freed_memory", lambda: pytest.fail("called"))
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    run(clips, tmp_path, iterations=2, validate_every=1)
    assert torch.equal(torch.rand(3), expected)


def test_progress_has_losses_and_messages_worth_keeping(clips, tmp_path):
    data = open_distillation_data(clips)
    data._rows[0][0] = tmp_path / "missing.wav"
    reports = []
    run(data, tmp_path / "run", reports.append, iterations=4, workers=0, validate_every=2, save_every=2)
    assert {(report.total, report.unit) for report in reports} == {(4, "step")}
    assert [report.done for report in reports if report.validation] == [2, 4]
    for report in reports:
        assert report.note == ("" if report.loss is None else f"loss {report.loss:.5g}")
        if report.validation:
            assert report.message.startswith(f"step {report.done}: {report.note}; validation loss ")
    (message,) = [report.message for report in reports if "silence" in report.message]
    assert message.startswith(f"{tmp_path / 'missing.wav'}: ")
    assert message.endswith("; it is silence in this training")
