"""Makes a small colour data set for studies: cliparts by subject, in five folds, as one file of arrays.

    python data/make_openclipart.py --source=DIR [--out=data/openclipart.npz] [--size=32]

DIR holds PNG files in one folder per class (Debian's package openclipart-png, public domain, installs
/usr/share/openclipart/png). Classes with at least 130 images are kept, without a folder of near-duplicates. Each image
is cropped to what it draws, put on white, padded to a square and resized.

The file has the splits fold0 to fold4, which `data.train_split='fold1+fold2+fold3+fold4'` joins. Classes are in
proportion in each fold. Images that look alike, and series of one name, are in the same fold.
"""

import argparse
import collections
import re
from pathlib import Path

import numpy as np
from PIL import Image

Image.MAX_IMAGE_PIXELS = None  # one of them has 231 million
LEFT_OUT = ('unsorted', 'stars')  # 1,378 shapes are stars that differ in their rays
FOLDS = 5
LEAST = 130  # images of a class
THUMB = 16  # pixels per side of what is compared
ALIKE = 0.06  # root mean square difference of thumbnails in [0, 1], up to which two images look alike


def drawn(path: Path, size: int) -> np.ndarray | None:
    """An image as uint8 (size, size, 3); None for an empty one."""
    with Image.open(path) as image:
        image = image.convert('RGBA')
    white = Image.new('RGBA', image.size, 'white')
    white.alpha_composite(image)
    image = white.convert('RGB')
    rows, columns = np.nonzero((np.asarray(image) < 250).any(2))
    if not len(rows):
        return None
    image = image.crop((columns.min(), rows.min(), columns.max() + 1, rows.max() + 1))
    side = max(image.size)
    square = Image.new('RGB', (side, side), 'white')
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return np.asarray(square.resize((size, size), Image.Resampling.BICUBIC))


def groups_of(images: np.ndarray, names: list[str]) -> np.ndarray:
    """A number per image, int (n,), equal for those that look alike or have one name but for its numbers.

    Args:
      images: uint8 (n, s, s, 3).
      names: of the files, with their folders.
    """
    parent = np.arange(len(images))

    def root(i):
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    def join(i, j):
        parent[root(i)] = root(j)

    series = {}
    for i, name in enumerate(names):
        join(i, series.setdefault(re.sub(r'[\d_]+$', '', name), i))
    thumbs = [np.asarray(Image.fromarray(x).resize((THUMB, THUMB), Image.Resampling.BOX)) for x in images]
    x = np.stack(thumbs).reshape(len(images), -1).astype(np.float32) / 255
    squares = (x * x).sum(1)
    for start in range(0, len(x), 512):
        part = x[start : start + 512]
        distance = squares[start : start + 512, None] + squares - 2 * part @ x.T
        for i, j in np.argwhere(distance <= ALIKE**2 * x.shape[1]):
            join(start + i, j)
    return np.array([root(i) for i in range(len(images))])


def folds_of(labels: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """A fold per image, int (n,): each group in one fold, large ones first, where its classes are the fewest."""
    members = collections.defaultdict(list)
    for i in np.random.default_rng(0).permutation(len(labels)):
        members[groups[i]].append(i)
    counts, folds = np.zeros((FOLDS, labels.max() + 1), int), np.empty(len(labels), int)
    for chosen in sorted(members.values(), key=len, reverse=True):
        own = np.bincount(labels[chosen], minlength=counts.shape[1])
        fold = int(np.argmin(counts @ (own / np.bincount(labels))))
        folds[chosen] = fold
        counts[fold] += own
    return folds


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--source', type=Path, required=True)
    parser.add_argument('--out', type=Path, default=Path('data/openclipart.npz'))
    parser.add_argument('--size', type=int, default=32)
    args = parser.parse_args()
    files = collections.defaultdict(list)
    for path in sorted(args.source.glob('*/**/*.png')):
        folders = path.relative_to(args.source).parts[:-1]
        if not set(folders) & set(LEFT_OUT):
            files[folders[0]].append(path)
    classes = [name for name, found in files.items() if len(found) >= LEAST]
    if not classes:
        parser.error(f'--source={args.source} has no folder with {LEAST} .png files')
    found = [(c, p, drawn(p, args.size)) for c, name in enumerate(classes) for p in files[name]]
    found = [row for row in found if row[2] is not None]
    labels = np.array([c for c, *_ in found], np.uint8)
    images = np.stack([x for *_, x in found])
    groups = groups_of(images, [str(p.relative_to(args.source).with_suffix('')) for _, p, _ in found])
    folds = folds_of(labels, groups)
    arrays = {'classes': np.array(classes)}
    for fold in range(FOLDS):
        arrays[f'fold{fold}_image'], arrays[f'fold{fold}_label'] = images[folds == fold], labels[folds == fold]
    np.savez_compressed(args.out, **arrays)
    sizes = np.bincount(np.unique(groups, return_inverse=True)[1])
    print(f'{len(images):,} images, {len(classes)} classes, {len(sizes):,} groups, the largest of {sizes.max()}')
    for c, name in enumerate(classes):
        print(f'  {name}: {np.bincount(folds[labels == c], minlength=FOLDS).tolist()}')


if __name__ == '__main__':
    main()
