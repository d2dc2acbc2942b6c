"""Makes films and image classifiers for tests; each frame of a film has a colour of its own."""

from fractions import Fraction

import numpy as np
import torch


def colour(number):
    """Of a frame; neighbours differ by more than what a codec loses."""
    return (17 * number % 256, 101 * number % 256, 40 * (number // 50))


def write_film(
    path,
    times,
    *,
    codec="libx264",
    gop=12,
    rotation=0,
    sound=None,
    sound_begins=0.0,
    only=None,
):
    """Frame k is shown from times[k] on, in seconds with three digits; `sound` lasts so many seconds."""
    import av

    tick = Fraction(1, 1000)
    header_first = {"movflags": "faststart"} if str(path).endswith((".mp4", ".mov")) else {}
    with av.open(str(path), "w", options=header_first) as out:
        pictures = audio = None
        if only != "sound":
            pictures = out.add_stream(codec, rate=10)
            pictures.width, pictures.height = 64, 48
            pictures.pix_fmt = "yuv420p"
            pictures.gop_size = gop
            if codec != "mpeg4":  # which counts frames
                pictures.codec_context.time_base = tick
            if codec == "libx264":
                pictures.options = {"crf": "4", "preset": "ultrafast"}
            if rotation:
                pictures.set_display_rotation(rotation)
        if only != "pictures":
            audio = out.add_stream("aac", rate=22_050, layout="mono")
        packets = []
        for number, seconds in enumerate(times if pictures else ()):
            image = np.full((48, 64, 3), colour(number), np.uint8)
            image[:24] //= 2  # so that up is up
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.time_base = Fraction(1, 10) if codec == "mpeg4" else tick
            frame.pts = round(seconds / frame.time_base)
            packets += pictures.encode(frame)
        if pictures:
            packets += pictures.encode()
        if audio:
            seconds = sound or times[-1] + 0.1
            noise = np.random.default_rng(0).integers(-3000, 3000, (1, int(22_050 * seconds)), np.int16)
            heard = av.AudioFrame.from_ndarray(noise, format="s16", layout="mono")
            heard.sample_rate = 22_050
            heard.time_base = Fraction(1, 22_050)
            heard.pts = round(sound_begins * 22_050)
            packets += [*audio.encode(heard), *audio.encode()]
        for packet in sorted(packets, key=lambda packet: packet.dts * packet.time_base):
            out.mux(packet)


def write_classifier(folder, seed=0, labels=("cat", "dog", "bus"), size=32, cls=None, **settings):
    """A classifier of a few thousand parameters, with what comes before it."""
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
