"""Files as the code of EDM and of torch writes them, without either."""

import io
import pickle
import zipfile
from collections import OrderedDict

MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
SOURCE = ""  # of a snapshot's classes
STORAGE = {"float32": "FloatStorage", "float16": "HalfStorage", "float64": "DoubleStorage"}
STORAGE |= {"int64": "LongStorage", "bfloat16": "BFloat16Storage"}


class Name:
    """A class or a function of a module that need not exist."""

    def __init__(self, name):
        self.name = name

    def __call__(self, *_):
        raise AssertionError("a pickle does not call what it names")


class Call:
    """What unpickles as a function of arguments."""

    def __init__(self, function, *args, state=None):
        self.reduced = Name(function), args, state

    def __reduce__(self):
        return self.reduced


class Stored:
    """A storage, pickled by its key."""

    def __init__(self, array):
        self.array = array


class Pickler(pickle._Pickler):
    """Writes names as they are, and the storages' keys in place of `Stored`."""

    def __init__(self, file, protocol=4):
        super().__init__(file, protocol)
        self.storages, self.keys = {}, {}

    def save(self, obj, *args, **kwargs):
        if isinstance(obj, Name):
            module, _, name = obj.name.rpartition(".")
            self.write(f"c{module}\n{name}\n".encode())
        else:
            super().save(obj, *args, **kwargs)

    def persistent_id(self, obj):
        if not isinstance(obj, Stored):
            return None
        key = self.keys.setdefault(id(obj), str(len(self.keys)))
        self.storages[key] = obj.array
        kind = Name(f"torch.{STORAGE[obj.array.dtype.name]}")
        return "storage", kind, key, "cpu", obj.array.size


def pickled(thing, protocol=4):
    file = io.BytesIO()
    Pickler(file, protocol).dump(thing)
    return file.getvalue()


def tensor(array, storage=None, offset=0, stride=None):
    """An array as torch's, perhaps a view of a storage that other tensors share."""
    stride = [s // array.itemsize for s in array.strides] if stride is None else stride
    storage = storage or Stored(array.ravel())
    function = "torch._utils._rebuild_tensor_v2"
    return Call(function, storage, offset, array.shape, tuple(stride), False, OrderedDict())


def legacy(thing):
    """What torch.save wrote before its zips."""
    file = io.BytesIO()
    for head in (MAGIC, PROTOCOL, {"protocol_version": PROTOCOL, "little_endian": True}):
        Pickler(file, 2).dump(head)
    pickler = Pickler(file, 2)
    pickler.dump(thing)
    Pickler(file, 2).dump([*pickler.storages])
    for array in pickler.storages.values():
        file.write(array.size.to_bytes(8, "little") + array.tobytes())
    return file.getvalue()


def zipped(thing, order=b"little", compression=zipfile.ZIP_STORED):
    """What torch.save writes."""
    file, main = io.BytesIO(), io.BytesIO()
    pickler = Pickler(main, 2)
    pickler.dump(thing)
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.writestr("archive/data.pkl", main.getvalue())
        archive.writestr("archive/byteorder", order)
        for key, array in pickler.storages.items():
            archive.writestr(f"archive/data/{key}", array.tobytes())
    return file.getvalue()


def persistent(name, state):
    """An object of EDM's own classes."""
    meta = {"type": "class", "version": 6, "module_src": SOURCE, "class_name": name, "state": state}
    return Call("torch_utils.persistence._reconstruct_persistent_obj", meta)


def module(tree, **state):
    """The state of a torch module: arrays and modules by their names."""
    kept = {"_parameters": {}, "_buffers": {}, "_modules": {}}
    for key, value in tree.items():
        if isinstance(value, dict):
            name, inside = "torch.nn.modules.container.ModuleDict", module(value)
            layer = any(not isinstance(part, dict) for part in value.values())
            kept["_modules"][key] = (
                persistent("Layer", inside) if layer else Call(name, state=inside)
            )
        else:
            storage = Call("torch.storage._load_from_bytes", legacy(Stored(value.ravel())))
            is_buffer = key in ("freqs", "resample_filter")
            whole = tensor(value, storage)
            if not is_buffer:
                whole = Call("torch._utils._rebuild_parameter", whole, False, OrderedDict())
            kept["_buffers" if is_buffer else "_parameters"][key] = whole
    return {"training": False, "_backward_hooks": OrderedDict(), **kept, **state}


def snapshot(config, arrays):
    """EDM's file of a network that `edm_reference.py` describes; arrays by their names."""
    tree = {}
    for key, array in arrays.items():
        *path, leaf = key.split(".")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[leaf] = array
    kept = {"_init_args": (), "_init_kwargs": config["arguments"]}
    outer = module({}, **config["state"])
    outer["_modules"] = {"model": persistent(config["model"], module(tree["model"], **kept))}
    loss = persistent("EDMLoss", {"P_mean": -1.2, "seen": {"a", "b"}})
    scalar = Call("numpy.core.multiarray.scalar", Call("numpy.dtype", "f8", False, True), bytes(8))
    augment = persistent("AugmentPipe", {"p": 0.12, "scale": scalar})
    options = Call("dnnlib.util.EasyDict")
    ema = persistent(config["class"], outer)
    return pickled({"ema": ema, "loss_fn": loss, "augment_pipe": augment, "options": options})
