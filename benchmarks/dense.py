"""Memory and time of segmenting one large picture with BEiT-B and UPerNet on the CPU: python benchmarks/dense.py

Untrained strong weights; each line is a process of its own. `--plain` also holds the whole thing in float32 at the
picture's full size (10 GB and more) and counts the pixels that differ.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

SCALES = {
    "one scale": [1.0],
    "two scales": [0.5, 1.0],
    "six scales, flipped": [0.5, 0.75, 1.0, 1.25, 1.5, 1.75],
}


def measure(name: str, height: int, width: int, plain: bool) -> dict[str, float]:
    """Seconds, peak memory (GB) and, with `plain`, the share of pixels that differ from float32 at full size."""
    import torch
    from torch.nn import functional as F

    from beit_pretrain.dense import Sliding
    from beit_pretrain.models.beit import Beit
    from beit_pretrain.models.upernet import SegmentationHead

    torch.manual_seed(0)
    encoder = Beit(
        image_size=(512, 512), width=768, depth=12, heads=12, rel_pos="per_layer", mask_token=False
    ).eval()
    head = SegmentationHead(width=768, channels=768, classes=150).eval()
    for parameter in head.parameters():  # as drawn, logits would hardly differ from class to class
        if parameter.ndim == 4:
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    smooth = torch.rand(1, 3, height // 50, width // 50)
    image = (255 * F.interpolate(smooth, size=(height, width), mode="bicubic")[0].clamp(0, 1)).byte()

    def model(batch: torch.Tensor) -> torch.Tensor:
        tokens = encoder.features(batch / 127.5 - 1, [3, 5, 7, 11])
        return head([t[:, 1:].transpose(1, 2).unflatten(2, (32, 32)).contiguous() for t in tokens])

    sliding = Sliding(crop=(512, 512), patch_size=16, scales=SCALES[name], flip="flipped" in name)
    began = time.perf_counter()
    with torch.no_grad():
        predicted = sliding.predict(model, image)
    seconds = time.perf_counter() - began
    found = {"seconds": seconds, "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}
    if plain:
        with torch.no_grad():
            whole = plainly(model, image, sliding)
        found["differ"] = float((whole != predicted).float().mean())
    return found


def plainly(model, image, sliding):  # type: ignore[no-untyped-def]
    """The same by whole maps of logits at full size in float32, pass by pass."""
    import torch
    from torch.nn import functional as F
    from torchvision.transforms.v2.functional import resize

    size, total = image.shape[1:], torch.zeros(150, *image.shape[1:])
    for (h, w), weight in sliding.working_sizes(*size).items():
        for mirrored in (False, True) if sliding.flip else (False,):
            working = resize(image, [h, w], antialias=True)
            working = working.flip(-1) if mirrored else working
            logits, count = torch.zeros(150, h, w), torch.zeros(h, w)
            for top in sorted({min(y, h - 512) for y in range(0, h, 341)}):
                for left in sorted({min(x, w - 512) for x in range(0, w, 341)}):
                    window = model(working[None, :, top : top + 512, left : left + 512])
                    logits[:, top : top + 512, left : left + 512] += F.interpolate(
                        window, size=(512, 512), mode="bilinear"
                    )[0]
                    count[top : top + 512, left : left + 512] += 1
            logits = F.interpolate((logits / count)[None], size=size, mode="bilinear")[0]
            logits = logits.flip(-1) if mirrored else logits
            total += weight * logits.softmax(0) if len(sliding.scales) > 1 else logits
    return total.argmax(0).byte()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, nargs=2, default=(1500, 2000), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--plain", action="store_true", help="compare with float32 at full size")
    parser.add_argument("--only", choices=SCALES, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.only:
        print(json.dumps(measure(given.only, *given.size, given.plain)))
        return
    for name in SCALES:
        command = [sys.executable, __file__, "--only", name, "--size", *map(str, given.size)]
        done = subprocess.run(command + ["--plain"] * given.plain, capture_output=True, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        differ = f", {found['differ']:.2e} of the pixels differ" if given.plain else ""
        print(
            f"{given.size[1]} x {given.size[0]}, {name}: {found['seconds']:.0f} s, {found['peak_gb']:.2f} GB{differ}"
        )


if __name__ == "__main__":
    main()
