"""Reports of runs -> one Markdown table: python benchmarks/table.py runs/*/report.json"""

import json
import pathlib
import sys

COLUMNS = {
    "run": lambda r, path: path.parent.name,
    "mIoU": lambda r, path: f"{r['segmentation']['miou']:.3f}",
    "mask code alone": lambda r, path: f"{r['segmentation']['codec_ceiling_miou']:.3f}",
    "accuracy": lambda r, path: f"{r['segmentation']['pixel_accuracy']:.3f}",
    "re-segmentation": lambda r, path: f"{r['synthesis']['resegmentation_miou']:.3f}",
    "diversity": lambda r, path: f"{r['synthesis']['diversity']:.3f}",
    "training": lambda r, path: f"{r['train']['steps']} steps, {r['train']['seconds'] / 60:.0f} min",
    "images/s": lambda r, path: f"{r['train']['images_per_second']:.0f}",
    "wall": lambda r, path: f"{r['wall_seconds'] / 60:.1f} min",
    "command": lambda r, path: f"`python {r['command']}`",
}


def main(paths: list[str]) -> None:
    print("| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|")
    for path in map(pathlib.Path, paths):
        result = json.loads(path.read_text())
        print("| " + " | ".join(cell(result, path) for cell in COLUMNS.values()) + " |")


if __name__ == "__main__":
    main(sys.argv[1:])
