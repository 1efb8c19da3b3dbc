"""A small BasicSR experiment: photographs in folders, a float checkpoint, an option file."""

import os
from copy import deepcopy
from pathlib import Path

import pytest
import skimage.data
import torch
import yaml

from condiquant_basicsr import build_network, matlab_downscale, write_image
from condiquant_basicsr.data.images import to_tensor, to_uint8

# isort: split
from basicsr.utils.lmdb_util import make_lmdb_from_imgs  # with the torchvision repaired above

OPTIONS = {
    "name": "exp", "model_type": "CondiQuantModel", "scale": 2, "num_gpu": "auto", "manual_seed": 0,
    "datasets": {
        "train": {
            "name": "Photos", "type": "PairedImageDataset", "io_backend": {"type": "disk"},
            "gt_size": 48, "use_hflip": True, "use_rot": True, "batch_size_per_gpu": 1,
            "num_worker_per_gpu": 0,
        },
        "val": {"name": "Tiny", "type": "PairedImageDataset", "io_backend": {"type": "disk"}},
    },
    "network_g": {
        "type": "EDSR", "num_in_ch": 3, "num_out_ch": 3, "num_feat": 16, "num_block": 2, "upscale": 2,
    },
    "path": {},
    "train": {
        "ema_decay": 0.9,
        "optim_g": {"type": "Adam", "lr": 1e-3, "betas": [0.9, 0.99]},
        "scheduler": {"type": "MultiStepLR", "milestones": [4], "gamma": 0.5},
        "total_iter": 3,
        "pixel_opt": {"type": "L1Loss", "loss_weight": 1.0, "reduction": "mean"},
    },
    "val": {
        "val_freq": 3, "save_img": False, "suffix": None,
        "metrics": {"psnr": {"type": "calculate_psnr", "crop_border": 2}},
    },
    "logger": {"print_freq": 1, "save_checkpoint_freq": 3, "use_tb_logger": False},
    "condiquant": {"scope": "all", "calibration_images": 4, "bounds": {"crops": 2}},
}  # fmt: skip


def real_options(file: str) -> dict:
    """One of BasicSR's own option files."""
    folder = os.environ.get("CONDIQUANT_DATA")
    if not folder:
        pytest.skip("set CONDIQUANT_DATA to a folder with basicsr_options")
    return yaml.safe_load((Path(folder) / "basicsr_options" / "train" / file).read_text())


class TrainingJob:
    """Folder with images and a checkpoint; ``write`` makes the option file."""

    def __init__(self, folder: Path, options: dict | None = None) -> None:
        self.folder, self.options = folder, deepcopy(options or OPTIONS)
        self.scale = self.options["scale"]
        photograph = torch.from_numpy(skimage.data.chelsea().copy()).permute(2, 0, 1) / 255
        side = self.options["datasets"]["train"]["gt_size"]
        self.write_images(
            "train", {n: photograph[:, k:, k:] for k, n in enumerate("ab")}, (side + 16, side + 16)
        )
        # NIQE takes blocks of 96x96 pixels, at least two.
        self.write_images(
            "val", {n: photograph[:, k:, 90:] for k, n in enumerate("cde")}, (108, 208)
        )
        for phase, section in self.options["datasets"].items():
            data = folder / phase.split("_")[0]
            section |= {"dataroot_gt": str(data / "HR"), "dataroot_lq": str(data / "LR")}
            section.pop("filename_tmpl", None)
            if "meta_info_file" in section:
                section["meta_info_file"] = str(folder / "meta_info.txt")
        section = self.options["datasets"]["train"]
        (folder / "meta_info.txt").write_text("a.png (64,64,3)\nb.png (64,64,3)\n")
        if section["io_backend"]["type"] == "lmdb":
            for key in ("dataroot_gt", "dataroot_lq"):
                source = Path(section[key])
                section[key] += ".lmdb"
                names = ["a.png", "b.png"]
                make_lmdb_from_imgs(str(source), section[key], names, ["a", "b"], map_size=2**24)
        section["num_worker_per_gpu"] = 0
        self.set_weights("net.pth")

    def write_images(self, phase: str, images: dict, size: tuple[int, int]) -> None:
        for name, image in images.items():
            hr = image[:, : size[0], : size[1]]
            lr = to_tensor(matlab_downscale(to_uint8(hr), self.scale))
            for kind, pixels in (("HR", hr), ("LR", lr)):
                (self.folder / phase / kind).mkdir(parents=True, exist_ok=True)
                write_image(self.folder / phase / kind / f"{name}.png", pixels)

    def set_weights(self, name: str) -> None:
        torch.manual_seed(0)
        network = build_network(self.options["network_g"])
        torch.save({"params": network.state_dict()}, self.folder / name)
        self.options["path"] |= {"pretrain_network_g": str(self.folder / name)}

    def write(self) -> Path:
        path = self.folder / "options.yml"
        path.write_text(yaml.safe_dump(self.options))
        return path

    @property
    def experiment(self) -> Path:
        return self.folder / "experiments" / self.options["name"]

    def checkpoint(self, name: int | str) -> dict:
        return torch.load(self.experiment / "models" / f"net_g_{name}.pth", weights_only=True)

    def log(self) -> str:
        """Of all runs of the experiment."""
        return "".join(p.read_text() for p in sorted(self.experiment.glob("train_*.log")))

    def forget_log(self) -> None:
        """Logs are named by the second: a second run within one has the name of the first."""
        for file in self.experiment.glob("train_*.log"):
            file.unlink()
