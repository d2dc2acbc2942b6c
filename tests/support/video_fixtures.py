"""Write videos and image classifiers for tests; each frame of a video has its own color."""

from fractions import Fraction

import numpy as np
import torch


def frame_color(number):
    """Return a frame's RGB color; neighbors differ by more than a codec loses."""
    return (17 * number % 256, 101 * number % 256, 40 * (number // 50))


def write_video(
    path,
    times,
    *,
    codec="libx264",
    gop=12,
    rotation=0,
    sound=None,
    sound_start=0.0,
    only=None,
):
    """Write a video whose frame k is shown from times[k] on, in seconds with three digits.

    `sound` is the sound's length in seconds; `only` is "frames", "sound" or None for both.
    """
    import av

    tick = Fraction(1, 1000)
    header_first = {"movflags": "faststart"} if str(path).endswith((".mp4", ".mov")) else {}
    with av.open(str(path), "w", options=header_first) as file:
        video = audio = None
        if only != "sound":
            video = file.add_stream(codec, rate=10)
            video.width, video.height = 64, 48
            video.pix_fmt = "yuv420p"
            video.gop_size = gop
            if codec != "mpeg4":  # which counts frames
                video.codec_context.time_base = tick
            if codec == "libx264":
                video.options = {"crf": "4", "preset": "ultrafast"}
            if rotation:
                video.set_display_rotation(rotation)
        if only != "frames":
            audio = file.add_stream("aac", rate=22_050, layout="mono")
        packets = []
        for number, seconds in enumerate(times if video else ()):
            image = np.full((48, 64, 3), frame_color(number), np.uint8)
            image[:24] //= 2  # so that up is up
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.time_base = Fraction(1, 10) if codec == "mpeg4" else tick
            frame.pts = round(seconds / frame.time_base)
            packets += video.encode(frame)
        if video:
            packets += video.encode()
        if audio:
            seconds = sound or times[-1] + 0.1
            noise = np.random.default_rng(0).integers(-3000, 3000, (1, int(22_050 * seconds)), np.int16)
            samples = av.AudioFrame.from_ndarray(noise, format="s16", layout="mono")
            samples.sample_rate = 22_050
            samples.time_base = Fraction(1, 22_050)
            samples.pts = round(sound_start * 22_050)
            packets += [*audio.encode(samples), *audio.encode()]
        for packet in sorted(packets, key=lambda packet: packet.dts * packet.time_base):
            file.mux(packet)


def write_classifier(folder, seed=0, labels=("cat", "dog", "bus"), size=32, cls=None, **settings):
    """Write a classifier of a few thousand parameters, with its preprocessor."""
    import transformers
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    torch.manual_seed(seed)
    config = transformers.ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16],
        depths=[1, 1],
        layer_type="basic",
        id2label=dict(enumerate(labels)),
        label2id={label: index for index, label in enumerate(labels)},
        **settings,
    )
    (cls or transformers.ResNetForImageClassification)(config).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": size, "width": size}).save_pretrained(folder)
    return folder
