"""Write weights in the formats of other ports, for tests."""

import io
import struct

import numpy as np


def tensorflow_layers(state):
    """Return the TensorFlow port's dict: HWIO weights, batch norm beside its convolution."""
    names = {f"conv{i}": f"conv{i}" for i in range(1, 8)} | {"conv8": "objects", "conv8_2": "scenes"}
    result = {}
    for layer_name, ours in names.items():
        weight = state[f"{ours}.weight"].numpy()
        layer = {
            "weights": weight[..., None].transpose(2, 3, 1, 0),  # a view, in Fortran's order
            "biases": state[f"{ours}.bias"].numpy(),
        }
        norm = ours.replace("conv", "bn")
        if f"{norm}.weight" in state and norm != ours:
            fields = {"gamma": "weight", "beta": "bias", "mean": "running_mean", "var": "running_var"}
            layer |= {key: state[f"{norm}.{field}"].numpy() for key, field in fields.items()}
        result[layer_name] = layer
    return result


def python2_npy(layers, order="<"):
    """Return what np.save(path, layers) wrote under Python 2.7 and numpy 1.x: byte strings and protocol 2."""
    out = bytearray(b"\x80\x02")

    def string(raw):
        out.extend(
            b"U" + bytes([len(raw)]) + raw if len(raw) < 256 else b"T" + struct.pack("<i", len(raw)) + raw
        )

    def number(value):
        out.extend(b"K" + bytes([value]) if value < 256 else b"J" + struct.pack("<i", value))

    def array(shape, code, data, order=b"<", fortran=False):
        out.extend(b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R")
        out.extend(b"(K\x01(")
        for size in shape:
            number(size)
        out.extend(b"tcnumpy\ndtype\n")
        string(code)
        out.extend(b"K\x00K\x01\x87R(K\x03")
        string(order)
        out.extend(b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb" + (b"\x88" if fortran else b"\x89"))
        data()
        out.extend(b"tb")

    def contents():
        out.extend(b"]}(")
        for name, layer in sorted(layers.items(), reverse=True):  # Python 2's order is anything
            string(name.encode())
            out.extend(b"}(")
            for key, values in layer.items():
                string(key.encode())
                fortran = values.flags.f_contiguous and not values.flags.c_contiguous
                raw = values.astype(f"{order}f4").tobytes("F" if fortran else "C")
                array(values.shape, b"f4", lambda raw=raw: string(raw), order.encode(), fortran)
            out.extend(b"u")
        out.extend(b"ua")

    array((), b"O8", contents, order=b"|")
    out.extend(b".")
    header = b"{'descr': '|O', 'fortran_order': False, 'shape': (), }"
    header += b" " * (-(len(header) + 11) % 16) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(out)


def modern_npy(layers):
    """Return what np.save writes today."""
    out = io.BytesIO()
    np.save(out, layers, allow_pickle=True)
    return out.getvalue()


def port_state_dict(state, rename):
    """Return a state dict in another port's naming, with 2D kernels."""
    result = {}
    for name, tensor in state.items():
        value = tensor[..., None] if tensor.ndim == 3 else tensor
        result[rename(name)] = value
    return result
